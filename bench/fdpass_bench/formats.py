"""Records as CSV, as Markdown for an issue, and as text for a terminal. What is in them is tables.py's and compare.py's."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from fdpass_bench.compare import Comparison
from fdpass_bench.records import Record, condition_of, sections
from fdpass_bench.tables import Table, command_of, environment, headline, tables_of, tables_of_runs

_MOST_INVALID = 6  # that are named at once
_SHORT = 20  # letters of a name that a terminal does not break
#: Columns of a terminal, where their whole names would be broken inside words.
_BRIEFLY = {
    "95 % interval ms": "(95%)",
    "of one-queue bound": "of bound",
    "connections per worker": "per worker",
    "switches / connection": "switches / conn.",
    "CPU us / connection": "CPU us / conn.",
}
#: What of a run is no single figure.
_NOT_IN_CSV = {"series", "latency_curve", "events", "per_worker", "requests_per_worker", "work"}


def as_csv(records: Sequence[Record]) -> str:
    """One line for each run or row, one column for each figure: latency_ms.p99, theory.latency_ms.mean."""
    lines: list[dict[str, Any]] = []
    for record in records:
        for one in [*record.runs, *record.rows]:
            line: dict[str, Any] = {"file": record.name}
            _flatten(one, "", line)
            lines.append(line)
    columns = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _flatten(found: Mapping[str, Any], prefix: str, line: dict[str, Any]) -> None:
    for key, value in found.items():
        if isinstance(value, dict) and key not in _NOT_IN_CSV:
            _flatten(value, f"{prefix}{key}.", line)
        elif isinstance(value, list):
            if key in ("per_worker", "requests_per_worker"):
                line[prefix + key] = " ".join(map(str, value))
            elif key not in _NOT_IN_CSV and not any(isinstance(one, dict | list) for one in value):
                line[prefix + key] = " ".join("" if one is None else str(one) for one in value)
        elif key not in _NOT_IN_CSV:
            line[prefix + key] = _plain(value)


def _plain(value: Any) -> Any:
    # A spreadsheet takes a text that begins like this for a formula.
    return "'" + value if isinstance(value, str) and value[:1] in ("=", "+", "@") else value


def as_markdown(records: Sequence[Record], comparisons: Sequence[Comparison]) -> str:
    """For pasting into an issue: the verdict, the tables, and folded away what it depends on."""
    parts = []
    for comparison in comparisons:
        parts.append(f"**{_escaped(comparison.sentence)}**")
        parts += [f"- {_escaped(text)}" for text in _notes(comparison)]
        parts += [_markdown(table) for table in comparison.tables]
    for record in records:
        heading = f"### fdpass-bench {record.kind}" + (f": {_escaped(record.name)}" if len(records) > 1 else "")
        parts.append(heading)
        parts += [f"**{_escaped(text)}**" for text in headline(record)]
        invalid = [f"- INVALID: {_escaped(text)}" for text in record.invalid]
        parts += invalid[:_MOST_INVALID]
        parts += [_folded(f"{len(more)} more that are INVALID", more)] if (more := invalid[_MOST_INVALID:]) else []
        if len(records) == 1:
            parts += [_markdown(table) for table in tables_of(record)]
            parts += [_folded(text, [_markdown(table) for table in tables]) for text, tables in _each(record)]
        lines = "\n".join(f"- {name}: {_escaped(text)}" for name, text in environment(record))
        fence = "`" * max(3, 1 + _longest_ticks(command_of(record)))
        command = f"{fence}\n{command_of(record)}\n{fence}"
        parts.append(_folded("environment and command", [lines, command]))
    return "\n\n".join(parts) + "\n"


def _folded(summary: str, parts: Sequence[str]) -> str:
    return "\n\n".join([f"<details><summary>{_escaped(summary)}</summary>", *parts, "</details>"])


def _each(record: Record) -> list[tuple[str, list[Table]]]:
    """The runs of sweeps and of a matrix by themselves, which their summaries leave out."""
    return [(condition_of(group[0]), tables_of_runs(group)) for one in sections(record.runs) if one.axis for group in one.groups]


def _longest_ticks(text: str) -> int:
    return max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)


def _notes(comparison: Comparison) -> list[str]:
    found = [*comparison.turned, *comparison.invalid, *comparison.only]
    if comparison.differences:
        found.append(f"also different, and perhaps the reason: {'; '.join(comparison.differences)}")
    return found


def _markdown(table: Table) -> str:
    align = ["---" if place == 0 or place in table.words else "---:" for place in range(len(table.columns))]
    lines = [[name or " " for name in table.columns], align, *table.rows]
    text = "\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines)
    return f"{_escaped(table.title)}\n\n{text}"


def _escaped(text: str) -> str:
    for mark in ("\\", "|", "*", "<", "`", "_"):
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())


def show(records: Sequence[Record], comparisons: Sequence[Comparison], out: Console) -> None:
    """For a terminal: with several records only how they compare."""
    for comparison in comparisons:
        out.print(comparison.sentence)
        for text in _notes(comparison):
            out.print(f"{text[0].upper()}{text[1:]}.")
        for table in comparison.tables:
            out.print(table.title, style="bold")
            out.print(_rich(table), "")
    if comparisons:
        return
    for record in records:
        for text in headline(record):
            out.print(text)
        for text in record.invalid[:_MOST_INVALID]:
            out.print(f"INVALID: {text}.")
        if more := record.invalid[_MOST_INVALID:]:
            out.print(f"{len(more)} more are INVALID; --html and --markdown say why.")
        out.print()
        for table in tables_of(record):
            out.print(table.title, style="bold")
            out.print(_rich(table), "")
        if each := _each(record):
            out.print(f"--html and --markdown show each of these {len(each)} conditions by itself.", "")
        out.print(f"{command_of(record)}", soft_wrap=True)


def _rich(table: Table) -> RichTable:
    found = RichTable(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    for place, name in enumerate(table.columns):
        words = place == 0 or place in table.words
        name = _BRIEFLY.get(name, name)
        heading = name if words else name.replace(" ", "\n", 1)
        short = place == 0 and max((len(row[0]) for row in table.rows), default=0) <= _SHORT
        whole = short or name.startswith("lost")
        found.add_column(heading, justify="left" if words else "right", overflow="fold", no_wrap=whole)
    for place, row in enumerate(table.rows):
        cells = [Text(cell, style="dim" if (place, column) in table.struck_cells else "") for column, cell in enumerate(row)]
        found.add_row(*cells, style="dim" if place in table.struck else "")
    return found
