"""Metrics against values worked out by hand, and against the definitions written out."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sctd.evaluate.finetune.metrics import measure
from sctd.evaluate.tasks.rows import ChoiceRow, Row, SpanRow, TagRow, TextRow
from sctd.evaluate.tasks.task import load_task


def texts(labels: Sequence[float]) -> list[Row]:
    return [TextRow("t", None, label) for label in labels]


def spans(*answers: tuple[str, ...]) -> list[Row]:
    return [SpanRow(str(n), "q", "c", tuple((text, 0) for text in golds)) for n, golds in enumerate(answers)]


def test_accuracy_and_f1() -> None:
    # Two of three positives are found, and one of three guesses is wrong: F1 is 2 * 2 / (2 * 2 + 1 + 1).
    found = measure(load_task("mrpc"), texts([1, 1, 1, 0, 0]), [1, 1, 0, 1, 0])
    assert found == pytest.approx({"accuracy": 3 / 5, "f1": 2 / 3})
    assert measure(load_task("mrpc"), texts([0, 0]), np.array([0, 0])) == {"accuracy": 1.0, "f1": 0.0}
    choices: list[Row] = [ChoiceRow("t", ("a", "b"), label) for label in (0, 1, 1, 0)]
    assert measure(load_task("copa"), choices, [0, 1, 0, 0]) == {"accuracy": 0.75}


def test_matthews() -> None:
    # tp 3, tn 1, fp 1, fn 2
    found = measure(load_task("cola"), texts([1, 1, 1, 1, 1, 0, 0]), [1, 1, 1, 0, 0, 1, 0])
    assert found == pytest.approx({"matthews": (3 * 1 - 1 * 2) / math.sqrt(4 * 5 * 2 * 3)})
    assert measure(load_task("cola"), texts([1, 0, 1]), [1, 1, 1]) == {"matthews": 0.0}


def test_correlations() -> None:
    gold, guesses = [0.0, 1.0, 2.0, 4.0], [1.0, 1.0, 3.0, 2.0]
    found = measure(load_task("stsb"), texts(gold), guesses)
    a, b = np.array(gold), np.array(guesses)

    def pearson(x: Any, y: Any) -> float:
        x, y = x - x.mean(), y - y.mean()
        return float((x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum()))

    ranks = pearson(np.array([1, 2, 3, 4]), np.array([1.5, 1.5, 4, 3]))
    assert found == pytest.approx({"pearson": pearson(a, b), "spearman": ranks})
    assert list(measure(load_task("sickr"), texts(gold), guesses)) == ["spearman", "pearson"]
    assert measure(load_task("stsb"), texts(gold), [2.5] * 4) == {"pearson": 0.0, "spearman": 0.0}


def test_the_mean_of_each_classs_f1() -> None:
    # F1 of the classes: 2/3, 1/2, 0
    found = measure(load_task("cb"), texts([0, 0, 1, 1, 2]), [0, 0, 1, 0, 1])
    assert found == pytest.approx({"accuracy": 3 / 5, "macro_f1": (4 / 5 + 1 / 2 + 0) / 3})


def test_multirc_counts_answers_and_whole_questions() -> None:
    rows: list[Row] = [
        TextRow("t", "p", label, group) for label, group in ((1, "a"), (0, "a"), (1, "b"), (1, "b"), (0, "c"))
    ]
    found = measure(load_task("multirc"), rows, [1, 0, 1, 0, 0])
    assert found == pytest.approx({"f1": 2 * 2 / (2 * 2 + 0 + 1), "exact_match": 2 / 3})


def test_squad_compares_words_without_case_articles_and_punctuation() -> None:
    rows = spans(("The Eiffel Tower",), ("Paris", "the city of Paris"), ("1,000",), ("a b b",))
    found = measure(load_task("squad1"), rows, ["eiffel tower!", "city of paris, France", "1000", "b b c"])
    overlaps = [1.0, 2 * 3 / (3 + 4), 1.0, 2 * 2 / (2 + 3)]  # "a" is an article
    assert found == pytest.approx({"exact_match": 2 / 4, "f1": sum(overlaps) / 4})


def test_squad_with_questions_that_have_no_answer() -> None:
    rows = spans((), (), ("Bob",), ("Bob",), ("the",))
    found = measure(load_task("squad2"), rows, ["", "Bob", "", "bob", ""])
    assert found == pytest.approx({"exact_match": 3 / 5, "f1": 3 / 5})


def test_entities_are_right_as_a_whole() -> None:
    task = load_task("conll03")
    number = {tag: n for n, tag in enumerate(task.classes)}

    def tags(text: str) -> tuple[int, ...]:
        return tuple(number[tag] for tag in text.split())

    gold = ["B-PER I-PER O B-LOC", "O B-ORG B-ORG"]
    rows: list[Row] = [TagRow(tuple("w" * len(tags(text))), tags(text)) for text in gold]
    assert measure(task, rows, [tags(text) for text in gold]) == {"f1": 1.0, "precision": 1.0, "recall": 1.0}
    # One entity cut short, one right; an I- that continues nothing is no entity; one ORG right, the other missed.
    found = measure(task, rows, [tags("B-PER O O B-LOC"), list(tags("I-PER B-ORG O"))])
    assert found == pytest.approx({"f1": 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4), "precision": 2 / 3, "recall": 2 / 4})
    nothing = measure(task, rows, [tags("O O O O"), tags("O O O")])
    assert nothing == {"f1": 0.0, "precision": 0.0, "recall": 0.0}


def test_tags_of_a_task_whose_classes_are_those_of_its_rows() -> None:
    task = replace(load_task("conll03"), classes=())
    rows: list[Row] = [TagRow(("a", "b"), (1, 2))]
    assert measure(task, rows, [[1, 2]], classes=("O", "B-x", "I-x"))["f1"] == 1.0


def test_a_metric_is_a_plain_number() -> None:
    found = measure(load_task("mrpc"), texts([1, 0]), np.array([1, 0]))
    assert all(type(value) is float for value in found.values())
