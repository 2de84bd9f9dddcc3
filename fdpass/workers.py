"""WorkerGroup: start, watch, restart, roll and stop the workers of one port. How they share it is the strategy's affair.

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
from fdpass._board import ACCEPTED, HEARTBEAT, OPEN, WORDS, Board
from fdpass._launch import SignalsHeld
from fdpass._process import WorkerProcess
from fdpass._succession import Roll, Slot
from fdpass.ancillary import why_no_passing
from fdpass.endpoint import Endpoint, listen
from fdpass.errors import ClosedError, WorkerDied
from fdpass.fds import OwnedFd
from fdpass.start import METHODS, OWN_THREADS, get_context

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType
    from typing import Self


RESTARTS = ("never", "on-failure")
#: More successors than this in this many seconds, and the group gives up: a kill every half second makes ten.
RESTART_LIMIT, RESTART_WINDOW = 30, 5.0
#: Successors in a row, of one index, that ended before they were ready; the wait before the next doubles, in seconds.
NEVER_READY_LIMIT, BACKOFF, BACKOFF_MAX = 5, 0.1, 5.0
_LOOK_AGAIN = 1.0  # seconds that a caller of ours sleeps at most before it looks again


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """One worker as the supervisor sees it.

    index, name, pid: who. state: starting, ready, stopping or ended. exitcode: of the last process that served there and ended, else None.
    accepted: connections since the group started, over all generations. open: connections held now; of a worker that drains while its
    successor serves, too. restarts: successors of processes that had ended by themselves; a roll does not count.
    heartbeat: seconds since it last accepted or went to wait, None before the first time.
    queue, queue_limit: connections that wait in the socket it accepts from, now, and how many may; with one socket for all, each shows
    the same. None where nobody tells: Unix sockets, reuseport-bare, systems other than Linux, and once the group has ended.
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
    queue: int | None = None
    queue_limit: int | None = None


