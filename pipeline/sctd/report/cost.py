"""What the runs cost: throughput, hours, FLOPs, and savings beside the paper's."""

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.figure import Figure

from sctd.objective.flops import saving
from sctd.report import paper
from sctd.report.arms import BASELINE, Group, baseline_of
from sctd.report.curves import curves
from sctd.report.document import (
    NOTHING,
    PAPER,
    Cell,
    Head,
    Picture,
    Points,
    Section,
    Table,
    change,
    number,
    over,
    whole,
)
from sctd.report.figures import panels
from sctd.report.gather import Run, finite
from sctd.report.paper import PaperRow
from sctd.report.stats import mean_of
from sctd.report.words import as_flops, as_hours, as_less, as_saving, counted, listed, opening

_PAPER_BAR = "#c9ced6"


def cost_section(groups: Sequence[Group]) -> Section | None:
    """None where no run has anything on record."""
    trained = [group for group in groups if group.trained]
    if not trained:
        return None
    section = Section("cost", "Cost")
    section.parts.append(_cost_words(trained))
    if _savings(trained):
        section.parts.append(Points(_savings(trained)))
    section.parts.append(_cost_table(trained))
    if any(_clock(group, trained) is not None for group in trained):
        section.parts.append(_cost_picture(trained))
    if curves(trained, "step", "tokens_per_s"):
        section.parts.append(_speed_picture(trained))
    return section


def tokens_per_second(run: Run) -> float | None:
    """Over its whole training."""
    tokens, seconds = (run.at(run.step).get(key) for key in ("tokens", "seconds"))
    return tokens / seconds if tokens and seconds else None


def utilisation(run: Run) -> float | None:
    """Its MFU over its whole training: the records' means, each weighted by its time."""
    before, work, time = 0.0, 0.0, 0.0
    for record in run.records:
        seconds, share = record.get("seconds"), record.get("mfu")
        if finite(seconds):
            if finite(share):
                work, time = work + share * (seconds - before), time + seconds - before
            before = seconds
    return work / time if time else None


def _cost_words(groups: Sequence[Group]) -> str:
    hosts = {(attempt["host"], attempt["ranks"]) for group in groups for run in group.runs for attempt in run.attempts}
    said = ["Times are as recorded by the runs, of training alone: without validation, evaluation and saving."]
    if len(hosts) == 1:
        host, ranks = next(iter(hosts))
        said.append(
            f"All runs were on one machine ({host}, {counted(ranks, 'rank')}). Whether it had other work meanwhile is "
            "not on record: savings by clock are as good as its quiet was, those by FLOPs are exact."
        )
    elif hosts:
        names = listed(sorted(f"{host} ({counted(ranks, 'rank')})" for host, ranks in hosts))
        said.append(f"The runs were on different machines or numbers of ranks ({names}): clocks compare these too.")
    apart = [group.label for group in groups if group.arm != BASELINE and baseline_of(group, groups) is None]
    if apart:
        said.append(f"There is no baseline on the same model, data and steps for {listed(apart)}: nothing is compared.")
    return " ".join(said)


def _savings(groups: Sequence[Group]) -> list[str]:
    """A sentence for each arm, the paper's saving beside."""
    said = []
    for group in groups:
        clock, work = _clock(group, groups), _work(group, groups)
        baseline = baseline_of(group, groups)
        if clock is not None and work is not None and baseline is not None:
            part = "" if group.step == baseline.step else f" up to step {min(group.step, baseline.step):,}"
            said.append(_beside_paper(group, clock, work, part))
    return said


def _beside_paper(group: Group, clock: float, work: float, part: str) -> str:
    fewer = as_less(work, "FLOPs").replace("less", "fewer")
    took = f"{opening(group.label)} took{part} {as_less(clock, 'time')} and {fewer}"
    theirs = [f"{100 * row.saving:.3g} % ({row.size})" for row in _paper_rows() if row.arm == group.arm and row.saving]
    if not theirs:
        return f"{took} than the baseline; the paper has no such arm."
    verb = "ours saves time too" if clock > 0 else "ours saves none"
    return f"{took} than the baseline. In the paper it takes {listed(theirs)} less time: {verb}."


def _clock(group: Group, groups: Sequence[Group]) -> float | None:
    """Share of the baseline's hours that it saves on as many steps."""
    return _saved(group, groups, "hours")


def _work(group: Group, groups: Sequence[Group]) -> float | None:
    return _saved(group, groups, "flops")


