"""How runs are shown: tables for 80 columns, a verdict computed from the numbers, JSON. It measures nothing."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import IO, Any

import psutil
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import fdpass
from fdpass_bench import measure
from fdpass_bench.balance import SCENARIOS, Plan, Run
from fdpass_bench.clients import OUTCOMES

_TITLES = {
    "idle": "idle: spaced connections to idle workers",
    "burst": "burst: many connections at once",
    "kill": "kill: queued connections, a worker killed every half second and restarted",
}
_SHARES_WIDTH = 15
# What the kernel does with a connection that waits.
_SYSCTLS = (
    "net.core.somaxconn",
    "net.ipv4.tcp_max_syn_backlog",
    "net.ipv4.tcp_migrate_req",
    "net.ipv4.tcp_abort_on_overflow",
    "net.ipv4.tcp_syncookies",
)


def console(stream: IO[str]) -> Console:
    """No escape code goes to what is not a terminal, whatever the environment asks for."""
    return Console(file=stream, force_terminal=stream.isatty(), highlight=False, markup=False, emoji=False)


class ProgressBar:
    """Follows the runs: a bar on a terminal, else one line on stderr for each run that has ended."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self._plans = plans
        self._over = 0
        self._connections = 0
        self._bar: Progress | None = None
        if sys.stdout.isatty():
            columns = (TextColumn("{task.description:<21}"), BarColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=console(sys.stdout), transient=True)
            self._task = self._bar.add_task("", total=sum(plan.connections for plan in plans))

    def __enter__(self) -> ProgressBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def follow(self, plan: Plan) -> Callable[[int], None]:
        """What measure_run() tells how many connections have ended."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"{plan.scenario}, {plan.strategy}")
        return self._ended

    def _ended(self, connections: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._connections + connections)

    def run_over(self, run: Run) -> None:
        self._over += 1
        self._connections += run.plan.connections
        self._ended(0)
        if self._bar is None:
            line = f"{self._over}/{len(self._plans)} {run.plan.scenario}, {run.plan.strategy}: {_outcomes(run)}"
            print(line if run.valid else f"{line}; not valid: {run.invalid_reason}", file=sys.stderr, flush=True)


def show(runs: Sequence[Run], stream: IO[str]) -> None:
    out = console(stream)
    for scenario in SCENARIOS:
        here = [run for run in runs if run.plan.scenario == scenario]
        if here:
            out.print(_table(scenario, here), "")
    if runs:
        out.print(
            "Switches: voluntary context switches of all workers, without their idle rate and without the one that holds a connection."
        )
    for run in runs:
        if not run.valid:
            out.print(f"{run.plan.scenario}, {run.plan.strategy}: not valid: {run.invalid_reason}.")
    out.print(verdict(runs))


def _table(scenario: str, runs: Sequence[Run]) -> Table:
    table = Table(title=_TITLES[scenario], title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    table.padding = (0, 1, 0, 0)
    table.pad_edge = False
    table.add_column("strategy", overflow="fold")
    table.add_column("per worker", no_wrap=True)
    for name in ("max/\nmean", "switches\n/ conn."):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("outcomes", overflow="fold")
    for name in ("lost\naccepted", "lost\nqueued"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        table.add_row(
            str(run.plan.strategy),
            _shares(run.per_worker),
            _figure(run.max_over_mean),
            _figure(run.switches_per_connection),
            _outcomes(run) + ("" if run.valid else " (not valid)"),
            str(run.lost_accepted),
            str(run.lost_unaccepted),
            style="" if run.valid else "dim",
        )
    return table


def _shares(per_worker: Sequence[int]) -> str:
    text = " ".join(map(str, per_worker))
    return text if len(text) <= _SHARES_WIDTH else f"{min(per_worker)} to {max(per_worker)}"


def _figure(number: float | None) -> str:
    return "-" if number is None else f"{number:.2f}"


def _outcomes(run: Run) -> str:
    return ", ".join(f"{run.outcomes[outcome]} {outcome}" for outcome in OUTCOMES if run.outcomes[outcome] or outcome == "ok")


# The verdict


def verdict(runs: Sequence[Run]) -> str:
    """One sentence, from the valid runs alone."""
    valid = [run for run in runs if run.valid]
    parts = []
    for scenario, where in (("idle", "connections to idle workers were shared"), ("burst", "a burst was shared")):
        here = [run for run in valid if run.plan.scenario == scenario and run.max_over_mean is not None]
        if here:
            parts.append(f"{where} {_evenness(here)}")
    killed = [run for run in valid if run.plan.scenario == "kill"]
    if killed:
        parts.append(_losses(killed))
    invalid = len(runs) - len(valid)
    if not parts:
        return "Nothing was measured properly, so there is nothing to compare." if runs else "Nothing was measured."
    if invalid:
        parts.append(f"{invalid} of {len(runs)} runs {'was not valid and says' if invalid == 1 else 'were not valid and say'} nothing")
    sentence = "; ".join(parts) + "."
    return sentence[0].upper() + sentence[1:]


def _evenness(runs: Sequence[Run]) -> str:
    figures = [(str(run.plan.strategy), _figure(run.max_over_mean)) for run in runs]
    best = min((figure for _, figure in figures), key=float)
    winners = [name for name, figure in figures if figure == best]
    others = sorted({figure for _, figure in figures if figure != best}, key=float)
    against = f" against {' to '.join(dict.fromkeys((others[0], others[-1])))}" if others else ""
    return f"{'most evenly ' if others else ''}by {_and(winners)} (max/mean {best}{against})"


def _losses(runs: Sequence[Run]) -> str:
    kept = [str(run.plan.strategy) for run in runs if not run.lost_unaccepted]
    lost = [f"{run.plan.strategy} {run.lost_unaccepted} of {run.plan.connections}" for run in runs if run.lost_unaccepted]
    of_what = "that no worker had accepted"
    if not lost:
        return f"when workers were killed, {_and(kept)} lost no connection {of_what}"
    if not kept:
        return f"when workers were killed, connections {of_what} were lost: {', '.join(lost)}"
    return f"when workers were killed, {_and(kept)} lost no connection {of_what}, {_and(lost)}"


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# JSON


def as_json(runs: Iterable[Run], began: float, interrupted: bool) -> dict[str, Any]:
    """`began`: seconds since the epoch."""
    return {"schema": 1, "environment": _environment(began, interrupted), "runs": [run.as_json() for run in runs]}


def _environment(began: float, interrupted: bool) -> dict[str, Any]:
    return {
        "system": platform.system(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpus": psutil.cpu_count(),
        "usable_cpus": len(os.sched_getaffinity(0)),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "fdpass": fdpass.__version__,
        "sysctls": {name: measure.sysctl(name) for name in _SYSCTLS},
        "command": ["fdpass-bench", *sys.argv[1:]],
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(began)),
        "seconds": round(time.time() - began, 1),
        "interrupted": interrupted,
    }
