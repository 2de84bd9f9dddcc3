"""AsyncChannel: a Channel that asyncio waits for, with no thread, and channels over the path of a Unix socket.

What a frame is and whom it may come from is Channel's affair; here stands only who waits, for what, and what a cancellation leaves.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
from functools import partial
from operator import methodcaller
from typing import TYPE_CHECKING, Any

from fdpass import _carriers, _syscall, _transit
from fdpass._frames import BATCH
from fdpass.channel import Channel
from fdpass.endpoint import PATH_MAX, listen
from fdpass.errors import BrokenChannelError, ClosedError, EndOfChannel
from fdpass.fds import OwnedFd

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable
    from types import TracebackType
    from typing import Self

    from typing_extensions import Buffer

    from fdpass.ancillary import HasFileno
    from fdpass.endpoint import Endpoint

    Callback = Callable[["AsyncChannel"], Coroutine[Any, Any, None] | None]

#: So many system calls for a frame, or frames, or accepted connections in a row: then the loop's other tasks have their turn.
_IN_A_ROW = 32

_DONTWAIT, _EAGAIN, _EINTR = socket.MSG_DONTWAIT, -errno.EAGAIN, -errno.EINTR


class AsyncChannel:
    """Channel for asyncio: the same frames, terms, checks and errors, awaited. Deadlines are asyncio.timeout()'s.

    sock:  what Channel takes, or a Channel, which is taken over with its terms. Flags of the socket are never changed.
    terms: max_size, max_fds, allow_pickle, peer, large: see Channel.

    It belongs to the event loop in which it is first used, and is no more thread-safe than that. Tasks may share it: one
    sends and one receives at a time, in the order in which they asked.

    A cancelled recv() leaves what has come of a frame to the next one. A cancelled send() whose first byte has not gone sends
    nothing; one that has begun is finished by the loop, before anything else is sent.

    It pickles as a Channel does, between two frames only, and arrives as an AsyncChannel that no loop has used yet.
    Raises TypeError, ValueError, WrongDescriptorError, ClosedError, OSError; sock is then untouched.
    """

    __slots__ = (
        "__weakref__", "_channel", "_closing", "_gone", "_incoming", "_loop", "_outgoing",
        "_receiver", "_receiving", "_row", "_sender", "_sending",
    )  # fmt: skip

    def __init__(self, sock: socket.socket | OwnedFd | Channel, **terms: Any) -> None:
        self._closing = True
        self._channel = _take_over(sock, terms) if isinstance(sock, Channel) else Channel(sock, **terms)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sending, self._receiving = asyncio.Lock(), asyncio.Lock()
        #: The frame that waits for room, and with it the turn to send; whether what travels in it is closed afterwards.
        self._outgoing: tuple[_transit.Outgoing, bool] | None = None
        #: What has come of the next frame, whoever waits for it.
        self._incoming: _transit.Incoming | None = None
        #: Whom to wake when there is room, or something to read; and what ends the watch.
        self._sender: tuple[asyncio.Future[None], Callable[[], None]] | None = None
        self._receiver: tuple[asyncio.Future[None], Callable[[], None]] | None = None
        self._closing, self._gone, self._row = False, asyncio.Event(), 0

    # -- sending ---------------------------------------------------------------------------------------------------------------

    async def send(self, obj: Any, *, consume: bool = False) -> None:
        """Pickles obj and sends it. Returns when the kernel has all of it: it waits while the peer does not read.

        What travels must stay open until this returns or is cancelled. consume: close it once the frame has gone.
        Raises what Channel.send() raises, but for TimeoutError.
        """
        await self._send(partial(_transit.pack_object, obj, self._channel._terms), consume)

    async def send_message(self, data: Buffer, fds: Iterable[int | HasFileno] = ()) -> None:
        """Sends bytes and descriptors, no pickle involved; waits and raises as send()."""
        await self._send(partial(_transit.pack_message, data, fds, self._channel._terms), False)

    async def _send(self, pack: Callable[[], _transit.Outgoing], consume: bool) -> None:
        await self._sending.acquire()
        try:
            if self._pause():
                await asyncio.sleep(0)
            loop, fd = self._usable(self._channel._writable, "send on")
            # Packed now and not before: whoever waits for its turn holds no copy, and no number that may have changed hands.
            frame = pack()
            try:
                if len(frame.fds) > BATCH:
                    frame.refuse_ends(fd, self._channel._ends)
                whole = self._push(frame, fd)
                watch = None if whole else _watch(loop, fd, True, self._go_on)
            except BaseException as error:
                self._channel._end_with(frame.verdict(error), error)
                frame.finish()
                raise
        except BaseException:
            self._sending.release()
            raise
        if watch is None:
            self._sending.release()
            frame.finish(consume)
            return
        # From here on the turn is the frame's; _leave() gives it back.
        waiting = loop.create_future(), watch
        self._outgoing, self._sender, self._row = (frame, consume), waiting, 0
        try:
            await waiting[0]
        except BaseException:
            # Unless it was sent, or failed, in the round in which this task was cancelled.
            if self._sender is waiting:
                self._abandon(frame)
            raise

    def _push(self, frame: _transit.Outgoing, fd: int) -> bool:
        """Sends what there is room for; whether that was all of it."""
        for _ in range(_IN_A_ROW):
            code = frame.send_once(fd, _DONTWAIT, self._channel._ends)
            if frame.done or code == _EAGAIN:
                break
            if code < 0 and code != _EINTR:
                frame.fail(code)
        return frame.done

    def _go_on(self) -> None:
        """Called by the loop when there is room."""
        assert self._outgoing is not None
        frame, _ = self._outgoing
        try:
            if not self._push(frame, self._channel.fileno()):
                return
        except BaseException as error:
            try:
                self._channel._end_with(frame.verdict(error), error)
            except BrokenChannelError as broken:
                self._leave(broken)
            else:
                self._leave(error)
            if not isinstance(error, Exception):
                raise
        else:
            self._leave()

    def _abandon(self, frame: _transit.Outgoing) -> None:
        """Its sender was cancelled: the frame is withdrawn, or made independent of what the sender does with its data and descriptors."""
        if frame.started:
            try:
                frame.hold()
                return
            except Exception as error:
                self._channel._broken = BrokenChannelError(f"a frame broke off when its sender was cancelled: {error}")
        self._leave()

    def _leave(self, error: BaseException | None = None) -> None:
        """The frame was sent or is given up: the turn passes on."""
        assert self._outgoing is not None
        assert self._sender is not None
        (frame, consume), (sender, unwatch) = self._outgoing, self._sender
        self._outgoing = self._sender = None
        unwatch()
        if self._running():
            if not sender.done():
                if error is None:
                    sender.set_result(None)
                else:
                    sender.set_exception(error)
            # After close() nobody has a turn any more.
            if not self._closing:
                self._sending.release()
        if self._closing:
            self._shut()
        frame.finish(consume and frame.done)

    # -- receiving -------------------------------------------------------------------------------------------------------------

    async def recv(self) -> Any:
        """The next object; descriptors in it are owned by what was loaded. Raises what Channel.recv() raises, but for TimeoutError."""
        if not self._channel._terms.allow_pickle:
            raise ValueError("this channel carries only messages (allow_pickle=False): use recv_message()")
        return (await self._recv(True)).object()

    async def recv_message(self) -> tuple[bytes, list[OwnedFd]]:
        """The next message as (bytes, owners); nothing is unpickled. An object frame is given as its raw pickle. Errors as recv()."""
        return (await self._recv(False)).message()

    async def _recv(self, objects: bool) -> _transit.Incoming:
        async with self._receiving:
            if self._pause():
                await asyncio.sleep(0)
            while True:
                loop, fd = self._usable(self._channel._readable, "receive from")
                # Read by the task itself, between two awaits: a cancellation finds every byte in self._incoming.
                frame = self._pull(fd, objects)
                if frame is not None:
                    return frame
                receiver = loop.create_future()
                self._receiver, self._row = (receiver, _watch(loop, fd, False, _wake, receiver)), 0
                try:
                    await receiver
                finally:
                    self._unwatch()

    def _pull(self, fd: int, objects: bool) -> _transit.Incoming | None:
        """Reads what there is of a frame; the frame when it is whole."""
        frame = self._incoming
        if frame is None:
            frame = self._incoming = _transit.Incoming(self._channel._terms)
        frame.objects = objects
        try:
            for _ in range(_IN_A_ROW):
                code = frame.receive_once(fd, _DONTWAIT)
                if code == 1:
                    self._incoming = None
                    return frame
                if code == _EAGAIN:
                    break
                if code < 0 and code != _EINTR:
                    _syscall.fail(code, "receiving a frame")
        except BaseException as error:
            self._incoming = None
            frame.close()
            self._channel._end_with(frame.verdict(error), error)
            raise
        return None

    def _unwatch(self) -> None:
        """Nobody waits to receive any more."""
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver[1]()

    # -- the rest --------------------------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """The number, -1 once closed. Borrowed."""
        return -1 if self._closing else self._channel.fileno()

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closing

    def close(self) -> None:
        """Closes this end; again does nothing. Tasks that wait here get ClosedError.

        Only a frame that has begun is finished first, by the loop: the peer reads it, then EndOfChannel. wait_closed() waits for
        that; abort() does not finish it.
        """
        if self._closing:
            return
        running = self._running()
        begun = running and self._outgoing is not None and self._outgoing[0].started
        if self._outgoing is not None and not begun:
            self._leave(_closed("send on"))
        self._closing = True
        if self._receiver is not None:
            if running and not self._receiver[0].done():
                self._receiver[0].set_exception(_closed("receive from"))
            self._unwatch()
        if self._incoming is not None:
            self._incoming.close()
        if begun:
            # Nothing else will be sent: whoever waits for its turn is told so now.
            self._sending.release()
        else:
            self._shut()

    def abort(self) -> None:
        """Closes at once: a frame that has begun is cut off, and the peer's recv() raises BrokenChannelError."""
        self.close()
        if self._outgoing is not None:
            self._leave(_closed("send on"))

    async def wait_closed(self) -> None:
        """Waits until the descriptor is closed: see close()."""
        await self._gone.wait()

    def _shut(self) -> None:
        self._channel.close()
        self._gone.set()

    def _usable(self, allowed: bool, purpose: str) -> tuple[asyncio.AbstractEventLoop, int]:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None:
                raise RuntimeError(f"cannot {purpose} this channel: it belongs to another event loop")
            self._loop = loop
        if self._closing:
            raise _closed(purpose)
        self._channel._refuse(allowed, purpose)
        return loop, self._channel.fileno()

    def _running(self) -> bool:
        """Whether its loop can still wake anybody: one that was closed has forgotten whoever waited in it."""
        return self._loop is not None and not self._loop.is_closed()

    def _pause(self) -> bool:
        """Two peers that never have to wait for each other must not keep the loop to themselves."""
        self._row += 1
        if self._row <= _IN_A_ROW:
            return False
        self._row = 0
        return True

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self.recv()
        except EndOfChannel:
            raise StopAsyncIteration from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """close() and wait_closed(); after an error, or when it is cancelled, abort()."""
        try:
            if kind is None:
                self.close()
                await self.wait_closed()
        finally:
            self.abort()

    def __reduce__(self) -> tuple[Any, ...]:
        if self._closing:
            raise ClosedError("cannot pickle this channel: it was closed")
        if self._outgoing is not None or (self._incoming is not None and self._incoming.started):
            raise ValueError("cannot pickle this channel in the middle of a frame")
        return AsyncChannel, (self._channel,)

    def __repr__(self) -> str:
        return f"<AsyncChannel {'closed' if self._closing else self._channel.fileno()}>"


