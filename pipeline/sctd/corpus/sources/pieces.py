"""A part of a source, the unit of work, and how documents lie in files."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """How documents lie in files.

    Args:
        field: key of a JSON line, column of a table. txt: blank-line | file, what separates the documents of .txt.
    """

    field: str = "text"
    txt: str = "blank-line"


@dataclass(frozen=True)
class Piece:
    """A part of one source.

    Args:
        source: its number among the sources. spec: file, hub data set or "embedded".
        kind: text | parquet | arrow | hub | embedded.
        start, end: bytes of the decompressed text, row groups, record batches or shards of a hub data set; an `end` of
            None is the end of all.
        bytes: of text, estimated. title: for messages.
    """

    source: int
    spec: str
    kind: str
    start: int
    end: int | None
    bytes: int
    title: str


def titles(name: str, parts: int) -> list[str]:
    """`name, part 2 of 4`, or the name alone where there is one part."""
    return [name] if parts == 1 else [f"{name}, part {part + 1} of {parts}" for part in range(parts)]
