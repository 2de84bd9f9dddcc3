"""A conversation: each frame arrives whole, in order and with its descriptors, or a named error says what happened and nothing leaks."""

import array
import collections
import contextlib
import errno
import multiprocessing
import os
import pickle
import select
import signal
import socket
import ssl
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fdpass
from fdpass import _frames, _syscall

sys.path.insert(0, str(Path(__file__).parent))  # children.py, whose classes are pickled by name

import children

FIVE_MB = 5_000_000


@pytest.fixture
def pipe():
    """Two channels, closed afterwards."""
    left, right = fdpass.Pipe()
    with left, right:
        yield left, right


@pytest.fixture
def peer():
    """(raw, channel): a plain socket plays the peer of a channel."""
    raw, far = socket.socketpair()
    channel = fdpass.Channel(far)
    with raw, channel:
        yield raw, channel


@pytest.fixture
def room(limit_nofile):
    """Room for what the test opens, where the limit is the usual 1024."""
    with limit_nofile(4096):
        yield


def rights(fds):
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []


def frame(data, kind=_frames.DATA, fds=0):
    """The bytes of a frame."""
    return _frames.encode(kind, len(data), fds) + bytes(_frames.fillers(fds)) + data + bytes(_frames.padding(len(data), fds))


def write_bytewise(raw, data, fds=()):
    """One sendmsg for each byte, the descriptors where the format wants them."""
    riding = {0 if place == 0 else _frames.HEADER_SIZE + place - 1: fds[batch] for place, batch in enumerate(_frames.batches(len(fds)))}
    for place in range(len(data)):
        raw.sendmsg([data[place : place + 1]], rights(riding.get(place, ())))


def close_all(items):
    for item in items:
        item.close()


@contextlib.contextmanager
def thread(function, *args):
    """function(*args) in a thread; on the way out it is joined and what it raised is raised."""
    raised = []

    def run():
        try:
            function(*args)
        except BaseException as error:
            raised.append(error)

    running = threading.Thread(target=run)
    running.start()
    try:
        yield running
    finally:
        running.join()
    if raised:
        raise raised.pop()


def fails_for_good(channel, error, words):
    """Every further receive tells the same."""
    for receive in (channel.recv, channel.recv_message):
        with pytest.raises(error, match=words):
            receive(timeout=0)


# -------------------------------------------------------------------------------------------------------------- whole frames


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 175, 176, 177, 65536, 65537, 200_000])
def test_messages_come_back(pipe, size):
    left, right = pipe
    data = os.urandom(size)
    with thread(left.send_message, data):
        got = right.recv_message()
    assert got == (data, [])
    assert type(got[0]) is bytes


@settings(max_examples=30)
@given(st.lists(st.binary(max_size=300), max_size=8))
def test_several_frames_keep_their_borders(messages):
    left, right = fdpass.Pipe()
    with left, right:
        for data in messages:
            left.send_message(data)
        left.close()
        assert [right.recv_message()[0] for _ in messages] == messages
        with pytest.raises(fdpass.EndOfChannel):
            right.recv_message()


@pytest.mark.parametrize("make", [bytearray, memoryview, lambda data: array.array("B", data), lambda data: memoryview(data + data)[::2]])
def test_any_buffer_is_a_message(pipe, make):
    left, right = pipe
    given_ = make(bytes(range(10)))
    left.send_message(given_)
    assert right.recv_message() == (memoryview(given_).tobytes(), [])


@pytest.mark.parametrize("obj", [None, 0, "words", [1, {"two": (3,)}], b"\0" * 1000, {1: set()}])
def test_objects_come_back_in_both_directions(pipe, obj):
    left, right = pipe
    left.send(obj)
    right.send([obj])
    assert right.recv() == obj
    assert left.recv() == [obj]


def test_five_megabytes_both_ways_at_once(pipe):
    left, right = pipe
    there, back = os.urandom(FIVE_MB), os.urandom(FIVE_MB)
    with thread(left.send_message, there), thread(right.send, back):
        assert right.recv_message() == (there, [])
        assert left.recv() == back


@pytest.mark.parametrize("count", [0, 1, 253])
def test_a_byte_at_a_time(peer, marked, content, count):
    raw, channel = peer
    fds = [marked(str(place)) for place in range(count)]
    with thread(write_bytewise, raw, frame(b"a message", fds=count), fds):
        data, owners = channel.recv_message()
    assert data == b"a message"
    assert [content(owned) for owned in owners] == [str(place) for place in range(count)]
    close_all(owners)


def test_an_object_a_byte_at_a_time(peer):
    raw, channel = peer
    with thread(write_bytewise, raw, frame(pickle.dumps({"a": 1}), _frames.OBJECT)):
        assert channel.recv() == {"a": 1}


