"""The one door to C. A return code becomes an exception here, EINTR is retried here, and waiting happens here.

Numbers in, numbers out: this file knows neither owners nor messages.
"""

from __future__ import annotations

import errno
import os
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, NoReturn

try:
    from fdpass._native import ffi, lib
except ImportError as error:
    if os.name == "nt":
        raise ImportError("fdpass needs descriptors in control messages (SCM_RIGHTS), which Windows does not have.") from error
    raise

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Sequence

# Numbers from <sys/socket.h>, without the enum machinery of the socket module's attributes.
from _socket import MSG_DONTWAIT

MAX_FDS: int = lib.FDP_MAX_FDS
#: 64 KiB is the largest read that reuses a buffer; beyond it one is allocated for the call.
POOLED = 1 << 16

_EINTR, _EAGAIN = -errno.EINTR, -errno.EAGAIN
_lib_wait = lib.fdp_wait
_uncleared = ffi.new_allocator(should_clear_after_alloc=False)


def fail(code: int, what: str) -> NoReturn:
    """Raises the OSError for a negative return code; `what` says what was attempted."""
    raise OSError(-code, f"{os.strerror(-code)} ({what})")


def wait(fd: int, writing: bool, deadline: float | None, what: str) -> None:
    """Waits with poll(2) until fd is ready. deadline: time.monotonic() seconds, None for ever. Raises TimeoutError, OSError."""
    while True:
        # Rounded up: a wait that ends a fraction too early would spin until the deadline.
        milliseconds = -1 if deadline is None else min(max(0, int((deadline - monotonic()) * 1000 + 0.999)), 0x7FFFFFFF)
        ready = _lib_wait(fd, writing, milliseconds)
        if ready > 0:
            return
        if ready == 0 and deadline is not None:
            if monotonic() >= deadline:
                raise TimeoutError(errno.ETIMEDOUT, f"timed out ({what})")
        elif ready != _EINTR:
            fail(ready, what)


#: Places of fdp_message's fields in Scratch.ints.
PLAIN, FRAME, SIZE, RECEIVED, OWN, FIRST = (
    ffi.offsetof("fdp_message", name) // 4 for name in ("plain", "frame", "size", "received", "own", "fds")
)


class Scratch:
    """What one receive needs in memory, reused. Whoever drops it unread closes what it still holds.

    A number leaves `message` in bytecodes that have no call between them: there CPython neither runs a signal handler nor
    switches threads, so a Ctrl-C cannot lose a descriptor, nor close one twice.
    """

    __slots__ = ("buffer", "ints", "message", "view")

    def __init__(self) -> None:
        self.message: Any = ffi.gc(ffi.new("fdp_message *"), lib.fdp_message_close)
        #: The same struct as ints, through Python's own memoryview: half the price of cffi's attributes.
        self.ints = memoryview(ffi.buffer(self.message)).cast("i")
        self.buffer: Any = _uncleared("char[]", POOLED)
        self.view: Any = ffi.buffer(self.buffer)


#: pool.pop() or Scratch() borrows one, pool.append() returns it once its descriptors were taken or closed. A signal handler or
#: another thread in the middle of ours gets one of its own, so there are never more than receives were under way at once.
pool: list[Scratch] = []


def close_message(message: Any) -> None:
    """Closes what has not been taken."""
    lib.fdp_message_close(message)


def numbers(message: Any) -> list[int]:
    """The numbers in a message, as a list; they still belong to the message."""
    found: list[int] = ffi.unpack(message.fds, message.nfds)
    return found


#: One sendmsg or recvmsg, nothing else: a count or -errno. A negative one goes to settle() with the call to repeat.
send_once, send_one_once, recv_once = lib.fdp_send, lib.fdp_send_one, lib.fdp_recv
send_frame_once, recv_frame_once = lib.fdp_send_frame, lib.fdp_recv_frame
#: Where no ends() are to be refused.
NO_ENDS = ffi.NULL


