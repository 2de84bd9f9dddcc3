"""register(): fdpass inside multiprocessing's own pickler, in this process and in those that multiprocessing starts from it.

What is put there, and taken away exactly: two methods of ForkingPickler, DupFd, and one more entry in a child's preparation data.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from contextlib import contextmanager
from multiprocessing import reduction as mp_reduction
from multiprocessing import spawn as mp_spawn
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any, NoReturn

import fdpass.handles  # noqa: F401  (the reducers themselves)
from fdpass import _carriers, _store, _syscall
from fdpass.errors import ClosedError, DescriptorsLostError, TicketError
from fdpass.fds import OwnedFd, _own
from fdpass.limits import soft_limit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def register(max_unclaimed: int | None = None, ttl: float | None = None, linger: float = 2.0) -> None:
    """Makes raw sockets (subclasses too) and connections travel by fdpass's rules through every multiprocessing queue, pipe, pool
    and process of this program, and with them what pickles by multiprocessing.reduction.DupFd: torch tensors, the Arena and
    BufferWrapper of multiprocessing.heap. Shared ctypes and locks stay what they are, arguments of processes only.

    max_unclaimed: how many pickled descriptors may wait to be loaded; never more than three quarters of RLIMIT_NOFILE, which is
    also what None means. ttl: seconds after which one that nobody loaded is closed, None never. linger: seconds that the process
    waits at its exit while some are unclaimed.

    Holds for the whole process and for what it starts by fork, spawn or forkserver, whose programs need no line; a process without
    it loads the pickles all the same. Again it only changes the settings. Raises TypeError and ValueError for a setting,
    RuntimeError when another library has put its own hook in the same place.
    """
    wanted = _store.Settings(max_unclaimed, ttl, linger)
    # The hook is asked before any dispatch table, so whoever registers there before or after us changes nothing.
    present = ForkingPickler.__dict__.get("reducer_override")
    if present is not None and present is not _override:
        raise RuntimeError(f"ForkingPickler has a reducer_override already: {present!r}")
    _store.configure(wanted)
    if present is None:
        for owner, name, make in _PLACES:
            before = owner.__dict__.get(name)
            _installed[name] = make(before), before
            setattr(owner, name, _installed[name][0])


def unregister() -> None:
    """Takes away what register() put there, and nothing else; without a register() before it does nothing.

    What somebody else has wrapped in the meantime stays where it is, and does what it did before.
    """
    if not _is_registered():
        return
    for owner, name, _ in reversed(_PLACES):
        ours, before = _installed.pop(name)
        if owner.__dict__.get(name) is not ours:
            continue
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
    _store.configure(_store.Settings())


@contextmanager
def registered(max_unclaimed: int | None = None, ttl: float | None = None, linger: float = 2.0) -> Iterator[None]:
    """register() for the length of a with block. Inside one, or after a register(), only the settings change, and change back."""
    before = _store.settings() if _is_registered() else None
    register(max_unclaimed, ttl, linger)
    try:
        yield
    finally:
        if before is None:
            unregister()
        else:
            _store.configure(before)


def _is_registered() -> bool:
    return ForkingPickler.__dict__.get("reducer_override") is _override


# -- what is put in place ------------------------------------------------------------------------------------------------------


def _override(pickler: ForkingPickler, obj: Any) -> Any:
    """ForkingPickler.reducer_override: sockets, connections and our own are ours, everything else pickles as it did."""
    reducer = _carriers.raw_reducer(type(obj))
    if reducer is None:
        return NotImplemented
    try:
        return reducer(obj)
    except (TypeError, ValueError, ClosedError, TicketError, OSError) as error:
        late = isinstance(error, (ValueError, ClosedError)) and _closed(obj)
        where, reports = _pickling_thread()
        if where == "queue" and not reports:
            return _lost(_cure(obj, where) if late else _refused(obj, error))
        if where and late:
            # The future of an executor and the result of a pool get what is raised here: all that is missing is a better word.
            raise (ClosedError if isinstance(error, ClosedError) else ValueError)(_cure(obj, where)) from error
        raise


def _dump_over(before: Callable[..., None] | None) -> Callable[..., None]:
    def dump(pickler: ForkingPickler, obj: Any) -> None:
        """ForkingPickler.dump: tickets of a pickling that fails are withdrawn, for nobody will ever claim them."""
        made: list[bytes] = []
        token = _store.making.set(made)
        try:
            if before is None:
                super(ForkingPickler, pickler).dump(obj)
            else:
                before(pickler, obj)
        except BaseException:
            for ticket in made:
                _store.withdraw(ticket)
            raise
        finally:
            _store.making.reset(token)
        # A pickling inside a pickling: the outer one may fail yet.
        outer = _store.making.get()
        if outer is not None:
            outer += made

    return dump


def _dup_fd_over(before: Callable[[int], Any]) -> Callable[[int], Any]:
    def DupFd(fd: int) -> Any:
        """multiprocessing.reduction.DupFd: an object that pickles and whose detach() gives, once, the number of a duplicate of fd."""
        if not _is_registered() or _carriers.spawning_popen() is not None:
            return before(fd)
        return _Duplicate(fd)

    return DupFd


class _Duplicate:
    """What our DupFd returns: a duplicate here, a ticket in the pickle, claimed by detach() there."""

    __slots__ = ("_owned", "_token")

    def __init__(self, fd: int) -> None:
        self._token: _carriers.Token | None = None
        self._owned: OwnedFd | None = _own(_syscall.dup(fd))

    def __reduce__(self) -> tuple[Any, ...]:
        if self._token is not None:
            return _arrived, (self._token,)
        if self._owned is None:
            raise ClosedError("this duplicate was detached already")
        return _arrived, (_carriers.carry(self._owned.fileno(), "DupFd"),)

    def detach(self) -> int:
        """The number, which is the caller's to close. Raises TicketError, ClosedError, DescriptorsLostError, OSError."""
        if self._token is not None:
            spare = _spare_number()
            try:
                return _carriers.claim(self._token).release()
            finally:
                os.close(spare)
        owned, self._owned = self._owned, None
        if owned is None:
            raise ClosedError("this duplicate was detached already")
        return owned.release()

    def __del__(self) -> None:
        owned = getattr(self, "_owned", None)
        if owned is not None:
            owned.close()


