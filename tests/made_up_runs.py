"""Files of `balance` and `pass` with made-up figures, as figures.py, balance.py and price.py write them."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from fdpass_bench import curves, theory

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


# ------------------------------------------------------------------ what one command can hold: sweeps, a matrix, all scenarios

LOADS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
WORKERS = (1, 2, 4, 8, 16)
CASES = {  # mean service in seconds, requests of a connection
    "many-cheap": (0.001, 1),
    "many-costly": (0.012, 1),
    "kept-cheap": (0.001, 20),
    "kept-costly": (0.012, 20),
}
LEVELS = {"light": 0.25, "medium": 0.5, "heavy": 0.75}
#: Who queues how, and how much slower it is made up to be than theory.
_DISCIPLINES = {"dispatch": "least outstanding", "reuseport": "split"}
PEERS = {"nginx-reuseport": "nginx 1.22.1", "gunicorn": "gunicorn 23.0.0"}


def timed(
    strategy: str, load: float = 0.7, workers: int = 4, service: float = 0.004, connections: int = 4000, **others: Any
) -> dict[str, Any]:
    """A run of an open loop with as much in it as a real one: latencies drawn as its way of queueing has them, 4000 of them."""
    chance = random.Random(f"{strategy} {load} {workers} {service} {others.get('scenario')}")
    peer = strategy in PEERS
    discipline = None if peer else _DISCIPLINES.get(strategy, "one queue")
    rate = load * workers / service
    one, split = theory.one_queue(workers, rate, service), theory.split_queue(workers, rate, service)
    apart = strategy in ("reuseport", "nginx-reuseport")
    waits, speed = (load, (1 - load) / service) if apart else (theory.erlang_c(workers, load), workers * (1 - load) / service)
    seconds = []
    for _ in range(connections):
        waited = chance.expovariate(speed) if chance.random() < waits else 0.0
        seconds.append(0.0003 + chance.expovariate(1 / service) + waited)
    ordered = sorted(seconds)
    at = {
        name: ordered[min(connections - 1, int(share * connections))]
        for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99_9", 0.999))
    }
    mean = statistics.fmean(seconds)
    found = {"mean": mean, "stdev": statistics.stdev(seconds), **at, "max": ordered[-1]}
    half = 2 * found["stdev"] / connections**0.5 / (1 - load) ** 0.5
    taken: dict[int, list[float]] = {worker: [] for worker in range(workers)}
    for number in range(connections):
        taken[chance.randrange(workers)].append(number / rate)
    per_worker = [len(instants) for instants in taken.values()]
    requests = others.get("requests_per_connection", 1)
    work = {
        "workers": workers,
        "connections": connections,
        "rate": rate,
        "service": service,
        "distribution": "exponential",
        "work": "sleep",
    }
    work |= {"arrivals": "poisson", "clients": 0, "requests": requests, "think": 0.0, "seed": 1, "repeats": 2, "time_limit": 10.0}
    work |= {"scenario": others.get("scenario", "steady"), "load": load}
    prediction = split if discipline == "split" else one
    names = ("mean", "p50", "p90", "p99", "p99_9")
    known: dict[str, Any] = {
        "discipline": discipline,
        "how": "closed form",
        "latency_ms": {name: round(getattr(prediction, name) * 1e3, 4) for name in names},
        "one_queue_ms": {name: round(getattr(one, name) * 1e3, 4) for name in names},
        "share_of_one_queue_bound": round(mean / one.mean, 4),
        "latency_curve": curves.of_theory(prediction, one),
    }
    run: dict[str, Any] = {
        "strategy": strategy,
        "server": "peer" if peer else "fdpass",
        "version": PEERS.get(strategy, "0.1.0"),
        "scenario": "steady",
        "case": None,
        "level": None,
        "work": work,
        "workers": workers,
        "connections": connections,
        "repeats": 2,
        "requests_per_connection": 1,
        "per_worker": per_worker,
        "requests_per_worker": per_worker,
        "max_over_mean": round(max(per_worker) * workers / connections, 4),
        "requests_max_over_mean": round(max(per_worker) * workers / connections, 4),
        "switches_per_connection": 0.55,
        "cpu_us_per_connection": 280.0,
        "outcomes": {"ok": connections, "refused": 0, "reset": 0, "timeout": 0, "bad_answer": 0, "no_port": 0, "no_descriptor": 0},
        "lost_accepted": 0,
        "lost_unaccepted": 0,
        "latency_ms": {name: round(value * 1e3, 4) for name, value in found.items()},
        "lag_ms": {name: round(value * 10, 4) for name, value in found.items()},
        "queue_ms": {name: round(value * 400, 4) for name, value in found.items()},
        "service_ms": {name: round(value * 600, 4) for name, value in found.items()},
        "offered_per_s": round(rate, 4),
        "ci": {"level": 0.95, "mean_ms": [round((mean - half) * 1e3, 4), round((mean + half) * 1e3, 4)], "batches": 32},
        "theory": None if peer else known,
        "load": load,
        "latency_curve": curves.of_values(seconds),
        "series": [{"repeat": repeat, **curves.series(taken, workers)} for repeat in (1, 2)],
        "service_seconds": service,
        "valid": True,
        "invalid_reason": None,
    }
    return run | others


def late(run: dict[str, Any]) -> dict[str, Any]:
    """The same, INVALID."""
    return run | {"valid": False, "invalid_reason": "the generator was late by 3.1 ms at p99, more than a tenth of the latency at p99"}


def pairs(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The comparisons of runs under the same conditions, as figures.py writes them."""
    found = []
    for first, second in combinations(runs, 2):
        ratio = first["latency_ms"]["mean"] / second["latency_ms"]["mean"]
        valid = first["valid"] and second["valid"]
        names = f"{first['strategy']} and {second['strategy']}"
        low, high = ratio * 0.9, ratio * 1.1
        if not valid:
            sentence = f"{names}: nothing can be said, one is INVALID"
        elif low <= 1 <= high:
            sentence = f"{names}: no difference that this run can show (mean ratio {ratio:.2f}, 95 % {low:.2f} to {high:.2f})"
        else:
            winner, loser, times = (first, second, 1 / ratio) if ratio < 1 else (second, first, ratio)
            beats = f"{winner['strategy']} beats {loser['strategy']}"
            sentence = f"{beats}: mean {times:.2f} times lower (95 % {times * 0.9:.2f} to {times * 1.1:.2f})"
        one = {name: first.get(name) for name in ("scenario", "workers", "load", "case", "level")}
        one |= {
            "first": first["strategy"],
            "second": second["strategy"],
            "mean_ratio": round(ratio, 4),
            "ci": [round(low, 4), round(high, 4)],
        }
        found.append(one | {"theory": None, "valid": valid, "sentence": sentence})
    return found


