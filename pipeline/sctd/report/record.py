"""Exactly what was run: runs, data, recipes, fine-tunings, versions; and what a full reproduction would need beside."""

import json
from collections.abc import Sequence
from typing import Any

from sctd.config import BASELINE
from sctd.evaluate.ablate.ablations import ABLATIONS
from sctd.evaluate.results import Record
from sctd.evaluate.tasks.task import load_task, task_names
from sctd.present.page import Part, Points, Section
from sctd.present.table import NONE, NOTHING, Cell, Heading, Number, Table, number
from sctd.present.words import counted, listed, short_name
from sctd.report import paper
from sctd.report.gather import Inputs, Run
from sctd.report.groups import FAMILIES, SCTD, TOKEN_DROP, RunGroup, is_papers, settings
from sctd.report.scores import Subject, title_of

_FEW_ROWS = 0.9  # of the paper's training rows
_PROBES = {"tense": "Tense", "subj_number": "SubjNum"}


def record_section(inputs: Inputs, groups: Sequence[RunGroup]) -> Section:
    section = Section("record", "Exactly what was run")
    if groups:
        section.parts += [_run_table(groups), _corpus_table(inputs.runs), *_recipes(groups)]
    cells = [cell for each in inputs.evaluations for cell in each.cells]
    if cells:
        section.parts.append(_cell_table(cells))
    section.parts.append(_measured(inputs, cells))
    return section


def _run_table(groups: Sequence[RunGroup]) -> Table:
    head = ["run", "arm", "seed", "steps", "on", "jobs", "from", "until", "sctd", "ledger"]
    rows: list[list[Cell]] = []
    for group, run in ((of, run) for of in groups for run in of.runs):
        places = dict.fromkeys(f"{attempt['host']}, {counted(attempt['ranks'], 'rank')}" for attempt in run.attempts)
        versions = dict.fromkeys(str(attempt.get("version", NONE)) for attempt in run.attempts)
        times = [attempt["start"] for attempt in run.attempts[:1]]
        times += [attempt["ended"]["end"] for attempt in run.attempts if "ended" in attempt][-1:] or [NONE]
        start, end = (time[:16].replace("T", " ") for time in times) if run.attempts else (NONE, NONE)
        steps = f"{run.step:,}" if run.step == run.goal else f"{run.step:,} of {run.goal:,}"
        parent, begin = run.begins
        name = f"{run.name} (from {parent.name}@{begin})" if begin else run.name
        rows.append([
            name, group.label, str(run.config.run.seed), steps, "; ".join(places) or NONE, str(len(run.attempts)),
            start, end, ", ".join(versions) or NONE, str(run.at(run.step).get("ledger", NONE)),
        ])  # fmt: skip
    note = (
        "On: host and ranks. Ledger: rolling hash of the rows trained on; equal ledgers, equal rows in equal order. "
        "Times are those of the host."
    )
    return Table("runs", "Runs, by the names of their folders", head, rows, texts=2, note=note)


def _corpus_table(runs: Sequence[Run]) -> Table:
    head = ["corpus", "sources", "rows", "documents", "tokens", "ids", "unigram\nentropy"]
    rows: dict[str, list[Cell]] = {}
    for run in runs:
        of = run.manifest
        sources = listed([f"{source.name} ({short_name(source.spec)})" for source in of.sources])
        splits = listed([
            f"{split['train'].rows:,} of {length} tokens (and {split['valid'].rows:,} held out)"
            for length, split in of.splits.items()
        ])  # fmt: skip
        counts = [number(count) for count in (of.documents, of.tokens, of.vocab_size)]
        rows[run.corpus] = [run.corpus, sources, splits, *counts, number(of.unigram_entropy, ".3f")]
    return Table("corpora", "Data", head, list(rows.values()), texts=3)


def _recipes(groups: Sequence[RunGroup]) -> list[Part]:
    """Settings that all share, and a table of the others."""
    flats = [settings(group.first) for group in groups]
    same = {key: value for key, value in flats[0].items() if all(flat[key] == value for flat in flats)}
    sections: dict[str, list[str]] = {}
    for key, value in same.items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section or "also", []).append(f"{name} {json.dumps(value)}")
    parts: list[Part] = ["Settings of all runs:"]
    parts.append(Points([f"{section}: {', '.join(said)}" for section, said in sections.items()]))
    rows: list[list[Cell]] = [
        [key, *(json.dumps(flat[key]) for flat in flats)] for key in flats[0] if key not in same and key != "arm"
    ]
    if rows:
        head = ["setting", *(group.label for group in groups)]
        parts.append(Table("recipes", "Settings that differ between arms", head, rows))
    return parts


def _cell_table(cells: Sequence[Record]) -> Table:
    """A line for each task and setting."""
    head: list[Heading] = ["task", ("training\nrows", "paper"), "dev\nrows", "LR", "batch", ("steps", "default"),
            ("epochs", "default"), ("tokens,\nat most", "default"), "seeds", "fine-tunings", "rows' hash"]  # fmt: skip
    alike: dict[tuple[Any, ...], list[Record]] = {}
    for cell in cells:
        key = title_of(cell), *(cell[name] for name in ("lr", "batch_size", "steps", "max_length")), cell.get("data")
        alike.setdefault(key, []).append(cell)
    rows: list[list[Cell]] = []
    for (title, lr, batch_size, steps, length, data), found in alike.items():
        cell, seeds = found[0], sorted({cell["seed"] for cell in found})
        task = load_task(cell["task"]) if cell["task"] in task_names() else None
        counts, few = cell.get("rows") or {}, cell.get("shots")
        in_order = len(seeds) > 1 and seeds == list(range(seeds[0], seeds[-1] + 1))
        rows.append([
            title, _of(counts.get("train"), None if few else paper.TRAIN_ROWS.get(cell["task"]), _FEW_ROWS),
            _of(counts.get("dev"), None), number(lr, "g"), number(batch_size), _of(steps, task.steps if task else None),
            _of(cell.get("epochs"), task.epochs if task and not few else None),
            _of(length, task.max_length if task else None),
            f"{seeds[0]} to {seeds[-1]}" if in_order else ", ".join(map(str, seeds)), number(len(found)), data or NONE,
        ])  # fmt: skip
    note = "Beside a number, where it is less: the paper's training rows, and the task's default, which is the paper's."
    return Table("fine-tunings", "Fine-tunings", head, rows, note=note)


