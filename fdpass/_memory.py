"""Large buffers of a pickle as memory: a sealed memory file, written by the sender, checked and mapped by the receiver.

It knows neither frames nor pickles.
"""

from __future__ import annotations

import fcntl
import os
from typing import Any

from fdpass import _syscall
from fdpass.errors import ProtocolError
from fdpass.fds import OwnedFd, kind_of

# Names that other systems do not have.
_fcntl: Any = fcntl
_memfd_create: Any = getattr(os, "memfd_create", None)


#: Whether this system has memory files that can be sealed.
AVAILABLE = _memfd_create is not None and hasattr(fcntl, "F_ADD_SEALS") and "no-memfd" not in _syscall.forced()


def sealed(views: list[memoryview], places: list[slice]) -> OwnedFd:
    """A file with each view at its place, which nobody can change any more. Raises OSError."""
    owned = OwnedFd(_memfd_create("fdpass-buffers", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    try:
        fd = owned.fileno()
        for view, place in zip(views, places, strict=True):
            start, rest = place.start, view
            while rest:
                written = os.pwrite(fd, rest, start)
                start, rest = start + written, rest[written:]
        fcntl.fcntl(fd, _fcntl.F_ADD_SEALS, _fcntl.F_SEAL_SEAL | _fcntl.F_SEAL_SHRINK | _fcntl.F_SEAL_GROW | _fcntl.F_SEAL_WRITE)
    except BaseException:
        owned.close()
        raise
    return owned


def mapped(owned: OwnedFd, places: list[slice]) -> list[memoryview]:
    """The buffers of a file that arrived, as one private mapping; owned may be closed afterwards. Raises ProtocolError, OSError."""
    fd = owned.fileno()
    try:
        seals = fcntl.fcntl(fd, _fcntl.F_GET_SEALS)
    except (OSError, AttributeError):
        raise ProtocolError(f"large buffers came in {kind_of(fd)}, which is no sealed memory file") from None
    # Whoever can shrink it kills its readers with SIGBUS; whoever can write it changes what was checked already.
    if missing := [name for name in ("SHRINK", "GROW", "WRITE") if not seals & getattr(fcntl, f"F_SEAL_{name}")]:
        raise ProtocolError(f"large buffers came in a memory file without the seals that keep it as it is ({', '.join(missing)})")
    size = os.fstat(fd).st_size
    if size != places[-1].stop:
        raise ProtocolError(f"large buffers of {places[-1].stop} bytes came in a memory file of {size}")
    memory = _syscall.map_privately(fd, size)
    return [memory[place] for place in places]
