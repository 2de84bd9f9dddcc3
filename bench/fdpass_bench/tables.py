"""From a record to tables of text, the same for a terminal, an issue, a page and a spreadsheet. It knows no format."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from fdpass_bench.records import Record, condition_of, grouped

_WIDTH_OF_SHARES = 23

WHAT = {
    "carriers": "carriers: one socket by each carrier",
    "starts": "starts: what a socket among its arguments adds to the start of a process",
    "descriptors": "descriptors: one message with so many, for each descriptor",
    "outstanding": "outstanding: a claim while so many tickets are unclaimed",
    "receivers": "receivers: so many claim from one owner at once",
}


#: Of stall, rolling and long-lived.
_BEYOND = {
    "arrived_while_frozen": "arrived while frozen",
    "delayed": "of these delayed",
    "delayed_share": "share delayed",
    "delayed_share_split": "share of one queue of k",
    "longest_ms": "longest ms",
    "rolls": "rolls",
    "roll_seconds": "s for each roll",
    "requests": "requests",
    "failed": "failed",
    "opened": "opened",
    "open_stdev": "stdev of open connections",
    "open_stdev_random": "stdev by chance",
    "open_range": "range of open connections",
}


@dataclass(frozen=True)
class Table:
    """columns: names with their units. The first holds words, and so do `words`; the others numbers. struck: rows of what is not valid."""

    title: str
    columns: Sequence[str]
    rows: list[list[str]]
    words: frozenset[int] = frozenset()
    struck: list[int] = field(default_factory=list)


def tables_of(record: Record) -> list[Table]:
    if record.kind == "pass":
        return [_prices(what, list(rows)) for what, rows in groupby(record.rows, lambda row: str(row["what"]))]
    found = []
    for runs in grouped(record.runs):
        if any(run.get("latency_ms") or run.get("ci") is not None or "latency_ms" in run for run in runs):
            found.append(_latencies(runs))
        found.append(_shares(runs))
        found += [table for table in (_beyond(runs), _steps(runs)) if table is not None]
    return found


def _beyond(runs: Sequence[Mapping[str, Any]]) -> Table | None:
    """What a scenario measures beyond shares and outcomes."""
    columns = [(key, name) for key, name in _BEYOND.items() if any(run.get(key) is not None for run in runs)]
    if not columns:
        return None
    rows = [[_named(run), *(_any(run.get(key)) for key, _ in columns)] for run in runs]
    return Table(f"Beyond that: {condition_of(runs[0])}", ["server", *(name for _, name in columns)], rows, struck=_struck(runs))


def _steps(runs: Sequence[Mapping[str, Any]]) -> Table | None:
    """Of `scale-out`: what each number of workers did."""
    rows = [
        [_named(run), str(step.get("workers", "-")), figure(step.get("connections_per_s")), figure(step.get("share_of_linear"))]
        for run in runs
        for step in run.get("steps") or []
    ]
    return Table(f"Steps: {runs[0]['scenario']}", ["server", "workers", "connections / s", "share of linear"], rows) if rows else None


def _any(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(figure, value)) or "-"
    return str(value) if isinstance(value, int) else figure(value)


def _latencies(runs: Sequence[Mapping[str, Any]]) -> Table:
    columns = ["server", "mean ms", "95 % interval ms", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "max ms"]
    columns += ["theory mean ms", "of one queue"]
    rows = []
    for run in runs:
        latency, theory = run.get("latency_ms") or {}, run.get("theory") or {}
        interval = (run.get("ci") or {}).get("mean_ms")
        share = theory.get("share_of_one_queue_bound")
        rows.append(
            [
                _named(run),
                figure(latency.get("mean")),
                f"{figure(interval[0])} to {figure(interval[1])}" if interval and len(interval) == 2 else "-",
                *(figure(latency.get(name)) for name in ("p50", "p90", "p99", "p99_9", "max")),
                figure((theory.get("latency_ms") or {}).get("mean")),
                "-" if share is None else f"{share:.0%}",
            ]
        )
    return Table(f"Latency: {condition_of(runs[0])}", columns, rows, struck=_struck(runs))


def _shares(runs: Sequence[Mapping[str, Any]]) -> Table:
    kept = any((run.get("requests_per_connection") or 1) > 1 for run in runs)
    columns = ["server", "connections per worker", *(["requests per worker"] if kept else []), "max / mean"]
    columns += ["switches / connection", "CPU us / connection", "lost, accepted", "lost, queued", "outcomes"]
    # What no run of these has is no column.
    rows = [
        [
            _named(run),
            shares(run.get("per_worker") or []),
            *([shares(run.get("requests_per_worker") or [])] if kept else []),
            _fixed(run.get("requests_max_over_mean" if kept else "max_over_mean")),
            _fixed(run.get("switches_per_connection")),
            figure(run.get("cpu_us_per_connection")),
            str(run.get("lost_accepted", "-")),
            str(run.get("lost_unaccepted", "-")),
            outcomes(run),
        ]
        for run in runs
    ]
    kept_columns = [place for place in range(len(columns)) if place == 0 or any(row[place] != "-" for row in rows)]
    columns = [columns[place] for place in kept_columns]
    words = frozenset(place for place, name in enumerate(columns) if name.endswith("per worker") or name == "outcomes")
    rows = [[row[place] for place in kept_columns] for row in rows]
    return Table(f"Shares and outcomes: {condition_of(runs[0])}", columns, rows, words, _struck(runs))


def _struck(runs: Sequence[Mapping[str, Any]]) -> list[int]:
    return [place for place, run in enumerate(runs) if run.get("valid") is False]


def _named(run: Mapping[str, Any]) -> str:
    return str(run["strategy"]) + (" INVALID" if run.get("valid") is False else "")


def _prices(what: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    unit = next((unit_of(row["fdpass"]) for row in rows if row.get("fdpass")), "us")
    per = {"us": "us", "us_per_descriptor": "us / descriptor", "us_per_socket": "us / socket", "claims_per_s": "claims / s"}[unit]
    timed = unit != "claims_per_s"
    columns = ["", f"fdpass p50 {per}" if timed else f"fdpass {per}", *([f"fdpass p99 {per}"] if timed else []), "against"]
    columns += [f"its p50 {per}" if timed else f"its {per}", *([f"its p99 {per}"] if timed else []), "fdpass is"]
    cells = []
    for row in rows:
        ours, other = row.get("fdpass"), row.get("other")
        cells.append(
            [
                str(row["name"]),
                *(figure(value) for value in paid(ours)[: 2 if timed else 1]),
                str(other["name"]) if other else "-",
                *(figure(value) for value in paid(other)[: 2 if timed else 1]),
                _said(row),
            ]
        )
    place = 3 if timed else 2
    struck = [number for number, row in enumerate(rows) if row.get("valid") is False]
    return Table(WHAT.get(what, what), columns, cells, frozenset((place, len(columns) - 1)), struck)


def _said(row: Mapping[str, Any]) -> str:
    """Without the names, which have columns of their own."""
    sentence = str(row.get("sentence") or "-")
    other = row.get("other") or {}
    return sentence.removeprefix(f"{(row.get('fdpass') or {}).get('name')}: ").removesuffix(f", against {other.get('name')}")


def unit_of(side: Mapping[str, Any]) -> str:
    """us, us_per_descriptor, us_per_socket or claims_per_s."""
    return next((key.removeprefix("p50_") for key in side if key.startswith("p50_us") and not key.endswith("_rounds")), "claims_per_s")


def paid(side: Mapping[str, Any] | None) -> list[float | None]:
    """p50 and p99, in the side's unit; of a rate itself and None."""
    side = side or {}
    unit = unit_of(side)
    return [side.get(unit), None] if unit == "claims_per_s" else [side.get(f"p50_{unit}"), side.get(f"p99_{unit}")]


