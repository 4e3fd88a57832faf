"""Fine-tuning a checkpoint on tasks: which cells there are, which are missing, running them, and the table of all.

A cell is one task, one setting and one seed; its result is a file, and what is finished is not run again.
"""

import csv
import functools
import io
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sctd.errors import UserError
from sctd.evaluate.encoder import best_device, open_encoder
from sctd.evaluate.finetune.task_data import TaskData, read_task_data
from sctd.evaluate.finetune.training import Setting, fit, metric_names, precision
from sctd.evaluate.results import SETTING, Record, Score, read_cells, scores
from sctd.evaluate.tasks.rows import ChoiceRow, Row, SpanRow, TagRow
from sctd.evaluate.tasks.task import Task, load_tasks
from sctd.files import read_json_object, write_atomically, write_json
from sctd.present.table import Table, as_markdown, as_text
from sctd.train.engine.devices import keep_freed_memory, measured_on, repeatable_products, share_cores

_RESULT = "result.json"
_WORDS = {"encoder": "checkpoint", "data": "hash of the rows", "steps": "number of steps"}  # of a result's keys
_GRID_LR = (1e-5, 2e-5, 3e-5, 5e-5)
_GRID_BATCH_SIZE = (12, 16, 32)
_SHORTEST = 16  # tokens of a row: special ones, and a few of two texts
_COLUMNS = ("task", "metric", "best epoch", "last epoch", "seeds", "setting")


@dataclass(frozen=True)
class Cell:
    """One fine-tuning, as it is asked for.

    Args:
        steps, epochs: at most one of them; neither: the task's own. shots: None: all training rows.
        max_length: tokens, where it is not the task's own.
    """

    task: Task
    lr: float
    batch_size: int
    seed: int
    steps: int | None = None
    epochs: float | None = None
    shots: int | None = None
    max_length: int | None = None

    @property
    def own_length(self) -> bool:
        """Whether it is trained for as long as the task says."""
        asked = (self.steps, self.epochs)
        return asked == (None, None) or asked == (self.task.steps, self.task.epochs)

    def total_steps(self, data: TaskData) -> int:
        """Optimizer steps."""
        steps, epochs = (self.task.steps, self.task.epochs) if self.own_length else (self.steps, self.epochs)
        return steps or data.steps(epochs or 0, self.batch_size, self.shots)

    def name(self, data: TaskData) -> str:
        """What its folder is called."""
        length = "" if self.own_length else f"-{self.total_steps(data)}steps"
        shots = f"-{self.shots}shot" if self.shots else ""
        tokens = f"-{self.max_length}tokens" if self.max_length else ""
        return f"lr{self.lr:g}-b{self.batch_size}-seed{self.seed}{length}{tokens}{shots}"

    def folder(self, results: Path, data: TaskData) -> Path:
        return results / "finetune" / self.task.name / self.name(data)

    def setting(self, steps: int) -> Setting:
        return Setting(self.lr, self.batch_size, steps, self.seed, self.shots)

    def identity(self, data: TaskData, setting: Setting) -> Record:
        """What a result must agree with to be this cell's."""
        metrics, limit = metric_names(self.task, list(data.dev)), data.coding.limit
        of_data = {"encoder": data.encoder.identity, "data": data.digest, "max_length": limit, "metrics": metrics}
        return of_data | asdict(setting)


def finished(results: Path, cell: Cell, data: TaskData) -> Record | None:
    """The result of a cell in a folder of results; None where there is none yet.

    Raises:
        UserError: one is there, but of another checkpoint, of other rows, or made in another way.
    """
    path = cell.folder(results, data) / _RESULT
    if not path.is_file():
        return None
    result = read_json_object(path)
    if result is None:
        raise UserError(f"{path} cannot be read: remove it, and call again")
    # To count the windows of spans takes minutes.
    steps = result.get("steps", 0) if cell.task.kind == "span" else cell.total_steps(data)
    for key, now in cell.identity(data, cell.setting(steps)).items():
        if result.get(key) != now:
            what = _WORDS.get(key, key)
            raise UserError(
                f"{path} has another {what} ({result.get(key)}, now {now}): remove its folder, or choose another --out"
            )
    return result


def run_cell(results: Path, cell: Cell, data: TaskData, say: Callable[[Record], None]) -> Record:
    """Fine-tune, write predictions and, when all is done, the result. Returns the result.

    Raises:
        UserError: the fine-tuning failed; nothing is written.
    """
    start, task = time.perf_counter(), cell.task
    setting = cell.setting(cell.total_steps(data))
    outcome = fit(data, setting, say)
    folder, rows = cell.folder(results, data), {"train": data.rows(cell.shots, cell.seed), **data.dev}
    folder.mkdir(parents=True, exist_ok=True)
    for name, predictions in outcome.predictions.items():
        lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in _lines(data, predictions))
        write_atomically(folder / f"predictions-{name}.jsonl", "".join(lines))
    result = {
        "task": task.name,
        "title": task.title,
        "suite": task.suite,
        "kind": task.kind,
        **cell.identity(data, setting),
        "rows": {name: len(split.rows) for name, split in rows.items()},
        "origin": data.train.origin,
        "epochs": outcome.curve[-1]["epoch"],
        "scores": {"best": outcome.curve[outcome.best], "last": outcome.curve[-1]},
        "curve": outcome.curve,
        "seconds": time.perf_counter() - start,
        "examples_per_s": outcome.examples / outcome.seconds,
        "tokens_per_s": outcome.tokens / outcome.seconds,
        "precision": precision(best_device()),
        **measured_on("sctd", "torch", "transformers", "scikit-learn", "scipy", "seqeval"),
    }
    write_json(folder / _RESULT, result)
    return result


