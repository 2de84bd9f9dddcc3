"""Channels in an event loop: what Channel promises, awaited, and whatever is cancelled loses neither bytes nor descriptors."""

import asyncio
import contextlib
import gc
import multiprocessing
import os
import pickle
import socket
import stat
import sys
import tracemalloc
from pathlib import Path

import pytest

import fdpass
from fdpass import _frames, _syscall
from fdpass.aio import AsyncChannel, open_channel, start_channel_server

sys.path.insert(0, str(Path(__file__).parent))  # children.py, whose classes are pickled by name

import aio_targets
import children

try:
    import uvloop
except ImportError:
    uvloop = None
else:
    # Its first loop opens a pipe for the life of the process: before any test counts.
    uvloop.new_event_loop().close()

MEGABYTES = 3_000_000


@pytest.fixture(params=["asyncio", "uvloop"])
def runner(request):
    """An event loop, closed afterwards: the stock one and uvloop's."""
    module = {"asyncio": asyncio, "uvloop": uvloop}[request.param]
    if module is None:
        pytest.skip("uvloop is not installed")
    with asyncio.Runner(loop_factory=module.new_event_loop) as runner:
        yield runner


@pytest.fixture
def run(runner):
    """run(main): the coroutine function in the loop."""
    return lambda main: runner.run(main())


@pytest.fixture
def many_rounds(runner):
    """For thousands of rounds: asyncio's debug mode, which is -X dev's, keeps a traceback of each step and takes ten times as long."""
    runner.get_loop().set_debug(False)


def pair(**options):
    """Two connected channels."""
    return tuple(map(AsyncChannel, fdpass.Pipe(**options)))


def with_peer():
    """(raw, channel): a plain non-blocking socket plays the peer, with as little room between them as the kernel has."""
    raw, far = socket.socketpair()
    raw.setblocking(False)
    far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    return raw, AsyncChannel(far)


def frame(data, kind=_frames.DATA, fds=0):
    """The bytes of a frame."""
    return _frames.encode(kind, len(data), fds) + bytes(_frames.fillers(fds)) + data + bytes(_frames.padding(len(data), fds))


def close_all(items):
    for item in items:
        item.close()


async def rounds(count):
    """So many turns of the loop."""
    for _ in range(count):
        await asyncio.sleep(0)


async def cancel(task):
    """Cancels a task and waits for its end."""
    task.cancel()
    await asyncio.wait([task])


# -------------------------------------------------------------------------------------------------------------- whole frames


def test_objects_and_messages_go_both_ways(run, marked, content):
    async def main():
        left, right = pair()
        async with left, right:
            await left.send({"a": [1]})
            await right.send_message(b"words", [marked("mine")])
            assert await right.recv() == {"a": [1]}
            data, (owned,) = await left.recv_message()
            with owned:
                assert (data, content(owned)) == (b"words", "mine")
                assert not os.get_inheritable(owned.fileno())

    run(main)


@pytest.mark.parametrize("size", [0, 16, 65537, MEGABYTES])
@pytest.mark.parametrize("count", [0, 1, 253, 600])
def test_any_size_with_any_number_of_descriptors(run, marked, content, size, count, limit_nofile):
    fds, data = [marked(str(place)) for place in range(count)], os.urandom(size)

    async def main():
        left, right = pair()
        async with left, right:
            got, _ = await asyncio.gather(right.recv_message(), left.send_message(data, fds))
            assert got[0] == data
            assert [content(owned) for owned in got[1]] == [str(place) for place in range(count)]
            close_all(got[1])

    with limit_nofile(4096):
        run(main)


def test_megabytes_both_ways_at_once(run):
    async def main():
        left, right = pair()
        there, back = os.urandom(MEGABYTES), os.urandom(MEGABYTES)
        async with left, right:
            got = await asyncio.gather(left.send(there), right.send_message(back), right.recv(), left.recv_message())
            assert got[2:] == [there, (back, [])]

    run(main)


def test_sockets_in_objects_are_the_same_sockets(run, unix_pair):
    async def main():
        left, right = pair()
        async with left, right:
            await left.send([*unix_pair, children.Temporary(unix_pair[0])])
            socks = await right.recv()
            assert [children.cookie(sock) for sock in socks] == [children.cookie(sock) for sock in (*unix_pair, unix_pair[0])]
            close_all(socks)

    run(main)