def _saved(group: Group, groups: Sequence[Group], key: str) -> float | None:
    baseline = baseline_of(group, groups)
    if baseline is None or baseline is group:
        return None
    step = min(group.step, baseline.step)
    return saving(group.mean(key, step), baseline.mean(key, step))


def _paper_rows() -> list[PaperRow]:
    return [row for row in paper.GLUE.rows if row.steps == paper.STEPS]


def _cost_table(groups: Sequence[Group]) -> Table:
    head = [Head("arm"), Head("runs"), Head("steps"), Head("tokens"), Head("tokens/s", "deviation"),
            Head("MFU"), Head("hours", "deviation"), Head("hours vs.\nbaseline"), Head("FLOPs"),
            Head("FLOPs vs.\nbaseline")]  # fmt: skip
    rows: list[list[Cell]] = []
    for group in groups:
        rates = [tokens_per_second(run) for run in group.trained]
        hours = [run.at(group.step).get("hours") for run in group.trained]
        share = mean_of([utilisation(run) for run in group.trained])
        rows.append([
            group.label, whole(len(group.trained)), whole(group.step), number(group.mean("tokens"), _count),
            over(rates, _count), number(share, lambda value: f"{100 * value:.1f} %"), over(hours, as_hours),
            change(_clock(group, groups)), number(group.mean("flops"), as_flops),
            change(_work(group, groups)),
        ])  # fmt: skip
    kinds = [""] * len(rows)
    for row in _paper_rows():
        tokens = row.steps * paper.ROWS * paper.LENGTH
        rows.append([
            f"paper, {row.size}: {paper.TITLES[row.arm]}", whole(1), whole(row.steps), number(tokens, _count), NOTHING,
            NOTHING, number(row.hours, as_hours), change(row.saving), NOTHING, NOTHING,
        ])  # fmt: skip
        kinds.append(PAPER)
    note = (
        "Hours and FLOPs are compared with the baseline on as many steps. FLOPs: matrix products of forward and "
        "backward, by formula. MFU: those FLOPs a second, relative to the device's peak. The paper has neither FLOPs "
        "nor throughput; its tokens are steps × 1,024 × 512."
    )
    return Table("cost", "What the runs cost", head, rows, kinds=kinds, note=note)


def _cost_picture(groups: Sequence[Group]) -> Picture:
    shown = [group for group in groups if _clock(group, groups) is not None]

    def fill(figure: Figure) -> None:
        axes = figure.add_subplot()
        names, place = [], 0
        for group in shown:
            bars = [("by clock", _clock(group, groups), group.colour), ("by FLOPs", _work(group, groups), group.colour)]
            bars += [
                (f"paper, {row.size}, by clock", row.saving, _PAPER_BAR)
                for row in _paper_rows()
                if row.arm == group.arm and row.saving
            ]
            for what, share, colour in bars:
                if share is not None:
                    axes.barh(place, 100 * (1 - share), 0.74, color=colour, alpha=0.55 if what == "by FLOPs" else 1.0)
                    axes.text(100 * (1 - share) + 0.8, place, as_saving(share), va="center", fontsize=8)
                    names.append((place, f"{group.label}, {what}" if what.startswith("by") else what))
                    place += 1
            place += 1
        axes.axvline(100, color="#555555", lw=1.2, ls="--")
        axes.text(100, -1.1, "baseline", ha="center", va="bottom", fontsize=8, color="#555555")
        axes.set_yticks([y for y, _ in names], [name for _, name in names])
        axes.set_ylim(place - 1.3, -1.0)
        axes.set_xlim(0, max(118, *(100 * (1 - (_clock(g, groups) or 0)) + 14 for g in shown)))
        axes.set_xlabel("percent of the baseline's cost on as many steps")
        axes.grid(axis="y", visible=False)

    bars = sum(2 + sum(row.arm == group.arm and bool(row.saving) for row in _paper_rows()) + 1 for group in shown)
    return Picture("cost", "Cost relative to the baseline", 0.9 + 0.24 * bars, fill)


def _speed_picture(groups: Sequence[Group]) -> Picture:
    found = {"tokens a second": curves(groups, "step", "tokens_per_s", smooth=True)}
    if shares := curves(groups, "step", "mfu", smooth=True):
        found["MFU (%)"] = [replace(curve, y=tuple(100 * y for y in curve.y)) for curve in shares]
    note = "Neighbouring records averaged. A dip is time that the machine had other work, or rows of another length."
    return Picture("throughput", "Throughput over training", 2.9, panels(found, from_zero=True), note)


def _count(value: float) -> str:
    return f"{value:,.0f}"
