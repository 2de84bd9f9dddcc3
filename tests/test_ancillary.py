"""One message with descriptors: all of it arrives with one owner each, or a named error says what did not and nothing is left open."""

import array
import ctypes
import errno
import itertools
import os
import signal
import socket
import struct
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fdpass

SO_PASSPIDFD = 76
FOUR_MIB = 4 << 20


def send_control(sock, data, *control):
    """A sendmsg of the test's own, with SCM_RIGHTS for each list of numbers and SCM_CREDENTIALS for "credentials"."""
    mine = struct.pack("3i", os.getpid(), os.getuid(), os.getgid())
    return sock.sendmsg(
        [data],
        [
            (socket.SOL_SOCKET, socket.SCM_CREDENTIALS, mine)
            if one == "credentials"
            else (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", one))
            for one in control
        ],
    )


def close_all(fds):
    for fd in fds:
        fd.close()


def in_thread(function, *args):
    """Starts function in a thread; call what this returns to join it and get its result, or its exception raised."""
    outcome = []

    def run():
        try:
            outcome.append((function(*args), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()

    def join():
        thread.join()
        result, error = outcome.pop()
        if error is not None:
            raise error
        return result

    join.tid = thread.native_id
    return join


@pytest.fixture(params=[socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET], ids=["stream", "dgram", "seqpacket"])
def any_pair(request):
    left, right = socket.socketpair(socket.AF_UNIX, request.param)
    with left, right:
        yield left, right


@pytest.fixture
def bulk():
    """A stream pair, and 4 MiB, which are more than it holds."""
    left, right = socket.socketpair()
    with left, right:
        yield left, right, bytes(range(256)) * (FOUR_MIB // 256)


def send_without_end(sock, number):
    while True:
        fdpass.send_fds(sock, [b"x"], [number])


# -------------------------------------------------------------------------------- there and back


def test_bytes_and_descriptors_arrive_in_order(any_pair, marked, content):
    left, right = any_pair
    names = ["a", "b", "c"]
    assert fdpass.send_fds(left, [b"hel", b"lo"], [marked(name) for name in names]) == 5
    data, fds, flags, address = fdpass.recv_fds(right, 100, 10)
    assert (data, flags, address) == (b"hello", 0, None)
    assert [content(fd) for fd in fds] == names
    assert all(type(fd) is fdpass.OwnedFd for fd in fds)
    close_all(fds)


def test_the_message_has_names(unix_pair, marked):
    left, right = unix_pair
    fdpass.send_fds(left, [b"x"], [marked()])
    message = fdpass.recv_fds(right, 10, 1)
    assert isinstance(message, fdpass.Message)
    assert isinstance(message, tuple)
    assert message == (message.data, message.fds, message.flags, message.address)
    message.fds[0].close()


def test_what_was_sent_stays_the_senders(unix_pair, marked, content):
    left, right = unix_pair
    number = marked("still here")
    with fdpass.OwnedFd(os.dup(number)) as owned:
        fdpass.send_fds(left, [b"x"], [number, owned])
        close_all(fdpass.recv_fds(right, 1, 2).fds)
        assert content(number) == content(owned) == "still here"


def test_a_received_socket_works(unix_pair):
    left, right = unix_pair
    one, other = socket.socketpair()
    with one, other:
        fdpass.send_fds(left, [b"x"], [one])
        with fdpass.recv_fds(right, 1, 1).fds[0].to_socket() as received:
            received.sendall(b"through")
        assert other.recv(100) == b"through"


@pytest.mark.parametrize("count", [0, 1, 2, 3, 252, 253])
def test_any_number_that_the_kernel_passes(any_pair, marked, content, count):
    left, right = any_pair
    fdpass.send_fds(left, [b"x"], [marked("same")] * count)
    message = fdpass.recv_fds(right, 10, count)
    assert message.data == b"x"
    assert len({fd.fileno() for fd in message.fds}) == count
    assert {content(fd) for fd in message.fds} <= {"same"}
    close_all(message.fds)


def test_no_descriptors_is_a_plain_message(any_pair):
    left, right = any_pair
    assert fdpass.send_fds(left, [b"plain"], []) == 5
    assert fdpass.recv_fds(right, 100, 0) == (b"plain", [], 0, None)


def test_the_end_of_the_stream_is_empty(unix_pair):
    left, right = unix_pair
    left.close()
    assert fdpass.recv_fds(right, 100, 10) == (b"", [], 0, None)


def test_writing_to_a_closed_peer_is_an_error_and_no_signal(unix_pair, marked):
    left, right = unix_pair
    right.close()
    with pytest.raises(BrokenPipeError):
        fdpass.send_fds(left, [b"x"], [marked()])


def test_the_standard_library_understands_it_and_is_understood(unix_pair, marked, content):
    left, right = unix_pair
    numbers = [marked("a"), marked("b")]
    fdpass.send_fds(left, [b"ours"], numbers)
    data, fds, _, _ = socket.recv_fds(right, 10, 2)
    assert (data, [content(fd) for fd in fds]) == (b"ours", ["a", "b"])
    for fd in fds:
        os.close(fd)
    socket.send_fds(left, [b"theirs"], numbers)
    message = fdpass.recv_fds(right, 10, 2)
    assert (message.data, [content(fd) for fd in message.fds]) == (b"theirs", ["a", "b"])
    close_all(message.fds)


def test_a_read_stops_behind_a_message_with_descriptors(unix_pair, marked, content):
    left, right = unix_pair
    fdpass.send_fds(left, [b"AAAA"], [])
    fdpass.send_fds(left, [b"BBBB"], [marked("b")])
    fdpass.send_fds(left, [b"CCCC"], [])
    fdpass.send_fds(left, [b"DDDD"], [marked("d")])
    for data, name in ((b"AAAABBBB", "b"), (b"CCCCDDDD", "d")):
        message = fdpass.recv_fds(right, 1000, 10)
        assert (message.data, [content(fd) for fd in message.fds]) == (data, [name])
        close_all(message.fds)


@pytest.mark.parametrize("bufsize", [1, 1000, 65_536, 65_537, 1 << 20])
def test_a_buffer_of_any_size_takes_what_fits(unix_pair, marked, bufsize):
    left, right = unix_pair
    payload = os.urandom(min(100_000, 100 * bufsize))
    fdpass.send_fds(left, [payload], [marked()])
    got, counts = b"", []
    while len(got) < len(payload):
        data, fds, flags, _ = fdpass.recv_fds(right, bufsize, 1)
        assert 0 < len(data) <= bufsize
        assert flags == 0
        close_all(fds)
        counts.append(len(fds))
        got += data
    assert got == payload
    assert counts == [1] + [0] * (len(counts) - 1)


# -------------------------------------------------------------------------------- what may be given


def generator(items):
    yield from items


@pytest.mark.parametrize(
    ("buffers", "expected"),
    [
        ([b"a", b"b"], b"ab"),
        ((b"a", b"b"), b"ab"),
        (generator([b"a", bytearray(b"b")]), b"ab"),
        ([bytearray(b"ab")], b"ab"),
        ([memoryview(b"xaby")[1:3]], b"ab"),
        ([memoryview(b"axbx")[::2]], b"ab"),
        ([b"-", memoryview(b"axbx")[::2]], b"-ab"),
        ([memoryview(b"ba")[::-1], b"-"], b"ab-"),
        ([array.array("i", [1, 2])], array.array("i", [1, 2]).tobytes()),
        ([array.array("d", [0.5]), b"-"], array.array("d", [0.5]).tobytes() + b"-"),
        ([memoryview(bytes(range(6))).cast("B", (2, 3))], bytes(range(6))),
        ([(ctypes.c_int * 2)(1, 2)], bytes((ctypes.c_int * 2)(1, 2))),
        ([b"-", (ctypes.c_int * 2)(1, 2)], b"-" + bytes((ctypes.c_int * 2)(1, 2))),
        ([b"", b"a", b""], b"a"),
        (generator([b"x"] * 3000), b"x" * 3000),  # more than one sendmsg takes as parts
    ],
    ids=[
        "list",
        "tuple",
        "generator",
        "bytearray",
        "slice",
        "strided",
        "strided-second",
        "reversed-first",
        "ints",
        "doubles",
        "two-dimensional",
        "ctypes",
        "ctypes-second",
        "empty-parts",
        "many-parts",
    ],
)
def test_any_iterable_of_any_buffers(unix_pair, marked, buffers, expected):
    left, right = unix_pair
    assert fdpass.send_fds(left, buffers, [marked()]) == len(expected)
    message = fdpass.recv_fds(right, 10_000, 1)
    assert (message.data, len(message.fds)) == (expected, 1)
    close_all(message.fds)


@pytest.mark.parametrize(
    "buffers", [b"bytes", bytearray(b"b"), memoryview(b"m"), "text", 5, None, [5], ["text"], [None], [b"a", "text"]], ids=repr
)
def test_what_is_no_iterable_of_buffers_is_a_type_error(unix_pair, marked, buffers):
    with pytest.raises(TypeError):
        fdpass.send_fds(unix_pair[0], buffers, [marked()])
    nothing_was_sent(unix_pair[1])


def nothing_was_sent(sock):
    sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        sock.recv(1)


def test_sockets_files_owners_and_numbers_are_descriptors(unix_pair, marked, tmp_path):
    left, right = unix_pair
    number = marked()
    with (tmp_path / "file").open("w") as file, fdpass.OwnedFd(os.dup(number)) as owned:
        given = [left, file, owned, number]
        expected = [os.fstat(item if isinstance(item, int) else item.fileno()) for item in given]
        for fds in (given, tuple(given), generator(given), [left], [file], [owned], (number,), array.array("i", [number]), {number}):
            count = len(fds) if hasattr(fds, "__len__") else len(given)
            fdpass.send_fds(left, [b"x"], fds)
            received = fdpass.recv_fds(right, 1, 4).fds
            assert len(received) == count
            if count == 4:
                for one, stat in zip(received, expected, strict=True):
                    assert os.path.samestat(os.fstat(one.fileno()), stat)
            close_all(received)


@pytest.mark.parametrize("wrong", ["3", 3.5, None, b"3", object()], ids=lambda item: type(item).__name__)
def test_what_is_no_descriptor_is_a_type_error(unix_pair, marked, wrong):
    for fds in ([wrong], [marked(), wrong]):
        with pytest.raises(TypeError, match=type(wrong).__name__):
            fdpass.send_fds(unix_pair[0], [b"x"], fds)
    nothing_was_sent(unix_pair[1])


@pytest.mark.parametrize(
    "call", [lambda sock: fdpass.send_fds(sock, [b"x"], []), lambda sock: fdpass.recv_fds(sock, 1, 1)], ids=["send", "recv"]
)
@pytest.mark.parametrize("wrong", ["socket", None, 1.5], ids=repr)
def test_what_is_no_socket_is_a_type_error(call, wrong):
    with pytest.raises(TypeError):
        call(wrong)


def test_the_socket_may_be_a_subclass_or_any_owner(unix_pair, marked):
    class Sub(socket.socket):
        pass

    left, right = unix_pair
    with Sub(fileno=os.dup(left.fileno())) as sub, fdpass.OwnedFd(os.dup(right.fileno())) as owned:
        fdpass.send_fds(sub, [b"x"], [marked()])
        message = fdpass.recv_fds(owned, 10, 1)
        assert message.data == b"x"
        close_all(message.fds)


@pytest.mark.parametrize(("bufsize", "maxfds"), [(-1, 1), (1, -1)])
def test_negative_sizes_are_refused(unix_pair, bufsize, maxfds):
    with pytest.raises(ValueError, match="-1"):
        fdpass.recv_fds(unix_pair[1], bufsize, maxfds)


@pytest.mark.parametrize(("bufsize", "maxfds"), [("1", 1), (1, "1"), (1.5, 1), (None, 1)])
def test_sizes_that_are_no_ints_are_refused_and_take_nothing(unix_pair, marked, bufsize, maxfds):
    left, right = unix_pair
    fdpass.send_fds(left, [b"x"], [marked()])
    with pytest.raises(TypeError):
        fdpass.recv_fds(right, bufsize, maxfds)
    message = fdpass.recv_fds(right, 1, 1)
    assert (message.data, len(message.fds)) == (b"x", 1)
    close_all(message.fds)


# -------------------------------------------------------------------------------- refused before the first byte


@pytest.mark.parametrize("count", [254, 300, 5000])
def test_more_than_253_descriptors(any_pair, marked, count):
    with pytest.raises(ValueError, match=rf"{count}.*253"):
        fdpass.send_fds(any_pair[0], [b"x"], [marked()] * count)
    nothing_was_sent(any_pair[1])


@pytest.mark.parametrize(
    "buffers",
    [[], [b""], [b"", bytearray()], [bytearray()], [memoryview(b"")], [array.array("i")]],
    ids=lambda one: type(one[-1]).__name__ if one else "none",
)
@pytest.mark.parametrize("count", [1, 2])
def test_descriptors_without_a_byte_on_a_stream(unix_pair, marked, buffers, count):
    with pytest.raises(ValueError, match="byte"):
        fdpass.send_fds(unix_pair[0], buffers, [marked()] * count)
    nothing_was_sent(unix_pair[1])


def test_no_descriptors_and_no_byte_on_a_stream_is_nothing(unix_pair):
    assert fdpass.send_fds(unix_pair[0], [], []) == 0
    nothing_was_sent(unix_pair[1])


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET], ids=["dgram", "seqpacket"])
def test_descriptors_without_a_byte_travel_where_messages_have_borders(marked, content, kind):
    left, right = socket.socketpair(socket.AF_UNIX, kind)
    with left, right:
        for count in (1, 2):
            assert fdpass.send_fds(left, [], [marked("alone")] * count) == 0
            message = fdpass.recv_fds(right, 100, 2)
            assert message.data == b""
            assert [content(fd) for fd in message.fds] == ["alone"] * count
            close_all(message.fds)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["inet", "inet6"])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["stream", "dgram"])
