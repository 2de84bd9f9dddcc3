"""register(): raw sockets and connections through queues, pools and executors, in processes whose programs know nothing of it."""

import copyreg
import multiprocessing
import os
import pickle
import ssl
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import reduction, spawn
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest

import fdpass

sys.path.insert(0, str(Path(__file__).parent))  # store_targets.py, by name, here and in every spawned child

import store_targets

METHODS = ["fork", "spawn", "forkserver"]


def places():
    tables = ForkingPickler._extra_reducers, copyreg.dispatch_table
    return [dict(one) for one in (vars(ForkingPickler), *tables, vars(reduction), vars(spawn))]


@pytest.fixture
def as_found():
    fdpass.unregister()
    before = places()
    yield before
    assert places() == before


@pytest.fixture
def dialogue(store, as_found, method):
    """dialogue(): a process of store_targets.echo, its queue, and the queue of its answers."""
    context = multiprocessing.get_context(method)
    queue, out = context.Queue(), context.Queue()
    process = None

    def begin():
        nonlocal process
        process = context.Process(target=store_targets.echo, args=(queue, out))
        process.start()
        return process, queue, out

    yield begin
    fdpass.unregister()
    process.join()
    assert process.exitcode == 0
    process.close()
    queue.close()
    queue.join_thread()
    out._reader.close()
    out._writer.close()


# -------------------------------------------------------------------------------------------------------------- what goes through


@pytest.mark.parametrize("method", METHODS)
def test_a_queue_carries_raw_sockets_and_the_child_is_registered_too(dialogue, method, unix_pair):
    fdpass.register(max_unclaimed=77)
    process, queue, out = dialogue()
    queue.put(unix_pair[0])
    assert int(unix_pair[1].recv(100)) == process.pid
    queue.put(fdpass.SocketHandle(unix_pair[0]))
    assert int(unix_pair[1].recv(100)) == process.pid
    queue.put(None)
    hooks, limit, sharer = out.get()
    assert (hooks, limit) == (["dump", "reducer_override"], 77)
    assert not sharer
    assert fdpass.store_stats().claims == 2
    assert "multiprocessing.resource_sharer" not in sys.modules or not multiprocessing.resource_sharer._resource_sharer._cache


