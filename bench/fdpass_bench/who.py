"""fdpass-bench who: which processes hold the listening sockets of a port, how they share it, and whether somebody accepts from each.
It says what it saw, and for how long; what cannot be known is said to be unknown."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from fdpass_bench.holders import Member, find_holders, observe, user_of, warning
from fdpass_bench.report import console
from fdpass_bench.sockdiag import listening_sockets

_WINDOW = 1.0  # seconds until a socket for which nobody was seen waiting is warned of


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
            table.add_row(*cells, "?", "", f"not to be seen; the socket belongs to {user_of(found.uid)}")
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
