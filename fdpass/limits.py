"""The limit on open descriptors: reading it, raising it, and telling whether it is what stood in the way."""

from __future__ import annotations

import errno
import os
import resource

from fdpass import _syscall


def soft_limit() -> int:
    """The soft RLIMIT_NOFILE of this process."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_fd_limit(target: int = 65535) -> int:
    """Raises the soft RLIMIT_NOFILE towards target, as far as the hard limit allows; never lowers it. Returns the soft limit now.

    Raises TypeError or ValueError for a target that is not a positive int.
    """
    if not isinstance(target, int):
        raise TypeError(f"target is a number of descriptors (int), not {type(target).__name__}")
    if target < 1:
        raise ValueError(f"target is at least 1, not {target}")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= target:
        return soft
    wanted = target if hard == resource.RLIM_INFINITY else min(target, hard)
    if wanted > soft:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):  # macOS caps lower than the hard limit that it reports
            return soft
    return max(wanted, soft)


def lost_reason() -> tuple[str, int | None, int]:
    """Why the kernel kept descriptors back: (a sentence, the limit or None, errno). Asked before the survivors are closed."""
    # Any open descriptor will do for the try; the table is what is asked about.
    ends: tuple[int, ...] = ()
    try:
        ends = os.pipe()
        os.close(_syscall.dup(ends[0]))
    except OSError as error:
        if error.errno == errno.EMFILE:
            limit = soft_limit()
            return f"this process's table is full (RLIMIT_NOFILE is {limit})", limit, errno.EMFILE
        if error.errno == errno.ENFILE:
            return "the system's table of open files is full", None, errno.ENFILE
        raise
    finally:
        for end in ends:
            os.close(end)
    return "a security module refused them, or room came back since", None, errno.EACCES
