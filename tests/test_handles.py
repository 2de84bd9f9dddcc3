"""SocketHandle: a share in a socket that outlives the socket object, opens once, and changes nothing for the other holders."""

import gc
import os
import socket
import ssl
import warnings

import pytest

import fdpass


@pytest.fixture
def handle(unix_pair):
    """A handle of the pair's first end, closed afterwards."""
    with fdpass.SocketHandle(unix_pair[0]) as made:
        yield made


def through_a_channel(obj):
    left, right = fdpass.Pipe()
    with left, right:
        left.send(obj)
        return right.recv()


def test_it_works_after_the_socket_is_closed(unix_pair, handle):
    unix_pair[0].close()
    with handle.open() as sock:
        sock.sendall(b"still here")
        assert unix_pair[1].recv(100) == b"still here"


def test_it_holds_a_duplicate_that_no_program_inherits(unix_pair, handle):
    assert handle.fileno() >= 3
    assert handle.fileno() != unix_pair[0].fileno()
    assert not os.get_inheritable(handle.fileno())
    assert repr(handle) == f"<SocketHandle {handle.fileno()}>"


def test_it_opens_once(handle):
    number = handle.fileno()
    with handle.open() as sock:
        assert sock.fileno() == number
        assert handle.fileno() == -1
        assert repr(handle) == "<SocketHandle opened>"
        with pytest.raises(fdpass.TicketError, match="cannot open this SocketHandle: it was opened already, and a handle opens once"):
            handle.open()
        with pytest.raises(fdpass.TicketError, match="cannot pickle"):
            through_a_channel(handle)
        # What was opened is the socket's; closing the handle does not touch it.
        handle.close()
        assert sock.fileno() == number
        with pytest.raises(fdpass.TicketError):
            handle.open()


def test_closed_it_says_so(handle):
    number = handle.fileno()
    handle.close()
    handle.close()
    assert handle.fileno() == -1
    assert repr(handle) == "<SocketHandle closed>"
    with pytest.raises(fdpass.ClosedError, match="cannot open this SocketHandle: it was closed"):
        handle.open()
    with pytest.raises(fdpass.ClosedError, match="cannot pickle this SocketHandle: it was closed"):
        through_a_channel(handle)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_the_with_block_closes_it(unix_pair):
    with fdpass.SocketHandle(unix_pair[0]) as handle:
        assert handle.fileno() >= 0
    assert handle.fileno() == -1


def test_forgotten_it_closes_without_a_word(unix_pair, fd_count):
    before = fd_count()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fdpass.SocketHandle(unix_pair[0])
        gc.collect()
    assert said == []
    assert fd_count() == before


def test_each_pickle_that_is_loaded_is_a_handle_of_its_own(handle):
    first, second = through_a_channel(handle), through_a_channel(handle)
    with first, second, handle:
        assert len({first.fileno(), second.fileno(), handle.fileno()}) == 3
        for one in (first, second, handle):
            one.open().close()


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (socket.AF_INET, socket.SOCK_STREAM),
        (socket.AF_INET, socket.SOCK_DGRAM),
        pytest.param(socket.AF_INET6, socket.SOCK_STREAM, marks=pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")),
        (socket.AF_UNIX, socket.SOCK_STREAM),
        (socket.AF_UNIX, socket.SOCK_DGRAM),
        (socket.AF_UNIX, socket.SOCK_SEQPACKET),
    ],
)
@pytest.mark.parametrize("timeout", [None, 0.0, 1.5])
@pytest.mark.parametrize("travelled", [False, True])
def test_kind_and_timeout_are_kept(family, kind, timeout, travelled):
    with socket.socket(family, kind) as sock:
        sock.settimeout(timeout)
        handle = fdpass.SocketHandle(sock)
        if travelled:
            with handle:
                handle = through_a_channel(handle)
        with handle.open() as opened:
            assert (opened.family, opened.type) == (sock.family, sock.type)
            # The kernel's word where it has one (SO_PROTOCOL), else the 0 that the socket was made with.
            assert opened.proto in (sock.proto, sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL))
            assert opened.gettimeout() == timeout
            assert os.get_blocking(sock.fileno()) == (timeout is None)
            assert sock.gettimeout() == timeout


