"""What runs inside the workers. It imports fdpass and little else, because every start of a worker pays for it."""

from __future__ import annotations

import contextlib
import errno
import re
import select
import socket
import threading
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


def hold(listener: Listener) -> None:
    """Greets each connection with the worker's index and keeps it until the client closes it, any number at a time."""
    greeting = b"%d\n" % listener.index
    held: dict[int, socket.socket] = {}
    ends = select.epoll()

    def close_those_that_end() -> None:
        while True:
            for fd, _ in ends.poll():
                # Out of the set before its number may be another connection's.
                ends.unregister(fd)
                held.pop(fd).close()

    threading.Thread(target=close_those_that_end, daemon=True).start()
    for conn, _ in listener:
        try:
            conn.sendall(greeting)
        except ConnectionError:
            conn.close()
            continue
        held[conn.fileno()] = conn
        ends.register(conn, select.EPOLLIN | select.EPOLLRDHUP)


_SERVICE = re.compile(rb"\r\nfdpass-service:[ \t]*(\d{1,18})[ \t]*\r\n", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection:[ \t]*close[ \t]*\r\n", re.IGNORECASE)


def timed(listener: Listener, work: str) -> None:
    """Takes one connection at a time, holds its HTTP request for the time in its Fdpass-Service header (nanoseconds), and answers

        fdpass WORKER ACCEPTED STARTED FREE

    : the worker's index, then CLOCK_MONOTONIC nanoseconds: when the connection was taken, when its service began, and since when the
    worker had been waiting for it. `work` is "sleep" or "burn" (processor time).
    """
    # Only these workers need it, and no other starts slower for it.
    from fdpass_bench._loadgen import lib

    def hold(began: int, service: int) -> None:
        if service and work == "burn":
            lib.flg_burn_cpu(service)
        elif service:
            while lib.flg_sleep_until(began + service) == -errno.EINTR:
                pass

    # Else the kernel lets each sleep of this thread end up to 50 us late, which would occupy the worker and so raise the load.
    lib.flg_timer_slack(1)
    index = listener.index
    free = time.monotonic_ns()
    for conn, _ in listener:
        accepted = time.monotonic_ns()
        # A client that has gone away, or says nothing, is its own affair.
        with conn, contextlib.suppress(OSError):
            conn.settimeout(REQUEST_SECONDS)
            request = _read_head(conn)
            if request:
                started = time.monotonic_ns()
                # A deadline counted from the accept: what reading the request took does not prolong the service.
                hold(accepted, service_of(request))
                conn.sendall(answer_to(index, accepted, started, free, close=True))
        free = time.monotonic_ns()


def service_of(request: bytes) -> int:
    """The nanoseconds that a request wants to be held for."""
    found = _SERVICE.search(request)
    return int(found[1]) if found else 0


def closes(request: bytes) -> bool:
    """Whether a request is its connection's last."""
    return _CLOSE.search(request) is not None


def answer_to(index: int, accepted: int, started: int, free: int, close: bool) -> bytes:
    """A whole answer, as timed() has it."""
    body = b"fdpass %d %d %d %d\n" % (index, accepted, started, free)
    way = b"close" if close else b"keep-alive"
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: %s\r\n\r\n%s" % (len(body), way, body)


def _read_head(conn: socket.socket) -> bytes:
    """The head of a request without a body, with its empty line; b"" when the client closed or sent too much."""
    data = conn.recv(REQUEST_LIMIT)
    while data and not data.endswith(b"\r\n\r\n"):
        chunk = conn.recv(REQUEST_LIMIT)
        if not chunk or len(data) > REQUEST_LIMIT:
            return b""
        data += chunk
    return data


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
