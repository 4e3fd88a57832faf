"""One arm against another: held-out loss, cost, and every task, with tests, the paper's differences beside."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from sctd.present.pictures import ORANGE, Dots, Picture, draw_dots, grid
from sctd.present.table import NONE, NOTHING, Cell, Heading, Number, Table, change, number
from sctd.present.words import as_p, counted, signed
from sctd.report import paper, stats
from sctd.report.groups import RunGroup, loss_apart, partners, saved, size_of
from sctd.report.paper import Column, Layout
from sctd.report.scores import Subject, further, main_columns
from sctd.report.stats import Difference

SIZES = ("base", "large")
_LEAST_PAIRS = 6  # that Wilcoxon's test can find significant at 5 %


@dataclass(frozen=True)
class Item:
    """A task on which both have been scored, by its main metric. `p_all`: by Holm's method over the tasks.

    Args:
        means, ours: in percent. theirs: the paper's difference by its size, in percent; none where it has no such task.
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
    """`first` minus `second`.

    Args:
        scored: both, where they were scored at one step. items: every task that both have.
    """

    first: RunGroup
    second: RunGroup
    scored: tuple[Subject, Subject] | None = None
    items: tuple[Item, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.first.label} against {self.second.label}"

    @property
    def size(self) -> str:
        """The paper's that the models are nearest to."""
        return size_of(self.first)

    @property
    def tested(self) -> tuple[Item, ...]:
        return tuple(item for item in self.items if item.same)

    @property
    def units(self) -> tuple[str, str]:
        """What the spread is of, in one word and in a phrase."""
        assert self.scored is not None
        a, b = self.scored
        if _by_run(a, b):
            return "runs", f"pretraining seeds ({len(a.evaluations)} and {len(b.evaluations)})"
        return "seeds", f"fine-tuning seeds ({a.seeds} and {b.seeds})"

    def against(self, size: str) -> tuple[int, int, float] | None:
        """(signs that agree, that can be compared, the paper's mean difference over the same tasks in percent)."""
        items = [item for item in self.tested if size in item.theirs]
        signs = [agrees for item in items if (agrees := item.agrees(size)) is not None]
        return (sum(signs), len(signs), statistics.fmean(item.theirs[size] for item in items)) if items else None


def comparisons(found: Sequence[Subject], groups: Sequence[RunGroup]) -> list[Comparison]:
    """Arms with the baseline, and SCTD with token dropping, of one class."""
    by_group = {id(each.group): each for each in found}
    made = []
    for first, second in partners(groups):
        a, b = by_group.get(id(first)), by_group.get(id(second))
        scored = (a, b) if a and b and a.step == b.step else None
        made.append(Comparison(first, second, scored, _items(*scored, found) if scored else ()))
    return made


def say(compared: Comparison) -> str:
    """One sentence: whether the sign of the mean difference is the paper's, and what the tests can say."""
    items = compared.tested
    if not items:
        return f"{compared.label}: no task on the same rows with the same settings, so scores are not compared."
    known = compared.against(compared.size)
    if known is None:
        whether = "the paper has no such difference"
    else:
        ours = statistics.fmean(item.ours.value for item in items if compared.size in item.theirs)
        whether = "agrees in sign" if known[2] * ours > 0 else "does not agree in sign"
        if not round(known[2], 2) or not round(ours, 2):
            whether = "has no sign to compare"
        whether = f"the mean difference {whether} with the paper's BERT-{compared.size}"
    ps = [item.p_all for item in items if item.p_all is not None]
    sure = f"{sum(p < stats.LEVEL for p in ps)} of {counted(len(ps), 'task')} significant at 5 %"
    if not ps:
        sure = "too few seeds: a test of a task takes two values or more on both sides, and some spread in them"
    few = sum(item.ours.value != 0 for item in items) < _LEAST_PAIRS
    return f"{compared.label}: {whether}; {sure}{'; too few tasks to test their mean' if few else ''}."


def summary_table(compared: Sequence[Comparison]) -> Table:
    """A row for each comparison."""
    head: list[Heading] = ["comparison", "step", ("held-out\nloss", "p"), "time", "FLOPs", "tasks", "higher", "lower",
            ("points", "p"), "significant", *(f"paper,\n{size}" for size in SIZES), "same\nsigns"]  # fmt: skip
    rows: list[list[Cell]] = []
    for each in compared:
        first, second = each.first, each.second
        loss = loss_apart(first, second)
        row: list[Cell] = [each.label, number(min(first.step, second.step))]
        row.append(Number(loss.value, signed(loss.value, 4), loss.p, as_p(loss.p)) if loss else NOTHING)
        row += [change(saved(key, first, second)) for key in ("hours", "flops")]
        values = [item.ours.value for item in each.tested]
        if not values:
            rows.append(row + [NOTHING] * 8)
            continue
        signs, p = each.against(each.size), stats.wilcoxon(values)
        row += [number(len(values)), *(number(sum(sign * v > 0 for v in values)) for sign in (1, -1))]
        mean = statistics.fmean(values)
        row.append(Number(mean, signed(mean), p, as_p(p)))
        row.append(number(sum(item.p_all is not None and item.p_all < stats.LEVEL for item in each.tested)))
        theirs = [each.against(size) for size in SIZES]
        row += [number(of[2], signed) if of else NOTHING for of in theirs]
        rows.append([*row, Number(signs[0], f"{signs[0]} of {signs[1]}") if signs else NOTHING])
    note = (
        "At the last step of both. Loss: nats, p by Welch's t-test over pretraining seeds. Time and FLOPs: relative to "
        "the second arm. Points: mean difference of main metrics in percent over tasks done alike, p by Wilcoxon's "
        "signed-rank test. Significant: tasks at 5 %, by Holm's method. Same signs: as the paper's model of this size."
    )
    return Table("comparisons", "Arms compared", head, rows, note=note)


