"""Event loops whose listening sockets are fair: evenness, wake-ups, servers that people run, exhaustion, load and drain."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import select
import selectors
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trustme

import fdpass
from fdpass import _queue, aio
from fdpass._board import ACCEPTED, LOAD, OPEN, WAITING, WORDS
from fdpass._queue import Place
from fdpass.aio import uvloops
from fdpass.channel import Channel
from fdpass.listener import AcceptedSocket, Listener, ListenSocket, listener_of

sys.path.insert(0, str(Path(__file__).parent))
import loop_targets as targets

LOOPS = ("asyncio", "uvloop")
if not _queue.exclusive_works():
    pytest.skip("this kernel has no EPOLLEXCLUSIVE", allow_module_level=True)


def until(condition: Callable[[], object]) -> None:
    """Waits for a condition; the test's own time limit is the only one. One that spins takes the processor from what it waits for."""
    while not condition():
        time.sleep(0.001)


def connect(address: Any) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    sock.settimeout(30)
    sock.connect(address)
    return sock


def at_rest(pids: list[int]) -> bool:
    """Whether every one of the processes sleeps."""
    return all(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S" for pid in pids)


def switches(pids: list[int]) -> int:
    """How often the main threads went to sleep so far."""
    return sum(int(re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)[0]) for pid in pids)


def spaced(pids: list[int], ask: Callable[[], Any], count: int = 60) -> tuple[Counter[Any], float]:
    """ask() again and again, each time with all workers idle: who answered how often, and the switches for each."""
    until(lambda: at_rest(pids))
    before, answers = switches(pids), Counter[Any]()
    for _ in range(count):
        answers[ask()] += 1
        until(lambda: at_rest(pids))
    return answers, (switches(pids) - before) / count


def assert_even(answers: Counter[Any], per_connection: float = 0, most: float = 2) -> None:
    assert len(answers) == 4
    assert 12 <= min(answers.values()) <= max(answers.values()) <= 18, answers
    # Stock loops: about 4.
    assert per_connection < most


def word(address: Any, context: ssl.SSLContext | None = None) -> bytes:
    """One connection's first byte."""
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(connect(address))
        if context is not None:
            sock = stack.enter_context(context.wrap_socket(sock, server_hostname="localhost"))
        return sock.recv(1)


def get(address: Any) -> bytes:
    """The body of one HTTP request on a connection of its own."""
    with connect(address) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200")
    body: bytes = answer.rpartition(b"\r\n")[2]
    return body


def pids_of(group: fdpass.WorkerGroup) -> list[int]:
    return [one.pid for one in group.stats()]


def group(target: Any, workers: int = 4, address: str = "127.0.0.1:0", **options: Any) -> fdpass.WorkerGroup:
    return fdpass.WorkerGroup(target, address, workers=workers, **options)


@pytest.fixture(scope="module", autouse=True)
def libuv() -> None:
    """libuv keeps a pipe and threads for the life of the process: they start here, before a test's balance is taken."""
    with asyncio.Runner(loop_factory=aio.new_uvloop_event_loop) as runner:

        async def main() -> None:
            await asyncio.get_running_loop().getaddrinfo("127.0.0.1", 1)

        runner.run(main())


# -- evenness ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["rotate", "least-loaded"])
@pytest.mark.parametrize("which", LOOPS)
def test_start_server_on_a_groups_socket_is_even_and_counted(which: str, order: str) -> None:
    with group(targets.hold, args=(which,), order=order) as running:
        answers, per_connection = spaced(pids_of(running), lambda: word(running.endpoint.address))
        # A worker that is kept out looks again and again, and the slower the machine the more often.
        assert_even(answers, per_connection, 2 if order == "rotate" else 3.5)
        until(lambda: [one.open for one in running.stats()] == [0] * 4)
        assert [one.accepted for one in running.stats()] == [answers[b"%d" % index] for index in range(4)]


