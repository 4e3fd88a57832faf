"""Scores over training (Figure 6): of checkpoints along the way, and of what was measured while the runs trained."""

import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sctd.objective.flops import saving
from sctd.page import number_tick
from sctd.report import paper
from sctd.report.arms import BASELINE, Group, baseline_of
from sctd.report.curves import curves
from sctd.report.document import Cell, Fill, Head, Part, Picture, Section, Table, change, number, over, whole
from sctd.report.figures import ACROSS, add_legend, panels
from sctd.report.paper import Column
from sctd.report.scores import Subject, at_step, further
from sctd.report.stats import spread_of
from sctd.report.words import as_flops, as_hours, counted, opening
from sctd.train.keep.metrics import EVALUATED

_PANELS = 12  # with a task each


def progress_section(groups: Sequence[Group]) -> Section | None:
    """None where no checkpoint but the last was evaluated."""
    section = Section("progress", "Scores over training")
    along = {group.label: [at_step(group, step) for step in group.evaluated] for group in groups}
    along = {label: found for label, found in along.items() if len(found) > 1}
    columns = _common(along)
    along = {label: [each for each in found if each.averages(columns)] for label, found in along.items()}
    along = {label: found for label, found in along.items() if len(found) > 1}
    if along and columns:
        section.parts += _from_checkpoints(along, columns, groups)
    keys = sorted({key for group in groups for run in group.runs for key in run.keys if key.startswith(EVALUATED)})
    if keys:
        note = "Measured on the weights as they were, with one short fine-tuning or probe each: coarse, without seeds."
        title = "Measured while the runs trained"
        fill = panels({key.removeprefix(EVALUATED): curves(groups, "step", key) for key in keys}, markers=True)
        section.parts.append(Picture("during-training", title, _height(len(keys)), fill, note))
    return section if section.parts else None


def _from_checkpoints(
    along: dict[str, list[Subject]], columns: Sequence[Column], groups: Sequence[Group]
) -> list[Part]:
    tasks = list(dict.fromkeys(column.task for column in columns))
    what = _what(columns)
    parts: list[Part] = [f"{what[0].upper()}{what[1:]}, best dev epoch, at every step where all of it was measured. "
             f"{paper.OVER_TRAINING} {_words(along, columns, groups)}".strip()]  # fmt: skip
    parts.append(Picture("scores-over-training", "Scores over training", 3.1, _average(along, columns, what)))
    if 1 < len(tasks) <= _PANELS:
        fill = _each(along, [next(c for c in columns if c.task == task) for task in tasks])
        note = "Main metric; whiskers: standard deviation over seeds."
        parts.append(Picture("tasks-over-training", "Each task over training", _height(len(tasks)), fill, note))
    return [*parts, _table(along, columns, groups, what)]


def _common(along: dict[str, list[Subject]]) -> list[Column]:
    """Columns that every one of them has at every step."""
    everyone = [subject for found in along.values() for subject in found]
    columns: dict[tuple[str, str], Column] = {}
    for layout in paper.LAYOUTS:
        for column in layout.columns:
            columns.setdefault((column.task, column.metric), column)
    for column in further(everyone).columns:
        score = next((each.score(column.task) for each in everyone if each.score(column.task)), None)
        if score is not None and score.metric == column.metric:
            columns[column.task, column.metric] = column
    return [c for c in columns.values() if everyone and all(each.units(c.task, c.metric) for each in everyone)]


def _what(columns: Sequence[Column]) -> str:
    if list(columns) == list(paper.GLUE.columns):
        return "GLUE average"
    tasks = {column.task for column in columns}
    return "mean over " + counted(len(tasks), "task") if len(tasks) > 1 else columns[0].title.replace("\n", " ")


