"""The error tree: every error of fdpass's own is an FdPassError, says what was attempted with the numbers, and survives a pickle."""

import copy
import errno
import pickle
import signal

import pytest

import fdpass
from fdpass import errors

EXAMPLES = [
    fdpass.ClosedError("the listener was drained"),
    fdpass.EndOfChannel("the peer closed the channel"),
    fdpass.BrokenChannelError("ended after 3 of 9 bytes"),
    fdpass.ProtocolError("a frame of 2**60 bytes"),
    fdpass.DescriptorsLostError("3 of 10 arrived", 10, 3, 64, b"data", errno.EMFILE),
    fdpass.DescriptorsLostError("2 arrived where maxfds allows 1", 2, 2, 1),
    fdpass.TicketError("claimed already"),
    fdpass.PeerRefusedError("uid 1000, not 0"),
    fdpass.WrongDescriptorError("descriptor 5 is a pipe, not a socket", "a socket", "a pipe"),
    fdpass.WorkerDied("worker-2", 4711, -9, "it never became ready"),
    fdpass.WorkerDied("worker-3", 4712, 3),
    fdpass.WorkerDied("worker-4", 4713, None),
]
CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]

examples = pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)


def test_every_class_is_public_is_in_the_tree_and_has_an_example_here():
    assert errors.FdPassError in CLASSES
    for cls in CLASSES:
        assert issubclass(cls, fdpass.FdPassError)
        assert getattr(fdpass, cls.__name__) is cls
    assert {type(error) for error in EXAMPLES} == set(CLASSES) - {fdpass.FdPassError}


def test_the_root_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        raise fdpass.FdPassError("nothing says which")


def test_two_are_also_what_the_standard_library_would_raise():
    assert issubclass(fdpass.EndOfChannel, EOFError)
    assert issubclass(fdpass.DescriptorsLostError, OSError)
    own = {fdpass.EndOfChannel, fdpass.DescriptorsLostError}
    assert not [cls for cls in CLASSES if issubclass(cls, (OSError, EOFError)) and cls not in own]


@examples
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_survives_a_pickle(error, protocol):
    same_in_substance(pickle.loads(pickle.dumps(error, protocol)), error)


@examples
def test_survives_a_copy(error):
    same_in_substance(copy.copy(error), error)
    same_in_substance(copy.deepcopy(error), error)


def same_in_substance(one, other):
    assert type(one) is type(other)
    assert str(one) == str(other)
    assert one.args == other.args
    names = ("needed", "got", "limit", "data", "errno", "strerror", "filename", "filename2", "expected", "actual")
    for name in (*names, "name", "pid", "exitcode", "signal", "detail"):
        assert getattr(one, name, "absent") == getattr(other, name, "absent"), name


@examples
def test_is_caught_as_the_root_and_says_its_sentence(error):
    with pytest.raises(fdpass.FdPassError) as caught:
        raise error
    assert str(caught.value)
    assert not str(caught.value).startswith(("(", "[Errno"))


def test_lost_descriptors_carry_the_numbers_and_the_errno():
    error = fdpass.DescriptorsLostError("3 of 10 arrived", 10, 3, 64, b"data", errno.EMFILE)
    assert (error.needed, error.got, error.limit, error.data) == (10, 3, 64, b"data")
    assert error.errno == errno.EMFILE
    assert error.strerror == str(error) == "3 of 10 arrived"
    assert error.filename is None


def test_lost_descriptors_without_an_errno():
    error = fdpass.DescriptorsLostError("2 arrived where maxfds allows 1", 2, 2, 1)
    assert not error.errno
    assert (error.data, error.filename, error.filename2) == (b"", None, None)
    assert str(error) == "2 arrived where maxfds allows 1"


def test_a_wrong_descriptor_says_what_it_is_and_what_was_wanted():
    error = fdpass.WrongDescriptorError("descriptor 5 is a pipe, not a socket", "a socket", "a pipe")
    assert (error.expected, error.actual) == ("a socket", "a pipe")


@pytest.mark.parametrize(
    ("exitcode", "number", "words"),
    [
        (3, None, "exited with code 3"),
        (0, None, "exited with code 0"),
        (-9, signal.SIGKILL, "SIGKILL"),
        (-signal.SIGSEGV, signal.SIGSEGV, "SIGSEGV"),
        (-(signal.SIGRTMIN + 3), None, f"signal {signal.SIGRTMIN + 3}"),
        (None, None, "somebody else"),
    ],
)
def test_a_dead_worker_is_named_with_its_end(exitcode, number, words):
    error = fdpass.WorkerDied("worker-2", 4711, exitcode, "it never became ready")
    assert (error.name, error.pid, error.exitcode, error.signal) == ("worker-2", 4711, exitcode, number)
    for part in ("worker-2", "4711", words, "it never became ready"):
        assert part in str(error)