def test_it_speaks_with_a_channel_in_a_thread(run, unix_pair):
    async def main():
        near, far = fdpass.Pipe()

        def echo():
            with far:
                for obj in far:
                    far.send(obj)
                    obj[1].close()

        async with AsyncChannel(near) as channel:
            thread = asyncio.get_running_loop().run_in_executor(None, echo)
            for number in range(50):
                await channel.send([number, unix_pair[0]])
                back, sock = await channel.recv()
                with sock:
                    assert (back, children.cookie(sock)) == (number, children.cookie(unix_pair[0]))
            channel.close()
            await thread

    run(main)


# -------------------------------------------------------------------------------------------------------------- many at once


def test_tasks_send_one_after_the_other_in_their_order(run):
    async def main():
        left, right = pair()
        async with left, right, asyncio.TaskGroup() as group:
            for number in range(20):
                group.create_task(left.send_message(b"%d" % number * 100_000))
            for number in range(20):
                assert (await right.recv_message())[0] == b"%d" % number * 100_000

    run(main)


def test_tasks_receive_one_after_the_other_in_their_order(run):
    async def main():
        left, right = pair()
        async with left, right:
            tasks = [asyncio.create_task(right.recv()) for _ in range(20)]
            await rounds(1)
            for number in range(20):
                await left.send(number)
            assert await asyncio.gather(*tasks) == list(range(20))

    run(main)


def test_a_sender_waits_while_nobody_reads(run):
    async def main():
        left, right = pair()
        sent = []

        async def flood():
            while len(sent) < 2000:
                await left.send_message(bytes(1000))
                sent.append(len(sent))
            left.close()

        async with right:
            task = asyncio.create_task(flood())
            before = -1
            while before < len(sent):
                before = len(sent)
                await rounds(100)
            assert before < 2000
            for _ in range(2000):
                assert await right.recv_message() == (bytes(1000), [])
            await task

    run(main)


def test_a_flood_leaves_the_other_tasks_their_turn(run):
    # Neither of the two ever has to wait for the other.
    async def main():
        left, right = pair()
        turns = []

        async def bystander():
            while True:
                turns.append(len(turns))
                await asyncio.sleep(0)

        async with left, right:
            task = asyncio.create_task(bystander())
            for _ in range(1000):
                await left.send(None)
                await right.recv()
            assert len(turns) > 10
            await cancel(task)

    run(main)


