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
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from sctd.errors import UserError
from sctd.evaluate.analyse.layers import batches, nothing
from sctd.evaluate.encoder import Encoder, best_device
from sctd.evaluate.finetune.features import Features, steps_of_pass, training_batches
from sctd.evaluate.finetune.heads import build_model
from sctd.evaluate.finetune.metrics import measure
from sctd.evaluate.finetune.spans import Windows, answers, best_spans
from sctd.evaluate.results import Record
from sctd.evaluate.tasks.rows import Rows, TagRow
from sctd.evaluate.tasks.task import Task

_WEIGHT_DECAY = 0.01
_WARMUP = 0.06  # of all steps
_CLIP = 1.0
_LOOK = 100  # steps after which the loss is read at the latest
_EVALUATIONS = 20  # about as many at most
_TOKENS = {"cpu": 4096, "cuda": 65536}  # of a batch that is only predicted, padding included


@dataclass(frozen=True)
class Split:
    """A dev set: its rows, and what the model sees of them."""

    rows: Rows
    features: Features


@dataclass(frozen=True)
class Data:
    """What a fine-tuning learns from and is measured on.

    Args:
        dev: by the names of the splits: dev, and where there is dev_mm.
    """

    task: Task
    classes: tuple[str, ...]
    train: Features
    dev: dict[str, Split]


