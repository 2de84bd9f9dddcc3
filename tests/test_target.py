"""A server that runs already: how it is named, what is seen of real ones, and what is said of it: only what was measured."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from fdpass_bench import cli, diagnosis, figures, holders, options, sockdiag
from fdpass_bench import target as targets
from fdpass_bench.servers import PeerServer, TargetServer
from fdpass_bench.steady import Trial, Work
from fdpass_bench.target import Process, Seen, Target, TargetError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it reads Linux's /proc, and the load generator needs Linux")

APPLICATION = """
async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    status = int(scope["path"][1:] or 200)
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"3")]})
    await send({"type": "http.response.body", "body": b"ok\\n"})
"""


@contextlib.contextmanager
def uvicorn(folder: Path, *arguments: str, host: str = "127.0.0.1", workers: int = 2) -> Iterator[tuple[int, int]]:
    """uvicorn, its port, and its first process; it is there when all workers wait."""
    pytest.importorskip("uvicorn")
    (folder / "application.py").write_text(APPLICATION)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "application:app",
        "--host",
        host,
        "--port",
        str(port),
        "--workers",
        str(workers),
        *arguments,
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("UVICORN_", "WEB_CONCURRENCY"))}
    with subprocess.Popen(
        [*command, "--log-level", "critical"],
        cwd=folder,
        env=environment,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while len(waiting(port)) < workers:
                assert process.poll() is None
                assert time.monotonic() < deadline
            yield port, process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def waiting(port: int) -> set[int]:
    sockets = sockdiag.listening_sockets(port)
    if not sockets:
        return set()
    held, _ = holders.find_holders({one.inode for one in sockets})
    members, _ = holders.observe(port, sockets, held, 0.0)
    return {pid for member in members for pid in (*member.waited, *member.watched)}


# ---------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:80", ("127.0.0.1", 80, "http", "/")),
        ("[::1]:8000", ("::1", 8000, "http", "/")),
        ("localhost:8000", ("127.0.0.1", 8000, "http", "/")),
        ("http://127.0.0.1:8000", ("127.0.0.1", 8000, "http", "/")),
        ("http://[0:0::1]:8000/a/b?c=d&e=%20", ("::1", 8000, "http", "/a/b?c=d&e=%20")),
        ("tcp://127.0.0.1:65535", ("127.0.0.1", 65535, "tcp", "/")),
        ("127.0.0.1:80/path", ("127.0.0.1", 80, "http", "/path")),
        ("http://localhost/health", ("127.0.0.1", 80, "http", "/health")),
        # What servers print when they listen on every address.
        ("http://0.0.0.0:8000", ("127.0.0.1", 8000, "http", "/")),
        ("[::]:8000", ("::1", 8000, "http", "/")),
    ],
)
def test_a_target(text: str, expected: tuple[str, int, str, str]) -> None:
    assert Target.parse(f" {text} ") == Target(*expected, text)


@pytest.mark.parametrize(("text", "shown"), [("8000", "127.0.0.1:8000"), (":8000", "127.0.0.1:8000"), ("8000/a", "127.0.0.1:8000/a")])
def test_a_port_alone_is_one_of_this_machine(text: str, shown: str) -> None:
    found = Target.parse(text)
    assert (found.host, found.port, found.text) == ("127.0.0.1", 8000, shown)


FORMS = r"is no target: PORT, HOST:PORT, \[::1\]:PORT, http://HOST:PORT/path or tcp://HOST:PORT"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", FORMS),
        ("localhost", FORMS),
        ("::1:8000", FORMS),
        ("127.0.0.1:http", FORMS),
        ("tcp://127.0.0.1", FORMS),
        ("tcp://127.0.0.1:80/path", FORMS),
        ("ftp://127.0.0.1:80", FORMS),
        ("http://someone@127.0.0.1:80/", FORMS),
        ("http://127.0.0.1:80/a b", FORMS),
        ("http://127.0.0.1:80/a\r\nX: y", FORMS),
        ("http://127.0.0.1:80/a#b", FORMS),
        ("http://127.0.0.1:80/ü", FORMS),
        ("127.0.0.1:0", "a port is 1 to 65535"),
        ("127.0.0.1:65536", "a port is 1 to 65535"),
        ("0", "a port is 1 to 65535"),
        ("70000", "a port is 1 to 65535"),
        ("[127.0.0.1]:80", r"\[127.0.0.1\] is no IPv6 address"),
        ("https://127.0.0.1:443/", "TLS is not supported"),
        ("unix:/run/app.sock", "is a Unix socket"),
        ("/run/app.sock", "is a Unix socket"),
        ("no-such-host.invalid:80", "'no-such-host.invalid' does not resolve"),
        (f"{'a' * 64}.invalid:80", "does not resolve"),
    ],
)
def test_no_target(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Target.parse(text)


# ---------------------------------------------------------------------------------------------------------------- what is seen


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_verdict_names_the_processes_of_a_server(host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        pytest.skip(f"no {host} here: {error}")
    path = tmp_path / "target.json"
    with uvicorn(tmp_path, "--loop", "asyncio", host=host) as (port, first):
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        workers = sorted(waiting(port))
        # A closed loop has no schedule that a busy machine could be late for.
        arguments = ["--target", address, "--clients", "2", "--connections", "200", "--repeats", "1", "--json", str(path)]
        status = cli.main(["balance", *arguments])
    out = " ".join(capsys.readouterr().out.split())
    data: dict[str, Any] = json.loads(path.read_text())
    (run,) = data["runs"]
    assert status == (0 if run["valid"] else 1)
    assert f"{address}: 2 processes share one socket (pids {workers[0]}, {workers[1]})." in out
    assert [one["pid"] for one in run["holders"] if one["worker"]] == workers
    assert {one["pid"]: one["does"] for one in run["holders"]}[first] == "holds it"
    # Every one of the connections one by one was taken by one of the two, and by nobody else.
    took = [one["took"] for one in run["holders"] if one["worker"]]
    assert sum(took) == run["one_by_one"]["known"] == run["one_by_one"]["connections"] > 0
    assert f"they took {took[0]}, {took[1]} (even: 20)" in out or sum(took) != 40
    assert "All 200 connections in a closed loop of 2 clients were answered in time" in out
    assert set(run["cpu_share_of"]) == set(map(str, workers))
    assert sum(run["cpu_share_of"].values()) == pytest.approx(1, abs=0.001)
    assert run["switches_per_connection"] > 0
    assert data["verdict"].startswith(f"{address}: 2 processes share one socket")
    assert data["verdict"] in out


def test_stock_workers_wake_together_and_ours_one_at_a_time(tmp_path: Path) -> None:
    if not os.access("/proc/self/syscall", os.R_OK):
        pytest.skip("where a thread sleeps is not to be seen here")
    woken = {}
    for loop in ("asyncio", "fdpass.aio:new_event_loop"):
        with uvicorn(tmp_path, "--loop", loop, workers=4) as (port, _):
            # Beside other programs a look may say that it does not know: then another one is taken.
            looks = (targets.look(Target.parse(str(port)), 20.0).woken for _ in range(10))
            woken[loop] = next(known for known in looks if known is not None)
    assert woken["asyncio"] > woken["fdpass.aio:new_event_loop"]


def test_one_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 60
            while not (found := [one for one in psutil.Process(process.pid).net_connections("tcp") if one.status == psutil.CONN_LISTEN]):
                assert time.monotonic() < deadline
            port = found[0].laddr.port
            seen = targets.look(Target.parse(str(port)), 20.0)
        finally:
            process.kill()
    assert [one.pid for one in seen.workers] == [process.pid]
    assert (seen.sockets, seen.status, seen.workers[0].took) == (1, 200, seen.known)
    assert diagnosis.sentences(studied(seen))[0] == f"127.0.0.1:{port}: one process serves (pid {process.pid})."


@contextlib.contextmanager
def passing() -> Iterator[tuple[int, int, int]]:
    """A process that accepts and passes each connection to a child; the port and both pids."""
    code = """
