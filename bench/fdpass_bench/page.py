"""One self-contained HTML page of records and how they compare: the verdict first, pictures, tables, and how to repeat it.
It is made of what the JSON says and nothing else, and asks no network for anything."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from itertools import count, groupby
from typing import Any

import jinja2
from markupsafe import Markup

from fdpass_bench import plots
from fdpass_bench.compare import Comparison
from fdpass_bench.records import Record, Section, sections
from fdpass_bench.tables import (
    HOLDS,
    WHAT,
    Table,
    command_of,
    environment,
    headline,
    pairs_of,
    summaries,
    tables_of,
    tables_of_runs,
)  # fmt: skip

_PLACE = {"load": "load {}", "rate": "{} connections/s", "workers": "workers: {}", "cell": "{}"}
_MOST_WARNINGS = 8  # that stand open
_LONG = 20  # rows: a table of what is only shown is folded where it has more

_METHOD = {
    "balance": (
        "Latency counts from the schedule: connections arrive when it says so, whatever the server does. Intervals are 95 %, by batch "
        "means. A run that could not be measured properly is INVALID: it is shown, struck out, and never compared. "
        "Made by fdpass-bench; its docs/method.md says what is measured, and what is not."
    ),
    "pass": (
        "Each side runs in processes of its own, in turns. Intervals are 95 %, of the medians of the rounds. "
        "Made by fdpass-bench; its docs/method.md says what each row holds."
    ),
}


@dataclass
class _Part:
    """A section of the page. folds: parts of their own, shut at first. notes: sentences, folded where there are many."""

    title: str
    text: str = ""
    plots: list[plots.Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    folds: list[_Part] = field(default_factory=list)


def render(records: Sequence[Record], comparisons: Sequence[Comparison] = ()) -> str:
    """The page. With several records: the comparisons, then each record's own pictures."""
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    folder = files("fdpass_bench") / "templates"
    parts = [_compared(comparison) for comparison in comparisons]
    warnings: list[str] = []
    for comparison in comparisons:
        warnings += [*comparison.invalid, *comparison.only]
        if comparison.differences:
            warnings.append(f"{comparison.after.name} differs in more than what is compared: {'; '.join(comparison.differences)}")
    for record in records:
        named = f"{record.name}: " if len(records) > 1 else ""
        parts += _parts(record, named)
        if not comparisons:
            warnings += [named + text for text in record.invalid]
        if record.environment.get("interrupted"):
            warnings.append(f"{named}it was interrupted: this is what had been measured by then")
    verdict = [comparison.sentence for comparison in comparisons] or [text for record in records for text in headline(record)]
    kind = records[0].kind
    heading = _heading(records, comparisons)
    number = count()
    for shown in [*parts, *(fold for part in parts for fold in part.folds)]:
        shown.plots = [
            replace(one, svgs=tuple(Markup(svg.replace(plots.OWN, f"p{next(number)}-")) for svg in one.svgs)) for one in shown.plots
        ]
    return template.from_string((folder / "page.html.jinja").read_text("utf-8")).render(
        title=f"fdpass-bench {kind}: {heading}",
        kicker=f"fdpass-bench {kind}",
        heading=heading,
        style=Markup((folder / "page.css").read_text("utf-8")),
        verdict=verdict,
        warnings=warnings[:_MOST_WARNINGS],
        more_warnings=warnings[_MOST_WARNINGS:],
        parts=parts,
        sources=[_source(record) for record in records],
        method=_METHOD[kind],
        said={"worse", "better", *HOLDS.values()},
    )


def _heading(records: Sequence[Record], comparisons: Sequence[Comparison]) -> str:
    if comparisons:
        return f"{', '.join(one.after.name for one in comparisons)} against {comparisons[0].before.name}"
    record = records[0]
    if record.kind == "pass":
        return "What passing a descriptor costs"
    servers = list(dict.fromkeys(str(run["strategy"]) for run in record.runs))
    scenarios = list(dict.fromkeys(str(run["scenario"]) for run in record.runs))
    what = "How connections are shared out" if len(servers) > 4 else f"{_and(servers)}, measured"
    return f"{what}: {_and(scenarios) if len(scenarios) <= 4 else f'{len(scenarios)} scenarios'}"


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _compared(comparison: Comparison) -> _Part:
    text = (
        "A difference is called worse or better when it is surer than 95 % for all judged runs together; where a file carries no interval, "
        "figures are shown and not judged."
    )
    picture = plots.changes(comparison)
    title, tables = f"{comparison.after.name} against {comparison.before.name}", comparison.tables
    part = _Part(title, text, [picture] if picture else [], tables, list(comparison.turned))
    if len(tables) > 1 and len(tables[-1].rows) > _LONG:
        part.tables, part.folds = tables[:-1], [_Part(f"{len(tables[-1].rows)} figures that are not judged", tables=tables[-1:])]
    return part