def test_trailing_frames_wait_their_turn(peer, marked, content):
    raw, channel = peer
    fd = marked("mine")
    # One write holds a frame, the next and half a third; the descriptor rides on a later write, with the rest.
    third = frame(b"third")
    raw.sendall(frame(b"first") + frame(b"", _frames.DATA) + third[:18])
    raw.sendall(third[18:])
    raw.sendmsg([frame(b"fourth", fds=1) + frame(b"fifth")], rights([fd]))
    assert [channel.recv_message() for _ in range(3)] == [(b"first", []), (b"", []), (b"third", [])]
    data, (owned,) = channel.recv_message()
    assert (data, content(owned)) == (b"fourth", "mine")
    owned.close()
    assert channel.recv_message() == (b"fifth", [])


# -------------------------------------------------------------------------------------------------------------- descriptors


@pytest.mark.parametrize("count", [0, 1, 252, 253, 600])
@pytest.mark.parametrize("size", [0, 10, 100_000])
def test_descriptors_arrive_in_order_close_on_exec_and_owned(pipe, marked, content, room, count, size):
    left, right = pipe
    fds = [marked(str(place)) for place in range(count)]
    data = os.urandom(size)
    with thread(left.send_message, data, fds):
        got, owners = right.recv_message()
    assert got == data
    assert [content(owned) for owned in owners] == [str(place) for place in range(count)]
    assert all(type(owned) is fdpass.OwnedFd and owned.fileno() >= 3 and not os.get_inheritable(owned.fileno()) for owned in owners)
    assert not {owned.fileno() for owned in owners} & set(fds)
    close_all(owners)


def test_frames_with_many_batches_follow_each_other(pipe, marked, content):
    left, right = pipe
    fds = [marked(str(place)) for place in range(300)]
    with thread(lambda: [left.send_message(b"%d" % count, fds[:count]) for count in (253, 0, 300, 1)]):
        for count in (253, 0, 300, 1):
            data, owners = right.recv_message()
            assert data == b"%d" % count
            assert [content(owned) for owned in owners] == [str(place) for place in range(count)]
            close_all(owners)


def test_sockets_in_objects_are_the_same_sockets(pipe, unix_pair):
    left, right = pipe
    sock = unix_pair[0]
    left.send({"deep": [(sock, 5)]})
    with right.recv()["deep"][0][0] as arrived:
        assert type(arrived) is socket.socket
        assert arrived.fileno() != sock.fileno()
        assert children.cookie(arrived) == children.cookie(sock)
    # What was sent stays the sender's.
    assert sock.fileno() >= 0


def test_300_sockets_in_one_object_keep_their_order(pipe):
    left, right = pipe
    socks = [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(300)]
    with thread(left.send, socks):
        arrived = right.recv()
    assert [children.cookie(sock) for sock in arrived] == [children.cookie(sock) for sock in socks]
    close_all(socks + arrived)


@pytest.mark.parametrize("timeout", [None, 0.0, 1.5])
def test_a_sockets_timeout_is_kept_and_no_flag_flipped(pipe, unix_pair, timeout):
    left, right = pipe
    sock = unix_pair[0]
    sock.settimeout(timeout)
    with fdpass.SocketHandle(sock) as handle:
        left.send([sock, handle])
    first, second = right.recv()
    with first, second.open() as opened:
        assert first.gettimeout() == opened.gettimeout() == timeout
        assert os.get_blocking(sock.fileno()) == (timeout is None)
    assert sock.gettimeout() == timeout


def test_every_kind_travels(pipe, unix_pair, marked, content):
    left, right = pipe
    near, far = fdpass.Pipe()
    reader, writer = multiprocessing.Pipe(duplex=False)
    framed = children.Framed(fileno=os.dup(unix_pair[1].fileno()))
    framed.label = "kept"
    with framed, near, far, reader, writer, fdpass.OwnedFd(os.dup(marked("mine"))) as owned, fdpass.SocketHandle(unix_pair[0]) as handle:
        left.send({"handle": handle, "owned": owned, "channel": far, "connection": writer, "framed": framed})
        got = right.recv()
        assert type(got["handle"]) is fdpass.SocketHandle
        with got["handle"].open() as sock:
            assert children.cookie(sock) == children.cookie(unix_pair[0])
        with got["owned"] as arrived:
            assert type(arrived) is fdpass.OwnedFd
            assert content(arrived) == "mine"
        with got["channel"] as arrived:
            arrived.send("through a channel that came through a channel")
            assert near.recv() == "through a channel that came through a channel"
        with got["connection"] as arrived:
            assert (arrived.readable, arrived.writable) == (False, True)
            arrived.send(1)
            assert reader.recv() == 1
        with got["framed"] as arrived:
            assert type(arrived) is children.Framed
            assert arrived.label == "kept"
            assert children.cookie(arrived) == children.cookie(framed)


def test_the_same_object_twice_is_one_and_two_objects_are_two(pipe, unix_pair):
    left, right = pipe
    sock = unix_pair[0]
    with fdpass.SocketHandle(sock) as handle, fdpass.OwnedFd(os.dup(sock.fileno())) as owned:
        left.send([sock, sock, handle, {"again": handle}, owned, owned])
    first, again, handle, inner, owned, owned_again = right.recv()
    assert first is again
    assert inner["again"] is handle
    assert owned_again is owned
    cookies = {children.cookie(item) for item in (first, handle, owned)}
    assert cookies == {children.cookie(sock)}
    assert len({item.fileno() for item in (first, handle, owned)}) == 3
    close_all([first, handle, owned])


