"""fdpass for asyncio: everything public of it is here. Nothing outside this package imports asyncio."""

from fdpass.aio.channel import AsyncChannel, ChannelServer, open_channel, start_channel_server
from fdpass.aio.server import Server, create_server, serve

__all__ = ["AsyncChannel", "ChannelServer", "Server", "create_server", "open_channel", "serve", "start_channel_server"]
