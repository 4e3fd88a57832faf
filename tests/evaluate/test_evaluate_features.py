"""Rows become the ids that the tokenizer gives each of them alone, in batches of similar length with each row once."""

import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import BertTokenizer, RobertaTokenizer

from sctd.evaluate.finetune.features import (
    NO_LABEL,
    Coding,
    Features,
    encode,
    has_token_types,
    steps_of_pass,
    training_batches,
)
from sctd.evaluate.tasks.rows import ChoiceRow, Row, TagRow, TextRow
from sctd.evaluate.tasks.task import load_task
from tiny_bert import sentence, tiny_tokenizer

CPU = torch.device("cpu")
PAIRS = [
    TextRow("the list", "a value of an object", 1),
    TextRow("a", "b", 0),
    TextRow("the object " * 20, "if not in the list " * 30, 1),
    TextRow("", "red", 0),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def batch(features: Features, rows: Sequence[int]) -> dict[str, torch.Tensor]:
    return features.batch(np.array(rows), CPU)


@pytest.mark.parametrize("types", [True, False])
def test_a_batch_is_what_the_tokenizer_makes_of_its_rows(tokenizer: BertTokenizer, types: bool) -> None:
    features = encode(load_task("rte"), PAIRS, Coding(tokenizer, 40, types))
    found = batch(features, [2, 0, 3])
    rows = [PAIRS[number] for number in (2, 0, 3)]
    expected: dict[str, Any] = tokenizer(
        [row.text for row in rows], [row.pair for row in rows], truncation=True, max_length=40, padding=True,
        return_tensors="pt",
    )  # fmt: skip
    assert set(found) == {"input_ids", "attention_mask", "labels"} | ({"token_type_ids"} if types else set())
    for name in set(found) - {"labels"}:
        assert found[name].equal(expected[name]), name
    assert found["labels"].tolist() == [1, 1, 0] and features.cut == 1
    lengths = [len(tokenizer(row.text, row.pair).input_ids[:40]) for row in PAIRS]
    assert features.lengths_N.tolist() == features.tokens_N.tolist() == lengths


def test_widths_are_multiples_of_eight_but_never_beyond_the_limit(tokenizer: BertTokenizer) -> None:
    features = encode(load_task("rte"), PAIRS, Coding(tokenizer, 42, True))
    assert batch(features, [1])["input_ids"].shape == (1, 8)
    assert batch(features, [0, 1])["input_ids"].shape == (2, 16)
    assert batch(features, [1, 2])["input_ids"].shape == (2, 42)


def test_texts_without_a_pair_and_scores(tokenizer: BertTokenizer) -> None:
    sst2 = encode(load_task("sst2"), [TextRow("the list", None, 1)], Coding(tokenizer, 40, True))
    assert batch(sst2, [0])["input_ids"][0, :4].tolist() == tokenizer("the list").input_ids
    stsb = encode(load_task("stsb"), [TextRow("the", "list", 2.5)], Coding(tokenizer, 40, True))
    assert batch(stsb, [0])["labels"].equal(torch.tensor([2.5]))


def test_choices_stand_beside_each_other(tokenizer: BertTokenizer) -> None:
    rows = [ChoiceRow("the list", ("red", "a blue object of the list"), 1), ChoiceRow("a", ("b", "c"), 0)]
    features = encode(load_task("copa"), rows, Coding(tokenizer, 40, True))
    found = batch(features, [1, 0])
    assert len(features) == 2 and found["input_ids"].shape == found["token_type_ids"].shape == (2, 2, 16)
    assert found["labels"].tolist() == [0, 1]
    for place, choice in enumerate(rows[0].choices):
        ids = tokenizer("the list", choice).input_ids
        assert found["input_ids"][1, place, : len(ids)].tolist() == ids
        assert found["attention_mask"][1, place].sum() == len(ids)
    assert features.lengths_N.tolist() == [11, 5] and features.tokens_N.tolist() == [17, 10]


def test_a_tag_stands_at_the_first_token_of_its_word(tokenizer: BertTokenizer) -> None:
    rows = [TagRow(("the", "xyz", "\u200b", "red"), (0, 3, 4, 5)), TagRow(("the",) * 50, (1,) * 50)]
    features = encode(load_task("conll03"), rows, Coding(tokenizer, 20, True))
    found = batch(features, [0, 1])
    ids = tokenizer(list(rows[0].tokens), is_split_into_words=True).input_ids
    assert found["input_ids"][0, : len(ids)].tolist() == ids and len(ids) == 7
    nothing = NO_LABEL
    assert found["labels"][0].tolist() == [nothing, 0, 3, nothing, nothing, 5, nothing, *[nothing] * 13]
    assert found["labels"][1].tolist() == [nothing, *[1] * 18, nothing]
    assert features.words_T[:7].tolist() == [-1, 0, 1, -1, -1, 3, -1] and features.cut == 1


def test_words_of_a_byte_level_tokenizer_begin_with_a_space(tmp_path: Path) -> None:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        ["the list of the red lists"] * 9, 300, special_tokens=["<s>", "<pad>", "</s>", "<unk>"]
    )
    trained.save_model(str(tmp_path))
    tokenizer = RobertaTokenizer.from_pretrained(tmp_path)
    features = encode(load_task("conll03"), [TagRow(("red", "list"), (1, 2))], Coding(tokenizer, 40, False))
    assert tokenizer.decode(features.ids_T, skip_special_tokens=True) == " red list"


