"""SQuAD: its JSON as flat records, and answers put where the context has them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sctd.errors import UserError
from sctd.evaluate.tasks.tables import Record, Table, read_text


def open_squad(path: Path) -> Table:
    """A record for each question, with the keys of the hub's: id, question, context, answers (text, answer_start)."""
    return Table(str(path), "question", _records(path))


def place_answer(context: str, text: str, start: int) -> int | None:
    """The first character of the answer's occurrence that is nearest to `start`; None where it does not occur."""
    if not text:
        return None
    if start >= 0 and context.startswith(text, start):
        return start
    places = []
    place = context.find(text)
    while place >= 0:
        places.append(place)
        place = context.find(text, place + 1)
    return min(places, key=lambda place: abs(place - start), default=None)


def _records(path: Path) -> Iterator[tuple[int, Record]]:
    try:
        tree = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not valid JSON ({error}): fetch it again") from None
    number = 0
    try:
        for article in tree["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    number += 1
                    yield number, _flat(paragraph["context"], question)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: behind question {number} it is not as SQuAD's JSON ({type(error).__name__}: {error}): "
            "data, paragraphs, context, qas, id, question, answers, text, answer_start are expected"
        ) from None


def _flat(context: str, question: dict[str, Any]) -> Record:
    answers = [] if question.get("is_impossible") else question["answers"]
    return {
        "id": question["id"],
        "question": question["question"],
        "context": context,
        "answers": {
            "text": [answer["text"] for answer in answers],
            "answer_start": [answer["answer_start"] for answer in answers],
        },
    }
