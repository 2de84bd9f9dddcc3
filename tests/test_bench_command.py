"""The fdpass-bench command as its user meets it: real runs with small numbers, real signals, real HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fdpass_bench import cli, measure, report, sockdiag
from fdpass_bench.balance import Plan, Run
from fdpass_bench.servers import Group
from fdpass_bench.strategy import Strategy

COMMAND = [sys.executable, "-X", "dev", "-W", "error", "-m", "fdpass_bench"]
RUN_KEYS = {
    "strategy": str,
    "scenario": str,
    "workers": int,
    "connections": int,
    "per_worker": list,
    "switches_per_connection": (float, type(None)),
    "outcomes": dict,
    "lost_unaccepted": int,
    "valid": bool,
    "invalid_reason": (str, type(None)),
}


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, **options)


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The command in a session of its own; whatever happens, nothing of it is left afterwards."""
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def session(leader: int) -> list[psutil.Process]:
    """The processes of a session, except those that only wait to be collected."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def balance(path: Path, *arguments: str, status: int = 0) -> list[dict[str, Any]]:
    """Runs `balance`, checks what holds for every JSON, returns the runs."""
    done = run("balance", "--json", str(path), *arguments)
    assert done.returncode == status, done.stderr
    data = json.loads(path.read_text())
    assert set(data) == {"schema", "environment", "runs", "verdict"}
    assert data["schema"] == 1
    assert {"kernel", "cpus", "python", "fdpass", "sysctls", "command", "time"} <= set(data["environment"])
    for one in data["runs"]:
        for key, kind in RUN_KEYS.items():
            assert isinstance(one[key], kind), (key, one[key])
        assert set(one["outcomes"]) == {"ok", "refused", "reset", "timeout"}
        assert len(one["per_worker"]) == one["workers"]
        assert one["valid"] == (one["invalid_reason"] is None)
        if one["valid"]:
            assert sum(one["outcomes"].values()) == one["connections"]
            assert one["lost_accepted"] + one["lost_unaccepted"] == one["connections"] - one["outcomes"]["ok"]
    return data["runs"]  # type: ignore[no-any-return]  # what JSON holds has no type


# ---------------------------------------------------------------------------------------------------------------- balance


def test_idle(tmp_path: Path) -> None:
    strategies = "shared,shared:first,reuseport"
    runs = balance(tmp_path / "idle.json", "--strategies", strategies, "--workers", "2", "--connections", "12", "--scenario", "idle")
    assert [one["strategy"] for one in runs] == strategies.split(",")
    assert all(one["outcomes"]["ok"] == sum(one["per_worker"]) == 12 and one["valid"] for one in runs)
    rotated, first, _ = runs
    assert max(rotated["per_worker"]) < max(first["per_worker"])


def test_burst(tmp_path: Path) -> None:
    (one,) = balance(tmp_path / "burst.json", "--strategies", "shared", "--workers", "2", "--connections", "40", "--scenario", "burst")
    assert one["outcomes"]["ok"] == sum(one["per_worker"]) == 40


def test_kill(tmp_path: Path) -> None:
    small = ("--workers", "2", "--connections", "24", "--service-ms", "100", "--scenario", "kill")
    runs = {one["strategy"]: one for one in balance(tmp_path / "kill.json", *small)}
    for one in runs.values():
        assert one["valid"], one["invalid_reason"]
        assert one["restarts"] == one["kills"] >= 1
        # A worker holds one connection at a time, so no kill takes more than one that had been accepted.
        assert one["lost_accepted"] <= one["kills"]
    assert runs["shared"]["lost_unaccepted"] == 0
    assert runs["reuseport"]["lost_unaccepted"] == 0
    bare = runs["reuseport-bare"]
    if measure.sysctl("net.ipv4.tcp_migrate_req") == 0:
        # The kernel's count of the dead worker's queue and the clients' count of resets are two witnesses.
        assert bare["lost_unaccepted"] == sum(bare["victims_queues"])


def test_what_was_not_measured_is_not_valid(tmp_path: Path) -> None:
    arguments = ("--strategies", "shared", "--workers", "1", "--connections", "1", "--service-ms", "0", "--scenario", "kill")
    (one,) = balance(tmp_path / "kill.json", *arguments, status=1)
    assert not one["valid"]
    assert "before the first kill" in one["invalid_reason"]


def test_the_time_limit_is_a_limit(tmp_path: Path) -> None:
    arguments = ("--strategies", "shared", "--workers", "1", "--connections", "3", "--service-ms", "2000", "--time-limit", "1")
    (one,) = balance(tmp_path / "burst.json", *arguments, "--scenario", "burst", status=1)
    assert one["outcomes"] == {"ok": 0, "refused": 0, "reset": 0, "timeout": 3}
    assert (one["lost_accepted"], one["lost_unaccepted"]) == (1, 2)
    assert "time limit" in one["invalid_reason"]


def test_plain_text_when_not_a_terminal() -> None:
    arguments = ("--strategies", "shared", "--workers", "1", "--connections", "2", "--scenario", "idle", "--json", "-")
    done = run("balance", *arguments, env={**os.environ, "FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"})
    assert done.returncode == 0
    assert json.loads(done.stdout)["runs"][0]["outcomes"]["ok"] == 2
    assert "max/mean 1.00" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_on_a_terminal_of_80_columns() -> None:
    ours, theirs = pty.openpty()
    arguments = ["balance", "--strategies", "reuseport-bare", "--workers", "4", "--connections", "200", "--scenario", "burst"]
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    with subprocess.Popen([*COMMAND, *arguments], stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=environment) as process:
        os.close(theirs)
        written = b""
        # EIO is how a terminal says that nobody holds its other side any more.
        with contextlib.suppress(OSError):
            while chunk := os.read(ours, 4096):
                written += chunk
        os.close(ours)
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 0
    assert b"\x1b[" in written
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())
    table = text[text.rindex("burst: many") :]
    assert "200 ok" in table
    assert max(len(line) for line in table.splitlines()) <= 80


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_shows_what_was_measured_and_leaves_nothing(tmp_path: Path, number: int, status: int) -> None:
    path = tmp_path / "runs.json"
    with running("balance", "--strategies", "shared", "--workers", "2", "--connections", "12", "--json", str(path)) as process:
        assert process.stderr is not None
        assert re.fullmatch(r"1/3 idle, shared: 12 ok; .* left\n", process.stderr.readline())
        # The second run is under way: its workers are starting, or started. A terminal's Ctrl-C reaches all of them.
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        out, err = process.communicate()
        left = session(process.pid)
        # multiprocessing's resource tracker ends when it sees that its parent has.
        _, alive = psutil.wait_procs(left, timeout=20)
    assert process.returncode == status
    assert "12 ok" in out
    assert "Traceback" not in out + err
    assert f"1 of 3 runs were measured, see {path}; fdpass-bench balance --resume {path} goes on." in err
    assert alive == []
    data = json.loads(path.read_text())
    assert data["environment"]["interrupted"] is True
    assert [one["scenario"] for one in data["runs"]] == ["idle"]


# ---------------------------------------------------------------------------------------------------------------- the verdict


def finished(strategy: str, scenario: str, per_worker: list[int], lost: int = 0, reason: str | None = None) -> Run:
    plan = Plan(Group(Strategy.parse(strategy)), scenario, len(per_worker), sum(per_worker) + lost, 30.0)
    outcomes = {"ok": sum(per_worker), "refused": 0, "reset": lost, "timeout": 0}
    return Run(plan, per_worker, outcomes, lost_unaccepted=lost, invalid_reason=reason)


def test_the_verdict_follows_the_numbers() -> None:
    better = report.verdict([finished("shared", "idle", [10, 20]), finished("reuseport", "idle", [15, 15])])
    assert better == "Connections to idle workers were shared most evenly by reuseport (max/mean 1.00 against 1.33)."
    equal = report.verdict([finished("shared", "burst", [15, 15]), finished("reuseport", "burst", [15, 15])])
    assert equal == "A burst was shared by shared and reuseport (max/mean 1.00)."
    lost = report.verdict([finished("shared", "kill", [8, 8], lost=4), finished("reuseport-bare", "kill", [10, 10])])
    assert lost == "When workers were killed, reuseport-bare lost no connection that no worker had accepted, shared 4 of 20."


def test_the_verdict_leaves_out_what_is_not_valid() -> None:
    bad = finished("reuseport", "idle", [15, 15], reason="the time limit was hit")
    assert report.verdict([bad]) == "Nothing was measured properly, so there is nothing to compare."
    assert report.verdict([bad, finished("shared", "idle", [10, 20])]).endswith(
        "(max/mean 1.33); 1 of 2 runs was not valid and says nothing."
    )
    assert report.verdict([]) == "Nothing was measured."


# ---------------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["frobnicate"], "there is no command 'frobnicate'; there are balance, doctor, pass, report, serve, who"),
        (["--frobnicate"], "--frobnicate"),
        (["balance", "--strategies", "shared,fair"], "'fair'; there are shared, reuseport, reuseport-bare"),
        (["balance", "--strategies", "shared:last"], "shared:first"),
        (["balance", "--strategies", ""], "shared"),
        (["balance", "--scenario", "flood"], "'idle', 'burst', 'kill'"),
        (["balance", "--workers", "0"], "--workers"),
        (["balance", "--connections", "many"], "many"),
        (["balance", "--json", "/nonexistent/runs.json"], "/nonexistent/runs.json"),
        (["balance", "extra"], "extra"),
        (["serve", "nowhere"], "'nowhere'"),
        (["serve", "127.0.0.1:0", "--strategy", "fair"], "'fair'"),
        (["serve", "unix:/tmp/fdpass-bench.sock", "--strategy", "reuseport"], "unix:"),
        (["who"], "PORT"),
        (["who", "http"], "'http' is no port: a number from 1 to 65535"),
        (["who", "0"], "a number from 1 to 65535"),
        (["who", "65536"], "a number from 1 to 65535"),
        (["pass", "--count", "many"], "'many' is not a whole number from 1 to 10000"),
        (["serve", "--workers", "0"], "1<=x<=64"),
    ],
)
def test_bad_arguments(arguments: list[str], named: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("fdpass-bench: ")
    assert named in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["doctor"], ["balance", "--scenario", "idle", "--workers", "1", "--connections", "2"]])
def test_a_full_disk_is_one_sentence(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "fdpass-bench: cannot write standard output: No space left on device"
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_enough_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*COMMAND, "--help"], stdout=write, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_bad_argument_ends_the_process_with_2() -> None:
    done = run("balance", "--strategies", "fair")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("command", [[], *([name] for name in sorted(cli.command.commands))])
def test_help_fits_a_screen_and_has_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"Examples?:\n +fdpass-bench", out)
    assert out.count("\n") <= 40
    assert max(map(len, out.splitlines())) <= 80


def test_help_all_says_what_help_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["balance", "--help"]) == 0
    assert "--help-all says what each means" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["balance", "--help-all"]) == 0
    out = capsys.readouterr().out
    for param in cli.command.commands["balance"].params:
        assert param.opts[0] in out
    assert "[0.01<=x<=0.99]" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "balance"),
        ("bal", "balance"),
        ("balance --scen", "--scenario"),
        ("balance --scenario k", "kill"),
        ("balance --strategies shared,reuse", "shared,reuseport"),
        ("balance --peer nginx,gran", "nginx,granian"),
        ("pass --what carriers,st", "carriers,starts"),
        ("report --mark", "--markdown"),
        ("serve --strategy reuse", "reuseport"),
        ("pass --start-method spawn,fork", "spawn,forkserver"),
        ("who --h", "--help"),
        ("doctor --h", "--help"),
    ],
)
def test_completion_is_clicks_own(words: str, expected: str) -> None:
    environment = {**os.environ, "_FDPASS_BENCH_COMPLETE": "bash_complete", "COMP_WORDS": f"fdpass-bench {words}"}
    environment["COMP_CWORD"] = str(max(1, len(words.split())))
    done = run(env=environment)
    assert done.returncode == 0, done.stderr
    assert expected in [line.partition(",")[2] for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("fdpass-bench ", "balance doctor pass report serve who"),
        ("fdpass-bench who --h", "--help"),
        ("fdpass-bench balance --strategies shared,reuseport-", "shared,reuseport-bare"),
        # Readline's own words end at the colon: what is completed begins after it.
        ("fdpass-bench balance --strategies shared:f", "first"),
        ("fdpass-bench serve --strategy=shared:fi", "first"),
    ],
)
def test_completion_in_a_bash(line: str, expected: str) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    script = f"""
    source <(_FDPASS_BENCH_COMPLETE=bash_source "$@")
    COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)}
    COMP_WORDS=($COMP_LINE) COMP_CWORD=1
    _fdpass_bench_completion "$COMMAND"
    IFS=' '; echo "${{COMPREPLY[*]}}"
    """
    here = Path(sys.executable).parent / "fdpass-bench"
    if not here.exists():
        pytest.skip("the command is not installed beside this interpreter")
    done = subprocess.run(
        [bash, "--norc", "-c", script, "bash", str(here)],
        env={**os.environ, "COMMAND": str(here)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == (expected, "")


def test_the_line_in_the_help_turns_completion_on() -> None:
    assert "_FDPASS_BENCH_COMPLETE=bash_source" in run("--help").stdout
    done = run(env={**os.environ, "_FDPASS_BENCH_COMPLETE": "fish_source"})
    assert done.returncode == 0
    assert "complete" in done.stdout


# ---------------------------------------------------------------------------------------------------------------- serve and who


def get(host: str, port: int) -> tuple[int, str]:
    connection = http.client.HTTPConnection(host, port, timeout=20)
    try:
        connection.request("GET", "/")
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


@pytest.mark.parametrize("strategy", ["shared", "reuseport"])
def test_serve_answers_with_the_index_and_who_names_its_processes(strategy: str) -> None:
    with running("serve", "127.0.0.1:0", "--workers", "2", "--strategy", strategy) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"Serving ([\d.]+):(\d+) ", line)
        assert found is not None, line
        host, port = found[1], int(found[2])
        answers = {get(host, port) for _ in range(8)}
        while strategy == "shared" and len(answers) < 2:
            # On a busy machine one worker may be back in its wait before the other was there at all.
            answers.add(get(host, port))
        assert answers <= {(200, "0\n"), (200, "1\n")}

        who = run("who", str(port))
        assert who.returncode == 0
        assert "held by 3 processes" in " ".join(who.stdout.split()) or "shared by 3 processes" in " ".join(who.stdout.split())
        assert str(process.pid) in who.stdout
        sockets = sockdiag.listening_sockets(port)
        assert len(sockets) == (1 if strategy == "shared" else 2)

        process.send_signal(signal.SIGTERM)
        out, err = process.communicate()
        _, alive = psutil.wait_procs(session(process.pid), timeout=20)
    assert (process.returncode, out, err, alive) == (0, "", "", [])
    assert sockdiag.listening_sockets(port) == []


def test_serve_says_when_the_port_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("serve", f"127.0.0.1:{taken.getsockname()[1]}", "--workers", "1")
    assert done.returncode == 1
    assert "Address already in use" in done.stderr
    assert done.stderr.count("\n") == 1


def test_who_when_nothing_listens() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        done = run("who", str(port))
    assert (done.returncode, done.stdout) == (1, f"Nothing listens on TCP port {port} here.\n")


@pytest.mark.parametrize(("family", "host", "shown"), [(socket.AF_INET, "127.0.0.1", "127.0.0.1"), (socket.AF_INET6, "::1", "[::1]")])
def test_a_listening_sockets_queue_and_limit(family: int, host: str, shown: str) -> None:
    try:
        server = socket.create_server((host, 0), family=family, backlog=7)
    except OSError as error:
        pytest.skip(f"no {host} here: {error}")
    with server, contextlib.ExitStack() as clients:
        address = server.getsockname()[:2]
        for _ in range(3):
            clients.enter_context(socket.create_connection(address))
        (found,) = sockdiag.listening_sockets(address[1])
        assert (found.address, found.queue, found.limit) == (f"{shown}:{address[1]}", 3, 7)
        assert found.inode == os.fstat(server.fileno()).st_ino


# ---------------------------------------------------------------------------------------------------------------- doctor


def test_doctor_finds_what_fdpass_needs() -> None:
    done = run("doctor")
    assert done.returncode == 0, done.stdout
    for name in (
        "SCM_RIGHTS",
        "EPOLLEXCLUSIVE",
        "SO_REUSEPORT after bind",
        "pidfd_open",
        "start by spawn",
        "RLIMIT_NOFILE",
        "tcp_migrate_req",
    ):
        assert re.search(rf"^(ok|note) +{name}", done.stdout, re.MULTILINE), name
    assert "\x1b" not in done.stdout


def test_doctor_says_what_to_do_about_a_low_limit() -> None:
    done = subprocess.run(["sh", "-c", 'ulimit -n 200; exec "$@"', "sh", *COMMAND, "doctor"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^note +RLIMIT_NOFILE +200 soft", done.stdout, re.MULTILINE)
    assert "LimitNOFILE=" in done.stdout


def test_doctor_says_what_to_do_in_the_line_after_each_lack() -> None:
    done = subprocess.run(["sh", "-c", 'ulimit -n 200; exec "$@"', "sh", *COMMAND, "doctor"], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    noted = [number for number, line in enumerate(lines) if re.match(r"(note|lack) ", line)]
    assert noted
    for number in noted:
        # What was found may be longer than a line.
        following = next(line for line in lines[number + 1 :] if re.match(r"\S| +-> ", line))
        assert following.lstrip().startswith("-> "), lines[number]
    assert "Worth a look: " in " ".join(done.stdout.split())
