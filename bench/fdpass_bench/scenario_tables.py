"""How runs of stall, rolling, long-lived and scale-out are shown: a table for 80 columns each, and what the verdict says of them.
It measures nothing and prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.table import Table

from fdpass_bench.runs import Run

NAME_WIDTH = 14  # characters of a server's name, in a table with much beside it


def outcomes_of(run: Run) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in run.outcomes.items() if count or name == "ok")


def scenario_table(title: str) -> Table:
    """Empty, with the server's column."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    table.padding = (0, 1, 0, 0)
    table.pad_edge = False
    table.add_column("server", overflow="fold")
    return table


def broken(name: str) -> str:
    """A server's name in lines of NAME_WIDTH, where it is longer: behind its colon, else behind a hyphen."""
    at = (name.find(":", 0, NAME_WIDTH) if ":" in name else name.rfind("-", 0, NAME_WIDTH)) + 1
    return name if len(name) <= NAME_WIDTH or not at else f"{name[:at]}\n{broken(name[at:])}"


def named(run: Run) -> str:
    return broken(run.plan.server.name)


def _figure(number: float | None, places: int = 1) -> str:
    return "-" if number is None else f"{number:.{places}f}"


def _share(number: float | None) -> str:
    return "-" if number is None else f"{number:.1%}"


def _filled(title: str, names: Sequence[str], runs: Sequence[Run], cells: Callable[[Run, dict[str, Any]], Sequence[str]]) -> Table:
    table = scenario_table(title)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("outcomes", overflow="fold")
    for run in runs:
        found = cells(run, run.figures) if run.figures else ["-"] * len(names)
        table.add_row(
            named(run),
            *found,
            outcomes_of(run) + ("" if run.valid else " (not valid)"),
            style="" if run.valid else "dim",
        )
    return table


def stall(runs: Sequence[Run]) -> Table:
    title = "stall: one worker frozen for a second, at half load"
    names = ("arrived\nmeanwhile", "delayed\n> 0.5 s", "\nshare", "split\nqueues", "longest\nms")

    def cells(run: Run, found: dict[str, Any]) -> list[str]:
        theory, longest = _share(found["delayed_share_split"]), _figure(found["longest_ms"], 0)
        return [str(found["arrived_while_frozen"]), str(found["delayed"]), _share(found["delayed_share"]), theory, longest]

    return _filled(title, names, runs, cells)


def rolling(runs: Sequence[Run]) -> Table:
    title = f"rolling: all workers replaced, under {runs[0].plan.client_count} clients in a closed loop"

    def cells(run: Run, found: dict[str, Any]) -> list[str]:
        took = found["roll_seconds"]
        each = _figure(sum(took) / len(took), 2) if took else "-"
        return [str(found["rolls"]), each, str(found["requests"]), str(found["failed"]), _figure(run.seconds)]

    return _filled(title, ("rolls", "s each", "requests", "failed", "s in all"), runs, cells)


def long_lived(runs: Sequence[Run]) -> Table:
    title = f"long-lived: {runs[0].plan.connections} connections open, closed and opened at random"
    names = ("stdev of\nopen", "at the\nend", "random\nhash", "max-\nmin", "at the\nend")

    def cells(run: Run, found: dict[str, Any]) -> list[str]:
        numbers = [found[name] for name in ("open_stdev", "open_stdev_end", "open_stdev_random", "open_range")]
        return [*map(_figure, numbers), str(found["open_range_end"])]

    return _filled(title, names, runs, cells)


def scale_out(runs: Sequence[Run]) -> Table:
    title = f"scale-out: {runs[0].plan.client_count} clients in a closed loop, connections per second and share of linear"
    table = scenario_table(title)
    most = max(runs, key=lambda run: len(run.figures.get("steps", ())))
    counts = [step["workers"] for step in most.figures.get("steps", ())]
    for count in counts:
        table.add_column(f"{count}\nworker{'s' if count > 1 else ''}", justify="right", no_wrap=True)
    for run in runs:
        cells = [f"{step['connections_per_s']:.0f} {_percent(step['share_of_linear'])}" for step in run.figures.get("steps", ())]
        table.add_row(named(run) + ("" if run.valid else " (not valid)"), *cells, style="" if run.valid else "dim")
    return table


def _percent(number: float | None) -> str:
    return "-" if number is None else f"{number:.0%}"


TABLES: dict[str, Callable[[Sequence[Run]], Table]] = {
    "stall": stall,
    "rolling": rolling,
    "long-lived": long_lived,
    "scale-out": scale_out,
}


# What the verdict says of them, from valid runs alone


def words_of(scenario: str, runs: Sequence[Run]) -> str:
    return {"stall": _stalled, "rolling": _rolled, "long-lived": _lay, "scale-out": _scaled}[scenario](runs)


def _stalled(runs: Sequence[Run]) -> str:
    each = [f"{run.plan.server.name} {run.figures['delayed']} of {run.figures['arrived_while_frozen']}" for run in runs]
    return f"a frozen worker delayed over half a second: {', '.join(each)} (split queues {1 / runs[0].plan.workers:.0%})"


def _rolled(runs: Sequence[Run]) -> str:
    # Its sockets die with their workers, and it says so: what it loses is no fault of the roll.
    bare = [run for run in runs if run.plan.server.loses_queues]
    parts = [f"in rolls {_lost([run for run in runs if run not in bare])}"] if len(bare) < len(runs) else []
    parts += [
        f"{'in rolls ' if not parts else ''}{run.plan.server.name}, whose sockets die with their workers, lost {_of(run)}" for run in bare
    ]
    return "; ".join(parts)


def _lost(runs: Sequence[Run]) -> str:
    kept = [run.plan.server.name for run in runs if not run.figures["failed"]]
    lost = [f"{run.plan.server.name} {_of(run)}" for run in runs if run.figures["failed"]]
    parts = [f"{and_(kept)} failed no request"] if kept else []
    return "; ".join([*parts, *([f"requests failed at {and_(lost)}"] if lost else [])])


def _of(run: Run) -> str:
    return f"{run.figures['failed']} of {run.figures['requests']}"


def _lay(runs: Sequence[Run]) -> str:
    each = [f"{run.plan.server.name} {_figure(run.figures['open_stdev'])}" for run in runs]
    return f"open connections deviated by {', '.join(each)} (a random hash {_figure(runs[0].figures['open_stdev_random'])})"


def _scaled(runs: Sequence[Run]) -> str:
    each = [f"{run.plan.server.name} {_percent(run.figures['steps'][-1]['share_of_linear'])}" for run in runs]
    count = runs[0].plan.workers
    return f"of {count} times the throughput of one worker {count} reached: {', '.join(each)}"


def and_(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
