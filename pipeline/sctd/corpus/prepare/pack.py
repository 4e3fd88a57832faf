"""Documents to rows of one length, without padding.

    [CLS] doc doc doc [SEP] doc doc ... [SEP]         a row: seq_len ids
          |----- seq_len - 2: the payload ---|

The payloads, laid end to end, are the documents with a [SEP] after each; a document longer than the room goes on in
the next row. Where a document ends exactly with the payload, the row's own last [SEP] is its separator.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from sctd.corpus.tokenizer import SpecialIds

MIN_SEQ_LEN = 8


class Packer:
    """Takes documents, gives back the rows that they complete; keeps less than one row between calls.

    Counts `special_rows`, which it leaves out: fewer than half of their positions hold non-special ids, so that
    masking would not find enough tokens.
    """

    def __init__(self, seq_len: int, special: SpecialIds) -> None:
        assert seq_len >= MIN_SEQ_LEN, seq_len
        self.seq_len = seq_len
        self.special = special
        self.special_rows = 0
        self._room = seq_len - 2
        self._separator = np.array([special.sep], dtype=np.int32)
        self._rest = np.empty(0, dtype=np.int32)  # the begun payload, always shorter than the room
        self._ends: list[int] = []  # of the documents that end in it

    @property
    def unfinished_tokens(self) -> int:
        """Ids of the begun row, separators included; dropped unless more documents come."""
        return len(self._rest)

    def add(self, documents: Iterable[Sequence[int] | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Pack documents (id sequences without special tokens; empty ones are passed over).

        Returns:
            rows [N, seq_len] int32, and the places row x seq_len + position of the separators that end a document in
            them, int64, ascending.
        """
        parts = [self._rest]
        ends, total = self._ends, len(self._rest)  # of the stream of payloads
        for ids in documents:
            if len(ids) == 0:
                continue
            parts.append(np.asarray(ids, dtype=np.int32))
            total += len(ids)
            row, filled = divmod(total, self._room)
            if filled:
                parts.append(self._separator)
                ends.append(row * self.seq_len + 1 + filled)
                total += 1
            else:
                ends.append(row * self.seq_len - 1)
        stream = np.concatenate(parts)
        complete = len(stream) // self._room
        self._rest = stream[complete * self._room :].copy()
        self._ends = [end - complete * self.seq_len for end in ends if end >= complete * self.seq_len]
        finished = np.array(ends[: len(ends) - len(self._ends)], dtype=np.int64)
        return self._rows(stream[: complete * self._room].reshape(-1, self._room), finished)

    def rest(self) -> list[np.ndarray]:
        """What of the documents stands in the begun row, a part for each of them."""
        borders = [end - 1 for end in self._ends]
        return [self._rest[start:end] for start, end in zip([0, *(b + 1 for b in borders)], borders, strict=False)]

    def _rows(self, payload: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = np.empty((len(payload), self.seq_len), dtype=np.int32)
        rows[:, 0] = self.special.cls
        rows[:, 1:-1] = payload
        rows[:, -1] = self.special.sep
        ordinary = np.count_nonzero(~is_special(rows, self.special), axis=1)
        keep = 2 * ordinary >= self.seq_len
        dropped = len(rows) - int(np.count_nonzero(keep))
        if dropped:
            self.special_rows += dropped
            row, position = np.divmod(ends, self.seq_len)
            moved = (np.cumsum(keep) - 1)[row] * self.seq_len + position
            rows, ends = rows[keep], moved[keep[row]]
        return rows, ends


def is_special(ids: np.ndarray, special: SpecialIds) -> np.ndarray:
    """Boolean array of the shape of `ids`: where one of the five special ids stands."""
    found = ids == special.pad
    for index in special.all[1:]:
        found |= ids == index
    return found
