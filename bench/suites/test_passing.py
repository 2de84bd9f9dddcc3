"""What passing a descriptor costs: sent, received and closed by fdpass, by the standard library and by C, in one run. Also the import.

Run with: pytest bench/suites   (needs cc; the table of ratios is at the end; --benchmark-json=FILE keeps every round)
"""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

import fdpass

ROUNDS = 300
WARM_UP = 20
#: Operations in a round, so that one takes about a millisecond.
OPERATIONS = {1: 150, 253: 8}
IMPORT_ROUNDS = 41

#: The same work in C. It reads how many operations to do, one number a line, and answers with the nanoseconds that they took.
PROGRAM = r"""
#define _GNU_SOURCE 1
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 253 };
static int ends[2], fds[MOST], count;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void there_and_back(void) {
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(MOST * sizeof(int))];
    } control;
    char byte = 'x';
    struct iovec part = {&byte, 1};
    struct msghdr message;
    struct cmsghdr *rights;
    size_t size = (size_t)count * sizeof(int), i;
    int received[MOST];

    memset(&message, 0, sizeof message);
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control.bytes;
    message.msg_controllen = CMSG_SPACE(size);
    memset(control.bytes, 0, CMSG_SPACE(size));
    rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(size);
    memcpy(CMSG_DATA(rights), fds, size);
    if (sendmsg(ends[0], &message, 0) != 1)
        die("sendmsg");
    message.msg_controllen = sizeof control.bytes;
    if (recvmsg(ends[1], &message, MSG_CMSG_CLOEXEC) != 1)
        die("recvmsg");
    rights = CMSG_FIRSTHDR(&message);
    if (!rights || rights->cmsg_len != CMSG_LEN(size) || (message.msg_flags & MSG_CTRUNC))
        die("not every descriptor arrived");
    memcpy(received, CMSG_DATA(rights), size);
    for (i = 0; i < (size_t)count; i++)
        if (close(received[i]) < 0)
            die("close");
}

int main(int argc, char **argv) {
    struct timespec start, end;
    long operations, i;
    int pipes[2];
    count = argc > 1 ? atoi(argv[1]) : 0;
    if (count < 1 || count > MOST || socketpair(AF_UNIX, SOCK_STREAM, 0, ends) < 0 || pipe(pipes) < 0)
        die("setting up");
    for (i = 0; i < count; i++)
        fds[i] = pipes[0];
    while (scanf("%ld", &operations) == 1) {
        clock_gettime(CLOCK_MONOTONIC, &start);
        for (i = 0; i < operations; i++)
            there_and_back();
        clock_gettime(CLOCK_MONOTONIC, &end);
        printf("%lld\n", (end.tv_sec - start.tv_sec) * 1000000000LL + (end.tv_nsec - start.tv_nsec));
        fflush(stdout);
    }
    return 0;
}
"""


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
    compiler = shutil.which("cc") or shutil.which(str(sysconfig.get_config_var("CC") or "gcc").split()[0])
    if compiler is None:
        pytest.skip("no C compiler: install gcc or clang")
    place = tmp_path_factory.mktemp("passing")
    (place / "passing.c").write_text(PROGRAM)
    subprocess.run([compiler, "-O2", "-o", "passing", "passing.c"], cwd=place, check=True)
    return place / "passing"


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
        with subprocess.Popen([program, str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:

            def in_c() -> float:
                print(operations, file=child.stdin, flush=True)
                return int(child.stdout.readline()) / operations / 1e9  # type: ignore[union-attr]  # stdout is a pipe, asked for above

            seconds = in_turns({"fdpass": ours, "standard": standard, "C": in_c}, ROUNDS, WARM_UP)
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
