"""What /proc says: switches, stops and sockets of other processes, settings of the kernel. It reads and judges nothing."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterable
from pathlib import Path

_ESTABLISHED = "01"
_SWITCHES = re.compile(rb"^voluntary_ctxt_switches:\s+(\d+)", re.MULTILINE)
_STOPPED = (b"T", b"t", b"Z", b"X")
_SOCKET = re.compile(r"socket:\[(\d+)\]")


def starting(workers: int) -> float:
    """Seconds that so many worker processes take to start and to end, about."""
    return 0.3 + 0.25 * workers


def alive(pids: Iterable[int]) -> list[int]:
    """Those of them that are still there, dead ones that nobody has collected among them."""
    return [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def task_count(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def voluntary_switches(pid: int) -> int:
    """Voluntary context switches of all threads of a process since they began. Raises FileNotFoundError when it is gone."""
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        # A thread may end between the listing and the read; its switches are then gone for everybody.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found = _SWITCHES.search(Path(f"/proc/{pid}/task/{task}/status").read_bytes())
            total += int(found[1]) if found else 0
    return total


def stop(pid: int, timeout: float = 5.0) -> None:
    """Sends SIGSTOP and returns when every thread stands still. Raises TimeoutError after `timeout` seconds, ProcessLookupError."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + timeout
    while not all(state in _STOPPED for state in _states(pid)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} did not stop within {timeout:g} s of SIGSTOP")
        time.sleep(0.0005)


def _states(pid: int) -> list[bytes]:
    states = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # The command, in parentheses, may hold anything: the state is the first field after the last one.
            states.append(Path(f"/proc/{pid}/task/{task}/stat").read_bytes().rpartition(b")")[2].split()[0])
    return states


def socket_inodes(pid: int) -> set[int]:
    """The inodes of the sockets a process holds. Raises PermissionError when it may not be looked into, FileNotFoundError."""
    inodes = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found = _SOCKET.fullmatch(os.readlink(f"/proc/{pid}/fd/{fd}"))
            if found:
                inodes.add(int(found[1]))
    return inodes


def established(server_port: int) -> dict[int, int]:
    """The server's side of each established IPv4 connection: the client's port -> inode, 0 while no process has accepted it."""
    ends = {}
    with open("/proc/net/tcp", encoding="ascii") as table:
        next(table)
        for line in table:
            fields = line.split()
            if fields[3] == _ESTABLISHED and int(fields[1].partition(":")[2], 16) == server_port:
                ends[int(fields[2].partition(":")[2], 16)] = int(fields[9])
    return ends


def sysctl(name: str) -> int | None:
    """The value of a kernel setting, None where this kernel does not have it or hides it."""
    try:
        return int(Path("/proc/sys", *name.split(".")).read_text())
    except (OSError, ValueError):
        return None


def local_ports() -> tuple[int, int]:
    """The first and the last port that a client is given; those of every Linux where this one hides them."""
    try:
        low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    except OSError:
        return 32768, 60999
    return int(low), int(high)


def cpu_seconds(pid: int) -> float:
    """Processor time of all living threads of a process, to the nanosecond. Raises FileNotFoundError when it is gone."""
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            total += int(Path(f"/proc/{pid}/task/{task}/schedstat").read_bytes().split()[0])
    return total / 1e9


def listen_counters() -> tuple[int, int]:
    """(ListenOverflows, ListenDrops) since boot, of every socket in this network namespace; zeros where the kernel hides them."""
    try:
        lines = Path("/proc/net/netstat").read_text().splitlines()
    except OSError:
        return 0, 0
    for names, values in zip(lines[::2], lines[1::2], strict=False):
        if names.startswith("TcpExt:"):
            found = dict(zip(names.split()[1:], map(int, values.split()[1:]), strict=False))
            return found.get("ListenOverflows", 0), found.get("ListenDrops", 0)
    return 0, 0


class Switches:
    """The voluntary switches of workers that come and go, counted from the moment each was first seen."""

    def __init__(self, pids: Iterable[int] = ()) -> None:
        self._first: dict[int, int] = {}
        self._gone = 0
        for pid in pids:
            self.see(pid)

    def see(self, pid: int) -> None:
        """Counts this process from now on; one that is gone already has nothing to count."""
        if pid not in self._first:
            with contextlib.suppress(FileNotFoundError):
                self._first[pid] = voluntary_switches(pid)

    def bury(self, pid: int) -> None:
        """Takes the last count of a process that `stop` has stopped. Being stopped was one switch per thread, and not its own doing."""
        first = self._first.pop(pid, None)
        if first is not None:
            self._gone += max(0, voluntary_switches(pid) - first - task_count(pid))

    def total(self) -> int:
        """Raises FileNotFoundError when one of them died unburied."""
        return self._gone + sum(voluntary_switches(pid) - first for pid, first in self._first.items())
