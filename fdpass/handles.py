"""How sockets, OwnedFd and multiprocessing's connections pickle, and SocketHandle, the form of a socket that any carrier takes."""

from __future__ import annotations

import errno
import socket
import sys
from operator import methodcaller
from typing import TYPE_CHECKING, Any

from fdpass import _carriers, _syscall
from fdpass.errors import ClosedError, TicketError, WrongDescriptorError
from fdpass.fds import Expected, OwnedFd, _own, insist, kind_of, socket_from

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

Reduced = tuple[Any, ...]


class SocketHandle:
    """A picklable share in a socket: it duplicates sock at once, so sock may be closed.

    Pickles with any pickler. Every pickle that is loaded gives a handle of its own; open() turns it into a socket with the
    timeout, family, type and protocol of the original.

    sock:   any socket but an SSLSocket. claims: how often one pickle of it may be loaded, at least 1.
    Raises TypeError, ValueError (closed, SSL, claims), OSError (no free descriptor).
    """

    __slots__ = ("__weakref__", "_claims", "_fd", "_opened", "_timeout")

    def __init__(self, sock: socket.socket, claims: int = 1) -> None:
        self._opened = False
        if not isinstance(sock, socket.socket):
            raise TypeError(f"SocketHandle takes a socket.socket, not {type(sock).__name__}")
        if not isinstance(claims, int) or isinstance(claims, bool):
            raise TypeError(f"claims is a number (int), not {type(claims).__name__}")
        if claims < 1:
            raise ValueError(f"claims is at least 1, not {claims}")
        refuse_tls(sock)
        if sock.fileno() < 0:
            raise ValueError("the socket is closed: there is nothing to make a handle of")
        self._claims, self._timeout = claims, sock.gettimeout()
        self._fd = _own(_syscall.dup(sock.fileno()))

    def open(self, expect: Expected | None = None) -> socket.socket:
        """The socket, which owns the handle's descriptor from now on: a handle opens once.

        expect: (family, type, listening) that it must have, None for any: for a handle that came from somebody else.
        Raises TicketError when it was opened already, ClosedError after close(), WrongDescriptorError when it is not what was expected:
        the handle is then closed.
        """
        self._fileno("open")
        if expect is not None:
            insist(self._fd, expect)
        sock = _socket_of(self._fd, self._timeout)
        self._opened = True
        return sock

    def close(self) -> None:
        """Gives the descriptor up; again does nothing. Pickles made before keep theirs."""
        self._fd.close()

    def fileno(self) -> int:
        """The number, -1 once opened or closed. Borrowed."""
        return self._fd.fileno()

    def _fileno(self, purpose: str) -> int:
        fd = self._fd.fileno()
        if fd < 0:
            if self._opened:
                raise TicketError(f"cannot {purpose} this SocketHandle: it was opened already, and a handle opens once")
            raise ClosedError(f"cannot {purpose} this SocketHandle: it was closed")
        return fd

    def __reduce__(self) -> Reduced:
        fd = self._fileno("pickle")
        return _rebuild_handle, (_carriers.carry(fd, "SocketHandle", self._claims), self._timeout, self._claims)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        # Silently: a handle is made to be put into something and forgotten.
        owned = getattr(self, "_fd", None)
        if owned is not None:
            owned.close()

    def __repr__(self) -> str:
        fd = self.fileno()
        return f"<SocketHandle {fd}>" if fd >= 0 else f"<SocketHandle {'opened' if self._opened else 'closed'}>"


def _rebuild_handle(token: _carriers.Token, timeout: float | None, claims: int) -> SocketHandle:
    owned = _carriers.claim(token)
    if _syscall.probe(owned.fileno()) is None:
        raise _wrong(owned)
    handle = SocketHandle.__new__(SocketHandle)
    handle._fd, handle._timeout, handle._claims, handle._opened = owned, timeout, claims, False
    return handle


def _socket_of(owned: OwnedFd, timeout: float | None, cls: type[socket.socket] = socket.socket) -> socket.socket:
    """A socket that takes owned's descriptor, with the sender's timeout as far as the description's flag agrees.

    A timeout goes with O_NONBLOCK, which belongs to every holder: where they disagree the flag wins, it is never changed here.
    """
    try:
        sock = socket_from(owned, None, cls)
    except OSError as error:
        if error.errno == errno.ENOTSOCK:
            raise _wrong(owned) from None
        raise
    if timeout and sock.gettimeout() == 0.0:
        sock.settimeout(timeout)
    return sock


def _wrong(owned: OwnedFd) -> WrongDescriptorError:
    actual = kind_of(owned.fileno())
    owned.close()
    return WrongDescriptorError(f"a socket was expected, {actual} arrived", "a socket", actual)


def refuse_tls(sock: socket.socket) -> None:
    """Raises TypeError for an SSLSocket, whose keys and counters live in this process."""
    ssl = sys.modules.get("ssl")
    if ssl is not None and isinstance(sock, ssl.SSLSocket):
        raise TypeError(
            "an SSLSocket cannot be passed: its keys and sequence numbers live in this process. "
            "Pass the plain socket before wrap_socket(), and wrap it in the process that serves it"
        )


def reduce_socket(sock: socket.socket) -> Reduced:
    """The reducer of socket.socket and its subclasses; a subclass comes back as itself, with its __dict__, its __init__ not run."""
    if type(sock) is socket.socket:
        return rebuild_socket, (_carriers.carry(sock.fileno(), "socket"), sock.gettimeout())
    refuse_tls(sock)
    token = _carriers.carry(sock.fileno(), type(sock).__name__)
    return rebuild_socket, (token, sock.gettimeout(), type(sock), getattr(sock, "__dict__", None) or None)


def rebuild_socket(
    token: _carriers.Token, timeout: float | None, cls: type[socket.socket] = socket.socket, state: dict[str, Any] | None = None
) -> socket.socket:
    """Loads what reduce_socket wrote. Raises TicketError, WrongDescriptorError, OSError."""
    sock = _socket_of(_carriers.claim(token), timeout, cls)
    if state:
        sock.__dict__.update(state)
    return sock


def reduce_owned(owned: OwnedFd) -> Reduced:
    """The reducer of OwnedFd: the loaded one owns a duplicate."""
    if owned.fileno() < 0:
        raise ClosedError("cannot pickle this OwnedFd: it was closed or released")
    return _carriers.claim, (_carriers.carry(owned.fileno(), "OwnedFd"),)


def reduce_connection(connection: Any) -> Reduced:
    """The reducer of multiprocessing.connection.Connection."""
    if connection.closed:
        raise ValueError("the Connection is closed: it has no descriptor to pass on")
    return rebuild_connection, (_carriers.carry(connection.fileno(), "Connection"), connection.readable, connection.writable)


def rebuild_connection(token: _carriers.Token, readable: bool, writable: bool) -> Any:
    """Loads what reduce_connection wrote. Raises TicketError, OSError."""
    from multiprocessing.connection import Connection

    return Connection(_carriers.claim(token).release(), readable, writable)


_carriers.raw_reducers[socket.socket] = reduce_socket
# These pickle by themselves; here they are seen by whoever treats all that holds a descriptor alike.
_carriers.raw_reducers[OwnedFd] = reduce_owned
_carriers.raw_reducers[SocketHandle] = methodcaller("__reduce__")
_carriers.raw_reducers["multiprocessing.connection.Connection"] = reduce_connection