def _arrived(token: _carriers.Token) -> _Duplicate:
    duplicate = _Duplicate.__new__(_Duplicate)
    duplicate._token, duplicate._owned = token, None
    return duplicate


def _spare_number() -> int:
    """A number to be given back right after a claim: for the duplicate that whoever detaches makes at once, as torch does of each
    tensor's memory. Without one it would fail there with a used ticket, here it fails with an untouched one."""
    taken: list[int] = []
    try:
        taken.append(os.open("/", os.O_RDONLY | os.O_CLOEXEC))
        # A second one, for the claim itself.
        os.close(os.dup(taken[0]))
    except OSError as error:
        got = len(taken)
        if got:
            os.close(taken[0])
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        limit = soft_limit() if error.errno == errno.EMFILE else None
        full = "the system's table of open files is full" if limit is None else f"this process's table is full (RLIMIT_NOFILE is {limit})"
        raise DescriptorsLostError(
            f"a pickled descriptor cannot be loaded: needed 2 free numbers (one for the duplicate that its user makes), got {got}: {full}. "
            "Its ticket is untouched: close something and load again",
            2, got, limit, b"", error.errno,
        ) from None  # fmt: skip
    return taken[0]


def _preparation_over(before: Callable[[str], dict[str, Any]]) -> Callable[[str], dict[str, Any]]:
    def get_preparation_data(name: str) -> dict[str, Any]:
        """multiprocessing.spawn.get_preparation_data: what a spawned or fork-server child loads before anything else."""
        data = before(name)
        if _is_registered():
            data["fdpass"] = _Arrival(data.get("sys_path", sys.path), _store.settings())
        return data

    return get_preparation_data


