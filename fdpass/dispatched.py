"""DispatchListener: a worker's side of a dispatcher. It asks for connections, receives them and gives up what it asked for; nothing is
accepted here."""

from __future__ import annotations

import errno
import socket
import sys
from time import monotonic_ns
from typing import TYPE_CHECKING, Any, NoReturn, cast

from fdpass import _syscall
from fdpass._board import ACCEPTED, HEARTBEAT
from fdpass.listener import Listener, ListenSocket

if TYPE_CHECKING:
    from fdpass.channel import Channel
    from fdpass.listener import AcceptedSocket, Socket

_WAIT = frozenset({-errno.EAGAIN, -errno.EINTR})
_FULL = frozenset({-errno.EMFILE, -errno.ENFILE, -errno.ENOBUFS, -errno.ENOMEM})


class DispatchListener(Listener):
    """A listener whose connections come from the supervisor, as many at a time as it has credits: while it is busy, none or few wait here.

    sock: the worker's end of a socket pair. kind: family, type and protocol of the connections. group: the group's line of the board.
    It has no listening socket: `socket` raises, servers with an event loop of their own take fdpass.aio.serve() or create_server().
    """

    def __init__(
        self,
        sock: Socket,
        index: int,
        credits: int,
        kind: tuple[int, int, int],
        line: Any,
        group: Any,
        channel: Channel | None = None,
        report: bool = False,
    ) -> None:
        super().__init__(cast("ListenSocket", sock), index, "dispatch", line, channel, report=report)
        self._asking = _syscall.Asking(sock.fileno(), line, group)
        self._credits, self._kind = credits, kind
        self._received = self._asked = self._waiting = 0
        self._over = False  # nothing comes any more: the dispatcher has closed its end, or this is a forked child

    @property
    def socket(self) -> NoReturn:
        """There is none here: raises RuntimeError, which says what to use."""
        raise RuntimeError(
            "under strategy 'dispatch' a worker has no listening socket: the supervisor accepts. "
            "Take listener.accept() or iterate, in asyncio await fdpass.aio.serve(protocol_factory, listener)"
        )

    def accept(self, timeout: float | None = None) -> tuple[Socket, Any]:
        """The next connection as (socket, address): see Listener.accept()."""
        with self._lock:
            self._waiting += 1
        try:
            return super().accept(timeout)
        finally:
            with self._lock:
                self._waiting -= 1

    # -- inside ----------------------------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        """Asks for as many as there are credits for."""
        with self._lock:
            wanted = self._received + self._credits
            if self._asked < wanted and not self._drained and not self._over:
                self._asking.ask(wanted)
                self._asked = wanted
                if self._drained:  # by a signal's handler, right here, which saw nothing to give up
                    self._leave()

    def _join(self) -> bool:
        """Asks for connections; False while there is no descriptor to spare for one."""
        with self._lock:
            if self._drained or self._over:
                return True
            if not self._asking.reserve() or not super()._join():
                return False
            self._ask()
            return True

    def _may_ask(self) -> bool:
        """Whether there is a descriptor for one more connection, and somebody who would give one."""
        with self._lock:
            return not self._over and self._asking.reserve()

    def _leave(self) -> None:
        """Gives up what was asked for: the dispatcher takes back what lies here."""
        with self._lock:
            if self._asked > self._received and not self._over:
                self._asked = self._received
                self._asking.ask(self._asked, wake=True)
            super()._leave()

    def _accept(self) -> tuple[AcceptedSocket, Any] | None:
        # Under the lock to the end: the dispatcher must see that a connection was received before it sees that one more is asked for.
        with self._lock:
            if self._over or self._sock.fileno() < 0:
                return None
            number = self._asking.take()
            if number < 0:
                self._nothing(number)
                return None
            self._received += 1
            plain = socket.socket(*self._kind, fileno=number)
            try:
                address = plain.getpeername()
            except OSError:  # the client is gone already
                plain.close()
                self._count(ACCEPTED, 1)
                return None
            if sys.platform != "linux":
                # There a connection is born as non-blocking as its listening socket.
                plain.settimeout(socket.getdefaulttimeout())
            accepted = self._admit(plain, address)
            if self._waiting > 1:
                self._ask()  # for the other threads
            return accepted

    def _nothing(self, code: int) -> None:
        """Why there was no connection."""
        if code in _WAIT:
            # It was taken back, for it lay here too long: the dispatcher looks whether this worker runs again.
            self._line[HEARTBEAT] = monotonic_ns()
            return
        if code in _FULL:
            self._leave()
        elif code == -errno.EBADMSG:  # it was sent and is lost: another thread took the number that was held free
            self._received += 1
            self._count(ACCEPTED, 1)
        elif code == -errno.EPIPE:
            self._leave()
            self._over = True
        else:
            _syscall.fail(code, "receiving a connection from the dispatcher")

    def _uncount(self) -> None:
        # What is in the socket pair is the parent's.
        super()._uncount()
        self._over = self._drained = True

    def _close(self) -> None:
        super()._close()
        with self._lock:
            self._asking.close()
            self._over = True
