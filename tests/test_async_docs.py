"""The programs on the page about asyncio run, and its wrappers for anyio and trio keep what the page says of them."""

from __future__ import annotations

import array
import fcntl
import re
import socket
import termios
from pathlib import Path

import pytest

import fdpass

PAGE = Path(__file__).parent.parent / "docs" / "asyncio.md"
if not PAGE.exists():
    pytest.skip("the documentation is not beside the tests", allow_module_level=True)
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    "source", [block for block in BLOCKS if re.search(r"^ *(asyncio|runner)\.run\(", block, re.MULTILINE) and "__main__" not in block]
)
def test_the_programs_run(run_python, source, tmp_path):
    assert run_python(source.replace("/tmp/", f"{tmp_path}/")).stdout


def wrapper(name):
    source = next(block for block in BLOCKS if f"class {name}:" in block)
    found = {}
    exec(source, found)
    return found[name]


@pytest.mark.parametrize(("name", "backend"), [("AnyioChannel", "asyncio"), ("AnyioChannel", "trio"), ("TrioChannel", "trio")])
def test_the_wrappers_run(name, backend, unix_pair):
    anyio = pytest.importorskip("anyio")
    pytest.importorskip(backend)
    wrap = wrapper(name)

    async def main():
        left, right = map(wrap, fdpass.Pipe())
        async with right:
            async with left:
                for number in range(3):
                    await left.send([number, unix_pair[0]])
                    back, sock = await right.recv()
                    with sock:
                        assert back == number
                # Both ways, with more than the kernel takes at once.
                async with anyio.create_task_group() as group:
                    group.start_soon(left.send, bytes(3_000_000))
                    assert await right.recv() == bytes(3_000_000)
                # Cancelled before a byte has come: nothing is lost.
                with anyio.move_on_after(0.01) as scope:
                    await right.recv()
                assert scope.cancelled_caught
                # Cancelled in the middle of a frame: it is received all the same.
                with anyio.CancelScope() as scope:
                    async with anyio.create_task_group() as group:
                        raw = socket.socket(fileno=left.channel._fd.dup().release())
                        frame = whole("late")
                        raw.send(frame[:20])

                        async def go_on():
                            # Until the thread has read the beginning.
                            while array.array("i", fcntl.ioctl(right.channel, termios.FIONREAD, bytes(4)))[0]:
                                await anyio.sleep(0)
                            scope.cancel()
                            raw.send(frame[20:])
                            raw.close()

                        group.start_soon(go_on)
                        got = await right.recv()
                assert got == "late"
                await left.send("next")
                assert await right.recv() == "next"
                await left.send("last")
            assert [obj async for obj in right] == ["last"]

    anyio.run(main, backend=backend)


def whole(obj):
    """The bytes of an object's frame."""
    near, far = fdpass.Pipe()
    with near, socket.socket(fileno=far._fd.release()) as raw:
        near.send(obj)
        return raw.recv(1000)
