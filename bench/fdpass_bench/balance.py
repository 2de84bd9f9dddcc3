"""The scenarios: k workers on one port under one strategy, real connections, what each worker got and what was lost.
A run that could not be measured properly says so; it is never repaired, repeated or left out."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import fdpass
from fdpass_bench import answer, measure, sockdiag
from fdpass_bench.clients import OUTCOMES, Clients

ORDERS: dict[str, tuple[str, ...]] = {"shared": ("rotate", "first"), "reuseport": (), "reuseport-bare": (), "auto": ()}
SCENARIOS: dict[str, int] = {"idle": 60, "burst": 400, "kill": 200}  # and how many connections each makes unless told

_GAP = 0.004  # seconds between two spaced connections: a worker is back in its wait long before
_SETTLE = 0.1  # seconds for what is left of the workers' start
_IDLE_WINDOW = {"idle": 0.5, "burst": 0.5, "kill": 1.0}  # seconds in which nothing happens, to know what idle workers cost
_BURST_SERVICE = 0.001  # seconds
_KILL_DRAIN = 2.5  # seconds that the queue of `kill` lasts when nobody dies: four kills and a little
_KILL_EVERY = 0.5  # seconds
_SUCCESSOR_LIMIT = 15.0  # seconds until a killed worker's successor must be ready


@dataclass(frozen=True)
class Strategy:
    """A strategy as it is written on the command line: NAME or NAME:ORDER."""

    name: str
    order: str | None = None

    def __str__(self) -> str:
        return self.name if self.order is None else f"{self.name}:{self.order}"

    @classmethod
    def parse(cls, text: str) -> Strategy:
        """Raises ValueError with what is allowed."""
        name, colon, order = text.strip().partition(":")
        if name in ORDERS and not colon:
            return cls(name)
        if order in ORDERS.get(name, ()):
            return cls(name, order)
        allowed = list(ORDERS) + [f"{name}:{order}" for name, orders in ORDERS.items() for order in orders]
        raise ValueError(f"there is no strategy {text.strip()!r}; there are {', '.join(allowed)}")


@dataclass(frozen=True)
class Plan:
    strategy: Strategy
    scenario: str
    workers: int
    connections: int
    time_limit: float  # seconds, for the connections of one run
    service: float | None = None  # seconds a worker holds a connection; None: the scenario's own

    @property
    def service_seconds(self) -> float:
        if self.service is not None:
            return self.service
        if self.scenario == "kill":
            return min(1.0, _KILL_DRAIN * self.workers / self.connections)
        return _BURST_SERVICE if self.scenario == "burst" else 0.0


@dataclass
class Run:
    """One strategy in one scenario. `per_worker` counts by the greeting that the client received.

    lost_accepted:   not ok, and a worker had accepted it.
    lost_unaccepted: not ok, and no worker had: a reset out of a queue, a refusal, a wait without end.
    switches_per_connection: voluntary context switches of all workers per accepted connection, without what idle workers cost in the
        same time and without the one switch of holding the connection (service_seconds); None when it could not be measured.
    queued_at_kills: at each kill, the connections that no worker had accepted, in whatever queue.
    victims_queues: of these, at each kill, those on a socket that the victim held; None where the kernel does not tell.
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
    invalid_reason: str | None = None

    @property
    def valid(self) -> bool:
        return self.invalid_reason is None

    @property
    def max_over_mean(self) -> float | None:
        return max(self.per_worker) * len(self.per_worker) / sum(self.per_worker) if sum(self.per_worker) else None

    def as_json(self) -> dict[str, Any]:
        return {
            "strategy": str(self.plan.strategy),
            "scenario": self.plan.scenario,
            "workers": self.plan.workers,
            "connections": self.plan.connections,
            "per_worker": self.per_worker,
            "max_over_mean": _rounded(self.max_over_mean),
            "switches_per_connection": _rounded(self.switches_per_connection),
            "idle_switches_per_second": _rounded(self.idle_switches_per_second),
            "outcomes": self.outcomes,
            "lost_accepted": self.lost_accepted,
            "lost_unaccepted": self.lost_unaccepted,
            "service_seconds": self.plan.service_seconds,
            "seconds": _rounded(self.seconds),
            "kills": len(self.queued_at_kills),
            "queued_at_kills": self.queued_at_kills,
            "victims_queues": self.victims_queues,
            "restarts": self.restarts,
            "valid": self.valid,
            "invalid_reason": self.invalid_reason,
        }


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 4)


