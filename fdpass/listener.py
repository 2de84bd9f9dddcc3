"""Listener: what a worker accepts from. It waits, accepts one connection at a time and leaves the queue; it does not know other workers."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from time import monotonic, monotonic_ns
from typing import TYPE_CHECKING, Any

from fdpass._board import ACCEPTED, HEARTBEAT, OPEN
from fdpass.errors import ClosedError, EndOfChannel, FdPassError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fdpass.channel import Channel

Socket = socket.socket  # the class Listener has a property called socket

#: Out of these there is no accepting; the connection stays in the queue, and a level-triggered wait would spin on it.
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
#: The peer gave up while it was queued: accept(2) reports it on the listener, the next connection is fine.
_GIVEN_UP = frozenset({errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.ENETDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH})
#: How often a worker without a free descriptor looks whether there is one, in seconds.
_ROOM = 0.05


class ListenSocket(Socket):
    """The listening socket as a server sees it. Its backlog is the group's: listen() with a smaller one does not cut it,
    which asyncio's create_server would do in every worker, for every worker."""

    __slots__ = ("_backlog",)

    def __init__(self, sock: Socket, backlog: int) -> None:
        super().__init__(sock.family, sock.type | getattr(socket, "SOCK_NONBLOCK", 0), sock.proto, fileno=sock.detach())
        self._backlog = backlog

    def listen(self, backlog: int = 0, /) -> None:
        """listen(2) with the larger of backlog and the group's."""
        super().listen(max(backlog, self._backlog))


class AcceptedSocket(Socket):
    """A connection that tells the board when it is closed or detached."""

    __slots__ = ("_after", "_listener")
    _listener: Listener | None
    _after: Callable[[], object] | None  # called once, when it is counted no more

    def _leave(self) -> None:
        listener, self._listener = getattr(self, "_listener", None), None
        if listener is not None:
            listener._count(OPEN, -1)
            if self._after is not None:
                self._after()

    def close(self) -> None:
        """Closes the connection; files made of it keep it open, as with any socket."""
        super().close()
        if self.fileno() < 0:
            self._leave()

    def detach(self) -> int:
        """The number, which is the caller's from now on; the worker's load no longer counts it."""
        self._leave()
        return super().detach()

    def __del__(self) -> None:
        self._leave()


