"""Rows of a task's split: from files of a folder, or from the hub."""

import functools
import hashlib
import json
import math
import os
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sctd.errors import UserError
from sctd.evaluate.tasks.conll import bio, open_conll
from sctd.evaluate.tasks.hub import open_hub
from sctd.evaluate.tasks.locate import find_files, has_files
from sctd.evaluate.tasks.squad import open_squad, place_answer
from sctd.evaluate.tasks.tables import NO_LABEL, Record, Table, open_table
from sctd.evaluate.tasks.task import Task, bio_tags, entity_types

_SHOWN = 60  # characters of what stands in place of a label
_CHOICES = ("choice1", "choice2")  # COPA's columns
_QUESTIONS = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}


@dataclass(frozen=True)
class TextRow:
    """A text or a pair of texts with a class's number or a score.

    Args:
        group: rows of one group are scored together (MultiRC: the question).
    """

    text: str
    pair: str | None
    label: int | float
    group: str = ""


@dataclass(frozen=True)
class ChoiceRow:
    """A text (COPA: the premise, then the question put as words) with texts of which one follows."""

    text: str
    choices: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class SpanRow:
    """A question about a context.

    Args:
        answers: (text, first character in the context) of each gold answer; () where there is none.
    """

    key: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class TagRow:
    """Words of a sentence, and the number of each one's tag."""

    tokens: tuple[str, ...]
    tags: tuple[int, ...]


Row = TextRow | ChoiceRow | SpanRow | TagRow


