"""How runs are shown: tables for 80 columns, a verdict computed from the numbers, JSON. It measures nothing."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from operator import attrgetter
from typing import IO, Any

import psutil
from rich import box
from rich.console import Console
from rich.table import Table

import fdpass
from fdpass_bench import contenders, diagnosis, estimate, matrix, measure, price, sweep_tables
from fdpass_bench.figures import Study
from fdpass_bench.runs import Run
from fdpass_bench.scenario_tables import TABLES, and_, broken, named, outcomes_of, scenario_table, words_of
from fdpass_bench.steady import Trial, Work
from fdpass_bench.sweep_tables import columns, ms, plain_table

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


def line_of(run: Run) -> str:
    line = f"{run.plan.scenario}, {run.plan.server.name}: {outcomes_of(run)}"
    return line if run.valid else f"{line}; not valid: {run.invalid_reason}"


def line_of_trial(trial: Trial, work: Work) -> str:
    outcomes = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in trial.outcomes.items() if count)
    return f"{work.where}, {trial.server}, repeat {trial.repeat + 1}: {trial.problem or outcomes}"


def show(runs: Sequence[Run], studies: Sequence[Study], stream: IO[str]) -> None:
    out = console(stream)
    several = len({run.plan.workers for run in runs}) > 1
    for (scenario, workers), of_one in groupby(runs, lambda run: (run.plan.scenario, run.plan.workers)):
        here = list(of_one)
        if several:
            out.print(f"{workers} worker{'s' if workers > 1 else ''}", style="bold")
        out.print(TABLES[scenario](here) if scenario in TABLES else _table(scenario, here), "")
    if any(run.plan.scenario in _TITLES for run in runs):
        out.print(
            "Switches: voluntary context switches of all workers, without their idle rate and without the one that holds a connection."
        )
    for run in runs:
        if not run.valid:
            out.print(f"{run.plan.scenario}, {run.plan.server.name}: not valid: {run.invalid_reason}.")
    if runs or not studies:
        out.print(verdict(runs))
    shown = bool(runs)
    for scenario in dict.fromkeys(study.work.scenario for study in studies):
        here_too = [study for study in studies if study.work.scenario == scenario]
        if shown:
            out.print()
        shown = True
        if scenario == "matrix":
            _show_matrix(here_too, out)
        elif len(here_too) > 1:
            _show_sweep(here_too, out)
        else:
            _show_study(here_too[0], out)


def _table(scenario: str, runs: Sequence[Run]) -> Table:
    bursts = runs[0].plan.bursts
    median = f", {bursts} times; max/mean is their median" if scenario == "burst" and bursts > 1 else ""
    table = scenario_table(_TITLES[scenario] + median)
    table.add_column("per worker", no_wrap=True)
    for name in ("max/\nmean", "switches\n/ conn."):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("outcomes", overflow="fold")
    for name in ("lost\naccepted", "lost\nqueued"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        table.add_row(
            named(run),
            _shares(run.per_worker),
            _figure(run.max_over_mean),
            _figure(run.switches_per_connection),
            outcomes_of(run) + ("" if run.valid else " (not valid)"),
            str(run.lost_accepted),
            str(run.lost_unaccepted),
            style="" if run.valid else "dim",
        )
    return table


def _show_sweep(studies: Sequence[Study], out: Console) -> None:
    """Of each study what is said of it; the figures of all in one table. The JSON has each whole."""
    for study in studies:
        out.print(_title(study), style="bold")
        _show_said(study, out)
        out.print()
    for title, table in sweep_tables.sweep(studies):
        out.print(title, style="bold")
        out.print(table, "")


def _show_matrix(studies: Sequence[Study], out: Console) -> None:
    theirs = ", ".join(f"{name} is {strategy}" for name, strategy in matrix.THEIRS.items() if name != strategy)
    out.print(f"latency in ms; {theirs}")
    for title, table in sweep_tables.cases(studies):
        out.print("")
        out.print(title, style="bold")
        out.print(table)
    out.print("")
    for study in studies:
        if invalid := [one for one in study.figures if not one.valid]:
            # The JSON has every reason.
            where, named, one = f"{study.work.case}, {study.work.level}", and_([one.name for one in invalid]), invalid[0]
            out.print(f"{where}: INVALID, and saying nothing: {named}. {one.name}: {one.reasons[0]}.")
    found = matrix.rankings(studies)
    if found:
        out.print("Hermes (SIGCOMM 2025, table 3), heavy load, and here; the lower one first", style="bold")
        out.print(sweep_tables.rankings(found), "")
        for reason in matrix.reasons(found):
            out.print(f"{reason[0].upper()}{reason[1:]}.")
    out.print(matrix.verdict(found) or "Nothing was measured under heavy load, of which figures were published.")


def _show_study(study: Study, out: Console) -> None:
    if study.figures:
        # Not the table's own title, which would be wrapped at the table's width.
        out.print(_title(study), style="bold")
        since = "its beginning" if study.work.since == "begun" else "the schedule"
        out.print(f"latency in ms from {since} to the end of the answer; bound: one queue")
        out.print(_latencies(study), "")
        out.print(_costs(study), "")
    if (calibration := study.calibration_json()) is not None:
        out.print(_calibrated(calibration))
    if study.ideals:
        bound = study.ideals["one queue"].mean
        shares = [f"{queues} {one.mean / bound:.0%}" for queues, one in study.ideals.items() if queues != "one queue"]
        out.print(f"Ideal policies with these workers, as shares of the one-queue bound: {', '.join(shares)}.")
    _show_said(study, out)


def _show_said(study: Study, out: Console) -> None:
    """What says nothing and why, and who beats whom."""
    for one in study.figures:
        if not one.valid and diagnosis.seen_of(one) is None:
            out.print(f"{one.name} is INVALID and says nothing: {'; '.join(one.reasons)}.")
    overflows = {one.name: sum(trial.overflows for trial in one.trials) for one in study.figures}
    for name, count in overflows.items():
        if count:
            out.print(f"While {name} was loaded a listen queue overflowed {count} times: these clients tried again a second later.")
    for comparison in study.comparisons:
        if comparison.first.valid and comparison.second.valid:
            out.print(f"{comparison.sentence}.")
    for one in study.figures:
        if said := diagnosis.sentences(one):
            out.print("", *said, sep="\n")
    if not study.figures:
        out.print("Nothing was measured.")


def _title(study: Study) -> str:
    work = study.work
    if work.clients:
        asked = f"closed loop of {work.clients} clients" + (f" (load {work.load:.2g} by their pauses)" if work.load else "")
    else:
        asked = f"{work.rate:.4g} connections/s" + (f" (load {work.load:.2g})" if work.load else "")
    service = f"{work.service * 1e3:.4g} ms {work.distribution}" if work.service else "no service time"
    kept = f", {work.requests} requests each" if work.requests > 1 else ""
    workers = (
        ""
        if all(one.server.kind == "target" for one in study.figures)
        else f", {work.workers} worker{'s' if work.workers > 1 else ''}, {service}"
    )
    return f"{work.scenario}: {asked}{workers}, {work.repeats} x {work.connections}{kept}"


def _latencies(study: Study) -> Table:
    table = plain_table()
    columns(table, "mean", "+-95%", "p50", "p90", "p99", "p99.9", "max", "theory\nmean", "\np99", "of\nbound")
    for one in study.figures:
        found, known = one.interval, one.prediction
        half = (found.high - found.low) / 2 if found and found.low is not None and found.high is not None else None
        share = one.share_of_bound
        cells = [one.latency.get("mean"), half, *(one.latency.get(name) for name in ("p50", "p90", "p99", "p99_9", "max"))]
        cells += [known.mean, known.p99] if known else [None, None]
        table.add_row(
            one.name + ("" if one.valid else " INVALID"),
            *map(ms, cells),
            "-" if share is None else f"{share:.0%}",
            style="" if one.valid else "dim",
        )
    return table


def _costs(study: Study) -> Table:
    kept = study.work.requests > 1
    table = plain_table(narrow=kept)
    table.add_column("per worker", no_wrap=True)
    if kept:
        table.add_column("requests", no_wrap=True)
    few = study.work.scenario == "few-clients"
    # Two columns of shares leave no room for another index of them.
    columns(table, "max/\nmean", *(["by a\nhash"] if few else [] if kept else ["Jain"]), "switches\n/ conn.", "CPU us\n/ conn.")
    table.add_column("outcomes", overflow="fold")
    for one in study.figures:
        counts = "requests_of" if kept else "connections_of"
        jain = one.evenness(counts, estimate.jain)
        cpu = one.per_connection("cpu_seconds")
        outcomes = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in one.outcomes.items() if count or name == "ok")
        table.add_row(
            (broken(one.name) if kept else one.name) + ("" if one.valid else "\nINVALID" if kept else " INVALID"),
            _shares(one.per_worker) or "-",
            *([_shares(one.requests_per_worker) or "-"] if kept else []),
            _figure(one.evenness(counts, estimate.max_over_mean)),
            *([_figure(one.by_hash)] if few else [] if kept else ["-" if jain is None else f"{jain:.3f}"]),
            _figure(one.switches_per_connection),
            "-" if cpu is None else f"{cpu * 1e6:.0f}",
            outcomes,
            style="" if one.valid else "dim",
        )
    return table


def _calibrated(found: dict[str, Any]) -> str:
    latency, lag = found["latency_ms"], found["lag_ms"]
    if not latency:
        return f"A server that answers at once did not answer: {found['problem'] or 'no connection came about'}."
    late = f", schedule lag p99 {lag['p99']:.3g} ms" if lag else ""  # of clients that begin all at once there is none
    return (
        f"Against a server that answers at once: mean {latency['mean']:.3g} ms, p99 {latency['p99']:.3g} ms{late}; "
        f"the generator spends {found['generator_cpu_us_per_connection']} us on a connection."
    )


def _shares(per_worker: Sequence[int]) -> str:
    text = " ".join(map(str, per_worker))
    return text if len(text) <= _SHARES_WIDTH else f"{min(per_worker)} to {max(per_worker)}"


def _figure(number: float | None) -> str:
    return "-" if number is None else f"{number:.2f}"


# The verdict


def verdict(runs: Sequence[Run]) -> str:
    """One sentence, from the valid runs alone; with several numbers of workers, one for each."""
    counts = list(dict.fromkeys(run.plan.workers for run in runs))
    if len(counts) > 1:
        each = [(count, verdict([run for run in runs if run.plan.workers == count])) for count in counts]
        return " ".join(f"{count} worker{'s' if count > 1 else ''}: {said[0].lower()}{said[1:]}" for count, said in each)
    valid = [run for run in runs if run.valid]
    parts = []
    for scenario, where in (("idle", "connections to idle workers were shared"), ("burst", "a burst was shared")):
        here = [run for run in valid if run.plan.scenario == scenario and run.max_over_mean is not None]
        if here:
            parts.append(f"{where} {_evenness(here)}")
    killed = [run for run in valid if run.plan.scenario == "kill"]
    if killed:
        parts.append(_losses(killed))
    for scenario in TABLES:
        here = [run for run in valid if run.plan.scenario == scenario]
        if here:
            parts.append(words_of(scenario, here))
    invalid = len(runs) - len(valid)
    if not parts:
        return "Nothing was measured properly, so there is nothing to compare." if runs else "Nothing was measured."
    if invalid:
        parts.append(f"{invalid} of {len(runs)} runs {'was not valid and says' if invalid == 1 else 'were not valid and say'} nothing")
    sentence = "; ".join(parts) + "."
    return sentence[0].upper() + sentence[1:]


def _evenness(runs: Sequence[Run]) -> str:
    figures = [(run.plan.server.name, _figure(run.max_over_mean)) for run in runs]
    best = min((figure for _, figure in figures), key=float)
    winners = [name for name, figure in figures if figure == best]
    others = sorted({figure for _, figure in figures if figure != best}, key=float)
    against = f" against {' to '.join(dict.fromkeys((others[0], others[-1])))}" if others else ""
    return f"{'most evenly ' if others else ''}by {and_(winners)} (max/mean {best}{against})"


def _losses(runs: Sequence[Run]) -> str:
    kept = [run.plan.server.name for run in runs if not run.lost_unaccepted]
    lost = [f"{run.plan.server.name} {run.lost_unaccepted} of {sum(run.outcomes.values())}" for run in runs if run.lost_unaccepted]
    of_what = "that no worker had accepted"
    if not lost:
        return f"when workers were killed, {and_(kept)} lost no connection {of_what}"
    if not kept:
        return f"when workers were killed, connections {of_what} were lost: {', '.join(lost)}"
    return f"when workers were killed, {and_(kept)} lost no connection {of_what}, {and_(lost)}"


# Prices

_PRICES = {
    "carriers": "carriers: one socket by each carrier, against the standard library",
    "starts": "starts: what a socket among its arguments adds to the start of a process",
    "descriptors": "descriptors: one message with so many, for each descriptor",
    "outstanding": "outstanding: a claim while so many tickets are unclaimed",
    "receivers": "receivers: so many claim from one owner at once",
}
_SHORT = {contenders.STANDARD: "stdlib", "1 unclaimed": "1", "no difference that this run can show": "no difference"}
_ASKED = (
    "Loading: the pickles were made ahead. Connection, Channel and Queue: asked for one at a time, with the sender's pickling, which "
    "needs the GIL."
)


def show_prices(found: price.Found, stream: IO[str]) -> None:
    out = console(stream)
    for what, rows in groupby(found.rows, attrgetter("what")):
        out.print(_PRICES[what], style="bold")
        out.print(_prices(list(rows)), "")
        if what == "carriers":
            out.print(_ASKED, "")
    for reason, rows in groupby([row for row in found.rows if row.reason], attrgetter("reason")):
        same = list(rows)
        out.print(f"{and_([row.name for row in same])}: {same[0].verdict}: {reason}.")
    for one in found.findings:
        out.print(f"{one.sentence[0].upper()}{one.sentence[1:]}.")
    if found.load_before > (cpus := len(os.sched_getaffinity(0))) / 2:
        out.print(
            f"This machine was not quiet: a load average of {found.load_before:.1f} on {cpus} processors before it began. "
            "What a busy sender costs depends on it."
        )
    out.print(price_verdict(found))


def _prices(rows: Sequence[price.Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.padding = (0, 0)
    table.pad_edge = False
    table.add_column("", overflow="fold", min_width=19)
    columns(table, "fdpass\np50", "\np99")
    table.add_column("against", no_wrap=True)
    columns(table, "\np50", "\np99")
    table.add_column("fdpass is", no_wrap=True, min_width=16)
    for row in rows:
        others = _SHORT.get(row.other.name, row.other.name) if row.other else ""
        verdict = _SHORT.get(row.verdict, row.verdict) + (f"\n({row.interval})" if row.interval else "")
        table.add_row(row.name, *_paid(row, row.ours), others, *_paid(row, row.other), verdict, style="" if row.ours else "dim")
    return table


def _paid(row: price.Row, side: price.Side | None) -> tuple[str, str]:
    if side is None:
        return ("-" if side is row.ours else ""), ""
    if row.unit == "claims_per_s":
        return f"{1 / side.p50:.0f}/s", ""
    return _microseconds(side.p50), _microseconds(side.p99)


def _microseconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    number, unit = (seconds * 1e3, "ms") if abs(seconds) >= 0.9995e-3 else (seconds * 1e6, "us")
    # Below 10 to two places, which is as much as a clock can tell.
    return f"{round(number, 2) + 0.0:.2f} {unit}" if abs(number) < 9.995 else f"{number:#.3g}".rstrip(".") + f" {unit}"


def price_verdict(found: price.Found) -> str:
    """One or two sentences, from what was measured alone."""
    measured = [row for row in found.rows if row.ours is not None]
    parts = [f"{row.name}: {row.verdict}" for row in measured if row.what == "carriers" and row.name.startswith("loading")]
    claims = [row for row in measured if row.what == "outstanding"]
    if len(claims) > 1 and claims[0].ours and claims[-1].ours:
        first, last = claims[0].ours, claims[-1].ours
        parts.append(f"{claims[-1].name}: {_microseconds(last.p50)} against {_microseconds(first.p50)} with {first.name}")
    if not parts:
        parts = [f"{row.name}: {row.sentence}" for row in measured if row.other][-1:]
    left = sum(row.failed for row in found.rows) + sum(one.failed for one in found.findings)
    if left:
        parts.append(f"{left} could not be measured")
    sentence = "; ".join(parts) + "." if parts else "Nothing was measured."
    return sentence[0].upper() + sentence[1:]


# JSON


def prices_as_json(found: price.Found, began: float, interrupted: bool) -> dict[str, Any]:
    """`began`: seconds since the epoch."""
    return {
        "schema": 1,
        "environment": environment(began, interrupted),
        "parameters": asdict(found.plan) | {"load_average_before": round(found.load_before, 2)},
        "rows": [_price_json(row) for row in found.rows],
        "findings": [{"name": one.name, **one.figures, "sentence": one.sentence, "valid": not one.failed} for one in found.findings],
        "verdict": price_verdict(found),
    }


def _price_json(row: price.Row) -> dict[str, Any]:
    ratio = row.times_faster
    known = ratio is not None and ratio.low is not None and ratio.high is not None
    return {
        "what": row.what,
        "name": row.name,
        **row.condition,
        "fdpass": _side_json(row, row.ours),
        "other": _side_json(row, row.other),
        "times_faster": round(ratio.mean, 4) if ratio else None,
        "times_faster_ci": [round(ratio.low or 0, 4), round(ratio.high or 0, 4)] if ratio and known else None,
        "sentence": row.sentence,
        "valid": row.reason is None,
        "invalid_reason": row.reason,
    }


def _side_json(row: price.Row, side: price.Side | None) -> dict[str, Any] | None:
    if side is None:
        return None
    found: dict[str, Any] = {"name": side.name, "rounds": len(side.rounds), "values": len(side.values)}
    if row.unit == "claims_per_s":
        return found | {"claims_per_s": round(1 / side.p50, 1), "claims_per_s_of_rounds": [round(1 / one, 1) for one in side.medians]}
    of = row.unit.removeprefix("us")
    p99 = side.p99
    return found | {
        f"p50_us{of}": round(side.p50 * 1e6, 4),
        f"p99_us{of}": None if p99 is None else round(p99 * 1e6, 4),
        f"p50_us{of}_of_rounds": [round(one * 1e6, 4) for one in side.medians],
    }


def as_json(runs: Sequence[Run], studies: Sequence[Study], environment: dict[str, Any]) -> dict[str, Any]:
    """`environment`: what environment() says."""
    found: dict[str, Any] = {
        "schema": 1,
        "environment": environment,
        "runs": [run.as_json() for run in runs] + [one.as_json() | diagnosis.as_json(one) for study in studies for one in study.figures],
    }
    said = [verdict(runs)] if runs else []
    said += [text for study in studies if (text := diagnosis.verdict(study.figures))]
    if ranked := matrix.rankings(studies):
        found["rankings"] = [one.as_json() for one in ranked]
        said.append(matrix.verdict(ranked))
    if said:
        found["verdict"] = " ".join(said)
    if studies:
        each = [_study_json(study) for study in studies]
        # What was asked for once stands above the runs; a sweep has it for each of its studies.
        found |= each[0] if len(each) == 1 else {"studies": each, "comparisons": [one for study in each for one in study["comparisons"]]}
    return found


def _study_json(study: Study) -> dict[str, Any]:
    return {
        "work": study.work.as_json(),
        "calibration": study.calibration_json(),
        "ideals": {queues: {"mean_ms": round(one.mean * 1e3, 4), "how": one.how} for queues, one in study.ideals.items()},
        "comparisons": [comparison.as_json() for comparison in study.comparisons],
    }


def environment(
    began: float,
    interrupted: bool,
    seconds: float | None = None,
    resumed: Sequence[float] = (),
    command: Sequence[str] | None = None,
) -> dict[str, Any]:
    """began, and when it was resumed: seconds since the epoch. seconds: that it took, and the command that began it, where it was."""
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
        "command": list(command) if command else ["fdpass-bench", *sys.argv[1:]],
        "time": _time(began),
        "seconds": round(time.time() - began if seconds is None else seconds, 1),
        "interrupted": interrupted,
        **({"resumed": [_time(one) for one in resumed]} if resumed else {}),
    }


def _time(since_the_epoch: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(since_the_epoch))
