"""`fdpass-bench pass`: real senders, receivers and starters with small numbers, and what is said when one of them does not live."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from fdpass_bench import cli, contenders, price, report
from fdpass_bench.price import Row, Side

COMMAND = [sys.executable, "-W", "error", "-m", "fdpass_bench", "pass"]
WHAT = ["carriers", "starts", "descriptors", "outstanding", "receivers"]


def run(*arguments: str, before: tuple[str, ...] = (), **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*before, *COMMAND, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, **options)
    assert "Traceback" not in done.stdout + done.stderr
    return done


def check(data: dict[str, Any]) -> list[dict[str, Any]]:
    """What holds for every JSON; returns the rows."""
    assert set(data) == {"schema", "environment", "parameters", "rows", "findings", "verdict"}
    assert data["schema"] == 1
    assert {"kernel", "cpus", "python", "fdpass", "command", "time", "interrupted"} <= set(data["environment"])
    for row in data["rows"]:
        assert row["valid"] == (row["invalid_reason"] is None)
        assert (row["fdpass"] is None) == (not row["valid"])
        for side in filter(None, (row["fdpass"], row["other"])):
            units = {key for key in side if key.startswith(("p50_us", "claims_per_s"))}
            assert len(units) == 2, side
            rounds = next(value for key, value in side.items() if key.endswith("_of_rounds"))
            assert len(rounds) == side["rounds"]
    return data["rows"]  # type: ignore[no-any-return]  # what JSON holds has no type


def children_of(process: subprocess.Popen[str], number: int) -> list[psutil.Process]:
    """Its senders, receivers and starters, once there are so many: what else it has is no spawned process of multiprocessing's."""
    while True:
        assert process.poll() is None
        found = []
        for child in psutil.Process(process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if any("spawn_main" in word for word in child.cmdline()):
                    found.append(child)
        if len(found) >= number:
            return found


# ---------------------------------------------------------------------------------------------------------------- the command


def test_everything(tmp_path: Path) -> None:
    path = tmp_path / "pass.json"
    limited = ("sh", "-c", 'ulimit -n 2000; exec "$@"', "sh")
    done = run("--count", "1", "--repeats", "2", "--tickets", "300", "--json", str(path), before=limited)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(path.read_text())
    rows = check(data)
    assert list(dict.fromkeys(row["what"] for row in rows)) == WHAT
    # What the limit forbids is no failure.
    forbidden = "the limit of 2000 open files allows 1500 unclaimed tickets"
    assert {row["name"]: row["invalid_reason"] for row in rows if not row["valid"]} == {"claim, 10000 unclaimed": forbidden}
    assert f"claim, 10000 unclaimed: skipped: {forbidden}" in " ".join(done.stdout.split())
    assert {row["sender"] for row in rows if "sender" in row} == {"idle", "busy"}
    assert {row["start_method"] for row in rows if "start_method" in row} == set(multiprocessing.get_all_start_methods())
    assert {row["descriptors"] for row in rows if row["what"] == "descriptors"} == {1, 8, 64, 253, 1000}
    assert {row["receivers"] for row in rows if row["what"] == "receivers"} == {1, 2, 4, 8}
    assert {row["other"]["name"] for row in rows if row["what"] == "descriptors"} == {"standard library", "C"}
    assert data["parameters"]["repeats"] == 2
    claimed, never = data["findings"]
    for one in ("sender_descriptors", "receiver_descriptors"):
        # The store may not have closed the last one yet.
        assert abs(claimed[one][0] - claimed[one][1]) <= 1
    assert (never["tickets"], "1500 were pickled" in never["error"]) == (1500, True)
    assert never["folder_left"] is False
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "\x1b" not in done.stdout
    for words in ("against the standard library", "made and claimed", "sender busy"):
        assert words in done.stdout


def test_json_on_standard_output() -> None:
    done = run("--what", "descriptors", "--count", "1", "--repeats", "1", "--json", "-")
    rows = check(json.loads(done.stdout))
    assert done.returncode == 0
    assert all(row["times_faster"] > 0 and row["times_faster_ci"] is None for row in rows)
    assert "(one round)" in done.stderr


def test_without_a_compiler_the_rows_of_c_say_so(tmp_path: Path) -> None:
    done = run("--what", "descriptors", "--count", "1", "--repeats", "2", "--json", "-", env={**os.environ, "PATH": str(tmp_path)})
    assert done.returncode == 1
    rows = check(json.loads(done.stdout))
    assert {row["valid"] for row in rows if row["other"] and row["other"]["name"] == "standard library"} == {True}
    assert {row["invalid_reason"] for row in rows if not row["valid"]} == {"there is no C compiler: install gcc or clang"}
    assert "could not be measured" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--what", "carriers,prices"], "'prices'; there are carriers, starts, descriptors, outstanding, receivers"),
        (["--what", ""], "carriers"),
        (["--start-method", "vfork"], "'vfork'; there are "),
        (["--start-method", "fork", "--what", "carriers"], "--what starts"),
        (["--sender", "asleep"], "'idle', 'busy', 'both'"),
        (["--sender", "idle", "--what", "starts"], "--what carriers"),
        (["--tickets", "5", "--what", "starts"], "--what outstanding"),
        (["--tickets", "-1"], "--tickets"),
        (["--count", "0"], "1<=x<=10000"),
        (["--repeats", "0"], "1<=x<=1000"),
        (["--json", "/nonexistent/pass.json"], "/nonexistent/pass.json"),
        (["extra"], "extra"),
    ],
)
def test_bad_arguments(arguments: list[str], named: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pass", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("fdpass-bench: ")
    assert named in err
    assert err.count("\n") == 1


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pass", "--help"]) == 0
    assert re.search(r"Examples:\n +fdpass-bench pass\n", capsys.readouterr().out)


# ---------------------------------------------------------------------------------------------------------------- signals


@contextlib.contextmanager
def running(*arguments: str, **options: Any) -> Any:
    """The command in a session of its own; whatever happens, nothing of it is left afterwards."""
    with subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    ) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("second", [("receivers",), ("starts", "--start-method", "spawn")], ids=["receivers", "starts"])
