"""What a descriptor costs: the comparisons of `pass`, both sides of each in turns, and what their rounds say. It prints nothing.
A comparison that could not be measured says why; it is never repaired or left out."""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from fdpass_bench import estimate
from fdpass_bench.contenders import CHANNEL, FDPASS, MOST_IN_A_MESSAGE, STANDARD, C, Stage, Unmeasured

DESCRIPTORS = (1, 8, 64, 253, 1000)
OUTSTANDING = (1, 10, 100, 1_000, 10_000)
RECEIVERS = (1, 2, 4, 8)
#: Sockets among a process's arguments: the standard library's fork server takes few more.
ARGUMENTS = 180
FEWEST_FOR_P99 = 100  # values: of fewer, the 99th percentile is the largest

#: Operations in a round where --count says nothing, so that all of it takes less than a minute.
_LOADS = {"idle": 200, "busy": 17}
_ASKED = {"idle": 50, "busy": 17}
_STARTS = {"fork": 20, "forkserver": 12, "spawn": 8}
_MESSAGES = {1: 400, 8: 250, 64: 80, 253: 25, 1000: 8}
_CLAIMS = 50
_TOGETHER = 50
_ROUND, _LEAST = 0.4, 0.05  # seconds that one takes with these, and with next to none, about
_USUAL = {"carriers": 50, "starts": 12, "descriptors": 80, "outstanding": _CLAIMS, "receivers": _TOGETHER}
_BATCH = 1000  # tickets that are unclaimed at most while many are made and claimed


@dataclass(frozen=True)
class Plan:
    """methods: of start, none means all. count: operations of each side in a round, None for the default of each comparison. repeats:
    rounds. tickets: made and claimed to see what grows, 0 to leave that out."""

    what: Sequence[str]
    methods: Sequence[str]
    senders: Sequence[str]
    count: int | None
    repeats: int
    tickets: int

    @property
    def ahead(self) -> list[tuple[int, float]]:
        """Of each comparison, what its progress is counted against, and the seconds that it takes, about."""
        rounds = {what: _ROUND if self.count is None else _LEAST + _ROUND * self.count / usual for what, usual in _USUAL.items()}
        return [(self.repeats, self.repeats * rounds[one.what]) for one in comparisons(self)]


# -------------------------------------------------------------------------------- what is found


