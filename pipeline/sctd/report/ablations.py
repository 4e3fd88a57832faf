"""Ablations (Tables 4 and 5, Figure 7, ways to choose the kept tokens), the paper's numbers beside."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sctd.evaluate.ablate.ablations import Row
from sctd.evaluate.ablate.table import Line
from sctd.objective.flops import saving
from sctd.report import paper, stats
from sctd.report.document import (
    Cell,
    Fill,
    Head,
    Number,
    Part,
    Picture,
    Section,
    Table,
    change,
    cost,
    number,
    over,
    whole,
)
from sctd.report.gather import Ablation
from sctd.report.paper import Column
from sctd.report.scores import Subject, further
from sctd.report.words import as_flops, as_hours, counted, listed, short_name, signed

_BASELINE = "baseline"
_LEAST_RANKED = 4  # rows that a rank correlation is worth a word of


@dataclass(frozen=True)
class _Entry:
    """A row with its results and those of the paper: (name, value in percent) by column."""

    row: Row
    line: Line | None
    scored: Subject
    theirs: dict[str, float]


def ablation_section(ablations: Sequence[Ablation]) -> Section | None:
    """None where there are none."""
    section = Section("ablations", "Ablations")
    for place, ablation in enumerate(ablations):
        name = (
            ablation.kind if [a.kind for a in ablations].count(ablation.kind) == 1 else f"{ablation.kind}-{place + 1}"
        )
        section.parts += _parts(ablation, f"ablation-{name}")
    return section if section.parts else None


def _parts(ablation: Ablation, name: str) -> list[Part]:
    entries = [
        _Entry(row, line, Subject(row.label, (scored,) if scored.cells else ()), _theirs(ablation.kind, row))
        for row, line, scored in ablation.lines
    ]
    done = [entry for entry in entries if entry.line is not None and entry.line.finished]
    if not done:
        return [f"{ablation.title}: none of its {counted(len(entries), 'run')} is finished yet."]
    columns = _columns([entry.scored for entry in done])
    parts: list[Part] = [" ".join(part for part in (
        f"{ablation.title}: {counted(len(done), 'run')} of recipe {short_name(ablation.recipe)}, one seed each.",
        paper.ABLATIONS.get(ablation.kind, ""), _agreement(done, columns),
        "With one run a row, differences between rows are not told from those between seeds.",
    ) if part)]  # fmt: skip
    left = [entry.row.label for entry in entries if entry not in done]
    if left:
        parts.append(f"Not finished, and left out: {listed(left)}.")
    parts.append(Picture(name, ablation.title, 0.9 + 0.27 * len(done), _dots(done, columns)))
    parts.append(_table(ablation, name, done, columns))
    if columns:
        parts.append(_task_table(ablation, name, done, columns))
    return parts


def _theirs(kind: str, row: Row) -> dict[str, float]:
    """The paper's numbers of a row."""
    if kind == "objectives" and row.value in paper.OBJECTIVES:
        found: tuple[float | None, ...] = paper.OBJECTIVES[str(row.value)]
        names = ["GLUE", "SuperGLUE", "SQuAD"]
    elif kind == "interval" and row.value in paper.INTERVALS:
        found, names = paper.INTERVALS[row.value], ["hours", "saving", "GLUE", "SQuAD"]
    else:
        return {}
    return {name: value for name, value in zip(names, found, strict=True) if value is not None}


def _columns(scored: Sequence[Subject]) -> list[Column]:
    """Of the tasks that all finished runs were scored on: as the paper's tables count them, others by main metric."""
    columns: dict[tuple[str, str], Column] = {}
    for layout in paper.LAYOUTS:
        for column in layout.columns:
            columns.setdefault((column.task, column.metric), column)
    for column in further(scored).columns:
        if any(score is not None and score.metric == column.metric for score in (s.score(column.task) for s in scored)):
            columns[column.task, column.metric] = column
    return [c for c in columns.values() if all(each.units(c.task, c.metric) for each in scored)]


def _mean(entry: _Entry, columns: Sequence[Column]) -> float | None:
    values = entry.scored.averages(columns)
    return 100 * statistics.fmean(values) if values else None


def _agreement(entries: Sequence[_Entry], columns: Sequence[Column]) -> str:
    """Whether rows come in the paper's order."""
    known = [entry for entry in entries if "GLUE" in entry.theirs]
    means = [_mean(entry, columns) for entry in known] if columns else []
    losses = [entry.line.loss if entry.line else None for entry in known]
    values, what = (means, "mean score") if means and None not in means else (losses, "held-out loss, lowest first,")
    if len(known) < _LEAST_RANKED or None in values:
        return ""
    sign = 1 if values is means else -1
    ours = [sign * value for value in values if value is not None]
    found, p = stats.rank_correlation(ours, [entry.theirs["GLUE"] for entry in known])
    if found != found:
        return ""
    order = "much as in the paper" if found > 0 and p < stats.LEVEL else "in no order that is surely the paper's"
    return (
        f"By {what} our rows come {order}: rank correlation with the paper's GLUE averages {signed(found)}, "
        f"{stats.as_p(p)}, {len(known)} rows."
    )


