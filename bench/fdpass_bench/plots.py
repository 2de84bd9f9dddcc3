"""The pictures of a page: matplotlib draws them as SVG, and their colours become the page's own, so that they follow it into the dark.
Each has a title, units on its axes and a legend, and is drawn twice: for a wide page and for a phone."""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from fdpass_bench.compare import Comparison
from fdpass_bench.records import Section, condition_of, place_on
from fdpass_bench.tables import WHAT, figure, paid, unit_of

# Building the cache of fonts, once, is nobody's news.
logging.getLogger("matplotlib").setLevel(logging.ERROR)

#: Okabe and Ito's colours, which differ for every kind of colour blindness, in an order that differs in lightness as well; the page has
#: them as --c0, --c1 ... and lighter ones in the dark. Each comes with a marker and a dash of its own, so that nothing hangs on colour.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d31")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (1.5, 1)),
    (0, (5, 1.5, 1, 1.5)),
    (0, (8, 2)),
    (0, (3, 1)),
    (0, (1, 1.8)),
    (0, (8, 1, 1, 1)),
)
# No dots or rings: each is a curve, and a page of them has megabytes.
_HATCHES = ("", "////", "\\\\\\\\", "xxxx", "----", "++++", "||||", "//")
#: Begins each id: a page replaces it by what no other picture has.
OWN = "PICTURE-"
#: Stand-ins: what matplotlib is given, and what the page puts there.
_INK, _FAINT, _GRID, _PAPER = "#010203", "#040506", "#070809", "#0a0b0c"
_VARIABLES = {_INK: "--ink", _FAINT: "--faint", _GRID: "--grid", _PAPER: "--paper"} | {
    colour: f"--c{number}" for number, colour in enumerate(COLOURS)
}

_STYLE: Any = {
    "svg.hashsalt": "fdpass",  # the same figures are the same picture
    "svg.fonttype": "none",  # text stays text: small, sharp, to be searched and read aloud
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.parse_math": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
    "hatch.linewidth": 0.8,
    "hatch.color": _PAPER,
}
_WIDE, _NARROW = 7.6, 3.9  # inches; a point is a pixel of the page
_FIRST = 20.0  # percentile: below, a log axis would show little else
_MANY_SERVERS = 3  # more names do not stand beside each other on a phone
_MANY_WORKERS = 8  # more lines than that say nothing
_PERCENTILES = (50.0, 90.0, 99.0, 99.9, 99.99)
_Run = Mapping[str, Any]


@dataclass(frozen=True)
class Plot:
    """`svgs`: wide, narrow; or a small one for both. caption: how to read it. alt: in words, for who does not see it."""

    svgs: tuple[str, ...]
    title: str
    caption: str
    alt: str


def _plot(
    title: str, caption: str, alt: str, height: float, draw: Callable[[Figure, bool], None], narrow_height: float = 0.0, small: bool = False
) -> Plot:
    """draw(figure, narrow). small: the narrow one alone."""
    svgs = []
    for narrow in (True,) if small else (False, True):
        with matplotlib.rc_context(_STYLE):
            drawn = Figure(
                figsize=(_NARROW if narrow else _WIDE, (narrow_height or height * 0.95) if narrow else height), layout="constrained"
            )
            draw(drawn, narrow)
            text = _wrapped(title, 42 if narrow else 72)
            drawn.suptitle(text, x=0.01, ha="left", fontsize=11 if narrow else 12, fontweight="bold")
            written = io.StringIO()
            drawn.savefig(written, format="svg", transparent=True, metadata={"Date": None})
        svgs.append(_for_the_page(written.getvalue(), title, alt))
    return Plot(tuple(svgs), title, caption, alt)


