"""Rows of a task's split, from files of a folder or from the hub, and K of each class for few-shot fine-tuning."""

import functools
import hashlib
import json
import math
import os
import random
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sctd.errors import UserError
from sctd.evaluate.tasks.forms import bio, conll_entries, place_answer, squad_entries
from sctd.evaluate.tasks.locate import find_files, has_files
from sctd.evaluate.tasks.tables import NO_LABEL, Entry, hub_entries, table_entries
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
class SplitRows:
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


def read_rows(task: Task, split: str, data_dir: Path | None) -> SplitRows:
    """The rows of a split (train, dev, or MNLI's dev_mm).

    Args:
        data_dir: the task's folder or one above it; None: the hub, or the files beside a user's YAML.

    Raises:
        UserError: they cannot be found or read, or are not those of such a task.
    """
    sources = _sources(task, split, data_dir)
    classes = task.classes
    if not classes and task.kind in ("classification", "tags"):
        classes = _found_classes(task, _sources(task, "train", data_dir))
    rows: list[Row] = []
    left_out = 0
    for name, entries in sources:
        found = [row for entry in entries for row in _rows(task, entry, classes, split == "train")]
        if not found:
            raise UserError(f"{name}: is empty: give a file with rows of {task.title}")
        kept = [row for row in found if row is not None]
        rows += kept
        left_out += len(found) - len(kept)
    first = sources[0][0]
    if not rows:
        raise UserError(f"{first}: none of its {left_out} rows has a label or answer: give one with labels")
    if task.no_answer and split == "train" and all(row.answers for row in rows if isinstance(row, SpanRow)):
        raise UserError(f"{first}: every question has an answer, as in SQuAD v1.1: give the file of {task.title}")
    origin = first if len(sources) == 1 else os.path.commonpath([name for name, _ in sources])
    return SplitRows(tuple(rows), origin, classes, left_out)


def has_split(task: Task, split: str, data_dir: Path | None) -> bool:
    """Whether the split is there; MNLI's mismatched set is not in every folder."""
    if _is_on_hub(task, data_dir):
        return task.hub is not None and split in task.hub.splits
    return has_files(task, split, data_dir)


def _is_on_hub(task: Task, data_dir: Path | None) -> bool:
    return data_dir is None and not (task.home and task.files)


def _sources(task: Task, split: str, data_dir: Path | None) -> list[tuple[str, Iterator[Entry]]]:
    """Files, or the hub's id, and the entries of each."""
    if _is_on_hub(task, data_dir):
        assert task.hub is not None
        return [(task.hub.id, hub_entries(task, split))]
    own_forms = {"squad": squad_entries, "conll": conll_entries}
    wanted = [names for names in (task.text, task.pair, task.label) if names]
    found = []
    for path in find_files(task, split, data_dir):
        own = own_forms.get(task.form) if path.suffix not in (".jsonl", ".parquet") else None
        found.append((str(path), own(path) if own else table_entries(path, wanted, task.columns)))
    return found


# ---- labels ------------------------------------------------------------------------------------------------------


def _found_classes(task: Task, sources: list[tuple[str, Iterator[Entry]]]) -> tuple[str, ...]:
    """The classes of a user's training rows: numbers in their order, words in that of the alphabet."""
    found: set[str] = set()
    for entry in (entry for _, entries in sources for entry in entries):
        if task.kind == "tags":
            found.update(entity_types(_bio(task, entry)))
        elif word := _word(task, entry):
            found.add(word)
        else:
            raise entry.wrong("it has no label: add one, or leave the row out")
    found.discard(NO_LABEL)
    ordered = sorted(found, key=lambda name: (0, int(name), name) if _is_number(name) else (1, 0, name))
    file = sources[0][0]
    if task.kind == "tags":
        if not ordered:
            raise UserError(f"{file}: all its words are tagged O: give the column file with entities")
        return bio_tags(ordered)
    if len(ordered) < 2:
        raise UserError(f"{file}: its labels are {', '.join(ordered) or 'none'}: two classes or more are needed")
    if "f1" in task.metrics and len(ordered) != 2:
        raise UserError(f"{file}: it has {len(ordered)} classes, and f1 needs two: use macro_f1 instead")
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


def _word(task: Task, entry: Entry) -> str:
    """The entry's label as it would stand in a file of text."""
    value = entry.value(task.label)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str | int | float):
        return str(value).strip()
    raise entry.wrong(f"a label must be a word or a number, found {type(value).__name__}")


def _class(task: Task, entry: Entry, classes: tuple[str, ...]) -> int | None:
    """The number of the entry's class; None where it has no label."""
    numbers, word = _numbers(classes), _word(task, entry)
    number = numbers.get(word, numbers.get(word.lower()))
    if number is None and word != NO_LABEL:
        word = textwrap.shorten(word, _SHOWN, placeholder=" ...")
        raise entry.wrong(f"label {word!r} is not one of the classes {', '.join(classes)}: correct it")
    return number


def _score(task: Task, entry: Entry) -> float:
    value = entry.value(task.label)
    try:
        score = float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if isinstance(value, bool) or not math.isfinite(score):
        raise entry.wrong(f"label {value!r} is not a number: correct it")
    return score


# ---- forms of rows -----------------------------------------------------------------------------------------------


def _rows(task: Task, entry: Entry, classes: tuple[str, ...], training: bool) -> Iterable[Row | None]:
    """The rows of an entry, None for each one that is left out."""
    if task.form == "squad":
        return [_span_row(task, entry, training)]
    if task.form == "conll":
        return _tag_rows(task, entry, classes)
    if task.form == "copa":
        return [_choice_row(task, entry)]
    if task.form == "multirc":
        return _answer_rows(task, entry, classes)
    text, pair = entry.text(*task.text), entry.text(*task.pair) if task.pair else None
    label = _score(task, entry) if task.kind == "regression" else _class(task, entry, classes)
    return [None if label is None else TextRow(text, pair, label)]


