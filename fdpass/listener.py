"""Listener: what a worker accepts from, how it counts and is told to drain. The queue is _queue.py's; it does not know other workers."""

from __future__ import annotations

import errno
import math
import os
import select
import socket
import threading
import weakref
from contextlib import suppress
from time import monotonic, monotonic_ns
from typing import TYPE_CHECKING, Any

from fdpass._board import ACCEPTED, HEARTBEAT, LOAD, OPEN, WAITING
from fdpass._queue import ROOM, Place, load_of
from fdpass.errors import ClosedError, EndOfChannel, FdPassError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fdpass.channel import Channel

Socket = socket.socket  # the class Listener has a property called socket


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
    """A connection that says when it is closed or detached: to the board, and to a server that counts for itself."""

    __slots__ = ("_after", "_listener")
    _listener: Listener | None
    _after: Callable[[], None] | None

    def _leave(self) -> None:
        listener, self._listener = getattr(self, "_listener", None), None
        if listener is not None:
            listener._count(OPEN, -1)
        after, self._after = getattr(self, "_after", None), None
        if after is not None:
            after()

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
        # The socket's own finalizer warns and closes: a __del__ that did not call it would leave the descriptor open.
        super().__del__()  # type: ignore[misc]  # typeshed does not list it
        self._leave()


