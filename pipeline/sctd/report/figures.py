"""Drawing of curves, the same way in all pictures of a report."""

from collections.abc import Callable, Sequence

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
_IN_A_ROW = 5  # names in a legend
_MARKED = 60  # points of a curve, at most, that are marked one by one


def panel(found: Sequence[Curve], x: str, y: str) -> Fill:
    """Fills a picture with one set of axes."""

    def fill(figure: Figure) -> None:
        axes = figure.add_subplot()
        draw_curves(axes, found)
        limit(axes, found)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
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


def limit(axes: Axes, found: Sequence[Curve]) -> None:
    """Leave out of the picture what lies above the losses of the first steps' end."""
    end = max(x for curve in found for x in curve.x)
    later = [y for curve in found for x, y in zip(curve.x, curve.y, strict=True) if x >= EARLY * end]
    low, high = min(later), max(later)
    if high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def add_legend(figure: Figure) -> None:
    names: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            names.setdefault(name, handle)
    names = dict(sorted(names.items(), key=lambda item: isinstance(item[1], Patch)))  # shading comes last
    rows = -(-len(names) // _IN_A_ROW)
    columns = -(-len(names) // max(1, rows)) or 1
    figure.legend(list(names.values()), list(names), loc="outside upper center", ncols=columns)
