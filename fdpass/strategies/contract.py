"""What a strategy is to its group: the calls that the supervisor makes, in order, and what they do where a strategy needs none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fdpass.endpoint import Endpoint
    from fdpass.fds import OwnedFd


class Strategy:
    """The supervisor's side. A group of k workers has 2k lines on its board: index i uses lines i and i + k, the one while the
    other's process still drains. What a strategy does not need it leaves as it is here."""

    name: str
    held: bool  # whether a socket without its worker keeps its share of the connections waiting
    passes: bool  # whether it needs descriptors to be passed

    def bind(self, endpoint: Endpoint, workers: int, backlog: int) -> None:
        """Makes every socket the group needs, bound; consumes nothing. Raises ValueError, OSError."""

    def begin(self, board: int, lines: int) -> None:
        """The board exists: its descriptor, borrowed, and how many workers' lines it has; the group's own comes after them."""

    def listen(self) -> None:
        """Starts to listen, right before the first worker starts."""

    def share(self, index: int, line: int) -> dict[str, Any]:
        """What the process of that index, about to start on that line, gets over its control channel. What is in it is borrowed."""
        raise NotImplementedError

    def launched(self, line: int, pidfd: OwnedFd | None) -> None:
        """The process on that line was started. pidfd: borrowed; None where there is none."""

    def retire(self, line: int) -> None:
        """The process on that line is about to be told to drain: send nothing more there."""

    def ended(self, line: int) -> None:
        """The process on that line is gone, or could not be started after share(): recover what it has not received."""

    def queue(self, index: int) -> tuple[int, int | None] | None:
        """Connections that wait in that worker's listening socket, and how many may; None where nobody tells."""
        return None

    def close(self) -> None:
        """Closes what the strategy made beyond the endpoint; again does nothing."""

    def forget(self) -> None:
        """In a forked child: closes this process's copies and touches nothing else."""
        self.close()
