"""Starting a process, and learning how it ended: what multiprocessing leaves open at both ends. It knows nothing of groups."""

from __future__ import annotations

import mmap
import os
import signal
import threading
from multiprocessing import process as mp_process
from multiprocessing.reduction import ForkingPickler
from time import sleep
from typing import TYPE_CHECKING, Any

from fdpass._board import anonymous_file
from fdpass.fds import OwnedFd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from multiprocessing.process import BaseProcess
    from types import FrameType


def pidfd_of(pid: int) -> OwnedFd | None:
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return OwnedFd(os.pidfd_open(pid))
    except OSError:  # no descriptor to spare, or a fork server's child that ended at once and was collected: the sentinel must do
        return None


def exit_status(process: BaseProcess) -> int | None:
    """The status of a process that has ended, collected; None when somebody else collected it or nobody tells."""
    # Only a fork server that was stopped or killed keeps this waiting: the end of the process itself is known.
    process.join(1.0)
    # Another thread that uses multiprocessing may have collected it a moment ago and be about to write it down.
    for _ in range(100):
        if process.exitcode is not None:
            break
        sleep(0.001)
    code = process.exitcode
    if code is None:
        # multiprocessing takes it for running, and would keep its two pipes, and wait for it at exit.
        # Both private, as there is no public way: Process.close() refuses one that it takes for running.
        mp_process._children.discard(process)  # type: ignore[attr-defined]  # typeshed leaves private names out
        process._popen.close()  # type: ignore[attr-defined]  # likewise
    else:
        process.close()
    return code


class Cargo:
    """What a worker is to run, as an argument of its process. Pickled while the process is being started, so that all that
    multiprocessing passes to a child passes; a large pickle goes into a file without a name, because CPython writes arguments
    into a pipe and waits for ever on one that its reader does not empty."""

    INLINE = 1 << 15

    def __init__(self, content: tuple[Callable[..., Any], tuple[Any, ...]]) -> None:
        self.content = content
        self._file: OwnedFd | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        pickled = ForkingPickler.dumps(self.content)
        if len(pickled) <= self.INLINE:
            return _unpack, (bytes(pickled), None)
        self._file = anonymous_file("fdpass-arguments")
        with open(self._file.fileno(), "wb", closefd=False) as file:
            file.write(pickled)
        return _unpack, (b"", self._file)

    def close(self) -> None:
        """Closes the file, once the process was started."""
        if self._file is not None:
            self._file.close()


def _unpack(pickled: bytes, owned: OwnedFd | None) -> Cargo:
    if owned is None:
        return Cargo(ForkingPickler.loads(pickled))
    with owned, mmap.mmap(owned.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return Cargo(ForkingPickler.loads(content))


class SignalsHeld:
    """While sockets are bound and processes started no signal handler of Python's runs: one that raises would tear it in the middle.

    What comes is delivered afterwards; the second of a kind at once, for somebody may be tired of a start that hangs.
    SIGINT is blocked too, which the child inherits: a Ctrl-C during its start must not print a traceback per worker.
    """

    current: SignalsHeld | None = None

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._came: list[int] = []
        self._mask: Iterable[int] = ()

    def __enter__(self) -> None:
        try:
            # Elsewhere there is nothing to hold: Python runs its handlers in the main thread only.
            if threading.current_thread() is threading.main_thread():
                SignalsHeld.current = self
                for number in signal.valid_signals():
                    handler = signal.getsignal(number)
                    if callable(handler):
                        self._handlers[number] = handler
                        signal.signal(number, self._hold)
            self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        except BaseException:
            self.restore()
            raise

    def __exit__(self, *exc: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        self.restore()
        for number in self._came:
            signal.raise_signal(number)

    def restore(self) -> None:
        """Puts every handler back; a forked child does so too, where it has no mask to undo."""
        SignalsHeld.current = None
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if number in self._came:
            signal.signal(number, self._handlers[number])
            signal.raise_signal(number)
        self._came.append(number)