def test_a_handle_that_exists_only_while_it_is_pickled(pipe, unix_pair):
    left, right = pipe
    left.send([children.Temporary(unix_pair[0]), children.Temporary(unix_pair[1])])
    first, second = right.recv()
    with first, second:
        assert [children.cookie(sock) for sock in (first, second)] == [children.cookie(sock) for sock in unix_pair]


def test_what_nothing_claims_is_closed(pipe, unix_pair):
    left, right = pipe
    left.send(children.ForgetsOnLoading(unix_pair[0]))
    assert right.recv() == "('frame', 0)"
    left.send([children.FailsToLoad(unix_pair[0]), unix_pair[1]])
    with pytest.raises(LookupError):
        right.recv()
    # What an object does when it is loaded is no matter of the channel, which goes on.
    left.send("next")
    assert right.recv() == "next"


def test_an_object_received_as_a_message_is_its_pickle(pipe, unix_pair):
    left, right = pipe
    left.send(["words"])
    assert pickle.loads(right.recv_message()[0]) == ["words"]
    left.send(unix_pair[0])
    data, (owned,) = right.recv_message()
    with owned:
        assert b"frame" in data


def test_a_plain_message_is_no_object(pipe, marked):
    left, right = pipe
    left.send_message(pickle.dumps("words"), [marked("x")])
    with pytest.raises(fdpass.ProtocolError, match=r"receive it with recv_message\(\)"):
        right.recv()


# -------------------------------------------------------------------------------------------------------------- refused by the sender


def nothing_was_sent(left, right):
    """The next frame is the first that the peer sees."""
    assert not right.poll()
    left.send("first")
    assert right.recv() == "first"


def test_an_ssl_socket_is_refused(pipe, unix_pair):
    left, right = pipe
    context = ssl.create_default_context()
    context.check_hostname = False
    with context.wrap_socket(unix_pair[0], do_handshake_on_connect=False) as wrapped:
        with pytest.raises(TypeError, match=r"an SSLSocket cannot be passed.*before wrap_socket\(\)"):
            left.send([unix_pair[1], {"deep": wrapped}])
        with pytest.raises(TypeError, match="SSLSocket"):
            fdpass.Channel(wrapped)
        assert wrapped.fileno() >= 0
    nothing_was_sent(left, right)


def test_whatever_is_closed_is_refused(pipe, unix_pair):
    left, right = pipe
    near, far = fdpass.Pipe()
    reader, writer = multiprocessing.Pipe()
    sock, owned, handle = socket.socket(), fdpass.OwnedFd(os.dup(0)), fdpass.SocketHandle(unix_pair[0])
    close_all([near, far, reader, writer, sock, owned, handle])
    for item, error in [
        (sock, ValueError),
        (owned, fdpass.ClosedError),
        (handle, fdpass.ClosedError),
        (far, fdpass.ClosedError),
        (writer, ValueError),
    ]:
        with pytest.raises(error, match="closed"):
            left.send([unix_pair[1], item])
    with pytest.raises(ValueError, match="closed"):
        left.send_message(b"", [sock])
    with pytest.raises(ValueError, match="negative"):
        left.send_message(b"", [-1])
    with pytest.raises(TypeError, match="not str"):
        left.send_message(b"", ["0"])
    with pytest.raises(TypeError):
        left.send_message("text")
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        left.send([unix_pair[1], lambda: None])
    nothing_was_sent(left, right)


def test_a_number_that_is_not_open_is_the_kernels_refusal(pipe):
    left, right = pipe
    with pytest.raises(OSError, match=r"descriptor 1000000 \(2 of 2\) is not open; nothing was sent") as caught:
        left.send_message(b"x", [0, 1_000_000])
    assert caught.value.errno == errno.EBADF
    nothing_was_sent(left, right)


def test_beyond_the_limits_nothing_is_sent(marked):
    left, right = fdpass.Pipe(max_size=100, max_fds=2)
    with left, right:
        with pytest.raises(ValueError, match=r"101 bytes: this channel sends 100 at most \(max_size\)"):
            left.send_message(bytes(101))
        with pytest.raises(ValueError, match=r"3 descriptors in one frame: this channel sends 2 at most \(max_fds\)"):
            left.send_message(b"", [0, 1, 2])
        with pytest.raises(ValueError, match="max_size"):
            left.send("x" * 200)
        nothing_was_sent(left, right)
        left.send_message(bytes(100), [marked("a"), marked("b")])
        data, owners = right.recv_message()
        assert (data, len(owners)) == (bytes(100), 2)
        close_all(owners)


