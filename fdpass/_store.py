"""Descriptors kept until they are claimed: this process's store, and the connections over which it claims from others' stores.

A thread in C serves the claims (_native/store.c); here are its folder, the words of its errors, its end. Pickles are not known here.
"""

from __future__ import annotations

import _socket
import errno
import fcntl
import os
import stat
import sys
import threading
import weakref
from contextlib import contextmanager, suppress
from contextvars import ContextVar

# Not when the first ticket needs it: another thread may fork in the middle, and the child then waits for ever for that import.
from multiprocessing import util
from time import monotonic, sleep
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from fdpass import _syscall
from fdpass.errors import DescriptorsLostError, PeerRefusedError, TicketError
from fdpass.fds import OwnedFd, kind_of
from fdpass.limits import lost_reason, raise_fd_limit, soft_limit

if TYPE_CHECKING:
    from collections.abc import Iterator

#: path of the socket, pid and uid of the owner, the boot of the machine it runs on.
Address = tuple[str, int, int, str]

#: How long a claim waits for its owner, in seconds. The owner's thread answers at once unless the whole process is stopped.
PATIENCE = 20.0
#: Connections to owners that are kept between claims.
KEPT = 16
PREFIX = "fdpass-store-"
#: sun_path has 108 bytes on Linux and 104 elsewhere, one of them the closing zero.
_SUN_PATH = 100


class StoreStats(NamedTuple):
    """What the store of this process has in hand, and what became of its tickets so far. After a fork the child counts from zero.

    unclaimed: tickets that can be claimed, each one open descriptor. limit: how many there may be. made: tickets in all. claims:
    descriptors given. expired: tickets whose ttl ran out. withdrawn: tickets of pickles that failed. unanswered: claims that named
    no live ticket. busy: claims that were told to ask again (ETOOMANYREFS). refused: connections of another uid. dropped:
    connections closed for garbage, silence, half a packet, or answers that nobody read. connections: claimants connected now.
    """

    unclaimed: int
    limit: int
    made: int
    claims: int
    expired: int
    withdrawn: int
    unanswered: int
    busy: int
    refused: int
    dropped: int
    connections: int


def store_stats() -> StoreStats:
    """The numbers of this process's store; all zero when nothing was pickled yet. Never raises."""
    now = _syscall.store_count()
    return StoreStats(
        now.unclaimed, _syscall.store_bound(_settings.max_unclaimed or 0), now.made, now.claims, now.expired, now.withdrawn,
        now.unanswered, now.busy, now.refused, now.dropped, now.connections,
    )  # fmt: skip


class Settings(NamedTuple):
    """What register() may say about the store. max_unclaimed: None means by the limit. ttl: seconds, None for ever. linger: seconds."""

    max_unclaimed: int | None = None
    ttl: float | None = None
    linger: float = 2.0


_settings = Settings()


def settings() -> Settings:
    """Those in force."""
    return _settings


def configure(wanted: Settings) -> None:
    """Puts other settings in force, for tickets made from now on. Raises TypeError, ValueError."""
    global _settings
    most, ttl, linger = wanted
    if most is not None and (not isinstance(most, int) or isinstance(most, bool)):
        raise TypeError(f"max_unclaimed is a number of tickets (int) or None, not {type(most).__name__}")
    if most is not None and most < 1:
        raise ValueError(f"max_unclaimed is at least 1, not {most}")
    for name, seconds in (("ttl", ttl), ("linger", linger)):
        if name == "linger" or seconds is not None:
            if not isinstance(seconds, (int, float)) or isinstance(seconds, bool):
                raise TypeError(f"{name} is a number of seconds, not {type(seconds).__name__}")
            if not 0 <= seconds <= 1e9:
                raise ValueError(f"{name} is 0 seconds or more, not {seconds}")
    _settings = wanted


# -- the owner's side ----------------------------------------------------------------------------------------------------------