def _lines(data: TaskData, predictions: dict[str, list[Any]]) -> Iterator[Record]:
    """A prediction a line: split, number of the row from 0, what was predicted and what is right, in words."""
    for name, rows in data.dev.items():
        for number, (row, predicted) in enumerate(zip(rows.rows, predictions[name], strict=True)):
            right, guess = _words(data, row, predicted)
            key = {"key": row.key} if isinstance(row, SpanRow) else {}
            yield {"split": name, "row": number, **key, "prediction": guess, "label": right}


def _words(data: TaskData, row: Row, predicted: Any) -> tuple[Any, Any]:
    """(what is right, what was predicted): names of classes and tags, scores, choices by number from 0, answers."""
    classes = data.train.classes
    if isinstance(row, SpanRow):
        return [text for text, _ in row.answers], predicted
    if isinstance(row, TagRow):
        return [classes[tag] for tag in row.tags], [classes[tag] for tag in predicted]
    if isinstance(row, ChoiceRow) or data.task.kind == "regression":
        return row.label, predicted
    return classes[int(row.label)], classes[predicted]


# ---- the verb ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
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

    def check(self) -> None:
        """UserError for a value that cannot be."""
        if self.steps is not None and self.epochs is not None:
            raise UserError("--steps and --epochs both say how long to train: give one of them")
        least = {"seeds": 1, "shots": 1, "batch_size": 1, "steps": 1, "max_length": _SHORTEST}
        for option, bound in least.items():
            value = getattr(self, option)
            if value is not None and value < bound:
                raise UserError(f"--{option.replace('_', '-')} {value}: must be at least {bound}")
        for option in ("lr", "epochs"):
            value = getattr(self, option)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"--{option} {value}: must be a number above 0")

    def cells(self, task: Task) -> list[Cell]:
        """The cells of a task, in the order of their numbers: by setting, then by seed."""

        def values(given: Any, own: Any, grid: tuple[Any, ...]) -> tuple[Any, ...]:
            if given is not None:
                return (given,)
            return grid if self.grid or own is None else (own,)

        length = None if self.max_length == task.max_length else self.max_length
        settings = itertools.product(
            values(self.lr, task.lr, _GRID_LR),
            values(self.batch_size, task.batch_size, _GRID_BATCH_SIZE),
            range(1, self.seeds + 1),
        )
        task = replace(task, max_length=length or task.max_length)
        return [Cell(task, *setting, self.steps, self.epochs, self.shots, length) for setting in settings]


def finetune(checkpoint: str, options: Options, out: Path | None, cell: int | None, count: bool) -> None:
    """Run the cells that are not finished yet, then print a table of all and write it beside them.

    Args:
        out: folder of the results; None: that of the run which the checkpoint belongs to.
        cell: run this one alone, and make no table. count: print how many there are, run none.

    Raises:
        UserError: before anything is run, for what cannot be; after everything, where a fine-tuning failed.
    """
    options.check()
    prepare_machine()  # before anything is multiplied
    cells = [found for task in load_tasks(options.tasks) for found in options.cells(task)]
    if cell is not None and not 0 <= cell < len(cells):
        raise UserError(f"--cell {cell}: there are {len(cells)}, from 0 to {len(cells) - 1}")
    encoder = open_encoder(checkpoint)
    folder = encoder.results(out)
    if count:
        print(len(cells))
        return
    chosen = cells if cell is None else [cells[cell]]
    tasks = {each.task.name: each.task for each in chosen}
    data = {name: read_task_data(task, options.data_dir, encoder) for name, task in tasks.items()}
    missing = [each for each in chosen if finished(folder, each, data[each.task.name]) is None]
    for each in missing:
        data[each.task.name].rows(each.shots, each.seed)  # raises where there are too few of a class
    if len(missing) < len(chosen):
        _say(f"{len(chosen) - len(missing)} of {len(chosen)} fine-tunings are finished already")
    failed = _run(missing, data, folder)
    if cell is None:
        _collect(folder, chosen, data)
    if failed:
        raise UserError(f"{failed} of {len(missing)} fine-tunings failed, see the errors above; the others are kept")


