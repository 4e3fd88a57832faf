"""Rows as token ids: encoded once, kept flat, cut into batches of rows of similar length.

Legend: N examples, C sequences an example (its choices), S = N C sequences, T tokens of all of them; B examples of a
batch, W its width.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sctd.evaluate.tasks.rows import ChoiceRow, Row, TagRow, TextRow
from sctd.evaluate.tasks.task import Task

NO_LABEL = -100  # what torch's cross-entropy passes over
_AT_ONCE = 1000  # rows that the tokenizer gets
_MULTIPLE = 8  # widths of batches
_POOL = 50  # batches that are sorted by length together, of at least
_POOLS = 4  # in a pass: else each pass would have the same batches


@dataclass(frozen=True)
class Features:
    """Examples as token ids, behind one another.

    Args:
        ids_T, types_T: int32; types None where the model has no token types.
        starts_S: int64 (S + 1,), where each sequence begins.
        labels: by the names of the model's arguments: (N,), or (T,) where `per_token`.
        pad: id of what is behind a row's end. limit: tokens of the longest row that may be.
        choices: C; None: a plain sequence an example.
        cut: examples that were longer.
        words_T: number of the word that begins with this token, -1 for others; of tags only.
    """

    ids_T: NDArray[np.int32]
    types_T: NDArray[np.int32] | None
    starts_S: NDArray[np.int64]
    labels: dict[str, NDArray[Any]]
    pad: int
    limit: int
    choices: int | None = None
    cut: int = 0
    per_token: bool = False
    words_T: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))

    def __len__(self) -> int:
        return (len(self.starts_S) - 1) // (self.choices or 1)

    @property
    def lengths_N(self) -> NDArray[np.int64]:
        """Tokens of each example, of its longest choice."""
        return np.diff(self.starts_S).reshape(len(self), -1).max(axis=1)

    @property
    def tokens_N(self) -> NDArray[np.int64]:
        """Tokens of each example, of all its choices."""
        return np.diff(self.starts_S).reshape(len(self), -1).sum(axis=1)

    def batch(self, rows_B: NDArray[np.int64], device: torch.device, labels: bool = True) -> dict[str, Tensor]:
        """What the model takes for these examples, (B, W) or with choices (B, C, W)."""
        there_BW, places = self.places(rows_B)
        arrays = {"input_ids": self.padded(self.ids_T, there_BW, places, self.pad)}
        arrays["attention_mask"] = there_BW.astype(np.int64)
        if self.types_T is not None:
            arrays["token_type_ids"] = self.padded(self.types_T, there_BW, places, 0)
        if self.choices:
            arrays = {name: array.reshape(len(rows_B), self.choices, -1) for name, array in arrays.items()}
        if labels:
            for name, values in self.labels.items():
                whole = self.padded(values, there_BW, places, NO_LABEL) if self.per_token else values[rows_B]
                arrays[name] = whole
        return {name: to_device(array, device) for name, array in arrays.items()}

    def places(self, rows_B: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Where the batch has tokens, (B C, W), and which these are among the T, in the order of the batch."""
        count = self.choices or 1
        sequences = (rows_B[:, None] * count + np.arange(count)).ravel()
        begin, lengths = self.starts_S[sequences], np.diff(self.starts_S)[sequences]
        width = min(-(-int(lengths.max()) // _MULTIPLE) * _MULTIPLE, self.limit)
        columns_W = np.arange(width)
        there_BW = columns_W < lengths[:, None]
        return there_BW, (begin[:, None] + columns_W)[there_BW]

    @staticmethod
    def padded(
        flat_T: NDArray[Any], there_BW: NDArray[np.bool_], places: NDArray[np.int64], filler: int
    ) -> NDArray[np.int64]:
        """Those of T values that belong to the batch, in its shape."""
        found = np.full(there_BW.shape, filler, dtype=np.int64)
        found[there_BW] = flat_T[places]
        return found


@dataclass(frozen=True)
class Coding:
    """How rows become token ids.

    Args:
        limit: tokens of the longest row. types: whether the model has token types.
    """

    tokenizer: Any
    limit: int
    types: bool


def has_token_types(config: Any) -> bool:
    """Whether a model of this transformers configuration tells a pair's texts apart by type."""
    return (getattr(config, "type_vocab_size", 0) or 0) > 1


def encode(task: Task, rows: Sequence[Row], coding: Coding) -> Features:
    """Features of rows of all kinds but spans; see `spans.py` for these."""
    first = rows[0]
    if isinstance(first, ChoiceRow):
        return _choices(rows, coding)
    if isinstance(first, TagRow):
        return _tags(rows, coding)
    assert isinstance(first, TextRow)
    kind = np.float32 if task.kind == "regression" else np.int64
    labels = {"labels": np.array([row.label for row in rows], dtype=kind)}  # type: ignore[union-attr]
    gathered = Gathered(coding)
    for part in parts(rows):
        texts = [row.text for row in part]  # type: ignore[union-attr]
        pairs = [row.pair for row in part] if first.pair is not None else None  # type: ignore[union-attr]
        gathered.add(coding.tokenizer(texts, pairs, truncation=True, max_length=coding.limit).encodings)
    return gathered.features(labels)


def parts(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """So many rows at a time that the tokenizer's results do not fill the memory."""
    return (rows[start : start + _AT_ONCE] for start in range(0, len(rows), _AT_ONCE))


class Gathered:
    """Collects what the tokenizer makes of rows.

    Args:
        look: an encoding -> further numbers, (tokens,) or (tokens, columns), that are collected beside the ids.
    """

    def __init__(self, coding: Coding, look: Callable[[Any], NDArray[np.int32]] | None = None) -> None:
        self._coding, self._look = coding, look
        self._ids: list[NDArray[np.int32]] = []
        self._types: list[NDArray[np.int32]] = []
        self._looked: list[NDArray[np.int32]] = []
        self._lengths: list[int] = []
        self._cut: list[bool] = []

    def add(self, encodings: Sequence[Any]) -> None:
        self._ids.append(_flat(encoding.ids for encoding in encodings))
        if self._coding.types:
            self._types.append(_flat(encoding.type_ids for encoding in encodings))
        if self._look is not None:
            self._looked.extend(self._look(encoding) for encoding in encodings)
        self._lengths.extend(len(encoding.ids) for encoding in encodings)
        self._cut.extend(bool(encoding.overflowing) for encoding in encodings)

    def looked(self) -> NDArray[np.int32]:
        return np.concatenate(self._looked)

    def features(self, labels: dict[str, NDArray[Any]], choices: int | None = None, **more: Any) -> Features:
        types = np.concatenate(self._types) if self._types else None
        starts = np.cumsum([0, *self._lengths], dtype=np.int64)
        cut = int(np.array(self._cut).reshape(-1, choices or 1).any(axis=1).sum())
        pad = self._coding.tokenizer.pad_token_id or 0
        return Features(np.concatenate(self._ids), types, starts, labels, pad, self._coding.limit, choices, cut, **more)


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array there; on a GPU without waiting for what it is doing."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def training_batches(lengths_N: NDArray[np.int64], batch_size: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Examples of each batch, pass after pass without an end; an order is a function of seed and pass.

    The rows are shuffled and cut into pools, a pool is sorted by length and cut into batches, and the batches are
    shuffled. A pass has each row once; one of its batches may be smaller.
    """
    count = steps_of_pass(len(lengths_N), batch_size)
    pool = batch_size * max(1, min(_POOL, count // _POOLS))
    for number in itertools.count():
        draw = np.random.default_rng([seed, number])
        order_N = draw.permutation(len(lengths_N))
        batches = []
        for start in range(0, len(order_N), pool):
            part = order_N[start : start + pool]
            part = part[np.argsort(-lengths_N[part], kind="stable")]
            batches += [part[first : first + batch_size] for first in range(0, len(part), batch_size)]
        yield from (batches[place] for place in draw.permutation(count))


def steps_of_pass(examples: int, batch_size: int) -> int:
    """Steps of one pass."""
    return -(-examples // batch_size)


# ---- kinds of rows -----------------------------------------------------------------------------------------------


def _choices(rows: Sequence[Row], coding: Coding) -> Features:
    """Each choice behind its text."""
    assert all(isinstance(row, ChoiceRow) for row in rows)
    count = len(rows[0].choices)  # type: ignore[union-attr]
    gathered = Gathered(coding)
    for part in parts(rows):
        texts = [row.text for row in part for _ in range(count)]  # type: ignore[union-attr]
        choices = [choice for row in part for choice in row.choices]  # type: ignore[union-attr]
        gathered.add(coding.tokenizer(texts, choices, truncation=True, max_length=coding.limit).encodings)
    return gathered.features({"labels": np.array([row.label for row in rows], dtype=np.int64)}, count)  # type: ignore[union-attr]


def _tags(rows: Sequence[Row], coding: Coding) -> Features:
    """A word's tag stands at its first token."""
    _words_begin_with_a_space(coding.tokenizer)
    gathered = Gathered(coding, _first_tokens)
    for part in parts(rows):
        words = [list(row.tokens) for row in part]  # type: ignore[union-attr]
        gathered.add(
            coding.tokenizer(words, is_split_into_words=True, truncation=True, max_length=coding.limit).encodings
        )
    words_T = gathered.looked()
    features = gathered.features({}, per_token=True, words_T=words_T)
    labels_T = np.full(len(words_T), NO_LABEL, dtype=np.int64)
    for number, row in enumerate(rows):
        assert isinstance(row, TagRow)
        place = slice(features.starts_S[number], features.starts_S[number + 1])
        first = words_T[place] >= 0
        labels_T[place][first] = np.array(row.tags, dtype=np.int64)[words_T[place][first]]
    features.labels["labels"] = labels_T
    return features


def _words_begin_with_a_space(tokenizer: Any) -> None:
    """Byte-level tokenizers (RoBERTa) would otherwise take words that are given one by one for parts of words."""
    splitter = tokenizer.backend_tokenizer.pre_tokenizer
    if hasattr(splitter, "add_prefix_space"):
        splitter.add_prefix_space = True


def _first_tokens(encoding: Any) -> NDArray[np.int32]:
    before, found = None, []
    for word in encoding.word_ids:
        found.append(-1 if word is None or word == before else word)
        before = word
    return np.array(found, dtype=np.int32)


def _flat(lists: Any) -> NDArray[np.int32]:
    return np.fromiter(itertools.chain.from_iterable(lists), dtype=np.int32)
