"""Drawing of curves, the same way in all pictures of a report."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sctd.page import number_tick
from sctd.report.curves import EARLY, Curve
from sctd.report.document import Fill

TICKS: dict[str, Callable[[float, float], str]] = {
    "step": number_tick,
    "tokens": number_tick,
    "flops": lambda value, _: f"{value:.2g}".replace("e+", "e"),
    "hours": lambda value, _: f"{value:,.3g}" if value < 1000 else f"{value:,.0f}",
}
ACROSS = 3  # sets of axes in a row
_WIDTH = 125  # of a legend, in letters
_HANDLE = 9  # what stands before a name in it, likewise
_MARKED = 60  # points of a curve, at most, that are marked one by one


def panels(found: Mapping[str, Sequence[Curve]], markers: bool = False, from_zero: bool = False) -> Fill:
    """Fills a picture with a set of axes over optimizer steps for each title."""

    def fill(figure: Figure) -> None:
        for place, (title, of_title) in enumerate(found.items(), 1):
            axes = figure.add_subplot(-(-len(found) // ACROSS), min(ACROSS, len(found)), place)
            draw_curves(axes, of_title, markers)
            if from_zero:
                axes.set_ylim(0)
                axes.yaxis.set_major_formatter(number_tick)
            else:
                limit(axes, of_title)
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("optimizer steps")
            axes.xaxis.set_major_formatter(number_tick)
        add_legend(figure)

    return fill


def draw_curves(axes: Axes, found: Sequence[Curve], markers: bool = False) -> None:
    """Single runs of several thin, means and only runs thick and with a name in the legend."""
    for curve in found:
        name = "" if curve.thin else curve.group.label
        form = ".-" if markers and not curve.thin and len(curve.x) <= _MARKED else "-"
        width, alpha = (0.7, 0.45) if curve.thin else (1.5, 1.0)
        axes.plot(curve.x, curve.y, form, ms=5, lw=width, alpha=alpha, color=curve.group.colour, label=name or "_")


def limit(axes: Axes, found: Sequence[Curve], *levels: float) -> None:
    """Leave out of the picture what lies beyond the values from the first steps' end on, and these levels."""
    end = max(x for curve in found for x in curve.x)
    later = [y for curve in found for x, y in zip(curve.x, curve.y, strict=True) if x >= EARLY * end]
    low, high = min([*later, *levels]), max([*later, *levels])
    if high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def add_legend(figure: Figure) -> None:
    names: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            names.setdefault(name, handle)
    names = dict(sorted(names.items(), key=lambda item: isinstance(item[1], Patch)))  # shading comes last
    figure.legend(list(names.values()), list(names), loc="outside upper center", ncols=_columns(list(names)))


def _columns(names: Sequence[str]) -> int:
    """As many as there is room for; names go down the first one, then down the next."""
    for columns in range(len(names), 1, -1):
        parts = np.array_split(names, columns)
        if sum(max(map(len, part)) + _HANDLE for part in parts) <= _WIDTH:
            return columns
    return 1
