"""A JSON file of `balance` or `pass`, read and checked: what does not have the form of schema 1 is one sentence, never a traceback.
It knows the form, and draws and judges nothing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

SCHEMA = 1
_MOST_BYTES = 256 << 20  # of a file: one with every run of a day has a few megabytes

_NUMBER = (int, float)
#: What is read of a run, and its type; each key may be absent or null.
_OF_A_RUN: Mapping[str, Any] = {
    "work": {str: object},
    "workers": int,
    "connections": int,
    "repeats": int,
    "per_worker": [int],
    "requests_per_worker": [int],
    "requests_per_connection": int,
    "max_over_mean": _NUMBER,
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
_OF_A_COMPARISON: Mapping[str, Any] = {"sentence": str}
_OF_THE_WHOLE: Mapping[str, Any] = {
    "environment": {str: object},
    "work": {str: object},
    "parameters": {str: object},
    "calibration": {str: object},
    "ideals": {str: {str: object}},
    "studies": [{str: object}],
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
    if isinstance(data.get("runs"), list):
        _check_runs(data["runs"], name)
        _check_all(data.get("comparisons", []), _OF_A_COMPARISON, f"{name}: comparison")
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
    return isinstance(value, kind) and not (isinstance(value, bool) and kind is not object)


# -------------------------------------------------------------------------------- what a run is called


def asked(run: Mapping[str, Any]) -> int | None:
    """How many connections were asked for; None of a closed loop, which makes as many as it can."""
    return None if run.get("clients") or run.get("steps") else run.get("connections")


def conditions(run: Mapping[str, Any]) -> tuple[Any, ...]:
    """What runs must have in common to stand in one table."""
    return run["scenario"], run.get("workers"), run.get("load"), asked(run), run.get("requests_per_connection")


def condition_of(run: Mapping[str, Any]) -> str:
    """ "steady, load 0.7, 4 workers"."""
    parts = [run["scenario"]]
    if run.get("load"):
        parts.append(f"load {run['load']:.2g}")
    elif run.get("offered_per_s"):
        parts.append(f"{run['offered_per_s']:.4g} connections/s")
    if run.get("workers") and run.get("server") != "target":
        parts.append(f"{run['workers']} worker{'s' if run['workers'] > 1 else ''}")
    if (run.get("requests_per_connection") or 1) > 1:
        parts.append(f"{run['requests_per_connection']} requests per connection")
    return ", ".join(parts)


def title_of(run: Mapping[str, Any]) -> str:
    return f"{run['strategy']}, {condition_of(run)}"


def grouped(runs: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Runs under the same conditions, each in the order of the file."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault(conditions(run), []).append(run)
    return list(groups.values())
