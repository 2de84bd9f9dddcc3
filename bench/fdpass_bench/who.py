"""fdpass-bench who: which processes hold the listening sockets of a port, how they share it, and whether somebody accepts from each.
It says what it saw, and for how long; what cannot be known is said to be unknown."""

from __future__ import annotations

import contextlib
import os
import pwd
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil
from rich import box
from rich.table import Table
from rich.text import Text

from fdpass_bench import measure, waiting
from fdpass_bench.report import console
from fdpass_bench.sockdiag import ListeningSocket, listening_sockets

_WINDOW = 1.0  # seconds until a socket for which nobody was seen waiting is warned of
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
                holders[inode].append(Holder(pid, _command(pid)))
        except (PermissionError, psutil.AccessDenied):
            unreadable += 1
        except (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):
            continue  # it ended meanwhile
    return holders, unreadable


def _command(pid: int) -> str:
    process = psutil.Process(pid)
    return " ".join(process.cmdline()) or process.name()


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


def show(port: int, window: float = _WINDOW) -> int:
    """Prints who listens on `port`; the exit status: 1 when nobody does, or nobody accepts from one of the sockets."""
    try:
        sockets = listening_sockets(port)
    except OSError as error:
        print(f"fdpass-bench: the kernel does not tell who listens: {error.strerror or error}.", file=sys.stderr)
        return 1
    if not sockets:
        print(f"Nothing listens on TCP port {port} here.")
        return 1
    holders, unreadable = find_holders({found.inode for found in sockets})
    members, seconds = observe(port, sockets, holders, window)
    out = console(sys.stdout)
    out.print(_table(members), "")
    warnings = []
    for address in dict.fromkeys(found.address for found in sockets):
        here = [member for member in members if member.socket.address == address]
        out.print(in_force(address, here))
        warnings += [text for member in here if (text := warning(member, here, seconds, unreadable)) is not None]
    for text in warnings:
        out.print(text, style="yellow")
    if unreadable:
        more = "" if os.geteuid() == 0 else " (root sees more)"
        out.print(f"Processes that this user may not look into: {unreadable}; they may hold these sockets too{more}.")
    return 1 if any(text.startswith("Black hole") for text in warnings) else 0


def _table(members: Sequence[Member]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.padding = (0, 1, 0, 0)
    table.pad_edge = False
    table.add_column("address", no_wrap=True)
    for name in ("inode", "queue", "limit", "pid"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("does", no_wrap=True)
    # The one column that may give way, and its cells are cut, not wrapped.
    table.add_column("command")
    for member in members:
        found = member.socket
        cells = [found.address, str(found.inode), str(member.queues[-1]), str(found.limit)]
        for holder in member.holders:
            command = Text(holder.command, no_wrap=True, overflow="ellipsis")
            table.add_row(*cells, str(holder.pid), member.does(holder.pid), command)
            cells = [""] * 4
        if not member.holders:
            table.add_row(*cells, "?", "", f"not to be seen; the socket belongs to {_user(found.uid)}")
    return table


def in_force(address: str, here: Sequence[Member]) -> str:
    """The strategy, as the sockets of one address show it, and its queue."""
    pids = {holder.pid for member in here for holder in member.holders}
    waiting_now = {pid for member in here for pid in member.waited}
    queued, limit = sum(member.queues[-1] for member in here), sum(member.socket.limit for member in here)
    queue = f"{queued} of at most {limit} connections wait{'s' if queued == 1 else ''} to be accepted"
    if not pids:
        text = "one socket" if len(here) == 1 else f"a reuseport group of {len(here)} members"
        return f"{address}: {text}; nobody that this user may see holds it; {queue}."
    held = f"held by {len(pids)} processes" if len(pids) > 1 else "held by one process"
    seen = f", {len(waiting_now)} of which {'was' if len(waiting_now) == 1 else 'were'} seen waiting for connections"
    if len(here) > 1:
        return (
            f"{address}: a reuseport group: {len(here)} sockets share the address by SO_REUSEPORT, each with a queue of its own, and a "
            f"hash chooses; {held}{seen}; {queue}."
        )
    if len(pids) == 1:
        return f"{address}: one socket, {held}; {queue}."
    return f"{address}: one queue: one socket, shared by {len(pids)} processes{seen}; {queue}."


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
            return f"Black hole: {which}: every process that holds it is stopped ({_pids(pids)}): {comes}. kill -CONT goes on with them."
        watchers = sorted(member.watched)
        if watchers:
            return (
                f"Black hole for {seconds:.1f} s: {which}: {_pids(watchers)} watches it, but no thread waited there at any look, so it is "
                f"busy or stuck: {comes}. See what it does: cat /proc/{watchers[0]}/stack."
            )
        return (
            f"Black hole: {which}: no process that holds it ({_pids(pids)}) was in accept, poll, select or epoll for it in "
            f"{seconds:.1f} s: {comes}. Close it where it is not used, or accept from it."
        )
    if member.stands and len(here) > 1 and any(not other.stands for other in here if other is not member):
        grew = f"grew from {member.queues[0]} to {member.queues[-1]}" if member.queues[-1] > member.queues[0] else "did not move"
        return f"Black hole for {seconds:.1f} s: {which}: its queue {grew} while those of others emptied: {comes}."
    return None


def _pids(pids: Sequence[int]) -> str:
    return f"pid {pids[0]}" if len(pids) == 1 else f"pids {', '.join(map(str, pids))}"


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
