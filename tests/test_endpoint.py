"""Endpoints: each form of the text binds exactly what it says or is refused by name; nothing is stolen, nothing of others removed."""

import errno
import json
import os
import socket

import pytest

import fdpass

FORMS = r"host:port, \[::1\]:port, unix:/path, fd:N or systemd:NAME"


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")


def option(sock, name):
    return sock.getsockopt(socket.SOL_SOCKET, name)


def refused(address, number=errno.EADDRINUSE, **options):
    """listen() raises that errno, and its text says which address."""
    with pytest.raises(OSError, match="cannot bind") as caught:
        fdpass.listen(address, **options)
    assert caught.value.errno == number
    assert address in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------------- host:port


@pytest.mark.parametrize(
    ("text", "family", "host"),
    [
        ("127.0.0.1:0", socket.AF_INET, "127.0.0.1"),
        ("0.0.0.0:0", socket.AF_INET, "0.0.0.0"),
        pytest.param("[::1]:0", socket.AF_INET6, "::1", marks=ipv6),
        pytest.param("[::]:0", socket.AF_INET6, "::", marks=ipv6),
    ],
)
def test_a_host_and_a_port(text, family, host):
    with fdpass.listen(text) as endpoint:
        port = endpoint.port
        assert port > 0
        assert str(endpoint) == (f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}")
        assert endpoint.address[:2] == endpoint.socket.getsockname()[:2] == (host, port)
        assert endpoint.socket.family == family
        assert endpoint.socket.type == socket.SOCK_STREAM
        assert not os.get_inheritable(endpoint.fileno())
        # Bound, and not listening.
        assert option(endpoint.socket, socket.SO_ACCEPTCONN) == 0
        assert repr(endpoint) == f"<Endpoint {endpoint}>"
    assert repr(endpoint) == f"<Endpoint {endpoint} closed>"
    # Its text is an address again.
    with fdpass.listen(str(endpoint)) as again:
        assert again.port == port


def test_a_name_is_looked_up():
    with fdpass.listen("localhost:0") as endpoint:
        assert endpoint.port > 0
    assert "localhost" not in str(endpoint)


def test_a_name_that_nobody_knows_is_the_resolvers_refusal(monkeypatch):
    def unknown(*args, **options):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "not known" in refused("no-such-host:80", socket.EAI_NONAME)


def test_an_address_of_another_machine_is_the_kernels_refusal():
    refused("192.0.2.1:0", errno.EADDRNOTAVAIL)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        ":80",
        "80",
        "127.0.0.1",
        "127.0.0.1:",
        "127.0.0.1:http",
        "127.0.0.1:65536",
        "127.0.0.1:-1",
        "127.0.0.1:99999",
        "127.0.0.1:123456",
        "127.0.0.1:80 ",
        " 127.0.0.1:80",
        "127.0.0.1:٨٠",
        "::1:80",
        "[::1]",
        "[::1]80",
        "[]:80",
        "http://127.0.0.1:80",
        "tcp:127.0.0.1:80",
        "..:80",
        "a" * 70 + ".b:80",
        "unix:",
        "unix:/a\0b",
        "fd:",
        "fd:-1",
        "fd:x",
        "fd:3.0",
        "fd: 3",
        "fd:12345678901",
    ],
)
def test_bad_text_is_a_value_error_with_the_forms(text):
    with pytest.raises(ValueError, match=FORMS):
        fdpass.listen(text)


@pytest.mark.parametrize("address", [None, 80, b"127.0.0.1:0", ("127.0.0.1", 0)])
def test_what_is_no_text_is_a_type_error_with_the_forms(address):
    with pytest.raises(TypeError, match=f"an address is text .{FORMS}.*, not {type(address).__name__}"):
        fdpass.listen(address)


def test_it_serves():
    with fdpass.listen("127.0.0.1:0") as endpoint:
        endpoint.socket.listen()
        with socket.create_connection(endpoint.address) as client, endpoint.socket.accept()[0] as served:
            served.sendall(b"hello")
            assert client.recv(10) == b"hello"


# -------------------------------------------------------------------------------------------------------------- the port is taken


