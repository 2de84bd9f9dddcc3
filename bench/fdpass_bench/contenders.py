"""The processes that `pass` measures: what they send, receive and start, by fdpass, the standard library and C, and how they are told to.
They time single operations; rounds, rows and ratios are not known here."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe, connection, get_context, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from time import perf_counter_ns
from types import FrameType, ModuleType
from typing import Any, NoReturn, TypeVar

import psutil

import fdpass
from fdpass._launch import SignalsHeld

#: The sides of comparisons.
FDPASS, CHANNEL, STANDARD, C = "fdpass", "fdpass Channel", "standard library", "C"

MOST_IN_A_MESSAGE = 253

#: Seconds between two operations when the sender computes: back to back they may keep its thread from computing.
_GAP = 0.002

_PATIENCE = 60.0  # seconds for an answer, and for each operation _SLOWEST more
_SLOWEST = 0.5
_LEAVE = 0.5  # seconds in which a process that is told to end does so by itself; after SIGTERM it has _LEAVE_AT_ONCE
_LEAVE_AT_ONCE = 5.0

#: Send, receive and close in C. Arguments: descriptors in a message. It reads how many operations to do, one number a line, and
#: answers with a line of the nanoseconds that each took.
PROGRAM = r"""
#define _GNU_SOURCE 1
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 253, OPERATIONS = 1000000 };
static int ends[2], fds[MOST], count;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void there_and_back(void) {
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(MOST * sizeof(int))];
    } control;
    char byte = 'x';
    struct iovec part = {&byte, 1};
    struct msghdr message;
    struct cmsghdr *rights;
    size_t size = (size_t)count * sizeof(int), i;
    int received[MOST];

    memset(&message, 0, sizeof message);
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control.bytes;
    message.msg_controllen = CMSG_SPACE(size);
    memset(control.bytes, 0, CMSG_SPACE(size));
    rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(size);
    memcpy(CMSG_DATA(rights), fds, size);
    if (sendmsg(ends[0], &message, 0) != 1)
        die("sendmsg");
    message.msg_controllen = sizeof control.bytes;
    if (recvmsg(ends[1], &message, MSG_CMSG_CLOEXEC) != 1)
        die("recvmsg");
    rights = CMSG_FIRSTHDR(&message);
    if (!rights || rights->cmsg_len != CMSG_LEN(size) || (message.msg_flags & MSG_CTRUNC))
        die("not every descriptor arrived");
    memcpy(received, CMSG_DATA(rights), size);
    for (i = 0; i < (size_t)count; i++)
        if (close(received[i]) < 0)
            die("close");
}

static long long now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

int main(int argc, char **argv) {
    static long long instants[OPERATIONS + 1];
    long operations, i;
    int pipes[2];
    count = argc > 1 ? atoi(argv[1]) : 0;
    if (count < 1 || count > MOST || socketpair(AF_UNIX, SOCK_STREAM, 0, ends) < 0 || pipe(pipes) < 0)
        die("setting up");
    for (i = 0; i < count; i++)
        fds[i] = pipes[0];
    while (scanf("%ld", &operations) == 1 && operations > 0 && operations <= OPERATIONS) {
        instants[0] = now();
        for (i = 0; i < operations; i++) {
            there_and_back();
            instants[i + 1] = now();
        }
        for (i = 0; i < operations; i++)
            printf("%lld%c", instants[i + 1] - instants[i], i + 1 < operations ? ' ' : '\n');
        fflush(stdout);
    }
    return 0;
}
"""


def compile_program(folder: Path) -> Path:
    """PROGRAM, compiled into folder. Raises RuntimeError when that cannot be done here."""
    compiler = shutil.which("cc") or shutil.which(str(sysconfig.get_config_var("CC") or "gcc").split()[0])
    if compiler is None:
        raise RuntimeError("there is no C compiler: install gcc or clang")
    (folder / "passing.c").write_text(PROGRAM)
    done = subprocess.run(
        [compiler, "-O2", "-o", "passing", "passing.c"], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{compiler} failed: {(done.stderr.splitlines() or ['without a word'])[0]}")
    return folder / "passing"


class InC:
    """The running program for messages of `count` descriptors."""

    def __init__(self, program: str | Path, count: int) -> None:
        self._child = subprocess.Popen([program, str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, operations: int) -> list[float]:
        """Seconds of each operation."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        print(operations, file=self._child.stdin, flush=True)
        times = [int(word) / 1e9 for word in self._child.stdout.readline().split()]
        if len(times) != operations:
            raise RuntimeError("the program in C ended")
        return times

    def close(self) -> None:
        self._child.communicate()


