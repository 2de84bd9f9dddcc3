"""uvicorn in every worker of a group, all on one port: python examples/uvicorn_workers.py [host:port] [workers] [strategy] [order]

strategy: shared (the default), reuseport, reuseport-bare, dispatch or auto. uvicorn is given the group's listener, whatever the strategy;
its own signal handling ends it when the group stops.
"""

import asyncio
import os
import sys

import uvicorn

import fdpass


async def app(scope, receive, send):
    """An ASGI application that tells which worker answers."""
    assert scope["type"] == "http"
    body = f"{os.environ['WORKER_INDEX']} {os.getpid()}\n".encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Server(uvicorn.Server):
    """uvicorn, whose connections come from a listener of fdpass instead of a socket of its own."""

    def __init__(self, config: uvicorn.Config, listener: fdpass.Listener) -> None:
        super().__init__(config)
        self.listener = listener

    async def startup(self, sockets=None) -> None:
        """What uvicorn.Server does, but for where connections come from."""
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(3)

        def protocol():
            return self.config.http_protocol_class(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

        self.servers = [await fdpass.aio.create_server(protocol, self.listener, ssl=self.config.ssl)]
        self.started = True

    async def shutdown(self, sockets=None) -> None:
        """uvicorn closes what it has read nothing from yet. Out of the queue first, then a moment for what was sent already to be read."""
        self.listener.drain()
        await asyncio.sleep(0.1)
        await super().shutdown(sockets)


#: One connection for each wake-up of one worker, where this version of fdpass has such a loop.
LOOP = "fdpass.aio:new_event_loop" if hasattr(fdpass.aio, "new_event_loop") else "asyncio"


def serve(listener: fdpass.Listener) -> None:
    """Runs in each worker."""
    os.environ["WORKER_INDEX"] = str(listener.index)
    Server(uvicorn.Config(app, log_level="warning", lifespan="off", loop=LOOP), listener).run()


if __name__ == "__main__":
    address, workers, strategy, order, *_ = [*sys.argv[1:], *("127.0.0.1:8000", "4", "shared", None)[len(sys.argv) - 1 :]]
    group = fdpass.WorkerGroup(serve, address, workers=int(workers), strategy=strategy, order=order, restart="on-failure")
    with group:
        print(f"serving on http://{group.endpoint}, Ctrl-C ends it", flush=True)
        try:
            group.wait()
        except KeyboardInterrupt:
            pass
