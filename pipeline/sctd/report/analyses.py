"""What layers know (Figures 4 and 8), semantic drift (Figure 3), and ablations (Tables 4 and 5, Figure 7)."""

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from sctd.config import BASELINE
from sctd.evaluate.ablate.ablations import Line, Variant
from sctd.evaluate.results import Record, probe_key
from sctd.present import pictures
from sctd.present.page import Part, Section
from sctd.present.pictures import Dots, Picture
from sctd.present.table import NOTHING, Cell, Heading, Number, Table, change, cost, number
from sctd.present.words import as_flops, as_hours, as_p, counted, file_name, listed, short_name, signed
from sctd.report import paper, stats
from sctd.report.gather import Ablation, Evaluation
from sctd.report.groups import RunGroup, partners
from sctd.report.paper import Column
from sctd.report.scores import Subject, common_columns, percent
from sctd.train.flops import saving

_APART = {"at another step": "step", "on other sentences": "data"}  # why probes are not compared
_LEAST_RANKED = 4  # rows that a rank correlation is worth a word of

# ---- probing -------------------------------------------------------------------------------------------------------


def probe_section(groups: Sequence[RunGroup], others: Sequence[Evaluation]) -> Section | None:
    """None where nothing was probed."""
    tasks: dict[str, dict[str, Record]] = {}
    for group in groups:
        step = max((step for run in group.runs for step, found in run.evaluations.items() if found.probes), default=0)
        of_task: dict[str, list[Record]] = {}
        for probe in (p for run in group.runs if step in run.evaluations for p in run.evaluations[step].probes):
            of_task.setdefault(probe_key(probe), []).append(probe)
        for name, probes in of_task.items():
            tasks.setdefault(name, {})[group.label] = _mean_probe(probes) | {"step": step}
    for other in others:
        for probe in other.probes:
            tasks.setdefault(probe_key(probe), {})[other.name] = probe
    if not tasks:
        return None
    section = Section("probing", "What each layer knows")
    section.parts.append(f"A linear classifier on frozen sentence vectors of each layer. {paper.PROBING}")
    colour = {group.label: group.colour for group in groups}
    colour = pictures.colours({other.name: None for other in others}, taken=colour.values()) | colour
    fill = pictures.draw_probes([(_title(curves), curves) for curves in tasks.values()], colour)
    note = "Shaded: layers that dropped tokens in training. Layer 0: embeddings."
    height = pictures.height_of(len(tasks), across=2, each=2.8)
    section.parts.append(Picture("probing", "Probing accuracy by layer", height, fill, note))
    rows = [row for curves in tasks.values() for row in _probe_differences(curves, groups)]
    if rows:
        note = "Points of a percent; p compares the shares that are right, as if sentences were drawn anew."
        head: list[Heading] = ["comparison", ("difference", "p")]
        section.parts.append(Table("probing-differences", "Differences between arms", head, rows, note=note))
    section.parts += [_probe_table(name, curves) for name, curves in tasks.items()]
    return section


def _title(curves: Mapping[str, Record]) -> str:
    probe = next(iter(curves.values()))
    return str(probe["title"]) + (", vectors of [CLS]" if probe.get("pooling") == "cls" else "")


def _mean_probe(records: Sequence[Record]) -> Record:
    """Over pretraining seeds."""
    layers = [
        {"layer": same[0]["layer"], "accuracy": statistics.fmean(layer["accuracy"] for layer in same)}
        for same in zip(*(record["layers"] for record in records), strict=False)
    ]
    return {**records[0], "layers": layers}


