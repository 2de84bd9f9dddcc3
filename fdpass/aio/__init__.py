"""fdpass for asyncio: everything public of it is here. Nothing outside this package imports asyncio."""

import asyncio

from fdpass.aio.channel import AsyncChannel, ChannelServer, open_channel, start_channel_server
from fdpass.aio.loops import EventLoop, FairSelector, new_event_loop
from fdpass.aio.server import Server, create_server, serve

__all__ = [
    "AsyncChannel",
    "ChannelServer",
    "EventLoop",
    "FairSelector",
    "Server",
    "create_server",
    "new_event_loop",
    "new_uvloop_event_loop",
    "open_channel",
    "serve",
    "start_channel_server",
]


def new_uvloop_event_loop() -> asyncio.AbstractEventLoop:
    """A new uvloop event loop whose servers share their connections fairly with other processes; else as new_event_loop().

    For `uvicorn --loop fdpass.aio:new_uvloop_event_loop`. Where the kernel has no EPOLLEXCLUSIVE, or this uvloop does not tell its
    epoll, it is uvloop's own loop, and one RuntimeWarning says so. Raises ImportError without uvloop.
    """
    from fdpass.aio.uvloops import new_loop

    return new_loop()
