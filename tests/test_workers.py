"""The promises of a worker group, with real processes, real sockets and real kills."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import fdpass

sys.path.insert(0, str(Path(__file__).parent))
import group_targets as targets

METHODS = ("fork", "spawn", "forkserver")
STRATEGIES = ("shared", "reuseport", "reuseport-bare")
#: Forking while other threads run is what CPython warns of; the successors of a fork group are started that way.
FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def ask(endpoint: fdpass.Endpoint) -> list[str]:
    """One connection, read to its end."""
    return talk(endpoint).split()


def connect(endpoint: fdpass.Endpoint) -> socket.socket:
    address = endpoint.address
    if endpoint.socket.family == socket.AF_UNIX:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(30)
        sock.connect(address)
        return sock
    return socket.create_connection(address[:2], timeout=30)


def talk(endpoint: fdpass.Endpoint) -> str:
    with connect(endpoint) as sock:
        parts = []
        while part := sock.recv(65536):
            parts.append(part)
    return b"".join(parts).decode()


def until(condition: Callable[[], object]) -> None:
    """Waits for a condition; the test's own time limit is the only one. One that spins takes the processor from what it waits for."""
    while not condition():
        time.sleep(0.001)


def group(target: Any, workers: int = 2, address: str = "127.0.0.1:0", **options: Any) -> fdpass.WorkerGroup:
    return fdpass.WorkerGroup(target, address, workers=workers, **options)


# -- serving -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_serves_under_every_start_method(strategy: str, method: str) -> None:
    with group(targets.answer, 3, strategy=strategy, start_method=method) as running:
        seen = Counter(ask(running.endpoint)[0] for _ in range(60))
        assert sum(seen.values()) == 60
        assert set(seen) <= {"0", "1", "2"}
        stats = running.stats()
        assert [one.accepted for one in stats] == [seen[str(index)] for index in range(3)]
        assert {one.state for one in stats} == {"ready"}
    assert [one.exitcode for one in running.stats()] == [0, 0, 0]


@pytest.mark.parametrize("method", METHODS)
def test_supervisor_and_workers_hold_the_same_kernel_socket(method: str) -> None:
    with group(targets.answer, 3, start_method=method) as running:
        seen = {ask(running.endpoint)[2] for _ in range(30)}
        assert seen == {str(targets.cookie(running.endpoint.socket))}
    with group(targets.answer, 3, strategy="reuseport", start_method=method) as running:
        held = {str(targets.cookie(sock)) for sock in running._strategy._members}
        seen = {ask(running.endpoint)[2] for _ in range(60)}
        assert len(held) == 3
        assert seen <= held


def test_rotate_spreads_and_first_does_not() -> None:
    with group(targets.answer, 4) as running:
        for _ in range(60):
            before = sum(one.accepted for one in running.stats())
            ask(running.endpoint)
            until(lambda before=before: sum(one.open for one in running.stats()) == 0 and sum(o.accepted for o in running.stats()) > before)
        counts = [one.accepted for one in running.stats()]
        assert max(counts) - min(counts) <= 30  # the even spread itself is a benchmark's figure
        assert min(counts) > 0
    with group(targets.answer, 4, order="first") as running:
        assert sum(Counter(ask(running.endpoint)[0] for _ in range(20)).values()) == 20