def _probe_differences(curves: Mapping[str, Record], groups: Sequence[RunGroup]) -> list[list[Cell]]:
    """At the last dropped layer and at the last layer."""
    rows: list[list[Cell]] = []
    for first, second in partners(groups):
        a, b = curves.get(first.label), curves.get(second.label)
        if a is None or b is None:
            continue
        name = f"{_title(curves)}, {first.label} against {second.label}"
        apart = [how for how, key in _APART.items() if a.get(key) != b.get(key)]
        if apart or len(a["layers"]) != len(b["layers"]):
            why = f"probed {listed(apart)}" if apart else "of another number of layers"
            rows.append([f"{name}: {why}, so not compared", NOTHING])
            continue
        last, trials = len(a["layers"]) - 1, (a.get("rows") or {}).get("test", 0)
        places = {last: "last"} | ({a["dropped"][1]: "last dropped"} if a["dropped"] else {})
        for layer, which in sorted(places.items()):
            x, y = (of["layers"][layer]["accuracy"] for of in (a, b))
            found = stats.two_shares(x, y, trials) if trials else stats.Difference(x - y)
            points = Number(100 * found.value, signed(100 * found.value, 1), found.p, as_p(found.p))
            rows.append([f"{name}, layer {layer} ({which})", points])
    return rows


def _probe_table(name: str, curves: Mapping[str, Record]) -> Table:
    rows: list[list[Cell]] = []
    for layer in range(max(len(curve["layers"]) for curve in curves.values())):
        row: list[Cell] = [str(layer)]
        for curve in curves.values():
            first, end = curve["dropped"] or (0, 0)
            mark = " ◦" if first < layer <= end else ""
            found = curve["layers"][layer : layer + 1]
            share = 100 * found[0]["accuracy"] if found else None
            row.append(NOTHING if share is None else Number(share, f"{share:.1f}{mark}"))
        rows.append(row)
    title = f"{_title(curves)}: accuracy by layer"
    note = "Percent on the test sentences. ◦: the output of a layer that dropped tokens in training."
    return Table(f"probing-{file_name(name)}", title, ["layer", *curves], rows, note=note)


# ---- drift ---------------------------------------------------------------------------------------------------------


def drift_section(groups: Sequence[RunGroup]) -> Section | None:
    """None where no drift was measured."""
    records = {group.label: [run.drift for run in group.runs if run.drift and run.drift["points"]] for group in groups}
    records = {label: found for label, found in records.items() if found}
    if not records:
        return None
    first = next(iter(records.values()))[0]
    same = {label: [r for r in found if _sentences(r) == _sentences(first)] for label, found in records.items()}
    curves = {label: _mean_drift(found) for label, found in same.items() if found}
    section = Section("drift", "Semantic drift")
    section.parts.append(
        f"Checkpoints fill the masked positions of {counted(first['sentences'], 'held-out sentence')}, through the "
        f"path that the run trains at that step. A sentence encoder ({first['encoder']}) embeds original and "
        f"reconstruction; the mean of their cosines is the similarity. {paper.DRIFT}"
    )
    left_out = [label for label in records if label not in curves or len(same[label]) < len(records[label])]
    if left_out:
        section.parts.append(f"Measured with other sentences or another encoder, and left out: {listed(left_out)}.")
    with_baseline = {first.label for first, second in partners(groups) if second.arm == BASELINE}
    gaps = {label: gap for label, gap in pictures.similarity_gaps(curves).items() if label in with_baseline}
    title = "Similarity of original and reconstruction, and held-out loss"
    note = (
        "Solid: mean cosine and its standard error; dashed: held-out loss. Inset: the baseline's cosine minus an arm's."
    )
    fill = pictures.draw_drifts(curves, {group.label: group.colour for group in groups}, gaps)
    section.parts += [
        Picture("drift", title, 4.2, fill, note),
        *_drift_differences(curves, groups),
        _drift_table(curves),
    ]
    return section


def _sentences(record: Record) -> tuple[object, ...]:
    return record["encoder"], record["sentences"], record.get("data")


def _mean_drift(records: Sequence[Record]) -> Record:
    """Over pretraining seeds, at the steps that all have."""
    by_step = [{point["step"]: point for point in record["points"]} for record in records]
    points = []
    for step in sorted(set.intersection(*map(set, by_step))):
        here = [of_run[step] for of_run in by_step]
        means = {key: statistics.fmean(point[key] for point in here) for key in ("cosine", "deviation")}
        losses = [point["valid_loss"] for point in here]
        points.append({"step": step, **means, "valid_loss": None if None in losses else statistics.fmean(losses)})
    return {**records[0], "points": points}