def _of(value: Any, full: float | None, enough: float = 1.0) -> Number:
    """A count, and what it should be where it falls short of it."""
    if not isinstance(value, int | float):
        return NOTHING
    said = f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
    less = full and round(value) < enough * full
    return Number(value, said, full, f"of {full:,g}") if full and less else Number(value, said)


def _measured(inputs: Inputs, cells: Sequence[Record]) -> str:
    """Probes, drift, and the versions, machines and days of everything."""
    probes = [probe for each in inputs.evaluations for probe in each.probes]
    everything = [*cells, *probes, *(run.drift for run in inputs.runs if run.drift)]
    rows = {f"{probe['title']} ({probe.get('pooling', 'mean')} pooling)": probe.get("rows") or {} for probe in probes}
    lists = {
        "Probing tasks": [
            f"{name}: {listed([f'{count:,} {split}' for split, count in of.items()])} sentences"
            for name, of in rows.items()
        ],
        "Ablations": [ablation.folder.resolve().name for ablation in inputs.ablations],
        "Checkpoints of no run here": [other.name for other in inputs.others],
        "Evaluated on": sorted({str(each["device"]) for each in everything if each.get("device")}),
        "Dates": sorted({str(each["date"]) for each in everything if each.get("date")}),
        "Versions": sorted({f"{k} {v}" for each in everything for k, v in (each.get("versions") or {}).items()}),
    }
    said = [f"{what}: {'; '.join(found)}." for what, found in lists.items() if found]
    return " ".join(said + ([] if everything else ["No checkpoint was evaluated."]))


# ---- what is missing ---------------------------------------------------------------------------------------------


def missing_section(inputs: Inputs, groups: Sequence[RunGroup], found: Sequence[Subject]) -> Section:
    """What the paper has, and these runs have not."""
    lines = [*_missing_runs(groups), *_missing_scores(found)]
    probed = {probe["task"] for run in inputs.runs for each in run.evaluations.values() for probe in each.probes}
    absent = [title for name, title in _PROBES.items() if name not in probed]
    lines += [f"Probing by layer: {listed(absent)} (Figures 4 and 8)."] if absent else []
    if not any(run.drift for run in inputs.runs):
        lines.append("Semantic drift over training (Figure 3).")
    if not any(len(group.evaluated) > 1 for group in groups):
        lines.append("Scores of several checkpoints along the training (Figure 6).")
    done = {a.kind for a in inputs.ablations if any(line.finished for line, _ in a.lines)}
    lines += [f"Ablation: {a.title}." for a in ABLATIONS.values() if a.kind not in done and a.kind != "selection"]
    section = Section("missing", "What is missing for a full reproduction")
    section.parts.append(Points(lines) if lines else "Nothing that the paper reports.")
    return section


def _missing_runs(groups: Sequence[RunGroup]) -> list[str]:
    arms = {group.arm for group in groups}
    absent = [paper.TITLES[arm] for arm in (BASELINE, TOKEN_DROP, SCTD) if arm not in arms]
    lines = [f"Runs of {listed(absent)}."] if absent else []
    if not groups:
        return lines
    models = [group.first.config.model for group in groups if not is_papers(group)]
    shapes = dict.fromkeys(
        f"{FAMILIES[m.family]}s with {counted(m.layers, 'layer')} of {m.hidden_size}" for m in models
    )
    if shapes:
        lines.append(f"BERT-base and BERT-large: these models are {listed(list(shapes))}.")
    if max(group.mean("tokens") or 0 for group in groups) < paper.STEPS * paper.ROWS * paper.LENGTH:
        lines.append(f"{paper.STEPS:,} steps of {paper.ROWS:,} rows of {paper.LENGTH} tokens: 131 billion tokens.")
    lines.append("The corpus of the paper, which is BERT's (Wikipedia and books).")
    if all(len(group.runs) == 1 for group in groups):
        lines.append("More than one pretraining seed per arm. (The paper does not say that it has more.)")
    return lines


def _missing_scores(found: Sequence[Subject]) -> list[str]:
    ours = [each for each in found if each.group is not None]
    absent = dict.fromkeys(
        column.title.replace("\n", " ").rstrip(".")
        for layout in paper.LAYOUTS
        for column in layout.columns
        if not any(each.units(column.task, column.metric) for each in ours)
    )
    lines = [f"Scores: {listed(list(absent))}."] if absent else []
    seeds = [len(score.values) for each in ours for e in each.evaluations for score in e.scores["best"].values()]
    if seeds and min(seeds) < paper.SEEDS:
        lines.append(f"{paper.SEEDS} fine-tuning seeds per task: the fewest here are {min(seeds)}.")
    return lines