import os, socket
listener = socket.create_server(("127.0.0.1", 0))
left, right = socket.socketpair()
child = os.fork()
if not child:
    listener.close(); left.close()
    while True:
        _, fds, _, _ = socket.recv_fds(right, 1, 1)
        if not fds: os._exit(0)
        with socket.socket(fileno=fds[0]) as conn:
            try:
                while conn.recv(1000):
                    conn.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok")
            except OSError:
                pass
right.close()
print(listener.getsockname()[1], child, flush=True)
while True:
    conn, _ = listener.accept()
    with conn:
        socket.send_fds(left, [b"x"], [conn.fileno()])
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port, child = map(int, process.stdout.readline().split())
            yield port, process.pid, child
        finally:
            process.kill()


def test_one_that_accepts_and_passes_on_does_not_serve() -> None:
    with passing() as (port, first, child):
        seen = targets.look(Target.parse(str(port)), 20.0)
    assert {one.pid for one in seen.workers} == {child}
    assert seen.processes[0].pid == first
    if os.access("/proc/self/syscall", os.R_OK):
        text = diagnosis.sentences(studied(seen))[0]
        assert text == f"127.0.0.1:{port}: one process accepts (pid {first}) and passes connections on to another process (pid {child})."


def test_holders_that_may_not_be_looked_into_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(pid: int) -> set[int]:
        raise PermissionError

    # What the kernel says of another user's processes.
    monkeypatch.setattr(targets.measure, "socket_inodes", forbidden)
    with passing() as (port, _, _):
        seen = targets.look(Target.parse(str(port)), 20.0)
    assert (seen.workers, seen.known, seen.woken) == ([], 0, None)
    assert seen.hidden > 0
    assert len(seen.latency) == 40
    first, *others = diagnosis.sentences(studied(seen))
    assert first.startswith(
        f"Which processes serve 127.0.0.1:{port} is unknown: the socket is {holders.user_of(os.geteuid())}'s, and none "
    )
    assert not any("pid" in text or "woke" in text for text in others)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_the_server_of_another_user_is_measured_and_not_named() -> None:
    nobody = 65534

    def look(port: int, result: Any) -> None:
        os.setgroups([])
        os.setgid(nobody)
        os.setuid(nobody)
        seen = targets.look(Target.parse(str(port)), 20.0)
        result.send((seen.workers, seen.known, seen.woken, seen.waiters, seen.owner, len(seen.latency)))

    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    socket.getaddrinfo("localhost", 80)  # what a resolver loads may not be readable to another user
    with receive, send, passing() as (port, _, _):
        child = context.Process(target=look, args=(port, send))
        child.start()
        assert receive.poll(60)
        assert receive.recv() == ([], 0, None, 0, "root", 40)
        child.join()
        child.close()


