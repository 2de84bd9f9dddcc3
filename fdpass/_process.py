"""One process of a group, as the supervisor holds it: its start, what it says, how it is told to go, how it ended. It knows no other."""

from __future__ import annotations

import os
import signal
from time import monotonic
from typing import TYPE_CHECKING, Any

from fdpass._board import ACCEPTED, ASKED, GENERATION, HEARTBEAT, LOAD, OPEN, WAITING
from fdpass._launch import Cargo, exit_status, pidfd_of
from fdpass._worker import run
from fdpass.channel import Channel, Pipe
from fdpass.errors import FdPassError

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.process import BaseProcess

    from fdpass.fds import OwnedFd

#: Of the time that a worker has to end, what is kept at its end for SIGTERM to work: a fifth, at most so many seconds.
LAST_PART, LAST_SECONDS = 0.2, 2.0
#: How often a worker that has drained is looked at (its connections may all have ended), in seconds.
LOOK = 0.05


class WorkerProcess:
    """state: starting, ready, stopping (told to go) or ended.

    number, line: its line of the board. deadline: by when it must be ready. end_by: by when it must have ended, once it was told to go.
    """

    def __init__(self, index: int, name: str, number: int, line: Any, generation: int, ready_by: float) -> None:
        self.index, self.name, self.number, self.line = index, name, number, line
        self.state, self.was_ready, self.born = "starting", False, monotonic()
        self.deadline: float | None = ready_by
        self.end_by: float | None = None
        self.pid, self.exitcode = 0, None  # type: int, int | None
        self.told = False  # it ended because it was told to
        self.muted = False  # it said something that could not be understood
        self.channel: Channel | None = None
        self.pidfd: OwnedFd | None = None
        self._process: BaseProcess | None = None
        self._follows = self._drained = self._pressed = self._killed = False
        self._press_at = 0.0
        # The line has no other writer now. A worker that cannot write it itself reports what it accepted, counted from 0.
        self._before = line[ACCEPTED]
        for word in (OPEN, HEARTBEAT, LOAD, WAITING, ASKED):
            line[word] = 0
        line[GENERATION] = generation

    @property
    def alive(self) -> bool:
        """Whether there is a process that was not buried yet."""
        return self._process is not None

    def fileno(self) -> int:
        """What becomes readable when it has ended. Borrowed."""
        assert self._process is not None
        return self.pidfd.fileno() if self.pidfd is not None else self._process.sentinel

    def start(self, context: Any, share: dict[str, Any], content: tuple[Callable[..., Any], tuple[Any, ...]]) -> None:
        """Starts it. What it raises leaves nothing of it behind, unless it is alive all the same."""
        ours, theirs = Pipe()
        # Known before the start, so that a forked child closes our end along with the group's other descriptors.
        self.channel = ours
        try:
            with theirs:
                # It waits in the socket pair until the worker reads it, so a slow start keeps nobody waiting here.
                ours.send(share)
                cargo = Cargo(content)
                process = context.Process(target=run, args=(theirs, cargo), name=self.name, daemon=False)
                try:
                    process.start()
                    self._process, self.pid = process, process.pid or 0
                finally:
                    cargo.close()
            self.pidfd = pidfd_of(self.pid)
        except BaseException:
            if not self.alive:
                self.close()
            raise

    def hear(self) -> None:
        """Reads what it says. One that says nonsense is not listened to any more; its end is seen all the same.

        Its channel stays open: the worker takes the end of it for the end of its supervisor.
        """
        if self.channel is None or self.muted:
            return
        try:
            # A bounded number at a time: a worker that floods must not keep the others from being heard.
            for _ in range(16):
                if not self.channel.poll():
                    return
                what, *values = self.channel.recv(timeout=1.0)
                if what == "ready" and self.state == "starting":
                    self.state, self.was_ready, self.deadline = "ready", True, None
                elif what == "follows":
                    self._follows = True
                elif what == "drained":
                    self._drained = True
                elif what == "counts":
                    accepted, self.line[OPEN] = values
                    self.line[ACCEPTED] = self._before + accepted
        except Exception:  # anything at all can come out of loading what a worker sent
            self.muted, self._follows = True, False

    def dismiss(self, by: float) -> None:
        """Orders it to drain. From now on press() ends it, at the latest by that time."""
        now = monotonic()
        self.state, self.deadline, self.end_by = "stopping", None, by
        self._press_at = by - min(LAST_SECONDS, LAST_PART * max(0.0, by - now))
        if self.channel is not None:
            try:
                self.channel.send(("drain", max(0.0, by - now)), timeout=0.1)
            except (FdPassError, OSError):
                pass  # it has ended, or does not read: SIGTERM and SIGKILL are left

    def press(self) -> float | None:
        """Signals a dismissed process if its time has come; returns when to look again, None when only its end is left to see.

        SIGTERM comes at once to a worker that is not known to obey the order: it goes on accepting until it is signalled. To one that
        obeys, it comes when nothing is left to do, since some servers close at SIGTERM what they accepted and have not read from yet.
        """
        assert self.end_by is not None
        now = monotonic()
        if now >= self.end_by:
            if not self._killed:
                self._killed = True
                self.signal(signal.SIGKILL)
            return None
        if self._pressed:
            return self.end_by
        done = self._drained and self.line[OPEN] <= 0
        if done or not self._follows or now >= self._press_at:
            self._pressed = True
            self.signal(signal.SIGTERM)
            return self.end_by
        at = min(self._press_at, self.end_by)
        return min(at, now + LOOK) if self._drained else at

    def signal(self, number: signal.Signals) -> None:
        """Sends it a signal, if it still is there."""
        try:
            if self.pidfd is not None and hasattr(signal, "pidfd_send_signal"):
                signal.pidfd_send_signal(self.pidfd.fileno(), number)
            else:
                os.kill(self.pid, number)
        except OSError:
            pass  # it has ended, or it is no longer ours to signal: either way its end is waited for

    def bury(self) -> None:
        """It has ended: hears its last words, collects its true exit status, closes what is held of it."""
        assert self._process is not None
        self.hear()
        self.exitcode = exit_status(self._process)
        self._process, self.told = None, self.state == "stopping"
        self.state, self.deadline, self.end_by = "ended", None, None
        for word in (OPEN, LOAD, WAITING):
            self.line[word] = 0
        self.close()

    def close(self) -> None:
        """Closes what the supervisor holds of it; the process is not touched."""
        for item in (self.channel, self.pidfd):
            if item is not None:
                item.close()
        self.channel = self.pidfd = None
        self.line = list(self.line)  # the board's page must be able to go
