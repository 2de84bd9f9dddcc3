"""Runs of one file against the same runs of another: how many times as much, how surely, and whether it got worse.
It judges only what has an interval or counts; the rest it shows. It knows neither a server nor a format."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fdpass_bench.estimate import CONFIDENCE, student_t
from fdpass_bench.records import Record, asked, title_of
from fdpass_bench.tables import HOLDS, Table, figure, unit_of

Verdict = Literal["worse", "better", "no difference", "not judged"]

#: Where a file does not say how many batches its interval rests on.
_BATCHES = 8
#: So many are delayed at one frozen worker together, or fail at one that is replaced: from run to run the counts of `stall` have six times
#: the variance of counts that fall by themselves (simulated: split queues of 2 to 8 workers at half load).
_TOGETHER = 6
_MOST_NAMED = 4  # changes in the sentence; all stand in the table
_ENVIRONMENT = (("system", "system"), ("kernel", "kernel"), ("machine", "machine"), ("usable_cpus", "processors"), ("python", "Python"))


@dataclass(frozen=True)
class Change:
    """One measure of one run in two files. ratio: the second over the first, low and high its 95 % interval, None where there is none.

    more_is_worse: of a rate it is better. verdict: of all judged changes together, so that one report in twenty names a difference that
    is none, however many runs it compares.
    """

    run: str
    measure: str
    before: str
    after: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    verdict: Verdict = "not judged"
    counts: bool = False

    @property
    def sentence(self) -> str:
        """ "shared, steady, load 0.7: mean latency 1.21 times as much (95 % 1.10 to 1.33)"."""
        if self.counts or self.ratio is None:
            return f"{self.run}: {self.measure} {self.after}, before {self.before}"
        within = "" if self.low is None or self.high is None else f" (95 % {self.low:.2f} to {self.high:.2f})"
        return f"{self.run}: {self.measure} {self.ratio:.2f} times as much{within}"


@dataclass(frozen=True)
class Comparison:
    """The second record against the first. only: what stands in one of them. differences: of the machines. turned: rankings that hold in
    one of them and not in the other."""

    before: Record
    after: Record
    changes: Sequence[Change]
    only: Sequence[str]
    invalid: Sequence[str]
    differences: Sequence[str]
    turned: Sequence[str] = ()

    @property
    def worse(self) -> list[Change]:
        return [change for change in self.changes if change.verdict == "worse"]

    @property
    def sentence(self) -> str:
        """Did it get worse?"""
        better = [change for change in self.changes if change.verdict == "better"]
        judged = sum(change.verdict != "not judged" for change in self.changes)
        if self.worse:
            text = f"{self.after.name} is worse than {self.before.name}: {_listed(self.worse)}."
            return text + (f" Better: {_listed(better)}." if better else "")
        if better:
            return f"{self.after.name} is better than {self.before.name}: {_listed(better)}. Nothing got worse that these runs can show."
        if judged:
            return f"{self.after.name} is not worse than {self.before.name}, as far as these runs can show ({judged} compared)."
        return f"{self.after.name} and {self.before.name}: nothing that could be judged is valid in both."

    @property
    def tables(self) -> list[Table]:
        """What was judged, then what is only shown; what has nothing is left out."""
        judged = [change for change in self.changes if change.verdict != "not judged"]
        shown = [change for change in self.changes if change.verdict == "not judged"]
        title = f"{self.after.name} against {self.before.name}"
        found = [self._table(title, judged, ["verdict"])] if judged else []
        return found + ([self._table(f"{title}: not judged, as the files carry no interval", shown, [])] if shown else [])

    @property
    def shared(self) -> list[str]:
        """What the names of all runs have in common: "steady", "4 workers"."""
        names = list(dict.fromkeys(change.run for change in self.changes))
        return [part for part in names[0].split(", ") if all(part in name.split(", ") for name in names)] if len(names) > 1 else []

    def short(self, change: Change) -> str:
        """A run's name without what all have in common."""
        return ", ".join(part for part in change.run.split(", ") if part not in self.shared) or change.run

    def _table(self, title: str, changes: Sequence[Change], verdict: list[str]) -> Table:
        columns = ["run", "measure", self.before.name, self.after.name, "ratio", *(["95 % interval", *verdict] if verdict else [])]
        if self.shared:
            title += f" ({', '.join(self.shared)})"
        # Below itself a name says nothing new.
        names = ["", *(change.run for change in changes)]
        rows = []
        for change, above in zip(changes, names, strict=False):
            row = ["" if change.run == above else self.short(change), change.measure, change.before, change.after]
            row.append("-" if change.ratio is None else f"{change.ratio:.2f}")
            if verdict:
                row.append("-" if change.low is None or change.high is None else f"{change.low:.2f} to {change.high:.2f}")
                row.append(change.verdict)
            rows.append(row)
        return Table(title, columns, rows, frozenset((1, 6)))