@dataclass(frozen=True)
class Side:
    """One contender's seconds, round by round."""

    name: str
    rounds: Sequence[Sequence[float]]

    @property
    def values(self) -> list[float]:
        return sorted(value for one in self.rounds for value in one)

    @property
    def p50(self) -> float:
        return statistics.median(self.values)

    @property
    def p99(self) -> float | None:
        """By nearest rank; None for fewer than 100 values."""
        values = self.values
        return values[-(-99 * len(values) // 100) - 1] if len(values) >= FEWEST_FOR_P99 else None

    @property
    def medians(self) -> list[float]:
        return [statistics.median(one) for one in self.rounds]


@dataclass(frozen=True)
class Row:
    """One comparison. condition: what it was measured under, for the JSON. unit: "us", "us_per_descriptor", "us_per_socket" or
    "claims_per_s", which the seconds are shown in. reason: why there are no figures; failed: and it should have been measured."""

    what: str
    name: str
    condition: Mapping[str, Any]
    unit: str
    ours: Side | None = None
    other: Side | None = None
    reason: str | None = None
    failed: bool = False

    @property
    def times_faster(self) -> estimate.Interval | None:
        """None where there is nothing to compare, or where what ours costs is lost in the noise."""
        return None if self.ours is None or self.other is None else times_faster(self.ours.medians, self.other.medians)

    @property
    def verdict(self) -> str:
        """In plain words, without names: "3.2 times faster"."""
        ratio = self.times_faster
        if self.ours is None:
            return "not measured" if self.failed else "skipped"
        if self.other is None:
            return "the base line"
        if ratio is None:
            return "no difference that this run can show"
        verdict = estimate.verdict_of(ratio)
        return verdict if ratio.low is not None and verdict == "no difference that this run can show" else _times(ratio.mean)

    @property
    def interval(self) -> str:
        """Of what the verdict says: "3.1 to 3.4", "one round" for which there is none, "" where there is nothing to compare."""
        ratio = self.times_faster
        return (
            "" if ratio is None else "one round" if ratio.low is None or ratio.high is None else _range(ratio.mean, ratio.low, ratio.high)
        )

    @property
    def sentence(self) -> str:
        if self.ours is None:
            return f"{self.verdict}: {self.reason}"
        if self.other is None:
            return self.verdict
        within = self.interval and f" ({'' if self.interval == 'one round' else '95 % '}{self.interval})"
        return f"{self.ours.name}: {self.verdict}{within}, against {self.other.name}"


def _times(ratio: float) -> str:
    times, word = (ratio, "faster") if ratio >= 1 else (1 / ratio, "slower")
    return f"{times:.0f} times {word}" if times >= 20 else f"{times:.1f} times {word}" if times >= 2 else f"{times:.2f} times {word}"


def _range(mean: float, low: float, high: float) -> str:
    low, high = (low, high) if mean >= 1 else (1 / high, 1 / low)
    digits = 0 if high >= 20 else 1 if high >= 2 else 2
    return f"{low:.{digits}f} to {high:.{digits}f}"


def times_faster(ours: Sequence[float], theirs: Sequence[float]) -> estimate.Interval | None:
    """The mean of theirs over the mean of ours, with its 95 % interval by Fieller's theorem; each place is one round of both.

    A single round gives no interval. None where ours is not told from 0, so that no ratio to it is known.
    """
    count, mine, other = len(ours), statistics.fmean(ours), statistics.fmean(theirs)
    if count < 2:
        return estimate.Interval(other / mine, None, None, count) if mine > 0 and other > 0 else None
    t = estimate.student_t(count - 1)

    def spread(first: Sequence[float], first_mean: float, second: Sequence[float], second_mean: float) -> float:
        products = sum((a - first_mean) * (b - second_mean) for a, b in zip(first, second, strict=True))
        return t * t * products / (count - 1) / count

    left = mine * mine - spread(ours, mine, ours, mine)
    if mine <= 0 or left <= 0:
        return None
    middle = mine * other - spread(ours, mine, theirs, other)
    root = max(0.0, middle * middle - left * (other * other - spread(theirs, other, theirs, other))) ** 0.5
    low, high = (middle - root) / left, (middle + root) / left
    # A price below 0 is the noise's: there is no telling how many times it is less.
    return estimate.Interval(other / mine, low, high, count) if low > 0 else None


@dataclass(frozen=True)
class Finding:
    """Something that is no comparison. figures: with units in their names."""

    name: str
    sentence: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    failed: bool = False


@dataclass
class Found:
    """What was measured so far. over: how many comparisons. load_before: the load average when it began."""

    plan: Plan
    over: int = 0
    load_before: float = field(default_factory=lambda: os.getloadavg()[0])
    rows: list[Row] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether all was measured that was asked for and that the limits of this machine allow."""
        return not (any(row.failed for row in self.rows) or any(finding.failed for finding in self.findings))


# -------------------------------------------------------------------------------- comparisons

#: Does so many operations and returns the seconds of each.
Contender = Callable[[int], list[float]]
Follow = Callable[[int], None]


@dataclass(frozen=True)
class Comparison:
    """Sides that take turns, and the rows that come of them: (name, ours, what it is compared with or None), by keys of `sides`.

    A side that cannot be had (Unmeasured while it is made) ends its own rows alone. scale: what its seconds are divided by. rounds: for
    each of the plan's repeats. skipped: why no row of it is measured.
    """

    what: str
    title: str
    condition: Mapping[str, Any]
    count: int
    sides: Mapping[str, Callable[[Stage], Contender]]
    rows: Sequence[tuple[str, str, str | None]]
    unit: str = "us"
    scale: int = 1
    rounds: int = 1
    skipped: str | None = None

    def measure(self, stage: Stage, plan: Plan, follow: Follow) -> list[Row | Finding]:
        if self.skipped:
            return [Row(self.what, name, self.condition, self.unit, reason=self.skipped) for name, _, _ in self.rows]
        ready: dict[str, Contender] = {}
        missing: dict[str, str] = {}
        rounds: dict[str, list[list[float]]] = {key: [] for key in self.sides}
        try:
            for key, make in self.sides.items():
                try:
                    ready[key] = make(stage)
                except Unmeasured as error:
                    missing[key] = str(error)
            for contender in ready.values():
                contender(min(self.count, 3))  # from now on connections, caches and a fork server are there
            for repeat in range(plan.repeats * self.rounds):
                # ABBA: a drift of the machine falls on all alike.
                for key in list(ready)[:: 1 if repeat % 2 == 0 else -1]:
                    rounds[key].append([seconds / self.scale for seconds in ready[key](self.count)])
                follow(repeat // self.rounds)
        except (Unmeasured, OSError) as error:
            stage.clear()
            missing = dict.fromkeys(self.sides, str(error))
        found: list[Row | Finding] = []
        for name, mine, others in self.rows:
            reason = next((missing[key] for key in (mine, others) if key in missing), None)
            ours, other = (None if reason or key is None else Side(key, rounds[key]) for key in (mine, others))
            found.append(Row(self.what, name, self.condition, self.unit, ours, other, reason, reason is not None))
        return found


@dataclass(frozen=True)
class Endurance:
    """Tickets without end: many made and claimed, and as many as there may be that nobody claims."""

    what: str = "outstanding"
    title: str = "many tickets"

    def measure(self, stage: Stage, plan: Plan, follow: Follow) -> list[Row | Finding]:
        found: list[Row | Finding] = []
        for name, measure in (("made and claimed", _made_and_claimed), ("made and never claimed", _never_claimed)):
            try:
                found.append(Finding(name, *measure(stage, plan, follow)))
            except (Unmeasured, OSError) as error:
                stage.clear()
                found.append(Finding(name, f"not measured: {error}", failed=True))
        return found


def _made_and_claimed(stage: Stage, plan: Plan, follow: Follow) -> tuple[str, dict[str, Any]]:
    pair = stage.pair(True)
    both = (pair.sender, pair.receiver)
    pair.sender.do("hold", 0, operations=OUTSTANDING[-1])
    # What is made once, and the allocator's first reserves, are no growth.
    warm_up = max(1, plan.tickets // 10)
    before: list[tuple[int, int]] = []
    done = 0
    while done < plan.tickets + warm_up:
        number = min(_BATCH, (warm_up if done < warm_up else plan.tickets + warm_up) - done)
        pair.ahead(False, number)
        done += number
        if done == warm_up:
            before = [one.usage() for one in both]
        follow(done * plan.repeats // (plan.tickets + warm_up))
    after = [one.usage() for one in both]
    words = []
    figures: dict[str, Any] = {"tickets": plan.tickets}
    for name, (memory, fds), (memory_after, fds_after) in zip(("sender", "receiver"), before, after, strict=True):
        words.append(f"{name} {fds} to {fds_after} descriptors and {memory / 2**20:.1f} to {memory_after / 2**20:.1f} MiB resident")
        figures |= {f"{name}_descriptors": [fds, fds_after], f"{name}_resident_bytes": [memory, memory_after]}
    return f"{plan.tickets} tickets made and claimed: {', '.join(words)}", figures


def _never_claimed(stage: Stage, plan: Plan, follow: Follow) -> tuple[str, dict[str, Any], bool]:
    sender = stage.peer("the sender", True)
    made, error, folder = sender.do("fill", operations=100)
    stage.clear()
    left = Path(folder).exists()
    sentence = f"{made} tickets made and never claimed, then: {error}. After the exit its store's folder was {'left' if left else 'gone'}"
    return sentence, {"tickets": made, "error": error, "folder_left": left}, left


def comparisons(plan: Plan) -> list[Comparison | Endurance]:
    """All that the plan asks for, in the order in which it is measured."""
    parts = {"carriers": _carriers, "starts": _starts, "descriptors": _descriptors, "outstanding": _outstanding, "receivers": _receivers}
    return [one for what in plan.what for one in parts[what](plan)]


def _carriers(plan: Plan) -> Iterator[Comparison]:
    for sender in plan.senders:
        busy, asked_for = sender == "busy", {"sender": sender, "pickled": "when asked for"}

        def ahead(registered: bool, busy: bool = busy) -> Callable[[Stage], Contender]:
            return lambda stage: partial(stage.pair(registered).ahead, busy)

        def asked(registered: bool, carrier: str, busy: bool = busy) -> Callable[[Stage], Contender]:
            return lambda stage: partial(stage.pair(registered).asked, carrier, busy)

        yield Comparison(
            "carriers", f"loading, sender {sender}", {"sender": sender, "pickled": "ahead"}, plan.count or _LOADS[sender],
            {FDPASS: ahead(True), STANDARD: ahead(False)},
            [(f"loading a pickle, sender {sender}", FDPASS, STANDARD)],
        )  # fmt: skip
        yield Comparison(
            "carriers", f"Connection and Channel, sender {sender}", asked_for, plan.count or _ASKED[sender],
            {FDPASS: asked(True, "connection"), CHANNEL: asked(True, "channel"), STANDARD: asked(False, "connection")},
            [
                (f"Connection.send, sender {sender}", FDPASS, STANDARD),
                (f"Channel.send, sender {sender}", CHANNEL, STANDARD),
            ],
        )  # fmt: skip
        yield Comparison(
            "carriers", f"Queue, sender {sender}", asked_for, plan.count or _ASKED[sender],
            {FDPASS: asked(True, "queue"), STANDARD: asked(False, "queue")},
            [(f"Queue.put, sender {sender}", FDPASS, STANDARD)],
        )  # fmt: skip
    yield _messages("carriers", 1, plan, channel=False)


def _descriptors(plan: Plan) -> Iterator[Comparison]:
    for count in DESCRIPTORS:
        yield _messages("descriptors", count, plan, channel=True)


def _messages(what: str, count: int, plan: Plan, channel: bool) -> Comparison:
    """One message with `count` descriptors, or as many messages as they take, by one thread that sends, receives and closes."""

    def side(key: str) -> Callable[[Stage], Contender]:
        def make(stage: Stage) -> Contender:
            program = stage.program() if key == C else None
            peer = stage.alone(False)
            return lambda operations: list(peer.do("messages", key, count, operations, program, operations=operations))

        return make

    messages = -(-count // MOST_IN_A_MESSAGE)
    named = "send_fds, recv_fds, close" if what == "carriers" else f"{count}" + (f" (in {messages} messages)" if messages > 1 else "")
    rows: list[tuple[str, str, str | None]] = [(named, FDPASS, STANDARD), (named, FDPASS, C)]
    keys = [FDPASS, STANDARD, C]
    if channel:
        keys.append(CHANNEL)
        rows.append((f"{named}, Channel", CHANNEL, C))
    return Comparison(
        what, f"{count} descriptors", {"descriptors": count}, plan.count or _MESSAGES[count], {key: side(key) for key in keys}, rows,
        unit="us_per_descriptor", scale=count,
    )  # fmt: skip


def _starts(plan: Plan) -> Iterator[Comparison]:
    for method in plan.methods or multiprocessing.get_all_start_methods():

        def side(registered: bool, method: str = method) -> Callable[[Stage], Contender]:
            def make(stage: Stage) -> Contender:
                peer = stage.alone(registered)
                return lambda pairs: list(peer.do("starts", method, ARGUMENTS, pairs, operations=pairs * 10))

            return make

        yield Comparison(
            "starts", method, {"start_method": method, "sockets": ARGUMENTS}, plan.count or _STARTS[method],
            {FDPASS: side(True), STANDARD: side(False)}, [(f"argument of a process, {method}", FDPASS, STANDARD)], unit="us_per_socket",
        )  # fmt: skip


def _outstanding(plan: Plan) -> Iterator[Comparison | Endurance]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    infinite = resource.RLIM_INFINITY
    limit = soft if soft == infinite or soft >= 65535 else 65535 if hard == infinite else min(65535, hard)
    bound = OUTSTANDING[-1] if limit == infinite else limit * 3 // 4
    allowed = [number for number in OUTSTANDING if number <= bound]

    def side(number: int) -> Callable[[Stage], Contender]:
        # One pair for all: which processors two processes share makes more of a difference than how many tickets there are.
        return lambda stage: partial(stage.pair(True).claims, number)

    rows = [(f"claim, {number} unclaimed", f"{number} unclaimed", "1 unclaimed" if number > 1 else None) for number in OUTSTANDING]
    sides = {f"{number} unclaimed": side(number) for number in allowed}
    count = plan.count or _CLAIMS
    yield Comparison("outstanding", "claims", {}, count, sides, rows[: len(allowed)], rounds=4)
    if rows[len(allowed) :]:
        forbidden = f"the limit of {limit} open files allows {bound} unclaimed tickets"
        yield Comparison("outstanding", "claims beyond the limit", {}, count, {}, rows[len(allowed) :], skipped=forbidden)
    if plan.tickets:
        yield Endurance()


def _receivers(plan: Plan) -> Iterator[Comparison]:
    for receivers in RECEIVERS:

        def side(registered: bool, receivers: int = receivers) -> Callable[[Stage], Contender]:
            return lambda stage: partial(stage.pair(registered, RECEIVERS[-1]).together, receivers)

        yield Comparison(
            "receivers", f"{receivers} receivers", {"receivers": receivers}, plan.count or _TOGETHER,
            {FDPASS: side(True), STANDARD: side(False)}, [(f"claims of {receivers} at once", FDPASS, STANDARD)], unit="claims_per_s",
        )  # fmt: skip


def measure(found: Found, begin: Callable[[str], Follow], over: Callable[[str], None]) -> None:
    """Measures into `found`, so that what was measured before an interrupt is there. begin, over: a comparison's title, what came of it."""
    for what, parts in groupby(comparisons(found.plan), attrgetter("what")):
        with Stage() as stage:
            for one in parts:
                results = one.measure(stage, found.plan, begin(f"{what}, {one.title}"))
                found.rows += [result for result in results if isinstance(result, Row)]
                found.findings += [result for result in results if isinstance(result, Finding)]
                found.over += 1
                problem = next((result.reason for result in results if isinstance(result, Row) and result.reason), None)
                over(f"{what}, {one.title}: {problem or 'measured'}")
