"""Frames in transit: an object or a message on its way into a socket, and out of one. Channel and AsyncChannel stand on it.

One system call at a time, never a wait: whoever calls knows how to wait.
"""

from __future__ import annotations

import _socket
import copyreg
import os
import pickle
from contextlib import ExitStack
from errno import ELOOP
from operator import methodcaller
from socket import socket as Socket
from typing import TYPE_CHECKING, Any

from fdpass import _carriers, _frames, _memory, _syscall
from fdpass.ancillary import _explain_send, number_of
from fdpass.errors import (
    BrokenChannelError,
    DescriptorsLostError,
    EndOfChannel,
    PeerRefusedError,
    ProtocolError,
    WrongDescriptorError,
)
from fdpass.fds import OwnedFd, _own, kind_of, take

# Its import also fills in the reducers for raw sockets and connections, which sending relies on.
from fdpass.handles import rebuild_socket, refuse_tls
from fdpass.limits import lost_reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from typing_extensions import Buffer

    from fdpass.ancillary import HasFileno

#: A payload up to this size is copied behind its header, so that a frame is one system call; a longer one is not copied.
_JOINED = 1 << 16
#: A payload up to this size is received into memory that is used again, while there is a room left.
_ROOM = 1 << 22
_rooms: list[bytearray | None] = [None, None]
#: A larger one is received into memory that grows by what has come, and by this at first: nothing is allocated on a header's word.
_STEP = 1 << 19
#: A payload is sent in steps of this size.
_CHUNK = 1 << 20
#: Bytes from which a buffer inside an object travels as memory. Below, copying is faster than making a file.
LARGE = 1 << 20
#: The uid in anonymous credentials, which the kernel writes, with pid 0, where it does not know the sender.
_NO_UID = 65534
_LOOP = ": waiting inside itself it could never be received, nor closed"

_pool, _Scratch, _POOLED, _HEADER = _syscall.pool, _syscall.Scratch, _syscall.POOLED, _frames.HEADER_SIZE
_PLAIN, _FRAME, _SIZE, _RECEIVED = _syscall.PLAIN, _syscall.FRAME, _syscall.SIZE, _syscall.RECEIVED
_OWN, _FIRST, _LEAST = _syscall.OWN, _syscall.FIRST, _frames.LEAST
_raw_reducer = _carriers.raw_reducer
_getuid, _loads, _new, _encode = os.getuid, pickle.loads, object.__new__, _frames.encode


class Terms:
    """What one end sends and accepts; the same for both directions.

    max_size: bytes in one frame, large buffers included. max_fds: descriptors in one frame. allow_pickle: False for messages only.
    peer: uids beside this process's own whose pickles are loaded, one or several. large: bytes from which a buffer inside an object
    travels as memory, None for never. Raises TypeError, ValueError.
    """

    __slots__ = ("allow_pickle", "large", "max_fds", "max_size", "memory_from", "peer")

    def __init__(
        self,
        max_size: int = _frames.MAX_SIZE,
        max_fds: int = _frames.MAX_FDS,
        allow_pickle: bool = True,
        peer: int | Iterable[int] = (),
        large: int | None = LARGE,
    ) -> None:
        uids = [peer] if isinstance(peer, int) else list(peer)
        for name, value in [("max_size", max_size), ("max_fds", max_fds), *(("peer", uid) for uid in uids)]:
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} is a number (int), not {type(value).__name__}")
            if value < 0:
                raise ValueError(f"{name} is 0 or more, not {value}")
        if large is not None and large < 1:
            raise ValueError(f"large is 1 byte or more, or None, not {large}")
        self.max_size, self.max_fds, self.allow_pickle, self.peer = max_size, max_fds, bool(allow_pickle), frozenset(uids)
        self.large = large
        #: The same, None also where no memory file could be sent.
        self.memory_from = large if max_fds and _memory.AVAILABLE else None

    def __reduce__(self) -> tuple[Any, ...]:
        return Terms, (self.max_size, self.max_fds, self.allow_pickle, self.peer, self.large)


