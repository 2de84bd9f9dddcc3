"""From figures of single connections to numbers with their uncertainty. It knows nothing of sockets, strategies or queues."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

Verdict = Literal["first is lower", "second is lower", "no difference that this run can show"]

CONFIDENCE = 0.95
FEWEST_VALUES = 20  # with fewer there is no interval
MOST_BATCHES, FEWEST_BATCHES = 32, 4  # of one repeat
STRETCHES = 5  # that a repeat is cut into, to see how often one tail is below another
BATCH_SIZE = 50  # values that a batch begins with, at least, where there are enough

# Batches are joined while their correlation is above what independent ones show by chance once in five times: to join once too often widens
# the interval by little, to join too seldom makes it wrong.
_SIGNIFICANT = 0.84

# A batch: the sum above and the sum below the line of a ratio. For a mean the latter is the number of values.
_Batch = tuple[float, float]


@dataclass(frozen=True)
class Interval:
    """A mean (or a ratio of means) and its confidence interval; low and high are None where there are too few values to say.

    batches: the batch means that it rests on, of all repeats.
    """

    mean: float
    low: float | None
    high: float | None
    batches: int


def jain(counts: Sequence[float]) -> float:
    """Jain's fairness index: 1 when all are the same, also when nobody has anything; 1 / n when one has all.

    Raises ValueError for no counts, and for negative ones.
    """
    largest = _largest(counts)
    if largest == 0:
        return 1.0
    shares = [one / largest for one in counts]  # so that no square leaves the range of a float
    return min(1.0, math.fsum(shares) ** 2 / len(shares) / math.fsum(share * share for share in shares))


def max_over_mean(counts: Sequence[float]) -> float:
    """1 when all are the same, also when nobody has anything; n when one has all.

    Raises ValueError for no counts, and for negative ones.
    """
    largest = _largest(counts)
    return 1.0 if largest == 0 else len(counts) / math.fsum(one / largest for one in counts)


def _largest(counts: Sequence[float]) -> float:
    if not counts or min(counts) < 0:
        raise ValueError(f"these are not counts: {list(counts)}")
    return max(counts)


def warm_up(connections: int) -> int:
    """How many first connections of a repeat are left out, as they found queues that were just filling.

    A tenth up to 500, but never less than a twentieth; none where there are fewer than 100 connections.
    """
    return max(connections // 20, min(connections // 10, 500)) if connections >= 100 else 0


def interval(repeats: Sequence[Sequence[float | None]]) -> Interval:
    """The mean of all values, with its 95 % confidence interval by batch means.

    repeats: of each run its values in the order of arrival, None where a connection was lost; no batch spans two runs.

    A repeat begins with 32, 16, 8 or 4 batches of equal size: the most that leave each 50 values, else 4. While the correlation of
    neighbouring batches, pooled over the repeats, is significantly positive, neighbours are joined, down to 4 batches per repeat. What
    correlation is left then widens the interval as that of an autoregressive series would. Student's t has one degree of freedom less than
    there are batches.
    Fewer values than 20, or batches than 4, give no interval. Raises ValueError when there is no value at all.
    """
    found = _estimate([[(value, 1.0) for value in repeat if value is not None] for repeat in repeats])
    if found.error is None:
        return Interval(found.mean, None, None, found.batches)
    half = found.error * student_t(found.batches - 1)
    return Interval(found.mean, found.mean - half, found.mean + half, found.batches)


def ratio(first_repeats: Sequence[Sequence[float | None]], second_repeats: Sequence[Sequence[float | None]]) -> Interval:
    """The mean of the first over the mean of the second, with its 95 % confidence interval by the delta method, taken of the logarithm.

    Each repeat has the same arrivals and the same work at the same place in both. So what made both slow at once cancels. A place that
    is None in either was lost there, and is left out of both: the means are of the same work. The batches are those of interval(), of
    the residuals first - ratio * second.
    Raises ValueError for repeats of different lengths, when there is no value at all, or the mean of either is 0.
    """
    if [len(one) for one in first_repeats] != [len(one) for one in second_repeats]:
        raise ValueError("repeats of different lengths are not of the same work")
    pairs = [
        [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
        for one, other in zip(first_repeats, second_repeats, strict=True)
    ]
    found = _estimate(pairs)
    if found.mean <= 0:
        raise ValueError("there is no ratio of a mean of 0")
    if found.error is None:
        return Interval(found.mean, None, None, found.batches)
    factor = math.exp(found.error / found.mean * student_t(found.batches - 1))
    return Interval(found.mean, found.mean / factor, found.mean * factor, found.batches)


def verdict_of(of_ratio: Interval) -> Verdict:
    """What an interval of ratio() says; that there is no difference to be shown where 1 is within it, or where there is no interval."""
    if of_ratio.low is None or of_ratio.high is None or of_ratio.low <= 1 <= of_ratio.high:
        return "no difference that this run can show"
    return "first is lower" if of_ratio.high < 1 else "second is lower"


def lower_tail(first_repeats: Sequence[Sequence[float | None]], second_repeats: Sequence[Sequence[float | None]]) -> bool | None:
    """Whether the 99th percentile of the first is the lower one; None where that is not sure. Repeats as of ratio().

    A sign test: each repeat is cut into five stretches, and the same one must have the lower percentile in so many that chance would do it
    less than once in twenty: 9 of 10, all of 6. Of two repeats by themselves chance makes every second pair agree.
    """
    below = above = 0
    for one, other in zip(first_repeats, second_repeats, strict=True):
        pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
        for begin, end in pairwise(len(pairs) * i // STRETCHES for i in range(STRETCHES + 1)):
            if begin < end:
                mine, others = (sorted(side)[math.ceil(0.99 * (end - begin)) - 1] for side in zip(*pairs[begin:end], strict=True))
                below, above = below + (mine < others), above + (mine > others)
    count, most = below + above, max(below, above)
    by_chance = 2 * sum(math.comb(count, i) for i in range(most, count + 1)) / 2**count
    return below > above if by_chance < 1 - CONFIDENCE else None


# -------------------------------------------------------------------------------- batch means


@dataclass(frozen=True)
class _Estimate:
    """error: one standard error, None where there are too few values."""

    mean: float
    error: float | None
    batches: int


def _estimate(repeats: Sequence[Sequence[_Batch]]) -> _Estimate:
    """The sum of the first parts over that of the second parts."""
    repeats = [repeat for repeat in repeats if repeat]
    if not repeats:
        raise ValueError("there are no values")
    values = sum(map(len, repeats))
    above, below = _sum([_sum(repeat) for repeat in repeats])
    if below == 0:
        raise ValueError("there is no ratio to a mean of 0")
    mean = above / below
    each = MOST_BATCHES
    while each > FEWEST_BATCHES and values < each * BATCH_SIZE * len(repeats):
        each //= 2
    batches = [_batches(repeat, each) for repeat in repeats]
    correlated, correlation = _correlation(batches, mean)
    while correlated and each > FEWEST_BATCHES:
        each //= 2
        batches = [_batches(batch, each) for batch in batches]
        correlated, correlation = _correlation(batches, mean)
    number = sum(map(len, batches))
    if values < FEWEST_VALUES or number < FEWEST_BATCHES:
        return _Estimate(mean, None, number)
    squares = math.fsum((a - mean * b) ** 2 for batch in batches for a, b in batch)
    left = (1 + correlation) / (1 - correlation) if correlated else 1.0
    return _Estimate(mean, math.sqrt(left * number / (number - 1) * squares) / abs(below), number)


def _sum(parts: Sequence[_Batch]) -> _Batch:
    return math.fsum(a for a, _ in parts), math.fsum(b for _, b in parts)


def _batches(parts: Sequence[_Batch], number: int) -> list[_Batch]:
    """So many sums of neighbours, or as many as there are parts."""
    number = min(number, len(parts))
    edges = [len(parts) * i // number for i in range(number + 1)]
    return [_sum(parts[begin:end]) for begin, end in pairwise(edges)]


def _correlation(batches: Sequence[Sequence[_Batch]], mean: float) -> tuple[bool, float]:
    """Whether neighbouring batches are significantly correlated, and how much."""
    residuals = [[a - mean * b for a, b in batch] for batch in batches]
    squares = [one**2 for batch in residuals for one in batch]
    products = [one * following for batch in residuals for one, following in pairwise(batch)]
    if not products or not any(squares):
        return False, 0.0
    # Residuals sum to 0, which makes independent ones seem correlated by -1 / n.
    correlation = math.fsum(products) / len(products) / (math.fsum(squares) / len(squares)) + 1 / len(squares)
    return correlation * math.sqrt(len(products)) > _SIGNIFICANT, min(correlation, 0.8)


# -------------------------------------------------------------------------------- Student's t


@lru_cache
def student_t(freedom: int, confidence: float = CONFIDENCE) -> float:
    """How many standard errors to either side hold Student's t with this probability.

    Raises ValueError unless freedom is at least 1 and confidence is in (0, 1).
    """
    if freedom < 1 or not 0 < confidence < 1:
        raise ValueError(f"there is no Student's t for {freedom} degrees of freedom and a confidence of {confidence}")
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        if _student_within(freedom, angle) < confidence:
            low = angle
        else:
            high = angle
    return math.sqrt(freedom) * math.tan(low)


def _student_within(freedom: int, angle: float) -> float:
    """P(|T| < sqrt(freedom) * tan(angle)); Abramowitz and Stegun 26.7.3 and 26.7.4."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for i in range(2 + odd, freedom + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (i - 1) / i
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
