"""Rolls of a worker group under load: nobody notices, and a new program version that does not start changes nothing."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import psutil
import pytest

import fdpass

sys.path.insert(0, str(Path(__file__).parent))
import roll_targets as targets

METHODS = ("fork", "spawn", "forkserver")
STRATEGIES = ("shared", "reuseport", "reuseport-bare", "dispatch")
#: The successors of a fork group are forked beside the supervising thread, which CPython warns of.
FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def until(condition: Callable[[], object]) -> None:
    """Waits for a condition; the test's own time limit is the only one. One that spins takes the processor from what it waits for."""
    while not condition():
        time.sleep(0.001)


def group(target: Any, workers: int = 2, address: str = "127.0.0.1:0", **options: Any) -> fdpass.WorkerGroup:
    return fdpass.WorkerGroup(target, address, workers=workers, **options)


def ask(endpoint: fdpass.Endpoint, word: str = "hello") -> list[str]:
    with socket.create_connection(endpoint.address[:2], timeout=30) as sock:
        sock.sendall(word.encode())
        parts = []
        while part := sock.recv(4096):
            parts.append(part)
    return b"".join(parts).decode().split()


def pids(running: fdpass.WorkerGroup) -> list[int]:
    return [one.pid for one in running.stats()]


class Load:
    """Clients in threads, each asking again and again; what fails is kept. Leaving the block ends them."""

    def __init__(self, running: fdpass.WorkerGroup, clients: int = 3) -> None:
        self.endpoint, self.failed, self.answered, self.over = running.endpoint, [], 0, threading.Event()
        self.answer = threading.Condition()
        self.threads = [threading.Thread(target=self.run, args=(number,), name=f"fdpass-test-{number}") for number in range(clients)]

    def run(self, number: int) -> None:
        for count in itertools.count():
            if self.over.is_set():
                return
            word = f"{number}-{count}"
            try:
                answer = ask(self.endpoint, word)
                if answer[-1:] != [word]:
                    self.failed.append(f"{word}: {answer}")
            except (OSError, fdpass.ClosedError) as error:
                self.failed.append(f"{word}: {error!r}")
            with self.answer:
                self.answered += 1
                self.answer.notify_all()

    def __enter__(self) -> Self:
        for thread in self.threads:
            thread.start()
        self.more()
        return self

    def more(self, count: int = 40) -> None:
        """Waits for so many more answers."""
        with self.answer:
            wanted = self.answered + count
            self.answer.wait_for(lambda: self.answered >= wanted)

    def __exit__(self, *exc: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()


class Switch:
    """A file on which the workers' behaviour depends, as on the code that they load."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "version"
        self.to("old")

    def to(self, word: str) -> None:
        self.path.write_text(word)

    def group(self, workers: int = 2, **options: Any) -> fdpass.WorkerGroup:
        return group(targets.versioned, workers, args=(str(self.path),), **options)


@pytest.fixture
def switch(tmp_path: Path) -> Switch:
    return Switch(tmp_path)


# -- a roll that succeeds ----------------------------------------------------------------------------------------------------


@FORKS
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_worker_is_replaced(switch: Switch, strategy: str, method: str) -> None:
    with switch.group(3, strategy=strategy, start_method=method) as running:
        before = pids(running)
        switch.to("new")
        running.roll()
        after = pids(running)
        assert len({*before, *after}) == 6
        assert not any(psutil.pid_exists(pid) for pid in before)
        stats = running.stats()
        assert {(one.state, one.exitcode, one.restarts) for one in stats} == {("ready", 0, 0)}
        for _ in range(10):
            index, pid, word, _ = ask(running.endpoint)
            assert (int(pid), word) == (after[int(index)], "new")
        assert sum(one.accepted for one in running.stats()) == 10
    assert [one.exitcode for one in running.stats()] == [0, 0, 0]


@pytest.mark.parametrize(
    ("strategy", "target"), [*itertools.product(["shared", "reuseport"], ["serve", "own_loop"]), ("dispatch", "serve")]
)
def test_clients_notice_nothing(strategy: str, target: str) -> None:
    with group(getattr(targets, target), 2, strategy=strategy) as running:
        with Load(running) as load:
            for _ in range(3):
                running.roll()
                load.more()
        assert load.failed == []
        assert sum(one.accepted for one in running.stats()) == (load.answered if target == "serve" else 0)


def test_a_unix_socket_rolls(tmp_path: Path) -> None:
    with group(targets.serve, 2, f"unix:{tmp_path}/s") as running:
        before = pids(running)
        running.roll()
        assert not {*before} & {*pids(running)}
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(tmp_path / "s"))
            sock.sendall(b"x")
            assert sock.recv(100)


@pytest.mark.parametrize("strategy", ["shared", "reuseport", "dispatch"])
def test_rolls_and_kills_together(strategy: str) -> None:
    """What a killed worker had accepted is lost, and nothing else: one connection for each kill, as a worker serves one at a time."""
    with group(targets.serve, 3, strategy=strategy, restart="on-failure") as running:
        kills = 0
        with Load(running) as load:
            for _ in range(3):
                roller = threading.Thread(target=running.roll, name="fdpass-test-roll")
                roller.start()
                victim = running.stats()[kills % 3]
                os.kill(victim.pid, signal.SIGKILL)
                kills += 1
                roller.join()
                load.more()
        assert len(load.failed) <= kills, load.failed
        assert {one.state for one in running.stats()} == {"ready"}


def test_ten_rolls_leave_nothing_behind(fd_count: Callable[[], int]) -> None:
    with group(targets.serve, 2, start_method="forkserver") as running:
        running.roll()
        open_before = fd_count()
        for _ in range(10):
            running.roll()
        assert fd_count() == open_before
        assert len(psutil.Process().children()) >= 2


def test_accepted_never_goes_down() -> None:
    with group(targets.serve, 2, strategy="reuseport-bare") as running:
        for expected in range(1, 4):
            ask(running.endpoint)
            until(lambda expected=expected: sum(one.accepted for one in running.stats()) == expected)
            running.roll()
            assert sum(one.accepted for one in running.stats()) == expected


def test_workers_that_report_count_over_rolls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDPASS_FORCE", "no-passing")
    with group(targets.serve, 2, strategy="reuseport-bare") as running:
        for expected in range(1, 4):
            ask(running.endpoint)
            running.roll()
            assert sum(one.accepted for one in running.stats()) == expected


def test_a_signal_handler_may_roll() -> None:
    with group(targets.serve, 2) as running:
        before = pids(running)
        old = signal.signal(signal.SIGHUP, lambda *_: running.roll())
        try:
            os.kill(os.getpid(), signal.SIGHUP)
            until(lambda: not {*before} & {*pids(running)})
        finally:
            signal.signal(signal.SIGHUP, old)


# -- draining ----------------------------------------------------------------------------------------------------------------


def test_connections_of_a_worker_that_drains_are_served_on() -> None:
    with group(targets.with_threads, 1) as running, socket.create_connection(running.endpoint.address) as kept:
        kept.sendall(b"one")
        pid = kept.recv(100).split()[0]
        roller = threading.Thread(target=running.roll)
        roller.start()
        until(lambda: pids(running) != [int(pid)])
        kept.sendall(b"two")
        assert kept.recv(100).split() == [pid, b"two"]
        with socket.create_connection(running.endpoint.address) as fresh:
            fresh.sendall(b"three")
            assert int(fresh.recv(100).split()[0]) == pids(running)[0] != int(pid)
        kept.close()
        roller.join()
        assert running.stats()[0].exitcode == 0


def test_sigterm_comes_when_nothing_is_left_to_do(tmp_path: Path) -> None:
    note = tmp_path / "open at SIGTERM"
    with group(targets.notes_sigterm, 1, args=(str(note),)) as running, socket.create_connection(running.endpoint.address) as kept:
        pid = kept.recv(100)
        roller = threading.Thread(target=running.roll)
        roller.start()
        until(lambda: pids(running) != [int(pid)])
        assert not note.exists()
        kept.sendall(b"more")
        kept.close()
        roller.join()
        assert note.read_text() == "0"


def test_a_predecessor_that_does_not_end_is_killed() -> None:
    with group(targets.with_threads, 1, stop_timeout=0.3) as running, socket.create_connection(running.endpoint.address) as kept:
        kept.sendall(b"one")
        kept.recv(100)
        running.roll()
        assert running.stats()[0].exitcode == -signal.SIGKILL
        assert running.stats()[0].state == "ready"


def test_clients_that_never_stop_coming_do_not_keep_a_worker_from_ending() -> None:
    """Nobody else takes what is queued at a socket of the worker's own: it does so itself, but not for ever."""
    with group(targets.slow, 1, strategy="reuseport-bare", stop_timeout=2.0) as running:
        with Load(running, clients=4) as load:
            running.stop()
            load.over.set()
        assert running.stats()[0].exitcode == 0


def test_a_worker_that_drains_gets_no_connection_that_it_would_not_take(tmp_path: Path) -> None:
    """Its own socket is shut once its last look is over, however long it goes on with what it accepted."""
    with (
        group(targets.notes_sigterm, 1, strategy="reuseport-bare", args=(str(tmp_path / "note"),)) as running,
        socket.create_connection(running.endpoint.address, timeout=30) as kept,
    ):
        old = kept.recv(100)
        roller = threading.Thread(target=running.roll, name="fdpass-test-roll")
        roller.start()
        slot = running._slots[0]
        until(lambda: slot.leaving is not None and slot.leaving._drained)
        for _ in range(20):
            with socket.create_connection(running.endpoint.address, timeout=30) as fresh:
                assert fresh.recv(100) not in (b"", old)
        kept.close()
        roller.join()
        assert running.stats()[0].exitcode == 0


def test_a_sigterm_right_at_the_end_prints_nothing(run_python: Callable[..., Any]) -> None:
    code = """
import os, signal
from fdpass._worker import _ignore_sigterm

signal.signal(signal.SIGTERM, lambda *_: None)
parent = os.getpid()
pid = os.fork()
if pid == 0:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while os.getppid() == parent:
        os.kill(parent, signal.SIGTERM)
    os._exit(0)
for _ in range(2000):
    _ignore_sigterm()
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
os.kill(pid, signal.SIGKILL)
os.waitpid(pid, 0)
"""
    assert run_python(code).stderr == ""


SCRIPT = """
import signal, sys
sys.path.insert(0, {here!r})
import fdpass, roll_targets as targets
if __name__ == "__main__":
    def leave(*_):
        raise SystemExit(0)
    signal.signal(signal.SIGTERM, leave)
    with fdpass.WorkerGroup(targets.with_threads, "127.0.0.1:0", workers=2, strategy={strategy!r}, restart="on-failure") as group:
        print(group.endpoint.port, *[one.pid for one in group.stats()], flush=True)
        try:
            group.wait()
        finally:
            group.stop()
            print([one.exitcode for one in group.stats()])
"""


@pytest.mark.parametrize("strategy", ["shared", "reuseport", "dispatch"])
def test_sigterm_to_every_process_at_once_cuts_nothing(tmp_path: Path, strategy: str) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(here=str(Path(__file__).parent), strategy=strategy))
    command = [sys.executable, "-W", "error::ResourceWarning", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        port, *workers = map(int, process.stdout.readline().split())
        clients = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(8)]
        for client in clients:
            client.sendall(b"one")
            assert int(client.recv(100).split()[0]) in workers
        os.killpg(process.pid, signal.SIGTERM)
        # Until the listening socket is gone from every process that accepts: the signals have been seen.
        until(lambda: all(not psutil.pid_exists(pid) or _handled(pid) for pid in workers))
        for client in clients:
            client.sendall(b"two")
            assert client.recv(100).split()[1] == b"two"
            client.close()
        out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == ("[0, 0]\n", "", 0)


