"""The wire format, docs/wire.md: bytes to frames and back. Pure: it never sees a socket, a descriptor or a pickle.

A frame is a header of 16 bytes, one filler byte for every further batch of descriptors, the payload, and padding up to 192 bytes.
The first 252 descriptors ride on the header's first byte, each further batch of 252 on a filler byte of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

from fdpass.errors import ProtocolError

#: magic, version, kind, number of descriptors, payload bytes; network byte order.
_HEADER = Struct("!2sBBIQ")
_pack, _unpack = _HEADER.pack, _HEADER.unpack
HEADER_SIZE = _HEADER.size
#: Bytes of the shortest frame: whoever begins to read one may read so many. It is what fits into the memory that Linux takes for one byte.
LEAST = 192
MAGIC, VERSION = b"fd", 1

#: A payload is plain bytes, a pickle, or a pickle whose large buffers are in a memory file, the frame's last descriptor.
DATA, OBJECT, OBJECT_AND_MEMORY = 0, 1, 2

#: Descriptors in one sendmsg: Linux takes 253, others 252.
BATCH = 252

#: What an end accepts, and sends, unless told otherwise.
MAX_SIZE, MAX_FDS = 1 << 30, 16384


class Header(NamedTuple):
    """kind: DATA and so on. fds: descriptors in the whole frame. size: payload bytes. fillers: bytes between header and payload.
    padding: bytes behind it."""

    kind: int
    fds: int
    size: int
    fillers: int
    padding: int


def encode(kind: int, size: int, fds: int) -> bytes:
    """The header of a frame, 16 bytes."""
    return _pack(MAGIC, VERSION, kind, fds, size)


def decode(raw: bytes | bytearray, max_size: int, max_fds: int) -> Header:
    """Reads a header, before anything is allocated for what it announces. Raises ProtocolError."""
    magic, version, kind, fds, size = _unpack(raw)
    if magic != MAGIC:
        raise ProtocolError(f"not a frame: it starts with {magic!r} instead of {MAGIC!r}")
    if version != VERSION:
        raise ProtocolError(f"the peer speaks version {version} of the wire format, this side version {VERSION}")
    if kind > OBJECT_AND_MEMORY:
        raise ProtocolError(f"a frame of unknown kind {kind}")
    if size > max_size:
        raise ProtocolError(f"a frame announces a payload of {size} bytes; this end takes {max_size} at most")
    if fds > max_fds:
        raise ProtocolError(f"a frame announces {fds} descriptors; this end takes {max_fds} at most")
    if kind == OBJECT_AND_MEMORY and (not fds or size < _COUNT.size):
        raise ProtocolError(f"a frame with a memory file announces {fds} descriptors and {size} bytes")
    return Header(kind, fds, size, fillers(fds), padding(size, fds))


def fillers(fds: int) -> int:
    """How many filler bytes a frame with so many descriptors has."""
    return (fds - 1) // BATCH if fds else 0


def padding(size: int, fds: int) -> int:
    """How many bytes follow the payload, so that the frame is not too short."""
    return max(0, LEAST - HEADER_SIZE - fillers(fds) - size)


def batches(fds: int) -> Iterator[slice]:
    """Which descriptors ride together: the first slice on the header, one for each filler byte."""
    for start in range(0, fds, BATCH):
        yield slice(start, min(start + BATCH, fds))


# -- the large buffers of a pickle ---------------------------------------------------------------------------------------------

#: Behind the pickle stand the sizes of its large buffers and how many there are: 8 bytes for each size, 4 for the count.
_SIZE, _COUNT = Struct("!Q"), Struct("!I")
#: Every buffer starts at a multiple of this in the memory file, which ends with the last one.
ALIGNMENT = 64


def encode_sizes(sizes: list[int]) -> bytes:
    """What stands behind a pickle with large buffers."""
    return b"".join([*map(_SIZE.pack, sizes), _COUNT.pack(len(sizes))])


def decode_sizes(payload: bytes | memoryview, max_size: int) -> list[int]:
    """The sizes of the large buffers, whose sum with the payload keeps to max_size. Raises ProtocolError."""
    end = len(payload) - _COUNT.size
    (count,) = _COUNT.unpack_from(payload, end)
    start = end - count * _SIZE.size
    if not count or start < 0:
        raise ProtocolError(f"a frame with a memory file lists {count} buffers in a payload of {len(payload)} bytes")
    sizes = [size for (size,) in _SIZE.iter_unpack(memoryview(payload)[start:end])]
    if not all(sizes):
        raise ProtocolError("a frame with a memory file lists an empty buffer")
    if sum(sizes) + len(payload) > max_size:
        raise ProtocolError(f"a frame announces a payload of {sum(sizes) + len(payload)} bytes; this end takes {max_size} at most")
    return sizes


def places(sizes: list[int]) -> list[slice]:
    """Where each buffer is in the memory file."""
    found, end = [], 0
    for size in sizes:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + size
        found.append(slice(start, end))
    return found
