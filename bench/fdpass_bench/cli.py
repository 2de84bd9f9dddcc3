"""The command line: arguments in, exit status out. It neither measures nor knows how a figure is come by."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import math
import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from fdpass_bench import scenarios, screens

# The rest of the package is imported by the command that needs it: a spawned worker imports this file again.
if TYPE_CHECKING:
    from fdpass_bench.campaign import Campaign, Result, Steady, Step
    from fdpass_bench.checkpoint import Checkpoint
    from fdpass_bench.price import Plan as PricePlan
    from fdpass_bench.runs import Plan
    from fdpass_bench.servers import Group, PeerServer, Server, Wanted
    from fdpass_bench.steady import Work
    from fdpass_bench.strategy import Strategy
    from fdpass_bench.target import Target

_MOST_REQUESTS = 5_000_000  # of one run: 80 bytes each, in memory
_PRICES = ("carriers", "starts", "descriptors", "outstanding", "receivers")
_DEMONSTRATION = ("shared", "reuseport", "reuseport-bare")
_MOST_CLIENTS = 20000  # connections of a run that are followed one by one
_MOST_TOGETHER = 100  # numbers of workers, loads and rates, each with each, in one command
_ARRIVAL = 0.02  # seconds between two of a few clients


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


class _Several(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click
    """Numbers between commas, each by itself or as from:to:step with both ends. Converts to a list without repetitions."""

    name = "list"

    def __init__(self, low: float, high: float, example: str, whole: bool = False) -> None:
        self._low, self._high, self._example, self._kind = low, high, example, int if whole else float

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        if isinstance(value, list):
            return value
        try:
            found = list(dict.fromkeys(number for part in str(value).split(",") for number in self._of(part)))
        except (ArithmeticError, ValueError):
            found = []
        if not found or len(found) > _MOST_TOGETHER or not all(self._low <= number <= self._high for number in found):
            form = f"numbers from {self._low:g} to {self._high:g}, {_MOST_TOGETHER} at most, such as {self._example}"
            self.fail(f"{value!r} is not what it takes: {form}", param, ctx)
        return found

    def _of(self, part: str) -> Iterator[float]:
        # In decimal, so that 0.3 and three times 0.1 are the same number as written.
        first, *more = (Decimal(text.strip()) for text in part.split(":"))
        last, step = more or (first, Decimal(1))
        if not all(number.is_finite() for number in (first, last, step)) or step <= 0 or (last - first) / step > _MOST_TOGETHER:
            raise ValueError(part)
        while first <= last:
            number = self._kind(first)
            if number != first and self._kind is int:
                raise ValueError(part)
            yield number
            first += step


def _list_scenarios(ctx: click.Context, param: click.Parameter, given: bool) -> None:
    if given and not ctx.resilient_parsing:
        for line in scenarios.listed(min(80, ctx.make_formatter().width)):
            click.echo(line)
        ctx.exit()


_json = click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, allow_dash=True), help="Write the figures to it; - is standard output."
)
_html = click.option("--html", "html_file", type=click.Path(dir_okay=False, allow_dash=True), help="Write one self-contained page to it.")
_WORKERS = (1, 64)
_workers = click.option("--workers", type=screens.Whole(*_WORKERS), default=4, show_default=True, help="How many worker processes.")


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
    from fdpass_bench.servers import Group
    from fdpass_bench.strategy import Strategy

    return _measure(Campaign(_plans([Group(Strategy.parse(text)) for text in _DEMONSTRATION], scenarios.FIRST, 4, None, 10.0, None)), None)


@command.command(cls=screens.Command, short_help="Measure how strategies share connections out, and what they lose.")
@click.option(
    "--strategies",
    metavar="LIST",
    callback=_strategies,
    shell_complete=screens.listed(_every_strategy),
    default=",".join(_DEMONSTRATION),
    help="Separated by commas, see above.  [default: shared,reuseport,reuseport-bare; of a loop the first two, or those of its paragraph]",
)
@click.option(
    "--workers",
    metavar="LIST",
    type=_Several(*_WORKERS, example="4, 1,2,4,8 or 2:8:2", whole=True),
    default="4",
    show_default=True,
    help="How many worker processes; of several numbers each.",
)
@click.option(
    "--scenario",
    type=click.Choice([*scenarios.CATALOGUE, "all"]),
    default=None,
    help="[default: idle, burst and kill; the scenario of an option that belongs to one]",
)
@click.option(
    "--list", is_flag=True, is_eager=True, expose_value=False, callback=_list_scenarios, help="Say of each scenario what it does and shows."
)
@click.option(
    "--connections",
    type=click.IntRange(1, 1_000_000),
    default=None,
    help="In each run; long-lived: open at a time.  [default: 60 idle, 400 burst, 200 kill, 1000 long-lived, loops 4000 or those of 6 s]",
)
@_json
@_html
@click.option("--resume", metavar="FILE", type=click.Path(), help="long runs: alone, go on with an interrupted one, by its --json FILE.")
@click.option(
    "--service-ms",
    type=_Number(0, 10000),
    default=None,
    help="Milliseconds a worker holds each connection; stall, of a loop: on average.  "
    "[default: 0 idle, 1 burst, 2 rolling and scale-out, 4 stall and of a loop, in kill a queue of 2.5 s]",
)
@click.option(
    "--time-limit",
    type=_Number(1, 600),
    default=None,
    help="Seconds for the connections of one run; of a loop for each request.  [default: 30, rolling 120, of a loop 10]",
)
@click.option("--bursts", type=click.IntRange(1, 1000), default=None, help="burst: so many, one after the other.  [default: 1]")
@click.option("--rolls", type=click.IntRange(1, 1000), default=None, help="rolling: how often all workers are replaced.  [default: 5]")
@click.option(
    "--credits", type=click.IntRange(1, 128), default=None, help="dispatch: connections that a worker may get ahead.  [default: 1]"
)
@click.option(
    "--rate",
    metavar="LIST",
    type=_Several(0.1, 1_000_000, example="200, 100,200 or 100:500:100"),
    default=None,
    help="loops: connections per second; of several each.",
)
@click.option(
    "--load",
    metavar="LIST",
    type=_Several(0.01, 0.99, example="0.7, 0.5,0.8 or 0.3:0.9:0.1"),
    default=None,
    help="loops: the rate as a share of what the workers can do; of several each; few-clients: by their pauses.  "
    "[default: 0.7, few-clients 0.5]  [0.01<=x<=0.99]",
)
@click.option(
    "--clients",
    type=click.IntRange(1, 10000),
    default=None,
    help="rolling, scale-out: of the closed loop; loops: a closed loop instead of a rate.  "
    "[default: 24 rolling, 8 x workers scale-out, 16 few-clients]",
)
@click.option("--arrivals", type=click.Choice(["poisson", "uniform"]), default=None, help="loops: their spacing.  [default: poisson]")
@click.option(
    "--distribution",
    type=click.Choice(["exponential", "fixed", "hyper"]),
    default=None,
    help="loops: of the service times.  [default: exponential, heavy-tail hyper]",
)
@click.option(
    "--work", "kind", type=click.Choice(["sleep", "burn"]), default=None, help="loops: how a worker is occupied.  [default: sleep]"
)
@click.option(
    "--requests-per-connection",
    "requests",
    type=click.IntRange(1, 10000),
    default=None,
    help="loops: over 1 is keep-alive.  [default: 1, keep-alive 8, few-clients 60]",
)
@click.option(
    "--think-ms",
    type=_Number(0, 60000),
    default=None,
    help="loops: between an answer and the connection's next request.  [default: 0, keep-alive 20]",
)
@click.option("--seed", type=click.IntRange(0, 2**31), default=None, help="The same seed is the same work.  [default: 1]")
@click.option(
    "--repeats",
    type=click.IntRange(1, 1000),
    default=None,
    help="loops, matrix: runs of each server, in ABBA order.  [default: 2, few-clients 6]",
)
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
    help="Start nginx, uvicorn, node ... and compare.",
)
@click.pass_context
def balance(
    ctx: click.Context,
    /,
    strategies: list[Strategy],
    workers: list[int],
    scenario: str | None,
    connections: int | None,
    json_file: str | None,
    html_file: str | None,
    resume: str | None,
    service_ms: float | None,
    time_limit: float | None,
    bursts: int | None,
    rolls: int | None,
    credits: int | None,
    clients: int | None,
    seed: int | None,
    targets: list[Target],
    peers: list[str],
    rate: list[float] | None,
    load: list[float] | None,
    repeats: int | None,
    **loop: Any,
) -> int:
    """Measures how each strategy shares connections out, what it loses, and what waiting it costs.

    \b
    Scenarios; --list says of each what it does and shows:
      idle burst kill stall rolling long-lived scale-out
      steady heavy-tail few-clients keep-alive   loops: a load, latencies, theory
      matrix                                     published rankings, in 8 minutes

    Several loads, rates or numbers of workers (0.5,0.8 or 0.3:0.9:0.1) are measured each by itself.

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
      fdpass-bench balance --scenario heavy-tail --load 0.3:0.9:0.1
      fdpass-bench balance --target http://127.0.0.1:8000/health
    """
    if resume is not None:
        return _resume(ctx, resume)

    def given(name: str) -> bool:
        return ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE

    bound = scenarios.belonging()
    of = {param.opts[0]: bound[param.name] for param in ctx.command.params if param.name in bound and param.name and given(param.name)}
    words = _chosen(scenario, of)
    singles = [word for word in words if word in scenarios.SINGLES]
    if connections is not None and scenario != "all":
        if (name := next((name for name in singles if not scenarios.CATALOGUE[name].connections), None)) is not None:
            raise click.UsageError(f"--connections has no meaning in {name}, which makes as many as its rate or its clients do")
        # A burst is one of several; a loop has room for more.
        most = _MOST_CLIENTS // (bursts or 1) if singles else 1_000_000
        if connections > most:
            raise click.BadParameter(f"{singles[0]} makes at most {most} connections", ctx, param_hint="--connections")
    if credits is not None and not any(strategy.name == "dispatch" for strategy in strategies):
        raise click.UsageError("--credits belongs to the strategy dispatch, which is not among --strategies")
    if (together := len(workers) * len(load or [1]) * len(rate or [1])) > _MOST_TOGETHER:
        raise click.UsageError(f"--workers, --load and --rate make {together} combinations: one command measures {_MOST_TOGETHER} at most")
    if targets and len(workers) > 1:
        raise click.UsageError("several --workers have no meaning with --target, whose workers are somebody else's")
    from fdpass_bench.campaign import Campaign, Steady

    service = None if service_ms is None else service_ms / 1000
    more = {"bursts": bursts or 1, "rolls": rolls or 5, "clients": clients, "seed": 1 if seed is None else seed}
    # What others do is compared with what we would have them do.
    ours = _contenders(strategies[:2] if peers and not given("strategies") else strategies, credits)
    everything = scenario == "all"
    plans = [
        plan
        for count in workers
        for plan in _plans(ours, singles, count, connections, time_limit, service, (peers, everything), **more)
    ]
    loops: list[Steady] = []
    asked = loop | {"clients": clients, "seed": seed, "repeats": repeats}
    for word in words:
        if word not in scenarios.LOOPS:
            continue
        mine = _own(word, strategies if given("strategies") else None, bool(targets) and not peers)
        loads, rates = ([*several] if several else [None] for several in (load, rate))
        for count, one_load, one_rate in itertools.product(workers, loads, rates):
            work = _work(word, count, connections, service, time_limit, bool(targets), load=one_load, rate=one_rate, **asked)
            loops.append(Steady(work, _servers(work, mine, credits, targets, (peers, everything))))
    if words == ["matrix"]:
        if service_ms is not None or len(workers) > 1:
            what = "--service-ms has" if service_ms is not None else "several --workers have"
            raise click.UsageError(f"{what} no meaning in matrix, whose four cases by three loads are what they are")
        from fdpass_bench import matrix

        # The contestants in the paper's order, whatever else takes part.
        mine = list(dict.fromkeys([*_own("matrix", None, False), *(strategies if given("strategies") else [])]))
        cells = matrix.works(workers[0], connections, repeats or 2, 1 if seed is None else seed, time_limit or 10.0)
        loops = [Steady(work, _servers(work, mine, credits)) for work in cells]
    if service_ms == 0 and "stall" in singles:
        raise click.UsageError("with --service-ms 0 there is no half load for stall to be at")
    if service_ms is not None and words == ["long-lived"]:
        raise click.UsageError("--service-ms has no meaning in long-lived, whose connections stay until they are closed")
    _refuse_unwritable(json_file, html_file)
    if targets:
        loops = _looked_at(loops, rate is None, connections)
    return _measure(Campaign(plans, loops), json_file, html_file)


def _own(word: str, given: list[Strategy] | None, others_only: bool) -> list[Strategy]:
    """The strategies of a loop: those given, else its own. A target is somebody's own question; peers are compared with us."""
    from fdpass_bench.strategy import Strategy

    if given is not None:
        return given
    own = scenarios.CATALOGUE[word].strategies
    return [] if others_only else [Strategy.parse(text) for text in (own.split(",") if own else _DEMONSTRATION[:2])]


