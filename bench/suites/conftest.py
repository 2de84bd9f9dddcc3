"""The table at the end of a run: each figure as a ratio, beside the ratio that the project has set itself. Nothing is asserted here."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Ratio:
    """One line of the table: the quotient of two medians, and at most what it is meant to be (None: shown for comparison only)."""

    what: str
    over: str
    target: float | None
    seconds: tuple[float, float]


class Ratios:
    """What a run measured, for the table at its end."""

    def __init__(self) -> None:
        self.lines: list[Ratio] = []

    def add(self, what: str, over: str, target: float | None, ours: list[float], theirs: list[float]) -> None:
        """Rounds in seconds that belong together: ours[i] was measured beside theirs[i]."""
        self.lines.append(Ratio(what, over, target, (statistics.median(ours), statistics.median(theirs))))


_ratios = pytest.StashKey[Ratios]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ratios] = Ratios()


@pytest.fixture(scope="session")
def ratios(pytestconfig: pytest.Config) -> Ratios:
    return pytestconfig.stash[_ratios]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash[_ratios].lines
    if not lines:
        return
    terminalreporter.section("ratios of medians")
    terminalreporter.write_line(f"{'':<44}{'fdpass':>10}{'other':>10}{'ratio':>8}{'target':>10}")
    for line in lines:
        ours, theirs = line.seconds
        ratio = ours / theirs
        target = "-" if line.target is None else f"<= {line.target:.2f}"
        verdict = "  missed" if line.target is not None and ratio > line.target else ""
        name = f"{line.what} / {line.over}"
        terminalreporter.write_line(f"{name:<44}{_time(ours):>10}{_time(theirs):>10}{ratio:>8.2f}{target:>10}{verdict}")


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.2f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
