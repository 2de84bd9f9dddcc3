"""A JSON file of `balance` or `pass`, read and checked: what does not have the form of schema 1 is one sentence, never a traceback.
It knows the form, and draws and judges nothing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

SCHEMA = 1
_MOST_BYTES = 256 << 20  # of a file: one with every run of a day has a few megabytes

_NUMBER = (int, float)
#: What is read of a run, and its type; each key may be absent or null.
_OF_A_RUN: Mapping[str, Any] = {
    "work": {str: object},
    "case": str,
    "level": str,
    "workers": int,
    "connections": int,
    "repeats": int,
    "per_worker": [int],
    "requests_per_worker": [int],
    "requests_per_connection": int,
    "max_over_mean": _NUMBER,
    "hash_max_over_mean": _NUMBER,
    "requests_max_over_mean": _NUMBER,
    "jain": _NUMBER,
    "switches_per_connection": _NUMBER,
    "cpu_us_per_connection": _NUMBER,
    "outcomes": {str: int},
    "lost_accepted": int,
    "lost_unaccepted": int,
    "latency_ms": {str: _NUMBER},
    "load": _NUMBER,
    "service_seconds": _NUMBER,
    "offered_per_s": _NUMBER,
    "ci": {str: object},
    "theory": {str: object},
    "latency_curve": {str: [_NUMBER]},
    "series": [{str: object}],
    "events": [{str: object}],
    "invalid_reason": str,
    "version": str,
    **dict.fromkeys(("arrived_while_frozen", "delayed", "rolls", "requests", "failed", "opened", "open_range_end"), int),
    **dict.fromkeys(("delayed_share", "delayed_share_split", "frozen_seconds", "longest_ms"), _NUMBER),
    **dict.fromkeys(("open_stdev", "open_stdev_end", "open_stdev_random", "open_range"), _NUMBER),
    "clients": int,
    "roll_seconds": [_NUMBER],
    "steps": [{str: object}],
}
_OF_A_STEP: Mapping[str, Any] = {"workers": int, "connections_per_s": _NUMBER, "share_of_linear": _NUMBER}
_OF_A_ROW: Mapping[str, Any] = {
    "fdpass": {str: object},
    "other": {str: object},
    "times_faster": _NUMBER,
    "times_faster_ci": [_NUMBER],
    "sentence": str,
    "invalid_reason": str,
}
_OF_A_SIDE: Mapping[str, Any] = {
    **{f"{which}_us{of}": _NUMBER for which in ("p50", "p99") for of in ("", "_per_descriptor", "_per_socket")},
    **{f"p50_us{of}_of_rounds": [_NUMBER] for of in ("", "_per_descriptor", "_per_socket")},
    "claims_per_s": _NUMBER,
    "claims_per_s_of_rounds": [_NUMBER],
    "name": str,
}
_OF_A_THEORY: Mapping[str, Any] = {
    "discipline": str,
    "how": str,
    "latency_ms": {str: _NUMBER},
    "one_queue_ms": {str: _NUMBER},
    "latency_curve": {str: [_NUMBER]},
    "share_of_one_queue_bound": _NUMBER,
}
_OF_AN_EVENT: Mapping[str, Any] = {"repeat": int, "at_seconds": _NUMBER, "until_seconds": _NUMBER, "what": str, "worker": int}
_OF_A_SERIES: Mapping[str, Any] = {"repeat": int, "bin_seconds": _NUMBER, "per_worker": [[int]]}
_OF_A_COMPARISON: Mapping[str, Any] = {
    "sentence": str,
    **dict.fromkeys(("first", "second", "scenario", "case", "level"), str),
    "workers": int,
    **dict.fromkeys(("load", "mean_ratio"), _NUMBER),
    "ci": [_NUMBER],
}
_OF_A_RANKING: Mapping[str, Any] = {
    **dict.fromkeys(("case", "level", "measure", "sentence"), str),
    **{side: {str: str} for side in ("first", "second")},
    **{figures: [_NUMBER] for figures in ("published_ms", "here_ms", "ci")},
    "holds": bool,
}
_OF_THE_WHOLE: Mapping[str, Any] = {
    "environment": {str: object},
    "work": {str: object},
    "parameters": {str: object},
    "calibration": {str: object},
    "ideals": {str: {str: object}},
    "studies": [{str: object}],
    "comparisons": [{str: object}],
    "rankings": [{str: object}],
}
_OF_THE_ENVIRONMENT: Mapping[str, Any] = {
    "command": [str],
    "sysctls": {str: object},
    "load_average": [_NUMBER],
    "cpus": int,
    "usable_cpus": int,
    "fdpass": str,
    "time": str,
    "resumed": [str],
    "seconds": _NUMBER,
}


class RecordError(Exception):
    """Why a file cannot be reported: one sentence, without its full stop."""


@dataclass(frozen=True)
class Record:
    """What one command wrote. `name`: the file's, shortened to what tells it apart."""

    name: str
    kind: Literal["balance", "pass"]
    data: Mapping[str, Any]

    @property
    def runs(self) -> list[Mapping[str, Any]]:
        """Of `balance`."""
        return list(self.data.get("runs", []))

    @property
    def rows(self) -> list[Mapping[str, Any]]:
        """Of `pass`."""
        return list(self.data.get("rows", []))

    @property
    def work(self) -> Mapping[str, Any]:
        return self.data.get("work") or {}

    @property
    def rankings(self) -> list[Mapping[str, Any]]:
        """Of `matrix`: published orders of two servers, and whether they hold."""
        return list(self.data.get("rankings") or [])

    @property
    def pairs(self) -> list[Mapping[str, Any]]:
        """Comparisons of two servers, each with all that its loop is known by."""
        found: list[Mapping[str, Any]] = []
        for study in self.data.get("studies") or []:
            work = study.get("work") or {}
            known = {key: work.get(key) for key in ("scenario", "workers", "case", "level")} | {"work": work}
            found += [{**known, **one} for one in study.get("comparisons") or []]
        return found or list(self.data.get("comparisons") or [])

    @property
    def answered_at_once(self) -> list[float]:
        """Mean latencies of the server that answers at once, in milliseconds: one of each loop."""
        studies = self.data.get("studies") or [self.data]
        means = [((study.get("calibration") or {}).get("latency_ms") or {}).get("mean") for study in studies]
        return [mean for mean in means if isinstance(mean, int | float)]

    @property
    def environment(self) -> Mapping[str, Any]:
        return self.data.get("environment") or {}

    @property
    def invalid(self) -> list[str]:
        """What could not be measured properly, each with its reason."""
        named = [(title_of(run), run) for run in self.runs] + [(str(row["name"]), row) for row in self.rows]
        said = [f"{title}: {one.get('invalid_reason') or 'no reason given'}" for title, one in named if one.get("valid") is False]
        return said + [f"{one.get('name')}: {one.get('sentence')}" for one in self.data.get("findings", []) if one.get("valid") is False]


