"""The scenarios `idle`, `burst` and `kill`: connections followed one by one, what each worker got of them and what was lost."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable

from fdpass_bench import curves, measure, sockdiag
from fdpass_bench.clients import Client, Clients
from fdpass_bench.runs import Plan, Run, Unmeasurable, max_over_mean, rounded
from fdpass_bench.servers import Serving

_GAP = 0.004  # seconds between two spaced connections: a worker is back in its wait long before
_SETTLE = 0.1  # seconds for what is left of the workers' start; an event loop says that it is ready before it is set up
_SETTLE_LOOP = 0.5
_IDLE_WINDOW = {"idle": 0.5, "burst": 0.5, "kill": 1.0}  # seconds in which nothing happens, to know what idle workers cost
_TICK = 0.1  # seconds: uvicorn wakes as often by itself, so what it costs is told best over many, and whole ones
_TICKING_WINDOW = 2.0
_LESS_THAN_NOTHING = -0.1  # switches per connection: below, what idle workers cost was not known
_CONNECTION = 0.0005  # seconds that a connection costs whoever serves it, about
_KILL_EVERY = 0.5  # seconds
_SUCCESSOR_LIMIT = 15.0  # seconds until a killed worker's successor must be ready


def expected_seconds(plan: Plan) -> float:
    """That play() takes, about."""
    each = plan.service_seconds + _CONNECTION
    one_by_one = plan.scenario == "idle"
    load = plan.connections * (each + _GAP) if one_by_one else plan.bursts * plan.connections * each / plan.workers
    if plan.scenario == "kill":
        # The capacity of a killed worker is missing until its successor is there.
        load += load / _KILL_EVERY * measure.starting(1) / plan.workers + _KILL_EVERY
    window = _TICKING_WINDOW if "uvicorn" in plan.server.name else _IDLE_WINDOW[plan.scenario]
    return measure.starting(plan.workers) + window + min(load, plan.time_limit)


def play(plan: Plan, run: Run, ended: Callable[[int], None]) -> None:
    """Starts a server, measures, stops it. Raises Unmeasurable."""
    with plan.serve("greet") as serving:
        taken_at: dict[int, list[float]] = {}

        def answered(client: Client) -> None:
            if client.index is not None:
                taken_at.setdefault(client.index, []).append(time.monotonic())

        service, place = plan.service_seconds, serving.workers.place
        with Clients(serving.address, http=serving.http, service=service, answered=answered, place=place) as clients:
            scene = _Scene(plan, run, serving, clients, ended)
            try:
                scene.play()
            finally:
                run.figures["series"] = [
                    {"repeat": 1, **curves.series({k: [one - scene.began for one in at] for k, at in taken_at.items()}, plan.workers)}
                ]


class _Scene:
    """One run under way."""

    def __init__(self, plan: Plan, run: Run, serving: Serving, clients: Clients, ended: Callable[[int], None]) -> None:
        self.plan = plan
        self.run = run
        self.serving = serving
        self.clients = clients
        self.ended = ended
        self.began = time.monotonic()
        self.accepted_by_victims: set[int] = set()  # the clients' ports
        self.switches = measure.Switches(serving.pids())
        self.ticks = serving.ticks

    def play(self) -> None:
        idle_rate = self._idle_rate()
        before = self.switches.total()
        self.began = began = time.monotonic()
        self.deadline = began + self.plan.time_limit
        try:
            {"idle": self._idle, "burst": self._burst, "kill": self._kill}[self.plan.scenario]()
            # The last worker goes back to its wait: that switch belongs to the last connection.
            time.sleep(5 * _GAP)
            if self.ticks:
                # As many ticks as the time says, and not one more or less in each worker.
                time.sleep(_TICK - (time.monotonic() - began) % _TICK)
        finally:
            # What was measured is reported of an invalid run too.
            self.run.seconds = time.monotonic() - began
            self.clients.give_up()
            self._count()
        switches = self.switches.total() - before
        accepted = sum(self.run.per_worker)
        if accepted:
            held = accepted if self.plan.service_seconds > 0 else 0
            per_connection = (switches - idle_rate * self.run.seconds - held) / accepted
            # Where dead workers' ticks are missing, all of them did less than idle ones were said to.
            self.run.switches_per_connection = per_connection if per_connection > _LESS_THAN_NOTHING else None
        if self.run.outcomes["timeout"]:
            late = self.run.outcomes["timeout"]
            raise Unmeasurable(f"the time limit of {self.plan.time_limit:g} s was hit with {late} connections under way")

    def _idle_rate(self) -> float:
        time.sleep(_SETTLE_LOOP if self.serving.loops else _SETTLE)
        before = self.switches.total()
        began = time.monotonic()
        time.sleep(_TICKING_WINDOW if self.ticks else _IDLE_WINDOW[self.plan.scenario])
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
                raise Unmeasurable(f"the time limit of {self.plan.time_limit:g} s was hit after {number} connections")
            self.clients.finish(self.clients.connect(), self.deadline)
            self.ended(number + 1)
            time.sleep(_GAP)

    def _burst(self) -> None:
        for number in range(self.plan.bursts):
            if number:
                # Every worker is back in its wait.
                time.sleep(5 * _GAP)
            for _ in range(self.plan.connections):
                self.clients.connect()
            self._pump(self.deadline)
            counts = [0] * self.plan.workers
            for client in self.clients.all[number * self.plan.connections :]:
                if client.index is not None:
                    counts[client.index] += 1
            evenness = max_over_mean(counts)
            if evenness is not None:
                self.run.max_over_means.append(evenness)
            if self.clients.under_way:
                break  # at the time limit

    def _kill(self) -> None:
        for _ in range(self.plan.connections):
            self.clients.connect()
        next_kill = time.monotonic() + _KILL_EVERY
        self._pump(next_kill)
        if not all(client.connected for client in self.clients.all):
            raise Unmeasurable("not all connections were made before the first kill was due")
        while self.clients.under_way and time.monotonic() < self.deadline:
            victim = len(self.run.queued_at_kills) % self.plan.workers
            killed = self._kill_worker(victim)
            next_kill += _KILL_EVERY
            self._await_successor(victim, killed)
            next_kill = max(next_kill, time.monotonic())
            self._pump(min(next_kill, self.deadline))
        if not self.run.queued_at_kills:
            raise Unmeasurable("all connections had ended before the first kill was due: more connections, or a longer --service-ms")
        for client in self.clients.all:
            # The greeting and the kernel's table are two witnesses of one fact.
            if client.outcome not in (None, "ok") and client.index is not None and client.port not in self.accepted_by_victims:
                raise Unmeasurable(f"a lost connection had been greeted by worker {client.index}, yet no killed worker had held it")

    def _kill_worker(self, index: int) -> int:
        """The pid of the worker that was killed."""
        pids = self.serving.pids()
        if index >= len(pids):
            raise Unmeasurable(f"worker {index} was to be killed, and only {len(pids)} workers are there")
        pid = pids[index]
        try:
            # Stopped, the victim can accept nothing more: what it holds now is exactly what dies with it.
            measure.stop(pid)
            held = measure.socket_inodes(pid)
            owned = self._held_by_workers()
            ends = measure.established(self.clients.address[1])
            owned |= self._held_by_workers() | held
            queue = _queue(self.clients.address[1], held)
            self.switches.bury(pid)
        except (TimeoutError, FileNotFoundError, ProcessLookupError) as error:
            raise Unmeasurable(f"worker {index} (pid {pid}) could not be looked into before it was killed: {error}") from error
        finally:
            _kill(pid)
        self._event("kill", index)
        self.accepted_by_victims |= {port for port, inode in ends.items() if inode in held}
        dispatched = self.serving.dispatched
        # What a dispatcher has sent and no worker has received has an inode, and is nobody's yet.
        self.run.queued_at_kills.append(sum(inode == 0 or (dispatched and inode not in owned) for inode in ends.values()))
        self.run.victims_queues.append(queue)
        return pid

    def _event(self, what: str, worker: int) -> None:
        event = {"repeat": 1, "at_seconds": rounded(time.monotonic() - self.began), "what": what, "worker": worker}
        self.run.figures.setdefault("events", []).append(event)

    def _held_by_workers(self) -> set[int]:
        """The sockets of all workers, where a connection may be in nobody's hands although it was accepted."""
        held: set[int] = set()
        if self.serving.dispatched:
            for pid in self.serving.pids():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    held |= measure.socket_inodes(pid)
        return held

    def _await_successor(self, index: int, killed: int) -> None:
        """Returns when the worker that took the place of the killed one is ready; follows the connections meanwhile."""
        deadline = time.monotonic() + _SUCCESSOR_LIMIT
        while True:
            successor = self._successor(index, killed)
            if successor is not None:
                break
            if time.monotonic() > deadline:
                raise Unmeasurable(f"worker {index} had no successor {_SUCCESSOR_LIMIT:g} s after it was killed")
            self._pump(time.monotonic() + 0.005)
            if not self.clients.under_way:
                time.sleep(0.005)
        self.run.restarts += 1
        self._event("restart", index)
        self.switches.see(successor)

    def _successor(self, index: int, killed: int) -> int | None:
        """The pid of the worker that is ready in the place of the killed one, None while there is none."""
        if self.serving.group is not None:
            worker = self.serving.group.stats()[index]
            return worker.pid if worker.pid != killed and worker.state == "ready" else None
        pids = self.serving.pids()
        return pids[index] if len(pids) >= self.plan.workers and killed not in pids else None


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
