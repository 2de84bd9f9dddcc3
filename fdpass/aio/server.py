"""asyncio servers on a group's listener, under any strategy: they accept, follow the group's orders, and know when what they accepted has
ended. How connections come is the listener's affair."""

from __future__ import annotations

import asyncio
import weakref
from asyncio.trsock import TransportSocket
from typing import TYPE_CHECKING, Any

from fdpass._queue import ROOM, Place
from fdpass.dispatched import DispatchListener

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from ssl import SSLContext

    from fdpass.listener import AcceptedSocket, Listener

#: Turns of the loop between a connection and the request for the next one from a dispatcher: transport, connection_made, its first bytes,
#: what the protocol makes of them. A worker that computes in those has asked for nothing meanwhile, so that nothing waits for it.
_TURNS = 4


async def create_server(
    protocol_factory: Callable[[], asyncio.BaseProtocol],
    listener: Listener,
    *,
    ssl: SSLContext | None = None,
    ssl_handshake_timeout: float | None = None,
) -> asyncio.AbstractServer:
    """As loop.create_server(), for the listener of a group's worker; it serves, and the worker is ready, when this returns.

    protocol_factory: called without arguments for each connection. ssl: a context for the server's side of TLS.
    ssl_handshake_timeout: seconds, None: asyncio's 60. One server at a time serves a listener.

    Told to drain, by the group or by SIGTERM, it closes itself: it accepts no more, and what it accepted goes on.
    """
    loop = asyncio.get_running_loop()
    if ssl is None and ssl_handshake_timeout is not None:
        raise ValueError("ssl_handshake_timeout goes with ssl")
    server = Server(protocol_factory, listener, loop, ssl, ssl_handshake_timeout)
    await server.start_serving()
    return server


async def serve(
    protocol_factory: Callable[[], asyncio.BaseProtocol],
    listener: Listener,
    ssl: SSLContext | None = None,
    *,
    ssl_handshake_timeout: float | None = None,
) -> None:
    """Serves until the worker is told to drain and every connection has ended; arguments as for create_server().

    A connection that does not end by itself lasts until the group's stop_timeout. Cancelled, it stops accepting and returns at once.
    """
    server = await create_server(protocol_factory, listener, ssl=ssl, ssl_handshake_timeout=ssl_handshake_timeout)
    try:
        # It closes itself when the listener drains.
        await server.wait_closed()
    except BaseException:
        server.close()
        raise


