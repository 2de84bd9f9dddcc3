"""What the two ends of a channel agree to: whom they believe, what they refuse, what is closed, and large buffers as memory."""

import fcntl
import gc
import mmap
import os
import pickle
import socket
import sys
from pathlib import Path

import numpy
import pytest

import fdpass
from fdpass import _frames, _memory, _syscall, _transit

sys.path.insert(0, str(Path(__file__).parent))  # the other test files, for what they share

import children
from test_channel import frame, peer, per_message, pipe, rights, root, somebody_else, thread, wire

__all__ = ["peer", "pipe", "wire"]

memory_files = pytest.mark.skipif(not _memory.AVAILABLE, reason="this system has no memory files that can be sealed")
MIB = 1 << 20


def pair(**terms):
    """A raw socket and a channel with these terms."""
    raw, far = socket.socketpair()
    return raw, fdpass.Channel(far, **terms)


# -------------------------------------------------------------------------------------------------------------- whom it believes


@root
@per_message
@pytest.mark.parametrize("peer", [65534, [1000, 65534], {65534}])
def test_a_named_uid_is_believed_and_no_other(wire, peer):
    path, whole = wire
    raw, channel = pair(peer=peer)
    with raw, channel:
        with somebody_else(65534, lambda: raw.sendall(frame(pickle.dumps("hello"), _frames.OBJECT))):
            assert channel.recv() == "hello"
        raw.sendall(frame(pickle.dumps("from the own uid"), _frames.OBJECT))
        assert channel.recv() == "from the own uid"
        with somebody_else(1001, lambda: raw.sendall(whole)), pytest.raises(fdpass.PeerRefusedError, match=r"uid 1001 .*65534"):
            channel.recv()
    assert not path.exists()


@root
@per_message
def test_another_uid_on_a_connected_socket_is_refused(wire, tmp_path):
    path, whole = wire
    folder = tmp_path / "open"
    folder.mkdir()
    for one in (tmp_path, *tmp_path.parents[:-1], folder):
        if one.owner() == "root":
            one.chmod(0o755)
    name = str(folder / "socket")

    def connect():
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(name)
            sock.sendall(whole)

    with socket.socket(socket.AF_UNIX) as listener:
        # Connections inherit it, so that nothing is queued before anybody asked for the sender.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        listener.bind(name)
        os.chmod(name, 0o777)
        listener.listen()
        with (
            somebody_else(65534, connect),
            fdpass.Channel(listener.accept()[0]) as channel,
            pytest.raises(fdpass.PeerRefusedError, match="uid 65534"),
        ):
            channel.recv()
    assert not path.exists()


@per_message
@pytest.mark.parametrize("receive", ["recv", "recv_message"])
def test_anonymous_credentials_are_nobodys_word_even_where_nobody_is_named(wire, receive):
    path, whole = wire
    raw, far = socket.socketpair()
    raw.sendall(whole)
    with raw, fdpass.Channel(far, peer=65534) as channel, pytest.raises(fdpass.PeerRefusedError, match="without credentials"):
        getattr(channel, receive)()
    assert not path.exists()


# -------------------------------------------------------------------------------------------------------------- messages only


def test_a_channel_without_pickles(pipe, marked, content):
    left, right = fdpass.Pipe(allow_pickle=False)
    with left, right:
        for use in (lambda: left.send(1), right.recv, lambda: next(iter(right))):
            with pytest.raises(ValueError, match=r"carries only messages \(allow_pickle=False\)"):
                use()
        left.send_message(b"words", [marked("x")])
        data, (owned,) = right.recv_message()
        with owned:
            assert (data, content(owned)) == (b"words", "x")


@pytest.mark.parametrize("kind", [_frames.OBJECT, _frames.OBJECT_AND_MEMORY])
def test_an_object_is_refused_where_only_messages_are_taken(wire, marked, kind):
    path, whole = wire
    raw, channel = pair(allow_pickle=False)
    with raw, channel:
        raw.sendmsg([frame(whole[16:], kind, 1)], rights([marked()]))
        for _ in range(2):
            with pytest.raises(fdpass.ProtocolError, match="only messages are taken"):
                channel.recv_message()
    assert not path.exists()


def passrights():
    left, right = socket.socketpair()
    with left, right:
        return _syscall.refuse_rights(left.fileno())


@pytest.mark.skipif(not passrights(), reason="SO_PASSRIGHTS came with Linux 6.16")
def test_descriptors_are_refused_on_the_senders_side(marked):
    raw, channel = pair(allow_pickle=False, max_fds=0)
    with raw, channel:
        with fdpass.Channel(fdpass.OwnedFd(os.dup(raw.fileno()))) as sender:
            with pytest.raises(PermissionError, match="the receiver accepts no descriptors"):
                sender.send_message(b"x", [marked()])
            sender.send_message(b"plain")
        assert channel.recv_message() == (b"plain", [])