def _drift_differences(curves: Mapping[str, Record], groups: Sequence[RunGroup]) -> list[Table]:
    """At the first and at the last step that both have: whether the gap grows."""
    rows: list[list[Cell]] = []
    for first, second in partners(groups):
        if first.label not in curves or second.label not in curves:
            continue
        mine, theirs = ({p["step"]: p for p in curves[each.label]["points"]} for each in (first, second))
        steps = sorted(mine.keys() & theirs.keys())
        for step in dict.fromkeys((*steps[:1], *steps[-1:])):
            a, b = mine[step], theirs[step]
            found = stats.normal(a["cosine"] - b["cosine"], math.hypot(a["deviation"], b["deviation"]))
            apart = Number(found.value, signed(found.value, 4), found.p, as_p(found.p))
            rows.append([f"{first.label} against {second.label}, step {step:,}", apart])
    note = "p: as if the sentences were drawn anew."
    head: list[Heading] = ["comparison", ("cosine", "p")]
    return [Table("drift-differences", "Differences in similarity", head, rows, note=note)] if rows else []


def _drift_table(curves: Mapping[str, Record]) -> Table:
    head: list[Heading] = ["step"]
    for label in curves:
        head += [(f"{label}:\ncosine", "standard error"), f"{label}:\nheld-out loss"]
    by_step = [{point["step"]: point for point in curve["points"]} for curve in curves.values()]
    rows: list[list[Cell]] = []
    for step in sorted(set().union(*by_step)):
        row: list[Cell] = [number(step)]
        for point in (of.get(step) for of in by_step):
            if point is None:
                row += [NOTHING, NOTHING]
                continue
            cosine, error = point["cosine"], point["deviation"]
            row += [Number(cosine, f"{cosine:.4f}", error, f"± {error:.4f}"), number(point["valid_loss"], ".4f")]
        rows.append(row)
    return Table("drift", "Semantic drift by step", head, rows)


# ---- ablations -----------------------------------------------------------------------------------------------------


# A finished run, its scores, and the paper's: value in percent by column.
_Entry = tuple[Line, Subject, dict[str, float]]


def ablation_section(ablations: Sequence[Ablation]) -> Section | None:
    """None where there are none."""
    section = Section("ablations", "Ablations")
    for place, ablation in enumerate(ablations):
        again = [each.kind for each in ablations].count(ablation.kind) > 1
        section.parts += _ablated(ablation, f"ablation-{ablation.kind}" + (f"-{place + 1}" if again else ""))
    return section if section.parts else None


