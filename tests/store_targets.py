"""What the processes of the store's tests run: importable by name, as spawn and forkserver want it."""

from __future__ import annotations

import os
import pickle
import socket
import sys
from typing import Any

import fdpass


class Mine(socket.socket):
    """A socket class of somebody's own."""


def echo(queue: Any, out: Any) -> None:
    """Sends its pid through every socket that arrives, and back what get() raises; None ends it with the facts of this process."""
    from multiprocessing.reduction import ForkingPickler

    while True:
        try:
            item = queue.get()
        except fdpass.FdPassError as error:
            out.put((type(error).__name__, str(error)))
            continue
        if item is None:
            break
        sock = item.open() if isinstance(item, fdpass.SocketHandle) else item
        sock.sendall(b"%d" % os.getpid())
        sock.close()
    hooks = sorted({"reducer_override", "dump"} & set(vars(ForkingPickler)))
    out.put((hooks, fdpass.store_stats().limit, "multiprocessing.resource_sharer" in sys.modules))


def pids_of(items: list[Any]) -> list[str]:
    """Types of what arrived; each socket says this process's pid."""
    for item in items:
        item.sendall(b"%d" % os.getpid())
    return [type(item).__name__ for item in items]


def load(raw: bytes) -> str:
    """What loading a pickle comes to: its class, or the error in words."""
    try:
        loaded = pickle.loads(raw)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    loaded.close()
    return type(loaded).__name__


class Fails:
    """Does not pickle."""

    def __reduce__(self) -> Any:
        raise LookupError("this one does not pickle")
