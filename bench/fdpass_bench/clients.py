"""Real client connections: one process, one selectors loop, every connection followed from connect to its end.
Nothing here knows of workers; it knows the protocol of answer.py only: the server speaks first and ends with LAST."""

from __future__ import annotations

import contextlib
import errno
import selectors
import socket
import time
from typing import Literal

from fdpass_bench.answer import LAST

Outcome = Literal["ok", "refused", "reset", "timeout"]
OUTCOMES: tuple[Outcome, ...] = ("ok", "refused", "reset", "timeout")


class Client:
    """One connection. `outcome` is None while it is under way; `index` is the worker that greeted it, None when none has.

    ok:      the whole answer came.
    refused: no connection came about.
    reset:   it was cut off before the answer was whole, by a reset or by an early end of file.
    timeout: given up at the time limit of the run, or by the kernel while connecting.
    """

    __slots__ = ("connected", "data", "outcome", "port", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.port = 0
        self.data = b""
        self.connected = False
        self.outcome: Outcome | None = None

    @property
    def index(self) -> int | None:
        first, newline, _ = self.data.partition(b"\n")
        return int(first) if newline else None


class Clients:
    """Connections to one server. Context manager: closes those that are still open."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address
        self.all: list[Client] = []
        self.under_way = 0
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for client in self.all:
            client.sock.close()
        self._selector.close()

    def connect(self) -> Client:
        """Starts one connection. Raises OSError where this machine cannot make one (no descriptor, no port left)."""
        client = Client(socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
        self.all.append(client)
        self.under_way += 1
        error = client.sock.connect_ex(self.address)
        if error == errno.ECONNREFUSED:
            self._end(client, "refused")
        elif error not in (0, errno.EINPROGRESS):
            self._end(client, "refused")
            raise OSError(error, f"connecting to {self.address[0]}:{self.address[1]}: {errno.errorcode.get(error, error)}")
        else:
            client.port = client.sock.getsockname()[1]
            self._selector.register(client.sock, selectors.EVENT_WRITE, client)
        return client

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
        elif error == errno.ECONNREFUSED:
            self._end(client, "refused")
        elif error == errno.ETIMEDOUT:
            self._end(client, "timeout")
        else:
            self._end(client, "reset")

    def _read(self, client: Client) -> None:
        try:
            data = client.sock.recv(4096)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(client, "timeout" if error.errno == errno.ETIMEDOUT else "reset")
            return
        client.data += data
        if not data:
            self._end(client, "ok" if client.data.endswith(LAST) else "reset")

    def _end(self, client: Client, outcome: Outcome) -> None:
        client.outcome = outcome
        self.under_way -= 1
        with contextlib.suppress(KeyError):
            self._selector.unregister(client.sock)
        client.sock.close()
