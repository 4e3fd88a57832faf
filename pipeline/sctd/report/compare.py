"""One arm against another over the tasks: differences, tests, and whether their signs are the paper's."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sctd.report import paper, stats
from sctd.report.arms import Group, is_papers, partners, size_of
from sctd.report.document import NONE, NOTHING, Cell, Head, Number, Picture, Table
from sctd.report.paper import Column, Layout
from sctd.report.scores import Subject, further
from sctd.report.stats import Difference
from sctd.report.words import counted, listed, opening, signed

_INK, _PAPER_INK = "#1b2430", {"base": "#d1742b", "large": "#8a94a0"}
_MARKS = {"base": "D", "large": "s"}
_LEAST_PAIRS = 6  # that Wilcoxon's test can find significant at 5 %


@dataclass(frozen=True)
class Item:
    """A task on which both have been scored, by its main metric. `p_all`: by Holm's method over the tasks.

    Args:
        ours: difference, as a fraction. theirs: the paper's by its size, in percent; none where it has no such task.
        same: whether rows and settings are the same on both sides; where not, nothing is tested.
    """

    title: str
    means: tuple[float, float]
    ours: Difference
    theirs: dict[str, float]
    same: bool
    p_all: float | None = None

    def agrees(self, size: str) -> bool | None:
        """Whether the sign is the paper's; None where the paper has none, or one of the two is 0."""
        known = self.theirs.get(size, 0.0)
        return (known > 0) == (self.ours.value > 0) if known and self.ours.value else None


@dataclass(frozen=True)
class Comparison:
    """`first` minus `second`, on every task that both have. `size`: the paper's that the models are nearest to."""

    first: Subject
    second: Subject
    items: tuple[Item, ...]
    size: str

    @property
    def tested(self) -> tuple[Item, ...]:
        return tuple(item for item in self.items if item.same)

    @property
    def with_p(self) -> tuple[Item, ...]:
        return tuple(item for item in self.tested if item.p_all is not None)

    @property
    def mean(self) -> float:
        """Over the tasks done in the same way, as a fraction."""
        return statistics.fmean(item.ours.value for item in self.tested)

    @property
    def p(self) -> float | None:
        """Of no difference over the tasks."""
        return stats.wilcoxon([item.ours.value for item in self.tested])

    @property
    def units(self) -> tuple[str, str]:
        """What the spread is of, in one word and in a phrase."""
        if _by_run(self.first, self.second):
            return "runs", f"pretraining seeds ({len(self.first.evaluations)} and {len(self.second.evaluations)})"
        return "seeds", f"fine-tuning seeds ({self.first.seeds} and {self.second.seeds})"

    def shared(self, size: str) -> tuple[Item, ...]:
        """The tested tasks that the paper has for this size."""
        return tuple(item for item in self.tested if size in item.theirs)

    def against(self, size: str) -> tuple[int, int, float] | None:
        """(signs that agree, that can be compared, the paper's mean difference over the same tasks in percent)."""
        items = self.shared(size)
        if not items:
            return None
        signs = [item.agrees(size) for item in items if item.agrees(size) is not None]
        return sum(map(bool, signs)), len(signs), statistics.fmean(item.theirs[size] for item in items)


def comparisons(found: Sequence[Subject], groups: Sequence[Group]) -> list[Comparison]:
    """Arms with the baseline, and SCTD with token dropping: of one class, at one step."""
    by_group = {id(each.group): each for each in found if each.group is not None}
    pairs = [(by_group.get(id(first)), by_group.get(id(second))) for first, second in partners(groups)]
    made = [
        Comparison(first, second, _items(first, second, found), size_of(first.group))
        for first, second in pairs
        if first and second and first.group and first.step == second.step
    ]
    return [each for each in made if each.items]


def comparison_table(compared: Comparison, name: str) -> Table:
    first, second = compared.first.label, compared.second.label
    head = [Head("task"), Head(first), Head(second), Head("difference"), Head("95 %\ninterval", "high"),
            Head(f"p over\n{compared.units[0]}"), Head("p, Holm")]  # fmt: skip
    note = (
        f"Main metric of each task, percent, best dev epoch. p: Welch's t-test over {compared.units[1]}; Holm: "
        f"corrected for {counted(len(compared.with_p), 'task')}."
    )
    sizes = [size for size in ("base", "large") if compared.against(size) is not None]
    if sizes:
        head += [*(Head(f"paper,\n{size}") for size in sizes), Head("sign")]
        note += f" Sign: whether it is that of the paper's BERT-{compared.size}."
    rows = [_row(item, sizes, compared.size) for item in compared.items]
    if any(not item.same for item in compared.items):
        note += " †: other rows or settings on the two sides, so nothing is tested and nothing counted."
    return Table(name, f"{first} minus {second}", head, rows, note=note)


