"""Documents to rows of one length, without padding, and rows to shards.

    [CLS] doc doc doc [SEP] doc doc ... [SEP]         a row: seq_len ids
          |----- seq_len - 2: the payload ---|

The payloads, laid end to end, are the documents with a [SEP] after each; a document longer than the room goes on in
the next row. Where a document ends exactly with the payload, the row's own last [SEP] is its separator.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from sctd.corpus.manifest import Ends, Shard
from sctd.corpus.tokenizer import SpecialIds
from sctd.files import sha256

MIN_SEQ_LEN = 8
MAX_SHARD_BYTES = 64 << 20  # of row data; also what a writer holds in memory


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
        """Pack documents (id sequences without special tokens; empty ones are skipped).

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
        """The parts of documents in the begun row."""
        borders = [end - 1 for end in self._ends]
        return [self._rest[start:end] for start, end in zip([0, *(b + 1 for b in borders)], borders, strict=False)]

    def _rows(self, payload: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = np.empty((len(payload), self.seq_len), dtype=np.int32)
        rows[:, 0] = self.special.cls
        rows[:, 1:-1] = payload
        rows[:, -1] = self.special.sep
        keep = 2 * np.count_nonzero(~np.isin(rows, self.special.all), axis=1) >= self.seq_len
        if not keep.all():
            self.special_rows += int(np.count_nonzero(~keep))
            row, position = np.divmod(ends, self.seq_len)
            moved = (np.cumsum(keep) - 1)[row] * self.seq_len + position
            rows, ends = rows[keep], moved[keep[row]]
        return rows, ends


def row_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type in which every token id fits."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def write_shards(
    folder: Path, name: str, rows: np.ndarray, ends: np.ndarray, dtype: np.dtype, source: int
) -> list[Shard]:
    """Write rows [N, seq_len] as `<name>-0.npy`, `<name>-1.npy`, ... in `folder`, with the ends of their documents
    beside them as `<name>-0.ends.npy`. None where there are no rows. Raises OSError."""
    length = rows.shape[1]
    at_once = max(1, MAX_SHARD_BYTES // (length * dtype.itemsize))
    shards = []
    for number, start in enumerate(range(0, len(rows), at_once)):
        part = rows[start : start + at_once].astype(dtype)
        low, high = np.searchsorted(ends, [start * length, (start + len(part)) * length])
        path, beside = folder / f"{name}-{number}.npy", folder / f"{name}-{number}.ends.npy"
        save_array(path, part)
        save_array(beside, ends[low:high] - start * length)
        inside = Ends(beside.name, sha256(beside), beside.stat().st_size)
        shards.append(Shard(path.name, len(part), sha256(path), path.stat().st_size, source, inside))
    return shards


def save_array(path: Path, array: np.ndarray) -> None:
    """One .npy file, on disk."""
    with path.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
        stream.write(np.ascontiguousarray(array).data)  # numpy's own writer would not say that the disk is full
        stream.flush()
        os.fsync(stream.fileno())
