"""register(): fdpass's reducers inside multiprocessing's own pickler, put there and taken away exactly."""

from __future__ import annotations

from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

import fdpass.handles  # noqa: F401  (the reducers themselves)
from fdpass import _carriers

if TYPE_CHECKING:
    from collections.abc import Iterator


def _override(pickler: ForkingPickler, obj: Any) -> Any:
    """Sockets and connections that are arguments of a process being started are ours; any other pickle stays the standard library's."""
    reducer = _carriers.raw_reducer(type(obj))
    if reducer is None or _carriers.spawning_popen() is None:
        return NotImplemented
    return reducer(obj)


def register() -> None:
    """Makes raw sockets (subclasses too) and connections, as arguments of multiprocessing processes, travel by fdpass's rules:
    timeout kept, the same descriptor any number of times, hundreds of them under forkserver, a closed one refused before the start.

    For the whole process, whichever context starts the child; the child needs nothing. Twice is once. Elsewhere (Queue, Pipe)
    pickling stays the standard library's. Raises RuntimeError when another library has put its own hook in the same place.
    """
    # The hook is asked before any dispatch table, so whoever registers there before or after us changes nothing.
    present = ForkingPickler.__dict__.get("reducer_override")
    if present is _override:
        return
    if present is not None:
        raise RuntimeError(f"ForkingPickler has a reducer_override already: {present!r}")
    ForkingPickler.reducer_override = _override  # type: ignore[method-assign, assignment]  # the documented hook, set from outside


def unregister() -> None:
    """Takes away what register() put there, and nothing else; without a register() before it does nothing."""
    if ForkingPickler.__dict__.get("reducer_override") is _override:
        del ForkingPickler.reducer_override


@contextmanager
def registered() -> Iterator[None]:
    """register() for the length of a with block. Inside one, or after a register(), it changes nothing."""
    before = ForkingPickler.__dict__.get("reducer_override") is _override
    register()
    try:
        yield
    finally:
        if not before:
            unregister()