# -------------------------------------------------------------------------------- a process from within


def main(control: Connection, registered: bool, ends: dict[str, Any]) -> None:
    """Calls what comes over `control`, (method of Contender, arguments), and answers (True, result) or (False, why), until it closes."""
    # Who started this tells of what fails; a traceback of ours, or of a thread of the standard library's, would be a second word.
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 2)
    os.close(silence)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    fdpass.raise_fd_limit()
    if registered:
        fdpass.register(linger=0.0)
    contender = Contender(ends)
    control.send((True, None))
    while True:
        try:
            method, arguments = control.recv()
        except EOFError:
            break
        try:
            answer = True, getattr(contender, method)(*arguments)
        except Exception as error:  # whatever it is, it is the answer
            answer = False, f"{type(error).__name__}: {error}"
        control.send(answer)
    contender.close()


def _leave(signum: int, frame: FrameType | None) -> NoReturn:
    # In order, so that the store's folder goes.
    raise SystemExit(1)


class Contender:
    """One process's operations. `ends`: bell (a one-way pipe from receiver to sender), line (a Connection between them), queue, and
    under fdpass channel."""

    def __init__(self, ends: dict[str, Any]) -> None:
        self._ends = ends
        self._sock = socket.socket()
        self._held: list[bytes] = []
        self._computing: _Computing | None = None
        self._in_c: dict[int, InC] = {}
        if "queue" in ends:
            ends["queue"].cancel_join_thread()

    def close(self) -> None:
        self.compute(False)
        for program in self._in_c.values():
            program.close()
        self._sock.close()

    # -- the sender

    def compute(self, on: bool) -> None:
        """Starts or ends a thread that computes in Python and lets go of the GIL only when it must."""
        if self._computing is not None:
            self._computing.end()
        self._computing = _Computing() if on else None

    def make(self, number: int) -> list[bytes]:
        """So many pickles of a socket."""
        return [bytes(ForkingPickler.dumps(self._sock)) for _ in range(number)]

    def hold(self, number: int) -> None:
        """Has so many that nobody loads."""
        self._held += self.make(number - len(self._held))
        for raw in self._held[number:]:
            pickle.loads(raw).close()
        del self._held[number:]

    def serve(self, carrier: str, number: int) -> None:
        """Sends a socket whenever the bell rings."""
        give: Callable[[Any], Any] = {
            "pickle": lambda sock: self._ends["line"].send_bytes(ForkingPickler.dumps(sock)),
            "connection": lambda sock: self._ends["line"].send(sock),
            "queue": lambda sock: self._ends["queue"].put(sock),
            "channel": lambda sock: self._ends["channel"].send(sock),
        }[carrier]
        bell = self._ends["bell"].fileno()
        for _ in range(number + 1):
            # One byte by hand: a Connection reads a header first, which is a second turn at the GIL.
            if not os.read(bell, 1):
                raise RuntimeError("the receiver is gone")
            give(self._sock)

    def fill(self) -> tuple[int, str, str]:
        """Makes tickets until there is an error: how many, the error, the store's folder."""
        from fdpass import _store

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY or soft > 65535:
            resource.setrlimit(resource.RLIMIT_NOFILE, (65535, hard))
        made = 0
        try:
            while True:
                ForkingPickler.dumps(self._sock)
                made += 1
        except fdpass.TicketError as error:
            assert _store._folder is not None
            return made, str(error), _store._folder.path

    # -- the receiver

    def load(self, pickles: Sequence[bytes], gap: float = 0.0) -> list[float]:
        """Loads pickles that were made before, `gap` seconds between two; seconds of each."""
        seconds = []
        for raw in pickles:
            time.sleep(gap)
            begin = perf_counter_ns()
            sock = pickle.loads(raw)
            seconds.append((perf_counter_ns() - begin) / 1e9)
            sock.close()
        return seconds

    def load_from(self, instant_ns: int, pickles: Sequence[bytes]) -> tuple[int, int]:
        """Loads them all from an instant of the monotonic clock; when it began and ended."""
        time.sleep(max(0.0, (instant_ns - time.monotonic_ns()) / 1e9))
        begin = time.monotonic_ns()
        for raw in pickles:
            pickle.loads(raw).close()
        return begin, time.monotonic_ns()

    def ask(self, carrier: str, number: int, gap: float) -> list[float]:
        """Rings and receives; seconds from the ring until the socket is there. The first, for which the sender may be late, is left out."""
        take = self._ends[{"connection": "line", "channel": "channel"}[carrier]].recv if carrier != "queue" else self._ends["queue"].get
        bell = self._ends["bell"].fileno()
        seconds = []
        for _ in range(number + 1):
            time.sleep(gap)
            begin = perf_counter_ns()
            os.write(bell, b"x")
            sock = take()
            seconds.append((perf_counter_ns() - begin) / 1e9)
            sock.close()
        return seconds[1:]

    def load_each(self, number: int) -> list[float]:
        """Rings, receives a pickle, loads it; seconds of the load alone, when no other but the held ones are unclaimed."""
        seconds = []
        for _ in range(number + 1):
            os.write(self._ends["bell"].fileno(), b"x")
            seconds += self.load([self._ends["line"].recv_bytes()])
        return seconds[1:]

    # -- both ends in one thread

    def messages(self, side: str, count: int, operations: int, program: str | None) -> list[float]:
        """Sends, receives and closes `count` descriptors, in several messages where one does not take them; seconds of each time."""
        if hasattr(os, "sched_setaffinity"):
            # As does the program in C, which inherits it: to change the processor in the middle is nobody's price.
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        parts = -(-count // MOST_IN_A_MESSAGE)
        each = count // parts
        if side == C:
            assert program is not None
            if each not in self._in_c:
                self._in_c[each] = InC(program, each)
            times = self._in_c[each](operations * parts)
            return [sum(times[begin : begin + parts]) for begin in range(0, len(times), parts)]
        read, write = os.pipe()
        try:
            return _there_and_back(side, read, parts, each, operations)
        finally:
            os.close(read)
            os.close(write)

    # -- the starter

    def starts(self, method: str, sockets: int, pairs: int) -> list[float]:
        """What so many sockets among its arguments add to the start of a process, until its target runs: seconds for each socket."""
        # Nor does the child of a bare main import the command.
        sys.modules["__main__"] = ModuleType("__main__")
        cargo = [socket.socket() for _ in range(sockets)]
        try:
            prices = []
            for pair in range(pairs):
                loads: list[list[socket.socket]] = [cargo, []] if pair % 2 else [[], cargo]
                seconds = {len(load): _start(method, load) for load in loads}
                prices.append((seconds[sockets] - seconds[0]) / sockets)
            return prices
        finally:
            for sock in cargo:
                sock.close()


def _there_and_back(side: str, fd: int, parts: int, each: int, operations: int) -> list[float]:
    fds, payload = [fd] * each, [b"x"]
    everything = fds * parts
    send_fds, recv_fds, std_send, std_recv, close = fdpass.send_fds, fdpass.recv_fds, socket.send_fds, socket.recv_fds, os.close
    left, right = socket.socketpair()

    def ours() -> None:
        for _ in range(parts):
            send_fds(left, payload, fds)
            for owned in recv_fds(right, 1, each).fds:
                owned.close()

    def standard() -> None:
        for _ in range(parts):
            std_send(left, payload, fds)
            for number in std_recv(right, 1, each)[1]:
                close(number)

    def channel() -> None:
        near.send_message(b"x", everything)
        for owned in far.recv_message()[1]:
            owned.close()

    seconds = []
    near, far = fdpass.Pipe()
    with left, right, near, far:
        operation = {FDPASS: ours, STANDARD: standard, CHANNEL: channel}[side]
        for _ in range(operations):
            begin = perf_counter_ns()
            operation()
            seconds.append((perf_counter_ns() - begin) / 1e9)
    return seconds


def _start(method: str, cargo: list[socket.socket]) -> float:
    context: Any = get_context(method)
    answer, theirs = Pipe(duplex=False)
    with answer:
        process = context.Process(target=exec, args=(_ARRIVED, {"answer": theirs, "cargo": cargo}))
        begin = time.monotonic_ns()
        try:
            process.start()
        finally:
            theirs.close()
        try:
            end = answer.recv()
        except EOFError:
            process.join()
            raise RuntimeError(f"a process with {len(cargo)} sockets ended with {process.exitcode} before its target ran") from None
    process.join()
    process.close()
    return float(end - begin) / 1e9


#: No function of this file: its import would be most of what a start takes.
_ARRIVED = "import time; answer.send(time.monotonic_ns())"


class _Computing:
    def __init__(self) -> None:
        self._over = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        number = 1
        while not self._over:
            for _ in range(1000):
                number = number * 1103515245 + 12345 & 0x7FFFFFFF

    def end(self) -> None:
        self._over = True
        self._thread.join()


# -------------------------------------------------------------------------------- processes as whoever started them has them

Made = TypeVar("Made")


class Unmeasured(Exception):
    """Why something could not be measured, in a sentence without its full stop."""


class Peer:
    """A process with a Contender. Raises Unmeasured when it died, failed, or did not answer in time."""

    def __init__(self, role: str, registered: bool, ends: dict[str, Any]) -> None:
        self.role = role
        self.company: Sequence[Peer] = (self,)  # whose death ends what this one does
        self._ready = False
        self._control, theirs = multiprocessing.Pipe()
        try:
            self._process = multiprocessing.get_context("spawn").Process(target=main, args=(theirs, registered, ends))
            self._process.start()
        except BaseException:
            self._control.close()
            raise
        finally:
            theirs.close()
        self.pid = self._process.pid or 0

    def tell(self, method: str, *arguments: Any) -> None:
        if not self._ready:
            self._answer(_PATIENCE)
            self._ready = True
        try:
            self._control.send((method, arguments))
        except OSError:
            self._raise_death()
            raise Unmeasured(f"{self.role} (pid {self.pid}) closed its connection") from None

    def reply(self, operations: int = 1) -> Any:
        return self._answer(_PATIENCE + _SLOWEST * operations)

    def do(self, method: str, *arguments: Any, operations: int = 1) -> Any:
        self.tell(method, *arguments)
        return self.reply(operations)

    def _answer(self, patience: float) -> Any:
        deadline = time.monotonic() + patience
        while not self._control.poll():
            self._raise_death()
            left = deadline - time.monotonic()
            if left <= 0:
                raise Unmeasured(f"{self.role} (pid {self.pid}) did not answer within {patience:.0f} s")
            connection.wait([self._control, *(one._process.sentinel for one in self.company)], left)
        try:
            ok, answer = self._control.recv()
        except (EOFError, OSError):
            ok, answer = False, "it closed its connection"
        if not ok:
            # Its failure may be but the echo of another's death.
            self._raise_death()
            raise Unmeasured(f"{self.role} (pid {self.pid}) failed: {answer}")
        return answer

    def _raise_death(self) -> None:
        for one in self.company:
            if connection.wait([one._process.sentinel], 0):
                one._process.join(_LEAVE_AT_ONCE)
                raise Unmeasured(str(fdpass.WorkerDied(one.role, one.pid, one._process.exitcode)))

    def usage(self) -> tuple[int, int]:
        """Resident bytes, open descriptors. The fewest of several looks: a store closes what it gave a moment after it gave it."""
        try:
            process = psutil.Process(self.pid)
            descriptors = []
            for _ in range(10):
                time.sleep(0.005)
                descriptors.append(process.num_fds())
            return process.memory_info().rss, min(descriptors)
        except psutil.Error as error:
            self._raise_death()
            raise Unmeasured(f"{self.role} (pid {self.pid}) cannot be looked into: {error}") from None

    def let_go(self) -> None:
        """Tells it to end."""
        self._control.close()

    def ended(self, deadline: float) -> None:
        """Waits until it has ended, which from the deadline (monotonic seconds) on is not left to itself."""
        self._process.join(max(0.0, deadline - time.monotonic()))
        if self._process.exitcode is None:
            self._process.terminate()
            self._process.join(_LEAVE_AT_ONCE)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        self._process.close()


class Pair:
    """A sender, and receivers that share one bell, line and queue: more than one only load."""

    def __init__(self, stage: Stage, registered: bool, receivers: int = 1) -> None:
        hear, ring = multiprocessing.Pipe(duplex=False)
        here, there = multiprocessing.Pipe()
        queue = stage.queue()
        senders: dict[str, Any] = {"bell": hear, "line": here, "queue": queue}
        others: dict[str, Any] = {"bell": ring, "line": there, "queue": queue}
        if registered:
            senders["channel"], others["channel"] = fdpass.Pipe()
        try:
            self.sender = stage.peer("the sender", registered, senders)
            self.receivers = [stage.peer("a receiver" if receivers > 1 else "the receiver", registered, others) for _ in range(receivers)]
        finally:
            for end in (*senders.values(), *others.values()):
                if end is not queue:
                    end.close()
        self.receiver = self.receivers[0]
        for one in (self.sender, *self.receivers):
            one.company = (self.sender, *self.receivers)

    def ahead(self, busy: bool, number: int) -> list[float]:
        """Loads of pickles that were all made before."""
        pickles = self.sender.do("make", number, operations=number)
        with self._computing(busy):
            seconds: list[float] = self.receiver.do("load", pickles, _GAP if busy else 0.0, operations=number)
        return seconds

    def asked(self, carrier: str, busy: bool, number: int) -> list[float]:
        """One at a time: the receiver asks, the sender sends, the receiver has it."""
        with self._computing(busy):
            self.sender.tell("serve", carrier, number)
            seconds: list[float] = self.receiver.do("ask", carrier, number, _GAP if busy else 0.0, operations=number)
            self.sender.reply(number)
        return seconds

    def claims(self, unclaimed: int, number: int) -> list[float]:
        """Loads of pickles, each made when the one before was loaded, while so many are unclaimed with it."""
        self.sender.do("hold", unclaimed - 1, operations=unclaimed)
        self.sender.tell("serve", "pickle", number)
        seconds: list[float] = self.receiver.do("load_each", number, operations=number)
        self.sender.reply(number)
        return seconds

    def together(self, receivers: int, number: int) -> list[float]:
        """So many receivers load at once: seconds for each load, over all of them, as one value."""
        loading = self.receivers[:receivers]
        pickles = [self.sender.do("make", number, operations=number) for _ in loading]
        instant = time.monotonic_ns() + 20_000_000
        for one, mine in zip(loading, pickles, strict=True):
            one.tell("load_from", instant, mine)
        spans = [one.reply(number) for one in loading]
        return [(max(end for _, end in spans) - min(begin for begin, _ in spans)) / 1e9 / (number * receivers)]

    @contextlib.contextmanager
    def _computing(self, busy: bool) -> Iterator[None]:
        if busy:
            self.sender.do("compute", True)
        yield
        if busy:
            self.sender.do("compute", False)


class Stage:
    """The processes of one part of a plan, each started when it is first needed. Context manager: ends them all."""

    def __init__(self) -> None:
        self._peers: list[Peer] = []
        self._made: dict[Any, Any] = {}
        self._queues: list[Any] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def clear(self) -> None:
        """Ends the processes; the next that is asked for is a new one."""
        with SignalsHeld():
            peers, self._peers = self._peers, []
            for one in peers:
                one.let_go()
            deadline = time.monotonic() + _LEAVE
            for one in peers:
                one.ended(deadline)
            self._made.clear()
            # Not before: a process that is still starting would look for the semaphores of a queue and not find them.
            self._queues.clear()

    def peer(self, role: str, registered: bool, ends: dict[str, Any] | None = None) -> Peer:
        # The first start of the tracker ends with SIGINT unblocked.
        resource_tracker.ensure_running()
        with SignalsHeld():
            self._peers.append(Peer(role, registered, ends or {}))
            return self._peers[-1]

    def queue(self) -> Any:
        self._queues.append(multiprocessing.get_context("spawn").Queue())
        return self._queues[-1]

    def pair(self, registered: bool, receivers: int = 1) -> Pair:
        return self._once(("pair", registered, receivers), lambda: Pair(self, registered, receivers))

    def alone(self, registered: bool) -> Peer:
        return self._once(("alone", registered), lambda: self.peer("the measuring process", registered))

    def program(self) -> str:
        """Where the program in C lies. Raises Unmeasured."""
        folder = self._folder = self._folder or tempfile.TemporaryDirectory(prefix="fdpass-bench-")
        try:
            return str(self._once("program", lambda: compile_program(Path(folder.name))))
        except (RuntimeError, OSError) as error:
            raise Unmeasured(str(error)) from error

    def _once(self, key: object, make: Callable[[], Made]) -> Made:
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made
