"""Endpoints: from text to a bound socket. Addresses, bind, LISTEN_FDS; nothing here accepts."""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import sys
import warnings
from typing import TYPE_CHECKING, Any

from fdpass import _syscall
from fdpass.errors import ClosedError, WrongDescriptorError
from fdpass.fds import _own, kind_of, socket_from

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

Socket = socket.socket  # the class Endpoint has a property called socket

FORMS = "host:port, [::1]:port, unix:/path, fd:N or systemd:NAME"
#: Room in sockaddr_un for a path and its end.
PATH_MAX = 107 if sys.platform == "linux" else 103


class BoundAlone(Socket):
    """A socket bound without SO_REUSEADDR, which comes when it listens.

    Two sockets that both have the option and do not listen yet may share a port; the sockets accepted later need it, so that
    what they leave in TIME_WAIT does not block the next bind. They inherit it from the listening one.
    """

    def listen(self, *backlog: int) -> None:
        """listen(2)."""
        self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        super().listen(*backlog)


class Endpoint:
    """A bound address and the socket that holds it; listen() makes one. str() is its text, with the port that was bound.

    It owns its socket (and, for unix:, the file): close() gives both up. Bound is not listening: a worker group starts to
    listen when its first worker starts. Forgotten, it is closed with a ResourceWarning.
    """

    def __init__(self, sock: Socket, text: str, path_id: tuple[int, int] | None = None, adopted: bool = False) -> None:
        self._sock: Socket | None = sock
        self._text, self._path_id, self._pid = text, path_id, os.getpid()
        self.adopted = adopted  #: whether the socket came from outside (fd:, systemd:), so that others may hold it too

    @property
    def socket(self) -> Socket:
        """The bound socket, borrowed. Raises ClosedError."""
        if self._sock is None:
            raise ClosedError(f"the endpoint {self._text} was closed")
        return self._sock

    @property
    def address(self) -> Any:
        """As getsockname() gives it: (host, port, ...) or a path."""
        return self.socket.getsockname()

    @property
    def port(self) -> int | None:
        """The port that was bound, None for a Unix socket."""
        return self.address[1] if self.socket.family != socket.AF_UNIX else None

    def fileno(self) -> int:
        """The number, -1 once closed. Borrowed."""
        return -1 if self._sock is None else self._sock.fileno()

    def close(self) -> None:
        """Closes the socket and removes the file of a unix: endpoint, if it is still this one's; again does nothing."""
        sock, self._sock = self._sock, None
        if sock is None:
            return
        if self._path_id is not None and self._pid == os.getpid():
            path = self._text.removeprefix("unix:")
            try:
                status = os.lstat(path)
                if (status.st_dev, status.st_ino) == self._path_id:
                    os.unlink(path)
            except OSError:
                pass  # gone already, or not ours to remove: the socket is closed all the same
        sock.close()

    def share_port(self) -> None:
        """SO_REUSEPORT, set after the bind: others may join from now on, and nobody listened here before."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)

    def member(self) -> Socket:
        """One more socket on the same address, bound with SO_REUSEPORT. Raises OSError."""
        return join(self.socket.family, self.address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"<Endpoint {self._text}{'' if self._sock is not None else ' closed'}>"

    def __del__(self, _warn: Any = warnings.warn) -> None:
        if getattr(self, "_sock", None) is not None:
            self.close()
            _warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)


def listen(address: str, *, reuse_port: bool = False) -> Endpoint:
    """Binds an address now, before anything slow; a WorkerGroup that takes the endpoint listens on it later.

    address:    "host:port" (port 0: one that is free), "[::1]:port", "unix:/path" (a stale file is replaced), "fd:N" (a bound or
                listening stream socket, duplicated), "systemd:NAME" (one of LISTEN_FDS).
    reuse_port: join a port that other processes of this user share by SO_REUSEPORT.

    Raises ValueError with the forms for any other text, WrongDescriptorError for an N that is no such socket,
    OSError: EADDRINUSE when the port or a live Unix socket is taken, and whatever else bind(2) refuses.
    """
    if not isinstance(address, str):
        raise TypeError(f"an address is text ({FORMS}), not {type(address).__name__}")
    kind, colon, rest = address.partition(":")
    if colon and kind in ("unix", "fd", "systemd"):
        if reuse_port:
            raise ValueError(f"reuse_port shares a TCP port; {address!r} has none")
        return {"unix": _unix, "fd": _adopt_text, "systemd": _systemd}[kind](rest)
    match = re.fullmatch(r"(?:\[(?P<six>[^\]]+)\]|(?P<host>[^:\[\]\s]+)):(?P<port>[0-9]{1,5})", address)
    if match is None or int(match["port"]) > 65535:
        raise ValueError(f"{address!r} is no endpoint: write {FORMS}, with a port of 0 to 65535")
    return _tcp(match["six"] or match["host"], int(match["port"]), reuse_port, address)


def join(family: int, address: Any) -> socket.socket:
    """A socket bound to an address that SO_REUSEPORT members share. Raises OSError."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


def queued(holder: Endpoint | Socket) -> tuple[int, int] | None:
    """Connections that wait in a listening TCP socket, and how many may; None where nobody tells: another kind, closed, no Linux."""
    sock = holder._sock if isinstance(holder, Endpoint) else holder
    if sys.platform != "linux" or sock is None or sock.fileno() < 0 or sock.family == socket.AF_UNIX:
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
    except OSError:  # a signal handler closed it a moment ago
        return None
    # Of a listener the kernel gives its queue in tcpi_unacked and its limit in tcpi_sacked (tcp_diag does the same); state 10 is LISTEN.
    if info[0] != 10:
        return None
    return int.from_bytes(info[24:28], sys.byteorder), int.from_bytes(info[28:32], sys.byteorder)


