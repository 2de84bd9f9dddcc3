"""Means and ratios with their uncertainty: published tables, cases worked out by hand, and how often the intervals hold what is true."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from fdpass_bench import estimate, theory
from hypothesis import given
from hypothesis import strategies as st

VALUES = st.floats(0.001, 1000.0)


def low_and_high(of: estimate.Interval) -> tuple[float, float]:
    assert of.low is not None
    assert of.high is not None
    return of.low, of.high


def width(of: estimate.Interval) -> float:
    low, high = low_and_high(of)
    return high - low


def waits(gaps: Sequence[float], times: Sequence[float], warm_up: int) -> list[float]:
    """The responses of one worker: Lindley's recursion, from an empty queue."""
    found = []
    wait = 0.0
    for gap, time in zip(gaps, times, strict=True):
        wait = max(0.0, wait - gap)
        wait += time
        found.append(wait)
    return found[warm_up:]


# -------------------------------------------------------------------------------- Student's t


@pytest.mark.parametrize(
    ("freedom", "ninety", "ninety_five", "ninety_nine"),
    [
        (1, 6.314, 12.706, 63.657),
        (2, 2.920, 4.303, 9.925),
        (3, 2.353, 3.182, 5.841),
        (4, 2.132, 2.776, 4.604),
        (5, 2.015, 2.571, 4.032),
        (9, 1.833, 2.262, 3.250),
        (10, 1.812, 2.228, 3.169),
        (30, 1.697, 2.042, 2.750),
        (31, 1.696, 2.040, 2.744),
        (120, 1.658, 1.980, 2.617),
    ],
)
def test_students_t_is_that_of_the_tables(freedom: int, ninety: float, ninety_five: float, ninety_nine: float) -> None:
    found = [estimate.student_t(freedom, confidence) for confidence in (0.9, 0.95, 0.99)]
    assert found == pytest.approx([ninety, ninety_five, ninety_nine], abs=0.00051)


def test_students_t_becomes_normal_and_refuses_what_is_none() -> None:
    assert estimate.student_t(100_000) == pytest.approx(1.95996, abs=0.0001)
    for freedom, confidence in ((0, 0.95), (3, 0.0), (3, 1.0)):
        with pytest.raises(ValueError):
            estimate.student_t(freedom, confidence)


# -------------------------------------------------------------------------------- how even


def test_evenness_of_known_counts() -> None:
    assert estimate.jain([15, 15, 15, 15]) == estimate.max_over_mean([15, 15, 15, 15]) == 1
    assert estimate.jain([60, 0, 0, 0]) == 0.25
    assert estimate.max_over_mean([60, 0, 0, 0]) == 4
    assert estimate.jain([1, 2, 3, 4]) == pytest.approx(100 / 120)
    assert estimate.max_over_mean([1, 2, 3, 4]) == pytest.approx(1.6)
    assert estimate.jain([0, 0]) == estimate.max_over_mean([0, 0]) == 1
    for figure in (estimate.jain, estimate.max_over_mean):
        for counts in ([], [1, -1]):
            with pytest.raises(ValueError):
                figure(counts)


@given(st.lists(st.floats(0.0, 1e300), min_size=1, max_size=100))
def test_evenness_is_within_its_bounds(counts: list[float]) -> None:
    assert 1 / len(counts) * (1 - 1e-9) <= estimate.jain(counts) <= 1
    assert 1 - 1e-9 <= estimate.max_over_mean(counts) <= len(counts) * (1 + 1e-9)


# -------------------------------------------------------------------------------- warm-up


def test_the_warm_up_is_a_tenth_up_to_500_and_never_less_than_a_twentieth() -> None:
    assert [estimate.warm_up(count) for count in (0, 20, 99, 100, 1000, 5000, 8000, 10_000, 100_000)] == [
        *(0, 0, 0, 10, 100, 500, 500, 500, 5000),
    ]


@given(st.integers(0, 10**7))
def test_the_warm_up_leaves_most_and_never_shrinks(count: int) -> None:
    assert 0 <= estimate.warm_up(count) <= count // 10
    assert estimate.warm_up(count) <= estimate.warm_up(count + 1)


# -------------------------------------------------------------------------------- intervals


def test_an_interval_by_hand() -> None:
    # Four batches of five; their means are 1, 4, 2, 3: uncorrelated enough to stay apart.
    values = [mean + part for mean in (1.0, 4.0, 2.0, 3.0) for part in (-0.4, 0.4, 0.0, 0.25, -0.25)]
    found = estimate.interval([values])
    assert found.batches == 4
    assert found.mean == pytest.approx(2.5)
    half = 3.182446 * math.sqrt(5 / 3 / 4)
    assert low_and_high(found) == pytest.approx((2.5 - half, 2.5 + half), rel=1e-5)
    # The same means as a trend: residuals -1.5, -0.5, 0.5, 1.5 are correlated by 1/3, and by 1/4 more for being four that sum to 0.
    found = estimate.interval([sorted(values, key=round)])
    half *= math.sqrt((1 + 7 / 12) / (1 - 7 / 12))
    assert low_and_high(found) == pytest.approx((2.5 - half, 2.5 + half), rel=1e-5)


