"""What the runs have learnt and what it cost: losses over four budgets, breakthroughs, throughput, savings."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from sctd.objective.build import build_hook
from sctd.present import pictures
from sctd.present.page import Section
from sctd.present.pictures import Curve, Panel, Picture, grid
from sctd.present.table import NOTHING, PAPER, Cell, Heading, Number, Table, change, mean_of, number, over
from sctd.present.words import as_flops, as_hours, as_saving, counted, listed, signed
from sctd.report import paper
from sctd.report.gather import Run, finite
from sctd.report.groups import RunGroup, baseline_of, loss_apart, saved
from sctd.train.flops import saving

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOT_REACHED = "not reached"
_EARLY = 0.1  # of the baseline's steps: differences there say little
_POINTS = 300  # of a curve in a picture
_TICKS = 3  # of a panel beside another one: "2.5 million" is wide
# Of ALIGN steps.
_TERMS = {
    "kl_global": "KL_global (nats)",
    "kl_local": "KL_local (nats)",
    "kl_gradient": "gradient of λ KL, relative to MLM's",
}
_PAPER_COSTS = [row for row in paper.GLUE.rows if row.steps == paper.STEPS]


# ---- curves --------------------------------------------------------------------------------------------------------


def curves(groups: Sequence[RunGroup], x: str, y: str, smooth: bool = False) -> list[Curve]:
    """Of every run, and of the mean of groups with several; those without a point are left out.

    Args:
        x, y: keys of records. smooth: the mean of neighbours instead of every n-th point.
    """
    found = []
    for group in groups:
        runs = [{s: (run.known(x)[s], value) for s, value in run.known(y).items() if s in run.known(x)}
                for run in group.trained]  # fmt: skip
        lines = [(list(of.values()), len(runs) > 1) for of in runs]
        if len(runs) > 1:  # their mean, at the steps that all have on record
            steps = sorted(set.intersection(*map(set, runs)))
            pairs = [zip(*(of[step] for of in runs), strict=True) for step in steps]
            lines.append(([(statistics.fmean(xs), statistics.fmean(ys)) for xs, ys in pairs], False))
        for points, thin in lines:
            if points:
                xs, ys = zip(*_thinned(points, smooth), strict=True)
                found.append(Curve(group.label, xs, ys, group.colour, thin))
    return found


def _thinned(points: Sequence[tuple[float, float]], smooth: bool) -> list[tuple[float, float]]:
    """Of many points some hundreds, the last one among them."""
    size = -(-len(points) // _POINTS)
    parts = [points[max(0, end - size) : end] for end in range(len(points), 0, -size)][::-1]
    return [(part[-1][0], statistics.fmean(y for _, y in part) if smooth else part[-1][1]) for part in parts]


def _gaps(groups: Sequence[RunGroup], x: str) -> list[Curve]:
    """Held-out loss minus that of the baseline of its class at the same x, for groups that have one: of their means."""
    means = {curve.label: curve for curve in curves(groups, x, "valid_loss") if not curve.thin}
    found = []
    for group in groups:
        baseline = baseline_of(group, groups)
        mine, theirs = means.get(group.label), means.get(baseline.label) if baseline else None
        if mine is None or theirs is None:
            continue
        start, end = max(theirs.x[0], _EARLY * theirs.x[-1]), theirs.x[-1]
        points = [(a, b) for a, b in zip(mine.x, mine.y, strict=True) if start <= a <= end]
        apart = [b - float(np.interp(a, theirs.x, theirs.y)) for a, b in points]
        found.append(Curve(group.label, [a for a, _ in points], apart, group.colour))
    return [curve for curve in found if len(curve.x) > 1]


# ---- losses --------------------------------------------------------------------------------------------------------


def loss_section(groups: Sequence[RunGroup]) -> Section:
    section = Section("losses", "Losses")
    training = curves(groups, "step", "loss", smooth=True)
    silent = [run.name for group in groups for run in group.runs if not run.records]
    if silent:
        section.parts.append(f"Without a recorded step so far: {listed(silent)}.")
    if curves(groups, "step", "valid_loss"):
        rows = max(run.config.train.valid_rows for group in groups for run in group.trained)
        section.parts += [
            f"Held-out loss: up to {counted(rows, 'held-out row')} through the full path, whatever the arm, so that "
            "arms can be compared.",
            _loss_picture(groups),
        ]
        if keys := [key for key in ("step", "flops", "hours") if _gaps(groups, key)]:
            section.parts.append(_gap_picture(groups, keys))
        section.parts += [_loss_table(groups), *_learning(groups)]
    else:
        section.parts.append("No run has a held-out loss on record, so there are no curves of it.")
    if training:
        note = (
            "Means since the record before, neighbours averaged. Arms train on different sums of terms (of an ALIGN "
            "step both paths and the KL terms), so these curves show progress and do not compare arms."
        )
        fill = grid([Panel(training, "training loss (nats)").draw])
        section.parts.append(Picture("training-loss", "Training loss", 3.0, fill, note))
    panels = [Panel(curves(groups, "step", key, smooth=True), title) for key, title in _TERMS.items()]
    terms = [panel.draw for panel in panels if panel.curves]
    if terms:
        note = (
            "The KL terms are means since the record before, without λ. Right: norm of their gradient, λ included, "
            "relative to that of the MLM terms, at the ALIGN steps on record."
        )
        section.parts.append(Picture("alignment", "Alignment of the two paths", 2.9, grid(terms), note))
    return section


def breakthrough(run: Run) -> int | str | None:
    """The step of the first validation at least 1 nat below the unigram entropy; None of a run that did not look."""
    return run.at(run.step).get("breakthrough_step", NOT_REACHED) if "breakthrough_step" in run.keys else None


def validated(group: RunGroup) -> int:
    """The step of its last held-out loss; a run that is not at its end has gone on since."""
    steps = [[step for step in run.known("valid_loss") if step <= group.step] for run in group.trained]
    return min((max(each, default=0) for each in steps), default=0)


def _loss_picture(groups: Sequence[RunGroup]) -> Picture:
    entropies = {run.corpus: run.manifest.unigram_entropy for group in groups for run in group.trained}

    def fill(figure: Figure) -> None:
        places = figure.add_gridspec(2, 3)
        for place, key in enumerate(pictures.AXES):
            axes = figure.add_subplot(places[0, :] if place == 0 else places[1, place - 1])
            levels, y = list(entropies.values()) if place == 0 else [], "held-out loss (nats)" if place < 2 else ""
            found, ticks = curves(groups, key, "valid_loss"), _TICKS if place else 0
            Panel(found, x=key, y=y, marker=".", levels=levels, level_name="unigram entropy", ticks=ticks).draw(axes)
        _draw_events(figure.axes[0], groups)
        pictures.add_legend(figure)

    note = (
        "Unigram entropy: the loss of a model that knows frequencies alone; breakthrough: 1 nat below it. FLOPs are "
        "those of the matrix products, by the formula of each step's phase; hours are of training alone, without "
        "validation, evaluation and saving. Thin lines: single runs of several; thick: their mean."
    )
    return Picture("held-out-loss", "Held-out loss over steps, tokens, FLOPs and hours", 6.0, fill, note)


def _draw_events(axes: Axes, groups: Sequence[RunGroup]) -> None:
    """Breakthroughs, and lines where the full start of arms that drop ends and their full finish begins."""
    borders: dict[int, set[str]] = {}
    for group in groups:
        for run in group.trained:
            step = breakthrough(run)
            if isinstance(step, int) and step in run.known("valid_loss"):
                loss = run.known("valid_loss")[step]
                axes.plot([step], [loss], "*", ms=11, color=group.colour, mec="white", label="breakthrough")
        for start in build_hook(group.first.config, 1).phase.starts:
            if 1 < start <= group.step:
                borders.setdefault(start, set()).add(group.colour)
    for start, found in borders.items():
        colour = found.pop() if len(found) == 1 else pictures.GREY
        axes.axvline(start - 0.5, color=colour, ls=":", lw=1.2, label="dropping begins or ends")


def _gap_picture(groups: Sequence[RunGroup], keys: Sequence[str]) -> Picture:
    panels = [Panel(_gaps(groups, key), x=key, y="minus baseline (nats)", levels=[0], ticks=_TICKS) for key in keys]
    note = (
        "On as many steps, on as many FLOPs, in as many hours; the baseline's loss between its validations is taken "
        "from the line through them. Below 0: better than the baseline. At equal FLOPs or hours the arms stand at "
        "different points of their learning-rate schedules, which favours those that are further on. The first tenth "
        "is left out."
    )
    fill = grid([panel.draw for panel in panels])
    return Picture("held-out-loss-difference", "Held-out loss minus the baseline's", 2.9, fill, note)


def _loss_table(groups: Sequence[RunGroup]) -> Table:
    head: list[Heading] = [
        "arm", "runs", "steps", "tokens", "validated\nat step", ("held-out\nloss", "deviation"), "minus\nbaseline",
        ("masked\naccuracy", "deviation"), "broke\nthrough", "baseline's last\nloss at step", "hours vs.\nbaseline",
        "FLOPs vs.\nbaseline",
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for group in (each for each in groups if each.trained):
        baseline = baseline_of(group, groups)
        minus, accuracy = loss_apart(group, baseline), group.values("valid_accuracy")
        row: list[Cell] = [group.label, number(len(group.trained)), number(group.step)]
        row += [number(group.mean("tokens"), ",.0f"), number(validated(group)), over(group.values("valid_loss"), ".4f")]
        row.append(Number(minus.value, signed(minus.value, 4)) if minus else NOTHING)
        row.append(over([None if share is None else 100 * share for share in accuracy], ".2f"))
        broke = [step for step in map(breakthrough, group.trained) if step is not None]
        count = sum(step != NOT_REACHED for step in broke)
        row.append(Number(count, f"{count} of {len(broke)}") if broke else NOTHING)
        rows.append([*row, *_reached(group, baseline)])
    note = (
        "Loss and accuracy (percent) are those of the last validation. Minus the baseline: where both ended at one "
        "step. The last three columns: the first validation whose loss is no higher than the baseline's last, and what "
        "it took until then relative to the whole training of the baseline."
    )
    return Table("held-out-loss", "Held-out loss at the end", head, rows, note=note)


def _reached(group: RunGroup, baseline: RunGroup | None) -> list[Cell]:
    """Step, saving of hours and of FLOPs when the mean loss comes down to the baseline's last."""
    last = baseline.mean("valid_loss") if baseline else None
    losses = [run.known("valid_loss") for run in group.trained]
    steps = sorted(set.intersection(*map(set, losses)))
    if baseline is None or last is None or not steps:
        return [NOTHING] * 3
    step = next((step for step in steps if statistics.fmean(of[step] for of in losses) <= last), None)
    if step is None:
        return [NOT_REACHED, NOTHING, NOTHING]
    return [number(step), *(change(saving(group.mean(key, step), baseline.mean(key))) for key in ("hours", "flops"))]


