"""Rows as token ids: encoded once, kept flat, cut into batches of rows of similar length.

Questions about a context become windows of tokens, of which the best answer is read that a model's logits name.

Legend: N examples (of questions: windows), C sequences an example (its choices), S = N C sequences, T tokens of all of
them; B examples of a batch, W its width, K likeliest tokens.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sctd.evaluate.tasks.rows import ChoiceRow, SpanRow, TagRow
from sctd.evaluate.tasks.task import Task

NO_LABEL = -100  # what torch's cross-entropy passes over
_AT_ONCE = 1000  # rows that the tokenizer gets, so that its results do not fill the memory
_MULTIPLE = 8
_POOL = 50  # batches that are sorted by length together, of at least
_POOLS = 4  # in a pass: else each pass would have the same batches
_STRIDE = 128  # tokens of the context that a window shares with the one before
_QUESTION = 64  # tokens of a question; what is longer is cut
_LIKELIEST = 20  # first and last tokens that are combined
_LONGEST = 30  # tokens of an answer
_MINUS = float("-inf")


@dataclass(frozen=True)
class Features:
    """Examples as token ids, behind one another.

    Args:
        ids_T, types_T: int32; types None where the model has no token types.
        starts_S: int64 (S + 1,), where each sequence begins. cut_S: whether it was longer.
        pad: id of what is behind a row's end. limit: tokens of the longest row that may be. multiple: of widths.
        labels: by the names of the model's arguments: (N,), or (T,) where `per_token`.
        choices: C; None: a plain sequence an example.
        words_T: number of the word that begins with this token, -1 for others; of tags only.
    """

    ids_T: NDArray[np.int32]
    types_T: NDArray[np.int32] | None
    starts_S: NDArray[np.int64]
    cut_S: NDArray[np.bool_]
    pad: int
    limit: int
    labels: dict[str, NDArray[Any]]
    choices: int | None = None
    per_token: bool = False
    words_T: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    multiple: int = _MULTIPLE

    def __len__(self) -> int:
        return (len(self.starts_S) - 1) // (self.choices or 1)

    @property
    def cut(self) -> int:
        """Examples that were longer."""
        return int(self.cut_S.reshape(len(self), -1).any(axis=1).sum())

    @property
    def lengths_N(self) -> NDArray[np.int64]:
        """Tokens of each example, of its longest choice."""
        return np.diff(self.starts_S).reshape(len(self), -1).max(axis=1)

    @property
    def tokens_N(self) -> NDArray[np.int64]:
        """Tokens of each example, of all its choices."""
        return np.diff(self.starts_S).reshape(len(self), -1).sum(axis=1)

    def tokens_of(self, sequence: int) -> slice:
        """Where its tokens are among the T."""
        return slice(self.starts_S[sequence], self.starts_S[sequence + 1])

    def batch(self, rows_B: NDArray[np.int64], device: torch.device, labels: bool = True) -> dict[str, Tensor]:
        """What the model takes for these examples, (B, W) or with choices (B, C, W)."""
        there_BW, places = self.places(rows_B)
        arrays = {"input_ids": self.padded(self.ids_T, there_BW, places, self.pad)}
        arrays["attention_mask"] = there_BW.astype(np.int64)
        if self.types_T is not None:
            arrays["token_type_ids"] = self.padded(self.types_T, there_BW, places, 0)
        if self.choices:
            arrays = {name: array.reshape(len(rows_B), self.choices, -1) for name, array in arrays.items()}
        for name, values in self.labels.items() if labels else ():
            arrays[name] = self.padded(values, there_BW, places, NO_LABEL) if self.per_token else values[rows_B]
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if device.type == "cuda":  # without waiting for what the GPU is doing
            return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}
        return tensors

    def places(self, rows_B: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Where the batch has tokens, (B C, W), and which these are among the T, in the order of the batch."""
        count = self.choices or 1
        sequences = (rows_B[:, None] * count + np.arange(count)).ravel()
        begin, lengths = self.starts_S[sequences], np.diff(self.starts_S)[sequences]
        width = min(-(-int(lengths.max()) // self.multiple) * self.multiple, self.limit)
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


def encode(task: Task, rows: Sequence[Any], coding: Coding) -> Features:
    """Features of rows of all kinds but spans, which `encode_spans` is for. Each choice stands behind its text."""
    first = rows[0]
    if isinstance(first, TagRow):
        return _tags(rows, coding)
    choices = len(first.choices) if isinstance(first, ChoiceRow) else None

    def tokenize(part: Sequence[Any]) -> Sequence[Any]:
        if choices:
            pairs = [(row.text, choice) for row in part for choice in row.choices]
        else:
            pairs = [(row.text, row.pair) for row in part]
        firsts, seconds = zip(*pairs, strict=True)
        alone = pairs[0][1] is None
        settings = {"truncation": True, "max_length": coding.limit}
        return coding.tokenizer(list(firsts), None if alone else list(seconds), **settings).encodings

    labels = np.array([row.label for row in rows], dtype=np.float32 if task.kind == "regression" else np.int64)
    return Features(**gather(rows, coding, tokenize)[0], labels={"labels": labels}, choices=choices)


def gather(
    rows: Sequence[Any],
    coding: Coding,
    tokenize: Callable[[Sequence[Any]], Sequence[Any]],
    look: Callable[[Any], NDArray[np.int32]] | None = None,
) -> tuple[dict[str, Any], NDArray[np.int32]]:
    """Fields of Features, and further numbers beside the ids.

    Args:
        tokenize: some rows -> their encodings by the tokenizer.
        look: an encoding -> the further numbers, (tokens,) or (tokens, columns).
    """
    ids: list[NDArray[np.int32]] = []
    types: list[NDArray[np.int32]] = []
    looked: list[NDArray[np.int32]] = []
    lengths, cut = [0], []
    for start in range(0, len(rows), _AT_ONCE):
        for encoding in tokenize(rows[start : start + _AT_ONCE]):
            ids.append(np.array(encoding.ids, dtype=np.int32))
            if coding.types:
                types.append(np.array(encoding.type_ids, dtype=np.int32))
            if look is not None:
                looked.append(look(encoding))
            lengths.append(len(encoding.ids))
            cut.append(bool(encoding.overflowing))
    fields = {
        "ids_T": np.concatenate(ids),
        "types_T": np.concatenate(types) if types else None,
        "starts_S": np.cumsum(lengths, dtype=np.int64),
        "cut_S": np.array(cut),
        "pad": coding.tokenizer.pad_token_id or 0,
        "limit": coding.limit,
    }
    return fields, np.concatenate(looked) if looked else np.zeros(0, np.int32)


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


def batches(lengths: Sequence[int], budget: int) -> Iterator[NDArray[np.int64]]:
    """Rows of similar length together: row numbers of each batch of at most `budget` positions, or of one row."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * lengths[order[stop]] <= budget:
            stop += 1
        yield order[start:stop]
        start = stop


def nothing() -> None:
    """For a `check` that has nothing to say."""


def steps_of_pass(examples: int, batch_size: int) -> int:
    """Steps of one pass."""
    return -(-examples // batch_size)


def _tags(rows: Sequence[TagRow], coding: Coding) -> Features:
    """A word's tag stands at its first token."""
    splitter = coding.tokenizer.backend_tokenizer.pre_tokenizer
    if hasattr(splitter, "add_prefix_space"):  # byte-level (RoBERTa): words given one by one would be parts of words
        splitter.add_prefix_space = True
    settings = {"is_split_into_words": True, "truncation": True, "max_length": coding.limit}
    fields, words_T = gather(
        rows,
        coding,
        lambda part: coding.tokenizer([list(row.tokens) for row in part], **settings).encodings,
        _first_tokens,
    )
    features = Features(**fields, labels={}, per_token=True, words_T=words_T)
    features.labels["labels"] = np.full(len(words_T), NO_LABEL, dtype=np.int64)
    for number, row in enumerate(rows):
        words, labels = (array[features.tokens_of(number)] for array in (words_T, features.labels["labels"]))
        labels[words >= 0] = np.array(row.tags, dtype=np.int64)[words[words >= 0]]
    return features


def _first_tokens(encoding: Any) -> NDArray[np.int32]:
    words = encoding.word_ids
    return np.array(
        [-1 if word is None or word == before else word for before, word in zip([None, *words], words, strict=False)],
        dtype=np.int32,
    )


# ---- questions about a context -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows(Features):
    """Features of windows.

    Args:
        row_N: the question of each; those of one question are behind one another.
        chars_T: int32 (T, 2), where in the context the token begins and ends; -1 for tokens that are not of it.
    """

    row_N: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    chars_T: NDArray[np.int32] = field(default_factory=lambda: np.zeros((0, 2), np.int32))

    def context(self, rows_B: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which tokens of the batch are the context's, (B, W)."""
        there_BW, places = self.places(rows_B)
        return self.padded(self.chars_T[:, 0], there_BW, places, -1) >= 0


def encode_spans(rows: Sequence[SpanRow], coding: Coding) -> Windows:
    """Windows of question and context, each with the first and last token of the first gold answer.

    Where a window does not hold the whole answer, and where there is none, both are the first token, [CLS]. Models with
    few positions get narrower windows that share less.
    """
    room = coding.limit - coding.tokenizer.num_special_tokens_to_add(pair=True)
    longest = max(1, min(_QUESTION, room // 2))
    stride = max(0, min(_STRIDE, (room - longest) // 2))
    row_N: list[int] = []

    def tokenize(part: Sequence[SpanRow]) -> Sequence[Any]:
        encoded = coding.tokenizer(
            _questions(part, coding.tokenizer, longest),
            [row.context for row in part],
            truncation="only_second",
            max_length=coding.limit,
            stride=stride,
            return_overflowing_tokens=True,
        )
        done = row_N[-1] + 1 if row_N else 0
        row_N.extend(done + number for number in encoded["overflow_to_sample_mapping"])
        return encoded.encodings

    fields, chars_T = gather(rows, coding, tokenize, _chars)
    fields["cut_S"] = np.zeros(len(row_N), dtype=bool)  # spread over windows
    windows = Windows(**fields, labels={}, row_N=np.array(row_N), chars_T=chars_T)
    targets = [_target(rows[row], chars_T[windows.tokens_of(number)]) for number, row in enumerate(row_N)]
    first_N, last_N = np.array(targets, dtype=np.int64).T
    windows.labels.update(start_positions=first_N, end_positions=last_N)
    return windows


def best_spans(start_BW: Tensor, end_BW: Tensor, context_BW: Tensor) -> Tensor:
    """The best answer of each window, float32 (B, 4): its score, first and last token, and the score of no answer.

    Scores are sums of two logits. Of the likeliest first and last tokens those pairs count that are an answer: in the
    context, in their order, not too long. With no such pair the score is minus infinity.
    """
    count = min(_LIKELIEST, start_BW.shape[1])
    none_B = start_BW[:, 0] + end_BW[:, 0]
    start_BK, first_BK = start_BW.masked_fill(~context_BW, _MINUS).topk(count)
    end_BK, last_BK = end_BW.masked_fill(~context_BW, _MINUS).topk(count)
    length_BKK = last_BK[:, None, :] - first_BK[:, :, None] + 1
    score_BKK = start_BK[:, :, None] + end_BK[:, None, :]
    score_BKK = score_BKK.masked_fill((length_BKK < 1) | (length_BKK > _LONGEST), _MINUS)
    score_B, place_B = score_BKK.flatten(1).max(dim=1)
    first_B = first_BK.gather(1, (place_B // count)[:, None])[:, 0]
    last_B = last_BK.gather(1, (place_B % count)[:, None])[:, 0]
    return torch.stack([score_B, first_B.float(), last_B.float(), none_B], dim=1)


def answers(windows: Windows, rows: Sequence[SpanRow], best_N4: NDArray[np.float32], no_answer: bool) -> list[str]:
    """The answer to each question, from the best of its windows; "" for none.

    Args:
        best_N4: of `best_spans`.
        no_answer: questions may have none; they have where its lowest score over the windows beats the best span's.
    """
    found = [""] * len(rows)
    best = np.full(len(rows), -np.inf)
    none = np.full(len(rows), np.inf)
    for number, (score, first, last, score_of_none) in enumerate(best_N4.tolist()):
        question = windows.row_N[number]
        none[question] = min(none[question], score_of_none)
        if score > best[question]:
            best[question] = score
            begin = windows.starts_S[number]
            chars = windows.chars_T[begin + int(first), 0], windows.chars_T[begin + int(last), 1]
            found[question] = rows[question].context[slice(*chars)]
    if no_answer:
        return ["" if none[question] > best[question] else text for question, text in enumerate(found)]
    return found


def _questions(rows: Sequence[SpanRow], tokenizer: Any, longest: int) -> list[str]:
    """Their questions, cut behind so many tokens."""
    questions = [row.question for row in rows]
    encodings = tokenizer(questions, add_special_tokens=False).encodings
    return [
        question[: encoding.offsets[longest - 1][1]] if len(encoding.ids) > longest else question
        for question, encoding in zip(questions, encodings, strict=True)
    ]


def _chars(encoding: Any) -> NDArray[np.int32]:
    chars = np.array(encoding.offsets, dtype=np.int32)
    chars[[number != 1 for number in encoding.sequence_ids]] = -1
    return chars


def _target(row: SpanRow, chars_T: NDArray[np.int32]) -> tuple[int, int]:
    """First and last token of the row's first gold answer in a window."""
    context = np.flatnonzero(chars_T[:, 0] >= 0)
    if not row.answers or not len(context):
        return 0, 0
    text, start = row.answers[0]
    begins, ends = chars_T[context, 0], chars_T[context, 1]
    if start < begins[0] or start + len(text) > ends[-1]:
        return 0, 0
    first = context[np.searchsorted(begins, start, side="right") - 1]
    last = context[np.searchsorted(ends, start + len(text), side="left")]
    return int(first), int(last)
