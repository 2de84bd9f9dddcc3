"""Other people's servers, started here on a loopback port, each worker doing one thing at a time.
It knows how each is started, looked at and ended. It sends no load and measures nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import os
import pwd
import re
import select
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

import fdpass

WORKS = ("sleep", "burn")

_APPS = Path(__file__).parent / "peer_apps"
_APPLICATION = "fdpass_bench.peer_apps.application"
_START_LIMIT = 30.0  # seconds until every worker must serve
_RELOAD_LIMIT = 30.0  # seconds until every worker must be another process, and
_RELOAD_EACH = 5.0  # for each of them: granian waits 3.5 s after each by itself
_STOP_LIMIT = 5.0  # seconds that a server has to end by itself; a second time for what was killed
_LOOK_AGAIN = 0.02  # seconds between two looks at a server that starts
_ANSWER_LIMIT = 2.0  # seconds for the first answer
_LAST_LINES = 6  # of a server's output, in an error
# What the caller's environment says to one of them: it would start as something else than its command line shows.
_FOREIGN = re.compile("GUNICORN_|UVICORN_|GRANIAN_|NODE_|NGINX|LISTEN_|WEB_CONCURRENCY")


class PeerError(Exception):
    """A server is not installed, did not start, ended too early or cannot do what was asked; the message says what helps."""


class PeerUnable(PeerError):
    """A server cannot do what was asked, wherever it is installed."""


# -------------------------------------------------------------------------------- how each is started


@dataclass(frozen=True)
class Order:
    """What a server is asked for. service: whether requests are held at all; work: "sleep" or "burn"."""

    workers: int
    service: bool
    work: str
    keep_alive: bool
    backlog: int


@dataclass(frozen=True)
class Recipe:
    """How an installed server is started: its version, its command for a port and its temporary folder, and how a worker that serves shows.

    The command runs in that folder. `serves` is asked about the first process and each child of it.
    """

    version: str
    command: Callable[[int, Path], list[str]]
    serves: Callable[[psutil.Process, Path], bool]


def _said_so(process: psutil.Process, folder: Path) -> bool:
    """Our application left the worker's pid there right before its server began to serve."""
    return (folder / str(process.pid)).exists()


def _nginx(order: Order, reuseport: bool = False, accept_mutex: bool = False) -> Recipe:
    program = _program("nginx", "apt install nginx", folders=":/usr/sbin:/usr/local/sbin:/usr/local/nginx/sbin")
    built = subprocess.run([program, "-V"], capture_output=True, text=True, check=False, timeout=_START_LIMIT).stderr
    found = re.search(r"nginx/(\S+)", built)
    version = found[1] if found else "unknown"
    module = _nginx_perl(built) if order.service else None

    def command(port: int, folder: Path) -> list[str]:
        user = pwd.getpwuid(os.geteuid()).pw_name if os.geteuid() == 0 else None
        # Where a distribution's nginx keeps them, only root and its own user may write.
        kinds = [kind for kind in ("proxy", "fastcgi", "uwsgi", "scgi") if f"--without-http_{kind}_module" not in built]
        perl = {"sleep": "hold::sleeping", "burn": "hold::burning"}[order.work]
        text = _Template((_APPS / "nginx.conf").read_text()).substitute(
            load_module=f'load_module "{module}";' if module else "",
            user=f"user {user};" if user else "",
            workers=order.workers,
            accept_mutex="on" if accept_mutex else "off",
            keepalive_timeout="3600s" if order.keep_alive else "0",
            temporary_paths=" ".join(f"{kind}_temp_path {kind};" for kind in ("client_body", *kinds)),
            perl=f'perl_modules "{_APPS}"; perl_require hold.pm;' if order.service else "",
            port=port,
            backlog=order.backlog,
            reuseport=" reuseport" if reuseport else "",
            answer=f"perl {perl};" if order.service else 'return 200 "fdpass $pid 0 0 0\\n";',
        )
        (folder / "nginx.conf").write_text(text)
        return [program, "-p", f"{folder}/", "-c", "nginx.conf"]

    # A worker takes this title when its event loop is set up, and another one when it is to end.
    return Recipe(version, command, lambda process, folder: process.cmdline()[:1] == ["nginx: worker process"])