class _Folder:
    """A private folder with the listening socket and a locked file, which tells others' sweeps that its owner lives."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.path = ""
        #: Both are the thread's once it was started.
        self.listener = self.lock = -1
        try:
            self._make()
        except BaseException:
            self.remove()
            raise
        self.address: Address = (os.path.join(self.path, "s"), self.pid, os.geteuid(), BOOT)

    def _make(self) -> None:
        base = _base()
        _sweep(base)
        while True:
            path = os.path.join(base, PREFIX + os.urandom(8).hex())
            os.mkdir(path, 0o700)
            self.path = path
            try:
                self.lock = _raised(os.open(os.path.join(self.path, "lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(self.lock).st_nlink:
                    break
            except (FileNotFoundError, BlockingIOError):
                pass
            # Somebody's sweep came between the making and the locking and took it for a dead owner's.
            self.remove()
        sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            with _reachable(os.path.join(self.path, "s")) as path:
                sock.bind(path)
            sock.listen(128)
            # Nobody else holds this description: the thread accepts until there is nothing left.
            sock.setblocking(False)
            self.listener = _raised(sock.detach())
        finally:
            sock.close()

    def given(self) -> None:
        """The thread has taken the descriptors."""
        self.listener = self.lock = -1

    def remove(self) -> None:
        """Unlinks everything; only in the process that made it. Closes what the thread has not taken."""
        listener, self.listener, lock, self.lock = self.listener, -1, self.lock, -1
        path, self.path = self.path, ""
        if path and self.pid == os.getpid():
            _unlink(path)
        for fd in (listener, lock):
            if fd >= 0:
                os.close(fd)


_folder: _Folder | None = None
_starting = threading.RLock()


def put(fd: int, what: str, claims: int = 1) -> tuple[Address, bytes]:
    """Keeps a duplicate of fd (borrowed) until it is claimed; returns where, and the ticket. The first one starts the store.

    Raises TicketError when the store is full, ValueError when fd is not open, OSError.
    """
    ttl = _settings.ttl
    # 0 would mean for ever.
    ttl_ns = 0 if ttl is None else int(ttl * 1e9) or -1
    while True:
        folder = _folder
        if folder is None or folder.pid != os.getpid():
            folder = _start()
        ticket = _syscall.store_put(fd, claims, ttl_ns, _settings.max_unclaimed or 0)
        if isinstance(ticket, bytes):
            made = making.get()
            if made is not None:
                made.append(ticket)
            return folder.address, ticket
        if ticket != -errno.ENOTCONN:
            _not_kept(fd, what, ticket)
        _abandon(folder)


def _not_kept(fd: int, what: str, code: int) -> NoReturn:
    if code == -errno.ENOSPC:
        stats = store_stats()
        raise TicketError(
            f"the store of pickled descriptors is full: {stats.unclaimed} were pickled by this process (pid {os.getpid()}) and not yet "
            f"loaded; at most {stats.limit} may be ({_why_limit(stats.limit)}). Load or expire some, or raise the limit"
        )
    if code == -errno.EBADF or kind_of(fd) == "not open":
        raise ValueError(f"{what} is closed: it has no descriptor to pass on")
    if code == -errno.EMFILE:
        raise OSError(
            errno.EMFILE, f"{what} cannot be pickled: its duplicate needs a free number (RLIMIT_NOFILE is {soft_limit()}, "
            f"{store_stats().unclaimed} tickets are unclaimed)",
        )  # fmt: skip
    _syscall.fail(code, f"keeping {what} until it is claimed")


def _why_limit(limit: int) -> str:
    if _settings.max_unclaimed == limit:
        return f"max_unclaimed is {limit}, RLIMIT_NOFILE {soft_limit()}"
    return f"three quarters of RLIMIT_NOFILE, {soft_limit()}"


def _start() -> _Folder:
    """The folder of the running store. May be entered again by a signal handler at any moment."""
    global _folder
    with _starting:
        folder = _folder
        if folder is None or folder.pid != os.getpid():
            raise_fd_limit()
            fresh = _Folder()
            # A handler that pickled while the folder was being made has started one already.
            if _folder is None or _folder.pid != os.getpid():
                _folder = fresh
            else:
                fresh.remove()
            folder = _folder
        if folder.listener >= 0 and _syscall.store_start(folder.listener, folder.lock):
            folder.given()
            _end_with_the_process()
        return folder


def _abandon(folder: _Folder) -> None:
    """Forgets a store whose descriptors the program has closed behind its back, or that has ended."""
    global _folder
    with _starting:
        if folder is not _folder:
            return
        if folder.listener >= 0:  # published and not yet started: by a signal handler, or another thread waits for the lock
            _start()
            return
        _folder = None
        folder.remove()


def withdraw(ticket: bytes) -> bool:
    """Ends a ticket of this process that nobody will claim; False when there was none."""
    return _syscall.store_withdraw(ticket)


#: Tickets that the pickling under way has made; whoever sets it withdraws them when the pickling fails.
making: ContextVar[list[bytes] | None] = ContextVar("fdpass tickets of a pickling", default=None)


def stop() -> None:
    """Ends this process's store at once: unclaimed descriptors are closed, the folder is removed. The next ticket starts another."""
    global _folder
    with _starting:
        folder, _folder = _folder, None
        if folder is not None and folder.pid == os.getpid():
            _syscall.store_stop()
            folder.remove()


