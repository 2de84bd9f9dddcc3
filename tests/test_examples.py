"""The examples run as they are printed, driven by a real HTTP client."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parent.parent
if not (ROOT / "examples").exists():
    pytest.skip("the examples are not beside the tests", allow_module_level=True)


def test_uvicorn_workers() -> None:
    command = [sys.executable, str(ROOT / "examples" / "uvicorn_workers.py"), "127.0.0.1:0", "3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.match(r"serving on (http://127\.0\.0\.1:\d+),", process.stdout.readline())
            assert found is not None
            pids = set()
            for _ in range(40):
                answer = httpx.get(found[1], timeout=30)
                assert answer.status_code == 200
                index, pid = answer.text.split()
                assert index in "012"
                pids.add(pid)
            assert 1 <= len(pids) <= 3
        finally:
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in err
