"""A worker's place in the queue of a listening socket, in whatever epoll it waits: join, leave, rotate, stay out, make room, take one.

Shared by Listener (an epoll of its own), the asyncio selector (the loop's) and uvloop (libuv's). It does not know whom it serves.
"""

from __future__ import annotations

import errno
import os
import select
import warnings
from contextlib import nullcontext
from functools import cache
from time import monotonic, monotonic_ns
from typing import TYPE_CHECKING, Any

from fdpass import _syscall
from fdpass._board import HEARTBEAT, LOAD, OPEN, WAITING

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

#: Out of these there is no accepting; the connection stays in the queue, and a level-triggered wait would spin on it.
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
#: The peer gave up while it was queued: accept(2) reports it on the listener, the next connection is fine.
GIVEN_UP = frozenset({errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.ENETDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH})
#: How often a worker without a free descriptor looks whether there is one, in seconds.
ROOM = 0.05
#: A worker that its load keeps out looks so often whether that has changed, and whether a connection waits all the same; it takes one that
#: still waits at a second look, so long afterwards: at the first the one whose it is may just be waking up. In seconds.
LOOK, AGAIN = 0.002, 0.002
#: So long after it came back it goes on looking: that nobody with less was waiting may have been true for a moment only. In seconds.
DOUBT = 0.05


