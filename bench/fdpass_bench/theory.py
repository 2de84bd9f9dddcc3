"""Queueing theory: how long connections would wait for ideal workers. Closed forms where there are any, simulation where there are none;
each prediction says which. Seconds, and connections per second; Poisson arrivals unless said. Nothing here measures."""

from __future__ import annotations

import cmath
import heapq
import math
import random
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, count, pairwise
from typing import Literal

How = Literal["closed form", "approximation", "simulated"]
Discipline = Literal["one queue", "split", "least outstanding", "round robin"]
Arrivals = Literal["poisson", "uniform"]
Distribution = Literal["exponential", "fixed", "hyper"]

DISCIPLINES: tuple[Discipline, ...] = ("one queue", "split", "least outstanding", "round robin")
ARRIVALS: tuple[Arrivals, ...] = ("poisson", "uniform")
DISTRIBUTIONS: tuple[Distribution, ...] = ("exponential", "fixed", "hyper")

HYPER_CV2 = 4.0
NEAR_EXPONENTIAL = (0.8, 1.25)  # cv² within which the approximation for one queue is taken; see predict

_CONNECTIONS = 400_000  # of a simulation: about half a second
_WARM_UP = 0.1  # of them, left out: the simulation begins with empty queues
_BATCHES = 30


@dataclass(frozen=True)
class Prediction:
    """The response, from the schedule to the answer, in seconds.

    how: "closed form" (exact, if by a numerical inversion), "approximation", or "simulated".
    standard_error: of mean_wait, and so of mean, by batch means; 0.0 unless simulated.
    tail(t): the probability of a response longer than t seconds.
    """

    mean: float
    mean_wait: float
    p50: float
    p90: float
    p99: float
    p99_9: float
    how: How
    standard_error: float = 0.0
    tail: Callable[[float], float] = field(default=lambda t: 0.0, repr=False, compare=False)

    def quantiles(self, above: Sequence[float]) -> list[float]:
        """The responses that these shares of all are above, to four digits. `above` falls."""
        return _quantiles(self.tail, self.mean, above, 18)


@dataclass(frozen=True)
class Simulation:
    """The waits of the connections in the order of their arrival, in seconds, without the warm-up.

    standard_error: of mean, by batch means.
    """

    waits: array[float]
    mean: float
    standard_error: float


@dataclass(frozen=True)
class _Wait:
    """tail(t) is the probability of waiting longer than t, for t >= 0."""

    mean: float
    tail: Callable[[float], float]
    how: How
    standard_error: float = 0.0


def erlang_c(servers: int, load: float) -> float:
    """The probability that a connection has to wait in M/M/k; load is rate * mean / servers.

    Raises ValueError unless there is a server and the load is in [0, 1).
    """
    _check_load(servers, load)
    # By way of Erlang B, whose recursion neither overflows nor loses digits.
    blocked = 1.0
    for busy in range(1, servers + 1):
        blocked = servers * load * blocked / (busy + servers * load * blocked)
    return blocked / (1 - load * (1 - blocked))


def one_queue(servers: int, rate: float, mean: float, cv2: float = 1.0) -> Prediction:
    """All workers take from one queue in the order of arrival; mean (seconds) and cv2 (squared coefficient of variation) are those of the
    time that a connection occupies its worker.

    Exact for cv2 = 1, exponential times (M/M/k). Else the mean wait is that of Allen and Cunneen, M/M/k's times (1 + cv2) / 2, its tail
    stays exponential, and the times are taken as a constant and an exponential part (cv2 < 1) or as balanced two-phase hyper-exponential.
    Raises ValueError for a load outside [0, 1), a mean that is not positive, and a negative cv2.
    """
    load = rate * mean / servers if servers > 0 else 0.0
    return _two_moments(erlang_c(servers, load), mean / servers, load, mean, cv2)


def split_queue(servers: int, rate: float, mean: float, cv2: float = 1.0) -> Prediction:
    """Each worker has a queue of its own, and each connection falls into one of them by chance, as with SO_REUSEPORT.

    Exact for cv2 = 1 (M/M/1). Else the mean is exact (Pollaczek and Khinchine); the quantiles are approximated as in one_queue().
    Raises ValueError for a load outside [0, 1), a mean that is not positive, and a negative cv2.
    """
    load = rate * mean / servers if servers > 0 else 0.0
    _check_load(servers, load)
    return _two_moments(load, mean, load, mean, cv2)


