"""The examples run as they are printed, driven by a real HTTP client and from programs of their own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parent.parent
if not (ROOT / "examples").exists():
    pytest.skip("the examples are not beside the tests", allow_module_level=True)


@contextlib.contextmanager
def example(name: str, *arguments: str, says: str) -> Iterator[re.Match[str]]:
    """A running example and what its first line matched; Ctrl-C ends it without a traceback."""
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.match(says, process.stdout.readline())
            assert found is not None
            yield found
        finally:
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in err


def test_uvicorn_workers() -> None:
    with example("uvicorn_workers.py", "127.0.0.1:0", "3", says=r"serving on (http://127\.0\.0\.1:\d+),") as found:
        pids = set()
        with httpx.Client(timeout=30, headers={"connection": "close"}) as client:
            for _ in range(40):
                answer = client.get(found[1])
                assert answer.status_code == 200
                index, pid = answer.text.split()
                assert index in "012"
                pids.add(pid)
        assert 1 <= len(pids) <= 3


def test_handover() -> None:
    handover = example("handover.py", "127.0.0.1:0", "3", says=r"serving on (http://127\.0\.0\.1:\d+),")
    with handover as found, contextlib.ExitStack() as clients:
        pids = []
        # Each client keeps its connection, so the next one goes to a worker that has fewer.
        for number in range(6):
            client = clients.enter_context(httpx.Client(base_url=found[1], timeout=30))
            for _ in range(2):
                words = re.fullmatch(rf"worker (\d+) got /{number}\n", client.get(f"/{number}").text)
                assert words is not None
            pids.append(words[1])
        assert len(set(pids[:3])) == 3
        assert sorted(pids[:3]) == sorted(pids[3:])


def test_handover_goes_on_without_a_worker_that_died() -> None:
    with example("handover.py", "127.0.0.1:0", "2", says=r"serving on (http://127\.0\.0\.1:\d+),") as found:
        first = int(httpx.get(found[1], timeout=30).text.split()[1])
        os.kill(first, signal.SIGKILL)
        others = set()
        while not others:
            # What was handed to the dead one before the parent knew is lost.
            with contextlib.suppress(httpx.TransportError):
                others.add(int(httpx.get(found[1], timeout=30).text.split()[1]))
        assert first not in others


BROKER = str(ROOT / "examples" / "asyncio_broker.py")


def broker(*arguments: str) -> tuple[int, str, str]:
    """Exit status, output and errors of one program that talks to the broker."""
    done = subprocess.run([sys.executable, BROKER, *arguments], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_asyncio_broker(tmp_path: Path) -> None:
    path = str(tmp_path / "broker")
    with example("asyncio_broker.py", "serve", path, says="listening on (.*)\n") as found:
        assert found[1] == path
        for words in ("first\n", "second\n"):
            (tmp_path / "file").write_text(words)
            assert broker("put", path, "name", str(tmp_path / "file")) == (0, "ok\n", "")
            (tmp_path / "file").unlink()
            # Twice: what is registered stays.
            for _ in range(2):
                assert broker("get", path, "name") == (0, words, "")
        assert broker("get", path, "other") == (1, "", "there is no other\n")
    assert not os.path.exists(path)
    assert broker("get", path, "name") == (1, "", f"cannot open a channel to {path}: there is no such file; has the server started?\n")


def test_asyncio_broker_shows_itself() -> None:
    status, out, err = broker()
    assert (status, err) == (0, "")
    assert out.endswith("hello from a file that has no name any more\n")
    assert broker("nonsense")[0] == 1