def test_a_socket_that_is_not_af_unix(marked, family, kind):
    with socket.socket(family, kind) as sock:
        with pytest.raises(ValueError, match="AF_UNIX"):
            fdpass.send_fds(sock, [b"x"], [marked()])
        with pytest.raises(ValueError, match="AF_UNIX"):
            fdpass.recv_fds(sock, 1, 1)
        # Nor is the family believed that a socket object was told.
        with fdpass.OwnedFd(os.dup(sock.fileno())) as owned, pytest.raises(ValueError, match="AF_UNIX"):
            fdpass.send_fds(owned, [b"x"], [marked()])


def test_a_connected_tcp_socket(marked):
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        server, _ = listener.accept()
        with pytest.raises(ValueError, match="AF_UNIX"):
            fdpass.send_fds(client, [b"x"], [marked()])
        nothing_was_sent(server)
        server.close()


def test_what_is_no_socket_at_all(marked):
    with fdpass.OwnedFd(os.dup(marked())) as file:
        with pytest.raises(ValueError, match="regular file"):
            fdpass.send_fds(file, [b"x"], [marked()])
        with pytest.raises(ValueError, match="regular file"):
            fdpass.recv_fds(file, 1, 1)


def test_a_closed_socket_to_send_on(unix_pair, marked):
    left, _ = unix_pair
    left.close()
    with pytest.raises(ValueError, match="closed"):
        fdpass.send_fds(left, [b"x"], [marked()])
    with pytest.raises(ValueError, match="closed"):
        fdpass.recv_fds(left, 1, 1)