def test_too_few_values_have_a_mean_and_no_interval() -> None:
    for repeats in ([[3.0]], [[1.0, 5.0]], [[3.0] * 19], [[3.0], [], [3.0]]):
        found = estimate.interval(repeats)
        assert (found.mean, found.low, found.high) == (3.0, None, None)
    assert estimate.interval([[3.0] * 20]).low == 3.0
    # Twenty repeats of one value each are as good as any.
    assert width(estimate.interval([[float(i)] for i in range(20)])) > 0
    for nothing in ([], [[]], [[], [None, None]]):
        with pytest.raises(ValueError):
            estimate.interval(nothing)


def test_lost_values_are_left_out() -> None:
    chance = random.Random(2)
    values = [chance.random() for _ in range(500)]
    with_losses: list[float | None] = list(values)
    for place in (0, 17, 300, 500):
        with_losses.insert(place, None)
    assert estimate.interval([with_losses, [None]]) == estimate.interval([values])


def test_independent_values_keep_fine_batches_and_trends_lose_them() -> None:
    chance = random.Random(4)
    independent = [[chance.random() for _ in range(3200)] for _ in range(3)]
    assert estimate.interval(independent).batches == 3 * estimate.MOST_BATCHES
    slow = [[math.sin(i / 500) + value for i, value in enumerate(repeat)] for repeat in independent]
    assert estimate.interval(slow).batches == 3 * estimate.FEWEST_BATCHES


def test_a_batch_begins_with_enough_values() -> None:
    for count, batches in ((100, 4), (399, 4), (400, 8), (799, 8), (800, 16), (1600, 32), (100_000, 32)):
        alternating = [float(i % 2) for i in range(count)]
        assert estimate.interval([alternating]).batches == batches


def test_repeats_that_differ_widen_the_interval() -> None:
    chance = random.Random(5)
    repeats = [[chance.random() for _ in range(1000)] for _ in range(4)]
    moved = [[value + offset for value in repeat] for repeat, offset in zip(repeats, (0.0, 0.5, 1.0, 1.5), strict=True)]
    # The means of the repeats spread by half the offsets: an interval that knew only the values would be 0.02 wide.
    assert width(estimate.interval(repeats)) < 0.05
    assert width(estimate.interval(moved)) > 0.7


@given(st.lists(st.lists(VALUES, max_size=60), min_size=1, max_size=5), st.floats(0.01, 100.0))
def test_an_interval_holds_its_mean_and_scales(repeats: list[list[float]], scale: float) -> None:
    values = [value for repeat in repeats for value in repeat]
    if not values:
        return
    found = estimate.interval(repeats)
    assert found.mean == pytest.approx(math.fsum(values) / len(values))
    assert (found.low is None) == (found.high is None)
    assert found.low is not None or len(values) < 20
    if found.low is not None and found.high is not None:
        assert found.low <= found.mean <= found.high
        assert estimate.interval([[value * scale for value in repeat] for repeat in repeats]).mean == pytest.approx(found.mean * scale)


@pytest.mark.parametrize("servers", [1, 4])
def test_nearly_95_of_100_intervals_hold_the_true_mean(servers: int) -> None:
    # Three runs of 3000 connections at load 0.7. Waits are what is hard to estimate; services are independent.
    truth = theory.one_queue(servers, 0.7 * servers, 1.0).mean_wait
    held = 0
    for trial in range(200):
        seeds = range(3 * trial, 3 * trial + 3)
        runs = [theory.simulate("one queue", servers, 0.7 * servers, 1.0, seed=seed, connections=3000).waits for seed in seeds]
        low, high = low_and_high(estimate.interval(runs))
        held += low <= truth <= high
    assert 0.88 <= held / 200 <= 0.99


# -------------------------------------------------------------------------------- ratios


def test_a_ratio_by_hand() -> None:
    second = [1.0, 2.0, 3.0, 4.0] * 5
    found = estimate.ratio([[2 * value for value in second]], [second])
    assert (found.mean, found.low, found.high) == (2.0, 2.0, 2.0)
    # Twice the second but for a difference that alternates between batches of five: residuals of +-5 in each batch sum.
    noise = [1.0] * 5 + [-1.0] * 5 + [1.0] * 5 + [-1.0] * 5
    found = estimate.ratio([[2 * value + one for value, one in zip(second, noise, strict=True)]], [second])
    factor = math.exp(3.182446 * math.sqrt(4 / 3 * 4 * 25) / 50 / 2)
    assert found.mean == pytest.approx(2.0)
    assert low_and_high(found) == pytest.approx((2 / factor, 2 * factor), rel=1e-5)
    # However wide, it stays above 0, and is that of the second over the first turned round.
    few = [0.001, 9.0, 0.001, 0.001] * 5
    low, high = low_and_high(estimate.ratio([few], [few[1:] + few[:1]]))
    assert low > 0
    assert low_and_high(estimate.ratio([few[1:] + few[:1]], [few])) == pytest.approx((1 / high, 1 / low))


