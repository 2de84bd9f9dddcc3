"""All that one `balance` was asked for, measured one after the other, and what came of it until then, however it ends.
It measures nothing by itself, and prints nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, TypeAlias

from fdpass_bench import figures, report, steady
from fdpass_bench.balance import Plan, Run, expected_seconds, measure_run
from fdpass_bench.servers import Server
from fdpass_bench.steady import Trial, Work

Result: TypeAlias = Run | Trial


class Progress(Protocol):
    """Is told of each run: its title when it begins, how far it is, and a line when it has ended."""

    def follow(self, title: str) -> Callable[[int], None]: ...
    def over(self, line: str) -> None: ...


@dataclass
class Steady:
    """One open or closed loop, the same for each server, and its trials so far."""

    work: Work
    servers: Sequence[Server]
    calibration: Trial | None = None
    trials: list[Trial] = field(default_factory=list)

    def study(self) -> figures.Study:
        return figures.study(self.work, self.servers, self.trials, self.calibration)


# -------------------------------------------------------------------------------- what is measured in one go


@dataclass(frozen=True)
class Playing:
    """The run of a plan."""

    plan: Plan

    @property
    def title(self) -> str:
        return f"{self.plan.scenario}, {self.plan.server.name}"

    @property
    def seconds(self) -> float:
        """That it is expected to take."""
        return expected_seconds(self.plan)

    @property
    def count(self) -> int:
        """What its progress is counted against; 0 of what is no run of its own."""
        return self.plan.steps

    def measure(self, progress: Progress) -> Result:
        return measure_run(self.plan, progress.follow(self.title))


@dataclass(frozen=True)
class Calibrating:
    """The null server under what all these loops have in common."""

    loops: Sequence[Steady]
    title = "calibration"
    count = 0

    @property
    def seconds(self) -> float:
        return self.loops[0].work.calibration_seconds

    def measure(self, progress: Progress) -> Result:
        return steady.calibrate(self.loops[0].work)


@dataclass(frozen=True)
class Trying:
    """One server under one repeat of a loop's work."""

    loop: Steady
    server: Server
    repeat: int

    @property
    def title(self) -> str:
        return f"{self.loop.work.where}, {self.server.name}"

    @property
    def seconds(self) -> float:
        return self.loop.work.expected_seconds

    @property
    def count(self) -> int:
        return self.loop.work.connections * self.loop.work.requests

    def measure(self, progress: Progress) -> Result:
        return steady.measure_trial(self.server, self.loop.work, self.repeat, progress.follow(self.title))


Step: TypeAlias = Playing | Calibrating | Trying


@dataclass
class Campaign:
    """What was asked for, in order: `plans`, then the loops. `runs`: those of the plans that have ended; `done`: steps that have;
    `seconds`: that these took, however many commands they took them of."""

    plans: Sequence[Plan]
    loops: Sequence[Steady] = ()
    runs: list[Run] = field(default_factory=list)
    done: int = 0
    seconds: float = 0.0

    @cached_property
    def steps(self) -> Sequence[Step]:
        """All that is to be measured, in order, each in one go."""
        found: list[Step] = [Playing(plan) for plan in self.plans]
        calibrated: list[Steady] = []
        for loop in self.loops:
            if loop not in calibrated:
                asked = steady.null_load(loop.work)
                alike = [one for one in self.loops if steady.null_load(one.work) == asked]
                calibrated += alike
                found.append(Calibrating(alike))
            repeats = range(loop.work.repeats)
            found += [Trying(loop, server, repeat) for repeat in repeats for server in steady.order_of(loop.servers, repeat)]
        return found

    @property
    def ahead(self) -> list[tuple[int, float]]:
        """Of each run, what its progress is counted against, and the seconds that it is expected to take with what goes before it."""
        found, before = [], 0.0
        for step in self.steps:
            before += step.seconds
            if step.count:
                found.append((step.count, before))
                before = 0.0
        return found

    @property
    def over(self) -> int:
        """How many runs have ended."""
        return len(self.runs) + sum(len(loop.trials) for loop in self.loops)

    @property
    def whole(self) -> bool:
        return self.done == len(self.steps)

    @property
    def studies(self) -> list[figures.Study]:
        """Of the loops that have something to show: interrupted before its turn, one has not."""
        return [loop.study() for loop in self.loops if loop.trials or not (self.runs or self.over)]

    def take(self, result: Result, seconds: float) -> str | None:
        """What the next step gave, and the seconds that it took; the line that says so, of a run."""
        step = self.steps[self.done]
        line = None
        if isinstance(result, Run):
            self.runs.append(result)
            line = report.line_of(result)
        elif isinstance(step, Calibrating):
            for loop in step.loops:
                loop.calibration = result
        else:
            assert isinstance(step, Trying)
            step.loop.trials.append(result)
            line = report.line_of_trial(result, step.loop.work)
        # An interrupt may come at any line: a step that counts as done is among the figures.
        self.seconds += seconds
        self.done += 1
        return line

    def measure(self, progress: Progress, keep: Callable[[Step, Result, float], None] | None = None) -> None:
        """The steps that are not done yet. `keep` gets each, what it gave and the seconds it took, before anything else is made of it."""
        for step in self.steps[self.done :]:
            began = time.monotonic()
            result = step.measure(progress)
            seconds = time.monotonic() - began
            if keep is not None:
                keep(step, result, seconds)
            line = self.take(result, seconds)
            if line is not None:
                progress.over(line)
