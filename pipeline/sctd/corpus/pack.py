"""Documents to rows of one length, without padding.

    [CLS] doc doc doc [SEP] doc doc ... [SEP]         a row: seq_len ids
          |----- seq_len - 2: the payload ---|

The payloads, laid end to end, are the documents with a [SEP] after each; a document longer than the room goes on in
the next row. Where a document ends exactly with the payload, the row's own last [SEP] is its separator.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from sctd.corpus.tokenizer import SpecialIds

MIN_SEQ_LEN = 8


class Packer:
    """Takes documents, gives back the rows that they complete; keeps less than one row between calls.

    Counts what it leaves out: `special_rows` (fewer than half of the positions hold non-special ids, so that masking
    would not find enough tokens), `empty_documents`, and after the last call `unfinished_tokens`.
    """

    def __init__(self, seq_len: int, special: SpecialIds) -> None:
        assert seq_len >= MIN_SEQ_LEN, seq_len
        self.seq_len = seq_len
        self.special = special
        self.special_rows = 0
        self.empty_documents = 0
        self._room = seq_len - 2
        self._separator = np.array([special.sep], dtype=np.int32)
        self._rest = np.empty(0, dtype=np.int32)  # the begun payload, always shorter than the room

    @property
    def unfinished_tokens(self) -> int:
        """Ids of the begun row, separators included; dropped unless more documents come."""
        return len(self._rest)

    def add(self, documents: Iterable[Sequence[int] | np.ndarray]) -> np.ndarray:
        """Rows [N, seq_len] int32 completed by these documents (id sequences without special tokens)."""
        parts = [self._rest]
        filled = len(self._rest)  # of the payload begun last
        for ids in documents:
            if len(ids) == 0:
                self.empty_documents += 1
                continue
            parts.append(np.asarray(ids, dtype=np.int32))
            filled = (filled + len(ids)) % self._room
            if filled:
                parts.append(self._separator)
                filled = (filled + 1) % self._room
        stream = np.concatenate(parts)
        complete = len(stream) // self._room * self._room
        self._rest = stream[complete:].copy()
        return self._rows(stream[:complete].reshape(-1, self._room))

    def _rows(self, payload: np.ndarray) -> np.ndarray:
        rows = np.empty((len(payload), self.seq_len), dtype=np.int32)
        rows[:, 0] = self.special.cls
        rows[:, 1:-1] = payload
        rows[:, -1] = self.special.sep
        ordinary = np.count_nonzero(~is_special(rows, self.special), axis=1)
        keep = 2 * ordinary >= self.seq_len
        self.special_rows += int(np.count_nonzero(~keep))
        return rows[keep]


def is_special(ids: np.ndarray, special: SpecialIds) -> np.ndarray:
    """Boolean array of the shape of `ids`: where one of the five special ids stands."""
    found = ids == special.pad
    for index in special.all[1:]:
        found |= ids == index
    return found


def pack(
    documents: Iterable[Sequence[int] | np.ndarray], seq_len: int, special: SpecialIds, chunk: int = 1024
) -> Iterator[np.ndarray]:
    """Rows [seq_len] int32 of a stream of id sequences, `chunk` documents at a time. The unfinished last row is
    dropped; use Packer to read the counts of what was left out."""
    packer = Packer(seq_len, special)
    batch: list[Sequence[int] | np.ndarray] = []
    for ids in documents:
        batch.append(ids)
        if len(batch) == chunk:
            yield from packer.add(batch)
            batch = []
    yield from packer.add(batch)