def settle(code: int, again: Callable[[], int], fd: int, writing: bool, flags: int, timeout: float | None, what: str) -> int:
    """Turns the result of a first try into a count, by waiting and trying again where that is due.

    EINTR: Python's signal handlers have run by now, so again. EAGAIN: waits, except with timeout 0 or the caller's own
    MSG_DONTWAIT. timeout: seconds; 0 does not wait, None waits for ever. Raises OSError, TimeoutError, BlockingIOError.
    """
    deadline = monotonic() + timeout if timeout else None
    while code < 0:
        # timeout None and yet EAGAIN: another holder made the shared description non-blocking.
        if code == _EAGAIN and timeout != 0 and (timeout is not None or not flags & MSG_DONTWAIT):
            wait(fd, writing, deadline, what)
        elif code != _EINTR:
            fail(code, what)
        code = again()
    return code


def send(fd: int, data: Any, fds: Sequence[int], flags: int, timeout: float | None, what: str) -> int:
    """One message. Returns the bytes that went (possibly fewer than given: the descriptors have gone with the first of them)."""
    per_call = flags if timeout is None else flags | MSG_DONTWAIT
    code: int = send_once(fd, data, len(data), fds, len(fds), per_call)
    if code < 0:
        return settle(code, partial(send_once, fd, data, len(data), fds, len(fds), per_call), fd, True, flags, timeout, what)
    return code


def recv(fd: int, buffer: Any, size: int, message: Any, flags: int, timeout: float | None, what: str) -> int:
    """One message into buffer and message. Returns the bytes that came, 0 at the end."""
    per_call = flags if timeout is None else flags | MSG_DONTWAIT
    code: int = recv_once(fd, buffer, size, per_call, message)
    if code < 0:
        return settle(code, partial(recv_once, fd, buffer, size, per_call, message), fd, False, flags, timeout, what)
    return code


def buffer_of(size: int) -> Any:
    """An uninitialised char[size]."""
    return _uncleared("char[]", size)


#: What as_memory() returns.
Memory = type(ffi.from_buffer(b""))


def as_memory(data: Any) -> Any:
    """A C pointer to the bytes of any contiguous buffer, without a copy."""
    return ffi.from_buffer(data)


def release(memory: Any) -> None:
    """Gives back what as_memory holds, so that the buffer may be resized again."""
    ffi.release(memory)


def as_ints(numbers: array[int]) -> Any:
    """An array("i") as a C array of int, without a copy."""
    return ffi.from_buffer("int[]", numbers)


def unpack(buffer: Any, size: int) -> bytes:
    """The first size bytes of a char[]."""
    return bytes(ffi.buffer(buffer, size))


def address_of(message: Any) -> str | bytes | None:
    """The sender's name as socket.recvmsg gives it: text for a path, bytes for an abstract name, None without one."""
    size = message.address_size
    if not size:
        return None
    raw = bytes(ffi.buffer(message.address, size))
    return raw if raw[0] == 0 else os.fsdecode(raw.split(b"\0", 1)[0])


def dup(fd: int) -> int:
    """A close-on-exec duplicate, numbered 3 or higher. Raises OSError."""
    copy: int = lib.fdp_dup(fd)
    if copy < 0:
        fail(copy, f"duplicating descriptor {fd}")
    return copy


def adopt(fd: int) -> int:
    """Makes fd close-on-exec and numbered 3 or higher; returns its number. Raises OSError, fd is then unchanged."""
    number: int = lib.fdp_adopt(fd)
    if number < 0:
        fail(number, f"taking over descriptor {fd}")
    return number


def pair(kind: int) -> tuple[int, int]:
    """A connected pair of AF_UNIX sockets that ask for credentials. Raises OSError."""
    ends = ffi.new("int[2]")
    code = lib.fdp_pair(kind, ends)
    if code < 0:
        fail(code, "making a socket pair")
    return ends[0], ends[1]