@pytest.mark.usefixtures("many_rounds")
def test_a_thousand_channels_in_one_loop(run, limit_nofile):
    """Every descriptor comes back to the channel that sent it, and is the same socket; a thousand are in flight at a time."""

    async def main():
        ends = [pair() for _ in range(1000)]
        socks = [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in ends]
        cookies = [children.cookie(sock) for sock in socks]
        assert len(set(cookies)) == 1000
        # All of them are sent before the first is received.
        await asyncio.gather(*(left.send((place, 0, socks[place])) for place, (left, _) in enumerate(ends)))
        close_all(socks)

        async def talk(place, channel, turns):
            for turn in range(turns):
                number, count, sock = await channel.recv()
                with sock:
                    assert (number, count // 2, children.cookie(sock)) == (place, turn, cookies[place])
                    await channel.send((place, count + 1, sock))

        # There and back, twice; and who is served next is the loop's affair.
        await asyncio.gather(*(talk(place, channel, 2) for place, both in enumerate(ends) for channel in both))
        for place, (_, right) in enumerate(ends):
            _, count, sock = await right.recv()
            with sock:
                assert (count, children.cookie(sock)) == (4, cookies[place])
        for left, right in ends:
            left.close()
            assert [obj async for obj in right] == []
            right.close()

    with limit_nofile(8192):
        run(main)


# -------------------------------------------------------------------------------------------------------------- cancellation


def pieces(data, fds):
    """The bytes of a message one by one, each with the descriptors that ride on it."""
    riding = {place and _frames.HEADER_SIZE + place - 1: fds[batch] for place, batch in enumerate(_frames.batches(len(fds)))}
    return [(bytes([byte]), riding.get(place, [])) for place, byte in enumerate(frame(data, fds=len(fds)))]


@pytest.mark.usefixtures("many_rounds")
@pytest.mark.parametrize("again", [False, True])
def test_a_receive_cancelled_in_any_round_loses_nothing(run, marked, content, again):
    fds = [marked(str(place)) for place in range(300)]
    names = [str(place) for place in range(300)]

    async def attempt(count):
        """A byte arrives in each round; the receive is cancelled after so many. With again, the next one too, and so on."""
        raw, channel = with_peer()
        with raw:
            coming = [*pieces(b"first", fds), *pieces(b"second", fds[:2])]
            arrived, cancelled = [], 0
            while len(arrived) < 2:
                task = asyncio.create_task(channel.recv_message())
                left = count if again or not cancelled else -1
                while left and not task.done():
                    if coming:
                        fdpass.send_fds(raw, [coming[0][0]], coming.pop(0)[1])
                    left -= 1
                    await rounds(1)
                if not task.done():
                    await cancel(task)
                    cancelled += 1
                if task.cancelled():
                    # Forward at the pace of the peer, not of the receiver: else a receive of no rounds never gets anything.
                    if coming:
                        fdpass.send_fds(raw, [coming[0][0]], coming.pop(0)[1])
                else:
                    arrived.append(task.result())
            assert [data for data, _ in arrived] == [b"first", b"second"]
            assert [[content(owned) for owned in owners] for _, owners in arrived] == [names, names[:2]]
            for _, owners in arrived:
                close_all(owners)
            channel.close()
        return cancelled

    async def main():
        count = 1
        while await attempt(count):
            count += 1
        assert count > 20

    run(main)


class Slow:
    """A peer that reads one piece in each round of the loop, and keeps everything."""

    def __init__(self, raw):
        self.raw, self.data, self.owners = raw, b"", []

    async def round(self):
        with contextlib.suppress(BlockingIOError):
            data, owners, *_ = fdpass.recv_fds(self.raw, 4096, 253)
            self.data += data
            self.owners += owners
        await rounds(1)

    async def until(self, task):
        while not task.done():
            await self.round()
        await task


def no_more_room(sock):
    """Fills what a socket sends into, with whole frames; returns their bytes."""
    sent = b""
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(frame(b""), socket.MSG_DONTWAIT)
            sent += frame(b"")
    return sent


@pytest.mark.usefixtures("many_rounds")
@pytest.mark.parametrize("stage", ["room", "no room", "not its turn", "a byte a round"])
def test_a_send_cancelled_in_any_round_sends_all_or_nothing(run, marked, content, limit_nofile, stage, monkeypatch):
    names = [str(place) for place in range(600)]
    marks = [marked(name) for name in names]
    size = 20_000
    if stage == "a byte a round":
        size, send_frame_once = 40, _syscall.send_frame_once
        monkeypatch.setattr(_syscall, "send_frame_once", lambda fd, data, size, *rest: send_frame_once(fd, data, min(size, 1), *rest))
        monkeypatch.setattr("fdpass.aio.channel._IN_A_ROW", 1)

    async def attempt(count):
        raw, channel = with_peer()
        with raw, socket.socket(fileno=os.dup(channel.fileno())) as same:
            slow = Slow(raw)
            before, earlier = b"", None
            if stage == "no room":
                before = no_more_room(same)
            if stage == "not its turn":
                earlier = asyncio.create_task(channel.send_message(bytes(20_000)))
                before = frame(bytes(20_000))
                await rounds(1)
            fds, data = [fdpass.OwnedFd(os.dup(mark)) for mark in marks], bytearray(os.urandom(size))
            sent = frame(bytes(data), fds=600)
            task = asyncio.create_task(channel.send_message(data, fds))
            for _ in range(count):
                await slow.round()
            if not task.done():
                await cancel(task)
            # From now on they are the caller's again, to change and to close.
            close_all(fds)
            data.clear()
            await slow.until(asyncio.create_task(channel.send_message(b"after", marks[:1])))
            if earlier is not None:
                await earlier
            channel.close()
            same.close()
            while slow.raw.recv(1, socket.MSG_PEEK):
                await slow.round()
            arrived = [content(owned) for owned in slow.owners]
            close_all(slow.owners)
            after = frame(b"after", fds=1)
            if not task.cancelled() or len(slow.data) > len(before + after):
                assert slow.data == before + sent + after
                assert arrived == [*names, "0"]
                return "went on" if task.cancelled() else "done"
            assert slow.data == before + after
            assert arrived == ["0"]
            return "nothing"

    async def main():
        outcomes = []
        while outcomes[-1:] != ["done"]:
            outcomes.append(await attempt(len(outcomes)))
        # First too early for the first byte, then in the middle of the frame, at last too late.
        assert sorted(outcomes, key=["nothing", "went on", "done"].index) == outcomes
        assert set(outcomes) == {"nothing", "went on", "done"}
        if stage == "a byte a round":
            assert outcomes.count("went on") >= len(frame(bytes(size), fds=600)) - 2

    with limit_nofile(4096):
        run(main)


def test_a_cancelled_send_of_an_object_keeps_what_only_pickling_made(run, unix_pair):
    """In any round, and with handles that live no longer than the pickling."""
    cookies = [children.cookie(unix_pair[place % 2]) for place in range(300)]

    async def attempt(count):
        left, right = pair()
        with socket.socket(fileno=os.dup(left.fileno())) as same:
            same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        async with left, right:
            socks = [sock.dup() for sock in unix_pair]
            task = asyncio.create_task(left.send([children.Temporary(socks[place % 2]) for place in range(300)]))
            receiving = asyncio.create_task(right.recv())
            await rounds(count)
            late = task.done()
            await cancel(task)
            close_all(socks)
            gc.collect(0)
            await left.send([])
            got = await receiving
            if got:
                assert [children.cookie(sock) for sock in got] == cookies
                close_all(got)
                assert await right.recv() == []
        return late

    async def main():
        count = 0
        while not await attempt(count):
            count += 1
        assert count > 2

    run(main)


def test_a_time_out_is_a_cancellation(run):
    async def main():
        left, right = pair()
        async with left, right:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await right.recv()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await left.send(bytes(MEGABYTES))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(right.recv_message(), 0)
            receiving = asyncio.create_task(right.recv())
            # The first frame is whole or absent, but never in the way.
            await left.send("next")
            assert await receiving in ("next", bytes(MEGABYTES))

    run(main)


def test_a_cancelled_frame_that_cannot_be_kept_breaks_the_channel(run, marked, full_table):
    async def main():
        raw, channel = with_peer()
        with raw:
            mark = marked()
            task = asyncio.create_task(channel.send_message(bytes(20_000), [mark] * 2000))
            await rounds(2)
            assert not task.done()
            with full_table(free=3):
                await cancel(task)
            for use in (channel.send, channel.send_message):
                with pytest.raises(fdpass.BrokenChannelError, match=r"when its sender was cancelled: .*Too many open files"):
                    await use(b"")
            channel.close()
            await channel.wait_closed()

    run(main)


# -------------------------------------------------------------------------------------------------------------- the end


def test_iteration_ends_with_the_channel(run):
    async def main():
        left, right = pair()
        async with right:
            async with left:
                for number in range(5):
                    await left.send(number)
            assert [obj async for obj in right] == [0, 1, 2, 3, 4]
            assert [obj async for obj in right] == []
            with pytest.raises(fdpass.EndOfChannel):
                await right.recv()

    run(main)


def test_iteration_hides_no_broken_frame(run):
    async def main():
        raw, channel = with_peer()
        async with channel:
            raw.sendall(frame(pickle.dumps(1), _frames.OBJECT) + b"fd")
            raw.close()
            with pytest.raises(fdpass.BrokenChannelError, match="in the middle of a frame"):
                [obj async for obj in channel]

    run(main)


def test_closing_wakes_whoever_waits(run):
    async def main():
        raw, channel = with_peer()
        with raw:
            tasks = [asyncio.create_task(channel.recv()) for _ in range(2)]
            with socket.socket(fileno=os.dup(channel.fileno())) as same:
                no_more_room(same)
            tasks += [asyncio.create_task(channel.send(1)) for _ in range(2)]
            await rounds(3)
            assert not any(task.done() for task in tasks)
            channel.close()
            await asyncio.wait(tasks)
            assert [type(task.exception()) for task in tasks] == [fdpass.ClosedError] * 4
            await channel.wait_closed()

    run(main)


def test_closing_finishes_a_frame_that_has_begun_and_aborting_does_not(run):
    async def main():
        for ending in ("close", "abort", "leave", "fail"):
            left, right = pair()
            tasks = [asyncio.create_task(left.send(bytes(MEGABYTES))), asyncio.create_task(left.send("not this one"))]
            await rounds(2)
            if ending == "leave":
                leaving = asyncio.create_task(left.__aexit__(None, None, None))
            elif ending == "fail":
                with contextlib.suppress(LookupError):
                    async with left:
                        raise LookupError
            else:
                getattr(left, ending)()
            await asyncio.wait(tasks[1:])
            assert (left.closed, left.fileno(), type(tasks[1].exception())) == (True, -1, fdpass.ClosedError)
            async with right:
                if ending in ("close", "leave"):
                    assert await right.recv() == bytes(MEGABYTES)
                    await tasks[0]
                    await left.wait_closed()
                    with pytest.raises(fdpass.EndOfChannel):
                        await right.recv()
                    if ending == "leave":
                        await leaving
                else:
                    with pytest.raises(fdpass.ClosedError):
                        await tasks[0]
                    with pytest.raises(fdpass.BrokenChannelError):
                        await right.recv()

    run(main)


def test_a_closed_channel_says_so(run, unix_pair):
    async def main():
        channel = AsyncChannel(unix_pair[0])
        assert repr(channel) == f"<AsyncChannel {channel.fileno()}>"
        assert not channel.closed
        for _ in range(2):
            channel.close()
            channel.abort()
        await channel.wait_closed()
        assert (channel.closed, channel.fileno(), repr(channel)) == (True, -1, "<AsyncChannel closed>")
        for use in (channel.recv, channel.recv_message, lambda: channel.send(1), lambda: channel.send_message(b"")):
            with pytest.raises(fdpass.ClosedError, match="it was closed"):
                await use()
        with pytest.raises(fdpass.ClosedError):
            pickle.dumps(channel)

    run(main)


def test_sending_to_a_peer_that_left(run):
    async def main():
        left, right = pair()
        async with left:
            task = asyncio.create_task(left.send(bytes(MEGABYTES)))
            await rounds(2)
            right.close()
            with pytest.raises((BrokenPipeError, ConnectionResetError, fdpass.BrokenChannelError)):
                await task
            with pytest.raises((BrokenPipeError, fdpass.BrokenChannelError)):
                await left.send(1)

    run(main)


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("raw_bytes", "count", "error", "words"),
    [
        (b"GET / HTTP/1.1\r\n", 2, fdpass.ProtocolError, "not a frame"),
        (_frames.encode(_frames.DATA, 1 << 62, 0), 1, fdpass.ProtocolError, "4611686018427387904 bytes"),
        (frame(b"", fds=1), 2, fdpass.ProtocolError, "announces 1 descriptors and brings 2"),
        (frame(b"", fds=2), 1, fdpass.ProtocolError, "announces 2 descriptors and brings 1"),
        (frame(b"words", fds=3)[:18], 3, fdpass.BrokenChannelError, "in the middle of a frame"),
    ],
)
def test_what_is_no_frame_ends_the_channel_and_leaves_nothing(run, marked, raw_bytes, count, error, words):
    async def main():
        raw, channel = with_peer()
        async with channel:
            fdpass.send_fds(raw, [raw_bytes], [marked() for _ in range(count)])
            raw.close()
            for _ in range(2):
                with pytest.raises(error, match=words):
                    await channel.recv_message()
            with pytest.raises(error, match=words):
                await channel.send(1)

    run(main)


