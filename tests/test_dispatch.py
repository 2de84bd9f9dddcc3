"""strategy="dispatch", and the asyncio servers that every strategy has: real workers, real kills, nothing lost."""

from __future__ import annotations

import datetime
import errno
import os
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import fdpass
from fdpass import _board, _syscall
from fdpass._board import ACCEPTED, ASKED, OPEN
from fdpass.aio.server import Server
from fdpass.dispatched import DispatchListener

sys.path.insert(0, str(Path(__file__).parent))
import dispatch_targets as targets

STRATEGIES = ("shared", "reuseport", "reuseport-bare", "dispatch")
FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def group(target: Any, workers: int = 2, address: str = "127.0.0.1:0", **options: Any) -> fdpass.WorkerGroup:
    options.setdefault("strategy", "dispatch")
    return fdpass.WorkerGroup(target, address, workers=workers, **options)


def connect(endpoint: fdpass.Endpoint) -> socket.socket:
    sock = socket.socket(endpoint.socket.family)
    sock.settimeout(60)
    try:
        sock.connect(endpoint.address)
    except BaseException:
        sock.close()
        raise
    return sock


def read(sock: socket.socket) -> str:
    """Everything up to the end."""
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts).decode()


def ask(endpoint: fdpass.Endpoint) -> list[str]:
    with connect(endpoint) as sock:
        return read(sock).split()


def until(condition: Callable[[], object]) -> None:
    """Waits for a condition; the test's own time limit is the only one. One that spins takes the processor from what it waits for."""
    while not condition():
        time.sleep(0.001)


def counts(running: fdpass.WorkerGroup) -> dict[str, int]:
    found: dict[str, int] = running._strategy.counts()  # type: ignore[attr-defined]  # Dispatch's
    return found


def words(running: fdpass.WorkerGroup, word: int) -> list[int]:
    return [line[word] for line in running._lines[: 2 * len(running.stats())]]


def hungry(running: fdpass.WorkerGroup) -> int:
    return int(running._lines[2 * len(running.stats())][0])


def asking(running: fdpass.WorkerGroup, credits: int = 1) -> int:
    """How many workers wait for a connection."""
    return sum(asked - accepted == credits for asked, accepted in zip(words(running, ASKED), words(running, ACCEPTED), strict=True))


def freeze(running: fdpass.WorkerGroup, index: int) -> int:
    """Stops a worker by SIGSTOP, and returns its pid once it is stopped."""
    pid = running.stats()[index].pid
    os.kill(pid, signal.SIGSTOP)
    until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    return pid


def kill(running: fdpass.WorkerGroup, index: int) -> None:
    """Kills a worker, unless it has ended."""
    if running.stats()[index].state != "ended":
        os.kill(running.stats()[index].pid, signal.SIGKILL)
        until(lambda: running.stats()[index].state == "ended")


# -- who gets what -----------------------------------------------------------------------------------------------------------


@FORKS
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_round_robin_is_even_to_idle_workers(method: str) -> None:
    with group(targets.answer, 4, start_method=method) as running:
        until(lambda: asking(running) == 4)
        order = []
        for number in range(40):
            order.append(ask(running.endpoint)[0])
            # The word of the worker may come before it asks again.
            until(lambda number=number: sum(words(running, ACCEPTED)) == number + 1)
            until(lambda: sum(words(running, ASKED)) - sum(words(running, ACCEPTED)) == 4)
        assert Counter(order) == dict.fromkeys("0123", 10)
        assert order[:4] == order[4:8] == order[-4:]
        assert counts(running)["given"] == 40
        assert [one.accepted for one in running.stats()] == [10] * 4
    assert [one.exitcode for one in running.stats()] == [0] * 4
    assert counts(running) == {}


@pytest.mark.parametrize("credits", [1, 3])
def test_a_frozen_worker_holds_at_most_its_credits_and_not_for_long(credits: int) -> None:
    with group(targets.answer, 3, credits=credits) as running:
        until(lambda: sum(words(running, ASKED)) == 3 * credits)
        pid = freeze(running, 1)
        try:
            # More than its credits would let through if they did not count.
            clients = [connect(running.endpoint) for _ in range(60)]
            found = [read(client).split()[0] for client in clients]
            for client in clients:
                client.close()
            # What was given to it lay there for a while, then went to another: nobody waits for it at all.
            assert Counter(found)["1"] == 0
            assert counts(running)["rescued"] <= credits
        finally:
            os.kill(pid, signal.SIGCONT)
        until(lambda: ask(running.endpoint)[0] == "1")