def adopt(sock: Socket | OwnedFd, terms: Terms) -> OwnedFd:
    """Takes a connected AF_UNIX stream socket over, detaching sock, and has the kernel name senders.

    Raises TypeError, ValueError, WrongDescriptorError, OSError; sock is then untouched.
    """
    if not isinstance(sock, (Socket, OwnedFd)):
        raise TypeError(f"a channel takes a socket or an OwnedFd, not {type(sock).__name__}")
    if isinstance(sock, Socket):
        refuse_tls(sock)
    fd = sock.fileno()
    if fd < 0:
        raise ValueError("the socket is closed")
    info = _syscall.probe(fd)
    if info is None or info.family != _socket.AF_UNIX or info.type != _socket.SOCK_STREAM or info.listening:
        wanted, actual = "a connected AF_UNIX stream socket", kind_of(fd)
        if info is not None:
            actual = "a listening socket" if info.listening else "a socket of another kind"
        raise WrongDescriptorError(f"a channel needs {wanted}; descriptor {fd} is {actual}", wanted, actual)
    prepare(fd, terms)
    return OwnedFd(sock.release() if isinstance(sock, OwnedFd) else sock.detach())


def prepare(fd: int, terms: Terms) -> None:
    """What the terms ask of the socket itself. Raises OSError."""
    if terms.allow_pickle:
        _syscall.ask_credentials(fd)
    elif not terms.max_fds:
        # Then a descriptor is refused on the sender's side, before it is in flight.
        _syscall.refuse_rights(fd)


# -- on the way out ------------------------------------------------------------------------------------------------------------


class _Pickler(pickle.Pickler):
    """Pickles what goes into a frame: sockets and connections too, whose own pickling knows nothing of frames."""

    def __init__(self) -> None:
        #: The pickle; large bytes objects are pieces of their own, not copied.
        self.pieces: list[Any] = []
        super().__init__(_Sink(self.pieces.append), 5, buffer_callback=self._inside)
        self.fds: list[int] = []
        #: The objects that had a descriptor.
        self.items: list[Any] = []
        self.views: list[memoryview] = []
        self.large: int | None = None
        #: Of the carrier in force, set where it may be asked for: only an object that has a reducer can ask.
        self.token: Any = None
        self.dispatch_table = _Reducers({Socket: self._socket, memoryview: self._memoryview})
        self.dispatch_table.pickler = self

    def _socket(self, sock: Socket) -> Any:
        """As handles.reduce_socket and _carriers.carry(), by the shortest way."""
        fd = sock.fileno()
        if fd < 0:
            raise ValueError("socket is closed: it has no descriptor to pass on")
        self.items.append(sock)
        fds = self.fds
        fds.append(fd)
        return rebuild_socket, (("frame", len(fds) - 1), sock.gettimeout())

    def _memoryview(self, view: memoryview) -> Any:
        return memoryview, (pickle.PickleBuffer(view if view.contiguous else view.tobytes()),)

    def _other(self, obj: Any) -> Any:
        """Of another class that has a reducer of ours."""
        self.items.append(obj)
        return _raw_reducer(type(obj))(obj)  # type: ignore[misc]  # it has one

    def _inside(self, buffer: pickle.PickleBuffer) -> bool:
        """Whether a buffer stays in the pickle."""
        if self.large is None:
            return True
        try:
            view = buffer.raw()
        except BufferError:  # not contiguous: pickle refuses it in its own words
            return True
        if view.nbytes < self.large:
            return True
        self.views.append(view)
        return False

    def empty(self) -> None:
        """Lets go of everything, what was made only while pickling among it: a handle from somebody's __reduce__, for instance."""
        self.clear_memo()
        self.pieces.clear()
        if self.items or self.fds or self.views:
            self.fds, self.items, self.views = [], [], []


#: What a pickler does with an object of a class without reducer.
_by_itself = methodcaller("__reduce_ex__", 5)


class _Reducers(dict[type, Any]):
    """Which reducer a class has: asked by the pickler in C, which calls nothing for a class that is in here."""

    pickler: _Pickler

    def __missing__(self, cls: type) -> Any:
        if self.pickler.token is None:
            self.pickler.token = _carriers.outgoing.set(self.pickler.fds)
        if _raw_reducer(cls) is not None:
            return self.pickler._other
        reducer = copyreg.dispatch_table.get(cls)
        if reducer is None and issubclass(cls, type):
            raise KeyError(cls)
        return reducer or _by_itself


class _Sink:
    """As much of a file as a pickler needs."""

    __slots__ = ("write",)

    def __init__(self, write: Callable[[Any], None]) -> None:
        self.write = write


