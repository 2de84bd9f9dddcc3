"""What is said of a server that ran already: sentences, each from a figure that was measured, and none where it was not.
It knows what was seen and what the load showed, and measures nothing."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fdpass_bench.figures import Figures
from fdpass_bench.holders import pids_of
from fdpass_bench.servers import TargetServer
from fdpass_bench.target import Seen

_KNOWN = 0.8  # of the connections one by one, before it is said who took how many
_HERD = 1.5  # processes that a connection wakes, from which on it is one too many
_BY_CHANCE = 0.05  # a share that chance makes as often is not called uneven
_LEAST_WORK = 0.05  # seconds of processor time, below which shares of it are noise
_LAG_SHARE = 0.10  # of a figure, that may be the generator's own lateness
_MOST_NAMED = 8  # processes


def seen_of(one: Figures) -> Seen | None:
    """What was seen of this server, None of one that is no target."""
    return one.server.seen if isinstance(one.server, TargetServer) else None


def as_json(one: Figures) -> dict[str, Any]:
    """What a target's run says beyond what every run does."""
    seen = seen_of(one)
    return seen.as_json() | {"cpu_share_of": _work_of(one, seen) or None} if seen else {}


def sentences(one: Figures) -> list[str]:
    """Of a target, from how it is shared to what would help; empty of other servers."""
    seen = seen_of(one)
    if seen is None:
        return []
    found = [_sharing(one.name, seen), _one_by_one(seen), _woken(seen), _answered(one), _work(one, seen), *seen.black_holes]
    if seen.status is not None and seen.status >= 300:
        found.append(f"It answers GET {seen.target.path} with status {seen.status}, and that is what was measured.")
    found.append(_advice(one, seen))
    return [text for text in found if text]


# -------------------------------------------------------------------------------- who serves


def _sharing(name: str, seen: Seen) -> str:
    workers = [process.pid for process in seen.workers]
    if seen.unknown is not None:
        return f"Which processes serve {name} is unknown: {seen.unknown}."
    if not workers:
        more = "; as root (sudo) this command sees more" if os.geteuid() else ""
        return (
            f"Which processes serve {name} is unknown: the socket is {seen.owner}'s, and none that this user may look into took any{more}."
        )
    named = pids_of(workers) if len(workers) <= _MOST_NAMED else f"pids {workers[0]} to {workers[-1]}"
    passing = _passing(seen)
    if passing:
        to = "another process" if len(workers) == 1 else f"{len(workers)} others"
        return f"{name}: one process accepts ({pids_of(passing)}) and passes connections on to {to} ({named})."
    if seen.sockets > 1:
        stalled = f": while one stalls, expect 1 in {seen.sockets} connections to wait for it" if seen.sockets == len(workers) else ""
        many = "One process has" if len(workers) == 1 else f"{len(workers)} processes have"
        return f"{name}: {many} {seen.sockets} sockets ({named}), each with its own queue, and a hash chooses{stalled}."
    if len(workers) == 1:
        return f"{name}: one process serves ({named})."
    return f"{name}: {len(workers)} processes share one socket ({named})."


def _passing(seen: Seen) -> list[int]:
    """Those who wait for connections, where others serve them."""
    serving = {process.pid for process in seen.workers}
    waiting = [process.pid for process in seen.processes if process.does.startswith(("waits", "busy"))]
    return waiting if waiting and not serving & set(waiting) else []


def _took(seen: Seen) -> list[int]:
    """How many of the connections one by one each worker took; empty where too little is known of it."""
    enough = len(seen.workers) > 1 and seen.known >= 10 and seen.known >= _KNOWN * len(seen.latency)
    return [process.took for process in seen.workers] if enough else []


def _one_by_one(seen: Seen) -> str:
    took = _took(seen)
    if not took:
        return ""
    counts = ", ".join(map(str, took)) if len(took) <= _MOST_NAMED else f"between {min(took)} and {max(took)} each"
    return f"Of {seen.known} connections, one after the other, they took {counts} (even: {sum(took) / len(took):.3g})."


def _woken(seen: Seen) -> str:
    if seen.woken is None or seen.waiters < 2:
        return ""
    woken = f"{seen.woken:.1f}"
    if seen.woken < _HERD:
        return f"Each of these woke {woken} of the {seen.waiters} that wait."
    wasted = f"{float(woken) - 1:.1f}"
    return f"Each of these woke {woken} of the {seen.waiters} that wait: {wasted} for nothing; with an exclusive wait it would be 1."


# -------------------------------------------------------------------------------- under load