def compare(before: Record, after: Record) -> Comparison:
    """Raises ValueError, with a sentence, where the two have no run in common."""
    if before.kind != after.kind:
        raise ValueError(f"{before.name} is of fdpass-bench {before.kind}, {after.name} of fdpass-bench {after.kind}")
    first, second = (_keyed(record) for record in (before, after))
    common = [key for key in first if key in second]
    if not common:
        raise ValueError(f"{before.name} and {after.name} have no run in common: nothing to compare")
    found: list[_Raw] = []
    invalid = []
    for key in common:
        one, other = first[key], second[key]
        title = _title(one)
        for record, run in ((before, one), (after, other)):
            if run.get("valid") is False:
                invalid.append(f"{title} is INVALID in {record.name} and not compared: {run.get('invalid_reason')}")
        if one.get("valid") is False or other.get("valid") is False:
            continue
        found += _of_rows(title, one, other) if before.kind == "pass" else _of_runs(title, one, other)
    judged = sum(raw.error is not None or raw.chance is not None for raw in found)
    only = []
    for record, mine, others in ((before, first, second), (after, second, first)):
        if left := [_title(run) for key, run in mine.items() if key not in others]:
            only.append(f"not compared, as {after.name if record is before else before.name} has no such run: {_shortened(left)}")
    turned = _turned(before, after)
    return Comparison(before, after, [raw.judged(judged) for raw in found], only, invalid, _differences(before, after), turned)


def _turned(before: Record, after: Record) -> list[str]:
    """Rankings that both files could tell, and told differently."""
    held = [
        {(one.get("case"), one.get("level"), one.get("measure"), *_sides(one)): one.get("holds") for one in record.rankings}
        for record in (before, after)
    ]
    found = []
    for (case, level, measure, first, second), one in held[0].items():
        other = held[1].get((case, level, measure, first, second))
        if None not in (one, other) and one != other:
            ranking = f"{case}, {level}, {measure}: the published ranking of {first} and {second}"
            found.append(f"{ranking} {HOLDS[one]} in {before.name} and {HOLDS[other]} in {after.name}")
    return found


def _sides(ranking: Mapping[str, Any]) -> list[str]:
    return [str((ranking.get(side) or {}).get("strategy")) for side in ("first", "second")]


def _listed(changes: Sequence[Change]) -> str:
    said = "; ".join(change.sentence for change in changes[:_MOST_NAMED])
    return said if len(changes) <= _MOST_NAMED else f"{said}; and {len(changes) - _MOST_NAMED} more"


def _shortened(titles: Sequence[str]) -> str:
    return "; ".join(titles) if len(titles) <= 3 else f"{titles[0]}; {titles[1]} and {len(titles) - 2} more"


def _title(one: Mapping[str, Any]) -> str:
    return f"{one['what']}, {one['name']}" if "what" in one else title_of(one)


def _keyed(record: Record) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    """Runs by all that must be the same for their figures to be comparable."""
    if record.kind == "pass":
        # Our side stands in several rows where it is compared with several others.
        rows: dict[tuple[Any, ...], Mapping[str, Any]] = {}
        for row in record.rows:
            rows.setdefault((row["what"], row["name"], (row.get("fdpass") or {}).get("name")), row)
        return rows
    found = {}
    for run in record.runs:
        work = run.get("work") or record.work
        timed = "latency_ms" in run
        given = (
            [work.get(name) for name in ("arrivals", "clients", "distribution", "work", "think")]
            if timed
            else [asked(run), run.get("clients")]
        )
        rate = run.get("load") or (work.get("rate") if timed else None)
        cell = (run["scenario"], run.get("case"), run.get("level"))
        key = (
            *cell,
            run["strategy"],
            run.get("credits"),
            run.get("workers"),
            run.get("service_seconds"),
            run.get("requests_per_connection"),
        )
        found[*key, _rounded(rate), *given] = run
    return found