_carriers.raw_reducers[AsyncChannel] = methodcaller("__reduce__")


def _take_over(channel: Channel, terms: dict[str, Any]) -> Channel:
    """Another Channel with the descriptor of this one, which is closed from now on."""
    if terms:
        raise TypeError(f"a Channel brings its own terms: {', '.join(terms)} cannot be changed")
    owned = OwnedFd(channel._fd.release())
    taken = Channel._of(owned, channel._terms, channel._readable, channel._writable)
    taken._ends, taken._broken = channel._ends, channel._broken
    return taken


def _closed(purpose: str) -> ClosedError:
    return ClosedError(f"cannot {purpose} this channel: it was closed")


def _watch(loop: asyncio.AbstractEventLoop, fd: int, writing: bool, callback: Callable[..., None], *args: Any) -> Callable[[], None]:
    """Has the loop call back while fd is ready; returns what ends that. Raises OSError."""
    inner = None
    if not isinstance(loop, asyncio.SelectorEventLoop) and hasattr(select, "epoll") and os.get_blocking(fd):
        # libuv, and so uvloop, sets O_NONBLOCK on what it polls, for every holder of the socket. It is given an epoll of ours
        # instead, that is ready when the socket is.
        inner = select.epoll(1)
        inner.register(fd, select.EPOLLOUT if writing else select.EPOLLIN)
        fd, writing = inner.fileno(), False
    (loop.add_writer if writing else loop.add_reader)(fd, callback, *args)

    def unwatch() -> None:
        if not loop.is_closed():
            (loop.remove_writer if writing else loop.remove_reader)(fd)
        if inner is not None:
            inner.close()

    return unwatch


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


