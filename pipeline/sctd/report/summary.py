"""What stands on top of a report: what was trained, what came out, and how it relates to the paper."""

import statistics
from collections.abc import Sequence

from sctd.objective.flops import saving
from sctd.page import as_short
from sctd.report import paper
from sctd.report.arms import (
    BASELINE,
    FAMILIES,
    SCTD,
    TOKEN_DROP,
    Group,
    baseline_of,
    differences,
    drop_alike,
    is_papers,
    size_of,
)
from sctd.report.compare import Comparison
from sctd.report.document import Part, Points, Section
from sctd.report.gather import Material, Run
from sctd.report.losses import NOT_REACHED, breakthrough
from sctd.report.record import lengths_of
from sctd.report.scores import Subject
from sctd.report.stats import as_p, wilcoxon
from sctd.report.words import as_hours, as_saving, counted, listed, opening, short_name, signed


def summary_section(
    material: Material, groups: Sequence[Group], found: Sequence[Subject], compared: Sequence[Comparison]
) -> Section:
    section = Section("summary", "Summary")
    kinds = [[group for group in groups if group.kind == kind] for kind in sorted({group.kind for group in groups})]
    parts: list[Part] = [_trained(of_kind) for of_kind in kinds]
    parts += [] if groups else ["No pretraining run is among the folders: scores alone."]
    parts += [*_unfinished(groups), *_on_plateau(groups), *_apart(groups)]
    parts += [words for words in (_losses(groups), _costs(groups), _scored(found)) if words]
    paragraph, *lines = _beside_paper(groups, compared) or [""]
    parts += [paragraph] if paragraph else []
    parts += [Points(lines)] if lines else []
    parts += [words for words in (_strength(groups, compared), _ablated(material)) if words]
    section.parts = parts
    return section


