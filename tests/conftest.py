"""What every test is held to: it leaves the open descriptors and the child processes as it found them.

The fixtures that tests share live here.
"""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import resource
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from hypothesis import HealthCheck, settings

from fdpass import _claims, _store

# No deadline: a test asserts no timing. No database: a test leaves no file. The balance fixture spans all examples of a test, as it should.
settings.register_profile("fdpass", deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("fdpass")


# -------------------------------------------------------------------------------- balance


def open_descriptors() -> dict[int, str]:
    """Every open descriptor of this process with what it points at."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        # The descriptor that listed the directory is gone by now.
        with contextlib.suppress(FileNotFoundError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def child_processes() -> dict[int, str]:
    """Every process below this one with its command, except the two that multiprocessing keeps for the life of a process.

    A child that nobody waited for counts. A zombie below a fork server does not: collecting it is the fork server's business.
    """
    keepers = {resource_tracker._resource_tracker._pid, forkserver._forkserver._forkserver_pid}
    found = {}
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.pid in keepers or (child.status() == psutil.STATUS_ZOMBIE and child.ppid() != os.getpid()):
                continue
            found[child.pid] = " ".join(child.cmdline()) or f"<{child.status()}>"
    return found


def _difference(before: dict[int, str], after: dict[int, str]) -> list[str]:
    lines = [f"leaked: descriptor {fd}, {link}" for fd, link in after.items() if fd not in before]
    lines += [f"closed, but not the test's own: descriptor {fd}, {link}" for fd, link in before.items() if fd not in after]
    lines += [f"replaced: descriptor {fd}, was {link}, is {after[fd]}" for fd, link in before.items() if fd in after and after[fd] != link]
    return sorted(lines)


def _let_go_of_the_failure() -> None:
    """A failed test's frames hold what it had open; kept, they would put the next tests out of balance as well."""
    if hasattr(sys, "last_value"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            for name in ("last_type", "last_value", "last_traceback", "last_exc"):
                if hasattr(sys, name):
                    delattr(sys, name)
            gc.collect()


@pytest.fixture(scope="session", autouse=True)
def started_once() -> None:
    """The resource tracker and the fork server start here, so that their pipes are in every test's baseline."""
    # A shell's background jobs are born with SIGINT ignored, and so would be every child of a test that sends one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    resource_tracker.ensure_running()
    forkserver.ensure_running()
    # What pytest and its plugins allocated cannot hold a test's descriptor: the collections below pass it over.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def balance(request: pytest.FixtureRequest, started_once: None) -> Iterator[None]:
    """Fails the test that does not leave descriptors and child processes as it found them."""
    gc.collect()
    fds, children = open_descriptors(), child_processes()
    yield
    _let_go_of_the_failure()
    gc.collect()
    lines = []
    if request.node.get_closest_marker("allow_fd_growth") is None:
        lines += _difference(fds, open_descriptors())
    lines += [f"left running or not waited for: process {pid}, {what}" for pid, what in child_processes().items() if pid not in children]
    # What is alive now belongs to no test: left among the objects to look at, it would make each collection dearer than the one before.
    gc.freeze()
    if lines:
        pytest.fail("the test is out of balance:\n  " + "\n  ".join(lines), pytrace=False)


@pytest.fixture
def fd_count() -> Callable[[], int]:
    """How many descriptors this process has open, at each call."""
    return lambda: len(open_descriptors())


# -------------------------------------------------------------------------------- sockets and files


@pytest.fixture
def store() -> Iterator[ModuleType]:
    """For a test that makes or claims tickets in this process: fdpass._store, ended afterwards with its connections."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield _store
    _store.stop()
    _claims.close_connections()
    _store.configure(_store.Settings())
    # The first ticket raised it.
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.fixture
def unix_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connected pair of AF_UNIX stream sockets, closed afterwards."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with left, right:
        yield left, right


@pytest.fixture
def marked() -> Iterator[Callable[[str], int]]:
    """marked("a"): the number of a new memory file whose content is "a". Closed afterwards. Each is an inode of its own."""
    opened: list[int] = []

    def make(content: str = "") -> int:
        fd = os.memfd_create("marked")
        opened.append(fd)
        os.pwrite(fd, content.encode(), 0)
        return fd

    yield make
    for fd in opened:
        os.close(fd)


@pytest.fixture
def content() -> Callable[[object], str]:
    """What a memory file contains, given its number or an object with fileno()."""

    def read(item: object) -> str:
        return os.pread(item if isinstance(item, int) else item.fileno(), 100, 0).decode()  # type: ignore[attr-defined]  # object stands for whatever has fileno()

    return read


# -------------------------------------------------------------------------------- limits


@contextlib.contextmanager
def _limit_nofile(soft: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextlib.contextmanager
def _full_table(free: int = 0) -> Iterator[int]:
    limit = max(open_descriptors()) + 40
    eaten: list[int] = []
    with _limit_nofile(limit):
        try:
            with contextlib.suppress(OSError):
                while True:
                    eaten.append(os.dup(0))
            for _ in range(free):
                os.close(eaten.pop())
            yield limit
        finally:
            for fd in eaten:
                os.close(fd)


@pytest.fixture
def limit_nofile() -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """with limit_nofile(64): the soft RLIMIT_NOFILE is 64."""
    return _limit_nofile


@pytest.fixture
def full_table() -> Callable[..., contextlib.AbstractContextManager[int]]:
    """with full_table(free=3) as limit: the soft RLIMIT_NOFILE is low and all but 3 numbers are really taken."""
    return _full_table


# -------------------------------------------------------------------------------- processes


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """run_python(code, *args): runs a program in a process of its own, warnings being errors; fails unless it exits with 0."""

    def run(code: str, *args: str, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-W", "error", "-c", code, *args]
        done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]  # the options are subprocess.run's own
        assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


#: Numbers of recvmsg, sendmsg, poll, ppoll.
_WAITS = {"x86_64": {47, 46, 7, 271}, "aarch64": {212, 211, 73}}.get(platform.machine())


def _until_blocked(pid: int | None = None, tid: int | None = None) -> None:
    task = Path(f"/proc/{pid or os.getpid()}/task/{tid or pid}")
    while True:
        state = (task / "stat").read_text().rpartition(")")[2].split()[0]
        if state in "ZX":
            raise AssertionError("the process ended instead of waiting")
        if state == "S":
            if _WAITS is None:
                return
            number = (task / "syscall").read_text().split()[0]
            if number.isdigit() and int(number) in _WAITS:
                return
        os.sched_yield()


@pytest.fixture
def until_blocked() -> Callable[..., None]:
    """until_blocked(pid) or until_blocked(tid=thread.native_id): returns once that task sleeps in sendmsg, recvmsg or poll."""
    return _until_blocked
