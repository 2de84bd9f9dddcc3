"""A run of `balance`: what was asked for and what came of it. It measures nothing.
A run that could not be measured properly says so; it is never repaired, repeated or left out."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from fdpass_bench import curves, loadgen
from fdpass_bench.clients import OUTCOMES
from fdpass_bench.scenarios import CATALOGUE
from fdpass_bench.servers import Server, Serving, Wanted, Workers
from fdpass_bench.strategy import Manner

_STUCK = 1_000_000_000  # nanoseconds
_KILL_DRAIN = 2.5  # seconds that the queue of `kill` lasts when nobody dies: four kills and a little


@dataclass(frozen=True)
class Plan:
    server: Server
    scenario: str
    workers: int
    connections: int  # in each burst; long-lived: open at a time
    time_limit: float  # seconds, for the connections of one run
    service: float | None = None  # seconds a worker holds a connection; None: the scenario's own
    bursts: int = 1
    rolls: int = 5
    clients: int | None = None  # of the closed loop; None: the scenario's own
    seed: int = 1

    @property
    def service_seconds(self) -> float:
        if self.service is not None:
            return self.service
        if self.scenario == "kill":
            return min(1.0, _KILL_DRAIN * self.workers / self.connections)
        return CATALOGUE[self.scenario].service

    @property
    def client_count(self) -> int:
        if self.clients is not None:
            return self.clients
        return 24 if self.scenario == "rolling" else 8 * self.workers

    @property
    def steps(self) -> int:
        """What a run's progress is counted against."""
        return {"burst": self.connections * self.bursts, "rolling": 100 * self.rolls}.get(self.scenario, self.connections or 100)

    def wanted(self, manner: Manner, workers: int | None = None, stop_timeout: float = 2.0) -> Wanted:
        """What this plan's scenario wants of a server."""
        return Wanted(
            workers or self.workers,
            manner,
            self.service_seconds,
            keep_alive=manner == "hold",
            backlog=max(4096, self.connections),
            restarts=self.scenario == "kill",
            stop_timeout=stop_timeout,
        )

    def serve(self, manner: Manner, workers: int | None = None, stop_timeout: float = 2.0) -> AbstractContextManager[Serving]:
        """The plan's server, on a port of its own."""
        return self.server.serve(self.wanted(manner, workers, stop_timeout))


@dataclass
class Run:
    """One strategy in one scenario. `per_worker` counts by what the client received of the worker.

    lost_accepted:   not ok, and a worker had accepted it.
    lost_unaccepted: not ok, and no worker had: a reset out of a queue, a refusal, a wait without end.
    switches_per_connection: voluntary context switches of all workers per accepted connection, without what idle workers cost in the
        same time and without the one switch of holding the connection (service_seconds); None when it could not be measured.
    queued_at_kills: at each kill, the connections that no worker had accepted, in whatever queue.
    victims_queues: of these, at each kill, those on a socket that the victim held; None where the kernel does not tell.
    max_over_means: of each burst. figures: what the scenario measures beyond this, by its key in the JSON.
    """

    plan: Plan
    per_worker: list[int]
    outcomes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    switches_per_connection: float | None = None
    idle_switches_per_second: float | None = None
    lost_accepted: int = 0
    lost_unaccepted: int = 0
    seconds: float = 0.0
    queued_at_kills: list[int] = field(default_factory=list)
    victims_queues: list[int | None] = field(default_factory=list)
    restarts: int = 0
    max_over_means: list[float] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    invalid_reason: str | None = None

    @property
    def valid(self) -> bool:
        return self.invalid_reason is None

    @property
    def max_over_mean(self) -> float | None:
        """The largest share over the mean; of several bursts the median of each one's."""
        return median(self.max_over_means) if len(self.max_over_means) > 1 else max_over_mean(self.per_worker)

    def take(self, result: loadgen.Result, workers: Workers) -> None:
        """Counts what a generator saw of these workers, in place of what was counted before.

        A reset before one byte of an answer counts as that of a connection that nobody had accepted. Of a run that was cut off,
        connections that had been under way for a second count as timed out, the others not at all.
        """
        found = dict.fromkeys(loadgen.OUTCOMES, 0)
        self.per_worker = [0] * len(self.per_worker)
        for outcome, worker, begun in zip(result.outcome, result.worker, result.begun, strict=True):
            if outcome >= 0:
                found[loadgen.OUTCOMES[outcome]] += 1
            elif begun and result.ended - begun > _STUCK:
                found["timeout"] += 1
            if outcome == 0 and (place := _place(workers, worker, len(self.per_worker))) is not None:
                self.per_worker[place] += 1
        self.figures["series"] = [{"repeat": 1, **curves.series(_taken_at(result, workers, len(self.per_worker)), len(self.per_worker))}]
        before, after = found.pop("reset_before_accept"), found.pop("reset_after_accept")
        self.outcomes = {"ok": found.pop("ok"), "refused": found.pop("refused"), "reset": before + after, **found}
        self.figures["resets"] = {"before_accept": before, "after_accept": after}
        self.lost_accepted = after + found["bad_answer"]
        self.lost_unaccepted = sum(self.outcomes.values()) - self.outcomes["ok"] - self.lost_accepted

    def as_json(self) -> dict[str, Any]:
        return {
            "strategy": self.plan.server.name,
            "server": self.plan.server.kind,
            "version": self.plan.server.version,
            "scenario": self.plan.scenario,
            "workers": self.plan.workers,
            "connections": self.plan.connections or sum(self.outcomes.values()),
            "credits": self.plan.server.credits,
            "per_worker": self.per_worker,
            "max_over_mean": rounded(self.max_over_mean),
            "switches_per_connection": rounded(self.switches_per_connection),
            "idle_switches_per_second": rounded(self.idle_switches_per_second),
            "outcomes": self.outcomes,
            "lost_accepted": self.lost_accepted,
            "lost_unaccepted": self.lost_unaccepted,
            "service_seconds": self.plan.service_seconds,
            "seconds": rounded(self.seconds),
            "bursts": self.plan.bursts,
            "max_over_means": [rounded(one) for one in self.max_over_means],
            "kills": len(self.queued_at_kills),
            "queued_at_kills": self.queued_at_kills,
            "victims_queues": self.victims_queues,
            "restarts": self.restarts,
            **self.figures,
            "valid": self.valid,
            "invalid_reason": self.invalid_reason,
        }


def _place(workers: Workers, said: int, count: int) -> int | None:
    """A server with more workers than it was asked for has no place for what these did."""
    place = workers.place(said)
    return place if place is not None and 0 <= place < count else None


def _taken_at(result: loadgen.Result, workers: Workers, count: int) -> dict[int, list[float]]:
    """By worker, when it took each request that was answered: seconds since the generator began."""
    found: dict[int, list[float]] = {}
    for outcome, worker, accepted, answered in zip(result.outcome, result.worker, result.accepted, result.answered, strict=True):
        if outcome == 0 and (place := _place(workers, worker, count)) is not None:
            found.setdefault(place, []).append(((accepted or answered) - result.began) / 1e9)
    return found


class Unmeasurable(Exception):
    """Why a run is not valid."""


def max_over_mean(counts: list[int]) -> float | None:
    return max(counts) * len(counts) / sum(counts) if sum(counts) else None


def rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 4)
