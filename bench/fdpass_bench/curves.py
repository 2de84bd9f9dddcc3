"""What a page draws of a run, in few numbers: the latency at each percentile, theory's beside it, and what each worker took over time.
It knows neither a server nor a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fdpass_bench import theory

_PER_DECADE = 8  # points of a measured curve, by the share of requests that took longer
_MOST_BINS = 60
_THEORY = (0.9, 0.75, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)  # shares that take longer
_WIDTHS = (1, 2, 5)


def of_values(seconds: Sequence[float]) -> dict[str, list[float]] | None:
    """{"percentile": [...], "ms": [...]}, by nearest rank; None for no values.

    Down from the whole to one value of all: 0, 25, 43.8 ... 90 ... 99 ..., eight points for each nine.
    """
    if not seconds:
        return None
    ordered = sorted(seconds)
    count = len(ordered)
    ranks = {0: 0.0}
    for step in range(1, math.floor(math.log10(count) * _PER_DECADE) + 1):
        share = 10 ** (-step / _PER_DECADE)
        ranks[max(0, math.ceil((1 - share) * count) - 1)] = round(100 * (1 - share), 5)
    return {"percentile": list(ranks.values()), "ms": [round(ordered[rank] * 1e3, 4) for rank in ranks]}


def of_theory(prediction: theory.Prediction, bound: theory.Prediction) -> dict[str, list[float]]:
    """{"percentile", "ms", "one_queue_ms"}: a discipline's responses, and those of one queue with the same workers."""
    return {
        "percentile": [round(100 * (1 - share), 5) for share in _THEORY],
        "ms": [round(value * 1e3, 4) for value in prediction.quantiles(_THEORY)],
        "one_queue_ms": [round(value * 1e3, 4) for value in bound.quantiles(_THEORY)],
    }


def series(taken_at: Mapping[int, Sequence[float]], workers: int) -> dict[str, Any]:
    """{"bin_seconds", "per_worker"}: how many requests each worker took in each bin of time. taken_at: by place, seconds from the start.

    Bins are 0.1, 0.2, 0.5, 1 ... s, the shortest that make no more than 60.
    """
    until = max((max(instants) for instants in taken_at.values() if instants), default=0.0)
    widths = (width * 10.0**power for power in range(-1, 9) for width in _WIDTHS)
    width = next(width for width in widths if until < width * _MOST_BINS)
    bins = int(until / width) + 1
    counts = [[0] * bins for _ in range(max(workers, *(place + 1 for place in taken_at)) if taken_at else workers)]
    for place, instants in taken_at.items():
        for instant in instants:
            counts[place][min(bins - 1, max(0, int(instant / width)))] += 1
    return {"bin_seconds": round(width, 1), "per_worker": counts}
