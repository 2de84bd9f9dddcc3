"""One message with descriptors: send_fds and recv_fds over a socket that is the caller's. Nothing is framed or pickled here."""

from __future__ import annotations

import _socket
import errno
from array import array
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

from fdpass import _syscall
from fdpass.errors import DescriptorsLostError
from fdpass.fds import OwnedFd, _new, kind_of, take
from fdpass.limits import lost_reason, soft_limit

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import Buffer


class HasFileno(Protocol):
    """Anything with a descriptor: a socket, a file, an OwnedFd."""

    def fileno(self) -> int:
        """The number, negative when closed."""
        ...


class Message(NamedTuple):
    """What recv_fds returns; unpacks as (data, fds, flags, address), as socket.recv_fds does.

    data: the bytes, empty at the end of the stream. fds: owners, in the order they were sent. flags: MSG_TRUNC and the like.
    address: the sender's name (path, or bytes for an abstract one), None when it has none.
    """

    data: bytes
    fds: list[OwnedFd]
    flags: int
    address: str | bytes | None


_AF_UNIX, _SOCK_STREAM, _SOCK_SEQPACKET = _socket.AF_UNIX, _socket.SOCK_STREAM, getattr(_socket, "SOCK_SEQPACKET", -1)
# The bare member: socket.socket.family builds an enum member at each access.
_family: Any = _socket.socket.family.__get__
_socket_type = _socket.socket
_message = tuple.__new__
_MAX_FDS = _syscall.MAX_FDS
_pool, _Scratch, _PLAIN, _FIRST = _syscall.pool, _syscall.Scratch, _syscall.PLAIN, _syscall.FIRST
_send_once, _send_one_once, _recv_once, _settle = _syscall.send_once, _syscall.send_one_once, _syscall.recv_once, _syscall.settle
_POOLED, _DONTWAIT = _syscall.POOLED, _socket.MSG_DONTWAIT


def send_fds(sock: HasFileno, buffers: Iterable[Buffer], fds: Iterable[int | HasFileno], flags: int = 0) -> int:
    """Sends the bytes of all buffers with the descriptors on their first byte: the call of socket.send_fds.

    sock:    an AF_UNIX socket; its timeout is honoured.
    buffers: bytes-like objects, any iterable; together at least one byte on a stream.
    fds:     at most 253 of int, or objects with fileno(); borrowed, they stay open here.
    flags:   of sendmsg(2).

    Returns the number of bytes sent, which may be less than given; the descriptors went with the first of them, so send
    only the rest of the bytes again. Raises TypeError and ValueError before any byte is sent, OSError with the kernel's
    errno (EBADF names the descriptor; ETOOMANYREFS: too many in flight for this user), TimeoutError, BlockingIOError.
    """
    if isinstance(sock, _socket_type) and _family(sock) == _AF_UNIX and (fd := sock.fileno()) >= 0:
        timeout = sock.gettimeout()
    else:
        fd, timeout = target(sock)
    parts = buffers if type(buffers) is list else _parts(buffers)
    data: Any = parts[0] if len(parts) == 1 else _joined(parts)
    if type(data) is not bytes and type(data) is not _syscall.Memory:
        memory = _flat(data)
        try:
            return send_fds(sock, [memory], fds, flags)
        finally:
            # cffi's pointer must not outlive the call in a traceback: the garbage collector crashes on it.
            _syscall.release(memory)
    # Per call, never F_SETFL: the flag would belong to every holder of the socket.
    per_call = flags if timeout is None else flags | _DONTWAIT
    if type(fds) is list and len(fds) == 1 and type(number := fds[0]) is int and number >= 0 and len(data):
        numbers: Any = fds
        code: int = _send_one_once(fd, data, len(data), number, per_call)
    else:
        items = fds if isinstance(fds, (list, tuple, array)) else list(fds)
        try:
            flat = array("i", items)
        except (TypeError, OverflowError):
            flat = array("i", [number_of(item) for item in items])
        if len(flat) > _MAX_FDS:
            raise ValueError(f"{len(flat)} descriptors in one message: the kernel passes {_MAX_FDS} at most; send them in several")
        if len(flat) and not len(data) and _is_stream(fd):
            raise ValueError("descriptors need at least one byte to travel with on a stream socket: an empty message would drop them")
        numbers = _syscall.as_ints(flat)
        code = _send_once(fd, data, len(data), numbers, len(numbers), per_call)
    if code >= 0:
        return code
    try:
        again = partial(_send_once, fd, data, len(data), numbers, len(numbers), per_call)
        return _settle(code, again, fd, True, flags, timeout, "sending a message")
    except OSError as error:
        _explain_send(error, list(numbers))
        raise