def test_an_interrupt_shows_what_was_measured_and_leaves_nothing(tmp_path: Path, second: tuple[str, ...]) -> None:
    path = tmp_path / "pass.json"
    arguments = ("--what", "descriptors", "--what", *second, "--count", "1", "--repeats", "60", "--json", str(path))
    with running(*arguments, env={**os.environ, "TMPDIR": str(tmp_path)}) as process:
        # The descriptors are a matter of a second, the others of ten: these are under way.
        lines = [process.stderr.readline() for _ in range(5)]
        assert all(re.search(r": measured; .* left\n", line) for line in lines), lines
        everybody = children_of(process, 2) + psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C: all of them get it
        out, err = process.communicate()
        _, alive = psutil.wait_procs(everybody, timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in out + err
    assert "fdpass-bench: interrupted; 5 of" in err
    assert alive == []
    data = json.loads(path.read_text())
    assert {one["what"] for one in check(data)} == {"descriptors"}
    assert data["environment"]["interrupted"] is True
    assert [name for name in os.listdir(tmp_path) if name.startswith("fdpass-")] == []


def test_a_killed_process_is_one_sentence() -> None:
    with running("--what", "starts", "--start-method", "fork", "--count", "1000", "--repeats", "1000", "--json", "-") as process:
        victim = children_of(process, 2)[0]
        victim.kill()
        out, err = process.communicate()
    (row,) = check(json.loads(out))
    assert process.returncode == 1
    assert row["invalid_reason"] == f"the measuring process (pid {victim.pid}) was killed by SIGKILL"
    assert "Traceback" not in err


# ---------------------------------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize("registered", [True, False], ids=["fdpass", "standard"])
@pytest.mark.parametrize("carrier", ["connection", "queue"])
def test_a_killed_sender_is_named_by_whoever_waits_for_the_receiver(registered: bool, carrier: str) -> None:
    with contenders.Stage() as stage:
        pair = stage.pair(registered)
        assert len(pair.asked(carrier, False, 2)) == 2
        # The receiver has nobody who serves it: it waits.
        pair.receiver.tell("ask", carrier, 5, 0.0)
        psutil.Process(pair.sender.pid).kill()
        with pytest.raises(contenders.Unmeasured, match=rf"the sender \(pid {pair.sender.pid}\) was killed by SIGKILL"):
            pair.receiver.reply()


def test_a_stage_that_was_cleared_starts_anew() -> None:
    with contenders.Stage() as stage:
        first = stage.pair(True)
        first.ahead(False, 2)
        stage.clear()
        second = stage.pair(True)
        assert len(second.ahead(True, 2)) == 2
        assert second.sender.pid != first.sender.pid


def test_a_failure_is_an_answer_and_not_the_end() -> None:
    with contenders.Stage() as stage:
        peer = stage.alone(False)
        with pytest.raises(contenders.Unmeasured, match=r"the measuring process \(pid \d+\) failed: KeyError: 'nobody'"):
            peer.do("messages", "nobody", 1, 1, None)
        assert len(peer.do("messages", contenders.CHANNEL, 300, 3, None)) == 3


def test_register_is_on_where_it_is_fdpass_and_only_there() -> None:
    with contenders.Stage() as stage:
        ours, theirs = (stage.alone(registered).do("make", 1)[0] for registered in (True, False))
    assert b"fdpass.handles" in ours
    assert b"resource_sharer" in theirs
    assert b"fdpass" not in theirs


def test_as_many_are_held_as_was_said() -> None:
    with contenders.Stage() as stage:
        pair = stage.pair(True)
        pair.claims(1, 2)
        alone = pair.sender.usage()[1]
        for unclaimed in (40, 7, 1):
            pair.claims(unclaimed, 2)
            # The store closes what it gave a moment after it gave it.
            while pair.sender.usage()[1] != alone + unclaimed - 1:
                pass


# ---------------------------------------------------------------------------------------------------------------- figures


def test_a_ratio_with_its_interval() -> None:
    found = price.times_faster([1.0, 1.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0])
    assert found is not None
    assert (found.mean, found.low, found.high) == (3.0, 3.0, 3.0)
    # By hand: t(2) squared is 18.513, the variances of the means are 1/300 and 1/4, their covariance 0, so the bounds are the roots of
    # (4 - 18.513 / 300) r^2 - 2 * 40 r + 400 - 18.513 / 4.
    found = price.times_faster([1.9, 2.0, 2.1], [20.5, 19.0, 20.5])
    assert found is not None
    assert found.mean == pytest.approx(10.0)
    assert (found.low, found.high) == (pytest.approx(8.4934, abs=1e-3), pytest.approx(11.8200, abs=1e-3))
    # What made both slow at once cancels.
    found = price.times_faster([10.0, 11.0, 12.0], [20.0, 22.0, 24.0])
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(2.0), pytest.approx(2.0))
    assert price.times_faster([1.0, -1.0, 0.5], [3.0, 3.0, 3.0]) is None
    assert price.times_faster([-1.0, -1.0], [3.0, 3.0]) is None
    alone = price.times_faster([2.0], [3.0])
    assert alone is not None
    assert (alone.mean, alone.low) == (1.5, None)


