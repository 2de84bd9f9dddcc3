"""EventLoop: asyncio's own loop with fair listening sockets. Its selector registers them exclusively and re-queues them after a wake-up.

Of asyncio's privates it overrides one method, _start_serving(); what a place in the queue is stands in _queue.py.
"""

from __future__ import annotations

import asyncio
import errno
import math
import select
import selectors
import weakref
from collections.abc import Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any

from fdpass import _syscall
from fdpass._queue import ROOM, Place, exclusive_works, warn_once
from fdpass.listener import listener_of

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from fdpass.listener import Listener

_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
_EPOLLIN, _EPOLLOUT = getattr(select, "EPOLLIN", 1), getattr(select, "EPOLLOUT", 4)
_NOT_IN, _NOT_OUT = ~_EPOLLIN, ~_EPOLLOUT


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A new asyncio event loop whose listening sockets share their connections fairly with other processes.

    For `uvicorn --loop fdpass.aio:new_event_loop` and asyncio.Runner(loop_factory=). Any listening socket counts, and so does any
    server: start_server, create_server, aiohttp, hypercorn. Where the kernel has no EPOLLEXCLUSIVE it is asyncio's own loop,
    and one RuntimeWarning says so.
    """
    if not exclusive_works():
        warn_once("EPOLLEXCLUSIVE is missing here: asyncio's own event loop is used, and every connection wakes every worker")
        return asyncio.SelectorEventLoop()
    return EventLoop()


class EventLoop(asyncio.SelectorEventLoop):
    """asyncio's event loop on a FairSelector. Its servers accept up to accept_batch connections each time they are woken (1 or more).

    A server without a free descriptor leaves the queue, where other processes serve, until there is one: nothing is logged.
    Serving a Listener's socket counts its connections on the group's board and obeys the group's order to drain.
    """

    def __init__(self, *, accept_batch: int = 1) -> None:
        # asyncio's __del__ looks at it, in whatever state an __init__() was left.
        self._closed = True
        self._batch = check_batch(accept_batch)
        self._fair = FairSelector()
        self._followed: weakref.WeakSet[Listener] = weakref.WeakSet()
        try:
            super().__init__(self._fair)
        except BaseException:
            self._fair.close()
            self._closed = True
            raise

    # What asyncio's Server calls, in every version from 3.11 to 3.14, with the same two arguments first.
    def _start_serving(self, protocol_factory: Any, sock: socket.socket, *args: Any, **options: Any) -> None:
        door = _Door(self._fair, sock, self._batch)
        super()._start_serving(protocol_factory, door, *args, **options)  # type: ignore[misc]  # typeshed does not list it
        listener = door.open()
        if listener is not None and listener not in self._followed:
            self._followed.add(listener)
            listener._follow(self)
            listener._on_drain(self._look_up)

    def close(self) -> None:
        """Closes the loop; again does nothing."""
        super().close()
        for listener in self._followed:
            listener._off_drain(self._look_up)

    def _look_up(self) -> None:
        """Ends the wait, so that the selector sees who drains. From any thread or signal handler."""
        try:
            self.call_soon_threadsafe(_nothing)
        except RuntimeError:
            pass  # the loop was closed


def _nothing() -> None:
    pass


def check_batch(accept_batch: int) -> int:
    """accept_batch, if it is a number of 1 or more. Raises TypeError, ValueError."""
    if not isinstance(accept_batch, int) or isinstance(accept_batch, bool):
        raise TypeError(f"accept_batch is a number (int), not {type(accept_batch).__name__}")
    if accept_batch < 1:
        raise ValueError(f"accept_batch is at least 1, not {accept_batch}")
    return accept_batch


class _Door:
    """A listening socket as asyncio's accept loop sees it: it gives no more than a batch for each wake-up, and never EMFILE."""

    __slots__ = ("_given", "_listener", "_most", "_place", "_selector", "_sock", "_turn")

    def __init__(self, selector: FairSelector, sock: socket.socket, most: int) -> None:
        self._selector, self._sock, self._most = selector, sock, most
        self._place: Place | None = None
        self._listener: Listener | None = None
        self._given, self._turn = 0, -1

    def open(self) -> Listener | None:
        """Once it was registered: finds its place, and whose socket it is."""
        fd = self._sock.fileno()
        self._place, self._listener = self._selector.place(fd), listener_of(fd)
        if self._place is not None:
            self._selector.keep_spare(self._place)
        return self._listener

    def fileno(self) -> int:
        """The socket's."""
        return self._sock.fileno()

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection. Raises BlockingIOError when there is none, when the batch is over, and for want of a descriptor."""
        if self._turn != self._selector.turn:
            self._turn, self._given = self._selector.turn, 0
        place = self._place
        if place is None:
            return self._sock.accept()
        if self._given < self._most:
            taken = place.take(self._sock)
            if not place.queued:
                self._selector.watch(place)
            if taken is not None:
                self._given += 1
                return taken if self._listener is None else self._listener._admit(*taken)
        raise BlockingIOError(errno.EAGAIN, "no more connections for this wake-up")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


class FairSelector(selectors.BaseSelector):
    """selectors.EpollSelector, but that a listening socket registered for reading alone gets a fair place in its queue.

    It is registered with EPOLLEXCLUSIVE, so that one connection wakes one process, and goes to the end of the queue before the
    next wait after each wake-up. The listening socket must be in this epoll itself and not in one inside it: only a process that
    waits counts for an exclusive wake-up.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._keys: dict[int, selectors.SelectorKey] = {}
        self._map: _Map | None = _Map(self)
        self._listening: set[int] = set()
        self._places: dict[int, Place] = {}
        self._listeners: dict[int, Listener] = {}
        self._woken: list[Place] = []
        #: Those of a group's listeners: their waits stand on the board.
        self._lined: list[Place] = []
        #: Places to look after before each wait: out of the queue, coming back to it, or of a listener that drains.
        self._watched: dict[int, Place] = {}
        self._told: weakref.WeakSet[Listener] = weakref.WeakSet()
        #: Of drained listeners: how many last looks are left; a sole one looks until nothing is left.
        self._looks: dict[int, float] = {}
        #: Counts the calls of select().
        self.turn = 0

    def fileno(self) -> int:
        """The epoll's number. Borrowed."""
        return self._epoll.fileno()

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        """What is registered, by file object; None once closed, as with the standard selectors."""
        return self._map  # type: ignore[return-value]  # None is what the standard selectors return, against typeshed

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """As selectors.BaseSelector. Raises ValueError, KeyError when it is registered, OSError."""
        if not events or events & ~(_READ | _WRITE):
            raise ValueError(f"Invalid events: {events!r}")
        fd = self.number_of(fileobj)
        if fd in self._keys:
            raise KeyError(f"{fileobj!r} (FD {fd}) is already registered")
        listens = events == _READ and _syscall.listens(fd)
        self._add(fd, events, listens)
        if listens:
            self._listening.add(fd)
        key = self._keys[fd] = selectors.SelectorKey(fileobj, fd, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        """As selectors.BaseSelector. Raises ValueError, KeyError when it is not registered."""
        try:
            key = self._keys.pop(self.number_of(fileobj))
        except KeyError:
            raise KeyError(f"{fileobj!r} is not registered") from None
        self._listening.discard(key.fd)
        self._remove(key.fd)
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """As selectors.BaseSelector. Raises ValueError, KeyError when it is not registered, OSError."""
        if not events or events & ~(_READ | _WRITE):
            raise ValueError(f"Invalid events: {events!r}")
        fd = self.number_of(fileobj)
        try:
            key = self._keys[fd]
        except KeyError:
            raise KeyError(f"{fileobj!r} is not registered") from None
        if events != key.events:
            try:
                if fd in self._listening:
                    # EPOLL_CTL_MOD is refused for an exclusive registration.
                    self._remove(fd)
                    self._add(fd, events, events == _READ)
                else:
                    self._epoll.modify(fd, _mask(events))
            except BaseException:
                self.unregister(fileobj)
                raise
        key = selectors.SelectorKey(key.fileobj, fd, events, data)
        self._keys[fd] = key
        return key

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """As selectors.BaseSelector. timeout: seconds, 0 or less does not wait, None waits for ever."""
        self.turn += 1
        if self._woken:
            for place in self._woken:
                place.rotate()
                if not place.queued:
                    self.watch(place)
            self._woken.clear()
        for place in self._lined:
            if place.restless and (not self._settle(place) or place.pause is not None):
                self._watched[place.fd] = place
        if self._watched:
            return self._select_watched(timeout)
        # epoll_wait() counts milliseconds: rounded up, so that a timer is due when it returns.
        return self._ready(self._wait(-1 if timeout is None else 0 if timeout <= 0 else math.ceil(timeout * 1e3) * 1e-3))

    def close(self) -> None:
        """Closes the epoll; again does nothing."""
        for listener in self._told:
            listener._off_drain(self._hear)
        for fd in list(self._places):
            self._remove(fd)
        self._epoll.close()
        self._keys.clear()
        self._listening.clear()
        self._map = None

    # -- for the event loop ----------------------------------------------------------------------------------------------------

    def place(self, fd: int) -> Place | None:
        """The place that a descriptor has as a listening socket."""
        return self._places.get(fd)

    def keep_spare(self, place: Place) -> None:
        """Keeps a descriptor free for when there is no other; without one the place is left."""
        place.keep_spare(self._epoll.fileno())
        if not place.queued:
            self.watch(place)

    def watch(self, place: Place) -> None:
        """Looks after a place before each wait, until it is in the queue."""
        if self._places.get(place.fd) is place:
            self._watched[place.fd] = place

    # -- inside ----------------------------------------------------------------------------------------------------------------

    def number_of(self, fileobj: Any) -> int:
        """The descriptor's number; of a closed file object, the one it was registered with. Raises ValueError."""
        if type(fileobj) is int:
            number = fileobj
        else:
            try:
                number = int(fileobj.fileno()) if not isinstance(fileobj, int) else int(fileobj)
            except (AttributeError, TypeError, ValueError):
                number = -1
        if number < 0:
            for key in self._keys.values():
                if key.fileobj is fileobj:
                    return key.fd
            raise ValueError(f"Invalid file object: {fileobj!r}")
        return number

    def _add(self, fd: int, events: int, fair: bool) -> None:
        if not fair:
            self._epoll.register(fd, _mask(events))
            return
        listener = listener_of(fd)
        place = Place(fd, self._epoll, exclusive=True, rotate=True) if listener is None else listener._place_in(self._epoll, fd)
        place.settle()
        self._places[fd] = place
        if not place.queued:
            self._watched[fd] = place
        if listener is not None:
            self._listeners[fd] = listener
            self._lined.append(place)
            listener._loops += 1
            if listener.draining:
                self._watched[fd] = place
            elif listener not in self._told:
                self._told.add(listener)
                listener._on_drain(self._hear)

    def _remove(self, fd: int) -> None:
        place = self._places.pop(fd, None)
        if place is None:
            try:
                self._epoll.unregister(fd)
            except OSError:
                pass  # it was closed, and so it is in no epoll
            return
        self._watched.pop(fd, None)
        place.close()
        if place in self._woken:
            self._woken.remove(place)
        listener = self._listeners.pop(fd, None)
        if listener is not None:
            self._lined.remove(place)
            place.end_wait()
            listener._loops -= 1
            if self._looks.pop(fd, None) is not None:
                listener._left()

    def _settle(self, place: Place) -> bool:
        try:
            return place.settle()
        except OSError:
            # Closed without a word, which other selectors do not mind either.
            place.end()
            return True

    def _wait(self, seconds: float) -> list[tuple[int, int]]:
        for place in self._lined:
            place.begin_wait()
        try:
            return self._epoll.poll(seconds, len(self._keys) or 1)
        except InterruptedError:
            return []
        finally:
            for place in self._lined:
                place.end_wait()

    def _hear(self) -> None:
        """A listener drains: its places are looked after before the next wait. From any thread or signal handler."""
        for fd, listener in list(self._listeners.items()):
            place = self._places.get(fd)
            if listener.draining and place is not None:
                self._watched[fd] = place

    def _ready(self, events: list[tuple[int, int]]) -> list[tuple[selectors.SelectorKey, int]]:
        keys, places = self._keys, self._places
        ready = []
        for fd, event in events:
            key = keys.get(fd)
            if key is not None:
                if fd in places:
                    self._woken.append(places[fd])
                found = (event & _NOT_IN and _WRITE) | (event & _NOT_OUT and _READ)
                ready.append((key, found & key.events))
        return ready

    def _select_watched(self, timeout: float | None) -> list[tuple[selectors.SelectorKey, int]]:
        """select() while some place needs looking after. Looks come every few milliseconds, and none of them wakes the event loop."""
        deadline = None if timeout is None else monotonic() + max(0.0, timeout)
        while True:
            due: list[int] = []
            pause: float | None = None
            for fd, place in list(self._watched.items()):
                again = self._attend(fd, place, due)
                if again is not None:
                    pause = again if pause is None else min(pause, again)
            left = 0.0 if due else pause
            if deadline is not None:
                until = max(0.0, deadline - monotonic())
                left = until if left is None else min(left, until)
            ready = self._ready(self._wait(-1 if left is None else math.ceil(left * 1e3) * 1e-3))
            ready += [(self._keys[fd], _READ) for fd in due]
            if ready or (deadline is not None and monotonic() >= deadline):
                return ready

    def _attend(self, fd: int, place: Place, due: list[int]) -> float | None:
        """Looks after one place before a wait: seconds until the next look, None: none is needed. due: whose connections wait for us."""
        listener = self._listeners.get(fd)
        if listener is not None and listener.draining:
            if not place.ended:
                place.end()
                # The order may have come right after an exclusive wake-up, which nobody else gets for that connection.
                self._looks[fd] = 0 if listener._done else math.inf if listener._sole else 1
            if self._looks.get(fd, 0) > 0 and monotonic() < listener._look_by and place.waiting():
                if not place.room():
                    return ROOM
                self._looks[fd] -= 1
                due.append(fd)
                return None
            # By now what the last look accepted is counted.
            del self._watched[fd]
            if self._looks.pop(fd, None) is not None:
                place.close()
                listener._left()
            return None
        if self._settle(place):
            if place.pause is None:
                del self._watched[fd]
                if listener is not None and listener.draining:  # since it was looked at, in another thread
                    self._watched[fd] = place
        elif place.overdue():
            due.append(fd)
        return place.pause


def _mask(events: int) -> int:
    return (_EPOLLIN if events & _READ else 0) | (_EPOLLOUT if events & _WRITE else 0)


class _Map(Mapping[Any, selectors.SelectorKey]):
    """What get_map() gives: a view by file object."""

    __slots__ = ("_selector",)

    def __init__(self, selector: FairSelector) -> None:
        self._selector = selector

    def __len__(self) -> int:
        return len(self._selector._keys)

    def get(self, fileobj: Any, default: Any = None) -> Any:
        """As of any mapping; an event loop asks for a number."""
        if type(fileobj) is int and fileobj >= 0:
            return self._selector._keys.get(fileobj, default)
        return self._selector._keys.get(self._selector.number_of(fileobj), default)

    def __getitem__(self, fileobj: Any) -> selectors.SelectorKey:
        try:
            return self._selector._keys[self._selector.number_of(fileobj)]
        except KeyError:
            raise KeyError(f"{fileobj!r} is not registered") from None

    def __iter__(self) -> Iterator[int]:
        return iter(self._selector._keys)