def test_where_no_other_asks_a_frozen_worker_keeps_what_it_has() -> None:
    with group(targets.answer, 1) as running:
        until(lambda: asking(running) == 1)
        pid = freeze(running, 0)
        with connect(running.endpoint) as first, connect(running.endpoint) as second:
            until(lambda: counts(running)["given"] == 1)
            assert select.select([first, second], [], [], 0.3)[0] == []
            assert counts(running) == {"pending": 0, "given": 1, "recovered": 0, "rescued": 0, "lost": 0, "refused": 0}
            # The second waits in the kernel's queue, where the first is too in any other strategy.
            os.kill(pid, signal.SIGCONT)
            assert read(first)
            assert read(second)


def test_connections_wait_in_the_kernel_while_all_are_busy() -> None:
    with group(targets.busy, 2) as running:
        clients = [connect(running.endpoint) for _ in range(10)]
        until(lambda: sum(words(running, ACCEPTED)) == 2)
        until(lambda: hungry(running) == 1)
        assert counts(running)["given"] == 2
        info = running.endpoint.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        assert int.from_bytes(info[24:28], sys.byteorder) == 8  # tcpi_unacked: of a listener, what waits in its queue
        done = set()
        while len(done) < 10:
            for client in select.select([one for one in clients if one not in done], [], [], 60)[0]:
                client.recv(100)
                client.sendall(b"x")
                done.add(client)
        for client in clients:
            client.close()
        until(lambda: asking(running) == 2 and hungry(running) == 0)


def test_least_loaded_evens_out_held_connections() -> None:
    with group(targets.echo, 4, order="least-loaded") as running:
        until(lambda: asking(running) == 4)
        # All at once: a connection waits a little for whoever has less.
        held = [connect(running.endpoint) for _ in range(40)]
        for sock in held:
            sock.recv(100)
        assert max(one.open for one in running.stats()) - min(one.open for one in running.stats()) <= 4
        gone = [sock for sock, at in zip(held, range(40), strict=True) if at % 3 == 0]
        for sock in gone:
            sock.close()
        until(lambda: sum(one.open for one in running.stats()) == 26)
        more = []
        for number in range(14):
            more.append(connect(running.endpoint))
            more[-1].recv(100)
            until(lambda number=number: sum(words(running, OPEN)) == 27 + number and asking(running) == 4)
        assert [one.open for one in running.stats()] == [10] * 4
        for sock in held + more:
            sock.close()


def test_a_load_of_its_own_counts() -> None:
    with group(targets.loaded, 2, order="least-loaded") as running:
        for _ in range(20):
            until(lambda: asking(running) == 2)
            assert ask(running.endpoint)[0] == "1"


def test_threads_accept_together() -> None:
    with group(targets.threads, 1, args=(3,)) as running:
        for _ in range(5):
            clients = [connect(running.endpoint) for _ in range(3)]
            for client in clients:
                assert read(client)
                client.close()
    assert [one.exitcode for one in running.stats()] == [0]


# -- what a worker sees ------------------------------------------------------------------------------------------------------