def test_a_unix_endpoint_serves_and_its_file_goes(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with group(targets.answer, 2, f"unix:{path}") as running:
        assert str(running.endpoint) == f"unix:{path}"
        assert ask(running.endpoint)[0] in "01"
    assert not path.exists()


def test_an_endpoint_bound_before_and_an_inherited_descriptor() -> None:
    endpoint = fdpass.listen("127.0.0.1:0")
    text = str(endpoint)
    with fdpass.WorkerGroup(targets.answer, endpoint, workers=1) as running:
        assert str(running.endpoint) == text
        assert ask(running.endpoint)[0] == "0"
    with socket.create_server(("127.0.0.1", 0)) as sock, group(targets.answer, 2, f"fd:{sock.fileno()}") as running:
        assert ask(running.endpoint)[2] == str(targets.cookie(sock))
        assert not sock.getblocking() or os.get_blocking(sock.fileno()) is False


def test_arguments_for_all_and_for_each() -> None:
    with group(targets.answer, 2, args=("left", "right")) as running:
        assert ask(running.endpoint)[3:] == ["left", "right"]
    with group(targets.answer, 2, args_for=lambda index: (f"mine-{index}",)) as running:
        for _ in range(8):
            index, _, _, mine = ask(running.endpoint)
            assert mine == f"mine-{index}"


def test_threads_of_one_worker_accept_together() -> None:
    with group(targets.threads, 1, args=(3,)) as running:
        assert all(ask(running.endpoint)[3] in "012" for _ in range(30))
    assert [one.exitcode for one in running.stats()] == [0]


def test_a_server_with_a_loop_of_its_own() -> None:
    with group(targets.takes_socket, 2) as running:
        assert all(ask(running.endpoint)[0] in "01" for _ in range(20))
    assert {one.exitcode for one in running.stats()} == {-signal.SIGTERM}


def test_the_backlog_is_the_groups() -> None:
    with group(targets.small_backlog, 2, backlog=1000) as running:
        ask(running.endpoint)
        info = running.endpoint.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        limit = int.from_bytes(info[28:32], sys.byteorder)  # tcpi_sacked: of a listener, its backlog
        assert limit == min(1000, int(Path("/proc/sys/net/core/somaxconn").read_text()))


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_has_nothing_inheritable(method: str) -> None:
    with group(targets.describe, 2, start_method=method) as running:
        index, strategy, *loose = talk(running.endpoint).split(" ", 3)
        assert strategy == "shared"
        # multiprocessing's own two pipes (sentinel and parent's) are inheritable; nothing of the group's may be a socket.
        assert not any("socket" in word for word in loose), loose
        assert index in "01"


def test_out_of_descriptors_a_worker_leaves_the_queue_and_does_not_spin() -> None:
    with group(targets.exhausted, 2) as running:
        controls = []
        while True:  # whichever connection worker 0 takes first is its control connection
            sock = connect(running.endpoint)
            if sock.recv(1) == b"0":
                controls.append(sock)
                break
            sock.close()
        with controls[0] as control:
            assert control.recv(4) == b"full"
            # The spare descriptor serves one, once worker 0 waits again; then it is out of the queue, and nothing is stranded on it.
            while ask(running.endpoint)[:2] != ["0", "spare"]:
                pass
            assert [ask(running.endpoint)[0] for _ in range(40)] == ["1"] * 40
            control.sendall(b"x")
            failures = None
            while failures is None:
                index, word, *rest = ask(running.endpoint)
                if index == "0" and not rest:
                    failures = int(word)
            # Once when it found out, then only when there seemed to be room: a spinning worker fails thousands of times.
            assert failures < 30


def test_no_descriptor_of_a_group_stays_open_in_a_forked_child() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with group(targets.answer, 2, strategy="reuseport") as running:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            found = [
                os.readlink(f"/proc/self/fd/{fd}")
                for fd in set(os.listdir("/proc/self/fd")) - before
                if Path(f"/proc/self/fd/{fd}").exists()
            ]
            os.write(write, "\n".join(link for link in found if "pipe" not in link and "/proc/" not in link).encode() or b"-")
            os._exit(0)
        os.close(write)
        os.waitpid(pid, 0)
        with os.fdopen(read) as file:
            left = [line for line in file.read().splitlines() if "socket" in line or "fdpass-board" in line or "pidfd" in line]
        # The sentinels' own pidfds do not exist here: what is left over may only be multiprocessing's.
        assert left == []
        assert ask(running.endpoint)[0] in "01"


# -- the start ---------------------------------------------------------------------------------------------------------------


def nothing_left(address: tuple[str, int]) -> None:
    with socket.create_server(address):  # the port is free again
        pass


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_that_ends_in_its_start_ends_the_start(method: str, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    failing = group(targets.exit_unready, 3, f"unix:{path}", args=(3,), start_method=method)
    with pytest.raises(fdpass.WorkerDied, match=r"worker-\d \(pid \d+\) exited with code 3: it was never ready") as caught:
        failing.start()
    assert caught.value.exitcode == 3
    assert caught.value.signal is None
    assert not path.exists()


def test_exit_0_before_ready_is_a_failed_start() -> None:
    with pytest.raises(fdpass.WorkerDied, match="never ready"):
        group(targets.exit_unready, 2, args=(0,)).start()


def test_one_of_several_dies_in_the_start() -> None:
    running = group(targets.die_if_first, 3)
    address = running.endpoint.address
    with pytest.raises(fdpass.WorkerDied, match=r"worker-0 .* was killed by SIGKILL"):
        running.start()
    nothing_left(address)


def test_a_worker_that_is_never_ready_is_a_timeout() -> None:
    running = group(targets.never_ready, 2, start_timeout=0.7)
    with pytest.raises(TimeoutError, match=r"worker-0, worker-1 not ready 0\.7 s after the start"):
        running.start()
    with pytest.raises(RuntimeError, match="starts once"):
        running.start()


def test_arguments_that_do_not_pickle_start_nothing() -> None:
    running = group(targets.answer, 2, args=(threading.Lock(),))
    with pytest.raises(TypeError, match="pickle"):
        running.start()


def test_a_port_that_is_taken_is_refused_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        text = f"127.0.0.1:{sock.getsockname()[1]}"
        for strategy in STRATEGIES:
            with pytest.raises(OSError, match="cannot bind"):
                group(targets.answer, 2, text, strategy=strategy)
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as sock:
        text = f"127.0.0.1:{sock.getsockname()[1]}"
        for strategy in ("reuseport", "reuseport-bare"):
            with pytest.raises(OSError, match="cannot bind"):
                group(targets.answer, 2, text, strategy=strategy)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"workers": 0}, ValueError, "at least 1"),
        ({"workers": 1.5}, TypeError, "number"),
        ({"strategy": "magic"}, ValueError, "shared, reuseport, reuseport-bare, dispatch, auto"),
        ({"order": "last"}, ValueError, "rotate, first, least-loaded"),
        ({"order": "first", "strategy": "reuseport"}, ValueError, "belongs to strategy 'shared'"),
        ({"restart": "always"}, ValueError, "never, on-failure"),
        ({"start_method": "thread"}, ValueError, "fork, spawn, forkserver"),
        ({"args": (1,), "args_for": lambda index: ()}, ValueError, "exclude"),
        ({"backlog": 0}, ValueError, "backlog"),
        ({"address": 8000}, TypeError, "address"),
        ({"address": "nonsense"}, ValueError, "host:port"),
        ({"target": "serve"}, TypeError, "function"),
        ({"stop_timeout": -1}, ValueError, "seconds"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], text: str) -> None:
    call = {"target": targets.answer, "address": "127.0.0.1:0", "workers": 2, **options}
    with pytest.raises(error, match=text):
        fdpass.WorkerGroup(**call)