def test_lost_descriptors_are_an_error_and_the_channel_goes_on(run, marked, full_table):
    async def main():
        left, right = pair()
        async with left, right:
            await left.send_message(b"words", [marked() for _ in range(20)])
            await left.send("next")
            with full_table(free=5), pytest.raises(fdpass.DescriptorsLostError, match="20 descriptors were sent, 5 arrived") as caught:
                await right.recv_message()
            assert caught.value.data == b"words"
            assert await right.recv() == "next"

    run(main)


def test_a_plain_message_is_no_object_and_a_pickle_may_fail(run, unix_pair):
    async def main():
        left, right = pair()
        async with left, right:
            await left.send(children.FailsToLoad(unix_pair[0]))
            with pytest.raises(LookupError):
                await right.recv()
            with pytest.raises(LookupError):
                await left.send([unix_pair[0], children.FailsToPickle()])
            with pytest.raises(ValueError, match="negative"):
                await left.send_message(b"", [-1])
            await left.send_message(b"words")
            with pytest.raises(fdpass.ProtocolError, match=r"receive it with recv_message\(\)"):
                await right.recv()

    run(main)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_pickle_of_another_uid_is_refused(run, tmp_path):
    raw, channel = with_peer()
    path = tmp_path / "wire"
    pid = os.fork()
    if pid == 0:
        os.setuid(1000)
        raw.sendall(frame(pickle.dumps(children.Tripwire(str(path))), _frames.OBJECT))
        os._exit(0)
    os.waitpid(pid, 0)

    async def main():
        async with channel:
            with pytest.raises(fdpass.PeerRefusedError, match="uid 1000"):
                await channel.recv()

    with raw:
        run(main)
    assert not path.exists()