# -------------------------------------------------------------------------------------------------------------- refused by the receiver


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"XX" + bytes(14), "not a frame"),
        (b"fd\x09\x00" + bytes(12), "version 9"),
        (b"fd\x01\x07" + bytes(12), "unknown kind 7"),
        (_frames.encode(_frames.DATA, 1 << 62, 0), "payload of 4611686018427387904 bytes"),
        (_frames.encode(_frames.OBJECT, 1 << 62, 0), "payload of 4611686018427387904 bytes"),
        (_frames.encode(_frames.DATA, 0, 1 << 31), "announces 2147483648 descriptors"),
    ],
)
@pytest.mark.parametrize("count", [0, 3])
def test_a_wrong_header_ends_the_channel(peer, marked, header, words, count):
    raw, channel = peer
    raw.sendmsg([header], rights([marked(str(place)) for place in range(count)]))
    raw.sendall(frame(b"fine by itself"))
    with pytest.raises(fdpass.ProtocolError, match=words):
        channel.recv_message()
    fails_for_good(channel, fdpass.ProtocolError, words)
    with pytest.raises(fdpass.ProtocolError):
        channel.send("nor can it send")


@pytest.mark.parametrize(
    ("announced", "first", "second"), [(0, 1, 0), (1, 2, 0), (3, 1, 0), (1, 0, 0), (253, 252, 0), (253, 252, 2), (0, 253, 0)]
)
@pytest.mark.parametrize("kind", [_frames.DATA, _frames.OBJECT])
def test_another_number_of_descriptors_than_announced(peer, marked, kind, announced, first, second):
    raw, channel = peer
    fds = [marked() for _ in range(max(first, second))]
    payload = pickle.dumps(None)
    whole = frame(payload, kind, announced)
    raw.sendmsg([whole[: _frames.HEADER_SIZE]], rights(fds[:first]))
    raw.sendmsg([whole[_frames.HEADER_SIZE :]], rights(fds[:second]))
    with pytest.raises(fdpass.ProtocolError, match=f"announces {announced} descriptors and brings {first + second}"):
        channel.recv_message()
    fails_for_good(channel, fdpass.ProtocolError, "announces")


def test_the_receivers_own_limits(pipe, marked):
    raw, far = socket.socketpair()
    with raw, fdpass.Channel(far, max_size=10, max_fds=1) as channel:
        raw.sendall(frame(bytes(10)))
        assert channel.recv_message() == (bytes(10), [])
        raw.sendmsg([frame(b"", fds=2)], rights([marked(), marked()]))
        with pytest.raises(fdpass.ProtocolError, match="announces 2 descriptors; this end takes 1"):
            channel.recv_message()


@settings(max_examples=60)
@given(st.binary(max_size=60))
def test_garbage_gives_a_named_error_and_nothing_else(garbage):
    raw, far = socket.socketpair()
    with raw, fdpass.Channel(far) as channel:
        raw.sendall(garbage)
        raw.close()
        with pytest.raises((fdpass.ProtocolError, fdpass.BrokenChannelError, fdpass.EndOfChannel)):
            channel.recv_message()


def test_what_is_announced_is_not_allocated_before_it_arrives(peer):
    raw, channel = peer
    raw.sendall(_frames.encode(_frames.DATA, _frames.MAX_SIZE, 0) + b"no more")
    raw.close()
    import tracemalloc

    tracemalloc.start()
    try:
        with pytest.raises(fdpass.BrokenChannelError, match="in the middle of a frame"):
            channel.recv_message()
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


# -------------------------------------------------------------------------------------------------------------- the end


def test_the_orderly_end_comes_after_what_was_sent(pipe):
    left, right = pipe
    left.send(1)
    left.send_message(b"two")
    left.close()
    assert right.recv() == 1
    assert right.recv_message() == (b"two", [])
    fails_for_good(right, fdpass.EndOfChannel, "the peer closed the channel")
    with pytest.raises(EOFError):
        right.recv()


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 20])
def test_the_end_inside_a_frame_is_another(peer, marked, cut):
    raw, channel = peer
    raw.sendmsg([frame(b"words", fds=2)[:cut]], rights([marked(), marked()]))
    raw.close()
    with pytest.raises(fdpass.BrokenChannelError, match="in the middle of a frame"):
        channel.recv_message()
    fails_for_good(channel, fdpass.BrokenChannelError, "in the middle of a frame")


def test_each_error_is_an_object_of_its_own(pipe):
    left, right = pipe
    left.close()
    errors = []
    for _ in range(3):
        with pytest.raises(fdpass.EndOfChannel) as caught:
            right.recv()
        errors.append(caught.value)
    assert errors[1] is not errors[2]


def test_sending_to_a_peer_that_left(pipe):
    left, right = pipe
    right.close()
    with pytest.raises(BrokenPipeError):
        left.send(1)


def test_iteration_ends_with_the_channel(pipe):
    left, right = pipe
    for number in range(5):
        left.send(number)
    left.close()
    assert list(right) == [0, 1, 2, 3, 4]
    assert list(right) == []


