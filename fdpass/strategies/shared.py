"""shared: one listening socket, passed to every worker. The kernel wakes one waiter; a busy worker is not waiting, so none is stranded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fdpass.listener import Listener, ListenSocket

if TYPE_CHECKING:
    from fdpass.endpoint import Endpoint


class Shared:
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

    def close(self) -> None:
        """Nothing beyond the endpoint."""

    def begin(self, board: int, lines: int) -> None:
        """Needs no board."""

    def launched(self, line: int, pidfd: int | None) -> None:
        """The kernel sees to the rest."""

    def retire(self, line: int) -> None:
        """The worker leaves its queue itself."""

    def ended(self, line: int) -> None:
        """Nothing was the worker's alone."""

    def forget(self) -> None:
        """What close() closes."""
        self.close()

    @staticmethod
    def open(share: dict[str, Any], **inside: Any) -> Listener:
        """A listener that waits exclusively, in an epoll of its own."""
        sock = ListenSocket(share["socket"], share["backlog"])
        return Listener(sock, share["index"], "shared", exclusive=True, rotate=share["order"] == "rotate", **inside)
