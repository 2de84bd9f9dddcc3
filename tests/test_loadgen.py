"""The load generator, the server that does nothing and the histogram: real servers, real ends, every outcome."""

from __future__ import annotations

import contextlib
import errno
import http.client
import math
import os
import re
import resource
import select
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fdpass

if sys.platform != "linux":
    pytest.skip("the load generator needs Linux", allow_module_level=True)

from fdpass_bench import sockdiag
from fdpass_bench._loadgen import ffi, lib
from fdpass_bench.loadgen import OUTCOMES, Generator, Histogram, Load, NullServer, Result

NATIVE = Path(__file__).parents[1] / "_native" / "bench"
#: Longer than anything here takes: no test waits for it.
LONG = 60.0


# -------------------------------------------------------------------------------- servers of ours


class Server:
    """A listening socket and a thread that gives each of its connections to `handle`; what it raises is raised by the test."""

    def __init__(self, handle: Callable[[socket.socket], None], threads: bool, family: socket.AddressFamily, host: str) -> None:
        self.handle, self.threads = handle, threads
        self.listener = socket.create_server((host, 0), family=family, backlog=1024)
        self.host, self.port = self.listener.getsockname()[:2]
        self.peers: list[str] = []
        self.errors: list[BaseException] = []
        self.running: list[threading.Thread] = []
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        while True:
            try:
                conn, peer = self.listener.accept()
            except OSError:
                return
            self.peers.append(peer[0])
            if self.threads:
                self.running.append(threading.Thread(target=self.one, args=(conn,)))
                self.running[-1].start()
            else:
                self.one(conn)

    def one(self, conn: socket.socket) -> None:
        with conn:
            try:
                self.handle(conn)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the generator is free to go
            except BaseException as error:
                self.errors.append(error)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        for thread in self.running:
            thread.join()
        self.listener.close()


@contextlib.contextmanager
def serving(
    handle: Callable[[socket.socket], None], threads: bool = False, family: socket.AddressFamily = socket.AF_INET, host: str = "127.0.0.1"
) -> Iterator[Server]:
    server = Server(handle, threads, family, host)
    try:
        yield server
    finally:
        server.close()
    assert server.errors == []


def read_head(conn: socket.socket) -> bytes:
    """One request; b"" at the end of file."""
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        byte = conn.recv(1)
        if not byte:
            assert not data
            return b""
        data += byte
    return data


def field(head: bytes, name: bytes) -> bytes:
    found = re.search(rb"\r\n" + name + rb": ([^\r]*)\r\n", head)
    assert found is not None
    return found[1]


def answering(answer: bytes) -> Callable[[socket.socket], None]:
    """Reads one request, sends these bytes and closes."""

    def handle(conn: socket.socket) -> None:
        assert read_head(conn)
        conn.sendall(answer)

    return handle


def whole(body: bytes = b"fdpass 3 11 22 33\n", more: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n%s" % (more, len(body), body)


def reset(conn: socket.socket) -> None:
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    conn.close()


@pytest.fixture(scope="module")
def generator() -> Iterator[Generator]:
    with Generator() as running:
        yield running


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A listening socket whose connections nobody accepts."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        yield listener


def outcomes(result: Result) -> Counter[str]:
    return Counter("under way" if code < 0 else OUTCOMES[code] for code in result.outcome)


def load(server: Any, connections: int = 4, rate: float | None = 1000.0, **more: Any) -> Load:
    host, port = (server.host, server.port) if isinstance(server, Server) else server.getsockname()
    return Load(host, port, connections, rate, **{"timeout": LONG, **more})


def queue_of(listener: socket.socket) -> int:
    """Connections that wait to be accepted; 0 once it is closed."""
    if listener.fileno() < 0:
        return 0
    return sum(found.queue for found in sockdiag.listening_sockets(listener.getsockname()[1]))


# -------------------------------------------------------------------------------- what a run tells


def test_each_request_is_told_of(generator: Generator) -> None:
    def handle(conn: socket.socket) -> None:
        head = read_head(conn)
        assert head.startswith(b"GET /some/path?x=1 HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % server.port)
        assert field(head, b"Connection") == b"close"
        conn.sendall(whole(b"fdpass 7 %s -5 9223372036854775807\n" % field(head, b"Fdpass-Service")))

    with serving(handle) as server:
        result = generator.run(load(server, 50, service=0.004, path="/some/path?x=1"))
    assert outcomes(result) == {"ok": 50}
    assert set(result.worker) == {7}
    assert result.accepted.tolist() == result.drawn.tolist()
    assert set(result.started) == {-5}
    assert set(result.free) == {(1 << 63) - 1}
    for scheduled, begun, connected, answered in zip(result.scheduled, result.begun, result.connected, result.answered, strict=True):
        assert result.began <= scheduled <= begun <= connected <= answered <= result.ended
    assert result.scheduled.tolist() == sorted(result.scheduled)
    assert result.cpu_seconds > 0
    assert result.scheduled.format == "q"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"3\n", b"fdpass\n", b"fdpass 3 1 2\n", b"fdpass 3 1 2 3", b"fdpass 3 1 2 3 4\n", b"fdpass  3 1 2 3\n", b"fdpass x 1 2 3\n",
        b"fdpass - 1 2 3\n", b"fdpass 3 1 2 %d\n" % 2**63, b"fdpass 3 1 2 " + b"0" * 200 + b"\n",
    ],
)  # fmt: skip
def test_a_body_of_another_form_is_fine(generator: Generator, body: bytes) -> None:
    with serving(answering(whole(body))) as server:
        result = generator.run(load(server, 1))
    assert outcomes(result) == {"ok": 1}
    assert (result.worker[0], result.accepted[0], result.started[0], result.free[0]) == (-1, 0, 0, 0)


