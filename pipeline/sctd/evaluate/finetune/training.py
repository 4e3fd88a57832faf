"""One fine-tuning: the loop, and what it is measured by.

Where the paper's Table 7 is silent it is what `Trainer` of transformers does or is usually told to: AdamW, a weight
decay of 0.01 on matrices alone, a linear warm-up over 6 % of the steps and a linear decay to 0, gradients clipped to 1.

Legend: N examples, B of a batch.
"""

import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from sctd.errors import UserError
from sctd.evaluate.encoder import best_device
from sctd.evaluate.finetune.features import (
    Features,
    Windows,
    answers,
    batches,
    best_spans,
    nothing,
    steps_of_pass,
    training_batches,
)
from sctd.evaluate.finetune.metrics import measure
from sctd.evaluate.finetune.task_data import TaskData, build_model
from sctd.evaluate.results import Record
from sctd.evaluate.tasks.task import Task

_WEIGHT_DECAY = 0.01
_WARMUP = 0.06  # of all steps
_CLIP = 1.0
_LOOK = 100  # steps after which the loss is read at the latest
_EVALUATIONS = 20  # about as many at most
_TOKENS = {"cpu": 4096, "cuda": 65536}  # of a batch that is only predicted, padding included


@dataclass(frozen=True)
class Setting:
    """Hyper-parameters of a fine-tuning. lr: at its peak. steps: of the optimizer. shots: None: all training rows."""

    lr: float
    batch_size: int
    steps: int
    seed: int
    shots: int | None = None


@dataclass
class Outcome:
    """What came of a fine-tuning.

    Args:
        curve: epoch, step, training loss since the evaluation before, and the metrics, of each evaluation.
        best: which of them has the highest main metric; the first of equals.
        predictions: of the best and of the last evaluation, by the names of the splits.
        seconds: of the training alone, in which it saw so many examples and tokens.
    """

    curve: list[Record] = field(default_factory=list)
    best: int = 0
    predictions: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    seconds: float = 0.0
    examples: int = 0
    tokens: int = 0


def fit(
    data: TaskData,
    setting: Setting,
    say: Callable[[Record], None] = lambda point: None,
    check: Callable[[], None] = nothing,
) -> Outcome:
    """Fine-tune the encoder of the data, and evaluate it on the way; what comes out depends on the arguments alone.

    Args:
        say: called with each point of the curve. check: called before each batch; what it raises ends the work.

    Raises:
        UserError: the weights cannot be loaded, a loss is not finite, or the GPU's memory is too small.
    """
    try:
        return _fit(data, setting, say, check)
    except torch.OutOfMemoryError:
        raise UserError(f"the GPU's memory does not hold batches of {setting.batch_size}: lower --batch-size") from None


def evaluation_steps(steps: int, one_pass: int) -> list[int]:
    """After which steps to evaluate: at the end of each pass, or of every k-th where there are many, and at the end."""
    every = math.ceil(steps / one_pass / _EVALUATIONS) * one_pass
    return [*range(every, steps, every), steps]


def metric_names(task: Task, splits: Sequence[str]) -> list[str]:
    """The task's metrics; those on the mismatched set end in _mm."""
    return [name + split.removeprefix("dev") for split in splits for name in task.metrics]


