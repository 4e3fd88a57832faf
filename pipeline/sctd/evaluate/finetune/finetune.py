"""Fine-tuning a checkpoint on tasks: which cells there are, which are missing, running them, and the table of all."""

import csv
import functools
import io
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sctd.errors import UserError
from sctd.evaluate.encoder import open_encoder
from sctd.evaluate.finetune.cells import Cell, finished, run_cell
from sctd.evaluate.finetune.material import Material, read_material
from sctd.evaluate.results import SETTING, Record, Score, read_cells, scores
from sctd.evaluate.tasks.task import Task, load_tasks
from sctd.files import write_atomically
from sctd.train.engine.cpu import keep_freed_memory, repeatable_products, share_cores

_GRID_LR = (1e-5, 2e-5, 3e-5, 5e-5)
_GRID_BATCH_SIZE = (12, 16, 32)
_SHORTEST = 16  # tokens of a row: special ones, and a few of two texts
_COLUMNS = ("task", "metric", "best epoch", "last epoch", "seeds", "setting")


@dataclass(frozen=True)
class Wanted:
    """What to fine-tune on, and how; None is the task's own.

    Args:
        tasks: names, suites and YAML files. data_dir: None: the hub. seeds: 1 to so many.
        grid: over LR and batch size, also where the task has its own; what is given here is not varied.
        steps, epochs: at most one of them.
    """

    tasks: tuple[str, ...]
    data_dir: Path | None = None
    seeds: int = 5
    grid: bool = False
    shots: int | None = None
    lr: float | None = None
    batch_size: int | None = None
    steps: int | None = None
    epochs: float | None = None
    max_length: int | None = None


def finetune(checkpoint: str, wanted: Wanted, out: Path | None, cell: int | None, count: bool) -> None:
    """Run the cells that are not finished yet, then print a table of all and write it beside them.

    Args:
        out: folder of the results; None: that of the run which the checkpoint belongs to.
        cell: run this one alone, and make no table. count: print how many there are, run none.

    Raises:
        UserError: before anything is run, for what cannot be; after everything, where a fine-tuning failed.
    """
    _check(wanted)
    prepare_machine()  # before anything is multiplied
    tasks = load_tasks(wanted.tasks)
    cells = [found for task in tasks for found in list_cells(task, wanted)]
    if cell is not None and not 0 <= cell < len(cells):
        raise UserError(f"--cell {cell}: there are {len(cells)}, from 0 to {len(cells) - 1}")
    encoder = open_encoder(checkpoint)
    folder = encoder.results(out)
    if count:
        print(len(cells))
        return
    chosen = cells if cell is None else [cells[cell]]
    materials = {task.name: read_material(task, wanted.data_dir, encoder) for task in _tasks(chosen)}
    missing = [each for each in chosen if finished(folder, each, materials[each.task.name]) is None]
    for each in missing:
        materials[each.task.name].rows(each.shots, each.seed)  # there are enough of each class
    if len(missing) < len(chosen):
        _say(f"{len(chosen) - len(missing)} of {len(chosen)} fine-tunings are finished already")
    failed = _run(missing, materials, folder)
    if cell is None:
        _collect(folder, chosen, materials)
    if failed:
        raise UserError(f"{failed} of {len(missing)} fine-tunings failed, as said above; the others are kept")


def list_cells(task: Task, wanted: Wanted) -> list[Cell]:
    """The cells of a task, in the order of their numbers: by setting, then by seed."""
    rates = _choose(wanted.lr, task.lr, _GRID_LR, wanted.grid)
    sizes = _choose(wanted.batch_size, task.batch_size, _GRID_BATCH_SIZE, wanted.grid)
    length = None if wanted.max_length == task.max_length else wanted.max_length
    task = replace(task, max_length=length or task.max_length)
    return [
        Cell(task, lr, size, seed, wanted.steps, wanted.epochs, wanted.shots, length)
        for lr in rates
        for size in sizes
        for seed in range(1, wanted.seeds + 1)
    ]


def _choose(given: Any, own: Any, grid: tuple[Any, ...], whole_grid: bool) -> tuple[Any, ...]:
    if given is not None:
        return (given,)
    return grid if whole_grid or own is None else (own,)


def _check(wanted: Wanted) -> None:
    if wanted.steps is not None and wanted.epochs is not None:
        raise UserError("--steps and --epochs say the same twice: give one of them")
    for option in ("seeds", "shots", "batch_size", "steps"):
        value = getattr(wanted, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} {value}: must be at least 1")
    if wanted.max_length is not None and wanted.max_length < _SHORTEST:
        raise UserError(f"--max-length {wanted.max_length}: must be at least {_SHORTEST}")
    for option in ("lr", "epochs"):
        value = getattr(wanted, option)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{option} {value}: must be a number above 0")


def prepare_machine() -> None:
    """As pretraining does on CPUs."""
    if not torch.cuda.is_available():
        share_cores(1)
        keep_freed_memory()
        repeatable_products()


def _tasks(cells: Sequence[Cell]) -> list[Task]:
    return list({cell.task.name: cell.task for cell in cells}.values())


# ---- running -----------------------------------------------------------------------------------------------------


