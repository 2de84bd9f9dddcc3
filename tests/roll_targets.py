"""What the workers of the roll tests run. What it is, they read from a file at their start, as they would a new program version."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from pathlib import Path

import fdpass


def versioned(listener: fdpass.Listener, path: str) -> None:
    """Does what the file says: serve, crash, exit0, hang, unready, kill."""
    word = Path(path).read_text()
    if word == "crash":
        sys.exit(7)
    if word == "exit0":
        os._exit(0)
    if word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            pass
    if word == "unready":
        threading.Event().wait()
    if word == "brief":
        listener.ready()
        os._exit(5)
    serve(listener, word)


def serve(listener: fdpass.Listener, word: str = "") -> None:
    """Waits for a word and answers with its index, its pid and a word of its own."""
    for conn, _ in listener:
        with conn:
            got = conn.recv(100)
            conn.sendall(f"{listener.index} {os.getpid()} {word} {got.decode()}".encode())


def slow(listener: fdpass.Listener) -> None:
    """Each answer takes a while."""
    for conn, _ in listener:
        with conn:
            conn.recv(100)
            select.select([], [], [], 0.02)
            conn.sendall(b"slow")


def with_threads(listener: fdpass.Listener) -> None:
    """A thread for each connection; the process ends with the last of them."""
    for conn, _ in listener:

        def answer(conn: object = conn) -> None:
            with conn:  # type: ignore[attr-defined]  # a socket
                while got := conn.recv(100):  # type: ignore[attr-defined]
                    conn.sendall(f"{os.getpid()} {got.decode()}".encode())  # type: ignore[attr-defined]

        threading.Thread(target=answer).start()


def own_loop(listener: fdpass.Listener) -> None:
    """A server of its own that does not follow: it closes at SIGTERM, after it has answered what it accepted."""
    sock = listener.socket
    read, write = os.pipe()
    signal.signal(signal.SIGTERM, lambda *_: os.write(write, b"t"))
    while True:
        ready, _, _ = select.select([read, sock], [], [])
        if read in ready:
            return
        try:
            conn, _ = sock.accept()
        except BlockingIOError:
            continue
        with conn:
            conn.setblocking(True)
            got = conn.recv(100)
            conn.sendall(f"{listener.index} {os.getpid()} own {got.decode()}".encode())


def notes_sigterm(listener: fdpass.Listener, path: str) -> None:
    """A server that obeys the order, and closes at SIGTERM what it has open: it writes down how many connections that were."""
    held = []

    def term(*_: object) -> None:
        Path(path).write_text(str(sum(conn.fileno() >= 0 for conn in held)))
        os._exit(0)

    signal.signal(signal.SIGTERM, term)
    for conn, _ in listener:
        held.append(conn)
        conn.sendall(str(os.getpid()).encode())
    while True:
        for conn in [one for one in held if one.fileno() >= 0]:
            if conn.recv(100) == b"":
                conn.close()
        if all(one.fileno() < 0 for one in held):
            threading.Event().wait()
