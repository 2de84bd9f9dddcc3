"""A server that runs already: how it is named, and what a few connections, one after the other, and /proc show of it.
It sends no load and judges nothing; what cannot be known is said to be unknown."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import math
import re
import socket
import ssl
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import stdev
from typing import Any

import psutil

from fdpass_bench import holders, measure, sockdiag
from fdpass_bench.holders import Member

_SPACED = 40  # connections, one after the other
_BUDGET = 8.0  # seconds for all of them
_GAP = 0.005  # seconds in which whoever a connection wakes has run
_REST = 0.003  # seconds after a connection until its end is over too
_WINDOW = 0.5  # seconds to see who waits
_FEW = 10  # connections, from which nothing follows
_UNSURE, _UNSURE_SHARE = 0.25, 0.1  # processes, or of how many a connection wakes: the standard error of that
_MOST_PROCESSES = 256  # that are looked at for each connection
_MOST_PORTS = 8  # of a sentence


class TargetError(Exception):
    """Why a server cannot be a target; the message says what helps."""


# -------------------------------------------------------------------------------- how it is named


@dataclass(frozen=True)
class Target:
    """A server that somebody else runs. host: an IPv4 or IPv6 literal; protocol: "http" or "tcp"; text: as it was written."""

    host: str
    port: int
    protocol: str
    path: str
    text: str

    @classmethod
    def parse(cls, text: str) -> Target:
        """A port alone is one of this machine. Of a name's addresses an IPv4 one is preferred: "localhost" is ::1 as well, where fewer
        servers listen.

        Raises ValueError for another form, for TLS, for a port that is none and for a name that does not resolve.
        """
        text = text.strip()
        if text.lower().startswith("https://"):
            raise ValueError(f"TLS is not supported, so {text!r} cannot be a target: name a port that speaks plain HTTP")
        if text.startswith(("unix:", "/", "./")):
            raise ValueError(f"{text!r} is a Unix socket, which cannot be a target: let the server listen on a TCP port too")
        found = re.fullmatch(r"(?:(http|tcp)://)?(?:\[([^\s\[\]]+)\]|([^\s:/\[\]@?#]*))(?::(\d+))?(/[!\"$-~]*)?", text, re.ASCII)
        protocol, literal, name, port, path = found.groups() if found else (None,) * 5
        if name and port is None and name.isdigit():
            name, port = "", name
        if found is None or (protocol == "tcp" and path) or (port is None and protocol != "http") or not (literal or name or port):
            raise ValueError(f"{text!r} is no target: PORT, HOST:PORT, [::1]:PORT, http://HOST:PORT/path or tcp://HOST:PORT")
        if not 1 <= int(port or 80) <= 65535:
            raise ValueError(f"{text!r} is no target: a port is 1 to 65535")
        found_at = cls(_resolved(literal, name or ""), int(port or 80), protocol or "http", path or "/", text)
        return found_at if literal or name else replace(found_at, text=f"{found_at.address}{path or ''}")

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _resolved(literal: str | None, name: str) -> str:
    if literal is not None:
        try:
            found = str(ipaddress.IPv6Address(literal))
        except ValueError:
            raise ValueError(f"[{literal}] is no IPv6 address") from None
        return "::1" if found == "::" else found
    # What a server says that listens on every address; nobody connects to that.
    if name in ("", "0.0.0.0", "*"):
        return "127.0.0.1"
    try:
        infos = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{name!r} does not resolve: {getattr(error, 'strerror', None) or error}") from None
    infos.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return str(infos[0][4][0])


# -------------------------------------------------------------------------------- what is seen of it


@dataclass(frozen=True)
class Process:
    """does: as `who` says it, or "child" of one that holds the socket. worker: whether it takes connections. took: of those one by one."""

    pid: int
    command: str
    does: str
    worker: bool
    took: int


@dataclass(frozen=True)
class Seen:
    """latency: seconds of each of the connections one after the other; of `known` it is known who took it. status: of the HTTP answer.

    unknown: why nothing is known of its processes. sockets: how many listen; owner: whose they are. hidden: processes that may not be seen.
    woken: processes that wait for connections, and that a connection woke, on average, beyond what wakes them without one; None where it
    cannot be told. black_holes: sentences.
    """

    target: Target
    latency: Sequence[float]
    status: int | None
    unknown: str | None = None
    sockets: int = 0
    owner: str = ""
    processes: Sequence[Process] = ()
    known: int = 0
    woken: float | None = None
    waiters: int = 0
    hidden: int = 0
    black_holes: Sequence[str] = ()

    @property
    def workers(self) -> list[Process]:
        return [process for process in self.processes if process.worker]

    @property
    def mean(self) -> float:
        return sum(self.latency) / len(self.latency)

    @property
    def modest_rate(self) -> float:
        """Connections per second that it can do whatever it is: half as many as one client alone, and 100 at most."""
        return float(f"{min(100.0, max(0.5, 0.5 / max(self.mean, 1e-6))):.2g}")

    def as_json(self) -> dict[str, Any]:
        """Of its run."""
        return {
            # Of a command what it is; its arguments may be nobody's business.
            "holders": [asdict(one) | {"command": " ".join(one.command.split()[:2])} for one in self.processes],
            "listening_sockets": self.sockets or None,
            "unknown": self.unknown,
            "one_by_one": {"connections": len(self.latency), "mean_ms": round(self.mean * 1e3, 4), "known": self.known},
            "woken_per_connection": None if self.woken is None else round(self.woken, 4),
        }


def look(target: Target, timeout: float) -> Seen:
    """Makes up to 41 connections, one after the other. `timeout`: seconds for each answer. Raises TargetError when it does not answer."""
    first = _first(target, timeout)
    unknown, sockets = _listening(target)
    watch = _Watch(target, sockets)
    spaced = _Spaced()
    # Before and after: one that was busy at one look may wait at the other.
    watch.look()
    deadline = time.monotonic() + _BUDGET
    try:
        while len(spaced.latency) < _SPACED and time.monotonic() < deadline:
            watch.connection(spaced, timeout)
    except (OSError, http.client.HTTPException) as error:
        if not spaced.latency:
            raise TargetError(f"{target.text} answered once, and then no more: {_said(error)}") from error
    watch.look()
    return Seen(
        target, spaced.latency, first, unknown, len(sockets), holders.user_of(sockets[0].uid) if sockets else "", **watch.found(spaced)
    )


def _listening(target: Target) -> tuple[str | None, list[sockdiag.ListeningSocket]]:
    """Why nothing is known of its processes, and the sockets that its connections come to, which are those of the closest address."""
    host = ipaddress.ip_address(target.host)
    own = {str(one.address).partition("%")[0] for found in psutil.net_if_addrs().values() for one in found}
    if not host.is_loopback and target.host not in own:
        return "it is not on this machine", []
    try:
        found = sockdiag.listening_sockets(target.port)
    except OSError as error:
        return f"the kernel does not tell who listens ({error.strerror or error})", []
    for address in (target.host, "0.0.0.0" if host.version == 4 else "::", "::"):
        shown = f"[{address}]:{target.port}" if ":" in address else f"{address}:{target.port}"
        if here := [one for one in found if one.address == shown]:
            return None, here
    return "no socket of this network namespace listens there: it is in a container, or another program forwards the port", []


@dataclass
class _Spaced:
    latency: list[float] = field(default_factory=list)
    took: Counter[int] = field(default_factory=Counter)
    woken: list[int] = field(default_factory=list)  # by each connection
    restless: list[int] = field(default_factory=list)  # as many, in the same time without one


class _Watch:
    """The processes of a target on this machine, and what each connection does to them."""

    def __init__(self, target: Target, sockets: Sequence[sockdiag.ListeningSocket]) -> None:
        self._target, self._sockets = target, sockets
        self._held, self._hidden = holders.find_holders({one.inode for one in sockets}) if sockets else ({}, 0)
        self._members: list[Member] = []
        self._seconds = 0.0
        self._waiters: set[int] = set()
        self._commands = {holder.pid: holder.command for found in self._held.values() for holder in found}
        self._holding = set(self._commands)
        for pid in list(self._commands):
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(pid).children(recursive=True):
                    with contextlib.suppress(psutil.Error, OSError):
                        self._commands.setdefault(child.pid, holders.command_of(child.pid))

    @property
    def _watched(self) -> list[int]:
        return [] if len(self._commands) > _MOST_PROCESSES else list(self._commands)

    def look(self) -> None:
        if self._sockets:
            self._members, self._seconds = holders.observe(self._target.port, self._sockets, self._held, _WINDOW)
            self._waiters |= {pid for member in self._members for pid in (*member.waited, *member.watched)}

    def connection(self, spaced: _Spaced, timeout: float) -> None:
        """One, after as long a time without one. Raises OSError and http.client.HTTPException."""
        before = self._switches()
        time.sleep(_GAP if self._watched else 0.0)
        quiet = self._switches()
        began = time.monotonic()
        with _connected(self._target, timeout) as conn:
            connected = time.monotonic()
            if self._watched:
                time.sleep(_GAP)
            after = self._switches()
            taker, inode = self._taker(conn)
            asked = time.monotonic()
            response = _asked(conn, self._target, timeout)
            spaced.latency.append(time.monotonic() - asked + connected - began)
            # Where it was not closed, whoever has it now has answered.
            taker = self._taker(conn)[0] or taker
            if response is not None:
                response.close()
        if inode:
            spaced.woken.append(_more(quiet, after))
            spaced.restless.append(_more(before, quiet))
        if taker is not None:
            spaced.took[taker] += 1
        time.sleep(_REST)

    def _switches(self) -> dict[int, int]:
        found = {}
        for pid in self._waiters & set(self._watched):
            with contextlib.suppress(OSError):
                found[pid] = measure.voluntary_switches(pid)
        return found

    def _taker(self, conn: socket.socket) -> tuple[int | None, int]:
        """Who alone has the server's end of a connection, None where it is several or nobody seen; and its inode, 0 before the accept."""
        if not self._watched:
            return None, 0
        here, there = conn.getpeername()[:2], conn.getsockname()[:2]
        try:
            inode = sockdiag.inode_of(here, there) or 0
        except OSError:
            return None, 0
        having = []
        for pid in self._watched if inode else []:
            with contextlib.suppress(OSError):
                if inode in measure.socket_inodes(pid):
                    having.append(pid)
        return (having[0] if len(having) == 1 else None), inode

    def found(self, spaced: _Spaced) -> dict[str, Any]:
        """What Seen says of processes."""
        # A process that accepts and passes on does not serve: those whom it passes to do.
        takers = set(spaced.took)
        serving = takers if takers and not takers & self._waiters else takers | self._waiters
        does = {pid: member.does(pid) for member in self._members for pid in self._commands if _holds(member, pid)}
        shown = self._holding | serving
        return {
            "processes": [
                Process(pid, command, does.get(pid, "child"), pid in serving, spaced.took[pid])
                for pid, command in sorted(self._commands.items())
                if pid in shown
            ],
            "known": spaced.took.total(),
            "woken": self._woken(spaced),
            "waiters": len(self._waiters),
            "hidden": self._hidden,
            "black_holes": [
                text
                for member in self._members
                if (text := holders.warning(member, self._members, self._seconds, self._hidden)) and text.startswith("Black hole")
            ],
        }

    def _woken(self, spaced: _Spaced) -> float | None:
        """None of few connections, and of processes that hardly rest: what a connection adds to that is not to be told."""
        count, waiters = len(spaced.woken), len(self._waiters)
        if count < _FEW or not waiters:
            return None
        woken, restless = (sum(counts) / count / waiters for counts in (spaced.woken, spaced.restless))
        if restless == 1:
            return None
        # One that would have woken anyway may have been woken by the connection as well.
        found = waiters * (woken - restless) / (1 - restless)
        # Those that tick may tick together: what differs from one connection to the next has that in it.
        added = [with_it - without for with_it, without in zip(spaced.woken, spaced.restless, strict=True)]
        error = stdev(added) / math.sqrt(count) / (1 - restless)
        return found if error < max(_UNSURE, _UNSURE_SHARE * found) else None