@pytest.mark.parametrize("method", METHODS)
def test_put_and_close_reaches_the_receiver_and_warns_the_sender(run_python, method):
    done = run_python(f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import multiprocessing, socket, warnings, store_targets, fdpass
if __name__ == "__main__":
    warnings.simplefilter("always")
    fdpass.register()
    context = multiprocessing.get_context({method!r})
    queue, out = context.Queue(), context.Queue()
    process = context.Process(target=store_targets.echo, args=(queue, out))
    process.start()
    near, far = socket.socketpair()
    # Held back until the socket is closed: the feeder begins with the first item.
    with queue._notempty:
        queue._start_thread()
        for item in (socket.socket(), far, fdpass.SocketHandle(near)):
            queue._sem.acquire()
            queue._buffer.append([item])
            item.close()
        queue._notempty.notify()
    for _ in range(3):
        print(*out.get())
    queue.put(None); print(out.get()); process.join(); near.close()
    queue.close(); queue.join_thread(); out.close(); out.join_thread()
    assert process.exitcode == 0
""")
    lines = done.stdout.splitlines()
    for line, kind in zip(lines, ("socket", "socket", "SocketHandle"), strict=False):
        assert line.startswith(f"TicketError an item with a {kind} was put into a queue, and the {kind} was closed before")
    assert "Put a SocketHandle(sock) instead" in lines[0]
    assert "let go of it without close()" in lines[2]
    assert done.stderr.count("RuntimeWarning: an item with a socket") == 2
    assert done.stderr.count("RuntimeWarning: an item with a SocketHandle") == 1


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_executors_and_pools(store, as_found, unix_pair, method):
    # A program of its own would not see what is left here: nothing.
    context = multiprocessing.get_context(method)
    near, far = unix_pair
    mine = store_targets.Mine(fileno=os.dup(near.fileno()))
    closed, closed_handle = near.dup(), fdpass.SocketHandle(near)
    closed.close()
    closed_handle.close()
    with mine, fdpass.registered():
        with ProcessPoolExecutor(1, mp_context=context) as executor:
            assert executor.submit(store_targets.pids_of, [near, mine]).result() == ["socket", "Mine"]
            assert len(far.recv(100)) >= 2
            with pytest.raises(ValueError, match=r"Put a SocketHandle\(sock\) instead"):
                executor.submit(store_targets.pids_of, [closed]).result()
            assert executor.submit(store_targets.pids_of, [near]).result() == ["socket"]
        with context.Pool(1) as pool:
            assert pool.map(store_targets.pids_of, [[near], [mine, near]]) == [["socket"], ["Mine", "socket"]]
            with pytest.raises(ValueError, match=r"was given to a pool, .*Give it a SocketHandle\(sock\) instead"):
                pool.apply_async(store_targets.pids_of, ([closed],)).get()
            with pytest.raises(fdpass.ClosedError, match=r"was given to a pool, .*let go of it without close\(\)"):
                pool.apply_async(store_targets.pids_of, ([closed_handle],)).get()
            assert pool.apply(store_targets.pids_of, ([near],)) == ["socket"]
            pool.close()
            pool.join()
    assert fdpass.store_stats().unclaimed == 0


def test_a_connection_goes_through_a_pipe(store, as_found):
    left, right = multiprocessing.Pipe()
    one, other = multiprocessing.Pipe(duplex=False)
    with left, right, one, other, fdpass.registered():
        left.send((one, other))
        reader, writer = right.recv()
        with reader, writer:
            assert (reader.readable, reader.writable, writer.readable, writer.writable) == (True, False, False, True)
            writer.send("through it")
            assert one.recv() == "through it"


def test_dup_fd_is_ours(store, as_found, marked, content):
    with fdpass.registered():
        raw = ForkingPickler.dumps(reduction.DupFd(marked("shared")))
        number = pickle.loads(raw).detach()
        try:
            assert content(number) == "shared"
        finally:
            os.close(number)
        with pytest.raises(fdpass.TicketError, match="claimed already"):
            pickle.loads(raw).detach()
        # One that is never pickled is closed with its object; one may be detached where it is.
        kept = reduction.DupFd(marked("here"))
        here = kept.detach()
        assert content(here) == "here"
        os.close(here)
        with pytest.raises(fdpass.ClosedError, match="detached already"):
            kept.detach()
    assert fdpass.store_stats().made == 1


@pytest.mark.parametrize("free", [0, 1])
def test_dup_fd_wants_a_number_for_its_users_duplicate_too(store, as_found, marked, content, full_table, free):
    with fdpass.registered():
        arrived = pickle.loads(ForkingPickler.dumps(reduction.DupFd(marked("kept"))))
        with full_table(free=free) as limit, pytest.raises(fdpass.DescriptorsLostError, match="needed 2 free numbers") as caught:
            arrived.detach()
        assert (caught.value.needed, caught.value.got, caught.value.limit) == (2, free, limit)
        assert fdpass.store_stats().unclaimed == 1
        number = arrived.detach()
        try:
            assert content(number) == "kept"
        finally:
            os.close(number)


def test_heap_arenas_and_buffer_wrappers_pickle_and_shared_ctypes_do_not(store, as_found, run_python):
    run_python("""
import multiprocessing, fdpass
from multiprocessing import heap, sharedctypes
from multiprocessing.reduction import ForkingPickler
fdpass.register()
arena = heap.Arena(4096)
arena.buffer[:5] = b"hello"
other = ForkingPickler.loads(ForkingPickler.dumps(arena))
assert other.buffer[:5] == b"hello"
other.buffer[:5] = b"HELLO"
assert arena.buffer[:5] == b"HELLO"
assert fdpass.store_stats().claims == 1
wrapper = heap.BufferWrapper(64)
wrapper.create_memoryview()[:5] = b"hello"
assert ForkingPickler.loads(ForkingPickler.dumps(wrapper)).create_memoryview()[:5] == b"hello"
assert fdpass.store_stats().claims == 2
for shared in (multiprocessing.Value("i"), multiprocessing.Array("i", 2), sharedctypes.RawValue("i"), multiprocessing.Lock()):
    try:
        ForkingPickler.dumps(shared)
    except RuntimeError as error:
        assert "through inheritance" in str(error), error
    else:
        raise AssertionError(shared)
""")


@pytest.fixture
def own_queue():
    """A queue whose both ends are here, its feeder running."""
    queue = multiprocessing.Queue()
    queue.put(None)
    queue.get()
    yield queue
    queue.close()
    queue.join_thread()
    queue._reader.close()


def own_queue_loses(queue, item, words):
    def through():
        queue.put(item)
        with pytest.raises(fdpass.TicketError, match=words):
            queue.get(timeout=60)

    with pytest.warns(RuntimeWarning, match=words):
        through()


def test_an_item_that_a_full_store_refuses_reaches_the_receiver_and_warns_the_sender(store, as_found, unix_pair, own_queue):
    with fdpass.registered(max_unclaimed=1):
        for item, kind in ((unix_pair[0], "socket"), (fdpass.SocketHandle(unix_pair[0]), "SocketHandle")):
            raw = ForkingPickler.dumps(unix_pair[0])
            words = rf"an item with a {kind} was put into a queue, and could not be pickled there: the store .* is full: 1 were pickled"
            own_queue_loses(own_queue, ["beside it", item], words)
            pickle.loads(raw).close()
            own_queue.put(item)
            own_queue.get(timeout=60).close()
        assert fdpass.store_stats().unclaimed == 0
        raw = ForkingPickler.dumps(unix_pair[0])
        own_queue_loses(own_queue, reduction.DupFd(unix_pair[0].fileno()), "an item with a DupFd was put into a queue, and could not be")
        pickle.loads(raw).close()


def test_an_item_for_which_no_number_is_free_reaches_the_receiver_and_warns_the_sender(
    store, as_found, unix_pair, own_queue, full_table, fd_count
):
    with fdpass.registered():
        ForkingPickler.loads(ForkingPickler.dumps(unix_pair[0])).close()
        before = fd_count()
        words = r"an item with a socket was put into a queue, and could not be pickled there: .*needs a free number \(RLIMIT_NOFILE is \d+"
        with full_table():
            own_queue_loses(own_queue, unix_pair[0], words)
        assert fd_count() == before
        own_queue.put(unix_pair[0])
        own_queue.get(timeout=60).close()


def test_an_ssl_socket_in_a_queue_reaches_the_receiver_and_warns_the_sender(store, as_found, unix_pair, own_queue):
    context = ssl.create_default_context()
    with context.wrap_socket(unix_pair[0], do_handshake_on_connect=False, server_hostname="x") as wrapped, fdpass.registered():
        own_queue_loses(own_queue, wrapped, r"an item with a SSLSocket .* an SSLSocket cannot be passed: .*Pass the plain socket before")


def test_a_full_store_is_still_an_error_where_somebody_waits_for_the_pickling(store, as_found, unix_pair):
    context = multiprocessing.get_context("spawn")
    left, right = multiprocessing.Pipe()
    with left, right, fdpass.registered(max_unclaimed=1):
        raw = ForkingPickler.dumps(unix_pair[0])
        with pytest.raises(fdpass.TicketError, match="is full"):
            left.send(unix_pair[0])
        with ProcessPoolExecutor(1, mp_context=context) as executor, pytest.raises(fdpass.TicketError, match=r"^the store .* is full"):
            executor.submit(store_targets.pids_of, [unix_pair[0]]).result()
        pickle.loads(raw).close()


def test_a_pickling_that_fails_leaves_no_ticket(store, as_found, unix_pair, fd_count):
    with fdpass.registered():
        ForkingPickler.loads(ForkingPickler.dumps(unix_pair[0])).close()
        before = fd_count()
        for _ in range(5):
            with pytest.raises(LookupError):
                ForkingPickler.dumps([unix_pair[0], unix_pair[1], store_targets.Fails()])
        stats = fdpass.store_stats()
        assert (stats.unclaimed, stats.withdrawn) == (0, 10)
        assert fd_count() == before


def test_without_registration_the_pickles_load_all_the_same(store, as_found, unix_pair, run_python):
    with fdpass.registered():
        raw = ForkingPickler.dumps([unix_pair[0]])
    run_python("import pickle, sys\nsock, = pickle.loads(bytes.fromhex(sys.argv[1]))\nsock.sendall(b'plain')\nsock.close()", raw.hex())
    assert unix_pair[1].recv(10) == b"plain"


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_child_that_cannot_import_fdpass_starts_all_the_same(store, as_found, method, tmp_path):
    out, program = tmp_path / "out", tmp_path / "program.py"
    program.write_text("""
import multiprocessing, sys
def target(out):
    with open(out, "w") as file:
        file.write(str("fdpass" in sys.modules))
if __name__ == "__main__":
    import fdpass
    fdpass.register()
    # The child's path is this process's, and on it there is nothing of ours any more; nor is there in a bare interpreter.
    package = fdpass.__path__[0].rsplit("/", 1)[0]
    sys.path[:] = [entry for entry in sys.path if "site-packages" not in entry and entry != package]
    context = multiprocessing.get_context(sys.argv[1])
    context.set_executable(sys._base_executable)
    process = context.Process(target=target, args=(sys.argv[2],))
    process.start()
    process.join()
    sys.exit(process.exitcode)
""")
    done = subprocess.run([sys.executable, str(program), method, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert out.read_text() == "False"


# -------------------------------------------------------------------------------------------------------------- there and back


def test_twice_is_once_and_unregister_restores_exactly(as_found):
    fdpass.register()
    once = places()
    assert once != as_found
    fdpass.register()
    assert places() == once
    fdpass.unregister()
    assert places() == as_found
    fdpass.unregister()
    with fdpass.registered():
        once = places()
        with fdpass.registered(ttl=3):
            assert places() == once
        assert places() == once
    assert places() == as_found


def test_again_changes_the_settings_and_a_wrong_one_changes_nothing(store, as_found, unix_pair):
    fdpass.register(max_unclaimed=1)
    fdpass.register(max_unclaimed=2, ttl=0.0, linger=3)
    assert store.settings() == (2, 0.0, 3)
    for wrong, error in (({"ttl": "1"}, TypeError), ({"linger": -1}, ValueError)):
        with pytest.raises(error):
            fdpass.register(max_unclaimed=5, **wrong)
    assert store.settings() == (2, 0.0, 3)
    raw = ForkingPickler.dumps(unix_pair[0])
    fdpass.register()
    assert store.settings() == (None, None, 2.0)
    # The time of a ticket is that of the settings it was made under.
    with pytest.raises(fdpass.TicketError, match="has expired"):
        pickle.loads(raw)
    fdpass.unregister()


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="the documentation speaks of 3.11 to 3.13")
def test_ctx_reducer_is_what_the_documentation_says(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("""
import multiprocessing, sys, types
from multiprocessing import connection, context, heap, queues, reduction
class Own(reduction.AbstractReducer): pass
def nothing(): pass
def tell(pipe): pipe.send(context.reduction.__name__)
if __name__ == "__main__":
    module = types.ModuleType("module")
    vars(module).update({name: value for name, value in vars(reduction).items() if not name.startswith("__")})
    own = {"instance": Own(), "class": Own, "module": module}[sys.argv[2]]
    chosen = multiprocessing.get_context(sys.argv[1])
    chosen.reducer = own
    assert multiprocessing.get_context("fork").reducer is own
    assert connection.reduction is heap.reduction is reduction
    try:
        process = chosen.Process(target=nothing)
        process.start()
    except (TypeError, AttributeError) as error:
        print(error)
    else:
        process.join()
        near, far = chosen.Pipe()
        process = chosen.Process(target=tell, args=(far,))
        process.start()
        print("child:", near.recv())
        process.join()
""")
    said = {}
    for method in ("spawn", "forkserver"):
        for what in ("instance", "class", "module"):
            done = subprocess.run([sys.executable, str(program), method, what], capture_output=True, text=True, check=True)
            said[method, what] = done.stdout
    assert "cannot be interpreted as an integer" in said["spawn", "instance"]
    assert "has no attribute 'HAVE_SEND_HANDLE'" in said["forkserver", "instance"]
    assert "has no attribute 'HAVE_SEND_HANDLE'" in said["forkserver", "class"]
    for works in (("spawn", "class"), ("spawn", "module"), ("forkserver", "module")):
        assert said[works] == "child: multiprocessing.reduction\n"


def test_settings_inside_registered_change_back(as_found):
    from fdpass import _store

    fdpass.register(max_unclaimed=5, ttl=7.0, linger=1.0)
    with fdpass.registered(max_unclaimed=6):
        assert _store.settings() == (6, None, 2.0)
    assert _store.settings() == (5, 7.0, 1.0)
    fdpass.unregister()
    assert _store.settings() == (None, None, 2.0)


def test_what_somebody_wrapped_meanwhile_stays_and_works(store, as_found, unix_pair):
    dup, prepare = reduction.DupFd, spawn.get_preparation_data
    calls = []
    try:
        for _ in range(3):
            fdpass.register()
            reduction.DupFd = wrapped = lambda fd, ours=reduction.DupFd: (calls.append(fd), ours(fd))[1]
            spawn.get_preparation_data = lambda name, ours=spawn.get_preparation_data: ours(name)
            assert "fdpass" in spawn.get_preparation_data("x")
            os.close(pickle.loads(ForkingPickler.dumps(reduction.DupFd(unix_pair[0].fileno()))).detach())
            fdpass.unregister()
            assert reduction.DupFd is wrapped
            assert "fdpass" not in spawn.get_preparation_data("x")
        assert len(calls) == 3
        assert fdpass.store_stats().claims == 3
    finally:
        reduction.DupFd, spawn.get_preparation_data = dup, prepare


def test_threads_register_and_pickle_at_once(store, as_found, unix_pair):
    errors = []

    def work():
        try:
            for _ in range(50):
                fdpass.register()
                ForkingPickler.loads(ForkingPickler.dumps(unix_pair[0])).close()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert fdpass.store_stats().unclaimed == 0
    fdpass.unregister()