def test_what_either_lost_is_left_out_of_both() -> None:
    chance = random.Random(6)
    first = [chance.random() for _ in range(300)]
    second = [chance.random() for _ in range(300)]
    kept = [i for i in range(300) if i not in (5, 100, 250)]
    found = estimate.ratio(
        [[None if i in (5, 100) else value for i, value in enumerate(first)]],
        [[None if i in (100, 250) else value for i, value in enumerate(second)]],
    )
    assert found == estimate.ratio([[first[i] for i in kept]], [[second[i] for i in kept]])


def test_a_ratio_of_nothing_is_refused() -> None:
    for first, second in (
        ([[]], [[]]),
        ([[None, 1.0]], [[1.0, None]]),
        ([[1.0] * 30], [[0.0] * 30]),
        ([[0.0] * 30], [[1.0] * 30]),
        ([[1.0] * 30], [[1.0] * 29]),
        ([[1.0]], []),
    ):
        with pytest.raises(ValueError):
            estimate.ratio(first, second)


def test_too_few_values_have_a_ratio_and_no_interval() -> None:
    found = estimate.ratio([[2.0] * 19], [[1.0] * 19])
    assert (found.mean, found.low, found.high) == (2.0, None, None)
    assert estimate.verdict_of(found) == "no difference that this run can show"


def test_a_tail_is_lower_where_nearly_every_stretch_says_so() -> None:
    low, high = [1.0] * 20, [1.0] * 19 + [2.0]
    assert estimate.lower_tail([low * 5, low * 5], [high * 5, high * 5]) is True
    # Of ten stretches one may be the other way round, and not two; of five all are not enough.
    assert estimate.lower_tail([high + low * 4, low * 5], [low + high * 4, high * 5]) is True
    assert estimate.lower_tail([high + low * 4, high + low * 4], [low + high * 4, low + high * 4]) is None
    assert estimate.lower_tail([high * 5], [low * 5]) is None
    assert estimate.lower_tail([high * 5] * 2, [low * 5] * 2) is False
    # What is lost in one counts in neither; what is the same says nothing, and nor does nothing.
    lost = [None if value == 2 else value for value in high]
    assert estimate.lower_tail([low * 5] * 2, [lost * 5] * 2) is estimate.lower_tail([], []) is None


def test_two_tails_that_differ_in_nothing_are_seldom_told_apart() -> None:
    chance = random.Random(8)
    told = 0
    for _ in range(200):
        first, second = (
            [waits([chance.expovariate(0.75) for _ in range(600)], [chance.expovariate(1.0) for _ in range(600)], 60) for _ in range(2)]
            for _ in range(2)
        )
        told += estimate.lower_tail(first, second) is not None
    assert told / 200 < 0.1


def test_a_ratio_is_true_and_closer_than_of_runs_that_have_not_the_same_work() -> None:
    # The same arrivals and the same work, but the first worker is a tenth faster; then compared with the second's next repeat.
    warm_up = 300
    rate = 0.6
    truth = (1 / (1 / 0.9 - rate)) / (1 / (1 - rate))
    held = closer = 0
    for seed in range(100):
        chance = random.Random(seed)
        first, second = [], []
        for _ in range(3):
            gaps = [chance.expovariate(rate) for _ in range(2000)]
            times = [chance.expovariate(1.0) for _ in range(2000)]
            first.append(waits(gaps, [0.9 * time for time in times], warm_up))
            second.append(waits(gaps, times, warm_up))
        paired = estimate.ratio(first, second)
        unpaired = estimate.ratio(first, [*second[1:], second[0]])
        closer += width(paired) < 0.5 * width(unpaired)
        low, high = low_and_high(paired)
        held += low <= truth <= high
    assert held >= 88
    assert closer >= 95


def test_verdicts() -> None:
    for low, high, verdict in (
        (0.5, 0.9, "first is lower"),
        (1.1, 1.3, "second is lower"),
        (0.9, 1.1, "no difference that this run can show"),
        (1.0, 1.2, "no difference that this run can show"),
        (None, None, "no difference that this run can show"),
    ):
        assert estimate.verdict_of(estimate.Interval(1.0, low, high, 8)) == verdict


def test_two_runs_of_the_same_show_no_difference_most_of_the_time() -> None:
    shown = 0
    for seed in range(100):
        chance = random.Random(seed)
        first, second = ([[chance.expovariate(1.0) for _ in range(400)] for _ in range(2)] for _ in range(2))
        shown += estimate.verdict_of(estimate.ratio(first, second)) != "no difference that this run can show"
    assert 1 <= shown <= 12
