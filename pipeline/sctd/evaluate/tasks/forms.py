"""Files that are no tables: SQuAD's JSON, and column files of tagged words.

Of these there are CoNLL-2003's, with the word first and the tag last, and CoNLL-2012's (OntoNotes).
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from sctd.errors import UserError
from sctd.evaluate.tasks.tables import Entry, lines, read_text
from sctd.evaluate.tasks.task import OUTSIDE

_DOCUMENT = "-DOCSTART-"
_BEGIN_2012, _END_2012 = "#begin document", "#end document"
_WORD_2012, _ENTITY_2012 = 3, 10  # columns
_BEGINS, _GOES_ON = "BSU", "IEL"  # first letters of BIO, BIOES and BILOU


def bio(tags: Sequence[str]) -> list[str]:
    """BIO tags from IOB1, BIOES, BILOU or BIO: what continues nothing of its type begins an entity.

    Raises:
        ValueError: a tag of none of them; it is the message.
    """
    found: list[str] = []
    before = ""
    for tag in tags:
        prefix, dash, kind = tag.partition("-")
        if tag == OUTSIDE:
            found.append(tag)
        elif dash and kind and len(prefix) == 1 and prefix in _BEGINS + _GOES_ON:
            found.append(f"{'I' if prefix in _GOES_ON and kind == before else 'B'}-{kind}")
        else:
            raise ValueError(tag)
        before = kind
    return found


def conll_entries(path: Path) -> Iterator[Entry]:
    """An entry for each sentence, at its first line: tokens, and tags as they stand in the file."""
    tokens: list[str] = []
    tags: list[str] = []
    width, is_2012 = 0, False
    for number, line in enumerate(itertools.chain(lines(path), [""]), 1):  # a blank line ends a sentence
        cells = line.split("\t") if "\t" in line else [cell for cell in line.split(" ") if cell]
        if line.startswith((_BEGIN_2012, _END_2012)):
            is_2012, cells = True, []
        if not line.strip() or not cells or cells[0] == _DOCUMENT:
            if tokens:
                values = {"tokens": tokens, "tags": _unbracketed(tags) if is_2012 else tags}
                yield Entry(f"{path}, sentence at line {number - len(tokens)}", values)
                tokens, tags = [], []
            continue
        if len(cells) < (_ENTITY_2012 + 2 if is_2012 else 2) or (width and not is_2012 and len(cells) != width):
            expected = f"at least {_ENTITY_2012 + 2}" if is_2012 else width or "at least 2"
            raise UserError(
                f"{path}, line {number}: {len(cells)} columns where {expected} are expected (the word, ..., its tag): "
                "correct the line"
            )
        width = len(cells)
        tokens.append(cells[_WORD_2012 if is_2012 else 0])
        tags.append(cells[_ENTITY_2012 if is_2012 else -1].strip())


def _unbracketed(cells: list[str]) -> list[str]:
    """BIO tags of CoNLL-2012's brackets: `(PERSON)`, or `(PERSON*` `*` `*)`; a `*` outside is O."""
    tags = []
    inside = ""
    for cell in cells:
        opened = cell.startswith("(")
        if opened:
            inside = cell.strip("(*)")
        tags.append(f"{'B' if opened else 'I'}-{inside}" if inside else OUTSIDE)
        if cell.endswith(")"):
            inside = ""
    return tags


# ---- SQuAD ---------------------------------------------------------------------------------------------------------


def place_answer(context: str, text: str, start: int) -> int | None:
    """The first character of the answer's occurrence that is nearest to `start`; None where it does not occur."""
    if text and start >= 0 and context.startswith(text, start):  # nearly always: to search takes long
        return start
    places = [found.start() for found in re.finditer(f"(?={re.escape(text)})", context)] if text else []
    return min(places, key=lambda place: abs(place - start), default=None)


def squad_entries(path: Path) -> Iterator[Entry]:
    """An entry for each question, with the hub's columns: id, question, context, answers (text, answer_start)."""
    text = read_text(path)
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}): download it again") from None
    number = 0
    try:
        for article in tree["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    number += 1
                    values = {"context": paragraph["context"], "id": question["id"], "question": question["question"]}
                    answers = [] if question.get("is_impossible") else question["answers"]
                    values["answers"] = {key: [answer[key] for answer in answers] for key in ("text", "answer_start")}
                    yield Entry(f"{path}, question {number}", values)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: after question {number} it does not follow SQuAD's JSON ({type(error).__name__}: {error}): "
            "data, paragraphs, context, qas, id, question, answers, text, answer_start are expected"
        ) from None