OTHERS = {"plain": (), "reuse address": ("SO_REUSEADDR",), "reuse port": ("SO_REUSEPORT",), "both": ("SO_REUSEADDR", "SO_REUSEPORT")}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("text", ["127.0.0.1:{}", "0.0.0.0:{}"])
def test_a_port_on_which_another_listens_is_refused(options, text):
    with socket.socket() as other:
        for name in options:
            other.setsockopt(socket.SOL_SOCKET, getattr(socket, name), 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert "already in use" in refused(text.format(other.getsockname()[1]))


@pytest.mark.parametrize("options", [(), ("SO_REUSEPORT",)])
def test_a_port_that_another_is_about_to_listen_on_is_refused(options):
    with socket.socket() as other:
        for name in options:
            other.setsockopt(socket.SOL_SOCKET, getattr(socket, name), 1)
        other.bind(("127.0.0.1", 0))
        refused(f"127.0.0.1:{other.getsockname()[1]}")


@pytest.mark.parametrize("listening", [False, True])
def test_two_endpoints_do_not_share_a_port(listening):
    with fdpass.listen("127.0.0.1:0") as endpoint:
        if listening:
            endpoint.socket.listen()
        refused(str(endpoint))
        endpoint.socket.listen()


def test_nor_may_a_stranger_bind_over_it_before_it_listens():
    with fdpass.listen("127.0.0.1:0") as endpoint, socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="in use"):
            other.bind(endpoint.address)


def leave_in_time_wait(listening):
    """A connection whose server side closed first and stays in TIME_WAIT."""
    with socket.create_connection(listening.getsockname()) as client:
        served, _ = listening.accept()
        served.close()
        assert client.recv(1) == b""


def test_connections_in_time_wait_do_not_block_the_next_bind():
    with fdpass.listen("127.0.0.1:0") as endpoint:
        endpoint.socket.listen()
        leave_in_time_wait(endpoint.socket)
    # A bind without any option shows that there is something in the way.
    with socket.socket() as plain, pytest.raises(OSError, match="in use"):
        plain.bind(("127.0.0.1", int(str(endpoint).rpartition(":")[2])))
    with fdpass.listen(str(endpoint)) as again:
        assert str(again) == str(endpoint)
        # A port won in this way is held as any other.
        refused(str(endpoint))
        again.socket.listen()
        refused(str(endpoint))


# -------------------------------------------------------------------------------------------------------------- reuse_port


def test_reuse_port_joins_and_only_those_who_share():
    with fdpass.listen("127.0.0.1:0", reuse_port=True) as first:
        with fdpass.listen(str(first), reuse_port=True) as second:
            for endpoint in (first, second):
                assert option(endpoint.socket, socket.SO_REUSEPORT)
                endpoint.socket.listen()
        refused(str(first))
        with first.member() as member:
            member.listen()
            assert member.getsockname() == first.address


def test_reuse_port_does_not_join_who_does_not_share():
    with fdpass.listen("127.0.0.1:0") as alone:
        refused(str(alone), reuse_port=True)
        alone.socket.listen()
        refused(str(alone), reuse_port=True)


@ipv6
def test_members_join_once_the_port_is_shared():
    with fdpass.listen("[::1]:0") as endpoint:
        with pytest.raises(OSError, match="in use"):
            endpoint.member()
        endpoint.share_port()
        with endpoint.member() as member:
            assert member.getsockname() == endpoint.address
            for sock in (member, endpoint.socket):
                sock.listen()


@pytest.mark.parametrize("text", ["unix:/x", "fd:3", "systemd:web"])
def test_reuse_port_is_for_a_tcp_port(text):
    with pytest.raises(ValueError, match=f"reuse_port shares a TCP port; '{text}' has none"):
        fdpass.listen(text, reuse_port=True)


# -------------------------------------------------------------------------------------------------------------- unix:


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "socket")


def bound(path, kind=socket.SOCK_STREAM):
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(path)
    return sock


