"""Other people's servers in the scenarios of `balance`, beside ours: really started, frozen, reloaded, killed and interrupted.
What is not a Python package is skipped where it is not installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from fdpass_bench import cli
from fdpass_bench.peers import PEERS, RELOADING, RESTARTING, Order, PeerError
from fdpass_bench.servers import Workers

pytestmark = [pytest.mark.long, pytest.mark.skipif(sys.platform != "linux", reason="the load generator needs Linux")]

COMMAND = [sys.executable, "-X", "dev", "-W", "error", "-m", "fdpass_bench", "balance"]


@pytest.fixture(autouse=True)
def no_preload(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sanitizer that these tests run under is for our own C."""
    monkeypatch.delenv("LD_PRELOAD", raising=False)


def installed(name: str) -> str:
    try:
        PEERS[name](Order(1, True, "sleep", False, 1))
    except PeerError as error:
        # The others are Python packages, which the tests install: one that is missing is a failure.
        if not name.startswith(("nginx", "node")):
            raise
        pytest.skip(str(error))
    return name


def measured(path: Path, scenario: str, peer: str, *arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our run and the peer's, of two workers each. A noisy machine may make a run invalid, and then it must say so."""
    command = [*COMMAND, "--json", str(path), "--scenario", scenario, "--strategies", "shared", "--peer", installed(peer)]
    done = subprocess.run([*command, "--workers", "2", *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert "Traceback" not in done.stderr
    ours, theirs = json.loads(path.read_text())["runs"]
    assert (ours["strategy"], ours["server"], ours["scenario"]) == ("shared", "fdpass", scenario)
    assert (theirs["strategy"], theirs["server"], theirs["scenario"]) == (peer, "peer", scenario)
    assert ours["version"]
    assert theirs["version"]
    for one in (ours, theirs):
        assert one["valid"] == (one["invalid_reason"] is None)
        assert one["lost_accepted"] + one["lost_unaccepted"] == sum(one["outcomes"].values()) - one["outcomes"]["ok"]
    assert done.returncode == (0 if ours["valid"] and theirs["valid"] else 1), done.stderr
    assert "shared" in done.stdout
    return ours, theirs


@pytest.mark.parametrize("peer", ["nginx", "nginx-reuseport"])
def test_a_worker_of_nginx_is_frozen(tmp_path: Path, peer: str) -> None:
    _, theirs = measured(tmp_path / "stall.json", "stall", peer)
    assert theirs["outcomes"]["ok"] == theirs["connections"] == sum(theirs["per_worker"])
    assert min(theirs["per_worker"]) > 0
    assert theirs["frozen_seconds"] >= 1
    assert theirs["arrived_while_frozen"] > 0
    if peer == "nginx-reuseport":
        # What was hashed to the frozen worker waits until it goes on: no machine is so slow that this would not show.
        assert theirs["delayed"] > 0


@pytest.mark.parametrize("peer", ["gunicorn", "gunicorn-reuseport", "uvicorn", "nginx"])
def test_a_roll_of_a_peer_is_its_reload(tmp_path: Path, peer: str) -> None:
    ours, theirs = measured(tmp_path / "rolling.json", "rolling", peer, "--rolls", "2", "--clients", "4")
    assert ours["failed"] == 0
    assert theirs["valid"], theirs["invalid_reason"]
    assert (theirs["rolls"], len(theirs["roll_seconds"])) == (2, 2)
    assert theirs["failed"] == theirs["requests"] - theirs["outcomes"]["ok"]
    # Three generations of workers have the same two places, though two of them may live at once.
    assert sum(theirs["per_worker"]) == theirs["outcomes"]["ok"] > 0


@pytest.mark.parametrize("peer", ["node", "node-none"])
def test_who_takes_spaced_connections_in_a_cluster(tmp_path: Path, peer: str) -> None:
    _, theirs = measured(tmp_path / "idle.json", "idle", peer, "--connections", "20")
    assert theirs["valid"], theirs["invalid_reason"]
    assert theirs["outcomes"]["ok"] == sum(theirs["per_worker"]) == 20
    assert theirs["switches_per_connection"] is not None
    if peer == "node":
        # Its first process hands them round; else the kernel wakes whom it likes.
        assert theirs["per_worker"] == [10, 10]


def test_who_has_the_accept_mutex_takes_what_comes(tmp_path: Path) -> None:
    _, theirs = measured(tmp_path / "idle.json", "idle", "nginx-accept-mutex", "--connections", "20")
    assert theirs["valid"], theirs["invalid_reason"]
    assert theirs["outcomes"]["ok"] == sum(theirs["per_worker"]) == 20


@pytest.mark.parametrize("peer", ["uvicorn", "granian"])
def test_connections_of_a_peer_are_kept(tmp_path: Path, peer: str) -> None:
    _, theirs = measured(tmp_path / "open.json", "long-lived", peer, "--connections", "30")
    assert theirs["valid"], theirs["invalid_reason"]
    assert sum(theirs["open_per_worker"]) == 30
    assert theirs["outcomes"]["ok"] == theirs["opened"] == sum(theirs["per_worker"])


def test_a_peer_is_scaled_out(tmp_path: Path) -> None:
    _, theirs = measured(tmp_path / "scale.json", "scale-out", "granian")
    assert theirs["valid"], theirs["invalid_reason"]
    assert [step["workers"] for step in theirs["steps"]] == [1, 2]
    assert sum(theirs["per_worker"]) == theirs["outcomes"]["ok"]


def test_a_burst_on_a_peer(tmp_path: Path) -> None:
    _, theirs = measured(tmp_path / "burst.json", "burst", "gunicorn", "--connections", "20", "--bursts", "2")
    assert theirs["valid"], theirs["invalid_reason"]
    assert theirs["outcomes"]["ok"] == sum(theirs["per_worker"]) == 40
    assert len(theirs["max_over_means"]) == 2


@pytest.mark.parametrize("peer", ["gunicorn", "gunicorn-reuseport"])
def test_what_a_killed_worker_of_a_peer_takes_along(tmp_path: Path, peer: str) -> None:
    _, theirs = measured(tmp_path / "kill.json", "kill", peer, "--connections", "24", "--service-ms", "100")
    assert theirs["valid"], theirs["invalid_reason"]
    assert theirs["restarts"] == theirs["kills"] >= 1
    if peer == "gunicorn":
        # All workers have one socket: what waits there is the others'.
        assert theirs["lost_unaccepted"] == 0
    else:
        # Each has a socket of its own, and the victim's queue dies with it.
        assert theirs["lost_unaccepted"] == sum(theirs["victims_queues"])


# ---------------------------------------------------------------------------------------------------------------- the end


def test_an_interrupt_while_a_worker_of_a_peer_is_frozen(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    arguments = ["--strategies", "shared", "--peer", "gunicorn", "--workers", "2", "--scenario", "stall", "--json", str(path)]
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        leader, folder = 0, tmp_path
        try:
            assert process.stderr is not None
            assert process.stderr.readline().startswith("1/2 stall, shared: ")
            leader = os.getsid(frozen(process.pid))
            folder = Path(f"/proc/{leader}/cwd").resolve()
            assert leader != process.pid
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate()
            _, alive = psutil.wait_procs([*session(process.pid), *session(leader)], timeout=20)
        finally:
            for group in {process.pid, leader} - {0}:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
    assert (process.returncode, alive) == (130, [])
    assert not folder.exists()
    assert "Traceback" not in out + err
    assert "1 of 2 runs were measured" in err
    assert [one["strategy"] for one in json.loads(path.read_text())["runs"]] == ["shared"]


def test_a_peer_that_ends_makes_its_run_invalid(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    arguments = ["--strategies", "shared", "--peer", "gunicorn", "--workers", "2", "--scenario", "stall", "--json", str(path)]
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("1/2 stall, shared: ")
        leader = os.getsid(frozen(process.pid))
        os.kill(leader, signal.SIGKILL)
        _, err = process.communicate()
    _, theirs = json.loads(path.read_text())["runs"]
    assert (process.returncode, theirs["valid"]) == (1, False)
    assert theirs["invalid_reason"].startswith("gunicorn was killed by SIGKILL")
    assert "Traceback" not in err
    assert session(leader) == []


def frozen(ancestor: int) -> int:
    """The first process below this one that is seen stopped."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(ancestor).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    # Ours stops in a session of the command's own, and its run is over.
                    if process.status() == psutil.STATUS_STOPPED and os.getsid(process.pid) != ancestor:
                        return process.pid
    raise AssertionError("no process was frozen")


def session(leader: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


# ---------------------------------------------------------------------------------------------------------------- places


def test_a_successor_takes_its_predecessors_place() -> None:
    alive = [11, 10]
    workers = Workers(lambda: alive, 2)
    assert workers.pids() == [11, 10]
    assert [workers.place(pid) for pid in (10, 11, 12)] == [1, 0, None]
    alive[:] = [10, 12]
    assert workers.pids() == [12, 10]
    # The dead one's answers are still its own.
    assert [workers.place(pid) for pid in (10, 11, 12)] == [1, 0, 0]
    # No place is free for a third until one has gone.
    alive[:] = [13, 10, 12]
    assert workers.pids() == [12, 10, 13]
    assert workers.place(13) is None
    alive[:] = [13, 12]
    assert workers.pids() == [12, 13]
    assert workers.place(13) == 1


# ---------------------------------------------------------------------------------------------------------------- arguments


def test_which_peer_can_do_what() -> None:
    assert set(PEERS) - set(RELOADING) == {"node", "node-none"}
    assert set(RELOADING) - set(RESTARTING) == {"granian"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--scenario", "rolling", "--peer", "node"], "node cannot replace its workers while it serves; nginx, nginx-reuseport"),
        (["--rolls", "2", "--peer", "gunicorn,node-none"], "node-none cannot replace its workers"),
        (["--scenario", "kill", "--peer", "granian"], "granian starts no worker in place of one that was killed; nginx, "),
        (["--scenario", "kill", "--peer", "node"], "node starts no worker in place"),
        (["--scenario", "long-lived", "--peer", "gunicorn"], "gunicorn's sync workers close each connection after one answer"),
        (["--scenario", "steady", "--requests-per-connection", "2", "--peer", "gunicorn"], "gunicorn's sync workers close each connection"),
        (["--scenario", "idle", "--peer", "nginx,apache"], "there is no peer 'apache'; there are nginx, "),
        (["--scenario", "idle", "--target", "127.0.0.1:1"], "--target belongs to --scenario steady"),
    ],
)
def test_bad_combinations(arguments: list[str], named: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["balance", *arguments]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert named in err


def test_one_that_is_not_installed_is_no_bad_argument(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    assert cli.main(["balance", "--scenario", "stall", "--peer", "nginx"]) == 1
    assert capfd.readouterr() == ("", "fdpass-bench: nginx is not installed: apt install nginx\n")
