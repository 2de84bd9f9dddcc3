"""The programs on the pages about workers and servers run as they are printed, each until Ctrl-C or its own end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

DOCS = Path(__file__).parent.parent / "docs"
if not DOCS.exists():
    pytest.skip("the documentation is not beside the tests", allow_module_level=True)

pytestmark = pytest.mark.long


def programs(page: str) -> list[str]:
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    return [block for block in blocks if "__main__" in block]


GREETS, COUNTS, FAILS = programs("workers.md")
FIRST, ASYNCIO = programs("quickstart.md")
[ECHOES] = programs("asyncio.md")


@contextlib.contextmanager
def running(source: str, folder: Path) -> Iterator[tuple[subprocess.Popen[str], tuple[str, int]]]:
    """A program and the address that it prints; Ctrl-C ends it, and all of its workers."""
    program = folder / "program.py"
    program.write_text(source.replace("127.0.0.1:8000", "127.0.0.1:0"))
    process = subprocess.Popen([sys.executable, "-u", program.name], cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        host, _, port = process.stdout.readline().strip().rpartition(":")
        yield process, (host, int(port))
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def said(address: tuple[str, int]) -> bytes:
    with socket.create_connection(address, timeout=30) as sock, sock.makefile("rb") as file:
        return file.read()


@pytest.mark.parametrize(
    ("source", "words"),
    [(GREETS, rb"hello from worker [0-3]\n"), (FIRST, rb"hello from worker [0-3]\n"), (ASYNCIO, rb"hello\n")],
    ids=["workers", "quickstart", "asyncio"],
)
def test_a_group_serves(source: str, words: bytes, tmp_path: Path) -> None:
    with running(source, tmp_path) as (_, address):
        for _ in range(8):
            assert re.fullmatch(words, said(address))


def test_a_server_under_dispatch(tmp_path: Path) -> None:
    with running(ECHOES, tmp_path) as (_, address):
        for word in (b"one", b"two"):
            with socket.create_connection(address, timeout=30) as sock:
                sock.sendall(word)
                assert sock.recv(100) == word


def test_the_page_for_prometheus(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    with running(COUNTS.replace("9100", str(port)), tmp_path) as (_, address):
        assert said(address) == b""
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as page:
            assert page.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
            text = page.read().decode()
        families = list(text_string_to_metric_families(text))
        assert sum(sample.value for one in families if one.name == "fdpass_worker_accepted" for sample in one.samples) == 1
        # The page names every family that there is.
        prose = (DOCS / "workers.md").read_text()
        suffixes = [line.split()[2].removeprefix("fdpass_worker") for line in text.splitlines() if line.startswith("# TYPE fdpass_worker")]
        assert [suffix for suffix in suffixes if suffix not in prose] == []


def test_the_first_failure_ends_all(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(FAILS)
    done = subprocess.run([sys.executable, program.name], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("3\n", "")
