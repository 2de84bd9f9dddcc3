"""From the options of `balance` to all that is to be measured: which go together, and what is done where one was not given.
What cannot be is one of click's errors, with what can. Nothing is measured here; of a target it is looked at who serves."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from fdpass_bench import scenarios

# The rest of the package is imported where it is needed: the command line reads this file at every start.
if TYPE_CHECKING:
    from fdpass_bench.campaign import Campaign, Steady
    from fdpass_bench.runs import Plan
    from fdpass_bench.servers import Group, PeerServer, Server, Wanted
    from fdpass_bench.steady import Work
    from fdpass_bench.strategy import Strategy
    from fdpass_bench.target import Target

DEMONSTRATION = ("shared", "reuseport", "reuseport-bare")
MOST_TOGETHER = 100  # numbers of workers, loads and rates, each with each, in one command
_MOST_REQUESTS = 5_000_000  # of one run: 80 bytes each, in memory
_MOST_CLIENTS = 20000  # connections of a run that are followed one by one
_ARRIVAL = 0.02  # seconds between two of a few clients


@dataclasses.dataclass(frozen=True)
class Asked:
    """The options, by the names of their parameters. given: those that stood on the command line, as they are written."""

    strategies: Sequence[Strategy]
    workers: Sequence[int]
    scenario: str | None
    connections: int | None
    json_file: str | None
    html_file: str | None
    resume: str | None
    service_ms: float | None
    time_limit: float | None
    bursts: int | None
    rolls: int | None
    credits: int | None
    rate: Sequence[float] | None
    load: Sequence[float] | None
    clients: int | None
    arrivals: str | None
    distribution: str | None
    kind: str | None
    requests: int | None
    think_ms: float | None
    seed: int | None
    repeats: int | None
    targets: Sequence[Target]
    peers: Sequence[str]
    given: Mapping[str, str]

    @property
    def service(self) -> float | None:
        """Seconds."""
        return None if self.service_ms is None else self.service_ms / 1000

    @property
    def everything(self) -> bool:
        return self.scenario == "all"


def demonstration() -> Campaign:
    from fdpass_bench.campaign import Campaign
    from fdpass_bench.strategy import Strategy

    ours = _contenders([Strategy.parse(text) for text in DEMONSTRATION], None)
    return Campaign([plan for word in scenarios.FIRST for plan in _plans(ours, word, 4, None, 10.0, None)])


def campaign(asked: Asked) -> Campaign:
    """Raises click.UsageError for options that do not go together, click.ClickException for a peer that is not installed."""
    from fdpass_bench.campaign import Campaign

    words = _chosen(asked)
    singles = [word for word in words if word in scenarios.SINGLES]
    _refuse(asked, words, singles)
    more = {"bursts": asked.bursts or 1, "rolls": asked.rolls or 5, "clients": asked.clients, "seed": _seed(asked)}
    # What others do is compared with what we would have them do.
    ours = _contenders(asked.strategies[:2] if asked.peers and "strategies" not in asked.given else asked.strategies, asked.credits)
    plans = []
    for count, word in itertools.product(asked.workers, singles):
        here = _plans(ours, word, count, asked.connections, asked.time_limit, asked.service, **more)
        wanted = here[0].wanted("hold" if word == "long-lived" else "timed")
        plans += here
        plans += [dataclasses.replace(here[0], server=peer) for peer in _peers_for(asked, word, wanted)]
    loops = _matrix(asked) if words == ["matrix"] else _loops(asked, [word for word in words if word in scenarios.LOOPS])
    return Campaign(plans, loops)


def _seed(asked: Asked) -> int:
    return 1 if asked.seed is None else asked.seed


def _refuse(asked: Asked, words: Sequence[str], singles: Sequence[str]) -> None:
    """What does not go together, whatever else is asked for. Raises click.UsageError."""
    if asked.connections is not None:
        name = next((name for name in singles if not scenarios.CATALOGUE[name].connections), None)
        if name is not None and not asked.everything:
            raise click.UsageError(f"--connections has no meaning in {name}, which makes as many as its rate or its clients do")
        # A burst is one of several; a loop has room for more.
        most = _MOST_CLIENTS // (asked.bursts or 1) if singles else 1_000_000
        if asked.connections > most:
            raise click.BadParameter(f"{singles[0]} makes at most {most} connections", param_hint="--connections")
    if asked.credits is not None and not any(strategy.name == "dispatch" for strategy in asked.strategies):
        raise click.UsageError("--credits belongs to the strategy dispatch, which is not among --strategies")
    if (together := len(asked.workers) * len(asked.load or [1]) * len(asked.rate or [1])) > MOST_TOGETHER:
        raise click.UsageError(f"--workers, --load and --rate make {together} combinations: one command measures {MOST_TOGETHER} at most")
    alone = asked.targets and not asked.peers and "strategies" not in asked.given and not asked.everything
    if asked.targets and (len(asked.workers) > 1 or (alone and "workers" in asked.given)):
        several = "several " if len(asked.workers) > 1 else ""
        raise click.UsageError(f"{several}--workers have no meaning with --target, whose workers are somebody else's")
    if asked.service_ms == 0 and "stall" in singles:
        raise click.UsageError("with --service-ms 0 there is no half load for stall to be at")
    if asked.service_ms is not None and words == ["long-lived"]:
        raise click.UsageError("--service-ms has no meaning in long-lived, whose connections stay until they are closed")
    if words == ["matrix"] and (asked.service_ms is not None or len(asked.workers) > 1):
        what = "--service-ms has" if asked.service_ms is not None else "several --workers have"
        raise click.UsageError(f"{what} no meaning in matrix, whose four cases by three loads are what they are")


def _chosen(asked: Asked) -> list[str]:
    """The scenarios to play: those asked for, else those of the options given, each with where it belongs. Raises click.UsageError."""
    if asked.everything:
        return list(scenarios.EVERY)
    bound = scenarios.belonging()
    of = {option: bound[name] for name, option in asked.given.items() if name in bound}
    if asked.scenario is not None:
        for option, where in of.items():
            if asked.scenario not in where:
                raise click.UsageError(f"{option} belongs to --scenario {', '.join(where[:-1]) + ' or ' if where[1:] else ''}{where[-1]}")
        return [asked.scenario]
    if not of:
        return list(scenarios.FIRST)
    common = [name for name in scenarios.EVERY if all(name in where for where in of.values())]
    if not common:
        raise click.UsageError(f"{', '.join(of)} belong to no scenario together")
    return ["steady"] if "steady" in common else common[:1]


# -------------------------------------------------------------------------------- who takes part


def _contenders(strategies: Sequence[Strategy], credits: int | None) -> list[Group]:
    from fdpass_bench.servers import Group

    return [Group(strategy, credits) for strategy in strategies]


def _own(asked: Asked, word: str) -> list[Strategy]:
    """The strategies of a loop: those given, else its own. A target is somebody's own question; peers are compared with us."""
    from fdpass_bench.strategy import Strategy

    if "strategies" in asked.given:
        return list(asked.strategies)
    if asked.targets and not asked.peers:
        return []
    own = scenarios.CATALOGUE[word].strategies
    return [Strategy.parse(text) for text in (own.split(",") if own else DEMONSTRATION[:2])]


