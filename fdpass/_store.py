"""Descriptors kept until they are claimed: this process's store, its folder and settings, the words of its errors, its end.

A thread in C serves the claims (_native/store.c). How one claims is _claims.py's; pickles are not known here.
"""

from __future__ import annotations

import _socket
import errno
import fcntl
import os
import stat
import sys
import threading
from contextlib import contextmanager, suppress
from contextvars import ContextVar

# Not when the first ticket needs it: another thread may fork in the middle, and the child then waits for ever for that import.
from multiprocessing import util
from time import monotonic, sleep
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from fdpass import _syscall
from fdpass.errors import TicketError
from fdpass.fds import kind_of
from fdpass.limits import raise_fd_limit, soft_limit

if TYPE_CHECKING:
    from collections.abc import Iterator

#: path of the socket, pid and uid of the owner, the boot of the machine it runs on.
Address = tuple[str, int, int, str]

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


# -- tickets, and the life of the store ----------------------------------------------------------------------------------------


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
            with reachable(os.path.join(self.path, "s")) as path:
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


def is_ours(address: Address) -> bool:
    """Whether this process's store, running, has this address."""
    folder = _folder
    return folder is not None and folder.address == address and folder.pid == os.getpid()


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
        # Asked first: a store that was not running yet has not ended.
        running = folder.listener < 0
        ticket = _syscall.store_put(fd, claims, ttl_ns, _settings.max_unclaimed or 0)
        if isinstance(ticket, bytes):
            made = making.get()
            if made is not None:
                made.append(ticket)
            return folder.address, ticket
        if ticket != -errno.ENOTCONN:
            _not_kept(fd, what, ticket)
        if running:
            _abandon(folder)
        else:  # made by another thread, or by what a signal handler interrupted
            _start()


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
        if folder.listener >= 0:
            try:
                started = _syscall.store_start(folder.listener, folder.lock)
            except OSError:
                if folder is _folder and folder.listener >= 0:
                    _folder = None
                    folder.remove()
                raise
            if started:
                folder.given()
                _end_with_the_process()
        return folder


def _abandon(folder: _Folder) -> None:
    """Forgets a store whose descriptors the program has closed behind its back, or that has ended."""
    global _folder
    with _starting:
        if folder is _folder:
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
    try:
        while _syscall.store_count().unclaimed and monotonic() < deadline:
            sleep(step)
            step = min(2 * step, 0.05)
    finally:  # Ctrl-C ends the wait, and leaves nothing behind either
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
def reachable(path: str) -> Iterator[str]:
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
