"""K examples of each class: exactly so many where rows have one class, at least so many sentences for entity types."""

from collections import Counter
from dataclasses import replace

import pytest

from sctd.errors import UserError
from sctd.evaluate.tasks.rows import ChoiceRow, SpanRow, SplitRows, TagRow, TextRow, few_shots
from sctd.evaluate.tasks.task import load_task


def texts(counts: dict[int, int]) -> SplitRows:
    labels = [label for label, count in counts.items() for _ in range(count)]
    rows = tuple(TextRow(f"t{number}", None, label) for number, label in enumerate(labels))
    return SplitRows(rows, "file.tsv", ("entailment", "contradiction", "neutral"))


def test_k_rows_of_each_class() -> None:
    task, rows = load_task("cb"), texts({0: 30, 2: 9, 1: 8})
    found = few_shots(task, rows, 8, seed=1)
    assert Counter(row.label for row in found.rows if isinstance(row, TextRow)) == {0: 8, 1: 8, 2: 8}
    assert set(found.rows) <= set(rows.rows)
    places = [rows.rows.index(row) for row in found.rows]
    assert places == sorted(places)
    assert found == few_shots(task, rows, 8, seed=1)
    assert found != few_shots(task, rows, 8, seed=2)
    assert (found.origin, found.classes) == (rows.origin, rows.classes)


def test_more_than_there_are() -> None:
    with pytest.raises(UserError) as error:
        few_shots(load_task("cb"), texts({0: 30, 1: 8, 2: 9}), 9, seed=1)
    assert str(error.value) == "cb: --shots 9: file.tsv has 8 rows of contradiction: ask for fewer"
    with pytest.raises(UserError, match="has 0 rows of neutral"):
        few_shots(load_task("cb"), texts({0: 3, 1: 3}), 1, seed=1)


def sentences() -> SplitRows:
    """PER in every third sentence, PER and LOC in every sixth, ORG twice in every tenth."""
    rows = []
    for number in range(60):
        tags = [0]
        tags += [1, 2] if number % 3 == 0 else []
        tags += [5] if number % 6 == 0 else []
        tags += [3, 3] if number % 10 == 0 else []
        rows.append(TagRow(tuple(f"w{number}" for _ in tags), tuple(tags)))
    return SplitRows(tuple(rows), "eng.train", load_task("conll03").classes[:7])


def test_each_entity_type_stands_in_k_sentences() -> None:
    task = load_task("conll03")
    for seed in range(5):
        found = few_shots(task, sentences(), 6, seed)
        there = Counter(tag for row in found.rows if isinstance(row, TagRow) for tag in set(row.tags))
        assert there[3] == 6  # a sentence that names two organisations is one
        assert there[1] >= 6
        assert there[5] >= 6
        assert len(found.rows) <= 18
        assert all(set(row.tags) != {0} for row in found.rows if isinstance(row, TagRow))
    assert few_shots(task, sentences(), 6, 1) == few_shots(task, sentences(), 6, 1)
    assert few_shots(task, sentences(), 6, 1) != few_shots(task, sentences(), 6, 2)
    with pytest.raises(UserError) as error:
        few_shots(task, sentences(), 7, 1)
    assert str(error.value) == "conll03: --shots 7: eng.train has 6 sentences with ORG: ask for fewer"


def test_what_has_no_classes_counts_as_one() -> None:
    scores = SplitRows(tuple(TextRow("t", "p", n / 2) for n in range(10)), "f", ())
    assert len(few_shots(load_task("stsb"), scores, 4, 1).rows) == 4
    spans = replace(scores, rows=tuple(SpanRow(str(n), "q", "c", ()) for n in range(10)))
    assert len(few_shots(load_task("squad2"), spans, 4, 1).rows) == 4
    with pytest.raises(UserError, match="squad2: --shots 11: f has 10 rows: ask for fewer"):
        few_shots(load_task("squad2"), spans, 11, 1)
    choices = replace(scores, rows=tuple(ChoiceRow("t", ("a", "b"), n % 2) for n in range(10)))
    assert len(few_shots(load_task("copa"), choices, 4, 1).rows) == 8
