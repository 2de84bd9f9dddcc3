"""Claiming what others' stores keep: connections to owners, one packet out and one in, and what each refusal means in words.

Pickles are not known here, nor what is behind a descriptor.
"""

from __future__ import annotations

import errno
import os
import weakref
from time import monotonic, sleep
from typing import NoReturn

from fdpass import _store, _syscall
from fdpass.errors import DescriptorsLostError, PeerRefusedError, TicketError
from fdpass.fds import OwnedFd
from fdpass.limits import lost_reason, soft_limit

#: How long a claim waits for its owner, in seconds. The owner's thread answers at once unless the whole process is stopped.
PATIENCE = 20.0
#: Connections to owners that are kept between claims.
KEPT = 16
#: Connections made for one claim, after which an owner that drops each of them is given up: about 2 seconds.
FRESH = 40


#: By the owner's socket, the last used last. Whoever took one out has it alone.
_kept: dict[str, list[_syscall.Connection]] = {}
_all: weakref.WeakSet[_syscall.Connection] = weakref.WeakSet()


def close_connections() -> None:
    """Closes every connection to an owner; the next claim makes a new one."""
    _kept.clear()
    for connection in list(_all):
        connection.close()
    _all.clear()


def _forked() -> None:
    """In a forked child: the C side has closed all of them already, also those in the hands of other threads."""
    for connection in list(_all):
        connection.forget()
    close_connections()


os.register_at_fork(after_in_child=_forked)


def _keep(path: str, connection: _syscall.Connection) -> None:
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


_spare: list[_syscall.Claim] = []
_FD = _syscall.CLAIM_FD


def claim(address: _store.Address, ticket: bytes) -> OwnedFd:
    """The descriptor behind a ticket, owned by the caller.

    Raises TicketError (claimed, expired, withdrawn, unknown; owner gone, on another host, not answering), PeerRefusedError (another
    uid here, or in the owner's place), DescriptorsLostError (no free number: the ticket is untouched unless another thread took the
    last one), OSError.
    """
    try:
        scratch = _spare.pop()
    except IndexError:
        scratch = _syscall.Claim()
    scratch.prepare(ticket)
    if _store.is_ours(address):
        code = scratch.take()
        if code < 0:
            _no_number(code)
    else:
        _ask(address, scratch)
    if scratch.ints[_FD] < 0:
        status, pid = scratch.status, scratch.pid
        _spare.append(scratch)
        _refused(status, pid, address)
    owned = OwnedFd.__new__(OwnedFd)
    # No call between these two lines: see _syscall.Scratch.
    owned._fd = scratch.ints[_FD]
    scratch.ints[_FD] = -1
    _spare.append(scratch)
    return owned


def _ask(address: _store.Address, scratch: _syscall.Claim) -> None:
    path, pid, _, where = address
    deadline = monotonic() + PATIENCE
    pause = 0.001
    fresh = 0
    while True:
        try:
            connection = _kept[path].pop()
        except (KeyError, IndexError):
            if where != _store.BOOT:
                raise TicketError(
                    f"this descriptor was pickled on another host, or before this one was started again (pid {pid} there): "
                    "descriptors do not leave their host"
                ) from None
            connection = _reach(address, deadline)
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
            if monotonic() >= deadline:
                raise OSError(
                    errno.ETOOMANYREFS,
                    f"too many descriptors of this user are in flight between processes (ETOOMANYREFS; RLIMIT_NOFILE of the owner, "
                    f"pid {pid}, is the limit): this one could not be sent within {PATIENCE:g} s",
                )
            pause = _again(scratch, pause)
            continue
        connection.close()
        # A kept connection that the owner dropped meanwhile, or a new one lost in a flood: nothing was given over it.
        if code in (-errno.EPIPE, -errno.ECONNRESET, -errno.EBADF) and fresh < FRESH:
            pause = _again(scratch, pause if fresh else 0)
            continue
        if code == -errno.ETIMEDOUT:
            raise TicketError(
                f"the owner of this descriptor (pid {pid}) did not answer within {PATIENCE:g} s: is it stopped? Load again once it runs"
            )
        if code == -errno.EPROTO:
            raise TicketError(f"what answers for pid {pid} at {path} does not speak this version of the claim protocol")
        if code in (-errno.EPIPE, -errno.ECONNRESET):
            raise TicketError(f"the owner of this descriptor (pid {pid}) went away while it was asked, or drops every connection")
        _no_number(code)


def _again(scratch: _syscall.Claim, pause: float) -> float:
    """Waits so many seconds, then the claim may begin anew; returns how long the next pause is."""
    sleep(pause)
    scratch.claim.stage = 0
    return min(max(2 * pause, 0.001), 0.05)


def _reach(address: _store.Address, deadline: float) -> _syscall.Connection:
    path, pid, uid, _ = address
    connection = _syscall.Connection()
    _all.add(connection)
    try:
        with _store.reachable(path) as name:
            code = connection.open(os.fsencode(name), deadline)
    except OSError as error:  # on the way round a long path
        code = -(error.errno or errno.EIO)
    if code in (-errno.ENOENT, -errno.ECONNREFUSED, -errno.ENOTDIR):
        if uid == os.geteuid() and _alive(pid):
            raise TicketError(
                f"the store that kept this descriptor is not there any more: its owner (pid {pid}) has closed it, is about to exit, "
                f"or lives where {path} is another place (a container)"
            )
        raise TicketError(f"the owner of this descriptor (pid {pid}) is gone, and the descriptor with it")
    if code in (-errno.EACCES, -errno.EPERM):
        raise PeerRefusedError(f"this descriptor was pickled by uid {uid} (pid {pid}), whose store uid {os.geteuid()} may not open")
    if code == -errno.EAGAIN:
        raise TicketError(
            f"the owner of this descriptor (pid {pid}) did not let anybody in within {PATIENCE:g} s: is it stopped? Load again once it runs"
        )
    if code < 0:
        _no_number(code)
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
    # Ended, but nobody has waited for it yet.
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
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


def _refused(status: int, pid: int, address: _store.Address) -> NoReturn:
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