def _nginx_perl(built: str) -> str | None:
    """The path of nginx's Perl module, None where it is built in. Raises PeerError where there is none."""
    if re.search(r"--with-http_perl_module(\s|$)", built):
        return None
    folder = re.search(r"--modules-path=(\S+)", built)
    module = Path(folder[1] if folder else "/usr/lib/nginx/modules", "ngx_http_perl_module.so")
    if not module.exists():
        raise PeerError(
            "nginx cannot hold a request without its Perl module (apt install libnginx-mod-http-perl); --service-ms 0 works without it"
        )
    return str(module)


class _Template(string.Template):
    delimiter = "@"  # the dollar is nginx's own


def _uvicorn(order: Order) -> Recipe:
    version = _python_version("uvicorn")

    def command(port: int, folder: Path) -> list[str]:
        options = ["--workers", str(order.workers), "--host", "127.0.0.1", "--port", str(port), "--backlog", str(order.backlog)]
        options += ["--timeout-keep-alive", "3600"] if order.keep_alive else ["--header", "connection:close"]
        return [sys.executable, "-m", "uvicorn", *options, "--no-access-log", "--lifespan", "on", f"{_APPLICATION}:asgi"]

    return Recipe(version, command, _said_so)


def _gunicorn(order: Order, reuseport: bool = False) -> Recipe:
    version = _python_version("gunicorn")
    if order.keep_alive:
        raise PeerUnable("gunicorn's sync workers close each connection after one answer: it cannot keep connections alive")

    def command(port: int, folder: Path) -> list[str]:
        # gunicorn reads this file by itself, and passes over names it does not know: older versions have no control socket.
        (folder / "gunicorn.conf.py").write_text("control_socket_disable = True\n")
        options = ["--worker-class", "sync", "--workers", str(order.workers), "--bind", f"127.0.0.1:{port}"]
        # A worker that holds a request says nothing to its master in that time.
        options += ["--backlog", str(order.backlog), "--timeout", "3600"]
        options += ["--reuse-port"] if reuseport else []
        return [sys.executable, "-m", "gunicorn", *options, f"{_APPLICATION}:wsgi()"]

    return Recipe(version, command, _said_so)


def _granian(order: Order) -> Recipe:
    version = _python_version("granian")

    def command(port: int, folder: Path) -> list[str]:
        backlog = max(128, order.backlog)  # granian's least
        options = ["--interface", "wsgi", "--factory", "--workers", str(order.workers), "--host", "127.0.0.1", "--port", str(port)]
        # Its accept waits for one of so many permits, each held by a connection: with one, a worker takes no connection ahead of its time.
        permits = backlog if order.keep_alive else 1
        options += ["--backlog", str(backlog), "--blocking-threads", "1", "--backpressure", str(permits), "--no-ws", "--http", "1"]
        options += [] if order.keep_alive else ["--no-http1-keep-alive"]
        return [sys.executable, "-m", "granian", *options, f"{_APPLICATION}:wsgi"]

    return Recipe(version, command, _said_so)


def _node(order: Order, scheduling: str = "rr") -> Recipe:
    program = _program("node", "apt install nodejs")
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False, timeout=_START_LIMIT).stdout

    def command(port: int, folder: Path) -> list[str]:
        connection = "keep-alive" if order.keep_alive else "close"
        numbers = map(str, (port, order.workers, order.backlog))
        return [program, str(_APPS / "cluster.js"), *numbers, order.work, connection, str(folder), scheduling]

    return Recipe(said.strip().removeprefix("v"), command, _said_so)


def _program(name: str, install: str, folders: str = "") -> str:
    # A user's PATH on Debian lacks the sbin folders.
    found = shutil.which(name, path=os.environ.get("PATH", os.defpath) + folders)
    if found is None:
        raise PeerError(f"{name} is not installed: {install}")
    return found


