"""The catalogue of scenarios, lists of loads and workers, the loops by their words, and the matrix: which published rankings hold."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import types
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from fdpass_bench import cli, figures, matrix, report, scenarios, steady, theory
from fdpass_bench.campaign import Campaign, Steady
from fdpass_bench.servers import Group
from fdpass_bench.strategy import Strategy

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the load generator needs Linux")

COMMAND = [sys.executable, "-X", "dev", "-W", "error", "-m", "fdpass_bench", "balance"]


def measured(path: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Runs `balance`: its JSON and what it printed. A noisy machine may make any run INVALID, and then it must say so."""
    done = subprocess.run(
        [*COMMAND, "--json", str(path), *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    assert "Traceback" not in done.stderr
    data: dict[str, Any] = json.loads(path.read_text())
    assert done.returncode == (0 if all(one["valid"] for one in data["runs"]) else 1), done.stderr
    assert ("INVALID" in done.stdout) >= (not all(one["valid"] for one in data["runs"]))
    return data, done.stdout


# ---------------------------------------------------------------------------------------------------------------- the catalogue


def test_the_list_says_what_each_scenario_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["balance", "--list"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in out
    assert [line for line in lines if line and line[0] != " "] == [
        *("idle", "burst", "kill", "stall", "rolling", "long-lived", "scale-out"),
        *("steady", "heavy-tail", "few-clients", "keep-alive", "matrix"),
    ]
    # Each says what happens, what it shows, and what to expect of one queue and of split ones.
    for text in re.split(r"^\S+$", out, flags=re.MULTILINE)[1:]:
        assert "Shows" in text
        assert re.search(r"queue|hash", text)


def test_every_option_that_belongs_to_a_scenario_is_one_of_the_command() -> None:
    names = {param.name for param in cli.command.commands["balance"].params}
    assert set(scenarios.belonging()) <= names
    assert {name for one in scenarios.CATALOGUE.values() for name in one.defaults} <= names
    assert "matrix" not in scenarios.EVERY


# ---------------------------------------------------------------------------------------------------------------- lists


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.3:0.9:0.1", [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        ("0.3,0.5", [0.3, 0.5]),
        ("0.5, 0.1:0.3:0.1 ,0.5,0.2", [0.5, 0.1, 0.2, 0.3]),
        ("0.2:0.7:0.2", [0.2, 0.4, 0.6]),
        ("0.7", [0.7]),
        ("0.7:0.7:0.1", [0.7]),
        ("0.01,0.99", [0.01, 0.99]),
    ],
)
def test_a_list_of_loads(text: str, expected: list[float]) -> None:
    assert cli._Several(0.01, 0.99, "0.7").convert(text, None, None) == expected


def test_a_list_of_workers() -> None:
    workers = cli._Several(1, 64, "4", whole=True)
    assert workers.convert("1,2,4:16:4", None, None) == [1, 2, 4, 8, 12, 16]
    assert all(isinstance(number, int) for number in workers.convert("1:64:1", None, None))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--load", "0.3:0.9"], "such as 0.7, 0.5,0.8 or 0.3:0.9:0.1"),
        (["--load", "0.9:0.3:0.1"], "from 0.01 to 0.99"),
        (["--load", "0.3:0.9:0"], "'0.3:0.9:0'"),
        (["--load", "0.3:0.9:-0.1"], "'0.3:0.9:-0.1'"),
        (["--load", "0.3:0.9:1e-9"], "100 at most"),
        (["--load", "0.3:0.9:0.1:0.1"], "from 0.01 to 0.99"),
        (["--load", "0.5,,0.7"], "'0.5,,0.7'"),
        (["--load", "0.5,1.2"], "from 0.01 to 0.99"),
        (["--load", "nan"], "'nan'"),
        (["--load", "0.1:inf:0.1"], "inf"),
        (["--workers", "1,2.5"], "from 1 to 64"),
        (["--workers", ""], "such as 4, 1,2,4,8"),
        (["--workers", "1:65:1"], "from 1 to 64"),
        (["--workers", "1e99999999999"], "from 1 to 64"),
        (["--scenario", "all", "--connections", "20001"], "idle makes at most 20000 connections"),
        (["--rate", "0"], "from 0.1"),
        (["--load", "1e99999999999"], "from 0.01 to 0.99"),
        (["--workers", "1:64:1", "--load", "0.1,0.2"], "128 combinations: one command measures 100 at most"),
        (["--target", "127.0.0.1:1", "--rate", "5", "--workers", "1,2"], "--workers have no meaning with --target"),
        (["--target", "127.0.0.1:1", "--rate", "5", "--workers", "2"], "--workers have no meaning with --target"),
        (["--scenario", "few-clients", "--rate", "5"], "--rate belongs to --scenario steady, heavy-tail or keep-alive"),
        (["--scenario", "few-clients", "--load", "0.5", "--think-ms", "5"], "--load and --think-ms exclude each other"),
        (["--scenario", "few-clients", "--clients", "2", "--load", "0.7"], "2 clients cannot ask 4 workers for a load of 0.7: 0.5 at most"),
        (["--scenario", "matrix", "--load", "0.5"], "--load belongs to --scenario steady"),
        (["--scenario", "matrix", "--service-ms", "5"], "--service-ms has no meaning in matrix"),
        (["--scenario", "matrix", "--workers", "2,4"], "several --workers have no meaning in matrix"),
        (["--scenario", "matrix", "--peer", "nginx"], "--peer belongs to --scenario idle, burst, kill"),
    ],
)
def test_bad_arguments(arguments: list[str], named: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["balance", *arguments]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert named in err


def test_a_sweep_of_loads_and_workers(tmp_path: Path) -> None:
    arguments = ("--workers", "1,2", "--load", "0.3:0.5:0.2", "--connections", "60", "--repeats", "1", "--service-ms", "2")
    data, out = measured(tmp_path / "sweep.json", "--scenario", "steady", "--strategies", "shared,reuseport", *arguments)
    assert [(one["workers"], one["load"], one["strategy"]) for one in data["runs"]] == [
        (workers, load, strategy) for workers in (1, 2) for load in (0.3, 0.5) for strategy in ("shared", "reuseport")
    ]
    assert [(one["work"]["workers"], one["work"]["load"]) for one in data["studies"]] == [(1, 0.3), (1, 0.5), (2, 0.3), (2, 0.5)]
    assert len(data["comparisons"]) == 4
    # Not the long tables, but one line for each server of each number of workers.
    assert "Jain" not in out
    for workers in ("1 worker", "2 workers"):
        table = out.partition(f"steady, {workers}: mean latency in ms by load")[2]
        assert re.search(r"^shared +(\d|INVALID)", table, re.MULTILINE)
        assert re.search(r"load +load\n.*0\.3 +0\.5", table)
    assert max(map(len, out.splitlines())) <= 80


def test_the_other_scenarios_by_workers(tmp_path: Path) -> None:
    data, out = measured(tmp_path / "idle.json", "--scenario", "idle", "--workers", "1,2", "--connections", "6", "--strategies", "shared")
    assert [(one["workers"], one["outcomes"]["ok"]) for one in data["runs"]] == [(1, 6), (2, 6)]
    assert data["verdict"].startswith("1 worker: connections to idle workers were shared by shared (max/mean 1.00). 2 workers: connections")
    assert re.search(r"^1 worker\n.*^2 workers\n", out, re.MULTILINE | re.DOTALL)


def test_arrivals_that_are_the_same_are_calibrated_once() -> None:
    """The rate is the same whatever the workers, so the null server gets the same of both."""
    server = Group(Strategy.parse("shared"))
    works = [steady.Work(workers=count, connections=20, rate=200.0, service=0.001, repeats=1) for count in (1, 2)]
    campaign = Campaign([], [Steady(work, [server]) for work in works])
    campaign.measure(Silent())
    first, second = campaign.loops
    assert first.calibration is second.calibration is not None
    assert steady.null_load(works[0]) != steady.null_load(steady.Work(workers=1, connections=20, rate=300.0, service=0.001))


class Silent:
    """Follows a campaign and says nothing."""

    def follow(self, title: str) -> Any:
        return lambda count: None

    def over(self, line: str) -> None:
        pass


# ---------------------------------------------------------------------------------------------------------------- loops by their words


def test_few_clients_come_one_after_the_other_and_stay(tmp_path: Path) -> None:
    arguments = ("--workers", "2", "--clients", "6", "--requests-per-connection", "5", "--repeats", "2", "--service-ms", "2")
    data, out = measured(tmp_path / "few.json", "--scenario", "few-clients", *arguments)
    assert [one["strategy"] for one in data["runs"]] == ["shared", "shared:least-loaded", "reuseport"]
    work = data["work"]
    assert (work["clients"], work["connections"], work["rate"], work["load"]) == (6, 6, None, pytest.approx(0.5))
    # Their pauses follow from the load: each of six clients asks 2 workers for a twelfth of their time.
    assert work["think"] == pytest.approx(6 * 0.002 / (2 * 0.5) - 0.002)
    for one in data["runs"]:
        assert one["outcomes"]["ok"] == sum(one["requests_per_worker"]) == 60
        assert one["hash_max_over_mean"] == pytest.approx(theory.hash_imbalance(2, 6), abs=1e-4)
        assert one["offered_per_s"] is None
    assert f"{theory.hash_imbalance(2, 6):.2f}" in out.partition("by a")[2]


def test_keep_alive_and_heavy_tail_are_steady_with_other_defaults(tmp_path: Path) -> None:
    arguments = ("--strategies", "shared", "--workers", "2", "--connections", "20", "--repeats", "1", "--service-ms", "1")
    data, _ = measured(tmp_path / "kept.json", "--scenario", "keep-alive", *arguments)
    (one,) = data["runs"]
    assert (one["requests_per_connection"], one["outcomes"]["ok"], data["work"]["think"]) == (8, 160, 0.02)
    data, _ = measured(tmp_path / "tail.json", "--scenario", "heavy-tail", *arguments)
    (one,) = data["runs"]
    assert (one["work"]["distribution"], one["scenario"], one["requests_per_connection"]) == ("hyper", "heavy-tail", 1)


def test_a_closed_loop_whose_clients_all_begin_at_once_is_shown(tmp_path: Path) -> None:
    """Its null server has no lateness to tell of."""
    arguments = ("--clients", "4", "--connections", "4", "--requests-per-connection", "3", "--repeats", "1", "--workers", "1")
    data, out = measured(tmp_path / "closed.json", "--scenario", "steady", "--strategies", "shared", *arguments)
    assert data["calibration"]["lag_ms"] is None
    assert "Against a server that answers at once: mean" in out


def test_pauses_are_no_lack_of_rate() -> None:
    """Kept connections of which the last pauses for longer than all arrivals took: the server was no slower for that."""
    work = steady.Work(workers=1, connections=20, rate=100.0, service=0.001, requests=2, think=0.01)
    ms = 1_000_000
    scheduled = []
    for number in range(20):
        arrival = ms + number * 10 * ms
        scheduled += [arrival, arrival + 2 * ms + (500 if number == 19 else 10) * ms]
    columns = {name: memoryview(array("q", [0] * 40)) for name in ("connected", "accepted", "started", "free", "outcome", "worker")}
    made_up = types.SimpleNamespace(
        **columns,
        scheduled=memoryview(array("q", scheduled)),
        begun=memoryview(array("q", scheduled)),
        answered=memoryview(array("q", [at + 2 * ms for at in scheduled])),
        cpu_seconds=0.1,
    )
    trial = steady.Trial("shared", 0)
    steady._take(trial, made_up, work, believed=False)  # type: ignore[arg-type]  # a result's columns, without a run
    assert trial.achieved_per_s == pytest.approx(trial.offered_per_s) == pytest.approx(100)


@pytest.mark.parametrize(("since", "ms"), [("schedule", 5), ("begun", 2)])
def test_what_a_latency_counts_from(since: Any, ms: int) -> None:
    work = steady.Work(workers=1, connections=1, rate=100.0, service=0.0, since=since)
    columns = {name: memoryview(array("q", [0])) for name in ("connected", "accepted", "started", "free", "outcome", "worker")}
    at = {name: memoryview(array("q", [value * 1_000_000])) for name, value in (("scheduled", 1), ("begun", 4), ("answered", 6))}
    trial = steady.Trial("target", 0)
    steady._take(trial, types.SimpleNamespace(**columns, **at, cpu_seconds=0.1), work, believed=False)  # type: ignore[arg-type]  # as above
    assert (trial.latency, trial.lag) == ([pytest.approx(ms / 1000)], [pytest.approx(0.003)])


def test_kept_connections_that_ask_for_more_than_there_is_have_no_steady_state() -> None:
    for rate, reasons in (
        (190.0, []),
        (210.0, ["overload: the workers are asked for 105% of what they can do, so there is no steady state"]),
    ):
        work = steady.Work(workers=4, connections=100, rate=rate, service=0.01, requests=2, think=0.01)
        trial = steady.Trial("shared", 0, latency=[0.02] * 200, lag=[1e-5], offered_per_s=rate, begun_per_s=rate, achieved_per_s=rate)
        trial.outcomes["ok"] = 200
        (one,) = figures.study(work, [Group(Strategy.parse("shared"))], [trial], None).figures
        assert one.reasons == reasons


def test_all_leaves_out_a_peer_where_it_cannot_take_part(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gunicorn")
    asked: list[Campaign] = []
    monkeypatch.setattr(cli, "_measure", lambda campaign, *files: asked.append(campaign) or 0)
    assert cli.main(["balance", "--scenario", "all", "--peer", "gunicorn", "--strategies", "shared"]) == 0
    said = capfd.readouterr().err.splitlines()
    assert [line.partition(": gunicorn")[0] for line in said] == [
        f"fdpass-bench: {word} without gunicorn" for word in ("long-lived", "few-clients", "keep-alive")
    ]
    with_it = [plan.scenario for plan in asked[0].plans if plan.server.name == "gunicorn"]
    assert with_it == [word for word in scenarios.SINGLES if word != "long-lived"]


def test_all_measures_a_loop_once_that_takes_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Campaign] = []
    monkeypatch.setattr(cli, "_measure", lambda campaign, *files: asked.append(campaign) or 0)
    assert cli.main(["balance", "--scenario", "all", "--rate", "100,200"]) == 0
    assert [(loop.work.scenario, loop.work.rate) for loop in asked[0].loops] == [
        *(("steady", 100), ("steady", 200), ("heavy-tail", 100), ("heavy-tail", 200)),
        *(("few-clients", None), ("keep-alive", 100), ("keep-alive", 200)),
    ]


# ---------------------------------------------------------------------------------------------------------------- the matrix


def cell(
    case: str, means: Mapping[str, float], invalid: Sequence[str] = (), tails: Mapping[str, Sequence[float]] | None = None
) -> figures.Study:
    """A heavy cell with made-up latencies: by strategy the mean in ms, and its largest values in turn, from one stretch to the next."""
    (work,) = (one for one in matrix.works(4, 400, 2, 1, 10.0) if (one.case, one.level) == (case, "heavy"))
    trials = []
    for repeat in range(2):
        for name, mean in means.items():
            # The same noise for each: pairs differ by their means alone.
            latency = [mean / 1000 * (0.9 + 0.2 * ((number * 7919) % 101) / 100) for number in range(400 * work.requests)]
            if tails is not None:
                # Without the 40 that found empty queues, a fifth of a repeat is 72.
                turns = [tails[name][(number - 40) // 72 % 2] / 1000 for number in range(len(latency))]
                latency = [turns[number] if number % 50 == 0 else value for number, value in enumerate(latency)]
            trial = steady.Trial(
                name, repeat, latency=list(latency), lag=[1e-5], offered_per_s=100.0, begun_per_s=100.0, achieved_per_s=100.0
            )
            trial.outcomes["ok"] = len(latency)
            trial.connections_of = trial.requests_of = {0: len(latency)}
            trial.problem = "it was struck by lightning" if name in invalid else None
            trials.append(trial)
    return figures.study(work, [Group(Strategy.parse(name)) for name in means], trials, None)


def by_pair(found: Sequence[matrix.Ranking], measure: str = "mean") -> dict[tuple[str, str], matrix.Ranking]:
    return {(one.first, one.second): one for one in found if one.measure == measure}


def test_a_ranking_holds_where_the_same_one_is_surely_lower() -> None:
    # As published of many connections and costly requests: load-aware, then exclusive, then reuseport.
    study = cell("many-costly", {"shared:first": 30.0, "reuseport": 60.0, "shared:least-loaded": 20.0, "shared": 20.0})
    found = by_pair(matrix.rankings([study]))
    assert {pair: one.holds for pair, one in found.items()} == {
        ("exclusive", "reuseport"): True,
        ("exclusive", "load-aware"): True,
        ("reuseport", "load-aware"): True,
    }
    one = found["exclusive", "reuseport"].as_json()
    assert one["published_ms"] == [121, 213]
    assert one["here_ms"] == [pytest.approx(30, rel=0.01), pytest.approx(60, rel=0.01)]
    assert one["ci"][0] <= 0.5 <= one["ci"][1] < 1
    assert one["second"] == {"published": "reuseport", "strategy": "reuseport"}
    assert one["sentence"].startswith(
        "many-costly, heavy, mean: exclusive is lower than reuseport (121 against 213 ms): holds, exclusive 30"
    )
    assert matrix.verdict(matrix.rankings([study])).startswith("Of Hermes' 3 rankings by mean 3 hold here, 0 do not, 0 cannot be told.")
    assert matrix.reasons(matrix.rankings([study])) == []


def test_a_ranking_that_does_not_hold_is_told_with_the_known_reason() -> None:
    # Published of many connections and cheap requests: reuseport is lower than exclusive.
    found = matrix.rankings([cell("many-cheap", {"shared:first": 8.0, "reuseport": 20.0, "shared:least-loaded": 8.0})])
    pairs = by_pair(found)
    assert pairs["exclusive", "reuseport"].holds is False
    assert pairs["exclusive", "load-aware"].holds is None
    assert "no difference that this run can show" in pairs["exclusive", "load-aware"].sentence
    assert pairs["reuseport", "load-aware"].holds is True
    said = matrix.verdict(found)
    assert said.startswith(
        "Of Hermes' 3 rankings by mean 1 holds here, 1 does not, 1 cannot be told; not here: many-cheap reuseport < exclusive. "
    )
    first, second = matrix.reasons(found)
    assert first.startswith(
        "many-cheap reuseport < exclusive: here no worker takes a connection ahead of its work, so exclusive is one queue"
    )
    assert second.startswith("many-cheap load-aware < exclusive: ")


def test_a_reason_is_given_only_where_it_explains_what_was_found() -> None:
    # Of many costly requests the paper has exclusive below reuseport, as theory has: that one queue waits less is no reason against it.
    (said,) = matrix.reasons(matrix.rankings([cell("many-costly", {"shared:first": 60.0, "reuseport": 30.0, "shared:least-loaded": 20.0})]))
    assert said.startswith("many-costly exclusive < reuseport: theory has one queue wait less than k: perhaps")
    # Of many cheap ones it has reuseport below: that one queue waits less does not say why the two are alike.
    (said,) = matrix.reasons(matrix.rankings([cell("many-cheap", {"shared:first": 8.0, "reuseport": 8.0, "shared:least-loaded": 4.0})]))
    assert said.startswith("many-cheap reuseport < exclusive: theory has one queue wait less than k: perhaps")
    # Kept and costly: not to pile connections up is no reason to be above a hash.
    (said,) = matrix.reasons(
        matrix.rankings([cell("kept-costly", {"shared:first": 60.0, "reuseport": 30.0, "shared:least-loaded": 90.0})])
    )[:1]
    assert said.startswith("kept-costly exclusive < reuseport, kept-costly load-aware < reuseport: few connections are open at a time")


def test_what_is_invalid_or_missing_never_counts() -> None:
    means = {"shared:first": 30.0, "reuseport": 60.0, "shared:least-loaded": 20.0}
    found = matrix.rankings([cell("many-costly", means, invalid=["reuseport"])])
    for measure in matrix.MEASURES:
        pairs = by_pair(found, measure)
        assert [one.holds for one in pairs.values()] == [None, True, None]
        assert pairs["exclusive", "reuseport"].as_json()["here_ms"] is None
        assert pairs["exclusive", "reuseport"].sentence.endswith("cannot be told, reuseport is INVALID")
    del means["shared:least-loaded"]
    pairs = by_pair(matrix.rankings([cell("many-costly", means)]))
    assert [one.holds for one in pairs.values()] == [True, None, None]
    assert pairs["reuseport", "load-aware"].sentence.endswith("cannot be told, without load-aware")
    assert matrix.rankings([]) == []


def test_a_p99_is_told_where_the_stretches_agree() -> None:
    means = {"shared:first": 30.0, "reuseport": 60.0, "shared:least-loaded": 20.0}
    tails = {"shared:first": (200.0, 300.0), "reuseport": (250.0, 280.0), "shared:least-loaded": (100.0, 100.0)}
    pairs = by_pair(matrix.rankings([cell("many-costly", means, tails=tails)]), "p99")
    assert {pair: one.holds for pair, one in pairs.items()} == {
        ("exclusive", "reuseport"): None,
        ("exclusive", "load-aware"): True,
        ("reuseport", "load-aware"): True,
    }
    assert pairs["exclusive", "reuseport"].sentence.endswith("without an interval; the stretches of the repeats do not agree")
    assert all(one.ci is None for one in pairs.values())


def test_the_cells_are_four_cases_by_three_loads() -> None:
    works = matrix.works(4, None, 2, 7, 10.0)
    assert [(one.case, one.level) for one in works] == [(case, level) for case in matrix.CASES for level in matrix.LEVELS]
    for one in works:
        assert one.load == pytest.approx(matrix.LEVELS[str(one.level)])
        assert (one.scenario, one.seed, one.repeats) == ("matrix", 7, 2)
    # Published are pairs of four cases by mean and p99, of contestants that are known here.
    assert set(matrix.PUBLISHED) == set(matrix.CASES)
    assert all(set(one) == set(matrix.THEIRS) for one in matrix.PUBLISHED.values())
    assert set(matrix.THEIRS.values()) < set(str(scenarios.CATALOGUE["matrix"].strategies).split(","))
    # What is asked for takes less than ten minutes with what the starts need: four servers, twice.
    seconds = sum(4 * one.repeats * (one.connections / one.rate + one.requests * (one.think + one.service)) for one in works if one.rate)
    assert seconds < 360


def test_two_real_cells_and_what_is_said_of_them() -> None:
    works = [one for one in matrix.works(2, 20, 1, 1, 10.0) if one.level == "heavy" and one.case in ("many-cheap", "kept-cheap")]
    servers = [Group(Strategy.parse(name)) for name in matrix.THEIRS.values()]
    campaign = Campaign([], [Steady(work, servers) for work in works])
    campaign.measure(Silent())
    studies = campaign.studies
    data = report.as_json([], studies, {})
    assert [(one["case"], one["level"], one["outcomes"]["ok"]) for one in data["runs"]] == [
        (case, "heavy", count) for case, count in (("many-cheap", 20), ("kept-cheap", 400)) for _ in servers
    ]
    assert len(data["rankings"]) == 12
    for one in data["rankings"]:
        assert set(one) == {"case", "level", "measure", "first", "second", "published_ms", "here_ms", "ci", "holds", "sentence"}
        assert one["holds"] in (True, False, None)
    assert data["verdict"].startswith("Of Hermes' 6 rankings by mean ")
    out = io.StringIO()
    report.show([], studies, out)
    shown = out.getvalue()
    assert "many-cheap: one request of 4 ms per connection, 2 workers, 1 repeat\n" in shown
    assert "kept-cheap: 20 requests of 4 ms on each connection, 2 workers" in shown
    assert "latency in ms; exclusive is shared:first, load-aware is shared:least-loaded\n" in shown
    assert shown.count("load-aware < reuseport") >= 4
    # Nothing is cut off at the right: one level here, of one case whose theory is known.
    assert shown.count("p99 theory\n") == 1
    assert "Of Hermes' 6 rankings by mean" in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_whole_matrix_small(tmp_path: Path) -> None:
    data, out = measured(
        tmp_path / "matrix.json",
        "--scenario",
        "matrix",
        "--workers",
        "2",
        "--connections",
        "12",
        "--repeats",
        "1",
        "--strategies",
        "dispatch",
    )
    assert len(data["runs"]) == 12 * 5
    assert {one["strategy"] for one in data["runs"]} == {*matrix.THEIRS.values(), "shared", "dispatch"}
    assert len(data["studies"]) == 12
    assert len(data["rankings"]) == 24
    assert "Of Hermes' 12 rankings by mean" in out
