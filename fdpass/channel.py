"""Channel and Pipe: a conversation in frames, each of bytes or of one pickled object, with descriptors in band.

One owner per descriptor, one frame at a time in each direction, and nothing is unpickled before the kernel has vouched for the sender.
"""

from __future__ import annotations

import _socket
import os
import pickle
import threading
from io import BytesIO
from operator import methodcaller
from socket import socket as Socket
from time import monotonic
from typing import TYPE_CHECKING, Any

from fdpass import _carriers, _frames, _syscall
from fdpass.ancillary import number_of
from fdpass.errors import (
    BrokenChannelError,
    ClosedError,
    DescriptorsLostError,
    EndOfChannel,
    PeerRefusedError,
    ProtocolError,
    WrongDescriptorError,
)
from fdpass.fds import OwnedFd, _own, kind_of, take

# Its import also fills in the reducers for raw sockets and connections, which send() relies on.
from fdpass.handles import refuse_tls
from fdpass.limits import lost_reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType
    from typing import Self

    from typing_extensions import Buffer

    from fdpass.ancillary import HasFileno

#: A payload up to this size is copied behind its header, so that a frame is one system call; a longer one is not copied.
_JOINED = 1 << 16
#: A payload is received in steps of this size: what a header announces is not allocated before it arrives.
_STEP = 1 << 20
#: The uid in anonymous credentials, which the kernel writes, with pid 0, where it does not know the sender.
_NO_UID = 65534


def Pipe(duplex: bool = True, *, max_size: int = _frames.MAX_SIZE, max_fds: int = _frames.MAX_FDS) -> tuple[Channel, Channel]:
    """A connected pair of channels, as multiprocessing.Pipe(): with duplex=False the first only receives, the second only sends.

    max_size, max_fds: see Channel. Raises OSError.
    """
    left, right = map(_own, _syscall.pair(_socket.SOCK_STREAM))
    return (
        Channel._of(left, max_size, max_fds, writable=duplex),
        Channel._of(right, max_size, max_fds, readable=duplex),
    )