def _python_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise PeerError(f"{name} is not installed for {sys.executable}: pip install {name}") from None


#: Each server that can be started, by its name on the command line.
PEERS: dict[str, Callable[[Order], Recipe]] = {
    "nginx": _nginx,
    "nginx-reuseport": functools.partial(_nginx, reuseport=True),
    "nginx-accept-mutex": functools.partial(_nginx, accept_mutex=True),
    "uvicorn": _uvicorn,
    "gunicorn": _gunicorn,
    "gunicorn-reuseport": functools.partial(_gunicorn, reuseport=True),
    "granian": _granian,
    "node": _node,
    "node-none": functools.partial(_node, scheduling="none"),
}
#: Those whose first process replaces all workers on SIGHUP, as each documents it; a cluster of Node does what its program does.
RELOADING = tuple(name for name in PEERS if not name.startswith("node"))
#: Those that start another worker for one that was killed. granian, as it is unless told, ends as a whole.
RESTARTING = tuple(name for name in RELOADING if name != "granian")


# -------------------------------------------------------------------------------- from start to end


class Peer:
    """A server of PEERS with `workers` worker processes on a loopback port, from `with` until its end, when nothing of it is left.

    It ends as well when this process is killed.

    Each request is held for the nanoseconds in its Fdpass-Service header, by sleeping or by burning processor time (work), where
    service is true; else nginx needs no Perl. The answer's body is "fdpass PID ACCEPTED STARTED 0", both times when the application saw
    the request, in CLOCK_MONOTONIC nanoseconds; 0 where nginx answers without Perl. keep_alive: connections stay open for an hour, else
    each is closed after one answer. backlog: how many connections may wait at each listening socket; net.core.somaxconn may allow fewer.

    Raises PeerError when made (not installed, cannot do that), entered (did not start; it raises this process's soft limit on
    descriptors, which the server inherits) and left (its first process ended before), ValueError for other arguments.
    """

    def __init__(self, name: str, workers: int, service: bool, work: str = "sleep", keep_alive: bool = False, backlog: int = 4096) -> None:
        if name not in PEERS:
            raise PeerError(f"there is no peer {name!r}; there are {', '.join(PEERS)}")
        if workers < 1 or backlog < 1 or work not in WORKS:
            raise ValueError(f"workers and backlog are at least 1 and work is sleep or burn, not {workers}, {backlog} and {work!r}")
        if not hasattr(os, "pidfd_open"):
            raise PeerError("peers are started on Linux only")
        self.name = name
        self.workers = workers
        self._recipe = PEERS[name](Order(workers, service, work, keep_alive, backlog))
        self._work = work
        self.version = self._recipe.version
        self.command: list[str] = []
        self.address = ("127.0.0.1", 0)  # until it is entered
        self._folder = Path()
        self._reservation: socket.socket | None = None
        # Whoever holds the lock either starts the server or sees that it is not wanted any more.
        self._lock = threading.Lock()
        self._over = False
        self._master: subprocess.Popen[bytes] | None = None
        self._refusal: OSError | None = None

    def __enter__(self) -> Peer:
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        problem = None
        try:
            problem = self._early_end()
        finally:
            self._end()
        if problem is not None and kind is None:
            raise problem

    def pids(self) -> list[int]:
        """The worker processes that serve now. Raises PeerError when the server's first process has ended."""
        problem = self._early_end()
        if problem is not None:
            raise problem
        assert self._master is not None, "pids() is for a server that was started"
        found = []
        # One that ends while it is looked at is no worker any more.
        with contextlib.suppress(psutil.NoSuchProcess):
            first = psutil.Process(self._master.pid)
            for process in (first, *first.children()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if process.status() != psutil.STATUS_ZOMBIE and self._recipe.serves(process, self._folder):
                        found.append(process.pid)
        return sorted(found)

    def reload(self) -> None:
        """Lets a server of RELOADING replace its workers; returns when those of before have ended and as many others serve.

        Raises PeerError where it does not in time, or ends.
        """
        with contextlib.ExitStack() as stack:
            before = self.pids()
            old: set[int] = set()
            for pid in before:
                with contextlib.suppress(ProcessLookupError):  # it ended just now
                    old.add(stack.enter_context(_pidfd(pid)))
            assert self._master is not None, "reload() is for a server that was started"
            # Uncollected, so that the number is its own still.
            os.kill(self._master.pid, signal.SIGHUP)
            seconds = _RELOAD_LIMIT + _RELOAD_EACH * self.workers
            limit = time.monotonic() + seconds
            while old or len(set(self.pids()) - set(before)) < self.workers:
                if time.monotonic() > limit:
                    raise PeerError(
                        f"{self.name} did not replace its workers within {seconds:g} s: {len(old)} of {len(before)} are still the same "
                        f"processes{self._last_words()}"
                    )
                old -= _wait(old, _LOOK_AGAIN)

    def _start(self) -> None:
        fdpass.raise_fd_limit()
        self._folder = Path(tempfile.mkdtemp(prefix="fdpass-peer-"))
        # Bound and never listening, it keeps the number ours: the kernel gives it to nobody, and a server that sets SO_REUSEADDR, as all
        # of these do, may bind it all the same.
        self._reservation = socket.socket()
        self._reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reservation.bind(("127.0.0.1", 0))
        self.address = self._reservation.getsockname()
        self.command = self._recipe.command(self.address[1], self._folder)
        # In a thread, where no signal handler runs: an interrupt cannot come between the process and our knowing of it.
        starter = threading.Thread(target=self._launch)
        starter.start()
        starter.join()
        if self._refusal is not None:
            raise PeerError(f"{self.name} did not start: {self._refusal}")
        self._wait_until_serving()

    def _launch(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not _FOREIGN.match(name)}
        environment |= {"FDPASS_PEER_WORK": self._work, "FDPASS_PEER_READY": str(self._folder)}
        # The server inherits it from this thread: else each sleep of a worker could end up to 50 us late, which would raise its load.
        with contextlib.suppress(OSError):
            Path(f"/proc/{threading.get_native_id()}/timerslack_ns").write_text("1")
        with self._lock:
            if self._over:
                return
            with open(self._folder / "output", "wb") as output:
                try:
                    (self._folder / "guarded.py").write_text(_GUARDED)
                    guarded = [sys.executable, "-I", "-S", "guarded.py", str(os.getpid()), str(_STOP_LIMIT), str(self._folder)]
                    # A session of its own: Ctrl-C is for us, and all its processes are known by it, orphans too.
                    self._master = subprocess.Popen(
                        [*guarded, *self.command],
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        cwd=self._folder,
                        env=environment,
                        start_new_session=True,
                    )
                except OSError as error:
                    self._refusal = error

    def _wait_until_serving(self) -> None:
        limit = time.monotonic() + _START_LIMIT
        assert self._master is not None
        with _pidfd(self._master.pid) as ended:
            while time.monotonic() < limit:
                count = len(self.pids())
                if count >= self.workers and _answers(self.address):
                    return
                _wait({ended}, _LOOK_AGAIN)
        raise PeerError(f"{self.name} did not start within {_START_LIMIT:g} s: {count} of {self.workers} workers serve{self._last_words()}")

    def _early_end(self) -> PeerError | None:
        """What to raise when the first process has ended; it stays uncollected, so that its pid, the session's name, is not given away."""
        if self._master is None or self._over:
            return None
        ended = os.waitid(os.P_PID, self._master.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        how = f"ended with exit status {ended.si_status}"
        if ended.si_code != os.CLD_EXITED:
            how = f"was killed by {signal.Signals(ended.si_status).name}"
        return PeerError(f"{self.name} {how}{self._last_words()}")

    def _last_words(self) -> str:
        lines = []
        with contextlib.suppress(OSError):
            text = (self._folder / "output").read_text(errors="replace")
            lines = [line.strip() for line in text.splitlines() if line.strip()][-_LAST_LINES:]
        return f"; it wrote: {' | '.join(lines)}" if lines else ""

    def _end(self) -> None:
        try:
            self._end_now()
        except KeyboardInterrupt:
            # Once more: an interrupt has to wait until nothing is left.
            self._end_now()
            raise

    def _end_now(self) -> None:
        with self._lock:
            self._over = True
        if self._master is not None and self._master.returncode is None:
            _end_session(self._master.pid, _STOP_LIMIT)
            self._master.wait()
        if self._reservation is not None:
            self._reservation.close()
        if self._folder != Path():
            shutil.rmtree(self._folder, ignore_errors=True)


def _answers(address: tuple[str, int]) -> bool:
    request = b"GET / HTTP/1.1\r\nHost: %s:%d\r\nFdpass-Service: 0\r\nConnection: close\r\n\r\n" % (address[0].encode(), address[1])
    data = b""
    with contextlib.suppress(OSError), socket.create_connection(address, _ANSWER_LIMIT) as conn:
        conn.sendall(request)
        while chunk := conn.recv(4096):
            data += chunk
    return data.startswith(b"HTTP/1.1 200 ") and b"\r\n\r\nfdpass " in data


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)


def _wait(pidfds: set[int], seconds: float) -> set[int]:
    """Those whose processes have ended, as soon as there is one, or none after so many seconds."""
    poll = select.poll()
    for fd in pidfds:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll(max(0, seconds) * 1000)}