def _parts(record: Record, named: str) -> list[_Part]:
    if record.kind == "pass":
        overview = plots.times_faster(record.rows)
        found = [_Part(f"{named}All comparisons", plots=[overview])] if overview else []
        tables = tables_of(record)
        for (what, rows), table in zip(groupby(record.rows, lambda row: str(row["what"])), tables, strict=True):
            title = WHAT.get(what, what)
            picture = plots.prices(what, list(rows))
            found.append(_Part(f"{named}{title[0].upper()}{title[1:]}", plots=[picture] if picture else [], tables=[table]))
        if findings := record.data.get("findings"):
            sentences = [str(one["sentence"]) for one in findings if one.get("sentence")]
            found.append(_Part(f"{named}Found besides", " ".join(f"{text[:1].upper()}{text[1:]}." for text in sentences)))
        return found
    colours = {name: number for number, name in enumerate(dict.fromkeys(str(run["strategy"]) for run in record.runs))}
    # What has a latency says most: it comes first.
    ordered = sorted(sections(record.runs), key=lambda section: not any(run.get("latency_ms") for run in section.runs))
    return [_section(record, section, colours, named) for section in ordered]


def _section(record: Record, section: Section, colours: Mapping[str, int], named: str) -> _Part:
    title = f"{named}{section.title[0].upper()}{section.title[1:]}"
    if section.axis is None:
        part = _Part(
            title, _size(section.runs), _drawn(section.runs, colours), tables_of_runs(section.runs), pairs_of(record, section.runs)
        )
        if course := plots.over_time(section.runs, colours):
            # What was done to a worker is to be seen; without that it is a long picture of little.
            if any(run.get("events") for run in section.runs):
                part.plots.append(course)
            else:
                part.folds.append(_Part("Over time", plots=[course]))
        return part
    overview = plots.cells(section, colours) if section.axis == "cell" else plots.sweep(section, colours)
    folds = []
    for group in section.groups:
        curves = plots.latency_curves(group, colours, small=True)
        invalid = sum(run.get("valid") is False for run in group)
        summary = _PLACE[section.axis].format(section.place_of(group)) + (f": {invalid} of {len(group)} INVALID" if invalid else "")
        folds.append(
            _Part(summary[:1].upper() + summary[1:], "", [curves] if curves else [], tables_of_runs(group), pairs_of(record, group))
        )
    return _Part(title, _size(section.runs), [overview] if overview else [], summaries(record, section), folds=folds)


def _drawn(runs: Sequence[Mapping[str, Any]], colours: Mapping[str, int]) -> list[plots.Plot]:
    kept = any((run.get("requests_per_connection") or 1) > 1 for run in runs)
    drawn = [
        plots.latency_curves(runs, colours),
        plots.per_worker(runs, colours),
        plots.per_worker(runs, colours, "requests") if kept else None,
        plots.stranded(runs, colours),
        plots.scaling(runs, colours),
        plots.outcomes(runs),
    ]
    return [one for one in drawn if one]


def _size(runs: Sequence[Mapping[str, Any]]) -> str:
    counts = {run["connections"] * (run.get("repeats") or 1) for run in runs if run.get("connections")}
    ends = [f"{count:,}".replace(",", " ") for count in (sorted(counts)[:: max(1, len(counts) - 1)] if counts else [])]
    return f"{' to '.join(ends)} connections for each server." if ends else ""


def _source(record: Record) -> dict[str, object]:
    text = json.dumps(record.data, separators=(",", ":")).encode()
    name = record.name if record.name.endswith(".json") else "figures.json"
    return {
        "name": record.name,
        "command": command_of(record),
        "environment": environment(record),
        "data": f"data:application/json;base64,{base64.b64encode(text).decode()}",
        "file": name,
    }
