"""Losses of the runs: curves over four budgets, and where they end."""

import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sctd.report import stats
from sctd.report.arms import Group, baseline_of, partners
from sctd.report.curves import AXES, curves, gaps
from sctd.report.document import NOTHING, Cell, Head, Number, Picture, Section, Table, change, number, over, whole
from sctd.report.figures import TICKS, add_legend, draw_curves, limit, panel
from sctd.report.stats import Difference, mean_of
from sctd.report.words import counted, listed, signed
from sctd.train.flops import saving

_TICKS = 5  # of a panel beside another one: "2.5 million" is wide


def loss_section(groups: Sequence[Group]) -> Section:
    section = Section("losses", "Losses")
    held_out, training = curves(groups, "step", "valid_loss"), curves(groups, "step", "loss", smooth=True)
    silent = [run.name for group in groups for run in group.runs if not run.records]
    if silent:
        section.parts.append(f"Without any step on record so far: {listed(silent)}.")
    if held_out:
        section.parts += [_held_out_words(groups), _loss_picture(groups)]
        if gaps(groups, "step"):
            section.parts.append(_gap_picture(groups))
        section.parts.append(_loss_table(groups))
    else:
        section.parts.append("No run has a held-out loss on record, so there are no curves of it.")
    if training:
        note = (
            "Means since the record before, neighbours averaged. Arms train on different sums of terms (of an ALIGN "
            "step both paths and the KL terms), so these curves show progress and do not compare arms."
        )
        fill = panel(training, "optimizer steps", "training loss (nats)")
        section.parts.append(Picture("training-loss", "Training loss", 3.0, fill, note))
    return section


def _held_out_words(groups: Sequence[Group]) -> str:
    rows = [run.config.train.valid_rows for group in groups for run in group.trained]
    said = [
        f"Measured on up to {counted(max(rows), 'held-out row')} through the full path, whatever the arm, so that arms "
        "can be compared."
    ]
    found: dict[int, list[str]] = {}
    for first, second in partners(groups):
        pairs = [[run.at(first.step).get("valid_loss") for run in each.trained] for each in (first, second)]
        a, b = ([value for value in values if value is not None] for values in pairs)
        if first.step == second.step and a and b and [len(a), len(b)] == [len(values) for values in pairs]:
            found.setdefault(first.step, []).append(f"{first.label} is {_apart(stats.welch(a, b), second.label)}")
    said += [f"At step {step:,} {listed(parts)}." for step, parts in found.items()]
    if found and all(len(group.trained) == 1 for group in groups):
        said.append("With one run an arm there is no test of these differences.")
    return " ".join(said)


def _apart(difference: Difference, label: str) -> str:
    """How far below or above, and whether that is chance."""
    test = "" if difference.p is None else f" (Welch's t-test over the seeds: {stats.as_p(difference.p)})"
    amount = f"{abs(difference.value):.4f}"
    if not float(amount):
        return f"level with {label}{test}"
    return f"{amount} nats {'below' if difference.value < 0 else 'above'} {label}{test}"


def _loss_picture(groups: Sequence[Group]) -> Picture:
    def fill(figure: Figure) -> None:
        shared: Axes | None = None
        for place, (key, title) in enumerate(AXES.items(), 1):
            axes = figure.add_subplot(2, 2, place, sharey=shared)
            shared = shared or axes
            draw_curves(axes, curves(groups, key, "valid_loss"), markers=True)
            axes.set_xlabel(title)
            axes.xaxis.set_major_formatter(TICKS[key])
            axes.xaxis.set_major_locator(MaxNLocator(_TICKS))
            axes.tick_params(labelleft=place % 2 == 1)
            if place % 2 == 1:
                axes.set_ylabel("held-out loss (nats)")
        limit(figure.axes[0], curves(groups, "step", "valid_loss"))
        add_legend(figure)

    note = (
        "FLOPs are those of the matrix products, by the formula of each step's phase; hours are of training alone, "
        "without validation, evaluation and saving."
    )
    several = any(len(group.trained) > 1 for group in groups)
    note += " Thin lines: single runs; thick: their mean." if several else ""
    title = "Held-out loss over steps, tokens, FLOPs and hours"
    return Picture("held-out-loss", title, 5.2, fill, note)


