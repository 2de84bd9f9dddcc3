"""CPython's own tests of connections, pickled connections, listeners, queues and shared ctypes, with register() in every process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("test._test_multiprocessing", reason="this interpreter came without its test package")

PROGRAM = Path(__file__).parent / "cpython_suite.py"

#: Imported by every interpreter at its start, the fork server's too. A claim leaves a line: a run without one used none of ours.
SITE = """
import os
import fdpass
from fdpass import _store
fdpass.register()
def claim(address, ticket, claim=_store.claim):
    owned = claim(address, ticket)
    with open(os.environ["FDPASS_TEST_CLAIMS"], "a") as file:
        print(os.getpid(), file=file)
    return owned
_store.claim = claim
with open(os.environ["FDPASS_TEST_CLAIMS"] + ".started", "a") as file:
    print(os.getpid(), file=file)
"""


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_cpythons_own_tests_pass(method, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SITE)
    claims = tmp_path / "claims"
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    names = [word for name in ("Connection", "Pickl", "Listener", "Queue", "Sharedctypes") for word in ("-k", name)]
    # CPython's tests watch what pytest keeps open: none of it is theirs.
    done = subprocess.run(
        [sys.executable, str(PROGRAM), method, *names],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "FDPASS_TEST_CLAIMS": str(claims)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Ran " in done.stderr
    # Connections over connections, sockets over connections, and the memory behind shared ctypes: in this process and in others.
    claimants = claims.read_text().split()
    assert len(claimants) >= 4
    assert len(set(claimants)) >= 2
    assert len(set((tmp_path / "claims.started").read_text().split())) > 2
