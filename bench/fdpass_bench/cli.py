"""The command line: arguments in, exit status out. It neither measures nor knows how a figure is come by."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

# The rest of the package is imported by the command that needs it: a spawned worker imports this file again.
if TYPE_CHECKING:
    from fdpass_bench.balance import Plan, Run, Strategy
    from fdpass_bench.peers import Target
    from fdpass_bench.steady import Server, Trial, Work

_DEMONSTRATION = ("shared", "reuseport", "reuseport-bare")


def _strategy(ctx: click.Context, param: click.Parameter, text: str) -> Strategy:
    from fdpass_bench.balance import Strategy

    try:
        return Strategy.parse(text)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from error


def _strategies(ctx: click.Context, param: click.Parameter, text: str) -> list[Strategy]:
    return list(dict.fromkeys(_strategy(ctx, param, one) for one in text.split(",")))


def _targets(ctx: click.Context, param: click.Parameter, texts: Sequence[str]) -> list[Target]:
    if not texts:
        return []
    from fdpass_bench import peers

    try:
        return [peers.Target.parse(text) for text in dict.fromkeys(texts)]
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


_workers = click.option("--workers", type=click.IntRange(1, 64), default=4, show_default=True, help="How many worker processes.")


@click.group(invoke_without_command=True)
@click.version_option(package_name="fdpass")
@click.pass_context
def command(ctx: click.Context) -> int:
    """Shows with real connections how k worker processes share one port, and what each way loses when workers die.

    Without a command: a demonstration of all scenarios, in less than a minute.

    \b
    Examples:
      fdpass-bench
      fdpass-bench balance --strategies shared,reuseport --scenario kill
      fdpass-bench serve 127.0.0.1:8000 --workers 4
      fdpass-bench who 8000
    """
    if ctx.invoked_subcommand is not None:
        return 0
    from fdpass_bench.balance import Strategy

    return _measure(_plans([Strategy.parse(text) for text in _DEMONSTRATION], ["idle", "burst", "kill"], 4, None, 10.0, None), None)


@command.command(short_help="Measure how strategies share connections out, and what they lose.")
@click.option(
    "--strategies",
    metavar="LIST",
    callback=_strategies,
    default=",".join(_DEMONSTRATION),
    help="NAME or NAME:ORDER, separated by commas.  [default: shared,reuseport,reuseport-bare; steady: shared,reuseport]",
)
@_workers
@click.option("--scenario", type=click.Choice(["idle", "burst", "kill", "steady", "all"]), default="all", show_default=True)
@click.option(
    "--connections",
    type=click.IntRange(1, 1_000_000),
    default=None,
    help="How many in each run.  [default: 60 idle, 400 burst, 200 kill, 4000 steady]",
)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, allow_dash=True), help="Write the figures to it; - is standard output."
)
@click.option(
    "--service-ms",
    type=click.FloatRange(0, 10000),
    default=None,
    help="Milliseconds a worker holds each connection; steady: on average.  [default: 0 idle, 1 burst, 4 steady, in kill a queue of 2.5 s]",
)
@click.option(
    "--time-limit",
    type=click.FloatRange(1, 600),
    default=None,
    help="Seconds for the connections of one run; steady: for each request.  [default: 30, steady 10]",
)
@click.option("--rate", type=click.FloatRange(0.1, 1_000_000), default=None, help="steady: connections per second.")
@click.option(
    "--load",
    type=click.FloatRange(0.01, 0.99),
    default=None,
    help="steady: the rate as a share of what the workers can do.  [default: 0.7]",
)
@click.option("--clients", type=click.IntRange(1, 10000), default=None, help="steady: a closed loop of so many clients instead of a rate.")
@click.option("--arrivals", type=click.Choice(["poisson", "uniform"]), default=None, help="steady: their spacing.  [default: poisson]")
@click.option("--distribution", type=click.Choice(["exponential", "fixed", "hyper"]), default=None, help="steady: of the service times.")
@click.option(
    "--work", "kind", type=click.Choice(["sleep", "burn"]), default=None, help="steady: how a worker is occupied.  [default: sleep]"
)
@click.option("--requests-per-connection", "requests", type=click.IntRange(1, 10000), default=None, help="steady: over 1 is keep-alive.")
@click.option(
    "--think-ms", type=click.FloatRange(0, 60000), default=None, help="steady: between an answer and the connection's next request."
)
@click.option("--seed", type=click.IntRange(0, 2**31), default=None, help="steady: the same seed is the same work.  [default: 1]")
@click.option("--repeats", type=click.IntRange(1, 1000), default=None, help="steady: runs of each server, in ABBA order.  [default: 2]")
@click.option("--target", "targets", metavar="HOST:PORT", multiple=True, callback=_targets, help="steady: a server that runs already.")
@click.option("--peer", "peers", metavar="LIST", multiple=True, callback=_peers, help="steady: start nginx, uvicorn, node ... and compare.")
@click.pass_context
def balance(
    ctx: click.Context,
    /,
    strategies: list[Strategy],
    workers: int,
    scenario: str,
    connections: int | None,
    json_file: str | None,
    service_ms: float | None,
    time_limit: float | None,
    targets: list[Target],
    peers: list[str],
    **steady: Any,
) -> int:
    """Measures how each strategy shares connections out, what it loses, and what waiting it costs.

    \b
    idle    spaced connections, each after the former has ended, to idle workers
    burst   many connections at once
    kill    connections wait in the queue while a worker is killed every half
            second and restarted
    steady  an open loop: connections arrive at a rate whatever the server does,
            each with its own service time; queueing theory beside the figures

    The exit status is 1 when a run could not be measured properly.

    \b
    Examples:
      fdpass-bench balance --strategies shared,shared:first --scenario idle
      fdpass-bench balance --scenario steady --load 0.8 --peer gunicorn
      fdpass-bench balance --target 127.0.0.1:8000 --rate 200
    """

    def given(name: str) -> bool:
        return ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE

    of_steady = [param for param in ctx.command.params if param.name in (*steady, "targets", "peers") and param.name and given(param.name)]
    if of_steady and not given("scenario"):
        scenario = "steady"
    if of_steady and scenario not in ("steady", "all"):
        raise click.UsageError(f"{of_steady[0].opts[0]} belongs to --scenario steady")
    scenarios = ["idle", "burst", "kill"] if scenario == "all" else [scenario] if scenario != "steady" else []
    most = 20000 if scenarios else 1_000_000
    if connections is not None and connections > most:
        raise click.BadParameter(f"{scenarios[0]} makes at most {most} connections", ctx, param_hint="--connections")
    service = None if service_ms is None else service_ms / 1000
    plans = _plans(strategies, scenarios, workers, connections, time_limit or 30.0, service)
    servers: list[Server] = []
    work = None
    if scenario in ("steady", "all"):
        if not given("strategies"):
            # A target is somebody's own question; peers are compared with us.
            strategies = [] if targets and not peers else strategies[:2]
        work = _work(workers, connections, service, time_limit, bool(targets), **steady)
        servers = _servers(work, strategies, peers, targets)
    if json_file not in (None, "-"):
        # An answer that cannot be written is found out before the minute of measuring.
        try:
            with open(str(json_file), "a"):
                pass
        except OSError as error:
            raise click.UsageError(f"cannot write {json_file}: {error.strerror}") from error
    return _measure(plans, json_file, work, servers)


@command.command(short_help="Answer HTTP requests with the worker's index.")
@click.argument("address", default="127.0.0.1:8000")
@_workers
@click.option("--strategy", metavar="NAME", callback=_strategy, default="shared", show_default=True, help="NAME or NAME:ORDER.")
def serve(address: str, workers: int, strategy: Strategy) -> int:
    """Answers each HTTP request with its worker's index, until Ctrl-C or SIGTERM.

    ADDRESS is host:port, [::1]:port or, under shared, unix:/path.

    \b
    Example:
      fdpass-bench serve 127.0.0.1:8000 --workers 4 --strategy reuseport
      curl http://127.0.0.1:8000/
    """
    from fdpass_bench import serve as serving

    with _interruptible():
        try:
            return serving.serve(address, workers, strategy)
        except ValueError as error:
            raise click.UsageError(str(error)) from error


@command.command(short_help="Try what this machine allows.")
def doctor() -> int:
    """Tries what this machine allows and says what to do about each lack.

    The exit status is 1 when something is missing that fdpass cannot do without.

    \b
    Example:
      fdpass-bench doctor
    """
    from fdpass_bench import doctor as examination

    return examination.show()


@command.command(short_help="Show who listens on a port, and the queues.")
@click.argument("port", type=click.IntRange(1, 65535))
def who(port: int) -> int:
    """Shows which processes hold the listening sockets of a TCP port, with the queue and the limit of each socket.

    The exit status is 1 when nothing listens there.

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
    time_limit: float,
    service: float | None,
) -> list[Plan]:
    from fdpass_bench.balance import SCENARIOS, Plan

    return [
        Plan(strategy, scenario, workers, connections or SCENARIOS[scenario], time_limit, service)
        for scenario in scenarios
        for strategy in strategies
    ]


