"""A broker of descriptors between asyncio programs: one registers a file under a name, another gets it by that name.

python examples/asyncio_broker.py serve PATH            keeps what is registered; Ctrl-C ends it
python examples/asyncio_broker.py put PATH NAME FILE    opens a file and registers the descriptor
python examples/asyncio_broker.py get PATH NAME         gets it, and prints what is in the file
python examples/asyncio_broker.py                       shows all three

Only messages are sent, nothing is pickled. PATH is a socket that this user alone may open.
"""

import asyncio
import os
import sys
import tempfile
from contextlib import closing, suppress

import fdpass
from fdpass.aio import AsyncChannel, open_channel, start_channel_server


class Broker:
    """Names and descriptors; it owns every one of them."""

    def __init__(self):
        self.kept: dict[bytes, fdpass.OwnedFd] = {}

    async def talk(self, channel: AsyncChannel) -> None:
        """Answers one client until it leaves: "put NAME" with one descriptor, "get NAME"."""
        with suppress(fdpass.FdPassError, OSError):  # at the latest when the client ends the channel
            async with channel:
                while True:
                    await self.answer(channel, *await channel.recv_message())

    async def answer(self, channel: AsyncChannel, request: bytes, fds: list[fdpass.OwnedFd]) -> None:
        """One request."""
        verb, _, name = request.partition(b" ")
        if verb == b"put" and len(fds) == 1:
            if name in self.kept:
                self.kept[name].close()
            self.kept[name] = fds.pop()
            await channel.send_message(b"ok")
        elif verb == b"get" and name in self.kept:
            # A duplicate: somebody may put another in its place while this client is slow to read.
            with self.kept[name].dup() as copy:
                await channel.send_message(b"ok", [copy])
        else:
            await channel.send_message(b"there is no " + name if verb == b"get" else b"what does that mean?")
        for owned in fds:
            owned.close()

    def close(self) -> None:
        """Closes all that it keeps."""
        while self.kept:
            self.kept.popitem()[1].close()


async def serve(path: str) -> None:
    """Runs a broker until it is cancelled."""
    with closing(Broker()) as broker:
        async with await start_channel_server(broker.talk, path, allow_pickle=False) as server:
            print("listening on", server.path, flush=True)
            await server.serve_forever()


async def put(path: str, name: str, file: str) -> None:
    """Registers a file; the descriptor stays with the broker when this program ends."""
    async with await open_channel(path, allow_pickle=False) as channel:
        with open(file, "rb") as opened:
            await channel.send_message(b"put " + name.encode(), [opened])
        answer, _ = await channel.recv_message()
        print(answer.decode())


async def get(path: str, name: str) -> None:
    """Prints what is behind a name."""
    async with await open_channel(path, allow_pickle=False) as channel:
        await channel.send_message(b"get " + name.encode())
        answer, fds = await channel.recv_message()
        if not fds:
            raise SystemExit(answer.decode())
        with fds[0].to_file("rb") as file:
            # From the start: the position in the file is shared by all who hold it.
            sys.stdout.buffer.write(os.pread(file.fileno(), 1 << 20, 0))


async def show() -> None:
    """A broker here, and two programs that know nothing of each other."""
    with tempfile.TemporaryDirectory() as folder, closing(Broker()) as broker:
        path, file = os.path.join(folder, "broker"), os.path.join(folder, "greeting")
        with open(file, "w") as opened:
            opened.write("hello from a file that has no name any more\n")
        async with await start_channel_server(broker.talk, path, allow_pickle=False):
            await run("put", path, "greeting", file)
            os.unlink(file)
            await run("get", path, "greeting")


async def run(*arguments: str) -> None:
    """This file once more, as a program of its own."""
    print("$ asyncio_broker.py", *arguments, flush=True)
    process = await asyncio.create_subprocess_exec(sys.executable, __file__, *arguments)
    await process.wait()


if __name__ == "__main__":
    commands = {"serve": (serve, 1), "put": (put, 3), "get": (get, 2)}
    command, *arguments = sys.argv[1:] or ["show"]
    if command != "show" and (command not in commands or len(arguments) != commands[command][1]):
        raise SystemExit(__doc__)
    try:
        asyncio.run(show() if command == "show" else commands[command][0](*arguments))
    except KeyboardInterrupt:
        pass
    except OSError as error:
        raise SystemExit(error.strerror) from None