def test_unix_and_fd_do_not_go_with_reuseport(tmp_path: Path) -> None:
    for strategy in ("reuseport", "reuseport-bare"):
        with pytest.raises(ValueError, match="take 'shared'"):
            group(targets.answer, 2, f"unix:{tmp_path}/s", strategy=strategy)
        with socket.create_server(("127.0.0.1", 0)) as sock, pytest.raises(ValueError, match="take 'shared'"):
            group(targets.answer, 2, f"fd:{sock.fileno()}", strategy=strategy)


def test_an_unguarded_main_is_told_what_is_wrong(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text("import fdpass\ndef serve(listener):\n    pass\nfdpass.WorkerGroup(serve, '127.0.0.1:0').start()\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "put the code that makes it under  if __name__ == '__main__':" in done.stderr


@pytest.mark.parametrize("method", METHODS)
def test_large_arguments_arrive(method: str) -> None:
    with group(targets.measure, 2, args=(b"x" * 3_000_000,), start_method=method) as running:
        assert talk(running.endpoint) == "3000000"


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_large_arguments_whose_reader_dies_do_not_hang_the_start(method: str) -> None:
    with pytest.raises(fdpass.WorkerDied, match=r"exited with code 9: it was never ready"):
        group(targets.measure, 2, args=(targets.Dies(), b"x" * 3_000_000), start_method=method).start()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("by", ["handler", "thread"])
def test_a_stop_during_the_start_ends_it(by: str, method: str) -> None:
    running = group(targets.never_ready, 2, start_method=method)
    fired = threading.Event()

    def stop(*_: object) -> None:
        fired.set()
        running.stop()

    def when_launched() -> None:
        until(lambda: running.stats()[1].state == "starting" and running._thread is not None)
        if by == "thread":
            stop()
        else:
            os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, stop)
    helper = threading.Thread(target=when_launched, name="fdpass-test")  # so named, fork does not count it as a hazard
    try:
        helper.start()
        with pytest.raises(fdpass.ClosedError, match="stopped while it was starting"):
            running.start()
        helper.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert fired.is_set()
    with pytest.raises(RuntimeError, match="starts once"):
        running.start()


# -- strange workers and busy programs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["number", "explosion", "garbage", "half", "flood", "close"])
def test_what_a_worker_says_harms_nobody(kind: str) -> None:
    with group(targets.talks_nonsense, 2, args_for=lambda index: (kind if index == 0 else "flood",)) as running:
        while ask(running.endpoint)[0] != "1":
            pass
        os.kill(running.stats()[1].pid, signal.SIGKILL)  # the group still sees what happens to its workers
        with pytest.raises(fdpass.WorkerDied, match=r"worker-1 .* SIGKILL"):
            running.wait()
    assert running.stats()[0].exitcode in (0, -signal.SIGTERM)


def test_a_handler_that_stops_the_group_may_come_at_any_moment() -> None:
    for _ in range(10):
        running = group(targets.answer, 2, start_method="forkserver")
        before = signal.signal(signal.SIGALRM, lambda *_, running=running: running.stop())
        try:
            running.start()
            signal.setitimer(signal.ITIMER_REAL, 0.002)
            until(lambda running=running: {one.state for one in running.stats()} == {"ended"})
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        running.stop()
        assert [one.exitcode for one in running.stats()] == [0, 0]


def test_exit_status_is_true_beside_a_thread_that_collects_children() -> None:
    import multiprocessing

    done = threading.Event()

    def collect() -> None:
        while not done.is_set():
            multiprocessing.active_children()

    collector = threading.Thread(target=collect)
    collector.start()
    try:
        for _ in range(2):
            with group(targets.exit_with, 8, args=(0,)) as running:
                running.wait()
                assert [one.exitcode for one in running.stats()] == [0] * 8
    finally:
        done.set()
        collector.join()


def test_a_worker_that_forks_is_counted_right() -> None:
    with group(targets.forks, 1) as running:
        for _ in range(3):
            with connect(running.endpoint) as sock:
                assert sock.recv(100) == b"child"
        until(lambda: running.stats()[0].open == 0)
        assert running.stats()[0].accepted == 3


def test_when_all_have_ended_clients_are_refused() -> None:
    with group(targets.return_when_asked, 1) as running:
        address = running.endpoint.address
        talk(running.endpoint)
        running.wait()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        nothing_left(address)


# -- deaths and successors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_failure_is_named_with_its_true_exit_status(method: str) -> None:
    running = group(targets.exit_with, 1, args=(3,), start_method=method)
    # From start() or from wait(): it may end while start() still looks whether all are ready.
    with pytest.raises(fdpass.WorkerDied, match=r"worker-0 \(pid \d+\) exited with code 3$") as caught, running:
        running.wait()
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.name, again.exitcode, str(again)) == ("worker-0", 3, str(caught.value))


