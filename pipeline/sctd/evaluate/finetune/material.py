"""A task's rows for an encoder, read once and encoded once for all cells."""

import functools
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

from sctd.evaluate.encoder import Encoder, load_config, load_tokenizer
from sctd.evaluate.finetune.features import Coding, Features, encode, has_token_types, steps_of_pass
from sctd.evaluate.finetune.heads import longest_input
from sctd.evaluate.finetune.spans import encode_spans
from sctd.evaluate.finetune.training import Data, Split
from sctd.evaluate.tasks.rows import Row, Rows, has_split, read_rows
from sctd.evaluate.tasks.shots import few_shots
from sctd.evaluate.tasks.task import Task

_FIRST_SEED = 1


@dataclass
class Material:
    """A task's rows; their token ids are made when they are first needed, and kept.

    Args:
        train, dev: rows; of dev by the names of the splits: dev, and where there is dev_mm.
        digest: of all of them.
    """

    task: Task
    encoder: Encoder
    coding: Coding
    train: Rows
    dev: dict[str, Rows]
    digest: str

    def rows(self, shots: int | None, seed: int) -> Rows:
        """The rows to train on. UserError where there are fewer than `shots` of a class."""
        return few_shots(self.task, self.train, shots, seed) if shots else self.train

    def data(self, shots: int | None, seed: int) -> Data:
        """What a fine-tuning learns from and is measured on."""
        dev = {name: Split(rows, self._dev[name]) for name, rows in self.dev.items()}
        return Data(self.task, self.train.classes, self._features(shots, seed), dev)

    def steps(self, epochs: float, batch_size: int, shots: int | None) -> int:
        """Optimizer steps of so many passes.

        Few examples may be more for one seed than for another; then those of the first seed count for all, so that all
        seeds of a setting are trained for as long.
        """
        if self.task.kind == "span":
            examples = len(self._features(shots, _FIRST_SEED))  # windows
        else:
            examples = len(self.rows(shots, _FIRST_SEED).rows)
        return max(1, math.ceil(epochs * steps_of_pass(examples, batch_size)))

    def cut(self, shots: int | None) -> dict[str, int]:
        """How many rows of each split are longer than the model sees them; few examples are not counted."""
        encoded = self._dev if shots else {"train": self._train, **self._dev}
        return {name: features.cut for name, features in encoded.items()}

    @functools.cached_property
    def _train(self) -> Features:
        return self._encode(self.train.rows)

    @functools.cached_property
    def _dev(self) -> dict[str, Features]:
        return {name: self._encode(rows.rows) for name, rows in self.dev.items()}

    def _features(self, shots: int | None, seed: int) -> Features:
        return self._encode(self.rows(shots, seed).rows) if shots else self._train

    def _encode(self, rows: tuple[Row, ...]) -> Features:
        return encode_spans(rows, self.coding) if self.task.kind == "span" else encode(self.task, rows, self.coding)


def read_material(task: Task, data_dir: Path | None, encoder: Encoder) -> Material:
    """A task's rows, read now.

    Raises:
        UserError: what `read_rows` refuses, or an encoder that cannot be used for the task.
    """
    tokenizer = load_tokenizer(encoder)
    limit = min(task.max_length, longest_input(encoder, task, tokenizer))
    coding = Coding(tokenizer, limit, has_token_types(load_config(encoder.source)))
    train = read_rows(task, "train", data_dir)
    splits = [name for name in ("dev", "dev_mm") if name == "dev" or has_split(task, name, data_dir)]
    dev = {name: read_rows(task, name, data_dir) for name in splits}
    digests = " ".join(rows.digest() for rows in (train, *dev.values()))
    return Material(task, encoder, coding, train, dev, hashlib.sha256(digests.encode()).hexdigest()[:16])
