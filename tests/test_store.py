"""The store: a pickled descriptor reaches whoever loads it first, once, and every other end has its own sentence."""

import contextlib
import io
import os
import pickle
import platform
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

import fdpass
from fdpass import _claims, _store, _syscall

sys.path.insert(0, str(Path(__file__).parent))  # claimant.py and store_targets.py, by name, here and in every spawned child

import claimant
import store_targets

MAGIC = b"fdC1"


@pytest.fixture
def owner():
    with claimant.Process() as process:
        yield process


@pytest.fixture
def receiver():
    with claimant.Process() as process:
        yield process


@pytest.fixture
def knock(owner):
    """knock(): a raw connection to the owner's store, which has made a ticket."""
    owner("make")
    opened = []

    def connect():
        sock = socket.socket(socket.AF_UNIX)
        opened.append(sock)
        # With a timeout it would not wait behind a full backlog.
        sock.connect(os.path.join(owner("where"), "s"))
        sock.settimeout(60)
        return sock

    yield connect
    for sock in opened:
        sock.close()


def packet(ticket=bytes(16)):
    return MAGIC + bytes(4) + ticket + bytes(8)


def address_of(raw):
    """(path, pid, uid, boot), ticket: what is in the pickle of a handle."""
    found = []

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            return lambda token, *rest: found.append(token)

    Reader(io.BytesIO(raw)).load()
    assert found[0][0] == "ticket"
    return found[0][1], found[0][2]


# -------------------------------------------------------------------------------------------------------------- a claim


def test_whoever_loads_it_gets_the_same_socket_once(owner, receiver):
    raw, cookie = owner("make")
    assert receiver("load", raw) == ("given", cookie)
    for process in (receiver, owner):
        whom = f"pid {receiver.pid}{' (this process)' if process is receiver else ''}"
        cure = "a pickle is loaded once, unless it was made with SocketHandle(sock, claims=n)"
        assert process("load", raw) == ("TicketError", f"this pickled descriptor was claimed already, by {whom}: {cure}")
    assert owner("stats")["claims"] == 1


def test_the_owner_loads_its_own(store, unix_pair, fd_count):
    before = None
    for _ in range(3):
        with fdpass.SocketHandle(unix_pair[0]) as handle:
            raw = pickle.dumps(handle)
        with pickle.loads(raw).open() as sock:
            sock.sendall(b"own")
        assert unix_pair[1].recv(10) == b"own"
        with pytest.raises(fdpass.TicketError, match=rf"claimed already, by pid {os.getpid()} \(this process\)"):
            pickle.loads(raw)
        before = before or fd_count()
        assert fd_count() == before


@pytest.mark.parametrize("claims", [1, 2, 5])
def test_as_many_claims_as_the_handle_says(owner, receiver, claims):
    raw, cookie = owner("make", claims)
    for turn in range(claims):
        assert (receiver if turn % 2 else owner)("load", raw) == ("given", cookie)
    assert receiver("load", raw)[0] == owner("load", raw)[0] == "TicketError"
    assert owner("stats")["unclaimed"] == 0


def test_everything_of_ours_pickles_with_any_pickler(store, unix_pair):
    left, right = fdpass.Pipe()
    with left, right, fdpass.OwnedFd(os.dup(unix_pair[0].fileno())) as owned, fdpass.SocketHandle(unix_pair[0]) as handle:
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            for one in (left, owned, handle):
                with pickle.loads(pickle.dumps(one, protocol)) as loaded:
                    assert os.path.sameopenfile(loaded.fileno(), one.fileno())
        # The pickler in Python, which knows reducers only by copyreg and __reduce__.
        for one in (left, owned, handle):
            with pickle._loads(pickle._dumps(one)) as loaded:
                assert os.path.sameopenfile(loaded.fileno(), one.fileno())


def test_the_loaded_descriptor_is_close_on_exec(store, unix_pair):
    with fdpass.OwnedFd(os.dup(unix_pair[0].fileno())) as owned, pickle.loads(pickle.dumps(owned)) as loaded:
        assert not os.get_inheritable(loaded.fileno())
        assert loaded.fileno() >= 3


def test_a_kept_connection_is_used_again_and_a_lost_one_made_again(owner, receiver):
    raws = owner("make_many", 3)
    assert receiver("load", raws[0])[0] == receiver("load", raws[1])[0] == "given"
    assert owner("stats")["connections"] == 1
    receiver("close_connections")
    assert receiver("load", raws[2])[0] == "given"


def test_connections_to_owners_are_bounded(receiver):
    with contextlib.ExitStack() as stack:
        owners = [stack.enter_context(claimant.Process()) for _ in range(_claims.KEPT + 3)]
        before = len(receiver("open_now"))
        for process in owners:
            assert receiver("load", process("make")[0])[0] == "given"
        assert len(receiver("open_now")) - before == _claims.KEPT