def prepare_machine() -> None:
    """As pretraining does on CPUs."""
    if not torch.cuda.is_available():
        share_cores(1)
        keep_freed_memory()
        repeatable_products()


# ---- running -----------------------------------------------------------------------------------------------------


def _run(cells: Sequence[Cell], data: dict[str, TaskData], folder: Path) -> int:
    """Run them one after the other; returns how many failed."""
    failed, described = 0, set()
    for number, cell in enumerate(cells, 1):
        of = data[cell.task.name]
        if cell.task.name not in described:
            described.add(cell.task.name)
            _describe(of, cell.shots)
        name = f"{cell.task.name} {cell.name(of)}"
        try:
            result = run_cell(folder, cell, of, functools.partial(_say_point, name, cell.total_steps(of)))
        except UserError as error:
            failed += 1
            print(f"{name} FAILED: {error}", file=sys.stderr, flush=True)
        else:
            main, best, last = result["metrics"][0], result["scores"]["best"], result["scores"]["last"]
            found = f"{main} {best[main]:.4f} best (epoch {best['epoch']:g}), {last[main]:.4f} last"
            speed = f"{result['seconds']:,.0f} s, {result['examples_per_s']:,.0f} examples/s"
            _say(f"{name}  {found}; {speed}  ({number} of {len(cells)})")
    return failed


def _describe(data: TaskData, shots: int | None) -> None:
    """Print what a task's rows are, and what the model does not see of them."""
    name, limit, splits = data.task.name, data.coding.limit, {"train": data.train, **data.dev}
    counts = ", ".join(f"{len(rows.rows):,} {split}" for split, rows in splits.items())
    few = f", {shots} of each class to train on" if shots else ""
    _say(f"{name}: {counts} rows of {data.train.origin}{few}")
    if limit < data.task.max_length:
        _say(f"{name}: the model takes {limit} tokens, not the task's {data.task.max_length}")
    for split, count in data.cut(shots).items():
        if count:
            _say(f"{name}: {count:,} {split} rows are longer than {limit} tokens, and cut")
    for split, rows in splits.items():
        if rows.left_out:
            _say(f"{name}: {rows.left_out:,} {split} rows are left out: no label, or an answer that is not in the text")


def _say_point(name: str, steps: int, point: Record) -> None:
    metrics = "  ".join(f"{key} {value:.4f}" for key, value in point.items() if key not in ("epoch", "step"))
    _say(f"{name}  epoch {point['epoch']:g}  step {point['step']:,}/{steps:,}  {metrics}")


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


# ---- collecting --------------------------------------------------------------------------------------------------


def _collect(folder: Path, cells: Sequence[Cell], data: dict[str, TaskData]) -> None:
    """Print what was asked for; write all that is in the folder."""
    asked = [finished(folder, cell, data[cell.task.name]) for cell in cells]
    found = [result for result in asked if result is not None]
    if found:
        print(as_text(_table(found)))
    everything = read_cells(folder)
    if everything:
        write_atomically(folder / "finetune" / "scores.md", as_markdown(_table(everything)) + "\n")
        write_atomically(folder / "finetune" / "scores.csv", _csv(everything))
        print(f"written {folder / 'finetune' / 'scores.csv'} and scores.md")


def _pairs(results: Sequence[Record]) -> list[tuple[Score, Score]]:
    """Of each metric at the best and at the last epoch: task by task, the best setting first."""
    pairs = list(zip(scores(results, "best"), scores(results, "last"), strict=True))
    order = {name: number for number, name in enumerate(dict.fromkeys(best.task for best, _ in pairs))}
    pairs.sort(key=lambda pair: (order[pair[0].task], -pair[0].mean))
    return [(best.of(metric), last.of(metric)) for best, last in pairs for metric in (best.metric, *best.others)]


def _table(results: Sequence[Record]) -> Table:
    """For reading: a row for each task, setting and metric."""
    rows = []
    for best, last in _pairs(results):
        rows.append((best.task, best.metric, _mean(best), _mean(last), str(len(best.values)), best.how))
    return Table("scores", "", _COLUMNS, rows, texts=len(_COLUMNS))


def _mean(score: Score) -> str:
    return f"{score.mean:.4f}" + (f" +- {score.deviation:.4f}" if len(score.values) > 1 else "")


def _csv(results: Sequence[Record]) -> str:
    """A line for each task, setting, metric and epoch (best, last): mean, deviation, and the value of each seed."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("task", *SETTING, "metric", "epoch", "mean", "deviation", "seeds", "values"))
    for pair in _pairs(results):
        for epoch, score in zip(("best", "last"), pair, strict=True):
            values = " ".join(f"{seed}:{value:.6g}" for seed, value in sorted(score.values.items()))
            deviation = "" if math.isnan(score.deviation) else f"{score.deviation:.6g}"
            setting = (score.setting[name] for name in SETTING)
            numbers = (f"{score.mean:.6g}", deviation, len(score.values), values)
            writer.writerow((score.task, *setting, score.metric, epoch, *numbers))
    return stream.getvalue()
