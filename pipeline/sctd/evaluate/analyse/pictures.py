"""Curves of probing and of semantic drift, drawn from the records in the files of results.

`draw_probe` and `draw_drift` draw onto axes that the caller has; `probe_picture` and `drift_picture` write a file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sctd.errors import UserError
from sctd.evaluate.results import Record

Curves = Mapping[str, Record]  # by the name in the legend
Gaps = Mapping[str, Sequence[tuple[int, float]]]
FORMATS = (".png", ".svg", ".pdf")
BASELINE = "baseline"
_OF_ARM = {
    "baseline": "#555555",
    "token_drop": "#d1742b",
    "sctd": "#2b6cb0",
    "random_drop": "#3a8a4d",
    "random_ltd": "#8a4fa3",
}
_IN_TURN = (
    "#2b6cb0",
    "#d1742b",
    "#3a8a4d",
    "#8a4fa3",
    "#b83232",
    "#7a5a3a",
    "#c2528b",
    "#555555",
    "#9a9a1f",
    "#1f9a9a",
)
_SHADE = "#f0e6d8"
_INSET = (0.08, 0.07, 0.88, 0.24)  # of the axes: x, y, width, height
_ROOM = 0.65  # left for it below the curves, in heights of theirs


def require_picture(path: Path) -> None:
    """UserError for a file that cannot be written, before there is anything to draw."""
    if path.suffix not in FORMATS:
        raise UserError(f"--picture {path}: give a name that ends in {', '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--picture {path}: there is no folder {path.absolute().parent}: make it")


def colours(arms: Mapping[str, str | None]) -> dict[str, str]:
    """A colour for each name: its arm's where all have arms and no two the same, else one after the other.

    Args:
        arms: of each name; None where it is not known.
    """
    if len(set(arms.values())) == len(arms) and set(arms.values()) <= _OF_ARM.keys():
        return {name: _OF_ARM[str(arm)] for name, arm in arms.items()}
    return {name: _IN_TURN[number % len(_IN_TURN)] for number, name in enumerate(arms)}


def draw_probe(axes: Axes, title: str, curves: Curves, colour: Mapping[str, str]) -> None:
    """Accuracy over layers, the layers that dropped tokens in training shaded.

    Args:
        curves: results of one task.
    """
    spans = sorted({tuple(curve["dropped"]) for curve in curves.values() if curve["dropped"]})
    for number, (first, end) in enumerate(spans):
        label = "" if number else "layers that dropped tokens"
        axes.axvspan(first + 0.5, end + 0.5, color=_SHADE, lw=0, zorder=0, label=label)
    for name, curve in curves.items():
        layers = [point["layer"] for point in curve["layers"]]
        accuracies = [100 * point["accuracy"] for point in curve["layers"]]
        axes.plot(layers, accuracies, "o-", ms=3.5, lw=1.5, color=colour[name], label=name)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("layer (0: embeddings)")
    axes.set_ylabel("test accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)


def draw_drift(axes: Axes, curves: Curves, colour: Mapping[str, str], gaps: Gaps) -> None:
    """Similarity (left) and held-out loss (right, dashed) over steps; `gaps` in an inset, where there are any."""
    right = axes.twinx()
    for name, curve in curves.items():
        points = curve["points"]
        steps = [point["step"] for point in points]
        means = [point["cosine"] for point in points]
        axes.plot(steps, means, "o-", ms=3.5, lw=1.5, color=colour[name], label=name)
        low = [point["cosine"] - point["deviation"] for point in points]
        high = [point["cosine"] + point["deviation"] for point in points]
        axes.fill_between(steps, low, high, color=colour[name], alpha=0.15, lw=0)
        losses = [(point["step"], point["valid_loss"]) for point in points if point["valid_loss"] is not None]
        right.plot(*_columns(losses), "--", lw=1.1, color=colour[name])
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("cosine of original and reconstruction (solid)")
    right.set_ylabel("held-out MLM loss in nats (dashed)")
    for side in (axes, right):
        side.spines["top"].set_visible(False)
    axes.set_zorder(right.get_zorder() + 1)  # the inset belongs on top of both
    axes.patch.set_visible(False)
    if gaps:
        for side in (axes, right):  # room for the inset below the curves
            bottom, top = side.get_ylim()
            side.set_ylim(bottom - _ROOM * (top - bottom), top)
        inset = axes.inset_axes(_INSET)
        for name, gap in gaps.items():
            inset.plot(*_columns(gap), ".-", ms=3, lw=1.0, color=colour[name])
        inset.axhline(0, color="#999999", lw=0.6)
        inset.set_title("baseline's similarity minus the run's", fontsize=7)
        inset.tick_params(labelsize=6)


def similarity_gaps(curves: Curves) -> dict[str, list[tuple[int, float]]]:
    """(step, similarity of the baseline minus that of the run) at the steps both have, for each run but the baseline.

    Empty where there is no baseline among them, or more than one.
    """
    baselines = [curve for curve in curves.values() if curve["arm"] == BASELINE]
    if len(baselines) != 1:
        return {}
    reference = {point["step"]: point["cosine"] for point in baselines[0]["points"]}
    gaps = {
        name: [(p["step"], reference[p["step"]] - p["cosine"]) for p in curve["points"] if p["step"] in reference]
        for name, curve in curves.items()
        if curve is not baselines[0]
    }
    return {name: gap for name, gap in gaps.items() if gap}


def probe_picture(path: Path, panels: Sequence[tuple[str, Curves]], arms: Mapping[str, str | None]) -> None:
    """One panel for each task (title, curves)."""
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    for place, (title, curves) in enumerate(panels, 1):
        draw_probe(figure.add_subplot(1, len(panels), place), title, curves, colours(arms))
    _finish(figure, figure.axes[0], path)


def drift_picture(path: Path, curves: Curves) -> None:
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    arms = {name: curve["arm"] for name, curve in curves.items()}
    draw_drift(figure.add_subplot(), curves, colours(arms), similarity_gaps(curves))
    _finish(figure, figure.axes[0], path)


def _finish(figure: Figure, axes: Axes, path: Path) -> None:
    lines, names = axes.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=min(4, len(names)), frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def _columns(points: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    return [x for x, _ in points], [y for _, y in points]
