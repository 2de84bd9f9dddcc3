"""Tries on this machine what fdpass and its strategies stand on, and says what to do about each lack. It changes nothing."""

from __future__ import annotations

import array
import errno
import importlib.util
import mmap
import multiprocessing
import os
import platform
import resource
import select
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table

from fdpass_bench import measure
from fdpass_bench.report import console

# Options that the socket module does not name (asm-generic/socket.h).
_SO_COOKIE = 57
_SO_PEERPIDFD = 77
_SO_PASSRIGHTS = 83

_ENOUGH_DESCRIPTORS = 4096
_ENOUGH_BACKLOG = 1024
_ENOUGH_BUFFER = 65536  # bytes
_ENOUGH_PORTS = 16000

State = Literal["ok", "lack", "note"]


@dataclass(frozen=True)
class Finding:
    """A lack: fdpass cannot do without it. A note: one of its ways, or its speed, suffers. `remedy` says what to do."""

    state: State
    name: str
    found: str
    remedy: str = ""


def examine() -> Iterator[Finding]:
    yield from _tried()
    yield from _start_methods()
    yield from _limits()
    yield from _sysctls()
    yield from _instruments()


def show() -> int:
    """Prints the findings; the exit status: 0 when all is there that fdpass needs."""
    out = console(sys.stdout)
    out.print(f"{platform.system()} {platform.release()}, {platform.machine()}, CPython {platform.python_version()}")
    findings = list(examine())
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    colours = {"ok": "", "lack": "red", "note": "yellow"}
    for finding in findings:
        table.add_row(finding.state, finding.name, finding.found, style=colours[finding.state])
        if finding.remedy:
            # Below what it is about, where it is looked for.
            table.add_row("", "", f"-> {finding.remedy}")
    out.print(table)
    lacks = [finding.name for finding in findings if finding.state == "lack"]
    if lacks:
        out.print(f"fdpass cannot work here: {', '.join(lacks)}.")
        return 1
    notes = [finding.name for finding in findings if finding.state == "note"]
    out.print("All that fdpass needs is here." + (f" Worth a look: {', '.join(notes)}." if notes else ""))
    return 0


# What is tried. Each probe returns what it found and raises OSError where the kernel refuses.


def _tried() -> Iterator[Finding]:
    yield _try("SCM_RIGHTS", _scm_rights, "lack", "descriptors cannot be passed; look for a seccomp or security-module rule on sendmsg")
    yield _try("SCM_CREDENTIALS", _scm_credentials, "lack", "peers cannot be identified; look for a user namespace without a mapping")
    yield _try("EPOLLEXCLUSIVE", _epoll_exclusive, "lack", "it needs Linux 4.5, and a container that allows it")
    yield _try("memfd_create", _memfd, "lack", "it needs Linux 3.17, and a container that allows it")
    yield _try("pidfd_open", _pidfd, "lack", "it needs Linux 5.3, and a container that allows it")
    yield _try("listen on 127.0.0.1", _loopback, "lack", "bring the loopback interface up: ip link set lo up")
    yield _try("SO_REUSEPORT", _reuseport, "note", "strategies reuseport and reuseport-bare do not work here; use shared")
    yield _try("SO_REUSEPORT after bind", _reuseport_late, "note", "two programs may end up on one port under reuseport; use shared")
    yield _try("SO_COOKIE", _cookie, "note", "sockets cannot be told apart by their cookie; it needs Linux 4.12")
    yield _try("SO_PEERPIDFD", _peer_pidfd, "note", "nothing to do: fdpass does without; it needs Linux 6.5")
    yield _try("SO_PASSRIGHTS", _pass_rights, "note", "nothing to do: fdpass does without; it needs Linux 6.16")


def _try(name: str, probe: Callable[[], str], failing: State, remedy: str) -> Finding:
    try:
        return Finding("ok", name, probe())
    except (OSError, AttributeError) as error:
        return Finding(failing, name, str(error), remedy)


