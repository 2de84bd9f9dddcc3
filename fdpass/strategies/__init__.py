"""How k workers share one port. Each strategy is a file: what the supervisor prepares, and what a worker makes of it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Protocol

from fdpass.ancillary import why_no_passing
from fdpass.strategies.reuseport import Reuseport, ReuseportBare
from fdpass.strategies.shared import Shared

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdpass.channel import Channel
    from fdpass.endpoint import Endpoint
    from fdpass.listener import Listener

NAMES = ("shared", "reuseport", "reuseport-bare", "auto")
ORDERS = ("rotate", "first", "least-loaded")


class Strategy(Protocol):
    """The supervisor's side. held: a socket without its worker keeps its share of the connections waiting."""

    name: str
    held: bool
    passes: bool  # whether it needs descriptors to be passed

    def bind(self, endpoint: Endpoint, workers: int, backlog: int) -> None:
        """Makes every socket the group needs, bound; consumes nothing. Raises ValueError, OSError."""

    def listen(self) -> None:
        """Starts to listen, right before the first worker starts."""

    def share(self, index: int) -> dict[str, Any]:
        """What worker `index` gets over its control channel."""

    def close(self) -> None:
        """Closes what bind() made beyond the endpoint."""


def choose(name: str, order: str | None) -> Strategy:
    """The strategy of that name. Raises ValueError that lists the names."""
    if name not in NAMES:
        raise ValueError(f"strategy {name!r} is none of {', '.join(NAMES)}")
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


def open_share(share: dict[str, Any], line: Any, lines: Sequence[Any], channel: Channel, report: bool) -> Listener:
    """In the worker: the listener for what share() gave. Raises OSError."""
    opener = {"shared": Shared.open, "reuseport": Reuseport.open, "reuseport-bare": ReuseportBare.open}[share["strategy"]]
    return opener(share, line=line, lines=lines, channel=channel, report=report)
