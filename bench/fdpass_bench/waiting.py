"""Who waits for connections on which socket, as far as /proc tells: what a process's epolls watch, and where its threads sleep.
It reads and judges nothing; what cannot be known is said to be unknown."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

#: Numbers of the system calls that wait for a connection, by machine; elsewhere nothing is known of where a thread sleeps.
_CALLS: Mapping[str, Mapping[int, str]] = {
    "x86_64": {
        43: "accept", 288: "accept", 7: "poll", 271: "poll", 23: "select", 270: "select", 232: "epoll", 281: "epoll", 441: "epoll",
    },
    "aarch64": {202: "accept", 242: "accept", 73: "poll", 72: "select", 22: "epoll", 441: "epoll"},
}  # fmt: skip
_TARGET = re.compile(r"^tfd:\s+(\d+) events:\s+([0-9a-f]+) .*?\bino:([0-9a-f]+) sdev:([0-9a-f]+)", re.MULTILINE)
_EPOLLIN = 0x1
_POLLFD = struct.Struct("=ihh")
_MOST_POLLED = 65536  # descriptors of one poll(2)
_STOPPED = (b"T", b"t")


@dataclass
class Waiting:
    """One process, now. Sets of socket inodes.

    waits: how a thread sleeps that a connection on it would wake: "accept", "poll", "select" or "epoll". watches: an epoll of the
    process has it, whether or not a thread waits there. stopped: by a signal or a debugger. unknown: why the lack of either proves
    nothing, None where it does.
    """

    waits: dict[int, str] = field(default_factory=dict)
    watches: set[int] = field(default_factory=set)
    stopped: bool = False
    unknown: str | None = None


def look(pid: int, inodes: Iterable[int]) -> Waiting:
    """What process `pid` does about these sockets. Raises FileNotFoundError when it is gone, PermissionError."""
    wanted = set(inodes)
    found = Waiting()
    calls = _CALLS.get(platform.machine())
    targets: dict[int, str] = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            targets[int(fd)] = os.readlink(f"/proc/{pid}/fd/{fd}")
    inode_of = {fd: int(target[8:-1]) for fd, target in targets.items() if target.startswith("socket:[")}
    epolls = {fd: _watched(pid, fd, wanted) for fd, target in targets.items() if target == "anon_inode:[eventpoll]"}
    found.watches = {inode for sockets, _ in epolls.values() for inode in sockets}
    if any(target == "anon_inode:[io_uring]" for target in targets.values()):
        found.unknown = "it has an io_uring, which may accept"
    states = []
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            states.append(Path(f"/proc/{pid}/task/{task}/stat").read_bytes().rpartition(b")")[2].split()[0])
            words = Path(f"/proc/{pid}/task/{task}/syscall").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        except PermissionError:
            found.unknown = "where it sleeps is not to be seen by this user"
            continue
        # "running", or the call's number and its arguments; -1 outside of a call.
        if len(words) < 4 or states[-1] in _STOPPED:
            continue
        call = calls.get(int(words[0])) if calls is not None else None
        if calls is None:
            found.unknown = f"where a thread sleeps is not known on {platform.machine()}"
        if call is not None:
            first, second = int(words[1], 16), int(words[2], 16)
            for inode in _woken_by(pid, call, first, second, inode_of, epolls) & wanted:
                found.waits.setdefault(inode, call)
    found.stopped = bool(states) and all(state in _STOPPED for state in states)
    return found


def _watched(pid: int, fd: int, wanted: set[int]) -> tuple[set[int], set[int]]:
    """The sockets that an epoll watches for reading, and the numbers of all that it watches (which may be epolls)."""
    with socket.socket() as own:
        device = os.fstat(own.fileno()).st_dev
    sockets, numbers = set(), set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for number, events, inode, on in _TARGET.findall(Path(f"/proc/{pid}/fdinfo/{fd}").read_text()):
            numbers.add(int(number))
            # An inode number says something on its own device only.
            if int(inode, 16) in wanted and int(on, 16) == device and int(events, 16) & _EPOLLIN:
                sockets.add(int(inode, 16))
    return sockets, numbers


def _woken_by(
    pid: int, call: str, first: int, second: int, inode_of: Mapping[int, int], epolls: Mapping[int, tuple[set[int], set[int]]]
) -> set[int]:
    if call == "accept":
        return {inode_of[first]} if first in inode_of else set()
    if call == "epoll":
        return _inside(first, epolls, set())
    fds = _polled(pid, first, second) if call == "poll" else _selected(pid, first, second)
    woken = {inode_of[fd] for fd in fds if fd in inode_of}
    for fd in fds:
        woken |= _inside(fd, epolls, set())
    return woken


def _inside(epoll: int, epolls: Mapping[int, tuple[set[int], set[int]]], seen: set[int]) -> set[int]:
    """An epoll may watch another one."""
    if epoll not in epolls or epoll in seen:
        return set()
    seen.add(epoll)
    sockets, numbers = epolls[epoll]
    return sockets.union(*(_inside(number, epolls, seen) for number in numbers))


def _polled(pid: int, address: int, count: int) -> set[int]:
    data = _memory(pid, address, min(count, _MOST_POLLED) * _POLLFD.size)
    return {fd for fd, events, _ in _POLLFD.iter_unpack(data[: len(data) // _POLLFD.size * _POLLFD.size]) if fd >= 0 and events & _EPOLLIN}


def _selected(pid: int, count: int, address: int) -> set[int]:
    data = _memory(pid, address, (min(count, _MOST_POLLED) + 63) // 64 * 8) if address else b""
    return {8 * place + bit for place, byte in enumerate(data) for bit in range(8) if byte >> bit & 1}


def _memory(pid: int, address: int, size: int) -> bytes:
    """Empty where it cannot be read: the thread may have gone on meanwhile."""
    try:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            return memory.read(size)
    except (OSError, OverflowError, ValueError):
        return b""
