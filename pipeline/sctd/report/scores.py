"""Scores of fine-tuned checkpoints: who has which, their means over seeds, and tables in the paper's layouts."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sctd.evaluate.results import Record, Score
from sctd.objective.flops import saving
from sctd.report import paper
from sctd.report.arms import Group, baseline_of
from sctd.report.document import NOTHING, PAPER, Cell, Head, Number, Table, cost, over, whole
from sctd.report.gather import Evaluation, finite, key_of
from sctd.report.paper import Column, Layout, PaperRow
from sctd.report.words import as_flops, as_hours

_COLUMNS = 10  # of scores beside each other
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
    group: Group | None = None
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
        return next((each.best[task] for each in self.evaluations if task in each.best), None)

    def ways(self, task: str) -> set[tuple[Any, ...]]:
        """How a task was fine-tuned: rows, and settings that were tried."""
        return set().union(*(each.ways(task) for each in self.evaluations))

    @property
    def seeds(self) -> str:
        """`3`, or with several pretraining runs `2 x 3`: the fewest fine-tunings of a task."""
        counts = [len(score.values) for each in self.evaluations for score in each.best.values()]
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
            score = (each.best if epoch == "best" else each.last).get(task)
            values = {} if score is None else score.values if metric == score.metric else score.others.get(metric, {})
            values = {seed: value for seed, value in values.items() if finite(value)}
            if values:
                found[place] = values
        return found


def subjects(groups: Sequence[Group], others: Sequence[Evaluation]) -> list[Subject]:
    """Groups at the last step they were evaluated at, then other checkpoints."""
    found = [at_step(group, group.evaluated[-1]) for group in groups if group.evaluated]
    return found + [Subject(each.name, (each,), step=each.facts.get("step")) for each in others if each.cells]


def at_step(group: Group, step: int) -> Subject:
    there = (run.evaluations.get(step) for run in group.runs)
    return Subject(group.label, tuple(each for each in there if each is not None and each.cells), group, step)


def score_tables(found: Sequence[Subject], groups: Sequence[Group]) -> list[Table]:
    """Each of the paper's layouts that has any score, and what is in none of them; best epoch, then last epoch."""
    tables = []
    for layout in (*paper.LAYOUTS, *_cut(further(found))):
        for epoch in ("best", "last"):
            table = score_table(layout, found, groups, epoch)
            tables += [table] if table else []
    return tables


def score_table(layout: Layout, found: Sequence[Subject], groups: Sequence[Group], epoch: str) -> Table | None:
    """None where nobody has a score of this layout."""
    columns = [c for c in layout.columns if any(each.units(c.task, c.metric, epoch) for each in found)]
    there = [each for each in found if any(each.units(c.task, c.metric, epoch) for c in columns)]
    if not there:
        return None
    suites = list(dict.fromkeys(column.suite for column in columns)) if layout.rows else []
    averages = [_average_head(suite, layout, columns) for suite in suites]
    budget = layout.budget and epoch == "best"
    heads = [Head("arm"), Head("seeds"), Head("steps")]
    heads += [Head("hours", "change"), Head("FLOPs", "change")] if budget else []
    heads += [Head(column.title, "deviation") for column in columns] + [Head(title, "deviation") for title in averages]
    rows, kinds = [], []
    for each in there:
        cells: list[Cell] = [each.label, each.seeds, NOTHING if each.step is None else whole(each.step)]
        scores = [_percent(each.units(column.task, column.metric, epoch)) for column in columns]
        means = [_percent(each.averages([c for c in columns if c.suite == suite], epoch)) for suite in suites]
        rows.append([*cells, *(_budget(each, groups) if budget else []), *scores, *means])
        kinds.append("")
    for row in layout.rows:
        rows.append(_paper_cells(row, layout, columns, suites, budget))
        kinds.append(PAPER)
    when = "best dev epoch" if epoch == "best" else "last epoch"
    name = f"scores-{layout.name}" + ("" if epoch == "best" else "-last-epoch")
    return Table(name, f"{layout.title}: {when}", heads, rows, kinds=kinds, note=_note(layout, columns, budget))