@pytest.mark.parametrize("which", LOOPS)
def test_unix_sockets_are_even(which: str, tmp_path: Path) -> None:
    with group(targets.hold, address=f"unix:{tmp_path}/s", args=(which,)) as running:
        assert_even(*spaced(pids_of(running), lambda: word(f"{tmp_path}/s")))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ssl.SSLContext]:
    """A certificate's file and a client's context that trusts it."""
    made = trustme.CA()
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    made.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(path))
    context = ssl.create_default_context()
    made.configure_trust(context)
    return str(path), context


@pytest.mark.parametrize("which", LOOPS)
def test_tls_is_even_and_a_failed_handshake_harms_nobody(which: str, authority: tuple[str, ssl.SSLContext]) -> None:
    certificate, context = authority
    with group(targets.hold, args=(which, certificate)) as running:
        answers, _ = spaced(pids_of(running), lambda: word(running.endpoint.address, context))
        assert_even(answers)  # a handshake takes more than one wake-up
        with connect(running.endpoint.address) as sock:
            sock.sendall(b"this is no handshake" * 10)
            with contextlib.suppress(ConnectionError):
                while sock.recv(100):
                    pass
        until(lambda: sum(one.open for one in running.stats()) == 0)
        assert word(running.endpoint.address, context) in b"0123"


@pytest.mark.parametrize("which", LOOPS)
def test_sock_accept(which: str) -> None:
    with group(targets.sock_accept, args=(which,)) as running:
        answers = Counter(word(running.endpoint.address) for _ in range(60))
        assert answers.total() == 60
        if which == "asyncio":
            assert_even(*spaced(pids_of(running), lambda: word(running.endpoint.address)))


@pytest.mark.parametrize("target", [targets.hypercorn, targets.aiohttp])
@pytest.mark.parametrize("which", LOOPS)
def test_servers_that_people_run(which: str, target: Any) -> None:
    with group(target, args=(which,)) as running:
        # Ready is said when they take the socket; they accept a little later.
        until(lambda: len({get(running.endpoint.address) for _ in range(8)}) == 4)
        assert_even(*spaced(pids_of(running), lambda: get(running.endpoint.address)))


@pytest.mark.parametrize("factory", ["new_event_loop", "new_uvloop_event_loop"])
def test_uvicorn_with_one_more_option(factory: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "uvicorn", "loop_targets:app", "--workers", "4", "--port", "0", "--loop", f"fdpass.aio:{factory}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            address, started = None, 0
            while started < 4:
                line = process.stderr.readline()
                assert line, "uvicorn ended"
                if found := re.search(r"running on http://([\d.]+):(\d+)", line):
                    address = found[1], int(found[2])
                started += "startup complete" in line
            # The log is read on, or the workers would wait for room in the pipe.
            threading.Thread(target=process.stderr.read).start()
            until(lambda: len({get(address) for _ in range(8)}) == 4)
            pids = [int(pid) for pid in {get(address) for _ in range(40)}]
            assert_even(*spaced(pids, lambda: get(address)))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
            for thread in threading.enumerate():
                if thread is not threading.main_thread() and not thread.daemon:
                    thread.join(30)


# -- a loop by itself --------------------------------------------------------------------------------------------------------


def run(which: str, main: Any) -> Any:
    with asyncio.Runner(loop_factory=targets.LOOPS[which]) as runner:
        return runner.run(main())


async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(await reader.readline())
    await writer.drain()
    writer.close()


async def echo(*where: Any, **options: Any) -> bytes:
    reader, writer = await (asyncio.open_unix_connection if isinstance(where[0], str) and len(where) == 1 else asyncio.open_connection)(
        *where, **options
    )
    writer.write(b"hello\n")
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


@pytest.mark.parametrize("which", LOOPS)
def test_host_and_port_several_listeners_and_serving_again(which: str) -> None:
    async def main() -> None:
        one = await asyncio.start_server(talk, "127.0.0.1", 0, start_serving=False)
        two = await asyncio.start_server(talk, host=["127.0.0.1", "127.0.0.2"], port=0)
        assert (one.is_serving(), two.is_serving()) == (False, True)
        await one.start_serving()
        await one.start_serving()
        assert one.is_serving()
        assert one.get_loop() is asyncio.get_running_loop()
        for sock in (*one.sockets, *two.sockets, *one.sockets):
            assert await echo(*sock.getsockname()) == b"hello\n"
        address = one.sockets[0].getsockname()
        one.close()
        one.close()
        await one.wait_closed()
        assert not one.sockets
        assert not one.is_serving()
        with pytest.raises(ConnectionRefusedError):
            await echo(*address)
        assert await echo(*two.sockets[0].getsockname()) == b"hello\n"
        async with two:
            task = asyncio.ensure_future(two.serve_forever())
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="already being awaited"):
                await asyncio.gather(two.serve_forever())
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    run(which, main)