@pytest.mark.parametrize("item", [1, "path", None])
def test_what_is_no_socket(item):
    with pytest.raises(TypeError):
        AsyncChannel(item)


@pytest.mark.parametrize("late", [False, True])
def test_what_is_consumed_is_closed_once_it_has_gone(run, unix_pair, late):
    async def main():
        left, right = pair()
        async with left, right:
            with pytest.raises(LookupError):
                await left.send([unix_pair[0], children.FailsToPickle()], consume=True)
            assert unix_pair[0].fileno() >= 0
            task = asyncio.create_task(left.send([unix_pair[0], bytes(MEGABYTES) if late else b""], consume=True))
            await rounds(2)
            assert task.done() is not late
            assert (unix_pair[0].fileno() >= 0) is late
            # Also when nobody waits for it any more.
            await cancel(task)
            sock, _ = await right.recv()
            sock.close()
            await left.send("next")
            assert unix_pair[0].fileno() == -1
            assert await right.recv() == "next"

    run(main)


def test_a_channel_that_carries_messages_only(run):
    async def main():
        left, right = pair(allow_pickle=False)
        async with left, right:
            for use in (left.recv, lambda: left.send(1)):
                with pytest.raises(ValueError, match="only messages"):
                    await use()
            await left.send_message(b"words")
            assert await right.recv_message() == (b"words", [])

    run(main)


