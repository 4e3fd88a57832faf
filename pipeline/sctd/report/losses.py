"""Losses of the runs: curves over four budgets, and where they end."""

import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sctd.objective.build import build_hook
from sctd.objective.flops import saving
from sctd.report import stats
from sctd.report.arms import Group, baseline_of, partners
from sctd.report.curves import AXES, curves, gaps
from sctd.report.document import NOTHING, Cell, Head, Number, Picture, Section, Table, change, number, over, whole
from sctd.report.figures import TICKS, add_legend, draw_curves, limit, panels
from sctd.report.gather import Run
from sctd.report.stats import Difference, mean_of
from sctd.report.words import counted, listed, signed

NOT_REACHED = "not reached"
_GREY = "#555555"
# Of ALIGN steps.
_TERMS = {
    "kl_global": "KL_global (nats)",
    "kl_local": "KL_local (nats)",
    "kl_gradient": "gradient of λ KL, relative to MLM's",
}
_TICKS = 3  # of a panel beside another one: "2.5 million" is wide


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
        section.parts += [_loss_table(groups), *_learning(groups)]
    else:
        section.parts.append("No run has a held-out loss on record, so there are no curves of it.")
    if training:
        note = (
            "Means since the record before, neighbours averaged. Arms train on different sums of terms (of an ALIGN "
            "step both paths and the KL terms), so these curves show progress and do not compare arms."
        )
        fill = panels({"training loss (nats)": training})
        section.parts.append(Picture("training-loss", "Training loss", 3.0, fill, note))
    terms = {title: curves(groups, "step", key, smooth=True) for key, title in _TERMS.items()}
    terms = {title: found for title, found in terms.items() if found}
    if terms:
        note = (
            "The KL terms are means since the record before, without λ. Right: norm of their gradient, λ included, "
            "relative to that of the MLM terms, at the ALIGN steps on record."
        )
        section.parts.append(Picture("alignment", "Alignment of the two paths", 2.9, panels(terms), note))
    return section


def breakthrough(run: Run) -> int | str | None:
    """The step of the first validation at least 1 nat below the unigram entropy; None of a run that did not look."""
    return run.at(run.step).get("breakthrough_step", NOT_REACHED) if "breakthrough_step" in run.keys else None


def _learning(groups: Sequence[Group]) -> list[Table]:
    """Run by run, whether it has learnt more than frequencies; nothing where no run looked."""
    head = [Head("run"), Head("arm"), Head("seed"), Head("steps"), Head("gap"), Head("context\nuse"),
            Head("breakthrough\nat step")]  # fmt: skip
    rows: list[list[Cell]] = []
    for group, run in ((of, run) for of in groups for run in of.trained):
        last, step = run.at(run.step), breakthrough(run)
        row: list[Cell] = [run.name, group.label, str(run.config.run.seed), whole(run.step)]
        row += [number(last.get("valid_gap"), signed), number(last.get("context_use"), _share)]
        rows.append([*row, whole(step) if isinstance(step, int) else step or NOTHING])
    if not any("valid_gap" in run.keys for group in groups for run in group.trained):
        return []
    note = (
        "Gap: nats below the unigram entropy, the loss of a model that knows how frequent tokens are and ignores the "
        "context. Context use: distance (total variation) between the distribution predicted at a mask and the mean "
        "over all masks; 0: the same everywhere. Breakthrough: the first validation with a gap of 1 nat or more."
    )
    return [Table("learning", "What each run has learnt, at its last validation", head, rows, texts=2, note=note)]


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
    found = curves(groups, "step", "valid_loss")
    entropies = {run.corpus: run.manifest.unigram_entropy for group in groups for run in group.trained}

    def fill(figure: Figure) -> None:
        grid = figure.add_gridspec(2, 3)
        upper = figure.add_subplot(grid[0, :])
        draw_curves(upper, found, markers=True)
        limit(upper, found, *entropies.values())
        for entropy in entropies.values():
            upper.axhline(entropy, color=_GREY, ls="--", lw=1.0, label="unigram entropy")
        _draw_breakthroughs(upper, groups)
        _draw_phases(upper, groups)
        shared: Axes | None = None
        for place, key in enumerate(key for key in AXES if key != "step"):
            axes = figure.add_subplot(grid[1, place], sharey=shared)
            shared = shared or axes
            draw_curves(axes, curves(groups, key, "valid_loss"), markers=True)
            axes.tick_params(labelleft=axes is shared)
        limit(figure.axes[1], found)
        for axes, (key, title) in zip(figure.axes, AXES.items(), strict=True):
            axes.set_xlabel(title)
            axes.xaxis.set_major_formatter(TICKS[key])
            axes.xaxis.set_major_locator(MaxNLocator("auto" if axes is upper else _TICKS))
        for axes in figure.axes[:2]:
            axes.set_ylabel("held-out loss (nats)")
        add_legend(figure)

    note = (
        "Unigram entropy: the loss of a model that knows frequencies alone; breakthrough: 1 nat below it. FLOPs are "
        "those of the matrix products, by the formula of each step's phase; hours are of training alone, without "
        "validation, evaluation and saving."
    )
    several = any(len(group.trained) > 1 for group in groups)
    note += " Thin lines: single runs; thick: their mean." if several else ""
    title = "Held-out loss over steps, tokens, FLOPs and hours"
    return Picture("held-out-loss", title, 6.0, fill, note)