@pytest.mark.parametrize("which", LOOPS)
def test_create_server_with_a_socket_and_unix_servers(which: str, tmp_path: Path) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as sock:
            address = sock.getsockname()
            server = await asyncio.start_server(talk, sock=sock)
            assert await echo(*address) == b"hello\n"
            server.close()
            await server.wait_closed()
            assert sock.fileno() == -1
        path = f"{tmp_path}/s"
        for _ in range(2):  # a stale file is in the way of nobody
            server = await asyncio.start_unix_server(talk, path)
            assert await echo(path) == b"hello\n"
            server.close()
            await server.wait_closed()
            assert os.path.exists(path) == (sys.version_info < (3, 13))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path)
            async with await loop.create_server(lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader(), talk), sock=sock):
                assert await echo(path) == b"hello\n"

    run(which, main)


@pytest.mark.parametrize("which", LOOPS)
def test_what_a_server_refuses(which: str, tmp_path: Path) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        factory = asyncio.Protocol
        with socket.socket() as sock, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
            for arguments in (
                {"host": "127.0.0.1", "port": 0, "sock": sock},
                {},
                {"sock": datagrams},
                {"sock": sock, "ssl_handshake_timeout": 1.0},
                {"sock": sock, "ssl_shutdown_timeout": 1.0},
            ):
                with pytest.raises(ValueError):
                    await loop.create_server(factory, **arguments)
            with pytest.raises(TypeError):
                await loop.create_server(factory, sock=sock, ssl=True)
            for arguments in ({"path": f"{tmp_path}/s", "sock": sock}, {}, {"sock": sock}):
                with pytest.raises(ValueError):
                    await loop.create_unix_server(factory, **arguments)
            sock.bind(("127.0.0.1", 0))
            with pytest.raises(OSError):
                await loop.create_server(factory, *sock.getsockname(), reuse_address=False)

    run(which, main)


@pytest.mark.parametrize("which", LOOPS)
def test_a_protocol_factory_that_fails_leaves_nothing_behind(which: str) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        asked = 0

        def factory() -> asyncio.Protocol:
            nonlocal asked
            asked += 1
            raise RuntimeError("deliberate")

        server = await loop.create_server(factory, "127.0.0.1", 0)
        seen: list[str] = []
        loop.set_exception_handler(lambda _, context: seen.append(context["message"]))
        loop.set_debug(True)
        with connect(server.sockets[0].getsockname()):
            while not asked:
                await asyncio.sleep(0)
            while not seen:
                await asyncio.sleep(0)
        server.close()
        gc.collect()

    with pytest.warns(ResourceWarning) if which == "asyncio" else contextlib.nullcontext():
        run(which, main)


@pytest.mark.parametrize("cls", [aio.EventLoop, lambda **terms: __import__("fdpass.aio.uvloops").aio.uvloops.UvloopEventLoop(**terms)])
def test_accept_batch_is_a_number(cls: Any) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        cls(accept_batch=0)
    with pytest.raises(TypeError, match="number"):
        cls(accept_batch="1")


@pytest.mark.parametrize("batch", [1, 3])
def test_a_wake_up_takes_a_batch(batch: int) -> None:
    turns: list[int] = []
    loop = aio.EventLoop(accept_batch=batch)

    class Counting(socket.socket):
        def accept(self) -> Any:
            accepted = super().accept()
            turns.append(loop._fair.turn)
            return accepted

    async def main() -> None:
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(Counting())
            sock.bind(("127.0.0.1", 0))
            sock.listen()
            clients = [stack.enter_context(connect(sock.getsockname())) for _ in range(6)]
            async with await asyncio.start_server(talk, sock=sock):
                for client in clients:
                    client.setblocking(False)
                    client.sendall(b"hello\n")
                    assert await loop.sock_recv(client, 10) == b"hello\n"

    with contextlib.closing(loop):
        loop.run_until_complete(main())
    assert set(Counter(turns).values()) == {batch}


