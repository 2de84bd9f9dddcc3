"""OwnedFd: one owner, closed once, close-on-exec, never below 3, turned into nothing that it is not."""

import copy
import errno
import fcntl
import gc
import io
import os
import select
import socket
import sys
import threading
import warnings

import pytest

import fdpass


def is_open(number):
    try:
        fcntl.fcntl(number, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def closes_on_exec(item):
    return bool(fcntl.fcntl(item, fcntl.F_GETFD) & fcntl.FD_CLOEXEC)


@pytest.fixture
def number():
    """A descriptor that nobody owns yet; the test gives it to an owner."""
    return os.memfd_create("owned", 0)


# -------------------------------------------------------------------------------- owning


def test_takes_over_the_number_and_closes_it(number):
    owned = fdpass.OwnedFd(number)
    assert owned.fileno() == number
    owned.close()
    assert owned.fileno() == -1
    assert not is_open(number)


def test_makes_it_close_on_exec(number):
    assert not closes_on_exec(number)
    with fdpass.OwnedFd(number) as owned:
        assert closes_on_exec(owned)


def test_closes_once_even_when_the_number_is_in_use_again(number):
    owned = fdpass.OwnedFd(number)
    owned.close()
    os.dup2(0, number)  # the number is somebody else's now
    owned.close()
    owned.close()
    with owned:
        pass
    del owned
    gc.collect()
    assert is_open(number)
    os.close(number)


def test_a_failing_close_forgets_the_number_all_the_same(number):
    owned = fdpass.OwnedFd(number)
    os.close(number)
    with pytest.raises(OSError) as caught:
        owned.close()
    assert caught.value.errno == errno.EBADF
    assert owned.fileno() == -1
    owned.close()


def test_release_gives_the_number_away(number):
    owned = fdpass.OwnedFd(number)
    assert owned.release() == number
    assert owned.fileno() == -1
    owned.close()
    assert is_open(number)
    with pytest.raises(fdpass.ClosedError):
        owned.release()
    os.close(number)


def test_dup_is_another_owner_of_the_same_description(number):
    with fdpass.OwnedFd(number) as first:
        second = first.dup()
        assert second.fileno() != first.fileno()
        assert second.fileno() >= 3
        assert closes_on_exec(second)
        os.lseek(first.fileno(), 17, os.SEEK_SET)
    with second:
        assert os.lseek(second.fileno(), 0, os.SEEK_CUR) == 17


def test_the_context_manager_closes_after_an_exception_too(number):
    with pytest.raises(ZeroDivisionError), fdpass.OwnedFd(number) as owned:
        raise ZeroDivisionError
    assert owned.fileno() == -1
    assert not is_open(number)


def test_the_context_manager_leaves_a_released_one_alone(number):
    with fdpass.OwnedFd(number) as owned:
        owned.release()
    assert is_open(number)
    os.close(number)


def test_forgotten_it_is_closed_with_a_warning_that_names_it(number):
    owned = fdpass.OwnedFd(number)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        del owned
        gc.collect()
    assert [(one.category, str(one.message)) for one in seen] == [(ResourceWarning, f"unclosed <OwnedFd {number}>")]
    assert not is_open(number)


def test_forgotten_it_is_closed_even_where_the_warning_is_an_error(run_python):
    # The interpreter prints what cannot be raised from a destructor; descriptor and exit status are right all the same.
    done = run_python("import os, fdpass; fd = os.dup(0); x = fdpass.OwnedFd(fd); del x; assert os.dup(0) == fd")
    assert "ResourceWarning" in done.stderr


def test_closed_or_released_it_is_silent(number, recwarn):
    owned = fdpass.OwnedFd(number)
    os.close(owned.release())
    del owned
    owned = fdpass.OwnedFd(os.dup(0))
    owned.close()
    del owned
    gc.collect()
    assert not recwarn.list


@pytest.mark.parametrize("what", ["dup", "to_socket", "to_file", "release"])
def test_after_close_every_use_is_a_named_error(number, what):
    owned = fdpass.OwnedFd(number)
    owned.close()
    with pytest.raises(fdpass.ClosedError):
        getattr(owned, what)()


def test_repr_shows_the_number_while_there_is_one(number):
    owned = fdpass.OwnedFd(number)
    assert repr(owned) == f"<OwnedFd {number}>"
    owned.close()
    assert "closed" in repr(owned)
    assert str(number) not in repr(owned)


def test_a_copy_is_never_a_second_owner_of_the_number(store, number):
    with fdpass.OwnedFd(number) as owned:
        for duplicate in (copy.copy, copy.deepcopy):
            try:
                other = duplicate(owned)
            except (TypeError, fdpass.FdPassError):
                continue
            with other:
                assert other.fileno() != owned.fileno()
        assert is_open(number)


@pytest.mark.parametrize("wrong", ["3", 3.0, None, True, b"3"], ids=repr)
def test_refuses_what_is_no_number(wrong):
    with pytest.raises(TypeError, match="OwnedFd"):
        fdpass.OwnedFd(wrong)


def test_refuses_an_object_that_has_an_owner_already(unix_pair):
    with pytest.raises(TypeError, match="detach"):
        fdpass.OwnedFd(unix_pair[0])


def test_refuses_negative_numbers():
    with pytest.raises(ValueError, match="-1"):
        fdpass.OwnedFd(-1)


def test_refuses_a_number_that_is_not_open(number):
    os.close(number)
    with pytest.raises(OSError, match=str(number)) as caught:
        fdpass.OwnedFd(number)
    assert caught.value.errno == errno.EBADF


# -------------------------------------------------------------------------------- numbers below 3


@pytest.mark.parametrize("low", [0, 1, 2])
def test_a_number_below_3_is_moved_up(run_python, low):
    run_python(f"""
import fcntl, os, fdpass
content = os.memfd_create("x")
os.dup2(content, {low})
with fdpass.OwnedFd({low}) as owned:
    assert owned.fileno() >= 3
    assert os.path.samestat(os.fstat(owned.fileno()), os.fstat(content))
    assert fcntl.fcntl(owned, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert not os.path.exists("/proc/self/fd/{low}")
""")


def test_a_duplicate_is_never_below_3(run_python):
    run_python("""
import os, fdpass
with fdpass.OwnedFd(os.memfd_create("x")) as owned:
    os.closerange(0, 3)
    with owned.dup() as one, owned.dup() as two:
        numbers = one.fileno(), two.fileno()
    assert min(numbers) >= 3, numbers
""")


def test_with_a_full_table_a_duplicate_is_refused_and_the_owner_unharmed(number, full_table):
    with fdpass.OwnedFd(number) as owned:
        with full_table(), pytest.raises(OSError) as caught:
            owned.dup()
        assert caught.value.errno == errno.EMFILE
        assert owned.fileno() == number


# -------------------------------------------------------------------------------- to_socket


def own(sock):
    """An owner of a duplicate of sock, which stays the test's."""
    return fdpass.OwnedFd(os.dup(sock.fileno()))


@pytest.mark.parametrize(
    ("family", "kind", "protocol"),
    [
        (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP),
        (socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_UDP),
        (socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP),
        (socket.AF_INET6, socket.SOCK_DGRAM, socket.IPPROTO_UDP),
        (socket.AF_UNIX, socket.SOCK_STREAM, 0),
        (socket.AF_UNIX, socket.SOCK_DGRAM, 0),
        (socket.AF_UNIX, socket.SOCK_SEQPACKET, 0),
        (socket.AF_NETLINK, socket.SOCK_RAW, 0),
    ],
    ids=str,
)
def test_a_socket_is_what_the_kernel_says(family, kind, protocol):
    with socket.socket(family, kind) as sock:
        owned = own(sock)
        number = owned.fileno()
        with owned.to_socket() as derived:
            assert type(derived) is socket.socket
            assert (derived.family, derived.type, derived.proto) == (family, kind, protocol)
            assert derived.fileno() == number
            assert derived.gettimeout() is None
            assert not derived.get_inheritable()
            assert owned.fileno() == -1
            owned.close()
            assert is_open(number)


def test_a_listening_socket_still_accepts():
    with socket.create_server(("127.0.0.1", 0)) as listener, own(listener).to_socket() as derived:
        assert derived.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        with socket.create_connection(listener.getsockname()), derived.accept()[0] as accepted:
            assert accepted.family == socket.AF_INET


def test_a_connected_socket_still_talks(unix_pair):
    left, right = unix_pair
    with own(left).to_socket() as derived:
        derived.sendall(b"through the copy")
        assert right.recv(100) == b"through the copy"


@pytest.mark.parametrize("default", [None, 0.0, 5.0])
@pytest.mark.parametrize("blocking", [True, False])
def test_the_timeout_follows_the_description_whatever_the_default_is(unix_pair, default, blocking):
    left, _ = unix_pair
    left.setblocking(blocking)
    socket.setdefaulttimeout(default)
    try:
        derived = own(left).to_socket()
    finally:
        socket.setdefaulttimeout(None)
    with derived:
        assert derived.gettimeout() == (None if blocking else 0.0)
        assert os.get_blocking(left.fileno()) is blocking  # another holder's view of the shared flag


def new_epoll():
    with select.epoll() as epoll:  # which keeps its descriptor
        return [os.dup(epoll.fileno())]


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: os.pipe2(0), "pipe"),
        (lambda: [os.open(__file__, os.O_RDONLY)], "regular file"),
        (lambda: [os.open("/", os.O_RDONLY)], "directory"),
        (lambda: [os.open("/dev/null", os.O_RDONLY)], "character device"),
        (new_epoll, "eventpoll"),
        (lambda: [os.eventfd(0)], "eventfd"),
        (lambda: [os.pidfd_open(os.getpid())], "pidfd"),
    ],
    ids=["pipe", "file", "directory", "device", "epoll", "eventfd", "pidfd"],
)
def test_what_is_no_socket_is_refused_and_stays_with_its_owner(make, word):
    numbers = list(make())
    owned = [fdpass.OwnedFd(number) for number in numbers]
    for one, number in zip(owned, numbers, strict=True):
        with pytest.raises(fdpass.WrongDescriptorError, match=str(number)) as caught:
            one.to_socket()
        assert "socket" in caught.value.expected
        assert word in caught.value.actual
        assert word in str(caught.value)
        assert one.fileno() == number
        one.close()