@pytest.mark.parametrize("negative", [-1, -5])
def test_a_negative_number(unix_pair, marked, negative):
    number = marked()
    for fds in ([negative], [number, negative], (negative,), array.array("i", [negative]), [unix_pair[0], negative]):
        with pytest.raises(ValueError, match=f"{negative}"):
            fdpass.send_fds(unix_pair[0], [b"x"], fds)
    nothing_was_sent(unix_pair[1])


def test_an_object_that_is_closed(unix_pair, marked):
    number = marked()
    sock, owned = socket.socket(), fdpass.OwnedFd(os.dup(number))
    sock.close()
    owned.close()
    for closed in (sock, owned):
        for fds in ([closed], [number, closed]):
            with pytest.raises(ValueError, match="closed"):
                fdpass.send_fds(unix_pair[0], [b"x"], fds)
    with open(os.devnull) as file:
        pass
    with pytest.raises(ValueError, match="closed"):
        fdpass.send_fds(unix_pair[0], [b"x"], [file])
    nothing_was_sent(unix_pair[1])


def test_a_number_that_is_not_open_is_named(unix_pair, marked):
    number, gone = marked(), os.dup(0)
    os.close(gone)
    for fds in ([gone], [number, gone], [unix_pair[0], gone, number]):
        with pytest.raises(OSError, match=rf"\b{gone}\b") as caught:
            fdpass.send_fds(unix_pair[0], [b"x"], fds)
        assert caught.value.errno == errno.EBADF
    nothing_was_sent(unix_pair[1])