def _holds(member: Member, pid: int) -> bool:
    return any(holder.pid == pid for holder in member.holders)


def _more(before: dict[int, int], after: dict[int, int]) -> int:
    return sum(after.get(pid, count) > count for pid, count in before.items())


# -------------------------------------------------------------------------------- one connection


def _connected(target: Target, timeout: float) -> socket.socket:
    return socket.create_connection((target.host, target.port), timeout)


def _asked(conn: socket.socket, target: Target, timeout: float) -> http.client.HTTPResponse | None:
    """The answer, read to its end and not yet closed; None of tcp. Raises OSError and http.client.HTTPException."""
    if target.protocol == "tcp":
        conn.sendall(b"fdpass\n")
        conn.recv(1)
        return None
    deadline = time.monotonic() + timeout
    conn.sendall(f"GET {target.path} HTTP/1.1\r\nHost: {target.address}\r\n\r\n".encode())
    response = http.client.HTTPResponse(conn, method="GET")
    try:
        response.begin()
        while response.read1(1 << 16):
            if time.monotonic() > deadline:
                raise TimeoutError
        if response.length:
            raise http.client.IncompleteRead(b"", response.length)
    except BaseException:
        response.close()  # it holds the connection open
        raise
    return response


def _first(target: Target, timeout: float) -> int | None:
    """The status of one answer. Raises TargetError for a server that cannot be measured, with what helps."""
    ask = f"GET {target.path}" if target.protocol == "http" else "a line"
    late = f"{target.text} gave no answer to {ask} within {timeout:g} s (--time-limit sets another)"
    try:
        conn = _connected(target, timeout)
    except ConnectionRefusedError:
        raise TargetError(_nobody(target)) from None
    except TimeoutError:
        raise TargetError(late) from None
    except OSError as error:
        raise TargetError(f"{target.text} cannot be reached: {_said(error)}") from error
    try:
        with conn:
            response = _asked(conn, target, timeout)
            if response is None:
                return None
            status, reason = response.status, response.reason
            response.close()
    except TimeoutError:
        raise TargetError(late) from None
    except (OSError, http.client.HTTPException) as error:
        if _speaks_tls(target):
            raise TargetError(_TLS.format(target.text, target.address)) from error
        raise TargetError(
            f"{target.text} does not answer {ask}: {_said(error)}; tcp://{target.address} measures what is not HTTP"
        ) from error
    if status < 400:
        return status
    if _speaks_tls(target):
        raise TargetError(_TLS.format(target.text, target.address))
    raise TargetError(
        f"{target.text} answers {ask} with {status} {reason}: name a path that it answers, --target http://{target.address}/path"
    )


