"""What the workers of the group tests run: importable by name, as spawn wants it."""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import socket
import struct
import sys
import threading
from pathlib import Path

import fdpass

SO_COOKIE = 57


def cookie(sock: socket.socket) -> int:
    return struct.unpack("Q", sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))[0]


def answer(listener: fdpass.Listener, *words: str) -> None:
    """Says who it is, then closes."""
    for conn, _ in listener:
        with conn:
            conn.sendall(" ".join([str(listener.index), str(os.getpid()), str(cookie(listener.socket)), *words]).encode())


def hold(listener: fdpass.Listener) -> None:
    """Says who it is, waits for the client's word and echoes it."""
    for conn, _ in listener:
        with conn:
            conn.sendall(f"{listener.index} {os.getpid()}".encode())
            conn.sendall(conn.recv(100))


def exit_with(listener: fdpass.Listener, code: int) -> None:
    listener.ready()
    sys.exit(code)


def exit_unready(listener: fdpass.Listener, code: int) -> None:
    os._exit(code)


def return_when_asked(listener: fdpass.Listener) -> None:
    """Ends by itself, with exit status 0, after its first connection."""
    conn, _ = listener.accept()
    conn.close()


def fail_second(listener: fdpass.Listener, marker: str) -> None:
    """The first process serves, the second ends before it is ready, all later ones serve."""
    with open(marker, "a") as file:
        file.write("x")
        file.flush()
        if os.fstat(file.fileno()).st_size == 2:
            os._exit(7)
    answer(listener)


def never_ready(listener: fdpass.Listener) -> None:
    threading.Event().wait()


def hang_second(listener: fdpass.Listener, marker: str) -> None:
    """The first process serves, every later one hangs in its start."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        threading.Event().wait()
    answer(listener)


def stubborn(listener: fdpass.Listener) -> None:
    """Neither drains nor dies of SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    listener.ready()
    while True:
        signal.pause()


def raises(listener: fdpass.Listener) -> None:
    raise RuntimeError("deliberate")


def die_if_first(listener: fdpass.Listener) -> None:
    if listener.index == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    answer(listener)


def accept_only(listener: fdpass.Listener) -> None:
    """Does not know of ClosedError."""
    while True:
        conn, _ = listener.accept()
        conn.sendall(str(listener.index).encode())
        conn.close()


def describe(listener: fdpass.Listener) -> None:
    """Says which descriptors this process has, whether one is inheritable, and what it knows of its listener."""
    for conn, _ in listener:
        with conn:
            fds = [int(name) for name in os.listdir("/proc/self/fd")]
            loose = []
            for fd in fds:
                try:
                    if fd > 2 and os.get_inheritable(fd):
                        loose.append(f"{fd}={os.readlink(f'/proc/self/fd/{fd}')}")
                except OSError:
                    pass  # the one that listed the directory
            conn.sendall(f"{listener.index} {listener.strategy} {len(loose)} {' '.join(loose)}".encode())


def small_backlog(listener: fdpass.Listener) -> None:
    """Does to its socket what asyncio's create_server does."""
    listener.socket.listen(100)
    answer(listener)


def exhausted(listener: fdpass.Listener) -> None:
    """Worker 0 has no free descriptor until a byte comes in on the control socket; it counts its failed accepts."""
    if listener.index:
        answer(listener)
        return
    conn, _ = listener.accept()  # the control connection
    failures = 0
    plain = type(listener.socket).accept

    def counted(sock: socket.socket) -> object:
        nonlocal failures
        try:
            return plain(sock)
        except BlockingIOError:
            raise
        except OSError:
            failures += 1
            raise

    type(listener.socket).accept = counted  # type: ignore[method-assign]  # wrapped, to count the real one
    conn.sendall(b"0")
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    eaten = []
    try:
        while True:
            eaten.append(os.dup(0))
    except OSError:
        pass

    def free() -> None:
        conn.recv(1)
        while eaten:
            os.close(eaten.pop())

    threading.Thread(target=free).start()
    conn.sendall(b"full")
    got, _ = listener.accept()
    got.sendall(b"0 spare")
    got.close()
    eaten.append(os.dup(0))  # what the spare had left free
    got, _ = listener.accept()
    with got:
        got.sendall(f"0 {failures}".encode())
    conn.close()
    answer(listener)


def threads(listener: fdpass.Listener, count: int) -> None:
    """Several threads accept from one listener."""
    workers = [threading.Thread(target=answer, args=(listener, str(number))) for number in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


class Dies:
    """Ends the process that loads it."""

    def __reduce__(self) -> tuple[object, ...]:
        return os._exit, (9,)


class Explodes:
    """Raises in the process that loads it."""

    def __reduce__(self) -> tuple[object, ...]:
        return eval, ("1 / 0",)


def talks_nonsense(listener: fdpass.Listener, kind: str) -> None:
    listener.ready()
    channel = listener._channel
    assert channel is not None
    if kind == "number":
        channel.send(5)
    elif kind == "explosion":
        channel.send(Explodes())
    elif kind == "garbage":
        os.write(channel.fileno(), b"garbage!" * 10)
    elif kind == "half":
        os.write(channel.fileno(), b"f")
    elif kind == "flood":
        for _ in range(500):
            channel.send(("ready",))
    else:
        channel.close()
        threading.Event().wait()
    answer(listener)


def measure(listener: fdpass.Listener, data: bytes) -> None:
    for conn, _ in listener:
        with conn:
            conn.sendall(str(len(data)).encode())


def mixed(listener: fdpass.Listener) -> None:
    """Worker 0 computes in Python for ever, worker 1 sits in a C call that holds the GIL, worker 2 computes, ignores SIGTERM and
    has closed everything, the others accept."""
    listener.ready()
    if listener.index == 0:
        while True:
            pass
    if listener.index == 1:
        # A mutex locked twice: unlike sleep(3), no signal makes it return. PyDLL keeps the GIL.
        mutex = ctypes.create_string_buffer(256)
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)
    if listener.index == 2:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.closerange(3, 4096)
        while True:
            pass
    answer(listener)


def forks(listener: fdpass.Listener) -> None:
    """Each connection gets a forked child, which closes it too, when the client does."""
    for conn, _ in listener:
        with conn:
            pid = os.fork()
            if pid == 0:
                conn.sendall(b"child")
                select.select([conn], [], [])
                conn.close()
                os._exit(0)
            os.waitpid(pid, 0)


def tell_limits(listener: fdpass.Listener) -> None:
    sig = {name: str(signal.getsignal(getattr(signal, name))) for name in ("SIGINT",)}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    for conn, _ in listener:
        with conn:
            conn.sendall(f"{sig['SIGINT']}|{sorted(blocked)}|{Path('/proc/self/comm').read_text().strip()}".encode())


def takes_socket(listener: fdpass.Listener) -> None:
    """A server with a loop of its own: it never asks the listener."""
    sock = listener.socket
    with select.epoll() as epoll:
        epoll.register(sock, select.EPOLLIN)
        while True:
            epoll.poll()
            try:
                conn, _ = sock.accept()
            except BlockingIOError:
                continue
            with conn:
                conn.sendall(f"{listener.index} {os.getpid()}".encode())