def _chosen(scenario: str | None, of: dict[str, tuple[str, ...]]) -> list[str]:
    """The scenarios to play: those asked for, else those of the options given, each with where it belongs. Raises UsageError."""
    if scenario == "all":
        return list(scenarios.EVERY)
    if scenario is not None:
        for option, where in of.items():
            if scenario not in where:
                raise click.UsageError(f"{option} belongs to --scenario {', '.join(where[:-1]) + ' or ' if where[1:] else ''}{where[-1]}")
        return [scenario]
    if not of:
        return list(scenarios.FIRST)
    common = [name for name in scenarios.EVERY if all(name in where for where in of.values())]
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
    ours: Sequence[Server],
    words: Sequence[str],
    workers: int,
    connections: int | None,
    time_limit: float | None,
    service: float | None,
    peers: tuple[Sequence[str], bool] = ((), False),
    **more: Any,
) -> list[Plan]:
    from fdpass_bench.runs import Plan

    usual = {word: scenarios.CATALOGUE[word].connections for word in words}  # 0: what its rate or its clients make

    def plan_of(server: Server, word: str) -> Plan:
        return Plan(
            server,
            word,
            workers,
            usual[word] and (connections or usual[word]),
            time_limit or (120.0 if word == "rolling" else 30.0),
            service,
            **more,
        )

    plans = [[plan_of(server, word) for server in ours] for word in words]
    for here, word in zip(plans, words, strict=True):
        like = plan_of(ours[0], word)
        wanted = like.wanted("hold" if word == "long-lived" else "timed")
        here += [plan_of(peer, word) for peer in _peers_for(word, wanted, *peers)]
    return [plan for here in plans for plan in here]