def _words(along: dict[str, list[Subject]], columns: Sequence[Column], groups: Sequence[Group]) -> str:
    """When each arm first has the baseline's last average."""
    said = []
    for group in groups:
        baseline = baseline_of(group, groups)
        if group.arm == BASELINE or group.label not in along or baseline is None or baseline.label not in along:
            continue
        theirs = along[baseline.label][-1]
        if any(theirs.ways(c.task) != each.ways(c.task) for c in columns for each in along[group.label]):
            said.append(
                f"{opening(group.label)} was fine-tuned on other rows or with other settings than the baseline."
            )
            continue
        last = _mean(theirs, columns)
        first = next((each for each in along[group.label] if _mean(each, columns) >= last), None)
        if first is None or first.step is None:
            said.append(f"{opening(group.label)} does not come up to the baseline's last value ({last:.2f}).")
        else:
            when = f"step {first.step:,}, {100 * first.step / group.step:.0f} % of its steps"
            said.append(f"{opening(group.label)} first has the baseline's last value ({last:.2f}) at {when}.")
    return " ".join(said)


def _mean(subject: Subject, columns: Sequence[Column]) -> float:
    return 100 * statistics.fmean(subject.averages(columns))


def _average(along: dict[str, list[Subject]], columns: Sequence[Column], what: str) -> Fill:
    def fill(figure: Figure) -> None:
        axes = figure.add_subplot()
        for found in along.values():
            _line(axes, found, [[100 * value for value in each.averages(columns)] for each in found])
        axes.set_ylabel(f"{what} (%)")
        _finish(figure)

    return fill


def _each(along: dict[str, list[Subject]], columns: Sequence[Column]) -> Fill:
    def fill(figure: Figure) -> None:
        for place, column in enumerate(columns, 1):
            axes = figure.add_subplot(-(-len(columns) // ACROSS), min(ACROSS, len(columns)), place)
            for found in along.values():
                values = [[100 * value for value in each.units(column.task, column.metric)] for each in found]
                _line(axes, found, values)
            axes.set_title(column.title.replace("\n", " "), fontsize=9)
        _finish(figure)

    return fill


def _line(axes: Axes, found: Sequence[Subject], values: Sequence[Sequence[float]]) -> None:
    group = found[0].group
    assert group is not None
    means, spreads = [statistics.fmean(each) for each in values], [spread_of(each) or 0.0 for each in values]
    steps = [each.step or 0 for each in found]
    axes.errorbar(
        steps, means, spreads, fmt="o-", ms=3.5, lw=1.4, elinewidth=0.8, color=group.colour, label=group.label
    )


def _finish(figure: Figure) -> None:
    for axes in figure.axes:
        axes.set_xlabel("optimizer steps")
        axes.xaxis.set_major_formatter(number_tick)
    add_legend(figure)


def _height(panels: int) -> float:
    return 0.6 + 2.0 * -(-panels // ACROSS)


def _table(along: dict[str, list[Subject]], columns: Sequence[Column], groups: Sequence[Group], what: str) -> Table:
    head = [Head("arm"), Head("steps"), Head("hours"), Head("hours vs.\nbaseline"), Head("FLOPs"),
            Head("FLOPs vs.\nbaseline"), Head(what, "deviation")]  # fmt: skip
    rows: list[list[Cell]] = []
    for found in along.values():
        for each in found:
            assert each.group is not None
            baseline = baseline_of(each.group, groups)
            costs = {key: each.group.mean(key, each.step) for key in ("hours", "flops")}
            wholes = {key: None if baseline is None else baseline.mean(key) for key in costs}
            saved = [saving(costs[key], wholes[key]) for key in costs]
            rows.append([
                each.label, whole(each.step or 0), number(costs["hours"], as_hours), change(saved[0]),
                number(costs["flops"], as_flops), change(saved[1]),
                over([100 * value for value in each.averages(columns)], lambda value: f"{value:.2f}"),
            ])  # fmt: skip
    note = (
        "Hours and FLOPs are compared with the whole training of the baseline; a task counts the mean of its metrics."
    )
    return Table("scores-over-training", "Scores over training", head, rows, note=note)
