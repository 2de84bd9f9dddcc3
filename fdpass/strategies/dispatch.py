"""dispatch: one listening socket, in the supervisor. A C thread there accepts and passes each connection to a worker that asks for one."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fdpass import _syscall
from fdpass.dispatched import DispatchListener
from fdpass.endpoint import queued
from fdpass.fds import OwnedFd
from fdpass.strategies.contract import Strategy

if TYPE_CHECKING:
    from fdpass.endpoint import Endpoint
    from fdpass.listener import Listener

ORDERS = ("round-robin", "least-loaded")


class Dispatch(Strategy):
    """order: who of those that ask gets the next one. credits: how many a worker may have that it has not received."""

    name, held, passes = "dispatch", False, True

    def __init__(self, order: str, credits: int) -> None:
        self.order, self.credits = order, credits
        self._dispatcher: _syscall.Dispatcher | None = None
        self._ends: dict[int, OwnedFd] = {}  # by line, until the worker has been started

    def bind(self, endpoint: Endpoint, workers: int, backlog: int) -> None:
        """The endpoint's own socket is all there is. O_NONBLOCK is set here: its thread waits for all sockets at once."""
        self._endpoint, self._backlog = endpoint, backlog
        endpoint.socket.setblocking(False)

    def begin(self, board: int, lines: int) -> None:
        """Notes the board, which the thread is to watch."""
        self._board, self._lines = board, lines

    def listen(self) -> None:
        """Clients wait from now on, and the thread runs; until a worker asks, they wait in the kernel's queue."""
        sock = self._endpoint.socket
        sock.listen(self._backlog)
        self._dispatcher = _syscall.Dispatcher(sock.fileno(), self._board, self._lines, self.order == "least-loaded", self.credits)

    def share(self, index: int, line: int) -> dict[str, Any]:
        """The worker's end of a socket pair, and what kind of connections come through it."""
        assert self._dispatcher is not None
        end = self._ends[line] = OwnedFd(self._dispatcher.attach(line))
        sock = self._endpoint.socket
        kind = int(sock.family), int(sock.type), sock.proto
        return {"strategy": self.name, "index": index, "end": end, "kind": kind, "credits": self.credits, "order": self.order}

    def launched(self, line: int, pidfd: OwnedFd | None) -> None:
        """From now on the thread itself sees that the process ends; without a descriptor to spare, ended() has to tell it."""
        self._close_end(line)
        if self._dispatcher is not None and pidfd is not None:
            with suppress(OSError):
                self._dispatcher.launched(line, pidfd.fileno())

    def retire(self, line: int) -> None:
        """No more connections go there; what the worker has not received goes to others."""
        if self._dispatcher is not None:
            self._dispatcher.retire(line)

    def ended(self, line: int) -> None:
        """The line is free for another worker."""
        self._close_end(line)
        if self._dispatcher is not None:
            self._dispatcher.ended(line)

    def queue(self, index: int) -> tuple[int, int | None] | None:
        """Of the one socket, from which every worker's connections come."""
        return queued(self._endpoint)

    def counts(self) -> dict[str, int]:
        """What the thread has done: pending now; given, recovered, rescued, lost, refused so far."""
        return self._dispatcher.count() if self._dispatcher is not None else {}

    def close(self) -> None:
        """Ends the thread. What no worker has received is closed, as is what waits in a listening socket's queue."""
        for line in list(self._ends):
            self._close_end(line)
        dispatcher, self._dispatcher = self._dispatcher, None
        if dispatcher is not None:
            dispatcher.stop()

    forget = close  # in a forked child there is no thread, and C has closed its descriptors

    def _close_end(self, line: int) -> None:
        end = self._ends.pop(line, None)
        if end is not None:
            end.close()

    @staticmethod
    def open(share: dict[str, Any], line: Any, lines: Any, **inside: Any) -> Listener:
        """A listener that asks the supervisor for connections. share["common"] is the group's own line of the board."""
        end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=share["end"].release())
        return DispatchListener(end, share["index"], share["credits"], share["kind"], line, share["common"], **inside)