def test_without_exclusive_wake_ups_it_is_the_plain_loop_and_says_so_once(run_python: Any) -> None:
    code = """
import asyncio, os, warnings
import uvloop
from fdpass import aio
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    loops = [make() for make in (aio.new_event_loop, aio.new_uvloop_event_loop) * 2]
for loop in loops:
    loop.close()
assert [type(loop) for loop in loops] == [asyncio.SelectorEventLoop, uvloop.Loop] * 2
assert [one.category for one in caught] == [RuntimeWarning] * 2, caught
assert all("EPOLLEXCLUSIVE is missing" in str(one.message) for one in caught)
"""
    run_python(code, env={**os.environ, "FDPASS_FORCE": "no-exclusive"})


def test_a_uvloop_that_does_not_tell_its_epoll(monkeypatch: pytest.MonkeyPatch) -> None:
    from fdpass.aio import uvloops

    class Loop(asyncio.SelectorEventLoop):
        """A uvloop of another time."""

    monkeypatch.setattr(_queue, "_warned", set())
    monkeypatch.setattr(uvloops.uvloop, "Loop", Loop)
    with pytest.warns(RuntimeWarning, match="_get_backend_id"):
        aio.new_uvloop_event_loop().close()
    aio.new_uvloop_event_loop().close()  # a second warning would be an error


def test_without_uvloop_a_sentence_says_so(run_python: Any) -> None:
    code = """
import sys
sys.modules["uvloop"] = None
from fdpass import aio
try:
    aio.new_uvloop_event_loop()
except ImportError as error:
    assert "pip install uvloop" in str(error)
else:
    raise SystemExit("no error")
"""
    run_python(code)


def test_a_failed_start_of_a_loop_leaves_nothing_open(full_table: Any) -> None:
    for free in range(6):
        with full_table(free=free), contextlib.suppress(OSError):
            aio.new_event_loop().close()


# -- the selector ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def selector() -> Iterator[aio.FairSelector]:
    with aio.FairSelector() as made:
        yield made


def test_the_standard_librarys_own_tests_of_a_selector() -> None:
    suite = pytest.importorskip("test.test_selectors", exc_type=ImportError)
    import unittest

    class FairSelectorTestCase(suite.BaseSelectorTestCase, unittest.TestCase):
        SELECTOR = aio.FairSelector

    done = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(FairSelectorTestCase).run(done)
    assert done.testsRun > 10
    assert [text for _, text in (*done.errors, *done.failures)] == []


def test_readers_and_writers_of_one_descriptor(selector: aio.FairSelector, unix_pair: Any) -> None:
    left, right = unix_pair
    selector.register(left, selectors.EVENT_READ, "data")
    assert selector.select(0) == []
    assert selector.modify(left, selectors.EVENT_READ | selectors.EVENT_WRITE, "both").data == "both"
    assert [(key.data, events) for key, events in selector.select(0)] == [("both", selectors.EVENT_WRITE)]
    right.send(b"x")
    assert [events for _, events in selector.select()] == [selectors.EVENT_READ | selectors.EVENT_WRITE]
    selector.modify(left, selectors.EVENT_READ)
    assert selector.get_key(left).events == selectors.EVENT_READ
    assert left in selector.get_map()
    assert left.fileno() in selector.get_map()
    assert list(selector.get_map()) == [left.fileno()]
    for call in (selector.unregister, selector.get_key, lambda sock: selector.modify(sock, 1)):
        with pytest.raises(KeyError):
            call(right)
    with pytest.raises(ValueError):
        selector.register(right, 0)
    with pytest.raises(ValueError):
        selector.register(-1, 1)
    with pytest.raises(KeyError, match="already"):
        selector.register(left, 1)
    with pytest.raises(PermissionError), open(__file__) as file:
        selector.register(file, 1)
    selector.unregister(left)
    selector.close()
    selector.close()
    assert selector.get_map() is None
    with pytest.raises(RuntimeError, match="closed"):
        selector.get_key(left)