def _learning(groups: Sequence[RunGroup]) -> list[Table]:
    """Run by run, whether it has learnt more than frequencies; nothing where no run looked."""
    if not any("valid_gap" in run.keys for group in groups for run in group.trained):
        return []
    head: list[Heading] = ["run", "arm", "seed", "steps", "gap", "context\nuse", "breakthrough\nat step"]
    rows: list[list[Cell]] = []
    for group, run in ((of, run) for of in groups for run in of.trained):
        last, step = run.at(run.step), breakthrough(run)
        row: list[Cell] = [run.name, group.label, str(run.config.run.seed), number(run.step)]
        row += [number(last.get("valid_gap"), signed), number(last.get("context_use"), ".2f")]
        rows.append([*row, step if isinstance(step, str) else number(step)])
    note = (
        "Gap: nats below the unigram entropy, the loss of a model that knows how frequent tokens are and ignores the "
        "context. Context use: distance (total variation) between the distribution predicted at a mask and the mean "
        "over all masks; 0: the same everywhere. Breakthrough: the first validation with a gap of 1 nat or more."
    )
    return [Table("learning", "What each run has learnt, at its last validation", head, rows, texts=2, note=note)]


# ---- cost ----------------------------------------------------------------------------------------------------------


def cost_section(groups: Sequence[RunGroup]) -> Section | None:
    """None where no run has anything on record."""
    trained = [group for group in groups if group.trained]
    if not trained:
        return None
    section = Section("cost", "Cost")
    hosts = {f"{a['host']} ({counted(a['ranks'], 'rank')})" for of in trained for run in of.runs for a in run.attempts}
    section.parts.append(
        "Times are as recorded by the runs, of training alone: without validation, evaluation and saving. Whether a "
        "machine had other work meanwhile is not recorded, and would change the times; FLOPs are exact."
    )
    if len(hosts) > 1:
        section.parts.append(f"The runs were on {listed(sorted(hosts))}: times compare these machines too.")
    section.parts.append(_cost_table(trained))
    shown = [group for group in trained if saved("hours", group, baseline_of(group, trained)) is not None]
    if shown:
        section.parts.append(_cost_picture(shown, trained))
    speeds = [Panel(curves(trained, "step", "tokens_per_s", smooth=True), "tokens per second", from_zero=True)]
    shares = curves(trained, "step", "mfu", smooth=True)
    speeds.append(Panel([replace(c, y=[100 * y for y in c.y]) for c in shares], "MFU (%)", from_zero=True))
    shown_speeds = [panel.draw for panel in speeds if panel.curves]
    if shown_speeds:
        note = (
            "Neighbouring records averaged. A dip is time that the machine had other work, or rows of another length."
        )
        section.parts.append(Picture("throughput", "Throughput over training", 2.9, grid(shown_speeds), note))
    return section


