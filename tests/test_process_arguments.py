"""Descriptors as arguments of a process that is being started, under each start method: all arrive, with one owner each, or none starts."""

import contextlib
import copyreg
import json
import multiprocessing
import os
import pickle
import socket
import ssl
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest

import fdpass

sys.path.insert(0, str(Path(__file__).parent))  # children.py, by name, here and in every spawned child

import children

METHODS = ("fork", "spawn", "forkserver")
PICKLING = ("spawn", "forkserver")


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "out")


@contextlib.contextmanager
def running(method, target, *args):
    """A started process; afterwards it has ended with 0 and is closed."""
    process = multiprocessing.get_context(method).Process(target=target, args=args)
    process.start()
    try:
        yield process
        process.join()
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()
        process.close()


def run(method, target, *args):
    with running(method, target, *args):
        pass


def told(out):
    return json.loads(Path(out).read_text())


def forkserver_is_well():
    """The same fork server as before still starts processes."""
    run("forkserver", children.nothing)


@pytest.fixture
def sockets():
    """sockets(n): n sockets, closed afterwards."""
    made = []

    def make(count):
        made.extend(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(count))
        return made[-count:]

    yield make
    for sock in made:
        sock.close()


# -------------------------------------------------------------------------------------------------------------- what travels


def test_every_kind_of_handle_works_in_the_child(method):
    pairs = [socket.socketpair() for _ in range(2)]
    left, right = fdpass.Pipe()
    with fdpass.OwnedFd(pairs[1][1].detach()) as owned, fdpass.SocketHandle(pairs[0][1]) as handle, left, right:
        pairs[0][1].close()
        with running(method, children.speak, [handle, owned, right]):
            assert pairs[0][0].recv(10) == b"x0"
            assert pairs[1][0].recv(10) == b"x1"
            assert left.recv_message()[0] == b"x2"
    for near, _ in pairs:
        near.close()


def test_registered_raw_sockets_and_connections_work_in_the_child(method):
    near, far = socket.socketpair()
    other, subclass = socket.socketpair()
    subclass = children.Framed(fileno=subclass.detach())
    mine, connection = multiprocessing.Pipe()
    with near, far, other, subclass, mine, connection, fdpass.registered(), running(method, children.speak, [far, subclass, connection]):
        assert near.recv(10) == b"x0"
        assert other.recv(10) == b"x1"
        assert mine.recv_bytes() == b"x2"


@pytest.mark.parametrize("timeout", [None, 0.0, 1.5])
def test_kind_timeout_and_blocking_state_are_kept_and_nothing_is_inheritable(method, out, timeout):
    plain, special = socket.socketpair()
    special = children.Framed(fileno=special.detach())
    special.label = "kept"
    with plain, special, fdpass.SocketHandle(plain) as first, fdpass.registered():
        plain.settimeout(timeout)
        special.settimeout(timeout)
        handle = fdpass.SocketHandle(plain)
        first.close()
        with handle:
            run(method, children.report, out, [handle, plain, special])
        found = told(out)
        # The flag belongs to the description: what was done in the child would show here.
        for sock in (plain, special):
            assert os.get_blocking(sock.fileno()) == (timeout is None)
            assert sock.gettimeout() == timeout
        assert [item["type"] for item in found["items"]] == ["SocketHandle", "socket", "Framed"]
        for item in found["items"]:
            assert item["timeout"] == timeout
            assert item["blocking"] == (timeout is None)
            assert item["kind"] == [socket.AF_UNIX, socket.SOCK_STREAM, 0]
            assert item["inheritable"] is False
            assert item["number"] >= 3
        assert found["items"][2]["label"] == "kept"
        assert found["survived_exec"] == []
        assert [item["cookie"] for item in found["items"]] == [children.cookie(plain), children.cookie(plain), children.cookie(special)]


@pytest.mark.parametrize("count", [1, 190, 260])
def test_nothing_is_inheritable_however_it_came(method, out, sockets, count):
    # The last ones under forkserver ride a socket pair.
    items = [fdpass.SocketHandle(sock) for sock in sockets(count)]
    run(method, children.report, out, items)
    found = told(out)
    assert found["survived_exec"] == []
    assert not any(item["inheritable"] for item in found["items"])
    assert len({item["number"] for item in found["items"]}) == count


