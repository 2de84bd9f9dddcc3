"""The scenario `steady`: the same arrivals and the same work for each server in turn, and what the kernel and the clients saw of it.
It measures one trial at a time and keeps the raw figures; what they mean is figures.py's."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import fdpass
from fdpass_bench import loadgen, measure, peers
from fdpass_bench.servers import Server, Serving, Wanted

_SETTLE = 0.1  # seconds for what is left of the workers' start
_IDLE_WINDOW = 0.25  # seconds in which nothing happens, to know what idle workers cost
_NEXT = 1_000_000  # nanoseconds after an answer by which its worker is free for the next
_CALIBRATION = 1.0  # seconds of the schedule that the null server gets, about
_GENERATOR = 0.4  # seconds that a generator takes to start and to end, about
_FASTEST = 20_000  # requests per second of a closed loop where a service takes no time, about


@dataclass(frozen=True)
class Work:
    """What every server gets. With `clients` the loop is closed and there is no rate."""

    workers: int
    connections: int  # in each repeat
    rate: float | None  # connections per second
    service: float  # mean seconds a request occupies a worker
    distribution: str = "exponential"
    work: str = "sleep"
    arrivals: str = "poisson"
    clients: int = 0
    requests: int = 1  # per connection
    think: float = 0.0  # mean seconds between an answer and the next request of the connection
    seed: int = 1
    repeats: int = 2
    time_limit: float = 10.0  # seconds until a request is given up
    scenario: str = "steady"
    gap: float = 0.0  # of a closed loop: seconds from one client's beginning to the next's, each with one connection; 0: all at once
    case: str | None = None  # of the matrix, and its level
    level: str | None = None
    since: Literal["schedule", "begun"] = "schedule"  # what latencies count from

    @property
    def load(self) -> float | None:
        """Offered work over what the workers can do, as the work was drawn; of a closed loop what its clients would ask for if none ever
        waited, None where they do not pause."""
        if self.rate is not None:
            return self.rate * self.requests * self.service / self.workers
        if not self.think or not self.service:
            return None
        return self.clients * self.service / (self.think + self.service) / self.workers

    @property
    def where(self) -> str:
        """ "steady", "matrix many-cheap heavy"."""
        return " ".join(filter(None, (self.scenario, self.case, self.level)))

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.workers, service=self.service, work=self.work, keep_alive=self.requests > 1)

    @property
    def expected_seconds(self) -> float:
        """That one trial takes, about."""
        busy = self.connections * self.requests * self.service / min(self.workers, self.clients or self.workers)
        each = self.requests * (self.service + self.think)
        if self.rate:
            load = max(busy, self.connections / self.rate) + each
        else:
            rounds = self.connections / max(1, self.clients)
            load = max(busy, rounds * each, self.connections * self.requests / _FASTEST) + self.connections * self.gap
        return measure.starting(self.workers) + _SETTLE + _IDLE_WINDOW + _GENERATOR + load

    @property
    def calibration_seconds(self) -> float:
        return 2 * _GENERATOR + _CALIBRATION

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"load": self.load}

    def load_of(self, server: Serving, repeat: int) -> loadgen.Load:
        """One repeat's load. Repeats differ in their seed, servers in nothing."""
        return loadgen.Load(
            host=server.host,
            port=server.port,
            connections=self.connections,
            # Clients that come one after the other, each with one connection, are arrivals; what follows is theirs to time.
            rate=1 / self.gap if self.gap else self.rate,
            arrivals="uniform" if self.gap else self.arrivals,
            clients=0 if self.gap else self.clients,
            service=self.service,
            distribution=self.distribution,
            seed=self.seed * 1000 + repeat,
            requests=self.requests,
            think=self.think,
            timeout=self.time_limit,
            protocol=server.protocol,
            path=server.path,
        )


@dataclass
class Trial:
    """One server under one repeat of the work. Columns have one entry for each request, in the order of the schedule; seconds.

    lag: how late the generator began it; not of a closed loop's opening burst. latency: from where the work says to the end of the
        answer, None where there was none.
    connect, queue, service: the parts of the latency after the lag; queue and service only of answers that say when they began.
    other: what of the latency was not waiting for a worker, and occupied: how long it kept its worker from the next connection;
    of our own workers only, one request per connection.
    """

    server: str
    repeat: int
    outcomes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(loadgen.OUTCOMES, 0))
    outcome_seconds: dict[str, tuple[float, float]] = field(default_factory=dict)  # mean and longest, from the schedule
    lag: list[float] = field(default_factory=list)
    latency: list[float | None] = field(default_factory=list)
    connect: list[float] = field(default_factory=list)
    queue: list[float] = field(default_factory=list)
    service: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)
    occupied: list[float] = field(default_factory=list)
    connections_of: dict[int, int] = field(default_factory=dict)  # by worker, as its answers name it
    requests_of: dict[int, int] = field(default_factory=dict)
    taken_at: dict[int, array[float]] = field(default_factory=dict)  # by worker: when it took each request, since the first was due
    offered_per_s: float | None = None
    achieved_per_s: float | None = None
    begun_per_s: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float | None = None  # of the server's workers
    cpu_of: dict[int, float] = field(default_factory=dict)  # the same by pid
    generator_cpu_seconds: float = 0.0
    idle_switches_per_second: float | None = None  # voluntary, of all workers together
    switches: float | None = None  # voluntary, of the workers, without what idle workers cost in that time
    overflows: int = 0
    drops: int = 0
    problem: str | None = None  # why it was not measured at all