def test_a_listening_socket_changes_its_kind_of_registration(selector: aio.FairSelector) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        selector.register(sock, selectors.EVENT_READ)
        assert selector.place(sock.fileno()) is not None
        selector.modify(sock, selectors.EVENT_READ, "data alone")
        assert selector.place(sock.fileno()).queued  # type: ignore[union-attr]  # it has one
        selector.modify(sock, selectors.EVENT_READ | selectors.EVENT_WRITE)
        assert selector.place(sock.fileno()) is None
        selector.modify(sock, selectors.EVENT_READ)
        place = selector.place(sock.fileno())
        assert place is not None
        with connect(sock.getsockname()):
            for _ in range(3):  # level-triggered, and in the queue again each time
                assert [events for _, events in selector.select()] == [selectors.EVENT_READ]
        fd = sock.fileno()
    assert selector.unregister(fd).fd == fd  # after it was closed
    assert selector.place(fd) is None
    assert selector.select(0) == []


def test_a_closed_file_object_is_known_by_itself(selector: aio.FairSelector) -> None:
    left, right = socket.socketpair()
    with right:
        selector.register(left, selectors.EVENT_READ)
        left.close()
        assert selector.get_key(left).fileobj is left
        selector.unregister(left)


# -- out of descriptors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", LOOPS)
def test_out_of_descriptors_a_server_leaves_the_queue(which: str) -> None:
    with group(targets.exhausted, 2, args=(which,)) as running, contextlib.ExitStack() as stack:

        def of_worker(index: bytes) -> socket.socket:
            """Connects until that worker has one of its connections."""
            while True:
                sock = connect(running.endpoint.address)
                if sock.recv(1) == index:
                    return stack.enter_context(sock)
                sock.close()

        control = of_worker(b"0")
        control.sendall(b"f")
        control.recv(100)
        # The spare descriptor serves one; it stays open, and the worker is out of the queue.
        of_worker(b"0")
        assert [word(running.endpoint.address) for _ in range(40)] == [b"1"] * 40
        control.sendall(b"x")
        control.recv(100)
        again = of_worker(b"0")
        again.sendall(b"?")
        failures, logged = map(int, again.recv(100).split())
        # Once when it found out. A spinning worker fails thousands of times.
        assert failures < 5
        assert logged == 0


def test_a_listening_socket_that_is_closed_without_a_word_is_forgotten(selector: aio.FairSelector) -> None:
    first = socket.create_server(("127.0.0.1", 0))
    key = selector.register(first, selectors.EVENT_READ)
    with socket.create_connection(first.getsockname()):
        assert selector.select(10.0) == [(key, selectors.EVENT_READ)]
        number = first.fileno()
        first.close()
        # Its number goes to another listening socket, which nobody has registered.
        with socket.create_server(("127.0.0.1", 0)) as second, socket.create_connection(second.getsockname()):
            assert second.fileno() == number
            assert selector.select(0.01) == []
    selector.unregister(first)


# -- load --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [*LOOPS, "threads"])
def test_long_lived_connections_go_to_the_least_loaded(which: str) -> None:
    target, args = (targets.hold_in_threads, ()) if which == "threads" else (targets.hold, (which,))
    with group(target, args=args, order="least-loaded") as running, contextlib.ExitStack() as stack:
        pids, held = pids_of(running), []

        def one_more() -> None:
            sock = stack.enter_context(connect(running.endpoint.address))
            held.append((sock.recv(1), sock))

        def opens() -> list[int]:
            return [one.open for one in running.stats()]

        for _ in range(60):
            one_more()
            until(lambda: at_rest(pids))
        assert max(opens()) - min(opens()) <= 5
        for index, sock in list(held):
            if index in (b"0", b"1"):
                sock.close()
                held.remove((index, sock))
        until(lambda: opens()[:2] == [0, 0])
        for _ in range(60):
            one_more()
            until(lambda: at_rest(pids))
        assert sum(opens()) == len(held)
        # Where the processors are busy, so that a lighter worker comes late, some go to those with more; rotate would leave them 15 apart.
        assert max(opens()) - min(opens()) <= 5


