"""The programs on the page of recipes run as they are printed, each with the real server, and answer a real client."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
if not PAGE.exists():
    pytest.skip("the documentation is not beside the tests", allow_module_level=True)
FILES = dict(re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE))
COMMANDS = re.findall(r"^\$ (.*)$", PAGE.read_text(), re.MULTILINE)
APPLICATION = re.search(r"^async def app\(.*?(?=^def )", FILES["uvicorn_group.py"], re.DOTALL | re.MULTILINE)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def refuses(port):
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) != 0


@contextlib.contextmanager
def running(command, folder):
    """The server in a session of its own; it is told to end as a terminal or a service manager would, and has to."""
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=out, start_new_session=True)
    try:
        yield process
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        assert b"Address already in use" not in log.read_bytes()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def answers(url):
    with httpx.Client(transport=httpx.HTTPTransport(retries=0)) as client:
        return [client.get(url, timeout=30, headers={"connection": "close"}).text for _ in range(12)]


@pytest.mark.parametrize("name", [name for name, source in FILES.items() if "WorkerGroup" in source])
def test_a_group_serves(name, tmp_path):
    pytest.importorskip({"hypercorn_group.py": "hypercorn", "aiohttp_group.py": "aiohttp", "manager.py": "uvloop"}.get(name, "uvicorn"))
    (tmp_path / name).write_text(FILES[name].replace("127.0.0.1:8000", "127.0.0.1:0"))
    with running([sys.executable, name], tmp_path) as process:
        address = process.stdout.readline().decode().strip()
        assert answers(f"http://{address}/") == ["ok\n"] * 12


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith(("uvicorn", "gunicorn"))])
def test_a_command_serves(command, tmp_path):
    if "uvloop" in command:
        pytest.importorskip("uvloop")
    if command.startswith("gunicorn"):
        pytest.importorskip("uvicorn_worker")
    (tmp_path / "app.py").write_text(APPLICATION[0])
    (tmp_path / "fair_worker.py").write_text(FILES["fair_worker.py"])
    port = free_port()
    program, *words = command.split()
    bind = ["--bind", f"127.0.0.1:{port}"] if program == "gunicorn" else ["--port", str(port)]
    with running([sys.executable, "-m", program, *words, *bind], tmp_path) as process:
        while refuses(port):
            # A server that ended instead of beginning is no timeout.
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=0.05)
        assert answers(f"http://127.0.0.1:{port}/") == ["ok\n"] * 12