class Listener:
    """A worker's share of a port. Iterating gives (socket, address) until the worker is told to drain.

    Threads may accept together. Under any strategy `socket` is the listening socket itself, for servers that bring their own loop.
    """

    def __init__(
        self,
        sock: ListenSocket,
        index: int,
        strategy: str,
        line: Any,
        channel: Channel | None = None,
        exclusive: bool = False,
        rotate: bool = False,
        report: bool = False,
        lines: Any = (),
    ) -> None:
        self._sock, self._line, self._channel = sock, line, channel
        self._index, self._strategy = index, strategy
        self._exclusive, self._rotate, self._report = exclusive, rotate, report
        # Re-entrant: SIGTERM's handler drains, and may come while this very thread holds it.
        self._lock = threading.RLock()
        self._drained = self._queued = self._accepting = False
        self._said: set[str] = set()
        self._ordered = False
        self._on_draining: list[Callable[[], object]] = []
        self._looked: set[int] = set()
        self._reported = 0.0
        self._spare = -1
        self._wake_read, self._wake_write = os.pipe()
        self._events = (getattr(select, "epoll", None) or _Poll)()
        self._events.register(self._wake_read, select.POLLIN)
        if channel is not None:
            self._events.register(channel.fileno(), select.POLLIN)

    @property
    def index(self) -> int:
        """Which worker of the group this is, from 0; a successor has its predecessor's."""
        return self._index

    @property
    def strategy(self) -> str:
        """How this group shares its port: shared, reuseport or reuseport-bare."""
        return self._strategy

    @property
    def socket(self) -> ListenSocket:
        """The listening socket, non-blocking, still the listener's; taking it says that the worker is ready."""
        self.ready()
        return self._sock

    @property
    def draining(self) -> bool:
        """Whether the worker was told to drain: no more connections come from this listener."""
        return self._drained

    def ready(self) -> None:
        """Tells the group that this worker serves; the first accept(), iteration or .socket says so too. Again does nothing."""
        self._say("ready")

    def accept(self, timeout: float | None = None) -> tuple[Socket, Any]:
        """The next connection as (socket, address); the socket blocks, or follows socket.setdefaulttimeout().

        timeout: seconds, None waits for ever. While the process has no descriptor to spare it stays out of the queue, where
        other workers serve, and looks again twenty times a second. Raises ClosedError once drained, TimeoutError, OSError.
        """
        deadline = None if timeout is None else monotonic() + timeout
        self._accepting = True
        self.ready()
        self._line[HEARTBEAT] = monotonic_ns()
        while True:
            if self._drained:
                # The order may have come right after an exclusive wake-up, which nobody else gets for that connection.
                if self._last_look() and (accepted := self._accept()) is not None:
                    return accepted
                raise ClosedError("this listener accepts no more: the worker was told to drain")
            left = None if deadline is None else max(0.0, deadline - monotonic())
            if not self._join():
                left = _ROOM if left is None else min(left, _ROOM)
            for fd, _ in self._events.poll(left):
                if fd == self._sock.fileno() and (accepted := self._accept()) is not None:
                    return accepted
                if self._channel is not None and fd == self._channel.fileno():
                    self._obey()
            if deadline is not None and monotonic() >= deadline and not self._drained:
                raise TimeoutError(errno.ETIMEDOUT, f"no connection came within {timeout} s")

    def __iter__(self) -> Iterator[tuple[Socket, Any]]:
        while True:
            try:
                yield self.accept()
            except ClosedError:
                return

    def drain(self) -> None:
        """Leaves the queue for good: iteration ends and accept() raises ClosedError, in every thread. What was accepted goes on."""
        with self._lock:
            first, self._drained = not self._drained, True
        if first:
            self._leave()
            # Never read: it wakes every thread that waits or ever will.
            os.write(self._wake_write, b"d")
            for callback in self._on_draining:
                callback()

    # -- inside ----------------------------------------------------------------------------------------------------------------

    def _on_drain(self, callback: Callable[[], object]) -> None:
        """callback() is called once, in whatever thread drains; at once when it has drained."""
        with self._lock:
            drained = self._drained
            if not drained:
                self._on_draining.append(callback)
        if drained:
            callback()

    def _follow(self, loop: Any) -> None:
        """Lets an event loop obey what the supervisor orders, and tells the supervisor that it does."""
        if self._channel is None:
            return
        fd = self._channel.fileno()

        def obey() -> None:
            self._obey()
            if self._drained:
                loop.remove_reader(fd)  # there is no other order, and the end of the channel would be read for ever

        loop.add_reader(fd, obey)
        self._say("follows")

    def _accept(self) -> tuple[AcceptedSocket, Any] | None:
        try:
            plain, address = self._sock.accept()
        except BlockingIOError:
            return None  # another worker was faster
        except OSError as error:
            if error.errno in _GIVEN_UP:
                return None
            if error.errno not in _EXHAUSTED:
                raise
            # The exclusive wake-up was spent on this worker: to leave now would strand the connection until the next one
            # comes and wakes another. The spare descriptor makes room for it; without a spare there is no way back in.
            self._leave()
            with self._lock:
                spare, self._spare = self._spare, -1
            if spare < 0:
                return None
            os.close(spare)
            try:
                plain, address = self._sock.accept()
            except OSError:
                return None
        accepted = self._admit(plain, address)
        if self._rotate and self._queued:
            # To the end of the queue: an exclusive wake-up goes to whoever registered first, every time.
            self._leave()
            self._join()
        if self._report and monotonic() - self._reported > 0.25:
            self._reported = monotonic()
            self._tell(("counts", self._line[ACCEPTED], self._line[OPEN]))
        return accepted

    def _admit(self, plain: Socket, address: Any) -> tuple[AcceptedSocket, Any]:
        """Takes over a connection and counts it."""
        conn = AcceptedSocket(plain.family, plain.type, plain.proto, fileno=plain.detach())
        conn._listener, conn._after = self, None
        self._count(OPEN, 1)
        self._count(ACCEPTED, 1)
        self._line[HEARTBEAT] = monotonic_ns()
        return conn, address

    def _join(self) -> bool:
        """Joins the queue, if it is not in it; False while there is no descriptor to spare."""
        with self._lock:
            if self._queued or self._drained:
                return True
            if self._spare < 0:
                try:
                    self._spare = os.dup(self._wake_read)
                except OSError as error:
                    if error.errno not in _EXHAUSTED:
                        raise
                    return False
            self._events.register(self._sock.fileno(), select.POLLIN | (_EXCLUSIVE if self._exclusive else 0))
            self._queued = True
            return True

    def _leave(self) -> None:
        with self._lock:
            if self._queued:
                self._queued = False
                self._events.unregister(self._sock.fileno())

    def _last_look(self) -> bool:
        """True once for every thread that accepts."""
        thread = threading.get_ident()
        with self._lock:
            look = thread not in self._looked and self._sock.fileno() >= 0
            self._looked.add(thread)
        return look

    def _uncount(self) -> None:
        """In a forked child: the board is the parent's, and so was whoever held the lock."""
        self._lock = threading.RLock()
        self._line = list(self._line)

    def _count(self, word: int, step: int) -> None:
        with self._lock:
            self._line[word] += step

    def _left(self) -> None:
        """Tells the supervisor, once, that the drained listener is out of the queue."""
        self._say("drained")

    def _say(self, word: str) -> None:
        """Tells the supervisor that word, once. Not from a signal handler: the thread below it may hold the channel."""
        with self._lock:
            first = word not in self._said
            self._said.add(word)
        if first:
            self._tell((word,))

    def _tell(self, message: tuple[Any, ...]) -> None:
        if self._channel is not None:
            try:
                self._channel.send(message)
            except (OSError, FdPassError):
                pass  # the supervisor is gone: the watch ends this process

    def _obey(self) -> None:
        assert self._channel is not None
        try:
            order = self._channel.recv(timeout=0)
        except TimeoutError:
            return  # another thread read it
        except (EndOfChannel, FdPassError, OSError):
            order = ("drain",)  # the supervisor is gone
            self._events.unregister(self._channel.fileno())
        if order[0] == "drain":
            self._ordered = True
            self.drain()

    def _has_orders(self) -> bool:
        """Whether the supervisor told it to drain, or is gone; what was not read yet counts too."""
        return self._ordered or (self._channel is not None and self._channel.poll())

    def _close(self) -> None:
        """At the worker's end: the last counts, then the listening socket. What threads may still wait on goes with the process."""
        self.drain()
        with self._lock:
            if self._report:
                self._tell(("counts", self._line[ACCEPTED], self._line[OPEN]))
            # The board goes; connections that outlive the listener are counted nowhere.
            self._line = list(self._line)
            self._sock.close()


_EXCLUSIVE: int = getattr(select, "EPOLLEXCLUSIVE", 0)


class _Poll:
    """select.poll with epoll's calls, where there is no epoll: every waiting worker is woken, and one of them accepts."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self.register, self.unregister = self._poll.register, self._poll.unregister

    def poll(self, timeout: float | None) -> list[tuple[int, int]]:
        """timeout in seconds, as epoll's."""
        return self._poll.poll(None if timeout is None else timeout * 1000)
