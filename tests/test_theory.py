"""Queueing theory against published figures, against exact results of other make, and against itself."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable

import pytest
from fdpass_bench import theory
from hypothesis import example, given, settings
from hypothesis import strategies as st

LOADS = st.floats(0.01, 0.97)
SERVERS = st.integers(1, 64)


def exponential_times(mean: float, count: int = 20_000) -> list[float]:
    """As even as a sample can be, in a random order."""
    times = [-mean * math.log(1 - (i + 0.5) / count) for i in range(count)]
    random.Random(1).shuffle(times)
    return times


def fixed_point(function: Callable[[float], float]) -> float:
    x = 0.5
    for _ in range(1000):
        x = function(x)
    return x


# -------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize(
    ("servers", "load", "waiting", "one_mean", "one_p99", "split_mean", "split_p99"),
    [
        (4, 0.7, 0.429, 1.36, 5.49, 3.33, 15.35),
        (4, 0.8, 0.596, 1.75, 6.89, 5.00, 23.03),
        (8, 0.8, 0.458, 1.29, 5.15, 5.00, 23.03),
        (12, 0.8, 0.369, 1.15, 4.84, 5.00, 23.03),
    ],
)
def test_the_published_figures_come_out(
    servers: int, load: float, waiting: float, one_mean: float, one_p99: float, split_mean: float, split_p99: float
) -> None:
    assert theory.erlang_c(servers, load) == pytest.approx(waiting, abs=0.0005)
    one = theory.one_queue(servers, servers * load, 1.0)
    assert (one.mean, one.p99) == pytest.approx((one_mean, one_p99), abs=0.0051)
    split = theory.split_queue(servers, servers * load, 1.0)
    assert (split.mean, split.p99) == pytest.approx((split_mean, split_p99), abs=0.0051)
    assert one.how == split.how == "closed form"
    assert one.standard_error == 0


def test_erlang_c_of_many_servers_is_the_textbook_sum() -> None:
    servers, load = 700, 0.98
    work = servers * load
    logs = [n * math.log(work) - math.lgamma(n + 1) for n in range(servers)]
    last = servers * math.log(work) - math.lgamma(servers + 1) - math.log(1 - load)
    assert theory.erlang_c(servers, load) == pytest.approx(1 / (1 + math.fsum(math.exp(one - last) for one in logs)), rel=1e-9)


@pytest.mark.parametrize(("servers", "load"), [(0, 0.5), (-1, 0.5), (4, 1.0), (4, 1.5), (4, -0.1), (4, math.nan), (4, math.inf)])
def test_what_has_no_steady_state_is_refused(servers: int, load: float) -> None:
    with pytest.raises(ValueError):
        theory.erlang_c(servers, load)
    for prediction in (theory.one_queue, theory.split_queue):
        with pytest.raises(ValueError):
            prediction(servers, servers * load, 1.0)
    for discipline in theory.DISCIPLINES:
        with pytest.raises(ValueError):
            theory.predict(discipline, servers, servers * load, [1.0, 1.0], [1.0])
        with pytest.raises(ValueError):
            theory.simulate(discipline, servers, servers * load, 1.0, connections=100)


def test_where_wait_and_service_have_the_same_rate_there_is_no_gap() -> None:
    # Four workers at load 0.75: the closed form of the sum is 0 / 0 there.
    at = theory.one_queue(4, 3.0, 1.0)
    around = [theory.one_queue(4, rate, 1.0) for rate in (3 - 1e-5, 3 + 1e-5)]
    for quantile in ("p50", "p90", "p99", "p99_9"):
        low, high = (getattr(one, quantile) for one in around)
        assert low < getattr(at, quantile) < high


def test_a_fixed_time_is_not_spread() -> None:
    idle = theory.one_queue(8, 0.001, 1.0, cv2=0.0)
    assert (idle.p50, idle.p99, idle.p99_9) == pytest.approx((1.0, 1.0, 1.0))
    assert idle.how == "approximation"


def test_the_mean_of_split_queues_is_that_of_pollaczek_and_khinchine() -> None:
    for cv2 in (0.0, 0.5, 1.0, 4.0):
        assert theory.split_queue(4, 3.2, 1.0, cv2).mean_wait == pytest.approx(0.8 * (1 + cv2) / 2 / 0.2)


@given(servers=SERVERS, low=LOADS, high=LOADS)
def test_erlang_c_is_a_probability_and_grows_with_the_load(servers: int, low: float, high: float) -> None:
    low, high = sorted((low, high))
    assert 0 <= theory.erlang_c(servers, low) <= theory.erlang_c(servers, high) <= 1
    assert theory.erlang_c(1, low) == pytest.approx(low)
    assert theory.erlang_c(servers + 1, low) <= theory.erlang_c(servers, low)


@settings(max_examples=50)
@given(servers=SERVERS, load=LOADS, mean=st.floats(1e-5, 10.0), cv2=st.floats(0.0, 20.0))
@example(servers=1, load=0.5, mean=0.004, cv2=1.0)
def test_one_queue_is_never_worse_than_split_queues(servers: int, load: float, mean: float, cv2: float) -> None:
    one = theory.one_queue(servers, servers * load / mean, mean, cv2)
    split = theory.split_queue(servers, servers * load / mean, mean, cv2)
    assert one.mean <= split.mean * (1 + 1e-9)
    assert one.p99_9 <= split.p99_9 * (1 + 1e-6)
    for prediction in (one, split):
        assert 0 < prediction.p50 <= prediction.p90 <= prediction.p99 <= prediction.p99_9
        assert prediction.mean == pytest.approx(prediction.mean_wait + mean)


# -------------------------------------------------------------------------------- predictions from measured times


@pytest.mark.parametrize("load", [0.3, 0.8])
def test_predictions_from_exponential_times_are_the_closed_forms(load: float) -> None:
    times = exponential_times(0.004)
    rate = 4 * load / 0.004
    for discipline, closed in (("one queue", theory.one_queue), ("split", theory.split_queue)):
        found, exact = theory.predict(discipline, 4, rate, times, times), closed(4, rate, 0.004)
        assert found.mean == pytest.approx(exact.mean, rel=0.003)
        for quantile in ("p50", "p90", "p99", "p99_9"):
            assert getattr(found, quantile) == pytest.approx(getattr(exact, quantile), rel=0.006)
    assert theory.predict("split", 4, rate, times, times).how == "closed form"
    assert theory.predict("one queue", 4, rate, times, times).how == "approximation"


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_the_wait_for_fixed_times_is_that_of_erlang(load: float) -> None:
    def within(t: float) -> float:
        terms = ((-load * (t - j)) ** j / math.factorial(j) * math.exp(load * (t - j)) for j in range(int(t) + 1))
        return (1 - load) * math.fsum(terms)

    found = theory.predict("split", 3, 3 * load, [1.0] * 50, [0.0])
    assert found.mean == found.mean_wait == pytest.approx(load / 2 / (1 - load))
    assert (within(found.p90), within(found.p99), within(found.p99_9)) == pytest.approx((0.9, 0.99, 0.999), abs=0.0005)


def test_the_wait_for_hyper_exponential_times_is_that_of_the_closed_form() -> None:
    rate, load = 0.6, 0.6
    phases = [(0.9, 0.5), (0.1, 5.5)]  # share and mean
    times = [-mean * math.log(1 - (i + 0.5) / 200_000 / share) for share, mean in phases for i in range(round(200_000 * share))]
    (_, first), (_, second) = ((share, 1 / mean) for share, mean in phases)
    half = (first + second - rate) / 2
    root = math.sqrt(half**2 - (first * second - rate * (0.9 * second + 0.1 * first)))
    slow, fast = half - root, half + root

    def tail(t: float) -> float:
        parts = (sign * (first - one) * (second - one) / one * math.exp(-one * t) for sign, one in ((1, slow), (-1, fast)))
        return (1 - load) / (fast - slow) * sum(parts)

    mean = 0.9 * 0.5 + 0.1 * 5.5
    assert (mean, tail(0)) == pytest.approx((1.0, load))  # the closed form is one
    found = theory.predict("split", 5, 5 * rate, times, [0.0])
    assert found.how == "closed form"
    assert (tail(found.p50), tail(found.p90), tail(found.p99), tail(found.p99_9)) == pytest.approx((0.5, 0.1, 0.01, 0.001), rel=0.02)


def test_one_worker_is_the_same_under_every_discipline() -> None:
    times = exponential_times(1.0, 500)
    assert len({theory.predict(discipline, 1, 0.7, times, times) for discipline in theory.DISCIPLINES}) == 1


@settings(max_examples=25)
@given(
    discipline=st.sampled_from(["one queue", "split"]),
    servers=st.integers(1, 16),
    load=LOADS,
    occupied=st.lists(st.floats(0.8, 1.3), min_size=1, max_size=50),
    other=st.lists(st.floats(0.0, 50.0), min_size=1, max_size=300),
)
def test_the_response_is_the_wait_and_what_is_not_waiting(
    discipline: str, servers: int, load: float, occupied: list[float], other: list[float]
) -> None:
    times = [time * scale for time in occupied for scale in (0.1, 0.3, 0.6, 1.2, 3.0)]  # nearly exponential
    found = theory.predict(discipline, servers, servers * load * len(times) / sum(times), times, other)
    assert found.how != "simulated"
    assert found.mean == pytest.approx(found.mean_wait + sum(other) / len(other))
    assert found.mean_wait > 0
    assert found.p50 <= found.p90 <= found.p99 <= found.p99_9
    # More than half of them take at least as long as the median of what is not waiting.
    assert len(other) > 100 or found.p50 >= sorted(other)[(len(other) - 1) // 2] * (1 - 1e-6)


def test_nothing_measured_and_unknown_names_are_refused() -> None:
    for mean, cv2 in ((0.0, 1.0), (1.0, -0.1), (1.0, math.nan)):
        with pytest.raises(ValueError):
            theory.one_queue(2, 1.0, mean, cv2)
    for discipline, servers, occupied, other, arrivals in [
        ("random", 2, [1.0], [1.0], "poisson"),
        ("split", 2, [1.0], [1.0], "burst"),
        ("split", 2, [], [1.0], "poisson"),
        ("split", 2, [1.0], [], "poisson"),
        ("split", 2, [0.0], [1.0], "poisson"),
    ]:
        with pytest.raises(ValueError):
            theory.predict(discipline, servers, 1.0, occupied, other, arrivals=arrivals)
    with pytest.raises(ValueError):
        theory.predict("split", 2, 0.0, [1.0], [1.0])
    with pytest.raises(ValueError):
        theory.simulate("split", 2, 1.0, 1.0, "normal")
    with pytest.raises(ValueError):
        theory.simulate("split", 2, 1.0, 1.0, connections=99)


# -------------------------------------------------------------------------------- simulations
# Their seeds are fixed: what is asserted within some standard errors holds on every machine, or on none.


@pytest.mark.parametrize("servers", [1, 4])
def test_the_simulation_of_one_queue_is_that_of_erlang(servers: int) -> None:
    found = theory.simulate("one queue", servers, 0.7 * servers, 1.0, connections=200_000)
    assert found.mean == pytest.approx(theory.one_queue(servers, 0.7 * servers, 1.0).mean_wait, abs=3 * found.standard_error)
    assert sum(wait > 0 for wait in found.waits) / len(found.waits) == pytest.approx(theory.erlang_c(servers, 0.7), rel=0.02)
    assert 0 < found.standard_error < 0.05 * found.mean


def test_the_standard_error_is_that_of_many_simulations() -> None:
    found = [theory.simulate("one queue", 1, 0.5, 1.0, seed=seed, connections=10_000) for seed in range(40)]
    misses = [(one.mean - 1.0) / one.standard_error for one in found]  # at load 0.5 the mean wait is 1
    assert 0.7 < math.sqrt(sum(miss**2 for miss in misses) / len(misses)) < 1.4


@pytest.mark.parametrize(("distribution", "cv2"), [("exponential", 1.0), ("fixed", 0.0), ("hyper", 4.0)])
def test_the_simulation_of_split_queues_is_that_of_pollaczek_and_khinchine(distribution: str, cv2: float) -> None:
    found = theory.simulate("split", 3, 1.8, 1.0, distribution, connections=200_000)
    assert found.mean == pytest.approx(0.6 * (1 + cv2) / 2 / 0.4, abs=3 * found.standard_error)


def test_one_queue_with_fixed_times_is_that_of_cosmetatos() -> None:
    servers, load = 4, 0.8
    half = theory.one_queue(servers, servers * load, 1.0).mean_wait / 2
    expected = half * (1 + (1 - load) * (servers - 1) * (math.sqrt(4 + 5 * servers) - 2) / (16 * load * servers))
    found = theory.predict("one queue", servers, servers * load, [1.0] * 100, [1.0] * 100)
    assert found.how == "simulated"
    assert found.mean_wait == pytest.approx(expected, abs=3 * found.standard_error + 0.01 * expected)
    assert found.mean == pytest.approx(1 + found.mean_wait)


def test_evenly_spaced_arrivals_are_those_of_the_general_arrivals_queue() -> None:
    # D/M/1: each queue of round robin sees evenly spaced arrivals too.
    sigma = fixed_point(lambda x: math.exp(-(1 - x) / 0.8))
    found = theory.simulate("round robin", 4, 3.2, 1.0, arrivals="uniform", connections=200_000)
    assert found.mean == pytest.approx(sigma / (1 - sigma), abs=3 * found.standard_error)
    predicted = theory.predict("split", 1, 0.8, exponential_times(1.0), [0.0], arrivals="uniform")
    assert predicted.how == "simulated"
    assert predicted.mean == pytest.approx(sigma / (1 - sigma), abs=3 * predicted.standard_error)
    # Of the waits, a share 1 - sigma is 0 and the rest exponential.
    assert predicted.p99 == pytest.approx(math.log(sigma / 0.01) / (1 - sigma), rel=0.08)


def test_ideal_policies_are_where_they_were_published() -> None:
    # Four workers at load 0.7, mean response over that of one queue: least outstanding 112 %, round robin 166 %.
    bound = theory.one_queue(4, 2.8, 1.0).mean
    times = exponential_times(1.0)
    least = theory.predict("least outstanding", 4, 2.8, times, times)
    robin = theory.predict("round robin", 4, 2.8, times, times)
    assert least.how == robin.how == "simulated"
    assert least.mean / bound == pytest.approx(1.12, abs=0.02)
    assert robin.mean / bound == pytest.approx(1.66, abs=0.04)
    # Under round robin each queue sees every fourth arrival of a Poisson process, E4/M/1, which has a closed form: 165 %.
    sigma = fixed_point(lambda x: (2.8 / (2.8 + 1 - x)) ** 4)
    assert robin.mean == pytest.approx(1 / (1 - sigma), abs=3 * robin.standard_error)
    assert bound < least.mean < robin.mean < theory.split_queue(4, 2.8, 1.0).mean


def test_least_outstanding_never_lets_wait_while_a_worker_is_idle() -> None:
    # Evenly spaced, four workers, and each connection gone before the fourth after it comes.
    assert max(theory.simulate("least outstanding", 4, 1.0, 3.9, "fixed", arrivals="uniform", connections=1000).waits) == 0
    # Chance alone would not do so.
    assert max(theory.simulate("split", 4, 1.0, 3.9, "fixed", arrivals="uniform", connections=1000).waits) > 0


def test_a_simulation_is_a_function_of_its_seed() -> None:
    for discipline in theory.DISCIPLINES:
        first, second, third = (
            theory.simulate(discipline, 3, 2.0, [0.5, 1.0, 1.5], seed=seed, connections=connections).waits
            for seed, connections in ((1, 1000), (2, 1000), (1, 1000))
        )
        assert first == third != second
        assert len(first) == 900


# -------------------------------------------------------------------------------- hash imbalance


@pytest.mark.parametrize(("servers", "connections", "expected"), [(4, 4, 2.12), (4, 16, 1.53), (4, 64, 1.26), (8, 16, 2.10)])
def test_the_published_imbalance_comes_out(servers: int, connections: int, expected: float) -> None:
    assert theory.hash_imbalance(servers, connections) == pytest.approx(expected, abs=0.0051)


def test_imbalance_at_its_ends() -> None:
    assert theory.hash_imbalance(1, 100) == 1
    assert theory.hash_imbalance(7, 1) == pytest.approx(7)
    assert theory.hash_imbalance(2, 2) == pytest.approx(1.5)
    for servers, connections in ((0, 5), (5, 0)):
        with pytest.raises(ValueError):
            theory.hash_imbalance(servers, connections)


@pytest.mark.parametrize("servers", [2, 4, 16])
def test_the_expansion_goes_on_where_the_exact_imbalance_ends(servers: int) -> None:
    # (max/mean - 1) * sqrt(connections) changes slowly, but for the whole numbers of connections per worker.
    excess = [(theory.hash_imbalance(servers, n) - 1) * math.sqrt(n) for n in (256 - servers, 256, 256 + servers)]
    assert excess[2] - excess[1] == pytest.approx(excess[1] - excess[0], abs=0.004 * excess[1])


@pytest.mark.parametrize(("servers", "connections"), [(8, 1000), (64, 500)])
def test_the_imbalance_of_many_connections_is_that_of_a_trial(servers: int, connections: int) -> None:
    chance = random.Random(1)
    largest = [max(Counter(chance.choices(range(servers), k=connections)).values()) for _ in range(500)]
    mean = connections / servers
    assert theory.hash_imbalance(servers, connections) == pytest.approx(sum(largest) / len(largest) / mean, rel=0.01)
