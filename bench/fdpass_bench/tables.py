"""From a record to tables of text, the same for a terminal, an issue, a page and a spreadsheet. It knows no format."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from fdpass_bench.records import Record, Section, condition_of, rate_of, sections

_WIDTH_OF_SHARES = 23
_MOST_PAIRS = 3  # sentences about pairs: more than that are summed up

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
    "delayed": "delayed over 0.5 s",
    "delayed_share": "share delayed",
    "delayed_share_split": "share that split queues delay (1/k)",
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
    """columns: names with their units. The first holds words, and so do `words`; the others numbers. struck: rows of what is not valid,
    and struck_cells: row and column of it."""

    title: str
    columns: Sequence[str]
    rows: list[list[str]]
    words: frozenset[int] = frozenset()
    struck: list[int] = field(default_factory=list)
    struck_cells: frozenset[tuple[int, int]] = frozenset()


def tables_of(record: Record) -> list[Table]:
    """Those that stand open: of a sweep or a matrix its summary. What that leaves out is tables_of_runs() of each group."""
    if record.kind == "pass":
        return [_prices(what, list(rows)) for what, rows in groupby(record.rows, lambda row: str(row["what"]))]
    found = []
    for section in sections(record.runs):
        found += summaries(record, section) or tables_of_runs(section.runs)
    return found


def tables_of_runs(runs: Sequence[Mapping[str, Any]]) -> list[Table]:
    """All that is known of runs under the same conditions."""
    found = [_latencies(runs)] if any("latency_ms" in run for run in runs) else []
    return [*found, _shares(runs), *(table for table in (_beyond(runs), _steps(runs)) if table is not None)]


def summaries(record: Record, section: Section) -> list[Table]:
    """Of a sweep or a matrix: one row for each place, one column for each server; before it, the rankings. Nothing for a single group."""
    if section.axis is None:
        return []
    found = [_rankings(record.rankings)] if section.axis == "cell" and record.rankings else []
    return [*found, _places(section)]


def _places(section: Section) -> Table:
    runs = section.runs
    servers = list(dict.fromkeys(str(run["strategy"]) for run in runs))
    name, cell = next(((name, cell) for has, name, cell in _MEASURES if any(map(has, runs))))
    disciplines = list(
        dict.fromkeys(str((run.get("theory") or {}).get("discipline")) for run in runs if (run.get("theory") or {}).get("latency_ms"))
    )
    split = any(run.get("delayed_share_split") is not None for run in runs)
    unanswered = any(_unanswered(run) for run in runs)
    first = {"cell": "case, load", "rate": "connections/s"}.get(str(section.axis), str(section.axis))
    columns = [first, *servers, *(f"theory: {one}" for one in disciplines), *(["split queues: 1/k"] if split else [])]
    rows, struck = [], set()
    for number, group in enumerate(section.groups):
        of = {str(run["strategy"]): run for run in group}
        row = [section.place_of(group)]
        for column, server in enumerate(servers, 1):
            run = of.get(server)
            invalid = run is not None and run.get("valid") is False
            row.append("-" if run is None else cell(run) + (" INVALID" if invalid else ""))
            if invalid:
                struck.add((number, column))
        theories = [run["theory"] for run in group if run.get("theory") and run.get("valid") is not False]
        row += [next((_mean_and_tail(one) for one in theories if str(one.get("discipline")) == which), "-") for which in disciplines]
        if split:
            row.append(next((_percent(run["delayed_share_split"]) for run in group if run.get("delayed_share_split") is not None), "-"))
        if unanswered:
            row.append("; ".join(f"{run['strategy']} {_unanswered(run)}" for run in group if _unanswered(run)) or "-")
        rows.append(row)
    words = frozenset([len(columns)]) if unanswered else frozenset()
    title = f"{name}: {section.title}"
    return Table(title, [*columns, *(["not answered"] if unanswered else [])], rows, words, struck_cells=frozenset(struck))


def _unanswered(run: Mapping[str, Any]) -> int:
    return sum(count for name, count in (run.get("outcomes") or {}).items() if name != "ok" and count)


def _mean_and_tail(found: Mapping[str, Any]) -> str:
    latency = found.get("latency_ms") or {}
    return f"{figure(latency.get('mean'))} / {figure(latency.get('p99'))}"


#: What a place of a sweep is summed up by: whether a run has it, what it is called, and its words. The first that a run has.
_MEASURES: Sequence[tuple[Callable[[Mapping[str, Any]], bool], str, Callable[[Mapping[str, Any]], str]]] = (
    (lambda run: bool(run.get("latency_ms")), "Mean / p99 latency in ms", _mean_and_tail),
    (lambda run: run.get("delayed_share") is not None, "Share delayed", lambda run: _percent(run.get("delayed_share"))),
    (
        lambda run: run.get("failed") is not None,
        "Failed of all requests",
        lambda run: f"{run.get('failed', '-')} of {run.get('requests', '-')}",
    ),
    (lambda run: run.get("open_stdev") is not None, "Standard deviation of open connections", lambda run: figure(run.get("open_stdev"))),
    (lambda run: True, "Largest share over the mean", lambda run: _fixed(run.get("max_over_mean"))),
)


def _rankings(rankings: Sequence[Mapping[str, Any]]) -> Table:
    """Each published order of two servers, what was measured here, and whether it holds."""
    rows, above = [], ""
    for one in rankings:
        place = ", ".join(str(one[name]) for name in ("case", "level") if one.get(name))
        sides = [one.get("first") or {}, one.get("second") or {}]
        published, here = (
            _in_order(one.get(key), [str(side.get(of, "-")) for side in sides])
            for key, of in (("published_ms", "published"), ("here_ms", "strategy"))
        )
        rows.append(
            ["" if place == above else place, str(one.get("measure") or "-"), HOLDS[one.get("holds")], published, here, _ratio(one)]
        )
        above = place
    columns = ["case, load", "of", "the order", "published, ms", "here, ms", "first / second here, 95 %"]
    meant = {
        str(side.get("published")): str(side.get("strategy")) for one in rankings for side in (one.get("first"), one.get("second")) if side
    }
    title = f"Which published rankings hold here ({', '.join(f'{theirs}: {ours}' for theirs, ours in meant.items())})"
    return Table(title, columns, rows, frozenset((1, 2, 3, 4)))


#: Of a ranking, in words.
HOLDS: Mapping[Any, str] = {True: "holds", False: "does not hold", None: "cannot be told"}


def _in_order(both: Sequence[float] | None, names: Sequence[str]) -> str:
    """ "reuseport 5.10 < exclusive 7.09": the lower first."""
    if not both or len(both) != 2 or None in both:
        return f"{' and '.join(names)}: no figures"
    pairs = sorted(zip(both, names, strict=True))
    return f"{pairs[0][1]} {figure(pairs[0][0])} < {pairs[1][1]} {figure(pairs[1][0])}"


def _ratio(ranking: Mapping[str, Any]) -> str:
    here, ci = ranking.get("here_ms"), ranking.get("ci")
    ratio = f"{here[0] / here[1]:.2f}" if here and len(here) == 2 and None not in here and here[1] else "-"
    return f"{ratio} ({ci[0]:.2f} to {ci[1]:.2f})" if ci and len(ci) == 2 and None not in ci else ratio


def _beyond(runs: Sequence[Mapping[str, Any]]) -> Table | None:
    """What a scenario measures beyond shares and outcomes."""
    columns = [(key, name) for key, name in _BEYOND.items() if any(run.get(key) is not None for run in runs)]
    if not columns:
        return None
    rows = [[_named(run), *(_percent(run.get(key)) if "share" in key else _any(run.get(key)) for key, _ in columns)] for run in runs]
    return Table(f"Beyond that: {condition_of(runs[0])}", ["server", *(name for _, name in columns)], rows, struck=_struck(runs))


def _steps(runs: Sequence[Mapping[str, Any]]) -> Table | None:
    """Of `scale-out`: what each number of workers did."""
    steps = [(run, step) for run in runs for step in run.get("steps") or []]
    rows = [
        [_named(run), str(step.get("workers", "-")), figure(step.get("connections_per_s")), _percent(step.get("share_of_linear"))]
        for run, step in steps
    ]
    columns, struck = ["server", "workers", "connections / s", "share of linear"], _struck([run for run, _ in steps])
    return Table(f"Steps: {runs[0]['scenario']}", columns, rows, struck=struck) if rows else None


def _any(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(figure, value)) or "-"
    return str(value) if isinstance(value, int) else figure(value)


def _latencies(runs: Sequence[Mapping[str, Any]]) -> Table:
    columns = ["server", "mean ms", "95 % interval ms", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "max ms"]
    columns += ["theory mean ms", "of one-queue bound"]
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
    few = runs[0]["scenario"] == "few-clients"  # where what a hash would do is the question
    columns = ["server", "connections per worker", *(["requests per worker"] if kept else []), "max / mean"]
    columns += ["by a hash"] if few else []
    columns += ["switches / connection", "CPU us / connection", "lost, accepted", "lost, queued", "outcomes"]
    # What no run of these has is no column.
    rows = [
        [
            _named(run),
            shares(run.get("per_worker") or []),
            *([shares(run.get("requests_per_worker") or [])] if kept else []),
            _fixed(run.get("requests_max_over_mean" if kept else "max_over_mean")),
            *([_fixed(run.get("hash_max_over_mean"))] if few else []),
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


def _percent(number: float | None) -> str:
    return "-" if number is None else f"{number:.1%}"


# -------------------------------------------------------------------------------- in words


def headline(record: Record) -> list[str]:
    """What was found: the file's verdict, its rankings, its pairs. Many pairs are summed up; they stand with their runs (pairs_of)."""
    said = str(record.data.get("verdict") or "").strip()
    found = [said] if said else []
    if record.rankings and "rankings" not in said:
        found += _held(record.rankings)
    pairs = [one for one in record.pairs if one.get("valid") is not False and one.get("sentence")]
    known = [one for one in pairs if one.get("mean_ratio") and not (record.rankings and one.get("scenario") == "matrix")]
    if len(pairs) <= _MOST_PAIRS or any(not one.get("scenario") for one in pairs):
        found += [_sentence(str(one["sentence"])) for one in pairs]
    else:
        found += [_summed(section) for section in sections(known)]
    if not found and record.kind == "balance":
        found.append("Nothing was measured properly." if all(run.get("valid") is False for run in record.runs) else _plain(record))
    return found


