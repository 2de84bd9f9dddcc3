"""A process that owns a store and claims from others', driven by pickles over its standard input and output.

Orders are (name, arguments); the answer is what the order returns, or the text of what it raised.
"""

import contextlib
import os
import pickle
import resource
import socket
import struct
import subprocess
import sys

import fdpass
import fdpass.handles  # with a full table nothing can be imported any more
from fdpass import _claims, _store


class Process:
    """The driver's side."""

    def __init__(self, **options):
        self.popen = subprocess.Popen([sys.executable, "-W", "error", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)
        self.pid = self.popen.pid

    def __call__(self, name, *args):
        self.begin(name, *args)
        return self.answer()

    def begin(self, name, *args):
        """Gives the order and does not wait; answer() does."""
        pickle.dump((name, args), self.popen.stdin)
        self.popen.stdin.flush()

    def answer(self):
        return pickle.load(self.popen.stdout)

    def end(self, signal=None):
        """The exit status; without a signal an orderly exit."""
        if signal is None:
            self.popen.stdin.close()
        else:
            self.popen.send_signal(signal)
        status = self.popen.wait()
        with contextlib.suppress(BrokenPipeError):
            self.popen.stdin.close()
        self.popen.stdout.close()
        return status

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.popen.returncode is None:
            self.end(9)
        self.popen.stdout.close()


def cookie(fd):
    with socket.socket(fileno=os.dup(fd)) as view:
        return struct.unpack("Q", view.getsockopt(socket.SOL_SOCKET, 57, 8))[0]


def make(claims=1, ttl=None):
    """A pickled handle of a new socket, and the socket's cookie."""
    _store.configure(_store.settings()._replace(ttl=ttl))
    with socket.socket() as sock, fdpass.SocketHandle(sock, claims) as handle:
        return pickle.dumps(handle), cookie(sock.fileno())


def make_many(count):
    return [make()[0] for _ in range(count)]


def load(raw):
    """("given", cookie) or (class of the error, its words)."""
    try:
        with pickle.loads(raw) as handle:
            return "given", cookie(handle.fileno())
    except (fdpass.FdPassError, OSError) as error:
        return type(error).__name__, str(error)


def load_many(raws):
    return [load(raw)[0] for raw in raws]


def stats():
    return fdpass.store_stats()._asdict()


def where():
    """The folder of this process's store, "" without one."""
    return "" if _store._folder is None else _store._folder.path


def open_now():
    return {int(name): _link(name) for name in os.listdir("/proc/self/fd")}


def _link(name):
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        return "closed"


def resident():
    """Bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def configure(**settings):
    _store.configure(_store.settings()._replace(**settings))


def configure_all(most, linger):
    configure(max_unclaimed=most, linger=linger)


def set_linger(seconds):
    configure(linger=seconds)


def bound(count):
    configure(max_unclaimed=count)


def limit_nofile(soft):
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def hard_limit(both):
    resource.setrlimit(resource.RLIMIT_NOFILE, (both, both))


def churn(count):
    """Makes and claims tickets in this process; what is open and resident before and after."""
    # Beyond what the store remembers of ended tickets.
    for _ in range(6000):
        load(make()[0])
    before = len(open_now()), resident()
    for _ in range(count):
        load(make()[0])
    return before, (len(open_now()), resident()), stats()


def fork():
    """What a forked child of this process finds: its open descriptors, its store, and one ticket of its own and one of its parent's."""
    theirs = make()[0]
    before = set(open_now())
    near, far = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(near)
        inherited = open_now()
        found = inherited, stats(), load(theirs)[0], load(make()[0])[0], stats(), where()
        with open(far, "wb") as file:
            pickle.dump(found, file)
        _store.stop()
        os._exit(0)
    os.close(far)
    with open(near, "rb") as file:
        found = pickle.load(file)
    os.waitpid(pid, 0)
    return before, found, stats(), where()


def use_limit(free):
    """Takes all numbers but so many."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    eaten = []
    with contextlib.suppress(OSError):
        while len(open_now()) <= soft:
            eaten.append(os.dup(0))
    for _ in range(free):
        os.close(eaten.pop())
    globals()["_eaten"] = eaten
    return soft


def give_back():
    while _eaten:  # noqa: F821  (use_limit makes it)
        os.close(_eaten.pop())  # noqa: F821


def set_patience(seconds):
    _claims.PATIENCE = seconds


def close_connections():
    _claims.close_connections()


if __name__ == "__main__":
    # Orders come and answers go here; whatever is printed goes elsewhere.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            name, args = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        try:
            answer = globals()[name](*args)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()
    answers.close()
