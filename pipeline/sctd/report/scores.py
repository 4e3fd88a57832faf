"""Scores of fine-tuned checkpoints, in tables of the paper's layouts, and over training (Figure 6)."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sctd.evaluate.results import Record, Score
from sctd.present.page import Part, Section
from sctd.present.pictures import Curve, Panel, Picture, grid, height_of
from sctd.present.table import NOTHING, PAPER, Cell, Heading, Number, Table, cost, number, over, spread_of
from sctd.present.words import as_flops, as_hours, counted, signed
from sctd.report import paper
from sctd.report.gather import Evaluation, finite, key_of
from sctd.report.groups import RunGroup, baseline_of
from sctd.report.paper import Column, Layout, Row
from sctd.report.training import curves
from sctd.train.flops import saving
from sctd.train.keep.metrics import EVALUATED

_COLUMNS = 10  # of scores beside each other
_PANELS = 12  # with a task each
_METRICS = {"matthews": "Mcc.", "accuracy": "acc.", "pearson": "Pear.", "spearman": "Spea.", "f1": "F1",
            "exact_match": "EM", "macro_f1": "macro F1"}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """What has scores: a group at a step, or a checkpoint that belongs to no run (`group` is None).

    Args:
        evaluations: one of each pretraining run.
    """

    label: str
    evaluations: tuple[Evaluation, ...]
    group: RunGroup | None = None
    step: int | None = None

    def units(self, task: str, metric: str, epoch: str = "best") -> list[float]:
        """The values that a spread is taken of: means of each pretraining run where there are several, else the
        fine-tunings of the only one, by seed. Fractions."""
        return [value for _, value in sorted(self._by_unit(task, metric, epoch).items())]

    def pooled(self, task: str, metric: str, epoch: str = "best") -> list[float]:
        """The values of all fine-tunings, whichever pretraining run they are of. Fractions."""
        return [value for values in self._values(task, metric, epoch).values() for value in values.values()]

    def averages(self, columns: Sequence[Column], epoch: str = "best") -> list[float]:
        """The average over tasks of each unit that has all columns, a task counting the mean of its columns."""
        tasks = [[column for column in columns if column.task == task] for task in {c.task: 0 for c in columns}]
        each = [[self._by_unit(c.task, c.metric, epoch) for c in task] for task in tasks]
        units = [set(values) for task in each for values in task]
        return [
            statistics.fmean(statistics.fmean(values[unit] for values in task) for task in each)
            for unit in (sorted(set.intersection(*units)) if units else ())
        ]

    def score(self, task: str) -> Score | None:
        """Of its first run that has one: for the setting."""
        return next((each.scores["best"][task] for each in self.evaluations if task in each.scores["best"]), None)

    def ways(self, task: str) -> set[tuple[Any, ...]]:
        """How a task was fine-tuned: rows, and settings that were tried."""
        return set().union(*(each.ways(task) for each in self.evaluations))

    @property
    def seeds(self) -> str:
        """`3`, or with several pretraining runs `2 x 3`: the fewest fine-tunings of a task."""
        counts = [len(score.values) for each in self.evaluations for score in each.scores["best"].values()]
        least = f"{min(counts)}" + ("+" if min(counts) < max(counts) else "") if counts else "0"
        return least if len(self.evaluations) < 2 else f"{len(self.evaluations)} × {least}"

    def _by_unit(self, task: str, metric: str, epoch: str) -> dict[int, float]:
        """What `units` are, by the place of the pretraining run, or by seed where there is only one."""
        found = self._values(task, metric, epoch)
        if len(self.evaluations) == 1:
            return found.get(0, {})
        return {place: statistics.fmean(values.values()) for place, values in found.items()}

    def _values(self, task: str, metric: str, epoch: str) -> dict[int, dict[int, float]]:
        """By seed, of each pretraining run that has any, by its place."""
        found = {}
        for place, each in enumerate(self.evaluations):
            score = each.scores[epoch].get(task)
            values = {} if score is None else score.values if metric == score.metric else score.others.get(metric, {})
            values = {seed: value for seed, value in values.items() if finite(value)}
            if values:
                found[place] = values
        return found


def subjects(groups: Sequence[RunGroup], others: Sequence[Evaluation]) -> list[Subject]:
    """Groups at the last step they were evaluated at, then other checkpoints."""
    found = [at_step(group, group.evaluated[-1]) for group in groups if group.evaluated]
    return found + [Subject(each.name, (each,), step=each.facts.get("step")) for each in others if each.cells]


def at_step(group: RunGroup, step: int) -> Subject:
    there = (run.evaluations.get(step) for run in group.runs)
    return Subject(group.label, tuple(each for each in there if each is not None and each.cells), group, step)


# ---- columns -------------------------------------------------------------------------------------------------------


def further(found: Sequence[Subject]) -> Layout:
    """A layout of the tasks and metrics that the paper has none for."""
    known = {(column.task, column.metric) for layout in paper.LAYOUTS for column in layout.columns}
    columns: dict[tuple[str, str], Column] = {}
    for cell in (cell for each in found for evaluation in each.evaluations for cell in evaluation.cells):
        for metric in cell["metrics"]:
            key = (key_of(cell), metric)
            if key not in known:
                name, mismatched = (metric[:-3], " mm.") if metric.endswith("_mm") else (metric, "")
                columns.setdefault(key, Column(*key, f"{title_of(cell)}\n{_METRICS.get(name, name)}{mismatched}"))
    title = "Further metrics and tasks, which the paper has no numbers of"
    return Layout("further", title, tuple(columns.values()), ())


def main_columns(layout: Layout, found: Sequence[Subject]) -> list[Column]:
    """One for each task: its main metric."""
    scores = [(column, [each.score(column.task) for each in found]) for column in layout.columns]
    main = {c.task: c for c, of in scores if (first := next(filter(None, of), None)) and first.metric == c.metric}
    return list(main.values())


def common_columns(found: Sequence[Subject]) -> list[Column]:
    """Columns that all of these have: as the paper's tables count them, other tasks by their main metric."""
    columns = [column for layout in paper.LAYOUTS for column in layout.columns] + main_columns(further(found), found)
    known: dict[tuple[str, str], Column] = {}
    for column in columns:
        known.setdefault((column.task, column.metric), column)
    return [c for c in known.values() if found and all(each.units(c.task, c.metric) for each in found)]