def _scm_rights() -> str:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with left, right:
        read, write = os.pipe()
        try:
            left.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [read]))])
            _, control, flags, _ = right.recvmsg(1, socket.CMSG_LEN(struct.calcsize("i")), socket.MSG_CMSG_CLOEXEC)
        finally:
            os.close(read)
            os.close(write)
    if not control or flags & socket.MSG_CTRUNC:
        raise OSError(errno.EPERM, "the descriptor was dropped on the way")
    arrived = struct.unpack("i", control[0][2])[0]
    inheritable = os.get_inheritable(arrived)
    os.close(arrived)
    if inheritable:
        raise OSError(errno.EINVAL, "the descriptor arrived without close-on-exec")
    return "a descriptor passes and arrives close-on-exec"


def _scm_credentials() -> str:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with left, right:
        right.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        left.send(b"x")
        _, control, _, _ = right.recvmsg(1, socket.CMSG_SPACE(struct.calcsize("iII")))
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            uid = struct.unpack("iII", data)[1]
            if uid != os.getuid():
                raise OSError(errno.EPERM, f"the kernel names uid {uid}, this process has {os.getuid()}")
            return "the kernel vouches for the sender's uid"
    raise OSError(errno.EPERM, "no credentials came with the message")


def _bound(port: int = 0, reuse_port: bool = False) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("127.0.0.1", port))
    except OSError:
        sock.close()
        raise
    return sock


def _loopback() -> str:
    with _bound() as server, socket.socket() as client:
        server.listen(1)
        client.settimeout(5.0)
        client.connect(server.getsockname())
        server.accept()[0].close()
    return "a connection was made"


def _epoll_exclusive() -> str:
    with _bound() as server, select.epoll() as poll:
        server.listen(1)
        poll.register(server, select.EPOLLIN | select.EPOLLEXCLUSIVE)
    return "one waiter is woken per connection"


def _reuseport() -> str:
    with ExitStack() as stack:
        first = stack.enter_context(_bound(reuse_port=True))
        first.listen(1)
        stack.enter_context(_bound(first.getsockname()[1], reuse_port=True)).listen(1)
    return "two sockets listen on one port"


def _reuseport_late() -> str:
    with ExitStack() as stack:
        first = stack.enter_context(_bound())
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        first.listen(1)
        stack.enter_context(_bound(first.getsockname()[1], reuse_port=True)).listen(1)
    return "a port can be claimed first and shared afterwards"


def _memfd() -> str:
    fd = os.memfd_create("fdpass-bench")
    try:
        os.ftruncate(fd, mmap.PAGESIZE)
        mmap.mmap(fd, mmap.PAGESIZE).close()
    finally:
        os.close(fd)
    return "memory can be shared by descriptor"


def _pidfd() -> str:
    os.close(os.pidfd_open(os.getpid()))
    return "the end of a process can be waited for"


def _peer_pidfd() -> str:
    left, right = socket.socketpair()
    with left, right:
        os.close(left.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD))
    return "a peer has a pidfd"


def _pass_rights() -> str:
    left, right = socket.socketpair()
    with left, right:
        right.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    return "a socket can refuse descriptors"


def _cookie() -> str:
    with socket.socket() as sock:
        sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)
    return "two holders can prove that they hold one socket"


def _start_methods() -> Iterator[Finding]:
    remedy = "look at what the process printed, and at the limits on processes and memory (ulimit -u, cgroup pids.max)"
    for method in ("spawn", "forkserver", "fork"):
        failing: State = "lack" if method == "spawn" else "note"
        try:
            context: Any = multiprocessing.get_context(method)
            process = context.Process(target=os.getpid)
            process.start()
            process.join(30.0)
            code = process.exitcode
            if code is None:
                process.kill()
                process.join()
        except (OSError, ValueError) as error:
            yield Finding(failing, f"start by {method}", str(error), remedy)
            continue
        if code == 0:
            yield Finding("ok", f"start by {method}", "a process started and ended with 0")
        else:
            ended = "did not end within 30 s" if code is None else f"ended with {code}"
            yield Finding(failing, f"start by {method}", f"a process {ended}", remedy)