def precision(device: torch.device) -> str:
    """bf16 (autocast) on GPUs that have it, else fp32."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if fast else "fp32"


def _fit(data: TaskData, setting: Setting, say: Callable[[Record], None], check: Callable[[], None]) -> Outcome:
    device = best_device()
    model = build_model(data.encoder, data.task, data.train.classes, setting.seed).to(device)
    optimizer, schedule = _optimizer(model, setting)
    train = data.features(setting.shots, setting.seed)
    evaluations = set(evaluation_steps(setting.steps, steps_of_pass(len(train), setting.batch_size)))
    rows = training_batches(train.lengths_N, setting.batch_size, setting.seed)
    outcome, tokens_N = Outcome(), train.tokens_N
    loss_sum, counted = torch.zeros((), dtype=torch.float64, device=device), 0
    start = time.perf_counter()
    model.train()
    with tqdm(total=setting.steps, unit="step", disable=not sys.stderr.isatty(), leave=False) as bar:
        for step, rows_B in enumerate(itertools.islice(rows, setting.steps), 1):
            check()
            batch = train.batch(rows_B, device)
            with _autocast(device):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            loss_sum += loss.detach()
            counted += 1
            outcome.examples += len(rows_B)
            outcome.tokens += int(tokens_N[rows_B].sum())
            bar.update()
            if step % _LOOK and step not in evaluations:
                continue
            mean = loss_sum.item() / counted  # waits for the device
            if not math.isfinite(mean):
                raise UserError(f"the loss is not finite at step {step:,}: lower --lr")
            if step in evaluations:
                outcome.seconds += time.perf_counter() - start
                epoch = round(step / steps_of_pass(len(train), setting.batch_size), 2)
                point = {"epoch": int(epoch) if epoch == int(epoch) else epoch, "step": step, "loss": mean}
                _add_point(outcome, data, point, predict(model, data, device, check))
                say(outcome.curve[-1])
                loss_sum.zero_()
                counted = 0
                model.train()
                start = time.perf_counter()
    return outcome


def _add_point(outcome: Outcome, data: TaskData, point: Record, predictions: dict[str, list[Any]]) -> None:
    """To the curve, with its metrics; of the best and the last one the predictions are kept."""
    for name, rows in data.dev.items():
        found = measure(data.task, rows.rows, predictions[name], rows.classes)
        point |= {metric + name.removeprefix("dev"): value for metric, value in found.items()}
    outcome.curve.append(point)
    main = data.task.metrics[0]
    if len(outcome.curve) == 1 or point[main] > outcome.curve[outcome.best][main]:
        outcome.best = len(outcome.curve) - 1
        outcome.predictions["best"] = predictions
    outcome.predictions["last"] = predictions


def _optimizer(model: torch.nn.Module, setting: Setting) -> tuple[torch.optim.Optimizer, Any]:
    from transformers import get_linear_schedule_with_warmup

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": _WEIGHT_DECAY},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},  # biases, and the scales of LayerNorm
    ]
    optimizer = torch.optim.AdamW(groups, lr=setting.lr, fused=True)
    warmup = math.ceil(_WARMUP * setting.steps)
    return optimizer, get_linear_schedule_with_warmup(optimizer, warmup, setting.steps)


def _autocast(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if precision(device) == "bf16" else nullcontext()


# ---- predictions -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict(model: Any, data: TaskData, device: torch.device, check: Callable[[], None]) -> dict[str, list[Any]]:
    """What the model says of each row of each dev set, in the form that `measure` takes.

    Raises:
        UserError: its outputs are not finite.
    """
    model.eval()
    return {name: _predict(model, data, name, device, check) for name in data.dev}


def _predict(model: Any, data: TaskData, split: str, device: torch.device, check: Callable[[], None]) -> list[Any]:
    rows, features = data.dev[split].rows, data.dev_features[split]
    finite = torch.ones((), dtype=torch.bool, device=device)
    order, found = [], []
    for rows_B in batches((features.lengths_N * (features.choices or 1)).tolist(), _TOKENS[device.type]):
        check()
        with _autocast(device):
            output = model(**features.batch(rows_B, device, labels=False))
        logits = (output.start_logits, output.end_logits) if data.task.kind == "span" else (output.logits,)
        for each in logits:
            finite &= torch.isfinite(each).all()
        order.append(rows_B)
        found.append(_decided(data.task, features, rows_B, [each.float() for each in logits]))
    if not finite:
        raise UserError("the model's outputs are not finite: lower --lr")
    decided = [each.cpu().numpy() for each in found]
    if data.task.kind == "tags":
        return _tags(rows, features, order, decided)
    in_order = np.empty_like(np.concatenate(decided))
    in_order[np.concatenate(order)] = np.concatenate(decided)
    if isinstance(features, Windows):
        return answers(features, rows, in_order, data.task.no_answer)  # type: ignore[arg-type]
    return in_order.tolist()


def _decided(task: Task, features: Features, rows_B: NDArray[np.int64], logits: list[Tensor]) -> Tensor:
    """Of a batch's logits what a prediction is made from, still on the device."""
    if isinstance(features, Windows):
        start_BW, end_BW = logits
        return best_spans(start_BW, end_BW, torch.from_numpy(features.context(rows_B)).to(start_BW.device))
    if task.kind == "regression":
        return logits[0][:, 0]
    return logits[0].argmax(dim=-1)


def _tags(
    rows: Sequence[Any], features: Features, order: list[NDArray[np.int64]], decided: list[NDArray[np.int64]]
) -> list[list[int]]:
    """The tag at each word's first token; a word beyond the model's positions is in no entity."""
    tags_T = np.zeros(len(features.ids_T), dtype=np.int64)
    for rows_B, tags_BW in zip(order, decided, strict=True):
        there_BW, places = features.places(rows_B)
        tags_T[places] = tags_BW[there_BW]
    found = []
    for number, row in enumerate(rows):
        words, predicted = (array[features.tokens_of(number)] for array in (features.words_T, tags_T))
        tags = np.zeros(len(row.tokens), dtype=np.int64)
        tags[words[words >= 0]] = predicted[words >= 0]
        found.append(tags.tolist())
    return found
