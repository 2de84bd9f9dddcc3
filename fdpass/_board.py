"""The load board: one mapped page that a group's workers write and their supervisor reads. A line has one writer, so no lock.

A line is a cache line of 64 bytes, of 8-byte words; aligned, so that a store is seen whole or not at all. A group of k workers has 2k + 1:
index i uses i and i + k, for its predecessor may still serve while its successor starts; the last line is the group's own.
"""

from __future__ import annotations

import mmap
import os
import tempfile

from fdpass.fds import OwnedFd

WORDS = 8
LINE = WORDS * 8
#: Words of a line. LOAD: what the server says its load is, plus one; 0 while it says nothing, and OPEN is its load. WAITING: 1 while the
#: worker is in the queue and waits. ASKED: connections that it has asked a dispatcher for, in this generation.
OPEN, ACCEPTED, HEARTBEAT, GENERATION, LOAD, WAITING, ASKED = range(7)
#: The one word of the group's own line: 1 while the dispatcher sleeps because nobody asks.
HUNGRY = 0


class Board:
    """The page, mapped. Board.create makes one, Board(owned) maps one that arrived (consumes owned)."""

    def __init__(self, owned: OwnedFd) -> None:
        self.fd = owned
        try:
            page = mmap.mmap(owned.fileno(), 0)
        except BaseException:
            owned.close()
            raise
        words = memoryview(page).cast("q")
        #: 8 words each, as many as the page has room for.
        self.lines = [words[start : start + WORDS] for start in range(0, len(words), WORDS)]
        words.release()

    @classmethod
    def create(cls, lines: int) -> Board:
        """A new page with room for so many lines, all zero. Raises OSError."""
        size = -(-lines * LINE // mmap.PAGESIZE) * mmap.PAGESIZE
        owned = anonymous_file("fdpass-board")
        try:
            os.ftruncate(owned.fileno(), size)
            if hasattr(os, "memfd_create"):
                import fcntl

                # A worker that shrank the page would kill its supervisor with SIGBUS.
                fcntl.fcntl(owned.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        except BaseException:
            owned.close()
            raise
        return cls(owned)

    def close(self) -> None:
        """Closes the descriptor. The mapping, which holds a duplicate of it, goes with the last line that somebody still reads."""
        self.lines = []
        self.fd.close()


def anonymous_file(name: str) -> OwnedFd:
    """An empty file in memory where the system has such a thing, else one without a name on disk. Raises OSError."""
    if hasattr(os, "memfd_create"):
        return OwnedFd(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    with tempfile.TemporaryFile() as file:
        return OwnedFd(os.dup(file.fileno()))