def tiles(material: Material, groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Figures for the top of the page: (value, what it is)."""
    runs = [run for group in groups for run in group.trained]
    named = {run.folder.resolve() for run in material.runs}  # they may be an ablation's
    further = [
        (line, scored)
        for ablation in material.ablations
        for row, line, scored in ablation.lines
        if (ablation.folder / row.run).resolve() not in named
    ]
    ablated = [line for line, _ in further if line and line.finished]
    cells = sum(len(each.cells) for run in material.runs for each in run.evaluations.values())
    cells += sum(len(other.cells) for other in material.others)
    cells += sum(len(scored.cells) for _, scored in further)
    hours = [run.at(run.step).get("hours") for run in runs] + [line.hours for line in ablated]
    tokens = [run.at(run.step).get("tokens") for run in runs]
    found = [
        (f"{len(runs) + len(ablated):,}", "pretraining runs"),
        (str(len({group.arm for group in groups})), "arms"),
        (as_short(max((value for value in tokens if value), default=0)), "tokens a run, at most"),
        (as_hours(sum(value for value in hours if value)) + " h", "of pretraining in all"),
        (f"{cells:,}", "fine-tunings"),
    ]
    return [pair for pair in found if pair[0] not in ("0", "0 h")]


def _trained(groups: Sequence[Group]) -> str:
    """Groups of one class."""
    first, runs = groups[0].first, [run for group in groups for run in group.runs]
    model, manifest = first.config.model, first.manifest
    arms = list(dict.fromkeys(group.label for group in groups))
    seeds = sorted({run.config.run.seed for run in runs})
    steps, tokens = max(group.step for group in groups), max(group.mean("tokens") or 0 for group in groups)
    budget = f", {as_short(tokens)} tokens," if tokens else ","
    shape = f"BERT-{size_of(groups[0])}" if is_papers(groups[0]) else f"a {FAMILIES[model.family]}"
    data = listed([f"{source.name} ({short_name(source.spec)})" for source in manifest.sources])
    return (
        f"{counted(len(runs), 'pretraining run')} ({listed(arms)}; {'seed' if len(seeds) == 1 else 'seeds'} "
        f"{listed([str(seed) for seed in seeds])}) of {shape} with {model.layers} layers of {model.hidden_size}, "
        f"{model.heads} heads and {model.vocab_size or manifest.vocab_size:,} ids: {steps:,} optimizer steps "
        f"of {first.config.train.batch_size:,} rows of {lengths_of(first)} tokens{budget} in "
        f"{first.config.train.precision}, on {manifest.documents:,} documents of {data}{_where(runs)}."
    )


def _where(runs: Sequence[Run]) -> str:
    places = sorted({f"{a['host']} ({counted(a['ranks'], 'rank')})" for run in runs for a in run.attempts})
    days = sorted({attempt["start"][:10] for run in runs for attempt in run.attempts})
    if not places:
        return ""
    return f"; on {listed(places)}, {' to '.join(dict.fromkeys((days[0], days[-1])))}"


def _unfinished(groups: Sequence[Group]) -> list[str]:
    """A warning where runs are not at their end."""
    runs = [run for group in groups for run in group.runs if run.step < run.goal]
    said = [f"{run.name} (step {run.step:,} of {run.goal:,})" for run in runs]
    return [f"Not at {'its' if len(said) == 1 else 'their'} end yet: {listed(said)}."] if said else []


def _on_plateau(groups: Sequence[Group]) -> list[str]:
    """A warning where runs have learnt little but frequencies."""
    found = [run.name for group in groups for run in group.runs if breakthrough(run) == NOT_REACHED]
    if not found:
        return []
    return [f"Without a breakthrough, so that their losses say little about the arms: {listed(found)} (see Losses)."]


def _apart(groups: Sequence[Group]) -> list[str]:
    """Warnings where arms differ in more than the method, or two dropping arms in how they drop."""
    said = []
    if len({group.kind for group in groups}) > 1:
        said.append(
            f"These runs are not all of one kind: they differ in {listed(differences(groups))} beside the method. They "
            "are shown together, but only runs that differ in the method alone are compared."
        )
    said += [
        f"{opening(first.label)} and {second.label} drop differently (other layers, shares or steps), and are compared "
        "with the baseline alone."
        for first in groups
        for second in groups
        if (first.arm, second.arm, first.kind) == (SCTD, TOKEN_DROP, second.kind) and not drop_alike(first, second)
    ]
    return said


def _losses(groups: Sequence[Group]) -> str:
    said, apart = [], len(set(map(_validated, groups))) > 1
    for group in groups:
        loss = group.mean("valid_loss") if group.trained else None
        if loss is not None:
            said.append(f"{group.label} {loss:.3f}" + (f" (step {_validated(group):,})" if apart else ""))
        elif any("valid_loss" in run.keys for run in group.trained):
            said.append(f"{group.label} none that is finite")
    return f"Held-out loss at the end, in nats: {listed(said)}." if said else ""


def _validated(group: Group) -> int:
    """The step of its last held-out loss; a run that is not at its end has gone on since."""
    steps = [[step for step in run.known("valid_loss") if step <= group.step] for run in group.trained]
    return min((max(each, default=0) for each in steps), default=0)


def _costs(groups: Sequence[Group]) -> str:
    said = []
    for group in groups:
        baseline = baseline_of(group, groups)
        if group.arm == BASELINE or baseline is None or group.step != baseline.step or not group.step:
            continue
        clock, work = (saving(group.mean(key), baseline.mean(key)) for key in ("hours", "flops"))
        if clock is not None and work is not None:
            said.append(f"{group.label} {as_saving(clock)} ({as_saving(work)})")
    return f"Time of training relative to the baseline, and in brackets FLOPs: {listed(said)}." if said else ""


def _scored(found: Sequence[Subject]) -> str:
    """Means over the tasks that all arms have."""
    arms = [each for each in found if each.group is not None]
    tasks = [set().union(*(each.best for each in subject.evaluations)) for subject in arms]
    common = sorted(set.intersection(*tasks)) if tasks else []
    if not common:
        return ""
    said = []
    for subject in arms:
        scores = [subject.score(task) for task in common]
        means = [sum(units) / len(units) for task, score in zip(common, scores, strict=True) if score
                 for units in [subject.units(task, score.metric)] if units]  # fmt: skip
        if len(means) == len(common):
            said.append(f"{subject.label} {100 * sum(means) / len(means):.2f}")
    over = f"the mean over {len(common)} tasks" if len(common) > 1 else common[0]
    return f"Fine-tuned, at the best dev epoch, by main metrics in percent, {over} is: {listed(said)}." if said else ""


def _beside_paper(groups: Sequence[Group], compared: Sequence[Comparison]) -> list[str]:
    """A paragraph, and a line for each comparison that the paper has too."""
    said = []
    if groups and not all(is_papers(group) and _as_long(group) for group in groups):
        said.append(
            "The paper's BERT-base and BERT-large saw 131 billion tokens: absolute scores here are not comparable with "
            "its scores; what can be compared is the sign of differences between arms, and shares of time."
        )
    elif groups:
        said.append("Absolute scores are comparable with the paper's only as far as data and corpus are the same.")
    for each in compared:
        known = each.against(each.size) if each.tested else None
        if known is None:
            continue
        same, of, mean = known
        values = [item.ours.value for item in each.shared(each.size)]
        agree = f"{same} of {counted(of, 'sign')} {'agrees' if same == 1 else 'agree'}" if of else "no signs to compare"
        said.append(
            f"{opening(each.first.label)} against {each.second.label}: {signed(100 * statistics.fmean(values))} points "
            f"over {counted(len(values), 'task')} ({as_p(wilcoxon(values))}), in the paper (BERT-{each.size}) "
            f"{signed(mean)}; {agree}."
        )
    return said


def _as_long(group: Group) -> bool:
    """Whether it saw at least half the tokens of the paper's runs."""
    return 2 * (group.mean("tokens") or 0) >= paper.STEPS * paper.ROWS * paper.LENGTH


def _ablated(material: Material) -> str:
    said = []
    for ablation in material.ablations:
        done = sum(line is not None and line.finished for _, line, _ in ablation.lines)
        said.append(f"{ablation.title} ({done} of {counted(len(ablation.lines), 'run')})")
    return f"Ablations: {listed(said)}." if said else ""


def _strength(groups: Sequence[Group], compared: Sequence[Comparison]) -> str:
    """What the tests can say, and what not."""
    if not compared:
        return ""
    if all(len(group.runs) == 1 for group in groups):
        return (
            "There is one pretraining run an arm. The tests tell differences from the spread of fine-tuning and of "
            "tasks; how much another pretraining seed would change is not measured, so none of them shows that an arm "
            "is better."
        )
    said = "Where both arms have several pretraining seeds, each of them counts once, as the mean of its fine-tunings."
    if any(each.units[0] == "seeds" for each in compared):
        said += " Against an arm with one, all fine-tunings are compared, and pretraining seeds are not tested."
    return said