def _contenders(strategies: Sequence[Strategy], credits: int | None) -> list[Group]:
    from fdpass_bench.servers import Group

    return [Group(strategy, credits) for strategy in strategies]


def _peers_for(word: str, wanted: Wanted, names: Sequence[str], where_able: bool) -> list[PeerServer]:
    """The peers of a scenario. One that cannot do it is the caller's mistake, unless it takes part `where_able`, which is said; one that is
    not installed is not."""
    if not names:
        return []
    from fdpass_bench.peers import PeerError, PeerUnable
    from fdpass_bench.servers import PeerServer

    found = []
    for name in names:
        try:
            found.append(PeerServer.find(name, wanted, rolls=word == "rolling"))
        except PeerUnable as error:
            if not where_able:
                raise click.UsageError(str(error)) from error
            print(f"fdpass-bench: {word} without {name}: {error}", file=sys.stderr)
        except PeerError as error:
            raise click.ClickException(str(error)) from error
    return found


def _servers(
    work: Work,
    strategies: Sequence[Strategy],
    credits: int | None,
    targets: Sequence[Target] = (),
    peers: tuple[Sequence[str], bool] = ((), False),
) -> list[Server]:
    from fdpass_bench.servers import TargetServer

    found = _peers_for(work.scenario, work.wanted, *peers)
    for target in targets:
        try:
            work.load_of(TargetServer(target).serving, 0)
        except ValueError as error:
            raise click.UsageError(f"--target {target.text}: {error}") from error
    return [*_contenders(strategies, credits), *found, *map(TargetServer, targets)]