def _tcp(host: str, port: int, reuse_port: bool, text: str) -> Endpoint:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise OSError(error.errno, f"cannot bind {text}: {error.strerror}") from error
    except ValueError as error:  # among them UnicodeError: not a name that could be looked up
        raise ValueError(f"{text!r} names no host: write {FORMS}") from error
    try:
        sock = join(family, address) if reuse_port else _bind_alone(family, address)
    except OSError as error:
        error.strerror = f"cannot bind {text}: {error.strerror}"
        raise
    name = sock.getsockname()
    return Endpoint(sock, f"[{name[0]}]:{name[1]}" if family == socket.AF_INET6 else f"{name[0]}:{name[1]}")


def _bind_alone(family: int, address: Any) -> socket.socket:
    """Bound with no sharing option, so that it fails when anybody else is on the port, listening or about to."""
    # With SO_REUSEADDR only a socket that listens is in the way, or one without the option. It is needed where connections of
    # an earlier program linger in TIME_WAIT: so it comes second, for the bind alone.
    for lingering in (False, True):
        sock = BoundAlone(family, socket.SOCK_STREAM)
        try:
            if lingering:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            return sock
        except OSError as error:
            sock.close()
            if lingering or error.errno != errno.EADDRINUSE:
                raise
        except BaseException:
            sock.close()
            raise
    raise AssertionError("unreachable")


def _unix(path: str) -> Endpoint:
    if not path or "\0" in path:
        raise ValueError(f"{'unix:' + path!r} names no file: write {FORMS}")
    size = len(os.fsencode(path))
    if size > PATH_MAX:
        raise ValueError(f"the path of a Unix socket has at most {PATH_MAX} bytes, {path!r} has {size}")
    _clear_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
        status = os.lstat(path)
    except OSError as error:
        sock.close()
        error.strerror = f"cannot bind unix:{path}: {error.strerror}"
        raise
    except BaseException:
        sock.close()
        raise
    return Endpoint(sock, f"unix:{path}", (status.st_dev, status.st_ino))


def _clear_stale(path: str) -> None:
    """Removes a socket file that nobody is bound to; refuses anything else that stands there."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if stat.S_ISLNK(status.st_mode):
        raise OSError(errno.EEXIST, f"cannot bind unix:{path}: it is a symbolic link, which is not followed")
    if not stat.S_ISSOCK(status.st_mode):
        raise OSError(errno.EEXIST, f"cannot bind unix:{path}: a file that is no socket stands there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
            alive = True
        except ConnectionRefusedError:
            alive = _bound_somewhere(path)
        except OSError:
            alive = True  # a full queue, a datagram socket, no permission: somebody's
    if alive:
        raise OSError(errno.EADDRINUSE, f"cannot bind unix:{path}: a live socket is bound there")
    os.unlink(path)


def _bound_somewhere(path: str) -> bool:
    """Whether a socket is bound there that refuses connections only because it does not listen yet."""
    try:
        with open("/proc/net/unix", "rb") as table:
            # An accepted connection has the path of its listener too, and may outlive it; its state is not 01 (unconnected).
            return any(line.split()[5] == b"01" for line in table if line.rstrip(b"\n").endswith(b" " + os.fsencode(path)))
    except OSError:
        return False


def _adopt_text(text: str) -> Endpoint:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"{'fd:' + text!r} names no descriptor: write {FORMS}")
    return _adopt(int(text), f"fd:{text}")


def _systemd(name: str) -> Endpoint:
    count = os.environ.get("LISTEN_FDS", "")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not re.fullmatch(r"[0-9]+", count):
        raise ValueError(f"systemd:{name}: no sockets were handed to this process (LISTEN_PID and LISTEN_FDS are not its own)")
    names = os.environ.get("LISTEN_FDNAMES", "").split(":") if os.environ.get("LISTEN_FDNAMES") else ["unknown"] * int(count)
    places = [place for place, found in enumerate(names[: int(count)]) if found == name]
    if len(places) != 1:
        raise ValueError(f"systemd:{name}: {len(places)} sockets have that name; handed over are {', '.join(names)}")
    return _adopt(3 + places[0], f"systemd:{name}")


def _adopt(number: int, text: str) -> Endpoint:
    wanted = "a bound or listening stream socket"
    actual = kind_of(number)
    info = None if actual == "not open" else _syscall.probe(number)
    if info is not None:
        actual = "a datagram socket" if info.type != socket.SOCK_STREAM else "a socket that is neither bound nor listening"
    if info is None or info.type != socket.SOCK_STREAM:
        raise WrongDescriptorError(f"{text} is {actual}; it must be {wanted}", wanted, actual)
    # A duplicate: the number itself stays with whoever put it there, but must not leak into programs started later.
    sock = socket_from(_own(_syscall.dup(number)), info)
    name = sock.getsockname()
    if not info.listening and (_connected(sock) or not name or (info.family != socket.AF_UNIX and name[1] == 0)):
        actual = "a connected socket" if _connected(sock) else actual
        sock.close()
        raise WrongDescriptorError(f"{text} is {actual}; it must be {wanted}", wanted, actual)
    os.set_inheritable(number, False)
    if info.family == socket.AF_UNIX:
        shown = f"unix:{os.fsdecode(name)}"
    else:
        shown = f"[{name[0]}]:{name[1]}" if info.family == socket.AF_INET6 else f"{name[0]}:{name[1]}"
    return Endpoint(sock, shown, adopted=True)


def _connected(sock: Socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True