def test_a_unix_path(path):
    with fdpass.listen(f"unix:{path}") as endpoint:
        assert str(endpoint) == f"unix:{path}"
        assert endpoint.port is None
        assert endpoint.address == path
        assert option(endpoint.socket, socket.SO_ACCEPTCONN) == 0
        endpoint.socket.listen()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
    assert not os.path.lexists(path)


def test_a_stale_path_is_replaced(path):
    bound(path).close()
    before = os.lstat(path).st_ino, os.lstat(path).st_mtime_ns
    with fdpass.listen(f"unix:{path}") as endpoint:
        assert (os.lstat(path).st_ino, os.lstat(path).st_mtime_ns) != before
        endpoint.socket.listen()
    assert not os.path.lexists(path)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_a_live_path_is_refused(path, kind):
    with bound(path, kind) as other:
        other.listen()
        assert "a live socket is bound there" in refused(f"unix:{path}")
        assert os.path.lexists(path)


def test_a_live_path_with_a_full_queue_is_refused(path):
    clients = []
    with bound(path) as other:
        other.listen(0)
        try:
            while True:
                clients.append(socket.socket(socket.AF_UNIX))
                clients[-1].setblocking(False)
                clients[-1].connect(path)
        except BlockingIOError:
            pass
        assert "a live socket" in refused(f"unix:{path}")
    for client in clients:
        client.close()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_path_that_is_bound_and_not_listening_is_refused(path, kind):
    with bound(path, kind):
        assert "a live socket" in refused(f"unix:{path}")
        assert os.path.lexists(path)


def test_two_endpoints_do_not_share_a_path(path):
    with fdpass.listen(f"unix:{path}"):
        refused(f"unix:{path}")
        assert os.path.lexists(path)


def test_connections_that_outlive_their_listener_do_not_keep_the_path(path):
    other = bound(path)
    other.listen()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        served, _ = other.accept()
        other.close()
        with served, fdpass.listen(f"unix:{path}"):
            assert served.getsockname() == path


def test_a_symbolic_link_is_refused(path, tmp_path):
    target = str(tmp_path / "target")
    bound(target).close()
    os.symlink(target, path)
    assert "a symbolic link, which is not followed" in refused(f"unix:{path}", errno.EEXIST)
    os.unlink(target)
    assert "a symbolic link" in refused(f"unix:{path}", errno.EEXIST)
    assert os.path.islink(path)


def test_a_file_that_is_no_socket_is_refused(path):
    with open(path, "w") as file:
        file.write("precious")
    assert "a file that is no socket" in refused(f"unix:{path}", errno.EEXIST)
    with open(path) as file:
        assert file.read() == "precious"


def test_a_directory_is_refused(tmp_path):
    assert "a file that is no socket" in refused(f"unix:{tmp_path}", errno.EEXIST)


def test_a_directory_that_is_not_there_is_the_kernels_refusal(path):
    refused(f"unix:{path}/below", errno.ENOENT)