@pytest.mark.parametrize("default", [0.0, 3.0])
@pytest.mark.parametrize("timeout", [None, 0.0, 1.5])
def test_setdefaulttimeout_flips_no_flag(unix_pair, default, timeout):
    sock = unix_pair[0]
    sock.settimeout(timeout)
    socket.setdefaulttimeout(default)
    try:
        with (
            fdpass.SocketHandle(sock).open() as opened,
            through_a_channel(sock) as arrived,
            through_a_channel(fdpass.SocketHandle(sock)).open() as last,
        ):
            assert [one.gettimeout() for one in (opened, arrived, last)] == [timeout] * 3
            assert os.get_blocking(sock.fileno()) == (timeout is None)
    finally:
        socket.setdefaulttimeout(None)


def test_where_another_holder_changed_the_flag_the_flag_wins(unix_pair, handle):
    # The handle remembers "blocking", the description says otherwise by now; to insist would flip it for every holder.
    unix_pair[0].setblocking(False)
    with handle.open() as sock:
        assert sock.gettimeout() == 0.0
        assert not os.get_blocking(unix_pair[0].fileno())


def test_a_subclass_gives_a_plain_socket():
    class Mine(socket.socket):
        pass

    with Mine() as sock, fdpass.SocketHandle(sock).open() as opened:
        assert type(opened) is socket.socket


@pytest.mark.parametrize("claims", [1, 2, 1000])
def test_claims_that_are_numbers(unix_pair, claims):
    with fdpass.SocketHandle(unix_pair[0], claims=claims) as handle:
        assert handle.fileno() >= 0


@pytest.mark.parametrize(
    ("claims", "error"), [(0, ValueError), (-1, ValueError), (1.0, TypeError), ("1", TypeError), (None, TypeError), (True, TypeError)]
)
def test_claims_that_are_not(unix_pair, claims, error):
    with pytest.raises(error, match="claims is"):
        fdpass.SocketHandle(unix_pair[0], claims=claims)


def test_only_a_socket_has_a_handle(unix_pair):
    with fdpass.OwnedFd(os.dup(unix_pair[0].fileno())) as owned:
        for item in (owned, unix_pair[0].fileno(), None, "socket", b""):
            with pytest.raises(TypeError, match=f"takes a socket.socket, not {type(item).__name__}"):
                fdpass.SocketHandle(item)


def test_a_closed_socket_has_none():
    sock = socket.socket()
    sock.close()
    with pytest.raises(ValueError, match="the socket is closed"):
        fdpass.SocketHandle(sock)


def test_an_ssl_socket_has_none(unix_pair):
    context = ssl.create_default_context()
    context.check_hostname = False
    with context.wrap_socket(unix_pair[0], do_handshake_on_connect=False) as wrapped:
        with pytest.raises(TypeError, match=r"keys and sequence numbers.*Pass the plain socket before wrap_socket\(\)"):
            fdpass.SocketHandle(wrapped)
        assert wrapped.fileno() >= 0


def test_a_full_table_is_the_kernels_refusal(unix_pair, full_table):
    with full_table(), pytest.raises(OSError, match="Too many open files"):
        fdpass.SocketHandle(unix_pair[0])


@pytest.mark.parametrize("rebuild", ["_rebuild_handle", "rebuild_socket"])
def test_what_arrives_and_is_no_socket_is_named_and_closed(marked, rebuild):
    from fdpass import _carriers, handles

    token = _carriers.incoming.set([fdpass.OwnedFd(os.dup(marked()))])
    try:
        with pytest.raises(fdpass.WrongDescriptorError, match="a socket was expected, a regular file arrived") as caught:
            getattr(handles, rebuild)(("frame", 0), None, 1 if rebuild == "_rebuild_handle" else None)
    finally:
        _carriers.incoming.reset(token)
    assert (caught.value.expected, caught.value.actual) == ("a socket", "a regular file")