_ANYWHERE = Serving("127.0.0.1", 1)  # for a load that is compared, not sent


def null_load(work: Work, serving: Serving = _ANYWHERE) -> loadgen.Load:
    """What the null server gets in place of this work: its arrivals, at 100 a second or more, for a second."""
    load = work.load_of(serving, 0)
    rate = None if load.rate is None else max(100.0, load.rate)
    count = min(load.connections if rate is None else int(rate * _CALIBRATION), 20000)
    return replace(load, rate=rate, connections=count, requests=1, service=0.0, think=0.0, distribution="fixed")


def calibrate(work: Work) -> Trial:
    """The work's arrivals against a server that answers at once: what remains is the generator's and kernel's."""
    trial = Trial("null server", 0)
    try:
        with loadgen.Generator() as generator, loadgen.NullServer() as null:
            _take(trial, generator.run(null_load(work, Serving(*null.address))), replace(work, requests=1), believed=False)
    except (OSError, RuntimeError, fdpass.FdPassError) as error:
        trial.problem = str(error)
    return trial


def measure_trial(server: Server, work: Work, repeat: int, ended: Callable[[int], None]) -> Trial:
    """Starts the server, loads it, ends it. What went wrong is the trial's `problem`, never an exception."""
    trial = Trial(server.name, repeat)
    try:
        # A generator of its own for each: none inherits the trouble of another.
        with server.serve(work.wanted) as serving, loadgen.Generator() as generator:
            _load(trial, generator, serving, work, repeat, ended, believed=server.kind != "target")
    except (OSError, RuntimeError, ValueError, peers.PeerError, fdpass.FdPassError) as error:
        trial.problem = str(error)
    return trial


def _load(
    trial: Trial,
    generator: loadgen.Generator,
    serving: Serving,
    work: Work,
    repeat: int,
    ended: Callable[[int], None],
    believed: bool,
) -> None:
    pids = serving.pids()
    idle_rate = 0.0
    if pids:
        time.sleep(_SETTLE)
        switches = measure.Switches(pids)
        began = time.monotonic()
        time.sleep(_IDLE_WINDOW)
        idle_rate = trial.idle_switches_per_second = switches.total() / (time.monotonic() - began)
    counters = measure.listen_counters()
    cpu = {pid: measure.cpu_seconds(pid) for pid in pids}
    switches = measure.Switches(pids)
    began = time.monotonic()
    result = generator.run(work.load_of(serving, repeat), ended)
    trial.seconds = time.monotonic() - began
    after = measure.listen_counters()
    trial.overflows, trial.drops = after[0] - counters[0], after[1] - counters[1]
    _take(trial, result, work, believed)
    if pids:
        try:
            cpu_of = {pid: measure.cpu_seconds(pid) - before for pid, before in cpu.items()}
            trial.switches = switches.total() - idle_rate * trial.seconds
            trial.cpu_of, trial.cpu_seconds = cpu_of, sum(cpu_of.values()) or None
        except (FileNotFoundError, ProcessLookupError):
            # Somebody else's server may replace its workers as it likes: what they cost is then unknown, and nothing else.
            if believed:
                gone = len(pids) - len(measure.alive(pids))
                trial.problem = f"{gone} of {len(pids)} workers ended while they were loaded"


