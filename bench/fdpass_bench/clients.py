"""Real client connections: one process, one selectors loop, every connection followed from connect to its end.
Nothing here knows of workers; it knows what they say: a greeting that ends with LAST, or the answer to an HTTP request."""

from __future__ import annotations

import contextlib
import errno
import re
import selectors
import socket
import time
from collections.abc import Callable
from typing import Literal

from fdpass_bench.answer import LAST

Outcome = Literal["ok", "refused", "reset", "timeout"]
OUTCOMES: tuple[Outcome, ...] = ("ok", "refused", "reset", "timeout")


_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,9})[ \t]*\r\n", re.IGNORECASE)
_SAID = re.compile(rb"\Afdpass (\d{1,9}) ")


class Client:
    """One connection. `outcome` is None while it is under way; `index` is the worker that said so, None when none has.

    ok:      the whole answer came; of a kept connection, it was answered and then closed by us.
    refused: no connection came about.
    reset:   it was cut off before the answer was whole, by a reset or by an early end of file.
    timeout: given up at the time limit of the run, or by the kernel while connecting.
    """

    __slots__ = ("_place", "connected", "data", "http", "outcome", "port", "sock", "unsent")

    def __init__(self, sock: socket.socket, request: bytes, place: Callable[[int], int | None]) -> None:
        self.sock = sock
        self._place = place
        self.http = bool(request)
        self.unsent = request
        self.port = 0
        self.data = b""
        self.connected = False
        self.outcome: Outcome | None = None

    @property
    def index(self) -> int | None:
        if self.http:
            found = _SAID.match(self.data.partition(b"\r\n\r\n")[2])
            return self._place(int(found[1])) if found else None
        first, newline, _ = self.data.partition(b"\n")
        return int(first) if newline else None

    @property
    def whole(self) -> bool:
        """Whether all has come that was to come before the end."""
        if not self.http:
            return self.data.endswith(LAST)
        head, empty, body = self.data.partition(b"\r\n\r\n")
        length = _LENGTH.search(head + b"\r\n")
        return bool(empty) and head.startswith(b"HTTP/1.1 200 ") and length is not None and len(body) == int(length[1])


class Clients:
    """Connections to one server. Context manager: closes those that are still open.

    http: each sends a request, which asks to be held for `service` seconds, and reads which worker answers. kept: connections stay open
    once a worker has answered, until close(). answered: told each client that has heard of its worker. place: of the worker that calls
    itself so in an HTTP answer, None where there is no such.
    """

    def __init__(
        self,
        address: tuple[str, int],
        *,
        http: bool = False,
        service: float = 0.0,
        kept: bool = False,
        answered: Callable[[Client], None] = lambda client: None,
        place: Callable[[int], int | None] = lambda said: said,
    ) -> None:
        self.address = address
        self.all: list[Client] = []
        self.under_way = 0
        self.unanswered = 0  # of those under way, these have not heard of a worker
        self._kept, self._answered, self._place = kept, answered, place
        self._request = b""
        if http:
            way = "keep-alive" if kept else "close"
            text = f"GET / HTTP/1.1\r\nHost: {address[0]}\r\nFdpass-Service: {round(service * 1e9)}\r\nConnection: {way}\r\n\r\n"
            self._request = text.encode()
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for client in self.all:
            client.sock.close()
        self._selector.close()

    def connect(self) -> Client:
        """Starts one connection. Raises OSError where this machine cannot make one (no descriptor, no port left)."""
        client = Client(socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK), self._request, self._place)
        self.all.append(client)
        self.under_way += 1
        self.unanswered += 1
        if self._request and hasattr(socket, "TCP_QUICKACK"):
            # The request itself ends the handshake, so that it is there when the worker accepts. In a packet of its own it comes
            # before or after a worker has looked, as the scheduler likes, and some connections would cost a second wake-up.
            client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
        error = client.sock.connect_ex(self.address)
        if error == errno.ECONNREFUSED:
            self._end(client, "refused")
        elif error not in (0, errno.EINPROGRESS):
            self._end(client, "refused")
            raise OSError(error, f"connecting to {self.address[0]}:{self.address[1]}: {errno.errorcode.get(error, error)}")
        else:
            client.port = client.sock.getsockname()[1]
            self._selector.register(client.sock, selectors.EVENT_WRITE, client)
            # On loopback it is connected by now.
            self._send(client)
        return client

    def close(self, client: Client) -> None:
        """Ends a kept connection that a worker has answered."""
        self._end(client, "ok")

    def pump(self, timeout: float) -> None:
        """Waits at most `timeout` seconds for something to happen, then deals with all that has."""
        for key, _ in self._selector.select(timeout):
            client: Client = key.data
            if client.connected:
                self._read(client)
            else:
                self._connected(client)

    def finish(self, client: Client, deadline: float) -> None:
        """Pumps until this connection has ended; at `deadline` (monotonic seconds) it is given up."""
        while client.outcome is None:
            left = deadline - time.monotonic()
            if left <= 0:
                self._end(client, "timeout")
            else:
                self.pump(left)

    def give_up(self) -> None:
        """Every connection still under way has timed out."""
        for client in self.all:
            if client.outcome is None:
                self._end(client, "timeout")

    def _connected(self, client: Client) -> None:
        error = client.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error == 0:
            client.connected = True
            self._selector.modify(client.sock, selectors.EVENT_READ, client)
            self._send(client)
        elif error == errno.ECONNREFUSED:
            self._end(client, "refused")
        elif error == errno.ETIMEDOUT:
            self._end(client, "timeout")
        else:
            self._end(client, "reset")

    def _send(self, client: Client) -> None:
        """Sends what of the request is unsent, as far as that goes now."""
        if not client.unsent:
            return
        try:
            client.unsent = client.unsent[client.sock.send(client.unsent) :]
        except OSError as error:
            # The kernel says it once: nobody else will hear of it.
            if error.errno not in (errno.EAGAIN, errno.ENOTCONN):
                self._end(client, "refused" if error.errno == errno.ECONNREFUSED else "reset")

    def _read(self, client: Client) -> None:
        try:
            data = client.sock.recv(4096)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(client, "timeout" if error.errno == errno.ETIMEDOUT else "reset")
            return
        first = client.index is None
        client.data += data
        if first and client.index is not None:
            self.unanswered -= 1
            self._answered(client)
        if not data:
            self._end(client, "ok" if client.whole and not self._kept else "reset")

    def _end(self, client: Client, outcome: Outcome) -> None:
        client.outcome = outcome
        self.under_way -= 1
        self.unanswered -= client.index is None
        with contextlib.suppress(KeyError):
            self._selector.unregister(client.sock)
        client.sock.close()
