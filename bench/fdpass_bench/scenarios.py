"""The scenarios of `balance` as data: the word, what it does and shows, which options belong to it, what it does unless told.
It measures nothing and imports nothing of the package: the command line reads it at every start."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["single", "loop", "matrix"]

#: Of a loop, as the command line calls its parameters. The others belong to every scenario.
_OPEN = ("rate", "load", "arrivals")
_LOOP = ("clients", "seed", "distribution", "kind", "requests", "think_ms", "repeats", "targets", "peers")


@dataclass(frozen=True)
class Scenario:
    """kind: "single": each strategy once; "loop": all servers in turns under one load, several times; "matrix": loops of its own.

    says: what happens, what it shows, which figures it gives, what to expect. options: of those that belong to some scenarios only,
    its own. connections: of a single, unless told; 0: as many as its rate or its clients make. service: seconds that a single holds
    each. defaults: of a loop, by parameter, where it is not that of `steady`. strategies: unless told, where not the command's own.
    """

    word: str
    kind: Kind
    says: str
    options: tuple[str, ...] = ()
    connections: int = 0
    service: float = 0.0
    defaults: Mapping[str, Any] = field(default_factory=dict)
    strategies: str | None = None


_ALL = (
    Scenario(
        "idle",
        "single",
        "Connections come one at a time, each after the former has ended, while all workers wait. Shows whom the kernel wakes "
        "when it has the choice: connections per worker, largest over mean, context switches per connection. shared takes turns "
        "and is even; shared:first wakes the same worker again and again; split queues (reuseport) are as uneven as their hash.",
        options=("peers",),
        connections=60,
    ),
    Scenario(
        "burst",
        "single",
        "Many connections at once, each held for a moment; --bursts of them, one after the other. Shows how a queue is emptied: "
        "connections per worker, largest over mean, context switches. From one queue whoever is free takes the next; with split "
        "queues the longest one decides when the last client has its answer.",
        options=("bursts", "peers"),
        connections=400,
        service=0.001,
    ),
    Scenario(
        "kill",
        "single",
        "Connections wait in the queue while a worker is killed every half second and restarted. Shows what dies with a worker: "
        "connections lost that it had accepted, and lost that nobody had. One queue outlives its workers and loses only the "
        "former; a socket that one worker holds alone (reuseport-bare) takes its queue along.",
        options=("peers",),
        connections=200,
    ),
    Scenario(
        "stall",
        "single",
        "An open loop at half load, in which one worker is frozen for a second. Shows who waits for it: connections that took "
        "over half a second, as a share of those that came meanwhile. With split queues 1/k of them, as the hash goes on "
        "sending; from one queue hardly any, as the others take them.",
        options=("seed", "peers"),
        service=0.004,
    ),
    Scenario(
        "rolling",
        "single",
        "All workers are replaced by group.roll(), --rolls times, while --clients work in a closed loop. Shows what a "
        "deployment costs: requests that failed and how, seconds for each roll. With one queue, and with queues that outlive "
        "their workers, none fails; with reuseport-bare what is shaking hands when a socket closes fails.",
        options=("rolls", "clients", "seed", "peers"),
        service=0.002,
    ),
    Scenario(
        "long-lived",
        "single",
        "So many connections stay open; for four seconds one at random is closed and another opened. Shows who holds how many: "
        "standard deviation and range of the open connections per worker, beside those of a random hash. least-loaded stays "
        "within a few; one queue without it, and split queues, drift as far as chance does.",
        options=("seed", "peers"),
        connections=1000,
    ),
    Scenario(
        "scale-out",
        "single",
        "A closed loop that keeps everybody busy, on 1, 2, 4 ... workers. Shows whether more workers do more: connections per "
        "second, and as a share of k times those of one. One queue comes near to it; split queues as well, as long as there are "
        "many more clients than workers.",
        options=("clients", "seed", "peers"),
        service=0.002,
    ),
    Scenario(
        "steady",
        "loop",
        "An open loop: connections arrive at a rate whatever the server does, each with its own service time. Shows what "
        "waiting a way of sharing costs: mean and percentiles of the latency with confidence intervals, queueing theory beside "
        "them, a verdict for each pair. At load 0.7 with four workers split queues wait 6.5 times as long as one queue "
        "does, and answer 2.5 times as late.",
        options=(*_OPEN, *_LOOP),
    ),
    Scenario(
        "heavy-tail",
        "loop",
        "steady with service times of which few are very long (two phases, squared coefficient of variation 4). Shows what one "
        "slow request does to those behind it: the same figures as steady. A split queue makes all wait that were hashed behind "
        "it, 2.5 times as long as with exponential times; one queue passes it by, and the gap between the two widens.",
        options=(*_OPEN, *_LOOP),
        defaults={"distribution": "hyper"},
    ),
    Scenario(
        "few-clients",
        "loop",
        "A few clients, 16 unless told, come one after the other, each with one connection that it keeps for many requests; "
        "their pauses follow from --load. Shows how few connections a hash shares out: requests per worker, largest over mean, "
        "beside the mean that a hash would give (1.53 for 16 on 4 workers); each repeat draws anew. least-loaded is even; "
        "reuseport is as uneven as the hash, and its busiest worker makes its clients wait.",
        options=("load", *_LOOP),
        defaults={"clients": 16, "load": 0.5, "requests": 60, "repeats": 6},
        strategies="shared,shared:least-loaded,reuseport",
    ),
    Scenario(
        "keep-alive",
        "loop",
        "steady with 8 requests on each connection and a pause between them. Shows that a balance of connections is not one of "
        "requests: both per worker, and the latency of a request. A kept connection waits at the worker that took it even while "
        "others are idle: one queue no longer helps after the first request, so the ways of sharing come nearer to each other. "
        "There is no theory for this.",
        options=(*_OPEN, *_LOOP),
        defaults={"requests": 8, "think_ms": 20.0},
        strategies="shared,shared:least-loaded,reuseport",
    ),
    Scenario(
        "matrix",
        "matrix",
        "Four cases of traffic by three loads, as in table 3 of Hermes (SIGCOMM 2025): many connections or few kept ones, "
        "cheap or costly requests, at light, medium and heavy load, for its contestants (exclusive, reuseport, load-aware) and "
        "shared, in about seven minutes. Shows which of its rankings hold here: mean and p99 of each, theory where it is known, "
        "means judged by the interval of their ratio. Where each connection is one request, one queue beats split queues.",
        options=("seed", "repeats"),
        strategies="shared:first,reuseport,shared:least-loaded,shared",
    ),
)

CATALOGUE: Mapping[str, Scenario] = {one.word: one for one in _ALL}
#: Those of the demonstration, and of `balance` without any option that belongs to one.
FIRST = ("idle", "burst", "kill")
#: What `all` stands for: the matrix takes its seven minutes only when it is asked for.
EVERY = tuple(one.word for one in _ALL if one.kind != "matrix")
SINGLES = tuple(one.word for one in _ALL if one.kind == "single")
LOOPS = tuple(one.word for one in _ALL if one.kind == "loop")


def belonging() -> dict[str, tuple[str, ...]]:
    """By parameter: the words of the scenarios that it belongs to, where these are not all."""
    found: dict[str, tuple[str, ...]] = {}
    for one in _ALL:
        for name in one.options:
            found[name] = (*found.get(name, ()), one.word)
    return found


def listed(width: int = 80) -> Iterator[str]:
    """The catalogue for a terminal: each word, and below it its paragraph, in lines of at most `width` characters."""
    for one in _ALL:
        yield one.word
        yield from textwrap.wrap(one.says, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
        yield ""