class Channel:
    """One end of a conversation over a connected AF_UNIX stream socket, which it takes over: sock is detached.

    max_size: bytes of payload in one frame, max_fds: descriptors in one frame; what passes them is refused on both ends.
    Threads may share a channel: one sends and one receives at a time, others wait their turn. A channel pickles as an argument
    of a process that is being started and in band.

    EndOfChannel, ProtocolError, PeerRefusedError and a frame that broke off end it; DescriptorsLostError does not.
    Raises TypeError, WrongDescriptorError or ValueError when sock is not such a socket; it is then untouched.
    """

    __slots__ = ("__weakref__", "_broken", "_fd", "_max_fds", "_max_size", "_readable", "_receiving", "_sending", "_writable")

    def __init__(self, sock: Socket | OwnedFd, *, max_size: int = _frames.MAX_SIZE, max_fds: int = _frames.MAX_FDS) -> None:
        self._fd = OwnedFd.__new__(OwnedFd)
        self._fd._fd = -1
        if not isinstance(sock, (Socket, OwnedFd)):
            raise TypeError(f"Channel takes a socket or an OwnedFd, not {type(sock).__name__}")
        if isinstance(sock, Socket):
            refuse_tls(sock)
        fd = sock.fileno()
        if fd < 0:
            raise ValueError("the socket is closed")
        info = _syscall.probe(fd)
        if info is None or info.family != _socket.AF_UNIX or info.type != _socket.SOCK_STREAM or info.listening:
            wanted, actual = "a connected AF_UNIX stream socket", kind_of(fd)
            if info is not None:
                actual = "a listening socket" if info.listening else "a socket of another kind"
            raise WrongDescriptorError(f"a channel needs {wanted}; descriptor {fd} is {actual}", wanted, actual)
        _syscall.ask_credentials(fd)
        self._setup(OwnedFd(sock.release() if isinstance(sock, OwnedFd) else sock.detach()), max_size, max_fds)

    @classmethod
    def _of(cls, owned: OwnedFd, max_size: int, max_fds: int, readable: bool = True, writable: bool = True) -> Channel:
        channel = cls.__new__(cls)
        channel._setup(owned, max_size, max_fds, readable, writable)
        return channel

    def _setup(self, owned: OwnedFd, max_size: int, max_fds: int, readable: bool = True, writable: bool = True) -> None:
        self._fd, self._max_size, self._max_fds = owned, max_size, max_fds
        self._readable, self._writable = readable, writable
        self._sending, self._receiving = threading.Lock(), threading.Lock()
        self._broken: Exception | None = None

    # -- sending ---------------------------------------------------------------------------------------------------------------

    def send(self, obj: Any, timeout: float | None = None) -> None:
        """Pickles obj and sends it; sockets, handles, OwnedFd, channels and connections inside travel with it and stay open here.

        timeout: seconds, None waits for ever. Raises what pickling raises (nothing is sent then), ValueError beyond the limits,
        TimeoutError before the first byte (the channel stays usable), BrokenChannelError after it, ClosedError, OSError.
        """
        fds: list[int] = []
        outgoing = _carriers.outgoing.set(fds)
        try:
            stream = BytesIO()
            pickler = _carriers.InBandPickler(stream, pickle.HIGHEST_PROTOCOL)
            pickler.dump(obj)
        finally:
            _carriers.outgoing.reset(outgoing)
        self._send(_frames.OBJECT, stream.getbuffer(), fds, timeout)
        # Its memo holds what was made only while pickling, a handle from somebody's __reduce__ for instance: until here, no longer.
        pickler.clear_memo()

    def send_message(self, data: Buffer, fds: Iterable[int | HasFileno] = (), timeout: float | None = None) -> None:
        """Sends bytes and descriptors, no pickle involved; data may be empty. fds are borrowed. Arguments and errors as send()."""
        view = memoryview(data)
        flat = view.cast("B") if view.c_contiguous and view.nbytes else memoryview(view.tobytes())
        self._send(_frames.DATA, flat, [number_of(item) for item in fds], timeout)

    def _send(self, kind: int, payload: memoryview, fds: list[int], timeout: float | None) -> None:
        size, count = len(payload), len(fds)
        if size > self._max_size:
            raise ValueError(f"a payload of {size} bytes: this channel sends {self._max_size} at most (max_size)")
        if count > self._max_fds:
            raise ValueError(f"{count} descriptors in one frame: this channel sends {self._max_fds} at most (max_fds)")
        header = _frames.encode(kind, size, count)
        batches = list(_frames.batches(count))
        joined = not batches[1:] and size <= _JOINED
        deadline = None if timeout is None else monotonic() + timeout
        _acquire(self._sending, deadline, "waiting for another thread's send")
        started = attempted = False
        try:
            fd = self._usable(self._writable, "send on")
            first = header + payload if joined else header
            for part, batch in zip((first, *[b"\0"] * len(batches[1:])), batches or [slice(0)], strict=True):
                rest, numbers = part, fds[batch]
                while rest:
                    attempted = True
                    sent = _syscall.send(fd, rest, numbers, 0, _left(deadline), "sending a frame")
                    # The descriptors have gone with the first byte, however few bytes went.
                    started, numbers = True, []
                    rest = rest[sent:]
            if not joined:
                while payload:
                    # A step at a time: a timed-out send must not have promised C more than it can tell about.
                    step = _syscall.as_memory(payload[:_STEP])
                    try:
                        sent = _syscall.send(fd, step, [], 0, _left(deadline), "sending a frame")
                    finally:
                        # Also on the way out of an error: a memoryview that such a pointer holds crashes the cycle collector.
                        _syscall.release(step)
                    payload = payload[sent:]
        except BaseException as error:
            # An OSError is the kernel's word that nothing went; after a signal handler's exception nobody knows.
            if started or (attempted and not isinstance(error, OSError)):
                self._broken = BrokenChannelError(f"a frame broke off while it was being sent: {error or type(error).__name__}")
                if isinstance(error, TimeoutError):
                    raise BrokenChannelError(*self._broken.args) from error
            raise
        finally:
            self._sending.release()

    # -- receiving -------------------------------------------------------------------------------------------------------------

    def recv(self, timeout: float | None = None) -> Any:
        """The next object. Descriptors in it are owned by what was loaded; any that nothing claimed are closed.

        timeout: seconds, None waits for ever. Raises EndOfChannel, TimeoutError (nothing was read: the channel stays usable),
        PeerRefusedError (before anything is unpickled), ProtocolError, BrokenChannelError, DescriptorsLostError, ClosedError,
        OSError, and what unpickling raises.
        """
        kind, data, owners = self._recv(timeout)
        if kind != _frames.OBJECT:
            for owned in owners:
                owned.close()
            self._broken = ProtocolError("a plain message arrived where recv() expects an object: receive it with recv_message()")
            raise ProtocolError(*self._broken.args)
        claims: list[OwnedFd | None] = [*owners]
        incoming = _carriers.incoming.set(claims)
        try:
            return pickle.loads(data)
        finally:
            _carriers.incoming.reset(incoming)
            for unclaimed in claims:
                if unclaimed is not None:
                    unclaimed.close()

    def recv_message(self, timeout: float | None = None) -> tuple[bytes, list[OwnedFd]]:
        """The next message as (bytes, owners); nothing is unpickled. An object frame is given as its raw pickle. Errors as recv()."""
        _, data, owners = self._recv(timeout)
        return bytes(data), owners

    def _recv(self, timeout: float | None) -> tuple[int, bytes | bytearray, list[OwnedFd]]:
        deadline = None if timeout is None else monotonic() + timeout
        _acquire(self._receiving, deadline, "waiting for another thread's recv")
        inbox = _Inbox(self._usable_or_release())
        try:
            header = _frames.decode(inbox.read(_frames.HEADER_SIZE, deadline), self._max_size, self._max_fds)
            # Of the header's own sender, before the payload is even read.
            trusted = header.kind != _frames.OBJECT or inbox.vouched
            if trusted and header.fillers:
                inbox.read(header.fillers, deadline)
            data: bytes | bytearray = inbox.read(header.size, deadline) if trusted and header.size else b""
            if header.kind == _frames.OBJECT and not inbox.vouched:
                raise PeerRefusedError(f"a pickle from {inbox.sender}: this process loads only from uid {os.getuid()}")
            if inbox.lost is not None:
                text, limit, number = inbox.lost
                raise DescriptorsLostError(
                    f"{header.fds} descriptors were sent, {len(inbox.owners)} arrived: {text}; those that arrived were closed",
                    header.fds, len(inbox.owners), limit, bytes(data), number,
                )  # fmt: skip
            if len(inbox.owners) != header.fds:
                raise ProtocolError(f"a frame announces {header.fds} descriptors and brings {len(inbox.owners)}")
        except BaseException as error:
            inbox.close()
            if isinstance(error, TimeoutError) and inbox.started:
                self._broken = BrokenChannelError("timed out inside a frame")
                raise BrokenChannelError(*self._broken.args) from error
            if isinstance(error, (EndOfChannel, BrokenChannelError, ProtocolError, PeerRefusedError)):
                # Without its traceback, which holds this channel and whatever the frames had in hand.
                self._broken = type(error)(*error.args)
            elif inbox.started and not isinstance(error, DescriptorsLostError):
                self._broken = BrokenChannelError(f"a frame broke off while it was being received: {error or type(error).__name__}")
            raise
        finally:
            self._receiving.release()
        return header.kind, data, inbox.owners

    def _usable_or_release(self) -> int:
        try:
            return self._usable(self._readable, "receive from")
        except BaseException:
            self._receiving.release()
            raise

    # -- the rest --------------------------------------------------------------------------------------------------------------

    def poll(self, timeout: float | None = 0.0) -> bool:
        """Whether recv() would find something (a frame, its beginning, or the end) within timeout seconds (None: for ever)."""
        fd = self._usable(self._readable, "poll")
        try:
            _syscall.wait(fd, False, None if timeout is None else monotonic() + timeout, "polling a channel")
        except TimeoutError:
            return False
        return True

    def fileno(self) -> int:
        """The number, -1 once closed; for select, poll and multiprocessing.connection.wait. Borrowed."""
        return self._fd.fileno()

    def close(self) -> None:
        """Closes this end; again does nothing. The peer reads what was sent, then EndOfChannel."""
        self._fd.close()

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._fd.fileno() < 0

    def _usable(self, allowed: bool, purpose: str) -> int:
        fd = self._fd.fileno()
        if fd < 0:
            raise ClosedError(f"cannot {purpose} this channel: it was closed")
        if not allowed:
            raise ValueError(f"cannot {purpose} this end of a one-way channel")
        if self._broken is not None:
            # A new exception each time: one object raised twice would carry both tracebacks.
            raise type(self._broken)(*self._broken.args)
        return fd

    def __iter__(self) -> Iterator[Any]:
        while True:
            try:
                obj = self.recv()
            except EndOfChannel:
                return
            yield obj

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        fd = self._fd.fileno()
        if fd < 0:
            raise ClosedError("cannot pickle this channel: it was closed")
        return _rebuild, (_carriers.carry(fd, "Channel"), self._max_size, self._max_fds, self._readable, self._writable)

    def __repr__(self) -> str:
        return f"<Channel {'closed' if self.closed else self.fileno()}>"


