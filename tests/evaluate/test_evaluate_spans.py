"""Windows hold the whole context and point at the answer; of logits the best answer is read that is one."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertTokenizer

from sctd.evaluate.finetune.features import Coding, Windows, answers, best_spans, encode_spans
from sctd.evaluate.finetune.metrics import measure
from sctd.evaluate.tasks.rows import SpanRow
from sctd.evaluate.tasks.task import load_task
from tiny_bert import FILLER, sentence, tiny_tokenizer

CPU = torch.device("cpu")
SURE = 20.0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def rows_of(count: int, words: int, unanswerable: bool = False) -> list[SpanRow]:
    """Questions whose answer is some words of the context; of a third there is none."""
    draw, rows = random.Random(1), []
    for number in range(count):
        context = sentence(draw, "Xyz,", "ab!", least=words, most=words)
        places = [0, *(place + 1 for place, letter in enumerate(context) if letter == " ")]
        start = draw.choice(places)
        text = " ".join(context[start:].split(" ")[: draw.randint(1, 5)])
        gold = () if unanswerable and number % 3 == 0 else ((text, start),)
        rows.append(SpanRow(str(number), "What is the list?", context, gold))
    return rows


def oracle(windows: Windows) -> np.ndarray:
    """What a perfect model's logits come to, window by window."""
    found = []
    for number in range(len(windows)):
        rows = np.array([number])
        batch = windows.batch(rows, CPU)
        logits = []
        for name in ("start_positions", "end_positions"):
            logits.append(torch.zeros(batch["input_ids"].shape).index_fill(1, batch[name], SURE))
        found.append(best_spans(*logits, torch.from_numpy(windows.context(rows))))
    return torch.cat(found).numpy()


@pytest.mark.parametrize(("limit", "words"), [(384, 40), (384, 700), (48, 100), (16, 30)])
def test_windows_cover_the_context_and_share_some_of_it(tokenizer: BertTokenizer, limit: int, words: int) -> None:
    rows = rows_of(5, words)
    windows = encode_spans(rows, Coding(tokenizer, limit, True))
    assert sorted(set(windows.row_N.tolist())) == list(range(5)) and (np.diff(windows.row_N) >= 0).all()
    assert windows.lengths_N.max() <= limit and (len(windows) > 5) == (words + 20 > limit)
    for question, row in enumerate(rows):
        seen: list[set[int]] = []
        for number in np.flatnonzero(windows.row_N == question):
            place = slice(windows.starts_S[number], windows.starts_S[number + 1])
            chars = windows.chars_T[place]
            seen.append({char for first, last in chars if first >= 0 for char in range(first, last)})
        assert set.union(*seen) == {place for place, letter in enumerate(row.context) if letter != " "}
        if limit == 384 and len(seen) > 1:
            assert all(len(one & two) >= 128 for one, two in itertools.pairwise(seen))
        assert all(one & two for one, two in itertools.pairwise(seen))


@pytest.mark.parametrize(("limit", "words"), [(384, 40), (384, 700), (128, 300), (56, 100)])
def test_a_perfect_model_gives_the_gold_answers(tokenizer: BertTokenizer, limit: int, words: int) -> None:
    for name in ("squad1", "squad2"):
        task, rows = load_task(name), rows_of(40, words, unanswerable=name == "squad2")
        windows = encode_spans(rows, Coding(tokenizer, limit, True))
        found = answers(windows, rows, oracle(windows), task.no_answer)
        assert found == [row.answers[0][0] if row.answers else "" for row in rows]
        assert measure(task, rows, found) == {"exact_match": 1.0, "f1": 1.0}


def test_a_window_without_the_whole_answer_points_at_cls(tokenizer: BertTokenizer) -> None:
    row = SpanRow("a", "What?", " ".join(["the"] * 60 + ["gold", "gold"]), (("gold gold", 240),))
    windows = encode_spans([row], Coding(tokenizer, 32, True))
    last = len(windows) - 1
    for number in range(len(windows)):
        batch = windows.batch(np.array([number]), CPU)
        first, end = batch["start_positions"].item(), batch["end_positions"].item()
        if number < last:
            assert (first, end) == (0, 0)
        else:
            assert tokenizer.decode(batch["input_ids"][0, first : end + 1]) == "gold gold"


