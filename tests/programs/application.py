"""An ASGI application whose module calls register(): each worker gives sockets to a spawned process of its own through a Queue."""

import json
import multiprocessing
import os
import socket

from facts import cookie, sharer_ran

import fdpass

fdpass.register()


def answer(queue):
    """Writes into each socket that arrives who has it and which socket it is."""
    while (sock := queue.get()) is not None:
        with sock:
            sock.sendall(json.dumps([os.getpid(), cookie(sock)]).encode())


class Helper:
    """The process behind a worker."""

    def start(self):
        context = multiprocessing.get_context("spawn")
        self.queue = context.Queue()
        self.process = context.Process(target=answer, args=(self.queue,))
        self.process.start()

    def ask(self):
        near, far = socket.socketpair()
        with near, far:
            self.queue.put(far)
            pid, number = json.loads(near.recv(100))
            return {"helper": [pid, self.process.pid], "cookies": [number, cookie(far)]}

    def stop(self):
        self.queue.put(None)
        self.process.join()
        self.process.close()
        self.queue.close()
        self.queue.join_thread()


helper = Helper()


def held():
    """Blocks this worker until the test lets it go: what comes in the meantime is for the other one."""
    with socket.socket(socket.AF_UNIX) as test:
        test.connect(os.environ["FDPASS_TEST_SOCKET"])
        test.sendall(b"held")
        test.recv(1)


async def application(scope, receive, send):
    if scope["type"] == "lifespan":
        for step, do in (("startup", helper.start), ("shutdown", helper.stop)):
            assert (await receive())["type"] == f"lifespan.{step}"
            do()
            await send({"type": f"lifespan.{step}.complete"})
        return
    if scope["path"] == "/held":
        held()
    facts = {"worker": os.getpid(), **helper.ask(), "claims": fdpass.store_stats().claims, "sharer": sharer_ran()}
    body = json.dumps(facts).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})