@pytest.mark.parametrize("method", METHODS)
def test_a_kill_is_named(method: str) -> None:
    with group(targets.answer, 2, name="api", start_method=method) as running:
        pid = running.stats()[1].pid
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(fdpass.WorkerDied, match=rf"api-1 \(pid {pid}\) was killed by SIGKILL$") as caught:
            running.wait()
        assert caught.value.signal is signal.SIGKILL
        # The other one serves on until the group is left.
        assert ask(running.endpoint)[0] == "0"


@pytest.mark.parametrize("method", METHODS)
def test_clean_exits_are_0_every_time(method: str) -> None:
    for _ in range(3):
        with group(targets.exit_with, 8, args=(0,), start_method=method) as running:
            running.wait()
            assert [one.exitcode for one in running.stats()] == [0] * 8


@FORKS
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_successor_takes_index_and_listener(strategy: str, method: str) -> None:
    with group(targets.answer, 2, strategy=strategy, start_method=method, restart="on-failure") as running:
        for _ in range(2):
            dead = running.stats()[0].pid
            os.kill(dead, signal.SIGKILL)
            until(lambda dead=dead: running.stats()[0].pid != dead and running.stats()[0].state == "ready")
            found: set[str] = set()
            while found != {"0", "1"}:
                index, pid, cookie, *_ = ask(running.endpoint)
                found.add(index)
                assert int(pid) == running.stats()[int(index)].pid
                if strategy == "reuseport":
                    assert int(cookie) == targets.cookie(running._strategy._members[int(index)])
        assert running.stats()[0].restarts == 2
        assert running.stats()[1].restarts == 0


def test_connections_queued_on_a_dead_workers_socket_are_served_by_the_successor() -> None:
    with group(targets.hold, 1, strategy="reuseport", restart="on-failure") as running, connect(running.endpoint) as first:
        assert first.recv(100).startswith(b"0 ")  # the worker is busy with this one
        with connect(running.endpoint) as queued:
            os.kill(running.stats()[0].pid, signal.SIGKILL)
            _, pid = queued.recv(100).split()
            assert int(pid) == running.stats()[0].pid
            queued.sendall(b"bye")
            assert queued.recv(100) == b"bye"