def _for_the_page(svg: str, title: str, alt: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    # Two pictures of one page must not have the same ids: a clip of one that is not shown would cut the other.
    svg = re.sub(r'\bid="', f'id="{OWN}', svg)
    svg = re.sub(r'href="#', f'href="#{OWN}', svg)
    svg = re.sub(r"url\(#", f"url(#{OWN}", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"(font(?:-family)?: [^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1var(--font)", svg)
    head, _, rest = svg.partition(">")
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    label = _escaped(f"{title}. {alt}")
    return f'{head} role="img" aria-label="{label}">{_shortened(rest)}'


def _shortened(svg: str) -> str:
    """The same to the eye in half the bytes: a tenth of a pixel is enough, and only what something refers to, or a legend, needs a name."""
    svg = re.sub(r"\s+", " ", svg).replace("> <", "><")
    needed = set(re.findall(r"#([^\")]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in needed or "legend" in found[1] else "", svg)
    svg = re.sub(r'(?<= )(x|y|transform)="[^"]*"', lambda found: re.sub(r"(\.\d)\d+", r"\1", found[0]), svg)
    svg = re.sub(r' transform="rotate\(-?0 [^"]*"', "", svg)
    return re.sub(r' d="([^"]*)"', lambda found: f' d="{_path(found[1])}"', svg)


def _path(d: str) -> str:
    """A path of lines; one with curves, as of a marker, stays in hundredths."""
    if re.search("[CQ]", d):
        return re.sub(r"(\.\d\d)\d+", r"\1", d).strip()
    found, at, before = "", ("", ""), ""
    for command, x, y in re.findall(r"([MLz]) ?(?:([-\d.e]+) ([-\d.e]+))?", d):
        if command == "z":
            found, before = found + "z", "z"
            continue
        here = tuple(f"{float(one):.1f}".removesuffix(".0") for one in (x, y))
        if command == "L" and here == at:
            continue
        # Along an axis one number is enough, and a command need not be said again.
        word, rest = ("V", here[1:]) if here[0] == at[0] else ("H", here[:1]) if here[1] == at[1] else (command, here)
        if command == "M":
            word, rest = "M", here
        found += (" " if word == before != "M" else word) + " ".join(rest)
        at, before = (here[0], here[1]), word
    return found


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def _legend(drawn: Figure, labelled: Mapping[str, Any], narrow: bool) -> None:
    """Below the axes, in as many columns as have room. A point is a pixel; a letter of this size has about 5.8, and its handle 52."""
    room = (_NARROW if narrow else _WIDE) * 72
    columns = max(1, int(room / (52 + 5.8 * max(map(len, labelled), default=0))))
    handles, labels = list(labelled.values()), list(labelled)
    drawn.legend(handles, labels, loc="outside lower left", ncols=min(columns, len(labels)), handlelength=3.0, columnspacing=1.5)


def _labelled(axes: Axes) -> dict[str, Any]:
    handles, labels = axes.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


def _wrapped(text: str, width: int) -> str:
    lines: list[str] = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return "\n".join(lines)


def _log(axes: Axes, which: str) -> None:
    """A log axis with plain numbers, and more of them where it spans few decades."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    decades = math.log10(max(high, 1e-12) / max(low, 1e-12))
    few = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])
    axis.set_major_locator(few if decades < 0.9 else LogLocator(10, subs=(1, 2, 5) if decades < 2.6 else (1,), numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}k" if value >= 10000 else f"{value:g}"))


def _name(run: _Run) -> str:
    return str(run["strategy"]) + (" (INVALID)" if run.get("valid") is False else "")


def _faint(run: _Run) -> float:
    """How much ink a run gets."""
    return 0.45 if run.get("valid") is False else 1.0


# -------------------------------------------------------------------------------- latency


def latency_curves(runs: Sequence[_Run], colours: Mapping[str, int], small: bool = False) -> Plot | None:
    """Of runs under the same conditions; theory dashed beside each, and the bound of one queue. small: one picture, for every width."""
    drawn = [run for run in runs if (run.get("latency_curve") or {}).get("ms")]
    if not drawn:
        return None

    def place(percentile: float) -> float:
        return -math.log10(max(1 - percentile / 100, 1e-6))

    # Of an INVALID one only where there is no other.
    known_first = sorted(drawn, key=lambda run: run.get("valid") is False)
    bound = next((theory for run in known_first if (theory := (run.get("theory") or {}).get("latency_curve"))), None)

    def draw(picture: Figure, narrow: bool) -> None:
        axes = picture.subplots()
        furthest, theories = 1.0, {}
        for run in drawn:
            curve, number = run["latency_curve"], colours[str(run["strategy"])] % len(COLOURS)
            points = [(place(p), ms) for p, ms in zip(curve["percentile"], curve["ms"], strict=False) if p >= _FIRST and ms > 0]
            if not points:
                continue
            furthest = max(furthest, points[-1][0])
            faint = _faint(run)
            axes.plot(
                *zip(*points, strict=True),
                color=COLOURS[number],
                marker=_MARKERS[number],
                markersize=4.5,
                markevery=(number % 3, 3),
                alpha=faint,
                label=_name(run),
                zorder=3,
            )
            theory = (run.get("theory") or {}).get("latency_curve")
            if theory:
                axes.plot(
                    *_from_first(theory, "ms", place),
                    color=COLOURS[number],
                    linestyle=(0, (4, 2)),
                    linewidth=1.3,
                    alpha=0.85 * faint,
                )
                theories["theory, in the server's colour"] = _theory_key()
        if bound and not all((run.get("theory") or {}).get("discipline") == "one queue" for run in drawn if run.get("theory")):
            axes.plot(
                *_from_first(bound, "one_queue_ms", place),
                color=_FAINT,
                linestyle=(0, (1, 1.5)),
                linewidth=1.5,
                label="bound: one queue for all workers",
            )
        shown = [p for p in _PERCENTILES if place(p) <= furthest + 0.01]
        axes.xaxis.set_major_locator(FixedLocator([place(p) for p in shown]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * (1 - 10**-value):.6g}"))
        axes.set_xlim(place(_FIRST), furthest)
        axes.set_xlabel("percentile of requests (%)")
        axes.set_ylabel("latency (ms, log axis)")
        _log(axes, "y")
        _legend(picture, _labelled(axes) | theories, narrow)

    known = [(_name(run), run.get("latency_ms") or {}) for run in drawn]
    said = "; ".join(f"{name}: median {figure(latency.get('p50'))} ms, p99 {figure(latency.get('p99'))} ms" for name, latency in known)
    queues = [f"{run['strategy']}: {run['theory'].get('discipline')}" for run in drawn if (run.get("theory") or {}).get("latency_curve")]
    caption = (
        "Lower is better. So many per cent of the requests took no longer. The axis stretches the slowest: every step from 90 to "
        "99 to 99.9 is as wide. Dashed: how long they would take by queueing theory, with the times these workers were occupied "
        f"({', '.join(queues)})."
        if bound
        else "Lower is better. Each point: so many per cent of the requests took no longer. The axis stretches the slowest."
    )
    return _plot(f"Latency: {condition_of(drawn[0])}", caption, said, 4.6, draw, 5.0, small)


def _from_first(curve: Mapping[str, Any], values: str, place: Callable[[float], float]) -> tuple[list[float], list[float]]:
    points = [(place(p), ms) for p, ms in zip(curve["percentile"], curve.get(values) or [], strict=False) if p >= _FIRST]
    return [x for x, _ in points], [y for _, y in points]


def sweep(section: Section, colours: Mapping[str, int]) -> Plot | None:
    """Mean and p99 latency, or of `stall` the share delayed, by the axis of a sweep, with theory where it is known.

    What is INVALID is hollow and crossed out, and no line goes through it."""
    by_server: dict[str, list[_Run]] = {}
    for run in section.runs:
        by_server.setdefault(str(run["strategy"]), []).append(run)
    shown = next((panels for panels in _SWEPT if any(value(run) is not None for run in section.runs for _, value, *_ in panels)), None)
    axis = section.axis
    if axis is None or axis == "cell" or shown is None:
        return None

    def draw(picture: Figure, narrow: bool) -> None:
        panels = picture.subplots(*((len(shown), 1) if narrow else (1, len(shown))), sharex=True, squeeze=False).flatten()
        used: dict[str, Any] = {}
        for axes, (name, value, interval, theory) in zip(panels, shown, strict=True):
            bound_of: dict[float, float] = {}
            for server, runs in by_server.items():
                number = colours[server] % len(COLOURS)
                at = [place_on(axis, run) for run in runs]
                _swept(axes, at, runs, number, (value, interval), server, used)
                known = [(x, one) for x, run in zip(at, runs, strict=True) if run.get("valid") is not False for one in [theory(run)]]
                predicted = [(x, found) for x, (found, _) in known if found is not None]
                bound_of |= {x: bound for x, (_, bound) in known if bound is not None and x not in bound_of}
                if predicted:
                    axes.plot(*zip(*predicted, strict=True), color=COLOURS[number], linestyle=(0, (4, 2)), linewidth=1.3, alpha=0.85)
                    used.setdefault("theory, in the server's colour", _theory_key())
            disciplines = {(run.get("theory") or {}).get("discipline") for run in section.runs if run.get("theory")}
            if bound_of and disciplines != {"one queue"}:
                (handle,) = axes.plot(*zip(*sorted(bound_of.items()), strict=True), color=_FAINT, linestyle=(0, (1, 1.5)), linewidth=1.5)
                used.setdefault("split queues: 1/k" if shown is _STALLED else "bound: one queue for all workers", handle)
            axes.set_ylabel(name)
            if axis == "workers":
                axes.set_xscale("log", base=2)
            places = sorted({place_on(axis, run) for run in section.runs})
            axes.xaxis.set_major_locator(FixedLocator(places))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda place, _: f"{place:.3g}"))
            if "log" in name:
                _log(axes, "y")
            else:
                axes.set_ylim(bottom=0)
        for axes in panels if not narrow else panels[-1:]:
            axes.set_xlabel(_AXES[axis])
        last = [name for name in used if name not in by_server]
        _legend(
            picture, {name: used[name] for name in [*(name for name in by_server if name in used), *sorted(last, reverse=True)]}, narrow
        )

    value = shown[0][1]
    several = " and ".join(one[0].partition(" (")[0] for one in shown)
    invalid = any(run.get("valid") is False for run in section.runs)
    caption = "Lower is better. Bars: the 95 % interval of the mean. " if shown is _TIMED else "Lower is better. "
    caption += "Of those that arrived while a worker was frozen. Dotted: what is stranded where each worker has a queue. " * (
        shown is _STALLED
    )
    if any(run.get("theory") for run in section.runs):
        caption += "Dashed: queueing theory, with the times these workers were occupied. "
    caption += "Hollow and crossed: INVALID, and no line goes through it." if invalid else ""
    said = "; ".join(
        f"{server}: "
        + ", ".join(f"{figure(value(run))} at {section.place_of([run])}" + _invalid(run) for run in runs if value(run) is not None)
        for server, runs in by_server.items()
    )
    return _plot(f"{several[:1].upper()}{several[1:]} by {axis}", caption.strip(), said, 3.9, draw, 2.0 + 2.4 * len(shown))


_AXES = {"load": "load (share of what they can do)", "rate": "rate (connections per second)", "workers": "workers (processes, log axis)"}


def _invalid(run: _Run) -> str:
    return " (INVALID)" if run.get("valid") is False else ""


def _theory_key() -> Line2D:
    return Line2D([], [], color=_INK, linestyle=(0, (4, 2)), linewidth=1.3)


def _swept(
    axes: Axes,
    at: Sequence[float],
    runs: Sequence[_Run],
    number: int,
    of: tuple[Callable[[_Run], float | None], Callable[[_Run], Sequence[float] | None]],
    label: str,
    used: dict[str, Any],
) -> None:
    """One server's points: those that are valid joined where nothing INVALID lies between them."""
    value, interval = of
    values = [value(run) for run in runs]
    valid = [found is not None and run.get("valid") is not False for run, found in zip(runs, values, strict=True)]
    nothing = math.nan
    line = [found if good and found is not None else nothing for found, good in zip(values, valid, strict=True)]
    style: dict[str, Any] = {"color": COLOURS[number], "marker": _MARKERS[number], "markersize": 5.5}
    (handle,) = axes.plot(at, line, **style, label=label, zorder=3)
    used.setdefault(label, handle)
    for x, run, found, good in zip(at, runs, values, valid, strict=True):
        ends = interval(run)
        if good and found is not None and ends and len(ends) == 2:
            axes.errorbar([x], [found], yerr=[[max(0.0, found - ends[0])], [max(0.0, ends[1] - found)]], color=COLOURS[number], capsize=3)
        if found is not None and not good:
            _cross_out(axes, x, found, number, used)


def _cross_out(axes: Axes, x: float, y: float, number: int, used: dict[str, Any]) -> None:
    """A value of an INVALID run."""
    axes.plot(
        [x], [y], linestyle="none", color=COLOURS[number], marker=_MARKERS[number], markersize=6.5, markerfacecolor=_PAPER,
        markeredgewidth=1.4, zorder=4,
    )  # fmt: skip
    (cross,) = axes.plot([x], [y], linestyle="none", color=_INK, marker="x", markersize=9, markeredgewidth=1.1, zorder=5)
    used.setdefault("INVALID", cross)


def _latency(name: str) -> Callable[[_Run], float | None]:
    def value(run: _Run) -> float | None:
        return (run.get("latency_ms") or {}).get(name) or None

    return value


def _predicted(name: str) -> Callable[[_Run], tuple[float | None, float | None]]:
    def value(run: _Run) -> tuple[float | None, float | None]:
        theory = run.get("theory") or {}
        return (theory.get("latency_ms") or {}).get(name) or None, (theory.get("one_queue_ms") or {}).get(name) or None

    return value


def _hundred(share: float | None) -> float | None:
    return None if share is None else 100 * share


#: The panels of a sweep: what its axis says, a run's value, its interval, and what theory says of it and of the bound.
_Panel = tuple[
    str,
    Callable[[_Run], float | None],
    Callable[[_Run], Sequence[float] | None],
    Callable[[_Run], tuple[float | None, float | None]],
]
_TIMED: Sequence[_Panel] = (
    ("mean latency (ms, log axis)", _latency("mean"), lambda run: (run.get("ci") or {}).get("mean_ms"), _predicted("mean")),
    ("p99 latency (ms, log axis)", _latency("p99"), lambda run: None, _predicted("p99")),
)
_STALLED: Sequence[_Panel] = (
    (
        "share delayed (%)",
        lambda run: _hundred(run.get("delayed_share")),
        lambda run: None,
        lambda run: (None, _hundred(run.get("delayed_share_split"))),
    ),
)
_SHARED: Sequence[_Panel] = (
    ("largest share over the mean (ratio)", lambda run: run.get("max_over_mean"), lambda run: None, lambda run: (None, None)),
)
_SWEPT = (_TIMED, _STALLED, _SHARED)


def cells(section: Section, colours: Mapping[str, int]) -> Plot | None:
    """Small multiples of a matrix: mean with its interval, p99, theory, for each server in each case at each load."""
    timed = [run for run in section.runs if _latency("mean")(run)]
    if section.axis != "cell" or not timed:
        return None
    cases = list(dict.fromkeys(str(run["case"]) for run in section.runs))
    levels = list(dict.fromkeys(str(run.get("level") or "-") for run in section.runs))
    servers = [name for name in colours if any(run["strategy"] == name for run in section.runs)]

    def draw(picture: Figure, narrow: bool) -> None:
        grid = picture.subplots(len(cases), len(levels), sharex=True, sharey="row", squeeze=False)
        used: dict[str, Any] = {}
        for row, case in enumerate(cases):
            for column, level in enumerate(levels):
                axes = grid[row][column]
                here = [run for run in timed if run["case"] == case and str(run.get("level") or "-") == level]
                for run in here:
                    _in_a_cell(axes, servers.index(str(run["strategy"])), run, colours[str(run["strategy"])] % len(COLOURS), used)
                axes.set_xlim(-0.7, len(servers) - 0.3)
                axes.set_xticks([])
                axes.grid(False, axis="x")
                if not row:
                    load = next((run.get("load") for run in here), None)
                    axes.set_title(
                        level + ("" if load is None else f"{chr(10) if narrow else ', '}load {load:.2g}"), fontsize=9 if narrow else 10
                    )
                if not column:
                    axes.set_ylabel(_wrapped(case.replace("-", " "), 6) if narrow else case, fontsize=9 if narrow else 10)
            _log(grid[row][0], "y")
            for axes in grid[row][1:]:
                axes.tick_params(axis="y", length=0)
        picture.supylabel("latency (ms, log axis)", fontsize=9 if narrow else 10)
        order = [*servers, "99th percentile", "theory: mean", "INVALID"]
        _legend(picture, {name: used[name] for name in order if name in used}, narrow)

    caption = (
        "Lower is better; each row has an axis of its own, and the servers stand in the order of the legend. "
        "The mark is the mean with its 95 % interval, the line ends at the 99th percentile. "
        "The short line across is the mean by queueing theory, where the server's way of queueing is known."
    )
    if any(run.get("valid") is False for run in timed):
        caption += " Hollow and crossed: INVALID."
    said = "; ".join(
        f"{run['case']}, {run.get('level')}, {run['strategy']}: "
        f"mean {figure(_latency('mean')(run))} ms, p99 {figure(_latency('p99')(run))} ms" + _invalid(run)
        for run in timed
    )
    return _plot("Mean and p99 latency of each case at each load", caption, said, 1.4 + 1.75 * len(cases), draw, 2.2 + 1.5 * len(cases))


def _in_a_cell(axes: Axes, x: float, run: _Run, number: int, used: dict[str, Any]) -> None:
    colour, mean, tail = COLOURS[number], _latency("mean")(run) or 0.0, _latency("p99")(run)
    valid = run.get("valid") is not False
    if tail:
        axes.plot([x, x], [mean, tail], color=colour, linewidth=1.2, alpha=1.0 if valid else 0.5)
        axes.plot([x], [tail], color=colour, marker="_", markersize=8, markeredgewidth=1.5, linestyle="none", alpha=1.0 if valid else 0.5)
        used.setdefault("99th percentile", Line2D([], [], color=_INK, marker="_", markersize=8, markeredgewidth=1.5, linestyle="none"))
    if not valid:
        _cross_out(axes, x, mean, number, used)
    else:
        (predicted, _) = _predicted("mean")(run)
        if predicted:
            axes.plot([x - 0.38, x + 0.38], [predicted, predicted], color=_INK, linewidth=1.2, zorder=2)
            used.setdefault("theory: mean", Line2D([], [], color=_INK, linewidth=1.2))
        ends = (run.get("ci") or {}).get("mean_ms")
        if ends and len(ends) == 2:
            spread = [[max(0.0, mean - ends[0])], [max(0.0, ends[1] - mean)]]
            axes.errorbar([x], [mean], yerr=spread, color=colour, capsize=3, linestyle="none")
        axes.plot([x], [mean], color=colour, marker=_MARKERS[number], markersize=5.5, linestyle="none", zorder=3)
    key = Line2D([], [], color=colour, marker=_MARKERS[number], markersize=5.5, linewidth=1.2)
    used.setdefault(str(run["strategy"]), key)


# -------------------------------------------------------------------------------- workers


def per_worker(runs: Sequence[_Run], colours: Mapping[str, int], what: str = "connections") -> Plot | None:
    """Bars: how many connections (or requests) each worker got, beside an even share."""
    key = "per_worker" if what == "connections" else "requests_per_worker"
    drawn = [run for run in runs if run.get(key)]
    if not drawn:
        return None
    title = f"{what.capitalize()} per worker: {condition_of(drawn[0])}"
    crowded = len(drawn) > _MANY_SERVERS

    def draw(picture: Figure, narrow: bool) -> None:
        axes = picture.subplots()
        at, middles = 0.0, []
        for run in drawn:
            counts, number = run[key], colours[str(run["strategy"])] % len(COLOURS)
            places = [at + place for place in range(len(counts))]
            faint = _faint(run)
            axes.bar(places, counts, width=0.86, color=COLOURS[number], hatch=_HATCHES[number], label=_name(run), alpha=faint, zorder=2)
            mean = sum(counts) / len(counts)
            axes.plot(
                [places[0] - 0.6, places[-1] + 0.6],
                [mean, mean],
                color=_INK,
                linewidth=1.4,
                linestyle=(0, (4, 2)),
                label="even share" if run is drawn[-1] else None,
                zorder=3,
            )
            ratio = run.get("max_over_mean" if what == "connections" else "requests_max_over_mean")
            if crowded and narrow:
                middles.append(((places[0] + places[-1]) / 2, "" if ratio is None else f"{ratio:.2f}"))
            else:
                below = "" if ratio is None else f"max/mean {ratio:.2f}"
                text = f"{_wrapped(_name(run), 12)}\n{_wrapped(below, 9) if narrow else below}"
                middles.append(((places[0] + places[-1]) / 2, text.rstrip()))
            at = places[-1] + 2.2
        axes.xaxis.set_major_locator(FixedLocator([place for place, _ in middles]))
        axes.set_xticklabels([label for _, label in middles], fontsize=8.5 if narrow else 9.5)
        axes.grid(False, axis="x")
        axes.tick_params(axis="x", length=0)
        axes.set_xlabel("worker (one bar each); below: max/mean" if crowded and narrow else "worker (one bar each, by server)")
        axes.set_ylabel(f"{what} (number)")
        axes.set_ylim(bottom=0)
        _legend(picture, _labelled(axes), narrow)

    said = "; ".join(f"{_name(run)}: {min(run[key])} to {max(run[key])}" for run in drawn)
    caption = "Evener is better. Under each server the largest share over the mean: 1.00 is perfectly even."
    return _plot(title, caption, said, 3.3, draw, 3.4 + 0.15 * len(drawn))


_MARKS = {
    "kill": ("X", "killed"),
    "stall": ("s", "stalled"),
    "restart": ("P", "started again"),
    "roll": (">", "replaced"),
    "resume": ("o", "goes on"),
}


def over_time(runs: Sequence[_Run], colours: Mapping[str, int]) -> Plot | None:
    """What each worker took in each bin of time, of the first repeat that has a series; kills and stalls marked."""
    drawn = [(run, _without_the_end(run["series"][0])) for run in runs if run.get("series")]
    drawn = [(run, series) for run, series in drawn if any(map(sum, series["per_worker"]))]
    if not drawn:
        return None
    kept = any((run.get("requests_per_connection") or 1) > 1 for run, _ in drawn)
    what = "requests" if kept else "connections"
    title = f"{what.capitalize()} over time: {condition_of(drawn[0][0])}"

    def draw(picture: Figure, narrow: bool) -> None:
        panels = picture.subplots(len(drawn), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        used: dict[str, Any] = {}
        for axes, (run, series) in zip(panels, drawn, strict=True):
            width, counts = float(series.get("bin_seconds") or 1.0), series["per_worker"]
            if len(counts) <= _MANY_WORKERS:
                for worker, line in enumerate(counts):
                    (handle,) = axes.step(
                        [place * width for place in range(len(line) + 1)],
                        [one / width for one in [*line, line[-1]]],
                        where="post",
                        color=COLOURS[worker % len(COLOURS)],
                        linestyle=_DASHES[worker % len(_DASHES)],
                        linewidth=1.3,
                    )
                    used.setdefault(f"worker {worker}", handle)
            else:
                columns = list(zip(*counts, strict=False))
                at = [(place + 0.5) * width for place in range(len(columns))]
                number = colours[str(run["strategy"])] % len(COLOURS)
                band = axes.fill_between(
                    at, [min(c) / width for c in columns], [max(c) / width for c in columns], color=COLOURS[number], alpha=0.25, linewidth=0
                )
                (line_of_mean,) = axes.plot(at, [sum(c) / len(c) / width for c in columns], color=COLOURS[number])
                used.setdefault("busiest to idlest worker", band)
                used.setdefault("mean of the workers", line_of_mean)
            _mark_events(axes, run, series, used)
            axes.set_ylabel("per second" if len(drawn) > 1 else f"{what} (per second)")
            axes.set_ylim(bottom=0)
            axes.annotate(_name(run), (0, 1), xytext=(2, 3), xycoords="axes fraction", textcoords="offset points", fontsize=10, va="bottom")
        panels[-1].set_xlabel("time since the first was due (s)")
        panels[-1].set_xlim(left=0)
        if len(drawn) > 1:
            picture.supylabel(f"{what} of each worker (per second)", fontsize=10)
            for axes in panels:
                axes.set_ylabel("")
        _legend(picture, used, narrow)

    events = sum(len(run.get("events") or []) for run, _ in drawn)
    repeats = max(len(run["series"]) for run, _ in drawn)
    caption = (f"The first of {repeats} repeats. " if repeats > 1 else "") + "Lines that run together are workers that get the same."
    caption += " Marks on the time axis: what was done to a worker." if events else ""
    said = f"{len(drawn)} servers, {events} events" if events else f"{len(drawn)} servers"
    return _plot(title, caption, said, 1.2 + 1.55 * len(drawn), draw, 2.6 + 1.55 * len(drawn))


def _without_the_end(series: Mapping[str, Any]) -> dict[str, Any]:
    """Without the last bins, of which the schedule filled only a part or nothing."""
    counts = series.get("per_worker") or []
    totals = [sum(column) for column in zip(*counts, strict=False)]
    usual = sorted(totals)[len(totals) // 2] if totals else 0
    bins = len(totals)
    while bins > 2 and totals[bins - 1] < 0.75 * usual and bins > len(totals) - 3:
        bins -= 1
    return {**series, "per_worker": [line[:bins] for line in counts]}


def _mark_events(axes: Axes, run: _Run, series: Mapping[str, Any], used: dict[str, Any]) -> None:
    for event in run.get("events") or []:
        if event.get("at_seconds") is None or (event.get("repeat") or 1) != (series.get("repeat") or 1):
            continue
        what = str(event.get("what") or "event")
        marker, word = _MARKS.get(what, ("d", what))
        at, until = event["at_seconds"], event.get("until_seconds")
        axes.axvline(at, color=_INK, linewidth=0.9, linestyle=(0, (1, 2)))
        if until is not None:
            used.setdefault(f"a worker {word}, how long", axes.axvspan(at, until, color=_FAINT, alpha=0.22, linewidth=0))
        (handle,) = axes.plot([at], [0], marker=marker, color=_INK, markersize=7, linestyle="none", clip_on=False, zorder=5)
        used.setdefault(f"a worker {word}", handle)
        if event.get("worker") is not None:
            axes.annotate(str(event["worker"]), (at, 0), xytext=(4, 4), textcoords="offset points", fontsize=8)


_OUTCOME_COLOURS = {"ok": 2, "refused": 4, "reset": 1, "timeout": 3, "bad_answer": 6, "no_port": 5, "no_descriptor": 7}


def outcomes(runs: Sequence[_Run]) -> Plot | None:
    """How connections or requests ended, as shares; None where all was answered."""
    drawn = [run for run in runs if sum((run.get("outcomes") or {}).values())]
    if not any(count for run in drawn for name, count in run["outcomes"].items() if name != "ok"):
        return None
    names = [name for name in drawn[0]["outcomes"] if any(run["outcomes"].get(name) for run in drawn)]
    title = f"How they ended: {condition_of(drawn[0])}"

    def draw(picture: Figure, narrow: bool) -> None:
        axes = picture.subplots()
        rows = list(range(len(drawn)))[::-1]
        left = [0.0] * len(drawn)
        for name in names:
            number = _OUTCOME_COLOURS.get(name, 5)
            shares = [100 * run["outcomes"].get(name, 0) / sum(run["outcomes"].values()) for run in drawn]
            hatch = "" if name == "ok" else _HATCHES[1 + names.index(name) % 7]
            bars = axes.barh(rows, shares, left=left, height=0.62, color=COLOURS[number], hatch=hatch, label=name.replace("_", " "))
            for bar, run in zip(bars, drawn, strict=True):
                bar.set_alpha(_faint(run))
            for row, start, share, run in zip(rows, left, shares, drawn, strict=True):
                if share > (16 if narrow else 7):
                    axes.text(
                        start + share / 2, row, str(run["outcomes"][name]), ha="center", va="center", color=_INK, fontsize=9,
                        bbox={"facecolor": _PAPER, "edgecolor": "none", "boxstyle": "round,pad=0.2"},
                    )  # fmt: skip
            left = [start + share for start, share in zip(left, shares, strict=True)]
        axes.set_yticks(rows, [_wrapped(_name(run), 14) if narrow else _name(run) for run in drawn])
        axes.grid(False, axis="y")
        axes.set_xlim(0, 100)
        kept = any((run.get("requests_per_connection") or 1) > 1 for run in drawn)
        axes.set_xlabel(f"share of all {'requests' if kept else 'connections'} (%)")
        axes.set_ylabel("server")
        _legend(picture, _labelled(axes), narrow)

    said = "; ".join(f"{_name(run)}: " + ", ".join(f"{run['outcomes'][name]} {name}" for name in names) for run in drawn)
    caption = "Reset: cut off before the answer was whole. Refused: no connection came about. Timeout: given up."
    return _plot(title, caption, said, 1.5 + 0.45 * len(drawn), draw, 1.9 + 0.5 * len(drawn))


def stranded(runs: Sequence[_Run], colours: Mapping[str, int]) -> Plot | None:
    """Of `stall`: the share of what arrived while a worker was frozen that had to wait for it, beside the share that k queues strand."""
    drawn = [run for run in runs if run.get("delayed_share") is not None]
    if not drawn:
        return None
    title = f"Delayed while a worker was frozen: {condition_of(drawn[0])}"
    split = next((run["delayed_share_split"] for run in drawn if run.get("delayed_share_split") is not None), None)

    def draw(picture: Figure, narrow: bool) -> None:
        axes = picture.subplots()
        for place, run in enumerate(reversed(drawn)):
            number = colours[str(run["strategy"])] % len(COLOURS)
            axes.barh(
                [place], [100 * run["delayed_share"]], height=0.6, color=COLOURS[number], hatch=_HATCHES[number], alpha=_faint(run),
                label=_name(run),
            )  # fmt: skip
            axes.annotate(
                f"{100 * run['delayed_share']:.1f}",
                (100 * run["delayed_share"], place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
            )
        if split is not None:
            axes.axvline(100 * split, color=_INK, linewidth=1.3, linestyle=(0, (4, 2)), label="split queues: 1/k")
        axes.set_yticks(range(len(drawn)), [_wrapped(_name(run), 14) if narrow else _name(run) for run in reversed(drawn)])
        axes.grid(False, axis="y")
        axes.set_xlim(0, max(5.0, *(112 * run["delayed_share"] for run in drawn), 112 * (split or 0)))
        axes.set_xlabel("share of those that arrived then (%)")
        axes.set_ylabel("" if narrow else "server")
        _legend(picture, _labelled(axes), narrow)

    said = "; ".join(f"{_name(run)}: {run['delayed_share']:.1%}" for run in drawn)
    caption = "Lower is better. Dashed: what is stranded where each worker has a queue of its own, and a hash chooses."
    return _plot(title, caption, said, 1.6 + 0.42 * len(drawn), draw, 2.1 + 0.5 * len(drawn))


def scaling(runs: Sequence[_Run], colours: Mapping[str, int]) -> Plot | None:
    """Of `scale-out`: connections per second by the number of workers."""
    drawn = [(run, [step for step in run.get("steps") or [] if step.get("workers") and step.get("connections_per_s")]) for run in runs]
    drawn = [(run, steps) for run, steps in drawn if len(steps) > 1]
    if not drawn:
        return None
    title = f"Throughput by workers: {drawn[0][0]['scenario']}"

    def draw(picture: Figure, narrow: bool) -> None:
        axes = picture.subplots()
        for run, steps in drawn:
            number = colours[str(run["strategy"])] % len(COLOURS)
            at = [(step["workers"], step["connections_per_s"]) for step in steps]
            # No line goes through what is INVALID.
            axes.plot(
                *zip(*at, strict=True), color=COLOURS[number], marker=_MARKERS[number], alpha=_faint(run), label=_name(run),
                linestyle="none" if run.get("valid") is False else _DASHES[number],
            )  # fmt: skip
        first = next((steps for run, steps in drawn if run.get("valid") is not False), drawn[0][1])[0]
        ends = [first["workers"], max(step["workers"] for _, steps in drawn for step in steps)]
        each = first["connections_per_s"] / first["workers"]
        axes.plot(ends, [each * count for count in ends], color=_FAINT, linestyle=(0, (1, 1.5)), label="as many times as workers")
        axes.set_xlabel("workers (number of processes)")
        axes.set_ylabel("connections (per second, log axis)")
        _log(axes, "x")
        _log(axes, "y")
        axes.xaxis.set_major_locator(FixedLocator(sorted({step["workers"] for _, steps in drawn for step in steps})))
        _legend(picture, _labelled(axes), narrow)

    said = "; ".join(
        f"{_name(run)}: " + ", ".join(f"{figure(s['connections_per_s'])} with {s['workers']}" for s in steps) for run, steps in drawn
    )
    return _plot(title, "Higher is better. Dotted: in proportion to the workers.", said, 4.0, draw, 4.4)


# -------------------------------------------------------------------------------- prices


def times_faster(rows: Sequence[Mapping[str, Any]]) -> Plot | None:
    """fdpass over what it is compared with, with intervals."""
    drawn = [row for row in rows if row.get("times_faster") and row.get("other") and row.get("valid") is not False]
    drawn = [row for row in drawn if row["what"] != "outstanding"]
    if not drawn:
        return None
    others = list(dict.fromkeys(str(row["other"].get("name")) for row in drawn))
    title = "How many times faster fdpass is"

    def draw(picture: Figure, narrow: bool) -> None:
        axes = picture.subplots()
        names = list(dict.fromkeys((row["what"], row["name"], (row.get("fdpass") or {}).get("name")) for row in drawn))
        place = {name: len(names) - 1 - number for number, name in enumerate(names)}
        for number, other in enumerate(others):
            here = [row for row in drawn if row["other"].get("name") == other]
            at = [
                place[row["what"], row["name"], (row.get("fdpass") or {}).get("name")] + (0.12 - 0.24 * number) * (len(others) > 1)
                for row in here
            ]
            ratios = [row["times_faster"] for row in here]
            ends = [row.get("times_faster_ci") or [ratio, ratio] for row, ratio in zip(here, ratios, strict=True)]
            spread = [
                [max(0.0, ratio - end[0]) for ratio, end in zip(ratios, ends, strict=True)],
                [max(0.0, end[1] - ratio) for ratio, end in zip(ratios, ends, strict=True)],
            ]
            axes.errorbar(
                ratios,
                at,
                xerr=spread,
                linestyle="none",
                marker=_MARKERS[number],
                markersize=6,
                capsize=3,
                color=COLOURS[number],
                label=f"against {other}",
            )
        axes.axvline(1, color=_INK, linewidth=1.2, linestyle=(0, (4, 2)), label="as fast")
        labels = [_label(what, name) for what, name, _ in names]
        axes.set_yticks(
            [place[name] for name in names], [_wrapped(label, 20) if narrow else label for label in labels], fontsize=8 if narrow else 9.5
        )
        axes.set_ylim(-0.7, len(names) - 0.3)
        axes.set_xlabel("times faster (ratio, log axis)")
        axes.set_ylabel("" if narrow else "what was passed")
        _log(axes, "x")
        _legend(picture, _labelled(axes), narrow)

    count = len({(row["what"], row["name"]) for row in drawn})
    said = "; ".join(f"{row['name']}: {row['times_faster']:.2f} against {row['other'].get('name')}" for row in drawn)
    caption = (
        "Right of the dashed line fdpass is faster, left of it slower. Bars: the 95 % interval; one across the line shows no difference."
    )
    return _plot(title, caption, said, 1.6 + 0.27 * count, draw, 2.0 + 0.36 * count)


def _label(what: str, name: str) -> str:
    if what == "descriptors":
        number, comma, by = name.partition(",")
        return f"{number} descriptor{'' if number == '1' else 's'}{comma}{by}"
    return name


def prices(what: str, rows: Sequence[Mapping[str, Any]]) -> Plot | None:
    """p50 and p99 of each side, or its rate."""
    measured = [row for row in rows if row.get("fdpass")]
    if not measured:
        return None
    unit = unit_of(measured[0]["fdpass"])
    measured = [row for row in measured if (unit_of(row["fdpass"]) == "claims_per_s") == (unit == "claims_per_s")]
    words = {"us": "time of one (us", "us_per_descriptor": "time of each descriptor (us", "us_per_socket": "time of each socket (us"}
    names = list(dict.fromkeys(str(row["name"]) for row in measured))
    sides: dict[str, dict[str, list[Any]]] = {}
    for row in measured:
        for side, ours in ((row["fdpass"], True), (row.get("other"), False)):
            if side is not None and (what != "outstanding" or ours):
                name = "fdpass" if what == "outstanding" else str(side.get("name"))
                sides.setdefault(name, {}).setdefault(str(row["name"]), paid(side))
    values = [value for side in sides.values() for pair in side.values() for value in pair if value is not None]
    log = all(value > 0 for value in values) and unit != "claims_per_s"
    title = WHAT.get(what, what)
    title = title[0].upper() + title[1:]

    def draw(picture: Figure, narrow: bool) -> None:
        axes = picture.subplots()
        place = {name: len(names) - 1 - number for number, name in enumerate(names)}
        step = 0.5 / max(1, len(sides))
        for number, (side, pairs) in enumerate(sides.items()):
            offset = (len(sides) - 1) * step / 2 - number * step
            for name, (middle, tail) in pairs.items():
                row = place[name] + offset
                if middle is not None and tail is not None:
                    axes.plot([middle, tail], [row, row], color=COLOURS[number], linewidth=1.6, linestyle=_DASHES[number % len(_DASHES)])
                    axes.plot([tail], [row], color=COLOURS[number], marker="|", markersize=9, linestyle="none")
            at = [(pair[0], place[name] + offset) for name, pair in pairs.items() if pair[0] is not None]
            if at:
                axes.plot(
                    *zip(*at, strict=True), color=COLOURS[number], marker=_MARKERS[number], markersize=6, linestyle="none", label=side
                )
        if unit != "claims_per_s":
            axes.plot([], [], color=_INK, marker="|", markersize=9, linestyle="none", label="99th percentile")
        axes.set_yticks(
            [place[name] for name in names], [_wrapped(name, 20) if narrow else name for name in names], fontsize=8.5 if narrow else 9.5
        )
        axes.set_ylim(-0.7, len(names) - 0.3)
        axes.set_ylabel("" if narrow else {"descriptors": "descriptors in a message", "receivers": "receivers"}.get(what, "by"))
        if unit == "claims_per_s":
            axes.set_xlim(left=0)
            axes.set_xlabel("claims (per second)")
        else:
            if log:
                _log(axes, "x")
            axes.set_xlabel(words.get(unit, "time (us") + (", log axis)" if log else ")"))
        _legend(picture, _labelled(axes), narrow)

    said = "; ".join(f"{side}: " + ", ".join(f"{name} {figure(pair[0])}" for name, pair in pairs.items()) for side, pairs in sides.items())
    timed = "Left is better. The mark is the median, the line ends at the 99th percentile."
    caption = "Right is better." if unit == "claims_per_s" else timed
    return _plot(title, caption, said, 1.5 + 0.42 * len(names), draw, 1.9 + 0.5 * len(names))


# -------------------------------------------------------------------------------- comparisons


def changes(comparison: Comparison) -> Plot | None:
    """The judged ratios of two files, with their intervals."""
    drawn = [change for change in comparison.changes if change.ratio is not None and change.low is not None and change.high is not None]
    if not drawn:
        return None
    kinds = {"worse": 1, "better": 2, "no difference": 0}
    several = len({change.measure for change in drawn}) > 1
    longest = max(len(comparison.short(change)) + len(change.measure) * several for change in drawn)
    title = f"{comparison.after.name} over {comparison.before.name}"

    def draw(picture: Figure, narrow: bool) -> None:
        axes = picture.subplots()
        for kind, number in kinds.items():
            here = [(row, change) for row, change in enumerate(reversed(drawn)) if change.verdict == kind]
            if here:
                ratios = [change.ratio or 1.0 for _, change in here]
                low = [max(0.0, ratio - (change.low or ratio)) for ratio, (_, change) in zip(ratios, here, strict=True)]
                high = [max(0.0, (change.high or ratio) - ratio) for ratio, (_, change) in zip(ratios, here, strict=True)]
                axes.errorbar(
                    ratios, [row for row, _ in here], xerr=[low, high], linestyle="none", marker=_MARKERS[number], markersize=6, capsize=3,
                    color=COLOURS[number], label=kind,
                )  # fmt: skip
        axes.axvline(1, color=_INK, linewidth=1.2, linestyle=(0, (4, 2)), label="the same")
        labels = [comparison.short(change) + (f": {change.measure}" if several else "") for change in reversed(drawn)]
        axes.set_yticks(range(len(drawn)), [_wrapped(label, 26 if narrow else 60) for label in labels], fontsize=7.5 if narrow else 9)
        axes.set_ylim(-0.7, len(drawn) - 0.3)
        what = "" if several else drawn[0].measure.removesuffix(", ms") + ", "
        axes.set_xlabel(f"{what}after / before (ratio)" if narrow else f"{what}after over before (ratio, log axis)")
        axes.set_ylabel("" if narrow else "run")
        _log(axes, "x")
        _legend(picture, _labelled(axes), narrow)

    caption = "1 is no change. Bars: the 95 % interval of each by itself; the verdict allows for their number."
    said = "; ".join(change.sentence for change in drawn)
    return _plot(title, caption, said, 1.7 + 0.3 * len(drawn), draw, 2.1 + (0.16 + 0.13 * math.ceil(longest / 24)) * len(drawn))