class Listener:
    """A worker's share of a port. Iterating gives (socket, address) until the worker is told to drain.

    Threads may accept together. `socket` is the listening socket itself, for servers with a loop of their own; dispatch has none.
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
        lines: Sequence[Any] = (),
        balance: bool = False,
        sole: bool = False,
    ) -> None:
        self._sock, self._line, self._channel = sock, line, channel
        self._index, self._strategy = index, strategy
        # sole: nobody else takes what is queued here. balance: stay out of the queue while the load is above the least of lines.
        self._exclusive, self._rotate, self._report, self._sole = exclusive, rotate, report, sole
        self._lines = lines if balance else ()
        # Re-entrant: SIGTERM's handler drains, and may come while this very thread holds it.
        self._lock = threading.RLock()
        self._told = self._drained = self._ordered = self._accepting = self._follows = self._done = False
        self._loops = 0  # places in the queue that event loops hold
        self._draining: list[Callable[[], None]] = []
        self._looked: set[int] = set()
        # Where nobody else takes what is queued, by when even so no more of it is taken; the order to drain says it.
        self._look_by = math.inf
        self._waiters = 0
        self._reported = 0.0
        self._wake_read, self._wake_write = os.pipe()
        self._events = (getattr(select, "epoll", None) or _Poll)()
        self._events.register(self._wake_read, select.POLLIN)
        if channel is not None:
            self._events.register(channel.fileno(), select.POLLIN)
        line[LOAD] = line[WAITING] = 0
        self._place = self._place_in(self._events, sock.fileno(), self._wake_read, self._lock)
        _known[_identity(sock.fileno())] = self

    def _place_in(self, events: Any, fd: int, spare_of: int = -1, lock: Any = None) -> Place:
        """A place for this listener in an epoll, which may be an event loop's, by a number of its socket."""
        options = {"exclusive": self._exclusive, "rotate": self._rotate, "spare_of": spare_of, "lock": lock}
        return Place(fd, events, line=self._line, lines=self._lines, **options)

    @property
    def index(self) -> int:
        """Which worker of the group this is, from 0; a successor has its predecessor's."""
        return self._index

    @property
    def strategy(self) -> str:
        """How this group shares its port: shared, reuseport, reuseport-bare or dispatch."""
        return self._strategy

    @property
    def socket(self) -> ListenSocket:
        """The listening socket, non-blocking, still the listener's; taking it says that the worker is ready."""
        self.ready()
        return self._sock

    @property
    def load(self) -> int:
        """The load that order="least-loaded" goes by: what the server set, else the open connections that this listener gave.

        Set an int of 0 or more, in whatever unit all workers of the group use, or None to have connections counted again.
        """
        return load_of(self._line)

    @load.setter
    def load(self, value: int | None) -> None:
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise TypeError(f"a load is a number (int) or None, not {type(value).__name__}")
        if value is not None and not 0 <= value < 1 << 62:
            raise ValueError(f"a load is 0 or more, not {value}")
        self._line[LOAD] = 0 if value is None else value + 1

    @property
    def draining(self) -> bool:
        """Whether the worker was told to drain: no more connections come from this listener."""
        return self._drained

    def ready(self) -> None:
        """Tells the group that this worker serves; the first accept(), iteration or .socket says so too. Again does nothing."""
        with self._lock:
            told, self._told = self._told, True
        if not told:
            self._tell(("ready",))

    def accept(self, timeout: float | None = None) -> tuple[Socket, Any]:
        """The next connection as (socket, address); the socket blocks, or follows socket.setdefaulttimeout().

        timeout: seconds, None waits for ever. While the process has no descriptor to spare it stays out of the queue, where
        other workers serve, and looks again twenty times a second. Raises ClosedError once drained, TimeoutError, OSError.
        """
        deadline = None if timeout is None else monotonic() + timeout
        self._accepting = True
        self.ready()
        self._say_follows()
        while True:
            if self._drained:
                # The order may have come right after an exclusive wake-up, which nobody else gets for that connection.
                while self._last_look():
                    if (accepted := self._accept()) is not None:
                        return accepted
                self._left()
                raise ClosedError("this listener accepts no more: the worker was told to drain")
            left = None if deadline is None else max(0.0, deadline - monotonic())
            pause = ROOM if not self._join() and self._place.pause is None else self._place.pause
            if pause is not None:
                left = pause if left is None else min(left, pause)
            found = [fd for fd, _ in self._wait(left)]
            # The order first: where connections never end it would otherwise not be read.
            if self._channel is not None and self._channel.fileno() in found:
                self._obey()
            if self._sock.fileno() in found and (accepted := self._accept()) is not None:
                return accepted
            if self._overdue() and (accepted := self._accept()) is not None:
                return accepted
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
            callbacks, self._draining = self._draining, []
        if first:
            self._leave()
            # Never read: it wakes every thread that waits or ever will.
            os.write(self._wake_write, b"d")
        for callback in callbacks:
            callback()

    # -- for event loops and servers on them -----------------------------------------------------------------------------------

    def _on_drain(self, callback: Callable[[], None]) -> None:
        """callback() once when the listener drains, in whatever thread or signal handler does it; at once when it drains already."""
        with self._lock:
            if not self._drained:
                self._draining.append(callback)
                return
        callback()

    def _off_drain(self, callback: Callable[[], None]) -> None:
        """Takes back what _on_drain() was given; what was called, or never given, does not matter."""
        with self._lock:
            if callback in self._draining:
                self._draining.remove(callback)

    def _follow(self, loop: Any) -> None:
        """Has an asyncio event loop listen to the supervisor, and tells the supervisor so: an order to drain needs no SIGTERM then."""
        if self._channel is None:
            return
        number = self._channel.fileno()

        def hear() -> None:
            if not self._obey():
                loop.remove_reader(number)
            if self._drained and not self._loops and not self._accepting:
                self._left()  # no server of this loop is left to leave the queue

        loop.add_reader(number, hear)
        self._say_follows()

    def _say_follows(self) -> None:
        """Tells the supervisor, once, that orders are obeyed here without a signal."""
        if not self._follows:
            self._follows = True
            self._tell(("follows",))

    def _left(self) -> None:
        """Tells the supervisor, once, that the drained listener is out of the queue and gives no more connections."""
        if not self._done:
            self._done = True
            if self._sole:
                # Connections would go on coming to it while others finish, and nobody would take them.
                with suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)
            self._tell(("drained",))

    # -- inside ----------------------------------------------------------------------------------------------------------------

    def _accept(self) -> tuple[Socket, Any] | None:
        """One connection, or None when there is none after all."""
        try:
            taken = self._place.take(self._sock)
        except OSError:
            if not self._done:
                raise
            return None  # another thread has found the queue empty, and shut it
        if taken is None:
            return None
        accepted = self._admit(*taken)
        with self._lock:
            self._place.rotate()
        return accepted

    def _admit(self, plain: Socket, address: Any) -> tuple[AcceptedSocket, Any]:
        """Counts a connection: on the board until it is closed or detached. Consumes plain."""
        conn = AcceptedSocket(plain.family, plain.type, plain.proto, fileno=plain.detach())
        conn._listener = self
        self._count(OPEN, 1)
        self._count(ACCEPTED, 1)
        self._line[HEARTBEAT] = monotonic_ns()
        if self._report and monotonic() - self._reported > 0.25:
            self._reported = monotonic()
            self._tell(("counts", self._line[ACCEPTED], self._line[OPEN]))
        return conn, address

    def _join(self) -> bool:
        """Joins the queue, if it is not in it; False while load or want of a descriptor keep it out, for `_place.pause` seconds."""
        with self._lock:
            return self._drained or self._place.settle()

    def _leave(self) -> None:
        with self._lock:
            self._place.leave()

    def _overdue(self) -> bool:
        """Whether a connection waits that those with less load should have taken by now."""
        with self._lock:
            return not self._drained and self._place.overdue()

    def _wait(self, timeout: float | None) -> list[tuple[int, int]]:
        """Waits for a connection, an order or the drain; on the board this worker waits as long as one of its threads does."""
        with self._lock:
            self._waiters += 1
            self._place.begin_wait()
        try:
            found: list[tuple[int, int]] = self._events.poll(timeout)
            return found
        finally:
            with self._lock:
                self._waiters -= 1
                if not self._waiters:
                    self._place.end_wait()

    def _last_look(self) -> bool:
        """True once for every thread that accepts; where nobody else takes what is queued, until all of it was taken, or half of the
        time for draining is over: clients that never stop coming must not have the last ones cut at its end."""
        if not self._sole:
            thread = threading.get_ident()
            with self._lock:
                look = thread not in self._looked and self._sock.fileno() >= 0
                self._looked.add(thread)
            return look
        while True:
            # The order may come after a signal.
            if self._channel is not None and not self._ordered and self._channel.poll():
                self._obey()
            with self._lock:
                if self._done or self._sock.fileno() < 0 or monotonic() >= self._look_by or not self._place.waiting():
                    return False
                if self._place.room():
                    return True
            # Out of descriptors it waits for some to be closed: whoever drains has a deadline.
            select.select((), (), (), ROOM)

    def _set_line(self, line: Any) -> None:
        self._line = self._place.line = line

    def _uncount(self) -> None:
        """In a forked child: the board is the parent's, and so was whoever held the lock."""
        self._lock = self._place.lock = threading.RLock()
        self._set_line(list(self._line))

    def _count(self, word: int, step: int) -> None:
        with self._lock:
            self._line[word] += step

    def _tell(self, message: tuple[Any, ...]) -> None:
        if self._channel is not None:
            try:
                self._channel.send(message)
            except (OSError, FdPassError):
                pass  # the supervisor is gone: the watch ends this process

    def _obey(self) -> bool:
        """Hears what the supervisor has said; False when it will never say anything again."""
        assert self._channel is not None
        try:
            order = self._channel.recv(timeout=0)
        except TimeoutError:
            return True  # another thread read it
        except (EndOfChannel, FdPassError, OSError):
            # The supervisor is gone.
            try:
                self._events.unregister(self._channel.fileno())
            except (OSError, KeyError, ValueError):
                pass
            self.drain()
            return False
        if order[0] == "drain":
            self._ordered = True
            for seconds in order[1:]:
                self._look_by = monotonic() + seconds / 2
            self.drain()
        return True

    def _has_orders(self) -> bool:
        """Whether the supervisor told it to drain, or is gone; what was not read yet counts too."""
        return self._ordered or (self._channel is not None and self._channel.poll())

    def _close(self) -> None:
        """At the worker's end: the last counts, then the listening socket. What threads may still wait on goes with the process."""
        self.drain()
        with self._lock:
            if self._report:
                self._tell(("counts", self._line[ACCEPTED], self._line[OPEN]))
            self._line[WAITING] = 0
            # The board goes; connections that outlive the listener are counted nowhere.
            self._set_line(list(self._line))
            self._place.close()
            self._sock.close()


#: The listeners of this process by what they listen on, so that a loop knows them whatever socket object a server makes of the number.
_known: weakref.WeakValueDictionary[tuple[int, int], Listener] = weakref.WeakValueDictionary()


def _identity(fd: int) -> tuple[int, int]:
    # A socket has an inode of its own, and its duplicates share it: what uvicorn makes of fd:// is a duplicate.
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def listener_of(fd: int) -> Listener | None:
    """The Listener that has the listening socket of this number, or a duplicate of it."""
    if not _known:
        return None
    found = _known.get(_identity(fd))
    return found if found is not None and found._sock.fileno() >= 0 else None


class _Poll:
    """select.poll with epoll's calls, where there is no epoll: every waiting worker is woken, and one of them accepts."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self.register, self.unregister = self._poll.register, self._poll.unregister

    def poll(self, timeout: float | None) -> list[tuple[int, int]]:
        """timeout in seconds, as epoll's."""
        return self._poll.poll(None if timeout is None else timeout * 1000)
