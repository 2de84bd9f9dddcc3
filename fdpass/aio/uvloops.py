"""uvloop's event loop with fair listening sockets: they are accepted from here, and re-registered exclusively in libuv's own epoll.

What a place in the queue is stands in _queue.py; what a connection does is uvloop's, as connect_accepted_socket() makes it.
"""

from __future__ import annotations

import asyncio
import math
import os
import select
import socket
import ssl as ssl_module
import stat
import sys
from asyncio import trsock
from errno import EADDRINUSE
from importlib.metadata import version
from time import monotonic
from typing import TYPE_CHECKING, Any

from fdpass import _syscall
from fdpass._queue import ROOM, Place, exclusive_works, warn_once
from fdpass.aio.loops import check_batch
from fdpass.listener import AcceptedSocket, listener_of

try:
    import uvloop
except ImportError as error:
    raise ImportError("fdpass.aio.new_uvloop_event_loop needs uvloop, which is not installed: pip install uvloop") from error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fdpass.listener import Listener

#: Rounds of the loop in which libuv must have registered a descriptor. It takes one.
_ROUNDS = 100
#: Connections that a draining worker takes in a row from a queue that is its alone: then the loop's other tasks have their turn.
_IN_A_ROW = 64


def new_loop() -> asyncio.AbstractEventLoop:
    """See fdpass.aio.new_uvloop_event_loop()."""
    missing = "" if exclusive_works() else "EPOLLEXCLUSIVE is missing here"
    if not missing and not hasattr(uvloop.Loop, "_get_backend_id"):
        missing = f"uvloop {version('uvloop')} has no _get_backend_id(), which names libuv's epoll"
    if missing:
        warn_once(f"{missing}: uvloop's own event loop is used, and every connection wakes every worker")
        return uvloop.new_event_loop()
    return UvloopEventLoop()


class UvloopEventLoop(uvloop.Loop):
    """uvloop's event loop. Its servers accept up to accept_batch connections each time they are woken (1 or more).

    A server without a free descriptor leaves the queue, where other processes serve, until there is one: nothing is logged.
    Serving a Listener's socket counts its connections on the group's board and obeys the group's order to drain.
    """

    def __init__(self, *, accept_batch: int = 1) -> None:
        super().__init__()
        try:
            self._batch = check_batch(accept_batch)
        except BaseException:
            super().close()
            raise
        self._libuv: select.epoll | None = None
        self._acceptors: set[_Acceptor] = set()
        self._followed: set[Listener] = set()

    async def create_server(  # type: ignore[override]  # the same, but that what is only passed on stands in **bind
        self,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        host: Any = None,
        port: Any = None,
        *,
        sock: socket.socket | None = None,
        backlog: int = 100,
        ssl: ssl_module.SSLContext | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
        start_serving: bool = True,
        **bind: Any,
    ) -> Server:
        """As asyncio's. Raises what uvloop's raises."""
        terms = _terms(ssl, ssl_handshake_timeout, ssl_shutdown_timeout)
        if sock is not None:
            if host is not None or port is not None:
                raise ValueError("host/port and sock can not be specified at the same time")
            if sock.type != socket.SOCK_STREAM:
                raise ValueError(f"A Stream Socket was expected, got {sock!r}")
            sockets = [sock]
        else:
            # uvloop resolves and binds; its handles never listen. What they hold is closed by the next round of the loop.
            plain = await super().create_server(protocol_factory, host, port, start_serving=False, **bind)
            try:
                sockets = _duplicates(plain.sockets)  # type: ignore[attr-defined]  # every server of uvloop has it
            finally:
                plain.close()
        return _serve(Server(self, sockets, protocol_factory, terms, backlog), start_serving)

    async def create_unix_server(  # type: ignore[override]  # typeshed and uvloop disagree about it
        self,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        path: Any = None,
        *,
        sock: socket.socket | None = None,
        backlog: int = 100,
        ssl: ssl_module.SSLContext | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
        start_serving: bool = True,
        cleanup_socket: bool = sys.version_info >= (3, 13),
    ) -> Server:
        """As asyncio's. Raises what uvloop's raises."""
        terms = _terms(ssl, ssl_handshake_timeout, ssl_shutdown_timeout)
        if path is not None:
            if sock is not None:
                raise ValueError("path and sock can not be specified at the same time")
            sock = _bind_unix(os.fspath(path))
        elif sock is None:
            raise ValueError("path was not specified, and no sock specified")
        elif sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            raise ValueError(f"A UNIX Domain Stream Socket was expected, got {sock!r}")
        server = Server(self, [sock], protocol_factory, terms, backlog)
        if cleanup_socket:
            server._remember_file()
        return _serve(server, start_serving)

    def close(self) -> None:
        """Closes the loop; again does nothing."""
        super().close()
        for acceptor in list(self._acceptors):
            acceptor.forget()
        if self._libuv is not None:
            self._libuv.close()

    def _acceptor(self, sock: socket.socket, take: Callable[..., None], ended: Callable[[], None]) -> _Acceptor:
        """For fdpass.aio.create_server(): take(connection, address, listener) for each, ended() when its listener has drained."""
        return _Acceptor(self, sock, take, ended)

    def _epoll(self) -> select.epoll:
        """libuv's epoll, by a duplicate of its number: select.epoll closes what it is given."""
        if self._libuv is None:
            self._libuv = select.epoll.fromfd(_syscall.dup(self._get_backend_id()))  # type: ignore[attr-defined]  # new_loop() has looked
        return self._libuv