def test_it_does_not_carry_itself(run):
    async def main():
        left, right = pair()
        async with left, right:
            for item in (left, right):
                with pytest.raises(ValueError, match="an end of this channel"):
                    await left.send_message(b"", [item])
                with pytest.raises(ValueError, match="an end of this channel"):
                    await left.send([item])
            await left.send(1)
            assert await right.recv() == 1

    run(main)


def test_large_buffers_arrive_as_memory(run):
    async def main():
        left, right = pair()
        data = bytearray(os.urandom(MEGABYTES))
        async with left, right:
            await left.send(pickle.PickleBuffer(data))
            got = await right.recv()
            assert got == data
            assert type(got) is not bytearray

    run(main)


def test_terms_are_those_of_a_channel(run):
    async def main():
        left, right = pair(max_size=10)
        async with left, right:
            with pytest.raises(ValueError, match="max_size"):
                await left.send_message(bytes(11))
            await left.send_message(bytes(10))
            assert await right.recv_message() == (bytes(10), [])
        near, far = pair(duplex=False)
        async with near, far:
            with pytest.raises(ValueError, match="one-way"):
                await near.send(1)
            with pytest.raises(ValueError, match="one-way"):
                await far.recv()

    run(main)


# -------------------------------------------------------------------------------------------------------------- its socket and its loop


@pytest.mark.parametrize("blocking", [True, False])
def test_it_takes_a_socket_over_and_leaves_its_flags(run, unix_pair, blocking):
    near, far = unix_pair
    near.setblocking(blocking)
    with near.dup() as same:

        async def main():
            async with AsyncChannel(near) as channel, AsyncChannel(fdpass.OwnedFd(far.detach())) as other:
                assert near.fileno() == -1
                await asyncio.gather(channel.send(bytes(MEGABYTES)), other.recv())
                assert os.get_blocking(same.fileno()) == blocking

        run(main)


@pytest.mark.skipif(uvloop is None, reason="uvloop is not installed")
def test_without_a_descriptor_to_watch_with(marked, full_table):
    # uvloop is given an epoll of ours: see _watch().
    async def main():
        left, right = pair()
        async with left, right:
            with full_table(), pytest.raises(OSError, match="Too many open files"):
                await right.recv()
            await left.send(1)
            assert await right.recv() == 1
            # In the middle of a frame it is the end.
            with full_table(), pytest.raises(OSError, match="Too many open files"):
                await left.send(bytes(MEGABYTES))
            with pytest.raises(fdpass.BrokenChannelError, match="Too many open files"):
                await left.send(1)
            left.close()
            with pytest.raises(fdpass.BrokenChannelError):
                await right.recv()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_it_takes_a_channel_over(run):
    async def main():
        left, right = fdpass.Pipe()
        async with AsyncChannel(left) as near, AsyncChannel(right) as far:
            assert left.closed
            with pytest.raises(fdpass.ClosedError):
                left.send(1)
            await near.send(1)
            assert await far.recv() == 1

    run(main)


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_as_the_argument_of_a_process(run, method, unix_pair):
    near, far = pair()
    process = multiprocessing.get_context(method).Process(target=aio_targets.echo, args=(far,))
    process.start()
    far.close()

    async def main():
        async with near:
            for words in ("one", "two"):
                await near.send((words, unix_pair[0]))
                back, sock = await near.recv()
                with sock:
                    assert (back, children.cookie(sock)) == (words, children.cookie(unix_pair[0]))
            # A forked child holds this end too, and would never see it closed.
            await near.send(("stop", unix_pair[0]))

    run(main)
    process.join()
    assert process.exitcode == 0


def test_it_travels_between_two_frames_only(run):
    async def main():
        left, right = pair()
        raw, far = with_peer()
        async with left, right:
            with raw:
                await left.send(far)
                arrived = await right.recv()
                assert type(arrived) is AsyncChannel
                raw.sendall(frame(b"words")[:20])
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.01):
                        await far.recv()
                with pytest.raises(ValueError, match="middle of a frame"):
                    await left.send(far)
            far.close()
            arrived.close()

    run(main)


