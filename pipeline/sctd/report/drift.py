"""Semantic drift over training (Figure 3)."""

import statistics
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sctd.evaluate.analyse.pictures import Gaps, draw_drift, similarity_gaps
from sctd.evaluate.results import Record
from sctd.page import number_tick
from sctd.report import paper, stats
from sctd.report.arms import BASELINE, Group, partners
from sctd.report.document import NOTHING, Cell, Fill, Head, Number, Picture, Points, Section, Table, whole
from sctd.report.figures import add_legend
from sctd.report.words import counted, listed, signed


def drift_section(groups: Sequence[Group]) -> Section | None:
    """None where no drift was measured."""
    records = {group.label: [run.drift for run in group.runs if run.drift and run.drift["points"]] for group in groups}
    records = {label: found for label, found in records.items() if found}
    if not records:
        return None
    first = next(iter(records.values()))[0]
    same = {label: [r for r in found if _sentences(r) == _sentences(first)] for label, found in records.items()}
    curves = {label: _mean_drift(found) for label, found in same.items() if found}
    section = Section("drift", "Semantic drift")
    section.parts.append(
        f"Checkpoints fill the masked positions of {counted(first['sentences'], 'held-out sentence')}, through the "
        f"path that the run trains at that step. A sentence encoder ({first['encoder']}) embeds original and "
        f"reconstruction; the mean of their cosines is the similarity. {paper.DRIFT}"
    )
    with_baseline = {first.label for first, second in partners(groups) if second.arm == BASELINE}
    gaps = {label: gap for label, gap in similarity_gaps(curves).items() if label in with_baseline}
    if said := _drift_words(curves, groups, gaps):
        section.parts.append(Points(said))
    left_out = [label for label in records if label not in curves or len(same[label]) < len(records[label])]
    if left_out:
        section.parts.append(f"Measured with other sentences or another encoder, and left out: {listed(left_out)}.")
    colour = {group.label: group.colour for group in groups}
    title = "Similarity of original and reconstruction, and held-out loss"
    note = (
        "Solid: mean cosine and its standard error; dashed: held-out loss. Inset: the baseline's cosine minus an arm's."
    )
    section.parts += [Picture("drift", title, 4.2, _drifts(curves, colour, gaps), note), _drift_table(curves)]
    return section


def _sentences(record: Record) -> tuple[object, ...]:
    return record["encoder"], record["sentences"], record.get("data")


def _mean_drift(records: Sequence[Record]) -> Record:
    """Over pretraining seeds, at the steps that all have."""
    by_step = [{point["step"]: point for point in record["points"]} for record in records]
    points = []
    for step in sorted(set.intersection(*map(set, by_step))):
        here = [of_run[step] for of_run in by_step]
        losses = [point["valid_loss"] for point in here]
        points.append({
            "step": step,
            "cosine": statistics.fmean(point["cosine"] for point in here),
            "deviation": statistics.fmean(point["deviation"] for point in here),
            "valid_loss": None if None in losses else statistics.fmean(losses),
        })  # fmt: skip
    return {**records[0], "points": points}


def _drifts(curves: Mapping[str, Record], colour: Mapping[str, str], gaps: Gaps) -> Fill:
    def fill(figure: Figure) -> None:
        axes: Axes = figure.add_subplot()
        draw_drift(axes, curves, colour, gaps)
        axes.xaxis.set_major_formatter(number_tick)
        for other in figure.axes[1:]:
            other.grid(visible=False)
        add_legend(figure)

    return fill


def _drift_words(curves: Mapping[str, Record], groups: Sequence[Group], gaps: Gaps) -> list[str]:
    said = []
    for first, second in partners(groups):
        if first.label not in curves or second.label not in curves:
            continue
        mine, theirs = ({p["step"]: p for p in curves[each.label]["points"]} for each in (first, second))
        steps = sorted(mine.keys() & theirs.keys())
        if not steps:
            continue
        a, b = mine[steps[-1]], theirs[steps[-1]]
        found = stats.two_means(a["cosine"], b["cosine"], (a["deviation"], b["deviation"]))
        test = f" ({stats.as_p(found.p)}, as if the sentences were drawn anew)" if found.p is not None else ""
        said.append(f"At step {steps[-1]:,} {first.label} is {signed(found.value, 4)} against {second.label}{test}.")
    for label, gap in gaps.items():
        if len(gap) > 1:
            (start, early), (end, late) = ((step, round(value, 4)) for step, value in (gap[0], gap[-1]))
            trend = "rose" if late > early else "fell" if late < early else "stayed the same"
            said.append(
                f"The baseline's similarity minus that of {label} {trend}: {signed(early, 4)} at step {start:,}, "
                f"{signed(late, 4)} at step {end:,}."
            )
    return said


def _drift_table(curves: Mapping[str, Record]) -> Table:
    head = [Head("step")]
    for label in curves:
        head += [Head(f"{label}:\ncosine", "standard error"), Head(f"{label}:\nheld-out loss")]
    steps = sorted({point["step"] for curve in curves.values() for point in curve["points"]})
    by_step = {label: {point["step"]: point for point in curve["points"]} for label, curve in curves.items()}
    rows: list[list[Cell]] = []
    for step in steps:
        row: list[Cell] = [whole(step)]
        for label in curves:
            row += _drift_cells(by_step[label].get(step))
        rows.append(row)
    return Table("drift", "Semantic drift by step", head, rows)


def _drift_cells(point: Record | None) -> list[Cell]:
    if point is None:
        return [NOTHING, NOTHING]
    cosine = Number(point["cosine"], f"{point['cosine']:.4f}", point["deviation"], f"± {point['deviation']:.4f}")
    loss = point["valid_loss"]
    return [cosine, NOTHING if loss is None else Number(loss, f"{loss:.4f}")]