def title_of(cell: Record) -> str:
    return f"{cell['title']}, {cell['shots']}-shot" if cell.get("shots") else str(cell["title"])


def percent(units: Sequence[float]) -> Number:
    return over([100 * unit for unit in units], ".2f")


# ---- tables in the paper's layouts ---------------------------------------------------------------------------------


def score_tables(found: Sequence[Subject], groups: Sequence[RunGroup]) -> list[Table]:
    """Each of the paper's layouts that has any score, and what is in none of them; best epoch, then last epoch."""
    rest = further(found)
    cuts = [rest.columns[start : start + _COLUMNS] for start in range(0, len(rest.columns), _COLUMNS)]
    names = [rest.name if not place else f"{rest.name}-{place + 1}" for place in range(len(cuts))]
    layouts = [*paper.LAYOUTS, *(replace(rest, name=n, columns=cut) for n, cut in zip(names, cuts, strict=True))]
    tables = [_score_table(layout, found, groups, epoch) for layout in layouts for epoch in ("best", "last")]
    return [table for table in tables if table is not None]


def _score_table(layout: Layout, found: Sequence[Subject], groups: Sequence[RunGroup], epoch: str) -> Table | None:
    """None where nobody has a score of this layout."""
    columns = [c for c in layout.columns if any(each.units(c.task, c.metric, epoch) for each in found)]
    there = [each for each in found if any(each.units(c.task, c.metric, epoch) for c in columns)]
    if not there:
        return None
    of_suite = {c.suite: [other for other in columns if other.suite == c.suite] for c in columns if layout.rows}
    is_whole = {suite: [c for c in layout.columns if c.suite == suite] == of for suite, of in of_suite.items()}
    budget = epoch == "best" and any(row.hours is not None for row in layout.rows)
    heads: list[Heading] = ["arm", "seeds", "steps"]
    heads += [("hours", "change"), ("FLOPs", "change")] if budget else []
    heads += [(column.title, "deviation") for column in columns]
    heads += [(f"{suite}\nAvg.".lstrip() if is_whole[suite] else "mean of\nthese", "deviation") for suite in of_suite]
    rows: list[list[Cell]] = []
    for each in there:
        row: list[Cell] = [each.label, each.seeds, number(each.step)]
        row += _budget(each, groups) if budget else []
        row += [percent(each.units(column.task, column.metric, epoch)) for column in columns]
        rows.append(row + [percent(each.averages(of, epoch)) for of in of_suite.values()])
    for theirs in layout.rows:
        row = [f"paper, {theirs.size}: {paper.TITLES[theirs.arm]}", str(paper.SEEDS), number(theirs.steps)]
        row += [cost(theirs.hours, theirs.saving, as_hours), NOTHING] if budget else []
        row += [number(theirs.scores[layout.columns.index(c)], f".{layout.digits(c)}f") for c in columns]
        for suite, of in of_suite.items():
            printed = theirs.average if is_whole[suite] else None
            row.append(number(paper_average(theirs, layout, of) if printed is None else printed, ".2f"))
        rows.append(row)
    kinds = [""] * len(there) + [PAPER] * len(layout.rows)
    name = f"scores-{layout.name}" + ("" if epoch == "best" else "-last-epoch")
    title = f"{layout.title}: {'best dev epoch' if epoch == 'best' else 'last epoch'}"
    return Table(name, title, heads, rows, kinds=kinds, note=_note(layout, columns, budget))


