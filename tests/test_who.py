"""`who`: who waits for connections, told from real processes that accept, poll, hold or are stopped; and black holes."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fdpass_bench import holders, sockdiag, waiting, who

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it reads Linux's /proc")

#: What a process does with a listening socket; each says a line when it is about to.
WAYS = {
    "accept": "print(flush=True); s.accept()",
    "poll": "p = select.poll(); p.register(s, select.POLLIN); print(flush=True); p.poll()",
    "select": "print(flush=True); select.select([s], [], [])",
    "epoll": "p = select.epoll(); p.register(s, select.EPOLLIN); print(flush=True); p.poll()",
    "nested": "p = select.epoll(); p.register(s, select.EPOLLIN); q = select.epoll(); q.register(p, 1); print(flush=True); q.poll()",
    "busy": "p = select.epoll(); p.register(s, select.EPOLLIN); print(flush=True); signal.pause()",
    "holds": "print(flush=True); signal.pause()",
    "other": "o = socket.socket(); o.bind(('127.0.0.1', 0)); o.listen(); print(flush=True); select.select([o], [], [])",
}


@contextlib.contextmanager
def process(way: str, listener: socket.socket) -> Iterator[subprocess.Popen[str]]:
    code = f"import select, signal, socket, sys; s = socket.socket(fileno=int(sys.argv[1])); {WAYS[way]}"
    command = [sys.executable, "-c", code, str(listener.fileno())]
    with subprocess.Popen(command, pass_fds=[listener.fileno()], stdout=subprocess.PIPE, text=True) as found:
        try:
            assert found.stdout is not None
            assert found.stdout.readline() == "\n"
            # It has said so; now until it sleeps.
            deadline = time.monotonic() + 30
            while b") S " not in Path(f"/proc/{found.pid}/stat").read_bytes():
                assert time.monotonic() < deadline
                select.select([], [], [], 0.001)
            yield found
        finally:
            found.kill()


@contextlib.contextmanager
def group(members: int) -> Iterator[list[socket.socket]]:
    """Listening sockets that share a port."""
    with contextlib.ExitStack() as stack:
        found: list[socket.socket] = []
        port = 0
        for _ in range(members):
            one = stack.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            one.bind(("127.0.0.1", port))
            port = one.getsockname()[1]
            found.append(one)
        for one in found:
            one.listen(16)
        yield found


def inode(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino


def readable() -> bool:
    return os.access("/proc/self/syscall", os.R_OK)


@pytest.mark.parametrize("way", WAYS)
def test_what_a_process_does_about_a_socket(way: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, process(way, listener) as one:
        found = waiting.look(one.pid, [inode(listener)])
        if not readable():
            pytest.skip("where a thread sleeps is not to be seen here")
        assert found.unknown is None
        expected = {"nested": "epoll"}.get(way, way)
        assert found.waits == ({} if way in ("busy", "holds", "other") else {inode(listener): expected})
        assert found.watches == ({inode(listener)} if way in ("epoll", "nested", "busy") else set())
        assert not found.stopped


def test_a_closed_number_that_an_epoll_still_watches() -> None:
    # The registration belongs to the open socket, not to the number: another holder keeps it alive.
    code = "import os, select, sys; fd = int(sys.argv[1]); p = select.epoll(); p.register(fd, 1); os.close(fd); print(flush=True); p.poll()"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [sys.executable, "-c", code, str(listener.fileno())]
        with subprocess.Popen(command, pass_fds=[listener.fileno()], stdout=subprocess.PIPE, text=True) as one:
            try:
                assert one.stdout is not None
                one.stdout.readline()
                assert waiting.look(one.pid, [inode(listener)]).watches == {inode(listener)}
            finally:
                one.kill()


def test_a_stopped_process_waits_for_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, process("accept", listener) as one:
        one.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 30
        while not (found := waiting.look(one.pid, [inode(listener)])).stopped:
            assert time.monotonic() < deadline
        assert found.waits == {}


# ---------------------------------------------------------------------------------------------------------------- black holes


def shown(port: int, capsys: pytest.CaptureFixture[str], window: float = 0.3) -> tuple[int, str]:
    if not readable():
        pytest.skip("where a thread sleeps is not to be seen here")
    status = who.show(port, window)
    return status, " ".join(capsys.readouterr().out.split())


def test_a_member_that_nobody_accepts_from_is_a_black_hole(capsys: pytest.CaptureFixture[str]) -> None:
    # The test itself holds both: what SO_REUSEPORT does to a program that forgets one.
    with group(2) as (served, forgotten), process("epoll", served):
        status, out = shown(served.getsockname()[1], capsys)
        assert status == 1
        assert "a reuseport group: 2 sockets share the address by SO_REUSEPORT" in out
        assert f"Black hole: socket {inode(forgotten)} (1 of 2 members): no process that holds it (pid {os.getpid()}) was in accept" in out
        assert "what the hash sends there is stranded" in out
        assert f"Black hole: socket {inode(served)}" not in out


def test_a_group_that_is_served_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    with group(2) as (first, second), process("accept", first), process("poll", second):
        status, out = shown(first.getsockname()[1], capsys)
        assert status == 0
        assert "Black hole" not in out
        assert "waits (accept)" in out
        assert "waits (poll)" in out
        assert "0 of at most 32 connections wait to be accepted" in out


def test_a_worker_that_is_stuck_or_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    with group(2) as (first, second), process("select", first), process("busy", second) as stuck:
        with contextlib.ExitStack() as clients:
            while not sum(found.queue for found in sockdiag.listening_sockets(first.getsockname()[1]) if found.inode == inode(second)):
                clients.enter_context(socket.create_connection(first.getsockname()))
            status, out = shown(first.getsockname()[1], capsys)
        assert status == 1
        assert f"pid {stuck.pid} watches it, but no thread waited there at any look" in out
        assert "wait there, and" in out or "waits there, and" in out
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with process("accept", listener) as one:
            port = listener.getsockname()[1]
            one.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, one.pid, os.WSTOPPED | os.WNOWAIT)
            # This process holds it too, and does nothing about it.
            status, out = shown(port, capsys)
        assert status == 1
        assert "stopped" in out


def test_one_queue_is_a_black_hole_only_when_nobody_waits(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, process("holds", listener), process("epoll", listener):
        status, out = shown(listener.getsockname()[1], capsys)
        assert status == 0
        assert "one queue: one socket, shared by 3 processes, 1 of which was seen waiting" in out
        assert "holds it" in out


def member(queues: list[int], waited: bool) -> holders.Member:
    found = holders.Member(sockdiag.ListeningSocket("127.0.0.1:1", 7, queues[0], 10, 0), [holders.Holder(1, "server")], queues)
    if waited:
        found.waited[1] = "epoll"
    return found


def test_a_queue_that_stands_while_others_empty() -> None:
    stands, moves, empty = member([2, 2, 3], True), member([2, 1, 3], True), member([0, 0, 0], True)
    text = holders.warning(stands, [stands, empty], 1.0, 0)
    assert text is not None
    assert "its queue grew from 2 to 3 while those of others emptied" in text
    assert holders.warning(moves, [moves, empty], 1.0, 0) is None
    # When all stand, all are busy: that is load, not a black hole.
    assert holders.warning(stands, [stands, member([5, 5, 5], True)], 1.0, 0) is None


def test_what_cannot_be_known_is_not_claimed() -> None:
    hidden = member([1, 1], False)
    hidden.unknown[1] = "it has an io_uring, which may accept"
    text = holders.warning(hidden, [hidden], 1.0, 0)
    assert (
        text
        == "Whether anybody accepts from socket 7 cannot be told (pid 1: it has an io_uring, which may accept); 1 connection waits there."
    )
    nobody = member([0, 0], False)
    nobody.holders.clear()
    assert "cannot be told" in str(holders.warning(nobody, [nobody], 1.0, 3))
