"""Programs that people run, whose descriptors travel by fdpass: uvicorn's workers, torch, executors, joblib, loky, Dask."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.long

PROGRAMS = Path(__file__).parent / "programs"


def marker(name):
    """The environment marker of a package of pyproject.toml's extra "programs"."""
    [found] = [one.marker for one in map(Requirement, requires("fdpass")) if one.name == name]
    return found


torch = pytest.mark.skipif(
    not marker("torch").evaluate({"extra": "programs"}), reason=f"torch is for {marker('torch')} (pyproject.toml), which this is not"
)


def run_text(path, *args, warnings="error"):
    """What a program prints. What is not installed fails: `make test` brings the extra "programs"."""
    command = [sys.executable, "-W", warnings, str(path), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def run(program, *args, **options):
    """The facts that one of the programs prints."""
    return json.loads(run_text(PROGRAMS / program, *args, **options))


# -------------------------------------------------------------------------------------------------------------- torch


@torch
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_data_loaders_two_workers_send_their_tensors_by_tickets(method):
    # From 3.12 on a fork beside any thread, such as numpy's, is a DeprecationWarning.
    facts = run("loader.py", method, warnings="ignore::DeprecationWarning")
    assert len(facts["workers"]) == 2
    # What each worker's own store had done when it made its last item.
    assert all(made > 0 and claims > 0 for made, claims in facts["workers"])
    assert not facts["sharer"]


@torch
def test_a_receiver_at_its_limit_dies_without_register():
    facts = run("tensors.py", "limit", "plain")
    assert facts["died"] == "received 0 items of ancdata"
    assert facts["sharer"]
    assert facts["made"] == 0


@torch
def test_a_receiver_at_its_limit_is_told_and_goes_on_with_register():
    facts = run("tensors.py", "limit", "registered")
    assert len(facts["errors"]) >= 2
    for text, needed, got, limit, kept in facts["errors"]:
        assert (needed > got, limit) == (True, 256)
        assert f"needed {needed} free numbers" in text
        assert f"got {got}: this process's table is full (RLIMIT_NOFILE is 256)" in text
        assert 100 < kept < 256
    # Of each error one tensor is lost with its item; its descriptor waits in the sender, whose ticket was not used.
    assert facts["received"] + len(facts["errors"]) == facts["made"] == 600
    assert facts["unclaimed"] == len(facts["errors"])
    assert facts["exitcode"] == 0
    assert not facts["sharer"]


@torch
def test_a_producer_700_tensors_ahead_at_a_soft_limit_of_1024():
    facts = run("tensors.py", "ahead", "registered")
    assert (facts["received"], facts["made"], facts["claims"], facts["unclaimed"], facts["exitcode"]) == (700, 700, 700, 0, 0)
    assert facts["descriptors"] > 1024
    assert not facts["sharer"]


@torch
def test_the_program_in_the_documentation(tmp_path):
    page = Path(__file__).parent.parent / "docs" / "pytorch.md"
    [program] = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "program.py").write_text(program)
    *kept, last = run_text(tmp_path / "program.py").splitlines()
    assert all(re.fullmatch(r"2\d\d kept, needed 2, got [01], limit 256", line) for line in kept)
    assert last == f"{600 - len(kept)} received, {len(kept)} lost"


# -------------------------------------------------------------------------------------------------------------- pools


@pytest.mark.parametrize("name", ["executor", "joblib", "loky", "dask"])
def test_arguments_and_results_are_the_same_kernel_sockets(name):
    # Dask's scheduler loads arguments and drops them; an OwnedFd warns of that.
    facts = run("pools.py", name, warnings="ignore::ResourceWarning")
    assert len(set(facts["here"])) == 4
    assert facts["there"] == facts["back"] == facts["here"]
    assert facts["said"] == facts["pids"]
    assert facts["pid"] not in facts["pids"]
    assert facts["read"] == ["what it says"] * 2
    # Four sockets and two files; Dask's scheduler takes them out of the client's pickles and makes its own.
    assert facts["made"] == facts["claims"] == (12 if name == "dask" else 6)
    assert facts["unclaimed"] == 0
    assert not facts["sharer"]
    assert facts["left"] == []


# -------------------------------------------------------------------------------------------------------------- uvicorn


def get(port, path):
    """The connection of a request that was sent, once somebody listens."""
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", port))
            break
        except ConnectionRefusedError:
            os.sched_yield()
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n".encode())
    return connection


def answer(connection):
    with connection, connection.makefile("rb") as file:
        head, body = file.read().split(b"\r\n\r\n", 1)
    assert head.startswith(b"HTTP/1.1 200")
    return json.loads(body)


def test_uvicorns_workers_run_an_application_that_registers(tmp_path):
    command = [sys.executable, "-m", "uvicorn", "application:application", "--workers", "2", "--port", "0", "--app-dir", str(PROGRAMS)]
    with socket.socket(socket.AF_UNIX) as gate:
        gate.bind(str(tmp_path / "gate"))
        gate.listen()
        environment = {**os.environ, "FDPASS_TEST_SOCKET": str(tmp_path / "gate")}
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment) as server:
            try:
                lines = iter(server.stderr.readline, "")
                port = next(int(found[1]) for line in lines if (found := re.search(r"http://127\.0\.0\.1:(\d+)", line)))
                one = get(port, "/held")
                held, _ = gate.accept()
                with held:
                    assert held.recv(10) == b"held"
                    # The first worker is blocked: this one is the other's.
                    facts = [answer(get(port, "/"))]
                    held.sendall(b"g")
                facts.append(answer(one))
                facts += [answer(get(port, "/")) for _ in range(8)]
            finally:
                server.send_signal(signal.SIGINT)
                rest = server.stderr.read()
    assert server.returncode == 0, rest
    assert "Traceback" not in rest
    assert len({each["worker"] for each in facts}) == 2
    seen = {}
    for each in facts:
        assert each["helper"][0] == each["helper"][1] != each["worker"]
        assert each["cookies"][0] == each["cookies"][1]
        # One claim for each answer of that worker.
        seen[each["worker"]] = seen.get(each["worker"], 0) + 1
        assert each["claims"] == seen[each["worker"]]
        assert not each["sharer"]
