"""The load generator, the server that does nothing and the histogram: the one door to the command's C. Linux only.

It knows connections, instants and outcomes; not workers, strategies or what a run is to show.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import math
import mmap
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

import fdpass
from fdpass._board import anonymous_file
from fdpass._launch import SignalsHeld

try:
    from fdpass_bench._loadgen import ffi, lib
except ImportError:
    ffi = lib = None

if TYPE_CHECKING:
    from typing import Self

#: How a request ended; the column `outcome` has the index, -1 while the request is under way or was never begun.
#:
#: ok:                   the whole answer came.
#: refused:              no connection came about: refused, no route, or a firewall's word.
#: reset_before_accept:  reset before one byte of an answer: what the kernel does to a connection that nobody accepted.
#: reset_after_accept:   cut off in another way: an early end of file, a reset inside an answer or on a connection that had one.
#: timeout:              given up.
#: bad_answer:           not HTTP, or a status of 400 or more.
#: no_port, no_descriptor: this machine could not make another connection.
OUTCOMES = ("ok", "refused", "reset_before_accept", "reset_after_accept", "timeout", "bad_answer", "no_port", "no_descriptor")

_ARRIVALS = ("poisson", "uniform", "burst")
_DISTRIBUTIONS = ("exponential", "fixed", "hyper")
_PROTOCOLS = ("http", "tcp")

#: Seconds between two looks at how far a run is.
_LOOK = 0.1
#: Seconds that a process of ours has to end in order.
_PATIENCE = 5.0
#: A path longer than this is refused: the request is composed in a buffer of 4096 bytes.
_PATH_MAX = 3072


@dataclass(frozen=True)
class Load:
    """What a run is to do. Raises ValueError for what cannot be.

    host, port: the target, an IPv4 or IPv6 literal.
    rate: connections per second of the schedule; None with clients > 0.
    arrivals: "poisson", "uniform" (evenly spaced), "burst" (all at once, at the start).
    clients: > 0: closed loop: so many clients, each begins its next connection when its last has ended; rate and arrivals do not matter.
    service: mean seconds that a request asks its server for. distribution: "exponential", "fixed", "hyper" (two-phase
        hyperexponential with balanced means and a squared coefficient of variation of 4).
    requests: per connection, kept alive when > 1. think: mean seconds between an answer and the connection's next request, exponential.
    timeout: seconds from the schedule until a request is given up.
    protocol: "http", or "tcp": one line is sent, and the first byte or an orderly end of file is the answer.
    sources: rotates the source address over 127/8, so that TIME_WAIT never takes the last port; of no effect on other targets.
    """

    host: str
    port: int
    connections: int
    rate: float | None
    arrivals: str = "poisson"
    clients: int = 0
    service: float = 0.0
    distribution: str = "exponential"
    seed: int = 1
    requests: int = 1
    think: float = 0.0
    timeout: float = 10.0
    protocol: str = "http"
    path: str = "/"
    sources: bool = True

    def __post_init__(self) -> None:
        if getattr(ipaddress.ip_address(self.host), "scope_id", None):
            raise ValueError(f"host {self.host!r} has a zone, which the generator does not know")
        for name, known in (("arrivals", _ARRIVALS), ("distribution", _DISTRIBUTIONS), ("protocol", _PROTOCOLS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(known)}")
        if not 0 < self.port < 65536:
            raise ValueError(f"port {self.port} is not within 1 and 65535")
        if self.connections < 1 or self.requests < 1 or self.clients < 0:
            raise ValueError("there is at least one connection, and one request on it")
        if not self.clients and self.arrivals != "burst" and not (self.rate and 0 < self.rate < math.inf):
            raise ValueError(f"an open loop needs a rate above 0 connections per second, not {self.rate}")
        if not (0 <= self.service < 1e6 and 0 <= self.think < 1e6 and 0 < self.timeout < 1e6):
            raise ValueError("service, think and timeout are seconds, not negative, timeout above 0, below a million")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError("seed is within 0 and 2**64 - 1")
        if self.protocol == "tcp" and self.requests > 1:
            raise ValueError("a tcp connection carries one request")
        if not self.path.startswith("/") or not self.path.isascii() or not self.path.isprintable() or " " in self.path:
            raise ValueError(f"path {self.path!r} does not begin with / or has characters that a request line cannot")
        if len(self.path) > _PATH_MAX:
            raise ValueError(f"path has {len(self.path)} characters: {_PATH_MAX} at most")

    def _request(self) -> bytes:
        """The request up to where its service time stands; in tcp mode all of it."""
        if self.protocol == "tcp":
            return b"fdpass\n"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"GET {self.path} HTTP/1.1\r\nHost: {host}:{self.port}\r\nFdpass-Service: ".encode()

    def _in_c(self) -> tuple[Any, Any]:
        """The flg_load, and what has to outlive it."""
        _require()
        address = ipaddress.ip_address(self.host)
        head = ffi.new("char[]", self._request())
        load = ffi.new("flg_load *")
        load.ipv6, load.port, load.sources = address.version == 6, self.port, self.sources
        load.address[0 : len(address.packed)] = list(address.packed)
        load.protocol = _PROTOCOLS.index(self.protocol)
        load.arrivals, load.distribution = _ARRIVALS.index(self.arrivals), _DISTRIBUTIONS.index(self.distribution)
        load.connections, load.requests, load.clients = self.connections, self.requests, self.clients
        load.gap = 1e9 / self.rate if self.rate else 0.0
        load.service, load.think, load.timeout = self.service * 1e9, self.think * 1e9, round(self.timeout * 1e9)
        load.seed, load.head, load.head_size = self.seed, head, len(head) - 1
        return load, head


class Result:
    """What happened in a run, request by request.

    The columns are memoryviews of format "q" with connections * requests entries, request r of connection c at c * requests + r.
    Instants are CLOCK_MONOTONIC nanoseconds, 0 where it never happened:

    scheduled: when the request was due. In a closed loop and of a later request: when its client or its connection was free for
        it, think time included. Latency counts from here, so that a late generator is not mistaken for a fast server.
    begun: when it was really begun, before connect(). Of a later request connected is the same.
    connected: when the connection took the request. answered: when the request ended, whatever its outcome.
    outcome: the index in OUTCOMES, -1 for what had not ended when the run was stopped.
    worker, accepted, started, free: what the answer said, -1 and 0 where it said nothing of that form.
    drawn: the service time asked for, nanoseconds.

    When a connection ends before its last request, those that are left have the same outcome, or reset_after_accept when the
    server closed it in order between two answers; they were never begun, and scheduled is 0.

    cpu_seconds: processor time of the generator's thread for the run, its preparation included. began, ended: instants, began is
    the schedule's zero.
    """

    __slots__ = (
        "accepted", "answered", "began", "begun", "connected", "cpu_seconds", "drawn", "ended", "free", "outcome", "scheduled",
        "started", "worker",
    )  # fmt: skip

    scheduled: memoryview
    begun: memoryview
    connected: memoryview
    answered: memoryview
    outcome: memoryview
    worker: memoryview
    accepted: memoryview
    started: memoryview
    free: memoryview
    drawn: memoryview

    def __init__(self, words: memoryview, requests: int) -> None:
        self.began: int = words[lib.FLG_BEGAN]
        self.ended: int = words[lib.FLG_ENDED]
        self.cpu_seconds: float = words[lib.FLG_CPU] / 1e9
        # In C's order. A copy: the pages are the generator's as well, and a mapping keeps a descriptor.
        columns = memoryview(words[lib.FLG_HEADER :].tobytes()).cast("q")
        names = ("scheduled", "begun", "connected", "answered", "outcome", "worker", "accepted", "started", "free", "drawn")
        for number, name in enumerate(names):
            setattr(self, name, columns[number * requests : (number + 1) * requests])


class _Process:
    """A spawned process of ours, which ends when its channel does."""

    def __init__(self, name: str, target: Callable[[fdpass.Channel], None]) -> None:
        _require()
        self._name = name
        self.channel, theirs = fdpass.Pipe()
        try:
            self._process = fdpass.get_context("spawn").Process(target=target, args=(theirs,), name=name, daemon=True)
            # A Ctrl-C in the middle of the start would leave a process behind, or have the child tell of it. Started now, because
            # the first start of the tracker ends with SIGINT unblocked.
            resource_tracker.ensure_running()
            with SignalsHeld():
                self._process.start()
            self.pid: int = self._process.pid
        except BaseException:
            self.channel.close()
            raise
        finally:
            theirs.close()

    def send(self, obj: Any) -> None:
        """Raises RuntimeError when the process has died."""
        try:
            self.channel.send(obj)
        except (fdpass.BrokenChannelError, ConnectionError):
            raise self._died() from None

    def recv(self) -> Any:
        """Raises RuntimeError when the process has died."""
        try:
            return self.channel.recv()
        except (fdpass.EndOfChannel, fdpass.BrokenChannelError, ConnectionError):
            raise self._died() from None

    def _died(self) -> RuntimeError:
        self._process.join(_PATIENCE)
        return RuntimeError(str(fdpass.WorkerDied(self._name, self.pid, self._process.exitcode)))

    def close(self) -> None:
        if self.channel.closed:
            return
        # A worker that was forked meanwhile has a duplicate of our end: to close ours alone would say nothing.
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.channel.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)
        self.channel.close()
        try:
            self._process.join(_PATIENCE)
        finally:
            if self._process.exitcode is None:
                self._process.kill()
                self._process.join()
            self._process.close()


class _Owner:
    """Whoever has a process, from `with` until its end."""

    _process: _Process

    def close(self) -> None:
        """Ends the process; again does nothing."""
        self._process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Generator(_Owner):
    """A process that makes the connections, so that its clock does not wait for this process's interpreter. Context manager.

    One run at a time, any number after each other. Raises RuntimeError where it cannot be (not Linux).
    """

    def __init__(self) -> None:
        self._process = _Process("the load generator", _generate)
        self.pid = self._process.pid

    def run(self, load: Load, ended: Callable[[int], None] = lambda count: None, enough: Callable[[], bool] = lambda: False) -> Result:
        """Makes the connections and returns when every request has ended. ended() is told now and then how many have.

        Where enough() says so, looked at ten times a second, it returns at once; what had not ended then has the outcome -1.

        An exception in ended(), or a KeyboardInterrupt, stops the run at once and goes on; the generator may be used again.
        Raises RuntimeError when the generator's process died, OSError when it could not even try, fdpass.ClosedError.
        """
        total = load.connections * load.requests
        size = (lib.FLG_HEADER + lib.FLG_COLUMNS * total) * 8
        with anonymous_file("fdpass-load") as owned:
            # Allocated now: a page that is not to be had later would be a SIGBUS.
            os.posix_fallocate(owned.fileno(), 0, size)
            with mmap.mmap(owned.fileno(), size) as pages, memoryview(pages) as view, view.cast("q") as words:
                try:
                    self._process.send((load, owned))
                except BaseException:
                    # Nobody knows whether the run has begun.
                    self.close()
                    raise
                try:
                    told = False
                    while not self._process.channel.poll(_LOOK):
                        ended(words[lib.FLG_OVER])
                        if not told and enough():
                            told = True
                            self._process.channel.send(None)
                    code = self._process.recv()
                except BaseException:
                    self._stop()
                    raise
                if code < 0:
                    raise OSError(-code, f"{os.strerror(-code)} (making connections to {load.host} port {load.port})")
                ended(words[lib.FLG_OVER])
                return Result(words, total)

    def _stop(self) -> None:
        """Ends the run under way, or the process when that cannot be done in order."""
        try:
            # Whatever can be read from its channel stops a run; what it says is for the time after.
            self._process.channel.send(None)
            self._process.channel.recv(_PATIENCE)
        except Exception:
            self.close()
        except BaseException:
            self.close()
            raise


def _generate(channel: fdpass.Channel) -> None:
    """What runs in the generator's process: a run for each (load, file of its columns) that arrives."""
    # The terminal's Ctrl-C is for the process that decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fdpass.raise_fd_limit()
    with channel:
        try:
            while True:
                channel.send(_run(channel))
        except (fdpass.EndOfChannel, fdpass.BrokenChannelError, ConnectionError):
            pass  # whoever wanted to know is gone