# -------------------------------------------------------------------------------- flags, kinds, addresses


def test_dontwait_does_not_wait_on_a_blocking_socket(bulk, marked):
    left, right, payload = bulk
    with pytest.raises(BlockingIOError):
        fdpass.recv_fds(right, 1, 1, socket.MSG_DONTWAIT)
    assert 0 < fdpass.send_fds(left, [payload], [], socket.MSG_DONTWAIT) < len(payload)
    with pytest.raises(BlockingIOError):
        fdpass.send_fds(left, [b"x"], [marked()], socket.MSG_DONTWAIT)
    assert left.gettimeout() is right.gettimeout() is None
    assert os.get_blocking(left.fileno())
    assert os.get_blocking(right.fileno())


def test_peek_gives_copies_of_its_own(any_pair, marked, content):
    left, right = any_pair
    fdpass.send_fds(left, [b"seen twice"], [marked("a")])
    peeked = fdpass.recv_fds(right, 100, 1, socket.MSG_PEEK)
    taken = fdpass.recv_fds(right, 100, 1)
    assert peeked.data == taken.data == b"seen twice"
    assert content(peeked.fds[0]) == content(taken.fds[0]) == "a"
    assert peeked.fds[0].fileno() != taken.fds[0].fileno()
    close_all(peeked.fds + taken.fds)


def test_waitall_stops_behind_descriptors(unix_pair, marked):
    left, right = unix_pair
    fdpass.send_fds(left, [b"four"], [marked()])
    fdpass.send_fds(left, [b"more"], [])
    message = fdpass.recv_fds(right, 8, 1, socket.MSG_WAITALL)
    assert message.data == b"four"
    close_all(message.fds)
    left.shutdown(socket.SHUT_WR)
    assert fdpass.recv_fds(right, 8, 1, socket.MSG_WAITALL).data == b"more"


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET], ids=["dgram", "seqpacket"])
@pytest.mark.parametrize("bufsize", [0, 5, 70_000])
def test_a_message_cut_short_is_flagged(marked, kind, bufsize):
    left, right = socket.socketpair(socket.AF_UNIX, kind)
    with left, right:
        fdpass.send_fds(left, [b"z" * 80_000], [marked()])
        message = fdpass.recv_fds(right, bufsize, 1)
        assert (message.data, len(message.fds)) == (b"z" * bufsize, 1)
        assert message.flags & socket.MSG_TRUNC
        close_all(message.fds)


