"""Files of `balance` and `pass` with made-up figures, as figures.py, balance.py and price.py write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_LATENCIES = {"mean": 10.0, "stdev": 8.0, "p50": 7.0, "p90": 20.0, "p99": 40.0, "p99_9": 60.0, "max": 80.0}


def latencies(factor: float = 1.0) -> dict[str, float]:
    return {name: factor * value for name, value in _LATENCIES.items()}


def steady(strategy: str = "shared", factor: float = 1.0, half: float = 0.5, load: float = 0.7, **others: Any) -> dict[str, Any]:
    """A run of `steady` as figures.py writes it, with made-up figures."""
    mean = 10.0 * factor
    run: dict[str, Any] = {
        "strategy": strategy,
        "server": "fdpass",
        "scenario": "steady",
        "workers": 2,
        "connections": 1000,
        "repeats": 2,
        "requests_per_connection": 1,
        "per_worker": [990, 1010],
        "requests_per_worker": [990, 1010],
        "max_over_mean": 1.01,
        "switches_per_connection": 0.5,
        "cpu_us_per_connection": 200.0,
        "outcomes": {"ok": 2000, "refused": 0, "reset": 0, "timeout": 0, "bad_answer": 0, "no_port": 0, "no_descriptor": 0},
        "lost_accepted": 0,
        "lost_unaccepted": 0,
        "latency_ms": latencies(factor),
        "offered_per_s": 350.0,
        "ci": {"level": 0.95, "mean_ms": [mean - half, mean + half], "batches": 32},
        "theory": {
            "discipline": "split" if strategy == "reuseport" else "one queue",
            "how": "closed form",
            "latency_ms": latencies(),
            "one_queue_ms": latencies(0.5),
            "share_of_one_queue_bound": 2.0 * factor,
            "latency_curve": {"percentile": [50.0, 90.0, 99.0], "ms": [7.0, 20.0, 40.0], "one_queue_ms": [3.5, 10.0, 20.0]},
        },
        "load": load,
        "latency_curve": {"percentile": [0.0, 50.0, 90.0, 99.0, 99.9], "ms": [0.2, 7.0, 20.0, 40.0, 60.0]},
        "series": [{"repeat": 1, "bin_seconds": 0.5, "per_worker": [[80, 90, 100, 70], [100, 90, 80, 70]]}],
        "service_seconds": 0.004,
        "valid": True,
        "invalid_reason": None,
    }
    return run | others


def kill(strategy: str = "shared", lost: int = 0, **others: Any) -> dict[str, Any]:
    run: dict[str, Any] = {
        "strategy": strategy,
        "scenario": "kill",
        "workers": 2,
        "connections": 200,
        "per_worker": [100, 100 - lost],
        "max_over_mean": 1.0,
        "outcomes": {"ok": 200 - lost, "refused": 0, "reset": lost, "timeout": 0},
        "lost_accepted": 0,
        "lost_unaccepted": lost,
        "service_seconds": 0.05,
        "series": [{"repeat": 1, "bin_seconds": 0.5, "per_worker": [[20, 30, 30, 20], [30, 10, 0, 30]]}],
        "events": [
            {"repeat": 1, "at_seconds": 0.6, "what": "kill", "worker": 1},
            {"repeat": 1, "at_seconds": 0.7, "until_seconds": 1.4, "what": "stall", "worker": 1},
        ],
        "valid": True,
        "invalid_reason": None,
    }
    return run | others


def stall(strategy: str = "shared", delayed: int = 0, **others: Any) -> dict[str, Any]:
    figures = {
        "arrived_while_frozen": 500,
        "delayed": delayed,
        "delayed_share": delayed / 500,
        "delayed_share_split": 0.25,
        "longest_ms": 990.0,
    }
    return kill(strategy, scenario="stall", **figures) | others


def scale_out(strategy: str = "shared", factor: float = 1.0) -> dict[str, Any]:
    steps = [{"workers": k, "connections_per_s": 100.0 * factor * k, "share_of_linear": 1.0} for k in (1, 2, 4)]
    return kill(strategy, scenario="scale-out", clients=8, connections=round(700 * factor), steps=steps)


def row(name: str = "loading a pickle", factor: float = 1.0, **others: Any) -> dict[str, Any]:
    rounds = [factor * value for value in (30.0, 31.0, 29.5, 30.5, 30.2)]
    found: dict[str, Any] = {
        "what": "carriers",
        "name": name,
        "fdpass": {"name": "fdpass", "rounds": 5, "values": 500, "p50_us": 30.0 * factor, "p99_us": 60.0, "p50_us_of_rounds": rounds},
        "other": {"name": "standard library", "p50_us": 200.0, "p99_us": 400.0, "p50_us_of_rounds": [200.0] * 5},
        "times_faster": 6.7 / factor,
        "times_faster_ci": [6.0 / factor, 7.4 / factor],
        "sentence": "fdpass: 6.7 times faster (95 % 6.0 to 7.4), against standard library",
        "valid": True,
        "invalid_reason": None,
    }
    return found | others


ENVIRONMENT = {
    "system": "Linux",
    "kernel": "6.1",
    "machine": "x86_64",
    "python": "3.13.0",
    "fdpass": "0.1.0",
    "command": ["fdpass-bench", "balance"],
}


def balance_file(*runs: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"schema": 1, "environment": ENVIRONMENT, "runs": list(runs), **others}


def pass_file(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"schema": 1, "environment": ENVIRONMENT, "parameters": {}, "rows": list(rows), "findings": [], "verdict": "Faster."}


def written(path: Path, data: dict[str, Any]) -> str:
    path.write_text(json.dumps(data))
    return str(path)
