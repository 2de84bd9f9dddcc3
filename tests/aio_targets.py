"""What the processes of the asyncio tests run: importable by name, as spawn and forkserver want it."""

from __future__ import annotations

import asyncio

from fdpass.aio import AsyncChannel


def echo(channel: AsyncChannel) -> None:
    """Sends back what comes, (words, socket) each, until it is told to stop."""

    async def main() -> None:
        async with channel:
            async for words, sock in channel:
                with sock:
                    if words == "stop":
                        break
                    await channel.send((words, sock))

    asyncio.run(main())