@pytest.mark.parametrize("bufsize", [0, 5, 70_000])
def test_asking_for_the_true_length_gives_no_byte_that_was_not_received(bufsize):
    """With MSG_TRUNC recvmsg returns the datagram's length, not the number of bytes in the buffer."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with left, right:
        fdpass.send_fds(left, [b"earlier" * 1000], [])
        fdpass.recv_fds(right, 10_000, 0)
        fdpass.send_fds(left, [b"z" * 80_000], [])
        message = fdpass.recv_fds(right, bufsize, 0, socket.MSG_TRUNC)
        assert message.data == b"z" * bufsize
        assert message.flags & socket.MSG_TRUNC


def names_of_senders(tmp_path):
    long = str(tmp_path) + "/"
    return [str(tmp_path / "short"), long + "x" * (107 - len(long)), str(tmp_path / "zwölf"), "\0fdpass-test-" + str(os.getpid()), ""]


@pytest.mark.parametrize("which", range(5), ids=["path", "path-107", "not-ascii", "abstract", "autobind"])
def test_the_senders_address_is_what_recvmsg_of_the_standard_library_gives(tmp_path, marked, which):
    name = names_of_senders(tmp_path)[which]
    left, right = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with left, right:
        left.bind(name)
        right.bind(str(tmp_path / "receiver"))
        left.connect(str(tmp_path / "receiver"))
        for _ in range(2):
            fdpass.send_fds(left, [b"x"], [marked()])
        data, fds, _, expected = socket.recv_fds(right, 10, 1)
        os.close(fds[0])
        message = fdpass.recv_fds(right, 10, 1)
        assert (message.data, message.address) == (data, expected)
        assert message.address
        close_all(message.fds)


# -------------------------------------------------------------------------------- partial sends, timeouts, waiting


def test_a_partial_send_has_sent_the_descriptors_once(bulk, marked, content):
    left, right, payload = bulk
    left.setblocking(False)
    sent = fdpass.send_fds(left, [payload], [marked("once")])
    assert 0 < sent < len(payload)
    finish = in_thread(rest_of_with_fds, right, len(payload))
    left.setblocking(True)
    left.sendall(memoryview(payload)[sent:])
    data, fds = finish()
    assert data == payload
    assert [content(fd) for fd in fds] == ["once"]
    close_all(fds)


def rest_of_with_fds(sock, count):
    parts, fds = [], []
    while count:
        message = fdpass.recv_fds(sock, 1 << 18, 10)
        assert message.data, "the stream ended early"
        parts.append(message.data)
        fds += message.fds
        count -= len(message.data)
    return b"".join(parts), fds


def test_a_blocking_send_sends_everything(bulk, marked, content):
    left, right, payload = bulk
    finish = in_thread(fdpass.send_fds, left, [payload], [marked("once")])
    data, fds = rest_of_with_fds(right, len(payload))
    assert finish() == len(payload)
    assert data == payload
    assert [content(fd) for fd in fds] == ["once"]
    close_all(fds)


def test_a_timeout_ends_a_receive(any_pair):
    any_pair[1].settimeout(0.01)
    with pytest.raises(TimeoutError):
        fdpass.recv_fds(any_pair[1], 1, 1)


def test_a_timeout_ends_a_send(bulk, marked):
    left, _, payload = bulk
    left.settimeout(0.01)
    assert 0 < fdpass.send_fds(left, [payload], [marked()]) < len(payload)
    with pytest.raises(TimeoutError):
        send_without_end(left, marked())


def test_a_non_blocking_socket_does_not_wait(bulk, marked):
    left, right, payload = bulk
    left.setblocking(False)
    right.setblocking(False)
    with pytest.raises(BlockingIOError):
        fdpass.recv_fds(right, 1, 1)
    fdpass.send_fds(left, [payload], [])
    with pytest.raises(BlockingIOError):
        send_without_end(left, marked())


@pytest.mark.parametrize("timeout", [None, 100.0])
def test_a_receive_that_waits_gets_what_comes(any_pair, marked, content, until_blocked, timeout):
    left, right = any_pair
    right.settimeout(timeout)
    finish = in_thread(fdpass.recv_fds, right, 10, 1)
    until_blocked(tid=finish.tid)
    fdpass.send_fds(left, [b"late"], [marked("late")])
    message = finish()
    assert (message.data, content(message.fds[0])) == (b"late", "late")
    close_all(message.fds)


@pytest.mark.parametrize("timeout", [None, 100.0])
def test_a_send_that_waits_goes_when_there_is_room(bulk, marked, content, until_blocked, timeout):
    left, right, payload = bulk
    filled = fdpass.send_fds(left, [payload], [], socket.MSG_DONTWAIT)
    left.settimeout(timeout)
    finish = in_thread(fdpass.send_fds, left, [b"late"], [marked("late")])
    until_blocked(tid=finish.tid)
    data, fds = rest_of_with_fds(right, filled + 4)
    assert finish() == 4
    assert data == payload[:filled] + b"late"
    assert [content(fd) for fd in fds] == ["late"]
    close_all(fds)


def test_a_receive_that_waits_sees_the_end(unix_pair, until_blocked):
    left, right = unix_pair
    finish = in_thread(fdpass.recv_fds, right, 10, 1)
    until_blocked(tid=finish.tid)
    left.close()
    assert finish() == (b"", [], 0, None)


def test_a_flag_that_another_holder_set_does_not_end_a_blocking_receive(unix_pair, marked, until_blocked):
    left, right = unix_pair
    with socket.socket(fileno=os.dup(right.fileno())) as other_holder:
        other_holder.setblocking(False)
        assert right.gettimeout() is None
        finish = in_thread(fdpass.recv_fds, right, 10, 1)
        until_blocked(tid=finish.tid)
        fdpass.send_fds(left, [b"x"], [marked()])
        close_all(finish().fds)
        assert not os.get_blocking(right.fileno()), "the flag is the other holder's, it stays"


def test_a_flag_that_another_holder_set_does_not_end_a_blocking_send(bulk, marked, until_blocked):
    left, right, payload = bulk
    with socket.socket(fileno=os.dup(left.fileno())) as other_holder:
        other_holder.setblocking(False)
        assert left.gettimeout() is None
        filled = fdpass.send_fds(left, [payload], [])
        finish = in_thread(fdpass.send_fds, left, [b"late"], [marked()])
        until_blocked(tid=finish.tid)
        data, fds = rest_of_with_fds(right, filled + 4)
        assert finish() == 4
        assert data[filled:] == b"late"
        close_all(fds)
        assert not os.get_blocking(left.fileno())


BLOCKED = """
import os, socket, sys
import fdpass
way, timeout = sys.argv[1], None if sys.argv[2] == "None" else float(sys.argv[2])
left, right = socket.socketpair()
if way == "send":
    fdpass.send_fds(left, [b"x" * (4 << 20)], [], socket.MSG_DONTWAIT)
left.settimeout(timeout)
os.write(1, b"ready")
try:
    if way == "send":
        fdpass.send_fds(left, [b"x"], [right])
    else:
        fdpass.recv_fds(left, 1, 1)
except KeyboardInterrupt:
    os.write(1, b" interrupted")
"""


@pytest.mark.parametrize("way", ["send", "recv"])
@pytest.mark.parametrize("timeout", [None, 100.0])
def test_ctrl_c_ends_a_call_that_waits(until_blocked, way, timeout):
    with subprocess.Popen([sys.executable, "-P", "-c", BLOCKED, way, str(timeout)], stdout=subprocess.PIPE) as child:
        assert os.read(child.stdout.fileno(), 5) == b"ready"
        until_blocked(child.pid)
        child.send_signal(signal.SIGINT)
        assert child.stdout.read() == b" interrupted"
    assert child.returncode == 0


def test_a_signal_whose_handler_returns_does_not_end_a_call_that_waits(run_python):
    run_python("""
