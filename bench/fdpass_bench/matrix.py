"""The scenario `matrix`: four cases of traffic by three loads, and what became of the rankings that were published of them.
Published: Hermes, Enhancing Layer-7 Cloud Load Balancers with Userspace-Directed I/O Event Notification (SIGCOMM 2025), table 3.
It plans and judges; it measures nothing and prints nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from fdpass_bench import estimate
from fdpass_bench.figures import Comparison, Figures, Study, paired
from fdpass_bench.steady import Work

Measure = Literal["mean", "p99"]
MEASURES: tuple[Measure, ...] = ("mean", "p99")

_FEWEST = 10  # connections of a run: fewer say nothing of how they are shared out


@dataclass(frozen=True)
class Case:
    """service: mean seconds of a request. requests: on each connection. think: mean seconds between two of them."""

    service: float
    requests: int = 1
    think: float = 0.0

    @property
    def kept(self) -> bool:
        return self.requests > 1


#: Cheap is as little as a generator beside the workers can time: its lateness must stay below a tenth of it.
CASES: Mapping[str, Case] = {
    "many-cheap": Case(0.004),
    "many-costly": Case(0.016),
    "kept-cheap": Case(0.004, 20, 0.02),
    "kept-costly": Case(0.016, 20, 0.02),
}
#: Once, twice and three times the same; not nearer to 1, where a queue takes longer to settle than a run of seconds has.
LEVELS: Mapping[str, float] = {"light": 0.25, "medium": 0.5, "heavy": 0.75}
_SECONDS: Mapping[str, tuple[float, float]] = {"light": (1.2, 1.2), "medium": (2.2, 2.2), "heavy": (3.5, 4.5)}  # of arrivals: many, kept

#: The contestants of the paper, and what comes nearest to them here.
THEIRS: Mapping[str, str] = {"exclusive": "shared:first", "reuseport": "reuseport", "load-aware": "shared:least-loaded"}

#: Milliseconds under heavy load: mean, p99. Load-aware is Hermes itself.
PUBLISHED: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "many-cheap": {"exclusive": (7.09, 27.5), "reuseport": (5.10, 26.9), "load-aware": (5.02, 26.6)},
    "many-costly": {"exclusive": (121, 1030), "reuseport": (213, 1820), "load-aware": (10.5, 377)},
    "kept-cheap": {"exclusive": (0.97, 67.6), "reuseport": (0.78, 35.8), "load-aware": (0.77, 28.3)},
    "kept-costly": {"exclusive": (95, 593), "reuseport": (182, 1240), "load-aware": (136, 623)},
}

#: Why a ranking need not hold here, by who is lower in the paper and who is not: where each connection is one request, and where
#: connections are kept.
_AHEAD = "here no worker takes a connection ahead of its work"
_IDLE = "here a worker takes one connection at a time, and only when it has nothing to do"
_WHY_MANY: Mapping[tuple[str, str], str] = {
    ("reuseport", "exclusive"): f"{_AHEAD}, so exclusive is one queue for all, which waits less than k queues do; what sharing a queue "
    "costs is microseconds, which tell where requests take microseconds",
    ("load-aware", "exclusive"): f"{_AHEAD}, so both are one queue, and there is nothing for load-awareness to mend",
}
_AWARE = f"{_IDLE}, so exclusive is aware of the load as well"
_WHY_KEPT: Mapping[tuple[str, str], str] = {
    ("reuseport", "exclusive"): f"{_IDLE}, so exclusive goes by who is idle and does not pile connections up",
    ("load-aware", "exclusive"): _AWARE,
    ("exclusive", "load-aware"): _AWARE,
}
#: Of what theory tells apart as the paper does, and of a hash.
_NOISE = "theory has one queue wait less than k: perhaps the machine was not quiet, or the run too short"
_CHANCE = "few connections are open at a time, and a hash may by chance share them out well"


def works(workers: int, connections: int | None, repeats: int, seed: int, time_limit: float) -> list[Work]:
    """One for each case and level. connections: of each run; None: those of its few seconds."""
    found = []
    for name, case in CASES.items():
        for level, load in LEVELS.items():
            rate = load * workers / (case.service * case.requests)
            found.append(
                Work(
                    workers=workers,
                    connections=connections or max(_FEWEST, round(rate * _SECONDS[level][case.kept])),
                    rate=rate,
                    service=case.service,
                    requests=case.requests,
                    think=case.think,
                    seed=seed,
                    repeats=repeats,
                    time_limit=time_limit,
                    scenario="matrix",
                    case=name,
                    level=level,
                )
            )
    return found


@dataclass(frozen=True)
class Ranking:
    """One pair of the paper's contestants in one cell, and whether the one that was lower there is lower here.

    here_ms: None where one of them is INVALID or was not measured. ci: 95 %, of the ratio of the means, first over second. holds: None
    where it cannot be told: without figures, with 1 in the interval, or where stretches of the repeats do not agree on a p99 (lower_tail).
    """

    case: str
    level: str
    measure: Measure
    first: str
    second: str
    published_ms: tuple[float, float]
    here_ms: tuple[float, float] | None
    ci: tuple[float, float] | None
    holds: bool | None
    why_not: str | None = None  # it cannot be told

    @property
    def lower(self) -> str:
        """Whom the paper has lower."""
        return self.first if self.published_ms[0] < self.published_ms[1] else self.second

    @property
    def higher(self) -> str:
        return self.second if self.lower == self.first else self.first

    @property
    def word(self) -> str:
        return "cannot be told" if self.holds is None else "holds" if self.holds else "does not hold"

    @property
    def reason(self) -> str | None:
        """What is known of why it is not as the paper has it."""
        if self.holds or self.here_ms is None:
            return None
        if CASES[self.case].kept:
            return _WHY_KEPT.get((self.lower, self.higher), _CHANCE)
        # That one queue waits less than k does not say why the two could not be told apart.
        split = "reuseport" in (self.lower, self.higher)
        return _NOISE if split and self.holds is None else _WHY_MANY.get((self.lower, self.higher), _NOISE)

    @property
    def sentence(self) -> str:
        theirs = f"{self.case}, {self.level}, {self.measure}: {self.lower} is lower than {self.higher}"
        theirs += f" ({' against '.join(f'{one:g}' for one in sorted(self.published_ms))} ms)"
        if self.here_ms is None:
            return f"{theirs}: {self.word}, {self.why_not}"
        here = f"{self.first} {self.here_ms[0]:.3g} ms, {self.second} {self.here_ms[1]:.3g} ms here"
        if self.measure == "p99":
            here += ", without an interval"
        elif self.ci is not None:
            here += f", ratio within {self.ci[0]:.2f} and {self.ci[1]:.2f}"
        return f"{theirs}: {self.word}, {here}" + (f"; {self.why_not}" if self.why_not else "")

    def as_json(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "level": self.level,
            "measure": self.measure,
            "first": {"published": self.first, "strategy": THEIRS[self.first]},
            "second": {"published": self.second, "strategy": THEIRS[self.second]},
            "published_ms": list(self.published_ms),
            "here_ms": None if self.here_ms is None else [round(one, 4) for one in self.here_ms],
            "ci": None if self.ci is None else [round(one, 4) for one in self.ci],
            "holds": self.holds,
            "sentence": self.sentence,
        }


def rankings(studies: Sequence[Study]) -> list[Ranking]:
    """By mean, then by p99, of the cells that figures were published of and that were measured; none where there is no matrix."""
    cells = {study.work.case: study for study in studies if study.work.scenario == "matrix" and study.work.level == "heavy"}
    return [
        _ranked(cells[case], case, measure, first, second)
        for measure in MEASURES
        for case in CASES
        if case in cells
        for first, second in combinations(THEIRS, 2)
    ]


def _ranked(study: Study, case: str, measure: Measure, first: str, second: str) -> Ranking:
    published = [PUBLISHED[case][one][MEASURES.index(measure)] for one in (first, second)]
    here = {one.name: one for one in study.figures}
    pair = [here.get(THEIRS[one]) for one in (first, second)]
    kept: dict[str, Any] = {"here_ms": None, "ci": None, "holds": None}
    named = list(zip((first, second), pair, strict=True))
    if missing := [name for name, one in named if one is None]:
        kept["why_not"] = f"without {' and '.join(missing)}"
    elif invalid := [name for name, one in named if one is not None and not one.valid]:
        kept["why_not"] = f"{' and '.join(invalid)} {'is' if len(invalid) == 1 else 'are'} INVALID"
    else:
        one, other = (figures for figures in pair if figures is not None)
        kept["here_ms"] = (one.latency[measure] * 1e3, other.latency[measure] * 1e3)
        below = published[0] < published[1]
        if measure == "mean":
            _by_mean(kept, next(c for c in study.comparisons if (c.first, c.second) == (one, other)), below)
        else:
            _by_p99(kept, one, other, below)
    return Ranking(case, str(study.work.level), measure, first, second, (published[0], published[1]), **kept)


def _by_mean(kept: dict[str, Any], comparison: Comparison, below: bool) -> None:
    """below: whether the first is lower in the paper."""
    ratio = comparison.ratio
    if ratio is None or ratio.low is None or ratio.high is None:
        kept["why_not"] = "too few requests for an interval"
        return
    kept["ci"] = (ratio.low, ratio.high)
    said = estimate.verdict_of(ratio)
    if said == "no difference that this run can show":
        kept["why_not"] = said
    else:
        kept["holds"] = (said == "first is lower") == below


def _by_p99(kept: dict[str, Any], one: Figures, other: Figures, below: bool) -> None:
    lower = estimate.lower_tail(*paired(one, other))
    # Of all together it must be as in most of the stretches.
    if lower is not None and lower == (kept["here_ms"][0] < kept["here_ms"][1]):
        kept["holds"] = lower == below
    else:
        kept["why_not"] = "the stretches of the repeats do not agree"


def verdict(found: Sequence[Ranking]) -> str:
    """A sentence for each measure, and how surely."""
    parts = []
    for measure in MEASURES:
        here = [one for one in found if one.measure == measure]
        if not here:
            continue
        counts = {holds: [one for one in here if one.holds is holds] for holds in (True, False, None)}
        text = f"Of Hermes' {len(here)} rankings by {measure} {_number(len(counts[True]), 'holds', 'hold')} here, "
        text += f"{_number(len(counts[False]), 'does', 'do')} not, {len(counts[None])} cannot be told"
        text += "" if measure == "mean" else " (where the same one is lower in nearly every fifth of a repeat)"
        failed = [f"{one.case} {one.lower} < {one.higher}" for one in counts[False]]
        parts.append(text + (f"; not here: {', '.join(failed)}" if failed else "") + ".")
    return " ".join(
        [*parts, "Each is judged by itself: of twenty pairs that differ in nothing one would be told by chance."] if parts else []
    )


def reasons(found: Sequence[Ranking]) -> list[str]:
    """Why rankings by mean do not hold, or differ too little to be told: a sentence for each reason."""
    named: dict[str, list[str]] = {}
    for one in found:
        if one.measure == "mean" and one.reason is not None and (one.holds is False or one.ci is not None):
            named.setdefault(one.reason, []).append(f"{one.case} {one.lower} < {one.higher}")
    return [f"{', '.join(which)}: {reason}" for reason, which in named.items()]


def _number(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"