def _take(trial: Trial, result: loadgen.Result, work: Work, believed: bool) -> None:
    """Copies what the columns say: they go with the result. `believed`: whether the server's answers tell of its workers."""
    requests = work.requests
    scheduled, begun, ended = result.scheduled.tolist(), result.begun.tolist(), result.answered.tolist()
    connected, accepted, started = result.connected.tolist(), result.accepted.tolist(), result.started.tolist()
    free, worker, outcomes = result.free.tolist(), result.worker.tolist(), result.outcome.tolist()
    ok = loadgen.OUTCOMES.index("ok")
    spent: dict[int, list[float]] = {}
    for row, outcome in enumerate(outcomes):
        took = (ended[row] - scheduled[row]) / 1e9
        if outcome >= 0:
            # A request whose connection had ended before its turn came was never due, and took no time.
            spent.setdefault(outcome, []).append(took if scheduled[row] else 0.0)
        # A closed loop begins all its clients at once, and nobody had promised them that instant.
        if begun[row] and (row >= work.clients * requests or row % requests):
            trial.lag.append((begun[row] - scheduled[row]) / 1e9)
        late = (begun[row] - scheduled[row]) / 1e9 if work.since == "begun" else 0.0
        trial.latency.append(took - late if outcome == ok else None)
        if outcome != ok:
            continue
        trial.connect.append((connected[row] - begun[row]) / 1e9)
        if not believed:
            worker[row] = -1
        if believed and scheduled[row] <= accepted[row] <= started[row] <= ended[row] and free[row] <= accepted[row]:
            trial.queue.append(max(0, started[row] - connected[row]) / 1e9)
            trial.service.append((ended[row] - started[row]) / 1e9)
        else:
            accepted[row] = 0  # nothing is known: of somebody else's server, though its answers look like ours, or by another clock
        if worker[row] >= 0:
            trial.taken_at.setdefault(worker[row], array("d")).append(((accepted[row] or ended[row]) - scheduled[0]) / 1e9)
            trial.requests_of[worker[row]] = trial.requests_of.get(worker[row], 0) + 1
            if row % requests == 0:
                trial.connections_of[worker[row]] = trial.connections_of.get(worker[row], 0) + 1
    for outcome, times in spent.items():
        name = loadgen.OUTCOMES[outcome]
        trial.outcomes[name] = len(times)
        trial.outcome_seconds[name] = (sum(times) / len(times), max(times))
    trial.generator_cpu_seconds = result.cpu_seconds
    firsts = [row for row in range(0, len(outcomes), requests) if begun[row]]
    if firsts:
        first = scheduled[0]
        window = (scheduled[(len(outcomes) - 1) // requests * requests] - first) / 1e9
        count = len(outcomes) // requests
        trial.offered_per_s = (count - 1) / window if work.rate is not None and window > 0 else None
        trial.begun_per_s = _per_second(len(firsts) - 1, max(begun[row] for row in firsts) - first)
        whole = [row for row in firsts if outcomes[row + requests - 1] == ok]
        if whole:
            # The time that the server took for a connection: its pauses are the client's.
            took_of = [sum(ended[row + one] - scheduled[row + one] for one in range(requests)) for row in whole]
            until = max(scheduled[row] + took for row, took in zip(whole, took_of, strict=True)) - first
            if trial.offered_per_s is not None:
                # The last arrivals take their time as all others do, which is no lack of rate; that they take ever longer is one.
                usual = max(took_of[: (len(whole) + 1) // 2])
                until = max(int(window * 1e9), until - usual)
            trial.achieved_per_s = _per_second(len(whole) - 1, until)
    if requests == 1:
        _occupation(trial, scheduled, connected, accepted, free, worker, ended)


def _occupation(
    trial: Trial,
    scheduled: Sequence[int],
    connected: Sequence[int],
    accepted: Sequence[int],
    free: Sequence[int],
    worker: Sequence[int],
    ended: Sequence[int],
) -> None:
    """A connection occupies its worker from when both were there, connection and idle worker, until the worker is free for the next.

    So what the accept, the wake-up and the closing cost is part of it, as it is for the next connection in the queue.
    """
    rows_of: dict[int, list[int]] = {}
    for row, taken in enumerate(accepted):
        if taken and free[row]:
            rows_of.setdefault(worker[row], []).append(row)
    whole = trial.outcomes["ok"] == len(ended)
    for rows in rows_of.values():
        rows.sort(key=accepted.__getitem__)
        for row, following in zip(rows, [*rows[1:], None], strict=True):
            # The worker may have it before connect() has returned to the generator.
            there = max(free[row], min(connected[row], accepted[row]))
            waited = max(0, free[row] - min(connected[row], accepted[row]))
            trial.other.append((ended[row] - scheduled[row] - waited) / 1e9)
            # Where answers were lost the next one may not be of the worker's next connection: then the worker seems busy for longer.
            if following is not None and (whole or free[following] - ended[row] < _NEXT):
                trial.occupied.append((free[following] - there) / 1e9)


def _per_second(count: int, nanoseconds: int) -> float:
    return count / nanoseconds * 1e9 if nanoseconds > 0 else 0.0


def order_of(servers: Sequence[Server], repeat: int) -> Sequence[Server]:
    """ABBA: a drift of the machine falls on all alike."""
    return servers if repeat % 2 == 0 else servers[::-1]