def read(path: str) -> Record:
    """The record of a file; - is standard input. Raises RecordError."""
    name = "standard input" if path == "-" else path
    try:
        if path == "-":
            text = sys.stdin.buffer.read(_MOST_BYTES + 1)
        else:
            with open(path, "rb") as file:
                text = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise RecordError(f"cannot read {name}: {error.strerror}") from error
    if not text.strip():
        raise RecordError(f"{name} is empty")
    if len(text) > _MOST_BYTES:
        raise RecordError(f"{name} has more than {_MOST_BYTES >> 20} MiB: no file of fdpass-bench has")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        began = error.doc.lstrip()[:1] == "{"
        if began and (error.pos >= len(error.doc.rstrip()) - 1 or error.msg.startswith("Unterminated")):
            raise RecordError(f"{name} breaks off in line {error.lineno}: it was not written to its end") from error
        raise RecordError(f"{name} is not JSON: line {error.lineno}: {error.msg}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise RecordError(f"{name} is not JSON") from error
    return record(data, "standard input" if path == "-" else os.path.basename(path))


def record(data: Any, name: str) -> Record:
    """Checks what was read, or is about to be written. Raises RecordError."""
    if not isinstance(data, dict) or "schema" not in data:
        raise RecordError(f"{name} is JSON, but not a file that fdpass-bench wrote: it has no schema")
    if data["schema"] != SCHEMA:
        raise RecordError(f"{name} has schema {data['schema']!r}; this version of fdpass-bench knows schema {SCHEMA}")
    _check(data, _OF_THE_WHOLE, name)
    _check(data.get("environment") or {}, _OF_THE_ENVIRONMENT, f"{name}: environment")
    for number, one in enumerate([data, *(data.get("studies") or [])]):
        where = f"{name}: study {number}" if number else name
        _check(one, {"calibration": {str: object}, "work": {str: object}, "comparisons": [{str: object}]}, where)
        _check_all(one.get("comparisons") or [], _OF_A_COMPARISON, f"{where}: comparison")
        _check(one.get("calibration") or {}, {"latency_ms": {str: _NUMBER}}, f"{where}: calibration")
    if isinstance(data.get("runs"), list):
        _check_runs(data["runs"], name)
        _check_all(data.get("rankings") or [], _OF_A_RANKING, f"{name}: ranking")
        return Record(name, "balance", data)
    if isinstance(data.get("rows"), list):
        _check_rows(data["rows"], name)
        _check_all(data.get("findings", []), {"sentence": str}, f"{name}: finding")
        if not data["rows"] and not data.get("findings"):
            raise RecordError(f"{name} holds no runs: it was interrupted before one had ended")
        return Record(name, "pass", data)
    raise RecordError(f"{name} has neither runs (of balance) nor rows (of pass)")


def _check_runs(runs: list[Any], name: str) -> None:
    if not runs:
        raise RecordError(f"{name} holds no runs: it was interrupted before one had ended")
    for number, run in enumerate(runs, 1):
        where = f"{name}: run {number}"
        _check_one(run, where, "strategy", "scenario")
        _check(run, _OF_A_RUN, where)
        _check(run.get("theory") or {}, _OF_A_THEORY, f"{where}: theory")
        _check(run.get("ci") or {}, {"mean_ms": [_NUMBER], "batches": int}, f"{where}: ci")
        _check_all(run.get("series") or [], _OF_A_SERIES, f"{where}: series")
        _check_all(run.get("events") or [], _OF_AN_EVENT, f"{where}: event")
        _check_all(run.get("steps") or [], _OF_A_STEP, f"{where}: step")


def _check_rows(rows: list[Any], name: str) -> None:
    for number, row in enumerate(rows, 1):
        where = f"{name}: row {number}"
        _check_one(row, where, "what", "name")
        _check(row, _OF_A_ROW, where)
        for side in ("fdpass", "other"):
            _check(row.get(side) or {}, _OF_A_SIDE, f"{where}: {side}")


def _check_one(found: Any, where: str, *words: str) -> None:
    for word in words:
        if not isinstance(found, dict) or not isinstance(found.get(word), str):
            raise RecordError(f"{where} has no {word}")


def _check_all(found: Any, form: Mapping[str, Any], where: str) -> None:
    if not isinstance(found, list):
        raise RecordError(f"{where}s are not a list")
    for number, one in enumerate(found, 1):
        if not isinstance(one, dict):
            raise RecordError(f"{where} {number} is not an object")
        _check(one, form, f"{where} {number}")


def _check(found: Mapping[str, Any], form: Mapping[str, Any], where: str) -> None:
    for key, kind in form.items():
        if found.get(key) is not None and not _is(found[key], kind):
            raise RecordError(f"{where}: {key} does not have the form of schema {SCHEMA}")


def _is(value: Any, kind: Any) -> bool:
    if isinstance(kind, list):
        return isinstance(value, list) and all(_is(one, kind[0]) for one in value)
    if isinstance(kind, dict):
        ((_, of),) = kind.items()
        return isinstance(value, dict) and all(one is None or _is(one, of) for one in value.values())
    return isinstance(value, kind) and not (isinstance(value, bool) and kind not in (object, bool))


# -------------------------------------------------------------------------------- what a run is called


def asked(run: Mapping[str, Any]) -> int | None:
    """How many connections were asked for; None of a closed loop, which makes as many as it can."""
    return None if run.get("clients") or run.get("steps") else run.get("connections")


def conditions(run: Mapping[str, Any]) -> tuple[Any, ...]:
    """What runs must have in common to stand in one table."""
    cell = (run.get("case"), run.get("level"))
    rate = run.get("load") or rate_of(run)
    return run["scenario"], *cell, run.get("workers"), rate, asked(run), run.get("requests_per_connection")


def rate_of(run: Mapping[str, Any]) -> float | None:
    """Connections per second that were asked for."""
    rate = (run.get("work") or {}).get("rate")
    return rate if isinstance(rate, int | float) else None


def condition_of(run: Mapping[str, Any]) -> str:
    """ "steady, load 0.7, 4 workers"; "matrix, many-cheap, heavy, 4 workers", where the cell says the load and how many requests."""
    parts = [run["scenario"], *(run[name] for name in ("case", "level") if run.get(name))]
    if run.get("case"):
        pass
    elif run.get("load"):
        parts.append(f"load {run['load']:.2g}")
    elif rate := rate_of(run) or run.get("offered_per_s"):
        parts.append(f"{rate:.4g} connections/s")
    if run.get("workers") and run.get("server") != "target":
        parts.append(_workers(run))
    if (run.get("requests_per_connection") or 1) > 1 and not run.get("case"):
        parts.append(f"{run['requests_per_connection']} requests per connection")
    return ", ".join(parts)


def _workers(run: Mapping[str, Any]) -> str:
    return f"{run['workers']} worker{'s' if run['workers'] > 1 else ''}"


def title_of(run: Mapping[str, Any]) -> str:
    return f"{run['strategy']}, {condition_of(run)}"


def grouped(runs: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Runs under the same conditions, each in the order of the file."""
    return _by(runs, conditions)


Axis = Literal["load", "rate", "workers", "cell"]


@dataclass(frozen=True)
class Section:
    """Runs of one scenario: `groups` of them under the same conditions, which differ in `axis` alone, in its order; "cell" is the case and
    the level of matrix, in the file's order; None where there is one group."""

    axis: Axis | None
    groups: list[list[Mapping[str, Any]]]

    @property
    def runs(self) -> list[Mapping[str, Any]]:
        return [run for group in self.groups for run in group]

    @property
    def title(self) -> str:
        """ "steady, 4 workers: load 0.3 to 0.9"."""
        first, last = self.groups[0][0], self.groups[-1][0]
        if self.axis is None:
            return condition_of(first)
        rated = ("load", "work", "offered_per_s")
        if self.axis == "cell":
            return f"{condition_of(_without(first, 'case', 'level', 'requests_per_connection', *rated))}: all cells"
        if self.axis == "workers":
            loads, rates = ({of(group[0]) for group in self.groups} for of in (lambda run: run.get("load"), rate_of))
            changing = ["offered_per_s", *(["load"] if len(loads) > 1 else []), *(["work"] if len(rates) > 1 else [])]
            return f"{condition_of(_without(first, 'workers', *changing))}: {first['workers']} to {_workers(last)}"
        ends = f"{place_on(self.axis, first):.4g} to {place_on(self.axis, last):.4g}"
        return f"{condition_of(_without(first, *rated))}: {f'load {ends}' if self.axis == 'load' else f'{ends} connections/s'}"

    def place_of(self, group: Sequence[Mapping[str, Any]]) -> str:
        """What is particular about a group: "0.3", "4", "many-cheap, light"."""
        run = group[0]
        if self.axis is None:
            return condition_of(run)
        return f"{run['case']}, {run.get('level') or '-'}" if self.axis == "cell" else f"{place_on(self.axis, run):.4g}"


def place_on(axis: Axis, run: Mapping[str, Any]) -> float:
    """Of a run of a section with that axis, which is no cell."""
    return float((rate_of(run) if axis == "rate" else run.get(axis)) or 0)


def _without(run: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key not in keys}


def sections(runs: Iterable[Mapping[str, Any]]) -> list[Section]:
    """All runs, each once. A sweep of loads, of rates, or of workers at the same load or rate, is one section, and so is a matrix."""
    found = []
    for same in _by(runs, lambda run: (run["scenario"], None if run.get("case") else run.get("requests_per_connection"))):
        if same[0].get("case"):
            found.append(Section("cell", grouped(same)))
            continue
        left = []
        for of_workers in _by(same, lambda run: run.get("workers")):
            places = _by(of_workers, lambda run: run.get("load") or rate_of(run))
            axis: Axis = "load" if all(group[0].get("load") for group in places) else "rate"
            if len(places) > 1 and all(place_on(axis, group[0]) for group in places):
                found.append(Section(axis, sorted(places, key=lambda group: place_on(axis, group[0]))))
            else:
                left += of_workers
        groups = grouped(left)
        counts = [group[0].get("workers") for group in groups]
        # At one rate each number of workers has another load.
        loads, rates = ({of(group[0]) for group in groups} for of in (lambda run: run.get("load"), rate_of))
        alike = len(loads) == 1 or (len(rates) == 1 and None not in rates)
        if len(groups) > 1 and all(counts) and len(set(counts)) == len(groups) and alike:
            found.append(Section("workers", sorted(groups, key=lambda group: place_on("workers", group[0]))))
        else:
            found += [Section(None, [group]) for group in groups]
    return found


def _by(runs: Iterable[Mapping[str, Any]], key: Callable[[Mapping[str, Any]], Any]) -> list[list[Mapping[str, Any]]]:
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return list(groups.values())
