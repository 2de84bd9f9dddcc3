"""A channel against a model of it: any order of sends, receives, closes, kills, limits and time-outs; and any bytes that a peer may write.

The fuzzer runs for FDPASS_FUZZ_SECONDS (2): FDPASS_FUZZ_SECONDS=600 pytest tests/test_channel_model.py -k fuzz --timeout 900
"""

import array
import collections
import os
import pickle
import signal
import socket
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

import fdpass
from fdpass import _frames

FUZZ_SECONDS = float(os.environ.get("FDPASS_FUZZ_SECONDS", "2"))
SIDES = st.integers(0, 1)
PICKS = st.lists(st.integers(0, 4), max_size=4) | st.sampled_from([[0, 1, 2] * 84, [3, 4, 0] * 100])


def opened():
    found = map(int, os.listdir("/proc/self/fd"))
    # The one that listed the directory is gone by now.
    return {number for number in found if os.path.lexists(f"/proc/self/fd/{number}")}


def read(item):
    return int(os.pread(item.fileno(), 10, 0))


class Conversation(RuleBasedStateMachine):
    """Two ends, and for each what it has yet to receive: (kind, payload, which files), or the error that ends it."""

    full_table = None  # the fixture
    steps = 0

    @initialize()
    def begin(self):
        self.files = []
        self.before = opened()
        for place in range(5):
            self.files.append(os.memfd_create("model"))
            os.pwrite(self.files[-1], b"%d" % place, 0)
        self.owned = [fdpass.OwnedFd(os.dup(fd)) for fd in self.files]
        self.ends, self.queues = [], []
        self.connect()

    def connect(self):
        for end in self.ends:
            end.close()
        self.ends = list(fdpass.Pipe(large=3000))
        self.queues = [collections.deque(), collections.deque()]
        self.errors = [None, None]

    def usable(self, side):
        return self.errors[side] is None and self.ends[side].fileno() >= 0

    def send(self, side, frame, action):
        """Sends to the other side, unless this one has ended."""
        Conversation.steps += 1
        if not self.usable(side):
            with pytest.raises((fdpass.FdPassError, OSError)):
                action()
            return
        try:
            action()
        except TimeoutError:  # the peer's queue is full: nothing went
            return
        except fdpass.BrokenChannelError:
            self.errors[side] = fdpass.BrokenChannelError
            self.queues[1 - side].append(fdpass.BrokenChannelError)
        except OSError:
            assert self.ends[1 - side].fileno() < 0
        else:
            assert self.ends[1 - side].fileno() >= 0
            self.queues[1 - side].append(frame)

    @rule(side=SIDES, size=st.sampled_from([0, 1, 100, 70_000]), picks=PICKS)
    def send_message(self, side, size, picks):
        data = os.urandom(size)
        fds = [self.files[pick] for pick in picks]
        self.send(side, ("data", data, picks), lambda: self.ends[side].send_message(data, fds, timeout=0))

    @rule(side=SIDES, size=st.sampled_from([0, 100, 5000]), picks=PICKS)
    def send_object(self, side, size, picks):
        data, items = os.urandom(size), [self.owned[pick].dup() for pick in picks]
        self.send(side, ("object", data, picks), lambda: self.ends[side].send([pickle.PickleBuffer(data), items], timeout=0, consume=True))
        for item in items:
            item.close()

    @rule(side=SIDES)
    def send_too_much(self, side):
        Conversation.steps += 1
        if self.ends[side].fileno() >= 0:
            with pytest.raises(ValueError, match="max_fds"):
                self.ends[side].send_message(b"", [0] * (_frames.MAX_FDS + 1))

    def receive(self, side, plainly, timeout=0):
        """(kind, data, owners), or what was raised."""
        Conversation.steps += 1
        queue = self.queues[side]
        if plainly or not queue or isinstance(queue[0], type) or queue[0][0] == "data":
            return self.ends[side].recv_message(timeout)
        return self.ends[side].recv(timeout)

    @rule(side=SIDES, plainly=st.booleans())
    def take_one(self, side, plainly):
        queue = self.queues[side]
        error = self.errors[side]
        if self.ends[side].fileno() < 0:
            error = fdpass.ClosedError
        elif error is None and not queue:
            error = TimeoutError if self.ends[1 - side].fileno() >= 0 else (fdpass.EndOfChannel, ConnectionResetError)
        elif error is None and isinstance(queue[0], type):
            error = self.errors[side] = queue.popleft()
        if error is not None:
            with pytest.raises(error) as caught:
                self.receive(side, plainly)
            if caught.type is fdpass.EndOfChannel:
                self.errors[side] = fdpass.EndOfChannel
            return
        data, owners = self.receive(side, plainly)
        kind, expected, picks = queue.popleft()
        if kind == "object" and plainly:
            pass  # its pickle, and with a large buffer a memory file
        else:
            assert data == expected
        assert [read(owned) for owned in owners[: len(picks)]] == picks
        for owned in owners:
            owned.close()

    @rule(side=SIDES, free=st.integers(0, 3))
    def take_one_with_a_full_table(self, side, free):
        queue = self.queues[side]
        if not self.usable(side) or not queue or isinstance(queue[0], type) or queue[0][0] != "data" or len(queue[0][2]) <= free:
            return
        with Conversation.full_table(free=free), pytest.raises(fdpass.DescriptorsLostError) as caught:
            self.receive(side, True)
        _, data, picks = queue.popleft()
        assert (caught.value.needed, caught.value.data) == (len(picks), data)
        assert caught.value.got <= free

    @rule(side=SIDES, cut=st.sampled_from([0, 2, 15, 16, 19]), picks=PICKS)
    def write_half_a_frame(self, side, cut, picks):
        """A time-out inside a frame ends the receiver."""
        Conversation.steps += 1
        if not self.usable(side) or self.ends[1 - side].fileno() < 0 or any(isinstance(item, type) for item in self.queues[1 - side]):
            return
        fds = [self.files[pick] for pick in picks][:2]
        raw = (_frames.encode(_frames.DATA, 5, len(fds)) + b"abc")[:cut] or b"garbage and more of it"
        try:
            fdpass.send_fds(self.ends[side], [raw], fds, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        self.queues[1 - side].append(fdpass.BrokenChannelError if cut else fdpass.ProtocolError)
        # What follows would be taken for the rest of it.
        self.ends[side]._broken = fdpass.BrokenChannelError("by the test")
        self.errors[side] = fdpass.BrokenChannelError

    @rule(side=SIDES)
    def close(self, side):
        Conversation.steps += 1
        self.ends[side].close()
        self.queues[side].clear()

    @precondition(lambda self: min(end.fileno() for end in self.ends) >= 0 and not any(self.queues) and self.errors == [None, None])
    @rule(side=SIDES, whole=st.booleans(), picks=PICKS)
    def kill(self, side, whole, picks):
        """A process that has one end is killed, after a frame or in the middle of one."""
        Conversation.steps += 1
        data, fds = b"last words", [self.files[pick] for pick in picks][:250]
        pid = os.fork()
        if not pid:
            self.ends[1 - side].close()
            if whole:
                self.ends[side].send_message(data, fds)
            else:
                fdpass.send_fds(self.ends[side], [_frames.encode(_frames.DATA, 10, len(fds))[:15]], fds)
            os.kill(os.getpid(), signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        self.ends[side].close()
        self.queues[1 - side].append(("data", data, picks[:250]) if whole else fdpass.BrokenChannelError)

    @precondition(lambda self: min(end.fileno() for end in self.ends) < 0 or self.errors != [None, None])
    @rule()
    def connect_again(self):
        Conversation.steps += 1
        self.connect()

    @invariant()
    def nothing_leaks(self):
        if hasattr(self, "ends"):
            ours = {*self.files, *(owned.fileno() for owned in self.owned), *(end.fileno() for end in self.ends)} - {-1}
            assert opened() - self.before == ours

    def teardown(self):
        for item in [*getattr(self, "ends", ()), *getattr(self, "owned", ())]:
            item.close()
        for fd in getattr(self, "files", ()):
            os.close(fd)


def converse(full_table, examples, length):
    Conversation.full_table, Conversation.steps = staticmethod(full_table), 0
    run_state_machine_as_test(Conversation, settings=settings(max_examples=examples, stateful_step_count=length))


def test_any_order_of_things(full_table):
    converse(full_table, 15, 30)


@pytest.mark.long
def test_ten_thousand_steps(full_table):
    total = 0
    while total < 10_000:
        converse(full_table, 100, 60)
        total += Conversation.steps


# -------------------------------------------------------------------------------------------------------------- any bytes


def headers():
    """Headers that are nearly right."""
    small, large = st.integers(0, 300), st.integers(0, (1 << 64) - 1)
    return st.builds(
        lambda magic, version, kind, fds, size: magic + bytes([version, kind]) + fds.to_bytes(4, "big") + size.to_bytes(8, "big"),
        st.sampled_from([b"fd", b"fd", b"fd", b"fe"]),
        st.sampled_from([1, 1, 1, 0, 2]),
        st.integers(0, 3),
        st.integers(0, 3) | st.sampled_from([252, 253, 505, 1 << 31]),
        small | st.sampled_from([70_000, 1 << 30, 1 << 62]) | large,
    )


#: What a peer writes: pieces of bytes, each with so many descriptors.
SCRIPTS = st.lists(st.tuples(headers() | st.binary(min_size=1, max_size=40), st.sampled_from([0, 0, 0, 1, 2, 252, 253])), max_size=6)


@settings(max_examples=100)
@given(SCRIPTS, st.booleans())
def feed(script, cut):
    raw, far = socket.socketpair()
    raw.setblocking(False)
    with raw, fdpass.Channel(far, large=100) as channel:
        for data, count in script:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [raw.fileno()] * count))] if count else []
            raw.sendmsg([data], rights)
        if cut:
            raw.close()

        def receive_all():
            while True:
                for owned in channel.recv_message(timeout=0)[1]:
                    owned.close()

        # Frames, and then how it ends.
        with pytest.raises((fdpass.ProtocolError, fdpass.BrokenChannelError, fdpass.EndOfChannel if cut else TimeoutError)):
            receive_all()


def test_a_fuzzer_finds_frames_and_named_errors_only():
    before, end = opened(), time.monotonic() + FUZZ_SECONDS
    while time.monotonic() < end:
        feed()
        assert opened() == before