def _answer_rows(task: Task, entry: Entry, classes: tuple[str, ...]) -> Iterator[TextRow | None]:
    """MultiRC: a row for each answer, whose text is question and answer."""
    for values in _answers(entry):
        answer = replace(entry, values=values)
        label = _class(task, answer, classes)
        text = f"{answer.text('question')} {answer.text('answer')}"
        yield None if label is None else TextRow(text, answer.text("paragraph"), label, values["group"])


def _answers(entry: Entry) -> Iterator[dict[str, Any]]:
    """Flat values of SuperGLUE's entries (a passage with its questions), or of the hub's (an answer)."""
    values = entry.values
    try:
        if "passage" not in values:
            yield values | {"group": f"{values['idx']['paragraph']}-{values['idx']['question']}"}
            return
        for number, question in enumerate(values["passage"]["questions"]):
            shared = {"paragraph": values["passage"]["text"], "question": question["question"]}
            for answer in question["answers"]:
                own = {"answer": answer["text"], "label": answer["label"], "group": f"{values['idx']}-{number}"}
                yield shared | own
    except (KeyError, TypeError) as error:
        raise entry.wrong(
            f"not in the form of SuperGLUE's MultiRC ({type(error).__name__}: {error}): "
            "passage, text, questions, question, answers, text, label, idx are expected"
        ) from None


def _choice_row(task: Task, entry: Entry) -> ChoiceRow | None:
    question = entry.text("question")
    if question not in _QUESTIONS:
        raise entry.wrong(f"question {question!r} is not one of {', '.join(_QUESTIONS)}: correct it")
    text, choices = f"{entry.text(*task.text)} {_QUESTIONS[question]}", tuple(map(entry.text, _CHOICES))
    label = _class(task, entry, _CHOICES)
    return None if label is None else ChoiceRow(text, choices, label)


def _span_row(task: Task, entry: Entry, training: bool) -> SpanRow | None:
    key, question, context = map(entry.text, ("id", "question", "context"))
    found = entry.value(["answers"])
    try:
        answers = [(str(text), int(start)) for text, start in zip(found["text"], found["answer_start"], strict=True)]
    except (KeyError, TypeError, ValueError):
        raise entry.wrong("answers must have one answer_start for each text: correct it") from None
    if not answers and not task.no_answer:
        raise entry.wrong(f"no answer, which {task.title} does not have: evaluate on squad2")
    placed = []
    for text, start in answers:
        nearest = place_answer(context, text, start)
        if nearest is not None or not training:  # a dev answer is compared as text, wherever it stands
            placed.append((text, start if nearest is None else nearest))
    return None if answers and not placed else SpanRow(key, question, context, tuple(placed))


def _tag_rows(task: Task, entry: Entry, classes: tuple[str, ...]) -> Iterator[TagRow]:
    """One row, or none of a sentence without words."""
    tokens, tags = entry.value(task.text), _bio(task, entry)
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise entry.wrong(f"column '{task.text[0]}' must hold a list of words")
    if len(tokens) != len(tags):
        raise entry.wrong(f"{len(tokens)} words, but {len(tags)} tags: correct it")
    for tag in tags:
        if tag not in classes:
            raise entry.wrong(f"tag {tag!r} is not of the types {', '.join(entity_types(classes))}: correct it")
    if tokens:
        yield TagRow(tuple(tokens), tuple(map(classes.index, tags)))


def _bio(task: Task, entry: Entry) -> list[str]:
    """The entry's tags in BIO; numbers are those of the task's classes."""
    tags = entry.value(task.label)
    if not isinstance(tags, list):
        raise entry.wrong(f"column '{task.label[0]}' must hold a list of tags")
    numbered = dict(enumerate(task.classes))
    try:
        return bio([tag if isinstance(tag, str) else str(numbered.get(tag, tag)) for tag in tags])
    except (ValueError, TypeError) as error:
        raise entry.wrong(f"tag {error.args[0]!r} is neither O nor begins with B- or I-: correct it") from None


# ---- few shots -----------------------------------------------------------------------------------------------------


def few_shots(task: Task, rows: SplitRows, shots: int, seed: int) -> SplitRows:
    """K rows of each class, in the order that they have in `rows`; which ones depends on rows and seed alone.

    For tags, sentences are gone through in random order, and those are taken that have an entity type of which there
    are fewer than K so far: each type then stands in K sentences or more. A task without classes (scores, spans) gets
    K rows in all, and one of choices K for each place of the right choice.

    Raises:
        UserError: there are fewer than K of a class.
    """
    first = rows.rows[0]
    names = entity_types(rows.classes) if task.kind == "tags" else list(rows.classes) or [""]  # "": rows of any kind
    if isinstance(first, ChoiceRow):
        names = [_choice(number) for number in range(len(first.choices))]
    labels = [_labels(row, rows.classes) for row in rows.rows]
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


def _labels(row: Row, classes: tuple[str, ...]) -> set[str]:
    """Those of the names that stand in the row."""
    if isinstance(row, TagRow):
        return set(entity_types([classes[tag] for tag in row.tags]))
    if isinstance(row, ChoiceRow):
        return {_choice(row.label)}
    return {classes[int(row.label)]} if isinstance(row, TextRow) and classes else {""}


def _choice(number: int) -> str:
    return f"choice {number + 1}"