def linger_and_stop() -> None:
    """What happens at exit: waits while tickets are unclaimed, at most the linger of register(), then stop()."""
    if _folder is None or _folder.pid != os.getpid():
        return
    deadline = monotonic() + _settings.linger
    step = 0.0005
    while _syscall.store_count().unclaimed and monotonic() < deadline:
        sleep(step)
        step = min(2 * step, 0.05)
    stop()


def _end_with_the_process() -> None:
    # Not atexit, which does not run in forked and fork-server children before 3.13. The feeder threads of queues, which pickle
    # as long as they live, are joined at priority -5; a process forked from here begins without finalizers and adds its own.
    util.Finalize(None, linger_and_stop, exitpriority=-100)


def _forked() -> None:
    """In a forked child: the C side has closed the parent's descriptors already."""
    global _folder, _starting
    _folder = None
    _starting = threading.RLock()
    close_connections()


os.register_at_fork(after_in_child=_forked)


# -- folders -------------------------------------------------------------------------------------------------------------------


def _base() -> str:
    """The folder for temporary files, as tempfile finds it; not by tempfile, in whose lock a signal handler that pickles would wait
    for what it interrupted."""
    chosen = getattr(sys.modules.get("tempfile"), "tempdir", None)
    wanted = [chosen, *map(os.environ.get, ("TMPDIR", "TEMP", "TMP")), "/tmp", "/var/tmp", "/usr/tmp", os.curdir]
    usable = [os.path.abspath(os.fsdecode(one)) for one in wanted if one and os.path.isdir(one) and os.access(one, os.W_OK | os.X_OK)]
    if not usable:
        raise FileNotFoundError(errno.ENOENT, "no folder for temporary files can be written to: neither TMPDIR nor /tmp")
    # A long TMPDIR: the next one where that can be had, else a detour through a descriptor of the folder.
    return next((one for one in usable if len(os.fsencode(one)) <= _SUN_PATH - 40), usable[0])


@contextmanager
def _reachable(path: str) -> Iterator[str]:
    """A name for the socket that fits into sun_path."""
    if len(os.fsencode(path)) <= _SUN_PATH or sys.platform != "linux":
        yield path
        return
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{os.path.basename(path)}"
    finally:
        os.close(folder)


def _sweep(base: str) -> None:
    """Removes the folders of owners that ended without a word: nobody holds their lock."""
    with suppress(OSError), os.scandir(base) as found:
        for one in found:
            if one.name.startswith(PREFIX):
                with suppress(OSError):
                    _sweep_one(one.path)


