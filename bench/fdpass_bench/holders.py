"""Which processes hold the listening sockets of a port, what each was seen to do about them, and the socket that nobody accepts from.
It says what it saw, and for how long; what cannot be known is said to be unknown."""

from __future__ import annotations

import contextlib
import os
import pwd
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil

from fdpass_bench import measure, waiting
from fdpass_bench.sockdiag import ListeningSocket, listening_sockets

_LOOK = 0.02  # seconds between two looks


@dataclass(frozen=True)
class Holder:
    pid: int
    command: str


@dataclass
class Member:
    """One listening socket and what was seen of it. queues: connections that waited, at each look. waited: how, by pid.

    watched: pids whose epoll has it. unknown: by pid, why nothing is known.
    """

    socket: ListeningSocket
    holders: list[Holder]
    queues: list[int] = field(default_factory=list)
    waited: dict[int, str] = field(default_factory=dict)
    watched: set[int] = field(default_factory=set)
    stopped: set[int] = field(default_factory=set)
    unknown: dict[int, str] = field(default_factory=dict)

    @property
    def stands(self) -> bool:
        """Whether connections waited at every look, and none was ever taken."""
        return min(self.queues) > 0 and all(now >= before for before, now in zip(self.queues, self.queues[1:], strict=False))

    def does(self, pid: int) -> str:
        if pid in self.stopped:
            return "stopped"
        if pid in self.waited:
            return f"waits ({self.waited[pid]})"
        if pid in self.unknown:
            return "unknown"
        return "busy" if pid in self.watched else "holds it"


def find_holders(inodes: set[int]) -> tuple[dict[int, list[Holder]], int]:
    """Inode -> who holds it, as far as this user may see; and how many processes could not be looked into."""
    holders: dict[int, list[Holder]] = {inode: [] for inode in inodes}
    unreadable = 0
    for pid in sorted(psutil.pids()):
        try:
            held = measure.socket_inodes(pid) & inodes
            for inode in held:
                holders[inode].append(Holder(pid, command_of(pid)))
        except (PermissionError, psutil.AccessDenied):
            unreadable += 1
        except (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):
            continue  # it ended meanwhile
    return holders, unreadable


def command_of(pid: int) -> str:
    """Its command line, in one line. Raises psutil.NoSuchProcess, psutil.AccessDenied."""
    process = psutil.Process(pid)
    words = process.cmdline()
    # "/usr/bin/python3 /home/me/venv/bin/uvicorn app:app": what tells processes apart comes after the folders.
    shown = [os.path.basename(word) if word.startswith("/") else word for word in words[:2]] + words[2:]
    return " ".join(" ".join(shown).split()) or process.name()


def observe(port: int, sockets: Sequence[ListeningSocket], holders: dict[int, list[Holder]], window: float) -> tuple[list[Member], float]:
    """Looks at the sockets until somebody was seen waiting for each and no queue stands, at most `window` seconds; and how long it was."""
    members = [Member(found, holders[found.inode], [found.queue]) for found in sockets]
    began = time.monotonic()
    while True:
        for pid in {holder.pid for member in members for holder in member.holders}:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                _look(pid, members)
        seconds = time.monotonic() - began
        if seconds >= window or all(member.waited and not member.stands for member in members):
            return members, seconds
        time.sleep(_LOOK)
        now = {found.inode: found.queue for found in listening_sockets(port)}
        for member in members:
            # One that was closed meanwhile has no queue.
            member.queues.append(now.get(member.socket.inode, 0))


def _look(pid: int, members: Sequence[Member]) -> None:
    mine = [member for member in members if any(holder.pid == pid for holder in member.holders)]
    try:
        found = waiting.look(pid, [member.socket.inode for member in mine])
    except PermissionError:
        found = waiting.Waiting(unknown="it may not be looked into by this user")
    for member in mine:
        inode = member.socket.inode
        if inode in found.waits:
            member.waited.setdefault(pid, found.waits[inode])
        if inode in found.watches:
            member.watched.add(pid)
        if found.unknown is not None:
            member.unknown[pid] = found.unknown
        (member.stopped.add if found.stopped else member.stopped.discard)(pid)


def warning(member: Member, here: Sequence[Member], seconds: float, unreadable: int) -> str | None:
    """What is wrong with a socket, None where nothing is, or where nothing can be said against it."""
    which = f"socket {member.socket.inode}" + (f" (1 of {len(here)} members)" if len(here) > 1 else "")
    waits = f"{member.queues[-1]} connection{'s' if member.queues[-1] != 1 else ''} wait{'s' if member.queues[-1] == 1 else ''} there"
    comes = f"{waits}, and what the hash sends there is stranded" if len(here) > 1 else waits
    pids = [holder.pid for holder in member.holders]
    if not member.waited:
        unknown = [f"pid {pid}: {member.unknown[pid]}" for pid in pids if pid in member.unknown]
        if not pids or unknown or (unreadable and os.geteuid() != 0):
            reason = "; ".join(unknown) or "some processes may not be looked into"
            return f"Whether anybody accepts from {which} cannot be told ({reason}); {waits}."
        if all(pid in member.stopped for pid in pids):
            return f"Black hole: {which}: every process that holds it is stopped ({pids_of(pids)}): {comes}. kill -CONT goes on with them."
        watchers = sorted(member.watched)
        if watchers:
            return (
                f"Black hole for {seconds:.1f} s: {which}: {pids_of(watchers)} watches it, but no thread waited there at any look, so it "
                f"is busy or stuck: {comes}. See what it does: cat /proc/{watchers[0]}/stack."
            )
        return (
            f"Black hole: {which}: no process that holds it ({pids_of(pids)}) was in accept, poll, select or epoll for it in "
            f"{seconds:.1f} s: {comes}. Close it where it is not used, or accept from it."
        )
    if member.stands and len(here) > 1 and any(not other.stands for other in here if other is not member):
        grew = f"grew from {member.queues[0]} to {member.queues[-1]}" if member.queues[-1] > member.queues[0] else "did not move"
        return f"Black hole for {seconds:.1f} s: {which}: its queue {grew} while those of others emptied: {comes}."
    return None


def pids_of(pids: Sequence[int]) -> str:
    """ "pid 7", "pids 7, 8"."""
    return f"pid {pids[0]}" if len(pids) == 1 else f"pids {', '.join(map(str, pids))}"


def user_of(uid: int) -> str:
    """Its name, or "uid 7"."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
