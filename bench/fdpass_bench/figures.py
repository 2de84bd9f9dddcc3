"""From the trials of `steady` to figures: latency and its uncertainty, shares, costs, theory beside them, and whether they may be believed.
It computes and judges; it measures nothing and prints nothing."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import pstdev
from typing import Any, TypeVar

from fdpass_bench import curves, estimate, theory
from fdpass_bench.loadgen import OUTCOMES, Histogram
from fdpass_bench.servers import Server
from fdpass_bench.steady import Trial, Work

_LAG_SHARE = 0.10  # of the service time: the generator's own lateness must stay below it, at p99
_LAG_FLOOR = 0.00025  # seconds: where the service time is not known, lag below this is the machine's timer and not lateness
_BUSY_SHARE = 0.95  # of the time that a closed loop's generator may compute before the rate is its own
_RATE_SHARE = 0.99  # of the offered rate must be achieved
_KEPT_SHARE = 0.9  # the same where connections are kept: few of them, of which the last take more or less by chance
_LOST_SHARE = 0.01  # of the requests may have no answer before the latency of the others says nothing
_OVERLOAD = "overload: the workers are asked for {:.0%} of what they can do, so there is no steady state"
_T = TypeVar("_T")
_PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99_9": 99.9}


@dataclass
class Figures:
    """One server over all its repeats. Seconds. `latency` and its parts: mean, stdev, p50, p90, p99, p99_9, max.

    interval: of the mean latency, 95 %. prediction: theory for the way this server queues, with the measured occupied times; bound: that
    of one queue, which no way of sharing out beats. per_worker counts connections, requests_per_worker requests.
    """

    server: Server
    work: Work
    trials: Sequence[Trial]
    latency: dict[str, float]
    parts: dict[str, dict[str, float]]
    interval: estimate.Interval | None
    per_worker: list[int]
    requests_per_worker: list[int]
    prediction: theory.Prediction | None = None
    bound: theory.Prediction | None = None
    curve: dict[str, list[float]] | None = None  # the latency at each percentile, in ms
    occupied: tuple[float, float] | None = None  # mean and squared coefficient of variation
    reasons: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.server.name

    @property
    def valid(self) -> bool:
        return not self.reasons

    @property
    def outcomes(self) -> dict[str, int]:
        return {outcome: sum(trial.outcomes[outcome] for trial in self.trials) for outcome in OUTCOMES}

    @property
    def utilisation(self) -> float | None:
        rate = self.rate
        return rate * self.occupied[0] / self.work.workers if rate and self.occupied else None

    @property
    def rate(self) -> float | None:
        """Connections per second, as they came: the seed's, not the one asked for, which few hundred arrivals may miss by some per cent."""
        return _mean_of(trial.offered_per_s for trial in self.trials)

    @property
    def share_of_bound(self) -> float | None:
        return self.latency["mean"] / self.bound.mean if self.bound and self.latency else None

    def evenness(self, counts: str, index: Callable[[Sequence[float]], float]) -> float | None:
        """estimate.max_over_mean or estimate.jain of "connections_of" or "requests_of": the mean over the repeats."""
        each = [_by_worker([getattr(trial, counts)], self.work.workers) for trial in self.trials]
        return _mean_of(index(one) for one in each if one)

    @property
    def by_hash(self) -> float | None:
        """The max/mean that a hash would give the connections of a repeat, expected; None where the workers are somebody else's."""
        return theory.hash_imbalance(self.work.workers, self.work.connections) if self.per_worker else None

    def per_connection(self, value: str) -> float | None:
        """A trial's figure over its connections: "cpu_seconds", "switches" or "generator_cpu_seconds"."""
        values = [getattr(trial, value) for trial in self.trials]
        accepted = sum(self.per_worker) or self.outcomes["ok"] // self.work.requests
        return sum(values) / accepted if accepted and values and None not in values else None

    @property
    def switches_per_connection(self) -> float | None:
        switches = self.per_connection("switches")
        # A sleep is one switch of its own, and no way of sharing out can do without it.
        held = self.work.requests if self.work.service > 0 and self.work.work == "sleep" else 0
        return None if switches is None else switches - held

    def as_json(self) -> dict[str, Any]:
        outcomes = self.outcomes
        before, after = outcomes["reset_before_accept"], outcomes["reset_after_accept"]
        cpu, own = self.per_connection("cpu_seconds"), self.per_connection("generator_cpu_seconds")
        return {
            "strategy": self.name,
            "server": self.server.kind,
            "version": self.server.version,
            "credits": self.server.credits,
            "scenario": self.work.scenario,
            "case": self.work.case,
            "level": self.work.level,
            "work": self.work.as_json(),
            "workers": self.work.workers,
            "connections": self.work.connections,
            "repeats": len(self.trials),
            "requests_per_connection": self.work.requests,
            "per_worker": self.per_worker,
            "requests_per_worker": self.requests_per_worker,
            "max_over_mean": _rounded(self.evenness("connections_of", estimate.max_over_mean)),
            "hash_max_over_mean": _rounded(self.by_hash),
            "jain": _rounded(self.evenness("connections_of", estimate.jain)),
            "requests_max_over_mean": _rounded(self.evenness("requests_of", estimate.max_over_mean)),
            "switches_per_connection": _rounded(self.switches_per_connection),
            "idle_switches_per_second": _rounded(_mean_of(trial.idle_switches_per_second for trial in self.trials)),
            "cpu_us_per_connection": None if cpu is None else round(cpu * 1e6, 1),
            "generator_cpu_us_per_connection": None if own is None else round(own * 1e6, 1),
            "outcomes": {
                "ok": outcomes["ok"],
                "refused": outcomes["refused"],
                "reset": before + after,
                "timeout": outcomes["timeout"],
                "bad_answer": outcomes["bad_answer"],
                "no_port": outcomes["no_port"],
                "no_descriptor": outcomes["no_descriptor"],
            },
            "resets": {"before_accept": before, "after_accept": after},
            "outcome_ms": self._outcome_times(),
            "lost_accepted": after,
            "lost_unaccepted": outcomes["refused"] + before,
            "latency_ms": _milliseconds(self.latency),
            **{f"{name}_ms": _milliseconds(part) for name, part in self.parts.items()},
            "offered_per_s": _rounded(self.rate),
            "achieved_per_s": _rounded(_mean_of(trial.achieved_per_s for trial in self.trials)),
            "ci": self._interval_json(),
            "theory": self._theory_json(),
            "load": _rounded(self.work.load),
            "latency_curve": self.curve,
            "series": self._series_json(),
            "occupied_ms": {"mean": _rounded(self.occupied[0] * 1e3), "cv2": _rounded(self.occupied[1])} if self.occupied else None,
            "utilisation": _rounded(self.utilisation),
            "listen_overflows": sum(trial.overflows for trial in self.trials),
            "listen_drops": sum(trial.drops for trial in self.trials),
            "service_seconds": self.work.service,
            "seconds": _rounded(sum(trial.seconds for trial in self.trials)),
            "valid": self.valid,
            "invalid_reason": "; ".join(self.reasons) or None,
        }

    def _series_json(self) -> list[dict[str, Any]]:
        workers = self.work.workers
        named = [(trial.repeat, _places(trial.taken_at, workers)) for trial in self.trials if trial.taken_at]
        return [{"repeat": repeat + 1, **curves.series(at, workers)} for repeat, at in named]

    def _outcome_times(self) -> dict[str, dict[str, float]]:
        times = {}
        for outcome, count in self.outcomes.items():
            here = [(trial.outcomes[outcome], *trial.outcome_seconds[outcome]) for trial in self.trials if outcome in trial.outcome_seconds]
            if here:
                mean = sum(number * average for number, average, _ in here) / count
                times[outcome] = {"mean": round(mean * 1e3, 4), "max": round(max(longest for _, _, longest in here) * 1e3, 4)}
        return times

    def _interval_json(self) -> dict[str, Any] | None:
        found = self.interval
        if found is None or found.low is None or found.high is None:
            return None
        return {"level": 0.95, "mean_ms": [round(found.low * 1e3, 4), round(found.high * 1e3, 4)], "batches": found.batches}

    def _ideal_mean(self) -> float | None:
        work, queues = self.work, {"one queue": theory.one_queue, "split": theory.split_queue}.get(self.server.discipline or "")
        if queues is None or self.rate is None or not 0 < self.rate * work.service < work.workers or work.arrivals != "poisson":
            return None
        cv2 = {"exponential": 1.0, "fixed": 0.0, "hyper": theory.HYPER_CV2}[work.distribution]
        return queues(work.workers, self.rate, work.service, cv2).mean * 1e3

    def _theory_json(self) -> dict[str, Any] | None:
        if self.prediction is None or self.bound is None:
            return None
        return {
            "discipline": self.server.discipline,
            "how": self.prediction.how,
            "latency_ms": _prediction(self.prediction),
            # The textbook's, of workers that cost nothing: from the service times as they were drawn.
            "ideal_mean_ms": _rounded(self._ideal_mean()),
            "one_queue_ms": _prediction(self.bound),
            # Of a repeat's connections, where each falls on a worker by chance: what a hash does.
            "expected_max_over_mean": _rounded(self.by_hash) if self.server.discipline == "split" else None,
            "share_of_one_queue_bound": _rounded(self.share_of_bound),
            "latency_curve": curves.of_theory(self.prediction, self.bound),
            "measured_over_theory": _rounded(self.latency["mean"] / self.prediction.mean) if self.latency else None,
        }