def ask_credentials(fd: int) -> None:
    """SO_PASSCRED. Raises OSError."""
    code = lib.fdp_ask_credentials(fd)
    if code < 0:
        fail(code, f"asking for credentials on descriptor {fd}")


def refuse_rights(fd: int) -> bool:
    """SO_PASSRIGHTS off; whether the system knows it. Raises OSError."""
    code = lib.fdp_refuse_rights(fd)
    if code < 0:
        fail(code, f"refusing descriptors on descriptor {fd}")
    return bool(code)


_ends = ffi.typeof("unsigned long long[2]")


def ends() -> Any:
    """What find_end() remembers of one socket."""
    return ffi.new(_ends)


def find_end(sock: int, fds: Sequence[int], ends: Any) -> int:
    """The place of the first of fds that is sock itself or what it is connected to, len(fds) when there is none. Raises OSError."""
    place: int = lib.fdp_find_end(sock, fds, len(fds), ends)
    if place < 0:
        fail(place, f"asking which socket descriptor {sock} is")
    return place


def map_privately(fd: int, size: int) -> memoryview:
    """The first size bytes of a file as memory that is written by nobody else. It lives as long as somebody looks at it. Raises OSError."""
    place = ffi.new("char **")
    code = lib.fdp_map(fd, size, place)
    if code < 0:
        fail(code, f"mapping {size} bytes of descriptor {fd}")
    memory = ffi.gc(place[0], lambda start: lib.fdp_unmap(start, size), size)
    return memoryview(ffi.buffer(memory, size)).cast("B")


def probe(fd: int) -> Any:
    """The fdp_socket_info of a socket (family, type, protocol, listening, nonblocking), None when fd is no socket. Raises OSError."""
    info = ffi.new("fdp_socket_info *")
    code = lib.fdp_socket_probe(fd, info)
    if code == -errno.ENOTSOCK:
        return None
    if code < 0:
        fail(code, f"asking what descriptor {fd} is")
    return info


def watch_start(pidfd: int, channel: int, supervisor: int, grace: float) -> None:
    """Ends this process when the supervisor ends: see fdp_watch_start. grace: seconds. Raises OSError."""
    code = lib.fdp_watch_start(pidfd, channel, supervisor, int(grace * 1000))
    if code < 0:
        fail(code, "starting the watch on the supervisor")


def watch_stop(in_child: bool = False) -> None:
    """Ends the watch; in a forked child forgets the parent's."""
    lib.fdp_watch_stop(in_child)


TICKET = lib.FDP_TICKET
GIVEN, CLAIMED, EXPIRED, WITHDRAWN = lib.FDP_GIVEN, lib.FDP_CLAIMED, lib.FDP_EXPIRED, lib.FDP_WITHDRAWN
UNKNOWN, REFUSED, BUSY = lib.FDP_UNKNOWN, lib.FDP_REFUSED, lib.FDP_BUSY
#: Place of fdp_claim's descriptor in Claim.ints.
CLAIM_FD = ffi.offsetof("fdp_claim", "fd") // 4


def _ms_until(deadline: float) -> int:
    return max(0, int((deadline - monotonic()) * 1000 + 0.999))


class Claim:
    """What one claim needs in memory, reused. Whoever drops it in the middle closes what it holds. See Scratch for the numbers."""

    __slots__ = ("claim", "ints")

    def __init__(self) -> None:
        claim = ffi.new("fdp_claim *")
        claim.spare = claim.fd = -1
        self.claim: Any = ffi.gc(claim, lib.fdp_claim_close)
        self.ints = memoryview(ffi.buffer(self.claim)).cast("i")

    def prepare(self, ticket: bytes) -> None:
        """Begins a claim."""
        self.claim.stage = 0
        self.claim.ticket = ticket

    def run(self, sock: int, deadline: float) -> int:
        """Asks over a connection; returns 0 or -errno, as fdp_claim_run. deadline: time.monotonic() seconds."""
        while True:
            code: int = lib.fdp_claim_run(sock, self.claim, _ms_until(deadline))
            if code != _EINTR:
                return code

    def take(self) -> int:
        """Asks this process's own store; returns 0 or -errno."""
        code: int = lib.fdp_store_take(self.claim)
        return code

    @property
    def status(self) -> int:
        """GIVEN and so on, after a 0."""
        status: int = self.claim.status
        return status

    @property
    def pid(self) -> int:
        """Of the claimant that came before; 0 where nobody knows."""
        pid: int = self.claim.pid
        return pid