class WorkerGroup:
    """k processes that serve one address; a context manager that starts them and, at its end, stops them.

    target:       called in each worker as target(listener, *args); importable, as multiprocessing wants it under spawn.
    address:      text for listen(), or the Endpoint it returned, which the group takes over.
    workers:      how many, at least 1.
    strategy:     "shared" (order= "rotate", the default, "first" or "least-loaded"), "reuseport", "reuseport-bare", "dispatch" (order=
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
        self._slots = [Slot(index, f"{name}-{index}", workers) for index in range(workers)]
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
        self._roll: Roll | None = None
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
                for slot in self._slots:
                    slot.due = monotonic()
                if method == "fork":
                    # Before the supervising thread exists: CPython warns of a fork beside another thread.
                    self._launch_due()
                self._thread = threading.Thread(target=self._supervise, name=f"{OWN_THREADS}supervisor-{self._name}", daemon=True)
                self._thread.start()
            with self._lock:
                while self._state == "starting" and not self._settled():
                    left = self._ready_by - monotonic()
                    if left <= 0:
                        late = [slot.name for slot in self._slots if slot.state != "ready"]
                        raise TimeoutError(f"{', '.join(late)} not ready {self._start_timeout} s after the start")
                    self._wait(left)
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

    def _wait(self, left: float | None = None) -> None:
        """Until something has changed, `left` seconds are over, or it is time to look again; the lock is held."""
        # A signal that comes between CPython's last look for one and its wait for the lock is not seen before that wait ends: Ctrl-C
        # would be lost until a worker does something.
        self._changed.wait(_LOOK_AGAIN if left is None else min(left, _LOOK_AGAIN))

    def _settled(self) -> bool:
        """Whether start() has nothing more to wait for."""
        if self._trouble is not None or self._failure is not None or self._stop_by is not None:
            return True
        return all(slot.due is None and slot.state != "starting" for slot in self._slots)

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
                self._wait(left)
            if self._failure is not None:
                raise self._failure
            if self._trouble is not None:
                raise self._trouble

    def roll(self, timeout: float | None = None) -> None:
        """Replaces every worker by a new process, one after the other: each successor is ready before its predecessor drains.

        The predecessor finishes what it accepted and is killed after stop_timeout seconds. A successor that is not ready after timeout
        seconds (None: start_timeout), or ends before, is killed; its predecessor serves on, and the roll ends there: TimeoutError,
        WorkerDied, or whatever starting it raised (pickling, args_for). Raises ClosedError when the group stops meanwhile or is stopped,
        WorkerDied when it fails or has failed, RuntimeError before start() has returned and while another roll is under way.

        From any thread, and from a signal handler. Interrupted by an exception, the roll stops after the worker that drains; a
        successor that is not ready is killed.
        """
        if timeout is not None and timeout < 0:
            raise ValueError(f"timeout is 0 or more seconds, not {timeout}")
        roll: Roll | None = None
        try:
            with self._lock:
                self._demand_running()
                if threading.current_thread() is self._thread:
                    raise RuntimeError(
                        "roll() was called by what the group itself had called, for the start of a worker: it would wait for itself"
                    )
                if self._roll is not None:
                    raise RuntimeError("another roll of this group is under way")
                limit = self._start_timeout if timeout is None else timeout
                roll = self._roll = Roll(self._slots, limit, self._launch, self._send_off)
                self._poke()
                while not roll.over:
                    self._wait()
        except BaseException:
            if roll is not None:
                roll.abandoned = True
                self._poke()
            raise
        if roll.error is not None:
            raise roll.error

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
            for slot in self._slots:
                lines = [self._lines[number] for number in slot.lines]
                beat = self._lines[slot.number][HEARTBEAT]
                age = (monotonic_ns() - beat) / 1e9 if beat else None
                who = (slot.index, slot.name, slot.pid, slot.state, slot.exitcode)
                counts = sum(line[ACCEPTED] for line in lines), sum(line[OPEN] for line in lines), slot.restarts
                found.append(WorkerStats(*who, *counts, age, *(self._strategy.queue(slot.index) or (None, None))))
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
        return f"<WorkerGroup {self._name} x{len(self._slots)} {self._strategy.name} on {self._endpoint}, {self._state}>"

    # -- start -----------------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        count = 2 * len(self._slots)
        self._board = Board.create(count + 1)
        self._lines = self._board.lines
        if hasattr(os, "pidfd_open"):
            self._self_pidfd = OwnedFd(os.pidfd_open(os.getpid()))
        self._wake = _pipe()
        self._over = _pipe()
        # The fallback strategy must start where no descriptor can be passed: its workers then count for themselves and report.
        self._passing = self._strategy.passes or why_no_passing() is None
        self._strategy.begin(self._board.fd.fileno(), count)

    def _launch(self, slot: Slot, ready_by: float) -> WorkerProcess:
        """Starts a successor at one index; where nobody serves it takes the place at once. On failure nothing of it is left."""
        assert self._board is not None
        args = tuple(self._args_for(slot.index)) if self._args_for is not None else self._args
        number = slot.next_line()
        process = WorkerProcess(slot.index, slot.name, number, self._lines[number], slot.generation, ready_by)
        slot.successor = process
        try:
            share = self._strategy.share(slot.index, number)
            if self._passing:
                share.update(board=self._board.fd, pidfd=self._self_pidfd)
            share.update(line=number, lines=2 * len(self._slots), supervisor=self._pid)
            process.start(self._context, share, (self._target, args))
        except BaseException:
            if not process.alive:
                slot.successor = None
                self._strategy.ended(number)
            raise
        self._strategy.launched(number, process.pidfd)
        if slot.present is None:
            slot.follow()
        return process

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
                self._drop_roll()
                if self._state != "stopped":
                    self._state = "ended"
                self._signal_over()
                self._changed.notify_all()

    def _turn(self) -> bool:
        """Does what is due, then waits for the next event and deals with it; False when nothing is left to do."""
        assert self._wake is not None
        poll = select.poll()
        poll.register(self._wake[0].fileno(), select.POLLIN)
        places: dict[int, tuple[Slot, WorkerProcess, str]] = {}
        with self._lock:
            if self._stop_by is not None:
                self._bring_down()
            else:
                self._launch_due()
                self._advance_roll()
            times = self._press()
            self._changed.notify_all()
            if not any(slot.processes or slot.due is not None for slot in self._slots):
                return False
            for slot, process in self._living():
                places[process.fileno()] = slot, process, "ended"
                if process.channel is not None and not process.muted:
                    places[process.channel.fileno()] = slot, process, "spoke"
                if self._state == "running":
                    times.append(process.deadline)
            times += [slot.due for slot in self._slots]
            times += [self._roll.look_at if self._roll is not None else None]
        for fd in places:
            poll.register(fd, select.POLLIN)
        at = min((time for time in times if time is not None), default=None)
        events = poll.poll(None if at is None else max(0.0, at - monotonic()) * 1000 + 1)
        with self._lock:
            # What a worker said comes before how it ended: a ready worker that dies at once was ready.
            for fd, _ in sorted(events, key=lambda event: event[0] not in places or places[event[0]][2] != "spoke"):
                if fd not in places:
                    os.read(fd, 4096)
                    continue
                slot, process, what = places[fd]
                if what == "spoke":
                    process.hear()
                else:
                    self._bury(slot, process)
        return True

    def _living(self) -> list[tuple[Slot, WorkerProcess]]:
        return [(slot, process) for slot in self._slots for process in slot.processes]

    def _bury(self, slot: Slot, process: WorkerProcess) -> None:
        """A process ended: its true exit status, and what follows from it."""
        process.bury()
        self._strategy.ended(process.number)
        if process is slot.successor:
            slot.successor = None  # the roll that started it sees it
            return
        slot.exitcode = code = process.exitcode
        if process is slot.leaving:
            slot.leaving = None
            return
        slot.present = None
        if process.told or self._stop_by is not None:
            return
        detail = "" if process.was_ready else "it was never ready"
        failed = code != 0
        died = WorkerDied(process.name, process.pid, code, detail)
        if self._state == "starting" and not process.was_ready:
            # Exit status 0 too: a worker that ends before it is ready does not serve.
            self._fail(died)
        elif failed or self._strategy.held:
            if not failed:
                died = WorkerDied(process.name, process.pid, code, "its share of the connections would wait for ever")
            if self._restart == "never":
                self._fail(died)
            else:
                self._succeed(slot, died, process.was_ready)
        elif slot.successor is not None:
            slot.follow()

    def _succeed(self, slot: Slot, died: WorkerDied, was_ready: bool) -> None:
        """Plans the successor of a worker, or gives the group up when successors do not help."""
        now = monotonic()
        if slot.successor is not None:  # a roll has started one
            slot.restarts += 1
            slot.follow()
            return
        enough = ""
        slot.unready = 0 if was_ready else slot.unready + 1
        if slot.unready > NEVER_READY_LIMIT:
            enough = f"{slot.unready} in a row were never ready"
        if len(self._started_at) == self._restart_limit and now - self._started_at[0] < RESTART_WINDOW:
            enough = f"{self._restart_limit} successors were started within {RESTART_WINDOW:g} s"
        if enough:
            detail = f"{died.detail}; {enough}" if died.detail else enough
            self._fail(WorkerDied(died.name, died.pid, died.exitcode, f"{detail}; no more successors"))
            return
        slot.due = now if was_ready else now + min(BACKOFF * 2 ** (slot.unready - 1), BACKOFF_MAX)

    def _launch_due(self) -> None:
        """Starts every worker whose time has come; at the group's start, all."""
        for slot in self._slots:
            now = monotonic()
            present = slot.present
            if present is not None and present.deadline is not None and self._state == "running" and now >= present.deadline:
                # A successor that hangs in its start: it counts as one that was never ready.
                present.deadline = None
                present.signal(signal.SIGKILL)
            if slot.due is None or now < slot.due or self._stop_by is not None:
                continue
            slot.due = None
            if slot.generation == 0:
                self._launch(slot, self._ready_by)  # what it raises ends the start
                continue
            slot.restarts += 1
            self._started_at.append(now)
            try:
                self._launch(slot, now + self._start_timeout)
            except Exception as error:
                detail = f"its successor could not be started: {error}"
                self._succeed(slot, WorkerDied(slot.name, slot.pid, slot.exitcode, detail), False)

    def _advance_roll(self) -> None:
        if self._roll is not None:
            if self._failure is not None:
                self._roll.fail(self._failure)
            self._roll.advance()
            if self._roll.over:
                self._roll = None

    def _drop_roll(self) -> None:
        if self._roll is not None:
            self._roll.drop(self._failure or self._trouble or ClosedError("the group was stopped during the roll"))
            self._roll = None

    def _fail(self, died: WorkerDied) -> None:
        if self._failure is None:
            self._failure = died
            self._signal_over()
        for slot in self._slots:
            slot.due = None
        if self._strategy.held and self._stop_by is None:
            # A held socket without a worker is a black hole for its share of the connections: better refused than swallowed.
            self._stop_by = monotonic() + self._stop_timeout

    def _bring_down(self) -> None:
        """Tells every worker to go, once, and by when."""
        assert self._stop_by is not None
        self._drop_roll()
        for slot in self._slots:
            slot.due = None
        for _, process in self._living():
            if process.end_by is None:
                self._dismiss(process, self._stop_by)
            else:
                process.end_by = min(process.end_by, self._stop_by)

    def _send_off(self, process: WorkerProcess) -> None:
        """What a roll does with a predecessor."""
        self._dismiss(process, monotonic() + self._stop_timeout)

    def _dismiss(self, process: WorkerProcess, by: float) -> None:
        self._strategy.retire(process.number)
        process.dismiss(by)

    def _press(self) -> list[float | None]:
        """Signals those that were told to go, each when its time has come; returns when to look again."""
        return [process.press() for _, process in self._living() if process.end_by is not None]

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
                self._wait()

    def _kill_rest(self) -> None:
        """Where no supervising thread does it."""
        for slot in self._slots:
            slot.due = None
        for slot, process in self._living():
            process.state = "stopping"
            process.signal(signal.SIGKILL)
            self._bury(slot, process)

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

    def _demand_running(self) -> None:
        self._demand_started()
        if self._failure is not None:
            raise self._failure
        if self._trouble is not None:
            raise self._trouble
        if self._stop_by is not None or self._state in ("ended", "stopped"):
            raise ClosedError(f"the group {self._name} was stopped, or all its workers have ended")
        if self._state != "running":
            raise RuntimeError(f"the group {self._name} is still starting")

    def _forget(self) -> None:
        """In a forked child: closes what is the supervisor's alone, so that no child keeps a port or a control channel alive."""
        self._lines = [[0] * WORDS] * (2 * len(self._slots))
        self._release()
        for slot in self._slots:
            slot.present = slot.successor = slot.leaving = None
        self._strategy.forget()
        self._endpoint.close()
        # Another thread of the parent may have held the lock at the fork.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._state = "stopped"

    def _release(self) -> None:
        for _, process in self._living():
            process.close()
        for item in (self._board, self._self_pidfd, *(self._wake or ()), *(self._over or ())):
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
