"""What a conversation costs: an object there and back between two processes, by fdpass and by what the standard library has for it.

Run with: pytest bench/suites/test_channel.py   (on a quiet machine; the table of ratios is at the end)
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import numpy
import pytest

import fdpass

ROUNDS = 60
WARM_UP = 5
ARRAY = 64 << 20


@pytest.fixture(autouse=True)
def one_processor() -> Iterator[None]:
    """Both ends take turns anyway; on one processor the scheduler has no say in the figure."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    yield
    os.sched_setaffinity(0, before)


def talk_back(end: Any) -> None:
    """The far end: sends what it receives."""
    with contextlib.suppress(EOFError):
        while True:
            item = end.recv()
            end.send(item)
            if isinstance(item, tuple):
                item[1].close()


def talk_back_by_hand(end: socket.socket) -> None:
    while True:
        data, fds, _, _ = socket.recv_fds(end, 1 << 16, 1)
        if not data:
            return
        item = pickle.loads(data)
        sock = socket.socket(fileno=fds[0])
        socket.send_fds(end, [pickle.dumps(item)], [sock.fileno()])
        sock.close()


def say_when(end: Any) -> None:
    """The far end of one-way talk: says that something has come."""
    with contextlib.suppress(EOFError):
        while True:
            end.recv()
            end.send(None)


@contextlib.contextmanager
def talking_to(what: Callable[[Any], None], pair: Callable[[], tuple[Any, Any]]) -> Iterator[Any]:
    """The near end of a new pair, while what(far end) runs in a process of its own."""
    near, far = pair()

    def run() -> None:
        near.close()
        what(far)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    far.close()
    yield near
    near.close()
    process.join()
    assert process.exitcode == 0


def there_and_back(end: Any, item: Any, operations: int) -> Callable[[], float]:
    def round_() -> float:
        start = perf_counter()
        for _ in range(operations):
            end.send(item)
            answer = end.recv()
            if isinstance(answer, tuple):
                answer[1].close()
        return (perf_counter() - start) / operations

    return round_


def there_and_back_by_hand(end: socket.socket, sock: socket.socket, operations: int) -> Callable[[], float]:
    def round_() -> float:
        start = perf_counter()
        for _ in range(operations):
            socket.send_fds(end, [pickle.dumps("a socket")], [sock.fileno()])
            data, fds, _, _ = socket.recv_fds(end, 1 << 16, 1)
            pickle.loads(data)
            socket.socket(fileno=fds[0]).close()
        return (perf_counter() - start) / operations

    return round_


def in_turns(contenders: dict[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of each round of each contender, taken in turns, so that what else this machine does hits all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(WARM_UP + rounds):
        for name, contender in contenders.items():
            spent = contender()
            if index >= WARM_UP:
                seconds[name].append(spent)
    return seconds


def test_an_object_with_a_socket(ratios: Any) -> None:
    with (
        socket.socket() as sock,
        talking_to(talk_back, fdpass.Pipe) as channel,
        talking_to(talk_back, multiprocessing.Pipe) as connection,
        talking_to(talk_back_by_hand, socket.socketpair) as hand,
    ):
        seconds = in_turns(
            {
                "fdpass": there_and_back(channel, ("a socket", sock), 50),
                "by hand": there_and_back_by_hand(hand, sock, 50),
                "Connection": there_and_back(connection, ("a socket", sock), 3),
            }
        )
    ratios.add("an object with a socket", "send_fds by hand", 1.4, seconds["fdpass"], seconds["by hand"])
    ratios.add("an object with a socket", "Connection", 0.1, seconds["fdpass"], seconds["Connection"])


@pytest.mark.parametrize(("size", "name", "operations", "target"), [(100, "100 bytes", 100, 1.15), (1 << 20, "1 MiB", 5, 1.0)])
def test_bytes(ratios: Any, size: int, name: str, operations: int, target: float) -> None:
    data = os.urandom(size)
    with talking_to(talk_back, fdpass.Pipe) as channel, talking_to(talk_back, multiprocessing.Pipe) as connection:
        ends = {"fdpass": channel, "Connection": connection}
        seconds = in_turns({contender: there_and_back(end, data, operations) for contender, end in ends.items()})
    ratios.add(f"{name}, there and back", "Connection", target, seconds["fdpass"], seconds["Connection"])


def test_a_large_array(ratios: Any) -> None:
    array = numpy.arange(ARRAY // 8, dtype="f8")
    with talking_to(say_when, fdpass.Pipe) as channel, talking_to(say_when, multiprocessing.Pipe) as connection:
        seconds = in_turns({"fdpass": there_and_back(channel, array, 1), "Connection": there_and_back(connection, array, 1)}, 9)
    ratios.add("an array of 64 MiB", "Connection", 1 / 3, seconds["fdpass"], seconds["Connection"])