def test_iteration_does_not_hide_a_broken_frame(peer):
    raw, channel = peer
    raw.sendall(frame(pickle.dumps(1), _frames.OBJECT) + b"fd")
    raw.close()
    with pytest.raises(fdpass.BrokenChannelError):
        list(channel)


def test_closing(unix_pair):
    channel = fdpass.Channel(unix_pair[0])
    number = channel.fileno()
    assert repr(channel) == f"<Channel {number}>"
    assert not channel.closed
    with channel:
        pass
    channel.close()
    assert channel.closed
    assert channel.fileno() == -1
    assert repr(channel) == "<Channel closed>"
    for use in (channel.recv, channel.recv_message, channel.poll, lambda: channel.send(1), lambda: channel.send_message(b"")):
        with pytest.raises(fdpass.ClosedError, match="it was closed"):
            use()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_a_forgotten_channel_warns():
    ends = list(fdpass.Pipe())
    ends.pop().close()
    with pytest.warns(ResourceWarning, match="unclosed"):
        ends.clear()


# -------------------------------------------------------------------------------------------------------------- time-outs


@pytest.mark.parametrize("timeout", [0, 0.001])
def test_a_time_out_before_the_first_byte_leaves_it_usable(pipe, timeout):
    left, right = pipe
    for receive in (right.recv, right.recv_message):
        with pytest.raises(TimeoutError, match="timed out"):
            receive(timeout=timeout)
    left.send("afterwards")
    assert right.recv(timeout=timeout) == "afterwards"


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 20])
def test_a_time_out_inside_a_frame_breaks_it_for_good(peer, marked, cut):
    raw, channel = peer
    whole = frame(b"words", fds=1)
    raw.sendmsg([whole[:cut]], rights([marked()]))
    with pytest.raises(fdpass.BrokenChannelError, match="timed out inside a frame"):
        channel.recv_message(timeout=0)
    raw.sendall(whole[cut:] + frame(b"next"))
    fails_for_good(channel, fdpass.BrokenChannelError, "timed out inside a frame")


def test_a_sender_that_times_out_before_the_first_byte_stays_usable(pipe):
    left, right = pipe
    sent = []

    def fill():
        while True:
            left.send(len(sent), timeout=0)
            sent.append(len(sent))

    with pytest.raises(TimeoutError, match="timed out"):
        fill()
    assert [right.recv(timeout=0) for _ in sent] == sent
    left.send("afterwards", timeout=0)
    assert right.recv(timeout=0) == "afterwards"


@pytest.mark.parametrize("fds", [0, 1, 300])
def test_a_sender_that_times_out_inside_a_frame_is_broken(pipe, marked, fds):
    left, right = pipe
    numbers = [marked() for _ in range(fds)]
    with pytest.raises(fdpass.BrokenChannelError, match=r"broke off|timed out"):
        left.send_message(bytes(FIVE_MB), numbers, timeout=0)
    with pytest.raises(fdpass.BrokenChannelError):
        left.send("more")
    left.close()
    with pytest.raises(fdpass.BrokenChannelError, match="in the middle of a frame"):
        right.recv_message()


@pytest.mark.parametrize("blocking", [None, 0.0, 1.5])
def test_the_sockets_own_timeout_is_not_the_channels(blocking, until_blocked):
    raw, far = socket.socketpair()
    far.settimeout(blocking)
    with raw, fdpass.Channel(far) as channel:
        with pytest.raises(TimeoutError):
            channel.recv(timeout=0)
        got = []
        with thread(lambda: got.append(channel.recv())) as receiver:
            until_blocked(tid=receiver.native_id)
            raw.sendall(frame(pickle.dumps("waited for"), _frames.OBJECT))
        assert got == ["waited for"]
        # O_NONBLOCK belongs to every holder of the socket.
        assert os.get_blocking(channel.fileno()) == (blocking is None)


def test_waiting_for_another_threads_receive_counts_as_waiting(pipe, until_blocked):
    left, right = pipe
    with thread(right.recv) as receiver:
        until_blocked(tid=receiver.native_id)
        with pytest.raises(TimeoutError):
            right.recv(timeout=0)
        left.send(1)


# -------------------------------------------------------------------------------------------------------------- lost descriptors


@pytest.mark.parametrize(("count", "free"), [(1, 0), (20, 3), (300, 10), (300, 270)])
@pytest.mark.parametrize("size", [5, 100_000])
def test_descriptors_that_do_not_fit_are_counted_and_the_channel_goes_on(pipe, marked, full_table, content, count, free, size):
    left, right = pipe
    fds = [marked(str(place)) for place in range(count)]
    data = os.urandom(size)
    spare = [os.dup(0) for _ in range(free)]
    with thread(lambda: (left.send_message(data, fds), left.send("next"))), full_table() as limit:
        for number in spare:
            os.close(number)
        with pytest.raises(fdpass.DescriptorsLostError, match=f"RLIMIT_NOFILE is {limit}") as caught:
            right.recv_message()
        assert right.recv() == "next"
    error = caught.value
    assert (error.needed, error.got, error.limit, error.data) == (count, free, limit, data)
    left.send_message(b"again", fds[:1])
    _, (owned,) = right.recv_message()
    with owned:
        assert content(owned) == "0"