def shares(per_worker: Sequence[int]) -> str:
    text = " ".join(map(str, per_worker))
    return "-" if not text else text if len(text) <= _WIDTH_OF_SHARES else f"{min(per_worker)} to {max(per_worker)}"


def outcomes(run: Mapping[str, Any]) -> str:
    found: Mapping[str, int] = run.get("outcomes") or {}
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in found.items() if count or name == "ok") or "-"


def figure(number: float | None) -> str:
    """Three digits, whatever the size."""
    if number is None:
        return "-"
    if abs(number) >= 999.5:
        return f"{number:.0f}"
    return f"{number:#.3g}".rstrip(".") if abs(number) >= 0.0005 or not number else f"{number:.1g}"


def _fixed(number: float | None) -> str:
    return "-" if number is None else f"{number:.2f}"


# -------------------------------------------------------------------------------- in words


def headline(record: Record) -> list[str]:
    """What was found, in sentences of the file's own: the verdict, the pairs, and what says nothing."""
    said = str(record.data.get("verdict") or "").strip()
    found = [said] if said else []
    for comparison in record.data.get("comparisons", []):
        if comparison.get("valid") is not False and comparison.get("sentence"):
            found.append(_sentence(str(comparison["sentence"])))
    if not found and record.kind == "balance":
        found.append("Nothing was measured properly." if all(run.get("valid") is False for run in record.runs) else _plain(record))
    return found


def _plain(record: Record) -> str:
    """For runs that nothing was compared with."""
    said = []
    for run in record.runs:
        if run.get("valid") is False:
            continue
        latency = run.get("latency_ms") or {}
        what = [f"mean latency {figure(latency['mean'])} ms, p99 {figure(latency.get('p99'))} ms"] if latency.get("mean") else []
        said.append(f"{run['strategy']}, {condition_of(run)}: {', '.join([*what, outcomes(run)])}")
    return _sentence("; ".join(said))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def environment(record: Record) -> list[tuple[str, str]]:
    """What the figures depend on, in words."""
    found = record.environment
    usable, cpus = found.get("usable_cpus"), found.get("cpus")
    load = found.get("load_average")
    measured = str(found.get("time") or "")
    if found.get("seconds") is not None:
        measured += f", {found['seconds']:.0f} s" + (", interrupted" if found.get("interrupted") else "")
    lines = [
        ("measured", measured),
        ("system", " ".join(str(found[key]) for key in ("system", "kernel", "machine") if found.get(key))),
        ("processors", f"{cpus}" + (f", of which {usable} could be used" if usable and usable != cpus else "") if cpus else ""),
        ("load average", " ".join(f"{one:.2f}" for one in load) if load else ""),
        ("Python", " ".join(str(found[key]) for key in ("implementation", "python") if found.get(key))),
        ("fdpass", str(found.get("fdpass") or "")),
        *((name, str(value)) for name, value in (found.get("sysctls") or {}).items() if value is not None),
    ]
    versions = {str(run["strategy"]): run["version"] for run in record.runs if run.get("server") == "peer" and run.get("version")}
    lines += list(versions.items())
    calibration = record.data.get("calibration") or {}
    latency = calibration.get("latency_ms") or {}
    if isinstance(latency.get("mean"), int | float):
        lines.append(("a server that answers at once", f"mean {figure(latency['mean'])} ms, p99 {figure(latency.get('p99'))} ms"))
    return [(name, text) for name, text in lines if text]


def command_of(record: Record) -> str:
    return shlex.join(record.environment.get("command") or ["fdpass-bench", record.kind])