def _work(
    word: str, workers: int, connections: int | None, service: float | None, time_limit: float | None, targets: bool, **asked: Any
) -> Work:
    """The work of a loop. asked: the options of loops, None where they were not given. Raises UsageError."""
    from fdpass_bench.steady import Work

    known = scenarios.CATALOGUE[word]
    # In `all` an option may be of another loop.
    asked = {name: value if name in known.options else None for name, value in asked.items()}
    found: dict[str, Any] = {name: known.defaults.get(name) if value is None else value for name, value in asked.items()}
    few = word == "few-clients"
    exclusive = ("load", "think_ms") if few else ("rate", "load", "clients")
    together = [_option(name) for name in exclusive if asked[name] is not None]
    if len(together) > 1:
        raise click.UsageError(f"{' and '.join(together)} exclude each other")
    clients = asked["clients"] or (max(found["clients"], 2 * workers) if few else 0)
    rate, requests, think = found["rate"], found["requests"] or 1, (found["think_ms"] or 0.0) / 1000
    if targets and asked["load"]:
        raise click.UsageError("--load has no meaning for a --target, of which nobody knows what it can do: give --rate or --clients")
    if clients and found["arrivals"]:
        raise click.UsageError("--arrivals has no meaning in the closed loop of --clients")
    if asked["think_ms"] is not None and requests == 1:
        raise click.UsageError("--think-ms needs --requests-per-connection over 1")
    service = (0.0 if targets else 0.004) if service is None else service
    if few and asked["think_ms"] is None:
        think = _pause(clients, workers, service, found["load"])
    if not rate and not clients and targets:
        rate = 1.0  # until it is known how fast it answers
    if not rate and not clients:
        if not service:
            raise click.UsageError("with --service-ms 0 a load has no rate: give --rate")
        rate = (found["load"] or 0.7) * workers / (service * requests)
    # So that the defaults end within a minute; a closed loop goes as fast as its workers do.
    expected = rate or (workers / (service * requests) if service else math.inf)
    connections = connections or (clients if few else _enough(expected, targets))
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
        time_limit=time_limit or 10.0,
        scenario=word,
        gap=_ARRIVAL if few and connections == clients else 0.0,
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