def _rebuild(token: _carriers.Token, max_size: int, max_fds: int, readable: bool, writable: bool) -> Channel:
    return Channel._of(_carriers.claim(token), max_size, max_fds, readable, writable)


_carriers.raw_reducers[Channel] = methodcaller("__reduce__")


class _Inbox:
    """One frame on its way in: its descriptors so far, and what the kernel says about whoever sent each part."""

    __slots__ = ("fd", "lost", "owners", "sender", "started", "vouched")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.owners: list[OwnedFd] = []
        self.lost: tuple[str, int | None, int] | None = None
        self.started = False
        self.vouched = True
        self.sender = ""

    def read(self, size: int, deadline: float | None) -> bytes | bytearray:
        """Exactly size bytes; collects descriptors and checks credentials on the way."""
        try:
            scratch = _syscall.pool.pop()
        except IndexError:
            scratch = _syscall.Scratch()
        if size <= _syscall.POOLED:
            got = self._read(scratch, scratch.buffer, size, deadline)
            if got == size:
                data: bytes = scratch.view[:size]
                _syscall.pool.append(scratch)
                return data
            collected = bytearray(scratch.view[:got])
        else:
            collected = bytearray()
        while (left := size - len(collected)) > 0:
            # A receive stops behind each message with descriptors, so short reads are ordinary.
            have = len(collected)
            collected += bytes(min(left, _STEP))
            with memoryview(collected) as window:
                step = _syscall.as_memory(window[have:])
                try:
                    got = self._read(scratch, step, len(step), deadline)
                finally:
                    _syscall.release(step)
            del collected[have + got :]
        _syscall.pool.append(scratch)
        return collected

    def _read(self, scratch: _syscall.Scratch, buffer: Any, size: int, deadline: float | None) -> int:
        message = scratch.message
        message.has_credentials = 0
        try:
            got = _syscall.recv(self.fd, buffer, size, message, 0, _left(deadline), "receiving a frame")
        except BaseException:
            # A signal handler may raise when bytes have come already; they come with credentials.
            self.started = self.started or bool(message.has_credentials)
            raise
        if got == 0:
            if self.started:
                raise BrokenChannelError("the peer is gone in the middle of a frame")
            raise EndOfChannel("the peer closed the channel")
        self.started = True
        # Not by the number alone, which is also that of the user "nobody".
        anonymous = not message.has_credentials or (message.uid == _NO_UID and message.pid == 0)
        if anonymous or message.uid != os.getuid():
            self.vouched = False
            self.sender = "a sender without credentials" if anonymous else f"uid {message.uid} (pid {message.pid})"
        if message.dropped:
            self.lost = self.lost or lost_reason()
        if message.nfds:
            self.owners += take(scratch)
        return got

    def close(self) -> None:
        """Closes the descriptors collected so far."""
        for owned in self.owners:
            owned.close()


def _acquire(lock: threading.Lock, deadline: float | None, what: str) -> None:
    if lock.acquire(blocking=False):
        return
    if not lock.acquire(timeout=-1 if deadline is None else max(0.0, deadline - monotonic())):
        raise TimeoutError(f"timed out ({what})")


def _left(deadline: float | None) -> float | None:
    # Never 0, which would mean "do not wait" and raise BlockingIOError: a deadline that has passed is a time-out.
    return None if deadline is None else max(1e-9, deadline - monotonic())