def test_a_path_has_107_bytes_at_most(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    room = 107 - len(os.fsencode(str(tmp_path))) - 1
    longest = f"{tmp_path}/{'x' * room}"
    with fdpass.listen(f"unix:{longest}") as endpoint:
        assert endpoint.address == longest
    with pytest.raises(ValueError, match=r"at most 107 bytes, .* has 108"):
        fdpass.listen(f"unix:{longest}x")
    with pytest.raises(ValueError, match=f"has {107 + room}"):
        fdpass.listen(f"unix:{tmp_path}/{'é' * room}")


def test_the_file_is_left_to_whoever_took_the_name(path):
    first = fdpass.listen(f"unix:{path}")
    os.unlink(path)
    with fdpass.listen(f"unix:{path}"):
        first.close()
        assert os.path.lexists(path)
    assert not os.path.lexists(path)


def test_a_file_that_is_gone_already_is_no_error(path):
    with fdpass.listen(f"unix:{path}"):
        os.unlink(path)


def test_a_forked_child_does_not_remove_the_file(path):
    with fdpass.listen(f"unix:{path}") as endpoint:
        pid = os.fork()
        if pid == 0:
            endpoint.close()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert os.path.lexists(path)


# -------------------------------------------------------------------------------------------------------------- fd:


def test_a_bound_descriptor():
    with socket.create_server(("127.0.0.1", 0)) as given:
        with fdpass.listen(f"fd:{given.fileno()}") as endpoint:
            assert str(endpoint) == f"127.0.0.1:{given.getsockname()[1]}"
            assert endpoint.fileno() != given.fileno()
            assert endpoint.adopted
            assert option(endpoint.socket, socket.SO_ACCEPTCONN)
        assert given.getsockname()  # still open: the number is its giver's


@pytest.mark.parametrize("family", [socket.AF_INET, pytest.param(socket.AF_INET6, marks=ipv6), socket.AF_UNIX])
@pytest.mark.parametrize("listening", [False, True])
def test_any_bound_stream_socket(family, listening, path):
    with socket.socket(family) as given:
        given.bind({socket.AF_INET: ("127.0.0.1", 0), socket.AF_INET6: ("::1", 0), socket.AF_UNIX: path}[family])
        if listening:
            given.listen()
        os.set_inheritable(given.fileno(), True)
        with fdpass.listen(f"fd:{given.fileno()}") as endpoint:
            assert endpoint.address == given.getsockname()
            assert option(endpoint.socket, socket.SO_ACCEPTCONN) == listening
            # Nor do programs that are started later get the number it came under.
            assert not os.get_inheritable(given.fileno())
            assert not os.get_inheritable(endpoint.fileno())
        if family == socket.AF_UNIX:
            # Not bound here, not removed here.
            assert os.path.lexists(path)


def test_a_socket_that_listens_without_a_name_of_its_own():
    with socket.socket() as given:
        given.listen()
        with fdpass.listen(f"fd:{given.fileno()}") as endpoint:
            assert endpoint.port == given.getsockname()[1]


def test_adopting_flips_no_flag():
    with socket.create_server(("127.0.0.1", 0)) as given:
        for blocking in (True, False):
            given.setblocking(blocking)
            with fdpass.listen(f"fd:{given.fileno()}"):
                assert os.get_blocking(given.fileno()) == blocking


@pytest.mark.parametrize(
    ("make", "actual"),
    [
        (lambda: socket.socket(), "a socket that is neither bound nor listening"),
        (lambda: socket.socket(socket.AF_UNIX), "a socket that is neither bound nor listening"),
        (lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM), "a datagram socket"),
        (lambda: fdpass.OwnedFd(os.memfd_create("file")), "a regular file"),
        (lambda: fdpass.OwnedFd(os.eventfd(0)), "an anonymous inode (eventfd)"),
    ],
    ids=["tcp", "unix", "datagram", "file", "eventfd"],
)
def test_another_kind_of_descriptor_is_refused_and_left_open(make, actual):
    with make() as given:
        with pytest.raises(
            fdpass.WrongDescriptorError, match=f"fd:{given.fileno()} is .* it must be a bound or listening stream socket"
        ) as caught:
            fdpass.listen(f"fd:{given.fileno()}")
        assert caught.value.actual == actual
        os.fstat(given.fileno())


def test_a_connected_socket_is_refused(path):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        served, _ = server.accept()
        left, right = socket.socketpair()
        with bound(path) as local:
            local.listen()
            right.close()
            right = socket.socket(socket.AF_UNIX)
            right.connect(path)
            inner, _ = local.accept()
        with served, left, right, inner:
            for given in (client, served, inner):
                with pytest.raises(fdpass.WrongDescriptorError, match="is a connected socket"):
                    fdpass.listen(f"fd:{given.fileno()}")


def test_a_number_that_is_not_open_is_refused():
    with pytest.raises(fdpass.WrongDescriptorError, match="fd:987654 is not open"):
        fdpass.listen("fd:987654")


# -------------------------------------------------------------------------------------------------------------- systemd:

#: What systemd does: the sockets at 3 and up, the variables, exec.
LAUNCHER = """
import json, os, sys
numbers, names, count, program = json.loads(sys.argv[1])
spare = [os.dup2(os.dup(number), 50 + place) for place, number in enumerate(numbers)]
for place, number in enumerate(spare):
    os.dup2(number, 3 + place, inheritable=True)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count}
if names is not None:
    os.environ["LISTEN_FDNAMES"] = names
os.execv(sys.executable, [sys.executable, "-P", "-W", "error", "-c", program, *sys.argv[2:]])
"""

