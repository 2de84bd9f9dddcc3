"""Long runs: what an interrupt, a kill or a full disk leaves of a balance, what --resume makes of it, and how long all of it will take."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import zlib
from array import array
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click
import pytest
from fdpass_bench import cli, report, screens
from fdpass_bench.balance import Plan, Run
from fdpass_bench.campaign import Campaign, Steady
from fdpass_bench.checkpoint import _FORMS, Checkpoint, CheckpointError, _asked
from fdpass_bench.loadgen import OUTCOMES, NullServer
from fdpass_bench.progress import Estimate, about
from fdpass_bench.steady import Trial, Work
from fdpass_bench.strategy import Strategy
from hypothesis import given, settings
from hypothesis import strategies as st

COMMAND = [sys.executable, "-X", "dev", "-W", "error", "-m", "fdpass_bench", "balance"]
PLANS = ("--strategies", "shared", "--workers", "2", "--connections", "16", "--service-ms", "100")
LOOP = ("--scenario", "steady", "--workers", "2", "--rate", "200", "--service-ms", "1", "--connections", "80", "--repeats", "2")


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, **options)


@contextlib.contextmanager
def running(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """The command in a session of its own; whatever happens, nothing of it is left afterwards."""
    with subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **options
    ) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def interrupted(number: int, after: int, *arguments: str, **options: Any) -> tuple[int, str, str]:
    """The command, sent a signal when so many runs have ended: its exit status and what it said."""
    with running(*arguments, **options) as process:
        assert process.stderr is not None
        while not process.stderr.readline().startswith(f"{after}/"):
            assert process.poll() is None
        process.send_signal(number)
        out, err = process.communicate()
    # A worker that was starting when the command was killed has nobody to start it, and may say so.
    assert number == signal.SIGKILL or "Traceback" not in out + err
    return process.returncode, out, err


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line)[1] for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------- interrupted and resumed


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_runs_go_on_where_they_were_interrupted(tmp_path: Path, number: int, status: int) -> None:
    file, kept = tmp_path / "runs.json", tmp_path / "runs.json.checkpoint"
    # Named from where it was begun: it is resumed from elsewhere.
    done, _, err = interrupted(number, 1, *PLANS, "--json", "runs.json", cwd=tmp_path)
    assert done == status
    whole = lines_of(kept) if kept.read_bytes().endswith(b"\n") else []
    assert whole[0]["arguments"] == [*PLANS, "--json", "runs.json"]
    assert sum("run" in line for line in whole) == 1
    first = None
    if number != signal.SIGKILL:
        assert err.endswith(
            "fdpass-bench: interrupted; 1 of 3 runs were measured, see runs.json; fdpass-bench balance --resume runs.json goes on.\n"
        )
        part = json.loads(file.read_text())
        assert part["environment"]["interrupted"] is True
        (first,) = part["runs"]

    refused = run(*PLANS, "--json", str(file))
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert f"{kept} holds 1 run" in refused.stderr
    assert f"--resume {file} goes on with it" in refused.stderr

    done = run("--resume", str(kept if number == signal.SIGTERM else file))
    assert done.returncode == 0, done.stderr
    assert re.match(r"1 of 3 runs are measured; the others take a?\S* ?\S+ \S+\.\n2/3 burst", done.stderr), done.stderr
    data = json.loads(file.read_text())
    assert [one["scenario"] for one in data["runs"]] == ["idle", "burst", "kill"]
    assert first in (None, data["runs"][0])
    environment = data["environment"]
    assert environment["interrupted"] is False
    assert len(environment["resumed"]) == 1
    assert environment["command"][1:] == ["balance", *PLANS, "--json", "runs.json"]
    assert not kept.exists()
    assert run("--resume", str(file)).stderr.startswith(f"fdpass-bench: there is no {kept}: ")


def test_loops_go_on_where_they_were_killed(tmp_path: Path) -> None:
    file, kept = tmp_path / "loop.json", tmp_path / "loop.json.checkpoint"
    status, _, _ = interrupted(signal.SIGKILL, 1, *LOOP, "--json", str(file))
    assert status == -9
    status, _, err = interrupted(signal.SIGINT, 3, "--resume", str(file))
    assert (status, err.splitlines()[-1][:55]) == (130, "fdpass-bench: interrupted; 3 of 4 runs were measured, s")
    assert [next(iter(line)) for line in lines_of(kept)[1:]] == ["calibration", "run", "resumed", "run", "run"]
    done = run("--resume", str(file))
    assert "\n4/4 steady, shared, repeat 2: 80 ok" in done.stderr
    data = json.loads(file.read_text())
    assert [(one["strategy"], one["repeats"], one["outcomes"]["ok"]) for one in data["runs"]] == [("shared", 2, 160), ("reuseport", 2, 160)]
    assert len(data["environment"]["resumed"]) == 2
    assert len(data["comparisons"]) == 1
    assert not kept.exists()


def test_what_cannot_be_written_is_kept_and_says_the_same_when_it_is_resumed(tmp_path: Path) -> None:
    file, kept = tmp_path / "loop.json", tmp_path / "loop.json.checkpoint"
    with running(*LOOP, "--json", str(file)) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("1/4 ")
        file.unlink(missing_ok=True)
        file.mkdir()
        out, err = process.communicate()
    assert process.returncode == 1
    assert err.endswith(f"fdpass-bench: cannot write {file}: Is a directory; fdpass-bench balance --resume {file} writes them.\n")
    assert sum("run" in line for line in lines_of(kept)) == 4

    file.rmdir()
    done = run("--resume", str(file))
    assert done.stderr == "All 4 runs are measured.\n"
    # Every figure, interval, prediction and comparison is made of the trials anew.
    assert done.stdout == out
    assert json.loads(file.read_text())["runs"][0]["repeats"] == 2
    assert not kept.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_measured_yet(tmp_path: Path, number: int) -> None:
    file, kept = tmp_path / "runs.json", tmp_path / "runs.json.checkpoint"
    file.write_text("yesterday's figures")
    with running(*PLANS, "--json", str(file)) as process:
        while not (kept.exists() and kept.read_bytes().endswith(b"\n")):
            assert process.poll() is None
        busy = run("--resume", str(file))
        process.send_signal(number)
        _, err = process.communicate()
    assert (busy.returncode, busy.stderr) == (2, f"fdpass-bench: {kept} is being written by another fdpass-bench\n")
    assert file.read_text() == "yesterday's figures"
    if number == signal.SIGINT:
        assert (process.returncode, err) == (130, "fdpass-bench: interrupted; 0 of 3 runs were measured.\n")
        assert not kept.exists()
    else:
        done = run("--resume", str(file))
        assert done.returncode == 0
        assert "1/3 idle, shared: 16 ok; " in done.stderr
        assert [one["scenario"] for one in json.loads(file.read_text())["runs"]] == ["idle", "burst", "kill"]


def test_without_a_file_nothing_is_kept(tmp_path: Path) -> None:
    status, out, err = interrupted(signal.SIGINT, 1, *LOOP[:-1], "100", "--json", "-", cwd=tmp_path)
    assert status == 130
    assert json.loads(out)["environment"]["interrupted"] is True
    assert err.endswith("; none is kept, as there would be a checkpoint with --json FILE.\n")
    assert list(tmp_path.iterdir()) == []


def test_a_page_alone_has_a_checkpoint_too(tmp_path: Path) -> None:
    page = tmp_path / "a page.html"
    status, _, err = interrupted(signal.SIGINT, 1, *PLANS, "--html", str(page))
    assert status == 130
    assert f"--resume '{page}' goes on" in err
    done = run("--resume", str(page))
    assert done.returncode == 0, done.stderr
    assert "<html" in page.read_text()
    assert list(tmp_path.iterdir()) == [page]


# ---------------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class Server:
    """Enough of one to have been measured."""

    name: str
    kind = "fdpass"
    version: str | None = "1"
    discipline = None

    def serve(self, work: Work) -> Any:
        raise NotImplementedError


WORK = Work(2, 10, 100.0, 0.001)
ENVIRONMENT = report.environment(0.0, False)


def campaign(*servers: Server) -> Campaign:
    return Campaign([], [Steady(WORK, servers or [Server("shared"), Server("reuseport")])])


def trials(steps: int = 3) -> list[Trial]:
    """A calibration and what comes after it, made up."""
    names = [("null server", 0), ("shared", 0), ("reuseport", 0), ("reuseport", 1), ("shared", 1)]
    return [Trial(name, repeat, latency=[0.1, None, 0.3], lag=[1e-9] * 9) for name, repeat in names[:steps]]


def begun(file: Path, results: Sequence[Trial]) -> Path:
    """A checkpoint with these."""
    of = campaign()
    with Checkpoint.begin("json_file", {"json_file": str(file)}, of, ["--json", file.name], 1.0, ENVIRONMENT) as made:
        for step, result in zip(of.steps, results, strict=False):
            made.keep(step, result, 2.0)
    return Path(made.path)


def restored(path: Path, of: Campaign) -> list[Trial | None]:
    with Checkpoint.open(str(path), ENVIRONMENT) as found:
        found.restore(of)
    return [of.loops[0].calibration, *of.loops[0].trials][: of.done]


def bits(trial: Trial) -> dict[str, Any]:
    """Every number as it is written in full: nan is not equal to itself, and -0.0 is equal to 0.0."""

    def of(value: Any) -> Any:
        if isinstance(value, float):
            return value.hex()
        if isinstance(value, dict):
            return [(key, of(one)) for key, one in value.items()]
        return [type(value), *map(of, value)] if isinstance(value, list | tuple | array) else value

    return {one.name: of(getattr(trial, one.name)) for one in fields(Trial)}


NUMBERS = st.floats()
KEYS = st.integers(-1, 2**40)


@settings(max_examples=30, deadline=None)
@given(
    st.builds(
        Trial,
        server=st.just("shared"),
        repeat=st.just(0),
        outcomes=st.fixed_dictionaries(dict.fromkeys(OUTCOMES, st.integers(0, 5_000_000))),
        outcome_seconds=st.dictionaries(st.sampled_from(OUTCOMES), st.tuples(NUMBERS, NUMBERS)),
        latency=st.lists(st.none() | NUMBERS),
        **dict.fromkeys(("lag", "connect", "queue", "service", "other", "occupied"), st.lists(NUMBERS)),
        connections_of=st.dictionaries(KEYS, st.integers(0, 1000)),
        requests_of=st.dictionaries(KEYS, st.integers(0, 1000)),
        taken_at=st.dictionaries(KEYS, st.lists(NUMBERS).map(lambda values: array("d", values))),
        offered_per_s=st.none() | NUMBERS,
        seconds=NUMBERS,
        idle_switches_per_second=st.none() | NUMBERS,
        switches=st.none() | NUMBERS,
        overflows=st.integers(-(2**40), 2**40),
        problem=st.none() | st.text(),
    )
)
def test_a_trial_comes_back_to_the_bit(tmp_path_factory: pytest.TempPathFactory, trial: Trial) -> None:
    path = begun(tmp_path_factory.mktemp("kept") / "x.json", [*trials(1), trial])
    _, found = restored(path, campaign())
    assert found is not None
    assert bits(found) == bits(trial)


def test_every_field_has_a_form() -> None:
    assert {one.type for one in (*fields(Run), *fields(Trial))} - {"Plan"} <= set(_FORMS)


def test_devices_have_no_checkpoint(tmp_path: Path) -> None:
    status, _, err = interrupted(signal.SIGINT, 1, *PLANS, "--json", os.devnull, cwd=tmp_path)
    assert status == 130
    assert "--resume" not in err
    assert not os.path.exists(f"{os.devnull}.checkpoint")


def test_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    path = begun(tmp_path / "x.json", trials(3))
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in (last, last + 1, last + 12, (last + len(whole)) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert len(restored(path, campaign())) == 2
        # It goes on after what was whole.
        assert path.read_bytes()[:last] == whole[:last]
        assert lines_of(path)[-1].keys() == {"resumed"}
    # After a power loss blocks may be missing in the middle of what was not on the disk yet.
    path.write_bytes(whole[: last + 20] + bytes(8) + whole[last + 28 :])
    assert len(restored(path, campaign())) == 2


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 1), st.integers(0, 3), st.binary(max_size=3))
def test_a_damaged_file_is_a_sentence_or_what_was_whole(
    tmp_path_factory: pytest.TempPathFactory, share: float, left_out: int, put_in: bytes
) -> None:
    path = begun(tmp_path_factory.mktemp("kept") / "x.json", trials(3))
    whole = bytearray(path.read_bytes())
    place = round(share * len(whole))
    whole[place : place + left_out] = put_in
    path.write_bytes(whole)
    try:
        found = restored(path, campaign())
    except CheckpointError as error:
        said = str(error)
    else:
        said = str(path)
        assert [bits(one) for one in found if one] == [bits(one) for one in trials(3)[: len(found)]]
    assert str(path) in said


def line(data: Any, change: bytes = b"") -> bytes:
    text = json.dumps(data).encode() + change
    return b'["%08x",%b]\n' % (zlib.crc32(text), text)


def changed(path: Path, number: int, **others: Any) -> None:
    """Some line says something else, and is whole."""
    lines = path.read_bytes().splitlines(keepends=True)
    lines[number] = line(json.loads(lines[number])[1] | others)
    path.write_bytes(b"".join(lines))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "breaks off in its first line"),
        (b'["01', "breaks off in its first line"),
        (b"{}\n", "is not a checkpoint of fdpass-bench"),
        (json.dumps({"schema": 1, "runs": []}).encode(), "is not a checkpoint of fdpass-bench"),
        (pickle.dumps({"checkpoint": 1}), "is not a checkpoint of fdpass-bench"),
        (bytes(range(256)) * 1000, "is not a checkpoint of fdpass-bench"),
        (b'["00000000",{}]\n["00000000",{}]\n', "line 1 of"),
        (b'["' + b"[" * 100_000, "breaks off in its first line"),
        (line({}), "has schema None"),
        (line({"checkpoint": 2}), "knows schema 1"),
        (line({"checkpoint": 1}), "does not have the form of schema 1"),
        (line([1]), "breaks off in its first line"),
    ],
)
def test_foreign_files(tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes, said: str) -> None:
    path = tmp_path / "x.json.checkpoint"
    path.write_bytes(content)
    assert cli.main(["balance", "--resume", str(tmp_path / "x.json")]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("fdpass-bench: ")
    assert said in err
    assert str(path) in err
    assert path.read_bytes() == content


def test_what_is_no_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder.checkpoint").mkdir()
    os.mkfifo(tmp_path / "pipe.checkpoint")
    for name, said in (("folder", "Is a directory"), ("pipe", "is not a file"), ("none", "there is no"), ("no/none", "No such file")):
        assert cli.main(["balance", "--resume", str(tmp_path / name)]) == 2
        out, err = capfd.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert said in err


def test_a_foreign_file_is_not_overwritten(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.json.checkpoint"
    path.write_text("somebody's notes\n")
    assert cli.main(["balance", *PLANS, "--json", str(tmp_path / "x.json")]) == 2
    assert capfd.readouterr().err == f"fdpass-bench: {path} is not a checkpoint of fdpass-bench\n"
    assert path.read_text() == "somebody's notes\n"


@pytest.mark.parametrize(
    "others",
    [
        {"run": None},
        {"run": {}},
        {"seconds": "long"},
        {"run": {"server": "shared"}},
        {"run": 5},
    ],
)
def test_a_line_of_another_form(tmp_path: Path, others: dict[str, Any]) -> None:
    path = begun(tmp_path / "x.json", trials(3))
    changed(path, 2, **others)
    with pytest.raises(CheckpointError, match=r"line 3 of .* does not have the form of schema 1"):
        restored(path, campaign())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (
            "latency",
            {"values": b64encode(zlib.compress(bytes(8))).decode(), "none": b64encode(zlib.compress(bytes([9, *bytes(7)]))).decode()},
        ),
        ("lag", b64encode(zlib.compress(bytes(7))).decode()),
        ("lag", b64encode(zlib.compress(bytes(50_000_000))).decode()),
        ("lag", b64encode(zlib.compress(bytes(80))[:-4]).decode()),
        ("lag", "not base64"),
        ("lag", [0.1]),
        ("repeat", 7),
        ("repeat", True),
        ("server", "nginx"),
        ("outcomes", {"ok": "many"}),
        ("outcome_seconds", {"ok": [1.0]}),
        ("connections_of", {"first": 1}),
        ("seconds", None),
    ],
)
def test_a_column_of_another_form(tmp_path: Path, name: str, value: Any) -> None:
    path = begun(tmp_path / "x.json", trials(3))
    changed(path, 2, run=lines_of(path)[2]["run"] | {name: value})
    with pytest.raises(CheckpointError, match=r"line 3 of .* does not have the form of schema 1"):
        restored(path, campaign())


def test_more_than_was_asked_for(tmp_path: Path) -> None:
    path = begun(tmp_path / "x.json", trials(5))
    with path.open("ab") as file:
        file.write(path.read_bytes().splitlines(keepends=True)[-1])
    with pytest.raises(CheckpointError, match=r"line 7 of .* nothing more was asked for"):
        restored(path, campaign())


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [("fdpass", "0.0.9", "fdpass 0.0.9"), ("python", "3.9.1", "Python 3.9.1"), ("kernel", "2.6.32", "kernel 2.6.32"), ("cpus", 999, "999")],
)
def test_figures_of_two_systems_are_not_one_study(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], key: str, value: Any, said: str
) -> None:
    path = begun(tmp_path / "x.json", trials(3))
    changed(path, 0, environment=ENVIRONMENT | {key: value})
    assert cli.main(["balance", "--resume", str(path)]) == 2
    err = capfd.readouterr().err
    assert said in err
    assert f"and this is {ENVIRONMENT[key]}: figures of two systems are not one study" in err
    assert err.count("\n") == 1


def test_another_plan_is_another_study(tmp_path: Path) -> None:
    path = begun(tmp_path / "x.json", trials(3))
    with pytest.raises(CheckpointError, match=r"begun with fdpass reuseport 1, and its arguments now mean fdpass reuseport 2: "):
        restored(path, campaign(Server("shared"), Server("reuseport", "2")))
    with pytest.raises(CheckpointError, match=r"begun with fdpass reuseport 1, and its arguments now mean nothing"):
        restored(path, campaign(Server("shared")))


@pytest.mark.parametrize("word", ["steady", "all"])
def test_the_rate_that_was_chosen_for_a_target_is_kept(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    """Whatever it would be when the target is looked at again."""
    asked: list[tuple[list[str], list[str]]] = []

    def note(of: Campaign, *files: str | None) -> int:
        asked.append((_asked(of), click.get_current_context().meta[screens.ARGUMENTS]))
        return 0

    monkeypatch.setattr(cli, "_measure", note)
    with NullServer() as server:
        assert cli.main(["balance", "--scenario", word, "--target", "{}:{}".format(*server.address)]) == 0
        assert cli.main(["balance", *asked[0][1]]) == 0
    assert asked[1] == asked[0]
    assert "--rate" in asked[0][1]


def test_an_interrupt_leaves_no_step_that_is_done_and_not_among_the_figures() -> None:
    class Interrupting(list[Trial]):
        def append(self, one: Trial) -> None:
            raise KeyboardInterrupt

    of = campaign()
    of.loops[0].trials = Interrupting()
    calibration, trial = trials(2)
    of.take(calibration, 1.0)
    with pytest.raises(KeyboardInterrupt):
        of.take(trial, 1.0)
    assert (of.done, of.seconds, of.over) == (1, 1.0, 0)


def test_resume_stands_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["balance", "--resume", str(tmp_path / "x.json"), "--workers", "2", "--load", "0.5"]) == 2
    assert capfd.readouterr().err == (
        "fdpass-bench: --resume goes on as the command was begun, so it stands alone, without --workers, --load\n"
    )


def test_a_full_disk_costs_what_comes_after(tmp_path: Path) -> None:
    of = campaign()
    results = trials(5)
    results[3].service = [index * math.pi for index in range(1000)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoint.begin("json_file", {"json_file": str(tmp_path / "x.json")}, of, [], 1.0, ENVIRONMENT) as made:
        for step, result in zip(of.steps[:3], results, strict=False):
            made.keep(step, result, 2.0)
        before = Path(made.path).read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 1000, hard))
        try:
            with pytest.raises(CheckpointError, match=r"cannot write .*x\.json\.checkpoint: File too large"):
                made.keep(of.steps[3], results[3], 2.0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        # What comes after it would be in the wrong place.
        made.keep(of.steps[4], results[4], 2.0)
    assert Path(made.path).read_bytes() == before
    assert len(restored(Path(made.path), campaign())) == 3


# ---------------------------------------------------------------------------------------------------------------- the time left


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "a few seconds"),
        (12, "about 10 s"),
        (89, "about 90 s"),
        (91, "about 2 min"),
        (3600, "about 60 min"),
        (7500, "about 2 h 5 min"),
        (86400, "about 24 h"),
    ],
)
def test_as_many_digits_as_are_known(seconds: float, said: str) -> None:
    assert about(seconds) == said


def test_the_estimate_is_what_was_expected_until_something_has_ended() -> None:
    assert Estimate([10.0, 100.0, 1000.0]).left() == 1110.0
    assert Estimate([10.0, 100.0, 1000.0]).left(share=0.5) == 1105.0


def test_what_has_ended_corrects_the_estimate() -> None:
    estimate = Estimate([100.0] * 4)
    estimate.end(150.0)
    # Not by all of it: the first may be an exception.
    assert 1.4 < estimate.correction < 1.5
    assert estimate.left() == pytest.approx(300.0 * estimate.correction)
    again = Estimate([100.0] * 4, over=1, took=150.0)
    assert again.left() == estimate.left()
    short = Estimate([1.0, 600.0])
    short.end(3.0)
    assert short.left() < 720.0


def test_a_run_is_as_far_as_it_was_counted_or_as_its_time_says() -> None:
    estimate = Estimate([100.0, 100.0])
    assert estimate.share(0.25, 10.0) == 0.25
    assert estimate.share(0.25, 50.0) == 0.5
    # It takes longer: it is not over before it is.
    assert estimate.share(0.25, 500.0) < 1.0
    assert Estimate([], 0).share(0.0, 1.0) == 0.0


def test_a_long_command_says_ahead_how_long_it_takes(tmp_path: Path) -> None:
    with running(*LOOP[:-1], "100") as process:
        assert process.stderr is not None
        assert re.fullmatch(r"This takes about \d+ min: 200 runs\.\n", process.stderr.readline())
        assert re.fullmatch(r"1/200 steady, shared, repeat 1: 80 ok; about \d+ min left\n", process.stderr.readline())
        process.send_signal(signal.SIGINT)
        process.communicate()


def test_each_run_is_expected_to_take_some_time() -> None:
    counts = {"idle": 60, "burst": 400, "kill": 200, "stall": 0, "rolling": 0, "long-lived": 1000, "scale-out": 0}
    plans = {name: Plan(Strategy.parse("shared"), name, 2, connections, 30.0) for name, connections in counts.items()}
    seconds = dict(zip(plans, (expected for _, expected in Campaign(list(plans.values())).ahead), strict=True))
    assert all(1 < one < 30 for one in seconds.values())
    # The queue of kill lasts 2.5 s when nobody dies; stall loads for 3.5 s, long-lived churns for 4.
    assert seconds["kill"] > 2.5
    assert seconds["stall"] > 3.5
    assert seconds["long-lived"] > 4
    work = Work(4, 4000, 700.0, 0.004)
    assert 6 < work.expected_seconds < 10
    assert Work(4, 4000, None, 0.004, clients=8).expected_seconds < work.expected_seconds
    assert Work(4, 4000, None, 0.0, clients=1).expected_seconds < 5
    loop = Campaign([], [Steady(work, [Server("shared"), Server("reuseport")])])
    first, *others = [seconds for _, seconds in loop.ahead]
    assert len(others) == 3
    # The calibration is nobody's run.
    assert first == work.expected_seconds + work.calibration_seconds
    assert {*others} == {work.expected_seconds}