def test_what_a_server_answers_with_is_told_before_it_is_loaded(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with uvicorn(tmp_path, workers=1) as (port, _):
        for status, reason in ((404, "404 Not Found"), (500, "500 Internal Server Error")):
            assert cli.main(["balance", "--target", f"http://localhost:{port}/{status}"]) == 1
            out, err = capfd.readouterr()
            assert (out, err.count("\n")) == ("", 1)
            assert f"answers GET /{status} with {reason}: name a path that it answers" in err
        seen = targets.look(Target.parse(f"{port}/301"), 20.0)
    assert "It answers GET /301 with status 301, and that is what was measured." in diagnosis.sentences(studied(seen))


def test_a_server_with_tls_is_told_so() -> None:
    trustme = pytest.importorskip("trustme")
    import ssl
    import threading

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("localhost").configure_cert(context)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for _ in range(2):
                conn, _ = listener.accept()
                with conn, contextlib.suppress(OSError), context.wrap_socket(conn, server_side=True) as wrapped:
                    wrapped.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(TargetError, match="speaks TLS, which is not supported"):
            targets.look(Target.parse(str(listener.getsockname()[1])), 20.0)
        thread.join()


def test_where_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(TargetError, match=r"nothing listens on 127\.0\.0\.1:\d+; this machine listens on .*\d"):
            targets.look(Target.parse(str(bound.getsockname()[1])), 1.0)
        port = other.getsockname()[1]
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError as error:
            pytest.skip(f"no ::1 here: {error}")
        with pytest.raises(TargetError, match=rf"this machine listens at 127\.0\.0\.1:{port}: --target 127\.0\.0\.1:{port}"):
            targets.look(Target.parse(f"[::1]:{port}"), 1.0)


# ---------------------------------------------------------------------------------------------------------------- what is said

WORKERS = [Process(pid, "python uvicorn app:app", "waits (epoll)", True, took) for pid, took in ((11, 4), (12, 6), (13, 10), (14, 20))]
HERD = Seen(Target.parse("8000"), [0.001] * 40, 200, sockets=1, processes=WORKERS, known=40, woken=4.0, waiters=4)

HELPS = "What helps: uvicorn --loop fdpass.aio:new_event_loop (pip install fdpass) "
HELPS += "wakes one worker for each connection, and idle ones take turns."


def studied(seen: Seen, cpu: dict[int, float] | None = None, lag: float = 0.0, ok: int = 100, rate: float = 100.0) -> figures.Figures:
    """As if a hundred connections had been answered in 5 ms each, and the generator had been late by `lag` for two of them."""
    trial = Trial("target", 0, latency=[0.005] * ok, lag=[0.0] * 98 + [lag] * 2, cpu_of=cpu or {})
    trial.outcomes["ok"], trial.outcomes["refused"] = ok, 100 - ok
    trial.outcome_seconds = dict.fromkeys(("ok", "refused"), (0.005, 0.005))
    trial.connect = [0.0001] * ok
    work = Work(workers=4, connections=100, rate=rate, service=0.0, repeats=1, since="begun")
    return figures.figures_of(TargetServer(seen.target, seen), work, [trial], None)


def test_each_sentence_follows_from_a_figure() -> None:
    assert diagnosis.sentences(studied(HERD, {11: 0.1, 12: 0.1, 13: 0.14, 14: 0.29})) == [
        "127.0.0.1:8000: 4 processes share one socket (pids 11, 12, 13, 14).",
        "Of 40 connections, one after the other, they took 4, 6, 10, 20 (even: 10).",
        "Each of these woke 4.0 of the 4 that wait: 3.0 for nothing; with an exclusive wait it would be 1.",
        "All 100 connections at 100 connections/s were answered in time: mean 5 ms, p99 5 ms.",
        "The busiest (pid 14) did 46% of the work of 4, in processor time (even: 25%).",
        HELPS,
    ]


def changed(seen: Seen, **fields: Any) -> Seen:
    return Seen(**{**vars(seen), **fields})


def test_what_was_not_measured_is_not_said() -> None:
    # Who took the connections is known of half of them; what wakes the workers is not; one of them has ended; too little was done.
    said = diagnosis.sentences(studied(changed(HERD, known=20, woken=None), {11: 0.1}))
    assert len(said) == 2
    assert len(diagnosis.sentences(studied(changed(HERD, known=20, woken=None), dict.fromkeys((11, 12, 13, 14), 0.001)))) == 2
    unknown = Seen(HERD.target, [0.001], 200, unknown="it is not on this machine")
    assert diagnosis.sentences(studied(unknown)) == [
        "Which processes serve 127.0.0.1:8000 is unknown: it is not on this machine.",
        "All 100 connections at 100 connections/s were answered in time: mean 5 ms, p99 5 ms.",
    ]


def test_a_generator_that_was_late_takes_back_what_it_makes_uncertain() -> None:
    (said,) = [text for text in diagnosis.sentences(studied(HERD, lag=0.1)) if "INVALID" in text]
    assert "were answered in time, half of them within 5 ms. Their mean and p99 are INVALID: the generator was late" in said
    (said,) = [text for text in diagnosis.sentences(studied(HERD, ok=50)) if "INVALID" in text]
    assert "50 of 100 connections at 100 connections/s were answered (50 refused). Their mean and p99 are INVALID: 50.0%" in said


def test_no_advice_where_nothing_is_wrong() -> None:
    even = [Process(one.pid, one.command, one.does, True, 10) for one in WORKERS]
    fine = changed(HERD, processes=even, woken=1.1)
    assert diagnosis.sentences(studied(fine))[-1] == "Nothing was seen that wants mending."
    assert not any("helps" in text or "mending" in text for text in diagnosis.sentences(studied(changed(fine, sockets=4))))
    # fdpass does not reach the wait of gunicorn's own workers.
    gunicorn = [Process(one.pid, "python gunicorn app:app", "waits (select)", True, one.took) for one in WORKERS]
    assert "processor time" not in " ".join(said := diagnosis.sentences(studied(changed(HERD, processes=gunicorn))))
    assert not any("helps" in text for text in said)


def test_what_chance_does_is_not_uneven() -> None:
    def of(*took: int) -> Seen:
        return changed(
            HERD, processes=[Process(pid, "python uvicorn app:app", "waits (epoll)", True, one) for pid, one in enumerate(took)], woken=1.0
        )

    # Of eight that get five each on average one easily gets eight, though that is 1.6 times as many.
    for fine in (of(8, 7, 6, 5, 5, 4, 3, 2), of(15, 10, 9, 6)):
        assert diagnosis.sentences(studied(fine))[-1] == "Nothing was seen that wants mending."
    for uneven in (of(12, 7, 6, 5, 4, 3, 2, 1), of(20, 10, 6, 4)):
        assert diagnosis.sentences(studied(uneven))[-1].startswith("What helps: uvicorn --loop")


def test_what_had_no_answer_is_not_measured_better_without_a_schedule() -> None:
    assert "--clients 4 measures them" in " ".join(diagnosis.sentences(studied(HERD, lag=0.1)))
    assert "--clients" not in " ".join(diagnosis.sentences(studied(HERD, ok=50)))


def test_how_many_a_connection_wakes_is_told_where_the_rest_does_not_drown_it() -> None:
    watch = targets._Watch(HERD.target, [])
    watch._waiters = {11, 12, 13, 14}

    def woken(with_it: list[int], without: list[int]) -> float | None:
        return watch._woken(targets._Spaced(woken=with_it, restless=without))

    assert woken([4] * 40, [0] * 40) == 4
    assert woken([2] * 40, [1] * 40) == pytest.approx(4 / 3)
    # One of four that wakes by itself now and then is no trouble, four that do so together at every second look are.
    assert woken([4] * 40, [0, 0, 0, 1] * 10) == pytest.approx(4)
    assert woken([4] * 40, [0, 4] * 20) is None
    assert woken([4] * 40, [4] * 40) is None
    assert woken([4] * 9, [0] * 9) is None


def test_split_queues_strand_what_waits_for_a_stalled_one() -> None:
    said = diagnosis.sentences(studied(changed(HERD, sockets=4, woken=1.0)))
    assert said[0] == (
        "127.0.0.1:8000: 4 processes have 4 sockets (pids 11, 12, 13, 14), each with its own queue, and a hash chooses: "
        "while one stalls, expect 1 in 4 connections to wait for it."
    )
    assert said[2] == "Each of these woke 1.0 of the 4 that wait."


@pytest.mark.parametrize(("seconds", "rate"), [(0.0001, 100.0), (0.02, 25.0), (0.5, 1.0), (30.0, 0.5)])
def test_a_rate_that_nobody_asked_for_is_modest(seconds: float, rate: float) -> None:
    assert changed(HERD, latency=[seconds] * 4).modest_rate == rate


@pytest.mark.parametrize(("rate", "connections"), [(0.5, 20), (1, 20), (10, 100), (100, 600), (1000, 4000)])
def test_a_slow_target_gets_fewer_connections(rate: float, connections: int) -> None:
    assert options._enough(rate, True) == connections
    assert options._enough(rate, False) == max(100, connections)


def test_a_target_that_nobody_looked_at_has_no_verdict() -> None:
    assert diagnosis.seen_of(SimpleNamespace(server=PeerServer("nginx", "1"))) is None  # type: ignore[arg-type]
    one = figures.figures_of(TargetServer(HERD.target), Work(4, 1, 1.0, 0.0), [Trial("target", 0, problem="why")], None)
    assert (diagnosis.sentences(one), diagnosis.as_json(one), diagnosis.verdict([one])) == ([], {}, "")
