"""Column files of tagged words: CoNLL-2003's, with the word first and the tag last, and CoNLL-2012's (OntoNotes)."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from sctd.errors import UserError
from sctd.evaluate.tasks.tables import Record, Table, lines
from sctd.evaluate.tasks.task import OUTSIDE

_DOCUMENT = "-DOCSTART-"
_BEGIN_2012, _END_2012 = "#begin document", "#end document"
_WORD_2012, _ENTITY_2012 = 3, 10  # columns
_BEGINS, _GOES_ON = "BSU", "IEL"  # first letters of BIO, BIOES and BILOU


def open_conll(path: Path) -> Table:
    """A record for each sentence, at its first line: tokens, and tags as they stand in the file."""
    return Table(str(path), "sentence at line", _records(path))


def bio(tags: Sequence[str]) -> list[str]:
    """BIO tags of IOB1's, BIOES', BILOU's or BIO's own: what goes on from nothing of its type begins an entity.

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


def _records(path: Path) -> Iterator[tuple[int, Record]]:
    tokens: list[str] = []
    tags: list[str] = []
    width = 0
    is_2012 = False
    number = 0
    for number, line in lines(path):
        cells = line.split("\t") if "\t" in line else [cell for cell in line.split(" ") if cell]
        if line.startswith((_BEGIN_2012, _END_2012)):
            is_2012, cells = True, []
        if not line.strip() or not cells or cells[0] == _DOCUMENT:
            if tokens:
                yield number - len(tokens), _sentence(tokens, tags, is_2012)
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
    if tokens:
        yield number - len(tokens) + 1, _sentence(tokens, tags, is_2012)


def _sentence(tokens: list[str], tags: list[str], is_2012: bool) -> Record:
    return {"tokens": tokens, "tags": _unbracketed(tags) if is_2012 else tags}


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
