"""K examples of each class, for few-shot fine-tuning."""

import random
from collections import Counter
from dataclasses import replace

from sctd.errors import UserError
from sctd.evaluate.tasks.rows import ChoiceRow, Row, Rows, TagRow, TextRow
from sctd.evaluate.tasks.task import Task, entity_types


def few_shots(task: Task, rows: Rows, shots: int, seed: int) -> Rows:
    """K rows of each class, in the order that they have in `rows`; which ones depends on rows and seed alone.

    For tags, sentences are gone through in random order, and those are taken that have an entity type of which there
    are fewer than K so far: each type then stands in K sentences or more. A task without classes (scores, spans) gets
    K rows in all, and one of choices K for each place of the right choice.

    Raises:
        UserError: there are fewer than K of a class.
    """
    names = _names(task, rows)
    labels = [_labels(task, row, rows.classes) for row in rows.rows]
    there = Counter(name for found in labels for name in found)
    for name in names:
        if there[name] < shots:
            what = "rows" if name == "" else f"{'sentences with' if task.kind == 'tags' else 'rows of'} {name}"
            raise UserError(f"{task.name}: --shots {shots}: {rows.origin} has {there[name]} {what}: ask for fewer")
    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    taken: Counter[str] = Counter()
    chosen = []
    for number in order:
        if any(taken[name] < shots for name in labels[number]):
            taken.update(labels[number])
            chosen.append(number)
    return replace(rows, rows=tuple(rows.rows[number] for number in sorted(chosen)))


def _names(task: Task, rows: Rows) -> list[str]:
    """What K are needed of; "" stands for rows of any kind."""
    if task.kind in ("regression", "span"):
        return [""]
    first = rows.rows[0]
    if isinstance(first, ChoiceRow):
        return [_place(label) for label in range(len(first.choices))]
    if task.kind == "tags":
        return entity_types(rows.classes)
    return list(rows.classes)


def _labels(task: Task, row: Row, classes: tuple[str, ...]) -> set[str]:
    """Those of the names that stand in the row."""
    if task.kind in ("regression", "span"):
        return {""}
    if isinstance(row, TagRow):
        return set(entity_types([classes[tag] for tag in row.tags]))
    if isinstance(row, ChoiceRow):
        return {_place(row.label)}
    assert isinstance(row, TextRow) and isinstance(row.label, int)
    return {classes[row.label]}


def _place(label: int) -> str:
    return f"choice {label + 1}"
