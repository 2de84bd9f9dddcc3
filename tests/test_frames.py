"""The wire format alone: a header comes back as it was written, and any other sixteen bytes are a ProtocolError or a header."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fdpass import _frames
from fdpass.errors import ProtocolError

KINDS = st.sampled_from([_frames.DATA, _frames.OBJECT])
SIZES = st.integers(0, _frames.MAX_SIZE)
COUNTS = st.integers(0, _frames.MAX_FDS)


def decode(raw, max_size=_frames.MAX_SIZE, max_fds=_frames.MAX_FDS):
    return _frames.decode(raw, max_size, max_fds)


@given(KINDS, SIZES, COUNTS)
@example(_frames.DATA, 0, 0)
@example(_frames.OBJECT, _frames.MAX_SIZE, _frames.MAX_FDS)
def test_a_header_comes_back_as_it_was_written(kind, size, fds):
    raw = _frames.encode(kind, size, fds)
    assert len(raw) == _frames.HEADER_SIZE == 16
    header = decode(raw)
    assert header == (kind, fds, size, _frames.fillers(fds), _frames.padding(size, fds))
    whole = len(raw) + header.fillers + size + header.padding
    assert whole == _frames.LEAST if header.padding else whole >= _frames.LEAST
    assert decode(bytearray(raw)) == decode(raw)


def test_the_bytes_are_these():
    # Two versions of the package may talk to each other: what is on the wire is fixed here, byte by byte.
    assert _frames.encode(_frames.OBJECT, 0x0102030405060708, 0x0A0B0C0D) == b"fd\x01\x01\x0a\x0b\x0c\x0d\x01\x02\x03\x04\x05\x06\x07\x08"


@pytest.mark.parametrize("place", range(16))
@given(KINDS, SIZES, COUNTS, st.integers(1, 255))
def test_one_byte_wrong(place, kind, size, fds, flip):
    raw = bytearray(_frames.encode(kind, size, fds))
    raw[place] ^= flip
    if place < 3:
        with pytest.raises(ProtocolError):
            decode(raw)
        return
    # Beyond magic and version the wrong byte may make a frame, but never the same one.
    try:
        found = decode(raw)
    except ProtocolError:
        return
    assert found != (kind, fds, size, _frames.fillers(fds))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"FD" + bytes([1, 0]) + bytes(12), r"not a frame: it starts with b'FD' instead of b'fd'"),
        (b"GET / HTTP/1.1\r\n", r"not a frame: it starts with b'GE'"),
        (b"fd" + bytes([2, 0]) + bytes(12), r"version 2 .* this side version 1"),
        (b"fd" + bytes([0, 0]) + bytes(12), r"version 0"),
        (b"fd" + bytes([1, 3]) + bytes(12), r"unknown kind 3"),
        (_frames.encode(_frames.OBJECT_AND_MEMORY, 20, 0), r"memory file announces 0 descriptors"),
        (_frames.encode(_frames.OBJECT_AND_MEMORY, 3, 1), r"memory file announces 1 descriptors and 3 bytes"),
        (_frames.encode(_frames.DATA, 1 << 62, 0), r"payload of 4611686018427387904 bytes; this end takes 1073741824"),
        (_frames.encode(_frames.DATA, 0, 0xFFFFFFFF), r"announces 4294967295 descriptors; this end takes 16384"),
    ],
)
def test_each_refusal_says_what_was_wrong(raw, words):
    with pytest.raises(ProtocolError, match=words):
        decode(raw)


@given(st.binary(min_size=16, max_size=16) | st.binary(min_size=12, max_size=12).map(lambda rest: b"fd\x01\x01" + rest))
def test_garbage_is_a_protocol_error_or_a_header_and_nothing_else(raw):
    try:
        header = decode(raw)
    except ProtocolError:
        return
    assert header.kind in (_frames.DATA, _frames.OBJECT, _frames.OBJECT_AND_MEMORY)
    assert 0 <= header.size <= _frames.MAX_SIZE
    assert 0 <= header.fds <= _frames.MAX_FDS
    assert _frames.encode(header.kind, header.size, header.fds) == raw


@pytest.mark.parametrize("limit", [0, 1, 1000])
def test_a_limit_is_the_last_value_that_passes(limit):
    assert decode(_frames.encode(_frames.DATA, limit, limit), limit, limit)[:3] == (_frames.DATA, limit, limit)
    with pytest.raises(ProtocolError, match="bytes"):
        decode(_frames.encode(_frames.DATA, limit + 1, limit), limit, limit)
    with pytest.raises(ProtocolError, match="descriptors"):
        decode(_frames.encode(_frames.DATA, limit, limit + 1), limit, limit)


@pytest.mark.parametrize(("fds", "batches"), [(0, 0), (1, 1), (252, 1), (253, 2), (504, 2), (505, 3), (10000, 40)])
def test_batches_and_fillers(fds, batches):
    slices = list(_frames.batches(fds))
    assert len(slices) == batches
    # The first batch rides on the header, each further one has a byte of its own to ride on.
    assert _frames.fillers(fds) == max(0, batches - 1)
    assert [number for one in slices for number in range(fds)[one]] == list(range(fds))
    assert all(0 < one.stop - one.start <= _frames.BATCH for one in slices)


@given(COUNTS)
def test_every_descriptor_rides_once_and_in_order(fds):
    slices = list(_frames.batches(fds))
    assert [number for one in slices for number in range(fds)[one]] == list(range(fds))
    assert _frames.fillers(fds) == max(0, len(slices) - 1)
