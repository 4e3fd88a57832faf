"""A piece of a source, the unit of work; how documents lie in files; and what is wrong with them."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sctd.errors import UserError

_EXAMPLES = 5


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


def pieces_from(
    source: int, spec: str, kind: str, title: str, starts: Sequence[int], sizes: Sequence[int]
) -> list[Piece]:
    """One piece from each of `starts` to the next, the last to the end; sizes: bytes of text in each."""
    count = len(starts)
    titles = [title] if count == 1 else [f"{title}, part {part + 1} of {count}" for part in range(count)]
    ends = [*starts[1:], None]
    return [Piece(source, spec, kind, *rest) for rest in zip(starts, ends, sizes, titles, strict=True)]


class Faults:
    """Where readers report what is wrong with the data.

    Args:
        on_error: stop raises the first fault; skip counts it, and the reader continues after it.

    `counts` has the number of faults of each kind, `examples` the first few as messages.
    """

    def __init__(self, on_error: str = "stop") -> None:
        self.on_error = on_error
        self.counts: Counter[str] = Counter()
        self.examples: list[str] = []

    def found(self, kind: str, where: str | Callable[[], str], problem: str) -> None:
        """Report one fault. `where` may be a function, called only for the message: counting lines can take long."""
        self.counts[kind] += 1
        if self.on_error == "stop" or len(self.examples) < _EXAMPLES:
            self.examples.append(f"{where if isinstance(where, str) else where()}: {problem}")
            if self.on_error == "stop":
                raise UserError(self.examples[-1])