def _end_session(leader: int, seconds: float) -> None:
    """Ends every process of a session but this one: its leader is asked first and has so many seconds, then all are killed.

    The leader is an uncollected child or this process is in the session: else its number could come to mean another one.
    """
    with contextlib.ExitStack() as stack:
        known: dict[int, int] = {}

        def living() -> set[int]:
            """A pidfd for each process of the session, known or new, that has not ended. A pidfd cannot come to mean another process."""
            for pid in {int(name) for name in os.listdir("/proc") if name.isdigit()} - {os.getpid()}:
                with contextlib.suppress(ProcessLookupError):
                    if pid not in known and os.getsid(pid) == leader:
                        fd = stack.enter_context(_pidfd(pid))
                        if os.getsid(pid) == leader:
                            known[pid] = fd
            fds = set(known.values())
            return fds - _wait(fds, 0)

        def send(fd: int, signum: signal.Signals) -> None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signum)

        left = living()
        if known.get(leader) in left:
            send(known[leader], signal.SIGTERM)
            _wait({known[leader]}, seconds)
        # A process may have begun another while it was being killed: until a look finds none.
        limit = time.monotonic() + seconds
        while (left := living()) and time.monotonic() < limit:
            for fd in left:
                send(fd, signal.SIGKILL)
            while left and time.monotonic() < limit:
                left -= _wait(left, limit - time.monotonic())


