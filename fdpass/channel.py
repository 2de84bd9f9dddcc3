"""Channel and Pipe: a conversation in frames, each of bytes or of one pickled object, with descriptors in band.

One owner per descriptor, one frame at a time in each direction. How to wait is known here, what a frame is in _transit.py.
"""

from __future__ import annotations

import _socket
import errno
import os
import threading
from operator import methodcaller
from time import monotonic
from typing import TYPE_CHECKING, Any

from fdpass import _carriers, _frames, _syscall, _transit
from fdpass.errors import ClosedError, EndOfChannel
from fdpass.fds import OwnedFd, _own

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from socket import socket as Socket
    from types import TracebackType
    from typing import Self

    from typing_extensions import Buffer

    from fdpass.ancillary import HasFileno

_DONTWAIT, _EINTR, _EAGAIN = _socket.MSG_DONTWAIT, -errno.EINTR, -errno.EAGAIN


def Pipe(duplex: bool = True, **terms: Any) -> tuple[Channel, Channel]:
    """A connected pair of channels, as multiprocessing.Pipe(): with duplex=False the first only receives, the second only sends.

    terms: max_size, max_fds, allow_pickle, peer, large, for both ends: see Channel. Raises TypeError, ValueError, OSError.
    """
    made = _transit.Terms(**terms)
    left, right = map(_own, _syscall.pair(_socket.SOCK_STREAM))
    try:
        for owned in (left, right):
            _transit.prepare(owned.fileno(), made)
    except BaseException:
        left.close()
        right.close()
        raise
    ends = Channel._of(left, made, writable=duplex), Channel._of(right, made, readable=duplex)
    inodes = [os.fstat(end.fileno()).st_ino for end in ends]
    # Where the kernel does not tell who is at the other end, this much is known.
    ends[0]._ends[0:2], ends[1]._ends[0:2] = inodes, inodes[::-1]
    return ends