import os, signal, socket, threading
import fdpass
left, right = socket.socketpair()
seen = []
def handler(signum, frame):
    seen.append(signum)
    if len(seen) == 20:
        signal.setitimer(signal.ITIMER_REAL, 0)
        fdpass.send_fds(left, [b"x"], [0])  # from inside the interrupted call
signal.signal(signal.SIGALRM, handler)
for timeout in (None, 100.0):
    seen.clear()
    right.settimeout(timeout)
    signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-3)  # again and again: one that comes just before the call waits is not noticed
    message = fdpass.recv_fds(right, 10, 1)
    assert message.data == b"x" and len(seen) == 20
    message.fds[0].close()
""")


# -------------------------------------------------------------------------------- close-on-exec, numbers


COUNTER = "import os\nfor name in os.listdir('/proc/self/fd'):\n try: print(os.readlink('/proc/self/fd/' + name))\n except OSError: pass"


def test_what_was_received_does_not_survive_an_exec(unix_pair, marked):
    left, right = unix_pair
    plain = marked()
    os.set_inheritable(plain, True)
    fdpass.send_fds(left, [b"x"], [plain] * 20)
    received = fdpass.recv_fds(right, 1, 20).fds
    inherited = os.dup(plain)
    os.set_inheritable(inherited, True)
    command = [sys.executable, "-I", "-S", "-c", COUNTER]
    done = subprocess.run(command, close_fds=False, capture_output=True, text=True, check=True)
    # The two that are meant to be inherited show that the counter can see: none of the twenty joins them.
    assert done.stdout.count("/memfd:marked") == 2
    assert not any(os.get_inheritable(fd.fileno()) for fd in received)
    close_all(received)
    os.close(inherited)


def test_what_was_received_does_not_survive_an_exec_in_its_own_process(run_python):
    done = run_python(f"""
import os, socket, sys
import fdpass
left, right = socket.socketpair()
fd = os.memfd_create("passed")
fdpass.send_fds(left, [b"x"], [fd] * 3)
kept = fdpass.recv_fds(right, 1, 3).fds
os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", {COUNTER!r}])
""")
    assert "memfd" not in done.stdout
    assert "socket" not in done.stdout


@pytest.mark.parametrize("count", [1, 2, 10])
def test_nothing_is_received_as_standard_input_output_or_error(run_python, count):
    run_python(f"""