def say(compared: Comparison) -> str:
    """The comparison in plain sentences."""
    first, second, items = compared.first.label, compared.second.label, compared.tested
    if not items:
        return f"{first} and {second} have no task on the same rows with the same settings, so they are not compared."
    up = sum(item.ours.value > 0 for item in items)
    down = sum(item.ours.value < 0 for item in items)
    said = [
        f"{opening(first)} against {second}: higher on {up} and lower on {down} of {counted(len(items), 'task')}, by "
        f"{signed(100 * compared.mean)} points on average ({_over_tasks(compared)})."
    ]
    said.append(_significant(compared))
    for size in ("base", "large"):
        known = compared.against(size)
        if known is not None and (size == compared.size or not _is_papers(compared)):
            said.append(_beside(compared, size, *known))
    return " ".join(part for part in said if part)


def forest(compared: Sequence[Comparison]) -> Picture:
    """Differences with their intervals, the paper's beside them."""
    titles = list(dict.fromkeys(item.title for each in compared for item in each.items))

    def fill(figure: Figure) -> None:
        shared: Axes | None = None
        for place, each in enumerate(compared, 1):
            axes = figure.add_subplot(1, len(compared), place, sharey=shared)
            shared = shared or axes
            _draw(axes, each, titles)
            axes.tick_params(labelleft=place == 1)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3)

    note = (
        "Points of a percent; whiskers: 95 % interval over the seeds, where there are two or more on both sides. "
        "Scores of models of another size or family are not comparable, signs of differences may be."
    )
    return Picture("differences", "Differences between arms, task by task", 1.1 + 0.27 * len(titles), fill, note)


def _items(first: Subject, second: Subject, found: Sequence[Subject]) -> tuple[Item, ...]:
    items: list[Item] = []
    for layout in (*paper.LAYOUTS, further(found)):
        for column in _main_columns(layout, found):
            a, b = _values(first, second, column)
            title = column.title.replace("\n", " ")
            if not a or not b or any(item.title == title for item in items):
                continue
            same = first.ways(column.task) == second.ways(column.task)
            ours = stats.welch(a, b) if same else Difference(statistics.fmean(a) - statistics.fmean(b))
            theirs = _theirs(layout, column, first, second)
            items.append(Item(title, (statistics.fmean(a), statistics.fmean(b)), ours, theirs, same))
    ps = stats.holm([item.ours.p for item in items])
    return tuple(replace(item, p_all=p) for item, p in zip(items, ps, strict=True))


def _by_run(first: Subject, second: Subject) -> bool:
    """Whether each pretraining run counts once: where both sides have several."""
    return min(len(first.evaluations), len(second.evaluations)) > 1


def _values(first: Subject, second: Subject, column: Column) -> tuple[list[float], list[float]]:
    """What the spread is taken of on both sides: of pretraining runs, or else of fine-tunings."""
    if _by_run(first, second):
        return first.units(column.task, column.metric), second.units(column.task, column.metric)
    return first.pooled(column.task, column.metric), second.pooled(column.task, column.metric)


def _main_columns(layout: Layout, found: Sequence[Subject]) -> list[Column]:
    """One for each task: its main metric."""
    main = {}
    for column in layout.columns:
        score = next((each.score(column.task) for each in found if each.score(column.task)), None)
        if score is not None and score.metric == column.metric:
            main[column.task] = column
    return list(main.values())


def _theirs(layout: Layout, column: Column, first: Subject, second: Subject) -> dict[str, float]:
    found = {}
    for size in ("base", "large"):
        arms = [each.group.arm if each.group else "" for each in (first, second)]
        scores = [layout.score(size, arm, column) for arm in arms]
        if scores[0] is not None and scores[1] is not None:
            found[size] = round(scores[0] - scores[1], 2)
    return found


