"""Rows to .npy shards, each flushed to disk and hashed."""

import os
from pathlib import Path

import numpy as np

from sctd.corpus.manifest import Ends, Shard, file_sha256

MAX_SHARD_BYTES = 64 << 20  # of row data; also what a writer holds in memory


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
        inside = Ends(beside.name, file_sha256(beside), beside.stat().st_size)
        shards.append(Shard(path.name, len(part), file_sha256(path), path.stat().st_size, source, inside))
    return shards


def save_array(path: Path, array: np.ndarray) -> None:
    """One .npy file, on disk."""
    with path.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
        stream.write(np.ascontiguousarray(array).data)  # numpy's own way has no words for a full disk
        stream.flush()
        os.fsync(stream.fileno())
