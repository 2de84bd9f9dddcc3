"""A worker does not outlive its supervisor, whatever it is doing and whoever else holds a copy of the supervisor's descriptors."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SUPERVISOR = """
import os, signal, sys
sys.path.insert(0, {here!r})
import fdpass, group_targets
if __name__ == "__main__":
    group = fdpass.WorkerGroup(group_targets.mixed, "127.0.0.1:0", workers=4, start_method={method!r})
    group.start()
    # An unrelated sibling, forked behind Python's back, so that it keeps every descriptor of the supervisor.
    import ctypes
    sibling = ctypes.CDLL(None).fork()
    if sibling == 0:
        while True:
            signal.pause()
    print(sibling, *[one.pid for one in group.stats()], flush=True)
    group.wait()
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_go_when_the_supervisor_is_killed(method: str, tmp_path: Path) -> None:
    """One computes, one sits in a C call that holds the GIL, one has closed the very watch, one accepts; a forked sibling lives on."""
    script = tmp_path / "supervisor.py"
    script.write_text(SUPERVISOR.format(here=str(Path(__file__).parent), method=method))
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        sibling, *workers = map(int, supervisor.stdout.readline().split())
        pidfds = [os.pidfd_open(pid) for pid in workers]
        try:
            supervisor.kill()
            supervisor.wait()
            poll = select.poll()
            for fd in pidfds:
                poll.register(fd, select.POLLIN)
            gone: set[int] = set()
            while len(gone) < len(pidfds):
                # The bound is the promise itself (2 s, with room for a loaded machine), not a measurement.
                ended = [fd for fd, _ in poll.poll(10_000)]
                assert ended, f"{[pid for pid, fd in zip(workers, pidfds, strict=True) if fd not in gone]} outlived the supervisor"
                for fd in ended:
                    poll.unregister(fd)
                gone.update(ended)
            os.kill(sibling, 0)  # it was there all the time
        finally:
            os.kill(sibling, signal.SIGKILL)
            for fd in pidfds:
                os.close(fd)
