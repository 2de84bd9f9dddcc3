"""Tensors of 16 floats through torch.multiprocessing.Queue under spawn, sharing strategy file_descriptor: with register() and without.

Run with: pytest bench/suites/test_torch.py   (needs torch: pip install 'fdpass[programs]')
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from typing import Any

import pytest

import fdpass

ROUNDS = {"idle": 21, "computing": 7}
TENSORS = {"idle": 200, "computing": 20}
#: Seconds before each tensor of a computing producer: put at once, they keep its other thread from computing.
GAP = 0.002


# -------------------------------------------------------------------------------- the producer and its receiver, a program of their own


def receive(queue: Any, answers: Any) -> None:
    """Takes as many tensors as it is told, keeps none, and says so; None ends it."""
    import torch

    torch.set_num_threads(1)
    while (count := queue.get()) is not None:
        for _ in range(count):
            queue.get()
        answers.put(count)


def produce() -> None:
    """Reads "idle registered" and the like, a line for each round, and answers with the seconds that a tensor took."""
    import torch
    from torch import multiprocessing

    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    queue, answers = context.Queue(), context.SimpleQueue()
    receiver = context.Process(target=receive, args=(queue, answers))
    receiver.start()
    computing = threading.Event()

    def compute() -> None:
        while True:
            computing.wait()
            sum(range(10_000))

    threading.Thread(target=compute, daemon=True).start()
    for line in sys.stdin:
        producer, how = line.split()
        if how == "registered":
            fdpass.register()
        before = fdpass.store_stats().claims
        count = TENSORS[producer]
        queue.put(count)
        if producer == "computing":
            computing.set()
        start = time.perf_counter()
        for _ in range(count):
            if producer == "computing":
                time.sleep(GAP)
            queue.put(torch.ones(16))
        answers.get()
        elapsed = time.perf_counter() - start
        computing.clear()
        fdpass.unregister()
        claims = fdpass.store_stats().claims - before
        assert claims == (count if how == "registered" else 0), claims
        print(elapsed / count, flush=True)
    queue.put(None)
    receiver.join()


# -------------------------------------------------------------------------------- rounds that belong together


@pytest.mark.skipif(find_spec("torch") is None, reason="no torch to compare with: pip install 'fdpass[programs]'")
@pytest.mark.parametrize("producer", ["idle", "computing"])
def test_tensors_through_a_queue(benchmark: Any, ratios: Any, producer: str) -> None:
    rounds: dict[str, list[float]] = {"registered": [], "plain": []}
    with subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdin is not None
        assert program.stdout is not None

        def one() -> None:
            for how, seconds in rounds.items():
                print(producer, how, file=program.stdin, flush=True)
                seconds.append(float(program.stdout.readline()))

        one()  # the receiver's start, the first ticket
        for seconds in rounds.values():
            seconds.clear()
        benchmark.pedantic(one, rounds=ROUNDS[producer])
        program.stdin.close()
    assert program.returncode == 0
    ours, theirs = rounds["registered"], rounds["plain"]
    ratios.add(f"a tensor through a queue, {producer} producer", "plain", 0.5, ours, theirs)
    for how, seconds in rounds.items():
        benchmark.extra_info[f"tensors per second, {how}"] = round(1 / statistics.median(seconds))
    benchmark.extra_info["ratio"] = round(statistics.median(theirs) / statistics.median(ours), 3)


if __name__ == "__main__":
    produce()
