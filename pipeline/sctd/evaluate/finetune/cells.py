"""A cell of fine-tuning: one task, one setting, one seed. What it is called, what it needs, and its result on disk."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sctd.bench.result import device_name
from sctd.errors import UserError
from sctd.evaluate.encoder import best_device
from sctd.evaluate.finetune.material import Material
from sctd.evaluate.finetune.training import Data, Outcome, Setting, fit, metric_names, precision
from sctd.evaluate.results import Record
from sctd.evaluate.tasks.rows import ChoiceRow, Row, SpanRow, TagRow
from sctd.evaluate.tasks.task import Task
from sctd.files import write_atomically

_RESULT = "result.json"
_VERSIONS = ("sctd", "torch", "transformers", "scikit-learn", "scipy", "seqeval")


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

    def total_steps(self, material: Material) -> int:
        """Optimizer steps."""
        steps, epochs = (self.task.steps, self.task.epochs) if self.own_length else (self.steps, self.epochs)
        return steps or material.steps(epochs or 0, self.batch_size, self.shots)

    def name(self, material: Material) -> str:
        """What its folder is called."""
        length = "" if self.own_length else f"-{self.total_steps(material)}steps"
        shots = f"-{self.shots}shot" if self.shots else ""
        tokens = f"-{self.max_length}tokens" if self.max_length else ""
        return f"lr{self.lr:g}-b{self.batch_size}-seed{self.seed}{length}{tokens}{shots}"


def finished(folder: Path, cell: Cell, material: Material) -> Record | None:
    """The result of a cell below `folder`; None where there is none yet.

    Raises:
        UserError: one is there, but of another checkpoint, of other rows, or made in another way.
    """
    path = _cell_folder(folder, cell, material) / _RESULT
    if not path.is_file():
        return None
    try:
        result = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{path} cannot be read: remove it, and call again") from None
    pairs: dict[str, tuple[Any, Any]] = {
        "checkpoint": (result.get("encoder"), material.encoder.identity),
        "hash of the rows": (result.get("data"), material.digest),
        "setting": (
            tuple(result.get(key) for key in ("lr", "batch_size", "seed", "shots")),
            (cell.lr, cell.batch_size, cell.seed, cell.shots),
        ),
        "length of rows": (result.get("max_length"), material.coding.limit),
        "list of metrics": (result.get("metrics"), metric_names(cell.task, list(material.dev))),
    }
    if cell.task.kind != "span":  # to count the windows of spans takes minutes
        pairs["number of steps"] = result.get("steps"), cell.total_steps(material)
    for what, (then, now) in pairs.items():
        if then != now:
            raise UserError(
                f"{path} has another {what} ({then}, now {now}): remove its folder, or choose another --out"
            )
    return result


def run_cell(folder: Path, cell: Cell, material: Material, say: Callable[[Record], None]) -> Record:
    """Fine-tune, write predictions and, when all is done, the result. Returns the result.

    Raises:
        UserError: the fine-tuning failed; nothing is written.
    """
    start = time.perf_counter()
    data = material.data(cell.shots, cell.seed)
    setting = Setting(cell.lr, cell.batch_size, cell.total_steps(material), cell.seed)
    outcome = fit(material.encoder, data, setting, say)
    where = _cell_folder(folder, cell, material)
    where.mkdir(parents=True, exist_ok=True)
    for name, predictions in outcome.predictions.items():
        lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in _lines(data, predictions))
        write_atomically(where / f"predictions-{name}.jsonl", "".join(lines))
    result = _facts(cell, material) | _measured(outcome, time.perf_counter() - start)
    write_atomically(where / _RESULT, json.dumps(result, indent=1) + "\n")
    return result


def _cell_folder(folder: Path, cell: Cell, material: Material) -> Path:
    return folder / "finetune" / cell.task.name / cell.name(material)


def _facts(cell: Cell, material: Material) -> Record:
    """What was fine-tuned on what, and how."""
    task = cell.task
    rows = {"train": material.rows(cell.shots, cell.seed), **material.dev}
    return {
        "task": task.name,
        "title": task.title,
        "suite": task.suite,
        "kind": task.kind,
        "metrics": metric_names(task, list(material.dev)),
        "lr": cell.lr,
        "batch_size": cell.batch_size,
        "seed": cell.seed,
        "shots": cell.shots,
        "steps": cell.total_steps(material),
        "max_length": material.coding.limit,
        "rows": {name: len(split.rows) for name, split in rows.items()},
        "data": material.digest,
        "origin": material.train.origin,
        "encoder": material.encoder.identity,
    }


def _measured(outcome: Outcome, seconds: float) -> Record:
    return {
        "epochs": outcome.curve[-1]["epoch"],
        "scores": {"best": outcome.curve[outcome.best], "last": outcome.curve[-1]},
        "curve": outcome.curve,
        "seconds": seconds,
        "examples_per_s": outcome.examples / outcome.seconds,
        "tokens_per_s": outcome.tokens / outcome.seconds,
        "precision": precision(best_device()),
        "device": device_name(),
        "versions": {package: version(package) for package in _VERSIONS},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _lines(data: Data, predictions: dict[str, list[Any]]) -> Iterator[Record]:
    """A prediction a line: split, number of the row from 0, what was predicted and what is right, in words."""
    for name, split in data.dev.items():
        for number, (row, predicted) in enumerate(zip(split.rows.rows, predictions[name], strict=True)):
            right, guess = _words(data, row, predicted)
            key = {"key": row.key} if isinstance(row, SpanRow) else {}
            yield {"split": name, "row": number, **key, "prediction": guess, "label": right}


def _words(data: Data, row: Row, predicted: Any) -> tuple[Any, Any]:
    """(what is right, what was predicted): names of classes and tags, scores, choices by number from 0, answers."""
    if isinstance(row, SpanRow):
        return [text for text, _ in row.answers], predicted
    if isinstance(row, TagRow):
        return [data.classes[tag] for tag in row.tags], [data.classes[tag] for tag in predicted]
    if isinstance(row, ChoiceRow) or data.task.kind == "regression":
        return row.label, predicted
    return data.classes[int(row.label)], data.classes[predicted]
