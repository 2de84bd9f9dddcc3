"""The application that gunicorn, granian (WSGI) and uvicorn (ASGI) serve: it holds each request as long as its header says.
It runs inside the peer's workers and imports nothing but the standard library.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

_BURN = os.environ.get("FDPASS_PEER_WORK") == "burn"


def wsgi() -> Callable[[dict[str, Any], Callable[..., object]], list[bytes]]:
    """Makes the WSGI application; only workers call it, and right before they serve."""
    _ready()

    def application(environ: dict[str, Any], start_response: Callable[..., object]) -> list[bytes]:
        body = _hold(environ.get("HTTP_FDPASS_SERVICE", "0"))
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
        return [body]

    return application


async def asgi(
    scope: dict[str, Any], receive: Callable[[], Awaitable[dict[str, Any]]], send: Callable[[dict[str, Any]], Awaitable[None]]
) -> None:
    if scope["type"] == "lifespan":
        while True:
            event = (await receive())["type"]
            if event == "lifespan.startup":
                _ready()
            await send({"type": f"{event}.complete"})
            if event == "lifespan.shutdown":
                return
    # The event loop waits on purpose: a worker does one thing at a time.
    body = _hold(dict(scope["headers"]).get(b"fdpass-service", b"0"))
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _ready() -> None:
    """Tells whoever started the server that this process serves from now on."""
    Path(os.environ["FDPASS_PEER_READY"], str(os.getpid())).touch()


def _hold(service: str | bytes) -> bytes:
    """Keeps this thread for `service` nanoseconds, which may be a digit string only; the body of the answer."""
    began = time.monotonic_ns()
    if _BURN:
        end = time.thread_time_ns() + int(service)
        while time.thread_time_ns() < end:
            pass
    else:
        while (left := began + int(service) - time.monotonic_ns()) > 0:
            time.sleep(left / 1e9)
    return b"fdpass %d %d %d 0\n" % (os.getpid(), began, began)