#: What peer_uid() gives for a user that the kernel does not name here.
NOBODY: int = lib.FDP_NOBODY
_uid = ffi.typeof("unsigned int[1]")


class Connection:
    """A connection to an owner of tickets. The number lives in memory of C's: whatever a signal handler raises, it is not lost."""

    __slots__ = ("__weakref__", "_place")

    def __init__(self) -> None:
        self._place: Any = ffi.gc(ffi.new("int *", -1), lib.fdp_claim_leave)

    @property
    def fd(self) -> int:
        """The number, -1 when closed. Borrowed."""
        fd: int = self._place[0]
        return fd

    def open(self, path: bytes, deadline: float) -> int:
        """Connects; returns 0 or -errno, as fdp_claim_open. deadline: time.monotonic() seconds."""
        while True:
            code: int = lib.fdp_claim_open(path, _ms_until(deadline), self._place)
            if code != _EINTR:
                return code

    def close(self) -> None:
        """Again does nothing."""
        lib.fdp_claim_leave(self._place)

    def forget(self) -> None:
        """In a forked child: C has closed it, and the number may be another's."""
        self._place[0] = -1


def peer_uid(sock: int) -> int:
    """The effective uid of whoever listens where sock is connected to, or NOBODY. Raises OSError."""
    uid = ffi.new(_uid)
    code = lib.fdp_peer_uid(sock, uid)
    if code < 0:
        fail(code, "asking who answers for the owner of a pickled descriptor")
    found: int = uid[0]
    return found


_put = lib.fdp_store_put
_ticket = ffi.typeof("unsigned char[16]")


def store_start(listener: int, lock: int) -> bool:
    """Starts the thread of the store. True: it has taken both descriptors; False: one was running. Raises OSError."""
    code: int = lib.fdp_store_start(listener, lock)
    if code < 0:
        fail(code, "starting the thread that keeps pickled descriptors")
    return bool(code)


def store_put(fd: int, claims: int, ttl_ns: int, bound: int) -> bytes | int:
    """The ticket of a new entry, or -errno; fd is borrowed."""
    ticket = ffi.new(_ticket)
    code: int = _put(fd, claims, ttl_ns, bound, ticket)
    return code if code < 0 else bytes(ffi.buffer(ticket))


def store_withdraw(ticket: bytes) -> bool:
    """Ends a ticket; False when there was none."""
    return bool(lib.fdp_store_withdraw(ticket))


def store_count() -> Any:
    """The fdp_store_stats of now."""
    stats = ffi.new("fdp_store_stats *")
    lib.fdp_store_count(stats)
    return stats


def store_bound(bound: int) -> int:
    """How many tickets fit under this bound (0: none given) and the present limit."""
    most: int = lib.fdp_store_bound(bound)
    return most


def store_stop() -> None:
    """Ends the thread and every ticket."""
    lib.fdp_store_stop()


#: Connections that a worker may have unreceived, at most.
CREDITS: int = lib.FDP_CREDITS
#: Places of words in a line of the board, as C knows them: see fdpass/_board.py. HUNGRY is in the group's own line.
BOARD_WORDS = {name: getattr(lib, f"FDP_{name}") for name in ("WORDS", "OPEN", "ACCEPTED", "LOAD", "ASKED", "HUNGRY")}


