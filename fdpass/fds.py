"""OwnedFd: a descriptor with one owner. It knows nothing of messages, pickles or sockets' families."""

from __future__ import annotations

import _socket
import errno
import os
import stat
import sys
import warnings
from _socket import getdefaulttimeout
from itertools import repeat
from typing import IO, TYPE_CHECKING, Any

from fdpass import _syscall
from fdpass.errors import ClosedError, WrongDescriptorError

if TYPE_CHECKING:
    import socket
    from types import TracebackType
    from typing import Self

_close, _get_blocking = os.close, os.get_blocking
#: Whether a descriptor alone is enough to make a socket object from.
_DESCRIBES_ITSELF = hasattr(_socket, "SO_PROTOCOL")


class OwnedFd:
    """A file descriptor that exactly one object owns: close-on-exec, numbered 3 or higher, closed once.

    OwnedFd(fd) takes over a raw number: from then on nobody else may close it. A number below 3 is moved up.
    Forgotten (collected while open) it is closed with a ResourceWarning. After close() or release() fileno() is -1.
    Raises TypeError for anything but an int, ValueError for a negative one, OSError (EBADF) for one that is not open.
    """

    __slots__ = ("_fd",)
    _fd: int

    def __init__(self, fd: int) -> None:
        self._fd = -1
        if type(fd) is not int:
            raise TypeError(f"OwnedFd takes over a descriptor number (int), not {type(fd).__name__}; of a socket pass sock.detach()")
        if fd < 0:
            raise ValueError(f"a descriptor is 0 or more, not {fd}")
        self._fd = _syscall.adopt(fd)

    def fileno(self) -> int:
        """The number, -1 once closed or released. Borrowed: do not close it."""
        return self._fd

    def close(self) -> None:
        """Closes the descriptor; again does nothing. Raises OSError as close(2) does; the number is gone all the same."""
        # Taken and cleared in one step, without a call in between: two threads cannot both close it.
        fd, self._fd = self._fd, -1
        if fd >= 0:
            _close(fd)

    def release(self) -> int:
        """The number, which is the caller's to close from now on. Raises ClosedError."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            raise ClosedError("this OwnedFd has no descriptor to release: it was closed or released")
        return fd

    def dup(self) -> OwnedFd:
        """Another owner of the same open file description. Raises ClosedError, OSError."""
        return _own(_syscall.dup(self._open("duplicate")))

    def to_socket(self, expect: Expected | None = None) -> socket.socket:
        """Hands the descriptor over to a socket object, whose family, type and protocol are the kernel's word.

        The socket's timeout follows the description: 0.0 where it is non-blocking, else None; its flags are not touched.
        expect: (family, type, listening) that it must have, None for any; if it has not, the descriptor is closed.
        Raises WrongDescriptorError when it is no socket (without expect the descriptor then stays here), ClosedError, OSError.
        """
        fd = self._open("turn into a socket")
        if expect is not None:
            insist(self, expect)
        info = _syscall.probe(fd)
        if info is None:
            actual = kind_of(fd)
            raise WrongDescriptorError(f"descriptor {fd} is {actual}, not a socket", "a socket", actual)
        return socket_from(self, info)

    def to_file(self, mode: str = "r", **options: Any) -> IO[Any]:
        """Hands the descriptor over to a file object; mode and options as for open(). Raises ClosedError, OSError, ValueError."""
        name = f"<descriptor {self._open('turn into a file')}>"
        return open(name, mode, opener=lambda name, flags: self.release(), **options)

    def _open(self, purpose: str) -> int:
        fd = self._fd
        if fd < 0:
            raise ClosedError(f"cannot {purpose}: this OwnedFd was closed or released")
        return fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<OwnedFd {self._fd}>" if self._fd >= 0 else "<OwnedFd closed>"

    def __del__(self, _warn: Any = warnings.warn, _close: Any = os.close) -> None:
        try:
            fd = self._fd
        except AttributeError:  # interrupted while half-built
            return
        if fd >= 0:
            self._fd = -1
            try:
                _close(fd)
            finally:
                _warn(f"unclosed <OwnedFd {fd}>", ResourceWarning, source=self, stacklevel=2)


_new = object.__new__


def _own(fd: int) -> OwnedFd:
    """An owner for a number that is known to be close-on-exec, numbered 3 or higher and nobody's."""
    owned = _new(OwnedFd)
    owned._fd = fd
    return owned