def _gap_picture(groups: Sequence[Group]) -> Picture:
    keys = [key for key in ("step", "flops", "hours") if gaps(groups, key)]

    def fill(figure: Figure) -> None:
        for place, key in enumerate(keys, 1):
            axes = figure.add_subplot(1, len(keys), place)
            draw_curves(axes, gaps(groups, key))
            axes.axhline(0, color="#555555", lw=0.9)
            axes.set_xlabel(AXES[key])
            axes.xaxis.set_major_formatter(TICKS[key])
            axes.xaxis.set_major_locator(MaxNLocator(_TICKS))
        figure.axes[0].set_ylabel("minus baseline (nats)")
        add_legend(figure)

    note = (
        "On as many steps, on as many FLOPs, in as many hours; the baseline's loss between its validations is taken "
        "from the line through them. Below 0: better than the baseline. At equal FLOPs or hours the arms stand at "
        "different points of their learning-rate schedules, which favours those that are further on. The first tenth "
        "is left out."
    )
    return Picture("held-out-loss-difference", "Held-out loss minus the baseline's", 2.9, fill, note)


def _loss_table(groups: Sequence[Group]) -> Table:
    head = [Head("arm"), Head("runs"), Head("steps"), Head("tokens"), Head("held-out\nloss", "deviation"),
            Head("minus\nbaseline"), Head("masked\naccuracy", "deviation"), Head("baseline's last\nloss at step"),
            Head("hours vs.\nbaseline"), Head("FLOPs vs.\nbaseline")]  # fmt: skip
    rows: list[list[Cell]] = []
    for group in groups:
        if not group.trained:
            continue
        baseline = baseline_of(group, groups)
        alike = baseline is not None and baseline is not group and baseline.step == group.step
        theirs = baseline.mean("valid_loss") if baseline is not None and alike else None
        loss, accuracy = (
            [run.at(group.step).get(key) for run in group.trained] for key in ("valid_loss", "valid_accuracy")
        )
        minus = None if mean_of(loss) is None or theirs is None else (mean_of(loss) or 0) - theirs
        row: list[Cell] = [group.label, whole(len(group.trained)), whole(group.step)]
        row += [number(group.mean("tokens"), _count), over(loss, _loss), number(minus, lambda value: signed(value, 4))]
        row.append(over([None if value is None else 100 * value for value in accuracy], lambda value: f"{value:.2f}"))
        row += _reached(group, baseline)
        rows.append(row)
    note = (
        "Masked accuracy in percent. Of a run that is not at its end, loss and accuracy are those of its last "
        "validation. Minus the baseline: where both ended at one step. The last three columns: the "
        "first validation whose loss is no higher than the baseline's last, and what it took until then relative to "
        "the whole training of the baseline."
    )
    return Table("held-out-loss", "Held-out loss at the end", head, rows, note=note)


def _reached(group: Group, baseline: Group | None) -> list[Cell]:
    """Step, saving of hours and of FLOPs when the mean loss comes down to the baseline's last."""
    if baseline is None or baseline is group:
        return [NOTHING] * 3
    last = baseline.mean("valid_loss")
    losses = [run.known("valid_loss") for run in group.trained]
    steps = sorted(set.intersection(*map(set, losses))) if losses else []
    means = ((step, statistics.fmean(of[step] for of in losses)) for step in steps)
    step = next((step for step, mean in means if last is not None and mean <= last), None)
    if step is None:
        return ["not reached" if steps and last is not None else NOTHING, NOTHING, NOTHING]
    return [whole(step), *(_saving(group, baseline, key, step) for key in ("hours", "flops"))]


def _saving(group: Group, baseline: Group, key: str, step: int | None = None) -> Number:
    return change(saving(group.mean(key, step), baseline.mean(key)))


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _loss(value: float) -> str:
    return f"{value:.4f}"