def _sweep_one(path: str) -> None:
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        return
    # A folder without the file is about to get it, or no store's at all.
    lock = os.open(os.path.join(path, "lock"), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _unlink(path)
    finally:
        os.close(lock)


def _unlink(path: str) -> None:
    for name in ("s", "lock"):
        with suppress(OSError):
            os.unlink(os.path.join(path, name))
    with suppress(OSError):
        os.rmdir(path)


def _raised(fd: int) -> int:
    """fd, or where it is stdin, stdout or stderr its substitute."""
    return _syscall.adopt(fd)


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return os.uname().nodename


#: What tells this host, since it was started, from every other. Read now: later there may be no number free to read it with.
BOOT = _boot_id()


# -- the claimant's side -------------------------------------------------------------------------------------------------------


class _Connection:
    """A connection to an owner. Whoever took it out of `_kept` has it alone; forgotten, it closes."""

    __slots__ = ("__weakref__", "fd")

    def __init__(self, path: str) -> None:
        self.fd = -1
        sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            with _reachable(path) as name:
                _connect(sock, name)
            self.fd = sock.detach()
        finally:
            sock.close()
        self.fd = _raised(self.fd)
        _all.add(self)

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


#: By the owner's socket, the last used last.
_kept: dict[str, list[_Connection]] = {}
_all: weakref.WeakSet[_Connection] = weakref.WeakSet()


def close_connections() -> None:
    """Closes every connection to an owner; the next claim makes a new one."""
    _kept.clear()
    for connection in list(_all):
        connection.close()
    _all.clear()


def _connect(sock: _socket.socket, name: str) -> None:
    # Never for ever: a stopped owner's backlog may be full.
    sock.settimeout(PATIENCE)
    sock.connect(name)
    sock.settimeout(None)


def _keep(path: str, connection: _Connection) -> None:
    waiting = _kept.pop(path, [])
    # As many as claimed at once, but not more than two are kept for one owner.
    if len(waiting) < 2:
        waiting.append(connection)
    _kept[path] = waiting
    while len(_kept) > KEPT:
        try:
            del _kept[next(iter(_kept))]
        except (StopIteration, RuntimeError, KeyError):  # another thread was there first
            break


_claims: list[_syscall.Claim] = []
_FD = _syscall.CLAIM_FD


def claim(address: Address, ticket: bytes) -> OwnedFd:
    """The descriptor behind a ticket, owned by the caller.

    Raises TicketError (claimed, expired, withdrawn, unknown; owner gone, on another host, not answering), PeerRefusedError (another
    uid here, or in the owner's place), DescriptorsLostError (no free number: the ticket is untouched unless another thread took the
    last one), OSError.
    """
    try:
        scratch = _claims.pop()
    except IndexError:
        scratch = _syscall.Claim()
    scratch.prepare(ticket)
    folder = _folder
    if folder is not None and folder.address == address and folder.pid == os.getpid():
        code = scratch.take()
        if code < 0:
            _no_number(code)
    else:
        _ask(address, scratch)
    if scratch.ints[_FD] < 0:
        status, pid = scratch.status, scratch.pid
        _claims.append(scratch)
        _refused(status, pid, address)
    owned = OwnedFd.__new__(OwnedFd)
    # No call between these two lines: see _syscall.Scratch.
    owned._fd = scratch.ints[_FD]
    scratch.ints[_FD] = -1
    _claims.append(scratch)
    return owned


def _ask(address: Address, scratch: _syscall.Claim) -> None:
    path, pid, _, where = address
    deadline = monotonic() + PATIENCE
    pause = 0.001
    fresh = 0
    while True:
        try:
            connection = _kept[path].pop()
        except (KeyError, IndexError):
            if where != BOOT:
                raise TicketError(
                    f"this descriptor was pickled on another host, or before this one was started again (pid {pid} there): "
                    "descriptors do not leave their host"
                ) from None
            connection = _reach(address)
            fresh += 1
        code = scratch.run(connection.fd, deadline)
        if code == 0 and scratch.status != _syscall.BUSY:
            if scratch.status == _syscall.REFUSED:
                connection.close()
            else:
                _keep(path, connection)
            return
        if code == 0:
            _keep(path, connection)
            if monotonic() + pause >= deadline:
                raise OSError(
                    errno.ETOOMANYREFS,
                    f"too many descriptors of this user are in flight between processes (ETOOMANYREFS; RLIMIT_NOFILE of the owner, "
                    f"pid {pid}, is the limit): this one could not be sent within {PATIENCE:g} s",
                )
            sleep(pause)
            pause = min(2 * pause, 0.05)
            scratch.claim.stage = 0
            continue
        connection.close()
        scratch.claim.stage = 0
        # A kept connection that the owner dropped meanwhile, or lost to a flood: nothing was given over it.
        if code in (-errno.EPIPE, -errno.ECONNRESET, -errno.EBADF) and fresh < 4:
            continue
        if code == -errno.ETIMEDOUT:
            raise TicketError(f"the owner of this descriptor (pid {pid}) did not answer within {PATIENCE:g} s: is it stopped?")
        if code == -errno.EPROTO:
            raise TicketError(f"what answers for pid {pid} at {path} does not speak this version of the claim protocol")
        if code in (-errno.EPIPE, -errno.ECONNRESET):
            raise TicketError(f"the owner of this descriptor (pid {pid}) went away while it was asked, or drops every connection")
        _no_number(code)


def _reach(address: Address) -> _Connection:
    path, pid, uid, _ = address
    try:
        connection = _Connection(path)
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        if uid == os.geteuid() and _alive(pid):
            text = (
                f"the store that kept this descriptor is not there any more: its owner (pid {pid}) has closed it, is about to exit, "
                f"or lives where {path} is another place (a container)"
            )
        else:
            text = f"the owner of this descriptor (pid {pid}) is gone, and the descriptor with it"
        raise TicketError(text) from None
    except PermissionError:
        raise PeerRefusedError(
            f"this descriptor was pickled by uid {uid} (pid {pid}), whose store uid {os.geteuid()} may not open"
        ) from None
    except TimeoutError:
        raise TicketError(f"the owner of this descriptor (pid {pid}) does not accept connections: is it stopped?") from None
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            _no_number(-error.errno)
        if error.errno == errno.EAGAIN:
            raise TicketError(f"the owner of this descriptor (pid {pid}) has a full backlog: is it stopped?") from None
        raise
    # Before the ticket is shown: once an owner has ended, others may make a folder and a socket of the same name.
    found = _syscall.peer_uid(connection.fd)
    if found != uid:
        connection.close()
        who = "a user that the kernel does not name" if found == _syscall.NOBODY else f"uid {found}"
        raise PeerRefusedError(
            f"this descriptor was pickled by uid {uid} (pid {pid}), but {who} listens at {path} now: nothing was asked of it"
        )
    return connection


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _no_number(code: int) -> NoReturn:
    if code not in (-errno.EMFILE, -errno.ENFILE):
        _syscall.fail(code, "claiming a pickled descriptor")
    limit = soft_limit() if code == -errno.EMFILE else None
    table = f"this process's table is full (RLIMIT_NOFILE is {limit})" if limit is not None else "the system's table of open files is full"
    raise DescriptorsLostError(
        f"a pickled descriptor cannot be loaded: needed 1 free number, got 0: {table}. "
        "Its ticket is untouched: close something and load again",
        1, 0, limit, b"", -code,
    )  # fmt: skip


def _refused(status: int, pid: int, address: Address) -> NoReturn:
    owner, uid = address[1], address[2]
    if status == _syscall.GIVEN:
        reason, limit, number = lost_reason()
        raise DescriptorsLostError(
            f"a pickled descriptor was lost on its way: needed 1 free number, got 0: {reason}; its ticket is used", 1, 0, limit, b"", number
        )
    if status == _syscall.CLAIMED:
        by = f"pid {pid}" if pid else "another process"
        you = " (this process)" if pid == os.getpid() else ""
        raise TicketError(
            f"this pickled descriptor was claimed already, by {by}{you}: a pickle is loaded once, "
            "unless it was made with SocketHandle(sock, claims=n)"
        )
    if status == _syscall.EXPIRED:
        raise TicketError(f"this pickled descriptor has expired: nobody loaded it within the ttl that its owner (pid {owner}) had set")
    if status == _syscall.WITHDRAWN:
        raise TicketError(f"this pickled descriptor was withdrawn: the pickling in its owner (pid {owner}) failed or was given up")
    if status == _syscall.REFUSED:
        raise PeerRefusedError(f"this descriptor was pickled by uid {uid} (pid {owner}), which gives nothing to uid {os.geteuid()}")
    raise TicketError(
        f"its owner (pid {owner}) does not know this ticket: it was claimed or expired long ago, or its store ended and began anew"
    )
