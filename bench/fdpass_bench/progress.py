"""How far a long command is, and how long it will still take: a bar on a terminal, else a line for each run that has ended.
It knows what a run is expected to take, and nothing of what it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from fdpass_bench.report import console

_LONG = 60.0  # seconds, beyond which it is said ahead how long it will take
_DOUBT = 10.0  # seconds of ended runs until they count as much as what was expected: one that started slowly says little
_ALMOST = 0.95  # of a run that takes longer than expected is over at most


def about(seconds: float) -> str:
    """In as few digits as are known: "about 40 s", "about 4 min", "about 2 h 10 min"."""
    if seconds < 8:
        return "a few seconds"
    if seconds < 90:
        return f"about {5 * round(seconds / 5)} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"about {minutes} min"
    hours, minutes = divmod(5 * round(minutes / 5), 60)
    return f"about {hours} h" + (f" {minutes} min" if minutes else "")


class Estimate:
    """The time left, from what each run is expected to take, corrected by what those that have ended took. Seconds."""

    def __init__(self, expected: Sequence[float], over: int = 0, took: float = 0.0) -> None:
        """`over`: how many have ended already, and `took`: the time that these took together."""
        self._expected = expected
        self.over = over
        self._took = took

    def end(self, seconds: float) -> None:
        """The next one took so long."""
        self.over += 1
        self._took += seconds

    @property
    def correction(self) -> float:
        return (_DOUBT + self._took) / (_DOUBT + sum(self._expected[: self.over]))

    def share(self, counted: float, elapsed: float) -> float:
        """Of the run under way, how much is over: as much as was counted of it, or as its time says."""
        if self.over == len(self._expected):
            return 0.0
        return max(counted, min(_ALMOST, elapsed / max(1e-9, self._expected[self.over] * self.correction)))

    def left(self, share: float = 0.0) -> float:
        """`share`: of the run under way that is over."""
        ahead = self._expected[self.over :]
        return self.correction * (sum(ahead) - (share * ahead[0] if ahead else 0.0))


class ProgressBar:
    """Follows the runs, on stdout where that is a terminal, else on stderr.

    `ahead`: of each run, what its progress is counted against, and the seconds that it is expected to take. over, took: as Estimate's.
    what: they are called.
    """

    def __init__(self, ahead: Sequence[tuple[int, float]], over: int = 0, took: float = 0.0, what: str = "runs") -> None:
        self._ahead = ahead
        self._what = what
        self._estimate = Estimate([seconds for _, seconds in ahead], over, took)
        self._counted = 0
        self._began = time.monotonic()
        self._bar: Progress | None = None
        if sys.stdout.isatty():
            columns = (TextColumn("{task.description:<21}"), BarColumn(24), _Left(self))
            self._bar = Progress(*columns, console=console(sys.stdout), transient=True)
            self._task = self._bar.add_task("", total=sum(seconds for _, seconds in ahead))
            self._move()

    @property
    def left(self) -> str:
        """ "3/24, about 4 min left"."""
        return f"{self._estimate.over}/{len(self._ahead)}, {about(self._estimate.left(self._share))} left"

    def __enter__(self) -> ProgressBar:
        over, left, runs = self._estimate.over, self._estimate.left(), len(self._ahead)
        if over == runs:
            print(f"All {runs} {self._what} are measured.", file=sys.stderr, flush=True)
        elif over:
            print(f"{over} of {runs} {self._what} are measured; the others take {about(left)}.", file=sys.stderr, flush=True)
        elif left > _LONG:
            print(f"This takes {about(left)}: {runs} {self._what}.", file=sys.stderr, flush=True)
        self._began = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def follow(self, title: str) -> Callable[[int], None]:
        """Begins the next run; what is returned is told how much of its count is over."""
        if self._bar is not None:
            self._bar.update(self._task, description=title)
        return self._ended

    def over(self, line: str) -> None:
        """The run has ended."""
        now = time.monotonic()
        self._estimate.end(now - self._began)
        self._began = now
        self._ended(0)
        if self._bar is None:
            over, runs = self._estimate.over, len(self._ahead)
            left = f"; {about(self._estimate.left())} left" if over < runs else ""
            print(f"{over}/{runs} {line}{left}", file=sys.stderr, flush=True)

    def _ended(self, counted: int) -> None:
        self._counted = counted
        self._move()

    @property
    def _share(self) -> float:
        over = self._estimate.over
        counted = min(1.0, self._counted / self._ahead[over][0]) if over < len(self._ahead) else 0.0
        return self._estimate.share(counted, time.monotonic() - self._began)

    def _move(self) -> None:
        if self._bar is not None:
            over = self._estimate.over
            ahead = self._ahead[over][1] if over < len(self._ahead) else 0.0
            self._bar.update(self._task, completed=sum(seconds for _, seconds in self._ahead[:over]) + self._share * ahead)


class _Left(ProgressColumn):
    """The time left, as it passes."""

    def __init__(self, bar: ProgressBar) -> None:
        super().__init__()
        self._of = bar

    def render(self, task: Task) -> Text:
        return Text(self._of.left)