def sweep_of_loads(servers: Sequence[str] = ("shared", "reuseport", "gunicorn"), loads: Sequence[float] = LOADS) -> dict[str, Any]:
    """7 loads by 3 servers; the one without theory is INVALID at the highest, another in the middle."""
    groups = [[timed(name, load) for name in servers] for load in loads]
    groups[-1][-1] = late(groups[-1][-1])
    groups[len(groups) // 2][1] = late(groups[len(groups) // 2][1])
    return balance_file(*(run for group in groups for run in group), comparisons=[pair for group in groups for pair in pairs(group)])


def sweep_of_workers(servers: Sequence[str] = ("shared", "reuseport"), counts: Sequence[int] = WORKERS) -> dict[str, Any]:
    groups = [[timed(name, 0.7, workers) for name in servers] for workers in counts]
    groups[-1][0] = late(groups[-1][0])
    return balance_file(*(run for group in groups for run in group), comparisons=[pair for group in groups for pair in pairs(group)])


#: Of heavy load, in milliseconds: mean and p99 of exclusive, reuseport, load-aware.
_PUBLISHED = {
    "many-cheap": ((7.09, 5.10, 5.02), (27.5, 26.9, 26.6)),
    "many-costly": ((121, 213, 10.5), (1030, 1820, 377)),
    "kept-cheap": ((0.97, 0.78, 0.77), (67.6, 35.8, 28.3)),
    "kept-costly": ((95, 182, 136), (593, 1240, 623)),
}
_THEIRS = {"exclusive": "shared:first", "reuseport": "reuseport", "load-aware": "shared:least-loaded"}


def matrix(servers: Sequence[str] = ("shared:first", "reuseport", "shared:least-loaded", "nginx-reuseport")) -> dict[str, Any]:
    """12 cells by 4 servers, and rankings of which some hold, some do not, and some cannot be told."""
    runs, comparisons = [], []
    for case, (service, requests) in CASES.items():
        for level, load in LEVELS.items():
            more: dict[str, Any] = {"scenario": "matrix", "case": case, "level": level, "requests_per_connection": requests}
            cell = [timed(name, load, service=service, connections=1000 if level == "light" else 4000, **more) for name in servers]
            if (case, level) == ("kept-costly", "heavy"):
                cell[1] = late(cell[1])
            runs += cell
            comparisons += pairs(cell)
    heavy = {(run["case"], run["strategy"]): run for run in runs if run["level"] == "heavy"}
    rankings = [
        _ranking(case, measure, (one, other), heavy)
        for measure in ("mean", "p99")
        for case in CASES
        for one, other in combinations(_THEIRS, 2)
    ]
    return balance_file(*runs, comparisons=comparisons, rankings=rankings)


def _ranking(case: str, measure: str, names: tuple[str, str], heavy: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    both = [heavy[case, _THEIRS[name]] for name in names]
    published = [_PUBLISHED[case][measure == "p99"][list(_THEIRS).index(name)] for name in names]
    here = [run["latency_ms"][measure] for run in both] if all(run["valid"] for run in both) else None
    ratio = here[0] / here[1] if here else None
    ci = [round(ratio * 0.95, 3), round(ratio * 1.05, 3)] if ratio and measure == "mean" else None
    holds = (ratio < 1) == (published[0] < published[1]) if ratio and not 0.95 < ratio < 1.05 else None
    lower, higher = names if published[0] < published[1] else names[::-1]
    said = {True: "holds", False: "does not hold", None: "cannot be told"}[holds]
    figures = f"{names[0]} {here[0]:.3g} ms, {names[1]} {here[1]:.3g} ms here" if here else f"{names[1]} is INVALID"
    return {
        "case": case,
        "level": "heavy",
        "measure": measure,
        "first": {"published": names[0], "strategy": _THEIRS[names[0]]},
        "second": {"published": names[1], "strategy": _THEIRS[names[1]]},
        "published_ms": published,
        "here_ms": here,
        "ci": ci,
        "holds": holds,
        "sentence": f"{case}, heavy, {measure}: {lower} is lower than {higher}: {said}, {figures}",
    }


ALL_SERVERS = ("shared", "dispatch", "reuseport", "nginx-reuseport", "gunicorn")


def all_scenarios(servers: Sequence[str] = ALL_SERVERS) -> dict[str, Any]:
    """Every scenario by 3 strategies and 2 peers, some INVALID."""
    runs: list[dict[str, Any]] = []
    for name in servers:
        apart = name in ("reuseport", "nginx-reuseport")
        instants = {worker: [0.05 * step + worker * 0.01 for step in range(80)] for worker in range(4)}
        more: dict[str, Any] = {
            "server": "peer" if name in PEERS else "fdpass",
            "version": PEERS.get(name, "0.1.0"),
            "workers": 4,
            "per_worker": [50, 38, 62, 50] if apart else [50, 49, 51, 50],
            "max_over_mean": 1.24 if apart else 1.02,
            "series": [{"repeat": 1, **curves.series(instants, 4)}],
        }
        rolled = {"rolls": 5, "roll_seconds": [0.41, 0.4, 0.42, 0.39, 0.4], "requests": 9000, "failed": 40 * apart}
        lay = {"opened": 3000, "open_stdev": 14.0 if apart else 1.2, "open_stdev_random": 13.7, "open_range": 31.0 if apart else 4.0}
        runs += [
            kill(name, scenario="idle", connections=60, **more | {"events": []}),
            kill(name, scenario="burst", connections=400, **more | {"events": []}),
            kill(name, lost=12 if apart else 0, **more),
            stall(name, 126 if apart else 2, **more),
            kill(name, scenario="rolling", clients=24, connections=9000, **rolled, **more),
            kill(name, scenario="long-lived", connections=1000, **lay, **more | {"series": [], "events": []}),
            scale_out(name, 0.9 if apart else 1.0) | {"workers": 4},
        ]
    runs[-1] = late(runs[-1])
    runs.sort(key=lambda run: ("idle", "burst", "kill", "stall", "rolling", "long-lived", "scale-out").index(run["scenario"]))
    comparisons = []
    for scenario, requests in (("steady", 1), ("heavy-tail", 1), ("few-clients", 50), ("keep-alive", 10)):
        more = {"scenario": scenario, "requests_per_connection": requests}
        group = [timed(name, connections=4000 // requests, **more) for name in servers]
        if scenario == "heavy-tail":
            group[2] = late(group[2])
        runs += group
        comparisons += pairs(group)
    said = "Shared lost nothing; a frozen worker delayed over half a second: shared 2 of 500, reuseport 126 of 500 (split queues 25%)."
    return balance_file(*runs, comparisons=comparisons, verdict=said)


def whole() -> dict[str, Any]:
    """All of it in one file: what the largest page is made of."""
    parts = [all_scenarios(), sweep_of_loads(ALL_SERVERS), matrix()]
    # The load of `steady` that the sweep has as well would stand there twice.
    runs = [run for run in parts[0]["runs"] if run["scenario"] != "steady"] + parts[1]["runs"] + parts[2]["runs"]
    alone = [pair for pair in parts[0]["comparisons"] if pair["scenario"] != "steady"]
    comparisons = [*alone, *parts[1]["comparisons"], *parts[2]["comparisons"]]
    return balance_file(*runs, comparisons=comparisons, rankings=parts[2]["rankings"], verdict=parts[0]["verdict"])
