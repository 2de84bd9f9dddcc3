"""Other people's servers, each really started: what it answers, that it holds a request, and that nothing of it is left.
What is not a Python package is skipped where it is not installed.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from fdpass_bench import measure, peers, sockdiag
from fdpass_bench.peers import PEERS, RELOADING, Peer, PeerError, Recipe

SERVICE = 20_000_000  # ns

PRELOADED = {name: value for name, value in os.environ.items() if name == "LD_PRELOAD"}

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True)
def no_preload(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sanitizer that these tests run under is for our own C."""
    monkeypatch.delenv("LD_PRELOAD", raising=False)


def peer(name: str, workers: int = 2, service: bool = True, **options: Any) -> Peer:
    try:
        return Peer(name, workers, service, **options)
    except PeerError as error:
        if name.startswith(("nginx", "node")):
            pytest.skip(str(error))
        raise


def first_process(server: Peer) -> int:
    """The process that the workers are children of."""
    (pid,) = {psutil.Process(pid).ppid() for pid in server.pids()}
    return pid


@contextlib.contextmanager
def leaving_nothing(server: Peer) -> Iterator[tuple[Peer, int]]:
    """Runs the server: (the server, its first process). Afterwards, whatever was raised, looks for what is left of it, orphans too."""
    leader, folder = 0, Path()
    try:
        with server:
            leader = first_process(server)
            folder = Path(f"/proc/{leader}/cwd").resolve()
            assert os.getsid(server.pids()[0]) == leader
            assert folder.is_dir()
            yield server, leader
    finally:
        assert session(leader) == []
        assert not folder.exists()
        assert sockdiag.listening_sockets(server.address[1]) == []


def session(leader: int) -> list[int]:
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError):
            # Whoever adopted an orphan may not have collected it yet.
            if os.getsid(pid) == leader and b") Z " not in Path(f"/proc/{pid}/stat").read_bytes():
                found.append(pid)
    return found


def ask(server: Peer, service: int, conn: http.client.HTTPConnection | None = None) -> tuple[list[int], bool]:
    """The numbers of the answer, checked against when they must have been; whether the connection stays open after it."""
    if conn is None:
        with contextlib.closing(http.client.HTTPConnection(*server.address)) as own:
            return ask(server, service, own)
    before = time.monotonic_ns()
    conn.request("GET", "/some/path?a=b", headers={"Fdpass-Service": str(service)})
    answer = conn.getresponse()
    body = answer.read().decode()
    after = time.monotonic_ns()
    assert answer.status == 200
    assert re.fullmatch(r"fdpass( \d+){4}\n", body)
    numbers = [int(word) for word in body.split()[1:]]
    pid, accepted, started, free = numbers
    assert pid in server.pids()
    assert free == 0
    if accepted:
        # perl's clock is a double: a number of nanoseconds may be a few too high or too low.
        assert before - 1000 <= accepted <= started <= after + 1000
    return numbers, not answer.will_close


# -------------------------------------------------------------------------------- each of them


@pytest.mark.parametrize("name", PEERS)
def test_its_workers_hold_and_answer(name: str) -> None:
    with leaving_nothing(peer(name)) as (server, leader):
        pids = server.pids()
        assert len(pids) == 2
        assert leader not in pids
        assert server.version[0].isdigit()
        assert server.command
        # More at once than one worker can hold, until each has had its turn.
        answered: set[int] = set()
        with ThreadPoolExecutor(4) as pool:
            while answered != set(pids):
                for (pid, accepted, _, _), kept in pool.map(lambda _: ask(server, SERVICE), range(4)):
                    answered.add(pid)
                    assert accepted
                    assert not kept
        (_, _, started, _), _ = ask(server, SERVICE)
        assert time.monotonic_ns() - started >= SERVICE - 1000


@pytest.mark.parametrize("name", ["nginx", "uvicorn", "granian", "node"])
def test_it_keeps_connections_alive(name: str) -> None:
    with leaving_nothing(peer(name, keep_alive=True)) as (server, _):
        with contextlib.closing(http.client.HTTPConnection(*server.address)) as conn:
            conn.connect()
            ours = conn.sock.getsockname()
            answers = [ask(server, 1000, conn) for _ in range(3)]
            assert conn.sock.getsockname() == ours
        assert len({numbers[0] for numbers, _ in answers}) == 1
        assert all(kept for _, kept in answers)


@pytest.mark.parametrize("name", ["nginx", "uvicorn", "gunicorn", "granian", "node"])
def test_it_burns_processor_time(name: str) -> None:
    with leaving_nothing(peer(name, work="burn")) as (server, _):
        before = sum(map(processor_time, server.pids()))
        ask(server, SERVICE)
        # A server may count in microseconds.
        assert sum(map(processor_time, server.pids())) - before >= SERVICE - 10_000


def processor_time(pid: int) -> int:
    """Nanoseconds, up to this moment also of a process that runs; the number of its clock is what clock_getcpuclockid() makes of a pid."""
    return time.clock_gettime_ns(~pid << 3 | 2)


