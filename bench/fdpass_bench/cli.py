"""The command line: arguments in, exit status out. It neither measures nor knows how a figure is come by."""

from __future__ import annotations

import contextlib
import errno
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

from fdpass_bench import options, scenarios, screens

# The rest of the package is imported by the command that needs it: a spawned worker imports this file again.
if TYPE_CHECKING:
    from fdpass_bench.campaign import Campaign, Result, Step
    from fdpass_bench.checkpoint import Checkpoint
    from fdpass_bench.price import Plan as PricePlan
    from fdpass_bench.strategy import Strategy
    from fdpass_bench.target import Target

_PRICES = ("carriers", "starts", "descriptors", "outstanding", "receivers")


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
        if not found or len(found) > options.MOST_TOGETHER:
            form = f"numbers from {self._low:g} to {self._high:g}, {options.MOST_TOGETHER} at most, such as {self._example}"
            self.fail(f"{value!r} is not what it takes: {form}", param, ctx)
        return found

    def _of(self, part: str) -> Iterator[float]:
        # In decimal, so that 0.3 and three times 0.1 are the same number as written.
        first, *more = (Decimal(text.strip()) for text in part.split(":"))
        last, step = more or (first, Decimal(1))
        if not all(number.is_finite() for number in (first, last, step)) or step <= 0 or (last - first) / step > options.MOST_TOGETHER:
            raise ValueError(part)
        while first <= last:
            # Its size first: int() of a number with a billion digits would not come back.
            if not self._low <= float(first) <= self._high:
                raise ValueError(part)
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

    Without a command: a demonstration of idle, burst and kill, in less than a minute.

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
    return _measure(options.demonstration(), None)


@command.command(cls=screens.Command, short_help="Measure how strategies share connections out, and what they lose.")
@click.option(
    "--strategies",
    metavar="LIST",
    callback=_strategies,
    shell_complete=screens.listed(_every_strategy),
    default=",".join(options.DEMONSTRATION),
    help="Separated by commas; --help-all lists them.  [default: shared,reuseport,reuseport-bare; loops: the first two, or their own]",
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
def balance(ctx: click.Context, /, **params: Any) -> int:
    """Measures how each strategy shares connections out, what it loses, and what waiting it costs.

    \b
    Scenarios; --list says of each what it does and shows:
      idle burst kill stall rolling long-lived scale-out
      steady heavy-tail few-clients keep-alive   loops: a load, latencies, theory
      matrix                                     published rankings, in 7 minutes

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
    if params["resume"] is not None:
        return _resume(ctx, params["resume"])
    asked = options.Asked(**ctx.params, given=_given(ctx))
    campaign = options.campaign(asked)
    _refuse_unwritable(asked.json_file, asked.html_file)
    if asked.targets:
        campaign, more = options.with_targets(asked, campaign)
        # What goes on from a checkpoint has to ask for the same.
        ctx.meta[screens.ARGUMENTS] += more
    return _measure(campaign, asked.json_file, asked.html_file)


def _given(ctx: click.Context) -> dict[str, str]:
    """The options that stand on the command line: by parameter, as they are written."""
    source = click.core.ParameterSource.COMMANDLINE
    return {one.name: one.opts[0] for one in ctx.command.params if one.name and ctx.get_parameter_source(one.name) is source}


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
        # After what is written: whoever reads the tables may have gone.
        report.show(campaign.runs, studies, sys.stderr if "-" in (json_file, html_file) else sys.stdout)
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

    if others := [option for name, option in _given(ctx).items() if name != "resume"]:
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
