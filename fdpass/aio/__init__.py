"""fdpass for asyncio: everything public of it is here. Nothing outside this package imports asyncio."""

from fdpass.aio.channel import AsyncChannel, ChannelServer, open_channel, start_channel_server

__all__ = ["AsyncChannel", "ChannelServer", "open_channel", "start_channel_server"]
