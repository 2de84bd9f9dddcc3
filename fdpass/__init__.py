"""fdpass: file descriptors made ordinary. Pickled, queued, sent in a message, given to a spawned worker; k workers on one port.

Everything public is here. What needs more than the calls for one message is imported when it is first used.
"""

from __future__ import annotations

import copyreg
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fdpass.ancillary import Message, recv_fds, send_fds
from fdpass.errors import (
    BrokenChannelError,
    ClosedError,
    DescriptorsLostError,
    EndOfChannel,
    FdPassError,
    PeerRefusedError,
    ProtocolError,
    TicketError,
    WorkerDied,
    WrongDescriptorError,
)
from fdpass.fds import OwnedFd
from fdpass.limits import raise_fd_limit

if TYPE_CHECKING:
    from fdpass import aio as aio
    from fdpass._store import store_stats
    from fdpass.channel import Channel, Pipe
    from fdpass.completion import wait_for_completion_or_failure
    from fdpass.endpoint import Endpoint, listen
    from fdpass.exposition import metrics
    from fdpass.handles import SocketHandle
    from fdpass.listener import Listener
    from fdpass.reduction import register, registered, unregister
    from fdpass.start import get_context
    from fdpass.workers import WorkerGroup

__version__ = "0.1.0"

__all__ = [
    "BrokenChannelError",
    "Channel",
    "ClosedError",
    "DescriptorsLostError",
    "EndOfChannel",
    "Endpoint",
    "FdPassError",
    "Listener",
    "Message",
    "OwnedFd",
    "PeerRefusedError",
    "Pipe",
    "ProtocolError",
    "SocketHandle",
    "TicketError",
    "WorkerDied",
    "WorkerGroup",
    "WrongDescriptorError",
    "get_context",
    "listen",
    "metrics",
    "raise_fd_limit",
    "recv_fds",
    "register",
    "registered",
    "send_fds",
    "store_stats",
    "unregister",
    "wait_for_completion_or_failure",
]

_LATER = {
    "Channel": "channel",
    "Endpoint": "endpoint",
    "Listener": "listener",
    "Pipe": "channel",
    "SocketHandle": "handles",
    "WorkerGroup": "workers",
    "aio": "aio",
    "get_context": "start",
    "listen": "endpoint",
    "metrics": "exposition",
    "register": "reduction",
    "registered": "reduction",
    "store_stats": "_store",
    "unregister": "reduction",
    "wait_for_completion_or_failure": "completion",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'fdpass' has no attribute {name!r}")
    value: Any = import_module(f"fdpass.{_LATER[name]}")
    if name != _LATER[name]:
        value = getattr(value, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_LATER})


def _reduce_owned(owned: OwnedFd) -> Any:
    from fdpass.handles import reduce_owned

    return reduce_owned(owned)


copyreg.pickle(OwnedFd, _reduce_owned)