def test_without_it_the_count_is_refused(marked):
    raw, channel = pair(max_fds=0)
    with raw, channel:
        raw.sendmsg([frame(b"", fds=1)], rights([marked()]))
        with pytest.raises(fdpass.ProtocolError, match="announces 1 descriptors; this end takes 0"):
            channel.recv_message()


@pytest.mark.parametrize(
    ("terms", "error"),
    [
        ({"max_size": -1}, ValueError),
        ({"max_fds": -1}, ValueError),
        ({"max_size": 1.5}, TypeError),
        ({"max_fds": True}, TypeError),
        ({"peer": "root"}, TypeError),
        ({"peer": [-1]}, ValueError),
        ({"large": 0}, ValueError),
        ({"unknown": 1}, TypeError),
    ],
)
def test_wrong_terms_are_refused_before_anything_is_taken_over(unix_pair, terms, error):
    with pytest.raises(error, match=next(iter(terms))):
        fdpass.Channel(unix_pair[0], **terms)
    assert unix_pair[0].fileno() >= 0
    with pytest.raises(error):
        fdpass.Pipe(**terms)


def test_the_terms_travel_with_the_channel(pipe):
    left, right = pipe
    near, far = fdpass.Pipe(max_size=1000, max_fds=3, peer=[7, 8], large=None)
    with near, far:
        left.send(far)
        with right.recv() as arrived:
            names = _transit.Terms.__slots__
            assert [getattr(arrived._terms, name) for name in names] == [getattr(far._terms, name) for name in names]


def test_what_is_no_channels_socket_any_more_is_refused_when_it_is_loaded(pipe, marked, unix_pair):
    left, right = pipe
    near, far = fdpass.Pipe()
    with near, far:
        left.send(far)
    data, owners = right.recv_message()
    owners[0].close()
    raw, receiver = pair()
    with raw, receiver:
        raw.sendmsg([frame(data, _frames.OBJECT, 1)], rights([marked()]))
        with pytest.raises(fdpass.WrongDescriptorError, match="a channel needs"):
            receiver.recv()


# -------------------------------------------------------------------------------------------------------------- its own ends


def doubled(channel):
    return fdpass.OwnedFd(os.dup(channel.fileno()))


@pytest.mark.parametrize("which", ["itself", "its peer"])
@pytest.mark.parametrize("many", [0, 300])
def test_an_end_of_the_channel_is_not_sent_through_it(pipe, which, many, marked):
    left, right = pipe
    fillers = [marked()] * many
    with doubled({"itself": left, "its peer": right}[which]) as end:
        for send in (
            lambda: left.send([end, *map(fdpass.OwnedFd, map(os.dup, fillers))] if not many else [end]),
            lambda: left.send_message(b"x", [*fillers, end]),
        ):
            with pytest.raises(ValueError, match="an end of this channel"):
                send()
    assert not right.poll()
    left.send("still usable")
    assert right.recv() == "still usable"


def test_the_object_itself_is_refused(pipe):
    left, right = pipe
    for end in pipe:
        with pytest.raises(ValueError, match="an end of this channel"):
            left.send({"deep": [end]})
    # Any other channel may travel.
    near, far = fdpass.Pipe()
    with near, far:
        left.send(near)
        right.recv().close()


# -------------------------------------------------------------------------------------------------------------- consume


def test_what_was_consumed_is_closed_here_and_open_there(pipe, unix_pair, marked, content):
    left, right = pipe
    near, far = fdpass.Pipe()
    items = [unix_pair[0], fdpass.SocketHandle(unix_pair[1]), fdpass.OwnedFd(os.dup(marked("mine"))), far]
    with near:
        left.send(items, consume=True)
        assert [item.fileno() for item in items] == [-1] * 4
        sock, handle, owned, channel = right.recv()
        with sock, handle, owned, channel:
            assert content(owned) == "mine"
            channel.send(1)
            assert near.recv() == 1


def test_what_could_not_be_sent_is_not_consumed(pipe, unix_pair):
    left, right = pipe
    with pytest.raises(LookupError):
        left.send([unix_pair[0], children.FailsToPickle()], consume=True)
    right.close()
    with pytest.raises(BrokenPipeError):
        left.send(unix_pair[0], consume=True)
    assert unix_pair[0].fileno() >= 0


# -------------------------------------------------------------------------------------------------------------- expect