def _from_anywhere(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    """From whatever thread or signal handler drains the listener."""
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:
        pass  # the loop is closed


class Server(asyncio.AbstractServer):
    """What create_server() returns: an asyncio server, and an async context manager that closes it and waits for its connections."""

    def __init__(
        self,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        listener: Listener,
        loop: asyncio.AbstractEventLoop,
        ssl: SSLContext | None,
        ssl_handshake_timeout: float | None,
    ) -> None:
        self._protocol_factory, self._listener, self._loop = protocol_factory, listener, loop
        self._ssl, self._ssl_handshake_timeout = ssl, ssl_handshake_timeout
        self._source: _Queue | _Given = _Given(listener) if isinstance(listener, DispatchListener) else _Queue(listener)
        # uvloop's fair loop waits for a listening socket in a way of its own.
        waits = getattr(loop, "_acceptor", None)
        self._acceptor: Any = None
        if waits is not None and not isinstance(listener, DispatchListener):
            self._acceptor = waits(listener._sock, self._accepted, self.close)
        self._serving = self._closed = self._asking = False
        self._resting: asyncio.TimerHandle | None = None
        self._open = 0  # connections that were accepted and not closed
        self._tasks: set[asyncio.Task[None]] = set()
        self._transports: weakref.WeakSet[asyncio.BaseTransport] = weakref.WeakSet()
        self._ended = asyncio.Event()

    # -- asyncio's server ------------------------------------------------------------------------------------------------------

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """The loop it serves in."""
        return self._loop

    def is_serving(self) -> bool:
        """Whether it accepts: until it is closed or drained."""
        return self._serving

    @property
    def sockets(self) -> tuple[TransportSocket, ...]:
        """The listening socket while it serves; none under dispatch, where the supervisor accepts."""
        return tuple(map(TransportSocket, self._source.sockets)) if self._serving else ()

    async def start_serving(self) -> None:
        """Accepts; create_server() has called it, again does nothing. Raises RuntimeError when the server is closed."""
        if self._closed:
            raise RuntimeError("this server is closed")
        if self._serving:
            return
        self._serving = True
        # SIGTERM and the group's order drain the listener instead of ending the process.
        self._listener._accepting = True
        self._join()
        self._listener._follow(self._loop)
        self._listener.ready()
        if self._acceptor is None:
            self._listener._on_drain(self._told)

    async def serve_forever(self) -> None:
        """Returns when the server is closed or drained and its connections have ended; cancelled, it closes the server."""
        await self.start_serving()
        try:
            await self.wait_closed()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Accepts no more; what was accepted goes on. Again does nothing."""
        if self._closed:
            return
        self._closed, self._serving = True, False
        if self._acceptor is not None:
            self._acceptor.stop()
        elif self._resting is not None:
            self._resting.cancel()
        else:
            self._loop.remove_reader(self._source.fileno())
        self._source.leave()
        self._listener._off_drain(self._told)
        self._look_for_end()

    async def wait_closed(self) -> None:
        """Returns once the server is closed and every connection has ended."""
        await self._ended.wait()

    def close_clients(self) -> None:
        """Closes every connection after what was written to it has gone."""
        for transport in list(self._transports):
            transport.close()

    def abort_clients(self) -> None:
        """Closes every connection at once."""
        for transport in list(self._transports):
            # uvloop's are of no class of asyncio's.
            transport.abort()  # type: ignore[attr-defined]  # those of servers are all streams

    # -- draining --------------------------------------------------------------------------------------------------------------

    def _told(self) -> None:
        _from_anywhere(self._loop, self._drain)

    def _drain(self) -> None:
        if not self._closed:
            # Out of the queue first. The order may have come right after an exclusive wake-up, which nobody else gets for that connection.
            self._loop.remove_reader(self._source.fileno())
            while self._listener._last_look():
                self._take()
            self.close()
        self._listener._left()

    # -- accepting -------------------------------------------------------------------------------------------------------------

    def _join(self) -> None:
        self._resting = None
        if self._acceptor is not None:
            self._acceptor.start()
        elif self._source.room():
            self._loop.add_reader(self._source.fileno(), self._readable)
            self._source.ask()
        else:
            self._resting = self._loop.call_later(ROOM, self._join)

    def _readable(self) -> None:
        # One at a time: what this loop does not take in this turn, another worker may.
        self._take()
        if self._closed or self._resting is not None:
            return
        if self._source.full:
            # Out of descriptors: out of the queue, where others serve, until there is room.
            self._loop.remove_reader(self._source.fileno())
            self._source.leave()
            self._resting = self._loop.call_later(ROOM, self._join)
        elif self._source.asks and not self._asking:
            self._asking = True
            self._ask_after(_TURNS)

    def _ask_after(self, turns: int) -> None:
        if turns:
            # By a timer: unlike call_soon() it comes after the events of its turn.
            self._loop.call_later(0, self._ask_after, turns - 1)
        else:
            self._asking = False
            if self._serving and self._resting is None:
                self._source.ask()

    def _take(self) -> None:
        conn = self._source.take()
        if conn is not None:
            self._begin(conn)

    def _accepted(self, plain: socket.socket, address: Any, listener: Listener) -> None:
        self._begin(listener._admit(plain, address)[0])

    def _begin(self, conn: AcceptedSocket) -> None:
        conn._after = self._leave
        self._open += 1
        task = self._loop.create_task(self._serve(conn))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, conn: AcceptedSocket) -> None:
        made: list[asyncio.BaseProtocol] = []

        def factory() -> asyncio.BaseProtocol:
            made.append(self._protocol_factory())
            return made[0]

        try:
            transport, _ = await self._loop.connect_accepted_socket(
                factory, conn, ssl=self._ssl, ssl_handshake_timeout=self._ssl_handshake_timeout
            )
            self._transports.add(transport)
        except OSError:
            pass  # the client gave up, or its handshake failed: its affair
        except Exception as error:
            self._loop.call_exception_handler({"message": "a connection could not be served", "exception": error, "socket": conn})
        finally:
            # From the protocol on a transport has the socket and closes it.
            if not made:
                conn.close()

    def _leave(self) -> None:
        self._open -= 1
        self._look_for_end()

    def _look_for_end(self) -> None:
        if self._closed and not self._open:
            self._ended.set()


class _Queue:
    """Connections of a listening socket, with a descriptor to spare for the day when there is none."""

    asks = False

    def __init__(self, listener: Listener) -> None:
        self._listener, self._sock = listener, listener._sock
        # In no epoll: the loop waits, this takes.
        self._place = Place(self._sock.fileno(), None, exclusive=False, rotate=False, spare_of=self._sock.fileno())

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        return (self._sock,)

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def full(self) -> bool:
        return not self._place.room()

    def room(self) -> bool:
        """Whether there is a descriptor to spare, after trying."""
        return self._place.room()

    def ask(self) -> None:
        """Nothing to ask: being in the queue is enough."""

    def take(self) -> AcceptedSocket | None:
        taken = self._place.take(self._sock)
        return None if taken is None else self._listener._admit(*taken)[0]

    def leave(self) -> None:
        """Gives the spare descriptor up."""
        self._place.close()


class _Given:
    """Connections that a dispatcher gives."""

    asks = True
    sockets: tuple[socket.socket, ...] = ()

    def __init__(self, listener: DispatchListener) -> None:
        self._listener = listener

    def fileno(self) -> int:
        return self._listener._sock.fileno()

    @property
    def full(self) -> bool:
        """Whether there is no descriptor for one more, or there will never be one more."""
        return not self._listener._may_ask()

    def room(self) -> bool:
        return self._listener._may_ask()

    def ask(self) -> None:
        self._listener._ask()

    def take(self) -> AcceptedSocket | None:
        accepted = self._listener._accept()
        return None if accepted is None else accepted[0]

    def leave(self) -> None:
        self._listener._leave()