def _peers_for(asked: Asked, word: str, wanted: Wanted) -> list[PeerServer]:
    """The peers of a scenario. One that cannot do it is the caller's mistake, but in `all`, where it is said; one that is not installed is
    not."""
    if not asked.peers:
        return []
    from fdpass_bench.peers import PeerError, PeerUnable
    from fdpass_bench.servers import PeerServer

    found = []
    for name in asked.peers:
        try:
            found.append(PeerServer.find(name, wanted, rolls=word == "rolling"))
        except PeerUnable as error:
            if not asked.everything:
                raise click.UsageError(str(error)) from error
            print(f"fdpass-bench: {word} without {name}: {error}", file=sys.stderr)
        except PeerError as error:
            raise click.ClickException(str(error)) from error
    return found


# -------------------------------------------------------------------------------- each strategy once


def _plans(
    ours: Sequence[Server], word: str, workers: int, connections: int | None, time_limit: float | None, service: float | None, **more: Any
) -> list[Plan]:
    from fdpass_bench.runs import Plan

    usual = scenarios.CATALOGUE[word].connections  # 0: what its rate or its clients make
    limit = time_limit or (120.0 if word == "rolling" else 30.0)
    return [Plan(server, word, workers, usual and (connections or usual), limit, service, **more) for server in ours]


