"""Batches of a split: the only state is one integer, the number of samples consumed so far (the cursor).

Legend: B rows of a micro-batch, S positions a row, M targets a row.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sctd.corpus.manifest import Manifest
from sctd.data.hashing import STREAM_TIES, STREAM_VALID, hash64
from sctd.data.masking import Masker
from sctd.data.order import Span, row_of_sample, samples_from
from sctd.errors import RunError, UserError

Batch = dict[str, Tensor]
_FAREWELL = 10.0  # seconds for the batch that is under way


class Rows:
    """Random access to the rows of one split, memory-mapped."""

    def __init__(self, folder: Path, manifest: Manifest, split: str) -> None:
        self.folder = folder
        shards = manifest.splits[split].shards
        if not shards:
            raise UserError(f"corpus {folder} has no {split} rows: prepare it again")
        self._shards = [np.load(folder / shard.file, mmap_mode="r", allow_pickle=False) for shard in shards]
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        for shard, array in zip(shards, self._shards, strict=True):
            if array.shape != (shard.rows, manifest.seq_len):
                raise UserError(
                    f"shard {folder / shard.file} has shape {array.shape}, its manifest says "
                    f"({shard.rows}, {manifest.seq_len}): prepare the corpus again"
                )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 (B,) -> int64 (B, S)."""
        which = np.searchsorted(self._ends, rows, side="right")
        starts = self._ends - [len(shard) for shard in self._shards]
        return np.stack([self._shards[w][row - starts[w]] for w, row in zip(which, rows, strict=True)]).astype(np.int64)


def make_batch(rows: Rows, masker: Masker, row_B: NDArray[np.int64], sample_B: NDArray[np.int64]) -> Batch:
    """Tensors of one micro-batch, named as the arguments of the model's forward."""
    masked = masker(rows[row_B], sample_B)
    ties_B = hash64(masker.seed, STREAM_TIES, sample_B.astype(np.uint64)).view(np.int64)
    return {
        "input_ids": torch.from_numpy(masked.input_ids_BS),
        "positions": torch.from_numpy(masked.positions_BM),
        "labels": torch.from_numpy(masked.labels_BM),
        "row_seed": torch.from_numpy(ties_B),
    }


@dataclass(frozen=True)
class Share:
    """This rank's part of each optimizer step: `accumulation` micro-batches of `micro_batch` rows."""

    rank: int
    world: int
    micro_batch: int
    accumulation: int

    @property
    def global_batch(self) -> int:
        return self.world * self.micro_batch * self.accumulation


class TrainStream:
    """The optimizer steps of a run from a cursor on, the next one prepared while the current one trains.

    Args:
        patience: seconds that a batch may take.
    """

    def __init__(
        self, rows: Rows, masker: Masker, seed: int, share: Share, pin: bool = False, patience: float | None = None
    ) -> None:
        self.rows, self.masker, self.seed, self.share = rows, masker, seed, share
        self.pin, self.patience = pin, patience
        self.passed_over: tuple[Span, ...] = ()

    def samples(self, cursor: int) -> tuple[NDArray[np.int64], int]:
        """Global indices of the step that starts at `cursor`, int64 (global batch,), and the cursor behind it."""
        return samples_from(cursor, self.share.global_batch, self.passed_over)

    def sample_rows(self, cursor: int) -> NDArray[np.int64]:
        """Corpus rows of the whole global batch that starts at `cursor`: int64 (global batch,)."""
        return row_of_sample(self.seed, self.samples(cursor)[0], len(self.rows))

    def step(self, cursor: int) -> list[Batch]:
        """The micro-batches of this rank for the step that starts at sample `cursor`."""
        share = self.share
        per_rank = share.micro_batch * share.accumulation
        mine = self.samples(cursor)[0][share.rank * per_rank : (share.rank + 1) * per_rank]
        batches = []
        for sample_B in mine.reshape(share.accumulation, share.micro_batch):
            row_B = row_of_sample(self.seed, sample_B, len(self.rows))
            batch = make_batch(self.rows, self.masker, row_B, sample_B)
            batches.append({name: tensor.pin_memory() for name, tensor in batch.items()} if self.pin else batch)
        return batches

    def iterate(self, cursor: int) -> Generator[list[Batch]]:
        """Endless steps from `cursor`; one thread stays one step ahead. To be closed when done with.

        Raises:
            RunError: a batch that cannot be read, or does not come in time: the file system behind it hangs.
        """
        asked: SimpleQueue[int | None] = SimpleQueue()
        ready: SimpleQueue[list[Batch] | BaseException] = SimpleQueue()
        # A daemon: a read that hangs for good must not keep the process.
        thread = Thread(target=self._work, args=(asked, ready), name="sctd-data", daemon=True)
        thread.start()
        asked.put(cursor)
        try:
            while True:
                batches = self._wait_for(ready, cursor)
                cursor = self.samples(cursor)[1]
                asked.put(cursor)
                yield batches
        finally:
            asked.put(None)
            thread.join(_FAREWELL)  # a thread at work when the interpreter ends would abort it

    def _work(self, asked: "SimpleQueue[int | None]", ready: "SimpleQueue[list[Batch] | BaseException]") -> None:
        while (cursor := asked.get()) is not None:
            try:
                ready.put(self.step(cursor))
            except BaseException as error:
                ready.put(error)

    def _wait_for(self, ready: "SimpleQueue[list[Batch] | BaseException]", cursor: int) -> list[Batch]:
        what = f"the batch of samples {cursor} to {self.samples(cursor)[1]} of {self.rows.folder}"
        try:
            found = ready.get(timeout=self.patience)
        except Empty:
            hint = "see whether its disk answers, or raise train.timeout"
            raise RunError(f"{what} did not come within {self.patience:g} s: {hint}") from None
        if isinstance(found, OSError):
            raise RunError(f"{what} cannot be read: {found}") from None
        if isinstance(found, BaseException):
            raise found
        return found


def valid_batches(
    rows: Rows, masker: Masker, limit: int, batch: int, rank: int, world: int
) -> Iterator[tuple[int, Batch]]:
    """Held-out rows of this rank, the same rows and masks at every call and for any number of ranks.

    Every rank gets as many batches, since under ZeRO-3 a forward is collective; with each comes how many of its rows
    count, 0 for one that only keeps step with the others.

    Args:
        limit: rows over all ranks, at most. batch: rows a batch.
    """
    total = min(limit, len(rows))
    mine = np.arange(total)[rank::world]
    offset = int(hash64(masker.seed, STREAM_VALID) >> np.uint64(1))  # far away from any training sample's index
    most = -(-total // world)
    for start in range(0, most, batch):
        row_B = mine[start : start + batch]
        count, row_B = len(row_B), row_B if len(row_B) else np.arange(1)
        yield count, make_batch(rows, masker, row_B, row_B + (offset >> 1))