def predict(
    discipline: str,
    servers: int,
    rate: float,
    occupied: Sequence[float],
    other: Sequence[float],
    *,
    arrivals: str = "poisson",
    seed: int = 1,
) -> Prediction:
    """The response of a discipline that costs nothing, with the workers of a run.

    occupied: how long each connection of the run occupied its worker, in seconds: with `rate`, all that the wait depends on.
    other: what of each response was not waiting in the queue, in seconds: transport, and service until the answer.
    The two need not be of the same length. The response is wait + other, which are independent: a queue does not know what it holds.

    "split" under Poisson arrivals is exact (M/G/1, the transform inverted). So is one worker. "one queue" takes its conditional wait from a
    single server k times as fast, which is exact for exponential times, has the mean of Allen and Cunneen, and decays as it should; where
    the cv² of `occupied` is outside NEAR_EXPONENTIAL that mean is not good enough. The rest is simulated, `occupied` drawn anew.
    Raises ValueError for a load outside [0, 1), nothing measured, and names that are not in DISCIPLINES and ARRIVALS.
    """
    _check_names(discipline, arrivals)
    if not occupied or not other or not rate > 0:
        raise ValueError("there were no connections")
    mean, cv2 = _moments(occupied)
    load = rate * mean / servers if servers > 0 else 0.0
    _check_load(servers, load)
    if servers == 1:
        discipline = "split"  # they are all the same, and this one is exact
    exact = discipline == "split"
    near = exact or (discipline == "one queue" and NEAR_EXPONENTIAL[0] <= cv2 <= NEAR_EXPONENTIAL[1])
    if near and arrivals == "poisson":
        wait = _inverted(load if exact else erlang_c(servers, load), 1 if exact else servers, rate / servers, occupied, load, cv2)
    else:
        simulated, ordered = _simulated(discipline, servers, rate, tuple(occupied), "measured", arrivals, seed, _CONNECTIONS)
        waits = len(ordered)
        wait = _Wait(simulated.mean, lambda t: (waits - bisect_right(ordered, t)) / waits, "simulated", simulated.standard_error)
    points = _condensed(other, 100)

    def tail(t: float) -> float:
        return math.fsum(weight * (wait.tail(t - value) if value <= t else 1.0) for value, weight in points)

    return _prediction(wait.mean + math.fsum(other) / len(other), wait.mean, tail, wait.how, wait.standard_error)


def simulate(
    discipline: str,
    servers: int,
    rate: float,
    service: float | Sequence[float],
    distribution: str = "exponential",
    *,
    arrivals: str = "poisson",
    seed: int = 1,
    connections: int = _CONNECTIONS,
) -> Simulation:
    """Connections go through queues that are served in the order of arrival.

    discipline: "one queue"; "split": one for each worker, by chance; "least outstanding": the worker with the fewest connections, waiting
    and in service, ties by chance; "round robin".
    service: the mean in seconds of `distribution` (in DISTRIBUTIONS; "hyper" is two-phase with balanced means and a cv² of HYPER_CV2), or
    measured times, which are drawn anew by chance.
    arrivals: "poisson" or "uniform": evenly spaced.
    Raises ValueError for a load outside [0, 1), fewer connections than 100, and names that are not known.
    """
    if isinstance(service, float | int):
        return _simulated(discipline, servers, rate, (service,), distribution, arrivals, seed, connections)[0]
    return _simulated(discipline, servers, rate, tuple(service), "measured", arrivals, seed, connections)[0]


