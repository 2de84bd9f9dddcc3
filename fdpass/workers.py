"""WorkerGroup: start, watch, restart, drain and stop the workers of one port. How they share it is the strategy's affair.

One thread of the supervisor does all the watching; every change of a group's state happens in it, under one lock.
"""

from __future__ import annotations

import atexit
import multiprocessing.util  # noqa: F401  (its exit handler must be registered before ours, see below)
import os
import select
import signal
import threading
import warnings
import weakref
from collections import deque
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing import process as mp_process
from time import monotonic, monotonic_ns
from typing import TYPE_CHECKING, Any

from fdpass import strategies
from fdpass._board import ACCEPTED, GENERATION, HEARTBEAT, LOAD, OPEN, WAITING, WORDS, Board
from fdpass._launch import Cargo, SignalsHeld, exit_status, pidfd_of
from fdpass._worker import run
from fdpass.ancillary import why_no_passing
from fdpass.channel import Channel, Pipe
from fdpass.endpoint import Endpoint, listen
from fdpass.errors import ClosedError, FdPassError, WorkerDied
from fdpass.fds import OwnedFd
from fdpass.start import METHODS, OWN_THREADS, get_context

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from multiprocessing.process import BaseProcess
    from types import TracebackType
    from typing import Self


RESTARTS = ("never", "on-failure")
#: More successors than this in this many seconds, and the group gives up: a kill every half second makes ten.
RESTART_LIMIT, RESTART_WINDOW = 30, 5.0
#: Successors in a row, of one index, that ended before they were ready; the wait before the next doubles, in seconds.
NEVER_READY_LIMIT, BACKOFF, BACKOFF_MAX = 5, 0.1, 5.0


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """One worker as the supervisor sees it.

    index, name, pid: who. state: starting, ready, stopping or ended. exitcode: of the last process that ended, else None.
    accepted: connections since the group started, over all generations. open: connections that it holds now. restarts: successors so far.
    heartbeat: seconds since it last accepted or went to wait, None before the first time.
    """

    index: int
    name: str
    pid: int
    state: str
    exitcode: int | None
    accepted: int
    open: int
    restarts: int
    heartbeat: float | None


class _Worker:
    """One index of the group: its present process, its end of the control channel, and what happened before."""

    def __init__(self, index: int, name: str) -> None:
        self.index, self.name, self.line = index, name, index
        self.state = "ended"
        self.process: BaseProcess | None = None
        self.channel: Channel | None = None
        self.pidfd: OwnedFd | None = None
        self.pid = 0
        self.exitcode: int | None = None
        self.restarts = 0
        self.unready = 0  # successors in a row that were never ready
        self.was_ready = False
        self.muted = False  # it said something that could not be understood
        self.deadline: float | None = None  # by when it must be ready
        self.due: float | None = None  # when its successor starts

    @property
    def alive(self) -> bool:
        return self.process is not None

    def close(self) -> None:
        """Closes what the supervisor holds of it; the process is not touched."""
        for item in (self.channel, self.pidfd):
            if item is not None:
                item.close()
        self.channel = self.pidfd = None


