"""`balance --scenario steady`: real servers under the real generator, what could not be measured, and the words of a verdict."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import multiprocessing
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fdpass_bench import answer, answer_async, cli, figures, steady
from fdpass_bench.servers import Group, TargetServer
from fdpass_bench.strategy import Strategy
from fdpass_bench.target import Target

import fdpass

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the load generator needs Linux")

COMMAND = [sys.executable, "-X", "dev", "-W", "error", "-m", "fdpass_bench", "balance"]
OUTCOMES = {"ok", "refused", "reset", "timeout", "bad_answer", "no_port", "no_descriptor"}


def measured(path: Path, *arguments: str) -> dict[str, Any]:
    """Runs `balance`, checks what holds for every JSON of `steady`. A noisy machine may make any run INVALID, and then it must say so."""
    done = subprocess.run(
        [*COMMAND, "--json", str(path), *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    data: dict[str, Any] = json.loads(path.read_text())
    targets = {"verdict"} if any(one["server"] == "target" for one in data["runs"]) else set()
    assert set(data) == {"schema", "environment", "runs", "work", "calibration", "ideals", "comparisons"} | targets
    assert data["schema"] == 1
    for one in data["runs"]:
        assert set(one["outcomes"]) == OUTCOMES
        assert sum(one["outcomes"].values()) == one["connections"] * one["repeats"] * one["requests_per_connection"]
        assert sum(one["resets"].values()) == one["outcomes"]["reset"]
        assert set(one["outcome_ms"]) >= {name for name, count in one["outcomes"].items() if count and name != "reset"}
        assert one["valid"] == (one["invalid_reason"] is None)
        assert ("INVALID" in done.stdout) >= (not one["valid"])
    assert done.returncode == (0 if all(one["valid"] for one in data["runs"]) else 1), done.stderr
    assert "Traceback" not in done.stderr
    return data


# ---------------------------------------------------------------------------------------------------------------- the command


def test_two_strategies_and_theory(tmp_path: Path) -> None:
    arguments = ("--workers", "2", "--load", "0.5", "--service-ms", "2", "--connections", "300", "--repeats", "2")
    data = measured(tmp_path / "steady.json", "--strategies", "shared,reuseport", *arguments)
    assert [one["strategy"] for one in data["runs"]] == ["shared", "reuseport"]
    assert data["work"]["load"] == pytest.approx(0.5)
    for one in data["runs"]:
        assert one["scenario"] == "steady"
        assert one["outcomes"]["ok"] == 600
        assert sum(one["per_worker"]) == sum(one["requests_per_worker"]) == 600
        assert len(one["per_worker"]) == 2
        latency = one["latency_ms"]
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["p99_9"] <= latency["max"]
        low, high = one["ci"]["mean_ms"]
        assert low < latency["mean"] < high
        # Each connection held its worker for the time that it brought along, and not much less on average than was drawn from the seed.
        assert one["occupied_ms"]["mean"] > 1.8
        assert one["cpu_us_per_connection"] > 0
        assert 0 < one["jain"] <= 1
        theory = one["theory"]
        assert theory["one_queue_ms"]["mean"] > one["occupied_ms"]["mean"]
        assert theory["share_of_one_queue_bound"] == pytest.approx(latency["mean"] / theory["one_queue_ms"]["mean"], rel=1e-3)
    shared, reuseport = data["runs"]
    assert (shared["theory"]["discipline"], reuseport["theory"]["discipline"]) == ("one queue", "split")
    assert shared["offered_per_s"] == reuseport["offered_per_s"]
    assert len(data["comparisons"]) == 1
    assert data["calibration"]["ok"] == data["calibration"]["connections"]


def test_closed_loop(tmp_path: Path) -> None:
    arguments = (
        "--workers",
        "2",
        "--clients",
        "8",
        "--service-ms",
        "1",
        "--distribution",
        "fixed",
        "--connections",
        "300",
        "--repeats",
        "1",
    )
    (one,) = measured(tmp_path / "closed.json", "--strategies", "shared", *arguments)["runs"]
    assert one["outcomes"]["ok"] == 300
    # Eight clients never wait for more than the seven others: nobody is served before its service time is over.
    assert one["latency_ms"]["p50"] >= 1.0
    assert (one["offered_per_s"], one["theory"]) == (None, None)


def test_clients_with_one_kept_connection_each_have_no_schedule(tmp_path: Path) -> None:
    arguments = ("--workers", "2", "--clients", "8", "--connections", "8", "--requests-per-connection", "3", "--service-ms", "1")
    data = measured(tmp_path / "clients.json", "--strategies", "shared", *arguments, "--repeats", "1")
    assert data["runs"][0]["outcomes"]["ok"] == 24
    assert data["calibration"]["lag_ms"] is None


def test_kept_connections_and_requests(tmp_path: Path) -> None:
    arguments = ("--workers", "2", "--rate", "60", "--requests-per-connection", "5", "--think-ms", "3", "--service-ms", "1")
    (one,) = measured(tmp_path / "kept.json", "--strategies", "shared", *arguments, "--connections", "60", "--repeats", "1")["runs"]
    assert one["outcomes"]["ok"] == 300
    assert (sum(one["per_worker"]), sum(one["requests_per_worker"])) == (60, 300)


def test_burning_and_no_service_at_all(tmp_path: Path) -> None:
    arguments = ("--strategies", "reuseport", "--workers", "1", "--connections", "60", "--repeats", "1")
    (one,) = measured(
        tmp_path / "burn.json", *arguments, "--rate", "100", "--service-ms", "2", "--work", "burn", "--distribution", "fixed"
    )["runs"]
    assert one["cpu_us_per_connection"] > 2000
    (one,) = measured(tmp_path / "nothing.json", *arguments, "--rate", "200", "--service-ms", "0")["runs"]
    assert one["outcomes"]["ok"] == 60
    assert one["cpu_us_per_connection"] < 2000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_shows_what_was_measured(tmp_path: Path, number: int) -> None:
    path = tmp_path / "cut.json"
    arguments = [
        "--strategies",
        "shared",
        "--workers",
        "2",
        "--rate",
        "500",
        "--service-ms",
        "1",
        "--repeats",
        "1000",
        "--connections",
        "100",
    ]
    with subprocess.Popen(
        [*COMMAND, "--json", str(path), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline().startswith("This takes about ")
            assert process.stderr.readline().startswith("1/1000 steady, shared")
            process.send_signal(number)
            out, err = process.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    assert "steady: 500 connections/s" in out
    data = json.loads(path.read_text())
    assert data["environment"]["interrupted"]
    assert data["runs"][0]["repeats"] >= 1


# ---------------------------------------------------------------------------------------------------------------- somebody else's servers


def _refuse(sock: socket.socket) -> None:
    sock.close()


def _hang(sock: socket.socket) -> None:
    sock.listen(1000)
    signal.pause()


def _each(sock: socket.socket, answer_to: Callable[[socket.socket], None]) -> None:
    sock.listen(1000)
    while True:
        conn, _ = sock.accept()
        with conn, contextlib.suppress(OSError):
            answer_to(conn)


def _garbage(sock: socket.socket) -> None:
    def answer_to(conn: socket.socket) -> None:
        conn.recv(1000)
        conn.sendall(bytes(range(256)) * 10)

    _each(sock, answer_to)


def _reset(sock: socket.socket) -> None:
    def answer_to(conn: socket.socket) -> None:
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    _each(sock, answer_to)


def _half(sock: socket.socket) -> None:
    def answer_to(conn: socket.socket) -> None:
        conn.recv(1000)
        conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nfdpass")

    _each(sock, answer_to)


def _whole(sock: socket.socket) -> None:
    def answer_to(conn: socket.socket) -> None:
        conn.recv(1000)
        conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    _each(sock, answer_to)


def _other_clock(sock: socket.socket) -> None:
    def answer_to(conn: socket.socket) -> None:
        conn.recv(1000)
        body = b"fdpass 7 -5 9223372036854775807 -5\n"
        conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    _each(sock, answer_to)


def _speaks_first(sock: socket.socket) -> None:
    _each(sock, lambda conn: conn.sendall(b"220 ready\r\n"))


@contextlib.contextmanager
def target(behave: Callable[[socket.socket], None]) -> Iterator[str]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{sock.getsockname()[1]}"
        if behave is _refuse:
            yield address  # bound, so that nobody else has the port, and not listening
            return
        process = multiprocessing.get_context("fork").Process(target=behave, args=(sock,), daemon=True)
        sock.listen(1000)
        process.start()
        try:
            yield address
        finally:
            process.kill()
            process.join()
            process.close()


@pytest.mark.parametrize(
    ("behave", "outcome"),
    [(_refuse, "refused"), (_hang, "timeout"), (_garbage, "bad_answer"), (_reset, "reset"), (_half, "reset")],
)
def test_a_target_that_stops_answering_is_told_as_it_is(behave: Callable[[socket.socket], None], outcome: str) -> None:
    work = steady.Work(workers=1, connections=100, rate=500.0, service=0.0, repeats=1, time_limit=1.0)
    with target(behave) as address:
        server = TargetServer(Target.parse(address))
        trial = steady.measure_trial(server, work, 0, lambda ended: None)
    one = figures.figures_of(server, work, [trial], None).as_json()
    assert one["outcomes"][outcome] == 100
    assert not one["valid"]
    assert "no request was answered: 100 " in one["invalid_reason"]
    assert (one["strategy"], one["server"], one["per_worker"], one["latency_ms"]) == (address, "target", [], None)


@pytest.mark.parametrize(
    ("behave", "said"),
    [
        (_refuse, "nothing listens on 127.0.0.1:"),
        (_hang, "gave no answer to GET / within 1 s (--time-limit sets another)"),
        (_garbage, "what came is not HTTP"),
        (_reset, "Connection reset by peer"),
        (_half, "does not answer GET /: the answer breaks off 94 bytes before its end"),
    ],
)
def test_a_target_that_does_not_answer_is_not_loaded(
    behave: Callable[[socket.socket], None], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "target.json"
    with target(behave) as address:
        assert cli.main(["balance", "--target", address, "--time-limit", "1", "--json", str(path)]) == 1
    out, err = capfd.readouterr()
    assert (out, err.count("\n"), path.exists()) == ("", 1, False)
    assert said in err


@pytest.mark.parametrize(("behave", "form"), [(_whole, "{}"), (_other_clock, "http://{}/any?path"), (_speaks_first, "tcp://{}")])
def test_a_target_that_answers(tmp_path: Path, behave: Callable[[socket.socket], None], form: str) -> None:
    with target(behave) as address:
        arguments = ("--target", form.format(address), "--rate", "500", "--connections", "300", "--repeats", "1")
        (one,) = measured(tmp_path / "target.json", *arguments)["runs"]
    assert one["outcomes"]["ok"] == 300
    assert one["latency_ms"]["mean"] > 0
    # Of a target's workers nothing is known, whatever its answers say.
    assert (one["per_worker"], one["queue_ms"], one["theory"]) == ([], None, None)


# ---------------------------------------------------------------------------------------------------------------- our workers


@contextlib.contextmanager
def group(workers: int = 1, work: str = "sleep", keep_alive: bool = False) -> Iterator[tuple[str, int]]:
    with fdpass.WorkerGroup(answer_async.kept if keep_alive else answer.timed, "127.0.0.1:0", workers=workers, args=(work,)) as running:
        host, _, port = str(running.endpoint).rpartition(":")
        yield host, int(port)


def ask(conn: http.client.HTTPConnection, service: int, close: bool = True) -> list[int]:
    conn.request("GET", "/", headers={"Fdpass-Service": str(service), "Connection": "close" if close else "keep-alive"})
    response = conn.getresponse()
    words = response.read().split()
    assert (response.status, words[0], len(words)) == (200, b"fdpass", 5)
    return [int(word) for word in words[1:]]


def test_a_worker_says_when_it_took_and_began_what_it_answers() -> None:
    with group() as (host, port):
        before = time.monotonic_ns()
        with contextlib.closing(http.client.HTTPConnection(host, port)) as conn:
            index, accepted, started, free = ask(conn, 20_000_000)
        assert index == 0
        assert before <= accepted <= started
        assert free <= accepted
        # The deadline counts from the accept, and is never early.
        assert time.monotonic_ns() - accepted >= 20_000_000
        with contextlib.closing(http.client.HTTPConnection(host, port)) as conn:
            _, again, _, free = ask(conn, 0)
        assert accepted + 20_000_000 <= free <= again


def test_a_client_that_says_nonsense_or_nothing_harms_nobody() -> None:
    with group() as (host, port):
        for words in (b"", b"\r\n\r\n", b"GET / HTTP/1.1\r\nFdpass-Service: many\r\n\r\n", bytes(range(256)) * 1000):
            with socket.create_connection((host, port)) as sock, contextlib.suppress(OSError):
                sock.sendall(words)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(65536):
                    pass
        with contextlib.closing(http.client.HTTPConnection(host, port)) as conn:
            assert ask(conn, 0)[0] == 0


def test_kept_connections_take_turns_at_one_worker() -> None:
    with group(keep_alive=True) as (host, port), contextlib.ExitStack() as stack:
        conns = [stack.enter_context(contextlib.closing(http.client.HTTPConnection(host, port))) for _ in range(3)]
        started = [ask(conn, 1_000_000, close=False)[2] for _ in range(2) for conn in conns]
        assert all(later - earlier >= 1_000_000 for earlier, later in itertools.pairwise(started))


# ---------------------------------------------------------------------------------------------------------------- validity


def _burn(cpu: int) -> None:
    os.sched_setaffinity(0, {cpu})
    while True:
        pass


def test_a_starved_generator_is_caught() -> None:
    work = steady.Work(workers=1, connections=200, rate=500.0, service=0.002, repeats=1)
    server = Group(Strategy.parse("shared"))
    cpu = min(os.sched_getaffinity(0))
    burners = [multiprocessing.get_context("fork").Process(target=_burn, args=(cpu,), daemon=True) for _ in range(2)]

    def starve(count: int) -> None:
        (generator,) = (child for child in multiprocessing.active_children() if child.name == "the load generator")
        os.sched_setaffinity(generator.pid or 0, {cpu})
        # Late, and yet done in seconds beside whatever else runs: at 19 it would get a hundredth of the processor and less.
        os.setpriority(os.PRIO_PROCESS, generator.pid or 0, 10)

    for burner in burners:
        burner.start()
    try:
        trial = steady.measure_trial(server, work, 0, starve)
    finally:
        for burner in burners:
            burner.kill()
            burner.join()
            burner.close()
    found = figures.study(work, [server], [trial], None)
    assert not found.valid
    assert any("the generator was late: schedule lag p99" in reason for reason in found.figures[0].reasons)
    assert trial.outcomes["ok"] == 200
    assert found.figures[0].as_json()["invalid_reason"] == "; ".join(found.figures[0].reasons)


def trial_of(server: str, latency: Sequence[float | None], repeat: int = 0, **more: Any) -> steady.Trial:
    ok = sum(value is not None for value in latency)
    trial = steady.Trial(server, repeat, latency=list(latency), lag=[1e-5] * len(latency), offered_per_s=100.0, begun_per_s=100.0, **more)
    trial.outcomes["ok"] = ok
    if ok < len(latency):
        trial.outcomes["timeout"] = len(latency) - ok
        trial.outcome_seconds["timeout"] = (1.0, 1.0)
    trial.achieved_per_s = more.get("achieved_per_s", 100.0)
    trial.connections_of = trial.requests_of = {0: ok}
    return trial


def found_of(**latencies: Sequence[float | None]) -> figures.Study:
    work = steady.Work(workers=1, connections=len(next(iter(latencies.values()))), rate=100.0, service=0.004, repeats=1)
    servers = [Group(Strategy.parse(name)) for name in latencies]
    return figures.study(work, servers, [trial_of(name, values) for name, values in latencies.items()], None)


def test_a_verdict_says_who_beats_whom_and_how_surely() -> None:
    slow = [0.020 + 0.001 * (number % 7) for number in range(2000)]
    fast = [0.010 + 0.001 * (number % 5) for number in range(2000)]
    (comparison,) = found_of(shared=fast, reuseport=slow).comparisons
    said = re.fullmatch(r"shared beats reuseport: mean (\d\.\d\d) times lower \(95 % (\d\.\d\d) to (\d\.\d\d)\)", comparison.sentence)
    assert said is not None
    assert float(said[2]) <= float(said[1]) <= float(said[3])
    assert float(said[1]) == pytest.approx(0.023 / 0.012, abs=0.01)
    (turned,) = found_of(reuseport=slow, shared=fast).comparisons
    assert turned.sentence.startswith("shared beats reuseport: mean 1.9")


def test_a_verdict_that_cannot_be_given_is_not_given() -> None:
    noise = [0.010 + 0.009 * ((number * 7919) % 101) / 101 for number in range(1000)]
    (same,) = found_of(shared=noise, reuseport=noise[::-1]).comparisons
    assert same.sentence.startswith("shared and reuseport: no difference that this run can show (")
    lossy = found_of(shared=noise, reuseport=[None if number % 10 == 0 else value for number, value in enumerate(noise)])
    assert lossy.comparisons[0].sentence == "shared and reuseport: nothing can be said, reuseport is INVALID"
    assert "10.0% of the requests had no answer" in lossy.figures[1].reasons[0]
    assert found_of(shared=noise[:5], reuseport=noise[:5]).comparisons[0].sentence == "shared and reuseport: too few connections to compare"


def test_what_was_not_achieved_is_not_valid() -> None:
    work = steady.Work(workers=1, connections=1000, rate=100.0, service=0.004, repeats=1)
    server = Group(Strategy.parse("shared"))
    for more, reason in (
        ({"achieved_per_s": 98.0}, "the server answered 98 of 100 connections per second"),
        ({"problem": "worker-1 (pid 7) was killed by SIGKILL"}, "worker-1 (pid 7) was killed by SIGKILL"),
    ):
        one = figures.study(work, [server], [trial_of("shared", [0.01] * 1000, **more)], None).figures[0]
        assert one.reasons == [reason]
    late = trial_of("shared", [0.01] * 1000)
    late.begun_per_s = 90.0
    assert figures.study(work, [server], [late], None).figures[0].reasons == ["the generator began 90 of 100 connections per second"]
    late.begun_per_s = 100.0
    late.outcomes |= {"no_port": 3}
    late.outcome_seconds = {"no_port": (0.0, 0.0)}
    assert "port exhaustion: 3 connections" in figures.study(work, [server], [late], None).figures[0].reasons[0]
    # The calibration tells whose fault it was, and is no fault of a server's.
    good = trial_of("shared", [0.01] * 1000)
    assert figures.study(work, [server], [good], late).valid
    for calibration, alone in ((good, "was not late"), (late, "was late as well")):
        (reason,) = figures.study(work, [server], [late], calibration).figures[0].reasons
        assert reason.endswith(f"(against a server that answers at once it {alone})")


def test_overload_has_no_steady_state() -> None:
    work = steady.Work(workers=1, connections=1000, rate=100.0, service=0.004, repeats=1)
    trial = trial_of("shared", [0.01] * 1000, occupied=[0.011] * 1000, other=[0.01] * 1000)
    one = figures.study(work, [Group(Strategy.parse("shared"))], [trial], None).figures[0]
    assert one.reasons == ["overload: the workers are asked for 110% of what they can do, so there is no steady state"]


def test_a_calibration_that_failed_says_nothing_of_the_machine() -> None:
    work = steady.Work(workers=1, connections=1000, rate=100.0, service=0.004, repeats=1)
    broken = trial_of("null server", [0.001] * 900 + [None] * 100)
    one = figures.study(work, [Group(Strategy.parse("shared"))], [trial_of("shared", [0.01] * 1000)], broken).figures[0]
    assert one.reasons[0].startswith("the calibration failed: 10.0% of the requests had no answer")


def test_repeats_are_in_the_order_abba() -> None:
    servers = [Group(Strategy.parse(name)) for name in ("shared", "reuseport")]
    order = [server.name for repeat in range(4) for server in steady.order_of(servers, repeat)]
    assert order == ["shared", "reuseport", "reuseport", "shared", "shared", "reuseport", "reuseport", "shared"]


# ---------------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--scenario", "idle", "--rate", "5"], "--rate belongs to --scenario steady"),
        (["--rate", "5", "--load", "0.5"], "--rate and --load exclude each other"),
        (["--load", "1.2"], "--load"),
        (["--service-ms", "0", "--scenario", "steady"], "--rate"),
        (["--target", "127.0.0.1:1", "--load", "0.5"], "--load has no meaning for a --target"),
        (["--target", "nowhere", "--rate", "5"], "nowhere"),
        (["--rate", "nan"], "nan"),
        (["--target", "tcp://127.0.0.1:1", "--rate", "5", "--requests-per-connection", "2"], "tcp"),
        (["--connections", "1000000", "--requests-per-connection", "100"], "5000000"),
        (["--scenario", "all", "--service-ms", "0"], "no half load for stall"),
        (["--target", "https://127.0.0.1:1", "--rate", "5"], "TLS"),
        (["--peer", "apache"], "'apache'; there are nginx, nginx-reuseport, nginx-accept-mutex, uvicorn"),
        (["--think-ms", "5"], "--think-ms needs --requests-per-connection"),
        (["--clients", "5", "--arrivals", "uniform"], "--arrivals"),
        (["--scenario", "burst", "--connections", "20001"], "20000"),
    ],
)
def test_bad_arguments(arguments: list[str], named: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["balance", *arguments]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert named in err
