"""Who follows whom at one index of a group: the slot, and the roll that replaces every worker. Nothing is started or signalled here but
through the calls that the group gives."""

from __future__ import annotations

import signal
from time import monotonic
from typing import TYPE_CHECKING

from fdpass.errors import ClosedError, WorkerDied

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from fdpass._process import WorkerProcess


class Slot:
    """One index: who serves there at present, who is to follow (during a roll), who was told to go and has not ended yet."""

    def __init__(self, index: int, name: str, workers: int) -> None:
        self.index, self.name = index, name
        self.present: WorkerProcess | None = None
        self.successor: WorkerProcess | None = None
        self.leaving: WorkerProcess | None = None
        self.pid, self.number = 0, index  # of whoever serves there, or did last
        self.exitcode: int | None = None  # of the last that ended after it had served there
        self.due: float | None = None  # when the next one starts, because the last one ended
        self.restarts = 0
        self.unready = 0  # successors in a row that were never ready
        self.generation = 0
        self.lines = index, index + workers

    @property
    def state(self) -> str:
        """Of whoever serves there: starting, ready, stopping or ended."""
        return "ended" if self.present is None else self.present.state

    @property
    def processes(self) -> list[WorkerProcess]:
        """All that live."""
        return [one for one in (self.present, self.successor, self.leaving) if one is not None]

    def next_line(self) -> int:
        """The line of the next process: the two in turn, but never one in use."""
        self.generation += 1
        chosen = self.lines[(self.generation + 1) % 2]
        taken = {one.number for one in self.processes}
        return sum(self.lines) - chosen if chosen in taken else chosen

    def follow(self) -> None:
        """The successor takes its place; whoever served there until now is leaving."""
        assert self.successor is not None
        self.leaving, self.present, self.successor = self.present, self.successor, None
        self.pid, self.number = self.present.pid, self.present.number


class Roll:
    """The replacement of a group's workers, index by index. The supervising thread advances it after every event.

    launch(slot, ready_by): starts a successor, or raises. dismiss(process): tells it to drain and to end.
    over: nothing more comes of it; error: with what it ended. look_at: when it must be advanced even if nothing happens.
    abandoned: set by whoever waited for it and was interrupted.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        limit: float,
        launch: Callable[[Slot, float], WorkerProcess],
        dismiss: Callable[[WorkerProcess], None],
    ) -> None:
        self.over = self.abandoned = False
        self.error: BaseException | None = None
        self.look_at: float | None = None
        self._failing = False
        self._slots, self._limit, self._launch, self._dismiss = slots, limit, launch, dismiss
        self._steps = self._replace_all()

    def advance(self) -> None:
        """Goes as far as it goes without waiting."""
        if self.abandoned:
            self.fail(ClosedError("the roll was interrupted"))
        if not self.over:
            self._go(lambda: next(self._steps))

    def fail(self, error: Exception) -> None:
        """Ends it with that error: a successor that is not ready is killed, a predecessor that drains goes on draining."""
        if not self.over and not self._failing:
            self._failing = True
            self._go(lambda: self._steps.throw(error))

    def drop(self, error: BaseException) -> None:
        """Ends it where it stands; the processes are somebody else's affair."""
        self._steps.close()
        if not self.over:
            self.over, self.error = True, error

    def _go(self, step: Callable[[], float | None]) -> None:
        try:
            self.look_at = step()
        except StopIteration:
            self.over = True
        except Exception as error:
            self.over, self.error = True, error

    def _replace_all(self) -> Generator[float | None]:
        """Each yield waits for the next event, or for the time that it gives."""
        began = monotonic()
        for slot in self._slots:
            # Its worker died and is being replaced: by what serves there afterwards, or by the end of the group.
            while slot.due is not None or slot.state == "starting":
                yield None
            # Ended by itself, with nothing left to do; or started since the roll began, and so the new program already.
            if slot.present is None or slot.present.born >= began:
                continue
            yield from self._replace(slot)

    def _replace(self, slot: Slot) -> Generator[float | None]:
        by = monotonic() + self._limit
        successor = self._launch(slot, by)
        try:
            while successor.state == "starting":
                if monotonic() >= by:
                    raise TimeoutError(
                        f"{slot.name} (pid {successor.pid}) not ready {self._limit:g} s after its start{_who_serves(slot, successor)}"
                    )
                yield by
            if not successor.alive:
                detail = "right after it was ready" if successor.was_ready else "it was never ready"
                raise WorkerDied(slot.name, successor.pid, successor.exitcode, detail + _who_serves(slot, successor))
        except Exception:
            if successor.alive:
                successor.signal(signal.SIGKILL)
            while successor.alive:
                yield None
            raise
        # It may have taken its place already: when its predecessor died meanwhile.
        if slot.successor is successor:
            slot.follow()
        if slot.leaving is not None:
            self._dismiss(slot.leaving)
        while slot.leaving is not None:
            yield None


def _who_serves(slot: Slot, successor: WorkerProcess) -> str:
    present = slot.present
    return f"; pid {present.pid} serves on" if present is not None and present is not successor else ""
