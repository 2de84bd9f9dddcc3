"""`fdpass-bench balance`, but for steady: a plan in, what came of it out. Which file measures which scenario."""

from __future__ import annotations

from collections.abc import Callable

import fdpass
from fdpass_bench import loaded, longlived, sharing
from fdpass_bench.peers import PeerError
from fdpass_bench.runs import Plan, Run, Unmeasurable

__all__ = ["Plan", "Run", "expected_seconds", "measure_run"]

_PLAYS = {
    "idle": sharing.play,
    "burst": sharing.play,
    "kill": sharing.play,
    "stall": loaded.stall,
    "rolling": loaded.rolling,
    "long-lived": longlived.play,
    "scale-out": loaded.scale_out,
}


_TAKE = {
    **dict.fromkeys(("idle", "burst", "kill"), sharing.expected_seconds),
    **dict.fromkeys(("stall", "rolling", "scale-out"), loaded.expected_seconds),
    "long-lived": longlived.expected_seconds,
}


def expected_seconds(plan: Plan) -> float:
    """That measure_run() takes, about."""
    return _TAKE[plan.scenario](plan)


def measure_run(plan: Plan, ended: Callable[[int], None]) -> Run:
    """Starts a server, measures, stops it. `ended` is told now and then how far it is, of plan.steps."""
    # Both ends' descriptors: the clients' here, an accepted one in each worker.
    fdpass.raise_fd_limit()
    run = Run(plan, [0] * plan.workers)
    try:
        _PLAYS[plan.scenario](plan, run, ended)
    except Unmeasurable as reason:
        run.invalid_reason = str(reason)
    except PeerError as reason:
        run.invalid_reason = str(reason)
    except (OSError, RuntimeError, ValueError, fdpass.FdPassError) as error:
        run.invalid_reason = f"{type(error).__name__}: {error}"
    return run
