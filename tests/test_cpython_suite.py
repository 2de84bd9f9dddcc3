"""CPython's own tests of connections, pickled connections, listeners, queues and shared ctypes, with register() in every process."""

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("test._test_multiprocessing", reason="this interpreter came without its test package")

PROGRAM = Path(__file__).parent / "cpython_suite.py"

#: Imported by every interpreter at its start, the fork server's too. Each process says whether it is registered, and which reducers are
#: used: a run without ours, or with the standard library's, is no run.
SITE = """
import os
import fdpass
from fdpass import _carriers, _claims, reduction
from multiprocessing import process, resource_sharer
fdpass.register()
def note(fact):
    with open(os.environ["FDPASS_TEST_FACTS"], "a") as file:
        print(fact, os.getpid(), file=file)
def carry(*args, before=_carriers.carry):
    token = before(*args)
    note(token[0])
    return token
def claim(*args, before=_claims.claim):
    owned = before(*args)
    note("claim")
    return owned
def theirs(*args, before=resource_sharer.DupFd):
    note("theirs")
    return before(*args)
def bootstrap(self, *args, before=process.BaseProcess._bootstrap, **options):
    note("registered" if reduction._is_registered() else "not registered")
    try:
        return before(self, *args, **options)
    finally:
        note("still" if reduction._is_registered() else "not any more")
_carriers.carry, _claims.claim, resource_sharer.DupFd, process.BaseProcess._bootstrap = carry, claim, theirs, bootstrap
note("interpreter")
"""


@pytest.mark.long
@pytest.mark.alone
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_cpythons_own_tests_pass(method, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SITE)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    names = [word for name in ("Connection", "Pickl", "Listener", "Queue", "Sharedctypes") for word in ("-k", name)]
    # CPython's tests watch what pytest keeps open: none of it is theirs.
    done = subprocess.run(
        [sys.executable, str(PROGRAM), method, *names],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "FDPASS_TEST_FACTS": str(tmp_path / "facts")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pids = defaultdict(list)
    for line in (tmp_path / "facts").read_text().splitlines():
        fact, _, pid = line.rpartition(" ")
        pids[fact].append(pid)
    ran = int(re.search(r"Ran (\d+) tests", done.stderr)[1])
    assert ran > 50, done.stderr
    # No process without it, from its first moment to its last; under forkserver the interpreters are this one's and the server's.
    assert not {"not registered", "not any more", "theirs"} & pids.keys(), dict(pids)
    assert len(pids["registered"]) > 20
    assert set(pids["registered"]) <= set(pids["interpreter"]) if method == "spawn" else len(set(pids["interpreter"])) >= 2
    # Arguments of processes by our reducers; connections, sockets and shared memory by tickets, claimed here and in others.
    assert len(pids["number" if method == "spawn" else "index"]) > 20
    assert len(pids["ticket"]) >= len(pids["claim"]) >= 4
    assert len(set(pids["claim"])) >= 2
