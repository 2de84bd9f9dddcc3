"""The page of a report in a real browser: it asks nobody for anything, complains of nothing, is read at any width, light and dark."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from browser import CHROMIUM, Browser, browser
from made_up_runs import (
    ENVIRONMENT,
    balance_file,
    kill,
    matrix,
    pass_file,
    row,
    scale_out,
    stall,
    steady,
    sweep_of_loads,
    sweep_of_workers,
    whole,
    written,
)

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on PATH (apt install chromium)"),
    pytest.mark.timeout(600),
]

OPENED = "document.querySelectorAll('details').forEach(one => { one.open = true; })"

#: Each picture that is shown: the texts in it, where they are, and how far they reach beyond it.
PICTURES = """
[...document.querySelectorAll("figure svg")].filter(svg => svg.getBoundingClientRect().width > 0).map(svg => {
  const box = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll("text")].map(text => ({text: text.textContent, box: text.getBoundingClientRect()}));
  const right = document.documentElement.clientWidth;
  const beyond = ({box: b}) => Math.max(b.right - right, -b.left, b.bottom - box.bottom - 2, box.top - b.top - 2);
  return {
    label: svg.getAttribute("aria-label"),
    ids: [...svg.querySelectorAll("[id]")].map(one => one.id),
    kinds: [...svg.querySelectorAll("g[id]")].map(one => one.id.replace(/^p[0-9]+-/, "").replace(/_[0-9]+$/, "")),
    texts: texts.map(one => one.text),
    smallest: Math.min(...texts.map(one => one.box.height)),
    beyond: Math.max(...texts.map(beyond)),
    worst: texts.reduce((a, b) => beyond(a) > beyond(b) ? a : b).text,
    colours: [...new Set([...svg.querySelectorAll("text")].map(text => getComputedStyle(text).fill))],
  };
})
"""
CONTRAST = """
(() => {
  const channels = colour => colour.match(/[0-9.]+/g).slice(0, 3).map(Number).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = colour => { const [r, g, b] = channels(colour); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const of = colour => { const l = light(colour); return (Math.max(l, paper) + 0.05) / (Math.min(l, paper) + 0.05); };
  const words = [...document.querySelectorAll("h1, h2, p, td, th, dt, dd, figcaption")].map(one => of(getComputedStyle(one).color));
  const probe = document.body.appendChild(document.createElement("i"));
  const series = [0, 1, 2, 3, 4, 5].map(n => { probe.style.color = `var(--c${n})`; return of(getComputedStyle(probe).color); });
  probe.remove();
  return {paper, words: Math.min(...words), series: Math.min(...series)};
})()
"""


def pages(folder: Path) -> dict[str, Path]:
    """One of each kind, made by the command."""
    sweep = [steady(name, factor * (1 + load), load=load) for load in (0.3, 0.7) for name, factor in (("shared", 1.0), ("reuseport", 2.0))]
    kept = steady("nginx", 3.0, server="peer", version="1.22", requests_per_connection=5, theory=None)
    many = steady("many", workers=16, per_worker=[100] * 16, series=[{"repeat": 1, "bin_seconds": 1.0, "per_worker": [[9, 10]] * 16}])
    bad = steady("reuseport-bare", valid=False, invalid_reason="the generator was late")
    more = [stall(), stall("reuseport", 120), scale_out(), scale_out("reuseport", 0.8)]
    balance = balance_file(*sweep, kept, many, bad, kill(lost=0), kill("reuseport-bare", lost=40), *more, verdict="Shared lost nothing.")
    prices = pass_file(row(), row("a queue", 9.0), row("a claim", what="outstanding", other=None, times_faster=None, times_faster_ci=None))
    before, after = written(folder / "before.json", balance), written(folder / "after.json", balance_file(*(steady(factor=2.0), kill())))
    one = written(folder / "pass.json", prices | {"environment": ENVIRONMENT | {"command": ["fdpass-bench", "pass"]}})
    full = written(folder / "full.json", whole())
    sweep, workers = written(folder / "sweep.json", sweep_of_loads()), written(folder / "workers.json", sweep_of_workers())
    cells = written(folder / "matrix.json", matrix())
    later = written(folder / "later.json", {**matrix(), "environment": ENVIRONMENT | {"kernel": "6.9"}})
    frozen = [
        stall(name, 240 // k * n, workers=k, delayed_share_split=1 / k) for k in (2, 4) for name, n in (("shared", 0), ("reuseport", 1))
    ]
    stalls = written(folder / "stalls.json", balance_file(*frozen))
    found = {}
    for name, files in (
        ("balance", [before]),
        ("pass", [one]),
        ("comparison", [before, after]),
        ("full", [full]),
        ("sweep", [sweep]),
        ("workers", [workers]),
        ("matrix", [cells]),
        ("matrices", [cells, later]),
        ("stalls", [stalls]),
    ):
        found[name] = folder / f"{name}.html"
        command = [sys.executable, "-m", "fdpass_bench", "report", *files, "--html", str(found[name])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode in (0, 1), done.stderr
        assert done.stderr == ""
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return pages(tmp_path_factory.mktemp("pages"))


@pytest.fixture
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found


def check(found: list[dict[str, Any]]) -> None:
    for picture in found:
        kinds, texts = picture["kinds"], picture["texts"]
        title, label = texts and picture["label"].partition(". ")[0], picture["label"]
        assert label
        shown = " ".join(texts)
        assert title.split()[0] in shown, f"{label}: no title"
        assert "legend" in kinds, f"{label}: no legend"
        # Both axes say what they show, and the one with numbers in what unit.
        assert any("(" in text and text.endswith(")") for text in texts), f"{label}: no unit in {texts}"
        assert picture["smallest"] >= 8, f"{label}: text {picture['smallest']} pixels high"
        assert picture["beyond"] <= 1, f"{label}: {picture['worst']!r} reaches {picture['beyond']} pixels beyond"
    ids = [one for picture in found for one in picture["ids"]]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("balance", 6),
        ("pass", 2),
        ("comparison", 2),
        ("full", 48),
        ("sweep", 8),
        ("workers", 6),
        ("matrix", 13),
        ("matrices", 27),
        ("stalls", 1),
    ],
)
def test_a_page_in_a_browser(made: dict[str, Path], chromium: Browser, name: str, least: int) -> None:
    page = made[name]
    assert page.stat().st_size < 3_000_000
    inks = {}
    for width in (400, 1400):
        for dark in (False, True):
            chromium.show(page, width, dark)
            shut = chromium.ask("document.documentElement.scrollHeight")
            assert chromium.ask("document.documentElement.scrollWidth") <= width
            chromium.ask(OPENED)
            assert chromium.ask("document.documentElement.scrollWidth") <= width
            assert name in ("pass", "comparison") or chromium.ask("document.documentElement.scrollHeight") > shut
            pictures = chromium.ask(PICTURES)
            assert len(pictures) >= least
            check(pictures)
            inks[dark] = {colour for picture in pictures for colour in picture["colours"]}
            contrast = chromium.ask(CONTRAST)
            assert (contrast["paper"] < 0.2) == dark
            assert contrast["words"] >= 4.5
            assert contrast["series"] >= 2.5
            first = chromium.ask("document.querySelector('.verdict').getBoundingClientRect().top")
            assert first < 400
    # The pictures follow the page into the dark.
    assert not inks[False] & inks[True]
    assert chromium.complaints == []
    assert {url.partition(":")[0] for url in chromium.requests} <= {"file", "data", "about"}
    assert [url for url in chromium.requests if url.startswith("file:") and url != page.as_uri()] == []


def test_a_page_on_paper(made: dict[str, Path], chromium: Browser) -> None:
    chromium.show(made["balance"], 800, dark=True, media="print")
    # Paper is white, whatever the screen is.
    assert chromium.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    check(chromium.ask(PICTURES))


def test_what_is_folded_is_on_paper(made: dict[str, Path], chromium: Browser) -> None:
    visible = "[...document.querySelectorAll('details table')].filter(one => one.checkVisibility({contentVisibilityAuto: true})).length"
    chromium.show(made["sweep"], 800)
    assert chromium.ask(visible) == 0
    chromium.show(made["sweep"], 800, media="print")
    assert chromium.ask(visible) == 14  # two of each load


def test_the_full_page_leads_to_each_part(made: dict[str, Path], chromium: Browser) -> None:
    chromium.show(made["full"], 1400)
    targets = chromium.ask("[...document.querySelectorAll('nav a')].map(one => one.getAttribute('href').slice(1))")
    titles = chromium.ask("[...document.querySelectorAll('nav a')].map(one => one.textContent)")
    assert len(targets) == 12  # eleven scenarios, one of which is a sweep, and the matrix
    assert titles == [chromium.ask(f"document.querySelector('#{one} h2').textContent") for one in targets]


def test_the_browser_sees_a_request_and_an_error(tmp_path: Path, chromium: Browser) -> None:
    page = tmp_path / "page.html"
    page.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('no'); nothing()</script>" + json.dumps({}))
    chromium.show(page, 400)
    assert "http://127.0.0.1:9/x.png" in chromium.requests
    assert any("no" in one for one in chromium.complaints)
    assert any("nothing is not defined" in one for one in chromium.complaints)