def line(load: int, waiting: int = 1) -> list[int]:
    words = [0] * WORDS
    words[OPEN], words[WAITING] = load, waiting
    return words


@pytest.mark.parametrize(
    ("own", "others", "inside"),
    [
        (0, [0, 0], True),
        (1, [0, 5], True),
        (2, [0, 5], False),
        (200, [198], True),
        (200, [197], False),
        (201, [198], False),
        (9, [], True),
    ],
)
def test_the_band(own: int, others: list[int], inside: bool) -> None:
    mine = line(own)
    lines = [mine, *(line(other) for other in others), line(0, waiting=0)]
    with socket.create_server(("127.0.0.1", 0)) as sock, select.epoll() as epoll:
        place = Place(sock.fileno(), epoll, exclusive=True, rotate=True, line=mine, lines=lines)
        assert place.settle() is place.queued is inside
        assert (place.pause is None) is inside
        mine[LOAD] = 1  # the server says 0
        assert place.settle()
        place.close()


def test_a_connection_waits_one_look_for_a_lighter_worker_that_does_not_come() -> None:
    mine = line(9)
    with socket.create_server(("127.0.0.1", 0)) as sock, select.epoll() as epoll:
        sock.setblocking(False)
        place = Place(sock.fileno(), epoll, exclusive=True, rotate=True, line=mine, lines=[mine, line(0)])
        assert not place.settle()
        with connect(sock.getsockname()):
            assert place.waiting()
            until(place.overdue)
            taken = place.take(sock)
            assert taken is not None
            taken[0].close()
            assert not place.waiting()
            assert not place.overdue()


def test_out_of_descriptors_and_kept_out_it_does_not_spin(full_table: Any) -> None:
    mine = line(9)
    with socket.create_server(("127.0.0.1", 0)) as sock, select.epoll() as epoll:
        place = Place(sock.fileno(), epoll, exclusive=True, rotate=True, spare_of=epoll.fileno(), line=mine, lines=[mine, line(0)])
        with connect(sock.getsockname()):
            assert not place.settle()
            with full_table():
                until(lambda: not place.overdue() and place.pause == _queue.ROOM)
                assert not place.settle()
                assert place.pause is not None
                assert place.pause > _queue.AGAIN
            until(place.overdue)
        place.close()


def test_on_uvloop_a_worker_that_is_kept_out_looks_no_more_than_once_a_millisecond(made: Any) -> None:
    one = made(lines=[line(0)], balance=True)
    one.line[LOAD] = 10
    look, looks = uvloops._Acceptor._look.__code__, 0

    def count(frame: Any, event: str, _: Any) -> None:
        nonlocal looks
        looks += event == "call" and frame.f_code is look

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await asyncio.start_server(talk, sock=one.listener.socket)
        began = loop.time()
        sys.setprofile(count)
        try:
            while looks < 50:
                await asyncio.sleep(0.001)
        finally:
            sys.setprofile(None)
        # The clock of the loop counts whole milliseconds.
        assert looks <= (loop.time() - began) * 1e3 + 2
        server.close()

    run("uvloop", main)


# -- a listener by itself ----------------------------------------------------------------------------------------------------


class Made:
    """A listener as a worker has it, its board line, and the supervisor's end of its channel."""

    def __init__(self, channel: Channel, listener: Listener, words: list[int], address: Any) -> None:
        self.channel, self.listener, self.line, self.address = channel, listener, words, address

    def said(self) -> list[str]:
        words = []
        while self.channel.poll():
            words.append(self.channel.recv()[0])
        return words


