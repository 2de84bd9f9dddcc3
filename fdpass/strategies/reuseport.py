"""reuseport and reuseport-bare: one SO_REUSEPORT socket for each worker; the kernel picks by a hash of the connection's addresses.

reuseport binds them in the supervisor, which keeps a duplicate: what is queued outlives its worker. reuseport-bare lets each
worker bind its own, which needs no passing of descriptors; what is queued there dies with the worker.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from fdpass.endpoint import join, queued
from fdpass.listener import Listener, ListenSocket
from fdpass.strategies.contract import Strategy

if TYPE_CHECKING:
    from fdpass.endpoint import Endpoint


def _share_port(endpoint: Endpoint, name: str) -> None:
    if endpoint.adopted:
        raise ValueError(f"strategy {name!r} binds sockets of its own and cannot use one that was handed over; take 'shared'")
    if endpoint.socket.family == socket.AF_UNIX:
        raise ValueError(f"strategy {name!r} needs a TCP port: SO_REUSEPORT does not exist for {endpoint}; take 'shared'")
    # The endpoint was bound without the option, so nobody else listens here; from now on our members may join.
    endpoint.share_port()


class Reuseport(Strategy):
    """The supervisor's k sockets; a successor takes the socket of the dead with everything queued on it."""

    name, held, passes = "reuseport", True, True

    def __init__(self) -> None:
        self._members: list[socket.socket] = []

    def bind(self, endpoint: Endpoint, workers: int, backlog: int) -> None:
        """The endpoint's socket is the first member, k - 1 more join it. O_NONBLOCK is set here, once, for every holder."""
        _share_port(endpoint, self.name)
        self._backlog = backlog
        self._members = [endpoint.socket]
        try:
            while len(self._members) < workers:
                self._members.append(endpoint.member())
            for sock in self._members:
                sock.setblocking(False)
        except BaseException:
            self.close()
            raise

    def listen(self) -> None:
        """All of them: from now on the hash counts every member."""
        for sock in self._members:
            sock.listen(self._backlog)

    def share(self, index: int, line: int) -> dict[str, Any]:
        """The worker's own socket."""
        return {"strategy": self.name, "index": index, "socket": self._members[index], "backlog": self._backlog}

    def queue(self, index: int) -> tuple[int, int | None] | None:
        """Of the index's own socket."""
        return queued(self._members[index]) if index < len(self._members) else None

    def close(self) -> None:
        """The members beyond the endpoint."""
        for sock in self._members[1:]:
            sock.close()

    @staticmethod
    def open(share: dict[str, Any], **inside: Any) -> Listener:
        """A listener on a socket that nobody else waits on."""
        return Listener(ListenSocket(share["socket"], share["backlog"]), share["index"], "reuseport", **inside)


class ReuseportBare(Strategy):
    """The supervisor's socket only holds the port: bound and never listening, it gets no connection."""

    name, held, passes = "reuseport-bare", False, False

    def bind(self, endpoint: Endpoint, workers: int, backlog: int) -> None:
        """Nothing to make: the workers do it."""
        _share_port(endpoint, self.name)
        self._endpoint, self._backlog = endpoint, backlog

    def listen(self) -> None:
        """Each worker does, when it starts; until the first one does, clients are refused."""

    def share(self, index: int, line: int) -> dict[str, Any]:
        """Where to bind."""
        family, address = int(self._endpoint.socket.family), self._endpoint.address
        return {"strategy": self.name, "index": index, "family": family, "address": address, "backlog": self._backlog}

    @staticmethod
    def open(share: dict[str, Any], **inside: Any) -> Listener:
        """Binds, listens, and listens alone."""
        sock = ListenSocket(join(share["family"], tuple(share["address"])), share["backlog"])
        sock.setblocking(False)
        sock.listen()
        return Listener(sock, share["index"], "reuseport-bare", **inside)
