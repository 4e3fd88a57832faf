"""A task's rows for an encoder, read once and encoded once for all cells, and the model that is fine-tuned on them.

The models are transformers' own heads on the encoder: those that a plain script of theirs would fine-tune.
"""

import functools
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sctd.errors import UserError
from sctd.evaluate.encoder import Encoder, load_config, load_tokenizer, load_weights
from sctd.evaluate.finetune.features import Coding, Features, encode, encode_spans, has_token_types, steps_of_pass
from sctd.evaluate.tasks.rows import SplitRows, few_shots, has_split, read_rows
from sctd.evaluate.tasks.task import Task

_FIRST_SEED = 1
_HEADS = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "choice": "AutoModelForMultipleChoice",
    "span": "AutoModelForQuestionAnswering",
    "tags": "AutoModelForTokenClassification",
}


@dataclass
class TaskData:
    """A task's rows; their token ids are made when they are first needed, and kept.

    Args:
        train, dev: rows; of dev by the names of the splits: dev, and where there is dev_mm.
        digest: of all of them.
    """

    task: Task
    encoder: Encoder
    coding: Coding
    train: SplitRows
    dev: dict[str, SplitRows]
    digest: str

    def rows(self, shots: int | None, seed: int) -> SplitRows:
        """The rows to train on. UserError where there are fewer than `shots` of a class."""
        return few_shots(self.task, self.train, shots, seed) if shots else self.train

    def features(self, shots: int | None, seed: int) -> Features:
        """What a model sees of them."""
        return self._encode(self.rows(shots, seed)) if shots else self._train

    @functools.cached_property
    def dev_features(self) -> dict[str, Features]:
        """What a model sees of the rows of each dev set."""
        return {name: self._encode(rows) for name, rows in self.dev.items()}

    def steps(self, epochs: float, batch_size: int, shots: int | None) -> int:
        """Optimizer steps of so many passes.

        Few examples may be more for one seed than for another; then those of the first seed count for all, so that all
        seeds of a setting are trained for as long.
        """
        if self.task.kind == "span":
            examples = len(self.features(shots, _FIRST_SEED))  # windows
        else:
            examples = len(self.rows(shots, _FIRST_SEED).rows)
        return max(1, math.ceil(epochs * steps_of_pass(examples, batch_size)))

    def cut(self, shots: int | None) -> dict[str, int]:
        """How many rows of each split are longer than the model sees them; few examples are not counted."""
        encoded = self.dev_features if shots else {"train": self._train, **self.dev_features}
        return {name: features.cut for name, features in encoded.items()}

    @functools.cached_property
    def _train(self) -> Features:
        return self._encode(self.train)

    def _encode(self, rows: SplitRows) -> Features:
        if self.task.kind == "span":
            return encode_spans(rows.rows, self.coding)  # type: ignore[arg-type]
        return encode(self.task, rows.rows, self.coding)


def read_task_data(task: Task, data_dir: Path | None, encoder: Encoder) -> TaskData:
    """A task's rows, read now.

    Raises:
        UserError: what `read_rows` refuses, or an encoder that cannot be used for the task.
    """
    tokenizer = load_tokenizer(encoder)
    limit = min(task.max_length, _longest_input(encoder, task, tokenizer))
    coding = Coding(tokenizer, limit, has_token_types(load_config(encoder.source)))
    splits = ["train", "dev", *(["dev_mm"] if has_split(task, "dev_mm", data_dir) else [])]
    dev = {name: read_rows(task, name, data_dir) for name in splits}
    digests = " ".join(rows.digest() for rows in dev.values())
    train = dev.pop("train")
    return TaskData(task, encoder, coding, train, dev, hashlib.sha256(digests.encode()).hexdigest()[:16])


def build_model(encoder: Encoder, task: Task, classes: tuple[str, ...], seed: int) -> Any:
    """The encoder's weights in float32 under a new head, which is drawn from the seed, on the CPU.

    Raises:
        UserError: the weights cannot be loaded.
    """
    options: dict[str, Any] = {}
    if task.kind == "regression":
        options = {"num_labels": 1, "problem_type": "regression"}
    elif task.kind == "span":
        options = {"num_labels": 2}  # of a token: whether it is the first, and whether it is the last
    elif task.kind in ("classification", "tags"):
        options = {"id2label": dict(enumerate(classes)), "label2id": {name: n for n, name in enumerate(classes)}}
    if task.kind == "classification":
        options["problem_type"] = "single_label_classification"
    torch.manual_seed(seed)
    return load_weights(encoder, _HEADS[task.kind], **options)


def _longest_input(encoder: Encoder, task: Task, tokenizer: Any) -> int:
    """How many tokens, special ones included, the encoder takes.

    Raises:
        UserError: transformers has no head of the task's kind for it.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    config = load_config(encoder.source)
    try:
        with torch.device("meta"):
            model = getattr(transformers, _HEADS[task.kind]).from_config(config)
    except ValueError:
        raise UserError(
            f"{encoder.spec}: transformers has no {_HEADS[task.kind]} for a {config.model_type} model, "
            f"which {task.name} takes: leave the task out"
        ) from None
    limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", tokenizer.model_max_length))
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            unused = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa counts from behind [PAD]
            limit = min(limit, module.num_embeddings - unused)
    return limit
