"""The command line: arguments in, exit status out. It neither measures nor knows how a figure is come by."""

from __future__ import annotations

import contextlib
import errno
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from fdpass_bench import screens

# The rest of the package is imported by the command that needs it: a spawned worker imports this file again.
if TYPE_CHECKING:
    from fdpass_bench.campaign import Campaign
    from fdpass_bench.price import Plan as PricePlan
    from fdpass_bench.runs import Plan
    from fdpass_bench.steady import Server, Work
    from fdpass_bench.strategy import Strategy
    from fdpass_bench.target import Target

_MOST_REQUESTS = 5_000_000  # of one run: 80 bytes each, in memory
_PRICES = ("carriers", "starts", "descriptors", "outstanding", "receivers")
_DEMONSTRATION = ("shared", "reuseport", "reuseport-bare")
_FIRST = ("idle", "burst", "kill")  # of the scenarios, those of the demonstration
_SCENARIOS = (*_FIRST, "stall", "rolling", "long-lived", "scale-out", "steady")
_LOADED = ("stall", "rolling", "scale-out")  # they make as many connections as their rate or their clients do
_MOST_CLIENTS = 20000  # connections of a run that are followed one by one
#: Which scenarios an option belongs to, where these are not all, nor steady alone.
_BELONGS = {
    "bursts": ("burst",),
    "rolls": ("rolling",),
    "clients": ("rolling", "scale-out", "steady"),
    "seed": ("stall", "rolling", "long-lived", "scale-out", "steady"),
}


def _strategy(ctx: click.Context, param: click.Parameter, text: str) -> Strategy:
    from fdpass_bench.strategy import Strategy

    try:
        return Strategy.parse(text)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from error


def _strategies(ctx: click.Context, param: click.Parameter, text: str) -> list[Strategy]:
    return list(dict.fromkeys(_strategy(ctx, param, one) for one in text.split(",")))


def _every_strategy() -> list[str]:
    from fdpass_bench.strategy import ORDERS, PROGRAMS

    orders = [f"{name}:{order}" for name, orders in ORDERS.items() for order in orders]
    return [*ORDERS, *orders, *(f"shared:{program}" for program in PROGRAMS)]


def _every_peer() -> list[str]:
    from fdpass_bench.peers import PEERS

    return list(PEERS)


def _targets(ctx: click.Context, param: click.Parameter, texts: Sequence[str]) -> list[Target]:
    if not texts:
        return []
    from fdpass_bench.target import Target

    try:
        return list(dict.fromkeys(Target.parse(text) for text in texts))
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from error


def _peers(ctx: click.Context, param: click.Parameter, texts: Sequence[str]) -> list[str]:
    if not texts:
        return []
    from fdpass_bench.peers import PEERS

    names = list(dict.fromkeys(name.strip() for text in texts for name in text.split(",")))
    for name in names:
        if name not in PEERS:
            raise click.BadParameter(f"there is no peer {name!r}; there are {', '.join(PEERS)}", ctx, param)
    return names


