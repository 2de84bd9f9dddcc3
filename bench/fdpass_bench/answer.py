"""What runs inside the workers. It imports fdpass and little else, because every start of a worker pays for it."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fdpass import Listener

LAST = b"done\n"

REQUEST_LIMIT = 65536  # bytes of headers, or of a body, that are read
REQUEST_SECONDS = 2.0  # a client that connects and says nothing holds its worker no longer than this


def speak_first(listener: Listener, service: float) -> None:
    """Greets each connection with the worker's index, holds it for `service` seconds, says LAST and closes.

    The client sends nothing: so closing never resets, and a client that was greeted had been accepted.
    """
    greeting = b"%d\n" % listener.index
    for conn, _ in listener:
        # A client that has gone away is its own affair.
        with conn, contextlib.suppress(ConnectionError):
            conn.sendall(greeting)
            if service > 0:
                time.sleep(service)
            conn.sendall(LAST)


def http(listener: Listener) -> None:
    """Answers each HTTP request with the worker's index and a newline; one request per connection."""
    body = b"%d\n" % listener.index
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
    for conn, _ in listener:
        with conn, contextlib.suppress(OSError):
            conn.settimeout(REQUEST_SECONDS)
            method = _read_request(conn)
            if method:
                conn.sendall(head if method == b"HEAD" else head + body)


def _read_request(conn: socket.socket) -> bytes:
    """The method of a request that was read whole (closing with bytes unread would reset the connection); b"" when none came."""
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = conn.recv(REQUEST_LIMIT)
        if not chunk or len(data) > REQUEST_LIMIT:
            return b""
        data += chunk
    head, _, rest = data.partition(b"\r\n\r\n")
    length = 0
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length" and value.strip().isdigit():
            length = min(int(value), REQUEST_LIMIT)
    missing = length - len(rest)
    while missing > 0:
        chunk = conn.recv(missing)
        if not chunk:
            return b""
        missing -= len(chunk)
    return head.split(b" ", 1)[0]