def row(ours: list[float], theirs: list[float], what: str = "carriers", name: str = "loading a pickle, sender idle") -> Row:
    sides = (Side(key, [[one] for one in rounds]) for key, rounds in ((contenders.FDPASS, ours), (contenders.STANDARD, theirs)))
    return Row(what, name, {}, "us", *sides)


@pytest.mark.parametrize(
    ("ours", "theirs", "sentence"),
    [
        ([1, 1, 1.01], [3, 3, 3.1], "fdpass: 3.0 times faster (95 % 2.9 to 3.1), against standard library"),
        ([3, 3, 3.1], [1, 1, 1.01], "fdpass: 3.0 times slower (95 % 2.9 to 3.1), against standard library"),
        ([1, 1, 1.01], [300, 300, 301], "fdpass: 299 times faster (95 % 297 to 302), against standard library"),
        ([1, 1.2, 1.1], [1.1, 1.2, 1], "fdpass: no difference that this run can show (95 % 0.79 to 1.26), against standard library"),
        ([1, -1, 1], [2, 1, 1], "fdpass: no difference that this run can show, against standard library"),
        ([1], [2], "fdpass: 2.0 times faster (one round), against standard library"),
    ],
)
def test_the_words_for_a_ratio(ours: list[float], theirs: list[float], sentence: str) -> None:
    assert row(ours, theirs).sentence == sentence


def test_percentiles_are_of_all_rounds() -> None:
    side = Side("fdpass", [[float(value) for value in range(1, 51)], [float(value) for value in range(51, 101)]])
    assert (side.p50, side.p99, side.medians) == (50.5, 99.0, [25.5, 75.5])
    assert Side("fdpass", [[1.0] * 99]).p99 is None


def test_the_verdict_follows_the_rows() -> None:
    found = price.Found(price.Plan(["carriers"], [], ["idle"], 1, 3, 0))
    assert report.price_verdict(found) == "Nothing was measured."
    found.rows.append(row([1, 1, 1.01], [3, 3, 3.1]))
    assert report.price_verdict(found) == "Loading a pickle, sender idle: 3.0 times faster."
    assert found.complete
    found.rows.append(Row("carriers", "Queue.put, sender idle", {}, "us", reason="the sender was killed", failed=True))
    assert report.price_verdict(found) == "Loading a pickle, sender idle: 3.0 times faster; 1 could not be measured."
    assert not found.complete