@dataclass(frozen=True)
class Setting:
    """Hyper-parameters of a fine-tuning. lr: at its peak. steps: of the optimizer."""

    lr: float
    batch_size: int
    steps: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What came of a fine-tuning.

    Args:
        curve: epoch, step, training loss since the evaluation before, and the metrics, of each evaluation.
        best: which of them has the highest main metric; the first of equals.
        predictions: of the best and of the last evaluation, by the names of the splits.
        seconds: of the training alone, in which it saw so many examples and tokens.
    """

    curve: list[Record]
    best: int
    predictions: dict[str, dict[str, list[Any]]]
    seconds: float
    examples: int
    tokens: int


def fit(
    encoder: Encoder,
    data: Data,
    setting: Setting,
    say: Callable[[Record], None] = lambda point: None,
    check: Callable[[], None] = nothing,
) -> Outcome:
    """Fine-tune the encoder, and evaluate it on the way; what comes out depends on the arguments alone.

    Args:
        say: called with each point of the curve. check: called before each batch; what it raises ends the work.

    Raises:
        UserError: the weights cannot be loaded, a loss is not finite, or the GPU's memory is too small.
    """
    try:
        return _fit(encoder, data, setting, say, check)
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


def _fit(
    encoder: Encoder, data: Data, setting: Setting, say: Callable[[Record], None], check: Callable[[], None]
) -> Outcome:
    device = best_device()
    model = build_model(encoder, data.task, data.classes, setting.seed).to(device)
    optimizer, schedule = _optimizer(model, setting)
    one_pass = steps_of_pass(len(data.train), setting.batch_size)
    evaluations = set(evaluation_steps(setting.steps, one_pass))
    history = _History(data, one_pass)
    loss_sum, counted = torch.zeros((), dtype=torch.float64, device=device), 0
    examples, tokens, tokens_N = 0, 0, data.train.tokens_N
    rows = training_batches(data.train.lengths_N, setting.batch_size, setting.seed)
    seconds, start = 0.0, time.perf_counter()
    model.train()
    with tqdm(total=setting.steps, unit="step", disable=not sys.stderr.isatty(), leave=False) as bar:
        for step, rows_B in enumerate(itertools.islice(rows, setting.steps), 1):
            check()
            batch = data.train.batch(rows_B, device)
            with _autocast(device):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            loss_sum += loss.detach()
            counted, examples, tokens = counted + 1, examples + len(rows_B), tokens + int(tokens_N[rows_B].sum())
            bar.update()
            if step % _LOOK and step not in evaluations:
                continue
            mean = loss_sum.item() / counted  # waits for the device
            if not math.isfinite(mean):
                raise UserError(f"the loss is not finite at step {step:,}: lower --lr")
            if step in evaluations:
                seconds += time.perf_counter() - start
                say(history.add(step, mean, predict(model, data, device, check)))
                loss_sum.zero_()
                counted = 0
                model.train()
                start = time.perf_counter()
    return Outcome(history.curve, history.best, history.predictions, seconds, examples, tokens)


class _History:
    """The curve so far, and the predictions that are kept."""

    def __init__(self, data: Data, one_pass: int) -> None:
        self._data, self._one_pass = data, one_pass
        self.curve: list[Record] = []
        self.best = 0
        self.predictions: dict[str, dict[str, list[Any]]] = {}

    def add(self, step: int, loss: float, predictions: dict[str, list[Any]]) -> Record:
        """The new point of the curve."""
        task, passes = self._data.task, round(step / self._one_pass, 2)
        point: Record = {"epoch": int(passes) if passes == int(passes) else passes, "step": step, "loss": loss}
        for name, split in self._data.dev.items():
            found = measure(task, split.rows.rows, predictions[name], split.rows.classes)
            point |= {metric + name.removeprefix("dev"): value for metric, value in found.items()}
        self.curve.append(point)
        main = task.metrics[0]
        if len(self.curve) == 1 or point[main] > self.curve[self.best][main]:
            self.best = len(self.curve) - 1
            self.predictions["best"] = predictions
        self.predictions["last"] = predictions
        return point


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
def predict(model: Any, data: Data, device: torch.device, check: Callable[[], None]) -> dict[str, list[Any]]:
    """What the model says of each row of each dev set, in the form that `measure` takes.

    Raises:
        UserError: its outputs are not finite.
    """
    model.eval()
    return {name: _predict(model, data.task, split, device, check) for name, split in data.dev.items()}


def _predict(model: Any, task: Task, split: Split, device: torch.device, check: Callable[[], None]) -> list[Any]:
    features = split.features
    finite = torch.ones((), dtype=torch.bool, device=device)
    order, found = [], []
    for rows_B in batches((features.lengths_N * (features.choices or 1)).tolist(), _TOKENS[device.type]):
        check()
        with _autocast(device):
            output = model(**features.batch(rows_B, device, labels=False))
        logits = (output.start_logits, output.end_logits) if task.kind == "span" else (output.logits,)
        for each in logits:
            finite &= torch.isfinite(each).all()
        order.append(rows_B)
        found.append(_decided(task, features, rows_B, [each.float() for each in logits]))
    if not finite:
        raise UserError("the model's outputs are not finite: lower --lr")
    decided = [each.cpu().numpy() for each in found]
    if task.kind == "tags":
        return _tags(split, order, decided)
    in_order = np.empty_like(np.concatenate(decided))
    in_order[np.concatenate(order)] = np.concatenate(decided)
    if task.kind == "span":
        assert isinstance(features, Windows)
        return answers(features, split.rows.rows, in_order, task.no_answer)
    return in_order.tolist()


def _decided(task: Task, features: Features, rows_B: NDArray[np.int64], logits: list[Tensor]) -> Tensor:
    """Of a batch's logits what a prediction is made from, still on the device."""
    if task.kind == "span":
        assert isinstance(features, Windows)
        context = torch.from_numpy(features.context(rows_B)).to(logits[0].device)
        start_BW, end_BW = logits
        return best_spans(start_BW, end_BW, context)
    if task.kind == "regression":
        return logits[0][:, 0]
    return logits[0].argmax(dim=-1)


def _tags(split: Split, order: list[NDArray[np.int64]], decided: list[NDArray[np.int64]]) -> list[list[int]]:
    """The tag at each word's first token; a word beyond the model's positions is in no entity."""
    features = split.features
    tags_T = np.zeros(len(features.ids_T), dtype=np.int64)
    for rows_B, tags_BW in zip(order, decided, strict=True):
        there_BW, places = features.places(rows_B)
        tags_T[places] = tags_BW[there_BW]
    found = []
    for number, row in enumerate(split.rows.rows):
        assert isinstance(row, TagRow)
        place = slice(features.starts_S[number], features.starts_S[number + 1])
        first = features.words_T[place] >= 0
        tags = np.zeros(len(row.tokens), dtype=np.int64)
        tags[features.words_T[place][first]] = tags_T[place][first]
        found.append(tags.tolist())
    return found