@pytest.fixture
def made() -> Iterator[Callable[..., Made]]:
    with contextlib.ExitStack() as stack:

        def make(**terms: Any) -> Made:
            ours, theirs = map(stack.enter_context, fdpass.Pipe())
            sock = ListenSocket(socket.create_server(("127.0.0.1", 0)), 100)
            sock.setblocking(False)
            words = [0] * WORDS
            listener = Listener(sock, 0, "shared", words, theirs, exclusive=True, rotate=True, **terms)
            stack.callback(os.close, listener._wake_read)
            stack.callback(os.close, listener._wake_write)
            stack.callback(listener._events.close)
            stack.callback(listener._close)
            return Made(ours, listener, words, sock.getsockname())

        yield make


def test_a_connection_that_is_forgotten_is_closed_and_no_longer_counted(made: Any) -> None:
    one = made()
    with connect(one.address) as client:
        conn, _ = one.listener.accept(30)
        assert isinstance(conn, AcceptedSocket)
        assert one.line[OPEN] == 1
        with pytest.warns(ResourceWarning):
            del conn
        assert client.recv(1) == b""
        assert one.line[OPEN] == 0


def test_load(made: Any) -> None:
    one = made()
    assert one.listener.load == 0
    one.line[OPEN] = 3
    assert one.listener.load == 3
    one.listener.load = 0
    assert (one.listener.load, one.line[LOAD]) == (0, 1)
    one.listener.load = 40
    assert one.listener.load == 40
    one.listener.load = None
    assert one.listener.load == 3
    one.line[OPEN] = 0
    for wrong in (1.5, "1", True):
        with pytest.raises(TypeError):
            one.listener.load = wrong
    with pytest.raises(ValueError):
        one.listener.load = -1


def test_a_listener_is_known_by_every_number_of_its_socket(made: Any) -> None:
    one = made()
    number = os.dup(one.listener.socket.fileno())
    try:
        assert listener_of(number) is one.listener
        with socket.create_server(("127.0.0.1", 0)) as other:
            assert listener_of(other.fileno()) is None
    finally:
        os.close(number)


def test_accept_says_that_orders_are_obeyed_and_when_it_has_drained(made: Any) -> None:
    one = made()
    with pytest.raises(TimeoutError):
        one.listener.accept(0)
    assert one.said() == ["ready", "follows"]
    called: list[str] = []
    one.listener._on_drain(lambda: called.append("first"))
    with connect(one.address), connect(one.address):
        one.channel.send(("drain",))
        until(lambda: one.listener._obey() and one.listener.draining)
        one.listener._on_drain(lambda: called.append("late"))
        assert called == ["first", "late"]
        assert one.said() == []
        conn, _ = one.listener.accept()  # the last look
        conn.close()
        with pytest.raises(fdpass.ClosedError):
            one.listener.accept()
        with pytest.raises(fdpass.ClosedError):
            one.listener.accept()
        assert one.said() == ["drained"]


def test_a_queue_that_is_ones_own_is_emptied_before_it_is_left(made: Any) -> None:
    one = made(sole=True)
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(connect(one.address))
        one.listener.drain()
        taken = [conn for conn, _ in one.listener]
        assert len(taken) == 20
        for conn in taken:
            conn.close()
        assert one.said() == ["ready", "follows", "drained"]


@pytest.mark.parametrize("sole", [False, True])
@pytest.mark.parametrize("which", LOOPS)
def test_a_loop_obeys_the_order_to_drain(which: str, sole: bool, made: Any) -> None:
    one = made(sole=sole)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await asyncio.start_server(talk, sock=one.listener.socket)
        with contextlib.ExitStack() as stack:
            held = stack.enter_context(connect(one.address))
            while not one.line[ACCEPTED]:
                await asyncio.sleep(0)
            assert one.said() == ["ready", "follows"]
            waiting = [stack.enter_context(connect(one.address)) for _ in range(5)]
            one.channel.send(("drain",))
            said: list[str] = []
            while not said:
                await asyncio.sleep(0)
                said += one.said()
            assert said == ["drained"]
            assert one.listener.draining
            # What came before the order may all have been accepted; after it a last look, or all of a queue that is its own.
            accepted = one.line[ACCEPTED]
            assert accepted == 6 if sole else 1 < accepted <= 6
            assert one.line[OPEN] == accepted
            assert one.line[WAITING] == 0
            if sole:  # whoever comes now goes to another's socket
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection(one.address)
            else:
                stack.enter_context(connect(one.address))
            # What was accepted is finished.
            for sock in (held, *waiting[: accepted - 1]):
                sock.setblocking(False)
                sock.sendall(b"hello\n")
                assert await loop.sock_recv(sock, 10) == b"hello\n"
            while one.line[OPEN]:
                await asyncio.sleep(0)
            await server.start_serving()
            assert one.line[ACCEPTED] == accepted
            server.close()
        assert one.said() == []

    run(which, main)


