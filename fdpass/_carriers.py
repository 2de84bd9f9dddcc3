"""How a pickled descriptor travels: which carrier is in force while something is pickled, and where a token is claimed.

Tokens are small tuples inside the pickle. This file moves numbers and owners; what they mean is its callers' affair.
"""

from __future__ import annotations

import _socket
import os
import sys
import weakref
from contextvars import ContextVar
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fdpass import _claims, _store, _syscall
from fdpass.ancillary import recv_fds, send_fds
from fdpass.errors import TicketError
from fdpass.fds import OwnedFd, _own, kind_of

if TYPE_CHECKING:
    from collections.abc import Callable

Token = tuple[Any, ...]

#: Numbers that the frame being pickled will carry; they are borrowed from the objects in it.
outgoing: ContextVar[list[int] | None] = ContextVar("fdpass outgoing frame", default=None)
#: Owners that came with the frame being loaded; None where one was claimed.
incoming: ContextVar[list[OwnedFd | None] | None] = ContextVar("fdpass incoming frame", default=None)

#: Arguments of a forkserver process beyond this many ride a socket pair: CPython's fork server takes 251 and less.
FORKSERVER_DIRECT = 200


def carry(fd: int, what: str, claims: int = 1) -> Token:
    """Hands an open descriptor (borrowed) to the carrier in force and returns the token that claims it.

    claims: how often a token of the store may be claimed; the other carriers do not count.
    Raises ValueError when it is not open, TicketError when the store is full, OSError.
    """
    frame = outgoing.get()
    popen = spawning_popen() if frame is None else None
    if frame is None and popen is None:
        return "ticket", *_store.put(fd, what, claims)
    # A frame leaves it to the kernel whether the number is open: it looks at each before it takes a byte.
    if fd < 0 or (frame is None and kind_of(fd) == "not open"):
        raise ValueError(f"{what} is closed: it has no descriptor to pass on")
    if frame is not None:
        frame.append(fd)
        return ("frame", len(frame) - 1)
    return _inherit(popen, fd)


def claim(token: Token) -> OwnedFd:
    """The descriptor behind a token, owned by the caller. Raises TicketError, PeerRefusedError, DescriptorsLostError, OSError."""
    if token[0] == "frame":
        owners, place = incoming.get(), token[1]
        if owners is None:
            raise TicketError("this descriptor travelled in a frame of a channel and can be loaded only by Channel.recv()")
        owned = owners[place] if place < len(owners) else None
        if owned is None:
            raise TicketError(f"descriptor {place} of this frame was claimed already")
        owners[place] = None
        return owned
    kind, *rest = token
    if kind == "ticket":
        return _claims.claim(*rest)
    if kind in ("number", "index", "ride"):
        return _claim_inherited(kind, *rest)
    raise TicketError(f"a descriptor's token of unknown kind {kind!r}")


#: Filled by the file that knows the types: (class, or "module.name" of one that need not be loaded) -> reducer.
raw_reducers: dict[type | str, Callable[[Any], tuple[Any, ...]]] = {}


def raw_reducer(cls: type) -> Callable[[Any], tuple[Any, ...]] | None:
    """The reducer for objects of this class or of a base of it, None when it is not ours to pickle."""
    try:
        return _raw_reducer(cls)
    except TypeError:  # a metaclass may make its classes unhashable
        return _raw_reducer.__wrapped__(cls)


@lru_cache(maxsize=256)
def _raw_reducer(cls: Any) -> Callable[[Any], tuple[Any, ...]] | None:
    for base in cls.__mro__:
        reducer = raw_reducers.get(base) or raw_reducers.get(f"{base.__module__}.{base.__qualname__}")
        if reducer is not None:
            return reducer
    return None


def spawning_popen() -> Any:
    """The Popen of the multiprocessing process whose arguments are being pickled in this thread, or None."""
    # A signal handler may pickle while the module is being imported.
    get = getattr(sys.modules.get("multiprocessing.context"), "get_spawning_popen", None)
    return None if get is None else get()


# -- the inherited carrier, sending side -------------------------------------------------------------------------------------


class _Outbox:
    """What one process that is being started has been given so far: each descriptor once, however often it appears."""

    def __init__(self) -> None:
        self.tokens: dict[int, Token] = {}
        self.ride: weakref.ref[_Ride] | None = None