class Place:
    """One registration of a listening socket in one epoll. Threads that share it hold `lock`, except around take().

    fd:        the listening socket's number, borrowed.
    events:    the epoll, or what has its register() and unregister(); borrowed.
    exclusive: ask for EPOLLEXCLUSIVE: a connection wakes one of those that wait, not all.
    rotate:    go to the end of the queue after each connection.
    spare_of:  a number of which a duplicate is kept for the day when there is no other, -1: keep none.
    line:      the worker's line of the board; lines: all lines, among which it stays out while it has more than the least loaded.
    """

    __slots__ = (
        "_behind", "_doubt_until", "_look_at", "_others", "_poll", "_room_at", "_seen", "_spare", "ended", "events", "exclusive", "fd",
        "line", "lock", "pause", "queued", "rotates", "spare_of",
    )  # fmt: skip

    def __init__(
        self,
        fd: int,
        events: Any,
        *,
        exclusive: bool,
        rotate: bool,
        spare_of: int = -1,
        line: Any = None,
        lines: Sequence[Any] = (),
        lock: Any = None,
    ) -> None:
        self.fd, self.events, self.spare_of, self.line = fd, events, spare_of, line
        self.lock = lock if lock is not None else nullcontext()
        self.exclusive = select.EPOLLEXCLUSIVE if exclusive and exclusive_works() else 0
        self.rotates = rotate
        self._others = [other for other in lines if other is not line]
        self._spare, self._look_at, self._room_at, self._doubt_until = -1, 0.0, 0.0, 0.0
        self._seen = self._behind = False
        self._poll: Any = None
        #: In the queue now. Never again once ended.
        self.queued = self.ended = False
        #: Seconds until settle() should be asked again, None: not before something happens.
        self.pause: float | None = None

    @property
    def restless(self) -> bool:
        """Whether others' loads bear on it: settle() is to be asked before each wait."""
        return bool(self._others)

    def settle(self) -> bool:
        """Joins the queue, or stays out of it for want of a descriptor or for its load; whether it is in. `pause` says for how long.

        Raises OSError when the epoll refuses the socket.
        """
        self.pause = None
        if self.ended:
            return True
        if self._others:
            if self._heavy():
                now = monotonic()
                if self.queued:
                    self.leave()
                    self._look_at, self._seen, self._behind = now + LOOK, False, False
                self._doubt_until = now + DOUBT
                self.pause = 0.0 if self._behind else max(0.0, self._look_at - now)
                return False
            if self._doubt_until:
                self.pause = LOOK
                if monotonic() >= self._doubt_until:
                    self.pause, self._doubt_until = None, 0.0
        return self.queued or self._join()

    def overdue(self) -> bool:
        """Whether this worker is out for its load and yet a connection waits, seen twice: who should have taken it did not.

        A lighter worker may be frozen, or busy with what it just began: nobody waits for it longer than two looks. As long as there
        are more, they are overdue as well.
        """
        if self.queued or self.ended or not self._others:
            return False
        now = monotonic()
        if not self._behind and now < self._look_at:
            return False
        if not self.waiting():
            self._seen = self._behind = False
            self._look_at, self.pause = now + LOOK, LOOK
            return False
        if not self._seen:
            self._seen = True
            self._look_at, self.pause = now + AGAIN, AGAIN
            return False
        self._behind = self.room()
        if not self._behind:
            self._look_at, self.pause = now + ROOM, ROOM
        return self._behind

    def waiting(self) -> bool:
        """Whether a connection waits in the socket now."""
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(self.fd, select.POLLIN)
        return any(event & select.POLLIN for _, event in self._poll.poll(0))

    def leave(self) -> bool:
        """Leaves the queue; again does nothing. False when the socket, or the epoll, was closed behind its back."""
        if self.queued:
            self.queued = False
            try:
                self.events.unregister(self.fd)
            except (OSError, ValueError):
                return False  # it is in no epoll any more
        return True

    def rotate(self) -> None:
        """To the end of the queue: an exclusive wake-up goes to whoever registered first, every time."""
        if self.queued and self.rotates:
            if self.leave():
                self.settle()
            else:
                self.ended = True  # by now the number may be of something else

    def end(self) -> None:
        """Leaves for good. The spare descriptor is kept for a last look; close() gives it back."""
        self.ended = True
        self.leave()

    def close(self) -> None:
        """Leaves for good and gives the spare descriptor back."""
        self.end()
        self._give_spare()

    def take(self, sock: socket.socket) -> tuple[socket.socket, Any] | None:
        """One connection of the socket with its address, or None when another worker was faster or the peer gave up.

        Out of descriptors it leaves the queue, and the spare one makes room for this connection. Raises OSError.
        """
        try:
            return sock.accept()
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            if error.errno in GIVEN_UP:
                return None
            if error.errno not in EXHAUSTED:
                raise
            # The exclusive wake-up was spent on this worker: to leave now would strand the connection until the next one
            # comes and wakes another. The spare descriptor makes room for it; without a spare there is no way back in.
            with self.lock:
                self.leave()
                if not self._give_spare():
                    return None
            try:
                return sock.accept()
            except OSError:
                return None

    def keep_spare(self, spare_of: int) -> None:
        """From now on it is in the queue only with a spare descriptor."""
        self.spare_of = spare_of
        if self.queued and self._spare < 0:
            self.leave()
            self.settle()

    def begin_wait(self) -> None:
        """Says on the board that this worker goes to wait, in the queue or out of it."""
        if self.line is not None:
            self.line[HEARTBEAT] = monotonic_ns()
            self.line[WAITING] = int(self.queued)

    def end_wait(self) -> None:
        """Says on the board that it does not."""
        if self.line is not None:
            self.line[WAITING] = 0

    # -- inside ----------------------------------------------------------------------------------------------------------------

    def _join(self) -> bool:
        if not self.room():
            self.pause = max(0.0, self._room_at - monotonic())
            return False
        try:
            self.events.register(self.fd, select.POLLIN | self.exclusive)
        except OSError as error:
            if error.errno not in (errno.ENOMEM, errno.ENOSPC):  # memory, or fs.epoll.max_user_watches
                raise
            self.pause = ROOM
            return False
        self.queued = True
        return True

    def room(self) -> bool:
        """Whether there is a spare descriptor, or none is wanted; looks for one no more often than every ROOM seconds."""
        if self.spare_of < 0 or self._spare >= 0:
            return True
        now = monotonic()
        if now < self._room_at:
            return False
        try:
            self._spare = _syscall.dup(self.spare_of)
        except OSError as error:
            if error.errno not in EXHAUSTED:
                raise
            self._room_at = now + ROOM
            return False
        return True

    def _heavy(self) -> bool:
        """Whether this worker has more than the least loaded of those that wait, by more than the band. A worker that does not wait, be it
        busy, dead or out itself, takes no connection, whatever its load."""
        own = load_of(self.line)
        if own < 2:
            return False
        for other in self._others:
            if other[WAITING]:
                load = load_of(other)
                if own > load + 1 + load // 128:
                    return True
        return False

    def _give_spare(self) -> bool:
        spare, self._spare = self._spare, -1
        if spare >= 0:
            os.close(spare)
        return spare >= 0


def load_of(line: Any) -> int:
    """A worker's load: what its server says, else its open connections."""
    said: int = line[LOAD]
    load: int = said - 1 if said else line[OPEN]
    return load


def exclusive_works() -> bool:
    """Whether this kernel wakes one waiter only (EPOLLEXCLUSIVE, Linux 4.5). FDPASS_FORCE=no-exclusive denies it."""
    return hasattr(select, "EPOLLEXCLUSIVE") and "no-exclusive" not in _syscall.forced() and _probe()


@cache
def _probe() -> bool:
    # A kernel that does not know the flag takes it without a word. One that does refuses to modify such a registration.
    read, write = os.pipe()
    try:
        with select.epoll() as epoll:
            epoll.register(read, select.EPOLLIN | select.EPOLLEXCLUSIVE)
            try:
                epoll.modify(read, select.EPOLLIN)
            except OSError:
                return True
            return False
    except OSError:
        return False
    finally:
        os.close(read)
        os.close(write)


_warned: set[str] = set()


def warn_once(text: str) -> None:
    """A RuntimeWarning, once in this process for each text."""
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, RuntimeWarning, stacklevel=3)