def test_one_loop_for_life(run):
    left, right = pair()

    async def main():
        await left.send(1)
        assert await right.recv() == 1

    run(main)
    with asyncio.Runner() as other, pytest.raises(RuntimeError, match="another event loop"):
        other.run(main())
    left.close()
    right.close()


@pytest.mark.parametrize("module", [module for module in (asyncio, uvloop) if module is not None])
def test_a_loop_that_closes_first(module, caplog):
    """What is open stays open until somebody closes or forgets it."""
    left, right = pair()
    loop = module.new_event_loop()

    async def main():
        # Kept by nobody but the loop: one waits for a byte, the other for room.
        tasks = [loop.create_task(left.recv()), loop.create_task(left.send(bytes(MEGABYTES)))]
        await rounds(3)
        assert not any(task.done() for task in tasks)

    loop.run_until_complete(main())
    loop.close()
    assert not left.closed
    left.close()
    assert left.closed
    ends = [right]
    del right
    with pytest.warns(ResourceWarning, match="unclosed <OwnedFd"):
        ends.clear()


def test_a_forgotten_channel_warns(run):
    async def main():
        left, right = pair()
        await left.send(1)
        await right.recv()
        left.close()
        ends = [right]
        del right
        with pytest.warns(ResourceWarning, match="unclosed <OwnedFd"):
            ends.clear()

    run(main)


# -------------------------------------------------------------------------------------------------------------- over a path


async def echo(channel):
    """A callback: sends back what comes."""
    async with channel:
        async for obj in channel:
            await channel.send(obj)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "socket")


def test_a_server_and_its_clients(run, path, unix_pair):
    async def client(number):
        async with await open_channel(path) as channel:
            await channel.send([number, unix_pair[0]])
            back, sock = await channel.recv()
            with sock:
                assert (back, children.cookie(sock)) == (number, children.cookie(unix_pair[0]))

    async def serve(channel):
        async with channel:
            async for number, sock in channel:
                with sock:
                    await channel.send([number, sock])

    async def main():
        threads = os.listdir("/proc/self/task")
        # Twenty at once, and the queue has room for two.
        async with await start_channel_server(serve, path, backlog=1) as server:
            assert (server.path, server.is_serving()) == (path, True)
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
            await asyncio.gather(*map(client, range(20)))
        assert not server.is_serving()
        assert not os.path.exists(path)
        assert os.listdir("/proc/self/task") == threads

    run(main)


def test_what_a_client_says_before_it_is_accepted_is_vouched_for(run, path):
    async def main():
        async with await start_channel_server(echo, Path(path)):
            with socket.socket(socket.AF_UNIX) as raw:
                raw.connect(path)
                raw.sendall(frame(pickle.dumps("early"), _frames.OBJECT))
                async with AsyncChannel(raw) as channel:
                    assert await channel.recv() == "early"

    run(main)


def test_what_a_server_says_first_is_vouched_for(run, path):
    async def main():
        greeted = []

        async def greet(channel):
            async with channel:
                await channel.send("welcome")
                greeted.append(channel)

        async with await start_channel_server(greet, path):
            channel = await open_channel(path)
            while not greeted:
                await rounds(1)
            async with channel:
                assert await channel.recv() == "welcome"

    run(main)


def test_a_stale_file_is_replaced_and_a_live_one_is_not(run, path):
    async def main():
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(path)
        with pytest.raises(ConnectionRefusedError, match=f"cannot open a channel to {path}: nobody listens there"):
            await open_channel(path)
        async with await start_channel_server(echo, path):
            with pytest.raises(OSError, match="a live socket is bound there"):
                await start_channel_server(echo, path)
            async with await open_channel(path) as channel:
                await channel.send(1)
                assert await channel.recv() == 1

    run(main)


def test_refusals_in_clear_words(run, tmp_path):
    async def main():
        with pytest.raises(FileNotFoundError, match=r"there is no such file; has the server started\?"):
            await open_channel(tmp_path / "nothing")
        (tmp_path / "file").touch()
        with pytest.raises(ConnectionRefusedError, match="the file is no socket"):
            await open_channel(tmp_path / "file")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
            other.bind(str(tmp_path / "other"))
            other.listen()
            with pytest.raises(OSError, match="a socket of another type listens there"):
                await open_channel(tmp_path / "other")
        for start in (open_channel, lambda path: start_channel_server(echo, path)):
            for name in ("", "a\0b", "x" * 200):
                with pytest.raises(ValueError, match="the path of a Unix socket has 1 to"):
                    await start(name)
        with pytest.raises(TypeError):
            await start_channel_server(echo, tmp_path / "new", no_such_option=1)
        assert not (tmp_path / "new").exists()

    run(main)