def pairs_of(record: Record, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences of the pairs of these runs, which stand under the same conditions; none where the headline has them all."""
    if len(record.pairs) <= _MOST_PAIRS:
        return []
    keys = ("scenario", "workers", "load", "case", "level")
    mine = [one for one in record.pairs if all(one.get(key) == runs[0].get(key) for key in keys)]
    return [_sentence(str(one["sentence"])) for one in mine if one.get("sentence") and rate_of(one) in (None, rate_of(runs[0]))]


def _held(rankings: Sequence[Mapping[str, Any]]) -> list[str]:
    counts = {word: sum(one.get("holds") is which for one in rankings) for which, word in HOLDS.items()}
    text = f"Of {len(rankings)} published rankings {counts['holds']} hold here, {counts['does not hold']} do not, and "
    found = [f"{text}{counts['cannot be told']} cannot be told."]
    against = [_sentence(str(one["sentence"])) for one in rankings if one.get("holds") is False and one.get("sentence")]
    if len(against) > _MOST_PAIRS:
        against[_MOST_PAIRS:] = [f"And {len(against) - _MOST_PAIRS} more that do not: the table of rankings names them."]
    return found + against


def _summed(section: Section) -> str:
    """Of all pairs of a sweep, or of one place with many servers: each server beside the one that beats most."""
    pairs = section.runs
    won: dict[str, int] = {}
    for pair in pairs:
        for name, side in ((pair["first"], 1), (pair["second"], -1)):
            won[str(name)] = won.get(str(name), 0) - side * _surely(pair)
    best = max(won, key=lambda name: won[name])
    single, parts = len(section.groups) == 1, []
    sides_of: dict[int, list[str]] = {}
    for other in won:
        mine = [pair for pair in pairs if {pair["first"], pair["second"]} == {best, other}]
        if other == best or not mine:
            continue
        ratios = sorted(1 / pair["mean_ratio"] if pair["first"] == best else pair["mean_ratio"] for pair in mine)
        sides = [_surely(pair) * (-1 if pair["first"] == best else 1) for pair in mine]
        times = f"{ratios[0]:.2f}" if f"{ratios[0]:.2f}" == f"{ratios[-1]:.2f}" else f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        sides_of.setdefault(sides[0], []).append(f"{other} {times}")
        parts.append(f"{other} {times} ({_how_often(sides)})")
    if single:
        words = {1: "surely higher", -1: "surely lower", 0: "no difference shown"}
        parts = [f"{', '.join(sides_of[side])} ({word})" for side, word in words.items() if side in sides_of]
    where = section.title
    return f"{where[:1].upper()}{where[1:]}: mean latency, times that of {best}: {', '.join(parts)}."


def _surely(pair: Mapping[str, Any]) -> int:
    """1 where the first of a pair is higher beyond its interval, -1 where it is lower, 0 where that cannot be told."""
    ci = pair.get("ci")
    return 0 if not ci or len(ci) != 2 or None in ci else 1 if ci[0] > 1 else -1 if ci[1] < 1 else 0


def _how_often(sides: Sequence[int]) -> str:
    words = [f"surely {word} at {sides.count(side)} of {len(sides)}" for side, word in ((1, "higher"), (-1, "lower")) if side in sides]
    return ", ".join(words) or f"no difference shown at any of {len(sides)}"


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
    if alone := record.answered_at_once:
        low, high = figure(min(alone)), figure(max(alone))
        lines.append(("a server that answers at once", f"mean {low} ms" if low == high else f"mean {low} to {high} ms"))
    return [(name, text) for name, text in lines if text]


def command_of(record: Record) -> str:
    return shlex.join(record.environment.get("command") or ["fdpass-bench", record.kind])
