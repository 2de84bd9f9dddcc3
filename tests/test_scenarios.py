"""`balance` with stall, rolling, long-lived, scale-out, and with every kind of strategy: small real runs, their JSON, bad arguments."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from fdpass_bench import cli, loaded, loadgen, report
from fdpass_bench.clients import Client, Clients
from fdpass_bench.runs import Plan, Run
from fdpass_bench.servers import Group
from fdpass_bench.strategy import PROGRAMS, Strategy

pytestmark = [pytest.mark.long, pytest.mark.skipif(sys.platform != "linux", reason="the load generator needs Linux")]

COMMAND = [sys.executable, "-X", "dev", "-W", "error", "-m", "fdpass_bench", "balance"]
PROGRAM_NAMES = [f"shared:{program}" for program in PROGRAMS]


def measured(path: Path, *arguments: str) -> list[dict[str, Any]]:
    """Runs `balance` and checks what holds for every JSON. A noisy machine may make a run invalid, and then it must say so."""
    done = subprocess.run(
        [*COMMAND, "--json", str(path), *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    assert "Traceback" not in done.stderr
    data = json.loads(path.read_text())
    assert data["schema"] == 1
    for one in data["runs"]:
        assert one["valid"] == (one["invalid_reason"] is None)
        assert one["lost_accepted"] + one["lost_unaccepted"] == sum(one["outcomes"].values()) - one["outcomes"]["ok"]
    assert done.returncode == (0 if all(one["valid"] for one in data["runs"]) else 1), done.stderr
    return data["runs"]  # type: ignore[no-any-return]  # what JSON holds has no type


# ---------------------------------------------------------------------------------------------------------------- strategies


@pytest.mark.parametrize("strategy", [*PROGRAM_NAMES, "shared:least-loaded", "dispatch", "dispatch:least-loaded"])
def test_every_strategy_serves_spaced_connections(tmp_path: Path, strategy: str) -> None:
    arguments = ("--strategies", strategy, "--workers", "2", "--connections", "12", "--scenario", "idle")
    (one,) = measured(tmp_path / "idle.json", *arguments)
    assert one["valid"], one["invalid_reason"]
    assert (one["strategy"], one["outcomes"]["ok"], sum(one["per_worker"])) == (strategy, 12, 12)
    assert one["switches_per_connection"] is not None


@pytest.mark.parametrize("strategy", ["shared:asyncio", "shared:uvicorn", "dispatch", "shared:uvicorn-uvloop-stock"])
def test_several_bursts_and_their_median(tmp_path: Path, strategy: str) -> None:
    arguments = ("--strategies", strategy, "--workers", "2", "--connections", "20", "--bursts", "3")
    (one,) = measured(tmp_path / "burst.json", *arguments)
    assert one["valid"], one["invalid_reason"]
    assert (one["scenario"], one["bursts"], one["connections"], one["outcomes"]["ok"]) == ("burst", 3, 20, 60)
    assert sum(one["per_worker"]) == 60
    assert len(one["max_over_means"]) == 3
    assert one["max_over_mean"] == sorted(one["max_over_means"])[1]


@pytest.mark.parametrize("strategy", ["dispatch", "shared:asyncio", "shared:uvicorn"])
def test_a_kill_takes_only_what_a_worker_had_accepted(tmp_path: Path, strategy: str) -> None:
    arguments = ("--strategies", strategy, "--workers", "2", "--connections", "24", "--service-ms", "100", "--scenario", "kill")
    (one,) = measured(tmp_path / "kill.json", *arguments)
    assert one["valid"], one["invalid_reason"]
    assert one["restarts"] == one["kills"] >= 1
    assert one["lost_unaccepted"] == 0
    if strategy == "dispatch":
        assert one["lost_accepted"] <= one["kills"]
        assert one["credits"] == 1
        # What waits is in the supervisor's socket, and no victim's.
        assert set(one["victims_queues"]) == {0}
        assert one["queued_at_kills"][0] > 0


@pytest.mark.parametrize("strategies", ["dispatch,shared:least-loaded", "shared:asyncio-stock,shared:uvicorn"])
def test_steady_has_theory_only_where_it_applies(tmp_path: Path, strategies: str) -> None:
    arguments = ("--strategies", strategies, "--workers", "2", "--load", "0.4", "--service-ms", "2", "--connections", "200")
    for one in measured(tmp_path / "steady.json", *arguments, "--repeats", "1", "--scenario", "steady"):
        assert one["outcomes"]["ok"] == 200
        assert sum(one["per_worker"]) == 200
        known = ":" not in one["strategy"] or one["strategy"].endswith("least-loaded")
        assert (one["theory"] is not None) == known
        if known:
            assert one["theory"]["discipline"] == "one queue"


def test_credits_are_of_dispatch_and_end_its_theory(tmp_path: Path) -> None:
    arguments = ("--strategies", "dispatch", "--credits", "4", "--workers", "2", "--load", "0.4", "--service-ms", "2")
    (one,) = measured(tmp_path / "steady.json", *arguments, "--connections", "150", "--repeats", "1", "--scenario", "steady")
    assert (one["outcomes"]["ok"], one["theory"]) == (150, None)


def test_a_program_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="shared:uvicorn-uvloop needs uvicorn: pip install uvicorn"):
        Strategy.parse("shared:uvicorn-uvloop")
    assert Strategy.parse("shared:asyncio").program == "asyncio"


# ---------------------------------------------------------------------------------------------------------------- scenarios


@pytest.mark.parametrize("strategies", ["reuseport", "dispatch,shared:asyncio"])
def test_stall(tmp_path: Path, strategies: str) -> None:
    for one in measured(tmp_path / "stall.json", "--strategies", strategies, "--workers", "2", "--scenario", "stall"):
        assert one["outcomes"]["ok"] == one["connections"] == sum(one["per_worker"])
        assert one["frozen_seconds"] >= 1
        assert 0 <= one["delayed"] <= one["connections"]
        assert one["delayed_share"] == pytest.approx(one["delayed"] / one["arrived_while_frozen"], abs=1e-3)
        assert one["delayed_share_split"] == 0.5
        if one["strategy"] == "reuseport":
            # A frozen worker's own queue waits until it goes on: no machine is so slow that this would not show.
            assert one["delayed"] > 0


@pytest.mark.parametrize("strategy", ["shared", "dispatch", "shared:asyncio", "shared:uvicorn"])
def test_a_roll_fails_no_request(tmp_path: Path, strategy: str) -> None:
    arguments = ("--strategies", strategy, "--workers", "2", "--rolls", "1", "--clients", "6")
    (one,) = measured(tmp_path / "rolling.json", *arguments)
    assert one["valid"], one["invalid_reason"]
    assert (one["scenario"], one["rolls"], one["failed"], one["clients"]) == ("rolling", 1, 0, 6)
    assert one["requests"] == one["outcomes"]["ok"] == sum(one["per_worker"]) > 0
    assert len(one["roll_seconds"]) == 1


def test_what_reuseport_bare_loses_in_a_roll_is_counted(tmp_path: Path) -> None:
    arguments = ("--strategies", "reuseport-bare", "--workers", "2", "--rolls", "1", "--scenario", "rolling")
    (one,) = measured(tmp_path / "rolling.json", *arguments)
    assert one["valid"], one["invalid_reason"]
    assert one["failed"] == one["requests"] - one["outcomes"]["ok"]
    assert sum(one["resets"].values()) == one["outcomes"]["reset"]


def test_a_roll_that_takes_too_long_is_not_valid(tmp_path: Path) -> None:
    arguments = ("--strategies", "shared", "--workers", "2", "--rolls", "1000", "--time-limit", "1", "--scenario", "rolling")
    (one,) = measured(tmp_path / "rolling.json", *arguments)
    assert not one["valid"]
    assert re.search(r"the time limit of 1 s was hit after \d+ of 1000 rolls", one["invalid_reason"])


@pytest.mark.parametrize("strategy", ["shared:least-loaded", "dispatch:least-loaded", "shared:uvloop", "shared:uvicorn"])
def test_long_lived(tmp_path: Path, strategy: str) -> None:
    arguments = ("--strategies", strategy, "--workers", "2", "--connections", "50", "--scenario", "long-lived", "--seed", "3")
    (one,) = measured(tmp_path / "open.json", *arguments)
    assert one["valid"], one["invalid_reason"]
    assert sum(one["open_per_worker"]) == one["connections"] == 50
    assert one["outcomes"]["ok"] == one["opened"] == sum(one["per_worker"]) > 50
    assert one["open_stdev_random"] == pytest.approx(50**0.5 / 2, abs=1e-3)
    assert one["open_stdev"] >= 0
    assert one["open_range_end"] == max(one["open_per_worker"]) - min(one["open_per_worker"])
    assert one["samples"] > 0


@pytest.mark.parametrize("strategy", ["dispatch", "shared:uvloop-stock"])
def test_scale_out(tmp_path: Path, strategy: str) -> None:
    (one,) = measured(tmp_path / "scale.json", "--strategies", strategy, "--workers", "3", "--scenario", "scale-out")
    assert one["valid"], one["invalid_reason"]
    assert [step["workers"] for step in one["steps"]] == [1, 2, 3]
    assert one["steps"][0]["share_of_linear"] == 1
    assert all(step["connections_per_s"] > 0 for step in one["steps"])
    assert len(one["per_worker"]) == 3


def test_steps_double_up_to_the_workers() -> None:
    assert [loaded.steps_of(workers) for workers in (1, 2, 4, 6)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 6]]


@pytest.mark.parametrize("scenario", ["stall", "rolling"])
def test_an_interrupt_shows_what_there_is_and_leaves_nothing(tmp_path: Path, scenario: str) -> None:
    path = tmp_path / "runs.json"
    arguments = ["--strategies", "shared,shared:first", "--workers", "2", "--scenario", scenario, "--json", str(path)]
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline().startswith(f"1/2 {scenario}, shared: ")
            # The second group starts, or is under load by now.
            wait_for_workers(process.pid)
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate()
            _, alive = psutil.wait_procs(session(process.pid), timeout=20)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, alive) == (130, [])
    assert "Traceback" not in out + err
    assert scenario in out
    assert "1 of 2 runs were measured" in err
    assert [one["strategy"] for one in json.loads(path.read_text())["runs"]] == ["shared"]


def session(leader: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait_for_workers(leader: int) -> None:
    deadline = time.monotonic() + 30
    while len(session(leader)) < 4:
        assert time.monotonic() < deadline


# ---------------------------------------------------------------------------------------------------------------- clients


class Answering:
    """A server that answers each connection with these bytes and closes it."""

    def __init__(self, answer: bytes) -> None:
        import threading

        self.answer = answer
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        self.thread = threading.Thread(target=self.serve)

    def serve(self) -> None:
        conn, _ = self.listener.accept()
        with conn:
            conn.recv(65536)
            conn.sendall(self.answer)

    def __enter__(self) -> Answering:
        self.thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.thread.join()
        self.listener.close()


HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s"


@pytest.mark.parametrize(
    ("answer", "outcome", "index"),
    [
        (HEAD % (16, b"fdpass 3 1 1 0\r\n"), "ok", 3),
        (HEAD % (17, b"fdpass 3 1 1 0\r\n"), "reset", 3),
        (HEAD % (2, b"hi"), "ok", None),
        (b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n", "reset", None),
        (b"fdpass 3 ", "reset", None),
        (b"", "reset", None),
    ],
)
def test_an_http_client_reads_who_answered(answer: bytes, outcome: str, index: int | None) -> None:
    heard: list[Client] = []
    with Answering(answer) as server, Clients(server.address, http=True, answered=heard.append) as clients:
        client = clients.connect()
        clients.finish(client, time.monotonic() + 20)
        assert (client.outcome, client.index) == (outcome, index)
        assert len(heard) == (index is not None)
        assert (clients.under_way, clients.unanswered) == (0, 0)


def test_a_refused_http_client_is_refused() -> None:
    with socket.socket() as bound, Clients(("127.0.0.1", 1), http=True) as clients:
        bound.bind(("127.0.0.1", 0))
        clients.address = bound.getsockname()
        client = clients.connect()
        clients.finish(client, time.monotonic() + 20)
        assert client.outcome == "refused"


def test_a_load_that_is_enough_ends_and_the_generator_goes_on() -> None:
    with loadgen.Generator() as generator, loadgen.NullServer() as server:
        endless = loadgen.Load(*server.address, connections=200_000, rate=None, clients=2)
        seen: list[int] = []
        result = generator.run(endless, seen.append, enough=lambda: bool(seen and seen[-1]))
        outcomes = result.outcome.tolist()
        assert outcomes.count(0) > 0
        assert outcomes.count(-1) > 0
        again = generator.run(loadgen.Load(*server.address, connections=10, rate=1000.0))
        assert again.outcome.tolist() == [0] * 10


# ---------------------------------------------------------------------------------------------------------------- the words


def finished(strategy: str, scenario: str, **figures: Any) -> Run:
    run = Run(Plan(Group(Strategy.parse(strategy)), scenario, 4, 0, 30.0), [25] * 4)
    run.outcomes["ok"] = 100
    run.figures = figures
    return run


def test_the_verdict_counts_reuseport_bare_apart() -> None:
    runs = [
        finished("shared", "rolling", failed=0, requests=1000),
        finished("dispatch", "rolling", failed=2, requests=900),
        finished("reuseport-bare", "rolling", failed=7, requests=800),
    ]
    assert report.verdict(runs) == (
        "In rolls shared failed no request; requests failed at dispatch 2 of 900; "
        "reuseport-bare, whose sockets die with their workers, lost 7 of 800."
    )


def test_the_verdict_has_theory_beside_it() -> None:
    assert report.verdict([finished("shared", "stall", delayed=1, arrived_while_frozen=500)]) == (
        "A frozen worker delayed over half a second: shared 1 of 500 (split queues 25%)."
    )
    assert report.verdict([finished("shared", "long-lived", open_stdev=2.04, open_stdev_random=13.7)]) == (
        "Open connections deviated by shared 2.0 (a random hash 13.7)."
    )
    steps = [{"workers": 1, "share_of_linear": 1.0}, {"workers": 4, "share_of_linear": 0.97}]
    assert (
        report.verdict([finished("shared", "scale-out", steps=steps)]) == "Of 4 times the throughput of one worker 4 reached: shared 97%."
    )


# ---------------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--strategies", "shared:fair"], "shared:uvicorn-uvloop-stock"),
        (["--strategies", "dispatch:rotate"], "dispatch:round-robin"),
        (["--strategies", "reuseport:uvicorn"], "'reuseport:uvicorn'"),
        (["--scenario", "idle", "--rolls", "2"], "--rolls belongs to --scenario rolling"),
        (["--scenario", "rolling", "--bursts", "2"], "--bursts belongs to --scenario burst"),
        (["--scenario", "stall", "--clients", "2"], "--clients belongs to --scenario rolling, scale-out, steady"),
        (["--rolls", "2", "--bursts", "2"], "--bursts, --rolls belong to no scenario together"),
        (["--credits", "2"], "--credits belongs to the strategy dispatch"),
        (["--strategies", "dispatch", "--credits", "129"], "--credits"),
        (["--scenario", "stall", "--connections", "5"], "--connections has no meaning in stall"),
        (["--scenario", "stall", "--service-ms", "0"], "no half load"),
        (["--scenario", "long-lived", "--service-ms", "2"], "--service-ms has no meaning in long-lived"),
        (["--connections", "2000", "--bursts", "11"], "burst makes at most 1818 connections"),
        (["--rolls", "0"], "--rolls"),
    ],
)
def test_bad_arguments(arguments: list[str], named: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["balance", *arguments]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert named in err


def test_serve_runs_no_program(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "127.0.0.1:0", "--strategy", "shared:uvicorn-stock"]) == 2
    assert "--strategy shared" in capfd.readouterr().err
