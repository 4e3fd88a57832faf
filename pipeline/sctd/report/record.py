"""Exactly what was run: runs, data, recipes, fine-tunings, versions; and what a full reproduction would need beside."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

from sctd.evaluate.ablate.ablations import ABLATIONS
from sctd.evaluate.results import Record
from sctd.evaluate.tasks.task import Task, load_task, task_names
from sctd.objective.build import row_lengths
from sctd.report import paper
from sctd.report.arms import FAMILIES, Group, is_papers, settings
from sctd.report.document import NONE, NOTHING, Cell, Head, Number, Part, Points, Section, Table, number, whole
from sctd.report.gather import Material, Run
from sctd.report.scores import Subject, title_of
from sctd.report.words import counted, listed, short_name

_COMPARED_ARMS = ("baseline", "token_drop", "sctd")
_FEW_ROWS = 0.9  # of the paper's training rows
_PROBES = {"tense": "Tense", "subj_number": "SubjNum"}


def record_section(material: Material, groups: Sequence[Group]) -> Section:
    section = Section("record", "Exactly what was run")
    if groups:
        section.parts += [_run_table(groups), *_corpora(groups), *_recipes(groups)]
    evaluations = _evaluations(material)
    if any(cells for _, cells, _ in evaluations):
        section.parts.append(_cell_table(evaluations))
    section.parts.append(_measured(material, evaluations))
    return section


def missing_section(material: Material, groups: Sequence[Group], found: Sequence[Subject]) -> Section:
    """What the paper has, and these runs have not."""
    lines = [*_missing_runs(groups), *_missing_scores(found), *_missing_analyses(material, groups)]
    section = Section("missing", "What is missing for a full reproduction")
    section.parts.append(Points(lines) if lines else "Nothing that the paper reports.")
    return section


# ---- what was run ------------------------------------------------------------------------------------------------


def _run_table(groups: Sequence[Group]) -> Table:
    head = [Head("run"), Head("arm"), Head("seed"), Head("steps"), Head("on"), Head("jobs"), Head("from"),
            Head("until"), Head("sctd"), Head("ledger")]  # fmt: skip
    rows = [_run_row(run, group.label) for group in groups for run in group.runs]
    note = (
        "On: host and ranks. Ledger: rolling hash of the rows trained on; equal ledgers, equal rows in equal order. "
        "Times are those of the host."
    )
    return Table("runs", "Runs, by the names of their folders", head, rows, texts=2, note=note)


def _run_row(run: Run, label: str) -> list[Cell]:
    places = dict.fromkeys(f"{attempt['host']}, {counted(attempt['ranks'], 'rank')}" for attempt in run.attempts)
    versions = dict.fromkeys(str(attempt.get("version", NONE)) for attempt in run.attempts)
    ends = [attempt["ended"]["end"] for attempt in run.attempts if "ended" in attempt]
    steps = f"{run.step:,}" if run.step == run.goal else f"{run.step:,} of {run.goal:,}"
    return [
        run.name, label, str(run.config.run.seed), steps, "; ".join(places) or NONE, str(len(run.attempts)),
        _minute(run.attempts[0]["start"]) if run.attempts else NONE, _minute(ends[-1]) if ends else NONE,
        ", ".join(versions) or NONE, str(run.at(run.step).get("ledger", NONE)),
    ]  # fmt: skip


def _minute(time: str) -> str:
    return time[:16].replace("T", " ")


def _corpora(groups: Sequence[Group]) -> list[Part]:
    said: dict[str, str] = {}
    for run in (run for group in groups for run in group.runs):
        manifest = run.manifest
        sources = listed([f"{source.name} ({short_name(source.spec)})" for source in manifest.sources])
        rows = listed([f"{split['train'].rows:,} of {length} tokens" for length, split in manifest.splits.items()])
        held = listed([f"{split['valid'].rows:,}" for split in manifest.splits.values()])
        said[run.corpus] = (
            f"Corpus {run.corpus}: {manifest.documents:,} documents and {manifest.tokens:,} tokens of {sources}, "
            f"{manifest.vocab_size:,} ids; training rows: {rows}; held out: {held}; unigram entropy "
            f"{manifest.unigram_entropy:.3f} nats."
        )
    return list(said.values())


def _recipes(groups: Sequence[Group]) -> list[Part]:
    """Settings that all share, and a table of the others."""
    flats = [settings(group.first) for group in groups]
    same = {key: value for key, value in flats[0].items() if all(flat[key] == value for flat in flats)}
    sections: dict[str, list[str]] = {}
    for key, value in same.items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section or "also", []).append(f"{name} {_value(value)}")
    parts: list[Part] = ["Settings of all runs:"]
    parts.append(Points([f"{section}: {', '.join(said)}" for section, said in sections.items()]))
    rows: list[list[Cell]] = [
        [key, *(_value(flat[key]) for flat in flats)] for key in flats[0] if key not in same and key != "arm"
    ]
    if rows:
        head = [Head("setting"), *(Head(group.label) for group in groups)]
        parts.append(Table("recipes", "Settings that differ between arms", head, rows))
    return parts


def _value(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _evaluations(material: Material) -> list[tuple[str, tuple[Record, ...], tuple[Record, ...]]]:
    """(name, cells, probes) of every evaluated checkpoint."""
    found = [(run.name, each.cells, each.probes) for run in material.runs for each in run.evaluations.values()]
    found += [(each.name, each.cells, each.probes) for each in material.others]
    lines = [line for ablation in material.ablations for line in ablation.lines]
    return found + [(row.run, scored.cells, scored.probes) for row, _, scored in lines]


def _cell_table(evaluations: Iterable[tuple[str, tuple[Record, ...], tuple[Record, ...]]]) -> Table:
    """A line for each task and setting."""
    head = [Head("task"), Head("training\nrows"), Head("dev\nrows"), Head("LR"), Head("batch"), Head("steps"),
            Head("epochs"), Head("tokens,\nat most"), Head("seeds"), Head("fine-tunings"),
            Head("rows' hash")]  # fmt: skip
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for cell in (cell for _, cells, _ in evaluations for cell in cells):
        key = title_of(cell), *(cell[name] for name in ("lr", "batch_size", "steps", "max_length")), cell.get("data")
        groups.setdefault(key, []).append(cell)
    rows: list[list[Cell]] = []
    for (title, lr, batch_size, steps, length, data), cells in groups.items():
        counts, seeds = cells[0].get("rows") or {}, sorted({cell["seed"] for cell in cells})
        epochs = cells[0].get("epochs")
        rows.append([
            title, _count(counts.get("train")), _count(counts.get("dev")), Number(lr, f"{lr:g}"), whole(batch_size),
            whole(steps),
            number(epochs, lambda value: f"{value:.3g}"), whole(length), _seeds(seeds),
            whole(len(cells)), str(data or NONE),
        ])  # fmt: skip
    return Table("fine-tunings", "Fine-tunings", head, rows)


def _seeds(seeds: Sequence[int]) -> str:
    whole = len(seeds) > 1 and list(seeds) == list(range(seeds[0], seeds[-1] + 1))
    return f"{seeds[0]} to {seeds[-1]}" if whole else ", ".join(map(str, seeds))


def _count(value: Any) -> Number:
    return whole(value) if isinstance(value, int) else NOTHING


def _measured(material: Material, evaluations: Sequence[tuple[str, tuple[Record, ...], tuple[Record, ...]]]) -> str:
    """Probes, drift, and the versions, machines and days of everything."""
    probes = [probe for _, _, found in evaluations for probe in found]
    drifts = [run.drift for run in material.runs if run.drift]
    everything = [*(cell for _, cells, _ in evaluations for cell in cells), *probes, *drifts]
    said = []
    if probes:
        said.append(f"Probing tasks: {listed(list(dict.fromkeys(map(_probed, probes))))}.")
    if material.ablations:
        said.append(f"Ablations: {listed([ablation.folder.resolve().name for ablation in material.ablations])}.")
    if material.others:
        said.append(f"Checkpoints of no run here: {listed([other.name for other in material.others])}.")
    if not everything:
        return " ".join([*said, "No checkpoint was evaluated."])
    devices = sorted({str(each["device"]) for each in everything if each.get("device")})
    dates = sorted({str(each["date"]) for each in everything if each.get("date")})
    versions = sorted({f"{k} {v}" for each in everything for k, v in (each.get("versions") or {}).items()})
    if devices:
        said.append(
            f"Evaluated on {listed(devices)}"
            + (f", {' to '.join(dict.fromkeys((dates[0], dates[-1])))}" if dates else "")
            + "."
        )
    if versions:
        said.append(f"Versions: {', '.join(versions)}.")
    return " ".join(said)


def _probed(probe: Record) -> str:
    counts = [f"{count:,} {split}" for split, count in (probe.get("rows") or {}).items()]
    return f"{probe['title']} ({listed(counts)} sentences, {probe.get('pooling', 'mean')} pooling)"


# ---- what is missing ---------------------------------------------------------------------------------------------


def _missing_runs(groups: Sequence[Group]) -> list[str]:
    lines = []
    arms = {group.arm for group in groups}
    absent = [paper.TITLES[arm] for arm in _COMPARED_ARMS if arm not in arms]
    if absent:
        lines.append(f"Runs of {listed(absent)}.")
    if not groups:
        return lines
    shapes = dict.fromkeys(_shape(group) for group in groups if not is_papers(group))
    if shapes:
        lines.append(f"BERT-base and BERT-large: these models are {listed(list(shapes))}.")
    tokens = [(group.mean("tokens") or 0, group.step) for group in groups]
    most, steps = max(tokens)
    whole = paper.STEPS * paper.ROWS * paper.LENGTH
    if most < whole:
        lines.append(
            f"{paper.STEPS:,} steps of {paper.ROWS:,} rows of {paper.LENGTH} tokens, {whole / 1e9:,.0f} billion "
            f"tokens: these runs have up to {steps:,} steps and {most:,.0f} tokens, {_part(most / whole)} of that."
        )
    lines.append("The corpus of the paper, which is BERT's (Wikipedia and books); ours is described above.")
    unfinished = [run.name for group in groups for run in group.runs if run.step < run.goal]
    if unfinished:
        lines.append(f"The rest of runs that are not at their end: {listed(unfinished)}.")
    if all(len(group.runs) == 1 for group in groups):
        lines.append("More than one pretraining seed an arm. (The paper does not say that it has more.)")
    return lines


def _shape(group: Group) -> str:
    model = group.first.config.model
    return f"{FAMILIES[model.family]}s with {counted(model.layers, 'layer')} of {model.hidden_size}"


def _part(share: float) -> str:
    return f"{100 * share:.3g} %"


def _missing_scores(found: Sequence[Subject]) -> list[str]:
    ours = [each for each in found if each.group is not None]
    columns = [column for layout in paper.LAYOUTS for column in layout.columns]
    absent = dict.fromkeys(
        column.title.replace("\n", " ").rstrip(".")
        for column in columns
        if not any(each.units(column.task, column.metric) for each in ours)
    )
    lines = [f"Scores: {listed(list(absent))}."] if absent else []
    cells = [cell for each in ours for evaluation in each.evaluations for cell in evaluation.cells]
    few = {title_of(cell): cell for cell in cells if _is_short_of_rows(cell)}
    if few:
        parts = [f"{title} ({c['rows']['train']:,} of {paper.TRAIN_ROWS[c['task']]:,})" for title, c in few.items()]
        lines.append(f"All training rows of {listed(parts)}.")
    shorter = dict.fromkeys(part for cell in cells for part in [_shorter(cell)] if part)
    if shorter:
        lines.append(f"The paper's length of fine-tuning, and of rows: {listed(list(shorter))}.")
    seeds = [len(score.values) for each in ours for e in each.evaluations for score in e.best.values()]
    if seeds and min(seeds) < paper.SEEDS:
        lines.append(f"{paper.SEEDS} fine-tuning seeds a task: the fewest here are {min(seeds)}.")
    return lines


def _is_short_of_rows(cell: Record) -> bool:
    known, rows = paper.TRAIN_ROWS.get(cell["task"]), (cell.get("rows") or {}).get("train")
    return bool(known and rows and not cell.get("shots") and rows < _FEW_ROWS * known)


def _shorter(cell: Record) -> str | None:
    """Where a task was trained for less than its default, which is the paper's: `RTE (500 of 2,036 steps)`."""
    task = _shipped(cell["task"])
    if task is None:
        return None
    less, epochs = [], cell.get("epochs")
    if task.steps and cell["steps"] < task.steps:
        less.append(f"{cell['steps']:,} of {task.steps:,} steps")
    elif task.epochs and isinstance(epochs, int | float) and round(epochs) < task.epochs and not cell.get("shots"):
        less.append(f"{epochs:.3g} of {task.epochs:g} epochs")
    if cell["max_length"] < task.max_length:
        less.append(f"{cell['max_length']:,} of {task.max_length:,} tokens a row")
    return f"{title_of(cell)} ({listed(less)})" if less else None


@functools.cache
def _shipped(name: str) -> Task | None:
    """None for a user's own."""
    return load_task(name) if name in task_names() else None


def _missing_analyses(material: Material, groups: Sequence[Group]) -> list[str]:
    lines = []
    probed = {probe["task"] for run in material.runs for each in run.evaluations.values() for probe in each.probes}
    absent = [title for name, title in _PROBES.items() if name not in probed]
    if absent:
        lines.append(f"Probing by layer: {listed(absent)} (Figures 4 and 8).")
    if not any(run.drift for run in material.runs):
        lines.append("Semantic drift over training (Figure 3).")
    if not any(len(group.evaluated) > 1 for group in groups):
        lines.append("Scores of several checkpoints along the training (Figure 6).")
    done = {a.kind for a in material.ablations if any(line and line.finished for _, line, _ in a.lines)}
    for kind in ABLATIONS:
        if kind not in done and kind != "selection":
            lines.append(f"Ablation: {ABLATIONS[kind].title}.")
    return lines


def lengths_of(run: Run) -> str:
    """`128, then 512`: tokens a row."""
    found = row_lengths(run.config, run.manifest)
    return f"{found[1]}, then {found[0]}" if len(found) > 1 else str(found[0])