@pytest.mark.parametrize("name", ["nginx", "nginx-reuseport"])
def test_nginx_without_perl(name: str) -> None:
    with leaving_nothing(peer(name, service=False)) as (server, _):
        numbers, _ = ask(server, 0)
        assert numbers[1:] == [0, 0, 0]


@pytest.mark.parametrize("name", PEERS)
def test_one_worker(name: str) -> None:
    with peer(name, workers=1) as server:
        # The only worker of uvicorn is its first process.
        (pid,) = server.pids()
        assert ask(server, 0)[0][0] == pid


@pytest.mark.parametrize(
    ("name", "sockets"),
    [("nginx", 1), ("nginx-reuseport", 2), ("uvicorn", 1), ("gunicorn", 1), ("gunicorn-reuseport", 2), ("granian", 2), ("node", 1)],
)
def test_listening_sockets_and_backlog(name: str, sockets: int) -> None:
    with peer(name, backlog=200) as server:
        listening = sockdiag.listening_sockets(server.address[1])
        assert [one.limit for one in listening] == [min(200, measure.sysctl("net.core.somaxconn") or 200)] * sockets


@pytest.mark.parametrize("name", [name for name in RELOADING if name not in ("granian", "nginx-accept-mutex")])
def test_a_reload_replaces_every_worker(name: str) -> None:
    with leaving_nothing(peer(name)) as (server, leader):
        before = server.pids()
        server.reload()
        after = server.pids()
        assert len(after) == 2
        assert not set(before) & set(after)
        # Not on their way out any more, whatever they call themselves meanwhile.
        assert not set(before) & set(session(leader))
        assert first_process(server) == leader
        assert ask(server, SERVICE)[0][0] in after


def test_granians_reload_takes_its_time() -> None:
    with leaving_nothing(peer("granian", workers=1)) as (server, _):
        (before,) = server.pids()
        server.reload()
        (after,) = server.pids()
        assert after != before
        assert ask(server, SERVICE)[0][0] == after


def test_a_reload_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_RELOAD_LIMIT", 0.0)
    monkeypatch.setattr(peers, "_RELOAD_EACH", 0.0)
    late = pytest.raises(PeerError, match=r"^uvicorn did not replace its workers within 0 s: 2 of 2 are still the same processes")
    with leaving_nothing(peer("uvicorn")) as (server, _), late:
        server.reload()


def test_a_reload_that_ends_the_server() -> None:
    # Its program minds no SIGHUP, which is why it is not in RELOADING.
    assert "node" not in RELOADING
    with pytest.raises(PeerError, match=r"^node was killed by SIGHUP"), leaving_nothing(peer("node")) as (server, _):
        server.reload()


def test_the_callers_environment_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUNICORN_CMD_ARGS", "--no-such-option")
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("WEB_CONCURRENCY", "5")
    with leaving_nothing(peer("gunicorn")) as (server, _):
        assert len(server.pids()) == 2


# -------------------------------------------------------------------------------- its end


@pytest.mark.parametrize("name", ["nginx-reuseport", "uvicorn", "gunicorn", "granian", "node"])
def test_its_first_process_is_killed(name: str) -> None:
    # The workers of most go on without it; they must not.
    with pytest.raises(PeerError, match=f"^{name} was killed by SIGKILL"):
        kill_first_process(peer(name))


def kill_first_process(server: Peer) -> None:
    with leaving_nothing(server) as (_, leader):
        os.kill(leader, signal.SIGKILL)
        os.waitid(os.P_PID, leader, os.WEXITED | os.WNOWAIT)
        with pytest.raises(PeerError, match="was killed by SIGKILL"):
            server.pids()


def test_what_the_caller_raised_comes_first() -> None:
    def fail(server: Peer) -> None:
        with server:
            leader = first_process(server)
            os.kill(leader, signal.SIGKILL)
            os.waitid(os.P_PID, leader, os.WEXITED | os.WNOWAIT)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail(peer("gunicorn"))


def test_one_that_does_not_end_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with leaving_nothing(peer("gunicorn")) as (server, leader):
        monkeypatch.setattr(peers, "_STOP_LIMIT", 0.3)
        for pid in (leader, *server.pids()):
            os.kill(pid, signal.SIGSTOP)


# An interrupt may fall between the opening of a file and its with statement: the file is closed all the same, and Python complains.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["uvicorn", "gunicorn-reuseport", "node"])
def test_an_interrupt_while_it_starts(name: str) -> None:
    server = peer(name)
    here = psutil.Process()
    before = {child.pid for child in here.children()}
    leaders: list[int] = []

    def interrupt() -> None:
        while not leaders:
            leaders.extend(child.pid for child in here.children() if child.pid not in before)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    try:
        with pytest.raises(KeyboardInterrupt), server:
            signal.pause()
    finally:
        watcher.join()
    (leader,) = leaders
    assert session(leader) == []
    assert sockdiag.listening_sockets(server.address[1]) == []