def _rounded(number: Any) -> Any:
    return float(f"{number:.3g}") if isinstance(number, int | float) else number


def _differences(before: Record, after: Record) -> list[str]:
    """What else is different, and may be the reason."""
    one, other = before.environment, after.environment
    found = [f"{name} {one.get(key)} and {other.get(key)}" for key, name in _ENVIRONMENT if one.get(key) != other.get(key)]
    if one.get("fdpass") != other.get("fdpass"):
        found.append(f"fdpass {one.get('fdpass')} and {other.get('fdpass')}")
    found += [
        f"{name} {value} and {(other.get('sysctls') or {}).get(name)}"
        for name, value in (one.get("sysctls") or {}).items()
        if value != (other.get("sysctls") or {}).get(name)
    ]
    # Of a sweep the middle of all its loops.
    alone = [statistics.median(record.answered_at_once or [0.0]) for record in (before, after)]
    if min(alone) > 0 and not 0.8 < alone[1] / alone[0] < 1.25:
        found.append(f"a server that answers at once took {figure(alone[0])} and {figure(alone[1])} ms: the machine was not equally quiet")
    return found


# -------------------------------------------------------------------------------- measures


@dataclass(frozen=True)
class _Raw:
    """A change before it is judged. error: one standard error of the logarithm of the ratio, with so many degrees of `freedom`.
    chance: of counts that differ as much, where nothing has changed."""

    run: str
    measure: str
    before: float | None
    after: float | None
    error: float | None = None
    freedom: int = 1
    chance: float | None = None
    more_is_worse: bool = True
    of: tuple[int, int] | None = None  # counts: of how many

    def judged(self, together: int) -> Change:
        level = 1 - (1 - CONFIDENCE) / max(1, together)  # Bonferroni
        before, after = (figure(one) if self.of is None else f"{one or 0:.0f}" for one in (self.before, self.after))
        if self.of is not None:
            before, after = f"{before} of {self.of[0]}", f"{after} of {self.of[1]}"
        ratio = self.after / self.before if self.before and self.after else None
        low = high = None
        verdict: Verdict = "not judged"
        if ratio is not None and self.error is not None:
            factor = math.exp(self.error * student_t(self.freedom))
            low, high = ratio / factor, ratio * factor
            sure = math.exp(self.error * student_t(self.freedom, level))
            more = ratio / sure > 1
            verdict = "no difference"
            if more or ratio * sure < 1:
                verdict = "worse" if more == self.more_is_worse else "better"
        elif self.chance is not None and self.of is not None:
            verdict = "no difference"
            if self.chance < 1 - level:
                more = (self.after or 0) * self.of[0] > (self.before or 0) * self.of[1]
                verdict = "worse" if more == self.more_is_worse else "better"
        return Change(self.run, self.measure, before, after, ratio, low, high, verdict, counts=self.of is not None)