# -- channels over the path of a socket --------------------------------------------------------------------------------------


async def open_channel(path: str | os.PathLike[str], **terms: Any) -> AsyncChannel:
    """Connects to a channel server; terms: those of Channel.

    Raises OSError in clear words: FileNotFoundError, ConnectionRefusedError (nobody listens there any more), PermissionError;
    ValueError for a path that is too long.
    """
    name = _path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | getattr(socket, "SOCK_NONBLOCK", 0))
    try:
        sock.setblocking(False)
        # Before it is connected: what the server says first must come with its credentials too.
        _syscall.ask_credentials(sock.fileno())
        delay = 0.001
        while True:
            try:
                sock.connect(name)
                break
            except BlockingIOError:
                # The server's queue is full. Nothing tells when there is room, so it is asked again.
                await asyncio.sleep(delay)
                delay = min(2 * delay, 0.05)
        return AsyncChannel(sock, **terms)
    except OSError as error:
        reason = _REFUSALS.get(error.errno or 0, error.strerror)
        raise OSError(error.errno, f"cannot open a channel to {name}: {reason}") from error
    finally:
        # Unless a channel has taken it over.
        sock.close()


_REFUSALS = {
    errno.ENOENT: "there is no such file; has the server started?",
    errno.ECONNREFUSED: "nobody listens there (the server has ended, or the file is no socket)",
    errno.EACCES: "this user may not connect to it",
    errno.EPROTOTYPE: "a socket of another type listens there",
}