def test_a_closed_number_is_an_os_error_not_a_wrong_kind(number):
    owned = fdpass.OwnedFd(number)
    os.close(number)
    with pytest.raises(OSError) as caught:
        owned.to_socket()
    assert caught.value.errno == errno.EBADF
    os.dup2(0, number)
    owned.close()


# -------------------------------------------------------------------------------- to_file


def test_a_file_takes_the_descriptor_over():
    read, write = os.pipe()
    reader, writer = fdpass.OwnedFd(read), fdpass.OwnedFd(write)
    with reader.to_file("r", encoding="utf-8") as lines, writer.to_file("wb", buffering=0) as raw:
        assert (reader.fileno(), writer.fileno()) == (-1, -1)
        assert (lines.fileno(), raw.fileno()) == (read, write)
        raw.write("zwölf\n".encode())
        assert lines.readline() == "zwölf\n"
    assert not is_open(read)
    assert not is_open(write)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("no such mode", {}),
        ("rb", {"encoding": "utf-8"}),
        ("r", {"encoding": "no-such-encoding"}),
        ("r", {"errors": "no-such-handler", "encoding": "ascii"}),
        ("r+b", {}),  # a pipe is not seekable
        ("r", {"buffering": 0}),
        ("r", {"newline": "x"}),
    ],
    ids=str,
)
def test_a_file_that_cannot_be_made_closes_the_descriptor_at_most_once(mode, options):
    """It may stay here or be gone, but the owner must know which: io.open closes some of its failures itself."""
    read, write = os.pipe()
    owned = fdpass.OwnedFd(read)
    try:
        made = owned.to_file(mode, **options)
    except (ValueError, LookupError, OSError):  # UnsupportedOperation is both
        pass
    else:
        made.close()
    opened, believed = is_open(read), owned.fileno() >= 0
    if believed:
        owned.release()
    if opened:
        os.close(read)
    os.close(write)
    assert believed is opened


