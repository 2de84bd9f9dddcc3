"""What the workers of the event loop tests run: importable by name, as spawn wants it."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import fdpass
from fdpass import aio

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": aio.new_event_loop, "uvloop": aio.new_uvloop_event_loop}


def run(which: str, main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=LOOPS[which]) as runner:
        runner.run(main)


async def app(scope: Any, receive: Any, send: Any) -> None:
    """ASGI: answers with its process id."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    body = str(os.getpid()).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})


def hold(listener: fdpass.Listener, which: str, certificate: str = "") -> None:
    """Says which worker it is and keeps the connection until the client closes it."""
    context = None
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(b"%d" % listener.index)
            await reader.read()
        except ConnectionError:
            pass
        writer.close()

    async def main() -> None:
        async with await asyncio.start_server(talk, sock=listener.socket, ssl=context) as server:
            await server.serve_forever()

    run(which, main())


def hold_in_threads(listener: fdpass.Listener) -> None:
    """The same with accept()."""

    def keep(conn: socket.socket) -> None:
        with conn:
            conn.sendall(b"%d" % listener.index)
            conn.recv(1)

    for conn, _ in listener:
        threading.Thread(target=keep, args=(conn,), daemon=True).start()


def sock_accept(listener: fdpass.Listener, which: str) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        sock = listener.socket
        while True:
            conn, _ = await loop.sock_accept(sock)
            with conn:
                await loop.sock_sendall(conn, b"%d" % listener.index)

    run(which, main())


def hypercorn(listener: fdpass.Listener, which: str) -> None:
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    config = Config()
    # A duplicate: hypercorn closes what it is given.
    config.bind = [f"fd://{os.dup(listener.socket.fileno())}"]
    config.errorlog = None

    async def main() -> None:
        await serve(app, config, shutdown_trigger=lambda: asyncio.Future())  # type: ignore[arg-type]  # an ASGI app of the plainest kind

    run(which, main())


def aiohttp(listener: fdpass.Listener, which: str) -> None:
    from aiohttp import web

    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=str(os.getpid()))

    async def main() -> None:
        application = web.Application()
        application.router.add_get("/", answer)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.SockSite(runner, listener.socket).start()
        await asyncio.Future()

    run(which, main())


def exhausted(listener: fdpass.Listener, which: str) -> None:
    """hold(); the word "f" takes every free descriptor, "x" gives them back, "?" asks for failed accepts and logged errors."""
    failures, logged, eaten = 0, 0, []
    plain = socket.socket.accept

    def accept(sock: socket.socket) -> Any:
        nonlocal failures
        try:
            return plain(sock)
        except BlockingIOError:
            raise
        except OSError:
            failures += 1
            raise

    socket.socket.accept = accept  # type: ignore[method-assign]  # wrapped, to count the real one

    def log(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal logged
        logged += 1

    def eat() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        try:
            while True:
                eaten.append(os.dup(0))
        except OSError:
            pass

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"%d" % listener.index)
        while word := await reader.read(1):
            if word == b"f":
                eat()
            elif word == b"x":
                while eaten:
                    os.close(eaten.pop())
            writer.write(b"%d %d\n" % (failures, logged))
        writer.close()

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(log)
        async with await asyncio.start_server(talk, sock=listener.socket) as server:
            await server.serve_forever()

    run(which, main())


def finishes(listener: fdpass.Listener, which: str) -> None:
    """Serves until it is told to drain, and then until its connections have ended."""
    talking: set[asyncio.Task[Any]] = set()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talking.add(task)
        writer.write(b"%d" % listener.index)
        writer.write(await reader.readexactly(1))
        await writer.drain()
        writer.close()
        talking.discard(task)

    async def main() -> None:
        loop, told = asyncio.get_running_loop(), asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, lambda: None)
        await asyncio.start_server(talk, sock=listener.socket)
        listener._on_drain(lambda: loop.call_soon_threadsafe(told.set))
        await told.wait()
        while listener._line[0] or talking:
            await asyncio.sleep(0.005)

    run(which, main())
