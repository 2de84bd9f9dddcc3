"""The command line: arguments in, exit status out. It neither measures nor knows how a figure is come by."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING

import click

# The rest of the package is imported by the command that needs it: a spawned worker imports this file again.
if TYPE_CHECKING:
    from fdpass_bench.balance import Plan, Run, Strategy

_DEMONSTRATION = ("shared", "reuseport", "reuseport-bare")


def _strategy(ctx: click.Context, param: click.Parameter, text: str) -> Strategy:
    from fdpass_bench.balance import Strategy

    try:
        return Strategy.parse(text)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from error


def _strategies(ctx: click.Context, param: click.Parameter, text: str) -> list[Strategy]:
    return list(dict.fromkeys(_strategy(ctx, param, one) for one in text.split(",")))


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
    show_default=True,
    help="NAME or NAME:ORDER, separated by commas.",
)
@_workers
@click.option("--scenario", type=click.Choice(["idle", "burst", "kill", "all"]), default="all", show_default=True)
@click.option(
    "--connections", type=click.IntRange(1, 20000), default=None, help="How many in each run.  [default: 60 idle, 400 burst, 200 kill]"
)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, allow_dash=True), help="Write the figures to it; - is standard output."
)
@click.option(
    "--service",
    type=click.FloatRange(0, 10),
    default=None,
    help="Seconds a worker holds each connection.  [default: 0 idle, 0.001 burst, in kill a queue of 2.5 s]",
)
@click.option(
    "--time-limit", type=click.FloatRange(1, 600), default=30.0, show_default=True, help="Seconds for the connections of one run."
)
def balance(
    strategies: list[Strategy],
    workers: int,
    scenario: str,
    connections: int | None,
    json_file: str | None,
    service: float | None,
    time_limit: float,
) -> int:
    """Measures how each strategy shares connections out, and what it loses.

    \b
    idle   spaced connections, each after the former has ended, to idle workers
    burst  many connections at once
    kill   connections wait in the queue while a worker is killed every half
           second and restarted

    The exit status is 1 when a run could not be measured properly.

    \b
    Example:
      fdpass-bench balance --strategies shared,shared:first --scenario idle --json idle.json
    """
    scenarios = ["idle", "burst", "kill"] if scenario == "all" else [scenario]
    plans = _plans(strategies, scenarios, workers, connections, time_limit, service)
    if json_file not in (None, "-"):
        # An answer that cannot be written is found out before the minute of measuring.
        try:
            with open(str(json_file), "a"):
                pass
        except OSError as error:
            raise click.UsageError(f"cannot write {json_file}: {error.strerror}") from error
    return _measure(plans, json_file)


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


def _measure(plans: Sequence[Plan], json_file: str | None) -> int:
    from fdpass_bench import report
    from fdpass_bench.balance import measure_run

    began = time.time()
    runs: list[Run] = []
    interrupted = 0
    with _interruptible() as signals:
        try:
            with report.ProgressBar(plans) as progress:
                for plan in plans:
                    runs.append(measure_run(plan, progress.follow(plan)))
                    progress.run_over(runs[-1])
        except KeyboardInterrupt:
            interrupted = signals[0] if signals else signal.SIGINT
        report.show(runs, sys.stderr if json_file == "-" else sys.stdout)
        if json_file is not None:
            text = json.dumps(report.as_json(runs, began, bool(interrupted)), indent=2) + "\n"
            if json_file == "-":
                sys.stdout.write(text)
            else:
                with open(json_file, "w", encoding="utf-8") as file:
                    file.write(text)
        if interrupted:
            print(f"fdpass-bench: interrupted; {len(runs)} of {len(plans)} runs were measured.", file=sys.stderr)
            return 128 + interrupted
    return 0 if all(run.valid for run in runs) else 1


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