def _of_runs(title: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> list[_Raw]:
    found = []
    latencies = [run.get("latency_ms") or {} for run in (one, other)]
    if all(latency.get("mean") for latency in latencies):
        error, freedom = _error_of_means(one, other)
        found.append(_Raw(title, "mean latency, ms", latencies[0]["mean"], latencies[1]["mean"], error, freedom))
        found += [
            _Raw(title, f"{name} latency, ms", latencies[0][key], latencies[1][key])
            for key, name in (("p99", "p99"), ("p99_9", "p99.9"))
            if latencies[0].get(key) and latencies[1].get(key)
        ]
    for key, total, measure in (
        ("delayed", "arrived_while_frozen", "delayed while a worker was frozen"),
        ("failed", "requests", "failed in the rolls"),
    ):
        many, of = [run.get(key) for run in (one, other)], [run.get(total) or 0 for run in (one, other)]
        if None not in many and any(many) and all(0 <= (count or 0) <= whole for count, whole in zip(many, of, strict=True)):
            clusters = [round((count or 0) / _TOGETHER) for count in (many[0], of[0], many[1], of[1])]
            found.append(_Raw(title, measure, many[0], many[1], chance=_fisher(*clusters), of=(of[0], of[1])))
    for key, measure in (("lost_unaccepted", "lost that no worker had accepted"), ("lost_accepted", "lost that a worker had accepted")):
        counts, totals = [run.get(key) or 0 for run in (one, other)], [sum((run.get("outcomes") or {}).values()) for run in (one, other)]
        if any(counts) and all(0 <= count <= total for count, total in zip(counts, totals, strict=True)):
            chance = _fisher(counts[0], totals[0], counts[1], totals[1])
            found.append(_Raw(title, measure, counts[0], counts[1], chance=chance, of=(totals[0], totals[1])))
    for key, measure in (
        ("max_over_mean", "largest share over the mean"),
        ("cpu_us_per_connection", "CPU us per connection"),
        ("switches_per_connection", "switches per connection"),
    ):
        if one.get(key) is not None and other.get(key) is not None:
            found.append(_Raw(title, measure, one[key], other[key]))
    return found


def _error_of_means(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float | None, int]:
    """From the intervals that both files carry, taken as independent: the same seed only makes it surer."""
    squares, fewest = 0.0, None
    for run in (one, other):
        found = run.get("ci") or {}
        interval, mean = found.get("mean_ms"), (run.get("latency_ms") or {}).get("mean")
        if not interval or len(interval) != 2 or not mean or not interval[0] < interval[1]:
            return None, 1
        freedom = max(1, int(found.get("batches") or _BATCHES) - 1)
        squares += ((interval[1] - interval[0]) / 2 / mean / student_t(freedom)) ** 2
        fewest = freedom if fewest is None else min(fewest, freedom)
    return math.sqrt(squares), fewest or 1


def _of_rows(title: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> list[_Raw]:
    ours = [row.get("fdpass") or {} for row in (one, other)]
    unit = unit_of(ours[0])
    if not all(ours) or unit_of(ours[1]) != unit:
        return []
    rate = unit == "claims_per_s"
    key = unit if rate else f"p50_{unit}"
    rounds = [side.get(f"{key}_of_rounds") or [] for side in ours]
    measure = "claims per second" if rate else f"fdpass, {unit.replace('_', ' ')}"
    if not all(value and value > 0 for side in rounds for value in side) or min(map(len, rounds)) < 1:
        return [_Raw(title, measure, ours[0].get(key), ours[1].get(key), more_is_worse=not rate)]
    means = [math.exp(statistics.fmean(map(math.log, side))) for side in rounds]
    error, freedom = _welch([list(map(math.log, side)) for side in rounds])
    return [_Raw(title, measure, means[0], means[1], error, freedom, more_is_worse=not rate)]


def _welch(samples: Sequence[Sequence[float]]) -> tuple[float | None, int]:
    """The standard error of the difference of two means, and its degrees of freedom, by Welch and Satterthwaite."""
    if min(map(len, samples)) < 2:
        return None, 1
    squares = [statistics.variance(sample) / len(sample) for sample in samples]
    total = sum(squares)
    if total <= 0:
        return None, 1
    below = sum(square**2 / (len(sample) - 1) for square, sample in zip(squares, samples, strict=True))
    return math.sqrt(total), max(1, int(total**2 / below))


def _fisher(lost: int, of: int, lost_then: int, of_then: int) -> float:
    """The chance that the same losses fall on the two runs as unevenly as this, or more: Fisher's exact test, both sides."""
    losses, whole = lost + lost_then, of + of_then

    def log_chance(first: int) -> float:
        return _log_choose(of, first) + _log_choose(of_then, losses - first) - _log_choose(whole, losses)

    seen = log_chance(lost)
    possible = (log_chance(first) for first in range(max(0, losses - of_then), min(losses, of) + 1))
    return min(1.0, math.fsum(math.exp(one) for one in possible if one <= seen + 1e-9))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
