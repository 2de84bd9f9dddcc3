"""What the workers of the dispatch tests run: importable by name, as spawn wants it."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import ssl
import threading

import fdpass
from fdpass._board import ACCEPTED, ASKED, LOAD


def who(listener: fdpass.Listener) -> bytes:
    return f"{listener.index} {os.getpid()}".encode()


def answer(listener: fdpass.Listener) -> None:
    """Says who it is, then closes."""
    for conn, _ in listener:
        with conn:
            conn.sendall(who(listener))


def echo(listener: fdpass.Listener) -> None:
    """One thread for each connection: says who it is, then echoes until the client closes."""

    def serve(conn: socket.socket) -> None:
        with conn:
            conn.sendall(who(listener))
            while data := conn.recv(100):
                conn.sendall(data)

    threads = []
    for conn, _ in listener:
        threads.append(threading.Thread(target=serve, args=(conn,)))
        threads[-1].start()
    for thread in threads:
        thread.join()


def busy(listener: fdpass.Listener) -> None:
    """Says who it is and is busy with that connection until the client closes it."""
    for conn, _ in listener:
        with conn:
            conn.sendall(who(listener))
            conn.recv(1)


def addresses(listener: fdpass.Listener) -> None:
    """Sends the address that accept() gave."""
    for conn, address in listener:
        with conn:
            blocks, inherits = conn.getblocking(), conn.get_inheritable()
            conn.sendall(repr((address, conn.family.name, blocks, inherits)).encode())


def socket_raises(listener: fdpass.Listener) -> None:
    try:
        listener.socket  # noqa: B018  (the look itself is what is tested)
    except RuntimeError as error:
        said = str(error)
    for conn, _ in listener:
        with conn:
            conn.sendall(said.encode())


def loaded(listener: fdpass.Listener) -> None:
    """Worker 0 says that it has a load of 1000."""
    if listener.index == 0:
        listener._line[LOAD] = 1001
    answer(listener)


def times_out(listener: fdpass.Listener) -> None:
    """Accepts with a time limit that never suffices, once, then as usual."""
    try:
        listener.accept(timeout=0)
    except TimeoutError:
        pass
    answer(listener)


def threads(listener: fdpass.Listener, count: int) -> None:
    """Several threads accept from one listener and hold what they have."""
    barrier = threading.Barrier(count)

    def serve() -> None:
        for conn, _ in listener:
            with conn:
                # Only when all threads have a connection does any go on.
                barrier.wait()
                conn.sendall(who(listener))

    made = [threading.Thread(target=serve) for _ in range(count)]
    for thread in made:
        thread.start()
    for thread in made:
        thread.join()


def misbehaves(listener: fdpass.Listener, kind: str) -> None:
    """Worker 0 does something that no worker should; the others answer."""
    if listener.index:
        answer(listener)
        return
    listener.ready()
    sock, line = listener._sock, listener._line
    if kind == "closes":
        listener._ask()  # type: ignore[attr-defined]  # a DispatchListener's
        os.close(sock.detach())
        os.close(listener._asking._spare[0]) if listener._asking._spare[0] >= 0 else None  # type: ignore[attr-defined]  # likewise
    elif kind == "shuts":
        listener._ask()  # type: ignore[attr-defined]  # likewise
        sock.shutdown(socket.SHUT_RDWR)
    elif kind == "greedy":
        line[ASKED] = 1 << 40
    elif kind == "liar":
        line[ACCEPTED] = (1 << 63) - 1
        line[ASKED] = 1 << 40
    elif kind == "negative":
        line[ACCEPTED] = -(1 << 63)
        line[ASKED] = -(1 << 63)
        sock.send(b"x")
    elif kind == "floods":
        while True:
            sock.send(b"x" * 1000)
    elif kind == "rights":
        for _ in range(100):
            socket.send_fds(sock, [b"x"], [0, 1, 2])
    elif kind == "urgent":
        sock.send(b"x", socket.MSG_OOB)
    else:
        raise AssertionError(kind)
    threading.Event().wait()


def exhausted(listener: fdpass.Listener) -> None:
    """Worker 0 has no free descriptor until its first client sends a byte."""
    if listener.index:
        answer(listener)
        return
    conn, _ = listener.accept()
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    eaten = []
    try:
        while True:
            eaten.append(os.dup(0))
    except OSError:
        pass

    def free() -> None:
        conn.recv(1)
        while eaten:
            os.close(eaten.pop())
        conn.close()

    threading.Thread(target=free).start()
    # The one that is held free is taken too, as another thread may.
    listener._asking.close()  # type: ignore[attr-defined]  # a DispatchListener's
    eaten.append(os.dup(0))
    conn.sendall(b"full")
    answer(listener)


def forks(listener: fdpass.Listener) -> None:
    """A forked child of a worker gets nothing."""
    for conn, _ in listener:
        with conn:
            pid = os.fork()
            if pid == 0:
                try:
                    listener.accept(timeout=10)
                except fdpass.ClosedError:
                    os._exit(7)
                os._exit(0)
            conn.sendall(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())


# -- asyncio -----------------------------------------------------------------------------------------------------------------


class Echo(asyncio.Protocol):
    """Says who it is, then echoes; ends when the client sends "end"."""

    def __init__(self, listener: fdpass.Listener) -> None:
        self.listener = listener

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(who(self.listener) + b"\n")

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)
        if data == b"end":
            self.transport.close()


def run(main: object, loop: str) -> None:
    factory = None
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    elif loop == "fair":
        factory = fdpass.aio.new_event_loop  # type: ignore[attr-defined]  # where it exists
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main)  # type: ignore[arg-type]  # a coroutine


def serve(listener: fdpass.Listener, loop: str = "stock", certificate: str = "") -> None:
    """fdpass.aio.serve() with an echo."""
    context = None
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
    run(fdpass.aio.serve(lambda: Echo(listener), listener, ssl=context), loop)


def serve_with_failures(listener: fdpass.Listener, log: str) -> None:
    """Every third protocol cannot be made; what the loop is told goes into a file."""
    count = 0

    def make() -> Echo:
        nonlocal count
        count += 1
        if count % 3 == 0:
            raise RuntimeError("deliberate")
        return Echo(listener)

    async def main() -> None:
        def note(loop: object, context: dict[str, object]) -> None:
            with open(log, "a") as file:
                file.write(f"{context['message']}: {context['exception']}\n")

        asyncio.get_running_loop().set_exception_handler(note)
        await fdpass.aio.serve(make, listener)

    asyncio.run(main())


def serve_cancelled(listener: fdpass.Listener) -> None:
    """Each time serve() is cancelled by the word of a client, it begins again; with "stop" it does not."""

    async def main() -> None:
        words: list[bytes] = []
        while b"stop" not in words:
            task: asyncio.Task[None]

            class Word(Echo):
                def data_received(self, data: bytes) -> None:
                    words.append(data)
                    task.cancel()
                    self.transport.write(b"cancelled")
                    self.transport.close()

            task = asyncio.ensure_future(fdpass.aio.serve(lambda: Word(listener), listener))
            try:
                await task
            except asyncio.CancelledError:
                pass

    asyncio.run(main())


def serve_exhausted(listener: fdpass.Listener) -> None:
    """Worker 0 has no free descriptor from its first connection on, until that sends a byte."""

    class Full(Echo):
        eaten: list[int] = []  # noqa: RUF012  (one for all, on purpose)
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            if listener.index == 0 and not self.eaten:
                resource.setrlimit(resource.RLIMIT_NOFILE, (64, self.limit[1]))
                try:
                    while True:
                        self.eaten.append(os.dup(0))
                except OSError:
                    pass

        def data_received(self, data: bytes) -> None:
            if data == b"free":
                resource.setrlimit(resource.RLIMIT_NOFILE, self.limit)
                while self.eaten:
                    os.close(self.eaten.pop())
            super().data_received(data)

    asyncio.run(fdpass.aio.serve(lambda: Full(listener), listener))


def server_object(listener: fdpass.Listener) -> None:
    """Looks at what create_server() returns, and reports what is wrong to the first client."""

    async def main() -> None:
        wrong: list[str] = []

        def check(good: bool, what: str) -> None:
            if not good:
                wrong.append(what)

        class Report(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                assert isinstance(transport, asyncio.Transport)
                transport.write((", ".join(wrong) or "nothing").encode())
                transport.close()

        try:
            await fdpass.aio.create_server(Report, listener, ssl_handshake_timeout=1)
        except ValueError:
            pass
        else:
            check(False, "a handshake timeout without TLS")
        first = await fdpass.aio.create_server(Report, listener)
        check(first.is_serving(), "not serving")
        check(len(first.sockets) == (listener.strategy != "dispatch"), "sockets")
        check(first.get_loop() is asyncio.get_running_loop(), "loop")
        first.close()
        first.close()
        await first.wait_closed()
        check(not first.is_serving(), "serving after close")
        check(first.sockets == (), "sockets after close")
        try:
            await first.start_serving()
        except RuntimeError:
            pass
        else:
            check(False, "serving again")
        async with await fdpass.aio.create_server(Report, listener) as second:
            await second.serve_forever()

    asyncio.run(main())


def computes(listener: fdpass.Listener, marker: str) -> None:
    """Worker 0 computes in its first connection's callback until the marker exists, and asks for nothing meanwhile."""

    class Computes(Echo):
        def data_received(self, data: bytes) -> None:
            if listener.index == 0:
                while not os.path.exists(marker):
                    pass
            super().data_received(data)

    asyncio.run(fdpass.aio.serve(lambda: Computes(listener), listener))


def uvicorn(listener: fdpass.Listener) -> None:
    """uvicorn as the example has it."""
    import importlib.util
    from pathlib import Path

    path = Path(__file__).parent.parent / "examples" / "uvicorn_workers.py"
    spec = importlib.util.spec_from_file_location("uvicorn_workers", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.serve(listener)


def ignores_sigterm(listener: fdpass.Listener) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    answer(listener)
