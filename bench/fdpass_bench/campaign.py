"""All that one `balance` was asked for, measured one after the other, and what came of it until then, however it ends.
It measures nothing by itself, and prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fdpass_bench import figures, report, steady
from fdpass_bench.balance import Plan, Run, measure_run
from fdpass_bench.servers import Server
from fdpass_bench.steady import Trial, Work


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


@dataclass
class Campaign:
    """What was asked for, in order: `plans`, then the loops. `runs`: those of the plans that have ended."""

    plans: Sequence[Plan]
    loops: Sequence[Steady] = ()
    runs: list[Run] = field(default_factory=list)

    @property
    def counts(self) -> list[int]:
        """What each run's progress is counted against."""
        found = [plan.steps for plan in self.plans]
        for loop in self.loops:
            found += [loop.work.connections * loop.work.requests] * (loop.work.repeats * len(loop.servers))
        return found

    @property
    def over(self) -> int:
        """How many runs have ended."""
        return len(self.runs) + sum(len(loop.trials) for loop in self.loops)

    @property
    def studies(self) -> list[figures.Study]:
        """Of the loops that have something to show: interrupted before its turn, one has not."""
        return [loop.study() for loop in self.loops if loop.trials or not (self.runs or self.over)]

    def measure(self, progress: Progress) -> None:
        for plan in self.plans:
            self.runs.append(measure_run(plan, progress.follow(f"{plan.scenario}, {plan.server.name}")))
            progress.over(report.line_of(self.runs[-1]))
        for loop in self.loops:
            asked = steady.null_load(loop.work)
            alike = (one.calibration for one in self.loops if one.calibration and steady.null_load(one.work) == asked)
            loop.calibration = next(alike, None) or steady.calibrate(loop.work)
            for repeat in range(loop.work.repeats):
                for server in steady.order_of(loop.servers, repeat):
                    ended = progress.follow(f"{loop.work.where}, {server.name}")
                    loop.trials.append(steady.measure_trial(server, loop.work, repeat, ended))
                    progress.over(report.line_of_trial(loop.trials[-1], loop.work))