def recv_fds(sock: HasFileno, bufsize: int, maxfds: int, flags: int = 0) -> Message:
    """Receives one message: at most bufsize bytes and maxfds descriptors, all of them close-on-exec and numbered 3 or higher.

    Returns a Message, which unpacks as (data, fds, flags, address); every item of fds is an OwnedFd (.release() gives the int).
    Raises DescriptorsLostError when the kernel could not deliver all of them (table full, refused by a security module) or more
    than maxfds came: what did arrive has been closed, and .data holds the bytes. OSError, TimeoutError, BlockingIOError as recvmsg(2).
    """
    if isinstance(sock, _socket_type) and _family(sock) == _AF_UNIX and (fd := sock.fileno()) >= 0:
        timeout = sock.gettimeout()
    else:
        fd, timeout = target(sock)
    if maxfds < 0 or bufsize < 0:
        raise ValueError(f"bufsize and maxfds are 0 or more, not {bufsize} and {maxfds}")
    try:
        scratch = _pool.pop()
    except IndexError:
        scratch = _Scratch()
    message, ints = scratch.message, scratch.ints
    per_call = flags if timeout is None else flags | _DONTWAIT
    buffer = scratch.buffer if bufsize <= _POOLED else _syscall.buffer_of(bufsize)
    got: int = _recv_once(fd, buffer, bufsize, per_call, message)
    if got < 0:
        again = partial(_recv_once, fd, buffer, bufsize, per_call, message)
        got = _settle(got, again, fd, False, flags, timeout, "receiving a message")
    # With MSG_TRUNC among the flags a datagram's true length is returned, which may pass the buffer's.
    data = scratch.view[: got if got <= bufsize else bufsize] if bufsize <= _POOLED else _syscall.unpack(buffer, min(got, bufsize))
    if ints[_PLAIN] == 1 <= maxfds:
        owned = _new(OwnedFd)
        fds = [owned]
        # These two lines have no call between them: see Scratch.
        owned._fd = ints[_FIRST]
        ints[_FIRST] = -1
        _pool.append(scratch)
        # tuple.__new__ spares a detour through Python.
        return _message(Message, (data, fds, 0, None))
    count = message.nfds
    if message.dropped or count > maxfds:
        _lost(scratch, count, maxfds, data)
    result = Message(data, take(scratch), message.msg_flags, _syscall.address_of(message))
    _pool.append(scratch)
    return result


def target(sock: Any) -> tuple[int, float | None]:
    """Number and timeout (seconds, None for ever) of an AF_UNIX socket; refuses anything else, on which descriptors would be lost."""
    if isinstance(sock, _socket_type):
        fd = sock.fileno()
        if _family(sock) == _AF_UNIX and fd >= 0:
            return fd, sock.gettimeout()
        family: int | None = int(_family(sock))
    else:
        if type(sock) is not int and not hasattr(sock, "fileno"):
            raise TypeError(f"a socket is wanted, not {type(sock).__name__}")
        fd = sock if type(sock) is int else sock.fileno()
        info = _syscall.probe(fd) if fd >= 0 else None
        if info is not None and info.family == _AF_UNIX:
            return fd, sock.gettimeout() if hasattr(sock, "gettimeout") else None
        family = None if info is None else info.family
    if fd < 0:
        raise ValueError("the socket is closed")
    if family is None:
        raise ValueError(f"descriptor {fd} is {kind_of(fd)}; descriptors travel over an AF_UNIX socket only")
    name = {_socket.AF_INET: "AF_INET", _socket.AF_INET6: "AF_INET6"}.get(family, f"of family {family}")
    raise ValueError(f"the socket is {name}; descriptors travel over an AF_UNIX socket only, on any other the kernel loses them silently")