import fcntl, os, socket
import fdpass
left, right = socket.socketpair()
fd = os.memfd_create("passed")
fdpass.send_fds(left, [b"x"], [fd] * {count})
out = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 100)
os.closerange(0, 3)
message = fdpass.recv_fds(right, 1, {count})
numbers = [one.fileno() for one in message.fds]
assert len(numbers) == {count} and min(numbers) >= 3, numbers
assert all(fcntl.fcntl(number, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for number in numbers)
assert not [low for low in range(3) if os.path.exists(f"/proc/self/fd/{{low}}")]
for one in message.fds:
    one.close()
""")


def test_with_standard_input_closed_and_the_table_full_otherwise_it_is_lost_and_said(run_python):
    run_python("""
import os, resource, socket
import fdpass
left, right = socket.socketpair()
fd = os.memfd_create("passed")
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
eaten = []
try:
    while True:
        eaten.append(os.dup(fd))
except OSError:
    pass
fdpass.send_fds(left, [b"data"], [fd])
os.close(0)
try:
    fdpass.recv_fds(right, 10, 1)
except fdpass.DescriptorsLostError as error:
    assert (error.got, error.limit, error.data) == (0, 64, b"data"), vars(error)
else:
    raise AssertionError("number 0 was given out")
assert os.dup(fd) == 0, "number 0 is still taken"
""")


# -------------------------------------------------------------------------------- lost


@pytest.mark.parametrize("free", [0, 1, 3])
def test_a_full_table_is_an_error_that_says_so_and_the_survivors_are_closed(any_pair, marked, content, full_table, fd_count, free):
    left, right = any_pair
    number = marked("a")
    fdpass.send_fds(left, [b"first"], [number] * 10)
    fdpass.send_fds(left, [b"second"], [])
    with full_table(free) as limit:
        with pytest.raises(fdpass.DescriptorsLostError) as caught:
            fdpass.recv_fds(right, 5, 10)
        error = caught.value
        assert (error.got, error.limit, error.data, error.errno) == (free, limit, b"first", errno.EMFILE)
        assert free < error.needed <= 10
        assert str(limit) in str(error)
        assert f"{free} " in str(error)
        assert "RLIMIT_NOFILE" in str(error)
        # As many numbers are free as were before.
        again = [os.dup(0) for _ in range(free)]
        with pytest.raises(OSError, match="Too many open files"):
            os.dup(0)
        for fd in again:
            os.close(fd)
        # The message was consumed: the conversation goes on.
        assert fdpass.recv_fds(right, 100, 10).data == b"second"
    fdpass.send_fds(left, [b"third"], [number])
    message = fdpass.recv_fds(right, 100, 10)
    assert (message.data, content(message.fds[0])) == (b"third", "a")
    close_all(message.fds)


def test_a_full_table_in_a_process_that_has_imported_nothing_else(run_python):
    """What is needed to tell must have been loaded before: with a full table nothing can be imported."""
    run_python(
        """
import sys, os, _socket
import fdpass
left, right = _socket.socketpair()
fdpass.send_fds(left, [b"data"], [0] * 10)
eaten = []
try:
    while True:
        eaten.append(os.dup(0))
except OSError:
    pass
os.close(eaten.pop())
try:
    fdpass.recv_fds(right, 10, 10)
except fdpass.DescriptorsLostError as error:
    lost = error
assert (lost.got, lost.limit, lost.data) == (1, 60, b"data"), vars(lost)
eaten.append(os.dup(0))
try:
    os.dup(0)
except OSError:
    pass
else:
    raise AssertionError("there was more room than before")
""",
        preexec_fn=lower_to_60,
    )


def lower_to_60():
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (60, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def test_a_table_with_just_enough_room_is_no_error(any_pair, marked, full_table):
    left, right = any_pair
    fdpass.send_fds(left, [b"x"], [marked()] * 3)
    with full_table(free=3):
        message = fdpass.recv_fds(right, 10, 3)
        close_all(message.fds)
    assert len(message.fds) == 3


@pytest.mark.parametrize(("sent", "maxfds"), [(2, 1), (1, 0), (2, 0), (253, 252), (10, 3), (3, 2)])
def test_more_than_was_asked_for_is_an_error_and_nothing_stays(any_pair, marked, content, sent, maxfds):
    """Two where one was asked for is the case that the padding of a control message lets through."""
    left, right = any_pair
    number = marked("a")
    fdpass.send_fds(left, [b"first"], [number] * sent)
    fdpass.send_fds(left, [b"second"], [number])
    with pytest.raises(fdpass.DescriptorsLostError) as caught:
        fdpass.recv_fds(right, 100, maxfds)
    error = caught.value
    assert (error.needed, error.limit, error.data) == (sent, maxfds, b"first")
    assert str(sent) in str(error)
    assert str(maxfds) in str(error)
    message = fdpass.recv_fds(right, 100, 1)
    assert (message.data, content(message.fds[0])) == (b"second", "a")
    close_all(message.fds)


def test_the_same_error_again_and_again_leaks_nothing(unix_pair, marked, fd_count):
    left, right = unix_pair
    number = marked()
    before = fd_count()
    for _ in range(300):
        fdpass.send_fds(left, [b"x"], [number] * 2)
        with pytest.raises(fdpass.DescriptorsLostError):
            fdpass.recv_fds(right, 1, 1)
        assert fd_count() == before


def test_a_receiver_that_takes_no_descriptors_is_named(unix_pair, marked):
    left, right = unix_pair
    try:
        right.setsockopt(socket.SOL_SOCKET, 83, 0)  # SO_PASSRIGHTS
    except OSError:
        pytest.skip("this kernel has no SO_PASSRIGHTS (Linux 6.16)")
    with pytest.raises(PermissionError, match="SO_PASSRIGHTS"):
        fdpass.send_fds(left, [b"x"], [marked()])
    assert fdpass.send_fds(left, [b"x"], []) == 1


# -------------------------------------------------------------------------------- several control messages


def ask(sock, *options):
    for option in options:
        sock.setsockopt(socket.SOL_SOCKET, option, 1)


@pytest.mark.parametrize(
    ("options", "control"),
    [
        ((), ([1], [2])),
        ((), ([1, 2], [1], [2, 2, 2])),
        ((socket.SO_PASSCRED,), ("credentials", [1])),
        ((socket.SO_PASSCRED,), ([1], "credentials", [2])),
        ((socket.SO_PASSCRED,), ([1, 2],)),
        ((socket.SO_PASSCRED, SO_PASSPIDFD), ("credentials", [1], [2])),
        ((SO_PASSPIDFD,), ([1] * 100, [2] * 153)),
        ((socket.SO_PASSCRED, SO_PASSPIDFD), ([1] * 253,)),
        ((socket.SO_PASSCRED, SO_PASSPIDFD), ()),
    ],
    ids=str,
)
def test_several_control_messages_in_one(any_pair, marked, content, options, control):
    left, right = any_pair
    try:
        ask(right, *options)
    except OSError:
        pytest.skip("this kernel has no SO_PASSPIDFD (Linux 6.5)")
    one, two = marked("1"), marked("2")
    numbers = [part if part == "credentials" else [one if mark == 1 else two for mark in part] for part in control]
    expected = [str(mark) for part in control if part != "credentials" for mark in part]
    send_control(left, b"x", *numbers)
    message = fdpass.recv_fds(right, 10, len(expected))
    assert message.data == b"x"
    assert message.flags == 0
    assert [content(fd) for fd in message.fds] == expected
    close_all(message.fds)


@given(
    parts=st.lists(st.integers(0, 4), max_size=4),
    credentials=st.sampled_from([None, 0, -1]),
    passcred=st.booleans(),
    passpidfd=st.booleans(),
    maxfds=st.integers(0, 18),
    bufsize=st.integers(1, 20),
    free=st.sampled_from([None, 0, 1, 2, 5]),
    data=st.binary(min_size=1, max_size=20),
)
def test_whatever_comes_every_descriptor_is_owned_or_closed(
    full_table, parts, credentials, passcred, passpidfd, maxfds, bufsize, free, data
):
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        right.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, passcred)
        try:
            right.setsockopt(socket.SOL_SOCKET, SO_PASSPIDFD, passpidfd)
        except OSError:
            passpidfd = False
        control = [[0] * part for part in parts if part]
        if credentials is not None:
            control.insert(credentials % (len(control) + 1), "credentials")
        send_control(left, data, *control)
        before = sorted(os.listdir("/proc/self/fd"))
        count, lost, message = sum(parts), None, None
        if free is None:
            try:
                message = fdpass.recv_fds(right, bufsize, maxfds)
            except fdpass.DescriptorsLostError as error:
                lost = error
        else:
            with full_table(free):
                try:
                    message = fdpass.recv_fds(right, bufsize, maxfds)
                except fdpass.DescriptorsLostError as error:
                    lost = error
                if message is not None:
                    close_all(message.fds)
        if lost is not None:
            assert lost.data == data[:bufsize]
            assert count > maxfds or (free is not None and count + passpidfd > free)
            assert lost.got <= count
            assert lost.got < lost.needed or lost.limit == maxfds
        else:
            assert message.data == data[:bufsize]
            assert len(message.fds) == count <= maxfds
            assert bool(message.flags & socket.MSG_TRUNC) is (len(data) > bufsize)
            close_all(message.fds)
        assert sorted(os.listdir("/proc/self/fd")) == before


@given(st.lists(st.tuples(st.lists(st.binary(max_size=12), max_size=4), st.integers(0, 5)), max_size=8), st.integers(1, 40))
def test_a_stream_of_messages_arrives_whole_and_each_descriptor_with_its_first_byte(messages, bufsize):
    left, right = socket.socketpair()
    first = os.memfd_create("first")
    with left, right:
        # The number of a message is the size of the file that it sends.
        files, expected, sent = [], {}, b""
        for index, (buffers, count) in enumerate(messages):
            data = b"".join(buffers)
            if count and not data:
                continue
            fd = os.memfd_create("message")
            files.append(fd)
            os.truncate(fd, index)
            if count:
                expected[index] = (len(sent), count)
            assert fdpass.send_fds(left, iter(buffers), (one for one in [fd] * count)) == len(data)
            sent += data
        left.shutdown(socket.SHUT_WR)
        got = b""
        while True:
            data, fds, flags, _ = fdpass.recv_fds(right, bufsize, 5)
            assert flags == 0
            if fds:
                indices = {os.fstat(fd.fileno()).st_size for fd in fds}
                assert len(indices) == 1, "a read merged the descriptors of two messages"
                at, count = expected.pop(indices.pop())
                assert len(fds) == count
                assert len(got) <= at < len(got) + len(data)
                close_all(fds)
            if not data:
                break
            got += data
        assert got == sent
        assert not expected
    for fd in [*files, first]:
        os.close(fd)


# -------------------------------------------------------------------------------- interrupted


INTERRUPTED = """
import gc, os, random, signal, socket, sys
import fdpass

class Bang(Exception):
    pass

armed = False
def handler(signum, frame):
    global armed
    if armed:
        armed = False
        raise Bang
signal.signal(signal.SIGALRM, handler)
# Where the interpreter happens to be in a destructor it can only print the exception: no fault of what is tested here.
sys.unraisablehook = lambda args: args.exc_type is Bang or sys.__unraisablehook__(args)
random.seed(11)

mine = os.memfd_create("mine")
ino = os.fstat(mine).st_ino
hits = rounds = 0

def interrupt(act, *args):
    # A Bang at a random point of act. Then every number that is free is taken by a sentinel, and only after that the objects of
    # the interrupted call go: one that believes it still owns a closed number closes a sentinel.
    global armed, hits, rounds
    held = None
    rounds += 1
    try:
        armed = True
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 6e-5), 0.001)  # again, should it come just before a call starts to wait
        act(*args)
        armed = False
    except Bang as error:
        held = error
        hits += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    sentinels = [os.dup(mine) for _ in range(6)]
    del held
    for number in sentinels:
        assert os.fstat(number).st_ino == ino, "a sentinel was closed"
        os.close(number)