class _Arrival:
    """Registers in the process that unpickles it, where fdpass can be imported, and does nothing where it cannot."""

    def __init__(self, path: list[str], settings: _store.Settings) -> None:
        self.path, self.settings = path, tuple(settings)

    def __reduce__(self) -> tuple[Any, ...]:
        # Not by a name of ours: the child has not got this process's sys.path yet, and an import that fails would end it.
        return exec, (_ARRIVE, {"path": self.path, "settings": self.settings})


_ARRIVE = """
import sys
before, sys.path = sys.path, path
try:
    from fdpass.reduction import register
except ImportError:
    pass
else:
    register(*settings)
finally:
    sys.path = before
"""

#: Where, the name there, and what makes ours of what was there. The first one says whether we are registered.
_PLACES: tuple[tuple[Any, str, Callable[[Any], Any]], ...] = (
    (ForkingPickler, "reducer_override", lambda before: _override),
    (ForkingPickler, "dump", _dump_over),
    (mp_reduction, "DupFd", _dup_fd_over),
    (mp_spawn, "get_preparation_data", _preparation_over),
)
#: Ours, and what it replaced; None: nothing of that class's own.
_installed: dict[str, tuple[Any, Any]] = {}


# -- what fails in a thread of multiprocessing's -------------------------------------------------------------------------------


def _closed(obj: Any) -> bool:
    """Whether obj has no descriptor any more."""
    if getattr(obj, "closed", False):
        return True
    try:
        return bool(obj.fileno() < 0)
    except Exception:  # whatever a subclass raises, it is not known to be closed
        return False


def _pickling_thread() -> tuple[str, bool]:
    """Which thread is pickling what a program handed over earlier: that of a "queue" or a "pool", "" for none; and whether somebody
    hears its errors. A queue of multiprocessing's own prints them and drops the item."""
    feed = getattr(getattr(sys.modules.get("multiprocessing.queues"), "Queue", None), "_feed", None)
    tasks = getattr(getattr(sys.modules.get("multiprocessing.pool"), "Pool", None), "_handle_tasks", None)
    frame = sys._getframe()
    while frame is not None:
        if feed is not None and frame.f_code is feed.__code__:
            silent = sys.modules["multiprocessing.queues"].Queue._on_queue_feeder_error
            return "queue", frame.f_locals.get("onerror") is not silent
        if tasks is not None and frame.f_code is tasks.__code__:
            return "pool", True
        frame = frame.f_back  # type: ignore[assignment]  # None ends the loop
    return "", True


def _cure(obj: Any, where: str) -> str:
    kind = type(obj).__name__
    handed, hand = ("put into a queue", "Put") if where == "queue" else ("given to a pool", "Give it")
    if kind == "SocketHandle":
        cure = f"{hand} the handle and let go of it without close(): it closes when the {where} is done with it"
    else:
        cure = f"{hand} a SocketHandle(sock) instead: it holds a duplicate, so sock may be closed at once"
    return f"an item with a {kind} was {handed}, and the {kind} was closed before the {where}'s thread had pickled it. {cure}"


def _refused(obj: Any, error: Exception) -> str:
    kind = "DupFd" if isinstance(obj, _Duplicate) else type(obj).__name__
    return f"an item with a {kind} was put into a queue, and could not be pickled there: {error}"


def _lost(text: str) -> tuple[Any, ...]:
    """The item travels as its own error: get() raises it in the receiver, and this process is warned."""
    try:
        warnings.warn(f"{text}. The receiver's get() raises TicketError", RuntimeWarning, stacklevel=1)
    except RuntimeWarning:  # where warnings are errors; raised here it would be printed and the item lost
        traceback.print_exc()
    return _raise_lost, (text,)


def _raise_lost(text: str) -> NoReturn:
    raise TicketError(text)


#: Pickles by itself; here so that a queue treats what it cannot keep as it treats a socket.
_carriers.raw_reducers[_Duplicate] = _Duplicate.__reduce__
