"""Questions about a context: windows of tokens over long contexts, and the answer that a model's logits name.

Legend: N windows, T tokens of all of them; B windows of a batch, W its width, K likeliest tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sctd.evaluate.finetune.features import Coding, Features, Gathered, parts
from sctd.evaluate.tasks.rows import Row, SpanRow

_STRIDE = 128  # tokens of the context that a window shares with the one before
_QUESTION = 64  # tokens of a question; what is longer is cut
_LIKELIEST = 20  # first and last tokens that are combined
_LONGEST = 30  # tokens of an answer
_MINUS = float("-inf")


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


def encode_spans(rows: Sequence[Row], coding: Coding) -> Windows:
    """Windows of question and context, each with the first and last token of the first gold answer.

    Where a window does not hold the whole answer, and where there is none, both are the first token, [CLS]. Models with
    few positions get narrower windows that share less.
    """
    room = coding.limit - coding.tokenizer.num_special_tokens_to_add(pair=True)
    longest = max(1, min(_QUESTION, room // 2))
    stride = max(0, min(_STRIDE, (room - longest) // 2))
    gathered, done = Gathered(coding, _chars), 0
    row_N: list[int] = []
    for part in parts(rows):
        encoded = coding.tokenizer(
            _questions(part, coding.tokenizer, longest),
            [row.context for row in part],  # type: ignore[union-attr]
            truncation="only_second",
            max_length=coding.limit,
            stride=stride,
            return_overflowing_tokens=True,
        )
        gathered.add(encoded.encodings)
        row_N.extend(done + number for number in encoded["overflow_to_sample_mapping"])
        done += len(part)
    features = gathered.features({})
    chars_T, first_last_N2 = gathered.looked(), np.zeros((len(row_N), 2), dtype=np.int64)
    for number, row in enumerate(row_N):
        place = slice(features.starts_S[number], features.starts_S[number + 1])
        first_last_N2[number] = _target(rows[row], chars_T[place])
    labels = {"start_positions": first_last_N2[:, 0], "end_positions": first_last_N2[:, 1]}
    values = vars(features) | {"labels": labels, "cut": 0}  # nothing is cut, but spread over windows
    return Windows(**values, row_N=np.array(row_N), chars_T=chars_T)


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


def answers(windows: Windows, rows: Sequence[Row], best_N4: NDArray[np.float32], no_answer: bool) -> list[str]:
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
            found[question] = rows[question].context[slice(*chars)]  # type: ignore[union-attr]
    if no_answer:
        return ["" if none[question] > best[question] else text for question, text in enumerate(found)]
    return found


def _questions(rows: Sequence[Row], tokenizer: Any, longest: int) -> list[str]:
    """Their questions, cut behind so many tokens."""
    questions = [row.question for row in rows]  # type: ignore[union-attr]
    encodings = tokenizer(questions, add_special_tokens=False).encodings
    return [
        question[: encoding.offsets[longest - 1][1]] if len(encoding.ids) > longest else question
        for question, encoding in zip(questions, encodings, strict=True)
    ]


def _chars(encoding: Any) -> NDArray[np.int32]:
    chars = np.array(encoding.offsets, dtype=np.int32)
    chars[[number != 1 for number in encoding.sequence_ids]] = -1
    return chars


def _target(row: Row, chars_T: NDArray[np.int32]) -> tuple[int, int]:
    """First and last token of the row's first gold answer in a window."""
    assert isinstance(row, SpanRow)
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