def _looked_at(loops: Sequence[Steady], chosen: bool, connections: int | None) -> list[Steady]:
    """With what was seen of each target. `chosen`: the rate follows from it, for nobody gave one."""
    from fdpass_bench import target
    from fdpass_bench.campaign import Steady
    from fdpass_bench.servers import TargetServer

    seen: dict[str, TargetServer] = {}
    try:
        for server in loops[0].servers:
            if isinstance(server, TargetServer):
                seen[server.name] = dataclasses.replace(server, seen=target.look(server.target, loops[0].work.time_limit))
    except target.TargetError as error:
        raise click.ClickException(f"{error}.") from error
    looks = [one.seen for one in seen.values() if one.seen is not None]
    found = []
    for loop in loops:
        work = loop.work
        if chosen and not work.clients:
            rate = min(one.modest_rate for one in looks)
            work = dataclasses.replace(work, rate=rate, connections=connections or _enough(rate, True))
            # What goes on from a checkpoint has to ask for the same.
            click.get_current_context().meta[screens.ARGUMENTS] += ["--rate", repr(rate), "--connections", str(work.connections)]
            slowest = max(one.mean for one in looks) * 1000
            seconds = work.repeats * work.connections / rate
            print(
                f"fdpass-bench: an answer takes {slowest:.3g} ms; {rate:g} connections/s for {seconds:.0f} s now (--rate sets another).",
                file=sys.stderr,
            )
        found.append(Steady(work, [seen.get(server.name, server) for server in loop.servers]))
    return found


def _measure(campaign: Campaign, json_file: str | None, html_file: str | None = None) -> int:
    from fdpass_bench import report
    from fdpass_bench.checkpoint import CheckpointError
    from fdpass_bench.progress import ProgressBar

    interrupted = 0
    with _interruptible() as signals, _checkpoint(campaign, json_file, html_file) as kept:

        def keep(step: Step, result: Result, seconds: float) -> None:
            try:
                if kept is not None:
                    kept.keep(step, result, seconds)
            except CheckpointError as error:
                print(f"fdpass-bench: {error}: what is measured from now on is lost if this is interrupted.", file=sys.stderr)

        began, before = time.time(), campaign.seconds
        try:
            with ProgressBar(campaign.ahead, campaign.over, before) as progress:
                campaign.measure(progress, keep)
            signals.noted_only = True
        except KeyboardInterrupt:
            interrupted = signals.seen[0] if signals.seen else signal.SIGINT
        studies = campaign.studies
        report.show(campaign.runs, studies, sys.stderr if "-" in (json_file, html_file) else sys.stdout)
        seconds = before + time.time() - began
        environment = report.environment(began, bool(interrupted), seconds)
        if kept is not None:
            environment = report.environment(kept.began, bool(interrupted), seconds, kept.resumed, kept.command)
        trouble = None
        try:
            if campaign.over:
                _write(json_file, html_file, report.as_json(campaign.runs, studies, environment))
            if kept is not None and (campaign.whole or not campaign.over):
                kept.remove()
        except (click.ClickException, CheckpointError) as error:
            trouble = str(error)
            print(f"fdpass-bench: {trouble}{_and_on(campaign, kept)}.", file=sys.stderr)
        interrupted = interrupted or (signals.seen[0] if signals.seen else 0)
        if interrupted:
            written = [] if trouble or not campaign.over else [file for file in (json_file, html_file) if file not in (None, "-")]
            where = f", see {' and '.join(map(str, written))}" if written else ""
            on = "" if trouble else _and_on(campaign, kept)
            over = f"{campaign.over} of {len(campaign.ahead)} runs were measured"
            print(f"fdpass-bench: interrupted; {over}{where}{on}.", file=sys.stderr)
            return 128 + interrupted
    return 0 if not trouble and all(run.valid for run in campaign.runs) and all(study.valid for study in studies) else 1