def _handled(pid: int) -> bool:
    """Whether no SIGTERM is pending for that process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return not any(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1 for line in lines if line.startswith(("SigPnd", "ShdPnd")))


# -- a new version that does not start ---------------------------------------------------------------------------------------


@FORKS
@pytest.mark.parametrize(("strategy", "method"), [*itertools.product(STRATEGIES, ["spawn"]), ("shared", "fork"), ("shared", "forkserver")])
def test_a_successor_that_crashes_leaves_the_old_worker(switch: Switch, strategy: str, method: str) -> None:
    with switch.group(strategy=strategy, start_method=method) as running:
        before = pids(running)
        switch.to("crash")
        with pytest.raises(
            fdpass.WorkerDied, match=rf"^worker-0 \(pid \d+\) exited with code 7: it was never ready; pid {before[0]} serves on$"
        ) as caught:
            running.roll()
        assert caught.value.pid not in before
        assert pids(running) == before
        assert {(one.state, one.restarts, one.exitcode) for one in running.stats()} == {("ready", 0, None)}
        assert ask(running.endpoint)[2] == "old"
        switch.to("new")
        running.roll()
        assert ask(running.endpoint)[2] == "new"


#: What a successor may do instead of becoming ready, by the word that tells it to.
FAILURES = {
    "crash": (fdpass.WorkerDied, "exited with code 7: it was never ready"),
    "exit0": (fdpass.WorkerDied, "exited with code 0: it was never ready"),
    "kill": (fdpass.WorkerDied, "was killed by SIGKILL: it was never ready"),
    "hang": (TimeoutError, r"not ready 1\.5 s after its start"),
    "unready": (TimeoutError, r"not ready 1\.5 s after its start"),
}


# Each of them once, and under each strategy one that ends and one that does not: those are all that the supervisor tells apart.
@pytest.mark.parametrize(
    ("strategy", "word"), [*itertools.product(["shared"], FAILURES), *itertools.product(["reuseport", "dispatch"], ["crash", "unready"])]
)
def test_clients_do_not_notice_a_failed_roll(switch: Switch, strategy: str, word: str) -> None:
    error, text = FAILURES[word]
    with switch.group(strategy=strategy, restart="on-failure") as running:
        before = pids(running)
        with Load(running) as load:
            switch.to(word)
            with pytest.raises(error, match=rf"^worker-0 \(pid \d+\) {text}; pid {before[0]} serves on$"):
                running.roll(timeout=1.5 if error is TimeoutError else None)
            load.more()
        assert load.failed == []
        assert pids(running) == before
        # The successor is gone when the error comes.
        assert {child.pid for child in psutil.Process().children()} & {*before} == {*before}
        assert sum(one.accepted for one in running.stats()) == load.answered


def test_a_successor_that_ends_when_ready_is_no_successor(switch: Switch) -> None:
    with switch.group(restart="on-failure") as running:
        switch.to("brief")
        # Ready and dead at once it is refused; seen ready first it takes the place, and its end is a failure as any other.
        with contextlib.suppress(fdpass.WorkerDied):
            running.roll()


def test_the_start_timeout_is_the_limit(switch: Switch) -> None:
    with switch.group(start_timeout=60) as running:
        running._start_timeout = 0.5
        switch.to("unready")
        with pytest.raises(TimeoutError, match=r"not ready 0\.5 s"):
            running.roll()


def test_a_failure_half_way_keeps_both(switch: Switch) -> None:
    calls: list[int] = []

    def args_for(index: int) -> tuple[str]:
        calls.append(index)
        if len(calls) == 5:
            raise LookupError("no arguments for this one")
        return (str(switch.path),)

    with group(targets.versioned, 3, args_for=args_for) as running:
        before = pids(running)
        switch.to("new")
        with pytest.raises(LookupError, match="no arguments for this one"):
            running.roll()
        after = pids(running)
        assert after[0] != before[0]
        assert after[1:] == before[1:]
        assert {ask(running.endpoint)[2] for _ in range(12)} == {"old", "new"}
        running.roll()
        assert not {*pids(running)} & {*before, *after}


def test_arguments_that_do_not_pickle() -> None:
    given: list[Any] = [("fine",), ("fine",), (threading.Lock(),)]
    with group(targets.serve, 2, args_for=lambda index: given.pop(0)) as running:
        before = pids(running)
        with pytest.raises(TypeError, match="pickle"):
            running.roll()
        assert pids(running) == before
        assert ask(running.endpoint)[2] == "fine"


# -- deaths, stops and interruptions during a roll ---------------------------------------------------------------------------


def rolling(running: fdpass.WorkerGroup, **options: Any) -> tuple[threading.Thread, list[BaseException]]:
    """A roll in a thread of its own, and what it raised. It has started a successor when this returns."""
    raised: list[BaseException] = []

    def roll() -> None:
        try:
            running.roll(**options)
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=roll)
    thread.start()
    until(lambda: any(slot.successor is not None and slot.successor.alive for slot in running._slots))
    return thread, raised


def test_a_predecessor_that_dies_meanwhile_is_followed(switch: Switch) -> None:
    with switch.group(restart="on-failure") as running:
        before = pids(running)
        thread, raised = rolling(running)
        os.kill(before[0], signal.SIGKILL)
        thread.join()
        assert raised == []
        assert not {*pids(running)} & {*before}
        assert [one.restarts for one in running.stats()][1] == 0
        assert ask(running.endpoint)[2] == "old"


def test_a_predecessor_that_dies_with_a_bad_successor_is_restarted(switch: Switch) -> None:
    with switch.group(1, restart="on-failure") as running:
        before = pids(running)
        switch.to("unready")
        thread, raised = rolling(running, timeout=1.0)
        os.kill(before[0], signal.SIGKILL)
        until(lambda: running.stats()[0].restarts == 1)
        thread.join()
        switch.to("new")
        assert isinstance(raised[0], TimeoutError)
        assert "serves on" not in str(raised[0])
        until(lambda: running.stats()[0].state == "ready")
        assert ask(running.endpoint)[2] == "new"


@pytest.mark.parametrize("strategy", ["shared", "reuseport"])
def test_without_restarts_a_death_ends_the_roll(switch: Switch, strategy: str) -> None:
    with switch.group(strategy=strategy) as running:
        switch.to("unready")
        thread, raised = rolling(running)
        os.kill(running.stats()[1].pid, signal.SIGKILL)
        thread.join()
        assert isinstance(raised[0], fdpass.WorkerDied)
        assert "worker-1" in str(raised[0])
        with pytest.raises(fdpass.WorkerDied, match="worker-1"):
            running.roll()


def test_one_roll_at_a_time_and_a_stop_ends_it(switch: Switch) -> None:
    with switch.group() as running:
        switch.to("unready")
        thread, raised = rolling(running)
        with pytest.raises(RuntimeError, match="another roll of this group is under way"):
            running.roll()
        running.stop()
        thread.join()
        assert isinstance(raised[0], fdpass.ClosedError)
        assert "stopped during the roll" in str(raised[0])
        with pytest.raises(fdpass.ClosedError, match="was stopped"):
            running.roll()
    assert [one.exitcode for one in running.stats()] == [0, 0]


def test_a_stop_while_a_predecessor_drains() -> None:
    with group(targets.with_threads, 1, stop_timeout=60) as running, socket.create_connection(running.endpoint.address) as kept:
        kept.sendall(b"one")
        pid = int(kept.recv(100).split()[0])
        raised: list[BaseException] = []

        def roll() -> None:
            try:
                running.roll()
            except fdpass.ClosedError as error:
                raised.append(error)

        thread = threading.Thread(target=roll)
        thread.start()
        until(lambda: pids(running) != [pid])
        running.stop(timeout=0.3)
        thread.join()
        assert len(raised) == 1


@pytest.mark.parametrize("ready", [True, False])
def test_an_interrupted_roll_leaves_whole_workers(switch: Switch, ready: bool) -> None:
    with switch.group(stop_timeout=30) as running:
        before = pids(running)
        if not ready:
            switch.to("unready")

        def interrupt() -> None:
            until(lambda: running._slots[0].successor is not None and running._slots[0].successor.alive)
            if ready:
                until(lambda: pids(running)[0] != before[0])
            os.kill(os.getpid(), signal.SIGINT)

        helper = threading.Thread(target=interrupt)
        helper.start()
        with pytest.raises(KeyboardInterrupt):
            running.roll()
        helper.join()
        until(lambda: running._roll is None and all(len(slot.processes) == 1 for slot in running._slots))
        assert pids(running)[1] == before[1] or ready
        assert (pids(running)[0] == before[0]) is not ready
        assert ask(running.endpoint)[2] == "old"
        switch.to("new")
        running.roll()
        assert ask(running.endpoint)[2] == "new"


def test_no_roll_where_there_is_no_running_group() -> None:
    idle = group(targets.serve, 1)
    with pytest.raises(RuntimeError, match="not started"):
        idle.roll()
    with pytest.raises(ValueError, match="0 or more seconds"):
        idle.roll(timeout=-1)
    idle.stop()
    with pytest.raises(fdpass.ClosedError):
        idle.roll()
    with group(targets.serve, 1) as running:
        os.kill(running.stats()[0].pid, signal.SIGKILL)
        with pytest.raises(fdpass.WorkerDied):
            running.wait()
        with pytest.raises(fdpass.WorkerDied, match="SIGKILL"):
            running.roll()


def test_a_roll_out_of_args_for_is_refused() -> None:
    told: list[str] = []
    made: list[fdpass.WorkerGroup] = []

    def args_for(index: int) -> tuple[()]:
        if made and made[0]._state == "running":
            try:
                made[0].roll()
            except RuntimeError as error:
                told.append(str(error))
        return ()

    running = group(targets.serve, 1, args_for=args_for)
    made.append(running)
    with running:
        running.roll()
    assert "wait for itself" in told[0]


def test_a_finished_worker_is_not_brought_back() -> None:
    """Under shared, exit status 0 means that a worker has done its work."""
    with group(targets.serve, 2) as running:
        os.kill(running.stats()[0].pid, signal.SIGTERM)
        until(lambda: running.stats()[0].state == "ended")
        before = pids(running)
        running.roll()
        assert pids(running)[0] == before[0]
        assert pids(running)[1] != before[1]