@pytest.mark.parametrize("which", LOOPS)
def test_one_loop_after_the_other_serves_a_listener(which: str, made: Any) -> None:
    one = made()

    async def main(leave_open: bool) -> None:
        duplicate = socket.socket(fileno=os.dup(one.listener.socket.fileno()))
        server = await asyncio.start_server(talk, sock=duplicate)
        accepted = one.line[ACCEPTED]
        with connect(one.address):
            while one.line[ACCEPTED] == accepted:
                await asyncio.sleep(0)
        while one.line[OPEN]:
            await asyncio.sleep(0)
        if leave_open:
            kept.append(duplicate)
        else:
            server.close()

    kept: list[socket.socket] = []
    for leave_open in (False, True, False):
        run(which, partial(main, leave_open))
    for sock in kept:
        sock.close()
    # The listener keeps no loop that was closed.
    assert one.listener._loops == 0
    assert one.listener._draining == []


@pytest.mark.parametrize("which", LOOPS)
def test_a_server_of_a_listener_is_in_its_queue_exclusively_and_waits_for_its_connections(which: str, made: Any) -> None:
    one = made()

    class Hold(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            transport.write(b"x")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for told in (False, True):
            server = await aio.create_server(Hold, one.listener)
            with connect(one.address) as sock:
                sock.setblocking(False)
                assert await loop.sock_recv(sock, 10) == b"x"
                number = one.listener.socket.fileno()
                epoll = loop._fair.fileno() if which == "asyncio" else loop._get_backend_id()  # type: ignore[attr-defined]
                (registered,) = re.findall(rf"tfd: +{number} events: +([0-9a-f]+)", Path(f"/proc/self/fdinfo/{epoll}").read_text())
                assert int(registered, 16) & select.EPOLLEXCLUSIVE
                if told:
                    one.channel.send(("drain",))
                else:
                    server.close()
                waiter = asyncio.ensure_future(server.wait_closed())
                while server.is_serving() or (told and "drained" not in one.said()):
                    await asyncio.sleep(0)
                assert not waiter.done()
            await waiter

    run(which, main)


@pytest.mark.parametrize("which", LOOPS)
def test_a_loop_without_its_server_drains_at_once_and_hears_that_the_supervisor_is_gone(which: str, made: Any) -> None:
    one = made()

    async def main() -> None:
        server = await asyncio.start_server(talk, sock=one.listener.socket)
        server.close()
        await server.wait_closed()
        one.channel.close()
        while not one.listener.draining:
            await asyncio.sleep(0)

    run(which, main)


@pytest.mark.parametrize("which", LOOPS)
def test_draining_under_load_loses_no_connection(which: str) -> None:
    with group(targets.finishes, 3, args=(which,)) as running:
        done: list[bytes] = []
        stop = threading.Event()

        def client() -> None:
            while not stop.is_set():
                with connect(running.endpoint.address) as sock:
                    assert sock.recv(1) in b"012"
                    sock.sendall(b"x")
                    done.append(sock.recv(1))

        threads = [threading.Thread(target=client) for _ in range(6)]
        for thread in threads:
            thread.start()
        until(lambda: len(done) > 100)
        before = {one.pid for one in running.stats()}
        running.roll()
        count = len(done)
        until(lambda: len(done) > count + 50)
        stop.set()
        for thread in threads:
            thread.join()
        assert set(done) == {b"x"}
        assert before.isdisjoint(one.pid for one in running.stats())