def test_the_folder_is_private_and_named_as_ours(owner):
    owner("make")
    folder = Path(owner("where"))
    assert folder.name.startswith("fdpass-store-")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in folder.iterdir()) == ["lock", "s"]


@pytest.mark.parametrize("length", [90, 150, 230])
def test_a_long_tmpdir_does_not_break_it(tmp_path, length):
    folder = tmp_path / ("x" * length)
    folder.mkdir()
    with claimant.Process(env={**os.environ, "TMPDIR": str(folder)}) as owner, claimant.Process() as receiver:
        assert receiver("load", owner("make")[0])[0] == "given"
        assert owner.end() == 0
    assert list(folder.iterdir()) == []


def test_a_path_too_long_for_sun_path_is_reached_through_its_folder(store, tmp_path, monkeypatch, unix_pair, receiver):
    folder = tmp_path / ("y" * 150)
    folder.mkdir()
    monkeypatch.setattr(_store, "_base", lambda: str(folder))
    with fdpass.SocketHandle(unix_pair[0]) as handle:
        raw = pickle.dumps(handle)
    assert address_of(raw)[0][0].startswith(str(folder))
    assert receiver("load", raw)[0] == "given"


# -------------------------------------------------------------------------------------------------------------- hostile clients


def test_half_a_packet_is_dropped_and_delays_nobody(owner, receiver, knock):
    hostile = knock()
    hostile.sendall(packet()[:20])
    assert receiver("load", owner("make")[0])[0] == "given"
    assert hostile.recv(100) == b""
    assert owner("stats")["dropped"] == 1
    assert receiver("load", owner("make")[0])[0] == "given"


