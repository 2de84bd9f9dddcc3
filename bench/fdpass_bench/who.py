"""fdpass-bench who: which processes hold the listening sockets of a port."""

from __future__ import annotations

import os
import pwd
import sys
from dataclasses import dataclass

import psutil
from rich import box
from rich.table import Table
from rich.text import Text

from fdpass_bench import measure
from fdpass_bench.report import console
from fdpass_bench.sockdiag import ListeningSocket, listening_sockets


@dataclass(frozen=True)
class Holder:
    pid: int
    command: str


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


def show(port: int) -> int:
    """Prints who listens on `port`; the exit status."""
    try:
        sockets = listening_sockets(port)
    except OSError as error:
        print(f"fdpass-bench: the kernel does not tell who listens: {error.strerror or error}.", file=sys.stderr)
        return 1
    if not sockets:
        print(f"Nothing listens on TCP port {port} here.")
        return 1
    holders, unreadable = find_holders({found.inode for found in sockets})
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.padding = (0, 1, 0, 0)
    table.pad_edge = False
    table.add_column("address", no_wrap=True)
    for name in ("inode", "queue", "limit", "pid"):
        table.add_column(name, justify="right", no_wrap=True)
    # The one column that may give way, and its cells are cut, not wrapped.
    table.add_column("command")
    for found in sockets:
        cells = [found.address, str(found.inode), str(found.queue), str(found.limit)]
        for holder in holders[found.inode]:
            table.add_row(*cells, str(holder.pid), Text(holder.command, no_wrap=True, overflow="ellipsis"))
            cells = [""] * 4
        if not holders[found.inode]:
            table.add_row(*cells, "?", f"not to be seen; the socket belongs to {_user(found.uid)}")
    out = console(sys.stdout)
    out.print(table, "")
    for address in dict.fromkeys(found.address for found in sockets):
        here = [found for found in sockets if found.address == address]
        out.print(_sentence(address, here, {holder.pid for found in here for holder in holders[found.inode]}))
    if unreadable:
        more = "" if os.geteuid() == 0 else " (root sees more)"
        out.print(f"Processes that this user may not look into: {unreadable}; they may hold these sockets too{more}.")
    return 0


def _sentence(address: str, here: list[ListeningSocket], pids: set[int]) -> str:
    sockets = "one socket" if len(here) == 1 else f"{len(here)} sockets, which share the address by SO_REUSEPORT"
    if not pids:
        return f"{address}: {sockets}; nobody that this user may see holds it."
    if len(pids) == 1:
        return f"{address}: {sockets}; held by one process."
    return f"{address}: {sockets}; {'shared' if len(here) == 1 else 'held'} by {len(pids)} processes."


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