def test_what_accept_gives_is_what_accept_2_gives(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    for address in ("127.0.0.1:0", "[::1]:0", f"unix:{path}"):
        with group(targets.addresses, 1, address) as running, connect(running.endpoint) as client:
            expected = client.getsockname()
            assert read(client) == repr((expected, client.family.name, True, False))
    assert not path.exists()


def test_the_socket_is_refused_with_a_word_about_what_to_use() -> None:
    with group(targets.socket_raises, 1) as running, connect(running.endpoint) as client:
        assert "fdpass.aio.serve(protocol_factory, listener)" in read(client)


def test_an_accept_that_timed_out_strands_nothing() -> None:
    with group(targets.times_out, 1) as running:
        for _ in range(5):
            assert ask(running.endpoint)[0] == "0"


def test_a_client_that_is_gone_is_passed_over() -> None:
    with group(targets.answer, 1) as running:
        until(lambda: asking(running) == 1)
        pid = freeze(running, 0)
        with connect(running.endpoint) as client:
            until(lambda: counts(running)["given"] == 1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # its close is a reset
        os.kill(pid, signal.SIGCONT)
        assert ask(running.endpoint)[0] == "0"
        assert running.stats()[0].accepted == 2
        until(lambda: running.stats()[0].open == 0)


def test_a_worker_out_of_descriptors_asks_for_nothing() -> None:
    with group(targets.exhausted, 2, credits=4) as running:
        while True:
            control = connect(running.endpoint)
            if control.recv(4) == b"full":
                break
            control.close()
        assert [ask(running.endpoint)[0] for _ in range(40)] == ["1"] * 40
        with control:
            control.sendall(b"x")
            until(lambda: ask(running.endpoint)[0] == "0")
        assert counts(running)["lost"] == 0


def test_a_forked_child_of_a_worker_gets_nothing() -> None:
    with group(targets.forks, 1) as running:
        assert ask(running.endpoint) == ["7"]
        assert ask(running.endpoint) == ["7"]


@pytest.mark.parametrize("kind", ["closes", "shuts", "greedy", "liar", "negative", "floods", "rights", "urgent"])
def test_a_worker_that_misbehaves_harms_only_itself(kind: str) -> None:
    with group(targets.misbehaves, 2, args=(kind,), stop_timeout=1) as running:
        for dead in (False, True):
            if dead:
                kill(running, 0)
            clients = [connect(running.endpoint) for _ in range(30)]
            # One that says it received what lies there gets it back only by its death, like one that accepts and does nothing.
            if kind == "liar" and not dead:
                until(lambda: counts(running)["given"] >= 15)
                kill(running, 0)
            assert {read(client).split()[0] for client in clients} == {"1"}
            for client in clients:
                client.close()
        found = counts(running)
        assert (found["pending"], found["lost"]) == (0, 0)


# -- deaths ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("credits", [1, 5])
def test_what_a_killed_worker_had_not_received_goes_to_another(credits: int) -> None:
    with group(targets.answer, 2, credits=credits, restart="on-failure") as running:
        until(lambda: sum(words(running, ASKED)) == 2 * credits)
        pids = [freeze(running, index) for index in range(2)]
        clients = [connect(running.endpoint) for _ in range(20)]
        until(lambda: counts(running)["given"] == 2 * credits)
        os.kill(pids[0], signal.SIGKILL)
        os.kill(pids[1], signal.SIGCONT)
        assert len([read(client).split()[0] for client in clients]) == 20
        for client in clients:
            client.close()
        found = counts(running)
        assert found["recovered"] + found["rescued"] >= credits
        assert (found["pending"], found["lost"]) == (0, 0)


def test_a_death_is_seen_while_the_supervisor_computes() -> None:
    with group(targets.answer, 2, restart="on-failure") as running:
        until(lambda: asking(running) == 2)
        pids = [freeze(running, index) for index in range(2)]
        clients = [connect(running.endpoint) for _ in range(2)]
        until(lambda: counts(running)["given"] == 2)
        before = sys.getswitchinterval()
        try:
            # From here on no other thread of this process runs Python.
            sys.setswitchinterval(1000)
            os.kill(pids[0], signal.SIGKILL)
            os.kill(pids[1], signal.SIGCONT)
            # select() would let the GIL go: what the clients have got is looked up without.
            for client in clients:
                client.setblocking(False)
            waiting = set(clients)
            while waiting:
                for client in list(waiting):
                    if b"rx" in _tcp_queues(client):
                        waiting.discard(client)
        finally:
            sys.setswitchinterval(before)
        assert running.stats()[0].pid in (pids[0], *(one.pid for one in running.stats()))
        for client in clients:
            client.setblocking(True)
            assert read(client).split()[0] in "01"
            client.close()


def _tcp_queues(sock: socket.socket) -> set[bytes]:
    """Whether something has come, asked in a way that keeps the GIL."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
    return {b"rx"} if int.from_bytes(info[128:136], sys.byteorder) else set()  # tcpi_bytes_received


def test_a_successor_takes_over_on_another_line_and_back() -> None:
    with group(targets.answer, 2, restart="on-failure") as running:
        lines = []
        for _ in range(3):
            dead = running.stats()[0].pid
            os.kill(dead, signal.SIGKILL)
            until(lambda dead=dead: running.stats()[0].pid != dead and running.stats()[0].state == "ready")
            until(lambda: ask(running.endpoint)[0] == "0")
            lines.append([at for at, asked in enumerate(words(running, ASKED)) if at % 2 == 0 and asked])
        found = counts(running)
        assert sum(one.accepted for one in running.stats()) == found["given"] - found["rescued"] - found["recovered"]
        assert any(2 in at for at in lines)


@pytest.mark.parametrize("credits", [1, 4])
def test_kills_under_load_lose_nothing_that_no_worker_had_received(credits: int) -> None:
    with group(targets.answer, 3, credits=credits, restart="on-failure", start_method="forkserver") as running:
        done = threading.Event()
        results: list[str] = []

        def load() -> None:
            while not done.is_set():
                try:
                    results.append("answered" if ask(running.endpoint) else "empty")
                except OSError as error:
                    results.append(type(error).__name__)

        clients = [threading.Thread(target=load) for _ in range(8)]
        for client in clients:
            client.start()
        try:
            for number in range(12):
                index = number % 3
                until(lambda index=index: running.stats()[index].state == "ready")
                target = len(results) + 50
                until(lambda target=target: len(results) >= target)
                os.kill(running.stats()[index].pid, signal.SIGKILL)
        finally:
            done.set()
            for client in clients:
                client.join()
        answered = results.count("answered")
        failed = len(results) - answered
        # A kill takes with it the one connection that its worker had in hand.
        assert failed <= 12
        assert answered > 500
        found = counts(running)
        assert found["lost"] == found["refused"] == 0


def test_retired_workers_connections_go_to_others() -> None:
    with group(targets.answer, 2, credits=3) as running:
        until(lambda: sum(words(running, ASKED)) == 6)
        pids = [freeze(running, index) for index in range(2)]
        clients = [connect(running.endpoint) for _ in range(6)]
        until(lambda: counts(running)["given"] == 6)
        running._strategy.retire(0)  # type: ignore[attr-defined]  # what stop() and roll() do first
        assert counts(running)["recovered"] == 3
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        assert {read(client).split()[0] for client in clients} == {"1"}
        for client in clients:
            client.close()


# -- the supervisor ----------------------------------------------------------------------------------------------------------


def test_a_drain_finishes_what_was_accepted() -> None:
    with group(targets.echo, 2) as running:
        with connect(running.endpoint) as client:
            client.recv(100)
            stopper = threading.Thread(target=running.stop)
            stopper.start()
            until(lambda: any(one.state in ("stopping", "ended") for one in running.stats()))
            client.sendall(b"finished")
            assert client.recv(100) == b"finished"
        stopper.join()
    assert [one.exitcode for one in running.stats()] == [0, 0]


def test_several_groups_at_once_and_again() -> None:
    for _ in range(2):
        with group(targets.answer, 2) as left, group(targets.answer, 2, order="least-loaded") as right:
            for _ in range(10):
                assert {ask(left.endpoint)[1], ask(right.endpoint)[1]} <= {str(one.pid) for one in left.stats() + right.stats()}
            left.stop()
            assert ask(right.endpoint)


@FORKS
def test_a_forked_child_of_the_supervisor_holds_nothing(fd_count: Callable[[], int]) -> None:
    before = fd_count()
    with group(targets.busy, 2) as running:
        clients = [connect(running.endpoint) for _ in range(2)]
        for client in clients:
            client.recv(100)
        stop = threading.Event()

        def more() -> None:
            while not stop.is_set():
                with connect(running.endpoint) as sock:
                    sock.settimeout(1)
                    sock.sendall(b"x")
                    read(sock)

        for client in clients:
            client.sendall(b"x")
            client.close()
        loader = threading.Thread(target=more)
        loader.start()
        try:
            # Forks in the middle of everything: a child that held one connection would keep its client waiting for an end.
            for _ in range(30):
                read_end, write_end = os.pipe()
                pid = os.fork()
                if pid == 0:
                    links = []
                    for name in os.listdir("/proc/self/fd"):
                        try:
                            links.append(os.readlink(f"/proc/self/fd/{name}"))
                        except OSError:
                            pass
                    os.write(write_end, str(sum("fdpass-board" in link for link in links)).encode() + b" %d" % len(links))
                    os._exit(0)
                os.close(write_end)
                with os.fdopen(read_end) as file:
                    boards, number = map(int, file.read().split())
                os.waitpid(pid, 0)
                assert boards == 0
                # The client of the loader, the pipe, the directory, and what multiprocessing keeps for each worker.
                assert number <= before + 12
        finally:
            stop.set()
            loader.join()


def test_out_of_descriptors_the_supervisor_serves_on(full_table: Callable[..., Any]) -> None:
    with group(targets.answer, 2) as running:
        until(lambda: asking(running) == 2)
        clients = [socket.socket() for _ in range(20)]
        with full_table():
            for client in clients:
                client.settimeout(60)
                client.connect(running.endpoint.address)
            assert all(read(client) for client in clients)
            # Each through the one number that is held free.
            assert counts(running)["refused"] >= 20
        for client in clients:
            client.close()
        assert counts(running)["lost"] == 0


def test_what_cannot_be_taken_back_now_is_taken_back_later(full_table: Callable[..., Any]) -> None:
    with group(targets.answer, 2, credits=5) as running:
        until(lambda: sum(words(running, ASKED)) == 10)
        pids = [freeze(running, index) for index in range(2)]
        clients = [connect(running.endpoint) for _ in range(10)]
        until(lambda: counts(running)["given"] == 10)
        with full_table():
            running._strategy.retire(0)  # type: ignore[attr-defined]  # what stop() and roll() do first
            # One fits into the number that is held free.
            assert counts(running)["pending"] == 1
        until(lambda: counts(running)["pending"] == 5)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        assert {read(client).split()[0] for client in clients} == {"1"}
        for client in clients:
            client.close()
        assert counts(running)["lost"] == 0


def test_a_dead_worker_whose_connections_do_not_fit_does_not_keep_the_thread_busy(full_table: Callable[..., Any]) -> None:
    with group(targets.answer, 2, credits=20) as running:
        until(lambda: sum(words(running, ASKED)) == 40)
        pids = [freeze(running, index) for index in range(2)]
        clients = [connect(running.endpoint) for _ in range(40)]
        until(lambda: counts(running)["given"] == 40)
        with full_table():
            kill(running, 0)
            before = sum(os.times()[:2])
            assert select.select([], [], [], 0.5) == ([], [], [])
            assert sum(os.times()[:2]) - before < 0.25
            # What the supervisor held of it made room for some.
            assert counts(running)["pending"] < 20
        os.kill(pids[1], signal.SIGCONT)
        assert {read(client).split()[0] for client in clients} == {"1"}
        for client in clients:
            client.close()
        assert counts(running)["lost"] == 0


def test_a_worker_starts_without_a_descriptor_for_the_thread_to_watch_it(full_table: Callable[..., Any]) -> None:
    with group(targets.answer, 1) as running:
        until(lambda: asking(running) == 1)
        strategy: Any = running._strategy
        share = strategy.share(0, 1)
        share["end"].close()  # so that launched() makes no room
        with fdpass.OwnedFd(os.pidfd_open(os.getpid())) as pidfd, full_table():
            strategy.launched(1, pidfd)
        strategy.ended(1)
        assert ask(running.endpoint)


def test_a_drain_in_the_middle_of_a_request_withdraws_it(board: _board.Board, unix_pair: tuple[socket.socket, socket.socket]) -> None:
    class Interrupted(_syscall.Asking):
        """A signal's handler that drains comes between the look at the state and the request."""

        def ask(self, count: int, wake: bool = False) -> None:
            listener.drain()
            super().ask(count, wake)

    end = socket.socket(fileno=os.dup(unix_pair[0].fileno()))
    listener = DispatchListener(end, 0, 1, (socket.AF_INET, socket.SOCK_STREAM, 0), board.lines[0], board.lines[4])
    listener._asking = Interrupted(end.fileno(), board.lines[0], board.lines[4])
    try:
        listener._ask()
        assert board.lines[0][ASKED] == 0
    finally:
        listener._close()
        listener._events.close()
        for fd in (listener._wake_read, listener._wake_write):
            os.close(fd)


def test_a_listener_that_is_shut_down_does_not_keep_the_thread_busy() -> None:
    with group(targets.answer, 2) as running:
        assert ask(running.endpoint)
        running.endpoint.socket.shutdown(socket.SHUT_RDWR)
        process = psutil.Process()
        before = sum(process.cpu_times()[:2])
        with pytest.raises(ConnectionRefusedError):
            connect(running.endpoint)
        assert select.select([], [], [], 0.5) == ([], [], [])
        assert sum(process.cpu_times()[:2]) - before < 0.25
        # Whoever shut it down may listen again.
        running.endpoint.socket.listen(10)
        assert ask(running.endpoint)


def test_a_program_that_closes_everything_ends(run_python: Callable[..., Any]) -> None:
    code = """
import os, sys
sys.path.insert(0, sys.argv[1])
import dispatch_targets as targets, fdpass
if __name__ == "__main__":
    listener = fdpass.listen("127.0.0.1:0")
    listener.socket.listen()
    board = fdpass._board.Board.create(3)
    made = fdpass._syscall.Dispatcher(listener.fileno(), board.fd.fileno(), 2, False, 1)
    os.close(made.attach(0))
    os.closerange(3, 4096)
    made.stop()
    listener.socket.detach(), board.fd.release()
"""
    run_python(code, str(Path(__file__).parent))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"order": "rotate"}, ValueError, "round-robin, least-loaded"),
        ({"credits": 0}, ValueError, "1 to 128, not 0"),
        ({"credits": 129}, ValueError, "1 to 128, not 129"),
        ({"credits": 1.5}, TypeError, "number"),
        ({"credits": True}, TypeError, "number"),
        ({"credits": 2, "strategy": "shared"}, ValueError, "belongs to strategy 'dispatch'"),
        ({"order": "round-robin", "strategy": "shared"}, ValueError, "none of"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        group(targets.answer, **options)


# -- the dispatcher itself ---------------------------------------------------------------------------------------------------


@pytest.fixture
def board() -> Iterator[_board.Board]:
    made = _board.Board.create(5)
    yield made
    made.close()


def test_the_words_are_the_boards() -> None:
    names = {name: getattr(_board, name) for name in ("WORDS", "OPEN", "ACCEPTED", "LOAD", "ASKED")}
    assert {**names, "HUNGRY": 0} == _syscall.BOARD_WORDS


def test_lines_are_used_again_and_misuse_is_refused(board: _board.Board) -> None:
    with fdpass.listen("127.0.0.1:0") as endpoint:
        endpoint.socket.setblocking(False)
        endpoint.socket.listen()
        with pytest.raises(OSError, match="Invalid argument"):
            _syscall.Dispatcher(endpoint.fileno(), board.fd.fileno(), 4, False, 0)
        with pytest.raises(OSError, match="Bad file descriptor"):
            _syscall.Dispatcher(-1, board.fd.fileno(), 4, False, 1)
        made = _syscall.Dispatcher(endpoint.fileno(), board.fd.fileno(), 4, False, 1)
        try:
            for line in (-1, 4):
                with pytest.raises(OSError, match="Invalid argument"):
                    made.attach(line)
            for _ in range(5):
                end = made.attach(0)
                with pytest.raises(OSError, match="busy"):
                    made.attach(0)
                made.ended(0)
                os.close(end)
            made.ended(0)
            made.retire(0)
            made.launched(0, -1)
        finally:
            made.stop()
        made.stop()
        assert set(made.count().values()) == {0}
        with pytest.raises(OSError, match="not connected"):
            made.attach(0)


def test_sixty_four_workers_on_one_thread() -> None:
    lines = 128
    board = _board.Board.create(lines + 1)
    with fdpass.listen("127.0.0.1:0") as endpoint:
        endpoint.socket.setblocking(False)
        endpoint.socket.listen(100)
        made = _syscall.Dispatcher(endpoint.fileno(), board.fd.fileno(), lines, False, 1)
        # Every second line has a worker, as after half a roll.
        ends = {line: made.attach(line) for line in range(0, lines, 2)}
        workers = {line: _syscall.Asking(end, board.lines[line], board.lines[lines]) for line, end in ends.items()}
        for turn in (1, 2):
            for worker in workers.values():
                worker.ask(turn, wake=True)
            clients = [connect(endpoint) for _ in range(64)]
            until(lambda turn=turn: made.count()["given"] == 64 * turn)
            for line, worker in workers.items():
                os.close(worker.take())
                assert worker.take() == -errno.EAGAIN
                board.lines[line][ACCEPTED] += 1
            for client in clients:
                client.close()
        made.stop()
        for line, worker in workers.items():
            assert worker.take() == -errno.EPIPE
            worker.close()
            os.close(ends[line])
    board.close()


def test_a_pidfd_of_a_process_that_has_ended_already(board: _board.Board) -> None:
    with fdpass.listen("127.0.0.1:0") as endpoint:
        endpoint.socket.setblocking(False)
        endpoint.socket.listen()
        made = _syscall.Dispatcher(endpoint.fileno(), board.fd.fileno(), 4, False, 1)
        try:
            process = subprocess.Popen([sys.executable, "-c", ""])
            pidfd = os.pidfd_open(process.pid)
            process.wait()
            for _ in range(50):
                # The thread frees the line; to free it again, or a new worker on it, does no harm.
                end = made.attach(1)
                made.launched(1, pidfd)
                made.ended(1)
                os.close(end)
                end = made.attach(1)
                board.lines[1][ASKED] = 1
                with connect(endpoint):
                    worker = _syscall.Asking(end, board.lines[1], board.lines[4])
                    worker.ask(1, wake=True)
                    while (number := worker.take()) < 0:
                        pass
                    os.close(number)
                    board.lines[1][ACCEPTED] += 1
                worker.close()
                os.close(end)
                made.ended(1)
            os.close(pidfd)
        finally:
            made.stop()


def test_too_many_descriptors_in_flight_are_tried_again(run_python: Callable[..., Any]) -> None:
    code = """
import os, resource, socket, sys, time
import fdpass
from fdpass import _board, _syscall
endpoint = fdpass.listen("127.0.0.1:0")
endpoint.socket.setblocking(False)
endpoint.socket.listen(100)
board = _board.Board.create(3)
os.setgid(65534), os.setuid(65533)
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
made = _syscall.Dispatcher(endpoint.fileno(), board.fd.fileno(), 2, False, 128)
end = made.attach(0)
worker = _syscall.Asking(end, board.lines[0], board.lines[2])
# Other descriptors of this user are in flight, as many as its limit lets it have.
full = []
left, right = socket.socketpair()
try:
    while True:
        socket.send_fds(left, [b"x"], [0] * 20)
except OSError as error:
    assert error.errno == 109, error
worker.ask(5, wake=True)
clients = [socket.create_connection(endpoint.address) for _ in range(3)]
while made.count()["refused"] < 3:
    pass
while True:
    try:
        right.recv(1, socket.MSG_DONTWAIT)
    except BlockingIOError:
        break
got = []
while len(got) < 3:
    if (number := worker.take()) >= 0:
        got.append(number)
        board.lines[0][_board.ACCEPTED] += 1
made.stop()
[os.close(number) for number in got]
[client.close() for client in clients]
left.close(), right.close(), worker.close(), os.close(end), board.close(), endpoint.close()
"""
    if os.getuid():
        pytest.skip("needs to become another user")
    run_python(code)


# -- asyncio -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with a key and a self-signed certificate for localhost."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    try:
        subprocess.run([*command, "-keyout", str(path), "-out", f"{path}.crt"], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip(f"no openssl to make a certificate with, on {datetime.date.today()}")
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return str(path)


def talk(sock: socket.socket) -> str:
    """Who answers; the echo ends the connection."""
    with sock:
        who = b""
        while not who.endswith(b"\n"):
            who += sock.recv(100)
        sock.sendall(b"end")
        assert sock.recv(100) == b"end"
        assert sock.recv(100) == b""
    return who.decode().split()[0]


@pytest.mark.parametrize("loop", ["stock", "uvloop"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_serve(strategy: str, loop: str) -> None:
    with group(targets.serve, 2, strategy=strategy, args=(loop,)) as running:
        seen = Counter(talk(connect(running.endpoint)) for _ in range(40))
        assert sum(seen.values()) == 40
        until(lambda: [one.open for one in running.stats()] == [0, 0])
        assert [one.accepted for one in running.stats()] == [seen["0"], seen["1"]]
        held = [connect(running.endpoint) for _ in range(6)]
        for sock in held:
            sock.recv(100)
        assert sum(one.open for one in running.stats()) == 6
        # The drain: what was accepted goes on, and the workers end with it.
        stopper = threading.Thread(target=running.stop)
        stopper.start()
        until(lambda: all(one.state in ("stopping", "ended") for one in running.stats()))
        for sock in held:
            sock.sendall(b"still")
            assert sock.recv(100) == b"still"
        for sock in held:
            sock.close()
        stopper.join()
    assert [one.exitcode for one in running.stats()] == [0, 0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_serve_with_tls(strategy: str, certificate: str) -> None:
    context = ssl.create_default_context(cafile=certificate)
    with group(targets.serve, 2, strategy=strategy, args=("stock", certificate)) as running:
        for _ in range(5):
            # A handshake that fails, one that never comes, and a good one.
            with connect(running.endpoint) as plain, connect(running.endpoint):
                plain.sendall(b"not a handshake")
                plain.recv(100)
                assert talk(context.wrap_socket(connect(running.endpoint), server_hostname="localhost")) in "01"
        until(lambda: [one.open for one in running.stats()] == [0, 0])
    assert [one.exitcode for one in running.stats()] == [0, 0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sigterm_to_all_at_once_cuts_nothing(strategy: str) -> None:
    with group(targets.serve, 2, strategy=strategy) as running:
        held = [connect(running.endpoint) for _ in range(6)]
        for sock in held:
            sock.recv(100)
        for one in running.stats():
            os.kill(one.pid, signal.SIGTERM)
        for sock in held:
            sock.sendall(b"still")
            assert sock.recv(100) == b"still"
        for sock in held:
            sock.close()
        until(lambda: {one.state for one in running.stats()} == {"ended"})
    assert [one.exitcode for one in running.stats()] == [0, 0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_protocol_that_cannot_be_made(strategy: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with group(targets.serve_with_failures, 1, strategy=strategy, args=(str(log),)) as running:
        for number in range(1, 10):
            with connect(running.endpoint) as sock:
                if number % 3:
                    assert sock.recv(100)
                else:
                    assert sock.recv(100) == b""
        until(lambda: running.stats()[0].open == 0)
        until(lambda: len(log.read_text().splitlines()) == 3)
        assert set(log.read_text().splitlines()) == {"a connection could not be served: deliberate"}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_serve_may_be_cancelled_and_called_again(strategy: str) -> None:
    with group(targets.serve_cancelled, 1, strategy=strategy, restart="never") as running:
        for word in (b"again", b"again", b"stop"):
            with connect(running.endpoint) as sock:
                sock.recv(100)
                sock.sendall(word)
                assert sock.recv(100) == b"cancelled"
        if strategy == "reuseport":
            with pytest.raises(fdpass.WorkerDied, match="its share"):
                running.wait()
        else:
            running.wait()
    assert [one.exitcode for one in running.stats()] == [0]


@pytest.mark.parametrize("strategy", ["shared", "dispatch"])
def test_an_asyncio_worker_out_of_descriptors_leaves_the_queue(strategy: str) -> None:
    with group(targets.serve_exhausted, 2, strategy=strategy) as running:
        held = []
        while True:
            held.append(connect(running.endpoint))
            if held[-1].recv(100).startswith(b"0"):
                break
        process = psutil.Process(running.stats()[0].pid)
        before = sum(process.cpu_times()[:2])
        # The number that was held free may serve one more.
        more = [connect(running.endpoint) for _ in range(20)]
        assert [sock.recv(100)[:1] for sock in more].count(b"0") <= 1
        assert select.select([], [], [], 0.5) == ([], [], [])
        assert sum(process.cpu_times()[:2]) - before < 0.25
        held[-1].sendall(b"free")
        until(lambda: talk(connect(running.endpoint)) == "0")
        for sock in held + more:
            sock.close()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_server_object(strategy: str) -> None:
    with group(targets.server_object, 1, strategy=strategy) as running, connect(running.endpoint) as sock:
        assert read(sock) == "nothing"
    assert [one.exitcode for one in running.stats()] == [0]


def test_a_worker_that_computes_in_a_callback_has_asked_for_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    with group(targets.computes, 2, args=(str(marker),)) as running:
        socks = [connect(running.endpoint) for _ in range(2)]
        found = [sock.recv(100)[:1] for sock in socks]
        assert sorted(found) == [b"0", b"1"]
        socks[found.index(b"0")].sendall(b"compute")
        assert {talk(connect(running.endpoint)) for _ in range(20)} == {"1"}
        marker.touch()
        assert socks[found.index(b"0")].recv(100) == b"compute"
        for sock in socks:
            sock.close()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_uvicorn(strategy: str) -> None:
    if not (Path(__file__).parent.parent / "examples").exists():
        pytest.skip("the examples are not beside the tests")
    with group(targets.uvicorn, 2, strategy=strategy) as running:
        url = f"http://{running.endpoint}"
        seen = Counter()
        with httpx.Client(timeout=60, headers={"connection": "close"}) as client:
            for _ in range(30):
                answer = client.get(url)
                assert answer.status_code == 200
                seen[answer.text.split()[0]] += 1
        assert sum(seen.values()) == 30
        if strategy == "dispatch":
            assert min(seen["0"], seen["1"]) >= 10
        with httpx.Client(timeout=60) as client:
            assert len({client.get(url).text for _ in range(5)}) == 1  # one connection, kept alive
        until(lambda: sum(one.open for one in running.stats()) == 0)
    assert [one.exitcode for one in running.stats()] == [0, 0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_uvicorn_cuts_nothing_at_a_sigterm_to_all(strategy: str) -> None:
    if not (Path(__file__).parent.parent / "examples").exists():
        pytest.skip("the examples are not beside the tests")
    with group(targets.uvicorn, 2, strategy=strategy) as running:
        clients = [connect(running.endpoint) for _ in range(20)]
        until(lambda: sum(one.accepted for one in running.stats()) == 20)
        for client in clients:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        for one in running.stats():
            os.kill(one.pid, signal.SIGTERM)
        for client in clients:
            assert read(client).startswith("HTTP/1.1 200 ")
            client.close()
        until(lambda: {one.state for one in running.stats()} == {"ended"})
    assert [one.exitcode for one in running.stats()] == [0, 0]


def test_the_server_is_an_asyncio_server() -> None:
    import asyncio

    assert issubclass(Server, asyncio.AbstractServer)