class _Ride:
    """A socket pair filled before the start: its far end is an argument like any other, the rest comes through it.

    It pickles as the far end's place. Only the pickler's memo holds it, so the near end closes when the pickling is over.
    """

    def __init__(self, popen: Any) -> None:
        self.near, far = map(_own, _syscall.pair(_socket.SOCK_STREAM))
        self.count = 0
        self.index: int = popen.duplicate_for_child(far.fileno())
        # The fork server is sent a duplicate after the pickling, at a moment of which nobody tells us.
        weakref.finalize(popen, _close_here, far.release(), os.getpid())

    def put(self, fd: int) -> bool:
        """Sends one descriptor ahead; False when the pair is full."""
        try:
            send_fds(self.near, [b"r"], [fd], _socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        self.count += 1
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (self.index,)

    def __del__(self) -> None:
        self.near.close()


def _inherit(popen: Any, fd: int) -> Token:
    box: _Outbox = popen.__dict__.setdefault("_fdpass_outbox", _Outbox())
    token = box.tokens.get(fd)
    if token is None:
        token = _hand_over(popen, box, fd)
        # Of a ride only its place, which is what it pickles to: kept here it would stay open as long as popen.
        box.tokens[fd] = tuple(part.index if isinstance(part, _Ride) else part for part in token)
    return token


def _hand_over(popen: Any, box: _Outbox, fd: int) -> Token:
    if getattr(popen, "method", None) != "forkserver":
        return ("number", popen.duplicate_for_child(fd), 0, _identity(fd))
    if len(popen._fds) < FORKSERVER_DIRECT:
        return ("index", popen.duplicate_for_child(fd), 0, _identity(fd))
    ride = box.ride() if box.ride is not None else None
    if ride is None or not ride.put(fd):
        ride = _Ride(popen)
        box.ride = weakref.ref(ride)
        if not ride.put(fd):
            raise OSError(f"a new socket pair takes no descriptor ({fd})")
    return ("ride", ride, ride.count - 1, _identity(fd))


def _identity(fd: int) -> tuple[int, int]:
    """What is behind a number. It travels along: a number closed after the pickling may be another file when the child gets it."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _close_here(fd: int, pid: int) -> None:
    if pid == os.getpid():
        os.close(fd)


# -- the inherited carrier, receiving side -----------------------------------------------------------------------------------


class _Inbox:
    """What this process was started with. Open only while its arguments are being loaded."""

    def __init__(self) -> None:
        self.claimed: set[int] = set()
        self.rides: dict[int, tuple[OwnedFd, list[int]]] = {}  # place -> far end, what came through it

    def close(self) -> None:
        while self.rides:
            end, arrived = self.rides.popitem()[1]
            end.close()
            for number in arrived:
                if number not in self.claimed:
                    os.close(number)
        self.claimed.clear()


_inbox: _Inbox | None = None


def _claim_inherited(kind: str, place: int, seat: int, identity: tuple[int, int]) -> OwnedFd:
    global _inbox
    from multiprocessing import process, util

    if not getattr(process.current_process(), "_inheriting", False):
        raise TicketError("this descriptor was an argument of a process that was being started and can be loaded only in its start")
    if _inbox is None:
        _inbox = _Inbox()
        # multiprocessing calls it once the arguments are loaded, before the target runs.
        util.register_after_fork(_inbox, _Inbox.close)
    if kind == "number":
        return _take_number(_inbox, place, identity)
    from multiprocessing import forkserver

    handed: Any = forkserver.get_inherited_fds()
    number: int = handed[place]
    if kind == "index":
        return _take_number(_inbox, number, identity)
    if place not in _inbox.rides:
        _inbox.rides[place] = OwnedFd(number), []
    end, arrived = _inbox.rides[place]
    while len(arrived) <= seat:
        message = recv_fds(end, 1, 1)
        if not message.data:
            raise TicketError(f"{len(arrived)} descriptors came through the socket pair filled before the start, number {seat + 1} did not")
        arrived += [owned.release() for owned in message.fds]
    return _take_number(_inbox, arrived[seat], identity)


def _take_number(inbox: _Inbox, number: int, identity: tuple[int, int]) -> OwnedFd:
    try:
        same = _identity(number) == identity
    except OSError:
        same = False
    if not same:
        raise TicketError(
            f"inherited descriptor {number} is not what was pickled: it was closed before the process had started, "
            "or claimed and closed already"
        )
    if number not in inbox.claimed:
        inbox.claimed.add(number)
        return OwnedFd(number)
    # It appears a second time: the first owner has the number itself, this one gets a duplicate.
    return _own(_syscall.dup(number))