_picklers: list[_Pickler] = []


def pack_object(obj: Any, terms: Terms) -> Outgoing:
    """The frame of an object. Raises what pickling raises, ValueError beyond the terms."""
    if not terms.allow_pickle:
        raise ValueError("this channel carries only messages (allow_pickle=False): use send_message()")
    try:
        pickler = _picklers.pop()
    except IndexError:
        pickler = _Pickler()
    pickler.large = terms.memory_from
    try:
        try:
            pickler.dump(obj)
        finally:
            if pickler.token is not None:
                token, pickler.token = pickler.token, None
                _carriers.outgoing.reset(token)
        if len(pickler.pieces) > 1:
            pickler.pieces[:] = [piece.raw() if type(piece) is pickle.PickleBuffer else piece for piece in pickler.pieces]
        if not pickler.views:
            return Outgoing(_frames.OBJECT, pickler.pieces, pickler.fds, terms, pickler)
        sizes = [view.nbytes for view in pickler.views]
        pickler.pieces.append(_frames.encode_sizes(sizes))
        _check(sum(map(len, pickler.pieces)) + sum(sizes), len(pickler.fds) + 1, terms)
        memory = _memory.sealed(pickler.views, _frames.places(sizes))
        with ExitStack() as otherwise:
            otherwise.callback(memory.close)
            frame = Outgoing(_frames.OBJECT_AND_MEMORY, pickler.pieces, [*pickler.fds, memory.fileno()], terms, pickler)
            otherwise.pop_all()
        frame._own = [memory]
        return frame
    except BaseException:
        pickler.empty()
        raise


def pack_message(data: Buffer, fds: Iterable[int | HasFileno], terms: Terms) -> Outgoing:
    """The frame of bytes and descriptors. Raises TypeError, ValueError."""
    if type(data) is not bytes:
        view = memoryview(data)
        data = view.cast("B") if view.c_contiguous and view.nbytes else view.tobytes()
    return Outgoing(_frames.DATA, [data], [number_of(item) for item in fds] if fds else [], terms, None)


def _check(size: int, fds: int, terms: Terms) -> None:
    if size > terms.max_size:
        raise ValueError(f"a payload of {size} bytes: this channel sends {terms.max_size} at most (max_size)")
    if fds > terms.max_fds:
        raise ValueError(f"{fds} descriptors in one frame: this channel sends {terms.max_fds} at most (max_fds)")