def _servers(work: Work, strategies: Sequence[Strategy], peers: Sequence[str], targets: Sequence[Target]) -> list[Server]:
    from fdpass_bench.peers import PeerError
    from fdpass_bench.steady import Group, PeerServer, TargetServer

    try:
        found = [PeerServer.find(name, work) for name in peers]
    except PeerError as error:
        raise click.ClickException(str(error)) from error
    return [*map(Group, strategies), *found, *map(TargetServer, targets)]


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
    if targets and not rate and not clients:
        raise click.UsageError("--target needs --rate, the connections per second that its server shall get, or --clients")
    if clients and arrivals:
        raise click.UsageError("--arrivals has no meaning in the closed loop of --clients")
    if think_ms is not None and (requests or 1) == 1:
        raise click.UsageError("--think-ms needs --requests-per-connection over 1")
    service = (0.0 if targets else 0.004) if service is None else service
    requests = requests or 1
    if not rate and not clients:
        if not service:
            raise click.UsageError("with --service-ms 0 a load has no rate: give --rate")
        rate = (load or 0.7) * workers / (service * requests)
    return Work(
        workers=workers,
        connections=connections or 4000,
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


def _measure(plans: Sequence[Plan], json_file: str | None, work: Work | None = None, servers: Sequence[Server] = ()) -> int:
    from fdpass_bench import figures, loadgen, report, steady
    from fdpass_bench.balance import measure_run

    began = time.time()
    runs: list[Run] = []
    calibration: Trial | None = None
    trials: list[Trial] = []
    counts = [plan.connections for plan in plans]
    if work is not None:
        counts += [work.connections * work.requests] * (work.repeats * len(servers))
    interrupted = 0
    with _interruptible() as signals:
        try:
            with report.ProgressBar(counts) as progress:
                for plan in plans:
                    runs.append(measure_run(plan, progress.follow(f"{plan.scenario}, {plan.strategy}")))
                    progress.over(report.line_of(runs[-1]))
                if work is not None:
                    with loadgen.Generator() as generator:
                        calibration = steady.calibrate(generator, work)
                        for repeat in range(work.repeats):
                            for server in steady.order_of(servers, repeat):
                                ended = progress.follow(f"steady, {server.name}")
                                trials.append(steady.measure_trial(generator, server, work, repeat, ended))
                                progress.over(report.line_of_trial(trials[-1]))
        except KeyboardInterrupt:
            interrupted = signals[0] if signals else signal.SIGINT
        # Interrupted before its turn, steady has nothing to show.
        study = figures.study(work, servers, trials, calibration) if work is not None and (trials or not runs) else None
        report.show(runs, study, sys.stderr if json_file == "-" else sys.stdout)
        if json_file is not None:
            text = json.dumps(report.as_json(runs, study, began, bool(interrupted)), indent=2) + "\n"
            if json_file == "-":
                sys.stdout.write(text)
            else:
                with open(json_file, "w", encoding="utf-8") as file:
                    file.write(text)
        if interrupted:
            print(f"fdpass-bench: interrupted; {len(runs) + len(trials)} of {len(counts)} runs were measured.", file=sys.stderr)
            return 128 + interrupted
    return 0 if all(run.valid for run in runs) and (study is None or study.valid) else 1


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM raises KeyboardInterrupt and is noted in the list; later ones wait until the cleaning-up is over."""
    seen: list[int] = []
    raised = False

    def interrupt(signum: int, frame: FrameType | None) -> None:
        nonlocal raised
        seen.append(signum)
        if not raised:
            raised = True
            raise KeyboardInterrupt

    # A signal that whoever started this had ignored (nohup, a background job) stays ignored.
    taken = [signum for signum in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(signum) is not signal.SIG_IGN]
    before = [signal.signal(signum, interrupt) for signum in taken]
    try:
        yield seen
    finally:
        for signum, handler in zip(taken, before, strict=True):
            signal.signal(signum, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 for what was found or could not be done, 2 for bad arguments, 130 after Ctrl-C."""
    try:
        status = command.main(args=None if arguments is None else list(arguments), prog_name="fdpass-bench", standalone_mode=False)
    except click.ClickException as error:
        print(f"fdpass-bench: {error.format_message()}", file=sys.stderr)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return int(status or 0)
