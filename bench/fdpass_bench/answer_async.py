"""What runs inside the workers on an event loop: a plain asyncio server, or uvicorn, on the group's listening socket.
Whose loop it is comes from the command line; nothing here knows which is fair."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib
import signal
import time
from typing import TYPE_CHECKING, Any, Literal, cast

from fdpass_bench.answer import LAST, answer_to, closes, service_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from fdpass import Listener

#: greet: the worker speaks first, holds the connection for a while, says LAST and closes.
#: timed: it answers HTTP requests, each held for the time in its header.
#: hold: it greets, and keeps the connection until the client closes it.
Manner = Literal["greet", "timed", "hold"]

_KEPT = 3600  # seconds: nobody but the client closes a kept connection


def server(listener: Listener, loop: str, manner: Manner, service: float, work: str) -> None:
    """An asyncio server on the loop of the factory `loop` (module:name), one request at a time: its handlers block the loop on purpose."""
    with asyncio.Runner(loop_factory=_factory(loop)) as runner:
        runner.run(_serve(listener, lambda: _PROTOCOLS[manner](listener.index, service, work)))


def kept(listener: Listener, work: str) -> None:
    """Answers HTTP requests on connections that stay open, on fdpass's event loop, under every strategy: while a worker serves one request
    it neither reads nor accepts, so the kernel wakes another for the next connection."""
    from fdpass import aio

    with asyncio.Runner(loop_factory=aio.new_event_loop) as runner:
        runner.run(aio.serve(lambda: _Timed(listener.index, 0.0, work), listener))


def uvicorn(listener: Listener, loop: str, work: str) -> None:
    """uvicorn on the loop of that factory; its application blocks the loop for as long as each request says."""
    program = importlib.import_module("uvicorn")
    config = program.Config(
        _application(listener.index, work), log_level="critical", access_log=False, lifespan="off", timeout_keep_alive=_KEPT
    )
    with asyncio.Runner(loop_factory=_factory(loop)) as runner:
        runner.run(program.Server(config).serve(sockets=[listener.socket]))


def _factory(text: str) -> Callable[[], asyncio.AbstractEventLoop]:
    module, _, name = text.partition(":")
    return cast("Callable[[], asyncio.AbstractEventLoop]", getattr(importlib.import_module(module), name))


async def _serve(listener: Listener, protocol: Callable[[], _Connection]) -> None:
    """Until SIGTERM; then what was accepted ends first, as a good server does it."""
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, told.set)
    serving = await loop.create_server(protocol, sock=listener.socket)
    await told.wait()
    serving.close()
    # A connection that was accepted in this very turn of the loop has no protocol yet.
    for _ in range(3):
        await asyncio.sleep(0)
    while _Connection.alive:
        _Connection.gone.clear()
        await _Connection.gone.wait()


def hold_for(began: int, service: int, work: str) -> None:
    """Occupies this thread until `began` plus `service` (CLOCK_MONOTONIC nanoseconds), or for so much processor time ("burn")."""
    from fdpass_bench._loadgen import lib

    if service and work == "burn":
        lib.flg_burn_cpu(service)
    elif service:
        lib.flg_timer_slack(1)
        while lib.flg_sleep_until(began + service) == -errno.EINTR:
            pass


class _Connection(asyncio.Protocol):
    """One connection of this process."""

    alive = 0
    gone = asyncio.Event()

    def __init__(self, index: int, service: float, work: str) -> None:
        self.index, self.service, self.work = index, round(service * 1e9), work
        self.data = b""
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        _Connection.alive += 1
        self.greet()

    def connection_lost(self, exc: Exception | None) -> None:
        _Connection.alive -= 1
        _Connection.gone.set()

    def greet(self) -> None:
        """What this one says first."""


class _Greeting(_Connection):
    def greet(self) -> None:
        began = time.monotonic_ns()
        self.transport.write(b"%d\n" % self.index)
        hold_for(began, self.service, self.work)
        self.transport.write(LAST)
        self.transport.close()


class _Holding(_Connection):
    def greet(self) -> None:
        self.transport.write(b"%d\n" % self.index)


class _Timed(_Connection):
    def data_received(self, data: bytes) -> None:
        self.data += data
        if not self.data.endswith(b"\r\n\r\n"):
            return
        request, self.data = self.data, b""
        began = time.monotonic_ns()
        hold_for(began, service_of(request), self.work)
        close = closes(request)
        # 0: since when this worker was idle is not known, as its loop takes connections ahead of their service.
        self.transport.write(answer_to(self.index, began, began, 0, close))
        if close:
            self.transport.close()


_PROTOCOLS: dict[Manner, type[_Connection]] = {"greet": _Greeting, "timed": _Timed, "hold": _Holding}


def _application(index: int, work: str) -> Callable[..., Any]:
    async def application(scope: dict[str, Any], receive: Callable[[], Any], send: Callable[[dict[str, Any]], Any]) -> None:
        began = time.monotonic_ns()
        service = 0
        with contextlib.suppress(KeyError, ValueError):
            service = int(dict(scope["headers"])[b"fdpass-service"])
        hold_for(began, service, work)
        body = b"fdpass %d %d %d 0\n" % (index, began, began)
        headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return application