class Outgoing:
    """A frame on its way out; its descriptors are borrowed until it has gone, unless hold() was called. Made by pack_...()."""

    #: Whether the whole frame has gone, and whether a byte of it has: then it cannot be given up without ending the channel.
    done = started = False
    _unsure = False
    #: Duplicates, and the memory file.
    _own: Sequence[OwnedFd] = ()
    #: What follows, last first.
    _parts: Sequence[tuple[Any, list[int]]] = ()

    def __init__(self, kind: int, pieces: list[Any], fds: list[int], terms: Terms, pickler: _Pickler | None) -> None:
        size, count = len(pieces[0]) if len(pieces) == 1 else sum(map(len, pieces)), len(fds)
        if size > terms.max_size or count > terms.max_fds:
            _check(size, count, terms)
        self.fds, self._pickler = fds, pickler
        header = _encode(kind, size, count)
        if len(pieces) == 1 and size <= _JOINED and count <= _frames.BATCH:
            self._data, self._numbers = (header + pieces[0]).ljust(_LEAST, b"\0"), fds
            return
        parts: list[tuple[Any, list[int]]] = [(b"\0", fds[batch]) for batch in _frames.batches(count)] or [(b"", [])]
        parts[0] = header, parts[0][1]
        padding = _frames.padding(size, count)
        for piece in [*pieces, bytes(padding)] if padding else pieces:
            # Small ones ride with what is before them: a system call costs more than a copy.
            last, numbers = parts[-1]
            if len(last) + len(piece) > _JOINED:
                parts.append((memoryview(piece), []))
            else:
                parts[-1] = b"".join([last, piece]), numbers
        parts.reverse()
        self._data, self._numbers = parts.pop()
        self._parts = parts

    def refuse_ends(self, fd: int, ends: Any) -> None:
        """Raises ValueError when the frame holds the channel's own socket or the one at its other end. ends: of _syscall.ends()."""
        place = _syscall.find_end(fd, self.fds, ends)
        if place < len(self.fds):
            raise ValueError(f"descriptor {self.fds[place]} ({place + 1} of {len(self.fds)}) is an end of this channel{_LOOP}")

    def hold(self) -> None:
        """What has not gone yet is the frame's own from now on: its descriptors may be closed, its data changed. Raises OSError."""
        own = self._own = [*self._own]
        parts: list[tuple[Any, list[int]]] = []
        for data, numbers in [*self._parts, (self._data, self._numbers)]:
            copies = []
            for number in numbers:
                own.append(_own(_syscall.dup(number)))
                copies.append(own[-1].fileno())
            # Bytes do not change. A pickler hands over a large bytearray, or what is behind a PickleBuffer, as it is: the sender's.
            if type(data) is memoryview and type(data.obj) is not bytes:
                data = bytes(data)
            parts.append((data, copies))
        self._data, self._numbers = parts.pop()
        self._parts = parts

    def send_once(self, fd: int, flags: int = 0, ends: Any = _syscall.NO_ENDS) -> int:
        """One sendmsg: the bytes that went, or -errno. With ends a frame of one batch does as refuse_ends()."""
        data, numbers = self._data, self._numbers
        if type(data) is bytes:
            self._unsure = True
            code: int = _syscall.send_frame_once(fd, data, len(data), numbers, len(numbers), flags, ends)
        else:
            # A step at a time: a timed-out send must not have promised C more than it can tell about.
            step = _syscall.as_memory(data[:_CHUNK])
            try:
                self._unsure = True
                code = _syscall.send_frame_once(fd, step, len(step), numbers, len(numbers), flags, ends)
            finally:
                # Also on the way out of an error: a memoryview that such a pointer holds crashes the cycle collector.
                _syscall.release(step)
        self._unsure = False
        if code > 0:
            self.started = True
            if code < len(data):
                # The descriptors have gone with the first byte, however few bytes went.
                self._data, self._numbers = data[code:], []
            elif self._parts:
                self._data, self._numbers = self._parts.pop()  # type: ignore[attr-defined]  # a list, unless it is empty
            else:
                self.done = True
        return code

    def fail(self, code: int) -> None:
        """Raises the OSError of a negative code, ValueError for an end of the channel itself."""
        if code == -ELOOP:
            raise ValueError(f"among {len(self.fds)} descriptors is an end of this channel{_LOOP}")
        try:
            _syscall.fail(code, "sending a frame")
        except OSError as error:
            if not self.started:
                _explain_send(error, list(self._numbers))
            raise

    def verdict(self, error: BaseException) -> BrokenChannelError | None:
        """Whether the channel ends with this error, in the middle of a frame; None when nothing has gone and it goes on."""
        if not self.started and not self._unsure:
            return None
        return BrokenChannelError(f"a frame broke off while it was being sent: {error or type(error).__name__}")

    def finish(self, consume: bool = False) -> None:
        """Lets go of everything, sent or not. consume: also closes the objects that had descriptors, for which it must have been sent."""
        for owned in self._own:
            owned.close()
        self._data, self._parts = b"", ()
        pickler, self._pickler = self._pickler, None
        if pickler is None:
            return
        items = pickler.items
        pickler.empty()
        _picklers.append(pickler)
        if consume:
            with ExitStack() as closing:
                for item in items:
                    closing.callback(item.close)


# -- on the way in -------------------------------------------------------------------------------------------------------------


