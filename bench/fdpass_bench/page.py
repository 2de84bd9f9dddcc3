"""One self-contained HTML page of records and how they compare: the verdict first, pictures, tables, and how to repeat it.
It is made of what the JSON says and nothing else, and asks no network for anything."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import count, groupby

import jinja2
from markupsafe import Markup

from fdpass_bench import plots
from fdpass_bench.compare import Comparison
from fdpass_bench.records import Record, condition_of, grouped
from fdpass_bench.tables import WHAT, Table, command_of, environment, headline, tables_of

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
    title: str
    text: str = ""
    plots: list[plots.Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


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
    for part in parts:
        for place, one in enumerate(part.plots):
            wide, narrow = (Markup(svg.replace(plots.OWN, f"p{next(number)}-")) for svg in one.svgs)
            part.plots[place] = plots.Plot((wide, narrow), one.title, one.caption, one.alt)
    return template.from_string((folder / "page.html.jinja").read_text("utf-8")).render(
        title=f"fdpass-bench {kind}: {heading}",
        kicker=f"fdpass-bench {kind}",
        heading=heading,
        style=Markup((folder / "page.css").read_text("utf-8")),
        verdict=verdict,
        warnings=warnings,
        parts=parts,
        sources=[_source(record) for record in records],
        method=_METHOD[kind],
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
    return f"{what}: {_and(scenarios)}"


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _compared(comparison: Comparison) -> _Part:
    text = (
        "A difference is called worse or better when it is surer than 95 % for all judged runs together; where a file carries no interval, "
        "figures are shown and not judged."
    )
    picture = plots.changes(comparison)
    return _Part(f"{comparison.after.name} against {comparison.before.name}", text, [picture] if picture else [], [comparison.table()])


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
    found = []
    colours = {name: number for number, name in enumerate(dict.fromkeys(str(run["strategy"]) for run in record.runs))}
    sweep = plots.load_sweep(record.runs, colours)
    if sweep:
        found.append(_Part(f"{named}{sweep.title}", plots=[sweep]))
    # What has a latency says most: it comes first.
    groups = sorted(grouped(record.runs), key=lambda runs: not any(run.get("latency_ms") for run in runs))
    for runs in groups:
        kept = any((run.get("requests_per_connection") or 1) > 1 for run in runs)
        drawn = [
            plots.latency_curves(runs, colours),
            plots.per_worker(runs, colours),
            plots.per_worker(runs, colours, "requests") if kept else None,
            plots.over_time(runs, colours),
            plots.stranded(runs, colours),
            plots.scaling(runs, colours),
            plots.outcomes(runs),
        ]
        only = Record(record.name, record.kind, {**record.data, "runs": runs})
        counts = {run["connections"] * (run.get("repeats") or 1) for run in runs if run.get("connections")}
        ends = [f"{count:,}".replace(",", " ") for count in (sorted(counts)[:: max(1, len(counts) - 1)] if counts else [])]
        text = f"{' to '.join(ends)} connections for each server." if ends else ""
        title = condition_of(runs[0])
        found.append(_Part(f"{named}{title[0].upper()}{title[1:]}", text, [one for one in drawn if one], tables_of(only)))
    return found


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
