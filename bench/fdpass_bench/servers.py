"""Who takes part: our workers under a strategy, another project's server started here, or one that runs already, each from start to end.
It sends no load and measures nothing; no scenario asks here whose a server is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import fdpass
from fdpass_bench import measure, peers
from fdpass_bench.strategy import Manner, Strategy
from fdpass_bench.target import Seen, Target


@dataclass(frozen=True)
class Wanted:
    """What a scenario wants of a server. manner: those of answer_async.py; a peer answers requests, whatever the manner.

    service: seconds, by which a worker holds what it greets; what is timed brings its own along. restarts: a worker that is killed shall
    have a successor. stop_timeout: seconds that our workers have to end by themselves.
    """

    workers: int
    manner: Manner = "timed"
    service: float = 0.0
    work: str = "sleep"
    keep_alive: bool = False
    backlog: int = 4096
    restarts: bool = False
    stop_timeout: float = 2.0  # a worker may be holding a connection that nobody waits for any more


class Workers:
    """The worker processes of a server, each with a place from 0 on. Ours say their place. `count`: others say their pid; so many have a
    place, which a successor takes once they are gone."""

    def __init__(self, find: Callable[[], Sequence[int]] = tuple, count: int | None = None) -> None:
        self._find, self._count = find, count
        self._places: dict[int, int] = {}  # by pid, of the dead too

    def pids(self) -> list[int]:
        """Those that serve now, in the order of their places; at the end those that wait for one."""
        alive = list(self._find())
        if self._count is None:
            return alive
        taken = {self._places[pid] for pid in alive if pid in self._places}
        free = [place for place in range(self._count) if place not in taken]
        for pid, place in zip([pid for pid in alive if pid not in self._places], free, strict=False):
            self._places[pid] = place
        return sorted(alive, key=lambda pid: self._places.get(pid, len(alive)))

    def place(self, said: int) -> int | None:
        """Of the worker that named itself so; None where it has none."""
        return said if self._count is None else self._places.get(said)


@dataclass(frozen=True)
class Serving:
    """A server that answers now.

    workers: its processes; none where they are somebody else's. http: whether they need a request before they say who they are.
    roll: replaces all workers while the port stays open; it raises RuntimeError, FdPassError or PeerError; None where it cannot.
    group: ours. dispatched: whether its connections are accepted by one process and passed on. loops: whether an event loop serves, and
    ticks: one that wakes ten times a second by itself.
    """

    host: str
    port: int
    workers: Workers = field(default_factory=Workers)
    protocol: str = "http"
    path: str = "/"
    http: bool = True
    roll: Callable[[], None] | None = None
    group: fdpass.WorkerGroup | None = None
    dispatched: bool = False
    loops: bool = True
    ticks: bool = False

    @property
    def address(self) -> tuple[str, int]:
        return self.host, self.port

    def pids(self) -> list[int]:
        return self.workers.pids()


class Server(Protocol):
    """What takes part: its name in the table, who runs it (fdpass, peer, target), what version, its credits where it is our dispatch, how
    it queues as far as theory knows, and whether what waits for a worker is lost with it, as it says itself."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def version(self) -> str | None: ...
    @property
    def credits(self) -> int | None: ...
    @property
    def discipline(self) -> str | None: ...
    @property
    def loses_queues(self) -> bool: ...
    def serve(self, wanted: Wanted) -> AbstractContextManager[Serving]: ...


@dataclass(frozen=True)
class Group:
    """Our own workers under one strategy."""

    strategy: Strategy
    asked_credits: int | None = None  # of dispatch
    kind = "fdpass"
    version = fdpass.__version__

    @property
    def name(self) -> str:
        return str(self.strategy)

    @property
    def credits(self) -> int | None:
        return (self.asked_credits or 1) if self.strategy.name == "dispatch" else None

    @property
    def discipline(self) -> str | None:
        return self.strategy.discipline(self.asked_credits)

    @property
    def loses_queues(self) -> bool:
        return self.strategy.name == "reuseport-bare"

    @contextmanager
    def serve(self, wanted: Wanted) -> Iterator[Serving]:
        with self.strategy.group(
            wanted.manner,
            "127.0.0.1:0",
            wanted.workers,
            service=wanted.service,
            work=wanted.work,
            keep_alive=wanted.keep_alive,
            credits=self.asked_credits,
            name="bench",
            backlog=wanted.backlog,
            restart="on-failure" if wanted.restarts else "never",
            stop_timeout=wanted.stop_timeout,
        ) as group:
            host, _, port = str(group.endpoint).rpartition(":")
            yield Serving(
                host,
                int(port),
                Workers(lambda: [worker.pid for worker in group.stats()]),
                http=self.strategy.speaks_http,
                roll=group.roll,
                group=group,
                dispatched=self.strategy.name == "dispatch",
                loops=self.strategy.program != "listener",
                ticks=self.strategy.program == "uvicorn",
            )


@dataclass(frozen=True)
class PeerServer:
    """Another project's server, started here."""

    name: str
    version: str
    kind = "peer"
    credits = None
    discipline = None
    loses_queues = False

    @classmethod
    def find(cls, name: str, wanted: Wanted, *, rolls: bool = False) -> PeerServer:
        """Raises peers.PeerUnable where it cannot do this, another peers.PeerError where it is not installed.

        rolls: whether it has to replace its workers.
        """
        if rolls and name not in peers.RELOADING:
            raise peers.PeerUnable(f"{name} cannot replace its workers while it serves; {', '.join(peers.RELOADING)} can")
        if wanted.restarts and name not in peers.RESTARTING:
            raise peers.PeerUnable(f"{name} starts no worker in place of one that was killed; {', '.join(peers.RESTARTING)} do")
        return cls(name, cls._peer(name, wanted).version)

    @staticmethod
    def _peer(name: str, wanted: Wanted) -> peers.Peer:
        kept = wanted.keep_alive or wanted.manner == "hold"
        return peers.Peer(name, wanted.workers, wanted.service > 0, wanted.work, kept, wanted.backlog)

    @contextmanager
    def serve(self, wanted: Wanted) -> Iterator[Serving]:
        with self._peer(self.name, wanted) as peer:
            workers = Workers(peer.pids, wanted.workers)
            workers.pids()

            def roll() -> None:
                peer.reload()
                workers.pids()

            host, port = peer.address
            yield Serving(host, port, workers, roll=roll if self.name in peers.RELOADING else None, ticks=self.name == "uvicorn")


@dataclass(frozen=True)
class TargetServer:
    """A server that somebody else runs. seen: what is known of its processes, None where nobody looked."""

    target: Target
    seen: Seen | None = None
    kind = "target"
    version = None
    credits = None
    discipline = None
    loses_queues = False

    @property
    def name(self) -> str:
        return self.target.text

    @property
    def serving(self) -> Serving:
        pids = [process.pid for process in self.seen.workers] if self.seen else []
        one = self.target
        return Serving(one.host, one.port, Workers(lambda: measure.alive(pids)), protocol=one.protocol, path=one.path)

    @contextmanager
    def serve(self, wanted: Wanted) -> Iterator[Serving]:
        yield self.serving
