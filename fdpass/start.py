"""Which start method a serving program gets, and why. It reads sys.modules and the environment; it never imports what it looks for."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import warnings
from typing import Any

METHODS = ("fork", "spawn", "forkserver")
VARIABLE = "FDPASS_START_METHOD"
#: Threads of ours, which only wait and hold no lock that a child could need.
OWN_THREADS = "fdpass-"

_warned = False


def get_context(method: str | None = None) -> Any:
    """A multiprocessing context. method: fork, spawn or forkserver; None chooses for a program that serves.

    None takes FDPASS_START_METHOD, else fork, the fastest; where fork is unsafe (CUDA or XPU initialised, inside a Ray worker,
    other threads running, macOS) it takes spawn instead of fork and says why, in one RuntimeWarning per process.
    Raises ValueError for any other name, in the argument or in the variable.
    """
    global _warned
    if method is not None:
        if method not in METHODS:
            raise ValueError(f"start method {method!r} is none of {', '.join(METHODS)}")
        return multiprocessing.get_context(method)
    chosen = os.environ.get(VARIABLE) or "fork"
    if chosen not in METHODS:
        raise ValueError(f"{VARIABLE}={chosen!r} is none of {', '.join(METHODS)}")
    if chosen == "fork" and (reasons := fork_hazards()):
        chosen = "spawn"
        if not _warned:
            _warned = True
            warnings.warn(
                f"processes are started with spawn, because fork is unsafe here: {'; '.join(reasons)}", RuntimeWarning, stacklevel=2
            )
    return multiprocessing.get_context(chosen)


def fork_hazards() -> list[str]:
    """Why a fork of this process would be unsafe, each reason in words; empty when nothing speaks against it."""
    reasons = []
    for backend, name in (("cuda", "CUDA"), ("xpu", "XPU")):
        # The submodule is looked up, never imported: an attribute access on torch could load it.
        module = sys.modules.get(f"torch.{backend}")
        if _true(module, "is_initialized"):
            reasons.append(f"{name} is initialised, and does not survive a fork")
    if _in_ray_worker():
        reasons.append("this is a Ray worker, whose threads and connections do not survive a fork")
    others = [
        thread for thread in threading.enumerate() if thread is not threading.current_thread() and not thread.name.startswith(OWN_THREADS)
    ]
    if others:
        names = ", ".join(thread.name for thread in others[:3]) + (", ..." if others[3:] else "")
        reasons.append(
            f"{len(others)} other thread{'s' * (len(others) > 1)} running ({names}), whose locks a child would inherit as they are"
        )
    if sys.platform == "darwin":
        reasons.append("macOS system libraries do not survive a fork")
    return reasons


def _in_ray_worker() -> bool:
    ray = sys.modules.get("ray")
    if not _true(ray, "is_initialized"):
        return False
    worker = getattr(getattr(getattr(ray, "_private", None), "worker", None), "global_worker", None)
    return bool(getattr(worker, "mode", None) == getattr(ray, "WORKER_MODE", 1))


def _true(module: Any, name: str) -> bool:
    asked = getattr(module, name, None)
    try:
        return bool(asked is not None and asked())
    except Exception:  # whatever a half-loaded module raises, it is not initialised
        return False
