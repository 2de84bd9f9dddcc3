"""One process accepts, k workers serve: python examples/handover.py [host:port] [workers]

Each connection goes over a channel to the worker that has the fewest open ones. For a port that needs no such middleman, and workers that
are restarted when they die, see fdpass.WorkerGroup.
"""

import multiprocessing
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from multiprocessing.connection import wait

import fdpass


class Hello(BaseHTTPRequestHandler):
    """Tells which worker answers; any code that takes a connected socket could stand here."""

    protocol_version = "HTTP/1.1"  # connections stay open between requests, and so does their place in the count

    def do_GET(self):
        body = f"worker {os.getpid()} got {self.path}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def work(channel: fdpass.Channel) -> None:
    """Runs in each worker, until the parent closes its end of the channel."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C in the terminal is the parent's affair

    def answer(conn: socket.socket, address: tuple[str, int]) -> None:
        with suppress(OSError), conn:  # the client may go away
            Hello(conn, address, None)
        with suppress(OSError, fdpass.FdPassError):  # and so may the parent
            channel.send_message(b"done")

    with suppress(ConnectionResetError), channel:  # so it ends when the parent had not read our last words
        for conn, address in channel:
            threading.Thread(target=answer, args=(conn, address), daemon=True).start()


def serve(server: socket.socket, count: int) -> None:
    """Accepts, and hands over, for ever."""
    context = multiprocessing.get_context("spawn")
    open_connections: dict[fdpass.Channel, int] = {}
    workers = []
    try:
        for _ in range(count):
            near, far = fdpass.Pipe()
            open_connections[near] = 0
            with far:
                workers.append(context.Process(target=work, args=(far,)))
                workers[-1].start()
        while open_connections:
            for ready in wait([server, *open_connections]):
                if ready is server:
                    hand_over(*server.accept(), open_connections)
                    continue
                try:
                    ready.recv_message()
                    open_connections[ready] -= 1
                except (fdpass.FdPassError, OSError):
                    lose(ready, open_connections)
        raise SystemExit("all workers have died")
    finally:
        for channel in open_connections:
            channel.close()
        for process in workers:
            process.join()


def hand_over(conn: socket.socket, address: tuple[str, int], open_connections: dict[fdpass.Channel, int]) -> None:
    """Gives a connection to the least busy worker; this process keeps nothing of it."""
    while open_connections:
        channel = min(open_connections, key=open_connections.__getitem__)
        try:
            channel.send((conn, address), consume=True)
            open_connections[channel] += 1
            return
        except (fdpass.FdPassError, OSError):
            lose(channel, open_connections)
    conn.close()


def lose(channel: fdpass.Channel, open_connections: dict[fdpass.Channel, int]) -> None:
    """A worker has died, and with it the connections that it had."""
    if open_connections.pop(channel, None) is not None:
        channel.close()


if __name__ == "__main__":
    host, _, port = (sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8000").rpartition(":")
    workers = int(sys.argv[2]) if len(sys.argv) > 2 else 4
    with socket.create_server((host, int(port))) as server:
        host, port = server.getsockname()
        print(f"serving on http://{host}:{port}, Ctrl-C ends it", flush=True)
        try:
            serve(server, workers)
        except KeyboardInterrupt:
            pass
