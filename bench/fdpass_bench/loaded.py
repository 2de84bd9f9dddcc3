"""The scenarios `stall`, `rolling` and `scale-out`: a server under the load generator while something is done to it.
The load runs in a thread of its own; what is done, and how long it takes, is this thread's."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import fdpass
from fdpass_bench import loadgen, measure
from fdpass_bench.peers import PeerError
from fdpass_bench.runs import Plan, Run, Unmeasurable, rounded
from fdpass_bench.servers import Serving

_SETTLE = 0.5  # seconds for what is left of the workers' start
_LOOK = 0.02  # seconds between two looks at a load that is under way
_LAG = 0.05  # seconds at p99 that the generator may be late where half a second is what counts

_STALL_LOAD = 0.5  # of what the workers can do
_BEFORE, _FROZEN, _AFTER = 1.0, 1.0, 1.5  # seconds of the stall's load
_DELAYED = 0.5  # seconds

_ROLL_PAUSE = 0.1  # seconds of load between two rolls
_ROLL_MOST = 30.0  # seconds that one may take, beyond which the load could end before it
_ROLLED = 1.5  # seconds of load after the last
_CONNECTIONS = 1_000_000  # of a closed loop at most: 80 bytes each
_FASTEST = 20_000  # connections per second that are made room for where a service takes no time

_GENERATOR = 0.4  # seconds that a generator takes to start and to end, about
_RISE, _WINDOW = 0.3, 1.5  # seconds until a closed loop is in its stride, and that are counted


def expected_seconds(plan: Plan) -> float:
    """That stall(), rolling() or scale_out() takes, about."""
    if plan.scenario == "scale-out":
        return sum(measure.starting(workers) + _GENERATOR + _SETTLE + _RISE + _WINDOW for workers in steps_of(plan.workers))
    if plan.scenario == "rolling":
        load = min(plan.time_limit, plan.rolls * (_ROLL_PAUSE + plan.workers * measure.starting(1))) + _ROLLED
    else:
        load = _BEFORE + _FROZEN + _AFTER
    return measure.starting(plan.workers) + _GENERATOR + _SETTLE + load


class _Load:
    """The load on a group, from `with` until its end; `result` is there after it. What went wrong in it is raised by wait() and by exit."""

    def __init__(self, generator: loadgen.Generator, load: loadgen.Load) -> None:
        self._generator, self._load = generator, load
        self._enough = False
        self._trouble: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self.result: loadgen.Result | None = None

    def __enter__(self) -> _Load:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        self._enough = True
        self._thread.join()
        if kind is None:
            self._raise()

    def _run(self) -> None:
        try:
            self.result = self._generator.run(self._load, enough=lambda: self._enough)
        except BaseException as error:
            self._trouble = error

    def _raise(self) -> None:
        if self._trouble is not None:
            raise self._trouble

    @property
    def over(self) -> bool:
        """Whether it has ended by itself."""
        return not self._thread.is_alive()

    def wait(self, until: float) -> None:
        """Returns at `until` (monotonic seconds), or when the load has ended by itself."""
        while (left := until - time.monotonic()) > 0 and not self.over:
            time.sleep(min(left, _LOOK))
        self._raise()


def _load_of(plan: Plan, serving: Serving, connections: int, **more: Any) -> loadgen.Load:
    return loadgen.Load(
        *serving.address,
        connections,
        service=plan.service_seconds,
        seed=plan.seed,
        timeout=min(plan.time_limit, 10.0),
        **{"rate": None, **more},
    )


def _took(load: _Load) -> loadgen.Result:
    """Raises Unmeasurable where this machine could not make the connections."""
    result = load.result
    assert result is not None, "its end was waited for, and it raised nothing"
    for outcome, lack in (("no_port", "local port"), ("no_descriptor", "descriptor")):
        count = result.outcome.tolist().count(loadgen.OUTCOMES.index(outcome))
        if count:
            raise Unmeasurable(f"{count} connections found no {lack}")
    return result


# -------------------------------------------------------------------------------- stall


def stall(plan: Plan, run: Run, ended: Callable[[int], None]) -> None:
    """One worker is frozen for a second at half load. Raises Unmeasurable."""
    rate = _STALL_LOAD * plan.workers / plan.service_seconds
    connections = round(rate * (_BEFORE + _FROZEN + _AFTER))
    began = time.monotonic()
    with plan.serve("timed") as serving, loadgen.Generator() as generator:
        time.sleep(_SETTLE)
        pid = serving.pids()[0]
        with _Load(generator, _load_of(plan, serving, connections, rate=rate, distribution="exponential")) as load:
            load.wait(time.monotonic() + _BEFORE)
            ended(30)
            frozen, thawed = _freeze(pid, load)
            ended(60)
            load.wait(time.monotonic() + plan.time_limit)
    result = _took(load)
    run.seconds = time.monotonic() - began
    run.take(result, serving.workers)
    half = round(_DELAYED * 1e9)
    scheduled, over, begun = result.scheduled.tolist(), result.answered.tolist(), result.begun.tolist()
    delayed = sum(end - due > half for due, end, outcome in zip(scheduled, over, result.outcome, strict=True) if outcome >= 0)
    arrived = sum(frozen <= due < thawed for due in scheduled)
    run.figures |= {
        "offered_per_s": rounded(rate),
        "frozen_seconds": rounded((thawed - frozen) / 1e9),
        "arrived_while_frozen": arrived,
        "delayed": delayed,
        "delayed_over_seconds": _DELAYED,
        "delayed_share": rounded(delayed / arrived) if arrived else None,
        # At half load a queue that nobody serves for a second takes another half to be worked off: whoever was hashed to it waits.
        "delayed_share_split": rounded(1 / plan.workers),
        "events": [
            {
                "repeat": 1,
                "what": "stall",
                "worker": 0,
                "at_seconds": rounded((frozen - result.began) / 1e9),
                "until_seconds": rounded((thawed - result.began) / 1e9),
            }
        ],
        "longest_ms": rounded(max((end - due for due, end in zip(scheduled, over, strict=True) if end), default=0) / 1e6),
    }
    lags = sorted(late - due for due, late in zip(scheduled, begun, strict=True) if late)
    if not arrived or not lags:
        raise Unmeasurable("no connection arrived while the worker was frozen")
    lag = lags[len(lags) * 99 // 100] / 1e9
    if lag > _LAG:
        raise Unmeasurable(f"the generator was late: schedule lag p99 {lag * 1e3:.0f} ms of at most {_LAG * 1e3:.0f}")
    if result.outcome.tolist().count(-1):
        raise Unmeasurable(f"the time limit of {plan.time_limit:g} s was hit before every connection had ended")


def _freeze(pid: int, load: _Load) -> tuple[int, int]:
    """Stops the process for a second; when it stood still and until when, CLOCK_MONOTONIC nanoseconds."""
    try:
        measure.stop(pid)
        frozen = time.monotonic_ns()
        load.wait(frozen / 1e9 + _FROZEN)
        thawed = time.monotonic_ns()
    except (TimeoutError, FileNotFoundError, ProcessLookupError) as error:
        raise Unmeasurable(f"worker 0 (pid {pid}) could not be frozen: {error}") from error
    finally:
        # Whatever happens: nobody else would wake it.
        _continue(pid)
    return frozen, thawed


def _continue(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        pass  # it ended


# -------------------------------------------------------------------------------- rolling


def rolling(plan: Plan, run: Run, ended: Callable[[int], None]) -> None:
    """All workers are replaced, several times, under a closed loop. Raises Unmeasurable."""
    took: list[float] = []
    rolled_at: list[float] = []  # CLOCK_MONOTONIC seconds
    began = time.monotonic()
    deadline = began + plan.time_limit
    trouble, used_up = None, False
    with plan.serve("timed", stop_timeout=10.0) as serving, loadgen.Generator() as generator:
        time.sleep(_SETTLE)
        connections = _room(plan, plan.workers, plan.time_limit + _ROLL_MOST)
        with _Load(generator, _load_of(plan, serving, connections, clients=plan.client_count)) as load:
            while len(took) < plan.rolls and time.monotonic() < deadline:
                load.wait(time.monotonic() + _ROLL_PAUSE)
                if used_up := load.over:
                    break
                try:
                    rolled_at.append(time.monotonic())
                    took.append(_roll(serving))
                except (Unmeasurable, OSError, RuntimeError, fdpass.FdPassError, PeerError) as error:
                    trouble = f"roll {len(took) + 1}: {error}"
                    break
                ended(100 * len(took))
            # Long enough that a connection which nobody will ever serve is told from one that is being served.
            load.wait(time.monotonic() + _ROLLED)
    result = _took(load)
    run.seconds = time.monotonic() - began
    run.take(result, serving.workers)
    requests = sum(run.outcomes.values())
    run.figures |= {
        "clients": plan.client_count,
        "rolls": len(took),
        "roll_seconds": [rounded(one) for one in took],
        "requests": requests,
        "failed": requests - run.outcomes["ok"],
        "events": [
            {
                "repeat": 1,
                "what": "roll",
                "worker": None,
                "at_seconds": rounded(at - result.began / 1e9),
                "until_seconds": rounded(at - result.began / 1e9 + one),
            }
            for at, one in zip(rolled_at, took, strict=False)
        ],
    }
    if trouble is not None:
        raise Unmeasurable(trouble)
    if len(took) < plan.rolls:
        what = f"the time limit of {plan.time_limit:g} s was hit" if not used_up else f"{connections} connections were over"
        raise Unmeasurable(f"{what} after {len(took)} of {plan.rolls} rolls")
    if not run.outcomes["ok"]:
        raise Unmeasurable("no request was answered")


def _roll(serving: Serving) -> float:
    """Seconds that it took. Raises Unmeasurable where a worker is still the same process."""
    assert serving.roll is not None, "a server that cannot is refused before anything starts"
    before = serving.pids()
    began = time.monotonic()
    serving.roll()
    took = time.monotonic() - began
    for place, pid in enumerate(serving.pids()):
        if pid in before:
            raise Unmeasurable(f"worker {place} is still process {pid}")
    return took


def _room(plan: Plan, workers: int, seconds: float) -> int:
    """Connections that a closed loop cannot use up in that time, as far as memory allows."""
    fastest = min(_FASTEST, workers / plan.service_seconds if plan.service_seconds else _FASTEST)
    return min(_CONNECTIONS, plan.client_count + int(fastest * seconds * 1.5))


# -------------------------------------------------------------------------------- scale-out


def steps_of(workers: int) -> list[int]:
    """1, 2, 4 ... and that many."""
    steps = [1]
    while steps[-1] < workers:
        steps.append(min(2 * steps[-1], workers))
    return steps


def scale_out(plan: Plan, run: Run, ended: Callable[[int], None]) -> None:
    """A closed loop that gives every worker something to do, for 1, 2, 4 ... workers. Raises Unmeasurable."""
    steps = steps_of(plan.workers)
    found: list[dict[str, Any]] = []
    began = time.monotonic()
    for number, workers in enumerate(steps):
        with plan.serve("timed", workers) as serving, loadgen.Generator() as generator:
            time.sleep(_SETTLE)
            connections = _room(plan, workers, _RISE + _WINDOW + 1.0)
            with _Load(generator, _load_of(plan, serving, connections, clients=plan.client_count)) as load:
                load.wait(time.monotonic() + _RISE)
                first = time.monotonic_ns()
                load.wait(first / 1e9 + _WINDOW)
                last = time.monotonic_ns()
                if load.over:
                    raise Unmeasurable(f"{connections} connections were over before the {_WINDOW:g} s that count")
        result = _took(load)
        ok = sum(outcome == 0 and first <= end < last for end, outcome in zip(result.answered, result.outcome, strict=True))
        rate = ok / (last - first) * 1e9
        alone = found[0]["connections_per_s"] if found else rate
        found.append(
            {
                "workers": workers,
                "connections_per_s": rounded(rate),
                "share_of_linear": rounded(rate / (workers * alone) if alone else None),
            }
        )
        ended(100 * (number + 1) // len(steps))
        run.seconds = time.monotonic() - began
        run.take(result, serving.workers)
        run.figures |= {"clients": plan.client_count, "steps": found}
        failed = sum(run.outcomes.values()) - run.outcomes["ok"]
        if failed or not rate:
            raise Unmeasurable(f"with {workers} workers {failed} connections failed, {run.outcomes['ok']} did not")
