"""How several loops of one command are shown together: a sweep by load, rate or workers, and the cases of the matrix.
Tables for 80 columns; it measures nothing and prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich import box
from rich.table import Table

from fdpass_bench import matrix
from fdpass_bench.figures import Figures, Study
from fdpass_bench.scenario_tables import NAME_WIDTH, broken
from fdpass_bench.steady import Work

_MOST_COLUMNS = 8  # beside the server's name

#: What a sweep may go by, and how a column is headed. A load that was asked for is told from the rate that follows from it.
_BY: dict[str, tuple[Callable[[Work], float | None], Callable[[float], str]]] = {
    "load": (lambda work: work.load, lambda value: f"load\n{value:.2g}"),
    "rate": (lambda work: work.rate, lambda value: f"{value:.4g}\n/ s"),
    "workers": (lambda work: work.workers, lambda value: f"{value:.0f}\nworker{'s' if value > 1 else ''}"),
}


def plain_table(narrow: bool = False) -> Table:
    """Empty, with the server's column; a `narrow` one is for names that were broken()."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.padding = (0, 0)
    table.pad_edge = False
    table.add_column("server", overflow="fold", min_width=NAME_WIDTH if narrow else 18)
    return table


def columns(table: Table, *names: str) -> None:
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)


def ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:#.3g}".rstrip(".") if seconds < 1 else f"{seconds * 1e3:.0f}"


def sweep(studies: Sequence[Study]) -> Iterator[tuple[str, Table]]:
    """Title and table of several studies of one scenario: servers by loads, rates or numbers of workers; of loads and workers, a table for
    each number of workers. A cell has the mean latency in ms, and below it its share of the one-queue bound."""
    scenario = studies[0].work.scenario
    counts = list(dict.fromkeys(study.work.workers for study in studies))
    by = _swept_by(studies)
    for count in counts if by != "workers" else [None]:
        here = [study for study in studies if count in (None, study.work.workers)]
        where = f"{scenario}, {_workers(count)}" if count else scenario
        for begin in range(0, len(here), _MOST_COLUMNS):
            part = here[begin : begin + _MOST_COLUMNS]
            yield f"{where}: mean latency in ms by {by}, and as a share of what one queue would give", _swept(part, by)


def _workers(count: int) -> str:
    return f"{count} worker{'s' if count > 1 else ''}"


def _swept_by(studies: Sequence[Study]) -> str:
    """What differs between them; with several workers and several loads, the latter."""
    for by in ("load", "rate"):
        each = {study.work.workers: set[float | None]() for study in studies}
        for study in studies:
            each[study.work.workers].add(_BY[by][0](study.work))
        if all(None not in values for values in each.values()) and any(len(values) > 1 for values in each.values()):
            return by
    return "workers"


def _swept(studies: Sequence[Study], by: str) -> Table:
    value_of, head = _BY[by]
    table = plain_table()
    columns(table, *(" " + head(value_of(study.work) or 0).replace("\n", "\n ") for study in studies))
    for name in dict.fromkeys(one.name for study in studies for one in study.figures):
        found = [next((one for one in study.figures if one.name == name), None) for study in studies]
        table.add_row(name, *map(_cell, found))
    return table


def _cell(one: Figures | None) -> str:
    if one is None:
        return "-"
    if not one.valid:
        return "INVALID"
    share = one.share_of_bound
    return f"{ms(one.latency.get('mean'))}\n{'' if share is None else f'{share:.0%}'}".rstrip()


def cases(studies: Sequence[Study]) -> Iterator[tuple[str, Table]]:
    """Title and table of each case of the matrix: servers by levels, with mean, p99, and the mean as a multiple of theory's."""
    for name, case in matrix.CASES.items():
        here = [study for study in studies if study.work.case == name]
        if not here:
            continue
        each = f"{case.service * 1e3:g} ms"
        kept = f"{case.requests} requests of {each} on each connection" if case.kept else f"one request of {each} per connection"
        work = here[0].work
        title = f"{name}: {kept}, {_workers(work.workers)}, {work.repeats} repeat{'s' if work.repeats > 1 else ''}"
        table = plain_table(narrow=True)
        for study in here:
            # Of kept connections there is no theory.
            columns(table, f"{study.work.level}\nmean", " \n p99", *([] if case.kept else ["over\ntheory"]))
        for server in dict.fromkeys(one.name for study in here for one in study.figures):
            cells = []
            for study in here:
                cells += _of_level(next((one for one in study.figures if one.name == server), None), case.kept)
            table.add_row(broken(server), *cells)
        yield title, table


def _of_level(one: Figures | None, kept: bool) -> list[str]:
    if one is None or not one.valid:
        return ["-" if one is None else "INVALID", "-", *([] if kept else ["-"])]
    cells = [ms(one.latency.get(name)) for name in ("mean", "p99")]
    theory = one.prediction.mean if one.prediction else None
    return cells if kept else [*cells, "-" if theory is None else f"{one.latency['mean'] / theory:.2f}"]


def rankings(found: Sequence[matrix.Ranking]) -> Table:
    """What the paper found under heavy load, what was found here, and whether it is the same; the lower one first."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.padding = (0, 1, 0, 0)
    table.pad_edge = False
    table.add_column("Hermes found", no_wrap=True)
    columns(table, "ms", "here", "ratio\n95 %")
    table.add_column("here it", no_wrap=True)
    above = ("", "")
    for one in found:
        if (one.case, one.measure) != above:
            above = one.case, one.measure
            table.add_row(f"{one.case}, {one.measure}", style="bold")
        # The lower one first, in every column.
        turned = one.lower == one.second
        theirs, here = (_turned(pair, turned) for pair in (one.published_ms, one.here_ms))
        ci = None if one.ci is None else (1 / one.ci[1], 1 / one.ci[0]) if turned else one.ci
        table.add_row(
            f"  {one.lower} < {one.higher}",
            f"{theirs[0]:g} {theirs[1]:g}" if theirs else "-",
            f"{here[0]:.3g} {here[1]:.3g}" if here else "-",
            f"{ci[0]:.2f} to {ci[1]:.2f}" if ci else "-",
            one.word.replace("cannot be told", "not told"),
        )
    return table


def _turned(pair: tuple[float, float] | None, turned: bool) -> tuple[float, float] | None:
    return pair[::-1] if pair and turned else pair