def _answered(one: Figures) -> str:
    outcomes, work = one.outcomes, one.work
    total, ok = sum(outcomes.values()), outcomes["ok"]
    what = "connections" if work.requests == 1 else "requests"
    one_or_more = "1 client" if work.clients == 1 else f"{work.clients} clients"
    at = f"in a closed loop of {one_or_more}" if work.clients else f"at {work.rate:.3g} connections/s"
    if not total:
        return f"Nothing was measured {at}: INVALID: {_reasons(one)}."
    failed = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in outcomes.items() if count and name != "ok")
    said = f"All {total} {what} {at} were answered in time" if ok == total else f"{ok} of {total} {what} {at} were answered ({failed})"
    if one.valid:
        return f"{said}: mean {_ms(one.latency['mean'])}, p99 {_ms(one.latency['p99'])}."
    median, lag = one.latency.get("p50"), one.parts["lag"].get("p50", 0.0)
    # That the generator was late at one in a hundred says nothing against the median.
    if ok == total and median and lag <= _LAG_SHARE * median:
        said += f", half of them within {_ms(median)}"
    # What had no answer has none without a schedule either.
    again = "" if work.clients or ok < total else "; --clients 4 measures them without a schedule"
    return f"{said}. Their mean and p99 are INVALID: {_reasons(one)}{again}."


def _reasons(one: Figures) -> str:
    """Each once: what happened in every repeat is not said for every repeat."""
    bare = [re.sub(r"^repeat \d+: ", "", reason) for reason in one.reasons]
    kinds = {reason.partition(":")[0]: reason for reason in reversed(bare)}
    return "; ".join(reversed(kinds.values()))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def _work_of(one: Figures, seen: Seen) -> dict[int, float]:
    """The share of each worker in the processor time of all; empty where one of them came or went, or too little was done."""
    pids = [process.pid for process in seen.workers]
    if not all(set(trial.cpu_of) == set(pids) for trial in one.trials):
        return {}
    spent = {pid: sum(trial.cpu_of[pid] for trial in one.trials) for pid in pids}
    total = sum(spent.values())
    return {pid: round(seconds / total, 4) for pid, seconds in spent.items()} if total >= _LEAST_WORK else {}


def _work(one: Figures, seen: Seen) -> str:
    shares = _work_of(one, seen)
    if len(shares) < 2:
        return ""
    busiest = max(shares, key=shares.__getitem__)
    most, even = f"{shares[busiest]:.0%}", f"{1 / len(shares):.0%}"
    return f"The busiest (pid {busiest}) did {most} of the work of {len(shares)}, in processor time (even: {even})."


# -------------------------------------------------------------------------------- what would help


def _advice(one: Figures, seen: Seen) -> str:
    took = _took(seen)
    shared = seen.sockets == 1 and seen.waiters > 1
    if shared and seen.woken is not None and (seen.woken >= _HERD or _uneven(took)):
        return _remedy(seen)
    sound = one.valid and one.outcomes["ok"] == sum(one.outcomes.values()) and not seen.black_holes
    if shared and seen.woken is not None and took and sound:
        return "Nothing was seen that wants mending."
    return ""


def _uneven(took: Sequence[int]) -> bool:
    """Whether one of them took more than chance would give to any: of 40 connections 17 of four workers, 11 of eight."""
    if not took:
        return False
    count, share = sum(took), 1 / len(took)
    as_many = math.fsum(math.comb(count, most) * share**most * (1 - share) ** (count - most) for most in range(max(took), count + 1))
    return len(took) * as_many < _BY_CHANCE


def _remedy(seen: Seen) -> str:
    """For the servers that fdpass is known to help; it does not reach the waits of others."""
    commands = " ".join(process.command for process in seen.processes)
    if "fdpass" in commands:
        return ""
    gives = "wakes one worker for each connection, and idle ones take turns"
    if re.search(r"\bgunicorn\b", commands):
        if "uvicorn" not in commands.lower():
            return ""
        return f"What helps: a worker class with fdpass's event loop {gives} (docs/recipes.md, gunicorn with uvicorn workers)."
    if re.search(r"\buvicorn\b", commands):
        loop = "new_uvloop_event_loop" if _maps(seen.workers[0].pid, "uvloop") else "new_event_loop"
        return f"What helps: uvicorn --loop fdpass.aio:{loop} (pip install fdpass) {gives}."
    if re.search(r"\bhypercorn\b", commands):
        return f"What helps: hypercorn's serve() on fdpass.aio.new_event_loop {gives} (docs/recipes.md)."
    return ""


def _maps(pid: int, library: str) -> bool:
    try:
        return library in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


def verdict(found: Sequence[Figures]) -> str:
    """Of all targets, one text; empty where there is none."""
    return " ".join(text for one in found for text in sentences(one))