@lru_cache
def hash_imbalance(servers: int, connections: int) -> float:
    """The expected max/mean of the connections per worker when each falls on a worker by chance.

    Exact up to 256 connections, beyond within 0.1 %. Raises ValueError unless both are at least 1.
    """
    if servers < 1 or connections < 1:
        raise ValueError(f"there must be workers and connections, not {servers} and {connections}")
    if servers == 1:
        return 1.0
    mean = connections / servers
    # Counts that fall by chance are Poisson counts, given their sum: so the chance that none is above `most` is that of the Poisson counts
    # for this and the sum together, over that of the sum.
    log_sum = _log_poisson(connections, connections)
    least = 0 if connections <= 256 else max(0, int(mean - 10 * math.sqrt(mean)))  # fewer than this never happen
    most = -(-connections // servers)
    poisson = [math.exp(_log_poisson(mean, i)) for i in range(least, most)]
    expected = float(most)
    while True:
        poisson.append(math.exp(_log_poisson(mean, most)))
        if connections <= 256:
            both = _power(poisson, servers, connections)[connections]
        else:
            both = math.fsum(poisson) ** servers * _sum_density(poisson, servers, connections - servers * least)
        above = 1 - both / math.exp(log_sum)
        if above < 1e-6:
            return expected / mean
        expected += above
        most += 1


def _log_poisson(mean: float, n: int) -> float:
    return n * math.log(mean) - mean - math.lgamma(n + 1)


def _sum_density(weights: list[float], servers: int, total: int) -> float:
    """Of the sum of so many independent numbers 0, 1, 2 ... with these weights: an Edgeworth expansion.

    Levin, A Representation for Multinomial Cumulative Distribution Functions (1981).
    """
    whole = math.fsum(weights)
    mean = math.fsum(i * weight for i, weight in enumerate(weights)) / whole
    second, third, fourth = (math.fsum((i - mean) ** power * weight for i, weight in enumerate(weights)) / whole for power in (2, 3, 4))
    x = (total - servers * mean) / math.sqrt(servers * second)
    skew = third / second**1.5 / math.sqrt(servers)
    excess = (fourth / second**2 - 3) / servers
    correction = skew / 6 * (x**3 - 3 * x) + excess / 24 * (x**4 - 6 * x**2 + 3) + skew**2 / 72 * (x**6 - 15 * x**4 + 45 * x**2 - 15)
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi * servers * second) * max(0.0, 1 + float(correction))