def _table(ablation: Ablation, name: str, entries: Sequence[_Entry], columns: Sequence[Column]) -> Table:
    """A row for each run: costs, means over tasks, and the paper's numbers."""
    means = [(f"mean of\n{suite}", _of(suite, columns)) for suite in ("GLUE", "SuperGLUE", "SQuAD")]
    means = [(title, of) for title, of in means if len(of) > 1]
    tasks = {column.task for column in columns}
    if tasks:
        means.append((f"mean of\n{counted(len(tasks), 'task')}", list(columns)))
    theirs = list(dict.fromkeys(key for entry in entries for key in entry.theirs))
    head = [Head("run"), Head("steps"), Head("held-out\nloss"), Head("hours", "change"), Head("FLOPs", "change")]
    head += [Head(title, "deviation") for title, _ in means]
    head += [Head(f"paper:\n{'change' if key == 'saving' else key}") for key in theirs]
    hours = next((e.line.hours for e in entries if e.line and e.row.value == _BASELINE), None)
    rows: list[list[Cell]] = []
    for entry in entries:
        line = entry.line
        assert line is not None
        row: list[Cell] = [entry.row.label, whole(line.goal), number(line.loss, lambda value: f"{value:.4f}")]
        row.append(cost(line.hours, saving(line.hours, hours), as_hours))
        row.append(cost(line.flops, saving(line.flops, line.baseline_flops), as_flops))
        row += [_percent(entry.scored.averages(of)) for _, of in means]
        row += [change(entry.theirs.get(k)) if k == "saving" else number(entry.theirs.get(k), _plain) for k in theirs]
        rows.append(row)
    note = "Hours and FLOPs are compared with the baseline on as many steps."
    if means:
        note += " Means in percent, best dev epoch, a task counting the mean of its metrics."
    if ablation.kind == "objectives":
        note += " Which of the paper's rows with two check marks is which pair is taken from the order of its columns."
    return Table(name, ablation.title, head, rows, note=note)


def _task_table(ablation: Ablation, name: str, entries: Sequence[_Entry], columns: Sequence[Column]) -> Table:
    """Main metrics."""
    main = list({column.task: column for column in reversed(columns)}.values())[::-1]
    head = [Head("run"), *(Head(column.title, "deviation") for column in main)]
    rows: list[list[Cell]] = [
        [entry.row.label, *(_percent(entry.scored.units(column.task, column.metric)) for column in main)]
        for entry in entries
    ]
    note = "Percent, best dev epoch, over fine-tuning seeds."
    return Table(f"{name}-tasks", f"{ablation.title}: tasks", head, rows, note=note)


def _of(suite: str, columns: Sequence[Column]) -> list[Column]:
    return [column for column in columns if column.suite == suite]


def _percent(units: Sequence[float]) -> Number:
    return over([100 * unit for unit in units], _plain)


def _plain(value: float) -> str:
    return f"{value:.2f}"


def _dots(entries: Sequence[_Entry], columns: Sequence[Column]) -> Fill:
    """A panel for each measure: held-out loss, mean score, the paper's GLUE average."""
    panels: list[tuple[str, list[float | None]]] = [
        ("held-out loss (nats)", [entry.line.loss if entry.line else None for entry in entries])
    ]
    tasks = {column.task for column in columns}
    if tasks:
        what = f"mean of {counted(len(tasks), 'task')} (%)"
        panels.append((what, [_mean(entry, columns) for entry in entries]))
    panels.append(("hours of training", [entry.line.hours if entry.line else None for entry in entries]))
    panels.append(("paper: GLUE average (%)", [entry.theirs.get("GLUE") for entry in entries]))
    shown = [(title, values) for title, values in panels if any(value is not None for value in values)]

    def fill(figure: Figure) -> None:
        for place, (title, values) in enumerate(shown, 1):
            axes = figure.add_subplot(1, len(shown), place)
            points = [(value, y) for y, value in enumerate(values) if value is not None]
            colour = "#8a94a0" if title.startswith("paper") else "#2b6cb0"
            axes.plot([x for x, _ in points], [y for _, y in points], "o", ms=5, color=colour)
            axes.set_yticks(range(len(entries)), [entry.row.label for entry in entries])
            axes.set_ylim(len(entries) - 0.5, -0.5)
            axes.margins(x=0.12)
            axes.ticklabel_format(axis="x", useOffset=False)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.tick_params(labelleft=place == 1)
            axes.set_xlabel(title)

    return fill