def test_a_failure_in_a_successors_start_backs_off_and_goes_on(tmp_path: Path) -> None:
    with group(targets.fail_second, 1, args=(str(tmp_path / "x"),), restart="on-failure") as running:
        os.kill(running.stats()[0].pid, signal.SIGKILL)
        until(lambda: running.stats()[0].restarts == 2 and running.stats()[0].state == "ready")
        assert ask(running.endpoint)[0] == "0"


def test_successors_that_are_never_ready_end_the_group(tmp_path: Path) -> None:
    import fdpass.workers as module

    before = module.BACKOFF
    module.BACKOFF = 0.01
    try:
        marker = tmp_path / "marker"
        with group(targets.hang_second, 1, args=(str(marker),), restart="on-failure", start_timeout=30) as running:
            running._start_timeout = 0.2
            os.kill(running.stats()[0].pid, signal.SIGKILL)
            with pytest.raises(fdpass.WorkerDied, match="in a row were never ready; no more successors"):
                running.wait()
    finally:
        module.BACKOFF = before


def test_a_crash_loop_ends_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    # A busy machine starts no 30 processes in the 5 s that are meant.
    monkeypatch.setattr("fdpass.workers.RESTART_WINDOW", 300.0)
    running = group(targets.exit_with, 4, args=(5,), restart="on-failure", start_method="forkserver")
    enough = r"exited with code 5: 30 successors were started within 300 s; no more successors"
    with pytest.raises(fdpass.WorkerDied, match=enough), running:
        running.wait()


def test_exit_0_in_shared_is_no_failure() -> None:
    with group(targets.return_when_asked, 2) as running:
        talk(running.endpoint)
        until(lambda: [one.state for one in running.stats()].count("ended") == 1)
        talk(running.endpoint)
        running.wait()
    assert [one.exitcode for one in running.stats()] == [0, 0]


def test_exit_0_in_a_held_strategy_ends_the_group_or_gets_a_successor() -> None:
    with group(targets.return_when_asked, 2, strategy="reuseport") as running:
        talk(running.endpoint)
        with pytest.raises(fdpass.WorkerDied, match="its share of the connections would wait for ever"):
            running.wait()
        until(lambda: {one.state for one in running.stats()} == {"ended"})
    with group(targets.return_when_asked, 1, strategy="reuseport", restart="on-failure") as running:
        for expected in range(1, 4):
            talk(running.endpoint)
            until(lambda expected=expected: running.stats()[0].restarts == expected)


# -- the stop ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_drain_finishes_what_was_accepted(strategy: str) -> None:
    with group(targets.hold, 2, strategy=strategy) as running:
        clients = [connect(running.endpoint)]
        clients[0].recv(100)
        stopper = threading.Thread(target=running.stop)
        stopper.start()
        until(lambda: any(one.state in ("stopping", "ended") for one in running.stats()))
        clients[0].sendall(b"finished")
        assert clients[0].recv(100) == b"finished"
        clients[0].close()
        stopper.join()
    assert [one.exitcode for one in running.stats()] == [0, 0]


def test_a_target_that_knows_no_closederror_ends_cleanly() -> None:
    with group(targets.accept_only, 2) as running:
        talk(running.endpoint)
    assert [one.exitcode for one in running.stats()] == [0, 0]


def test_the_deadline_kills() -> None:
    with group(targets.stubborn, 2) as running:
        running.stop(timeout=0.2)
        assert [one.exitcode for one in running.stats()] == [-signal.SIGKILL] * 2
        running.stop()


def test_stop_without_start_and_twice(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    idle = group(targets.answer, 2, f"unix:{path}")
    assert path.exists()
    idle.stop()
    idle.stop()
    assert not path.exists()
    with pytest.raises(RuntimeError, match="stopped"):
        idle.start()


def test_wait_times_out_and_the_group_goes_on() -> None:
    with group(targets.answer, 1) as running:
        with pytest.raises(TimeoutError, match="still runs"):
            running.wait(timeout=0.01)
        assert ask(running.endpoint)[0] == "0"


SCRIPT = """
import sys, threading
sys.path.insert(0, {here!r})
import fdpass, group_targets as targets
if __name__ == "__main__":
    group = fdpass.WorkerGroup(targets.{target}, "127.0.0.1:0", workers={workers}, start_method={method!r})
    {body}
"""


def script(tmp_path: Path, body: str, target: str = "answer", method: str = "spawn", workers: int = 2) -> list[str]:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(here=str(Path(__file__).parent), target=target, body=body, method=method, workers=workers))
    return [sys.executable, "-W", "error::ResourceWarning", str(path)]