def _prediction(one: theory.Prediction) -> dict[str, float]:
    return {name: round(getattr(one, name) * 1e3, 4) for name in ("mean", *_PERCENTILES)}


def _milliseconds(seconds: dict[str, float]) -> dict[str, float] | None:
    return {name: round(value * 1e3, 4) for name, value in seconds.items()} or None


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 4)


def _mean_of(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def figures_of(server: Server, work: Work, trials: Sequence[Trial], calibration: Trial | None) -> Figures:
    """`trials`: those of this server, in order; one or more."""
    kept = [_after_warm_up(trial, work) for trial in trials]
    answered = [value for values in kept for value in values if value is not None]
    found = Figures(
        server,
        work,
        trials,
        latency=_spread(answered),
        parts={
            name: _spread([value for trial in trials for value in getattr(trial, name)]) for name in ("lag", "connect", "queue", "service")
        },
        interval=estimate.interval(kept) if answered else None,
        per_worker=_by_worker([trial.connections_of for trial in trials], work.workers),
        requests_per_worker=_by_worker([trial.requests_of for trial in trials], work.workers),
        curve=curves.of_values(answered),
    )
    if calibration is not None and (lost := _lost(calibration)):
        found.reasons.append(f"the calibration failed: {lost}")
    for trial in trials:
        number = f"repeat {trial.repeat + 1}: " if len(trials) > 1 else ""
        found.reasons += [number + reason for reason in _problems(work, trial, calibration)]
    if work.requests > 1 and work.rate is not None and (work.load or 0.0) >= 1 and server.kind != "target":
        # The rate of a few kept connections does not tell it, nor does theory, which knows none.
        found.reasons.append(_OVERLOAD.format(work.load))
    _add_theory(found)
    return found


def _after_warm_up(trial: Trial, work: Work) -> list[float | None]:
    return trial.latency[estimate.warm_up(work.connections) * work.requests :]


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    histogram = Histogram()
    histogram.add(memoryview(array("q", [round(value * 1e9) for value in seconds])))
    found = {"mean": histogram.mean / 1e9, "stdev": pstdev(seconds)}
    found |= {name: histogram.percentile(share) / 1e9 for name, share in _PERCENTILES.items()}
    return found | {"max": histogram.max / 1e9}


def _places(of_worker: Mapping[int, _T], workers: int) -> dict[int, _T]:
    """Our workers answer with their index. Others answer with their pid, another one in each repeat: these in the order of the pids."""
    ours = all(worker < workers for worker in of_worker)
    return {worker if ours else place: of_worker[worker] for place, worker in enumerate(sorted(of_worker))}


def _by_worker(counts: Sequence[dict[int, int]], workers: int) -> list[int]:
    total = [0] * workers
    for count in counts:
        for at, number in _places(count, workers).items():
            total += [0] * (at + 1 - len(total))
            total[at] += number
    return total if any(total) else []


# Whether it may be believed


def _generator_problems(work: Work, trial: Trial, calibration: Trial | None = None) -> list[str]:
    found = []
    if trial.outcomes["no_port"]:
        found.append(f"port exhaustion: {trial.outcomes['no_port']} connections found no local port")
    if trial.outcomes["no_descriptor"]:
        found.append(f"{trial.outcomes['no_descriptor']} connections found no file descriptor (see ulimit -n)")
    if work.rate is None:
        # Nobody promised a closed loop an instant: its clients go as fast as they are let, unless they are what holds it up.
        if trial.seconds and trial.generator_cpu_seconds > _BUSY_SHARE * trial.seconds:
            found.append(f"the generator had no time to spare: {trial.generator_cpu_seconds / trial.seconds:.0%} of a processor")
        return found
    lag = _spread(trial.lag)
    answered = [value for value in trial.latency if value is not None]
    if work.since == "begun":
        # Its lateness is in no latency; what it could still do is to let connections come together that were to come one by one.
        limit, what = 1 / work.rate, "the mean time between two connections"
    elif work.service > 0:
        limit, what = _LAG_SHARE * work.service, f"{_LAG_SHARE:.0%} of the service time ({work.service * 1e3:.3g} ms)"
    else:
        # Where nothing is known of the service, the latency itself must not be mostly the generator's.
        mean = sum(answered) / len(answered) if answered else math.inf
        limit, what = max(_LAG_SHARE * mean, _LAG_FLOOR), f"{_LAG_SHARE:.0%} of the mean latency ({mean * 1e3:.3g} ms)"
    if lag and lag["p99"] > limit:
        found.append(f"the generator was late: schedule lag p99 {lag['p99'] * 1e3:.3g} ms, over {what}")
    if trial.offered_per_s and trial.begun_per_s < _RATE_SHARE * trial.offered_per_s:
        found.append(f"the generator began {trial.begun_per_s:.4g} of {trial.offered_per_s:.4g} connections per second")
    if found and calibration is not None:
        # What the calibration is for: whose fault it is.
        alone = "was not late" if not _generator_problems(work, calibration) else "was late as well"
        found[-1] += f" (against a server that answers at once it {alone})"
    return found


def _problems(work: Work, trial: Trial, calibration: Trial | None) -> list[str]:
    if trial.problem is not None:
        return [trial.problem]
    found = _generator_problems(work, trial, calibration)
    share = _RATE_SHARE if work.requests == 1 else _KEPT_SHARE
    if lost := _lost(trial):
        found.append(lost)
    elif trial.offered_per_s and trial.achieved_per_s is not None and trial.achieved_per_s < share * trial.offered_per_s:
        found.append(f"the server answered {trial.achieved_per_s:.4g} of {trial.offered_per_s:.4g} connections per second")
    return found


def _lost(trial: Trial) -> str | None:
    if trial.problem is not None:
        return trial.problem
    total, ok = sum(trial.outcomes.values()), trial.outcomes["ok"]
    failed = ", ".join(
        f"{count} {outcome.replace('_', ' ')} (after {trial.outcome_seconds[outcome][0] * 1e3:.3g} ms on average)"
        for outcome, count in trial.outcomes.items()
        if count and outcome != "ok"
    )
    if not ok:
        return f"no request was answered: {failed or 'nothing happened'}"
    if total - ok > _LOST_SHARE * total:
        return f"{(total - ok) / total:.1%} of the requests had no answer, and the latency of the others would flatter: {failed}"
    return None


# Theory


def _add_theory(found: Figures) -> None:
    work = found.work
    occupied, other = _pooled(found.trials)
    if len(occupied) < 2:
        return
    mean = sum(occupied) / len(occupied)
    variance = sum((value - mean) ** 2 for value in occupied) / (len(occupied) - 1)
    found.occupied = mean, variance / mean**2 if mean > 0 else 0.0
    discipline = found.server.discipline
    rate, load = found.rate, found.utilisation
    if rate is None or load is None or discipline is None or mean <= 0:
        return
    if load >= 1:
        found.reasons.append(_OVERLOAD.format(load))
        return
    found.bound = theory.predict("one queue", work.workers, rate, occupied, other, arrivals=work.arrivals)
    same = discipline == "one queue"
    found.prediction = found.bound if same else theory.predict(discipline, work.workers, rate, occupied, other, arrivals=work.arrivals)


def _ideals(figures: Sequence[Figures]) -> dict[str, theory.Prediction]:
    """With the workers of the first server that theory knows and that says something."""
    for one in figures:
        if one.valid and one.bound is not None and one.rate is not None:
            occupied, other = _pooled(one.trials)
            rest: Iterable[str] = (queues for queues in theory.DISCIPLINES if queues != "one queue")
            arrivals = one.work.arrivals
            predict = {queues: theory.predict(queues, one.work.workers, one.rate, occupied, other, arrivals=arrivals) for queues in rest}
            return {"one queue": one.bound, **predict}
    return {}


def _pooled(trials: Sequence[Trial]) -> tuple[list[float], list[float]]:
    return [value for trial in trials for value in trial.occupied], [value for trial in trials for value in trial.other]


# Pairs


@dataclass(frozen=True)
class Comparison:
    """The mean latency of `first` over that of `second`, paired by the same arrivals and work, with its 95 % interval."""

    first: Figures
    second: Figures
    ratio: estimate.Interval | None

    @property
    def theory(self) -> float | None:
        first, second = self.first.prediction, self.second.prediction
        return first.mean / second.mean if first and second else None

    @property
    def sentence(self) -> str:
        both = f"{self.first.name} and {self.second.name}"
        invalid = [one.name for one in (self.first, self.second) if not one.valid]
        if invalid:
            return f"{both}: nothing can be said, {' and '.join(invalid)} {'is' if len(invalid) == 1 else 'are'} INVALID"
        ratio = self.ratio
        if ratio is None or ratio.low is None or ratio.high is None:
            return f"{both}: too few connections to compare"
        verdict = estimate.verdict_of(ratio)
        if verdict == "no difference that this run can show":
            theory_says = "" if self.theory is None else f", theory {self.theory:.2f}"
            return f"{both}: {verdict} (mean ratio {ratio.mean:.2f}, 95 % {ratio.low:.2f} to {ratio.high:.2f}{theory_says})"
        if verdict == "first is lower":
            winner, loser, times, low, high = self.first, self.second, 1 / ratio.mean, 1 / ratio.high, 1 / ratio.low
            expected = None if self.theory is None else 1 / self.theory
        else:
            winner, loser, times, low, high, expected = self.second, self.first, ratio.mean, ratio.low, ratio.high, self.theory
        theory_says = "" if expected is None else f", theory {expected:.2f}"
        return f"{winner.name} beats {loser.name}: mean {times:.2f} times lower (95 % {low:.2f} to {high:.2f}){theory_says}"

    def as_json(self) -> dict[str, Any]:
        known = self.ratio is not None and self.ratio.low is not None and self.ratio.high is not None
        valid = self.first.valid and self.second.valid and known
        return {
            "scenario": self.first.work.scenario,
            "workers": self.first.work.workers,
            "load": _rounded(self.first.work.load),
            "first": self.first.name,
            "second": self.second.name,
            "mean_ratio": _rounded(self.ratio.mean) if self.ratio and known else None,
            "ci": [_rounded(self.ratio.low), _rounded(self.ratio.high)] if self.ratio and known else None,
            "theory": _rounded(self.theory),
            "valid": valid,
            "sentence": self.sentence,
        }


_Latencies = list[list[float | None]]


def paired(first: Figures, second: Figures) -> tuple[_Latencies, _Latencies]:
    """The latencies of the repeats that both have, without the first ones of each. An interrupt may have left one a repeat short."""
    both = [(one, other) for one in first.trials for other in second.trials if one.repeat == other.repeat and one.latency and other.latency]
    return [_after_warm_up(one, first.work) for one, _ in both], [_after_warm_up(other, first.work) for _, other in both]


def comparisons(found: Sequence[Figures]) -> list[Comparison]:
    """One for each pair, in the order given."""
    pairs = []
    for first, second in combinations(found, 2):
        try:
            pairs.append(Comparison(first, second, estimate.ratio(*paired(first, second))))
        except ValueError:
            pairs.append(Comparison(first, second, None))  # nothing was answered by both
    return pairs


@dataclass(frozen=True)
class Study:
    """What one `steady` found: a figure for each server that had at least one trial, each pair compared, the null server beside them."""

    work: Work
    calibration: Trial | None
    figures: list[Figures]
    comparisons: list[Comparison]
    ideals: dict[str, theory.Prediction]  # by discipline: what it would give with these workers, if sharing out cost nothing

    @property
    def valid(self) -> bool:
        return all(one.valid for one in self.figures)

    def calibration_json(self) -> dict[str, Any] | None:
        trial = self.calibration
        if trial is None:
            return None
        ok = trial.outcomes["ok"]
        return {
            "latency_ms": _milliseconds(_spread([value for value in trial.latency if value is not None])),
            "lag_ms": _milliseconds(_spread(trial.lag)),
            "connections": sum(trial.outcomes.values()),
            "ok": ok,
            "problem": trial.problem,
            "generator_cpu_us_per_connection": round(trial.generator_cpu_seconds / ok * 1e6, 1) if ok else None,
        }


def study(work: Work, servers: Sequence[Server], trials: Sequence[Trial], calibration: Trial | None) -> Study:
    by_server = [(server, [trial for trial in trials if trial.server == server.name]) for server in servers]
    figures = [figures_of(server, work, mine, calibration) for server, mine in by_server if mine]
    # Of the matrix no other policies are shown, and to simulate them twelve times would take half a minute.
    return Study(work, calibration, figures, comparisons(figures), _ideals(figures) if work.level is None else {})