_TLS = "{} speaks TLS, which is not supported: name a port that speaks plain HTTP, or see with tcp://{} how it takes connections"


def _said(error: Exception) -> str:
    if isinstance(error, http.client.BadStatusLine) and not isinstance(error, OSError):
        return f"what came is not HTTP ({str(error)[:40]!r})"
    if isinstance(error, http.client.IncompleteRead):
        return f"the answer breaks off {error.expected} bytes before its end"
    if isinstance(error, http.client.RemoteDisconnected):
        return "the connection was closed without an answer"
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def _speaks_tls(target: Target) -> bool:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with _connected(target, 2.0) as conn, context.wrap_socket(conn):
            return True
    except (OSError, ValueError):
        return False


def _nobody(target: Target) -> str:
    """What to try where a connection was refused."""
    try:
        here = sorted({one.address for one in sockdiag.listening_sockets(target.port)})
    except OSError:
        here = []
    if here and ipaddress.ip_address(target.host).is_loopback:
        return f"{target.text} refuses connections; on port {target.port} this machine listens at {' and '.join(here)}: --target {here[0]}"
    if not ipaddress.ip_address(target.host).is_loopback:
        return f"{target.text} ({target.address}) refuses connections: nothing listens there"
    return f"nothing listens on {target.address}{_others()}"


def _others() -> str:
    try:
        found = psutil.net_connections("tcp")
    except (psutil.Error, OSError):
        return ""
    programs: dict[int, str] = {}
    for one in found:
        if one.status == psutil.CONN_LISTEN and one.laddr:
            with contextlib.suppress(psutil.Error):
                programs[one.laddr.port] = f" ({psutil.Process(one.pid).name()})" if one.pid else ""
    shown = [f"{port}{programs[port]}" for port in sorted(programs)]
    if not shown:
        return "; no port of this machine is listened on"
    more = f" and {len(shown) - _MOST_PORTS} more" if len(shown) > _MOST_PORTS else ""
    return f"; this machine listens on {', '.join(shown[:_MOST_PORTS])}{more}"
