"""Waiting for several groups and foreign processes at once: the first failure ends the wait, and the groups."""

from __future__ import annotations

import select
import subprocess
from multiprocessing import process as mp_process
from time import monotonic
from typing import TYPE_CHECKING, Any

from fdpass._launch import pidfd_of
from fdpass.errors import WorkerDied
from fdpass.workers import WorkerGroup

if TYPE_CHECKING:
    from fdpass.fds import OwnedFd


def wait_for_completion_or_failure(*watched: Any, timeout: float | None = None) -> None:
    """Waits for WorkerGroups, multiprocessing processes and subprocess.Popen objects; the first failure stops the groups and raises.

    Returns when all have ended with exit status 0. timeout: seconds, None waits for ever. Raises WorkerDied with name, pid and
    exit status or signal, TimeoutError (nothing is stopped then), TypeError, ValueError for a process that was not started.
    Foreign processes are not ended: they are their owner's.
    """
    waiting: dict[Any, _Watched] = {}
    deadline = None if timeout is None else monotonic() + timeout
    try:
        for item in watched:
            waiting[item] = _Watched(item)
        while waiting:
            left = None if deadline is None else deadline - monotonic()
            poll = select.poll()
            for one in waiting.values():
                if one.fd >= 0:
                    poll.register(one.fd, select.POLLIN)
            # Where there are no pidfds a Popen has nothing to wait on: it is asked ten times a second.
            blind = any(one.fd < 0 for one in waiting.values())
            slice_ = min(left if left is not None else 3600.0, 0.1 if blind else 3600.0)
            if not any(one.over() for one in waiting.values()):
                if left is not None and left <= 0:
                    raise TimeoutError(f"{len(waiting)} of {len(watched)} still run after {timeout} s")
                poll.poll(max(0.0, slice_) * 1000 + 1)
            for item, one in list(waiting.items()):
                if one.over():
                    one.check()
                    one.close()
                    del waiting[item]
    except WorkerDied:
        for item in watched:
            if isinstance(item, WorkerGroup):
                item.stop()
        raise
    finally:
        for one in waiting.values():
            one.close()


class _Watched:
    """One thing that may end: a descriptor to wait on, whether it is over, and how it ended."""

    def __init__(self, item: Any) -> None:
        self.item = item
        self.owned: OwnedFd | None = None
        if isinstance(item, WorkerGroup):
            item._demand_started()
            self.fd = item.fileno()
        elif isinstance(item, subprocess.Popen):
            self.owned = pidfd_of(item.pid) if item.poll() is None else None
            self.fd = -1 if self.owned is None else self.owned.fileno()
        elif isinstance(item, mp_process.BaseProcess):
            if item.pid is None:
                raise ValueError(f"{item!r} was not started")
            self.fd = item.sentinel
        else:
            raise TypeError(f"a WorkerGroup, a multiprocessing process or a subprocess.Popen is awaited, not {type(item).__name__}")

    def over(self) -> bool:
        if isinstance(self.item, WorkerGroup):
            return self.item._failure is not None or self.item._trouble is not None or self.item._state in ("ended", "stopped")
        if isinstance(self.item, subprocess.Popen):
            return self.item.poll() is not None
        # The sentinel closes a little before the process can be waited for; join() waits for the rest.
        if select_ready(self.fd):
            self.item.join()
        return self.item.exitcode is not None

    def check(self) -> None:
        if isinstance(self.item, WorkerGroup):
            self.item.wait()
            return
        if isinstance(self.item, subprocess.Popen):
            command: Any = self.item.args
            name = str(command[0] if isinstance(command, (list, tuple)) else command)
            pid, code = self.item.pid, self.item.returncode
        else:
            name, pid, code = self.item.name, self.item.pid, self.item.exitcode
        if code != 0:
            raise WorkerDied(name, pid, code)

    def close(self) -> None:
        if self.owned is not None:
            self.owned.close()


def select_ready(fd: int) -> bool:
    """Whether fd is readable now."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