class Dispatcher:
    """The thread that accepts for a group's workers: see fdp_dispatch_start. Ended by stop(), after which every call does nothing."""

    __slots__ = ("_handle",)

    def __init__(self, listener: int, board: int, lines: int, least_loaded: bool, credits: int) -> None:
        place = ffi.new("fdp_dispatcher **")
        order = lib.FDP_LEAST_LOADED if least_loaded else lib.FDP_ROUND_ROBIN
        code = lib.fdp_dispatch_start(listener, board, lines, order, credits, place)
        if code < 0:
            fail(code, "starting the thread that dispatches connections")
        self._handle: Any = place[0]

    def attach(self, line: int) -> int:
        """The end of a socket pair for the worker of a line, the caller's to send and close. Raises OSError."""
        end: int = lib.fdp_dispatch_attach(self._handle, line) if self._handle is not None else -errno.ENOTCONN
        if end < 0:
            fail(end, f"making ready to dispatch to line {line}")
        return end

    def launched(self, line: int, pidfd: int) -> None:
        """That worker has started; pidfd is borrowed, -1: none. Raises OSError."""
        if self._handle is not None and (code := lib.fdp_dispatch_launched(self._handle, line, pidfd)) < 0:
            fail(code, f"watching the worker of line {line}")

    def retire(self, line: int) -> None:
        """It gets nothing more; what it has not received goes to others."""
        if self._handle is not None:
            lib.fdp_dispatch_retire(self._handle, line)

    def ended(self, line: int) -> None:
        """Its process is gone; the line is free."""
        if self._handle is not None:
            lib.fdp_dispatch_ended(self._handle, line)

    def count(self) -> dict[str, int]:
        """The fdp_dispatch_stats of now, all zero once stopped."""
        stats = ffi.new("fdp_dispatch_stats *")
        if self._handle is not None:
            lib.fdp_dispatch_count(self._handle, stats)
        return {name: int(getattr(stats, name)) for name, _ in ffi.typeof("fdp_dispatch_stats").fields}

    def stop(self) -> None:
        """Ends the thread and closes what it holds; in a forked child only forgets it. Again does nothing."""
        handle, self._handle = self._handle, None
        if handle is not None:
            lib.fdp_dispatch_stop(handle)


class Asking:
    """A worker's side of a dispatcher. sock: its end of the pair, borrowed; line, group: its own line of the board, and the group's."""

    __slots__ = ("_asked", "_hungry", "_sock", "_spare")

    def __init__(self, sock: int, line: memoryview, group: memoryview) -> None:
        words = BOARD_WORDS
        self._sock = sock
        # They keep the page mapped.
        self._asked = ffi.from_buffer("long long[]", line[words["ASKED"] : words["ASKED"] + 1], require_writable=True)
        self._hungry = ffi.from_buffer("long long[]", group[words["HUNGRY"] : words["HUNGRY"] + 1])
        self._spare = ffi.new("int *", -1)

    def ask(self, count: int, wake: bool = False) -> None:
        """Asks for that many connections in all; wake: tells the dispatcher at once, as befits a count that went down."""
        lib.fdp_ask(self._sock, self._asked, self._hungry, count, wake)

    def take(self) -> int:
        """The next connection, the caller's, or -errno: see fdp_take."""
        number: int = lib.fdp_take(self._sock, self._spare)
        return number

    def reserve(self) -> bool:
        """Whether a number is held free for the next connection, after trying."""
        if self._spare[0] < 0 and (copy := lib.fdp_dup(self._sock)) >= 0:
            self._spare[0] = copy
        return bool(self._spare[0] >= 0)

    def close(self) -> None:
        """Gives that number up; nothing is received afterwards."""
        spare, self._spare[0] = self._spare[0], -1
        if spare >= 0:
            os.close(spare)


def forced() -> frozenset[str]:
    """Fallbacks that FDPASS_FORCE asks for, so that tests cover them on a system that has the real thing."""
    return frozenset(filter(None, os.environ.get("FDPASS_FORCE", "").split(",")))