def take(scratch: _syscall.Scratch) -> list[OwnedFd]:
    """Owners for every descriptor of a received message, in order."""
    message = scratch.message
    taken = list(map(_new, repeat(OwnedFd, message.nfds)))
    numbers: list[int] = []
    try:
        numbers = _syscall.numbers(message)
        # No call between the assignment above and this one: see Scratch. From here on the message holds nothing.
        message.nfds = 0
        for owned, number in zip(taken, numbers, strict=True):
            owned._fd = number
    except BaseException:
        if not message.nfds:
            for owned, number in zip(taken, numbers, strict=True):
                if not hasattr(owned, "_fd"):
                    owned._fd = number
                owned.close()
        raise
    return taken


def socket_from(owned: OwnedFd, info: Any = None, cls: type[socket.socket] | None = None) -> socket.socket:
    """A socket object that takes owned's descriptor; its timeout says what the description's flag says.

    info: where it was asked for already; else the kernel is asked here. Raises OSError (ENOTSOCK); owned then keeps it.
    """
    import socket

    fd = owned._fd
    blocking = _get_blocking(fd)
    if info is None and _DESCRIBES_ITSELF and getdefaulttimeout() is None:
        # The constructor asks for all three, in C.
        family = kind = protocol = -1
    else:
        info = _syscall.probe(fd) if info is None else info
        if info is None:
            raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
        # SOCK_NONBLOCK keeps the constructor from applying socket.setdefaulttimeout(), which would flip O_NONBLOCK for every holder.
        family, kind, protocol = info.family, info.type | getattr(socket, "SOCK_NONBLOCK", 0), info.protocol
    cls = cls or socket.socket
    sock = cls.__new__(cls)
    # Released first: a Ctrl-C between the two may then lose the number, but never have it closed twice.
    owned._fd = -1
    try:
        socket.socket.__init__(sock, family, kind, protocol, fd)
    except BaseException:
        if sock.fileno() < 0:
            owned._fd = fd
        raise
    if (sock.gettimeout() is None) != blocking:
        sock.setblocking(blocking)
    return sock


#: Family, type and whether it listens; None stands for any.
Expected = tuple[int | None, int | None, bool | None]


def insist(owned: OwnedFd, expect: Expected) -> None:
    """Raises WrongDescriptorError, and closes owned, unless it is a socket of this family and type that listens or does not.

    Raises TypeError for what is not such a tuple, OSError.
    """
    if not isinstance(expect, tuple) or len(expect) != 3:
        raise TypeError(f"expect is a tuple (family, type, listening), with None for any, not {expect!r}")
    info = _syscall.probe(owned.fileno())
    actual = None if info is None else (info.family, info.type, bool(info.listening))
    if actual is not None and all(wanted is None or wanted == found for wanted, found in zip(expect, actual, strict=True)):
        return
    wanted, found = _in_words(expect), kind_of(owned.fileno()) if actual is None else _in_words(actual)
    owned.close()
    raise WrongDescriptorError(f"{wanted} was expected, {found} arrived; it was closed", wanted, found)


def _in_words(expect: Expected) -> str:
    import socket

    family, kind, listening = expect
    words = [
        enum(number).name if number in list(enum) else str(number)
        for number, enum in ((family, socket.AddressFamily), (kind, socket.SocketKind))
        if number is not None
    ]
    if listening is not None:
        words.append("listening" if listening else "not listening")
    return f"a socket ({', '.join(words)})" if words else "a socket"


def kind_of(fd: int) -> str:
    """What a descriptor is, in words, for messages: "a pipe", "a regular file", "an eventfd". Never raises."""
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        return "not open"
    for test, name in _KINDS:
        if test(mode):
            return name
    try:
        link = os.readlink(f"/proc/self/fd/{fd}" if sys.platform == "linux" else f"/dev/fd/{fd}")
    except OSError:
        return "something else"
    return f"an anonymous inode ({link.removeprefix('anon_inode:').strip('[]')})"


_KINDS = (
    (stat.S_ISREG, "a regular file"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)