@pytest.mark.parametrize(
    ("method", "count"),
    [*((method, 300) for method in METHODS), ("forkserver", 199), ("forkserver", 200), ("forkserver", 201), ("forkserver", 600)],
)
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "handles"])
def test_hundreds_arrive_in_order(method, count, raw, out, sockets, limit_nofile):
    items = sockets(count)
    expected = [children.cookie(sock) for sock in items]
    # Here each has two numbers; the fork server and its children keep to the limit that they were started with, the usual 1024 or more.
    with limit_nofile(4096), fdpass.registered():
        run(method, children.report_cookies, out, items if raw else [fdpass.SocketHandle(sock) for sock in items])
    assert told(out) == expected


@pytest.mark.parametrize("method", PICKLING)
@pytest.mark.parametrize("count", [10, 300])
def test_the_child_has_exactly_what_it_was_given(method, count, out, sockets):
    items = [fdpass.SocketHandle(sock) for sock in sockets(count)]
    run(method, children.report_descriptors, out, items)
    assert told(out) == [count, 0]


# -------------------------------------------------------------------------------------------------------------- twice


def test_the_same_descriptor_any_number_of_times(method, out):
    near, far = socket.socketpair()
    connection = multiprocessing.connection.Connection(os.dup(near.fileno()))
    with near, far, connection, fdpass.SocketHandle(near) as handle, fdpass.registered():
        # The same object twice, two objects on one number (a view that gives the number back), two numbers on one description.
        view = socket.socket(fileno=near.fileno())
        try:
            items = [handle, handle, near, view, connection, near]
            run(method, children.report_cookies, out, items)
        finally:
            view.detach()
        assert told(out) == [children.cookie(near)] * 6


@pytest.mark.parametrize("method", PICKLING)
def test_objects_on_one_number_get_an_owner_each(method, out):
    near, far = socket.socketpair()
    view = socket.socket(fileno=near.fileno())
    with near, far, fdpass.registered():
        try:
            run(method, children.report, out, [near, view])
        finally:
            view.detach()
    first, second = told(out)["items"]
    assert first["number"] != second["number"]
    assert first["cookie"] == second["cookie"]


def test_one_number_twice_on_a_ride(out, sockets):
    socks = sockets(230)
    views = [socket.socket(fileno=sock.fileno()) for sock in socks]
    try:
        with fdpass.registered():
            run("forkserver", children.report_cookies, out, [*socks, *views])
    finally:
        for view in views:
            view.detach()
    assert told(out) == [children.cookie(sock) for sock in socks] * 2


# -------------------------------------------------------------------------------------------------------------- refused


def starts_nothing(method, args, error, words):
    """Process.start() raises; no process was started and no descriptor is left, which the balance of the test proves."""
    process = multiprocessing.get_context(method).Process(target=children.nothing, args=args)
    with pytest.raises(error, match=words):
        process.start()
    assert process.pid is None
    if method == "forkserver":
        forkserver_is_well()


@pytest.mark.parametrize("method", PICKLING)
@pytest.mark.parametrize("before", [0, 210])
def test_a_closed_socket_is_refused_before_anything_starts(method, before, sockets):
    closed = socket.socket()
    closed.close()
    with fdpass.registered():
        starts_nothing(method, (*sockets(before), closed), ValueError, "socket is closed")


@pytest.mark.parametrize("method", PICKLING)
def test_everything_closed_is_refused_before_anything_starts(method):
    near, far = socket.socketpair()
    left, right = fdpass.Pipe()
    mine, connection = multiprocessing.Pipe()
    handle, owned = fdpass.SocketHandle(near), fdpass.OwnedFd(far.detach())
    opened = fdpass.SocketHandle(near)
    opened.open().close()
    for item in (near, left, right, mine, connection, handle, owned):
        item.close()
    with fdpass.registered():
        for item, error in [
            (handle, fdpass.ClosedError),
            (owned, fdpass.ClosedError),
            (left, fdpass.ClosedError),
            (connection, ValueError),
            (opened, fdpass.TicketError),
        ]:
            starts_nothing(method, (item,), error, "closed|opened already")


@pytest.mark.parametrize("method", PICKLING)
def test_a_number_that_is_not_open_any_more_is_refused(method):
    near, far = socket.socketpair()
    os.close(near.fileno())
    with far, fdpass.registered():
        starts_nothing(method, (near,), ValueError, "socket is closed")
    near.detach()


