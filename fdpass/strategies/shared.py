"""shared: one listening socket, passed to every worker. The kernel wakes one waiter; a busy worker is not waiting, so none is stranded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fdpass.endpoint import queued
from fdpass.listener import Listener, ListenSocket
from fdpass.strategies.contract import Strategy

if TYPE_CHECKING:
    from fdpass.endpoint import Endpoint


class Shared(Strategy):
    """order: "rotate" puts a worker at the end of the queue after each connection, "first" leaves it where it registered."""

    name, held, passes = "shared", False, True

    def __init__(self, order: str) -> None:
        self.order = order

    def bind(self, endpoint: Endpoint, workers: int, backlog: int) -> None:
        """The endpoint's own socket is all there is. O_NONBLOCK is set here, once, for every holder."""
        self._endpoint, self._backlog = endpoint, backlog
        endpoint.socket.setblocking(False)

    def listen(self) -> None:
        """Clients wait from now on, they are not refused."""
        self._endpoint.socket.listen(self._backlog)

    def share(self, index: int, line: int) -> dict[str, Any]:
        """The same socket for each."""
        return {"strategy": self.name, "index": index, "socket": self._endpoint.socket, "backlog": self._backlog, "order": self.order}

    def queue(self, index: int) -> tuple[int, int | None] | None:
        """Of the one socket, whoever asks."""
        return queued(self._endpoint)

    @staticmethod
    def open(share: dict[str, Any], **inside: Any) -> Listener:
        """A listener that waits exclusively, in an epoll of its own."""
        sock = ListenSocket(share["socket"], share["backlog"])
        return Listener(sock, share["index"], "shared", exclusive=True, rotate=share["order"] == "rotate", **inside)
