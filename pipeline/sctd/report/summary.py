"""The top of a report: what was trained, warnings about the data, how the arms compare, and what is comparable."""

from collections.abc import Sequence
from pathlib import Path

from sctd.config import BASELINE
from sctd.objective.build import row_lengths
from sctd.present.page import Part, Points, Section
from sctd.present.words import as_hours, as_short, counted, listed
from sctd.report import paper
from sctd.report.compare import Comparison, say, summary_table
from sctd.report.gather import Inputs, Run
from sctd.report.groups import (
    FAMILIES,
    SCTD,
    TOKEN_DROP,
    RunGroup,
    baseline_of,
    differences,
    drop_alike,
    is_papers,
    size_of,
)
from sctd.report.training import NOT_REACHED, breakthrough, validated


def summary_section(inputs: Inputs, groups: Sequence[RunGroup], compared: Sequence[Comparison]) -> Section:
    kinds = [[group for group in groups if group.kind == kind] for kind in sorted({group.kind for group in groups})]
    parts: list[Part] = [_trained(of_kind) for of_kind in kinds]
    parts += [] if groups else ["No pretraining run is among the folders: scores alone."]
    parts += _warnings(groups)
    if compared:
        parts.append(summary_table(compared))
        scored = [say(each) for each in compared if each.items]
        parts += [Points(scored)] if scored else []
    half = paper.STEPS * paper.ROWS * paper.LENGTH / 2  # the tokens of the paper's runs
    if groups and not all(is_papers(group) and (group.mean("tokens") or 0) >= half for group in groups):
        parts.append(
            "The paper's BERT-base and BERT-large saw 131 billion tokens: absolute scores here are not comparable with "
            "its scores; what can be compared is the sign of differences between arms, and shares of time."
        )
    elif groups:
        parts.append("Absolute scores are comparable with the paper's only as far as data and corpus are the same.")
    if compared and all(len(group.runs) == 1 for group in groups):
        parts.append(
            "There is one pretraining run per arm. The tests compare differences with the spread of fine-tunings and "
            "of tasks; what another pretraining seed would change is not measured, so no test shows that an arm is "
            "better."
        )
    done = [(a, sum(line.finished for line, _ in a.lines)) for a in inputs.ablations]
    if done:
        said = [f"{ablation.title} ({count} of {counted(len(ablation.lines), 'run')})" for ablation, count in done]
        parts.append(f"Ablations: {listed(said)}.")
    return Section("summary", "Summary", parts)


def tiles(inputs: Inputs, groups: Sequence[RunGroup]) -> list[tuple[str, str]]:
    """Figures for the top of the page: (value, what it is)."""
    runs = [run for group in groups for run in group.trained]
    named = {run.folder.resolve() for run in inputs.runs}  # they may be an ablation's
    further = [
        (line, scored)
        for ablation in inputs.ablations
        for line, scored in ablation.lines
        if (ablation.folder / line.variant.run).resolve() not in named
    ]
    ablated = [line for line, _ in further if line.finished]
    evaluations = [each for run in inputs.runs for each in run.evaluations.values()]
    cells = sum(len(each.cells) for each in [*evaluations, *inputs.others, *(scored for _, scored in further)])
    hours = _own_hours(runs) + [line.hours for line in ablated]
    tokens = [run.at(run.step).get("tokens") for run in runs]
    found = [
        (f"{len(runs) + len(ablated):,}", "pretraining runs"),
        (str(len({group.arm for group in groups})), "arms"),
        (as_short(max((value for value in tokens if value), default=0)), "tokens per run, at most"),
        (as_hours(sum(value for value in hours if value)) + " h", "of pretraining in all"),
        (f"{cells:,}", "fine-tunings"),
    ]
    return [pair for pair in found if pair[0] not in ("0", "0 h")]


def _own_hours(runs: Sequence[Run]) -> list[float | None]:
    """Of training, by run; what a branch has in common with its parent counts once."""
    shared: dict[Path, float] = {}  # parents that are not here
    hours: list[float | None] = []
    for run in runs:
        parent, step = run.begins
        before = run.at(step).get("hours") or 0.0
        hours.append((run.at(run.step).get("hours") or 0.0) - before)
        if step and parent not in {other.folder.resolve() for other in runs}:
            shared[parent] = max(before, shared.get(parent, 0.0))
    return [*hours, *shared.values()]


def _trained(groups: Sequence[RunGroup]) -> str:
    """Groups of one class."""
    first, runs = groups[0].first, [run for group in groups for run in group.runs]
    model, lengths = first.config.model, row_lengths(first.config, first.manifest)
    arms = list(dict.fromkeys(group.label for group in groups))
    seeds = [str(seed) for seed in sorted({run.config.run.seed for run in runs})]
    shape = f"BERT-{size_of(groups[0])}" if is_papers(groups[0]) else f"a {FAMILIES[model.family]}"
    return (
        f"{counted(len(runs), 'pretraining run')} ({listed(arms)}; {'seed' if len(seeds) == 1 else 'seeds'} "
        f"{listed(seeds)}) of {shape} with {model.layers} layers of {model.hidden_size}: "
        f"{max(group.step for group in groups):,} optimizer steps of {first.config.train.batch_size:,} rows of "
        f"{', then '.join(map(str, reversed(lengths)))} tokens."
    )


def _warnings(groups: Sequence[RunGroup]) -> list[str]:
    """What a reader must know of the runs before comparing them."""
    said = []
    runs = [run for group in groups for run in group.runs]
    unfinished = [f"{run.name} (step {run.step:,} of {run.goal:,})" for run in runs if run.step < run.goal]
    if unfinished:
        said.append(f"Not at {'its' if len(unfinished) == 1 else 'their'} end yet: {listed(unfinished)}.")
    flat = [run.name for run in runs if breakthrough(run) == NOT_REACHED]
    if flat:
        said.append(
            f"Without a breakthrough, so that their losses say little about the arms: {listed(flat)} (see Losses)."
        )
    lost = [g.label for g in groups if validated(g) and g.mean("valid_loss") is None]
    if lost:
        said.append(f"Without a finite held-out loss at the end: {listed(lost)}.")
    if len({group.kind for group in groups}) > 1:
        said.append(
            f"These runs differ in {listed(differences(groups))}, not only in the method. They are shown together, but "
            "only runs that differ in the method alone are compared."
        )
    alone = [g.label for g in groups if g.arm != BASELINE and baseline_of(g, groups) is None]
    if alone:
        said.append(f"There is no baseline on the same model, data and steps for {listed(alone)}.")
    said += [
        f"{first.label} and {second.label} drop differently (other layers, shares or steps), and are compared with the "
        "baseline alone."
        for first in groups
        for second in groups
        if (first.arm, second.arm, first.kind) == (SCTD, TOKEN_DROP, second.kind) and not drop_alike(first, second)
    ]
    return said
