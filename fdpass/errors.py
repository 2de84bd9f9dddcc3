"""Every error of fdpass's own. What the kernel refuses stays OSError with its errno; a caller's mistake is TypeError or ValueError."""

from __future__ import annotations

import signal
from typing import Any


class FdPassError(Exception):
    """What every error of fdpass's own is. Abstract: it is caught, never raised."""

    def __new__(cls, *args: Any, **kwargs: Any) -> FdPassError:
        if cls is FdPassError:
            raise TypeError("FdPassError is abstract: raise one of its subclasses")
        return super().__new__(cls)


class ClosedError(FdPassError):
    """The object was closed, released or drained in this process."""


class EndOfChannel(FdPassError, EOFError):
    """The peer closed the channel between two frames: the orderly end."""


class BrokenChannelError(FdPassError):
    """The channel ended, or timed out, inside a frame: what follows cannot be understood any more."""


class ProtocolError(FdPassError):
    """The peer's bytes, or its number of descriptors, are not what the wire format says."""


class DescriptorsLostError(FdPassError, OSError):
    """Descriptors were sent and did not arrive. Those that did arrive have been closed.

    needed: how many the sender sent (where the kernel does not say, the least it can have been: got + 1).
    got:    how many arrived before they were closed.
    limit:  the number that stood in the way: RLIMIT_NOFILE of this process, or the caller's maxfds; None when it was neither.
    data:   the bytes of the message, which are delivered whole.
    """

    def __init__(self, text: str, needed: int, got: int, limit: int | None, data: bytes = b"", errno: int = 0) -> None:
        super().__init__(text, needed, got, limit, data, errno)
        # Not through OSError's constructor: with a __new__ of one's own it reads its arguments there, and takes ours for a file name.
        self.errno, self.strerror = errno or None, text
        self.needed, self.got, self.limit, self.data = needed, got, limit, data
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._text, self.needed, self.got, self.limit, self.data, self.errno or 0)


class TicketError(FdPassError):
    """A pickled descriptor cannot be loaded: claimed already, expired, its owner gone, pickled where no carrier was."""


class PeerRefusedError(FdPassError):
    """The sender is not who this process trusts: another uid, or no credentials at all. Nothing was unpickled."""


class WrongDescriptorError(FdPassError, ValueError):
    """A descriptor is not of the kind that was asked for.

    expected, actual: what was wanted and what it is, in words.
    """

    def __init__(self, text: str, expected: str, actual: str) -> None:
        super().__init__(text)
        self.expected, self.actual = expected, actual

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.expected, self.actual)


class WorkerDied(FdPassError):
    """A watched process ended although nobody had told it to.

    name, pid:  which one.
    exitcode:   its exit status; -N when signal N killed it; None when somebody else had reaped it.
    signal:     the signal, or None.
    detail:     what else is known, for instance that it never became ready.
    """

    def __init__(self, name: str, pid: int, exitcode: int | None, detail: str = "") -> None:
        self.name, self.pid, self.exitcode, self.detail = name, pid, exitcode, detail
        self.signal = signal.Signals(-exitcode) if exitcode is not None and -exitcode in _SIGNALS else None
        if self.signal is not None:
            end = f"was killed by {self.signal.name}"
        elif exitcode is not None and exitcode < 0:
            end = f"was killed by signal {-exitcode}"
        elif exitcode is None:
            end = "ended with an exit status that somebody else collected"
        else:
            end = f"exited with code {exitcode}"
        super().__init__(f"{name} (pid {pid}) {end}{detail and ': ' + detail}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.pid, self.exitcode, self.detail)


_SIGNALS = frozenset(int(number) for number in signal.Signals)