def _draw_breakthroughs(axes: Axes, groups: Sequence[Group]) -> None:
    for group, run in ((of, run) for of in groups for run in of.trained):
        step = breakthrough(run)
        if isinstance(step, int) and step in run.known("valid_loss"):
            loss = run.known("valid_loss")[step]
            axes.plot([step], [loss], "*", ms=11, color=group.colour, mec="white", label="breakthrough")


def _draw_phases(axes: Axes, groups: Sequence[Group]) -> None:
    """Lines where the full start of arms that drop ends and their full finish begins."""
    borders: dict[int, set[str]] = {}
    for group in groups:
        config = group.first.config
        for step in build_hook(config, 1).phase.starts:
            if 1 < step <= group.step:
                borders.setdefault(step, set()).add(group.colour)
    for step, found in borders.items():
        colour = found.pop() if len(found) == 1 else _GREY
        axes.axvline(step - 0.5, color=colour, ls=":", lw=1.2, label="dropping begins or ends")


def _gap_picture(groups: Sequence[Group]) -> Picture:
    keys = [key for key in ("step", "flops", "hours") if gaps(groups, key)]

    def fill(figure: Figure) -> None:
        for place, key in enumerate(keys, 1):
            axes = figure.add_subplot(1, len(keys), place)
            draw_curves(axes, gaps(groups, key))
            axes.axhline(0, color=_GREY, lw=0.9)
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
            Head("minus\nbaseline"), Head("masked\naccuracy", "deviation"), Head("broke\nthrough"),
            Head("baseline's last\nloss at step"), Head("hours vs.\nbaseline"),
            Head("FLOPs vs.\nbaseline")]  # fmt: skip
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
        rows.append([*row, _escapes(group), *_reached(group, baseline)])
    note = (
        "Masked accuracy in percent. Of a run that is not at its end, loss and accuracy are those of its last "
        "validation. Minus the baseline: where both ended at one step. The last three columns: the "
        "first validation whose loss is no higher than the baseline's last, and what it took until then relative to "
        "the whole training of the baseline."
    )
    return Table("held-out-loss", "Held-out loss at the end", head, rows, note=note)


def _escapes(group: Group) -> Number:
    """How many of its runs have broken through."""
    found = [step for step in map(breakthrough, group.trained) if step is not None]
    count = sum(step != NOT_REACHED for step in found)
    return Number(count, f"{count} of {len(found)}") if found else NOTHING


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
        return [NOT_REACHED if steps and last is not None else NOTHING, NOTHING, NOTHING]
    return [whole(step), *(_saving(group, baseline, key, step) for key in ("hours", "flops"))]


def _saving(group: Group, baseline: Group, key: str, step: int | None = None) -> Number:
    return change(saving(group.mean(key, step), baseline.mean(key)))


def _share(value: float) -> str:
    return f"{value:.2f}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _loss(value: float) -> str:
    return f"{value:.4f}"