@pytest.mark.parametrize("method", PICKLING)
def test_an_ssl_socket_is_refused_with_what_to_do(method):
    near, far = socket.socketpair()
    context = ssl.create_default_context()
    context.check_hostname = False
    with far, context.wrap_socket(near, do_handshake_on_connect=False) as wrapped, fdpass.registered():
        starts_nothing(method, (wrapped,), TypeError, r"SSLSocket cannot be passed.*Pass the plain socket before wrap_socket\(\)")


@pytest.mark.parametrize("method", PICKLING)
@pytest.mark.parametrize("count", [1, 300])
def test_an_argument_that_does_not_pickle_leaves_nothing(method, count, sockets):
    items = [fdpass.SocketHandle(sock) for sock in sockets(count)]
    starts_nothing(method, (*items, children.FailsToPickle()), LookupError, "does not pickle")


# -------------------------------------------------------------------------------------------------------------- after the start


@pytest.mark.parametrize("count", [1, 300])
def test_the_parent_keeps_only_its_own(method, count, sockets, fd_count):
    items = [fdpass.SocketHandle(sock) for sock in sockets(count)]
    before = fd_count()
    run(method, children.nothing, *items)
    assert fd_count() == before


def test_a_ride_keeps_one_end_open_until_the_process_object_is_gone_no_more(sockets, fd_count):
    items = [fdpass.SocketHandle(sock) for sock in sockets(300)]
    grown = []
    for count in (100, 300):
        before = fd_count()
        with running("forkserver", children.nothing, *items[:count]):
            grown.append(fd_count() - before)
    # The far end: the fork server is sent a duplicate at a moment of which nobody tells us. The near end went with the pickling.
    assert grown[1] - grown[0] == 1


def test_a_handle_that_is_given_away_ends_with_its_last_holder(method):
    near, far = socket.socketpair()
    with near:
        with running(method, children.nothing, fdpass.SocketHandle(far)):
            far.close()
        # Neither the started process nor this one holds the far end any more.
        assert near.recv(1) == b""


@pytest.mark.parametrize("method", PICKLING)
@pytest.mark.parametrize("count", [1, 300])
def test_a_child_that_dies_while_it_loads_leaves_nothing(method, count, sockets):
    items = [fdpass.SocketHandle(sock) for sock in sockets(count)]
    process = multiprocessing.get_context(method).Process(target=children.nothing, args=(*items, children.DiesWhenLoaded(), *items))
    process.start()
    process.join()
    assert process.exitcode == 7
    process.close()
    if method == "forkserver":
        forkserver_is_well()


@pytest.mark.parametrize("method", PICKLING)
def test_a_number_closed_after_the_pickling_is_never_taken_for_another(method, unix_pair, monkeypatch):
    # The number is another socket's by the time the child gets it: the child refuses, loudly, and its target does not run.
    handle = fdpass.SocketHandle(unix_pair[0])
    dump = multiprocessing.reduction.dump

    def dump_and_swap(obj, file):
        dump(obj, file)
        if obj is process:
            os.dup2(unix_pair[1].fileno(), handle.fileno(), inheritable=False)

    monkeypatch.setattr(multiprocessing.reduction, "dump", dump_and_swap)
    process = multiprocessing.get_context(method).Process(target=children.nothing, args=(handle,))
    process.start()
    process.join()
    assert process.exitcode == 1
    process.close()
    handle.close()


@pytest.mark.parametrize("kind", ["closed", "another file's"])
def test_what_was_claimed_and_closed_already_is_named(monkeypatch, marked, kind):
    from fdpass import _carriers

    monkeypatch.setattr(_carriers, "_inbox", _carriers._Inbox())
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    number = os.dup(marked())
    token = ("number", number, 0, _carriers._identity(number))
    _carriers.claim(token).close()
    if kind != "closed":
        assert marked() == number  # the lowest that is free
    with pytest.raises(fdpass.TicketError, match=f"inherited descriptor {number} is not what was pickled"):
        _carriers.claim(token)


# -------------------------------------------------------------------------------------------------------------- no carrier


@pytest.fixture
def holders(unix_pair):
    """One of each that only fdpass pickles."""
    left, right = fdpass.Pipe()
    with left, right, fdpass.SocketHandle(unix_pair[0]) as handle, fdpass.OwnedFd(os.dup(unix_pair[0].fileno())) as owned:
        yield {"SocketHandle": handle, "OwnedFd": owned, "Channel": left}