def _budget(subject: Subject, groups: Sequence[RunGroup]) -> list[Cell]:
    """Hours and FLOPs up to its step, and what they save of the baseline's at its last step."""
    if subject.group is None or subject.step is None:
        return [NOTHING, NOTHING]
    baseline = baseline_of(subject.group, groups)
    cells: list[Cell] = []
    for key, say in (("hours", as_hours), ("flops", as_flops)):
        value = subject.group.mean(key, subject.step)
        cells.append(cost(value, saving(value, baseline.mean(key) if baseline else None), say))
    return cells


def paper_average(row: Row, layout: Layout, columns: Sequence[Column]) -> float:
    """Over the tasks of these columns, a task counting the mean of its columns, as the paper does."""
    tasks: dict[str, list[float]] = {}
    for column in columns:
        tasks.setdefault(column.task, []).append(row.scores[layout.columns.index(column)])
    return statistics.fmean(map(statistics.fmean, tasks.values()))


def _note(layout: Layout, columns: Sequence[Column], budget: bool) -> str:
    said = "Percent; mean ± standard deviation over the seeds."
    if budget:
        said += " Hours and FLOPs up to the step, and how they compare with the baseline's whole training."
    missing = [column for column in layout.columns if column not in columns]
    if missing:
        titles = [column.title.replace("\n", " ").rstrip(".") for column in missing]
        said += f" Not measured here, and left out: {'; '.join(titles)}."
    if layout.rows and {column.suite for column in missing} & {column.suite for column in columns}:
        said += " Means of these are over the columns shown, in the paper's rows too."
    return said


# ---- over training -------------------------------------------------------------------------------------------------


