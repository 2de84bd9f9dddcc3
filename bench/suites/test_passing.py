"""What passing a descriptor costs: sent, received and closed by fdpass, by the standard library and by C, in one run. Also the import.

Run with: pytest bench/suites   (needs cc; the table of ratios is at the end; --benchmark-json=FILE keeps every round)
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from fdpass_bench.contenders import InC, compile_program

import fdpass

ROUNDS = 300
WARM_UP = 20
#: Operations in a round, so that one takes about a millisecond.
OPERATIONS = {1: 150, 253: 8}
IMPORT_ROUNDS = 41


# -------------------------------------------------------------------------------- rounds that belong together


class Playback:
    """A clock for pytest-benchmark that plays rounds which were measured already: they are taken in turns, a round of each
    contender after the other, so that whatever else this machine does in the meantime hits all of them alike."""

    def __init__(self) -> None:
        self.readings: Iterator[float] = iter(())

    def load(self, rounds: list[float]) -> None:
        ends = list(itertools.accumulate(rounds))
        self.readings = itertools.chain.from_iterable(zip([0.0, *ends[:-1]], ends, strict=True))

    def __call__(self) -> float:
        return next(self.readings)


playback = Playback()
played = pytest.mark.benchmark(timer=playback)


def play(benchmark: Any, rounds: list[float]) -> None:
    playback.load(rounds)
    benchmark.pedantic(lambda: None, rounds=len(rounds))


def in_turns(contenders: dict[str, Callable[[], float]], rounds: int, warm_up: int) -> dict[str, list[float]]:
    """Seconds of each round of each contender, the first in a row changing from round to round."""
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(warm_up + rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            elapsed = contenders[name]()
            if index >= warm_up:
                seconds[name].append(elapsed)
    return seconds


# -------------------------------------------------------------------------------- descriptors


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C program, compiled here and now."""
    try:
        return compile_program(tmp_path_factory.mktemp("passing"))
    except RuntimeError as error:
        pytest.skip(str(error))


def measure(program: Path, count: int) -> dict[str, list[float]]:
    """Rounds of fdpass, the standard library and C, in turns, on one processor; seconds for one operation."""
    operations = OPERATIONS[count]
    left, right = socket.socketpair()
    read, write = os.pipe()
    fds, payload = [read] * count, [b"x"]
    send_fds, recv_fds, std_send, std_recv, close = fdpass.send_fds, fdpass.recv_fds, socket.send_fds, socket.recv_fds, os.close

    def ours() -> float:
        start = perf_counter()
        for _ in range(operations):
            send_fds(left, payload, fds)
            for fd in recv_fds(right, 1, count).fds:
                fd.close()
        return (perf_counter() - start) / operations

    def standard() -> float:
        start = perf_counter()
        for _ in range(operations):
            std_send(left, payload, fds)
            for fd in std_recv(right, 1, count)[1]:
                close(fd)
        return (perf_counter() - start) / operations

    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})  # the child inherits it
    try:
        with contextlib.closing(InC(program, count)) as in_c:
            contenders = {"fdpass": ours, "standard": standard, "C": lambda: sum(in_c(operations)) / operations}
            seconds = in_turns(contenders, ROUNDS, WARM_UP)
    finally:
        os.sched_setaffinity(0, before)
        for fd in (read, write):
            os.close(fd)
        left.close()
        right.close()
    return seconds


@pytest.fixture(scope="module", params=[1, 253], ids=["1-descriptor", "253-descriptors"])
def passed(request: pytest.FixtureRequest, program: Path, ratios: Any) -> dict[str, list[float]]:
    seconds = measure(program, request.param)
    what = "1 descriptor" if request.param == 1 else f"{request.param} descriptors"
    ratios.add(what, "standard library", 1.0 if request.param == 1 else None, seconds["fdpass"], seconds["standard"])
    ratios.add(what, "C", 2.0 if request.param == 1 else 1.6, seconds["fdpass"], seconds["C"])
    return seconds


@played
@pytest.mark.parametrize("contender", ["fdpass", "standard", "C"])
def test_send_receive_close(benchmark: Any, passed: dict[str, list[float]], contender: str, request: pytest.FixtureRequest) -> None:
    benchmark.group = f"send, receive, close: {request.node.callspec.params['passed']}"
    play(benchmark, passed[contender])


# -------------------------------------------------------------------------------- import


@pytest.fixture(scope="module")
def imported(ratios: Any) -> dict[str, list[float]]:
    """Processor seconds that an import adds to a bare interpreter's run: unlike the clock's, they do not grow with what else runs here."""

    # The warm-up leaves compiled modules behind; where that is forbidden the rounds would measure the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def run(code: str) -> Callable[[], float]:
        def once() -> float:
            pid = os.posix_spawn(sys.executable, [sys.executable, "-P", "-c", code], environment)
            _, status, usage = os.wait4(pid, 0)
            assert status == 0, f"python -c {code!r} failed"
            return usage.ru_utime + usage.ru_stime

        return once

    programs = {"bare": "pass", "fdpass": "import fdpass", "multiprocessing.reduction": "import multiprocessing.reduction"}
    seconds = in_turns({name: run(code) for name, code in programs.items()}, IMPORT_ROUNDS, 2)
    bare = sorted(seconds["bare"])[IMPORT_ROUNDS // 2]
    # One baseline for all rounds: subtracted pair by pair, it would add its own noise to theirs.
    net = {name: [max(one - bare, 0.0) for one in rounds] for name, rounds in seconds.items()}
    ratios.add("import fdpass", "multiprocessing.reduction", 1.3, net["fdpass"], net["multiprocessing.reduction"])
    return net


@played
@pytest.mark.parametrize("contender", ["fdpass", "multiprocessing.reduction"])
def test_import(benchmark: Any, imported: dict[str, list[float]], contender: str) -> None:
    benchmark.group = "import, processor time net of a bare interpreter"
    play(benchmark, imported[contender])