def _run(cells: Sequence[Cell], materials: dict[str, Material], folder: Path) -> int:
    """Run them one after the other; returns how many failed."""
    failed, told = 0, set()
    for number, cell in enumerate(cells, 1):
        material = materials[cell.task.name]
        if cell.task.name not in told:
            told.add(cell.task.name)
            _tell(material, cell.shots)
        name = f"{cell.task.name} {cell.name(material)}"
        say = functools.partial(_say_point, name, cell.total_steps(material))
        try:
            result = run_cell(folder, cell, material, say)
        except UserError as error:
            failed += 1
            print(f"{name} FAILED: {error}", file=sys.stderr, flush=True)
        else:
            _say(f"{name}  {_summary(result)}  ({number} of {len(cells)})")
    return failed


def _tell(material: Material, shots: int | None) -> None:
    """What a task's rows are, and what the model does not see of them."""
    name, limit = material.task.name, material.coding.limit
    splits = {"train": material.train, **material.dev}
    counts = ", ".join(f"{len(rows.rows):,} {split}" for split, rows in splits.items())
    few = f", {shots} of each class to train on" if shots else ""
    _say(f"{name}: {counts} rows of {material.train.origin}{few}")
    if limit < material.task.max_length:
        _say(f"{name}: the model takes {limit} tokens, not the task's {material.task.max_length}")
    for split, count in material.cut(shots).items():
        if count:
            _say(f"{name}: {count:,} {split} rows are longer than {limit} tokens, and cut")
    for split, rows in splits.items():
        if rows.left_out:
            _say(f"{name}: {rows.left_out:,} {split} rows are left out: no label, or an answer that is not in the text")


def _say_point(name: str, steps: int, point: Record) -> None:
    metrics = "  ".join(f"{key} {value:.4f}" for key, value in point.items() if key not in ("epoch", "step"))
    _say(f"{name}  epoch {point['epoch']:g}  step {point['step']:,}/{steps:,}  {metrics}")


def _summary(result: Record) -> str:
    main, best, last = result["metrics"][0], result["scores"]["best"], result["scores"]["last"]
    return (
        f"{main} {best[main]:.4f} best (epoch {best['epoch']:g}), {last[main]:.4f} last; "
        f"{result['seconds']:,.0f} s, {result['examples_per_s']:,.0f} examples/s"
    )


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


# ---- collecting --------------------------------------------------------------------------------------------------


def _collect(folder: Path, cells: Sequence[Cell], materials: dict[str, Material]) -> None:
    """Print what was asked for; write all that is in the folder."""
    asked = [finished(folder, cell, materials[cell.task.name]) for cell in cells]
    found = [result for result in asked if result is not None]
    if found:
        print(_plain(_table(found)))
    everything = read_cells(folder)
    if everything:
        write_atomically(folder / "finetune" / "scores.md", _markdown(_table(everything)))
        write_atomically(folder / "finetune" / "scores.csv", _csv(everything))
        print(f"written {folder / 'finetune' / 'scores.csv'} and scores.md")


def _pairs(results: Sequence[Record]) -> list[tuple[Score, Score]]:
    """Scores at the best and at the last epoch, task by task, the best setting first."""
    pairs = list(zip(scores(results, "best"), scores(results, "last"), strict=True))
    order = {name: number for number, name in enumerate(dict.fromkeys(best.task for best, _ in pairs))}
    return sorted(pairs, key=lambda pair: (order[pair[0].task], -pair[0].mean))


def _table(results: Sequence[Record]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for best, last in _pairs(results):
        for metric in (best.metric, *best.others):
            ends = [_metric(score, metric) for score in (best, last)]
            rows.append((best.task, metric, *map(_mean, ends), str(len(best.values)), _setting(best)))
    return rows


def _metric(score: Score, metric: str) -> Score:
    """The score of one of its further metrics."""
    values = score.values if metric == score.metric else score.others[metric]
    return replace(score, metric=metric, values=values, others={})


def _mean(score: Score) -> str:
    return f"{score.mean:.4f}" + (f" +- {score.deviation:.4f}" if len(score.values) > 1 else "")


def _setting(score: Score) -> str:
    of = score.setting
    shots = f", {of['shots']} examples a class" if of["shots"] else ""
    return f"LR {of['lr']:g}, batch {of['batch_size']}, {of['steps']:,} steps, {of['max_length']} tokens{shots}"


def _plain(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _markdown(rows: Sequence[tuple[str, ...]]) -> str:
    lines = [" | ".join(row) for row in rows]
    return "\n".join(f"| {line} |" for line in (lines[0], " | ".join(["---"] * len(_COLUMNS)), *lines[1:])) + "\n"


def _csv(results: Sequence[Record]) -> str:
    """A line for each task, setting, metric and epoch (best, last): mean, deviation, and the value of each seed."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("task", *SETTING, "metric", "epoch", "mean", "deviation", "seeds", "values"))
    for pair in _pairs(results):
        for metric in (pair[0].metric, *pair[0].others):
            for epoch, score in zip(("best", "last"), (_metric(score, metric) for score in pair), strict=True):
                values = " ".join(f"{seed}:{value:.6g}" for seed, value in sorted(score.values.items()))
                deviation = "" if math.isnan(score.deviation) else f"{score.deviation:.6g}"
                of = [score.setting[name] for name in SETTING]
                numbers = (f"{score.mean:.6g}", deviation, len(score.values), values)
                writer.writerow((score.task, *of, metric, epoch, *numbers))
    return stream.getvalue()