class Channel:
    """One end of a conversation over a connected AF_UNIX stream socket, which it takes over: sock is detached.

    max_size:     bytes in one frame, large buffers included; what passes it is refused on both ends.
    max_fds:      descriptors in one frame, likewise. With 0 and allow_pickle=False the sender's kernel refuses them (Linux 6.16).
    allow_pickle: False for a channel that carries messages only: no send(), no recv(), nothing is ever unpickled.
    peer:         uids, one or several, whose objects are loaded beside those of this process's own uid.
    large:        bytes from which a buffer inside an object (a numpy array, a PickleBuffer, a memoryview) travels as memory: a
                  sealed file that the receiver maps privately. None: never, everything is copied.

    Threads may share a channel: one sends and one receives at a time, others wait their turn. A channel pickles as an argument
    of a process that is being started, in band, and by ticket.

    EndOfChannel, ProtocolError, PeerRefusedError and a frame that broke off end it; DescriptorsLostError does not.
    Raises TypeError, WrongDescriptorError or ValueError when sock is not such a socket; it is then untouched.
    """

    __slots__ = ("__weakref__", "_broken", "_ends", "_fd", "_readable", "_receiving", "_sending", "_terms", "_writable")

    def __init__(
        self,
        sock: Socket | OwnedFd,
        *,
        max_size: int = _frames.MAX_SIZE,
        max_fds: int = _frames.MAX_FDS,
        allow_pickle: bool = True,
        peer: int | Iterable[int] = (),
        large: int | None = _transit.LARGE,
    ) -> None:
        self._fd = OwnedFd.__new__(OwnedFd)
        self._fd._fd = -1
        terms = _transit.Terms(max_size, max_fds, allow_pickle, peer, large)
        self._setup(_transit.adopt(sock, terms), terms)

    @classmethod
    def _of(cls, owned: OwnedFd, terms: _transit.Terms, readable: bool = True, writable: bool = True) -> Channel:
        channel = cls.__new__(cls)
        channel._setup(owned, terms, readable, writable)
        return channel

    def _setup(self, owned: OwnedFd, terms: _transit.Terms, readable: bool = True, writable: bool = True) -> None:
        self._fd, self._terms = owned, terms
        self._readable, self._writable = readable, writable
        self._sending, self._receiving = threading.Lock(), threading.Lock()
        self._ends = _syscall.ends()
        self._broken: Exception | None = None

    # -- sending ---------------------------------------------------------------------------------------------------------------

    def send(self, obj: Any, timeout: float | None = None, *, consume: bool = False) -> None:
        """Pickles obj and sends it; sockets, handles, OwnedFd, channels and connections inside travel with it and stay open here.

        timeout: seconds, None waits for ever. consume: close what travelled, once the frame has gone; on failure all stays open.
        Raises what pickling raises (nothing is sent then), ValueError beyond the limits and for an end of this channel itself,
        TimeoutError before the first byte (the channel stays usable), BrokenChannelError after it, ClosedError, OSError.
        """
        self._send(_transit.pack_object(obj, self._terms), timeout, consume)

    def send_message(self, data: Buffer, fds: Iterable[int | HasFileno] = (), timeout: float | None = None) -> None:
        """Sends bytes and descriptors, no pickle involved; data may be empty. fds are borrowed. Arguments and errors as send()."""
        self._send(_transit.pack_message(data, fds, self._terms), timeout)

    def _send(self, frame: _transit.Outgoing, timeout: float | None, consume: bool = False) -> None:
        sent = False
        try:
            deadline = None if timeout is None else monotonic() + timeout
            if deadline is None:
                # By `with`, no signal handler runs between the taking and what gives the lock back.
                with self._sending:
                    self._send_alone(frame, None)
            else:
                _acquire(self._sending, deadline, "waiting for another thread's send")
                try:
                    self._send_alone(frame, deadline)
                finally:
                    self._sending.release()
            sent = True
        finally:
            frame.finish(consume and sent)

    def _send_alone(self, frame: _transit.Outgoing, deadline: float | None) -> None:
        try:
            fd = self._fd._fd
            if fd < 0 or self._broken is not None or not self._writable:
                self._refuse(self._writable, "send on")
            if len(frame.fds) > _frames.BATCH:
                frame.refuse_ends(fd, self._ends)
            flags = 0 if deadline is None else _DONTWAIT
            while not frame.done:
                code = frame.send_once(fd, flags, self._ends)
                if code == _EAGAIN:
                    _syscall.wait(fd, True, deadline, "sending a frame")
                    # Closed meanwhile by another thread, the number may be another's.
                    if self._fd._fd != fd:
                        self._refuse(self._writable, "send on")
                elif code < 0 and code != _EINTR:
                    frame.fail(code)
        except BaseException as error:
            self._end_with(frame.verdict(error), error)
            raise

    # -- receiving -------------------------------------------------------------------------------------------------------------

    def recv(self, timeout: float | None = None) -> Any:
        """The next object. Descriptors in it are owned by what was loaded; any that nothing claimed are closed.

        timeout: seconds, None waits for ever. Raises EndOfChannel, TimeoutError (nothing was read: the channel stays usable),
        PeerRefusedError (before anything is unpickled), ProtocolError, BrokenChannelError, DescriptorsLostError, ClosedError,
        OSError, ValueError without pickles, and what unpickling raises.
        """
        if not self._terms.allow_pickle:
            raise ValueError("this channel carries only messages (allow_pickle=False): use recv_message()")
        return self._recv(timeout, True).object()

    def recv_message(self, timeout: float | None = None) -> tuple[bytes, list[OwnedFd]]:
        """The next message as (bytes, owners); nothing is unpickled. An object frame is given as its raw pickle. Errors as recv()."""
        return self._recv(timeout, False).message()

    def _recv(self, timeout: float | None, objects: bool) -> _transit.Incoming:
        frame = _transit.Incoming(self._terms, objects)
        deadline = None if timeout is None else monotonic() + timeout
        if deadline is None:
            with self._receiving:  # as in _send()
                self._recv_alone(frame, None)
        else:
            _acquire(self._receiving, deadline, "waiting for another thread's recv")
            try:
                self._recv_alone(frame, deadline)
            finally:
                self._receiving.release()
        return frame

    def _recv_alone(self, frame: _transit.Incoming, deadline: float | None) -> None:
        try:
            fd = self._fd._fd
            if fd < 0 or self._broken is not None or not self._readable:
                self._refuse(self._readable, "receive from")
            flags = 0 if deadline is None else _DONTWAIT
            while (code := frame.receive_once(fd, flags)) != 1:
                if code == _EAGAIN:
                    _syscall.wait(fd, False, deadline, "receiving a frame")
                    if self._fd._fd != fd:
                        self._refuse(self._readable, "receive from")
                elif code < 0 and code != _EINTR:
                    _syscall.fail(code, "receiving a frame")
        except BaseException as error:
            frame.close()
            self._end_with(frame.verdict(error), error)
            raise

    def _end_with(self, broken: Exception | None, error: BaseException) -> None:
        """Notes with what the channel ended, if it did, and raises that in place of the kernel's word for it."""
        if broken is not None:
            self._broken = broken
            if isinstance(error, (TimeoutError, ConnectionError)):
                raise type(broken)(*broken.args) from error

    # -- the rest --------------------------------------------------------------------------------------------------------------

    def poll(self, timeout: float | None = 0.0) -> bool:
        """Whether recv() would find something (a frame, its beginning, or the end) within timeout seconds (None: for ever)."""
        self._refuse(self._readable, "poll")
        try:
            _syscall.wait(self._fd.fileno(), False, None if timeout is None else monotonic() + timeout, "polling a channel")
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

    def _refuse(self, allowed: bool, purpose: str) -> None:
        """Says why this end cannot be used."""
        if self._fd.fileno() < 0:
            raise ClosedError(f"cannot {purpose} this channel: it was closed")
        if not allowed:
            raise ValueError(f"cannot {purpose} this end of a one-way channel")
        if self._broken is not None:
            # A new exception each time: one object raised twice would carry both tracebacks.
            raise type(self._broken)(*self._broken.args)

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
        return _rebuild, (_carriers.carry(fd, "Channel"), self._terms, self._readable, self._writable)

    def __repr__(self) -> str:
        return f"<Channel {'closed' if self.closed else self.fileno()}>"


def _rebuild(token: _carriers.Token, terms: _transit.Terms, readable: bool, writable: bool) -> Channel:
    owned = _carriers.claim(token)
    try:
        return Channel._of(_transit.adopt(owned, terms), terms, readable, writable)
    except BaseException:
        owned.close()
        raise


_carriers.raw_reducers[Channel] = methodcaller("__reduce__")


def _acquire(lock: threading.Lock, deadline: float | None, what: str) -> None:
    if not lock.acquire(timeout=-1 if deadline is None else max(0.0, deadline - monotonic())):
        raise TimeoutError(f"timed out ({what})")