class _Unmeasurable(Exception):
    """Why a run is not valid."""


def measure_run(plan: Plan, ended: Callable[[int], None]) -> Run:
    """Starts a group, measures, stops it. `ended` is told now and then how many connections have ended."""
    # Both ends' descriptors: the clients' here, an accepted one in each worker.
    fdpass.raise_fd_limit()
    run = Run(plan, [0] * plan.workers)
    try:
        with fdpass.WorkerGroup(
            answer.speak_first,
            "127.0.0.1:0",
            workers=plan.workers,
            strategy=plan.strategy.name,
            restart="on-failure" if plan.scenario == "kill" else "never",
            args=(plan.service_seconds,),
            name="bench",
            backlog=max(1024, plan.connections),
            stop_timeout=2.0,  # a worker may be holding a connection that nobody waits for any more
            order=plan.strategy.order,
        ) as group:
            host, _, port = str(group.endpoint).rpartition(":")
            with Clients((host, int(port))) as clients:
                _Scene(plan, run, group, clients, ended).play()
    except _Unmeasurable as reason:
        run.invalid_reason = str(reason)
    except (OSError, RuntimeError, fdpass.FdPassError) as error:
        run.invalid_reason = f"{type(error).__name__}: {error}"
    return run


class _Scene:
    """One run under way."""

    def __init__(self, plan: Plan, run: Run, group: fdpass.WorkerGroup, clients: Clients, ended: Callable[[int], None]) -> None:
        self.plan = plan
        self.run = run
        self.group = group
        self.clients = clients
        self.ended = ended
        self.accepted_by_victims: set[int] = set()  # the clients' ports
        self.switches = measure.Switches(worker.pid for worker in group.stats())

    def play(self) -> None:
        idle_rate = self._idle_rate()
        before = self.switches.total()
        began = time.monotonic()
        self.deadline = began + self.plan.time_limit
        try:
            {"idle": self._idle, "burst": self._burst, "kill": self._kill}[self.plan.scenario]()
            # The last worker goes back to its wait: that switch belongs to the last connection.
            time.sleep(5 * _GAP)
        finally:
            # What was measured is reported of an invalid run too.
            self.run.seconds = time.monotonic() - began
            self.clients.give_up()
            self._count()
        switches = self.switches.total() - before
        accepted = sum(self.run.per_worker)
        if accepted:
            held = accepted if self.plan.service_seconds > 0 else 0
            self.run.switches_per_connection = (switches - idle_rate * self.run.seconds - held) / accepted
        if self.run.outcomes["timeout"]:
            late = self.run.outcomes["timeout"]
            raise _Unmeasurable(f"the time limit of {self.plan.time_limit:g} s was hit with {late} connections under way")

    def _idle_rate(self) -> float:
        time.sleep(_SETTLE)
        before = self.switches.total()
        began = time.monotonic()
        time.sleep(_IDLE_WINDOW[self.plan.scenario])
        rate = (self.switches.total() - before) / (time.monotonic() - began)
        self.run.idle_switches_per_second = rate
        return rate

    def _count(self) -> None:
        run = self.run
        for client in self.clients.all:
            outcome = client.outcome or "timeout"
            run.outcomes[outcome] += 1
            index = client.index
            if index is not None:
                run.per_worker[index] += 1
            if outcome != "ok":
                if client.port in self.accepted_by_victims or index is not None:
                    run.lost_accepted += 1
                else:
                    run.lost_unaccepted += 1
        self.ended(len(self.clients.all))

    def _pump(self, until: float) -> None:
        """Follows the connections until all have ended or `until` (monotonic seconds)."""
        while self.clients.under_way:
            left = until - time.monotonic()
            if left <= 0:
                break
            self.clients.pump(min(left, 0.1))
            self.ended(len(self.clients.all) - self.clients.under_way)

    # The scenarios

    def _idle(self) -> None:
        for number in range(self.plan.connections):
            if time.monotonic() > self.deadline:
                raise _Unmeasurable(f"the time limit of {self.plan.time_limit:g} s was hit after {number} connections")
            self.clients.finish(self.clients.connect(), self.deadline)
            self.ended(number + 1)
            time.sleep(_GAP)

    def _burst(self) -> None:
        for _ in range(self.plan.connections):
            self.clients.connect()
        self._pump(self.deadline)

    def _kill(self) -> None:
        for _ in range(self.plan.connections):
            self.clients.connect()
        next_kill = time.monotonic() + _KILL_EVERY
        self._pump(next_kill)
        if not all(client.connected for client in self.clients.all):
            raise _Unmeasurable("not all connections were made before the first kill was due")
        while self.clients.under_way and time.monotonic() < self.deadline:
            victim = len(self.run.queued_at_kills) % self.plan.workers
            restarts = self.group.stats()[victim].restarts
            self._kill_worker(victim)
            next_kill += _KILL_EVERY
            self._await_successor(victim, restarts)
            next_kill = max(next_kill, time.monotonic())
            self._pump(min(next_kill, self.deadline))
        if not self.run.queued_at_kills:
            raise _Unmeasurable("all connections had ended before the first kill was due: more connections, or a longer --service")
        for client in self.clients.all:
            # The greeting and the kernel's table are two witnesses of one fact.
            if client.outcome not in (None, "ok") and client.index is not None and client.port not in self.accepted_by_victims:
                raise _Unmeasurable(f"a lost connection had been greeted by worker {client.index}, yet no killed worker had held it")

    def _kill_worker(self, index: int) -> None:
        pid = self.group.stats()[index].pid
        try:
            # Stopped, the victim can accept nothing more: what it holds now is exactly what dies with it.
            measure.stop(pid)
            held = measure.socket_inodes(pid)
            ends = measure.established(self.clients.address[1])
            queue = _queue(self.clients.address[1], held)
            self.switches.bury(pid)
        except (TimeoutError, FileNotFoundError, ProcessLookupError) as error:
            raise _Unmeasurable(f"worker {index} (pid {pid}) could not be looked into before it was killed: {error}") from error
        finally:
            _kill(pid)
        self.accepted_by_victims |= {port for port, inode in ends.items() if inode in held}
        self.run.queued_at_kills.append(sum(inode == 0 for inode in ends.values()))
        self.run.victims_queues.append(queue)

    def _await_successor(self, index: int, restarts: int) -> None:
        """Returns when the worker that took the place of the killed one is ready; follows the connections meanwhile."""
        deadline = time.monotonic() + _SUCCESSOR_LIMIT
        while True:
            worker = self.group.stats()[index]
            if worker.restarts > restarts and worker.state == "ready":
                break
            if time.monotonic() > deadline:
                raise _Unmeasurable(f"worker {index} had no successor {_SUCCESSOR_LIMIT:g} s after it was killed")
            self._pump(time.monotonic() + 0.005)
            if not self.clients.under_way:
                time.sleep(0.005)
        self.run.restarts += 1
        self.switches.see(worker.pid)


def _queue(port: int, held: set[int]) -> int | None:
    try:
        return sum(found.queue for found in sockdiag.listening_sockets(port) if found.inode in held)
    except OSError:
        return None


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it ended by itself