def _tokens_per_second(run: Run) -> float | None:
    """Over its whole training."""
    tokens, seconds = (run.at(run.step).get(key) for key in ("tokens", "seconds"))
    return tokens / seconds if tokens and seconds else None


def _utilisation(run: Run) -> float | None:
    """Its MFU over its whole training: the records' means, each weighted by its time."""
    before, work, time = 0.0, 0.0, 0.0
    for record in run.records:
        seconds, share = record.get("seconds"), record.get("mfu")
        if finite(seconds):
            if finite(share):
                work, time = work + share * (seconds - before), time + seconds - before
            before = seconds
    return work / time if time else None


def _cost_table(groups: Sequence[RunGroup]) -> Table:
    head: list[Heading] = ["arm", "runs", "steps", "tokens", ("tokens/s", "deviation"), "MFU", ("hours", "deviation"),
            "hours vs.\nbaseline", "FLOPs", "FLOPs vs.\nbaseline"]  # fmt: skip
    rows: list[list[Cell]] = []
    for group in groups:
        baseline = baseline_of(group, groups)
        rows.append([
            group.label, number(len(group.trained)), number(group.step), number(group.mean("tokens"), ",.0f"),
            over([_tokens_per_second(run) for run in group.trained], ",.0f"),
            number(mean_of([_utilisation(run) for run in group.trained]), lambda value: f"{100 * value:.1f} %"),
            over(group.values("hours"), as_hours), change(saved("hours", group, baseline)),
            number(group.mean("flops"), as_flops), change(saved("flops", group, baseline)),
        ])  # fmt: skip
    for row in _PAPER_COSTS:
        rows.append([
            f"paper, {row.size}: {paper.TITLES[row.arm]}", number(1), number(row.steps),
            number(row.steps * paper.ROWS * paper.LENGTH), NOTHING, NOTHING, number(row.hours, as_hours),
            change(row.saving), NOTHING, NOTHING,
        ])  # fmt: skip
    note = (
        "Hours and FLOPs are compared with the baseline on as many steps. FLOPs: matrix products of forward and "
        "backward, by formula. MFU: those FLOPs per second, relative to the device's peak. The paper has neither FLOPs "
        "nor throughput; its tokens are steps × 1,024 × 512."
    )
    kinds = [""] * len(groups) + [PAPER] * len(_PAPER_COSTS)
    return Table("cost", "What the runs cost", head, rows, kinds=kinds, note=note)


def _cost_picture(shown: Sequence[RunGroup], groups: Sequence[RunGroup]) -> Picture:
    bars: list[tuple[str, float | None, str]] = []  # name, share of the baseline's cost, colour
    for group in shown:
        for key, how in (("hours", "by clock"), ("flops", "by FLOPs")):
            bars.append((f"{group.label}, {how}", saved(key, group, baseline_of(group, groups)), group.colour))
        bars += [(f"paper, {r.size}, by clock", r.saving, pictures.PALE) for r in _PAPER_COSTS if r.arm == group.arm]
    found = [(name, 100 * (1 - share), colour) for name, share, colour in bars if share is not None]
    return pictures.bar_picture(
        "cost",
        "Cost relative to the baseline",
        [name for name, _, _ in found],
        {"": [value for _, value, _ in found]},
        lambda value: as_saving(1 - value / 100),
        "percent of the baseline's cost on as many steps",
        colour=[colour for _, _, colour in found],
        mark=100,
    )