class _Number(click.FloatRange):
    """A range of finite numbers: FloatRange lets nan through, which is in no range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


_json = click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, allow_dash=True), help="Write the figures to it; - is standard output."
)
_html = click.option("--html", "html_file", type=click.Path(dir_okay=False, allow_dash=True), help="Write one self-contained page to it.")
_workers = click.option("--workers", type=screens.Whole(1, 64), default=4, show_default=True, help="How many worker processes.")


@click.group(cls=screens.Group, invoke_without_command=True)
@click.version_option(package_name="fdpass")
@click.pass_context
def command(ctx: click.Context) -> int:
    """Shows with real connections how k worker processes share one port, and what each way loses when workers die.

    Without a command: a demonstration of all scenarios, in less than a minute.

    \b
    A verdict about your own server, while it runs (a port, HOST:PORT or URL):
      fdpass-bench balance --target 8000

    \b
    Examples:
      fdpass-bench
      fdpass-bench balance --strategies shared,reuseport --scenario kill
      fdpass-bench serve 127.0.0.1:8000 --workers 4
      fdpass-bench report before.json after.json
      fdpass-bench who 8000

    \b
    Completion, for the shell's start-up file (zsh: zsh_source):
      eval "$(_FDPASS_BENCH_COMPLETE=bash_source fdpass-bench)"
      _FDPASS_BENCH_COMPLETE=fish_source fdpass-bench | source
    """
    if ctx.invoked_subcommand is not None:
        return 0
    from fdpass_bench.campaign import Campaign
    from fdpass_bench.strategy import Strategy

    return _measure(Campaign(_plans([Strategy.parse(text) for text in _DEMONSTRATION], _FIRST, 4, None, 10.0, None)), None)


@command.command(cls=screens.Command, short_help="Measure how strategies share connections out, and what they lose.")
@click.option(
    "--strategies",
    metavar="LIST",
    callback=_strategies,
    shell_complete=screens.listed(_every_strategy),
    default=",".join(_DEMONSTRATION),
    help="Separated by commas, see above.  [default: shared,reuseport,reuseport-bare; steady: shared,reuseport]",
)
@_workers
@click.option(
    "--scenario",
    type=click.Choice([*_SCENARIOS, "all"]),
    default=None,
    help="[default: idle, burst and kill; the scenario of an option that belongs to one]",
)
@click.option(
    "--connections",
    type=click.IntRange(1, 1_000_000),
    default=None,
    help="In each run; long-lived: open at a time.  [default: 60 idle, 400 burst, 200 kill, 1000 long-lived, 4000 steady or those of 6 s]",
)
@_json
@_html
@click.option(
    "--service-ms",
    type=_Number(0, 10000),
    default=None,
    help="Milliseconds a worker holds each connection; steady, stall: on average.  "
    "[default: 0 idle, 1 burst, 2 rolling and scale-out, 4 stall and steady, in kill a queue of 2.5 s]",
)
@click.option(
    "--time-limit",
    type=_Number(1, 600),
    default=None,
    help="Seconds for the connections of one run; steady: for each request.  [default: 30, rolling 120, steady 10]",
)
@click.option("--bursts", type=click.IntRange(1, 1000), default=None, help="burst: so many, one after the other.  [default: 1]")
@click.option("--rolls", type=click.IntRange(1, 1000), default=None, help="rolling: how often all workers are replaced.  [default: 5]")
@click.option(
    "--credits", type=click.IntRange(1, 128), default=None, help="dispatch: connections that a worker may get ahead.  [default: 1]"
)
@click.option("--rate", type=_Number(0.1, 1_000_000), default=None, help="steady: connections per second.")
@click.option(
    "--load",
    type=_Number(0.01, 0.99),
    default=None,
    help="steady: the rate as a share of what the workers can do.  [default: 0.7]",
)
@click.option(
    "--clients",
    type=click.IntRange(1, 10000),
    default=None,
    help="rolling, scale-out: of the closed loop; steady: a closed loop instead of a rate.  [default: 24 rolling, 8 x workers scale-out]",
)
@click.option("--arrivals", type=click.Choice(["poisson", "uniform"]), default=None, help="steady: their spacing.  [default: poisson]")
@click.option("--distribution", type=click.Choice(["exponential", "fixed", "hyper"]), default=None, help="steady: of the service times.")
@click.option(
    "--work", "kind", type=click.Choice(["sleep", "burn"]), default=None, help="steady: how a worker is occupied.  [default: sleep]"
)
@click.option("--requests-per-connection", "requests", type=click.IntRange(1, 10000), default=None, help="steady: over 1 is keep-alive.")
@click.option("--think-ms", type=_Number(0, 60000), default=None, help="steady: between an answer and the connection's next request.")
@click.option("--seed", type=click.IntRange(0, 2**31), default=None, help="The same seed is the same work.  [default: 1]")
@click.option("--repeats", type=click.IntRange(1, 1000), default=None, help="steady: runs of each server, in ABBA order.  [default: 2]")
@click.option(
    "--target",
    "targets",
    metavar="ADDRESS",
    multiple=True,
    callback=_targets,
    help="A server that runs already: PORT, HOST:PORT or URL.  [its rate: half of what one client gets, 100 at most]",
)
@click.option(
    "--peer",
    "peers",
    metavar="LIST",
    multiple=True,
    callback=_peers,
    shell_complete=screens.listed(_every_peer),
    help="steady: start nginx, uvicorn, node ... and compare.",
)
@click.pass_context
def balance(
    ctx: click.Context,
    /,
    strategies: list[Strategy],
    workers: int,
    scenario: str | None,
    connections: int | None,
    json_file: str | None,
    html_file: str | None,
    service_ms: float | None,
    time_limit: float | None,
    bursts: int | None,
    rolls: int | None,
    credits: int | None,
    clients: int | None,
    seed: int | None,
    targets: list[Target],
    peers: list[str],
    **steady: Any,
) -> int:
    """Measures how each strategy shares connections out, what it loses, and what waiting it costs.

    \b
    idle        spaced connections, each after the former has ended, to idle
                workers
    burst       many connections at once
    kill        connections wait in the queue while a worker is killed every
                half second and restarted
    stall       one worker is frozen for a second at half load
    rolling     all workers are replaced by group.roll() under a closed loop
    long-lived  so many connections open, closed and opened at random
    scale-out   a saturating closed loop on 1, 2, 4 ... workers
    steady      an open loop: connections arrive at a rate whatever the server
                does, each with its own service time; queueing theory beside it

    \b
    Strategies, with what may stand behind a colon:
      shared          rotate, first, least-loaded: a loop on the listener;
                      asyncio, uvloop, uvicorn, uvicorn-uvloop: fdpass's event
                      loops under these, and each with -stock: their own
      dispatch        round-robin, least-loaded
      reuseport       reuseport-bare       auto

    The exit status is 1 when a run could not be measured properly.

    \b
    Examples:
      fdpass-bench balance --strategies shared,shared:first --scenario idle
      fdpass-bench balance --scenario steady --load 0.8 --peer gunicorn
      fdpass-bench balance --target http://127.0.0.1:8000/health
    """

    def given(name: str) -> bool:
        return ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE

    bound = dict.fromkeys((*steady, "targets", "peers"), ("steady",)) | _BELONGS
    of = {param.opts[0]: bound[param.name] for param in ctx.command.params if param.name in bound and param.name and given(param.name)}
    scenarios = _chosen(scenario, of)
    steadily = "steady" in scenarios
    scenarios = [name for name in scenarios if name != "steady"]
    if connections is not None and scenario != "all":
        if (name := next((name for name in scenarios if name in _LOADED), None)) is not None:
            raise click.UsageError(f"--connections has no meaning in {name}, which makes as many as its rate or its clients do")
        # A burst is one of several; a steady run has room for more.
        most = _MOST_CLIENTS // (bursts or 1) if scenarios else 1_000_000
        if connections > most:
            raise click.BadParameter(f"{scenarios[0]} makes at most {most} connections", ctx, param_hint="--connections")
    if credits is not None and not any(strategy.name == "dispatch" for strategy in strategies):
        raise click.UsageError("--credits belongs to the strategy dispatch, which is not among --strategies")
    from fdpass_bench.campaign import Campaign, Steady

    service = None if service_ms is None else service_ms / 1000
    more = {"bursts": bursts or 1, "rolls": rolls or 5, "clients": clients, "credits": credits, "seed": 1 if seed is None else seed}
    plans = _plans(strategies, scenarios, workers, connections, time_limit, service, **more)
    loops: list[Steady] = []
    if steadily:
        if not given("strategies"):
            # A target is somebody's own question; peers are compared with us.
            strategies = [] if targets and not peers else strategies[:2]
        work = _work(workers, connections, service, time_limit, bool(targets), clients=clients, seed=seed, **steady)
        servers = _servers(work, strategies, credits, peers, targets)
    if service_ms == 0 and "stall" in scenarios:
        raise click.UsageError("with --service-ms 0 there is no half load for stall to be at")
    if service_ms is not None and scenarios == ["long-lived"]:
        raise click.UsageError("--service-ms has no meaning in long-lived, whose connections stay until they are closed")
    _refuse_unwritable(json_file, html_file)
    if steadily:
        if targets:
            work, servers = _looked_at(work, servers, not clients and steady["rate"] is None, connections)
        loops.append(Steady(work, servers))
    return _measure(Campaign(plans, loops), json_file, html_file)


def _chosen(scenario: str | None, of: dict[str, tuple[str, ...]]) -> list[str]:
    """The scenarios to play: those asked for, else those of the options given, each with where it belongs. Raises UsageError."""
    if scenario == "all":
        return list(_SCENARIOS)
    if scenario is not None:
        for option, where in of.items():
            if scenario not in where:
                raise click.UsageError(f"{option} belongs to --scenario {' or '.join(where)}")
        return [scenario]
    if not of:
        return list(_FIRST)
    common = [name for name in _SCENARIOS if all(name in where for where in of.values())]
    if not common:
        raise click.UsageError(f"{', '.join(of)} belong to no scenario together")
    return ["steady"] if "steady" in common else common[:1]


def _port(ctx: click.Context, param: click.Parameter, text: str) -> int:
    """Of an address only the port: who looks at every address that it is bound to."""
    name = text.rpartition(":")[2]
    if not (name.isascii() and name.isdigit() and 1 <= int(name) <= 65535):
        raise click.BadParameter(f"{text!r} is no port: a number from 1 to 65535", ctx, param)
    return int(name)


def _of(kind: str, allowed: Sequence[str]) -> Callable[[click.Context, click.Parameter, Sequence[str]], list[str]]:
    """A callback for an option that may come several times, each with several values between commas."""

    def parse(ctx: click.Context, param: click.Parameter, texts: Sequence[str]) -> list[str]:
        names = list(dict.fromkeys(name.strip() for text in texts for name in text.split(",")))
        for name in names:
            if name not in allowed:
                raise click.BadParameter(f"there is no {kind} {name!r}; there are {', '.join(allowed)}", ctx, param)
        return names

    return parse


@command.command("pass", cls=screens.Command, short_help="Measure what passing a descriptor costs.")
@click.option(
    "--what",
    metavar="LIST",
    multiple=True,
    callback=_of("comparison", _PRICES),
    shell_complete=screens.listed(lambda: _PRICES),
    help=f"Of {', '.join(_PRICES)}.  [default: all]",
)
@click.option(
    "--start-method",
    "methods",
    metavar="LIST",
    multiple=True,
    callback=_of("start method", multiprocessing.get_all_start_methods()),
    shell_complete=screens.listed(multiprocessing.get_all_start_methods),
    help=f"starts: of {', '.join(multiprocessing.get_all_start_methods())}.  [default: all]",
)
@click.option("--sender", type=click.Choice(["idle", "busy", "both"]), default=None, help="carriers: what it does.  [default: both]")
@click.option("--count", type=screens.Whole(1, 10000), default=None, help="Operations of each side in a round.  [default: by comparison]")
@click.option("--repeats", type=screens.Whole(1, 1000), default=6, show_default=True, help="Rounds, in ABBA order.")
@click.option(
    "--tickets",
    type=screens.Whole(0, 10_000_000),
    default=None,
    help="outstanding: made and claimed, to see what grows.  [default: 100000]",
)
@_json
@_html
@click.pass_context
def pass_(
    ctx: click.Context,
    /,
    what: list[str],
    methods: list[str],
    sender: str | None,
    count: int | None,
    repeats: int,
    tickets: int | None,
    json_file: str | None,
    html_file: str | None,
) -> int:
    """Measures what passing a descriptor costs, with fdpass, the standard library and C in turns.

    \b
    carriers     a socket by ticket, queue, connection and channel, from a
                 sender that idles and from one that computes in Python
    starts       a socket as argument of a process, by start method
    descriptors  one message with 1 to 1000 descriptors
    outstanding  a claim while 1 to 10000 tickets are unclaimed; many tickets
                 made and claimed, and made and never claimed
    receivers    1 to 8 that claim from one owner at once

    The exit status is 1 when something could not be measured.

    \b
    Examples:
      fdpass-bench pass
      fdpass-bench pass --what carriers --sender busy --repeats 20
      fdpass-bench pass --what starts --start-method spawn --json spawn.json
    """
    for name, value, where in (("start-method", methods, "starts"), ("sender", sender, "carriers"), ("tickets", tickets, "outstanding")):
        if value not in (None, []) and what and where not in what:
            raise click.UsageError(f"--{name} belongs to --what {where}")
    from fdpass_bench.price import Plan as PricePlan

    senders = ["idle", "busy"] if sender in (None, "both") else [str(sender)]
    _refuse_unwritable(json_file, html_file)
    plan = PricePlan(what or list(_PRICES), methods, senders, count, repeats, 100_000 if tickets is None else tickets)
    return _price(plan, json_file, html_file)


@command.command(cls=screens.Command, short_help="Show and compare files that --json wrote.")
@click.argument("files", metavar="A.json [B.json ...]", nargs=-1, required=True, type=click.Path())
@_html
@click.option("--csv", "csv_file", type=click.Path(dir_okay=False, allow_dash=True), help="One line for each run; - is standard output.")
@click.option("--markdown", "markdown_file", type=click.Path(dir_okay=False, allow_dash=True), help="For an issue; - is standard output.")
def report(files: Sequence[str], html_file: str | None, csv_file: str | None, markdown_file: str | None) -> int:
    """Shows what a JSON file of balance or pass says; with several files, what changed since the first, and whether it got worse.

    \b
    worse, better  surer than 95 % for all that is judged together
    not judged     figures without an interval

    The exit status is 1 when a run is INVALID or something got worse, 2 when a file is not what it should be.

    \b
    Examples:
      fdpass-bench report steady.json --html steady.html
      fdpass-bench report before.json after.json
      fdpass-bench report before.json after.json --markdown - >> issue.md
    """
    from fdpass_bench import publish

    try:
        return publish.report(files, html_file, csv_file, markdown_file)
    except publish.PublishError as error:
        raise click.UsageError(str(error)) from error


@command.command(cls=screens.Command, short_help="Answer HTTP requests with the worker's index.")
@click.argument("address", default="127.0.0.1:8000")
@_workers
@click.option(
    "--strategy",
    metavar="NAME",
    callback=_strategy,
    shell_complete=screens.listed(_every_strategy),
    default="shared",
    show_default=True,
    help="NAME or NAME:ORDER.",
)
def serve(address: str, workers: int, strategy: Strategy) -> int:
    """Answers each HTTP request with its worker's index, until Ctrl-C or SIGTERM.

    ADDRESS is a port, host:port, [::1]:port or, under shared, unix:/path.

    \b
    Example:
      fdpass-bench serve 127.0.0.1:8000 --workers 4 --strategy reuseport
      curl http://127.0.0.1:8000/
    """
    from fdpass_bench import serve as serving

    with _interruptible():
        try:
            return serving.serve(f"127.0.0.1:{address}" if address.isdigit() else address, workers, strategy)
        except ValueError as error:
            raise click.UsageError(str(error)) from error


@command.command(cls=screens.Command, short_help="Try what this machine allows.")
def doctor() -> int:
    """Tries what this machine allows and says what to do about each lack.

    The exit status is 1 when something is missing that fdpass cannot do without.

    \b
    Example:
      fdpass-bench doctor
    """
    from fdpass_bench import doctor as examination

    return examination.show()


@command.command(cls=screens.Command, short_help="Show who listens on a port, and the queues.")
@click.argument("port", callback=_port)
def who(port: int) -> int:
    """Shows which processes hold the listening sockets of a TCP port, how they share it, and the queue and limit of each socket.

    \b
    waits     a thread sleeps until a connection comes
    busy      its epoll has the socket, but no thread was waiting there
    holds it  it has the socket open, and does nothing about it

    A black hole, a socket that nobody accepts from, is warned of: no holder was seen waiting for a second, or its queue stood while others
    emptied. It is told from the processes' epolls and from where their threads sleep.

    The exit status is 1 when nothing listens there, or a socket is a black hole.

    \b
    Example:
      fdpass-bench who 8000
    """
    from fdpass_bench import who as holders

    return holders.show(port)


def _plans(
    strategies: Sequence[Strategy],
    scenarios: Sequence[str],
    workers: int,
    connections: int | None,
    time_limit: float | None,
    service: float | None,
    **more: Any,
) -> list[Plan]:
    from fdpass_bench.runs import SCENARIOS, Plan

    return [
        Plan(
            strategy,
            scenario,
            workers,
            # 0: what its rate or its clients make.
            SCENARIOS[scenario] and (connections or SCENARIOS[scenario]),
            time_limit or (120.0 if scenario == "rolling" else 30.0),
            service,
            **more,
        )
        for scenario in scenarios
        for strategy in strategies
    ]


def _servers(
    work: Work, strategies: Sequence[Strategy], credits: int | None, peers: Sequence[str], targets: Sequence[Target]
) -> list[Server]:
    from fdpass_bench.peers import PeerError
    from fdpass_bench.steady import Group, PeerServer, TargetServer

    try:
        found = [PeerServer.find(name, work) for name in peers]
    except PeerError as error:
        raise click.ClickException(str(error)) from error
    for target in targets:
        try:
            work.load_of(TargetServer(target).serving, 0)
        except ValueError as error:
            raise click.UsageError(f"--target {target.text}: {error}") from error
    return [*(Group(strategy, credits) for strategy in strategies), *found, *map(TargetServer, targets)]


def _work(
    workers: int,
    connections: int | None,
    service: float | None,
    time_limit: float | None,
    targets: bool,
    *,
    rate: float | None,
    load: float | None,
    clients: int | None,
    arrivals: str | None,
    distribution: str | None,
    kind: str | None,
    requests: int | None,
    think_ms: float | None,
    seed: int | None,
    repeats: int | None,
) -> Work:
    from fdpass_bench.steady import Work

    asked = [name for name, value in (("--rate", rate), ("--load", load), ("--clients", clients)) if value is not None]
    if len(asked) > 1:
        raise click.UsageError(f"{' and '.join(asked)} exclude each other")
    if targets and load:
        raise click.UsageError("--load has no meaning for a --target, of which nobody knows what it can do: give --rate or --clients")
    if clients and arrivals:
        raise click.UsageError("--arrivals has no meaning in the closed loop of --clients")
    if think_ms is not None and (requests or 1) == 1:
        raise click.UsageError("--think-ms needs --requests-per-connection over 1")
    service = (0.0 if targets else 0.004) if service is None else service
    requests = requests or 1
    if not rate and not clients and targets:
        rate = 1.0  # until it is known how fast it answers
    if not rate and not clients:
        if not service:
            raise click.UsageError("with --service-ms 0 a load has no rate: give --rate")
        rate = (load or 0.7) * workers / (service * requests)
    # So that the defaults end within a minute; a closed loop goes as fast as its workers do.
    expected = rate or (workers / (service * requests) if service else math.inf)
    connections = connections or _enough(expected, targets)
    if connections * requests > _MOST_REQUESTS:
        raise click.UsageError(f"{connections} connections of {requests} requests are more than the {_MOST_REQUESTS} that a run can hold")
    return Work(
        workers=workers,
        connections=connections,
        rate=rate,
        service=service,
        distribution=distribution or "exponential",
        work=kind or "sleep",
        arrivals=arrivals or "poisson",
        clients=clients or 0,
        requests=requests,
        think=(think_ms or 0.0) / 1000,
        seed=1 if seed is None else seed,
        repeats=repeats or 2,
        time_limit=time_limit or 10.0,
    )


def _enough(rate: float, targets: bool) -> int:
    """The connections of six seconds, in bounds; of a target that gets few a second, fewer still."""
    return int(max(20 if targets else 100, min(100, 20 * rate), min(4000, 6 * rate)))


def _looked_at(work: Work, servers: Sequence[Server], chosen: bool, connections: int | None) -> tuple[Work, list[Server]]:
    """With what was seen of each target. `chosen`: the rate follows from it, for nobody gave one."""
    from dataclasses import replace

    from fdpass_bench import target
    from fdpass_bench.steady import TargetServer

    try:
        found: list[Server] = [
            replace(one, seen=target.look(one.target, work.time_limit)) if isinstance(one, TargetServer) else one for one in servers
        ]
    except target.TargetError as error:
        raise click.ClickException(f"{error}.") from error
    seen = [one.seen for one in found if isinstance(one, TargetServer) and one.seen is not None]
    if chosen:
        rate = min(one.modest_rate for one in seen)
        work = replace(work, rate=rate, connections=connections or _enough(rate, True))
        slowest = max(one.mean for one in seen) * 1000
        seconds = work.repeats * work.connections / rate
        print(
            f"fdpass-bench: an answer takes {slowest:.3g} ms; {rate:g} connections/s for {seconds:.0f} s now (--rate sets another).",
            file=sys.stderr,
        )
    return work, found


def _measure(campaign: Campaign, json_file: str | None, html_file: str | None = None) -> int:
    from fdpass_bench import report

    began = time.time()
    interrupted = 0
    with _interruptible() as signals:
        try:
            with report.ProgressBar(campaign.counts) as progress:
                campaign.measure(progress)
            signals.noted_only = True
        except KeyboardInterrupt:
            interrupted = signals.seen[0] if signals.seen else signal.SIGINT
        studies = campaign.studies
        report.show(campaign.runs, studies, sys.stderr if "-" in (json_file, html_file) else sys.stdout)
        _write(json_file, html_file, report.as_json(campaign.runs, studies, began, bool(interrupted)))
        interrupted = interrupted or (signals.seen[0] if signals.seen else 0)
        if interrupted:
            print(f"fdpass-bench: interrupted; {campaign.over} of {len(campaign.counts)} runs were measured.", file=sys.stderr)
            return 128 + interrupted
    return 0 if all(run.valid for run in campaign.runs) and all(study.valid for study in studies) else 1


def _price(plan: PricePlan, json_file: str | None, html_file: str | None) -> int:
    from fdpass_bench import price, report

    began = time.time()
    found = price.Found(plan)
    counts = [plan.repeats] * len(price.comparisons(plan))
    interrupted = 0
    with _interruptible() as signals:
        try:
            with report.ProgressBar(counts) as progress:
                price.measure(found, progress.follow, progress.over)
            signals.noted_only = True
        except KeyboardInterrupt:
            interrupted = signals.seen[0] if signals.seen else signal.SIGINT
        report.show_prices(found, sys.stderr if "-" in (json_file, html_file) else sys.stdout)
        _write(json_file, html_file, report.prices_as_json(found, began, bool(interrupted)))
        interrupted = interrupted or (signals.seen[0] if signals.seen else 0)
        if interrupted:
            print(f"fdpass-bench: interrupted; {found.over} of {len(counts)} comparisons were measured.", file=sys.stderr)
            return 128 + interrupted
    return 0 if found.complete else 1


def _refuse_unwritable(json_file: str | None, html_file: str | None = None) -> None:
    """An answer that cannot be written is found out before the minute of measuring."""
    from fdpass_bench import publish

    try:
        publish.refuse_unwritable(json_file, html_file)
    except publish.PublishError as error:
        raise click.UsageError(str(error)) from error


def _write(json_file: str | None, html_file: str | None, found: dict[str, Any]) -> None:
    from fdpass_bench import publish

    try:
        publish.write_json(json_file, found)
        publish.write_page(html_file, found, json_file)
    except publish.PublishError as error:
        raise click.ClickException(str(error)) from error


class _Signals:
    """The signals that came. noted_only: they raise nothing from now on."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.noted_only = False