@pytest.mark.parametrize("method", METHODS)
def test_a_program_that_ends_without_stopping_its_group_ends(tmp_path: Path, method: str) -> None:
    done = subprocess.run(
        script(tmp_path, "group.start(); print('ran')", method=method), capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran\n", "")


@pytest.mark.parametrize("method", METHODS)
def test_ctrl_c_ends_all_without_a_traceback_from_a_worker(tmp_path: Path, method: str) -> None:
    body = """group.start()
    try:
        print(*[one.pid for one in group.stats()], flush=True)
        group.wait()
    except KeyboardInterrupt:
        group.stop()
        print('stopped', [one.exitcode for one in group.stats()])
"""
    command = script(tmp_path, body, method=method)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        os.killpg(process.pid, signal.SIGINT)  # what the terminal does
        out, err = process.communicate(timeout=60)
    assert out == "stopped [0, 0]\n"
    assert err == ""
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_sigint_is_ignored_and_not_blocked_in_a_worker() -> None:
    with group(targets.tell_limits, 1) as running:
        handler, blocked, _ = talk(running.endpoint).split("|")
        assert "SIG_IGN" in handler or handler == "1"
        assert "SIGINT" not in blocked


# -- fallback ----------------------------------------------------------------------------------------------------------------


def test_auto_takes_shared_where_descriptors_pass() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with group(targets.describe, 1, strategy="auto") as running:
            assert talk(running.endpoint).split()[1] == "shared"


def test_auto_falls_back_with_one_warning_and_still_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDPASS_FORCE", "no-passing")
    with pytest.warns(RuntimeWarning, match="descriptors cannot be passed here .*reuseport-bare") as caught:
        running = group(targets.describe, 2, strategy="auto")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with running:
        for _ in range(10):
            assert talk(running.endpoint).split()[1] == "reuseport-bare"
    assert sum(one.accepted for one in running.stats()) == 10


# -- several groups and foreign processes ------------------------------------------------------------------------------------


def test_completion_of_everything() -> None:
    import multiprocessing

    foreign = subprocess.Popen([sys.executable, "-c", ""])
    process = multiprocessing.get_context("spawn").Process(target=print, args=("",))
    process.start()
    with group(targets.exit_with, 2, args=(0,)) as running:
        fdpass.wait_for_completion_or_failure(running, foreign, process)
    process.close()


def test_the_first_failure_stops_the_groups_and_is_named() -> None:
    import multiprocessing

    with group(targets.answer, 2) as left, group(targets.answer, 2, name="right") as right:
        foreign = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read(); sys.exit(9)"], stdin=subprocess.PIPE)
        with pytest.raises(TimeoutError, match="3 of 3"):
            fdpass.wait_for_completion_or_failure(left, right, foreign, timeout=0.05)
        assert foreign.stdin is not None
        foreign.stdin.close()
        with pytest.raises(fdpass.WorkerDied, match=rf"\(pid {foreign.pid}\) exited with code 9"):
            fdpass.wait_for_completion_or_failure(left, right, foreign)
        assert {one.state for one in left.stats() + right.stats()} == {"ended"}
    with group(targets.answer, 2) as left, group(targets.answer, 2, name="right") as right:
        os.kill(right.stats()[0].pid, signal.SIGKILL)
        with pytest.raises(fdpass.WorkerDied, match=r"right-0 .* SIGKILL"):
            fdpass.wait_for_completion_or_failure(left, right)
    engine = multiprocessing.get_context("spawn").Process(target=os._exit, args=(4,), name="engine")
    engine.start()
    with group(targets.answer, 1) as left, pytest.raises(fdpass.WorkerDied, match=r"engine .* exited with code 4"):
        fdpass.wait_for_completion_or_failure(left, engine)
    engine.close()


def test_waiting_for_the_wrong_thing() -> None:
    with pytest.raises(TypeError, match="WorkerGroup"):
        fdpass.wait_for_completion_or_failure("worker")  # type: ignore[arg-type]  # the wrong type is what is tested
    fdpass.wait_for_completion_or_failure()
    idle = group(targets.answer, 1)
    with pytest.raises(RuntimeError, match="not started"):
        fdpass.wait_for_completion_or_failure(idle)
    idle.stop()