def test_an_object_whose_descriptors_do_not_fit_is_not_unpickled(pipe, unix_pair, full_table, tmp_path):
    left, right = pipe
    left.send([children.Tripwire(str(tmp_path / "wire")), *unix_pair])
    with full_table(free=1), pytest.raises(fdpass.DescriptorsLostError):
        right.recv()
    assert not (tmp_path / "wire").exists()
    left.send("next")
    assert right.recv() == "next"


@pytest.mark.parametrize("failing", ["left.send_message(big, timeout=0)", "raw.sendall(half); raw.close(); left.recv_message()"])
def test_an_error_inside_a_large_frame_can_be_collected_in_a_cycle(run_python, failing):
    # In a program of its own: what this once did was to crash the interpreter.
    program = f"""
import fdpass, gc, socket
from fdpass import _frames
big = bytes(5_000_000)
half = _frames.encode(_frames.DATA, len(big), 0) + bytes(100)
for _ in range(20):
    raw, far = socket.socketpair()
    with raw, fdpass.Channel(far) as left:
        try:
            {failing}
        except fdpass.BrokenChannelError as error:
            error.itself = [error]
    del raw, far, left
    gc.collect()
print("alive")
"""
    assert run_python(program).stdout == "alive\n"


# -------------------------------------------------------------------------------------------------------------- whom it trusts


def credentials_per_message():
    """Whether the kernel says who sent each message; the portable fallback knows only who made the connection."""
    left, right = socket.socketpair()
    with left, right:
        left.sendall(b"x")
        scratch = _syscall.Scratch()
        _syscall.recv(right.fileno(), scratch.buffer, 1, scratch.message, 0, None, "trying")
        return not scratch.message.has_credentials


root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
per_message = pytest.mark.skipif(not credentials_per_message(), reason="this build knows only who made the connection")


@contextlib.contextmanager
def somebody_else(uid, action):
    """A forked child that becomes uid and does action(); waited for afterwards."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            action()
            status = 0
        finally:
            os._exit(status)
    try:
        yield
    finally:
        _, status = os.waitpid(pid, 0)
    assert status == 0


@pytest.fixture
def wire(tmp_path):
    """A tripwire's path, and the frame that would trip it."""
    path = tmp_path / "wire"
    return path, frame(pickle.dumps(children.Tripwire(str(path))), _frames.OBJECT)


def test_the_tripwire_works(peer, wire):
    raw, channel = peer
    raw.sendall(wire[1])
    assert channel.recv() is None
    assert wire[0].exists()


@root
@per_message
@pytest.mark.parametrize("uid", [65534, 1000])
@pytest.mark.parametrize("receive", ["recv", "recv_message"])
def test_another_uid_on_an_inherited_pair_is_refused(peer, wire, uid, receive, marked):
    raw, channel = peer
    path, whole = wire
    with somebody_else(uid, lambda: raw.sendall(whole)), pytest.raises(fdpass.PeerRefusedError, match=rf"uid {uid} .*only from uid 0"):
        getattr(channel, receive)()
    fails_for_good(channel, fdpass.PeerRefusedError, f"uid {uid}")
    assert not path.exists()


@root
@per_message
@pytest.mark.parametrize("uid", [65534, 1000])
def test_another_uid_with_a_channel_of_its_own_is_refused(pipe, unix_pair, uid, tmp_path):
    left, right = pipe
    with (
        somebody_else(uid, lambda: left.send([children.Tripwire(str(tmp_path / "wire")), unix_pair[0]])),
        pytest.raises(fdpass.PeerRefusedError, match=f"uid {uid}"),
    ):
        right.recv()
    assert not (tmp_path / "wire").exists()


@root
@pytest.mark.parametrize("uid", [65534, 1000])
@pytest.mark.parametrize("early", [True, False])
def test_another_uid_on_a_connected_named_socket_is_refused(wire, uid, early):
    path, whole = wire
    go_read, go_write = os.pipe()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0fdpass-test-" + os.urandom(8).hex())
        listener.listen()

        def send():
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(listener.getsockname())
                os.read(go_read, 1)
                sock.sendall(whole)
                os.read(go_read, 1)

        with somebody_else(uid, send):
            conn, _ = listener.accept()
            if early:  # it sends before anybody here asked for credentials
                os.write(go_write, b"x")
                select.select([conn], [], [])
            with fdpass.Channel(conn) as channel:
                if not early:
                    os.write(go_write, b"x")
                with pytest.raises(fdpass.PeerRefusedError, match=r"without credentials|uid"):
                    channel.recv()
            os.write(go_write, b"x")
    os.close(go_read)
    os.close(go_write)
    assert not path.exists()


@root
@per_message
def test_a_payload_that_another_uid_adds_is_refused(peer, wire):
    raw, channel = peer
    path, whole = wire
    raw.sendall(whole[:20])
    with somebody_else(65534, lambda: raw.sendall(whole[20:])), pytest.raises(fdpass.PeerRefusedError, match="uid 65534"):
        channel.recv()
    assert not path.exists()