def comparison_table(compared: Comparison, name: str) -> Table:
    """A row for each task."""
    first, second = compared.first.label, compared.second.label
    head: list[Heading] = ["task", first, second, "difference", ("95 %\ninterval", "high"),
                           f"p over\n{compared.units[0]}", "p, Holm"]  # fmt: skip
    with_p = sum(item.p_all is not None for item in compared.tested)
    note = (
        f"Main metric of each task, percent, best dev epoch. p: Welch's t-test over {compared.units[1]}; Holm: "
        f"corrected for {counted(with_p, 'task')}."
    )
    sizes = [size for size in SIZES if compared.against(size) is not None]
    if sizes:
        head += [*(f"paper,\n{size}" for size in sizes), "sign"]
        note += f" Sign: whether it is that of the paper's BERT-{compared.size}."
    if any(not item.same for item in compared.items):
        note += " †: other rows or settings on the two sides, so nothing is tested and nothing counted."
    rows: list[list[Cell]] = []
    for item in compared.items:
        row: list[Cell] = [item.title if item.same else f"{item.title} †"]
        row += [*(number(mean, ".2f") for mean in item.means), number(item.ours.value, signed)]
        low, high = item.ours.interval or (0.0, 0.0)
        interval = Number(low, f"{signed(low)} to {signed(high)}", high)
        row.append(interval if item.ours.interval else NOTHING)
        row += [number(p, lambda p: as_p(p).removeprefix("p ").removeprefix("= ")) for p in (item.ours.p, item.p_all)]
        row += [number(item.theirs.get(size), signed) for size in sizes]
        sign = {None: NONE, True: "same", False: "other"}[item.agrees(compared.size)]
        rows.append(row + ([sign] if sizes else []))
    return Table(name, f"{first} minus {second}", head, rows, note=note)


def forest(compared: Sequence[Comparison]) -> Picture:
    """Differences with their intervals, the paper's beside them."""
    titles = list(dict.fromkeys(item.title for each in compared for item in each.items))
    panels = []
    for each in compared:
        theirs = {size: {i.title: i.theirs[size] for i in each.items if size in i.theirs} for size in SIZES}
        ours = {item.title: item.ours.value for item in each.items}
        spans = {item.title: item.ours.interval for item in each.items if item.ours.interval}
        hollow = [item.title for item in each.items if not item.same]
        dots = [
            Dots("paper, BERT-large", theirs["large"], "#8a94a0", "s", hollow=titles),
            Dots("paper, BERT-base", theirs["base"], ORANGE, "D", hollow=titles),
            Dots("ours", ours, each.first.colour, "o", spans, hollow),
        ]
        title = f"{each.first.label} − {each.second.label}"
        panels.append(partial(draw_dots, names=titles, series=dots, title=title, zero=True))
    note = (
        "Points of a percent; whiskers: 95 % interval over the seeds, where there are two or more on both sides. "
        "Scores of models of another size or family are not comparable, signs of differences may be."
    )
    title, height = "Differences between arms, task by task", 1.1 + 0.27 * len(titles)
    return Picture("differences", title, height, grid(panels, across=len(panels)), note)


def _items(first: Subject, second: Subject, found: Sequence[Subject]) -> tuple[Item, ...]:
    items: dict[str, Item] = {}
    for layout in (*paper.LAYOUTS, further(found)):
        for column in main_columns(layout, found):
            a, b = _values(first, second, column)
            title = column.title.replace("\n", " ")
            if not a or not b or title in items:
                continue
            same, means = (
                first.ways(column.task) == second.ways(column.task),
                (statistics.fmean(a), statistics.fmean(b)),
            )
            ours = stats.welch(a, b) if same else Difference(means[0] - means[1])
            items[title] = Item(title, means, ours, _theirs(layout, column, first, second), same)
    ps = stats.holm([item.ours.p for item in items.values()])
    return tuple(replace(item, p_all=p) for item, p in zip(items.values(), ps, strict=True))


def _by_run(first: Subject, second: Subject) -> bool:
    """Whether each pretraining run counts once: where both sides have several."""
    return min(len(first.evaluations), len(second.evaluations)) > 1


def _values(first: Subject, second: Subject, column: Column) -> list[list[float]]:
    """What the spread is taken of on both sides, in percent: of pretraining runs, or else of fine-tunings."""
    of = Subject.units if _by_run(first, second) else Subject.pooled
    return [[100 * value for value in of(each, column.task, column.metric)] for each in (first, second)]


def _theirs(layout: Layout, column: Column, first: Subject, second: Subject) -> dict[str, float]:
    found = {}
    for size in SIZES:
        scores = [layout.score(size, each.group.arm if each.group else "", column) for each in (first, second)]
        if scores[0] is not None and scores[1] is not None:
            found[size] = round(scores[0] - scores[1], 2)
    return found