# -------------------------------------------------------------------------------- loops


def _loops(asked: Asked, words: Sequence[str]) -> list[Steady]:
    from fdpass_bench.campaign import Steady
    from fdpass_bench.servers import TargetServer

    found: list[Steady] = []
    loads, rates = ([*several] if several else [None] for several in (asked.load, asked.rate))
    for word, count, load, rate in itertools.product(words, asked.workers, loads, rates):
        work = _work(asked, word, count, load, rate)
        if any(work == one.work for one in found):
            continue  # in `all`, a loop that takes no rate is the same at each
        for target in asked.targets:
            try:
                work.load_of(TargetServer(target).serving, 0)
            except ValueError as error:
                raise click.UsageError(f"--target {target.text}: {error}") from error
        ours, peers = _contenders(_own(asked, word), asked.credits), _peers_for(asked, word, work.wanted)
        found.append(Steady(work, [*ours, *peers, *map(TargetServer, asked.targets)]))
    return found


def _matrix(asked: Asked) -> list[Steady]:
    from fdpass_bench import matrix
    from fdpass_bench.campaign import Steady
    from fdpass_bench.strategy import Strategy

    # The contestants in the paper's order, whatever else takes part.
    theirs = [Strategy.parse(text) for text in str(scenarios.CATALOGUE["matrix"].strategies).split(",")]
    ours = _contenders(list(dict.fromkeys([*theirs, *(asked.strategies if "strategies" in asked.given else [])])), asked.credits)
    cells = matrix.works(asked.workers[0], asked.connections, asked.repeats or 2, _seed(asked), asked.time_limit or 10.0)
    return [Steady(work, ours) for work in cells]