def further(found: Sequence[Subject]) -> Layout:
    """A layout of the tasks and metrics that the paper has none for."""
    known = {(column.task, column.metric) for layout in paper.LAYOUTS for column in layout.columns}
    columns: dict[tuple[str, str], Column] = {}
    for cell in (cell for each in found for evaluation in each.evaluations for cell in evaluation.cells):
        for metric in cell["metrics"]:
            key = (key_of(cell), metric)
            if key not in known:
                columns.setdefault(key, Column(*key, f"{title_of(cell)}\n{metric_name(metric)}"))
    return Layout(
        "further", "Further metrics and tasks, which the paper has no numbers of", tuple(columns.values()), ()
    )


def _cut(layout: Layout) -> list[Layout]:
    """Layouts of no more columns than a page of paper is wide."""
    parts = [layout.columns[start : start + _COLUMNS] for start in range(0, len(layout.columns), _COLUMNS)]
    names = [layout.name if not place else f"{layout.name}-{place + 1}" for place in range(len(parts))]
    return [replace(layout, name=name, columns=columns) for name, columns in zip(names, parts, strict=True)]


def title_of(cell: Record) -> str:
    return f"{cell['title']}, {cell['shots']}-shot" if cell.get("shots") else str(cell["title"])


def metric_name(metric: str) -> str:
    name, mismatched = (metric[:-3], " mm.") if metric.endswith("_mm") else (metric, "")
    return _METRICS.get(name, name) + mismatched


def is_whole(layout: Layout, columns: Sequence[Column], suite: str) -> bool:
    """Whether all columns of this suite are among them."""
    return all(column in columns for column in layout.columns if column.suite == suite)


def _average_head(suite: str, layout: Layout, columns: Sequence[Column]) -> str:
    title = "Avg." if is_whole(layout, columns, suite) else "mean of\nthese"
    return f"{suite}\n{title}" if suite and "\n" not in title else title


def _percent(units: Sequence[float]) -> Number:
    return over([100 * unit for unit in units], lambda value: f"{value:.2f}")


def _budget(subject: Subject, groups: Sequence[Group]) -> list[Cell]:
    """Hours and FLOPs up to its step, and what they save of the baseline's at its last step."""
    if subject.group is None or subject.step is None:
        return [NOTHING, NOTHING]
    baseline = baseline_of(subject.group, groups)
    cells: list[Cell] = []
    for key, say in (("hours", as_hours), ("flops", as_flops)):
        value = subject.group.mean(key, subject.step)
        whole = None if baseline is None or baseline is subject.group else baseline.mean(key)
        cells.append(cost(value, saving(value, whole), say))
    return cells


def _paper_cells(
    row: PaperRow, layout: Layout, columns: Sequence[Column], suites: Sequence[str], budget: bool
) -> list[Cell]:
    cells: list[Cell] = [f"paper, {row.size}: {paper.TITLES[row.arm]}", str(paper.SEEDS), whole(row.steps)]
    if budget:
        cells += [cost(row.hours, row.saving, as_hours), NOTHING]
    places = {column: place for place, column in enumerate(layout.columns)}
    cells += [_paper_score(row.scores[places[column]], layout.digits(column)) for column in columns]
    for suite in suites:
        mine = [column for column in columns if column.suite == suite]
        if row.average is not None and is_whole(layout, columns, suite):
            cells.append(_paper_score(row.average))
        else:
            cells.append(_paper_score(paper_average(row, layout, mine)))
    return cells


def paper_average(row: PaperRow, layout: Layout, columns: Sequence[Column]) -> float:
    """Over the tasks of these columns, a task counting the mean of its columns, as the paper does."""
    tasks: dict[str, list[float]] = {}
    for column in columns:
        tasks.setdefault(column.task, []).append(row.scores[layout.columns.index(column)])
    return statistics.fmean(map(statistics.fmean, tasks.values()))


def _paper_score(value: float, digits: int = 2) -> Number:
    return Number(value, f"{value:.{digits}f}")


def _note(layout: Layout, columns: Sequence[Column], budget: bool) -> str:
    said = ["Percent; mean ± standard deviation over the seeds."]
    if budget:
        said.append("Hours and FLOPs up to the step, and how they compare with the baseline's whole training.")
    missing = [column.title.replace("\n", " ").rstrip(".") for column in layout.columns if column not in columns]
    if missing:
        said.append(f"Not measured here, and left out: {'; '.join(missing)}.")
    if layout.rows and any(not is_whole(layout, columns, column.suite) for column in columns):
        said.append("Means of these are over the columns shown, in the paper's rows too.")
    return " ".join(said)