def _row(item: Item, sizes: Sequence[str], size: str) -> list[Cell]:
    ours = item.ours
    cells: list[Cell] = [item.title if item.same else f"{item.title} †"]
    cells += [Number(100 * mean, f"{100 * mean:.2f}") for mean in item.means]
    cells.append(Number(100 * ours.value, signed(100 * ours.value)))
    if ours.low is None or ours.high is None:
        cells.append(NOTHING)
    else:
        low, high = 100 * ours.low, 100 * ours.high
        cells.append(Number(low, f"{signed(low)} to {signed(high)}", high))
    cells += [NOTHING if p is None else Number(p, _short_p(p)) for p in (ours.p, item.p_all)]
    if not sizes:
        return cells
    for of in sizes:
        cells.append(Number(item.theirs[of], signed(item.theirs[of])) if of in item.theirs else NOTHING)
    agrees = item.agrees(size)
    return [*cells, NONE if agrees is None else "same" if agrees else "other"]


def _short_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _over_tasks(compared: Comparison) -> str:
    if compared.p is None:
        return "no test over the tasks"
    differ = sum(item.ours.value != 0 for item in compared.tested)
    few = ", which so few differences cannot bring below 0.05" if differ < _LEAST_PAIRS else ""
    return f"Wilcoxon's signed-rank test over the tasks: {stats.as_p(compared.p)}{few}"


def _significant(compared: Comparison) -> str:
    """Which single tasks differ beyond chance."""
    tested = compared.with_p
    if not tested:
        return "There is no test of single tasks: it takes two values or more on both sides, and some spread in them."
    sure = [item for item in tested if item.p_all is not None and item.p_all < stats.LEVEL]
    how = f"Welch's t-test over {compared.units[1]}, corrected by Holm's method for {counted(len(tested), 'task')}"
    if not sure:
        return f"No single task differs significantly at 5 % ({how})."
    parts = [f"{item.title} ({signed(100 * item.ours.value)})" for item in sure]
    return f"Significant at 5 % by itself: {listed(parts)} ({how})."


def _beside(compared: Comparison, size: str, same: int, of: int, mean: float) -> str:
    """Our mean and signs beside the paper's."""
    tasks = compared.shared(size)
    ours = statistics.fmean(item.ours.value for item in tasks)
    over = "these tasks" if len(tasks) == len(compared.tested) else f"the {counted(len(tasks), 'task')} that it has"
    whether = "agrees with the paper in sign" if mean * ours > 0 else "does not agree with the paper in sign"
    if not round(mean, 2) or not round(100 * ours, 2):
        whether = "has no sign to compare"
    mine = "" if len(tasks) == len(compared.tested) else f", ours {signed(100 * ours)}"
    return (
        f"The paper's difference for BERT-{size} over {over} is {signed(mean)}{mine}: our run {whether} on average, "
        f"and on {same} of the {of} tasks where both differences are not 0."
    )


def _is_papers(compared: Comparison) -> bool:
    return compared.first.group is not None and is_papers(compared.first.group)


def _draw(axes: Axes, compared: Comparison, titles: Sequence[str]) -> None:
    places = {title: place for place, title in enumerate(titles)}
    for size in ("large", "base"):
        points = [(item.theirs[size], places[item.title]) for item in compared.items if size in item.theirs]
        axes.plot(
            [x for x, _ in points], [y for _, y in points], _MARKS[size], ms=4.5, mfc="none", color=_PAPER_INK[size],
            label=f"paper, BERT-{size}",
        )  # fmt: skip
    colour = compared.first.group.colour if compared.first.group else _INK
    for item in compared.items:
        y, value = places[item.title], 100 * item.ours.value
        if item.ours.low is not None and item.ours.high is not None:
            axes.plot([100 * item.ours.low, 100 * item.ours.high], [y, y], "-", lw=1.3, color=colour)
        axes.plot([value], [y], "o", ms=5, color=colour if item.same else "white", mec=colour)
    axes.plot([], [], "o-", ms=5, color=_INK, label="ours")
    axes.axvline(0, color="#9aa3ad", lw=0.9, zorder=0)
    axes.set_yticks(range(len(titles)), titles)
    axes.set_ylim(len(titles) - 0.5, -0.5)
    axes.set_title(f"{compared.first.label} − {compared.second.label}", fontsize=9)
    axes.set_xlabel("points")