def there_and_back(left, right, count, maxfds):
    fdpass.send_fds(left, [b"x"], [mine] * count)
    try:
        for fd in fdpass.recv_fds(right, 1, maxfds).fds:
            fd.close()
    except fdpass.DescriptorsLostError:
        assert count > maxfds

def wait_for_nothing(left, right):
    fdpass.recv_fds(right, 1, 1)

def drain(right):
    # A plain recv has the kernel close what comes along.
    while True:
        try:
            right.recv(100, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return

import warnings
warnings.simplefilter("ignore")
left, right = socket.socketpair()
there_and_back(left, right, 3, 2)
gc.collect()
before = sorted(os.listdir("/proc/self/fd"))
for _ in range(1200):
    for count, maxfds in ((1, 1), (4, 4), (4, 1)):
        interrupt(there_and_back, left, right, count, maxfds)
        drain(right)
right.settimeout(50)
for _ in range(200):
    interrupt(wait_for_nothing, left, right)
gc.collect()
after = sorted(os.listdir("/proc/self/fd"))
assert after == before, (before, after)
assert hits > 400, (hits, rounds)
"""


def test_interrupted_anywhere_nothing_leaks_and_nothing_is_closed_twice(run_python):
    done = run_python(INTERRUPTED)
    assert not done.stderr


def test_threads_on_one_socket_take_every_message_once(marked):
    """The receive buffers are reused: two receives at once must not share one."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    total, count = 600, 3
    number = marked()

    def receive():
        got = []
        while data := (message := fdpass.recv_fds(right, 100, 2)).data:
            assert len(message.fds) == 1 + int(data) % 2
            close_all(message.fds)
            got.append(int(data))
        return got

    with left, right:
        finish = [in_thread(receive) for _ in range(count)]
        for index in range(total):
            fdpass.send_fds(left, [str(index).encode()], [number] * (1 + index % 2))
        left.close()
        got = [join() for join in finish]
    assert sorted(itertools.chain.from_iterable(got)) == list(range(total))
    assert all(one == sorted(one) for one in got)