def _work(asked: Asked, word: str, workers: int, load: float | None, rate: float | None) -> Work:
    """The work of a loop. Raises click.UsageError."""
    from fdpass_bench.steady import Work

    known = scenarios.CATALOGUE[word]
    names = ("clients", "seed", "repeats", "arrivals", "distribution", "kind", "requests", "think_ms")
    # In `all` an option may be of another loop.
    given = {name: getattr(asked, name) for name in names} | {"load": load, "rate": rate}
    given = {name: value if name in known.options else None for name, value in given.items()}
    found: dict[str, Any] = {name: known.defaults.get(name) if value is None else value for name, value in given.items()}
    few = word == "few-clients"
    exclusive = ("load", "think_ms") if few else ("rate", "load", "clients")
    together = [_option(name) for name in exclusive if given[name] is not None]
    if len(together) > 1:
        raise click.UsageError(f"{' and '.join(together)} exclude each other")
    clients = given["clients"] or (max(found["clients"], 2 * workers) if few else 0)
    rate, requests, think = found["rate"], found["requests"] or 1, (found["think_ms"] or 0.0) / 1000
    if asked.targets and given["load"]:
        raise click.UsageError("--load has no meaning for a --target, of which nobody knows what it can do: give --rate or --clients")
    if clients and found["arrivals"]:
        raise click.UsageError("--arrivals has no meaning in the closed loop of --clients")
    if given["think_ms"] is not None and requests == 1:
        raise click.UsageError("--think-ms needs --requests-per-connection over 1")
    service = (0.0 if asked.targets else 0.004) if asked.service is None else asked.service
    if few and given["think_ms"] is None:
        think = _pause(clients, workers, service, found["load"])
    if not rate and not clients and asked.targets:
        rate = 1.0  # until it is known how fast it answers
    if not rate and not clients:
        if not service:
            raise click.UsageError("with --service-ms 0 a load has no rate: give --rate")
        rate = (found["load"] or 0.7) * workers / (service * requests)
    # So that the defaults end within a minute; a closed loop goes as fast as its workers do.
    expected = rate or (workers / (service * requests) if service else math.inf)
    connections = asked.connections or (clients if few else _enough(expected, bool(asked.targets)))
    if connections * requests > _MOST_REQUESTS:
        raise click.UsageError(f"{connections} connections of {requests} requests are more than the {_MOST_REQUESTS} that a run can hold")
    return Work(
        workers=workers,
        connections=connections,
        rate=rate,
        service=service,
        distribution=found["distribution"] or "exponential",
        work=found["kind"] or "sleep",
        arrivals=found["arrivals"] or "poisson",
        clients=clients,
        requests=requests,
        think=think,
        seed=1 if found["seed"] is None else found["seed"],
        repeats=found["repeats"] or 2,
        time_limit=asked.time_limit or 10.0,
        scenario=word,
        gap=_ARRIVAL if few and connections == clients else 0.0,
        # Of a target nothing is known but its answers, and these are soon: the generator's own lateness would be much of them.
        since="begun" if asked.targets else "schedule",
    )


def _pause(clients: int, workers: int, service: float, load: float) -> float:
    """Seconds between an answer and the next request, by which so many clients ask for the load. Raises UsageError."""
    if not service:
        return _ARRIVAL  # of a server of which nothing is known
    pause = clients * service / (workers * load) - service
    if pause <= 0:
        most = f"{clients / workers:.2g} at most, without a pause"
        raise click.UsageError(f"{clients} clients cannot ask {workers} workers for a load of {load:g}: {most}")
    return pause


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _enough(rate: float, targets: bool) -> int:
    """The connections of six seconds, in bounds; of a target that gets few a second, fewer still."""
    return int(max(20 if targets else 100, min(100, 20 * rate), min(4000, 6 * rate)))


def with_targets(asked: Asked, campaign: Campaign) -> tuple[Campaign, list[str]]:
    """The campaign with what was seen of each target, and the options that would ask for the same, where a rate was chosen by that.

    Raises click.ClickException for a target that does not answer.
    """
    from fdpass_bench import target
    from fdpass_bench.campaign import Campaign, Steady
    from fdpass_bench.servers import TargetServer

    limit = campaign.loops[0].work.time_limit
    try:
        seen = {one.text: target.look(one, limit) for one in asked.targets}
    except target.TargetError as error:
        raise click.ClickException(f"{error}.") from error
    loops, more = [], []
    for loop in campaign.loops:
        work = loop.work
        if asked.rate is None and not work.clients:
            rate = min(one.modest_rate for one in seen.values())
            work = dataclasses.replace(work, rate=rate, connections=asked.connections or _enough(rate, True))
            # Their number follows from it; of `all`, a number given would be that of every other scenario too.
            more = ["--rate", repr(rate)]
            slowest = max(one.mean for one in seen.values()) * 1000
            seconds = work.repeats * work.connections / rate
            print(
                f"fdpass-bench: an answer takes {slowest:.3g} ms; {rate:g} connections/s for {seconds:.0f} s now (--rate sets another).",
                file=sys.stderr,
            )
        servers = [
            dataclasses.replace(server, seen=seen[server.name]) if isinstance(server, TargetServer) else server for server in loop.servers
        ]
        loops.append(Steady(work, servers))
    return Campaign(campaign.plans, loops), more
