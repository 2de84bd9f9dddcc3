"""The scenario `long-lived`: so many connections open at a time, closed and opened at random, and how the open ones lie on the workers."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from statistics import fmean, pstdev
from typing import Any

from fdpass_bench import measure
from fdpass_bench.clients import Client, Clients
from fdpass_bench.runs import Plan, Run, Unmeasurable, rounded

_SETTLE = 0.5  # seconds for what is left of the workers' start
_FILLING = 64  # connections under way at once, until there are enough
_FILLED_PER_SECOND = 2000  # connections, about
_CHURN = 4.0  # seconds of closing one at random and opening another
_MOST_PER_SECOND = 1000  # replacements: these clients are one process of Python
_SAMPLE = 0.01  # seconds
_LATE = 0.5  # seconds behind the schedule, and the clients were not able to keep it


def expected_seconds(plan: Plan) -> float:
    """That play() takes, about."""
    return measure.starting(plan.workers) + _SETTLE + plan.connections / _FILLED_PER_SECOND + _CHURN


def play(plan: Plan, run: Run, ended: Callable[[int], None]) -> None:
    """Starts a server, measures, stops it. Raises Unmeasurable."""
    with plan.serve("hold", stop_timeout=5.0) as serving:
        churn = _Churn(plan, run, ended)
        place = serving.workers.place
        with Clients(serving.address, http=serving.http, kept=True, answered=churn.answered, place=place) as clients:
            time.sleep(_SETTLE)
            churn.play(clients)


class _Churn:
    """One run under way."""

    def __init__(self, plan: Plan, run: Run, ended: Callable[[int], None]) -> None:
        self.plan, self.run, self.ended = plan, run, ended
        self.chance = random.Random(plan.seed)
        self.open: list[Client] = []  # those that a worker has answered
        self.counts = [0] * plan.workers
        self.deviations: list[float] = []
        self.ranges: list[int] = []

    def answered(self, client: Client) -> None:
        self.open.append(client)
        self.counts[client.index or 0] += 1

    def play(self, clients: Clients) -> None:
        self.clients = clients
        began = time.monotonic()
        self.deadline = began + self.plan.time_limit
        try:
            self._fill()
            self._churn()
            self._await_answers(0)
        finally:
            self.run.seconds = time.monotonic() - began
            lost = self._count()
            self._report()
        if lost:
            raise Unmeasurable(f"{lost} of {len(clients.all)} connections were not answered, or not kept")

    def _fill(self) -> None:
        for _ in range(self.plan.connections):
            self._await_answers(_FILLING - 1)
            self.clients.connect()
        self._await_answers(0)

    def _await_answers(self, unanswered: int) -> None:
        """Until no more connections than that wait for a worker's first word."""
        while self.clients.unanswered > unanswered:
            left = self.deadline - time.monotonic()
            if left <= 0:
                waiting = self.clients.unanswered
                raise Unmeasurable(f"the time limit of {self.plan.time_limit:g} s was hit with {waiting} connections unanswered")
            self.clients.pump(min(left, 0.1))
            self.ended(min(self.plan.connections, len(self.open)))

    def _churn(self) -> None:
        rate = min(_MOST_PER_SECOND, self.plan.connections)
        due = sample = time.monotonic()
        until = due + _CHURN
        while due < until:
            now = time.monotonic()
            if now > self.deadline:
                raise Unmeasurable(f"the time limit of {self.plan.time_limit:g} s was hit while connections came and went")
            if now - due > _LATE:
                raise Unmeasurable(f"the clients were {now - due:.1f} s behind their schedule")
            if now >= sample:
                self._sample()
                sample += _SAMPLE
            if now >= due:
                self._replace_one()
                due += self.chance.expovariate(rate)
            self.clients.pump(max(0.0, min(due, sample) - time.monotonic()))

    def _replace_one(self) -> None:
        if self.open:
            place = self.chance.randrange(len(self.open))
            client, self.open[place] = self.open[place], self.open[-1]
            self.open.pop()
            if client.outcome is None:
                self.counts[client.index or 0] -= 1
                self.clients.close(client)
            self.clients.connect()

    def _sample(self) -> None:
        self.deviations.append(pstdev(self.counts))
        self.ranges.append(max(self.counts) - min(self.counts))

    def _count(self) -> int:
        """How each connection ended; those still open end now, in order. Returns how many were lost."""
        for client in self.open:
            if client.outcome is None:
                self.clients.close(client)
        self.clients.give_up()
        for client in self.clients.all:
            outcome = client.outcome or "timeout"
            self.run.outcomes[outcome] += 1
            if client.index is not None:
                self.run.per_worker[client.index] += 1
            if outcome != "ok" and client.index is not None:
                self.run.lost_accepted += 1
        lost = sum(self.run.outcomes.values()) - self.run.outcomes["ok"]
        self.run.lost_unaccepted = lost - self.run.lost_accepted
        self.ended(self.plan.connections)
        return lost

    def _report(self) -> None:
        count, workers = self.plan.connections, self.plan.workers
        figures: dict[str, Any] = {
            "open_per_worker": self.counts,
            "open_stdev": rounded(fmean(self.deviations)) if self.deviations else None,
            "open_stdev_end": rounded(pstdev(self.counts)),
            "open_range": rounded(fmean(self.ranges)) if self.ranges else None,
            "open_range_end": max(self.counts) - min(self.counts),
            # Of connections that fall on the workers at random, as a hash lets them.
            "open_stdev_random": rounded(math.sqrt(count * (workers - 1)) / workers),
            "samples": len(self.deviations),
            "opened": len(self.clients.all),
        }
        self.run.figures |= figures