@pytest.mark.parametrize(
    ("sizes", "has"), [({"type_vocab_size": 2}, True), ({"type_vocab_size": 1}, False), ({}, False)]
)
def test_types_are_for_models_that_tell_them_apart(sizes: dict[str, int], has: bool) -> None:
    assert has_token_types(SimpleNamespace(**sizes)) is has


def draw_passes(lengths: np.ndarray, batch_size: int, seed: int, passes: int) -> list[list[list[int]]]:
    batches, count = training_batches(lengths, batch_size, seed), steps_of_pass(len(lengths), batch_size)
    return [[next(batches).tolist() for _ in range(count)] for _ in range(passes)]


@pytest.mark.parametrize(("rows", "batch_size"), [(1, 8), (7, 8), (64, 8), (1003, 16), (333, 1)])
def test_a_pass_has_each_row_once(rows: int, batch_size: int) -> None:
    lengths = np.array([random.Random(1).randint(3, 60) for _ in range(rows)])
    passes = draw_passes(lengths, batch_size, 1, 3)
    for batches in passes:
        assert sorted(number for part in batches for number in part) == list(range(rows))
        sizes = sorted(map(len, batches))
        assert all(size == batch_size for size in sizes[1:]) and 1 <= sizes[0] <= batch_size
    assert passes == draw_passes(lengths, batch_size, 1, 3)
    if rows > batch_size:
        assert passes[0] != passes[1] and passes != draw_passes(lengths, batch_size, 2, 3)


def test_batches_have_rows_of_similar_length_in_no_order() -> None:
    draw = random.Random(2)
    lengths = np.array([draw.randint(5, 100) for _ in range(4000)])
    (batches,) = draw_passes(lengths, 16, 1, 1)
    longest = np.array([lengths[part].max() for part in batches])
    padding = 1 - lengths.sum() / sum(lengths[part].max() * len(part) for part in batches)
    assert padding < 0.03  # of random batches it would be near 0.45
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.2


def test_few_batches_are_not_the_same_ones_in_each_pass() -> None:
    lengths = np.arange(96)
    first, second = ({frozenset(part) for part in batches} for batches in draw_passes(lengths, 8, 1, 2))
    assert len(first & second) < 4


def test_many_rows_are_encoded_in_parts(tokenizer: BertTokenizer) -> None:
    draw = random.Random(3)
    rows: list[Row] = [TextRow(sentence(draw), None, number % 2) for number in range(2500)]
    features = encode(load_task("sst2"), rows, Coding(tokenizer, 40, True))
    assert len(features) == 2500
    for number in (0, 999, 1000, 2499):
        ids = tokenizer(rows[number].text).input_ids  # type: ignore[union-attr]
        assert batch(features, [number])["input_ids"][0, : len(ids)].tolist() == ids