def _guarded() -> None:
    """Becomes the server, after leaving a guardian in its session, which ends that session when the caller dies before it has done so."""
    caller, seconds, folder, *command = sys.argv[1:]
    with contextlib.suppress(ProcessLookupError):
        died = os.pidfd_open(int(caller))
    # No longer its child: the caller has died already, and the number may be another's.
    if os.getppid() != int(caller):
        shutil.rmtree(folder, ignore_errors=True)
        return
    if os.fork() > 0:
        os.wait()
        # Python ignores these two, and so would the server.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        try:
            os.execvp(command[0], command)
        except OSError as error:
            sys.exit(f"{command[0]}: {error.strerror}")
    # A grandchild: the server has no child that it did not start. It leaves the group, which a server may send a signal.
    if os.fork() == 0:
        os.setpgid(0, 0)
        select.select([died], [], [])
        _end_session(os.getsid(0), float(seconds))
        shutil.rmtree(folder, ignore_errors=True)


#: A program of these functions alone: it must not hold up the start of the server, and this module imports much.
_GUARDED = "\n".join(
    [
        "from __future__ import annotations",
        "import contextlib, os, select, shutil, signal, sys, time",
        *(inspect.getsource(function) for function in (_pidfd, _wait, _end_session, _guarded)),
        "_guarded()",
    ]
)