class Incoming:
    """A frame on its way in: its bytes and descriptors so far, and what the kernel says about whoever sent each part."""

    header: _frames.Header | None = None
    #: Whether a byte has come: then the channel cannot go on without the rest.
    started = False
    _whole = False
    _head: bytes = b""
    _data: bytes | bytearray = b""
    _lost: tuple[str, int | None, int] | None = None
    _stranger: str | None = None
    _buffers: list[memoryview] | None = None
    _fillers = _have = _padding = 0

    def __init__(self, terms: Terms, objects: bool = False) -> None:
        self._terms = terms
        #: Whether object() will be called for it, so that a plain message is an error.
        self.objects = objects
        self._owners: list[OwnedFd] = []

    def receive_once(self, fd: int, flags: int = 0) -> int:
        """One step, which never reads beyond the frame: 1 when it is whole, 0 when it is not yet, or -errno.

        Raises EndOfChannel, BrokenChannelError, ProtocolError, PeerRefusedError, and DescriptorsLostError once all of it was read.
        """
        try:
            scratch = _pool.pop()
        except IndexError:
            scratch = _Scratch()
        ints = scratch.ints
        ints[_RECEIVED] = 0
        try:
            if self.started:
                code = self._more(fd, flags, scratch)
            else:
                code = _syscall.recv_frame_once(fd, scratch.buffer, _POOLED, flags, scratch.message)
                if code >= _HEADER:
                    count, size, terms = ints[_PLAIN], ints[_SIZE], self._terms
                    # An ordinary frame, which has come whole and which C has compared with its header.
                    if (
                        ints[_FRAME] == self.objects
                        and count <= terms.max_fds
                        and size <= terms.max_size
                        and (ints[_OWN] or not terms.allow_pickle)
                    ):
                        self._data = scratch.view[_HEADER : _HEADER + size]
                        self.started = self._whole = True
                        if count:
                            self._take(scratch, count)
                        _pool.append(scratch)
                        return 1
                    self._head, self._data = scratch.view[:_HEADER], scratch.view[_HEADER:code]
                    self._arrived(scratch)
                elif code > 0:
                    self._head = scratch.view[:code]
                    self._arrived(scratch)
        except BaseException:
            # A signal handler may raise when bytes have come already. Their descriptors close with the scratch.
            self.started = self.started or ints[_RECEIVED] > 0
            raise
        _pool.append(scratch)
        if code > 0:
            return self._judge()
        if code == 0:
            if self.started:
                raise BrokenChannelError("the peer is gone in the middle of a frame")
            raise EndOfChannel("the peer closed the channel")
        return code

    def _more(self, fd: int, flags: int, scratch: _syscall.Scratch) -> int:
        """A receive after the first: of the header, the filler bytes, the payload or the padding."""
        if self.header is None:
            wanted = _HEADER - len(self._head)
        elif self._fillers:
            wanted = min(self._fillers, _POOLED)
        elif self._have < self.header.size:
            return self._receive_payload(fd, flags, scratch, self.header.size)
        else:
            wanted = self._padding
        code: int = _syscall.recv_once(fd, scratch.buffer, wanted, flags, scratch.message)
        if code > 0:
            self._arrived(scratch)
            if self.header is None:
                self._head += scratch.view[:code]
            elif self._fillers:
                self._fillers -= code
            else:
                self._padding -= code
        return code

    def _receive_payload(self, fd: int, flags: int, scratch: _syscall.Scratch, size: int) -> int:
        """A receive straight into the payload's memory."""
        have = self._have
        if have == len(self._data):
            room = min(size, have + max(have, _STEP))
            try:
                grown = (_rooms.pop() or bytearray(_ROOM)) if size <= _ROOM else bytearray(room)
            except IndexError:
                # bytearray() writes to all of it: a room for everybody who waits would be memory on a header's word.
                grown = bytearray(room)
            grown[:have] = self._data
            self._data = grown
        with memoryview(self._data) as window:
            step = _syscall.as_memory(window[have:size])
            try:
                code: int = _syscall.recv_once(fd, step, len(step), flags, scratch.message)
            finally:
                _syscall.release(step)
        if code > 0:
            self._arrived(scratch)
            self._have += code
        return code

    def _arrived(self, scratch: _syscall.Scratch) -> None:
        """After a receive: who sent it, what came along, what was lost."""
        self.started = True
        ints = scratch.ints
        if not ints[_OWN] and self._terms.allow_pickle:
            message = scratch.message
            # Not by the number alone, which is also that of the user "nobody".
            anonymous = not message.has_credentials or (message.uid == _NO_UID and not message.pid)
            if anonymous or message.uid not in self._terms.peer:
                self._stranger = "a sender without credentials" if anonymous else f"uid {message.uid} (pid {message.pid})"
        if ints[_PLAIN]:
            if scratch.message.dropped:
                self._lost = self._lost or lost_reason()
            if scratch.message.nfds:
                self._take(scratch, ints[_PLAIN])

    def _take(self, scratch: _syscall.Scratch, count: int) -> None:
        if count == 1:
            owned = _new(OwnedFd)
            self._owners.append(owned)
            # These two lines have no call between them: see Scratch.
            owned._fd = scratch.ints[_FIRST]
            scratch.ints[_FIRST] = -1
        else:
            self._owners += take(scratch)

    def _judge(self) -> int:
        """What has come so far: 1 for a whole frame, 0 for a part of one, or the error that it is."""
        header, owners = self.header, self._owners
        if header is None:
            if len(self._head) < _HEADER:
                if len(owners) > _syscall.MAX_FDS:
                    raise ProtocolError(f"a frame brings {len(owners)} descriptors before its header is whole")
                return 0
            header = self.header = _frames.decode(self._head, self._terms.max_size, self._terms.max_fds)
            # What came along with it.
            came, self._data = self._data, self._data[header.fillers :][: header.size]
            self._have = len(self._data)
            self._fillers = max(0, header.fillers - len(came))
            self._padding = header.padding - max(0, len(came) - header.fillers - header.size)
            if header.kind != _frames.DATA and not self._terms.allow_pickle:
                raise ProtocolError("an object arrived where only messages are taken (allow_pickle=False)")
        # Before the payload is even read, as far as it did not come along.
        if self._stranger is not None and header.kind != _frames.DATA:
            raise PeerRefusedError(f"a pickle from {self._stranger}: this process loads only from uid {self._trusted()}")
        if len(owners) > header.fds:
            raise ProtocolError(f"a frame announces {header.fds} descriptors and brings {len(owners)}")
        if self._fillers or self._have < header.size or self._padding:
            return 0
        self._whole = True
        if self._lost is not None:
            text, limit, number = self._lost
            raise DescriptorsLostError(
                f"{header.fds} descriptors were sent, {len(owners)} arrived: {text}; those that arrived were closed",
                header.fds, len(owners), limit, bytes(self._payload()), number,
            )  # fmt: skip
        if len(owners) != header.fds:
            raise ProtocolError(f"a frame announces {header.fds} descriptors and brings {len(owners)}")
        if self.objects:
            if header.kind == _frames.DATA:
                raise ProtocolError("a plain message arrived where recv() expects an object: receive it with recv_message()")
            if header.kind == _frames.OBJECT_AND_MEMORY:
                places = _frames.places(_frames.decode_sizes(self._payload(), self._terms.max_size))
                self._buffers = _memory.mapped(owners[-1], places)
                owners.pop().close()
        return 1

    def _trusted(self) -> str:
        return " and ".join(str(uid) for uid in [_getuid(), *sorted(self._terms.peer)])

    def verdict(self, error: BaseException) -> Exception | None:
        """The error with which the channel ends; None when it goes on. Another object than error, without its traceback."""
        if isinstance(error, (EndOfChannel, BrokenChannelError, ProtocolError, PeerRefusedError)):
            return type(error)(*error.args)
        if not self.started or self._whole:
            return None
        if isinstance(error, TimeoutError):
            return BrokenChannelError("timed out inside a frame")
        return BrokenChannelError(f"a frame broke off while it was being received: {error or type(error).__name__}")

    def close(self) -> None:
        """Closes the descriptors collected so far."""
        for owned in self._owners:
            owned.close()
        self._give_back()

    def message(self) -> tuple[bytes, list[OwnedFd]]:
        """The bytes and descriptors of a whole frame, which are the caller's now; of an object its pickle."""
        data = bytes(self._payload())
        self._give_back()
        return data, self._owners

    def object(self) -> Any:
        """Unpickles a whole frame; descriptors that nothing claims are closed. Raises what unpickling raises, ProtocolError, OSError."""
        claims: list[OwnedFd | None] = self._owners  # type: ignore[assignment]  # from here on they are nobody else's
        if not claims and type(self._data) is bytes and _carriers.incoming.get() is None:
            return _loads(self._data, buffers=self._buffers)
        token = _carriers.incoming.set(claims)
        try:
            return _loads(self._payload(), buffers=self._buffers)
        finally:
            _carriers.incoming.reset(token)
            for unclaimed in claims:
                if unclaimed is not None:
                    unclaimed.close()
            self._give_back()

    def _payload(self) -> bytes | memoryview:
        return self._data if type(self._data) is bytes else memoryview(self._data)[: self._have]

    def _give_back(self) -> None:
        if type(self._data) is bytearray and len(self._data) == _ROOM and len(_rooms) < 2:
            _rooms.append(self._data)
        self._data = b""
