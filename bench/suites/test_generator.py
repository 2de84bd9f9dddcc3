"""What a connection costs the load generator in processor time, beside wrk: the same server, the same concurrency, one request each.

Run with: pytest bench/suites/test_generator.py   (needs wrk: apt install wrk)
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("the load generator needs Linux", allow_module_level=True)

from fdpass_bench.loadgen import Generator, Load, NullServer

ROUNDS = 7
#: wrk counts whole seconds only.
SECONDS = 1


@pytest.fixture(scope="module")
def wrk() -> str:
    found = shutil.which("wrk")
    if found is None:
        pytest.skip("no wrk to compare with: apt install wrk")
    return found


@pytest.fixture(scope="module")
def server() -> Iterator[NullServer]:
    with NullServer() as running:
        yield running


def by_wrk(wrk: str, server: NullServer, clients: int, log: Path) -> tuple[int, float]:
    """Connections, and the processor seconds of wrk's whole process, which has one thread of load and the main one."""
    url = "http://{}:{}/".format(*server.address)
    command = [wrk, "-t1", f"-c{clients}", f"-d{SECONDS}s", "-H", "Connection: close", "-H", "Fdpass-Service: 0", url]
    with open(log, "wb") as output:
        pid = os.posix_spawn(wrk, command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, output.fileno(), 1)])
        _, status, usage = os.wait4(pid, 0)
    text = log.read_text()
    assert status == 0, text
    assert "errors" not in text, text
    found = re.search(r"(\d+) requests in", text)
    assert found is not None, text
    return int(found[1]), usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("clients", [16, 128])
@pytest.mark.parametrize("sources", [True, False], ids=["rotated-sources", "one-source"])
def test_connections_per_processor_second(
    benchmark: Any, ratios: Any, wrk: str, server: NullServer, clients: int, sources: bool, tmp_path: Path
) -> None:
    ours: list[float] = []
    theirs: list[float] = []
    with Generator() as generator:
        connections = by_wrk(wrk, server, clients, tmp_path / "wrk")[0]
        load = Load(*server.address, connections, None, clients=clients, sources=sources)

        def one() -> None:
            result = generator.run(load)
            assert set(result.outcome) == {0}
            ours.append(result.cpu_seconds / connections)
            # Each round beside one of wrk's: whatever else runs here hits both.
            made, used = by_wrk(wrk, server, clients, tmp_path / "wrk")
            theirs.append(used / made)

        one()  # pages, ports and caches that the first run pays for
        ours.clear()
        theirs.clear()
        benchmark.pedantic(one, rounds=ROUNDS)
    name = f"{'rotated' if sources else 'one'} source, {clients} clients"
    ratios.add(f"a connection, {name}", "wrk", 1.0, ours, theirs)
    benchmark.extra_info["connections per processor second"] = round(1 / statistics.median(ours))
    benchmark.extra_info["wrk's connections per processor second"] = round(1 / statistics.median(theirs))
    benchmark.extra_info["ratio"] = round(statistics.median(theirs) / statistics.median(ours), 3)