class WorkerGroup:
    """k processes that serve one address; a context manager that starts them and, at its end, stops them.

    target:       called in each worker as target(listener, *args); importable, as multiprocessing wants it under spawn.
    address:      text for listen(), or the Endpoint it returned, which the group takes over.
    workers:      how many, at least 1.
    strategy:     "shared" (order= "rotate", the default, or "first"), "reuseport", "reuseport-bare", "dispatch" (order=
                  "round-robin", the default, or "least-loaded"), or "auto": shared where descriptors can be passed, else
                  reuseport-bare with a RuntimeWarning that says why.
    credits:      under dispatch, connections that a worker may have been given and not received yet: 1 (the default) to 128.
    restart:      "never": a worker that fails makes wait() raise; "on-failure": a successor takes its index and its listener.
    args, args_for: arguments for every worker, or args_for(index) -> tuple for each its own.
    start_method: fork, spawn, forkserver, or None for get_context()'s choice.
    backlog:      connections that may wait, capped by net.core.somaxconn; with several sockets, on each.
    start_timeout, stop_timeout: seconds for all to become ready, and to end when the with block does.

    The constructor binds (clients are refused until start()). Raises TypeError, ValueError, RuntimeError when __main__ is only
    being imported by a child, OSError from bind(2).
    """

    def __init__(
        self,
        target: Callable[..., Any],
        address: str | Endpoint,
        workers: int = 1,
        strategy: str = "shared",
        restart: str = "never",
        args: Iterable[Any] = (),
        args_for: Callable[[int], Iterable[Any]] | None = None,
        name: str = "worker",
        start_method: str | None = "spawn",
        *,
        order: str | None = None,
        credits: int | None = None,
        backlog: int = 4096,
        start_timeout: float = 60.0,
        stop_timeout: float = 10.0,
    ) -> None:
        self._state = "new"
        # Before the bind: a child that imports an unguarded __main__ would otherwise bind, or fail to, before it is told what is wrong.
        if getattr(mp_process.current_process(), "_inheriting", False):
            raise RuntimeError(
                "a WorkerGroup was made while a started worker was importing the main module: "
                "put the code that makes it under  if __name__ == '__main__':"
            )
        if not callable(target):
            raise TypeError(f"target is a function of (listener, *args), not {type(target).__name__}")
        if not isinstance(workers, int) or isinstance(workers, bool):
            raise TypeError(f"workers is a number (int), not {type(workers).__name__}")
        if workers < 1:
            raise ValueError(f"workers is at least 1, not {workers}")
        if restart not in RESTARTS:
            raise ValueError(f"restart {restart!r} is none of {', '.join(RESTARTS)}")
        if start_method is not None and start_method not in METHODS:
            raise ValueError(f"start_method {start_method!r} is none of {', '.join(METHODS)}")
        args = tuple(args)
        if args_for is not None and args:
            raise ValueError("args and args_for exclude each other")
        if backlog < 1:
            raise ValueError(f"backlog is at least 1, not {backlog}")
        if min(start_timeout, stop_timeout) < 0:
            raise ValueError(f"start_timeout and stop_timeout are 0 or more seconds, not {start_timeout} and {stop_timeout}")
        if not isinstance(address, (str, Endpoint)):
            raise TypeError(f"address is text or an Endpoint of listen(), not {type(address).__name__}")
        self._strategy = strategies.choose(strategy, order, credits)
        self._target, self._args, self._args_for, self._name = target, args, args_for, name
        self._restart, self._start_method = restart, start_method
        self._start_timeout, self._stop_timeout = start_timeout, stop_timeout
        self._workers = [_Worker(index, f"{name}-{index}") for index in range(workers)]
        self._pid = os.getpid()
        # The lock itself goes into with statements: Condition.__enter__ is Python, and a signal handler that raised in it would
        # leave the lock held for ever. Re-entrant, because a handler may call stop() or stats() while its thread holds it.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._failure: WorkerDied | None = None
        self._restart_limit = max(RESTART_LIMIT, 4 * workers)
        self._started_at: deque[float] = deque(maxlen=self._restart_limit)
        self._stop_by: float | None = None
        self._thread: threading.Thread | None = None
        self._finished = False  # the supervising thread has done its last
        self._trouble: BaseException | None = None  # what ended the start, or the thread, that was no worker's death
        self._ready_by = 0.0
        self._board: Board | None = None
        self._lines: list[Any] = [[0] * WORDS] * (2 * workers)  # of the board while it is open, else what it said last
        self._self_pidfd: OwnedFd | None = None
        self._wake: tuple[OwnedFd, OwnedFd] | None = None
        self._over: tuple[OwnedFd, OwnedFd] | None = None
        bound: Endpoint | None = None
        try:
            # A handler that raises here would leave a bound socket to the garbage collector.
            with SignalsHeld():
                bound = address if isinstance(address, Endpoint) else listen(address)
                self._endpoint = bound
                self._strategy.bind(bound, workers, backlog)
        except BaseException:
            self._strategy.close()
            if bound is not None:
                bound.close()
            raise

    # -- what users call -------------------------------------------------------------------------------------------------------

    @property
    def endpoint(self) -> Endpoint:
        """What the group serves; str() is its text, with the port that was bound."""
        return self._endpoint

    def start(self) -> None:
        """Listens, starts every worker and returns when all are ready.

        Raises WorkerDied when one ends before it is ready, TimeoutError after start_timeout seconds; then no process and no
        socket of the group is left. ClosedError when it was stopped meanwhile, RuntimeError when it was started before.
        """
        with self._lock:
            if self._state != "new":
                raise RuntimeError(f"a group starts once; this one is {self._state}")
            self._state = "starting"
        self._ready_by = monotonic() + self._start_timeout
        try:
            # Chosen once: successors start from the supervising thread, beside which fork would always look unsafe.
            self._context = get_context(self._start_method)
            method = self._context.get_start_method()
            # Here, where no signal is blocked: the two live on, and every other process of the program inherits from them.
            if method != "fork":
                resource_tracker.ensure_running()
            if method == "forkserver":
                forkserver.ensure_running()
            # SIGINT is blocked in it as well, which the thread keeps and the processes that either starts inherit.
            with SignalsHeld(), self._lock:
                self._open()
                self._strategy.listen()
                _live.add(self)
                for worker in self._workers:
                    worker.due = monotonic()
                if method == "fork":
                    # Before the supervising thread exists: CPython warns of a fork beside another thread.
                    self._launch_due()
                self._thread = threading.Thread(target=self._supervise, name=f"{OWN_THREADS}supervisor-{self._name}", daemon=True)
                self._thread.start()
            with self._lock:
                while self._state == "starting" and not self._settled():
                    left = self._ready_by - monotonic()
                    if left <= 0:
                        late = [worker.name for worker in self._workers if worker.state != "ready"]
                        raise TimeoutError(f"{', '.join(late)} not ready {self._start_timeout} s after the start")
                    self._changed.wait(left)
                if self._trouble is not None:
                    raise self._trouble
                if self._failure is not None:
                    raise self._failure
                if self._stop_by is not None:
                    raise ClosedError("the group was stopped while it was starting")
                if self._state == "starting":  # all may have served and ended by now
                    self._state = "running"
        except BaseException:
            self._end_now()
            raise

    def _settled(self) -> bool:
        """Whether start() has nothing more to wait for."""
        if self._trouble is not None or self._failure is not None or self._stop_by is not None:
            return True
        return all(worker.due is None and worker.state != "starting" for worker in self._workers)

    def wait(self, timeout: float | None = None) -> None:
        """Returns when every worker has ended by itself with exit status 0, or the group was stopped.

        timeout: seconds, None waits for ever. Raises WorkerDied with name, pid and exit status or signal for the first failure
        that gets no successor, TimeoutError.
        """
        deadline = None if timeout is None else monotonic() + timeout
        with self._lock:
            self._demand_started()
            while self._failure is None and self._trouble is None and self._state not in ("ended", "stopped"):
                left = None if deadline is None else deadline - monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(f"the group {self._name} still runs after {timeout} s")
                self._changed.wait(left)
            if self._failure is not None:
                raise self._failure
            if self._trouble is not None:
                raise self._trouble

    def stop(self, timeout: float | None = None) -> None:
        """Drains, sends SIGTERM, and SIGKILL to whatever still runs after timeout seconds (None: stop_timeout); returns when all ended.

        The listening sockets are closed and a unix: file removed. Again, or in a forked child, does nothing. It may come from any
        thread and from a signal handler; a start() that is under way ends with ClosedError.
        """
        if self._pid != os.getpid():
            return
        limit = self._stop_timeout if timeout is None else timeout
        try:
            with self._lock:
                if self._state in ("new", "stopped"):
                    self._close()
                    return
                by = monotonic() + limit
                self._stop_by = by if self._stop_by is None else min(by, self._stop_by)
                if self._thread is None:
                    return  # called by a signal handler in the middle of start(), which sees it and ends
            self._poke()
            self._await_thread()
        except BaseException:
            self._end_now()
            raise
        self._close()

    def stats(self) -> list[WorkerStats]:
        """One line per worker, read from the board without asking the workers."""
        with self._lock:
            found = []
            lines = self._lines
            for worker in self._workers:
                line = lines[worker.line]
                other = lines[(worker.index + len(self._workers)) if worker.line == worker.index else worker.index]
                age = (monotonic_ns() - line[HEARTBEAT]) / 1e9 if line[HEARTBEAT] else None
                who = (worker.index, worker.name, worker.pid, worker.state, worker.exitcode)
                found.append(WorkerStats(*who, line[ACCEPTED] + other[ACCEPTED], line[OPEN], worker.restarts, age))
            return found

    def fileno(self) -> int:
        """A descriptor that becomes readable when the group fails or ends; for select and poll. -1 before start() and after stop()."""
        return -1 if self._over is None else self._over[0].fileno()

    def __enter__(self) -> Self:
        if self._state not in ("running", "ended"):
            self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<WorkerGroup {self._name} x{len(self._workers)} {self._strategy.name} on {self._endpoint}, {self._state}>"

    # -- start -----------------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        self._board = Board.create(2 * len(self._workers) + 1)
        self._lines = self._board.lines
        self._strategy.begin(self._board.fd.fileno(), 2 * len(self._workers))
        if hasattr(os, "pidfd_open"):
            self._self_pidfd = OwnedFd(os.pidfd_open(os.getpid()))
        self._wake = _pipe()
        self._over = _pipe()
        # The fallback strategy must start where no descriptor can be passed: its workers then count for themselves and report.
        self._passing = self._strategy.passes or why_no_passing() is None

    def _launch(self, worker: _Worker, ready_by: float) -> None:
        """Starts the process of one index. On failure nothing of it is left."""
        assert self._board is not None
        ours, theirs = Pipe()
        try:
            with theirs:
                if worker.pid:
                    worker.line = worker.index + len(self._workers) if worker.line == worker.index else worker.index
                share = self._strategy.share(worker.index, worker.line)
                share.update(line=worker.line, lines=2 * len(self._workers))
                line = self._lines[worker.line]
                line[OPEN], line[HEARTBEAT], line[LOAD], line[WAITING] = 0, 0, 0, 0
                line[GENERATION] += 1
                if self._passing:
                    share.update(board=self._board.fd, pidfd=self._self_pidfd)
                share.update(supervisor=self._pid)
                # It waits in the socket pair until the worker reads it, so a slow start keeps nobody waiting here.
                ours.send(share)
                args = tuple(self._args_for(worker.index)) if self._args_for is not None else self._args
                cargo = Cargo((self._target, args))
                process = self._context.Process(target=run, args=(theirs, cargo), name=worker.name, daemon=False)
                # Known before the start, so that a forked child closes our end along with the group's other descriptors.
                worker.channel, worker.muted = ours, False
                try:
                    process.start()
                    worker.process, worker.pid = process, process.pid or 0
                    worker.state, worker.was_ready, worker.deadline, worker.due = "starting", False, ready_by, None
                finally:
                    cargo.close()
            worker.pidfd = pidfd_of(worker.pid)
            self._strategy.launched(worker.line, None if worker.pidfd is None else worker.pidfd.fileno())
        except BaseException:
            if worker.process is None:
                self._strategy.ended(worker.line)
                ours.close()
                worker.channel = None
            raise

    # -- the supervising thread ------------------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            # Whatever it is, workers that nobody watches must not stay.
            with self._lock:
                self._trouble = self._trouble or error
                self._kill_rest()
        finally:
            with self._lock:
                # Nobody accepts any more: clients are refused from now on, instead of waiting for ever.
                self._strategy.close()
                self._endpoint.close()
                self._finished = True
                if self._state != "stopped":
                    self._state = "ended"
                self._signal_over()
                self._changed.notify_all()

    def _turn(self) -> bool:
        """Starts what is due, then waits for the next event and deals with it; False when nothing is left to do."""
        assert self._wake is not None
        poll = select.poll()
        poll.register(self._wake[0].fileno(), select.POLLIN)
        places: dict[int, tuple[_Worker, str]] = {}
        with self._lock:
            if self._stop_by is not None:
                self._bring_down()
            else:
                self._launch_due()
            self._changed.notify_all()
            if not any(worker.alive or worker.due is not None for worker in self._workers):
                return False
            for worker in self._workers:
                if worker.process is not None:
                    ends = worker.pidfd.fileno() if worker.pidfd is not None else worker.process.sentinel
                    places[ends] = worker, "ended"
                if worker.channel is not None and not worker.muted:
                    places[worker.channel.fileno()] = worker, "spoke"
            times = [worker.due for worker in self._workers if worker.due is not None]
            if self._state == "running":
                times += [worker.deadline for worker in self._workers if worker.alive and worker.deadline is not None]
            if self._stop_by is not None:
                times.append(self._stop_by)
        for fd in places:
            poll.register(fd, select.POLLIN)
        left = max(0.0, min(times) - monotonic()) if times else None
        events = poll.poll(None if left is None else left * 1000 + 1)
        with self._lock:
            # What a worker said comes before how it ended: a ready worker that dies at once was ready.
            for fd, _ in sorted(events, key=lambda event: places.get(event[0], (None, "woken"))[1] != "spoke"):
                if fd not in places:
                    os.read(fd, 4096)
                elif places[fd][1] == "spoke":
                    self._hear(places[fd][0])
                else:
                    self._bury(places[fd][0])
        return True

    def _hear(self, worker: _Worker) -> None:
        """Reads what a worker says. One that says nonsense is not listened to any more; its end is seen by the pidfd.

        Its channel stays open: the worker takes the end of it for the end of its supervisor.
        """
        if worker.channel is None or worker.muted:
            return
        try:
            # A bounded number at a time: a worker that floods must not keep the others from being heard.
            for _ in range(16):
                if not worker.channel.poll():
                    return
                what, *values = worker.channel.recv(timeout=1.0)
                if what == "ready" and worker.state == "starting":
                    worker.state, worker.was_ready, worker.deadline, worker.unready = "ready", True, None, 0
                elif what == "counts" and not self._passing:
                    self._lines[worker.line][ACCEPTED], self._lines[worker.line][OPEN] = values
        except Exception:  # anything at all can come out of loading what a worker sent
            worker.muted = True

    def _bury(self, worker: _Worker) -> None:
        """A worker's process ended: its true exit status, and what follows from it."""
        process = worker.process
        assert process is not None
        self._hear(worker)
        code = worker.exitcode = exit_status(process)
        pid, told = worker.pid, worker.state == "stopping"
        worker.process, worker.state, worker.deadline = None, "ended", None
        worker.close()
        self._strategy.ended(worker.line)
        self._lines[worker.line][OPEN] = 0
        if told or self._stop_by is not None:
            return
        detail = "" if worker.was_ready else "it was never ready"
        failed = code != 0
        died = WorkerDied(worker.name, pid, code, detail)
        if self._state == "starting" and not worker.was_ready:
            # Exit status 0 too: a worker that ends before it is ready does not serve.
            self._fail(died)
        elif failed or self._strategy.held:
            if not failed:
                died = WorkerDied(worker.name, pid, code, "its share of the connections would wait for ever")
            if self._restart == "never":
                self._fail(died)
            else:
                self._succeed(worker, died)

    def _succeed(self, worker: _Worker, died: WorkerDied) -> None:
        """Plans the successor of a worker, or gives the group up when successors do not help."""
        now = monotonic()
        enough = ""
        if not worker.was_ready:
            worker.unready += 1
            if worker.unready > NEVER_READY_LIMIT:
                enough = f"{worker.unready} in a row were never ready"
        if len(self._started_at) == self._restart_limit and now - self._started_at[0] < RESTART_WINDOW:
            enough = f"{self._restart_limit} successors were started within {RESTART_WINDOW:g} s"
        if enough:
            detail = f"{died.detail}; {enough}" if died.detail else enough
            self._fail(WorkerDied(died.name, died.pid, died.exitcode, f"{detail}; no more successors"))
            return
        worker.due = now if worker.was_ready else now + min(BACKOFF * 2 ** (worker.unready - 1), BACKOFF_MAX)

    def _launch_due(self) -> None:
        """Starts every worker whose time has come; at the group's start, all."""
        for worker in self._workers:
            now = monotonic()
            if worker.alive and worker.deadline is not None and self._state == "running" and now >= worker.deadline:
                # A successor that hangs in its start: it counts as one that was never ready.
                worker.deadline = None
                self._kill(worker, signal.SIGKILL)
            if worker.due is None or now < worker.due or self._stop_by is not None:
                continue
            worker.due = None
            if worker.pid == 0:
                self._launch(worker, self._ready_by)  # what it raises ends the start
                continue
            worker.restarts += 1
            self._started_at.append(now)
            try:
                self._launch(worker, now + self._start_timeout)
            except Exception as error:
                worker.was_ready = False
                detail = f"its successor could not be started: {error}"
                self._succeed(worker, WorkerDied(worker.name, worker.pid, worker.exitcode, detail))

    def _fail(self, died: WorkerDied) -> None:
        if self._failure is None:
            self._failure = died
            self._signal_over()
        for worker in self._workers:
            worker.due = None
        if self._strategy.held and self._stop_by is None:
            # A held socket without a worker is a black hole for its share of the connections: better refused than swallowed.
            self._stop_by = monotonic() + self._stop_timeout

    def _bring_down(self) -> None:
        """Tells every worker to go, once; after the deadline ends those that have not."""
        assert self._stop_by is not None
        late = monotonic() >= self._stop_by
        for worker in self._workers:
            worker.due = None
            if not worker.alive:
                continue
            if worker.state != "stopping":
                worker.state, worker.deadline = "stopping", None
                self._strategy.retire(worker.line)
                if worker.channel is not None:
                    try:
                        worker.channel.send(("drain",), timeout=0.1)
                    except (FdPassError, OSError):
                        pass
                self._kill(worker, signal.SIGTERM)
            if late:
                self._kill(worker, signal.SIGKILL)
        if late:
            # The rest is the kernel's: ask again when the pidfds say so, without spinning on a deadline that has passed.
            self._stop_by = monotonic() + 1.0

    def _kill(self, worker: _Worker, number: signal.Signals) -> None:
        try:
            if worker.pidfd is not None and hasattr(signal, "pidfd_send_signal"):
                signal.pidfd_send_signal(worker.pidfd.fileno(), number)
            else:
                os.kill(worker.pid, number)
        except OSError:
            pass  # it has ended, or it is no longer ours to signal: either way its end is waited for

    def _poke(self) -> None:
        if self._wake is not None and self._wake[1].fileno() >= 0:
            os.write(self._wake[1].fileno(), b"w")

    def _signal_over(self) -> None:
        if self._over is not None:
            self._over[1].close()

    # -- the end ---------------------------------------------------------------------------------------------------------------

    def _end_now(self) -> None:
        """After a failed start, or an interrupted stop: every process is killed and collected, every socket closed."""
        with self._lock:
            self._stop_by = monotonic()
            if self._thread is None:
                self._kill_rest()
        self._poke()
        self._await_thread()
        self._close()

    def _await_thread(self) -> None:
        # Not Thread.join(): interrupted by an exception, CPython 3.11 takes a thread that runs for one that ended. And wait()
        # gives the lock up however often this thread holds it: a signal handler may have come while it did.
        with self._lock:
            while self._thread is not None and not self._finished:
                self._changed.wait()

    def _kill_rest(self) -> None:
        """Where no supervising thread does it."""
        for worker in self._workers:
            worker.due = None
            if worker.process is not None:
                worker.state = "stopping"
                self._kill(worker, signal.SIGKILL)
                self._bury(worker)

    def _close(self) -> None:
        with self._lock:
            if self._state == "stopped":
                return
            self._signal_over()
            self._strategy.close()
            self._endpoint.close()
            self._lines = [list(line) for line in self._lines]
            self._release()
            _live.discard(self)
            # Last: an interrupted close is finished by the next one.
            self._state = "stopped"
            self._changed.notify_all()

    def _demand_started(self) -> None:
        if self._state == "new":
            raise RuntimeError("the group was not started: use it in a with block, or call start()")

    def _forget(self) -> None:
        """In a forked child: closes what is the supervisor's alone, so that no child keeps a port or a control channel alive."""
        self._lines = [[0] * WORDS] * (2 * len(self._workers))
        self._release()
        self._strategy.forget()
        self._endpoint.close()
        # Another thread of the parent may have held the lock at the fork.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._state = "stopped"

    def _release(self) -> None:
        for item in (*self._workers, self._board, self._self_pidfd, *(self._wake or ()), *(self._over or ())):
            if item is not None:
                item.close()


_live: weakref.WeakSet[WorkerGroup] = weakref.WeakSet()


def _forget_groups() -> None:
    if SignalsHeld.current is not None:
        SignalsHeld.current.restore()
    for group in list(_live):
        group._forget()
    _live.clear()


def _stop_groups() -> None:
    for group in list(_live):
        try:
            group.stop()
        except Exception as error:  # one that fails to stop must not keep the others running
            warnings.warn(f"{group!r} could not be stopped at exit: {error}", RuntimeWarning, stacklevel=1)


os.register_at_fork(after_in_child=_forget_groups)
# Exit handlers run last in, first out: ours comes before multiprocessing's, which waits for every process that still runs.
atexit.register(_stop_groups)


def _pipe() -> tuple[OwnedFd, OwnedFd]:
    read, write = os.pipe()
    return OwnedFd(read), OwnedFd(write)