def _ablated(ablation: Ablation, name: str) -> list[Part]:
    done: list[_Entry] = [
        (line, Subject(line.variant.label, (scored,) if scored.cells else ()), _theirs(ablation.kind, line.variant))
        for line, scored in ablation.lines
        if line.finished
    ]
    left = [line.variant.label for line, _ in ablation.lines if not line.finished]
    if not done:
        return [f"{ablation.title}: none of its {counted(len(left), 'run')} is finished yet."]
    columns = common_columns([scored for _, scored, _ in done])
    parts: list[Part] = [
        f"{ablation.title}: {counted(len(done), 'run')} of recipe {short_name(ablation.recipe)}, one seed each, so "
        f"that differences between rows are not told from those between seeds. {paper.ABLATIONS.get(ablation.kind, '')}"
    ]
    if left:
        parts.append(f"Not finished, and left out: {listed(left)}.")
    names = [scored.label for _, scored, _ in done]
    means = {each.label: 100 * statistics.fmean(of) for _, each, _ in done if (of := each.averages(columns))}
    tasks = counted(len({column.task for column in columns}), "task")
    losses = {each.label: line.loss for line, each, _ in done if line.loss is not None}
    hours = {each.label: line.hours for line, each, _ in done if line.hours is not None}
    theirs = {each.label: paper_has["GLUE"] for _, each, paper_has in done if "GLUE" in paper_has}
    ranked = means or {label: -loss for label, loss in losses.items()}
    if len(theirs) >= _LEAST_RANKED and theirs.keys() <= ranked.keys():
        found, p = stats.rank_correlation([ranked[label] for label in theirs], list(theirs.values()))
        by = "mean scores" if means else "held-out losses"
        if found == found:
            parts.append(f"Rank correlation of {by} with the paper's GLUE averages: {signed(found)} ({as_p(p)}).")
    panels = {"held-out loss (nats)": losses, f"mean of {tasks} (%)": means, "hours of training": hours,
              "paper: GLUE average (%)": theirs}  # fmt: skip
    shown = {title: of for title, of in panels.items() if of}
    fill = pictures.grid(
        [
            partial(pictures.draw_dots, names=names, series=[Dots("", of, pictures.BLUE)], title=title)
            for title, of in shown.items()
        ],
        across=len(shown),
    )
    parts.append(Picture(name, ablation.title, 0.9 + 0.27 * len(done), fill))
    parts.append(_ablation_table(ablation, name, done, columns))
    if columns:
        main = list({column.task: column for column in reversed(columns)}.values())[::-1]
        rows: list[list[Cell]] = [
            [scored.label, *(percent(scored.units(column.task, column.metric)) for column in main)]
            for _, scored, _ in done
        ]
        head: list[Heading] = ["run", *((column.title, "deviation") for column in main)]
        note = "Percent, best dev epoch, over fine-tuning seeds."
        parts.append(Table(f"{name}-tasks", f"{ablation.title}: tasks", head, rows, note=note))
    return parts


def _theirs(kind: str, variant: Variant) -> dict[str, float]:
    """The paper's numbers of a row."""
    known: dict[str, tuple[str, Any]] = {
        "objectives": ("GLUE SuperGLUE SQuAD", paper.OBJECTIVES),
        "interval": ("hours saving GLUE SQuAD", paper.INTERVALS),
    }
    names, rows = known.get(kind, ("", {}))
    pairs = zip(names.split(), rows.get(variant.value, ()), strict=False)
    return {name: value for name, value in pairs if value is not None}


def _ablation_table(ablation: Ablation, name: str, done: Sequence[_Entry], columns: Sequence[Column]) -> Table:
    """A row for each run: costs, means over tasks, and the paper's numbers."""
    means = [
        (f"mean of\n{suite}", of)
        for suite in ("GLUE", "SuperGLUE", "SQuAD")
        if len(of := [column for column in columns if column.suite == suite]) > 1
    ]
    if columns:
        means.append((f"mean of\n{counted(len({column.task for column in columns}), 'task')}", list(columns)))
    theirs = list(dict.fromkeys(key for _, _, paper_has in done for key in paper_has))
    head: list[Heading] = ["run", "steps", "held-out\nloss", ("hours", "change"), ("FLOPs", "change")]
    head += [(title, "deviation") for title, _ in means]
    head += [f"paper:\n{'change' if key == 'saving' else key}" for key in theirs]
    hours = next((line.hours for line, _, _ in done if line.variant.value == BASELINE), None)
    rows: list[list[Cell]] = []
    for line, scored, paper_has in done:
        row: list[Cell] = [scored.label, number(line.goal), number(line.loss, ".4f")]
        row.append(cost(line.hours, saving(line.hours, hours), as_hours))
        row.append(cost(line.flops, saving(line.flops, line.baseline_flops), as_flops))
        row += [percent(scored.averages(of)) for _, of in means]
        known = [(key, paper_has.get(key)) for key in theirs]
        rows.append(row + [change(value) if key == "saving" else number(value, ".2f") for key, value in known])
    note = "Hours and FLOPs are compared with the baseline on as many steps."
    if means:
        note += " Means in percent, best dev epoch, a task counting the mean of its metrics."
    if ablation.kind == "objectives":
        note += " Which of the paper's rows with two check marks is which pair is taken from the order of its columns."
    return Table(name, ablation.title, head, rows, note=note)
