"""What runs in a worker's process, around the target: the setup over the control channel, the watch, SIGTERM, the end."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

from fdpass import _syscall, strategies
from fdpass._board import Board
from fdpass.errors import ClosedError
from fdpass.fds import OwnedFd

if TYPE_CHECKING:
    from types import FrameType

    from fdpass._launch import Cargo
    from fdpass.channel import Channel
    from fdpass.listener import Listener

#: How long a worker outlives its supervisor, in seconds.
GRACE = 1.0


def run(channel: Channel, cargo: Cargo) -> None:
    """What runs in the worker's process."""
    target, args = cargo.content
    # A supervisor that runs asyncio left its own, by fork: our signals would run its handlers.
    signal.set_wakeup_fd(-1)
    # The supervisor decides when to end; a target that wants the terminal's SIGINT installs a handler of its own.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    share = channel.recv(timeout=60.0)
    pidfd, board = share.pop("pidfd", None), share.pop("board", None)
    if pidfd is None and hasattr(os, "pidfd_open") and sys.platform == "linux":
        pidfd = OwnedFd(os.pidfd_open(share["supervisor"]))
    _syscall.watch_start(-1 if pidfd is None else pidfd.fileno(), channel.fileno(), share["supervisor"], GRACE)
    if pidfd is not None:
        pidfd.close()
    reports = board is None
    count = share["lines"]
    page = Board.create(count + 1) if board is None else Board(board)
    share["common"] = page.lines[count]
    listener = strategies.open_share(share, page.lines[share["line"]], page.lines[:count], channel, reports)
    os.register_at_fork(after_in_child=lambda: _in_forked_child(listener))
    signal.signal(signal.SIGTERM, _Terminate(listener))
    try:
        target(listener, *args)
    except ClosedError:
        if not listener.draining:
            raise
    finally:
        _ignore_sigterm()
        listener._close()
        page.close()
        channel.close()


class _Terminate:
    """SIGTERM in a worker: one that accepts through its listener drains; any other, and a second SIGTERM, ends as SIGTERM does.

    The supervisor's own, which comes after its order to drain, is no second one: somebody may have signalled every process of the
    group at once, and what was accepted must not be cut for it.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._first, self._supervisors = True, True

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._listener._accepting and self._may_wait():
            self._listener.drain()
        else:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    def _may_wait(self) -> bool:
        if self._first:
            self._first = False
            return True
        if self._supervisors and self._listener._has_orders():
            self._supervisors = False
            return True
        return False


def _ignore_sigterm() -> None:
    """What is left is the interpreter's own end, in which Python puts back default handlers: a SIGTERM that follows the drain closely
    would then turn a clean exit into a death by signal.

    Blocked first, and let one that came already find a handler of Python's: one that came while the handler is replaced has none, and
    Python prints a traceback.
    """
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _in_forked_child(listener: Listener) -> None:
    """In a process that a worker forks: it has a parent of its own, and its connections are counted nowhere."""
    _syscall.watch_stop(in_child=True)
    listener._uncount()