def _instruments() -> Iterator[Finding]:
    """What only this command needs."""
    missing = [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        yield Finding("note", "pages (--html)", f"{' and '.join(missing)} missing", "pip install 'fdpass[bench]'")
    else:
        yield Finding("ok", "pages (--html)", "jinja2 and matplotlib are here")
    try:
        with open("/proc/self/syscall", encoding="ascii") as file:
            file.read()
        yield Finding("ok", "who waits", "the kernel tells where threads sleep: who can warn of black holes")
    except OSError as error:
        remedy = "run who as root, or with sysctl -w kernel.yama.ptrace_scope=0, for its warnings of black holes"
        yield Finding("note", "who waits", f"where threads sleep is not to be seen: {error.strerror}", remedy)
    low, high = measure.local_ports()
    found = f"{high - low + 1} local ports, {low} to {high}"
    if high - low < _ENOUGH_PORTS:
        remedy = 'a long run against a server that is not on loopback may find none: sysctl -w net.ipv4.ip_local_port_range="10240 65535"'
        yield Finding("note", "ip_local_port_range", found, remedy)
    else:
        yield Finding("ok", "ip_local_port_range", found)


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{_number(soft)} soft, {_number(hard)} hard"
    remedy = ""
    if 0 <= soft < _ENOUGH_DESCRIPTORS:
        remedy = (
            "each connection takes a descriptor: fdpass.raise_fd_limit() in the program, or ulimit -n in the shell, lifts the soft limit"
        )
        if 0 <= hard < _ENOUGH_DESCRIPTORS:
            remedy = "each connection takes a descriptor: raise the hard limit (limits.conf, or LimitNOFILE= in the systemd unit)"
    yield Finding("note" if remedy else "ok", "RLIMIT_NOFILE", found, remedy)


def _number(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)


@dataclass(frozen=True)
class _Sysctl:
    name: str
    fine: Callable[[int], bool]
    meaning: str
    remedy: str


_SYSCTLS = (
    _Sysctl(
        "net.core.somaxconn",
        lambda value: value >= _ENOUGH_BACKLOG,
        "longest accept queue",
        "a burst beyond it waits or is dropped: sysctl -w net.core.somaxconn=4096",
    ),
    _Sysctl(
        "net.ipv4.tcp_max_syn_backlog",
        lambda value: value >= 128,
        "handshakes under way",
        "a burst beyond it is slowed: sysctl -w net.ipv4.tcp_max_syn_backlog=1024",
    ),
    _Sysctl(
        "net.ipv4.tcp_migrate_req",
        lambda value: value != 0,
        "1: the queue of a reuseport socket that closes moves to another",
        "a dying worker of reuseport-bare resets its queue: sysctl -w net.ipv4.tcp_migrate_req=1; shared and reuseport do not need it",
    ),
    _Sysctl(
        "net.ipv4.tcp_abort_on_overflow",
        lambda value: value == 0,
        "0: a client beyond the accept queue waits",
        "a client beyond the accept queue is reset: sysctl -w net.ipv4.tcp_abort_on_overflow=0",
    ),
    _Sysctl(
        "net.core.wmem_default",
        lambda value: value >= _ENOUGH_BUFFER,
        "bytes, the longest message on a Unix socket",
        "large messages are cut into more pieces: sysctl -w net.core.wmem_default=212992",
    ),
    _Sysctl(
        "net.core.wmem_max",
        lambda value: value >= _ENOUGH_BUFFER,
        "bytes, what SO_SNDBUF may ask for",
        "large messages are cut into more pieces: sysctl -w net.core.wmem_max=212992",
    ),
)


def _sysctls() -> Iterator[Finding]:
    for sysctl in _SYSCTLS:
        short = sysctl.name.rpartition(".")[2]
        value = measure.sysctl(sysctl.name)
        if value is None:
            yield Finding("note", short, "not to be read here", f"{sysctl.name} is set outside this container or missing from this kernel")
        elif sysctl.fine(value):
            yield Finding("ok", short, f"{value} ({sysctl.meaning})")
        else:
            yield Finding("note", short, f"{value} ({sysctl.meaning})", sysctl.remedy)