def test_an_interrupt_while_it_ends() -> None:
    def interrupt(signum: int, frame: object) -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise KeyboardInterrupt

    def run(server: Peer) -> None:
        with leaving_nothing(server):
            # What comes when its first process has ended, in the middle of the cleaning-up.
            signal.signal(signal.SIGCHLD, interrupt)

    try:
        with pytest.raises(KeyboardInterrupt):
            run(peer("node"))
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


ENTER = """
import os, signal
from fdpass_bench.peers import Peer
os.environ.pop("LD_PRELOAD", None)
with Peer("gunicorn", 2, True) as server:
    print(os.getsid(server.pids()[0]), server.address[1], flush=True)
    signal.pause()
"""


@pytest.mark.parametrize("first", [signal.SIGCONT, signal.SIGKILL, signal.SIGSTOP], ids=["serves", "was killed", "does not end when asked"])
def test_whoever_entered_it_is_killed(first: signal.Signals) -> None:
    patient = "import fdpass_bench.peers as peers; peers._STOP_LIMIT = 0.3" if first == signal.SIGSTOP else ""
    with contextlib.ExitStack() as stack:
        # This one loads our C, and so the sanitizer's library where that was built with it.
        command, environment = [sys.executable, "-c", patient + ENTER], {**os.environ, **PRELOADED}
        entered = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        stack.callback(entered.kill)
        assert entered.stdout is not None
        leader, port = map(int, entered.stdout.readline().split())
        folder = Path(f"/proc/{leader}/cwd").resolve()
        assert (folder / "output").is_file()
        # The first process, two workers and the guardian.
        members = [stack.enter_context(peers._pidfd(pid)) for pid in session(leader)]
        assert len(members) == 4
        stack.callback(end, members)
        os.kill(leader, first)
        entered.kill()
        assert [fd for fd in members if not peers._wait({fd}, 60)] == []
        assert session(leader) == []
        assert not folder.exists()
        assert sockdiag.listening_sockets(port) == []


def end(pidfds: list[int]) -> None:
    for fd in pidfds:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)


def test_whoever_would_enter_it_was_killed_before_it_ran(tmp_path: Path) -> None:
    folder = tmp_path / "fdpass-peer"
    folder.mkdir()
    program = tmp_path / "guarded.py"
    program.write_text(peers._GUARDED)
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
        command = [sys.executable, "-I", "-S", program, str(gone.pid), "5", folder, sys.executable, "-c", "print('serves')"]
        assert subprocess.run(command, capture_output=True, check=True).stdout == b""
    assert not folder.exists()


# -------------------------------------------------------------------------------- what does not come about


def test_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(PeerError, match="node is not installed: apt install nodejs"):
            Peer("node", 2, True)
    for name in ("uvicorn", "gunicorn", "granian"):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "path", [str(tmp_path)])
            with pytest.raises(PeerError, match=f"{name} is not installed for .*: pip install {name}"):
                Peer(name, 2, True)


def test_nginx_without_its_perl_module(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"nginx cannot hold a request without its Perl module .*--service-ms 0 works"):
        peers._nginx_perl(f"configure arguments: --modules-path={tmp_path} --with-http_perl_module=dynamic")
    assert peers._nginx_perl("configure arguments: --with-http_perl_module --with-debug") is None


def test_what_cannot_be_asked_for() -> None:
    with pytest.raises(PeerError, match=r"there is no peer 'apache'; there are nginx, .*uvicorn, gunicorn"):
        Peer("apache", 2, True)
    with pytest.raises(PeerError, match="cannot keep connections alive"):
        Peer("gunicorn", 2, True, keep_alive=True)
    for workers, work, backlog in ((0, "sleep", 1), (1, "dream", 1), (1, "burn", 0)):
        with pytest.raises(ValueError, match=r"workers and backlog are at least 1 and work is sleep or burn"):
            Peer("uvicorn", workers, True, work, backlog=backlog)


def command_line(*words: str) -> Callable[[peers.Order], Recipe]:
    return lambda order: Recipe("1", lambda port, folder: list(words), lambda process, folder: True)


def test_one_that_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "broken", command_line(sys.executable, "-c", "print('first'); raise SystemExit('no such option')"))
    with pytest.raises(PeerError, match=r"^broken ended with exit status 1; it wrote: first \| no such option$"), Peer("broken", 1, True):
        pass


def test_one_that_never_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_START_LIMIT", 0.2)
    monkeypatch.setitem(PEERS, "silent", command_line(sys.executable, "-c", "import signal; signal.pause()"))
    with pytest.raises(PeerError, match=r"^silent did not start within 0.2 s: [0-2] of 2 workers serve"), Peer("silent", 2, True):
        pass


def test_one_that_cannot_be_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(PEERS, "absent", command_line(str(tmp_path / "absent")))
    with pytest.raises(PeerError, match=r"^absent ended with exit status 1; it wrote: \S*/absent: No such file"), Peer("absent", 2, True):
        pass
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(PeerError, match=r"^absent did not start: .*No such file"), Peer("absent", 2, True):
        pass


def test_nothing_of_it_reaches_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with leaving_nothing(peer("uvicorn")) as (server, _):
        ask(server, 0)
    assert capfd.readouterr() == ("", "")