ASK = """
import fdpass, json, os, sys
told = []
for name in sys.argv[1:]:
    try:
        with fdpass.listen(f"systemd:{name}") as endpoint:
            told.append([str(endpoint), endpoint.adopted, os.get_inheritable(endpoint.fileno())])
    except ValueError as error:
        told.append(str(error))
print(json.dumps(told))
"""


@pytest.fixture
def activated(run_python):
    """activated(sockets, LISTEN_FDNAMES, asked, count=None): what a program that was started with these sockets tells about each name."""

    def activate(sockets, names, asked, count=None):
        numbers = [sock.fileno() for sock in sockets]
        setup = json.dumps([numbers, names, count or str(len(numbers)), ASK])
        return json.loads(run_python(LAUNCHER, setup, *asked, pass_fds=numbers).stdout)

    return activate


def test_sockets_from_systemd(activated):
    with socket.create_server(("127.0.0.1", 0)) as web, socket.create_server(("127.0.0.1", 0)) as admin:
        told = activated([web, admin], "web:admin", ["admin", "web", "other"])
        assert told[0] == [f"127.0.0.1:{admin.getsockname()[1]}", True, False]
        assert told[1] == [f"127.0.0.1:{web.getsockname()[1]}", True, False]
        assert "0 sockets have that name; handed over are web, admin" in told[2]


def test_sockets_without_names_are_called_unknown(activated):
    with socket.create_server(("127.0.0.1", 0)) as one:
        assert activated([one], None, ["unknown"])[0][0] == f"127.0.0.1:{one.getsockname()[1]}"


def test_a_name_that_two_sockets_have_is_refused(activated):
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        assert "2 sockets have that name" in activated([one, two], "web:web", ["web"])[0]


@pytest.mark.parametrize("count", ["x", "-1", "\N{SUPERSCRIPT TWO}"])
def test_a_count_that_is_no_number_is_refused(activated, count):
    assert "no sockets were handed to this process" in activated([], "web", ["web"], count)[0]


def test_sockets_for_another_process_are_refused(monkeypatch):
    monkeypatch.setenv("LISTEN_FDS", "1")
    for pid in ("", str(os.getppid())):
        monkeypatch.setenv("LISTEN_PID", pid)
        with pytest.raises(ValueError, match="systemd:web: no sockets were handed to this process"):
            fdpass.listen("systemd:web")
    monkeypatch.delenv("LISTEN_PID")
    with pytest.raises(ValueError, match="no sockets were handed"):
        fdpass.listen("systemd:web")


# -------------------------------------------------------------------------------------------------------------- owning it


def test_closed_it_says_so():
    endpoint = fdpass.listen("127.0.0.1:0")
    text = str(endpoint)
    endpoint.close()
    endpoint.close()
    assert endpoint.fileno() == -1
    assert str(endpoint) == text
    for use in (lambda: endpoint.socket, lambda: endpoint.address, lambda: endpoint.port, endpoint.share_port, endpoint.member):
        with pytest.raises(fdpass.ClosedError, match=f"the endpoint {text} was closed"):
            use()


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_forgotten_it_warns_and_gives_all_up(kind, path):
    endpoints = [fdpass.listen("127.0.0.1:0" if kind == "tcp" else f"unix:{path}")]
    with pytest.warns(ResourceWarning, match="unclosed <Endpoint"):
        endpoints.clear()
    assert not os.path.lexists(path)


def test_a_refused_address_leaves_nothing(path, fd_count):
    # The balance of every test shows it too; here for each in turn.
    bound(path).close()
    os.chmod(path, 0o600)
    before = fd_count()
    for address in ("192.0.2.1:0", "fd:987654", f"unix:{path}/x", f"unix:{os.path.dirname(path)}"):
        with pytest.raises((OSError, ValueError)):
            fdpass.listen(address)
        assert fd_count() == before