def test_a_callback_may_be_a_plain_function(run, path):
    async def main():
        channels = []
        async with await start_channel_server(channels.append, path), await open_channel(path) as channel:
            await channel.send("words")
            while not channels:
                await rounds(1)
            async with channels[0]:
                assert await channels[0].recv() == "words"

    run(main)


@pytest.mark.parametrize("plain", [False, True])
def test_a_callback_that_fails_is_reported_and_its_channel_ends(run, path, plain):
    def fail(channel):
        raise LookupError("on purpose")

    async def fail_later(channel):
        await channel.recv()
        fail(channel)

    async def main():
        reports = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: reports.append(context))
        async with await start_channel_server(fail if plain else fail_later, path), await open_channel(path) as channel:
            with contextlib.suppress(BrokenPipeError):
                await channel.send(1)
            with pytest.raises((fdpass.EndOfChannel, ConnectionResetError)):
                await channel.recv()
        assert [str(report["exception"]) for report in reports] == ["on purpose"]

    run(main)


def test_a_server_waits_for_its_callbacks_and_a_cancelled_one_cancels_them(run, path):
    async def main():
        running = []

        async def stay(channel):
            async with channel:
                running.append("begun")
                try:
                    await channel.recv()
                    running.append("told")
                except asyncio.CancelledError:
                    running.append("cancelled")
                    raise

        async def serve():
            async with await start_channel_server(stay, path) as server:
                await server.serve_forever()

        serving = asyncio.create_task(serve())
        await rounds(3)
        async with await open_channel(path) as channel:
            while not running:
                await rounds(1)
            await cancel(serving)
            assert serving.cancelled()
            assert running == ["begun", "cancelled"]
            assert not os.path.exists(path)
            with pytest.raises((fdpass.EndOfChannel, ConnectionResetError)):
                await channel.recv()
        running.clear()
        server = await start_channel_server(stay, path)
        serving = asyncio.create_task(server.serve_forever())
        async with await open_channel(path) as channel:
            while not running:
                await rounds(1)
            server.close()
            server.close()
            await serving
            waiting = asyncio.create_task(server.wait_closed())
            await rounds(3)
            assert not waiting.done()
            await channel.send(1)
            await waiting
        assert running == ["begun", "told"]

    run(main)


def test_a_server_without_a_free_descriptor_says_so_and_tries_again(run, path, full_table):
    async def main():
        reports = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: reports.append(context))
        async with await start_channel_server(echo, path):
            with socket.socket(socket.AF_UNIX) as raw:
                with full_table():
                    raw.connect(path)
                    while not reports:
                        await rounds(1)
                    await rounds(20)
                    assert [report["message"] for report in reports] == ["a channel server cannot accept and tries again in a second"]
                async with AsyncChannel(raw) as channel:
                    await channel.send(1)
                    assert await channel.recv() == 1

    run(main)


def test_a_forgotten_server_warns(path):
    loop = asyncio.new_event_loop()
    loop.run_until_complete(start_channel_server(echo, path))
    with pytest.warns(ResourceWarning, match="unclosed <Endpoint"):
        loop.close()
    assert not os.path.exists(path)


def test_what_is_inside_an_object_may_change_once_its_send_was_cancelled(run):
    """A pickler hands over a large bytearray as it is, not as a copy."""

    async def main():
        left, right = pair()
        async with left, right:
            data = bytearray(b"A" * 900_000)
            task = asyncio.create_task(left.send([data]))
            await rounds(3)
            assert not task.done()
            await cancel(task)
            data[:] = b"B" * len(data)
            data.append(1)
            assert await right.recv() == [bytearray(b"A" * 900_000)]

    run(main)


def test_a_hundred_beginnings_of_frames_are_no_hundred_rooms(run):
    raw, channels = [], []

    async def main():
        for _ in range(100):
            near, far = socket.socketpair()
            raw.append(near)
            channels.append(AsyncChannel(far))
            near.sendall(_frames.encode(_frames.DATA, 70_000, 0) + bytes(200))
        tasks = [asyncio.create_task(channel.recv_message()) for channel in channels]
        tracemalloc.start()
        try:
            await rounds(10)
            # A room of 4 MiB for two of them, and what was announced for the others.
            assert tracemalloc.get_traced_memory()[1] < 20 << 20
        finally:
            tracemalloc.stop()
        for task in tasks:
            await cancel(task)
        for channel in channels:
            channel.abort()

    run(main)
    for sock in raw:
        sock.close()