def _power(polynomial: list[float], exponent: int, degree: int) -> list[float]:
    """Coefficients up to `degree`."""
    if exponent == 1:
        return polynomial + [0.0] * (degree + 1 - len(polynomial))
    half = _power(polynomial, exponent // 2, min(degree, (exponent // 2) * (len(polynomial) - 1)))
    square = _product(half, half, degree)
    return _product(square, polynomial, degree) if exponent % 2 else square


def _product(first: list[float], second: list[float], degree: int) -> list[float]:
    product = [0.0] * (degree + 1)
    for i, a in enumerate(first):
        for j, b in enumerate(second[: degree + 1 - i], i):
            product[j] += a * b
    return product


# -------------------------------------------------------------------------------- checks


def _check_load(servers: int, load: float) -> None:
    if servers < 1:
        raise ValueError(f"there must be at least one worker, not {servers}")
    if not 0 <= load < 1:
        raise ValueError(f"the load is {load:.3g}: a queue has no steady state unless it is in [0, 1)")


def _check_names(discipline: str, arrivals: str) -> None:
    if discipline not in DISCIPLINES:
        raise ValueError(f"there is no discipline {discipline!r}; there are {', '.join(DISCIPLINES)}")
    if arrivals not in ARRIVALS:
        raise ValueError(f"there is no steady state for arrivals {arrivals!r}; there is for {', '.join(ARRIVALS)}")


def _moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and squared coefficient of variation."""
    mean = math.fsum(values) / len(values)
    if not 0 < mean < math.inf:
        raise ValueError(f"the mean time that a worker is occupied is {mean:.3g} s")
    return mean, math.fsum((value - mean) ** 2 for value in values) / len(values) / mean**2


# -------------------------------------------------------------------------------- quantiles


def _prediction(mean: float, mean_wait: float, tail: Callable[[float], float], how: How, standard_error: float = 0.0) -> Prediction:
    p50, p90, p99, p99_9 = _quantiles(tail, mean, (0.5, 0.1, 0.01, 0.001), 36)
    return Prediction(mean, mean_wait, p50, p90, p99, p99_9, how, standard_error, tail)


def _quantiles(tail: Callable[[float], float], mean: float, above: Sequence[float], halvings: int) -> list[float]:
    high = max(mean, 1e-9)
    low = 0.0
    quantiles = []
    for share in above:
        while tail(high) > share:
            low, high = high, 2 * high
        for _ in range(halvings):
            middle = (low + high) / 2
            if tail(middle) > share:
                low = middle
            else:
                high = middle
        quantiles.append(high)
        low = high  # the next quantile is not below this one
    return quantiles


def _two_moments(waiting: float, time_per_place: float, load: float, mean: float, cv2: float) -> Prediction:
    """The response where the wait is 0 but for a chance `waiting`, and exponential then."""
    if not (mean > 0 and cv2 >= 0):
        raise ValueError(f"no time has a mean of {mean} s and a cv² of {cv2}")
    scale = time_per_place * (1 + cv2) / 2 / (1 - load)
    if cv2 > 1:
        parts = [(share, 0.0, phase) for share, phase in _phases(mean, cv2)]
    else:
        parts = [(1.0, mean * (1 - math.sqrt(cv2)), mean * math.sqrt(cv2))]

    def tail(t: float) -> float:
        return sum(share * (_sum_tail(t - offset, waiting, scale, phase) if t >= offset else 1.0) for share, offset, phase in parts)

    return _prediction(mean + waiting * scale, waiting * scale, tail, "closed form" if cv2 == 1 else "approximation")


def _sum_tail(t: float, waiting: float, scale: float, phase: float) -> float:
    """P(W + S > t) for W exponential with mean `scale` but 0 with the chance 1 - `waiting`, and S exponential with mean `phase`."""
    wait = math.exp(-t / scale)
    if phase <= 1e-9 * scale:
        return waiting * wait
    service = math.exp(-t / phase)
    # Where the two rates are the same the quotient is 0 / 0, and beside it has no digits left.
    both = (1 + t / phase) * service if abs(scale - phase) < 1e-6 * phase else (scale * wait - phase * service) / (scale - phase)
    return (1 - waiting) * service + waiting * both


def _phases(mean: float, cv2: float) -> list[tuple[float, float]]:
    """Share and mean of both phases of the hyper-exponential distribution with balanced means."""
    share = (1 + math.sqrt((cv2 - 1) / (cv2 + 1))) / 2
    return [(share, mean / 2 / share), (1 - share, mean / 2 / (1 - share))]


# -------------------------------------------------------------------------------- M/G/1 and what follows from it


def _condensed(values: Sequence[float], fine: int) -> list[tuple[float, float]]:
    """Fewer values with weights, of the same mean. The `fine` largest stay as they are; below, a group of neighbours becomes its mean, and
    the groups grow with their rank, so that every quantile is known about as well."""
    ordered = sorted(values, reverse=True)
    points = []
    begin = 0
    while begin < len(ordered):
        group = ordered[begin : begin + 1 + begin // fine]
        points.append((math.fsum(group) / len(group), len(group) / len(ordered)))
        begin += len(group)
    return points


def _inverted(waiting: float, speed: int, rate: float, occupied: Sequence[float], load: float, cv2: float) -> _Wait:
    """The wait that is 0 but for a chance `waiting`, and is then that of a single server (M/G/1), `speed` times as fast."""
    mean = load / rate
    scale = mean * (1 + cv2) / 2 / (1 - load)  # the mean wait of those who wait, by Pollaczek and Khinchine
    # The condensed values have a little less variance; with the mean of the theory the tail has its scale.
    points = _condensed(occupied, 16)

    def transform(s: complex) -> complex:
        """Of P(wait > t), given that there is a wait."""
        idle = rate * (1 - sum(weight * cmath.exp(-s * value) for value, weight in points))
        return (load - idle / s) / (s - idle) / load

    # The logarithm of the tail: first bent, the more so the more the times vary, and soon straight.
    places, logs = [0.0], [0.0]
    while logs[-1] > math.log(1e-6) and len(logs) < 400:
        places.append(places[-1] + scale / 8 * min(1.0, len(places) / 12))
        logs.append(min(logs[-1], math.log(max(_inverse(transform, places[-1]), 1e-9))))

    def tail(t: float) -> float:
        right = min(bisect_right(places, t * speed), len(places) - 1)  # beyond the last, straight on
        slope = (logs[right] - logs[right - 1]) / (places[right] - places[right - 1])
        return waiting * math.exp(logs[right] + (t * speed - places[right]) * slope)

    return _Wait(waiting * scale / speed, tail, "approximation" if speed > 1 else "closed form")


def _inverse(transform: Callable[[complex], complex], t: float) -> float:
    """The function at t > 0 of which this is the Laplace transform, to about 1e-7 where it is smooth.

    Abate and Whitt, Numerical Inversion of Laplace Transforms of Probability Distributions (1995), algorithm EULER.
    """
    damping = 18.4
    terms = (math.cos(k * math.pi) * transform(complex(damping / 2 / t, k * math.pi / t)).real / (1 if k else 2) for k in range(27))
    sums = list(accumulate(terms))[15:]
    return math.exp(damping / 2) / t * sum(math.comb(11, k) / 2**11 * value for k, value in enumerate(sums))


# -------------------------------------------------------------------------------- simulation


@lru_cache(maxsize=8)
def _simulated(
    discipline: str, servers: int, rate: float, service: tuple[float, ...], distribution: str, arrivals: str, seed: int, connections: int
) -> tuple[Simulation, array[float]]:
    """The simulation, and its waits in order of size."""
    _check_names(discipline, arrivals)
    if connections < 100:
        raise ValueError(f"{connections} connections are too few to simulate")
    if not service or not rate > 0:
        raise ValueError("without connections there is nothing to simulate")
    _check_load(servers, rate * _moments(service)[0] / servers)
    chance = random.Random(seed)
    draw = chance.random
    times = _times(service, distribution, connections, chance)
    gaps = (1 / rate for _ in times) if arrivals == "uniform" else (-math.log(1 - draw()) / rate for _ in times)
    waits = array("d", _QUEUES[discipline](servers, accumulate(gaps), times, chance))[round(connections * _WARM_UP) :]
    edges = [round(len(waits) * i / _BATCHES) for i in range(_BATCHES + 1)]
    means = [math.fsum(waits[begin:end]) / (end - begin) for begin, end in pairwise(edges)]
    mean = math.fsum(waits) / len(waits)
    error = math.sqrt(math.fsum((one - mean) ** 2 for one in means) / (_BATCHES - 1) / _BATCHES)
    return Simulation(waits, mean, error), array("d", sorted(waits))


def _times(service: tuple[float, ...], distribution: str, connections: int, chance: random.Random) -> list[float]:
    draw = chance.random
    if distribution == "measured":
        return chance.choices(service, k=connections)
    mean = service[0]
    if distribution == "fixed":
        return [mean] * connections
    if distribution == "exponential":
        return [-mean * math.log(1 - draw()) for _ in range(connections)]
    if distribution == "hyper":
        (share, often), (_, seldom) = _phases(mean, HYPER_CV2)
        return [-(often if draw() < share else seldom) * math.log(1 - draw()) for _ in range(connections)]
    raise ValueError(f"there is no distribution {distribution!r}; there are {', '.join(DISTRIBUTIONS)}")


def _one_queue(servers: int, arrivals: Iterator[float], times: list[float], chance: random.Random) -> Iterator[float]:
    free = [0.0] * servers  # when each worker has done what it was given
    for now, time in zip(arrivals, times, strict=False):
        begin = max(now, free[0])
        heapq.heapreplace(free, begin + time)
        yield begin - now


def _own_queues(arrivals: Iterator[float], times: list[float], workers: Iterator[int], servers: int) -> Iterator[float]:
    free = [0.0] * servers
    for now, time, worker in zip(arrivals, times, workers, strict=False):
        begin = max(now, free[worker])
        free[worker] = begin + time
        yield begin - now


def _split(servers: int, arrivals: Iterator[float], times: list[float], chance: random.Random) -> Iterator[float]:
    return _own_queues(arrivals, times, (int(chance.random() * servers) for _ in count()), servers)


def _round_robin(servers: int, arrivals: Iterator[float], times: list[float], chance: random.Random) -> Iterator[float]:
    return _own_queues(arrivals, times, (i % servers for i in count()), servers)


def _least_outstanding(servers: int, arrivals: Iterator[float], times: list[float], chance: random.Random) -> Iterator[float]:
    free = [0.0] * servers
    outstanding = [0] * servers
    ends: list[tuple[float, int]] = []
    for now, time in zip(arrivals, times, strict=False):
        while ends and ends[0][0] <= now:
            outstanding[heapq.heappop(ends)[1]] -= 1
        fewest = min(outstanding)
        if outstanding.count(fewest) == 1:
            worker = outstanding.index(fewest)
        else:
            ties = [i for i, here in enumerate(outstanding) if here == fewest]
            worker = ties[int(chance.random() * len(ties))]
        begin = max(now, free[worker])
        free[worker] = begin + time
        outstanding[worker] += 1
        heapq.heappush(ends, (begin + time, worker))
        yield begin - now


_QUEUES = {"one queue": _one_queue, "split": _split, "least outstanding": _least_outstanding, "round robin": _round_robin}