def progress_section(groups: Sequence[RunGroup]) -> Section | None:
    """Scores of several checkpoints along the runs, and of what was measured while they trained; None without any."""
    parts = _from_checkpoints(groups)
    keys = sorted({key for group in groups for run in group.runs for key in run.keys if key.startswith(EVALUATED)})
    if keys:
        note = "Measured on the weights as they were, with one short fine-tuning or probe each: coarse, without seeds."
        fill = grid([Panel(curves(groups, "step", k), k.removeprefix(EVALUATED), marker=".").draw for k in keys])
        parts.append(Picture("during-training", "Measured while the runs trained", height_of(len(keys)), fill, note))
    return Section("progress", "Scores over training", parts) if parts else None


def _from_checkpoints(groups: Sequence[RunGroup]) -> list[Part]:
    """Groups that were scored on the same tasks at several steps."""
    along = [[at_step(group, step) for step in group.evaluated] for group in groups]
    along = [found for found in along if len(found) > 1]
    columns = common_columns([each for found in along for each in found])
    along = [[each for each in found if each.averages(columns)] for found in along]
    along = [found for found in along if len(found) > 1]
    if not along:
        return []
    tasks = {column.task: column for column in reversed(columns)}
    what = "mean over " + counted(len(tasks), "task") if len(tasks) > 1 else columns[0].title.replace("\n", " ")
    what = "GLUE average" if columns == list(paper.GLUE.columns) else what
    parts: list[Part] = [f"Best dev epoch, at every step where all of it was measured. {paper.OVER_TRAINING}"]
    means = Panel([_curve(found, [each.averages(columns) for each in found]) for found in along], marker="o",
                  y=f"{what} (%)")  # fmt: skip
    parts.append(Picture("scores-over-training", "Scores over training", 3.1, grid([means.draw])))
    if 1 < len(tasks) <= _PANELS:
        panels = [
            Panel([_curve(found, [each.units(c.task, c.metric) for each in found]) for found in along],
                  c.title.replace("\n", " "), marker="o")
            for c in reversed(tasks.values())
        ]  # fmt: skip
        note = "Main metric; whiskers: standard deviation over seeds."
        title, height = "Each task over training", height_of(len(tasks))
        parts.append(Picture("tasks-over-training", title, height, grid([panel.draw for panel in panels]), note))
    return [*parts, _progress_table(along, columns, groups, what)]


def _curve(found: Sequence[Subject], values: Sequence[Sequence[float]]) -> Curve:
    """Over the steps of one group."""
    group, steps = found[0].group, [each.step or 0 for each in found]
    assert group is not None
    means, spreads = [100 * statistics.fmean(of) for of in values], [100 * (spread_of(of) or 0.0) for of in values]
    return Curve(group.label, steps, means, group.colour, spread=spreads)


def _progress_table(
    along: Sequence[Sequence[Subject]], columns: Sequence[Column], groups: Sequence[RunGroup], what: str
) -> Table:
    head: list[Heading] = ["arm", "steps", ("hours", "change"), ("FLOPs", "change"), (what, "deviation"),
                           "minus baseline's\nlast"]  # fmt: skip
    lasts = {id(found[-1].group): found[-1] for found in along}
    rows: list[list[Cell]] = []
    for each in (each for found in along for each in found):
        assert each.group is not None
        last = lasts.get(id(baseline_of(each.group, groups)))
        apart = None
        if last is not None and all(each.ways(column.task) == last.ways(column.task) for column in columns):
            apart = 100 * (statistics.fmean(each.averages(columns)) - statistics.fmean(last.averages(columns)))
        cells = [percent(each.averages(columns)), number(apart, signed)]
        rows.append([each.label, number(each.step), *_budget(each, groups), *cells])
    note = (
        "Hours and FLOPs are compared with the whole training of the baseline. A task counts the mean of its metrics. "
        "The last column is empty where tasks were fine-tuned on other rows or with other settings than the baseline."
    )
    return Table("scores-over-training", "Scores over training", head, rows, note=note)