@dataclass(frozen=True)
class Rows:
    """Rows of a split.

    Args:
        origin: file or hub id that they come from.
        classes: their names by number, as in Task.classes; of a user's task, those found in its training rows.
        left_out: how many rows of the file are not among them: without a gold label, or in training with an answer
            that is not in the context.
    """

    rows: tuple[Row, ...]
    origin: str
    classes: tuple[str, ...]
    left_out: int = 0

    def digest(self) -> str:
        """The first 16 hexadecimal digits of a hash of the rows."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(vars(row)).encode() + b"\n")
        return digest.hexdigest()[:16]


def read_rows(task: Task, split: str, data_dir: Path | None) -> Rows:
    """The rows of a split (train, dev, or MNLI's dev_mm).

    Args:
        data_dir: the task's folder or one above it; None: the hub, or the files beside a user's YAML.

    Raises:
        UserError: they cannot be found or read, or are not those of such a task.
    """
    tables = _tables(task, split, data_dir)
    classes = task.classes
    if not classes and task.kind in ("classification", "tags"):
        classes = _found_classes(task, _tables(task, "train", data_dir))
    rows: list[Row] = []
    left_out = 0
    for table in tables:
        count = 0
        for row in _read(task, table, split, classes):
            count += 1
            if row is None:
                left_out += 1
            else:
                rows.append(row)
        if not count:
            raise UserError(f"{table.name}: is empty: give a file with rows of {task.title}")
    if not rows:
        raise UserError(f"{tables[0].name}: none of its {left_out} rows has a label or answer: give one with labels")
    if task.no_answer and split == "train" and all(row.answers for row in rows if isinstance(row, SpanRow)):
        raise UserError(
            f"{tables[0].name}: every question has an answer, as in SQuAD v1.1: give the file of {task.title}"
        )
    origin = tables[0].name if len(tables) == 1 else os.path.commonpath([table.name for table in tables])
    return Rows(tuple(rows), origin, classes, left_out)


def has_split(task: Task, split: str, data_dir: Path | None) -> bool:
    """Whether the split is there; MNLI's mismatched set is not in every folder."""
    if _from_hub(task, data_dir):
        return task.hub is not None and split in task.hub.splits
    return has_files(task, split, data_dir)


def _from_hub(task: Task, data_dir: Path | None) -> bool:
    return data_dir is None and not (task.home and task.files)


def _tables(task: Task, split: str, data_dir: Path | None) -> list[Table]:
    if _from_hub(task, data_dir):
        return [open_hub(task, split)]
    return [_open(task, path) for path in find_files(task, split, data_dir)]


def _open(task: Task, path: Path) -> Table:
    if path.suffix not in (".jsonl", ".parquet"):
        if task.form == "squad":
            return open_squad(path)
        if task.form == "conll":
            return open_conll(path)
    return open_table(path, [names for names in (task.text, task.pair, task.label) if names], task.columns)


def _read(task: Task, table: Table, split: str, classes: tuple[str, ...]) -> Iterator[Row | None]:
    """Rows in the order of the file, None for each one that is left out."""
    if task.form == "squad":
        return _span_rows(task, table, training=split == "train")
    if task.form == "conll":
        return _tag_rows(task, table, classes)
    if task.form == "copa":
        return _choice_rows(task, table)
    if task.form == "multirc":
        return _answer_rows(task, table, classes)
    return _text_rows(task, table, classes)


# ---- labels ------------------------------------------------------------------------------------------------------


def _found_classes(task: Task, tables: list[Table]) -> tuple[str, ...]:
    """The classes of a user's training rows: numbers in their order, words in that of the alphabet."""
    found: set[str] = set()
    for table in tables:
        for place, record in table.records:
            if task.kind == "tags":
                found.update(entity_types(_bio(task, table, place, record)))
            else:
                word = _word(table, place, table.value(place, record, task.label))
                if not word:
                    raise table.wrong(place, "it has no label: add one, or leave the row out")
                found.add(word)
    found.discard(NO_LABEL)
    ordered = sorted(found, key=lambda name: (0, int(name), name) if _is_number(name) else (1, 0, name))
    if task.kind == "tags":
        if not ordered:
            raise UserError(f"{tables[0].name}: no word of it has another tag than O: give the column file of entities")
        return bio_tags(ordered)
    if len(ordered) < 2:
        labels = ", ".join(ordered) or "none"
        raise UserError(f"{tables[0].name}: its labels are {labels}: two classes or more are needed")
    if "f1" in task.metrics and len(ordered) != 2:
        raise UserError(f"{tables[0].name}: it has {len(ordered)} classes, and f1 is of two: name macro_f1 instead")
    return tuple(ordered)


@functools.cache
def _numbers(classes: tuple[str, ...]) -> dict[str, int]:
    """What a label may read -> its class: the name, in any case where that is clear, or the number.

    Numbers are not taken where classes are numbers themselves: 1 of the classes 1 to 5 is not the second one.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    lowered = [name.lower() for name in classes]
    if len(set(lowered)) == len(classes):
        numbers |= {name: number for number, name in enumerate(lowered)}
    if not any(map(_is_number, classes)):
        numbers |= {str(number): number for number in range(len(classes))}
    return numbers


def _is_number(name: str) -> bool:
    digits = name.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) < 20


def _word(table: Table, place: int, value: Any) -> str:
    """A label as it would stand in a file of text."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str | int | float):
        return str(value).strip()
    raise table.wrong(place, f"a label must be a word or a number, found {type(value).__name__}")


def _class(task: Task, table: Table, place: int, record: Record, classes: tuple[str, ...]) -> int | None:
    """The number of the record's class; None where it has no label."""
    numbers = _numbers(classes)
    word = _word(table, place, table.value(place, record, task.label))
    number = numbers.get(word, numbers.get(word.lower()))
    if number is not None:
        return number
    if word == NO_LABEL:
        return None
    word = textwrap.shorten(word, _SHOWN, placeholder=" ...")
    raise table.wrong(place, f"label {word!r} is none of the classes {', '.join(classes)}: correct it")


# ---- kinds of rows -----------------------------------------------------------------------------------------------


def _text_rows(task: Task, table: Table, classes: tuple[str, ...]) -> Iterator[TextRow | None]:
    for place, record in table.records:
        text = table.text(place, record, task.text)
        pair = table.text(place, record, task.pair) if task.pair else None
        label: float | None
        if task.kind == "regression":
            label = _score(task, table, place, record)
        else:
            label = _class(task, table, place, record, classes)
        yield None if label is None else TextRow(text, pair, label)


def _score(task: Task, table: Table, place: int, record: Record) -> float:
    value = table.value(place, record, task.label)
    try:
        score = float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if isinstance(value, bool) or not math.isfinite(score):
        raise table.wrong(place, f"label {value!r} is no number: correct it")
    return score


def _answer_rows(task: Task, table: Table, classes: tuple[str, ...]) -> Iterator[TextRow | None]:
    """MultiRC: a row for each answer, whose text is question and answer."""
    for place, outer in table.records:
        for record in _answers(table, place, outer):
            label = _class(task, table, place, record, classes)
            question, answer, passage = (
                table.text(place, record, [key]) for key in ("question", "answer", "paragraph")
            )
            yield None if label is None else TextRow(f"{question} {answer}", passage, label, record["group"])


def _answers(table: Table, place: int, record: Record) -> Iterator[Record]:
    """Flat records of SuperGLUE's (a passage with its questions), or of the hub's (an answer)."""
    try:
        if "passage" not in record:
            index = record["idx"]
            yield record | {"group": f"{index['paragraph']}-{index['question']}"}
            return
        passage = record["passage"]
        for number, question in enumerate(passage["questions"]):
            shared = {
                "paragraph": passage["text"],
                "question": question["question"],
                "group": f"{record['idx']}-{number}",
            }
            for answer in question["answers"]:
                yield shared | {"answer": answer["text"], "label": answer["label"]}
    except (KeyError, TypeError) as error:
        raise table.wrong(
            place,
            f"not as SuperGLUE's MultiRC ({type(error).__name__}: {error}): "
            "passage, text, questions, question, answers, text, label, idx are expected",
        ) from None


def _choice_rows(task: Task, table: Table) -> Iterator[ChoiceRow | None]:
    for place, record in table.records:
        question = table.text(place, record, ["question"])
        if question not in _QUESTIONS:
            raise table.wrong(place, f"question {question!r} is none of {', '.join(_QUESTIONS)}: correct it")
        text = f"{table.text(place, record, task.text)} {_QUESTIONS[question]}"
        choices = tuple(table.text(place, record, [name]) for name in _CHOICES)
        label = _class(task, table, place, record, _CHOICES)
        yield None if label is None else ChoiceRow(text, choices, label)


def _span_rows(task: Task, table: Table, training: bool) -> Iterator[SpanRow | None]:
    for place, record in table.records:
        key, question, context = (table.text(place, record, [name]) for name in ("id", "question", "context"))
        found = table.value(place, record, ["answers"])
        try:
            answers = [
                (str(text), int(start)) for text, start in zip(found["text"], found["answer_start"], strict=True)
            ]
        except (KeyError, TypeError, ValueError):
            raise table.wrong(place, "answers must hold as many text as answer_start: correct it") from None
        if not answers and not task.no_answer:
            raise table.wrong(place, f"no answer, which {task.title} does not have: evaluate on squad2")
        placed = []
        for text, start in answers:
            nearest = place_answer(context, text, start)
            if nearest is not None or not training:  # a dev answer is compared as text, wherever it stands
                placed.append((text, start if nearest is None else nearest))
        yield None if answers and not placed else SpanRow(key, question, context, tuple(placed))


def _tag_rows(task: Task, table: Table, classes: tuple[str, ...]) -> Iterator[TagRow | None]:
    numbers = {tag: number for number, tag in enumerate(classes)}
    for place, record in table.records:
        tokens = table.value(place, record, task.text)
        tags = _bio(task, table, place, record)
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise table.wrong(place, f"column '{task.text[0]}' must hold a list of words")
        if len(tokens) != len(tags):
            raise table.wrong(place, f"{len(tokens)} words, but {len(tags)} tags: correct it")
        for tag in tags:
            if tag not in numbers:
                types = ", ".join(entity_types(classes))
                raise table.wrong(place, f"tag {tag!r} is of none of the types {types}: correct it")
        if tokens:
            yield TagRow(tuple(tokens), tuple(numbers[tag] for tag in tags))


def _bio(task: Task, table: Table, place: int, record: Record) -> list[str]:
    """The record's tags in BIO; numbers are those of the task's classes."""
    tags = table.value(place, record, task.label)
    if not isinstance(tags, list):
        raise table.wrong(place, f"column '{task.label[0]}' must hold a list of tags")
    numbered = dict(enumerate(task.classes))
    try:
        return bio([tag if isinstance(tag, str) else str(numbered.get(tag, tag)) for tag in tags])
    except (ValueError, TypeError) as error:
        raise table.wrong(place, f"tag {error.args[0]!r} is neither O nor begins with B- or I-: correct it") from None