@contextlib.contextmanager
def _interruptible() -> Iterator[_Signals]:
    """The first SIGINT or SIGTERM raises KeyboardInterrupt and is noted; later ones wait until the cleaning-up is over."""
    signals = _Signals()

    def interrupt(signum: int, frame: FrameType | None) -> None:
        signals.seen.append(signum)
        if not signals.noted_only:
            signals.noted_only = True
            raise KeyboardInterrupt

    # A signal that whoever started this had ignored (nohup, a background job) stays ignored.
    taken = [signum for signum in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(signum) is not signal.SIG_IGN]
    before = [signal.signal(signum, interrupt) for signum in taken]
    try:
        yield signals
    finally:
        for signum, handler in zip(taken, before, strict=True):
            signal.signal(signum, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 for what was found or could not be done, 2 for bad arguments, 130 after Ctrl-C."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for the rest of the process: it was started with a closed one
    try:
        status = command.main(args=None if arguments is None else list(arguments), prog_name="fdpass-bench", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        print(f"fdpass-bench: {error.format_message()}", file=sys.stderr)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 128 + signal.SIGINT
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        # Only standard output fails so: all else that is written is dealt with where it is. Its buffer would fail again at the end.
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())
        if error.errno != errno.EPIPE:  # who reads no more needs no word
            print(f"fdpass-bench: cannot write standard output: {error.strerror}", file=sys.stderr)
        return 1
    return int(status or 0)