async def start_channel_server(callback: Callback, path: str | os.PathLike[str], *, backlog: int = 100, **terms: Any) -> ChannelServer:
    """Listens on the path of a Unix socket and calls callback(channel) for each connection, in a task if it is a coroutine function.

    path: a stale socket file there is replaced; the new one has mode 0600. terms: those of Channel, for each channel.
    The channel is the callback's to close; when the callback raises, the loop's exception handler is told and it is aborted.
    Raises OSError (EADDRINUSE when somebody listens there), ValueError for a path that is too long.
    """
    _transit.Terms(**terms)
    endpoint = listen(f"unix:{_path(path)}")
    try:
        # Nobody can connect before it listens, so nobody gets in before the mode is set.
        os.chmod(endpoint.address, 0o600)
        endpoint.socket.setblocking(False)
        # Inherited by what it accepts: what a client sends before it is accepted comes with credentials too.
        _syscall.ask_credentials(endpoint.fileno())
        endpoint.socket.listen(backlog)
        return ChannelServer(callback, endpoint, terms)
    except BaseException:
        endpoint.close()
        raise


class ChannelServer:
    """What start_channel_server() returns. As a context manager it closes, and waits for its callbacks; after an error, or a
    cancellation, it cancels them first.
    """

    def __init__(self, callback: Callback, endpoint: Endpoint, terms: dict[str, Any]) -> None:
        self._callback, self._endpoint, self._terms = callback, endpoint, terms
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._retry: asyncio.TimerHandle | None = None
        self._closed = asyncio.Event()
        self._loop.add_reader(endpoint.fileno(), self._accept)

    @property
    def path(self) -> str:
        """Where it listens."""
        return str(self._endpoint).removeprefix("unix:")

    def is_serving(self) -> bool:
        """Whether it accepts connections."""
        return not self._closed.is_set()

    def _accept(self) -> None:
        for _ in range(_IN_A_ROW):
            try:
                sock, _address = self._endpoint.socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # No descriptor is free, say. The queue stays readable: trying at once would be all that the loop does.
                self._report("a channel server cannot accept and tries again in a second", error)
                self._loop.remove_reader(self._endpoint.fileno())
                self._retry = self._loop.call_later(1, self._loop.add_reader, self._endpoint.fileno(), self._accept)
                return
            try:
                channel = AsyncChannel(sock, **self._terms)
            except OSError as error:
                sock.close()
                self._report("a channel server lost a connection", error)
                continue
            self._call(channel)

    def _call(self, channel: AsyncChannel) -> None:
        try:
            answer = self._callback(channel)
        except Exception as error:
            self._failed(channel, error)
            return
        if answer is not None:
            task = self._loop.create_task(answer)
            self._tasks.add(task)
            task.add_done_callback(partial(self._ended, channel))

    def _ended(self, channel: AsyncChannel, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            channel.abort()
        elif (error := task.exception()) is not None:
            self._failed(channel, error)

    def _failed(self, channel: AsyncChannel, error: BaseException) -> None:
        channel.abort()
        self._report("the callback of a channel server failed", error)

    def _report(self, message: str, error: BaseException) -> None:
        self._loop.call_exception_handler({"message": message, "exception": error})

    def close(self) -> None:
        """Stops listening and removes the socket file; again does nothing. Callbacks and their channels go on."""
        if self._retry is not None:
            self._retry.cancel()
        if not self._closed.is_set():
            if not self._loop.is_closed():
                self._loop.remove_reader(self._endpoint.fileno())
            self._endpoint.close()
            self._closed.set()

    async def wait_closed(self) -> None:
        """Waits until it is closed and every callback has ended."""
        await self._closed.wait()
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def serve_forever(self) -> None:
        """Waits until it is closed; cancelled, it closes."""
        try:
            await self._closed.wait()
        finally:
            self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
        try:
            if kind is None:
                await self.wait_closed()
        finally:
            for task in self._tasks:
                task.cancel()
            await self.wait_closed()

    def __repr__(self) -> str:
        return f"<ChannelServer {self.path}{'' if self.is_serving() else ' closed'}>"


def _path(path: str | os.PathLike[str]) -> str:
    name = os.fsdecode(path)
    size = len(os.fsencode(name))
    if not name or "\0" in name or size > PATH_MAX:
        raise ValueError(f"the path of a Unix socket has 1 to {PATH_MAX} bytes and no null byte; {name!r} has {size} bytes")
    return name