@contextlib.contextmanager
def _checkpoint(campaign: Campaign, json_file: str | None, html_file: str | None) -> Iterator[Checkpoint | None]:
    """That which --resume goes on from, or a new one beside the first file that will be written; None where there is none."""
    from fdpass_bench import report
    from fdpass_bench.checkpoint import Checkpoint, CheckpointError

    context = click.get_current_context()
    kept = context.find_object(Checkpoint)
    files = {"json_file": json_file, "html_file": html_file}
    try:
        if kept is not None:
            kept.restore(campaign)
        elif beside := next((option for option, file in files.items() if _is_a_file(file)), None):
            began = time.time()
            arguments = context.meta[screens.ARGUMENTS]
            kept = Checkpoint.begin(beside, files, campaign, arguments, began, report.environment(began, False))
    except CheckpointError as error:
        raise click.UsageError(str(error)) from error
    with kept or contextlib.nullcontext():
        yield kept


def _is_a_file(file: str | None) -> bool:
    """Or will be one: no device, no pipe, no standard output."""
    return file not in (None, "-") and (os.path.isfile(str(file)) or not os.path.lexists(str(file)))


def _and_on(campaign: Campaign, kept: Checkpoint | None) -> str:
    """How to go on: the end of a sentence about what was measured."""
    if kept is not None and os.path.exists(kept.path):
        what = "writes them" if campaign.whole else "goes on"
        return f"; fdpass-bench balance --resume {shlex.quote(kept.beside)} {what}"
    # Nobody misses the checkpoint of a command that was over within a minute.
    if kept is None and sum(seconds for _, seconds in campaign.ahead) > 60:
        return "; none is kept, as there would be a checkpoint with --json FILE"
    return ""


def _resume(ctx: click.Context, file: str) -> int:
    """The command that began the checkpoint, again, without what it has measured. Raises UsageError."""
    from fdpass_bench import report
    from fdpass_bench.checkpoint import Checkpoint, CheckpointError

    source = click.core.ParameterSource.COMMANDLINE
    given = [one for one in ctx.command.params if one.name and ctx.get_parameter_source(one.name) is source]
    others = [one.opts[0] for one in given if one.name != "resume"]
    if others:
        raise click.UsageError(f"--resume goes on as the command was begun, so it stands alone, without {', '.join(others)}")
    try:
        kept = Checkpoint.open(file, report.environment(time.time(), False))
    except CheckpointError as error:
        raise click.UsageError(str(error)) from error
    with kept, ctx.command.make_context(ctx.info_name, kept.arguments, parent=ctx.parent, obj=kept) as again:
        again.params |= kept.files
        status: int = ctx.command.invoke(again)
        return status


def _price(plan: PricePlan, json_file: str | None, html_file: str | None) -> int:
    from fdpass_bench import price, report
    from fdpass_bench.progress import ProgressBar

    began = time.time()
    found = price.Found(plan)
    interrupted = 0
    with _interruptible() as signals:
        try:
            with ProgressBar(plan.ahead, what="comparisons") as progress:
                price.measure(found, progress.follow, progress.over)
            signals.noted_only = True
        except KeyboardInterrupt:
            interrupted = signals.seen[0] if signals.seen else signal.SIGINT
        report.show_prices(found, sys.stderr if "-" in (json_file, html_file) else sys.stdout)
        _write(json_file, html_file, report.prices_as_json(found, began, bool(interrupted)))
        interrupted = interrupted or (signals.seen[0] if signals.seen else 0)
        if interrupted:
            print(f"fdpass-bench: interrupted; {found.over} of {len(plan.ahead)} comparisons were measured.", file=sys.stderr)
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