def test_ended_is_told_in_the_end(generator: Generator) -> None:
    counts: list[int] = []
    with serving(answering(whole())) as server:
        generator.run(load(server, 20), counts.append)
    assert counts == sorted(counts)
    assert counts[-1] == 20


def test_ipv6(generator: Generator) -> None:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError as error:
        pytest.skip(f"no IPv6 loopback: {error}")

    def handle(conn: socket.socket) -> None:
        assert field(read_head(conn), b"Host") == b"[::1]:%d" % server.port
        conn.sendall(whole())

    with serving(handle, family=socket.AF_INET6, host="::1") as server:
        assert outcomes(generator.run(load(server))) == {"ok": 4}


def test_the_source_address_is_rotated_on_loopback(generator: Generator) -> None:
    with serving(answering(whole())) as server:
        generator.run(load(server, 20))
        assert len(set(server.peers)) == 20
        server.peers.clear()
        generator.run(load(server, 20, sources=False))
        assert set(server.peers) == {"127.0.0.1"}


# -------------------------------------------------------------------------------- outcomes


def test_refused(generator: Generator) -> None:
    with socket.socket() as bound:  # it has the port and does not listen
        bound.bind(("127.0.0.1", 0))
        result = generator.run(load(bound))
    assert outcomes(result) == {"refused": 4}
    assert all(result.answered)
    assert set(result.connected) == {0}


def test_reset_before_accept(generator: Generator) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        target = load(listener, 10, arrivals="burst")

        def close_with_a_queue(count: int) -> None:
            if queue_of(listener) == 10:
                listener.close()

        result = generator.run(target, close_with_a_queue)
    assert outcomes(result) == {"reset_before_accept": 10}
    assert all(result.connected)


def _half_then_end(conn: socket.socket) -> None:
    read_head(conn)
    conn.sendall(whole()[:-3])


def _nothing(conn: socket.socket) -> None:
    read_head(conn)


def _half_then_reset(conn: socket.socket) -> None:
    read_head(conn)
    conn.sendall(whole()[:20])
    reset(conn)


@pytest.mark.parametrize("handle", [_half_then_end, _nothing, _half_then_reset])
def test_reset_after_accept(generator: Generator, handle: Callable[[socket.socket], None]) -> None:
    with serving(handle) as server:
        assert outcomes(generator.run(load(server))) == {"reset_after_accept": 4}


def test_timeout_counts_from_the_schedule(generator: Generator, silent: socket.socket) -> None:
    result = generator.run(load(silent, 5, timeout=0.05))
    assert outcomes(result) == {"timeout": 5}
    assert all(answered - scheduled >= 50_000_000 for answered, scheduled in zip(result.answered, result.scheduled, strict=True))


BAD = {
    "not HTTP": b"220 mail.example.org ESMTP\r\n\r\n",
    "one byte after the other": b"\0" * 200,
    "another version": b"HTTP/2.0 200 OK\r\n\r\n",
    "a status of two digits": b"HTTP/1.1 20 OK\r\n\r\n",
    "a protocol nobody asked for": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
    "500": b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n",
    "404 without a length": b"HTTP/1.1 404 Not Found\r\n\r\nnothing here",
    "no colon": b"HTTP/1.1 200 OK\r\nnonsense\r\n\r\n",
    "blank before the colon": b"HTTP/1.1 200 OK\r\nContent-Length : 0\r\n\r\n",
    "folded": b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n",
    "length with letters": b"HTTP/1.1 200 OK\r\nContent-Length: 1x\r\n\r\nx",
    "length below zero": b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nx",
    "length too long": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\nx",
    "no length": b"HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\nx",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
    "endless head": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 12000,
    "endless line": b"HTTP/1.1 200 OK\r\nA: " + b"x" * 70000,
    "long length line": b"HTTP/1.1 200 OK\r\nContent-Length: " + b" " * 300 + b"1\r\n\r\nx",
    "chunk size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
    "chunk size with a tail": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5 5\r\nhello\r\n0\r\n\r\n",
    "chunk size too long": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1000000000000000\r\n",
    "chunk without an end": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhelloX\r\n0\r\n\r\n",
}