def _run(channel: fdpass.Channel) -> int:
    """The next order's run; what flg_run returned, or another -errno."""
    try:
        # None was meant for a run that was over by itself.
        while (order := channel.recv()) is None:
            pass
        load, owned = order
        wanted, _kept = load._in_c()
        with owned, mmap.mmap(owned.fileno(), 0) as pages, ffi.from_buffer("int64_t[]", pages) as board:
            return int(lib.flg_run(wanted, board, channel.fileno()))
    except fdpass.DescriptorsLostError as error:
        return -(error.errno or errno.EMFILE)
    except ConnectionError:
        raise
    except OSError as error:
        return -(error.errno or errno.EIO)


class NullServer(_Owner):
    """A server in a process of its own that answers each HTTP request at once, from C. Context manager.

    .address: (host, port), on IPv4 loopback; .pid. Raises OSError, RuntimeError where it cannot be (not Linux).
    """

    def __init__(self) -> None:
        self._process = _Process("the null server", _answer)
        self.pid = self._process.pid
        try:
            with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
                self.address: tuple[str, int] = listener.getsockname()
                self._process.send(listener)
            self._process.recv()  # it serves: the first connection does not pay for the start
        except BaseException:
            self._process.close()
            raise


def _answer(channel: fdpass.Channel) -> None:
    """What runs in the null server's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fdpass.raise_fd_limit()
    with channel:
        try:
            listener = channel.recv()
        except fdpass.EndOfChannel:
            return
        with listener:
            # Whoever is gone by now is found to be so by the server, which watches the channel.
            with contextlib.suppress(fdpass.BrokenChannelError, ConnectionError):
                channel.send(None)
            code = lib.flg_null_server(listener.fileno(), channel.fileno())
    if code < 0:
        raise OSError(-code, os.strerror(-code))


class Histogram:
    """Durations in nanoseconds, counted in steps of at most 1/128 of the value; count, sum, mean, min and max are exact.

    Raises ValueError for a negative duration, and where an empty histogram is asked for a figure.
    """

    def __init__(self) -> None:
        _require()
        self._in_c = ffi.new("flg_histogram *")

    def record(self, ns: int) -> None:
        """Counts one."""
        self._counted(lib.flg_histogram_add(self._in_c, ffi.new("int64_t *", ns), 1))

    def add(self, column: Any) -> None:
        """Counts each of a column: any contiguous buffer of 64-bit integers."""
        with memoryview(column) as view:
            if view.itemsize != 8 or view.format not in ("q", "l"):
                raise TypeError(f'a column has the format "q", not "{view.format}"')
            with ffi.from_buffer("int64_t[]", view) as values:
                self._counted(lib.flg_histogram_add(self._in_c, values, len(values)))

    def merge(self, other: Histogram) -> None:
        """Counts what the other has counted."""
        lib.flg_histogram_merge(self._in_c, other._in_c)

    def percentile(self, percent: float) -> int:
        """Nanoseconds that `percent` (0 to 100) of the durations do not exceed, within 0.4 %."""
        if not 0 <= percent <= 100:
            raise ValueError(f"a percentile is within 0 and 100, not {percent}")
        self._filled()
        return int(lib.flg_histogram_percentile(self._in_c, percent))

    @property
    def count(self) -> int:
        return int(self._in_c.count)

    @property
    def sum(self) -> int:
        return int(self._in_c.sum_high << 64 | self._in_c.sum_low)

    @property
    def mean(self) -> float:
        return self.sum / self._filled()

    @property
    def min(self) -> int:
        self._filled()
        return int(self._in_c.min)

    @property
    def max(self) -> int:
        self._filled()
        return int(self._in_c.max)

    def _filled(self) -> int:
        if not self._in_c.count:
            raise ValueError("nothing was counted yet")
        return int(self._in_c.count)

    @staticmethod
    def _counted(code: int) -> None:
        if code < 0:
            raise ValueError("a duration is not negative")


def _require() -> None:
    if lib is None:
        raise RuntimeError(
            "the load generator needs Linux: it is made of epoll and timerfd"
            if sys.platform != "linux"
            else "the load generator was not built: install fdpass again, from its sources"
        )