GARBAGE = {
    "another protocol": b"GET / HTTP/1.1\r\nHost: here\r\n\r\n..",
    "one wrong byte": b"x",
    "another version": b"fdC2" + bytes(28),
    "a status in a request": MAGIC + b"\1" + bytes(27),
    "something in the reserved bytes": packet()[:-1] + b"x",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_dropped_at_once(owner, receiver, knock, garbage):
    hostile = knock()
    hostile.sendall(garbage)
    # The owner closes with the rest unread, or read.
    with contextlib.suppress(ConnectionResetError):
        assert hostile.recv(100) == b""
    assert owner("stats")["dropped"] == 1
    assert receiver("load", owner("make")[0])[0] == "given"


def test_silence_is_dropped(owner, knock):
    assert knock().recv(1) == b""
    assert owner("stats")["dropped"] == 1


def test_a_flood_of_connections_pushes_out_nobody_who_claimed(owner, receiver, knock):
    raws = owner("make_many", 2)
    assert receiver("load", raws[0])[0] == "given"
    for _ in range(300):
        knock()
    assert receiver("load", raws[1])[0] == "given"
    # The last ones of the flood may still be waiting to be accepted.
    while (stats := owner("stats"))["dropped"] < 300 + 1 - 256:
        assert stats["connections"] <= 256
    assert receiver("load", owner("make")[0])[0] == "given"


def test_a_claimant_that_guesses_tickets_is_dropped(owner, knock):
    hostile = knock()
    with contextlib.suppress(OSError):
        for _ in range(1000):
            hostile.sendall(packet(os.urandom(16)))
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while part := hostile.recv(1 << 16):
            got += part
    assert owner("stats")["dropped"] == 1
    assert owner("stats")["unanswered"] <= 16
    assert {got[start + 4] for start in range(0, len(got), 32)} <= {4}  # unknown


def test_who_does_not_read_his_answers_delays_nobody(owner, receiver, knock):
    raw = owner("make", 1 << 30)[0]
    hostile = knock()
    hostile.setblocking(False)
    ticket = address_of(raw)[1]
    sent = 0
    with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
        while True:
            sent += hostile.send(packet(ticket) * 64)
    assert receiver("load", owner("make")[0])[0] == "given"
    # The owner gives until the socket is full, then drops the connection; it has not used a claim for what was not sent.
    hostile.setblocking(True)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while True:
            hostile.sendall(packet(ticket))
    assert owner("stats")["dropped"] == 1
    assert receiver("load", raw)[0] == "given"


def test_descriptors_sent_to_the_store_are_not_kept(owner, knock):
    hostile = knock()
    hostile.sendall(packet())
    assert hostile.recv(100)[4] == 4
    before = owner("open_now")
    fdpass.send_fds(hostile, [packet()], [0, 1, 2])
    assert hostile.recv(100)[4] == 4
    assert len(owner("open_now")) == len(before)


@pytest.mark.parametrize(
    ("answer", "connections", "words"),
    [
        (b"", 3, "went away while it was asked, or drops every connection"),
        (bytes(32), 1, "does not speak this version of the claim protocol"),
    ],
)
def test_who_answers_nonsense_in_the_owners_place_is_given_up(store, tmp_path, monkeypatch, fd_count, answer, connections, words):
    monkeypatch.setattr(_claims, "FRESH", 3)
    path = str(tmp_path / "s")
    before = fd_count()
    with socket.socket(socket.AF_UNIX) as listener:
        with store.reachable(path) as name:
            listener.bind(name)
        listener.listen()

        def serve():
            for _ in range(connections):
                with listener.accept()[0] as conn:
                    conn.recv(32)
                    conn.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(fdpass.TicketError, match=words):
            _claims.claim((path, os.getpid(), os.geteuid(), store.BOOT), bytes(16))
        thread.join()
    assert fd_count() == before


# -------------------------------------------------------------------------------------------------------------- a stopped owner


@pytest.fixture
def stopped(owner):
    """Tickets of an owner that is stopped until the test continues it, or ends."""
    raws = owner("make_many", 3)
    os.kill(owner.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, owner.pid, os.WSTOPPED | os.WNOWAIT)
    yield raws
    os.kill(owner.pid, signal.SIGCONT)


def test_a_stopped_owner_is_named_and_the_ticket_is_not_used(owner, receiver, stopped):
    receiver("set_patience", 0.02)
    words = f"the owner of this descriptor (pid {owner.pid}) did not answer within 0.02 s: is it stopped? Load again once it runs"
    assert receiver("load", stopped[0]) == ("TicketError", words)
    os.kill(owner.pid, signal.SIGCONT)
    receiver("set_patience", _claims.PATIENCE)
    assert receiver("load", stopped[0])[0] == "given"


def test_waiting_for_a_stopped_owner_can_be_interrupted(stopped, until_blocked):
    program = "import pickle, sys, fdpass.handles\nprint(flush=True)\npickle.loads(bytes.fromhex(sys.argv[1]))"
    with subprocess.Popen(
        [sys.executable, "-c", program, stopped[0].hex()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        until_blocked(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.communicate()[1].endswith("KeyboardInterrupt\n")
        assert process.wait() == -signal.SIGINT


def test_behind_a_full_backlog_a_claim_waits_its_turn(owner, receiver):
    raw = owner("make")[0]
    os.kill(owner.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, owner.pid, os.WSTOPPED | os.WNOWAIT)
    waiting = []
    try:
        with contextlib.suppress(BlockingIOError):
            while True:
                waiting.append(socket.socket(socket.AF_UNIX))
                waiting[-1].setblocking(False)
                waiting[-1].connect(address_of(raw)[0][0])
        receiver("set_patience", 0.02)
        words = (
            f"the owner of this descriptor (pid {owner.pid}) did not let anybody in within 0.02 s: is it stopped? Load again once it runs"
        )
        assert receiver("load", raw) == ("TicketError", words)
        receiver("set_patience", _claims.PATIENCE)
        receiver.begin("load", raw)
    finally:
        os.kill(owner.pid, signal.SIGCONT)
        for sock in waiting:
            sock.close()
    assert receiver.answer()[0] == "given"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_uid_gets_nothing_and_is_counted(owner):
    raw, cookie = owner("make")
    folder = owner("where")
    os.chmod(folder, 0o755)
    os.chmod(os.path.join(folder, "s"), 0o666)

    def become():
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)

    near, far = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            become()
            path, (_, ticket) = address_of(raw)[0][0], address_of(raw)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(path)
                with contextlib.suppress(OSError):
                    sock.sendall(packet(ticket))
                data, control, _, _ = sock.recvmsg(100, 100)
            pickle.dump((data[4], control, store_targets.load(raw)), os.fdopen(far, "wb"))
        finally:
            os._exit(0)
    os.close(far)
    with os.fdopen(near, "rb") as file:
        status, control, words = pickle.load(file)
    os.waitpid(pid, 0)
    assert (status, control) == (5, [])
    assert words == f"PeerRefusedError: this descriptor was pickled by uid 0 (pid {owner.pid}), which gives nothing to uid 65534"
    assert owner("stats")["refused"] == 2
    assert owner("load", raw) == ("given", cookie)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_private_folder_keeps_another_uid_out(owner):
    raw = owner("make")[0]
    program = """
import os, pickle, sys, fdpass._store, fdpass.handles
os.setresuid(65534, 65534, 65534)
try:
    pickle.loads(bytes.fromhex(sys.argv[1]))
except fdpass.PeerRefusedError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", program, raw.hex()], capture_output=True, text=True, check=True)
    assert said.stdout == f"this descriptor was pickled by uid 0 (pid {owner.pid}), whose store uid 65534 may not open\n"


@pytest.fixture
def shared_tmpdir():
    """A folder in which anybody may make folders and nobody may remove another's, as /tmp."""
    path = tempfile.mkdtemp(dir="/tmp")
    os.chmod(path, 0o1777)
    yield path
    shutil.rmtree(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("kept", [False, True], ids=["first claim", "after a claim from the owner"])
def test_another_user_in_the_owners_place_is_refused_and_learns_no_ticket(shared_tmpdir, receiver, kept):
    with claimant.Process(env={**os.environ, "TMPDIR": shared_tmpdir}) as owner:
        raws = owner("make_many", 2)
        folder = owner("where")
        if kept:
            assert receiver("load", raws[0])[0] == "given"
        owner("set_linger", 0)
        assert owner.end() == 0
    near, far = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            os.mkdir(folder, 0o755)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(os.path.join(folder, "s"))
                os.chmod(os.path.join(folder, "s"), 0o666)
                listener.listen()
                os.write(far, b"x")
                conn = listener.accept()[0]
                with conn, socket.socket() as chosen:
                    request = conn.recv(32)
                    if request:
                        fdpass.send_fds(conn, [packet(request[8:24])], [chosen])
                    status = 2 if request else 0
        finally:
            os._exit(status)
    os.close(far)
    assert os.read(near, 1) == b"x"
    os.close(near)
    got = receiver("load", raws[1])
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert got == (
        "PeerRefusedError",
        f"this descriptor was pickled by uid 0 (pid {owner.pid}), but uid 65534 listens at {folder}/s now: nothing was asked of it",
    )


_UNSHARE = shutil.which("unshare")


@pytest.mark.skipif(
    os.geteuid() != 0 or _UNSHARE is None or subprocess.run([_UNSHARE, "-pf", "true"], capture_output=True, check=False).returncode != 0,
    reason="only root can become another user, and in a process namespace of its own only where unshare may",
)
@pytest.mark.parametrize("inside", ["owner", "claimant"])
def test_nobodys_uid_without_a_pid_is_nobodys_word(shared_tmpdir, inside):
    # 65534 is also what the kernel writes for a user that it cannot name; across process namespaces there is no pid to tell them apart.
    program = """
import os, pickle, socket, sys
import multiprocessing.util, fdpass, fdpass.handles, fdpass._store
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
if sys.argv[1] == "owner":
    fdpass._store.configure(fdpass._store.settings()._replace(linger=0))
    with socket.socket() as sock, fdpass.SocketHandle(sock) as handle:
        print(pickle.dumps(handle).hex(), flush=True)
    sys.stdin.read()
    print(fdpass.store_stats().refused)
else:
    try:
        pickle.loads(bytes.fromhex(sys.argv[2])).close()
        print("given")
    except fdpass.PeerRefusedError as error:
        print(error)
"""

    def begin(*args):
        apart = [_UNSHARE, "-pf"] if inside == args[0] else []
        environment = {**os.environ, "TMPDIR": shared_tmpdir}
        return subprocess.Popen(
            [*apart, sys.executable, "-c", program, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    with begin("owner") as owner:
        raw = owner.stdout.readline().strip()
        with begin("claimant", raw) as other:
            said = other.communicate()[0]
        refused = owner.communicate()[0]
    if inside == "owner":
        assert said.endswith("which gives nothing to uid 65534\n")
        assert refused == "1\n"
    else:
        assert "but a user that the kernel does not name listens at" in said
        assert refused == "0\n"


# -------------------------------------------------------------------------------------------------------------- bounds


def test_the_bound_names_the_count(owner, receiver):
    owner("bound", 3)
    raws = owner("make_many", 3)
    words = owner("make")
    assert f"3 were pickled by this process (pid {owner.pid}) and not yet loaded; at most 3 may be (max_unclaimed is 3," in words
    assert words.startswith("TicketError: the store of pickled descriptors is full")
    assert receiver("load", raws[0])[0] == "given"
    assert receiver("load", owner("make")[0])[0] == "given"
    assert owner("stats")["limit"] == 3


def test_three_quarters_of_the_limit_and_nothing_left_after_exit(owner):
    owner("set_linger", 0)
    owner("hard_limit", 100)
    assert owner("make_many", 76).startswith("TicketError: the store of pickled descriptors is full: 75 were pickled")
    assert "three quarters of RLIMIT_NOFILE, 100" in owner("make")
    assert owner("stats")["unclaimed"] == 75
    folder = owner("where")
    assert owner.end() == 0
    assert not os.path.exists(folder)


def test_the_first_ticket_lifts_the_soft_limit(owner):
    owner("limit_nofile", 64)
    assert len(owner("make_many", 100)) == 100


def test_an_expired_ticket_is_closed_and_says_so(owner, receiver):
    # The store and the receiver's connection are there before anything is counted, and the first ticket's duplicate is not any more.
    assert receiver("load", owner("make")[0])[0] == "given"
    assert owner("stats")["unclaimed"] == 0
    before = len(owner("open_now"))
    raw = owner("make", 1, 0.0)[0]
    held = owner("make", 1, 1e-3)[0]
    assert receiver("load", raw) == (
        "TicketError",
        f"this pickled descriptor has expired: nobody loaded it within the ttl that its owner (pid {owner.pid}) had set",
    )
    while owner("stats")["expired"] < 2:
        pass
    assert receiver("load", held)[0] == "TicketError"
    assert owner("stats")["unclaimed"] == 0
    assert len(owner("open_now")) == before


def test_expired_tickets_make_room_at_the_bound(owner):
    owner("bound", 5)
    for _ in range(20):
        assert type(owner("make", 1, 0.0)) is tuple
    assert owner("stats")["made"] == 20


def test_what_was_claimed_long_ago_is_not_known_any_more(owner):
    raw = owner("make")[0]
    assert owner("load", raw)[0] == "given"
    assert "claimed already" in owner("load", raw)[1]
    assert set(owner("load_many", owner("make_many", 4096))) == {"given"}
    assert "does not know this ticket" in owner("load", raw)[1]


def test_forty_thousand_tickets_leave_descriptors_and_memory_flat(owner):
    # The least that malloc gives is 32 bytes: one such piece kept for each ticket is more than the MiB below.
    (descriptors, resident), (descriptors_after, resident_after), stats = owner("churn", 40_000)
    assert descriptors_after == descriptors
    # AddressSanitizer keeps what was freed.
    assert resident_after - resident < 1 << 20 or "asan" in os.environ.get("LD_PRELOAD", "")
    assert stats["unclaimed"] == 0


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"max_unclaimed": 0}, ValueError), ({"max_unclaimed": 1.5}, TypeError), ({"max_unclaimed": True}, TypeError),
        ({"ttl": -1}, ValueError), ({"ttl": "1"}, TypeError), ({"linger": -0.1}, ValueError), ({"linger": None}, TypeError),
        ({"linger": float("nan")}, ValueError), ({"ttl": float("inf")}, ValueError),
    ],
)  # fmt: skip
def test_settings_that_are_none(store, settings, error):
    with pytest.raises(error, match=next(iter(settings))):
        fdpass.register(**settings)
    assert store.settings() == store.Settings()
    fdpass.unregister()


# -------------------------------------------------------------------------------------------------------------- forks, and ends


def test_a_forked_child_begins_empty_and_holds_nothing_of_the_parents_store(owner, receiver):
    receiver("load", owner("make")[0])
    owner("load", receiver("make")[0])  # so that the owner keeps a connection, too
    before, (inherited, stats, theirs, own, after, folder), parents, parents_folder = owner("fork")
    assert [link for link in inherited.values() if link.startswith("socket:") or "fdpass-store" in link] == []
    assert len(inherited) < len(before)
    assert set(stats.values()) == {0, stats["limit"]}
    assert (theirs, own) == ("given", "given")
    assert (after["made"], after["claims"]) == (1, 1)
    assert folder != parents_folder
    assert parents["unclaimed"] == 0
    assert receiver("load", owner("make")[0])[0] == "given"


def test_forks_while_threads_pickle_and_claims_arrive(run_python):
    run_python("""
import os, pickle, socket, threading, fdpass
a, b = socket.socketpair()
handle = fdpass.SocketHandle(a)
over = threading.Event()
def churn():
    while not over.is_set():
        pickle.loads(pickle.dumps(handle)).close()
threads = [threading.Thread(target=churn) for _ in range(3)]
for thread in threads:
    thread.start()
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
for _ in range(100):
    raw = pickle.dumps(handle)
    pid = os.fork()
    if pid == 0:
        left = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")]
        bad = any("fdpass-store" in link for link in left)
        good = pickle.loads(pickle.dumps(handle)).fileno() >= 0 and pickle.loads(raw).fileno() >= 0
        from fdpass import _store
        _store.stop()
        os._exit(bad or not good)
    assert os.waitpid(pid, 0)[1] == 0
over.set()
for thread in threads:
    thread.join()
handle.close(); a.close(); b.close()
assert fdpass.store_stats().unclaimed == 0
""")


def test_forks_while_threads_claim_leave_no_connection_in_the_child(owner, run_python):
    # A fork copies the descriptors first and the memory later: what a thread opens or closes in between has to wait.
    run_python(
        """
import os, pickle, socket, sys, threading, warnings, fdpass.handles
from fdpass import _claims
warnings.simplefilter("ignore", DeprecationWarning)
raw, path = bytes.fromhex(sys.argv[1]), sys.argv[2]
over = threading.Event()
def claim(number):
    while not over.is_set():
        pickle.loads(raw).close()
        if number:
            _claims._kept.clear()
threads = [threading.Thread(target=claim, args=(number,)) for number in range(3)]
for thread in threads:
    thread.start()
def theirs(number):
    try:
        with socket.socket(fileno=os.dup(number)) as view:
            return view.family == socket.AF_UNIX and path in str(view.getpeername())
    except OSError:
        return False
for _ in range(60):
    pid = os.fork()
    if pid == 0:
        os._exit(any(theirs(int(name)) for name in os.listdir("/proc/self/fd")))
    assert os.waitpid(pid, 0)[1] == 0
over.set()
for thread in threads:
    thread.join()
""",
        owner("make", 1 << 30)[0].hex(),
        owner("where"),
    )


def test_ctrl_c_ends_the_waiting_at_exit_and_leaves_nothing(owner):
    owner("make")
    owner("set_linger", 1e6)
    folder = owner("where")
    owner.popen.stdin.close()
    sleeping = {"x86_64": "230", "aarch64": "115"}.get(platform.machine())
    if sleeping is None:
        pytest.skip("the number of clock_nanosleep here is not known")
    while Path(f"/proc/{owner.pid}/syscall").read_text().split()[0] != sleeping:
        pass
    owner.popen.send_signal(signal.SIGINT)
    owner.popen.wait()
    assert not os.path.exists(folder)


def test_a_store_whose_thread_cannot_start_leaves_nothing_and_may_start_later(tmp_path, run_python):
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("AddressSanitizer takes all address space")
    run_python(
        """
import os, pickle, resource, socket, fdpass
import fdpass.handles, fdpass._store
a, b = socket.socketpair()
with open("/proc/self/statm") as file:
    pages = int(file.read().split()[0])
everything = resource.getrlimit(resource.RLIMIT_AS)
handle = fdpass.SocketHandle(a)
# Room for everything but the thread's stack.
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (32 << 20), everything[1]))
try:
    pickle.dumps(handle)
except OSError as error:
    assert "starting the thread that keeps pickled descriptors" in str(error), error
else:
    raise AssertionError
assert os.listdir(os.environ["TMPDIR"]) == []
resource.setrlimit(resource.RLIMIT_AS, everything)
pickle.loads(pickle.dumps(handle)).close()
handle.close(); a.close(); b.close()
""",
        env={**os.environ, "TMPDIR": str(tmp_path)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_STACK, (64 << 20, resource.getrlimit(resource.RLIMIT_STACK)[1])),
    )


def test_exit_waits_until_the_last_is_claimed(owner, receiver):
    raw, cookie = owner("make")
    owner("set_linger", 1e6)
    folder = owner("where")
    owner.popen.stdin.close()
    assert receiver("load", raw) == ("given", cookie)
    assert owner.popen.wait() == 0
    assert not os.path.exists(folder)


def test_exit_waits_no_longer_than_it_was_told(owner, receiver):
    raw = owner("make")[0]
    owner("set_linger", 0.05)
    folder = owner("where")
    assert owner.end() == 0
    assert not os.path.exists(folder)
    assert receiver("load", raw) == ("TicketError", f"the owner of this descriptor (pid {owner.pid}) is gone, and the descriptor with it")


def test_a_killed_owner_is_named_and_its_folder_swept(tmp_path, monkeypatch, request):
    # A folder that nobody else's new store sweeps.
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    owner, receiver = map(request.getfixturevalue, ("owner", "receiver"))
    raws = owner("make_many", 2)
    folder = owner("where")
    assert receiver("load", raws[0])[0] == "given"
    gone = "TicketError", f"the owner of this descriptor (pid {owner.pid}) is gone, and the descriptor with it"
    os.kill(owner.pid, signal.SIGKILL)
    # It is a zombie until somebody waits for it.
    os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)
    assert receiver("load", raws[1]) == gone
    assert owner.end(signal.SIGKILL) == -signal.SIGKILL
    assert os.path.exists(folder)
    assert receiver("load", raws[1]) == gone
    # The receiver's own first ticket starts a store, which sweeps.
    receiver("make")
    assert not os.path.exists(folder)


def test_a_sweep_leaves_living_owners_and_strangers_alone(owner, receiver, tmp_path):
    raw, cookie = owner("make")
    stranger = Path(owner("where")).parent / f"fdpass-store-{os.getpid()}-mine"
    stranger.mkdir(mode=0o700)
    try:
        receiver("make")
        assert stranger.exists()
        assert receiver("load", raw) == ("given", cookie)
    finally:
        stranger.rmdir()


def test_a_stopped_store_begins_anew(store, unix_pair):
    with fdpass.SocketHandle(unix_pair[0]) as handle:
        raw = pickle.dumps(handle)
        store.stop()
        with pytest.raises(fdpass.TicketError, match=r"is not there any more: its owner \(pid \d+\) has closed it"):
            pickle.loads(raw)
        pickle.loads(pickle.dumps(handle)).close()
    assert fdpass.store_stats().made == 1


def test_another_host_is_named(owner, receiver):
    raw = owner("make")[0]
    boot = _store.BOOT.encode()
    elsewhere = raw.replace(boot, boot[::-1])
    assert receiver("load", elsewhere)[1].startswith("this descriptor was pickled on another host")
    assert receiver("load", raw)[0] == "given"


def test_a_program_that_closes_all_its_descriptors_can_pickle_again(run_python):
    run_python("""
import os, pickle, socket, fdpass
a, b = socket.socketpair()
pickle.loads(pickle.dumps(fdpass.SocketHandle(a))).close()
a.detach(); b.detach()
os.closerange(3, 1000)
a, b = socket.socketpair()
while True:
    raw = pickle.dumps(handle := fdpass.SocketHandle(a)); handle.close()
    try:
        pickle.loads(raw).close()
        break
    except fdpass.TicketError:
        pass  # kept by the store that has not yet noticed
a.close(); b.close()
""")


def test_threads_claim_and_pickle_at_once(owner, store):
    raws = owner("make_many", 400)
    given, errors = [], []

    def work(mine):
        for raw in mine:
            try:
                with pickle.loads(raw) as handle:
                    given.append(raw)
                pickle.loads(pickle.dumps(handle)) if handle.fileno() >= 0 else None
            except fdpass.TicketError as error:
                errors.append(str(error))

    # Every ticket by two threads: one of them gets it.
    threads = [threading.Thread(target=work, args=(part,)) for part in (raws[:200], raws[200:], raws[::-1][:200], raws[::-1][200:])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(given) == sorted(raws)
    assert len(errors) == len(raws)
    assert {f"claimed already, by pid {os.getpid()}" in words for words in errors} == {True}


@pytest.mark.parametrize("first", ["1e-6", "3e-4", "1e-3"])
def test_pickling_in_a_signal_handler(run_python, first):
    run_python(
        """
import os, pickle, signal, socket, sys, fdpass
a, b = socket.socketpair()
handle = fdpass.SocketHandle(a)
made = []
def handler(*args):
    made.append(pickle.dumps(handle))
    signal.setitimer(signal.ITIMER_REAL, 1e-4)
signal.signal(signal.SIGALRM, handler)
# The first one comes while the store is being started, wherever in it.
signal.setitimer(signal.ITIMER_REAL, float(sys.argv[1]))
while len(made) < 200:
    pickle.loads(pickle.dumps(handle)).close()
signal.setitimer(signal.ITIMER_REAL, 0)
for raw in made:
    pickle.loads(raw).close()
assert fdpass.store_stats().unclaimed == 0
handle.close(); a.close(); b.close()
""",
        first,
    )


def test_claims_that_a_signal_handler_breaks_off_leak_nothing(owner, run_python):
    run_python(
        """
import gc, os, pickle, random, signal, sys, fdpass.handles
class Broken(Exception): pass
def handler(*args): raise Broken
signal.signal(signal.SIGALRM, handler)
raw = bytes.fromhex(sys.argv[1])
pickle.loads(raw).close()
before = len(os.listdir("/proc/self/fd"))
broken = 0
while broken < 500:
    try:
        # Wherever in the making of a connection, the claim, or the closing of what it gave.
        signal.setitimer(signal.ITIMER_REAL, random.uniform(5e-6, 1e-4))
        try:
            pickle.loads(raw)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Broken:
        broken += 1
gc.collect()
assert len(os.listdir("/proc/self/fd")) <= before + 2, os.listdir("/proc/self/fd")
pickle.loads(raw).close()
""",
        owner("make", 1 << 30)[0].hex(),
    )


def test_pickling_at_the_interpreters_end(run_python):
    # Before and after multiprocessing's own end: what comes after it starts a store that nobody ends, and the next one sweeps.
    done = run_python("""
import atexit, pickle, socket, fdpass
a, b = socket.socketpair()
def late(when):
    handle = fdpass.SocketHandle(a)
    with pickle.loads(pickle.dumps(handle)) as loaded:
        print(when, loaded.fileno() >= 0, flush=True)
    handle.close()
    if when == "after":
        a.close(); b.close()
atexit.register(late, "after")
import multiprocessing.util
atexit.register(late, "before")
late("during")
""")
    assert done.stdout.split() == ["during", "True", "before", "True", "after", "True"]


# -------------------------------------------------------------------------------------------------------------- limits


def test_a_thread_that_finds_the_store_made_and_not_yet_running_waits_for_it(store, unix_pair, monkeypatch):
    start, put, asked = _syscall.store_start, _syscall.store_put, threading.Event()
    raws = []

    def pickled():
        raws.append(pickle.dumps(fdpass.SocketHandle(unix_pair[0])))

    other = threading.Thread(target=pickled)

    def put_and_tell(*args):
        code = put(*args)
        asked.set()
        return code

    def start_after_the_other_asked(*args):
        monkeypatch.undo()
        monkeypatch.setattr(_syscall, "store_put", put_and_tell)
        other.start()
        asked.wait()
        return start(*args)

    store.stop()
    monkeypatch.setattr(_syscall, "store_start", start_after_the_other_asked)
    pickled()
    other.join()
    for raw in raws:
        pickle.loads(raw).close()
    assert fdpass.store_stats().claims == 2


def test_a_full_table_names_the_limit_and_leaves_the_ticket(owner, receiver):
    raw, cookie = owner("make")
    first = owner("make")[0]
    assert receiver("load", first)[0] == "given"
    receiver("hard_limit", 64)
    receiver("use_limit", 0)
    for _ in range(2):
        kind, words = receiver("load", raw)
        assert kind == "DescriptorsLostError"
        assert "needed 1 free number, got 0: this process's table is full (RLIMIT_NOFILE is 64)" in words
    receiver("give_back")
    assert receiver("load", raw) == ("given", cookie)


def test_a_full_table_before_the_first_connection(owner, receiver):
    raw, cookie = owner("make")
    receiver("hard_limit", 64)
    receiver("use_limit", 0)
    assert receiver("load", raw)[0] == "DescriptorsLostError"
    receiver("give_back")
    assert receiver("load", raw) == ("given", cookie)


def test_an_owner_without_a_free_number_serves_all_the_same(owner, receiver):
    owner("hard_limit", 64)
    raws = owner("make_many", 3)
    owner("use_limit", 0)
    with claimant.Process() as other:
        assert [process("load", raw)[0] for process, raw in zip((receiver, other, receiver), raws, strict=True)] == ["given"] * 3
    owner("give_back")


def test_an_owner_without_a_free_number_cannot_pickle(owner):
    owner("hard_limit", 64)
    owner("make")
    owner("use_limit", 4)
    # One each for the socket, the handle and the ticket, and one to look at the socket.
    assert type(owner("make")) is tuple
    assert owner("make").startswith("OSError: [Errno 24]")
    owner("give_back")
    assert type(owner("make")) is tuple


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone is not counted: it takes a second user")
def test_too_many_in_flight_waits_its_turn(run_python):
    # Descriptors in flight are counted per user: this one stuffs a pair until the kernel refuses, claims, and empties the pair meanwhile.
    run_python("""
import errno, os, pickle, resource, socket
os.environ["TMPDIR"] = "/tmp"
# All of it now: the new user may not be able to read the interpreter's library.
import multiprocessing.util, shutil, tempfile, fdpass, fdpass.handles, fdpass._store
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
# Nobody else's, whoever runs this at the same time.
user = 100_000 + os.getpid()
os.setgroups([]); os.setresgid(user, user, user); os.setresuid(user, user, user)
a, b = socket.socketpair()
raw = pickle.dumps(fdpass.SocketHandle(a))
left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
left.setblocking(False)
try:
    while True:
        fdpass.send_fds(left, [b"x"], [0] * 20)
except OSError as error:
    assert error.errno == errno.ETOOMANYREFS, error
near, far = os.pipe()
pid = os.fork()
if pid == 0:
    b.close()
    fdpass._claims.PATIENCE, patient = 0.02, fdpass._claims.PATIENCE
    while True:
        try:
            pickle.loads(raw)
        except fdpass.TicketError:
            continue  # on a busy machine even its "no" comes too late
        except OSError as error:
            os.write(far, f"{error.errno} {error}".encode())
        break
    fdpass._claims.PATIENCE = patient
    with pickle.loads(raw).open() as sock:
        sock.sendall(b"in the end")
    os._exit(0)
os.close(far)
said = os.read(near, 1000).decode()
assert said.startswith(f"{errno.ETOOMANYREFS} ") and "too many descriptors of this user are in flight" in said, said
assert f"pid {os.getpid()}, is the limit" in said and said.endswith("could not be sent within 0.02 s"), said
os.close(near)
# It is refused once more before there is room.
busy = fdpass.store_stats().busy
while fdpass.store_stats().busy == busy:
    assert os.waitpid(pid, os.WNOHANG)[0] == 0
while True:
    try:
        for owned in fdpass.recv_fds(right, 1, 20, socket.MSG_DONTWAIT).fds:
            owned.close()
    except BlockingIOError:
        break
a.close()
assert b.recv(100) == b"in the end"
assert os.waitpid(pid, 0)[1] == 0
left.close(); right.close(); b.close()
""")