@root
@per_message
def test_descriptors_of_a_refused_frame_are_closed(peer, marked):
    raw, channel = peer
    fds = [marked(), marked()]
    with (
        somebody_else(65534, lambda: raw.sendmsg([frame(pickle.dumps(1), _frames.OBJECT, 2)], rights(fds))),
        pytest.raises(fdpass.PeerRefusedError),
    ):
        channel.recv()


@root
def test_plain_messages_may_come_from_anybody(peer, marked, content):
    raw, channel = peer
    fds = [marked("x")]
    with somebody_else(65534, lambda: raw.sendmsg([frame(b"bytes", fds=1)], rights(fds))):
        data, (owned,) = channel.recv_message()
    with owned:
        assert (data, content(owned)) == (b"bytes", "x")


@per_message
def test_a_frame_queued_before_credentials_were_asked_for_is_refused(wire):
    path, whole = wire
    raw, far = socket.socketpair()
    with raw:
        raw.sendall(whole)
        with fdpass.Channel(far) as channel:
            with pytest.raises(fdpass.PeerRefusedError, match="a sender without credentials"):
                channel.recv()
            fails_for_good(channel, fdpass.PeerRefusedError, "without credentials")
    assert not path.exists()


@root
@per_message
def test_nobodys_uid_does_not_stand_for_no_credentials(wire):
    # 65534 is what the kernel writes where it does not know the sender, and the uid of a process that runs as nobody.
    path, whole = wire
    raw, far = socket.socketpair()
    raw.sendall(whole)

    def receive():
        with fdpass.Channel(far) as channel, pytest.raises(fdpass.PeerRefusedError, match="a sender without credentials"):
            channel.recv()
        left, right = fdpass.Pipe()
        left.send("from nobody to nobody")
        assert right.recv() == "from nobody to nobody"

    with raw, far, somebody_else(65534, receive):
        pass
    assert not path.exists()


def test_a_forked_child_of_the_same_uid_is_trusted(pipe):
    left, right = pipe
    with somebody_else(os.getuid(), lambda: left.send("from the child")) if os.getuid() == 0 else thread(left.send, "from the child"):
        assert right.recv() == "from the child"


# -------------------------------------------------------------------------------------------------------------- threads and polling


def test_threads_share_a_channel(pipe, marked):
    left, right = pipe
    fds = [marked()]
    received = collections.Counter()

    def send(name):
        for number in range(100):
            left.send((name, number))
            left.send_message(b"%d" % number + bytes(5000), fds * (number % 3))

    def receive():
        for _ in range(200):
            data, owners = right.recv_message()
            received[data if data[:1] == b"\x80" else data.rstrip(b"\0")] += 1
            close_all(owners)

    with thread(send, "a"), thread(send, "b"), thread(receive), thread(receive):
        pass
    objects = {pickle.loads(data) for data in received if data[:1] == b"\x80"}
    assert objects == {(name, number) for name in "ab" for number in range(100)}
    assert all(count == 2 for data, count in received.items() if data[:1] != b"\x80")
    assert received.total() == 400


def test_poll_select_and_wait(pipe):
    left, right = pipe
    assert not right.poll()
    assert not right.poll(0.001)
    assert select.select([right], [left], [], 0) == ([], [left], [])
    assert multiprocessing.connection.wait([right], 0) == []
    left.send(1)
    assert right.poll()
    assert right.poll(None)
    assert select.select([right], [], [], 0) == ([right], [], [])
    assert multiprocessing.connection.wait([left, right]) == [right]
    assert right.recv() == 1
    assert not right.poll()
    left.close()
    # The end is something to receive as well.
    assert right.poll()
    assert multiprocessing.connection.wait([right], 0) == [right]


def test_a_one_way_pipe():
    reader, writer = fdpass.Pipe(duplex=False)
    with reader, writer:
        writer.send("down")
        assert reader.recv() == "down"
        for use in (lambda: reader.send(1), lambda: reader.send_message(b""), writer.recv, writer.recv_message, writer.poll):
            with pytest.raises(ValueError, match="one-way"):
                use()


def test_a_one_way_end_stays_one_way_when_it_travels(pipe):
    left, right = pipe
    reader, writer = fdpass.Pipe(duplex=False, max_size=50)
    left.send((reader, writer))
    close_all([reader, writer])
    reader, writer = right.recv()
    with reader, writer:
        writer.send("down")
        assert reader.recv() == "down"
        with pytest.raises(ValueError, match="one-way"):
            reader.send(1)
        with pytest.raises(ValueError, match="one-way"):
            writer.recv()
        with pytest.raises(ValueError, match="max_size"):
            writer.send_message(bytes(51))


# -------------------------------------------------------------------------------------------------------------- Channel(sock)


