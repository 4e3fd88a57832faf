"""Rows to .npy shards that np.load maps into memory, each flushed to disk and hashed."""

import os
from pathlib import Path

import numpy as np

from sctd.corpus.manifest import Shard, Split, file_sha256

MAX_SHARD_BYTES = 64 << 20  # of row data; also what a writer holds in memory


def row_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type in which every token id fits."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class ShardWriter:
    """Collects rows [N, seq_len] and writes them as `<name>-00000.npy`, `<name>-00001.npy`, ... in `folder`."""

    def __init__(self, folder: Path, name: str, seq_len: int, dtype: np.dtype) -> None:
        self.rows = 0
        self._folder, self._name, self._dtype = folder, name, dtype
        self._shard_rows = max(1, MAX_SHARD_BYTES // (seq_len * dtype.itemsize))
        self._pending: list[np.ndarray] = []
        self._pending_rows = 0
        self._shards: list[Shard] = []

    def add(self, rows: np.ndarray) -> None:
        """Append rows; full shards go to disk at once. Raises OSError."""
        self.rows += len(rows)
        self._pending.append(rows.astype(self._dtype))
        self._pending_rows += len(rows)
        while self._pending_rows >= self._shard_rows:
            self._flush(self._shard_rows)

    def close(self) -> Split:
        """Write what is left and return all shards."""
        if self._pending_rows:
            self._flush(self._pending_rows)
        return Split(self.rows, tuple(self._shards))

    def _flush(self, count: int) -> None:
        rows = np.concatenate(self._pending)
        self._pending, self._pending_rows = [rows[count:].copy()], len(rows) - count
        path = self._folder / f"{self._name}-{len(self._shards):05d}.npy"
        with path.open("wb") as stream:
            np.lib.format.write_array(stream, np.ascontiguousarray(rows[:count]), allow_pickle=False)
            stream.flush()
            os.fsync(stream.fileno())
        self._shards.append(Shard(path.name, count, file_sha256(path), path.stat().st_size))
