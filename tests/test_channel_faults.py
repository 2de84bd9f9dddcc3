"""A channel whose system calls are cut short, interrupted, or where the process at one end is killed at each of them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
COMPILER = shutil.which("cc")
pytestmark = pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs cc, and a loader that takes LD_PRELOAD")

#: What every program begins with: interfere(), and a message of each kind with what it looks like when it has arrived.
PROLOGUE = """
import ctypes, gc, os, pickle, sys, threading
sys.path.insert(0, sys.argv[1])
import fdpass
interfere = ctypes.CDLL(None).interfere

def opened():
    gc.collect()
    return sorted(map(int, os.listdir("/proc/self/fd")))

def marked(text):
    fd = os.memfd_create("marked")
    os.pwrite(fd, text.encode(), 0)
    return fd

def read(item):
    return os.pread(item.fileno(), 100, 0).decode()

files = [marked(str(place)) for place in range(300)]
owned = [fdpass.OwnedFd(os.dup(fd)) for fd in files]

def check_message(got):
    data, owners = got
    assert data == b"words", data
    assert list(map(read, owners)) == [str(place) for place in range(300)]
    for one in owners:
        one.close()

def check_object(got):
    words, owners, large = got
    assert words == "words" and large == bytes(range(250)) * 4 and type(large) is memoryview
    assert list(map(read, owners)) == ["0", "1", "2"]
    for one in owners:
        one.close()

WAYS = [
    (lambda channel: channel.send_message(b"words", files, timeout=60), lambda channel: check_message(channel.recv_message(timeout=60))),
    (lambda channel: channel.send(["words", owned[:3], pickle.PickleBuffer(bytes(range(250)) * 4)]),
     lambda channel: check_object(channel.recv(timeout=60))),
    (lambda channel: channel.send_message(bytes(500_000)), lambda channel: channel.recv_message(timeout=60)[0] == bytes(500_000) or 1 / 0),
]
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """Environment of a program that is interfered with."""
    library = tmp_path_factory.mktemp("shim") / "interfere.so"
    flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([COMPILER, *flags, "-o", library, TESTS / "interfere.c", "-ldl"], check=True)
    # A sanitizer wants to be the first.
    return os.environ | {"LD_PRELOAD": ":".join(filter(None, [os.environ.get("LD_PRELOAD"), str(library)]))}


@pytest.mark.parametrize("way", [0, 1])
@pytest.mark.parametrize(("short", "eintr"), [(1, 0), (0, 1), (1, 1)])
def test_short_and_interrupted_calls_change_nothing(run_python, shim, way, short, eintr):
    program = f"""
left, right = fdpass.Pipe(large=500)
before = opened()
send, receive = WAYS[{way}]
interfere({short}, {eintr}, 0, 0)
for _ in range(2):
    sender = threading.Thread(target=send, args=(left,))
    sender.start()
    receive(right)
    sender.join()
assert not right.poll()
interfere(0, 0, 0, 0)
assert opened() == before, (opened(), before)
for one in owned:
    one.close()
left.close(), right.close()
print("the same")
"""
    assert run_python(PROLOGUE + program, str(TESTS), env=shim).stdout == "the same\n"


@pytest.mark.parametrize(("way", "short"), [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)])
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_sender_is_killed_at_every_call(run_python, shim, way, short, when):
    program = f"""
send, receive = WAYS[{way}]
before, outcomes, place = opened(), [], 0
while True:
    place += 1 if place < 40 else 97
    left, right = fdpass.Pipe(large=500)
    pid = os.fork()
    if not pid:
        right.close()
        interfere({short}, 0, *({"place, 0" if when == "before" else "0, place"}))
        send(left)
        os._exit(0)
    left.close()
    try:
        receive(right)
        outcome = "whole"
    except (fdpass.BrokenChannelError, fdpass.EndOfChannel) as error:
        outcome = type(error).__name__
        for _ in range(2):
            try:
                right.recv_message()
            except type(error):
                pass
    right.close()
    status = os.waitpid(pid, 0)[1]
    outcomes.append(outcome)
    assert opened() == before, (place, opened(), before)
    if status == 0:
        break
    assert status == 9, status
assert outcomes[-1] == "whole", outcomes
for one in owned:
    one.close()
print(*dict.fromkeys(outcomes))
"""
    seen = run_python(PROLOGUE + program, str(TESTS), env=shim).stdout.split()
    assert set(seen) <= {"EndOfChannel", "BrokenChannelError", "whole"}
    assert "whole" in seen
    assert len(seen) > 1 or (when, way, short) == ("after", 0, 0)


@pytest.mark.parametrize("short", [0, 1])
def test_the_receiver_is_killed_in_the_middle_of_a_frame(run_python, shim, short):
    program = f"""
import signal
assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN
# Python ignores it; whoever does not must not die of a channel either.
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
before, outcomes = opened(), []
for place in range(1, 12):
    left, right = fdpass.Pipe()
    pid = os.fork()
    if not pid:
        left.close()
        interfere({short}, 0, 0, place)
        while True:
            right.recv_message()
    right.close()
    try:
        # More frames than calls: each takes one at least, a whole one when the sender keeps up.
        for _ in range(12):
            left.send_message(bytes(1_000_000), files[:3])
        outcomes.append("sent")
    except (fdpass.BrokenChannelError, BrokenPipeError) as error:
        outcomes.append(type(error).__name__)
    left.close()
    assert os.waitpid(pid, 0)[1] == 9
    assert opened() == before, (opened(), before)
for one in owned:
    one.close()
print(*dict.fromkeys(outcomes))
"""
    outcomes = run_python(PROLOGUE + program, str(TESTS), env=shim).stdout.split()
    # It may also have died between two frames, when the next one had not begun: then the error is the kernel's.
    assert set(outcomes) - {"BrokenPipeError"} == {"BrokenChannelError"}