@pytest.mark.parametrize(
    ("expect", "words"),
    [
        ((socket.AF_INET, None, None), r"a socket \(AF_INET\) was expected, a socket \(AF_UNIX, SOCK_STREAM, not listening\) arrived"),
        ((None, socket.SOCK_DGRAM, None), r"SOCK_DGRAM"),
        ((None, None, True), r"a socket \(listening\) was expected"),
        ((socket.AF_UNIX, socket.SOCK_STREAM, True), r"listening\) was expected"),
    ],
)
@pytest.mark.parametrize("kind", ["handle", "owned"])
def test_another_kind_than_expected_is_closed(pipe, unix_pair, expect, words, kind):
    left, right = pipe
    with fdpass.SocketHandle(unix_pair[0]) as handle, fdpass.OwnedFd(os.dup(unix_pair[0].fileno())) as owned:
        left.send(handle if kind == "handle" else owned)
    item = right.recv()
    with pytest.raises(fdpass.WrongDescriptorError, match=words):
        item.open(expect=expect) if kind == "handle" else item.to_socket(expect=expect)
    assert item.fileno() == -1


def test_what_was_expected_is_opened(unix_pair):
    with fdpass.SocketHandle(unix_pair[0]) as handle, handle.open(expect=(socket.AF_UNIX, socket.SOCK_STREAM, False)) as sock:
        assert children.cookie(sock) == children.cookie(unix_pair[0])
    with socket.create_server(("127.0.0.1", 0)) as server, fdpass.OwnedFd(os.dup(server.fileno())) as owned:
        owned.to_socket(expect=(None, None, True)).close()
    for wrong in (True, (socket.AF_UNIX,), [None, None, None]):
        with fdpass.SocketHandle(unix_pair[0]) as handle, pytest.raises(TypeError, match="expect is a tuple"):
            handle.open(expect=wrong)
    with fdpass.OwnedFd(os.memfd_create("no socket")) as owned:
        with pytest.raises(fdpass.WrongDescriptorError, match="a regular file arrived"):
            owned.to_socket(expect=(None, None, None))
        assert owned.fileno() == -1


# -------------------------------------------------------------------------------------------------------------- large buffers


def maps():
    """How many memory files of channels this process has mapped."""
    return Path("/proc/self/maps").read_text().count("memfd:fdpass-buffers")


@memory_files
def test_a_large_array_arrives_as_memory_and_lives_as_long_as_somebody_looks(pipe, fd_count):
    left, right = pipe
    array = numpy.arange(MIB, dtype="u4").reshape(1024, 1024)
    before = fd_count()
    left.send({"array": array, "again": array})
    got = right.recv()
    assert got["array"] is got["again"]
    assert maps() == 1
    # A mapping needs no descriptor.
    assert fd_count() == before
    assert numpy.array_equal(got["array"], array)
    got["array"][0, 0] = 7  # private: nobody else sees it
    part = got.pop("array")[5:7]
    del got
    gc.collect()
    assert maps() == 1
    assert part[0, 0] == 5 * 1024
    del part
    gc.collect()
    assert maps() == 0
    assert array[0, 0] == 0


@memory_files
def test_several_buffers_are_one_file(pipe, unix_pair):
    left, right = pipe
    items = [bytearray(os.urandom(MIB + place)) for place in range(5)]
    views = [pickle.PickleBuffer(item) for item in items]
    left.send([unix_pair[0], *views, pickle.PickleBuffer(bytes(items[0])), "small", numpy.arange(5)])
    sock, *got, readonly, small, few = right.recv()
    sock.close()
    assert maps() == 1
    assert got == items
    assert (readonly, small, few.tolist()) == (items[0], "small", [0, 1, 2, 3, 4])
    assert [view.readonly for view in [*got, readonly]] == [False] * 5 + [True]


@memory_files
def test_a_memoryview_is_a_large_buffer_too(pipe):
    left, right = pipe
    data = bytes(range(256)) * 8192
    left.send([memoryview(data), memoryview(data)[::2], memoryview(b"small")])
    whole, half, small = right.recv()
    assert [type(item) for item in (whole, half, small)] == [memoryview] * 3
    assert (whole, half, small) == (data, data[::2], b"small")


@pytest.mark.parametrize("terms", [{"large": None}, {"max_fds": 0}])
def test_without_memory_files_everything_is_copied(terms):
    left, right = fdpass.Pipe(**terms)
    array = numpy.arange(MIB)
    with left, right:
        with thread(left.send, [array, pickle.PickleBuffer(bytearray(MIB))]):
            got, copied = right.recv()
        assert maps() == 0
        assert numpy.array_equal(got, array)
        assert copied == bytes(MIB)


def test_large_buffers_count_as_payload():
    left, right = fdpass.Pipe(max_size=2 * MIB)
    with left, right:
        left.send(numpy.zeros(MIB + 1, dtype="u1"))
        assert right.recv().nbytes == MIB + 1
        with pytest.raises(ValueError, match="max_size"):
            left.send(numpy.zeros(2 * MIB, dtype="u1"))
        left.send("goes on")
        assert right.recv() == "goes on"