BODY = b"fdpass 3 11 22 33\n"
GOOD = {
    "content length": whole(),
    "names in capitals, blanks around values": b"HTTP/1.1 200 OK\r\nCONTENT-LENGTH: \t18 \t\r\n\r\n" + BODY,
    "the same length twice": b"HTTP/1.1 200 OK\r\nContent-Length: 18\r\nContent-Length: 18\r\n\r\n" + BODY,
    "line feeds alone": b"HTTP/1.1 200 OK\nContent-Length: 18\n\n" + BODY,
    "no reason": b"HTTP/1.1 200\r\nContent-Length: 18\r\n\r\n" + BODY,
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\nContent-Length: 18\r\n\r\n" + BODY,
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7\r\nfdpass \r\nB;name=\"x\"\r\n3 11 22 33\n\r\n000\r\n\r\n",
    "trailers": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n12 \r\n" + BODY + b"\r\n0\r\nA: b\r\nC: d\r\n\r\n",
    "chunked last": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: gzip, chunked\r\n\r\n12\r\n" + BODY + b"\r\n0\r\n\r\n",
    "until the end": b"HTTP/1.1 200 OK\r\n\r\n" + BODY,
    "another coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n" + BODY,
    "interim answers": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\nContent-Length: 7\r\n\r\n" + whole(),
    "a long header": whole(more=b"Set-Cookie: " + b"x" * 5000 + b"\r\n"),
    "many chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n12\r\n" + BODY + b"\r\n" + b"1\r\nx\r\n" * 20000 + b"0\r\n\r\n",
    "redirection": b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 18\r\n\r\n" + BODY,
}  # fmt: skip
UNTIL_END = {"until the end", "another coding"}
WITHOUT_BODY = {
    "204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "304": b"HTTP/1.1 304 Not Modified\r\nContent-Length: 18\r\n\r\n",
    "length 0": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "an empty chunked body": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_answer(generator: Generator, name: str) -> None:
    with serving(answering(BAD[name])) as server:
        assert outcomes(generator.run(load(server, 2))) == {"bad_answer": 2}


@pytest.mark.parametrize("name", GOOD)
def test_good_answer(generator: Generator, name: str) -> None:
    with serving(answering(GOOD[name])) as server:
        result = generator.run(load(server, 2))
    assert outcomes(result) == {"ok": 2}
    assert list(zip(result.worker, result.accepted, result.started, result.free, strict=True)) == [(3, 11, 22, 33)] * 2


def test_an_answer_a_byte_at_a_time(generator: Generator) -> None:
    def handle(conn: socket.socket) -> None:
        conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        read_head(conn)
        for byte in GOOD["chunked"]:
            conn.sendall(bytes([byte]))

    with serving(handle) as server:
        result = generator.run(load(server, 3))
    assert outcomes(result) == {"ok": 3}
    assert set(result.worker) == {3}


def test_a_large_answer(generator: Generator) -> None:
    with serving(answering(whole(BODY + b"x" * (5 << 20)))) as server:
        result = generator.run(load(server, 2))
    assert outcomes(result) == {"ok": 2}
    assert set(result.worker) == {3}


def open_in(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@contextlib.contextmanager
def room_for(generator: Generator, free: int) -> Iterator[None]:
    """In the generator's table of descriptors there is room for so many more."""
    taken = {int(name) for name in os.listdir(f"/proc/{generator.pid}/fd")}
    limit = [number for number in range(10000) if number not in taken][free]
    before = resource.prlimit(generator.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(generator.pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(generator.pid, resource.RLIMIT_NOFILE, before)


#: What a run itself holds: the columns' file, the duplicate in its mapping, the epoll set, the timer.
OWN = 4


def test_no_descriptor(generator: Generator, silent: socket.socket) -> None:
    with NullServer() as server:
        generator.run(Load(*server.address, 10, 1000.0))  # it has begun
        with room_for(generator, OWN + 5):

            def let_go(count: int) -> None:
                if count == 15 and queue_of(silent) == 5:
                    silent.close()

            result = generator.run(load(silent, 20, arrivals="burst"), let_go)
            assert outcomes(result) == {"reset_before_accept": 5, "no_descriptor": 15}
            # Closed ones make room for others.
            assert outcomes(generator.run(Load(*server.address, 100, None, clients=5))) == {"ok": 100}
        assert outcomes(generator.run(Load(*server.address, 10, 1000.0))) == {"ok": 10}


@pytest.mark.parametrize("free", range(OWN))
def test_a_run_that_cannot_be(generator: Generator, silent: socket.socket, free: int) -> None:
    before = open_in(generator.pid)
    with room_for(generator, free), pytest.raises(OSError, match="making connections to") as caught:
        generator.run(load(silent))
    assert caught.value.errno == errno.EMFILE
    assert open_in(generator.pid) == before


FEW_PORTS = """
import fcntl, socket, struct
from collections import Counter
from fdpass_bench import sockdiag
from fdpass_bench.loadgen import OUTCOMES, Generator, Load

def run(generator, sources, queued):
    with socket.create_server(("127.0.0.1", 50000), backlog=64) as silent:
        def let_go(count):
            if silent.fileno() >= 0 and count == 20 - queued == 20 - sockdiag.listening_sockets(50000)[0].queue:
                silent.close()
        result = generator.run(Load("127.0.0.1", 50000, 20, None, arrivals="burst", timeout=60.0, sources=sources), let_go)
    print(dict(Counter(OUTCOMES[code] for code in result.outcome)))

if __name__ == "__main__":
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sH14x", b"lo", 0x1 | 0x40))  # SIOCSIFFLAGS: up and running
    with open("/proc/sys/net/ipv4/ip_local_port_range", "w") as ports:
        ports.write("40000 40005")  # of an odd number the kernel may not try the last
    with Generator() as generator:
        run(generator, False, 6)
        run(generator, True, 20)
"""


def test_no_port(tmp_path: Path) -> None:
    """In a network of its own, where there are six ports to connect from; with rotated sources each connection has all six."""
    (tmp_path / "few_ports.py").write_text(FEW_PORTS)
    alone = ["unshare", "--user", "--map-root-user", "--net"]
    try:
        subprocess.run([*alone, "true"], check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespace of our own here: {error}")
    done = subprocess.run([*alone, sys.executable, "-P", tmp_path / "few_ports.py"], capture_output=True, text=True, check=False)
    if "Permission denied" in done.stderr or "Read-only" in done.stderr:
        pytest.skip(f"no settings of our own here: {done.stderr.splitlines()[-1]}")
    assert (done.stdout, done.stderr) == ("{'reset_before_accept': 6, 'no_port': 14}\n{'reset_before_accept': 20}\n", "")


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        ("ECONNREFUSED", "refused"), ("EHOSTUNREACH", "refused"), ("ENETUNREACH", "refused"), ("EPERM", "refused"),
        ("ECONNRESET", "reset_before_accept"), ("EPIPE", "reset_before_accept"), ("ETIMEDOUT", "timeout"),
        ("EADDRNOTAVAIL", "no_port"), ("EADDRINUSE", "no_port"), ("EMFILE", "no_descriptor"), ("ENFILE", "no_descriptor"),
    ],
)  # fmt: skip
def test_what_an_errno_says(error: str, outcome: str) -> None:
    assert OUTCOMES[lib.flg_outcome_of(getattr(errno, error))] == outcome


def test_an_errno_that_says_nothing_of_one_connection() -> None:
    assert lib.flg_outcome_of(errno.EAFNOSUPPORT) == -errno.EAFNOSUPPORT


# -------------------------------------------------------------------------------- when connections come


def test_a_server_that_does_not_answer_delays_no_arrival(generator: Generator) -> None:
    waiting: list[socket.socket] = []

    def handle(conn: socket.socket) -> None:
        # Nobody is answered before all are here: a generator that waited for an answer would never get so far.
        read_head(conn)
        waiting.append(conn.dup())
        if len(waiting) == 200:
            for one in waiting:
                with one:
                    one.sendall(whole())

    with serving(handle) as server:
        result = generator.run(load(server, 200, 2000.0))
    assert outcomes(result) == {"ok": 200}
    assert max(result.begun) < min(result.answered)


def test_a_burst(generator: Generator) -> None:
    with NullServer() as server:
        result = generator.run(Load(*server.address, 3000, None, arrivals="burst"))
    assert outcomes(result) == {"ok": 3000}
    assert set(result.scheduled) == {result.began}


def test_answers_are_read_while_arrivals_are_late(generator: Generator) -> None:
    with NullServer() as server:
        result = generator.run(Load(*server.address, 5000, 1e9))
    assert outcomes(result) == {"ok": 5000}
    # The last arrival was due within microseconds: all were late, and the first answers were not left for later.
    assert min(result.answered) < max(result.begun)


@pytest.mark.parametrize("clients", [1, 3, 500])
def test_a_closed_loop_never_exceeds_its_clients(generator: Generator, clients: int) -> None:
    with NullServer() as server:
        result = generator.run(Load(*server.address, 300, None, clients=clients))
    assert outcomes(result) == {"ok": 300}
    # At the same instant an end comes first: it is what lets the next begin.
    steps = sorted([(at, 1) for at in result.begun] + [(at, -1) for at in result.answered])
    under_way = most = 0
    for _, step in steps:
        under_way += step
        most = max(most, under_way)
    assert most <= clients
    starts = sorted(result.scheduled)
    assert starts[:clients] == [result.began] * min(clients, 300)
    assert set(starts[clients:]) <= set(result.answered)


def scheduled(seed: int = 1, connections: int = 20000, rate: float | None = 1000.0, **more: Any) -> tuple[list[int], list[int]]:
    """The columns scheduled (nanoseconds from the start) and drawn of a load, without a run."""
    wanted, _kept = Load("127.0.0.1", 1, connections, rate, seed=seed, **more)._in_c()
    total = connections * more.get("requests", 1)
    at, drawn = ffi.new("int64_t[]", total), ffi.new("int64_t[]", total)
    lib.flg_schedule(wanted, at, drawn)
    return ffi.unpack(at, total), ffi.unpack(drawn, total)


def gaps(at: list[int]) -> list[int]:
    return [later - earlier for earlier, later in zip([0, *at], at, strict=False)]


def test_a_seed_is_a_schedule(generator: Generator) -> None:
    with NullServer() as server:
        first, second, other = (generator.run(Load(*server.address, 100, 5000.0, service=0.001, seed=seed)) for seed in (5, 5, 6))
    for name in ("scheduled", "drawn"):
        one, two, three = ([at - (run.began if name == "scheduled" else 0) for at in getattr(run, name)] for run in (first, second, other))
        assert one == two
        assert one != three
    assert ([at - first.began for at in first.scheduled], first.drawn.tolist()) == scheduled(5, 100, 5000.0, service=0.001)


def test_the_work_of_a_seed_does_not_depend_on_its_arrivals() -> None:
    drawn = [
        scheduled(3, 100, arrivals=arrivals, service=0.01, think=think, requests=3)[1]
        for arrivals in ("poisson", "uniform", "burst")
        for think in (0.0, 1.0)
    ]
    assert drawn == [drawn[0]] * 6
    assert scheduled(3, 300, clients=4, service=0.01)[1] == drawn[0]
    poisson = [scheduled(3, 100, service=service, requests=requests)[0] for service, requests in ((0.0, 1), (0.01, 1), (0.0, 2))]
    assert poisson[0] == poisson[1] == poisson[2][::2]


def test_poisson_arrivals() -> None:
    between = gaps(scheduled(rate=1000.0)[0])
    # Of 20 000: the standard error of the mean is 0.7 %, of the coefficient of variation about 1 %.
    assert statistics.mean(between) == pytest.approx(1e6, rel=0.03)
    assert statistics.pstdev(between) / statistics.mean(between) == pytest.approx(1, abs=0.05)
    assert sum(gap < 1e6 for gap in between) / len(between) == pytest.approx(1 - math.exp(-1), abs=0.02)


def test_uniform_arrivals_are_evenly_spaced() -> None:
    assert scheduled(connections=1000, rate=300.0, arrivals="uniform")[0] == [round(number * 1e9 / 300) for number in range(1, 1001)]


@pytest.mark.parametrize(("distribution", "square"), [("exponential", 1.0), ("fixed", 0.0), ("hyper", 4.0)])
def test_service_times(distribution: str, square: float) -> None:
    drawn = scheduled(connections=100_000, service=0.002, distribution=distribution)[1]
    mean = statistics.mean(drawn)
    assert mean == pytest.approx(2e6, rel=0.03)
    assert statistics.pvariance(drawn) / mean**2 == pytest.approx(square, rel=0.1, abs=1e-9)


def test_think_times() -> None:
    at = scheduled(connections=10000, requests=3, think=0.5)[0]
    thought = [at[number] for number in range(len(at)) if number % 3]
    assert statistics.mean(thought) == pytest.approx(5e8, rel=0.03)


# -------------------------------------------------------------------------------- connections that are kept


def keeping(conn: socket.socket) -> None:
    while head := read_head(conn):
        conn.sendall(whole())
        if field(head, b"Connection") == b"close":
            return


@pytest.mark.parametrize("think", [0.0, 0.0005])
def test_a_connection_carries_its_requests(generator: Generator, think: float) -> None:
    seen: list[list[bytes]] = []

    def handle(conn: socket.socket) -> None:
        mine: list[bytes] = []
        seen.append(mine)
        while head := read_head(conn):
            mine.append(field(head, b"Connection"))
            conn.sendall(whole(b"fdpass 1 %s 0 0\n" % field(head, b"Fdpass-Service")))

    with serving(handle, threads=True) as server:
        result = generator.run(load(server, 20, requests=5, think=think, service=0.001))
    assert seen == [[b"keep-alive"] * 4 + [b"close"]] * 20
    assert outcomes(result) == {"ok": 100}
    assert result.accepted.tolist() == result.drawn.tolist()
    for at in range(100):
        if at % 5:
            assert result.connected[at] == result.begun[at] >= result.scheduled[at] >= result.answered[at - 1]
            assert think or result.scheduled[at] == result.answered[at - 1]


def test_a_closed_loop_of_kept_connections(generator: Generator) -> None:
    with NullServer() as server:
        result = generator.run(Load(*server.address, 30, None, clients=4, requests=10))
    assert outcomes(result) == {"ok": 300}


def _closes_in_order(conn: socket.socket) -> None:
    read_head(conn)
    conn.sendall(whole())


@pytest.mark.parametrize(
    ("answer", "think", "left"),
    [
        (whole(more=b"Connection: foo, Close , bar\r\n"), 0.0, "reset_after_accept"),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", 0.0, "reset_after_accept"),
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", 0.0, "reset_after_accept"),
        (whole(), 0.0, "reset_after_accept"),
        (whole(), LONG, "reset_after_accept"),
        (whole() + b"surplus", 0.0, "bad_answer"),
    ],
)
def test_a_connection_that_ends_early(generator: Generator, answer: bytes, think: float, left: str) -> None:
    with serving(answering(answer)) as server:
        result = generator.run(load(server, 3, requests=4, think=think))
    assert outcomes(result) == {"ok": 3, left: 9}
    for at in range(0, 12, 4):
        # The one after the first may have been sent, into a connection that was being closed.
        assert list(result.begun[at + 2 : at + 4]) == list(result.scheduled[at + 2 : at + 4]) == [0, 0]
        assert all(result.answered[at : at + 4])


def test_a_bad_status_does_not_end_a_kept_connection(generator: Generator) -> None:
    def handle(conn: socket.socket) -> None:
        for status in (b"200", b"500", b"200"):
            read_head(conn)
            conn.sendall(whole().replace(b"200", status))

    with serving(handle) as server:
        result = generator.run(load(server, 2, requests=3))
    assert [OUTCOMES[code] for code in result.outcome] == ["ok", "bad_answer", "ok"] * 2


def test_http_1_0_may_keep_its_connection(generator: Generator) -> None:
    def handle(conn: socket.socket) -> None:
        while read_head(conn):
            conn.sendall(b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n")

    with serving(handle) as server:
        assert outcomes(generator.run(load(server, 2, requests=3))) == {"ok": 6}


def test_the_requests_after_a_timeout_are_over_too(generator: Generator) -> None:
    def handle(conn: socket.socket) -> None:
        if read_head(conn):
            conn.sendall(whole())
            read_head(conn)
            assert conn.recv(1) == b""  # until it is given up

    with serving(handle, threads=True) as server:
        result = generator.run(load(server, 3, requests=4, timeout=0.5))
    for at in range(0, 12, 4):
        # On a machine that stands still the first may be late as well.
        assert OUTCOMES[result.outcome[at]] in ("ok", "timeout")
        assert [OUTCOMES[code] for code in result.outcome[at + 1 : at + 4]] == ["timeout"] * 3


# -------------------------------------------------------------------------------- plain TCP


def test_tcp(generator: Generator) -> None:
    def speaks(conn: socket.socket) -> None:
        assert conn.makefile("rb").readline() == b"fdpass\n"
        conn.sendall(b"x")

    def ends(conn: socket.socket) -> None:
        assert conn.makefile("rb").readline() == b"fdpass\n"

    def resets(conn: socket.socket) -> None:
        assert conn.makefile("rb").readline() == b"fdpass\n"
        reset(conn)

    for handle, outcome in ((speaks, "ok"), (ends, "ok"), (resets, "reset_before_accept")):
        with serving(handle) as server:
            assert outcomes(generator.run(load(server, protocol="tcp"))) == {outcome: 4}


# -------------------------------------------------------------------------------- ends


class Stopped(Exception):
    pass


def test_an_exception_stops_the_run_and_nothing_else(generator: Generator, silent: socket.socket) -> None:
    def stop(count: int) -> None:
        if queue_of(silent) == 30:
            raise Stopped

    before = open_in(generator.pid)
    with pytest.raises(Stopped):
        generator.run(load(silent, 30), stop)
    assert open_in(generator.pid) == before
    with NullServer() as server:
        assert outcomes(generator.run(Load(*server.address, 10, 1000.0))) == {"ok": 10}
    assert open_in(generator.pid) == before


def test_a_stop_that_comes_too_late_is_forgotten(generator: Generator) -> None:
    def stop(count: int) -> None:
        if count == 10:
            raise Stopped

    with NullServer() as server:
        for _ in range(3):
            with pytest.raises(Stopped):
                generator.run(Load(*server.address, 10, 1000.0), stop)
        assert outcomes(generator.run(Load(*server.address, 10, 1000.0))) == {"ok": 10}


def test_a_generator_that_is_killed(silent: socket.socket) -> None:
    with Generator() as generator:

        def kill(count: int) -> None:
            if queue_of(silent) == 3:
                os.kill(generator.pid, signal.SIGKILL)

        with pytest.raises(RuntimeError, match=rf"the load generator \(pid {generator.pid}\) was killed by SIGKILL"):
            generator.run(load(silent, 3), kill)
        with pytest.raises(fdpass.ClosedError):
            generator.run(load(silent, 3))
    with Generator() as generator:
        process = psutil.Process(generator.pid)
        process.kill()
        select.select([generator._process.channel], [], [])
        with pytest.raises(RuntimeError, match="was killed by SIGKILL"):
            generator.run(load(silent, 3))


def test_a_generator_that_is_stopped_and_continued(generator: Generator) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def pause(count: int) -> None:
            if queue_of(listener):
                process = psutil.Process(generator.pid)
                process.suspend()
                while process.status() != psutil.STATUS_STOPPED:
                    os.sched_yield()
                process.resume()
                conn, _ = listener.accept()
                with conn:
                    answering(whole())(conn)

        assert outcomes(generator.run(load(listener, 1), pause)) == {"ok": 1}


def test_closing_is_not_held_up_by_a_forked_process() -> None:
    generator = Generator()
    pid = os.fork()
    if pid == 0:
        # It has our end of the channel too, for as long as it lives.
        signal.pause()
        os._exit(0)
    try:
        generator.close()
        generator.close()
        assert not psutil.pid_exists(generator.pid)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


PROGRAM = """
import os, sys
from fdpass_bench.loadgen import Generator, Load, NullServer
if __name__ == "__main__":
    with Generator() as generator, NullServer() as server:
        print(generator.pid, server.pid, flush=True)
        told = []
        def ended(count):
            if not told:
                told.append(count)
                print("running", flush=True)
        try:
            generator.run(Load(*server.address, 100000, 100.0), ended)
        except KeyboardInterrupt:
            print("interrupted", sum(generator.run(Load(*server.address, 100, 10000.0)).outcome), flush=True)
"""


@contextlib.contextmanager
def program(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A program in a group of its own in the middle of a run, and pidfds of the two processes it has started."""
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-P", tmp_path / "program.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True) as child:
        pidfds: list[int] = []
        try:
            assert child.stdout is not None
            pidfds += [os.pidfd_open(int(pid)) for pid in child.stdout.readline().split()]
            assert child.stdout.readline() == "running\n"
            yield child, pidfds
        finally:
            child.kill()
            for pidfd in pidfds:
                os.close(pidfd)


def test_a_ctrl_c_of_the_terminal(tmp_path: Path) -> None:
    with program(tmp_path) as (child, _):
        os.killpg(child.pid, signal.SIGINT)
        assert child.communicate()[0] == "interrupted 0\n"
        assert child.returncode == 0


def test_both_processes_end_with_their_parent(tmp_path: Path) -> None:
    with program(tmp_path) as (child, pidfds):
        child.kill()
        for pidfd in pidfds:
            select.select([pidfd], [], [])


# -------------------------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"host": "localhost"}, "localhost"),
        ({"host": "fe80::1%lo"}, "zone"),
        ({"port": 0}, "port 0"),
        ({"connections": 0}, "at least one"),
        ({"requests": 0}, "at least one"),
        ({"clients": -1}, "at least one"),
        ({"rate": None}, "rate"),
        ({"rate": 0.0}, "rate"),
        ({"rate": math.inf}, "rate"),
        ({"rate": math.nan}, "rate"),
        ({"arrivals": "seldom"}, "seldom"),
        ({"distribution": "normal"}, "normal"),
        ({"protocol": "https"}, "https"),
        ({"service": -1.0}, "service"),
        ({"think": math.nan}, "think"),
        ({"timeout": 0.0}, "timeout"),
        ({"seed": -1}, "seed"),
        ({"path": "x"}, "path"),
        ({"path": "/a b"}, "path"),
        ({"path": "/a\r\n"}, "path"),
        ({"path": "/" + "a" * 4000}, "4001"),
        ({"protocol": "tcp", "requests": 2}, "tcp"),
    ],
)
def test_a_load_that_cannot_be(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Load(**{"host": "127.0.0.1", "port": 1, "connections": 1, "rate": 1.0, **wrong})


# -------------------------------------------------------------------------------- the server that does nothing


def test_the_null_server() -> None:
    with NullServer() as server:
        conn = http.client.HTTPConnection(*server.address)
        for _ in range(3):
            conn.request("GET", "/")
            answer = conn.getresponse()
            assert (answer.status, answer.read(), answer.will_close) == (200, b"fdpass 0 0 0 0\n", False)
        conn.request("GET", "/", headers={"connection": "Close"})
        assert conn.getresponse().will_close
        conn.close()
        with socket.create_connection(server.address) as raw, raw.makefile("rb") as read:
            request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
            for byte in request:
                raw.sendall(bytes([byte]))
            raw.sendall(request + request + b"GET / HTTP/1.0\r\n\r\n" + request)
            assert len(re.findall(rb"200 OK", read.read())) == 4
        with socket.create_connection(server.address) as raw, contextlib.suppress(ConnectionError):
            raw.sendall(b"x" * 10000)
            assert raw.recv(1) == b""


def test_the_null_server_without_descriptors() -> None:
    with NullServer() as server, contextlib.ExitStack() as stack:
        _, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        first = http.client.HTTPConnection(*server.address)
        stack.callback(first.close)
        first.request("GET", "/")
        first.getresponse().read()
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (open_in(server.pid) + 2, hard))
        waiting = [stack.enter_context(socket.create_connection(server.address)) for _ in range(5)]
        for conn in waiting:
            # The number of each that goes is the next one's.
            conn.sendall(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
        first.close()
        assert all(conn.makefile("rb").read() for conn in waiting)


# -------------------------------------------------------------------------------- the reader of answers


def new_parser() -> Any:
    parser = ffi.new("flg_parser *")
    lib.flg_parse_begin(parser)
    return parser


def feed(parser: Any, *pieces: bytes) -> tuple[int, int]:
    """The last result, and how many bytes belonged to the answer."""
    total, result, used = 0, lib.FLG_MORE, ffi.new("size_t *")
    for piece in pieces:
        # Memory of its exact size, which a sanitizer guards.
        memory = ffi.new("char[]", len(piece))
        ffi.memmove(memory, piece, len(piece))
        result = lib.flg_parse(parser, memory, len(piece), used)
        assert used[0] <= len(piece)
        total += used[0]
        if result != lib.FLG_MORE:
            break
        assert used[0] == len(piece)
    return result, total


def facts(parser: Any) -> tuple[Any, ...]:
    return (
        parser.stage, parser.status, parser.minor, parser.keep, parser.chunked, parser.length, parser.left, parser.seen, parser.line_size,
        ffi.buffer(parser.body)[: parser.body_size],
    )  # fmt: skip


def is_whole(name: str, parser: Any, result: int) -> bool:
    if name in UNTIL_END:
        return result == lib.FLG_MORE and lib.flg_parse_end(parser) == lib.FLG_DONE
    return result == lib.FLG_DONE == lib.flg_parse_end(parser)


@pytest.mark.parametrize("name", [*GOOD, *WITHOUT_BODY])
def test_answers_whole_and_in_bytes_and_with_more_behind(name: str) -> None:
    answer = {**GOOD, **WITHOUT_BODY}[name]
    at_once, in_bytes, with_more = new_parser(), new_parser(), new_parser()
    result, used = feed(at_once, answer)
    assert is_whole(name, at_once, result)
    assert used == len(answer)
    if name in GOOD:
        assert ffi.buffer(at_once.body)[:18] == BODY
    assert feed(in_bytes, *(bytes([byte]) for byte in answer)) == (result, used)
    assert facts(in_bytes) == facts(at_once)
    if name not in UNTIL_END:
        assert feed(with_more, answer + b"HTTP/1.1 ") == (result, used)
        assert facts(with_more) == facts(at_once)


@pytest.mark.parametrize("name", [name for name in GOOD if name != "many chunks"])
def test_an_answer_cut_short_is_never_whole(name: str) -> None:
    answer = GOOD[name]
    end = answer.index(b"\r\n\r\n") + 4 if name in UNTIL_END else len(answer)
    parser = new_parser()
    for number in range(end):
        assert lib.flg_parse_end(parser) == lib.FLG_MORE, answer[:number]
        feed(parser, answer[number : number + 1])
    assert lib.flg_parse_end(parser) == lib.FLG_DONE


@pytest.mark.parametrize("name", [name for name in BAD if "404" not in name and name != "500"])
def test_a_bad_answer_stays_bad(name: str) -> None:
    at_once, in_bytes = new_parser(), new_parser()
    # What is never ended is bad at its limit, before its end: in bytes it is known a little earlier.
    assert feed(at_once, BAD[name])[0] == lib.FLG_BAD
    assert feed(in_bytes, *(bytes([byte]) for byte in BAD[name]))[0] == lib.FLG_BAD
    assert feed(at_once, whole()) == (lib.FLG_BAD, 0)


pieces_of_http = st.lists(
    st.sampled_from([
        b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 404 \r\n", b"HTTP/1.1 100 \r\n", b"Content-Length: 5\r\n", b"Content-Length:", b" " * 250,
        b"Transfer-Encoding: chunked\r\n", b"Connection: close, x\r\n", b"Connection: keep-alive\r\n", b"Connection:\r\n",
        b"Connection: ,\r\n", b"\r\n", b"\n", b"5\r\n", b"hello", b"hello\r\n", b"0\r\n\r\n", b"a" * 255, b"b: " + b"x" * 254 + b"\r\n",
        b":", b" ", b"\0",
    ])
    | st.binary(max_size=8),
    max_size=12,
).map(b"".join)  # fmt: skip


@given(pieces_of_http, st.lists(st.integers(1, 40), max_size=20))
def test_where_an_answer_is_cut_makes_no_difference(data: bytes, sizes: list[int]) -> None:
    at_once, in_pieces = new_parser(), new_parser()
    pieces = []
    rest = data
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    result, used = feed(at_once, data)
    assert feed(in_pieces, *pieces, rest)[0] == result
    if result == lib.FLG_BAD:
        return
    assert facts(in_pieces) == facts(at_once)
    assert at_once.seen == used
    numbers = ffi.new("int64_t[4]")
    assert lib.flg_parse_body(at_once, numbers) in (0, 1)


# -------------------------------------------------------------------------------- the histogram

durations = st.one_of(st.integers(0, 300), st.integers(0, 10**7), st.integers(0, (1 << 63) - 1))


@given(st.lists(durations, min_size=1), st.floats(0, 100))
def test_a_histogram_is_within_one_percent(values: list[int], percent: float) -> None:
    histogram = Histogram()
    histogram.add(array("q", values))
    assert (histogram.count, histogram.sum, histogram.min, histogram.max) == (len(values), sum(values), min(values), max(values))
    assert histogram.mean == pytest.approx(statistics.fmean(values))
    exact = sorted(values)[max(1, math.ceil(percent / 100 * len(values))) - 1]
    found = histogram.percentile(percent)
    assert found == exact if exact < 256 else abs(found - exact) <= 0.004 * exact
    assert histogram.percentile(0) == min(values)
    assert histogram.percentile(100) == max(values)


@given(st.lists(durations), st.lists(durations))
def test_histograms_merge(left: list[int], right: list[int]) -> None:
    one, other, both = Histogram(), Histogram(), Histogram()
    one.add(array("q", left))
    for value in right:
        other.record(value)
    one.merge(other)
    both.add(array("q", left + right))
    assert bytes(ffi.buffer(one._in_c)) == bytes(ffi.buffer(both._in_c))


def test_what_a_histogram_refuses() -> None:
    histogram = Histogram()
    for ask in (lambda: histogram.mean, lambda: histogram.min, lambda: histogram.max, lambda: histogram.percentile(50)):
        with pytest.raises(ValueError, match="nothing was counted"):
            ask()
    with pytest.raises(ValueError, match="not negative"):
        histogram.record(-1)
    with pytest.raises(ValueError, match="not negative"):
        histogram.add(array("q", [5, -1]))
    with pytest.raises(TypeError, match='format "q"'):
        histogram.add(array("i", [5]))
    with pytest.raises(ValueError, match="101"):
        histogram.percentile(101)
    histogram.add(array("q"))
    assert histogram.count == histogram.sum == 0


# -------------------------------------------------------------------------------- time as workers use it


def test_sleeping_until_an_instant() -> None:
    until = time.monotonic_ns() + 2_000_000
    assert lib.flg_sleep_until(until) == 0
    assert time.monotonic_ns() >= until
    assert lib.flg_sleep_until(0) == 0


def test_a_signal_ends_the_sleep_first() -> None:
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    # Again and again: the first may come before the sleep has begun.
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    try:
        assert lib.flg_sleep_until(time.monotonic_ns() + int(LONG * 1e9)) == -4
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_burning_processor_time() -> None:
    before = time.thread_time_ns()
    lib.flg_burn_cpu(3_000_000)
    assert time.thread_time_ns() - before >= 3_000_000


def test_timer_slack_is_the_threads_own(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    code = """
from pathlib import Path
from fdpass_bench._loadgen import lib
assert lib.flg_timer_slack(1) == 0
print(Path("/proc/self/timerslack_ns").read_text().strip())
"""
    assert run_python(code).stdout == "1\n"


# -------------------------------------------------------------------------------- the border


def test_every_prototype_says_who_owns_what() -> None:
    if not NATIVE.is_dir():
        pytest.skip("installed without its C sources")
    text = (NATIVE / "loadgen.h").read_text()
    found = re.findall(r"/\*((?:[^*]|\*(?!/))*)\*/\s*[a-z_][\w ]*[\w*] ?\**(flg_\w+)\(", text)
    assert {name for _, name in found} == set(re.findall(r"^[a-z_][\w ]*[\w*] ?\**(flg_\w+)\(", text, re.MULTILINE))
    assert len(found) > 10
    assert [name for comment, name in found if "Ownership:" not in comment] == []
    for path in [*NATIVE.glob("*.h"), *NATIVE.glob("*.c")]:
        assert path.read_text().startswith("/* "), path.name


def test_workers_load_nothing_heavy_for_it(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    code = "import sys; from fdpass_bench._loadgen import lib; print(sorted(sys.modules.keys() & {'fdpass', 'click', 'rich', 'asyncio'}))"
    assert run_python(code).stdout == "[]\n"