def _terms(ssl: Any, handshake: float | None, shutdown: float | None) -> dict[str, Any]:
    if ssl is not None and not isinstance(ssl, ssl_module.SSLContext):
        raise TypeError("ssl argument must be an SSLContext or None")
    if ssl is None and handshake is not None:
        raise ValueError("ssl_handshake_timeout is only meaningful with ssl")
    if ssl is None and shutdown is not None:
        raise ValueError("ssl_shutdown_timeout is only meaningful with ssl")
    return {"ssl": ssl, "ssl_handshake_timeout": handshake, "ssl_shutdown_timeout": shutdown}


def _duplicates(sockets: Sequence[Any]) -> list[socket.socket]:
    made: list[socket.socket] = []
    try:
        for one in sockets:
            made.append(socket.socket(fileno=_syscall.dup(one.fileno())))
    except BaseException:
        for sock in made:
            sock.close()
        raise
    return made


def _bind_unix(path: str | bytes) -> socket.socket:
    if path[0] not in (0, "\0"):
        try:
            if stat.S_ISSOCK(os.stat(path).st_mode):
                os.remove(path)
        except FileNotFoundError:
            pass
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.bind(path)
    except OSError as error:
        sock.close()
        if error.errno == EADDRINUSE:
            raise OSError(EADDRINUSE, f"Address {path!r} is already in use") from None
        raise
    return sock


def _serve(server: Server, start: bool) -> Server:
    if start:
        try:
            server._start()
        except BaseException:
            server.close()
            raise
    return server


class Server(asyncio.AbstractServer):
    """What create_server() returns. Its sockets are closed with it; connections go on."""

    def __init__(self, loop: UvloopEventLoop, sockets: list[socket.socket], factory: Any, terms: dict[str, Any], backlog: int) -> None:
        self._loop, self._factory, self._terms, self._backlog = loop, factory, terms, backlog
        self._sockets: list[socket.socket] | None = sockets
        self._acceptors: list[_Acceptor] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = 0
        self._waiters: list[asyncio.Future[None]] = []
        self._forever: asyncio.Future[None] | None = None
        self._file: tuple[Any, int] | None = None
        for sock in sockets:
            sock.setblocking(False)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} sockets={self.sockets!r}>"

    @property
    def sockets(self) -> tuple[trsock.TransportSocket, ...]:
        """What it listens on; none once closed."""
        return tuple(trsock.TransportSocket(sock) for sock in self._sockets or ())

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Its event loop."""
        return self._loop

    def is_serving(self) -> bool:
        """Whether it accepts."""
        return bool(self._acceptors)

    async def start_serving(self) -> None:
        """Listens and accepts; again does nothing."""
        if self._sockets is None:
            raise RuntimeError(f"server {self!r} is closed")
        self._start()

    async def serve_forever(self) -> None:
        """Serves until it is cancelled, then closes."""
        if self._forever is not None:
            raise RuntimeError(f"server {self!r} is already being awaited on serve_forever()")
        await self.start_serving()
        self._forever = self._loop.create_future()
        try:
            await self._forever
        except asyncio.CancelledError:
            self.close()
            await self.wait_closed()
            raise
        finally:
            self._forever = None

    def close(self) -> None:
        """Stops accepting and closes the sockets; again does nothing."""
        sockets, self._sockets = self._sockets, None
        if sockets is None:
            return
        for acceptor in self._acceptors:
            acceptor.stop()
        self._acceptors.clear()
        for sock in sockets:
            sock.close()
        self._remove_file()
        if self._forever is not None and not self._forever.done():
            self._forever.cancel()
        self._wake()

    async def wait_closed(self) -> None:
        """Waits until it is closed and its connections have ended; as uvloop's, it returns at once when it was closed before."""
        if self._sockets is None:
            return
        waiter = self._loop.create_future()
        self._waiters.append(waiter)
        await waiter

    # -- inside ----------------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._acceptors or self._sockets is None:
            return
        for sock in self._sockets:
            sock.listen(self._backlog)
            acceptor = _Acceptor(self._loop, sock, self._take)
            self._acceptors.append(acceptor)
            acceptor.start()

    def _take(self, plain: socket.socket, address: Any, listener: Listener | None) -> None:
        """One accepted connection: consumes plain."""
        if listener is not None:
            conn, _ = listener._admit(plain, address)
        else:
            conn = AcceptedSocket(plain.family, plain.type, plain.proto, fileno=plain.detach())
        self._open += 1
        # The transport detaches its socket when it is closed.
        conn._after = self._ended
        task = self._loop.create_task(self._connect(conn))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, conn: AcceptedSocket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._factory, conn, **self._terms)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            conn.close()
            if self._loop.get_debug():
                what = {"message": "Error on transport creation for incoming connection", "exception": error}
                self._loop.call_exception_handler(what)

    def _ended(self) -> None:
        self._open -= 1
        self._wake()

    def _wake(self) -> None:
        if self._sockets is None and not self._open:
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self._waiters.clear()

    def _remember_file(self) -> None:
        assert self._sockets is not None
        path = self._sockets[0].getsockname()
        if path and path[0] not in (0, "\0"):
            try:
                self._file = path, os.stat(path).st_ino
            except FileNotFoundError:
                pass

    def _remove_file(self) -> None:
        if self._file is not None:
            path, inode = self._file
            try:
                if os.stat(path).st_ino == inode:
                    os.unlink(path)
            except OSError:
                pass  # gone already, or not ours to remove


