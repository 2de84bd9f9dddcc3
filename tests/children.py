"""What the processes of the argument tests run: importable by name, as spawn and forkserver want it. Each writes down what it found."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
from multiprocessing.connection import Connection
from typing import Any

import fdpass

SO_COOKIE = 57

#: Run after exec: every descriptor that came through.
COUNT_OPEN = "import os, json; print(json.dumps([int(n) for n in os.listdir('/proc/self/fd')]))"


class Framed(socket.socket):
    """A socket class of somebody's own."""

    label = ""


class Tripwire:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return touch, (self.path,)


def touch(path: str) -> None:
    with open(path, "x"):
        pass


class DiesWhenLoaded:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (7,)


class FailsToPickle:
    """Raises after everything before it has been pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        raise LookupError("this one does not pickle")


class Temporary:
    """Reduces to a handle that exists only while it is pickled."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def __reduce__(self) -> tuple[Any, ...]:
        return fdpass.SocketHandle.open, (fdpass.SocketHandle(self.sock),)


def cookie(item: Any) -> int:
    """The kernel's own number of a socket: equal for two descriptors exactly when they are the same socket."""
    with socket.socket(fileno=os.dup(item.fileno())) as view:
        return struct.unpack("Q", view.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))[0]


def facts(item: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"type": type(item).__name__, "inheritable": os.get_inheritable(item.fileno()), "number": item.fileno()}
    if isinstance(item, fdpass.SocketHandle):
        item = item.open()
    if isinstance(item, socket.socket):
        found |= {"timeout": item.gettimeout(), "label": getattr(item, "label", None), "kind": [item.family, item.type, item.proto]}
    found |= {"blocking": os.get_blocking(item.fileno()), "cookie": cookie(item)}
    return found


def report(out: str, items: list[Any]) -> None:
    """One line of JSON: what arrived, and which of it an exec'ed program still has."""
    numbers = {item.fileno() for item in items}
    after_exec = subprocess.run([sys.executable, "-I", "-c", COUNT_OPEN], stdout=subprocess.PIPE, close_fds=False, check=True).stdout
    # facts() opens handles: after this the numbers are somebody else's.
    found = [facts(item) for item in items]
    survived = sorted(numbers & set(json.loads(after_exec)))
    with open(out, "w") as file:
        json.dump({"items": found, "survived_exec": survived}, file)


def report_cookies(out: str, items: list[Any]) -> None:
    with open(out, "w") as file:
        json.dump([cookie(item) for item in items], file)


def open_sockets() -> int:
    """How many descriptors of this process are sockets."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            count += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
    return count


def report_descriptors(out: str, items: list[Any]) -> None:
    """How many sockets this process has, and how many once the given ones are closed."""
    before = open_sockets()
    for item in items:
        item.close()
    after = open_sockets()
    with open(out, "w") as file:
        json.dump([before, after], file)


def speak(items: list[Any]) -> None:
    """Each kind of thing says "x<its place>" in its own way."""
    for place, item in enumerate(items):
        words = b"x%d" % place
        if isinstance(item, fdpass.SocketHandle):
            item = item.open()
        if isinstance(item, fdpass.OwnedFd):
            os.write(item.fileno(), words)
        elif isinstance(item, fdpass.Channel):
            item.send_message(words)
        elif isinstance(item, Connection):
            item.send_bytes(words)
        else:
            item.sendall(words)
        item.close()


def nothing(*items: Any) -> None:
    for item in items:
        item.close()


def load_later(out: str, raw: bytes) -> None:
    import pickle

    try:
        pickle.loads(raw)
    except fdpass.TicketError as error:
        words = str(error)
    with open(out, "w") as file:
        json.dump(words, file)


def take_from_queue(queue: Any, out: str) -> None:
    sock = queue.get()
    sock.sendall(b"from the queue")
    sock.close()
    touch(out)


class FailsToLoad:
    """Raises when it is unpickled; what it holds was unpickled before."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __reduce__(self) -> tuple[Any, ...]:
        return fail_to_load, (self.held,)


def fail_to_load(held: Any) -> None:
    held.close()
    raise LookupError("this one does not load")


class ForgetsOnLoading:
    """Holds a descriptor in its pickle that nothing claims when it is loaded."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __reduce__(self) -> tuple[Any, ...]:
        from fdpass import _carriers

        return str, (str(_carriers.carry(self.held.fileno(), "a descriptor")),)
