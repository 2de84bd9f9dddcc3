"""fdpass-bench serve: a group of HTTP workers for curl and wrk, until it is told to end."""

from __future__ import annotations

import sys

import fdpass
from fdpass_bench import answer
from fdpass_bench.strategy import Strategy


def serve(address: str, workers: int, strategy: Strategy) -> int:
    """Serves until KeyboardInterrupt (Ctrl-C, SIGTERM), which is the orderly end; the exit status.

    Raises ValueError for an address or a strategy that it cannot serve by."""
    if strategy.program != "listener":
        raise ValueError(f"serve accepts from the listener itself and runs no {strategy.variant}: --strategy {strategy.name}")
    fdpass.raise_fd_limit()
    try:
        with fdpass.WorkerGroup(
            answer.http, address, workers=workers, strategy=strategy.name, restart="on-failure", name="serve", order=strategy.order
        ) as group:
            print(f"Serving {group.endpoint} ({strategy}, workers: {workers}); Ctrl-C ends it.", flush=True)
            group.wait()
    except KeyboardInterrupt:
        return 0
    except (OSError, RuntimeError, fdpass.FdPassError) as error:
        print(f"fdpass-bench: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 1
    return 0
