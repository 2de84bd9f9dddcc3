"""The page for Prometheus, read by a strict parser, served by a small server, true over restarts and rolls."""

from __future__ import annotations

import os
import signal
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_fd_to_metric_families, text_string_to_metric_families

import fdpass
from fdpass.exposition import CONTENT_TYPE

sys.path.insert(0, str(Path(__file__).parent))
import roll_targets as targets
from test_rolling import ask, group, until


def read(page: str) -> dict[tuple[str, str], float]:
    """What a strict reader finds: (name, index) to value. It checks the shape of the page on the way."""
    assert page.endswith("\n")
    lines = page.splitlines()
    helped = [line.split()[2] for line in lines if line.startswith("# HELP ")]
    typed = {line.split()[2]: line.split()[3] for line in lines if line.startswith("# TYPE ")}
    assert helped == list(typed)  # each once
    assert len(set(helped)) == len(helped)
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(page):
        assert family.documentation
        for sample in family.samples:
            assert sample.name in typed
            assert (typed[sample.name] == "counter") == sample.name.endswith("_total")
            key = sample.name, sample.labels.get("state", "") + sample.labels.get("index", "")
            assert key not in found
            found[key] = sample.value
    return found


def test_what_the_page_says() -> None:
    with group(targets.serve, 2, backlog=77) as running:
        for _ in range(6):
            ask(running.endpoint)
        until(lambda: sum(one.open for one in running.stats()) == 0)
        # A worker is ready right before it first waits.
        until(lambda: all(one.heartbeat is not None for one in running.stats()))
        found = read(fdpass.metrics(running))
        assert found["fdpass_worker_accepted_total", "0"] + found["fdpass_worker_accepted_total", "1"] == 6
        for index in "01":
            assert found["fdpass_worker_up", index] == found["fdpass_worker_state", f"ready{index}"] == 1
            assert found["fdpass_worker_state", f"ended{index}"] == found["fdpass_worker_restarts_total", index] == 0
            assert found["fdpass_worker_open_connections", index] == found["fdpass_worker_queue", index] == 0
            assert found["fdpass_worker_queue_limit", index] == 77
            assert 0 <= found["fdpass_worker_heartbeat_age_seconds", index] < 120
    found = read(fdpass.metrics(running))
    assert found["fdpass_worker_up", "0"] == 0
    assert found["fdpass_worker_state", "ended0"] == 1
    assert ("fdpass_worker_queue", "0") not in found
    assert found["fdpass_worker_accepted_total", "0"] + found["fdpass_worker_accepted_total", "1"] == 6


@pytest.mark.parametrize("strategy", ["shared", "reuseport", "reuseport-bare"])
def test_counters_go_up_over_restarts_and_rolls(strategy: str) -> None:
    with group(targets.serve, 2, strategy=strategy, restart="on-failure", start_method="forkserver") as running:
        for expected in (1, 2):
            ask(running.endpoint)
            os.kill(running.stats()[0].pid, signal.SIGKILL)
            until(lambda expected=expected: running.stats()[0].restarts == expected and running.stats()[0].state == "ready")
            running.roll()
            found = read(fdpass.metrics(running))
            assert found["fdpass_worker_accepted_total", "0"] + found["fdpass_worker_accepted_total", "1"] == expected
            assert found["fdpass_worker_restarts_total", "0"] == expected


def test_the_queue_of_a_worker_that_does_not_accept() -> None:
    import socket

    with group(targets.serve, 1, strategy="reuseport", backlog=50) as running:
        clients = [socket.create_connection(running.endpoint.address) for _ in range(5)]
        until(lambda: running.stats()[0].open == 1)
        # One is served and says nothing; the others wait.
        assert (running.stats()[0].queue, running.stats()[0].queue_limit) == (4, 50)
        assert read(fdpass.metrics(running))["fdpass_worker_queue", "0"] == 4
        for client in clients:
            client.close()


def test_nobody_tells_the_queue_of_a_unix_socket_and_of_sockets_that_others_hold(tmp_path: Path) -> None:
    for options in ({"address": f"unix:{tmp_path}/s"}, {"strategy": "reuseport-bare"}):
        with group(targets.serve, 1, **options) as running:
            assert (running.stats()[0].queue, running.stats()[0].queue_limit) == (None, None)
            assert ("fdpass_worker_queue", "0") not in read(fdpass.metrics(running))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("strategy", ["shared", "dispatch"])
def test_a_forked_child_has_no_workers(strategy: str) -> None:
    with group(targets.serve, 2, strategy=strategy) as running:
        ask(running.endpoint)
        pid = os.fork()
        if pid == 0:
            found = read(fdpass.metrics(running))
            os._exit(int(sum(value for (name, _), value in found.items() if name in ("fdpass_worker_up", "fdpass_worker_accepted_total"))))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert "fdpass_worker_up" in fdpass.metrics(running)


def test_strange_names_and_several_groups(tmp_path: Path) -> None:
    name = 'a "quoted"\\back\nline é'
    odd = group(targets.serve, 1, f"unix:{tmp_path}/s", name=name)
    plain = group(targets.serve, 1, name="plain")
    try:
        page = fdpass.metrics(odd, plain)
        families = list(text_string_to_metric_families(page))
        assert {sample.labels["group"] for family in families for sample in family.samples} == {name, "plain"}
        assert {family.name for family in families} >= {"fdpass_group_info", "fdpass_worker_up"}
        with pytest.raises(ValueError, match="different names"):
            fdpass.metrics(plain, plain)
    finally:
        odd.stop()
        plain.stop()


@pytest.fixture
def served() -> Iterator[tuple[fdpass.WorkerGroup, str]]:
    """A group, and the address of the page that docs/workers.md shows how to serve."""
    with group(targets.serve, 1) as running:

        class Page(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = fdpass.metrics(running).encode()
                self.send_response(200)
                self.send_header("Content-Type", CONTENT_TYPE)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        with HTTPServer(("127.0.0.1", 0), Page) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            yield running, f"http://127.0.0.1:{server.server_port}/metrics"
            server.shutdown()
            thread.join()


def test_served_by_the_standard_library(served: tuple[fdpass.WorkerGroup, str]) -> None:
    running, address = served
    ask(running.endpoint)
    with urllib.request.urlopen(address, timeout=30) as page:
        assert page.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        lines = page.read().decode().splitlines(keepends=True)
    found = {sample.name: sample.value for family in text_fd_to_metric_families(iter(lines)) for sample in family.samples}
    assert found["fdpass_worker_accepted_total"] == 1
