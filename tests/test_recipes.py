"""The programs on the page of recipes run as they are printed, each with the real server, and answer a real client."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
if not PAGE.exists():
    pytest.skip("the documentation is not beside the tests", allow_module_level=True)
FILES = dict(re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE))
COMMANDS = re.findall(r"^\$ (.*)$", PAGE.read_text(), re.MULTILINE)
APPLICATION = re.search(r"^async def app\(.*?(?=^def )", FILES["uvicorn_group.py"], re.DOTALL | re.MULTILINE)

pytestmark = pytest.mark.long


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def refuses(port):
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) != 0


@contextlib.contextmanager
def running(command, folder, end=signal.SIGINT):
    """The server in a session of its own; it is told to end as a terminal or a service manager would, and has to."""
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=out, start_new_session=True)
    try:
        yield process
        process.send_signal(end)
        process.wait(timeout=60)
        assert b"Address already in use" not in log.read_bytes()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def answers(url, folder):
    verify = ssl.create_default_context(cafile=str(folder / "cert.pem")) if url.startswith("https:") else True
    with httpx.Client(transport=httpx.HTTPTransport(retries=0, verify=verify)) as client:
        return [client.get(url, timeout=30, headers={"connection": "close"}).text for _ in range(12)]


def certify(folder):
    """A key and a self-signed certificate for 127.0.0.1."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=here", "-keyout", "key.pem"]
    try:
        subprocess.run(
            [*command, "-out", "cert.pem", "-addext", "subjectAltName=IP:127.0.0.1"], cwd=folder, check=True, capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("no openssl to make a certificate with")


@pytest.mark.parametrize("name", [name for name, source in FILES.items() if "WorkerGroup" in source])
def test_a_group_serves(name, tmp_path):
    pytest.importorskip({"hypercorn_group.py": "hypercorn", "aiohttp_group.py": "aiohttp", "manager.py": "uvloop"}.get(name, "uvicorn"))
    (tmp_path / name).write_text(FILES[name].replace("127.0.0.1:8000", "127.0.0.1:0"))
    tls = "ssl" in FILES[name]
    if tls:
        certify(tmp_path)
    with running([sys.executable, name], tmp_path) as process:
        address = process.stdout.readline().decode().strip()
        assert answers(f"http{'s' * tls}://{address}/", tmp_path) == ["ok\n"] * 12


def test_a_new_version_comes_by_sighup_and_one_that_fails_does_not(tmp_path):
    pytest.importorskip("uvicorn")
    source = FILES["rolling_group.py"].replace("127.0.0.1:8000", "127.0.0.1:0").replace("workers=4", "workers=2")
    program, log = tmp_path / "rolling_group.py", tmp_path / "log"
    program.write_text(source)
    with running([sys.executable, program.name], tmp_path) as process:
        url = f"http://{process.stdout.readline().decode().strip()}/"
        # The client keeps its connection as long as it may: each request is answered, whatever happens.
        with httpx.Client(transport=httpx.HTTPTransport(retries=0), timeout=30) as client:
            assert client.get(url).text == "ok\n"
            program.write_text(source.replace('b"ok\\n"', 'b"v2\\n"'))
            roll_until(b"rolled\n", log, client, url, process)
            assert client.get(url).text == "v2\n"
            program.write_text(source.replace("config = ", "raise SystemExit('broken') #"))
            roll_until(b"the roll ended: ", log, client, url, process)
            assert client.get(url).text == "v2\n"
        assert b"serves on" in log.read_bytes()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


def roll_until(word, log, client, url, process):
    """Demands a roll, and makes requests until the log has that word. Each is answered."""
    process.send_signal(signal.SIGHUP)
    limit = time.monotonic() + 60
    while word not in log.read_bytes():
        assert client.get(url).status_code == 200
        assert time.monotonic() < limit


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith(("uvicorn", "gunicorn"))])
def test_a_command_serves(command, tmp_path):
    if "uvloop" in command:
        pytest.importorskip("uvloop")
    if command.startswith("gunicorn"):
        pytest.importorskip("uvicorn_worker")
    (tmp_path / "app.py").write_text(APPLICATION[0])
    for name in ("fair_worker.py", "batch_loop.py"):
        (tmp_path / name).write_text(FILES[name])
    tls = "--ssl-keyfile" in command
    if tls:
        certify(tmp_path)
    port = free_port()
    program, *words = command.split()
    bind = ["--bind", f"127.0.0.1:{port}"] if program == "gunicorn" else ["--port", str(port)]
    # Of gunicorn's SIGINT the workers that uvicorn has for it know nothing, on any loop: it kills them after its 30 s of grace.
    end = signal.SIGTERM if program == "gunicorn" else signal.SIGINT
    with running([sys.executable, "-m", program, *words, *bind], tmp_path, end) as process:
        while refuses(port):
            # A server that ended instead of beginning is no timeout.
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=0.05)
        assert answers(f"http{'s' * tls}://127.0.0.1:{port}/", tmp_path) == ["ok\n"] * 12