@pytest.mark.parametrize("kind", ["SocketHandle", "OwnedFd", "Channel"])
def test_a_plain_pickle_goes_to_the_store(store, holders, kind):
    for dumps in (pickle.dumps, ForkingPickler.dumps):
        with pickle.loads(dumps(holders[kind])) as loaded:
            assert type(loaded) is type(holders[kind])
            assert children.cookie(loaded) == children.cookie(holders[kind])


@pytest.mark.parametrize("kind", ["number", "index", "ride"])
def test_an_inherited_token_loads_only_in_a_start(kind):
    from fdpass import _carriers

    with pytest.raises(fdpass.TicketError, match="only in its start"):
        _carriers.claim((kind, 0, 0, (0, 0)))


@pytest.mark.parametrize("method", METHODS)
def test_an_inherited_token_does_not_load_once_the_child_runs(method, out):
    from fdpass import _carriers

    raw = pickle.dumps(Loads(_carriers.claim, ("number", 1, 0, (0, 0))))
    run(method, children.load_later, out, raw)
    assert "only in its start" in told(out)


def test_a_frames_token_loads_only_in_a_frame():
    from fdpass import _carriers

    with pytest.raises(fdpass.TicketError, match=r"only by Channel\.recv\(\)"):
        _carriers.claim(("frame", 0))
    with pytest.raises(fdpass.TicketError, match="unknown kind 'later'"):
        _carriers.claim(("later", 0))


class Loads:
    """Pickles as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], (self.call[1],)


# -------------------------------------------------------------------------------------------------------------- register()


def pickler_state():
    return (
        dict(ForkingPickler.__dict__),
        dict(ForkingPickler._extra_reducers),
        dict(copyreg.dispatch_table),
    )


@pytest.fixture
def as_found():
    """The test begins unregistered and leaves ForkingPickler exactly as it was."""
    fdpass.unregister()
    before = pickler_state()
    yield before
    assert pickler_state() == before


def test_register_and_unregister_restore_exactly(as_found):
    fdpass.register()
    assert pickler_state() != as_found
    registered = pickler_state()
    fdpass.register()
    assert pickler_state() == registered
    fdpass.unregister()
    assert pickler_state() == as_found
    fdpass.unregister()
    assert pickler_state() == as_found


def test_registered_restores_on_the_way_out_of_an_error_too(as_found):
    with pytest.raises(LookupError), fdpass.registered():
        raise LookupError
    assert pickler_state() == as_found


def test_registered_inside_register_changes_nothing(as_found):
    fdpass.register()
    registered = pickler_state()
    with fdpass.registered(), fdpass.registered():
        assert pickler_state() == registered
    assert pickler_state() == registered
    fdpass.unregister()


def test_anothers_hook_is_not_replaced(as_found):
    def theirs(pickler, obj):
        return NotImplemented

    ForkingPickler.reducer_override = theirs
    try:
        with pytest.raises(RuntimeError, match="reducer_override already"):
            fdpass.register()
        fdpass.unregister()
        assert ForkingPickler.__dict__["reducer_override"] is theirs
    finally:
        del ForkingPickler.reducer_override


def test_a_registration_of_somebody_else_in_between_stays(as_found):
    class Theirs:
        pass

    with fdpass.registered():
        ForkingPickler.register(Theirs, lambda obj: (int, (5,)))
    assert pickle.loads(ForkingPickler.dumps(Theirs())) == 5
    del ForkingPickler._extra_reducers[Theirs]


ORDERS = {
    "register first": "import fdpass; fdpass.register(); import multiprocessing.connection, socket",
    "register last": "import multiprocessing.connection, socket; import fdpass; fdpass.register()",
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("method", PICKLING)
def test_the_order_of_imports_does_not_matter(run_python, order, method, out):
    # The same connection twice, which the standard library's own reducers refuse under spawn: it shows whose were used.
    program = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
{ORDERS[order]}
import os, children, multiprocessing
if __name__ == "__main__":
    near, far = socket.socketpair()
    near.settimeout(1.5)
    connection = multiprocessing.connection.Connection(os.dup(near.fileno()))
    view = socket.socket(fileno=near.fileno())
    items = [near, view, connection]
    process = multiprocessing.get_context({method!r}).Process(target=children.report, args=({out!r}, items))
    process.start(); process.join(); view.detach()
    assert process.exitcode == 0, process.exitcode
    near.close(); far.close(); connection.close()
"""
    run_python(program)
    found = told(out)["items"]
    assert [item["type"] for item in found] == ["socket", "socket", "Connection"]
    assert found[0]["timeout"] == 1.5
