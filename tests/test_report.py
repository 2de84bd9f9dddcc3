"""`report` and `--html`: what a JSON file says, in every form, and what is said of files that are none."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fdpass_bench import cli, compare, curves, formats, records, tables, theory

sys.path.insert(0, str(Path(__file__).parent))

from made_up_runs import (
    ENVIRONMENT,
    LOADS,
    all_scenarios,
    balance_file,
    kill,
    late,
    matrix,
    pass_file,
    row,
    scale_out,
    stall,
    steady,
    sweep_of_loads,
    sweep_of_workers,
    written,
)

COMMAND = [sys.executable, "-X", "dev", "-W", "error", "-m", "fdpass_bench"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


# ---------------------------------------------------------------------------------------------------------------- bad files


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("no json", "is not JSON: line 1"),
        ("\xff\xfe", "is not JSON"),
        ('{"schema": 1, "runs": [{"strategy": "sha', "breaks off in line 1"),
        ('{"schema": 1, "runs": [', "breaks off"),
        ("[]", "it has no schema"),
        ('{"schema": 2, "runs": []}', "has schema 2; this version of fdpass-bench knows schema 1"),
        ('{"schema": 1}', "neither runs (of balance) nor rows (of pass)"),
        ('{"schema": 1, "runs": []}', "holds no runs"),
        ('{"schema": 1, "rows": []}', "holds no runs"),
        ('{"schema": 1, "runs": [7]}', "run 1 has no strategy"),
        ('{"schema": 1, "runs": [{"strategy": "a", "scenario": "b", "latency_ms": 3}]}', "run 1: latency_ms does not have the form"),
        ('{"schema": 1, "runs": [{"strategy": "a", "scenario": "b", "per_worker": ["x"]}]}', "per_worker"),
        ('{"schema": 1, "runs": [{"strategy": "a", "scenario": "b"}], "environment": {"command": "ls"}}', "environment: command"),
        ('{"schema": 1, "runs": [{"strategy": "a", "scenario": "b", "case": 3}]}', "run 1: case does not have the form"),
        ('{"schema": 1, "runs": [{"strategy": "a", "scenario": "b"}], "rankings": 3}', "rankings does not have the form"),
        ('{"schema": 1, "runs": [{"strategy": "a", "scenario": "b"}], "rankings": [{"holds": 1}]}', "ranking 1: holds"),
        ('{"schema": 1, "runs": [{"strategy": "a", "scenario": "b"}], "comparisons": [{"ci": "wide"}]}', "comparison 1: ci"),
        ('{"schema": 1, "runs": [{"strategy": "a", "scenario": "b"}], "studies": [{"calibration": 3}]}', "study 1: calibration"),
        ('{"schema": 1, "rows": [{"what": "a", "name": "b", "fdpass": {"p50_us": "fast"}}]}', "row 1: fdpass: p50_us"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "runs.json"
    path.write_text(text, encoding="latin-1")
    assert cli.main(["report", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


def test_a_file_that_breaks_off_anywhere_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = json.dumps(balance_file(steady(), kill(lost=3)), indent=1)
    path = tmp_path / "runs.json"
    for end in range(1, len(text) - 1, 61):
        path.write_text(text[:end])
        assert cli.main(["report", str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("key", sorted({*steady(), *kill(), *stall()} - {"strategy", "scenario"}))
def test_whatever_stands_in_a_run_it_is_shown_or_refused(key: str) -> None:
    other = records.record(balance_file(steady(), kill(), steady("other")), "b.json")
    refused = 0
    values: list[Any] = [None, 3, "text", [1], {"a": 1}, [], {}, True]
    for value in values:
        data = balance_file(steady(**{key: value}), kill(lost=2, **{key: value}))
        try:
            record = records.record(data, "runs.json")
        except records.RecordError:
            refused += 1
            continue
        formats.as_csv([record])
        same = records.Record("c.json", "balance", {**data, "runs": [*record.runs, steady("other")]})
        formats.as_markdown([same], [compare.compare(other, same)])
    assert refused < len(values)


def test_files_that_have_nothing_in_common(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = written(tmp_path / "a.json", balance_file(steady())), written(tmp_path / "b.json", balance_file(kill()))
    third = written(tmp_path / "c.json", pass_file(row()))
    for arguments, said in (
        ([first, second], "no run in common"),
        ([first, third], "of fdpass-bench pass"),
        ([first, first], "given twice"),
    ):
        assert cli.main(["report", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert cli.main(["report", first, "--html", first]) == 2
    assert "not overwritten" in capsys.readouterr().err
    assert cli.main(["report", first, "--csv", str(tmp_path / "none" / "x.csv")]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert json.loads(Path(first).read_text())["schema"] == 1


# ---------------------------------------------------------------------------------------------------------------- forms


def test_one_file_in_every_form(tmp_path: Path) -> None:
    comparisons = [{"sentence": "shared beats reuseport: mean 2 times lower", "valid": True}]
    data = balance_file(steady(), steady("reuseport", 2.0), kill(lost=3), comparisons=comparisons, verdict="It was even.")
    path = written(tmp_path / "runs.json", data)
    html, table, text = (str(tmp_path / name) for name in ("page.html", "runs.csv", "runs.md"))
    done = run("report", path, "--html", html, "--csv", table, "--markdown", text)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "It was even." in done.stdout
    assert "Shared beats reuseport" in done.stdout
    lines = list(csv.DictReader(io.StringIO(Path(table).read_text())))
    assert [line["strategy"] for line in lines] == ["shared", "reuseport", "shared"]
    assert lines[1]["latency_ms.mean"] == "20.0"
    assert lines[0]["per_worker"] == "990 1010"
    markdown = Path(text).read_text()
    assert markdown.index("It was even.") < markdown.index("| shared |")
    assert "<details>" in markdown
    page = Path(html).read_text()
    assert page.index("It was even.") < page.index("<svg")
    assert len(page) < 3_000_000
    # A page made of the JSON again is the same page.
    again = str(tmp_path / "again.html")
    assert run("report", path, "--html", again).returncode == 0
    assert Path(again).read_text() == page


def test_html_of_a_run_is_the_report_of_its_json(tmp_path: Path) -> None:
    html, path = str(tmp_path / "page.html"), str(tmp_path / "runs.json")
    arguments = ("--strategies", "shared", "--workers", "2", "--connections", "6", "--scenario", "idle")
    done = run("balance", *arguments, "--json", path, "--html", html)
    assert done.returncode == 0, done.stderr
    assert "verdict" in json.loads(Path(path).read_text())
    again = str(tmp_path / "again.html")
    assert run("report", path, "--html", again).returncode == 0
    assert Path(again).read_text() == Path(html).read_text()


def test_a_page_of_pass(tmp_path: Path) -> None:
    rows = [
        row(),
        row("a queue", 2.0),
        row("broken", fdpass=None, other=None, valid=False, invalid_reason="no C compiler", sentence="not measured"),
    ]
    html = str(tmp_path / "page.html")
    assert run("report", written(tmp_path / "pass.json", pass_file(*rows)), "--html", html).returncode == 1
    page = Path(html).read_text()
    assert "no C compiler" in page
    assert "<svg" in page


@pytest.fixture(scope="module")
def page() -> Any:
    """Matplotlib keeps each font that it drew with open."""
    module = pytest.importorskip("fdpass_bench.page")
    module.render([records.record(balance_file(steady(), kill(lost=2)), "a.json")])
    return module


def test_what_a_file_says_is_text_and_nothing_else(page: Any) -> None:
    nasty = "<script>alert(1)</script>$x^2$&\"'|`"
    data = balance_file(steady(nasty), kill(nasty, lost=2), verdict=nasty)
    data["environment"] = ENVIRONMENT | {"command": ["fdpass-bench", nasty]}
    record = records.record(data, nasty)
    html = page.render([record])
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    markdown = formats.as_markdown([record], [])
    lines = [line.replace("\\|", "") for line in markdown.splitlines() if line.startswith("| ")]
    assert len(lines) == 9
    assert all(line.count("|") == lines[0].count("|") for line in lines[:3])


def test_a_formula_in_a_spreadsheet_is_text() -> None:
    assert ",'=1+1," in formats.as_csv([records.record(balance_file(kill("=1+1")), "a.json")])


def test_several_loads_are_a_sweep(page: Any) -> None:
    runs = [
        steady(name, factor * (1 + load), load=load) for load in (0.3, 0.5, 0.7) for name, factor in (("shared", 1.0), ("reuseport", 2.0))
    ]
    html = page.render([records.record(balance_file(*runs), "sweep.json")])
    assert html.count("<h2>") == 2  # the sweep, and where it was measured
    assert html.count("<details>") == 3
    assert html.index("Mean latency and p99 latency by load") < html.index("Mean / p99 latency in ms") < html.index("<summary>Load 0.3")


# ---------------------------------------------------------------------------------------------------------------- sweeps and the matrix


def test_runs_that_differ_in_one_thing_are_a_section() -> None:
    assert [one.title for one in records.sections(sweep_of_loads()["runs"])] == ["steady, 4 workers: load 0.3 to 0.9"]
    (workers,) = records.sections(sweep_of_workers()["runs"])
    assert (workers.axis, workers.title) == ("workers", "steady, load 0.7: 1 to 16 workers")
    (cells,) = records.sections(matrix()["runs"])
    assert (cells.axis, cells.title, len(cells.groups)) == ("cell", "matrix, 4 workers: all cells", 12)
    assert [one.axis for one in records.sections(all_scenarios()["runs"])] == [None] * 11
    # Each run stands in one of them, whatever they are.
    mixed = [*sweep_of_loads()["runs"], steady(workers=8), steady(workers=16), kill(), steady(requests_per_connection=5), steady(load=None)]
    found = records.sections(mixed)
    assert [one.axis for one in found] == ["load", None, None, None, None, None]
    assert sorted(map(id, mixed)) == sorted(id(run) for one in found for run in one.runs)


def test_a_rate_may_be_swept_without_a_load() -> None:
    runs = [steady(load=None, work={"rate": rate}, offered_per_s=rate * 0.99) for rate in (200.0, 50.0, 100.0)]
    (section,) = records.sections(runs)
    assert (section.axis, section.title) == ("rate", "steady, 2 workers: 50 to 200 connections/s")
    # At one rate several numbers of workers are several loads: it is the workers that differ.
    runs = [steady(workers=k, load=2.8 / k, work={"rate": 700.0}) for k in (8, 4)]
    (section,) = records.sections(runs)
    assert (section.axis, section.title) == ("workers", "steady, 700 connections/s: 4 to 8 workers")


def test_a_sweep_is_one_table_with_a_row_for_each_load() -> None:
    record = records.record(sweep_of_loads(), "sweep.json")
    (table,) = tables.tables_of(record)
    assert [line[0] for line in table.rows] == [f"{load:g}" for load in LOADS]
    assert list(table.columns) == ["load", "shared", "reuseport", "gunicorn", "theory: one queue", "theory: split"]
    # What is INVALID says so in its cell, and theory is not taken from it.
    assert sorted(table.struck_cells) == [(3, 2), (6, 3)]
    assert [line[2].endswith(" INVALID") for line in table.rows] == [row == 3 for row in range(7)]
    assert table.rows[3][5] == "-"


def test_other_scenarios_may_be_swept_over_workers_too() -> None:
    runs = [stall(name, lost, workers=k, delayed_share_split=1 / k) for k in (2, 4) for name, lost in (("shared", 2), ("reuseport", 120))]
    (table,) = tables.tables_of(records.record(balance_file(*runs), "a.json"))
    assert table.rows == [["2", "0.4%", "24.0%", "50.0%"], ["4", "0.4%", "24.0%", "25.0%"]]
    assert table.columns[3] == "split queues: 1/k"


def test_a_sweep_is_not_called_by_what_changes_in_it() -> None:
    # Of stall the rate follows from the number of workers.
    (section,) = records.sections([stall(workers=k, offered_per_s=125.0 * k) for k in (2, 4)])
    assert section.title == "stall: 2 to 4 workers"


def test_of_many_that_are_invalid_the_first_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], page: Any) -> None:
    data = balance_file(*(late(steady(f"server{i}")) for i in range(12)))
    path = written(tmp_path / "a.json", data)
    assert cli.main(["report", path]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("INVALID: server") == 6
    assert "6 more are INVALID; --html and --markdown say why." in out
    assert cli.main(["report", path, "--markdown", "-"]) == 1
    assert capsys.readouterr().out.count("- INVALID: server") == 12
    html = page.render([records.record(data, "a.json")])
    assert html.count("the generator was late") == 12
    assert "<summary>4 more</summary>" in html


def test_what_was_not_answered_in_a_sweep_is_said() -> None:
    bad = steady(load=0.5, outcomes={"ok": 1990, "timeout": 7, "reset": 3})
    (table,) = tables.tables_of(records.record(balance_file(steady(load=0.3), bad), "a.json"))
    assert [line[-1] for line in table.rows] == ["-", "shared 10"]


def test_a_sweep_in_a_terminal_and_in_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "sweep.json", sweep_of_loads())
    assert cli.main(["report", path]) == 1
    out = capsys.readouterr().out
    assert " ".join(out.split()).startswith("Steady, 4 workers: load 0.3 to 0.9: mean latency, times that of shared: reuseport 1.")
    assert out.count("Mean / p99 latency in ms") == 1
    assert "Shares and outcomes" not in out
    assert max(map(len, out.splitlines()[:-1])) <= 80
    assert cli.main(["report", path, "--markdown", "-"]) == 1
    markdown = capsys.readouterr().out
    assert markdown.index("Mean / p99 latency") < markdown.index("<details><summary>steady, load 0.3")
    assert markdown.count("<details>") == markdown.count("</details>") == 8


def test_many_pairs_are_summed_up_and_listed_with_their_runs() -> None:
    record = records.record(all_scenarios(), "all.json")
    said = tables.headline(record)
    assert len(said) == 5  # the verdict, and a sentence for each loop
    assert said[1].startswith("Steady, load 0.7, 4 workers: mean latency, times that of shared: reuseport 2.")
    assert said[1].endswith("(no difference shown).")
    (section,) = (one for one in records.sections(record.runs) if one.runs[0]["scenario"] == "steady")
    assert len(tables.pairs_of(record, section.runs)) == 10
    # Of a sweep the file has them by study, with its work.
    loops = [
        {"work": {"scenario": "steady", "workers": 2, "rate": rate}, "comparisons": [{"sentence": f"a beats b at {rate}"}] * 4}
        for rate in (50.0, 99.0)
    ]
    runs = [steady(load=None, work={"rate": rate}) for rate in (50.0, 99.0)]
    assert tables.pairs_of(records.record(balance_file(*runs, studies=loops), "a.json"), runs[1:]) == ["A beats b at 99.0."] * 4
    few = records.record(balance_file(steady(), comparisons=[{"sentence": "a beats b", "scenario": "steady"}]), "few.json")
    assert tables.headline(few) == ["A beats b."]
    assert tables.pairs_of(few, few.runs) == []


def test_what_is_invalid_is_struck_and_faint_in_every_scenario() -> None:
    plots = pytest.importorskip("fdpass_bench.plots")
    bad = {"valid": False, "invalid_reason": "the generator was late"}
    steps = tables.tables_of_runs([scale_out() | bad, scale_out("dispatch")])[-1]
    assert steps.title == "Steps: scale-out"
    assert steps.struck == [0, 1, 2]
    for draw, one in (
        (plots.stranded, stall(delayed=9)),
        (plots.scaling, scale_out()),
        (lambda runs, _: plots.outcomes(runs), kill(lost=9)),
    ):
        for invalid in (False, True):
            (svg, _) = draw([one | (bad if invalid else {})], {"shared": 0}).svgs
            assert ("opacity: 0.45" in svg) is invalid


def test_rankings_come_first_and_each_has_its_row(page: Any) -> None:
    record = records.record(matrix(), "matrix.json")
    said = tables.headline(record)
    counts = [sum(one["holds"] is holds for one in record.rankings) for holds in (True, False, None)]
    assert all(counts)
    assert said[0] == f"Of 24 published rankings {counts[0]} hold here, {counts[1]} do not, and {counts[2]} cannot be told."
    rankings, cells = tables.tables_of(record)
    assert [line[2] for line in rankings.rows].count("does not hold") == counts[1]
    assert rankings.rows[0][3].startswith("reuseport 5.10 < exclusive 7.09")
    assert [line[0] for line in cells.rows][:2] == ["many-cheap, light", "many-cheap, medium"]
    assert len(cells.struck_cells) == 1
    html = page.render([record])
    assert html.index("Of 24 published") < html.index("<svg") < html.index("Which published rankings") < html.index("<details>")
    assert html.count('data-verdict="does not hold">') == counts[1]
    line = next(csv.DictReader(io.StringIO(formats.as_csv([record]))))
    assert (line["case"], line["level"]) == ("many-cheap", "light")


def test_what_is_invalid_is_never_joined() -> None:
    plots = pytest.importorskip("fdpass_bench.plots")
    runs = [steady(load=load, theory=None) for load in (0.3, 0.5, 0.7, 0.9)]
    runs[1] = late(runs[1])
    (section,) = records.sections(runs)
    drawn = plots.sweep(section, {"shared": 0})
    assert "at 0.5 (INVALID)" in drawn.alt
    # The line has a gap: it begins anew behind what is INVALID.
    lines = [path for path in re.findall(r' d="(M[^"CQz]*)"[^>]*stroke: var\(--c0\)', drawn.svgs[0]) if "L" in path or "H" in path]
    assert len([path for path in lines if path.count("M") == 2]) >= 1
    whole = plots.sweep(records.sections([steady(load=load, theory=None) for load in (0.3, 0.5, 0.7, 0.9)])[0], {"shared": 0})
    assert not [path for path in re.findall(r' d="(M[^"CQz]*)"[^>]*stroke: var\(--c0\)', whole.svgs[0]) if path.count("M") == 2]


def test_a_shortened_path_is_the_same_path() -> None:
    plots = pytest.importorskip("fdpass_bench.plots")
    assert plots._path("M 1.04 2 L 1 3.26 L 5 3.26 L 6 7 L 8 9 L 8 9 M 1 1 L 2 2 z M 3 4 L 3 5 ") == "M1 2V3.3H5L6 7 8 9M1 1L2 2zM3 4V5"
    assert plots._path("M 0 1.2345 C 1 2 3 4 5 6") == "M 0 1.23 C 1 2 3 4 5 6"


# ---------------------------------------------------------------------------------------------------------------- did it get worse?


def compared(first: dict[str, Any], second: dict[str, Any]) -> compare.Comparison:
    return compare.compare(records.record(first, "before.json"), records.record(second, "after.json"))


def test_a_mean_that_rose_beyond_its_interval_is_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = written(tmp_path / "before.json", balance_file(steady(), steady("reuseport")))
    after = written(tmp_path / "after.json", balance_file(steady(factor=1.5), steady("reuseport")))
    assert cli.main(["report", before, after]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert out.startswith(
        "after.json is worse than before.json: shared, steady, load 0.7, 2 workers: mean latency, ms 1.50 times as much (95 % "
    )
    assert cli.main(["report", after, before]) == 0
    assert "before.json is better than after.json" in " ".join(capsys.readouterr().out.split())


def test_a_mean_within_the_interval_is_no_difference() -> None:
    found = compared(balance_file(steady()), balance_file(steady(factor=1.03)))
    assert [change.verdict for change in found.changes if change.measure == "mean latency, ms"] == ["no difference"]
    assert found.sentence == "after.json is not worse than before.json, as far as these runs can show (1 compared)."
    # p99 has no interval: it is shown, and not judged.
    assert {change.verdict for change in found.changes if "p99" in change.measure} == {"not judged"}


def test_the_interval_is_that_of_two_independent_means() -> None:
    (change,) = (one for one in compared(balance_file(steady(half=0.6)), balance_file(steady(half=0.8))).changes if one.low)
    assert change.high == pytest.approx(2.718281828 ** ((0.06**2 + 0.08**2) ** 0.5), rel=1e-3)
    assert change.low == pytest.approx(1 / change.high, rel=1e-9)


def test_many_runs_that_did_not_change_are_not_worse() -> None:
    # Just beyond its own interval, one of twenty is chance.
    def many(factor: float) -> dict[str, Any]:
        return balance_file(*(steady(f"server{i}", factor if i == 0 else 1.0) for i in range(20)))

    assert compared(balance_file(steady()), balance_file(steady(factor=1.075))).worse
    assert not compared(many(1.0), many(1.075)).worse


def test_losses_are_counts() -> None:
    assert not compared(balance_file(kill(lost=1)), balance_file(kill(lost=4))).worse
    found = compared(balance_file(kill(lost=0)), balance_file(kill(lost=20)))
    assert [change.sentence for change in found.worse] == [
        "shared, kill, 2 workers: lost that no worker had accepted 20 of 200, before 0 of 200"
    ]
    assert compare._fisher(1, 10, 9, 10) == pytest.approx(0.00109, abs=2e-5)  # a table of Fisher's, as R has it


def test_a_worker_that_strands_more_is_worse() -> None:
    # Split queues of the same server delay 95 of 500 in one run, and 165 in another: what waits at one worker waits together.
    found = compared(balance_file(stall(delayed=95)), balance_file(stall(delayed=165)))
    assert not found.worse
    found = compared(balance_file(stall(delayed=2)), balance_file(stall(delayed=125)))
    assert [change.sentence for change in found.worse] == [
        "shared, stall, 2 workers: delayed while a worker was frozen 125 of 500, before 2 of 500"
    ]


def test_a_sweep_is_compared_run_by_run() -> None:
    found = compared(sweep_of_loads(), sweep_of_loads())
    means = [change for change in found.changes if change.measure == "mean latency, ms"]
    assert len(means) == 19  # two of 21 are INVALID
    assert {change.verdict for change in means} == {"no difference"}
    assert found.shared == ["steady", "4 workers"]
    assert found.tables[0].rows[0][0] == "shared, load 0.3"
    assert found.tables[0].title.endswith("(steady, 4 workers)")
    assert found.only == []


def test_many_that_got_worse_are_counted_and_not_all_named() -> None:
    slower = sweep_of_loads()
    for run in slower["runs"]:
        run["latency_ms"]["mean"] *= 2
        run["ci"]["mean_ms"] = [2 * end for end in run["ci"]["mean_ms"]]
    found = compared(sweep_of_loads(), slower)
    assert len(found.worse) == 19
    assert found.sentence.endswith("; and 15 more.")


def test_a_matrix_is_compared_cell_by_cell_and_rankings_that_turned_are_named() -> None:
    turned = matrix()
    (one,) = (r for r in turned["rankings"] if (r["case"], r["measure"], r["first"]["published"]) == ("many-cheap", "mean", "reuseport"))
    assert one["holds"] is True
    one["holds"] = False
    found = compared(matrix(), turned)
    assert len([change for change in found.changes if change.low]) == 47
    ranking = "many-cheap, heavy, mean: the published ranking of reuseport and shared:least-loaded"
    assert found.turned == [f"{ranking} holds in before.json and does not hold in after.json"]
    cell = [run for run in matrix()["runs"] if (run["case"], run["level"]) == ("many-cheap", "light")]
    assert len([change for change in compared(matrix(), balance_file(*cell)).changes if change.low]) == 4


def test_an_invalid_run_is_not_compared_and_the_status_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = written(tmp_path / "before.json", balance_file(steady()))
    after = written(tmp_path / "after.json", balance_file(steady(factor=9.0, valid=False, invalid_reason="the generator was late")))
    assert cli.main(["report", before, after]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "is INVALID in after.json and not compared: the generator was late" in out
    assert "worse than" not in out


def test_other_work_is_not_compared() -> None:
    with pytest.raises(ValueError, match="no run in common"):
        compared(balance_file(steady(load=0.7)), balance_file(steady(load=0.9)))
    with pytest.raises(ValueError, match="no run in common"):
        compared(balance_file(steady(), work={"distribution": "fixed"}), balance_file(steady(), work={"distribution": "hyper"}))
    for make in (steady, kill):
        with pytest.raises(ValueError, match="no run in common"):
            compared(balance_file(make("dispatch") | {"credits": 1}), balance_file(make("dispatch") | {"credits": 4}))


def test_a_closed_loop_is_the_same_however_many_connections_it_made() -> None:
    runs = [kill(scenario="rolling", clients=24, connections=count) for count in (9000, 9100)]
    assert not compared(balance_file(runs[0]), balance_file(runs[1])).only
    assert len(records.grouped(runs)) == 1


def test_another_machine_is_named() -> None:
    other = balance_file(steady())
    other["environment"] = ENVIRONMENT | {"kernel": "6.9", "fdpass": "0.2.0"}
    assert compared(balance_file(steady()), other).differences == ["kernel 6.1 and 6.9", "fdpass 0.1.0 and 0.2.0"]


def test_prices_are_compared_by_their_rounds() -> None:
    assert [change.verdict for change in compared(pass_file(row()), pass_file(row(factor=1.3))).changes] == ["worse"]
    assert [change.verdict for change in compared(pass_file(row()), pass_file(row(factor=0.7))).changes] == ["better"]
    assert [change.verdict for change in compared(pass_file(row()), pass_file(row(factor=1.005))).changes] == ["no difference"]
    rates = [
        row(fdpass={"name": "fdpass", "claims_per_s": 10.0 * f, "claims_per_s_of_rounds": [9.9 * f, 10.0 * f, 10.1 * f]}) for f in (1, 2)
    ]
    assert [change.verdict for change in compared(pass_file(rates[0]), pass_file(rates[1])).changes] == ["better"]


def test_a_third_file_is_compared_with_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [
        written(tmp_path / f"{name}.json", balance_file(steady(factor=factor))) for name, factor in (("a", 1.0), ("b", 1.0), ("c", 3.0))
    ]
    assert cli.main(["report", *files]) == 1
    out = capsys.readouterr().out
    assert "b.json is not worse than a.json" in out
    assert "c.json is worse than a.json" in out


# ---------------------------------------------------------------------------------------------------------------- curves


def test_a_curve_is_of_the_values_themselves() -> None:
    curve = curves.of_values([number / 1000 for number in range(1, 1001)])
    assert curve is not None
    assert (curve["percentile"][0], curve["ms"][0]) == (0.0, 1.0)
    assert (curve["percentile"][-1], curve["ms"][-1]) == (99.9, 999.0)
    at = dict(zip(curve["percentile"], curve["ms"], strict=True))
    assert at[90.0] == 900.0
    assert curves.of_values([]) is None
    assert curves.of_values([0.5]) == {"percentile": [0.0], "ms": [500.0]}


def test_theorys_curve_has_theorys_percentiles() -> None:
    prediction = theory.one_queue(4, 700, 0.004)
    curve = curves.of_theory(prediction, prediction)
    at = dict(zip(curve["percentile"], curve["ms"], strict=True))
    assert at[99.0] == pytest.approx(prediction.p99 * 1e3, rel=1e-3)
    assert at[50.0] == pytest.approx(prediction.p50 * 1e3, rel=1e-3)
    assert curve["ms"] == sorted(curve["ms"])


def test_a_series_counts_everything_once() -> None:
    found = curves.series({0: [0.0, 0.05, 0.35], 2: [1.0]}, 2)
    assert found["bin_seconds"] == 0.1
    assert [sum(line) for line in found["per_worker"]] == [3, 0, 1]
    assert found["per_worker"][0][:4] == [2, 0, 0, 1]
    long = curves.series({0: [number / 10 for number in range(10000)]}, 1)
    assert long["bin_seconds"] == 20.0
    assert len(long["per_worker"][0]) <= 60


def test_a_table_leaves_no_figure_out_for_being_invalid() -> None:
    record = records.record(balance_file(steady(valid=False, invalid_reason="late")), "a.json")
    (latency, shares) = tables.tables_of(record)
    assert latency.rows[0][0] == "shared INVALID"
    assert latency.struck == shares.struck == [0]
    assert record.invalid == ["shared, steady, load 0.7, 2 workers: late"]


def test_the_record_is_not_changed_by_showing_it() -> None:
    data = balance_file(steady(), kill(lost=2))
    before = copy.deepcopy(data)
    record = records.record(data, "a.json")
    formats.as_markdown([record], [])
    assert data == before
