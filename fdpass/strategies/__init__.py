"""How k workers share one port. Each strategy is a file: what the supervisor prepares, and what a worker makes of it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from fdpass import _syscall
from fdpass.ancillary import why_no_passing
from fdpass.strategies import dispatch
from fdpass.strategies.contract import Strategy as Strategy
from fdpass.strategies.dispatch import Dispatch
from fdpass.strategies.reuseport import Reuseport, ReuseportBare
from fdpass.strategies.shared import Shared

if TYPE_CHECKING:
    from fdpass.channel import Channel
    from fdpass.listener import Listener

NAMES = ("shared", "reuseport", "reuseport-bare", "dispatch", "auto")
ORDERS = ("rotate", "first")


def choose(name: str, order: str | None, credits: int | None = None) -> Strategy:
    """The strategy of that name. Raises ValueError that lists the names, TypeError."""
    if name not in NAMES:
        raise ValueError(f"strategy {name!r} is none of {', '.join(NAMES)}")
    if credits is not None and name != "dispatch":
        raise ValueError(f"credits={credits!r} belongs to strategy 'dispatch'; under {name!r} a worker accepts for itself")
    if name == "dispatch":
        return _dispatch(order or dispatch.ORDERS[0], 1 if credits is None else credits)
    if order is not None and order not in ORDERS:
        raise ValueError(f"order {order!r} is none of {', '.join(ORDERS)}")
    if order is not None and name not in ("shared", "auto"):
        raise ValueError(f"order={order!r} belongs to strategy 'shared'; {name!r} has no queue to order")
    if name == "auto":
        reason = why_no_passing()
        name = "shared"
        if reason is not None:
            name = "reuseport-bare"
            warnings.warn(
                f"descriptors cannot be passed here ({reason}): each worker binds its own socket (reuseport-bare)",
                RuntimeWarning,
                stacklevel=4,
            )
    if name == "shared":
        return Shared(order or "rotate")
    return Reuseport() if name == "reuseport" else ReuseportBare()


def _dispatch(order: str, credits: int) -> Dispatch:
    if order not in dispatch.ORDERS:
        raise ValueError(f"order {order!r} of strategy 'dispatch' is none of {', '.join(dispatch.ORDERS)}")
    if not isinstance(credits, int) or isinstance(credits, bool):
        raise TypeError(f"credits is a number (int), not {type(credits).__name__}")
    if not 1 <= credits <= _syscall.CREDITS:
        raise ValueError(f"credits is 1 to {_syscall.CREDITS}, not {credits}")
    return Dispatch(order, credits)


def open_share(share: dict[str, Any], line: Any, lines: list[Any], channel: Channel, report: bool) -> Listener:
    """In the worker: the listener for what share() gave. line: its own on the board, one of lines, those of all workers. Raises OSError."""
    openers = {"shared": Shared.open, "reuseport": Reuseport.open, "reuseport-bare": ReuseportBare.open, "dispatch": Dispatch.open}
    return openers[share["strategy"]](share, line=line, lines=lines, channel=channel, report=report)