def test_a_directory_cannot_be_made_a_file():
    owned = fdpass.OwnedFd(number := os.open("/", os.O_RDONLY))
    with pytest.raises(IsADirectoryError):
        owned.to_file()
    opened, believed = is_open(number), owned.fileno() >= 0
    if believed:
        owned.release()
    if opened:
        os.close(number)
    assert believed is opened


def test_a_file_object_of_the_standard_library_can_be_read_back():
    with fdpass.OwnedFd(os.memfd_create("file")).to_file("w+") as file:
        assert isinstance(file, io.TextIOBase)
        file.write("text")
        file.seek(0)
        assert file.read() == "text"


# -------------------------------------------------------------------------------- threads, signals


@pytest.fixture
def nervous():
    """Threads take turns as often as the interpreter can make them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("how", ["close", "release", "to_file"])
def test_of_many_threads_exactly_one_gets_the_descriptor(nervous, how, marked, content):
    """Each winner's number is at once somebody else's, who would notice a second close."""
    rounds, count = 150, 4
    mine = marked("still mine")
    start, done = threading.Barrier(count), threading.Barrier(count)
    owners = [fdpass.OwnedFd(os.dup(mine)) for _ in range(rounds)]
    wrong = []

    def contend(index):
        for round_, owned in enumerate(owners):
            start.wait()
            try:
                if how == "close":
                    owned.close()
                elif how == "release":
                    os.close(owned.release())
                else:
                    owned.to_file("rb", buffering=0).close()
            except fdpass.ClosedError:
                pass
            except BaseException as error:
                wrong.append((round_, error))
            try:
                sentinel = os.dup(mine)
            except OSError as error:
                wrong.append((round_, error))
                sentinel = None
            done.wait()
            if sentinel is not None:
                try:
                    assert content(sentinel) == "still mine"
                    os.close(sentinel)
                except (OSError, AssertionError) as error:
                    wrong.append((round_, error))

    threads = [threading.Thread(target=contend, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(owned.fileno() == -1 for owned in owners)


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
random.seed(7)

mine = os.memfd_create("mine")
ino = os.fstat(mine).st_ino
left, right = socket.socketpair()
hits = 0

def attempt(make, act):
    # A Bang at a random point of act(owned). Then every number that is free is taken by a sentinel, and only after that the
    # objects of the interrupted call go: one that believes it still owns a closed number closes a sentinel.
    global armed, hits
    owned = make()
    held = None
    try:
        armed = True
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 4e-5))
        act(owned)
        armed = False
    except Bang as error:
        held = error
        hits += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    sentinels = [os.dup(mine) for _ in range(4)]
    owned.close()
    del owned, held
    gc.collect(0)
    for number in sentinels:
        assert os.fstat(number).st_ino == ino, "a sentinel was closed"
        os.close(number)

def convert(owned):
    owned.to_socket().close()

def to_file(owned):
    owned.to_file("rb").close()

def own_socket():
    return fdpass.OwnedFd(os.dup(left.fileno()))

def own_file():
    return fdpass.OwnedFd(os.dup(mine))

# Not dup(): the number that a C call returns is a bare int for a moment, as it is for os.dup.
ways = [(own_socket, convert), (own_file, to_file), (own_file, fdpass.OwnedFd.close)]
for way in ways:
    attempt(*way)
import warnings
warnings.simplefilter("ignore")
gc.collect()
before = sorted(os.listdir("/proc/self/fd"))
for round_ in range(1500):
    attempt(*ways[round_ % len(ways)])
gc.collect()
after = sorted(os.listdir("/proc/self/fd"))
assert after == before, (before, after)
assert hits > 100, hits
"""


def test_interrupted_anywhere_nothing_leaks_and_nothing_is_closed_twice(run_python):
    done = run_python(INTERRUPTED)
    assert not done.stderr
