"""uvicorn in every worker of a group, all on one port: python examples/uvicorn_workers.py [host:port] [workers]

uvicorn is given the group's listening socket; its own signal handling ends it when the group stops.
"""

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


def serve(listener: fdpass.Listener) -> None:
    """Runs in each worker."""
    os.environ["WORKER_INDEX"] = str(listener.index)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    server.run(sockets=[listener.socket])


if __name__ == "__main__":
    address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8000"
    workers = int(sys.argv[2]) if len(sys.argv) > 2 else 4
    with fdpass.WorkerGroup(serve, address, workers=workers, restart="on-failure") as group:
        print(f"serving on http://{group.endpoint}, Ctrl-C ends it", flush=True)
        try:
            group.wait()
        except KeyboardInterrupt:
            pass