def test_a_long_question_is_cut_and_the_context_is_not(tokenizer: BertTokenizer) -> None:
    row = SpanRow("a", "what " * 500, "the list is gold", (("gold", 12),))
    for limit in (384, 40):
        windows = encode_spans([row], Coding(tokenizer, limit, True))
        kept = {char for first, last in windows.chars_T if first >= 0 for char in range(first, last)}
        assert len(kept) == len("thelistisgold")
        assert answers(windows, [row], oracle(windows), False) == ["gold"]
        ids = windows.ids_T[: windows.starts_S[1]].tolist()
        assert ids.count(tokenizer.convert_tokens_to_ids("what")) == min(64, (limit - 3) // 2)


def by_hand(start: Tensor, end: Tensor, context: Tensor) -> tuple[float, tuple[int, int] | None]:
    """The best pair, by looking at each."""
    best: tuple[float, tuple[int, int] | None] = (-math.inf, None)
    for first, last in itertools.product(range(len(start)), repeat=2):
        if context[first] and context[last] and first <= last < first + 30:
            best = max(best, (float(start[first] + end[last]), (first, last)), key=lambda pair: pair[0])
    return best


@pytest.mark.parametrize("width", [8, 20])
def test_the_best_span_is_the_best_of_all(width: int) -> None:
    draw = torch.Generator().manual_seed(width)
    start, end = (torch.randn(200, width, generator=draw) for _ in range(2))
    context = torch.rand(200, width, generator=draw) < 0.6
    found = best_spans(start, end, context)
    for number in range(200):
        score, place = by_hand(start[number], end[number], context[number])
        assert found[number, 0].item() == pytest.approx(score)
        if place is not None:
            assert tuple(found[number, 1:3].tolist()) == place
        assert found[number, 3].item() == pytest.approx(float(start[number, 0] + end[number, 0]))


def test_only_the_likeliest_are_combined_and_long_answers_are_none() -> None:
    context = torch.ones(1, 64, dtype=torch.bool)
    start, end = torch.zeros(1, 64), torch.zeros(1, 64)
    start[0, 5], end[0, 40] = SURE, SURE  # 36 tokens
    start[0, 30], end[0, 8] = 3.0, 2.0
    assert best_spans(start, end, context)[0].tolist()[:3] == [SURE + 3.0, 30.0, 40.0]
    end[0, 40] = 0.0
    assert best_spans(start, end, context)[0].tolist()[:3] == [SURE + 2.0, 5.0, 8.0]
    start[0, 44:] = 9.0  # twenty likely first tokens behind the twenty likely last ones: no pair is in order
    end[0, :20] = 9.0
    start[0, 5] = 0.0
    assert best_spans(start, end, context)[0, 0].item() == -math.inf


def test_the_best_window_answers_and_none_beats_it_by_score(tokenizer: BertTokenizer) -> None:
    row = SpanRow("a", "What?", " ".join(FILLER * 5), ())
    windows = encode_spans([row], Coding(tokenizer, 40, True))
    count = len(windows)
    assert count >= 3
    first = [int(np.flatnonzero(windows.context(np.array([number]))[0])[2]) for number in range(count)]
    best = np.array([[number, first[number], first[number], 9.0] for number in range(count)], dtype=np.float32)
    best[1] = [5.0, first[1], first[1] + 1, 4.0]
    chars = windows.chars_T[windows.starts_S[1] + first[1] :][:2]
    text = row.context[chars[0, 0] : chars[1, 1]]
    assert answers(windows, [row], best, no_answer=False) == [text]
    assert answers(windows, [row], best, no_answer=True) == [text]  # the lowest score of none is 4
    best[1, 3] = 5.5
    assert answers(windows, [row], best, no_answer=True) == [""]
    best[1, 3] = 5.0
    assert answers(windows, [row], best, no_answer=True) == [text]


def test_a_context_of_nothing_has_no_answer(tokenizer: BertTokenizer) -> None:
    rows = [SpanRow("a", "What?", " ", ()), SpanRow("b", "What?", "the list", ())]
    windows = encode_spans(rows, Coding(tokenizer, 40, True))
    assert len(windows) == 2
    assert answers(windows, rows, oracle(windows), no_answer=True) == ["", ""]
