"""Every picture of the project: curves in panels, bars, differences with intervals, probing by layer, drift over steps.

matplotlib is imported when the first picture is drawn and not with this module, which training imports too.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sctd.errors import UserError
from sctd.present.words import as_short, printable

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]  # as evaluations write it
Fill = Callable[["Figure"], None]

FORMATS = (".png", ".svg", ".pdf")
BLUE, ORANGE, GREY, INK, PALE = "#2b6cb0", "#d1742b", "#555555", "#1b2430", "#c9ced6"
_BASELINE = "baseline"
_OF_ARM = {_BASELINE: GREY, "token_drop": ORANGE, "sctd": BLUE, "random_drop": "#3a8a4d", "random_ltd": "#8a4fa3"}
_IN_TURN = (BLUE, ORANGE, "#3a8a4d", "#8a4fa3", "#b83232", "#7a5a3a", "#c2528b", GREY, "#9a9a1f", "#1f9a9a")
_WIDTH, _DPI = 9.0, 150  # inches
# Text stays text: the browser has the glyphs of all scripts, and the page can be searched.
_STYLE: Any = {
    "svg.fonttype": "none", "text.parse_math": False, "font.family": "sans-serif", "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9aa3ad", "axes.titlelocation": "left",
    "axes.titlesize": 9, "axes.axisbelow": True, "axes.grid": True, "grid.color": "#e6e9ed", "grid.linewidth": 0.8,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "xtick.major.size": 0, "ytick.major.size": 0, "legend.frameon": False,
}  # fmt: skip
_LONGEST_NAME = 30  # of a bar
_LEGEND, _HANDLE = 125, 9  # letters in a row of a legend, and what stands before a name, in letters
_MARKED = 60  # points of a curve, at most, that are marked one by one
_EARLY = 0.1  # of the steps: their values would take most of a picture
_SHADE = "#f0e6d8"
_INSET = (0.08, 0.07, 0.88, 0.24)  # of the axes: x, y, width, height
_ROOM = 0.65  # left for it below the curves, in heights of theirs


@dataclass(frozen=True)
class Picture:
    """`name`: of its file. `height`: inches, of a width of 9. `note`: what the marks mean."""

    name: str
    title: str
    height: float
    fill: Fill
    note: str = ""


def draw_picture(picture: Picture, png: Path | None = None) -> str:
    """An SVG to stand in a page. The title salts its ids, so that those of two pictures differ.

    Args:
        png: where the same picture goes as a file of its own.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    stream = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": picture.title}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser has it
        figure = Figure(figsize=(_WIDTH, picture.height), layout="constrained")
        picture.fill(figure)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(stream, metadata=nothing)
        if png is not None:
            figure.set_layout_engine("none")  # it is laid out already
            figure.set_dpi(_DPI)
            FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    _, _, svg = stream.getvalue().partition("<svg ")
    # Groups are numbered anew in each picture, and nothing refers to them.
    svg = re.sub(r'<g id="[^"]*"/>\s*', "", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(?<!stroke-)\b(width|height)="[\d.]+pt" ?', "", svg, count=2)  # the page decides
    return f'<svg role="img" aria-label="{escape(picture.title)}" {svg}'


def write_picture(path: Path, width: float, height: float, fill: Fill) -> None:
    """A picture in a file of its own, in inches; the ending of the name is the format."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        fill(figure)
        figure.savefig(path, dpi=_DPI)


def require_picture(path: Path) -> None:
    """UserError for a file that cannot be written, before there is anything to draw."""
    if path.suffix not in FORMATS:
        raise UserError(f"--picture {path}: give a name that ends in {', '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--picture {path}: there is no folder {path.absolute().parent}: make it")


def colours(arms: Mapping[str, str | None], taken: Collection[str] = ()) -> dict[str, str]:
    """A colour for each name: its arm's where all have arms and no two the same, else one after the other.

    Args:
        arms: of each name; None where it is not known. taken: colours of other names, which are used last.
    """
    if len(set(arms.values())) == len(arms) and set(arms.values()) <= _OF_ARM.keys():
        return {name: _OF_ARM[str(arm)] for name, arm in arms.items()}
    in_turn = sorted(_IN_TURN, key=lambda colour: colour in taken)
    return {name: in_turn[number % len(in_turn)] for number, name in enumerate(arms)}


# ---- axes ----------------------------------------------------------------------------------------------------------


def number_tick(value: float, _: float) -> str:
    return as_short(value)


def percent_tick(value: float, _: float) -> str:
    return f"{100 * value:g} %"


# What curves run over: title of the axis and its labels.
AXES: dict[str, tuple[str, Callable[[float, float], str]]] = {
    "step": ("optimizer steps", number_tick),
    "tokens": ("tokens", number_tick),
    "flops": ("FLOPs (by formula)", lambda value, _: f"{value:.2g}".replace("e+", "e")),
    "hours": ("hours of training", lambda value, _: f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"),
}


def grid(draws: Sequence[Callable[[Axes], None]], across: int = 3) -> Fill:
    """A picture of sets of axes, so many in a row, with a legend for all."""

    def fill(figure: Figure) -> None:
        for place, draw in enumerate(draws, 1):
            draw(figure.add_subplot(-(-len(draws) // across), min(across, len(draws)), place))
        add_legend(figure)

    return fill


def add_legend(figure: Figure) -> None:
    """One for all axes, above them; each name once, shading last."""
    from matplotlib.patches import Patch

    names: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            names.setdefault(name, handle)
    order = sorted(names, key=lambda name: isinstance(names[name], Patch))
    if order:
        columns = max(1, min(len(order), _LEGEND // (max(map(len, order)) + _HANDLE)))
        figure.legend([names[name] for name in order], order, loc="outside upper center", ncols=columns)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Names of rows from top to bottom."""
    shown = [printable(name) for name in names]
    shown = [name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..." for name in shown]
    axes.set_yticks(range(len(names)), shown)
    axes.set_ylim(max(len(names), 2) - 0.5, -0.5)


# ---- curves --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """`thin`: one of several, whose mean is drawn too and has the name. `spread`: of each point, drawn as whiskers."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    thin: bool = False
    spread: Sequence[float] = ()


@dataclass(frozen=True)
class Panel:
    """A set of axes with curves.

    Args:
        x: a key of AXES. y: title of that axis. marker: of the points of curves that have few.
        levels: of dashed horizontal lines, and their name. from_zero: else the axis follows what comes after the start.
        ticks: labels on the x axis, at most.
    """

    curves: Sequence[Curve]
    title: str = ""
    x: str = "step"
    y: str = ""
    marker: str = ""
    levels: Sequence[float] = ()
    level_name: str = ""
    from_zero: bool = False
    ticks: int = 0

    def draw(self, axes: Axes) -> None:
        for curve in self.curves:
            form = self.marker if not curve.thin and len(curve.x) <= _MARKED else ""
            width, alpha = (0.7, 0.45) if curve.thin else (1.5, 1.0)
            label = "_" if curve.thin else curve.label
            axes.plot(curve.x, curve.y, f"{form}-", ms=5, lw=width, alpha=alpha, color=curve.colour, label=label)
            if curve.spread:
                axes.errorbar(curve.x, curve.y, curve.spread, fmt="none", elinewidth=0.8, ecolor=curve.colour)
        for level in self.levels:
            axes.axhline(level, color=GREY, ls="--", lw=1.0, label=self.level_name or "_")
        title, tick = AXES[self.x]
        axes.set(title=self.title, xlabel=title, ylabel=self.y)
        axes.xaxis.set_major_formatter(tick)
        if self.ticks:
            axes.locator_params(axis="x", nbins=self.ticks)
        if self.from_zero:
            axes.set_ylim(0)
            axes.yaxis.set_major_formatter(number_tick)
            return
        end, ends = max((x for curve in self.curves for x in curve.x), default=0), list(self.levels)
        for curve in self.curves:
            spreads = curve.spread or [0.0] * len(curve.x)
            late = ((y, reach) for x, y, reach in zip(curve.x, curve.y, spreads, strict=True) if x >= _EARLY * end)
            ends += [y + sign * reach for y, reach in late for sign in (-1, 1)]
        if ends and (room := 0.05 * (max(ends) - min(ends))):
            axes.set_ylim(min(ends) - room, max(ends) + room)


def height_of(panels: int, across: int = 3, each: float = 2.0) -> float:
    """Inches for so many panels."""
    return 0.6 + each * -(-panels // across)


# ---- bars and dots, by name ----------------------------------------------------------------------------------------


def bar_picture(
    name: str,
    title: str,
    bars: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    say: Callable[[float], str],
    unit: str = "",
    tick: Callable[[float, float], str] = number_tick,
    colour: Sequence[str] = (),
    mark: float | None = None,
) -> Picture:
    """Horizontal bars from top to bottom, each with its value; several series beside each other.

    Args:
        bars: names. series: values by title. colour: of each bar; else one for each series. mark: of a dashed line.
    """
    height = 0.72 / len(series)

    def draw(axes: Axes) -> None:
        for number, (label, values) in enumerate(series.items()):
            there = [(place, value) for place, value in enumerate(values) if value is not None]
            places = [place + (number - (len(series) - 1) / 2) * height for place, _ in there]
            painted = [colour[place] for place, _ in there] if colour else (BLUE, ORANGE)[number % 2]
            drawn = axes.barh(places, [value for _, value in there], height, color=painted, label=label)
            axes.bar_label(drawn, [say(value) for _, value in there], padding=3)
        _name_rows(axes, bars)
        largest = max(mark or 0.0, *(value or 0.0 for values in series.values() for value in values), 0.0)
        axes.set_xlim(0, 1.12 * largest or 1)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_formatter(tick)
        axes.set_xlabel(unit)
        if mark is not None:
            axes.axvline(mark, color=GREY, lw=1.2, ls="--")

    return Picture(name, title, 0.6 + 0.25 * max(2, len(bars) * len(series)), grid([draw]))


@dataclass(frozen=True)
class Dots:
    """Values by the names of their rows. `spans`: ends of their whiskers. `hollow`: rows whose dots are not filled."""

    label: str
    values: Mapping[str, float]
    colour: str
    marker: str = "o"
    spans: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    hollow: Collection[str] = ()


def draw_dots(axes: Axes, names: Sequence[str], series: Sequence[Dots], title: str, zero: bool = False) -> None:
    """Dots on rows from top to bottom. `zero`: with a line there."""
    if zero:
        axes.axvline(0, color=GREY, lw=0.9, zorder=0)
    for dots in series:
        for name, value in dots.values.items():
            row, face = names.index(name), "none" if name in dots.hollow else dots.colour
            if name in dots.spans:
                axes.plot(dots.spans[name], (row, row), lw=1.3, color=dots.colour)
            axes.plot(value, row, dots.marker, ms=5, color=dots.colour, mfc=face, label=dots.label)
    _name_rows(axes, names)
    axes.set_title(title)
    axes.margins(x=0.12)
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.locator_params(axis="x", nbins=4)
    axes.label_outer()


# ---- probing and drift ---------------------------------------------------------------------------------------------


def draw_probe(axes: Axes, title: str, curves: Mapping[str, Record], colour: Mapping[str, str]) -> None:
    """Accuracy over layers, the layers that dropped tokens in training shaded.

    Args:
        curves: results of one task, by their name in the legend.
    """
    spans = sorted({tuple(curve["dropped"]) for curve in curves.values() if curve["dropped"]})
    for number, (first, end) in enumerate(spans):
        label = "" if number else "layers that dropped tokens"
        axes.axvspan(first + 0.5, end + 0.5, color=_SHADE, lw=0, zorder=0, label=label)
    for name, curve in curves.items():
        layers = [point["layer"] for point in curve["layers"]]
        accuracies = [100 * point["accuracy"] for point in curve["layers"]]
        axes.plot(layers, accuracies, "o-", ms=3.5, lw=1.5, color=colour[name], label=name)
    axes.set(title=title, xlabel="layer (0: embeddings)", ylabel="test accuracy (%)")
    axes.locator_params(axis="x", integer=True)


def draw_probes(panels: Sequence[tuple[str, Mapping[str, Record]]], colour: Mapping[str, str], across: int = 2) -> Fill:
    """A panel for each task (title, curves)."""
    return grid([partial(draw_probe, title=title, curves=curves, colour=colour) for title, curves in panels], across)


def draw_drift(
    axes: Axes,
    curves: Mapping[str, Record],
    colour: Mapping[str, str],
    gaps: Mapping[str, Sequence[tuple[int, float]]],
) -> None:
    """Similarity (left) and held-out loss (right, dashed) over steps; `gaps` in an inset, where there are any."""
    right = axes.twinx()
    for name, curve in curves.items():
        points = curve["points"]
        steps = [point["step"] for point in points]
        axes.plot(steps, [p["cosine"] for p in points], "o-", ms=3.5, lw=1.5, color=colour[name], label=name)
        low = [point["cosine"] - point["deviation"] for point in points]
        high = [point["cosine"] + point["deviation"] for point in points]
        axes.fill_between(steps, low, high, color=colour[name], alpha=0.15, lw=0)
        losses = [(point["step"], point["valid_loss"]) for point in points if point["valid_loss"] is not None]
        right.plot([step for step, _ in losses], [loss for _, loss in losses], "--", lw=1.1, color=colour[name])
    axes.set(xlabel=AXES["step"][0], ylabel="cosine of original and reconstruction (solid)")
    axes.xaxis.set_major_formatter(number_tick)
    right.set_ylabel("held-out MLM loss in nats (dashed)")
    right.spines["right"].set_visible(True)
    right.grid(visible=False)
    axes.set_zorder(right.get_zorder() + 1)  # the inset belongs on top of both
    axes.patch.set_visible(False)
    if gaps:
        for side in (axes, right):  # room for the inset below the curves
            bottom, top = side.get_ylim()
            side.set_ylim(bottom - _ROOM * (top - bottom), top)
        inset = axes.inset_axes(_INSET)
        for name, gap in gaps.items():
            inset.plot([step for step, _ in gap], [value for _, value in gap], ".-", ms=3, lw=1.0, color=colour[name])
        inset.axhline(0, color="#999999", lw=0.6)
        inset.set_title("baseline's similarity minus the run's", fontsize=7)
        inset.tick_params(labelsize=6)


def similarity_gaps(curves: Mapping[str, Record]) -> dict[str, list[tuple[int, float]]]:
    """(step, similarity of the baseline minus that of the run) at the steps both have, for each run but the baseline.

    Empty where there is no baseline among them, or more than one.
    """
    baselines = [curve for curve in curves.values() if curve["arm"] == _BASELINE]
    if len(baselines) != 1:
        return {}
    reference = {point["step"]: point["cosine"] for point in baselines[0]["points"]}
    gaps = {
        name: [(p["step"], reference[p["step"]] - p["cosine"]) for p in curve["points"] if p["step"] in reference]
        for name, curve in curves.items()
        if curve is not baselines[0]
    }
    return {name: gap for name, gap in gaps.items() if gap}


def draw_drifts(curves: Mapping[str, Record], colour: Mapping[str, str], gaps: Mapping[str, Any]) -> Fill:
    return grid([partial(draw_drift, curves=curves, colour=colour, gaps=gaps)])