def sealed_file(data, seals):
    owned = fdpass.OwnedFd(os.memfd_create("somebody's", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.pwrite(owned.fileno(), data, 0)
    fcntl.fcntl(owned.fileno(), fcntl.F_ADD_SEALS, seals)
    return owned


ALL = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE if _memory.AVAILABLE else 0


def with_memory(sizes, path):
    """The payload of an object with large buffers that would trip a wire."""
    return pickle.dumps(children.Tripwire(str(path)), 5) + _frames.encode_sizes(sizes)


@memory_files
@pytest.mark.parametrize(
    ("make", "sizes", "words"),
    [
        (lambda: sealed_file(bytes(100), ALL & ~fcntl.F_SEAL_SHRINK), [100], r"without the seals .* \(SHRINK\)"),
        (lambda: sealed_file(bytes(100), fcntl.F_SEAL_SHRINK), [100], r"without the seals .* \(GROW, WRITE\)"),
        (lambda: sealed_file(bytes(99), ALL), [100], "100 bytes came in a memory file of 99"),
        (lambda: sealed_file(bytes(200), ALL), [100], "100 bytes came in a memory file of 200"),
        (lambda: fdpass.OwnedFd(os.open("/etc/hosts", os.O_RDONLY)), [100], "which is no sealed memory file"),
        (lambda: fdpass.OwnedFd(socket.socket().detach()), [100], "in a socket, which is no sealed memory file"),
        (lambda: sealed_file(bytes(100), ALL), [], "lists 0 buffers"),
        (lambda: sealed_file(bytes(100), ALL), [100, 0], "an empty buffer"),
        (lambda: sealed_file(bytes(100), ALL), [1 << 62], "payload of 4611686018427"),
        (lambda: sealed_file(bytes(100), ALL), [1 << 63, 1 << 63], "payload of"),
    ],
)
def test_a_memory_file_that_is_not_what_it_should_be_is_refused(peer, tmp_path, make, sizes, words):
    raw, channel = peer
    payload = with_memory(sizes, tmp_path / "wire")
    with make() as owned:
        raw.sendmsg([frame(payload, _frames.OBJECT_AND_MEMORY, 1)], rights([owned.fileno()]))
    for _ in range(2):
        with pytest.raises(fdpass.ProtocolError, match=words):
            channel.recv()
    assert not (tmp_path / "wire").exists()


def test_a_count_of_buffers_past_the_payload_is_refused(peer, marked):
    raw, channel = peer
    raw.sendmsg([frame(b"\xff" * 50, _frames.OBJECT_AND_MEMORY, 1)], rights([marked()]))
    with pytest.raises(fdpass.ProtocolError, match="lists 4294967295 buffers in a payload of 50 bytes"):
        channel.recv()


@memory_files
def test_received_as_a_message_it_is_the_pickle_and_the_file(pipe):
    left, right = pipe
    left.send(numpy.zeros(MIB))
    data, (owned,) = right.recv_message()
    with owned, mmap.mmap(owned.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        assert pickle.loads(data, buffers=[memory]).nbytes == len(memory)


# -------------------------------------------------------------------------------------------------------------- many


def test_ten_thousand_descriptors_in_one_frame(limit_nofile, pipe, marked, content):
    left, right = pipe
    files = [marked(str(place)) for place in range(101)]
    numbers = [files[place % 101] for place in range(10_000)]
    with limit_nofile(11_000):
        with thread(left.send_message, b"many", numbers):
            data, owners = right.recv_message()
        assert data == b"many"
        assert [content(owned) for owned in owners] == [str(place % 101) for place in range(10_000)]
        for owned in owners:
            owned.close()


def test_a_header_that_claims_2_to_the_62_costs_nothing():
    import tracemalloc

    for max_size in (_frames.MAX_SIZE, 1 << 63):
        raw, channel = pair(max_size=max_size)
        raw.sendall(_frames.encode(_frames.DATA, 1 << 62, 0) + b"and so on")
        raw.close()
        tracemalloc.start()
        try:
            with channel, pytest.raises((fdpass.ProtocolError, fdpass.BrokenChannelError)):
                channel.recv_message()
            assert tracemalloc.get_traced_memory()[1] < MIB
        finally:
            tracemalloc.stop()


def test_descriptors_on_every_byte_of_a_header_are_bounded(peer, marked):
    raw, channel = peer
    fds = [marked()] * 253
    whole = frame(b"x", fds=1)
    for place in range(10):
        raw.sendmsg([whole[place : place + 1]], rights(fds))
    with pytest.raises(fdpass.ProtocolError, match="506 descriptors before its header is whole"):
        channel.recv_message()