def test_it_takes_the_socket_over(unix_pair):
    number = unix_pair[0].fileno()
    with fdpass.Channel(unix_pair[0]) as channel, fdpass.Channel(fdpass.OwnedFd(unix_pair[1].detach())) as other:
        assert unix_pair[0].fileno() == -1
        assert channel.fileno() == number
        channel.send(1)
        assert other.recv() == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: socket.socket(socket.AF_INET),
        lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
        lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET),
        lambda: fdpass.OwnedFd(os.memfd_create("no socket")),
    ],
    ids=["tcp", "dgram", "seqpacket", "file"],
)
def test_another_kind_of_socket_is_refused_and_untouched(make):
    with make() as item:
        with pytest.raises(fdpass.WrongDescriptorError, match="a channel needs a connected AF_UNIX stream socket"):
            fdpass.Channel(item)
        assert item.fileno() >= 0


def test_a_listening_socket_is_refused():
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")
        listener.listen()
        with pytest.raises(fdpass.WrongDescriptorError, match="is a listening socket"):
            fdpass.Channel(listener)


def test_a_closed_socket_is_refused(unix_pair):
    unix_pair[0].close()
    with pytest.raises(ValueError, match="closed"):
        fdpass.Channel(unix_pair[0])


def test_what_is_no_socket_is_a_type_error():
    reader, writer = multiprocessing.Pipe()
    left, right = fdpass.Pipe()
    with reader, writer, left, right:
        for item in (reader, left, 5, None, "socket", sys.stdin):
            with pytest.raises(TypeError, match="a channel takes a socket"):
                fdpass.Channel(item)
        assert min(reader.fileno(), left.fileno()) >= 0


# -------------------------------------------------------------------------------------------------------------- interrupted


class Interrupted(BaseException):
    """What the signal handler of these tests raises."""


@pytest.fixture
def interrupt(until_blocked):
    """with interrupt(): a signal handler raises in this thread once it waits in a system call."""
    main = threading.main_thread()

    def handler(number, stack):
        raise Interrupted

    def fire():
        until_blocked(tid=main.native_id)
        signal.pthread_kill(main.ident, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handler)
    yield lambda: thread(fire)
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("receive", ["recv", "recv_message"])
def test_a_signal_while_nothing_has_come_leaves_it_usable(pipe, interrupt, receive):
    left, right = pipe
    with pytest.raises(Interrupted), interrupt():
        getattr(right, receive)()
    left.send("afterwards")
    assert right.recv() == "afterwards"


@pytest.mark.parametrize("timeout", [None, 60])
@pytest.mark.parametrize("cut", [3, 16, 18])
def test_a_signal_inside_a_frame_breaks_the_channel_and_leaks_nothing(peer, marked, interrupt, cut, timeout):
    raw, channel = peer
    raw.sendmsg([frame(b"words", fds=3)[:cut]], rights([marked(), marked(), marked()]))
    with pytest.raises(Interrupted), interrupt():
        channel.recv_message(timeout)
    fails_for_good(channel, fdpass.BrokenChannelError, "broke off")


def test_a_signal_while_sending_breaks_the_channel(pipe, marked, interrupt):
    left, right = pipe
    with pytest.raises(Interrupted), interrupt():
        left.send_message(bytes(FIVE_MB), [marked()])
    with pytest.raises(fdpass.BrokenChannelError):
        left.send(1)
    left.close()
    with pytest.raises(fdpass.BrokenChannelError):
        right.recv_message()


def test_bytes_that_came_with_the_signal_are_not_forgotten(peer, monkeypatch):
    # The handler raises after recvmsg(2) has taken bytes and before anybody looked at them: what follows cannot be understood.
    raw, channel = peer
    raw.sendall(frame(b"words"))
    recv_frame_once = _syscall.recv_frame_once

    def interrupted(*args):
        recv_frame_once(*args)
        raise Interrupted

    monkeypatch.setattr(_syscall, "recv_frame_once", interrupted)
    with pytest.raises(Interrupted):
        channel.recv_message()
    monkeypatch.undo()
    fails_for_good(channel, fdpass.BrokenChannelError, "broke off")


def test_bytes_that_went_with_the_signal_are_not_forgotten(pipe, monkeypatch):
    left, _ = pipe
    send_frame_once = _syscall.send_frame_once

    def interrupted(*args):
        send_frame_once(*args)
        raise Interrupted

    monkeypatch.setattr(_syscall, "send_frame_once", interrupted)
    with pytest.raises(Interrupted):
        left.send(1)
    monkeypatch.undo()
    with pytest.raises(fdpass.BrokenChannelError, match="broke off"):
        left.send(2)


def test_a_handler_that_does_not_raise_changes_nothing(pipe, until_blocked):
    left, right = pipe
    main = threading.main_thread()
    seen = []

    def poke():
        until_blocked(tid=main.native_id)
        signal.pthread_kill(main.ident, signal.SIGUSR1)
        while not seen:
            os.sched_yield()
        left.send("after the signal")

    before = signal.signal(signal.SIGUSR1, lambda number, stack: seen.append(number))
    try:
        with thread(poke):
            assert right.recv() == "after the signal"
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]
