"""How k workers share one port. Each strategy is a file: what the supervisor prepares, and what a worker makes of it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Protocol

from fdpass import _syscall
from fdpass.ancillary import why_no_passing
from fdpass.strategies import dispatch
from fdpass.strategies.dispatch import Dispatch
from fdpass.strategies.reuseport import Reuseport, ReuseportBare
from fdpass.strategies.shared import Shared

if TYPE_CHECKING:
    from fdpass.channel import Channel
    from fdpass.endpoint import Endpoint
    from fdpass.listener import Listener

NAMES = ("shared", "reuseport", "reuseport-bare", "dispatch", "auto")
ORDERS = ("rotate", "first")


class Strategy(Protocol):
    """The supervisor's side. held: a socket without its worker keeps its share of the connections waiting."""

    name: str
    held: bool
    passes: bool  # whether it needs descriptors to be passed

    def bind(self, endpoint: Endpoint, workers: int, backlog: int) -> None:
        """Makes every socket the group needs, bound; consumes nothing. Raises ValueError, OSError."""

    def listen(self) -> None:
        """Starts to listen, right before the first worker starts."""

    def begin(self, board: int, lines: int) -> None:
        """Before listen(): the board's descriptor, borrowed, and how many lines workers have in it."""

    def share(self, index: int, line: int) -> dict[str, Any]:
        """What worker `index` gets over its control channel; its words are in that line of the board."""

    def launched(self, line: int, pidfd: int | None) -> None:
        """The process on that line has started; pidfd is borrowed."""

    def retire(self, line: int) -> None:
        """The process on that line is to get no more connections."""

    def ended(self, line: int) -> None:
        """The process on that line is gone."""

    def forget(self) -> None:
        """In a forked child: closes what the strategy holds, and touches nothing of the parent's."""

    def close(self) -> None:
        """Closes what bind() made beyond the endpoint."""


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


def open_share(share: dict[str, Any], line: Any, lines: Any, channel: Channel, report: bool) -> Listener:
    """In the worker: the listener for what share() gave. lines: those of all workers. Raises OSError."""
    if share["strategy"] == "dispatch":
        return Dispatch.open(share, line=line, lines=lines, channel=channel, report=report)
    opener = {"shared": Shared.open, "reuseport": Reuseport.open, "reuseport-bare": ReuseportBare.open}[share["strategy"]]
    return opener(share, line=line, channel=channel, report=report)