def number_of(item: Any) -> int:
    """The number behind an int or an object with fileno(). Raises TypeError, ValueError."""
    if isinstance(item, int):
        if not 0 <= item <= 0x7FFFFFFF:
            raise ValueError(f"{item} is not a descriptor: it is {'negative' if item < 0 else 'too large for an int of C'}")
        return int(item)
    if not hasattr(item, "fileno"):
        raise TypeError(f"a descriptor is an int or an object with fileno(), not {type(item).__name__}")
    number: int = item.fileno()
    if not isinstance(number, int) or number > 0x7FFFFFFF:
        raise TypeError(f"{item!r} has no descriptor: its fileno() gave {number!r}")
    if number < 0:
        raise ValueError(f"{item!r} is closed: it has no descriptor to send")
    return number


def _parts(buffers: Any) -> list[Any]:
    if isinstance(buffers, (bytes, bytearray, memoryview, str)):
        raise TypeError(f"buffers is an iterable of bytes-like objects, not {type(buffers).__name__}: write [data]")
    return buffers if type(buffers) is list else list(buffers)


def _joined(parts: list[Any]) -> bytes:
    try:
        return b"".join(parts)
    except TypeError:
        return b"".join([memoryview(part).tobytes() for part in parts])


def _flat(data: Any) -> Any:
    """A contiguous buffer of bytes that C can read; copies only what is not contiguous."""
    view = memoryview(data)
    return _syscall.as_memory(view.cast("B") if view.c_contiguous and view.nbytes else view.tobytes())


def _is_stream(fd: int) -> bool:
    info = _syscall.probe(fd)
    return info is not None and info.type == _SOCK_STREAM


def _explain_send(error: OSError, numbers: list[int]) -> None:
    """Adds to the kernel's bare errno what it does not say."""
    if error.errno == errno.EBADF:
        # The kernel looks at every number before it takes a byte, so looking here first would only cost time.
        if min(numbers, default=0) < 0:
            raise ValueError(f"{min(numbers)} is not a descriptor: it is negative; nothing was sent") from None
        for place, number in enumerate(numbers, 1):
            if kind_of(number) == "not open":
                error.strerror = f"descriptor {number} ({place} of {len(numbers)}) is not open; nothing was sent"
                break
    elif error.errno == errno.ETOOMANYREFS:
        error.strerror = (
            f"too many descriptors of this user are in flight (RLIMIT_NOFILE is {soft_limit()}); "
            f"sending {len(numbers)} more must wait until some are received"
        )
    elif error.errno == errno.EPERM and numbers:
        error.strerror = f"the receiver accepts no descriptors (SO_PASSRIGHTS is off), or a security module refused these {len(numbers)}"
    elif numbers:
        error.strerror = f"{error.strerror}, with {len(numbers)} descriptors"


def _lost(scratch: _syscall.Scratch, count: int, maxfds: int, data: bytes) -> NoReturn:
    if scratch.message.dropped:
        # The kernel tells that it dropped, never how many: at least one.
        reason, limit, number = lost_reason()
        text, needed = f"descriptors were lost: {count} arrived and at least one more was sent; {reason}", count + 1
    else:
        text, needed, limit, number = f"{count} descriptors arrived where maxfds allows {maxfds}", count, maxfds, 0
    _syscall.close_message(scratch.message)
    _pool.append(scratch)
    raise DescriptorsLostError(f"{text}; those that arrived were closed", needed, count, limit, data, number)


def why_no_passing() -> str | None:
    """Tries to pass a descriptor to this process itself; None when it works, else the reason in words."""
    if "no-passing" in _syscall.forced():
        return "FDPASS_FORCE says no-passing"
    try:
        left, right = _socket.socketpair(_AF_UNIX, _SOCK_STREAM)
    except OSError as error:
        return f"no socket pair: {error}"
    try:
        near, far = OwnedFd(left.detach()), OwnedFd(right.detach())
        with near, far:
            send_fds(near, [b"?"], [near])
            for owned in recv_fds(far, 1, 1).fds:
                owned.close()
    except OSError as error:
        return str(error)
    return None