class _Acceptor:
    """One listening socket in one loop: waits in libuv's epoll, takes a batch for each wake-up, and keeps to its place in the queue."""

    def __init__(
        self, loop: UvloopEventLoop, sock: socket.socket, take: Callable[..., None], ended: Callable[[], None] | None = None
    ) -> None:
        self._loop, self._sock, self._take, self._fd, self._ended = loop, sock, take, sock.fileno(), ended
        self._listener = listener_of(self._fd)
        epoll = loop._epoll()
        if self._listener is None:
            self._place = Place(self._fd, epoll, exclusive=True, rotate=True, spare_of=epoll.fileno())
        else:
            self._place = self._listener._place_in(epoll, self._fd, epoll.fileno())
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = self._draining = self._ours = False

    def start(self) -> None:
        """Joins the queue."""
        self._loop._acceptors.add(self)
        self._loop.add_reader(self._fd, self._ready)
        self._loop.call_soon(self._take_over, _ROUNDS)
        if self._listener is not None:
            self._listener._loops += 1
            if self._listener not in self._loop._followed:
                self._loop._followed.add(self._listener)
                self._listener._follow(self._loop)
            self._listener._on_drain(self._told)

    def stop(self) -> None:
        """Leaves the queue for good."""
        if not self._stopped:
            self._loop.remove_reader(self._fd)
            self.forget()

    def forget(self) -> None:
        """stop() in a loop that is closed."""
        if self._stopped:
            return
        self._stopped = True
        self._loop._acceptors.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        self._place.close()
        self._place.end_wait()
        if self._listener is not None:
            self._listener._off_drain(self._told)
            self._listener._loops -= 1
            if self._listener.draining:
                self._listener._left()

    def _take_over(self, rounds: int) -> None:
        """Puts our registration in the place of libuv's, once that is there: libuv registers right before it waits."""
        if self._stopped or self._draining:
            return
        try:
            self._loop._epoll().unregister(self._fd)
        except FileNotFoundError:
            if rounds:
                self._loop.call_soon(self._take_over, rounds - 1)
            else:
                warn_once(f"uvloop {version('uvloop')} keeps its descriptors in no epoll known here: every connection wakes every worker")
            return
        self._ours = True
        self._settle()

    def _ready(self) -> None:
        for _ in range(self._loop._batch):
            if not self._one():
                break
        self._place.rotate()
        self._settle()

    def _one(self) -> bool:
        taken = self._place.take(self._sock)
        if taken is not None:
            self._take(*taken, self._listener)
        return taken is not None

    def _settle(self) -> None:
        """Joins the queue or stays out. libuv has nothing to hook in before it waits: so it is decided after each connection."""
        if self._stopped or self._draining or not self._ours:
            return
        self._place.settle()
        self._place.begin_wait()
        if self._place.pause is not None and self._timer is None:
            # uvloop rounds to the nearest millisecond: half of one would be none, and spin.
            self._timer = self._loop.call_later(math.ceil(self._place.pause * 1e3) * 1e-3, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._stopped or self._draining:
            return
        if self._place.overdue():
            self._one()
        self._settle()

    def _told(self) -> None:
        """The listener drains: called in whatever thread or signal handler has it from."""
        try:
            self._loop.call_soon_threadsafe(self._drain)
        except RuntimeError:
            pass  # the loop was closed

    def _drain(self) -> None:
        """A last look: the order may have come right after an exclusive wake-up, which nobody else gets for that connection."""
        if self._stopped:
            return
        assert self._listener is not None
        self._draining = True
        self._place.end()
        self._place.end_wait()
        if self._listener._sole:
            for _ in range(_IN_A_ROW):
                if monotonic() >= self._listener._look_by or not self._place.waiting():
                    break
                if not self._place.room():
                    self._loop.call_later(ROOM, self._drain)
                    return
                self._one()
            else:
                self._loop.call_soon(self._drain)
                return
        elif not self._listener._done:
            self._one()
        self.stop()
        if self._ended is not None:
            self._ended()
