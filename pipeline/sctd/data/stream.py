"""Batches of a split: the only state is one integer, the number of samples consumed so far (the cursor).

Legend: B rows of a micro-batch, S positions a row, M targets a row.
"""

import os
from collections import OrderedDict
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sctd.corpus.manifest import Manifest
from sctd.data.draws import STREAM_TIES, STREAM_VALID, hash64
from sctd.data.masking import Masker
from sctd.data.order import Order, Span, row_of_sample, samples_from
from sctd.errors import RunError, UserError
from sctd.schedule import Schedule

Batch = dict[str, Tensor]
_OPEN_SHARDS = 256
_FAREWELL = 10.0  # seconds for the batch that is under way


class Rows:
    """Random access to the rows of one split and length.

    Nothing is opened before a row of it is asked for, and no more than 256 files stay open; rows are read, not mapped:
    a damaged disk is then an error with a message, and not the end of the process.

    Raises:
        UserError: a split without rows; later, a shard that is not what the manifest says.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str, length: int) -> None:
        self.folder, self.length = folder, length
        self._shards = manifest.split(length, split).shards
        if not self._shards:
            raise UserError(f"corpus {folder} has no {split} rows: prepare it again")
        self._dtype = np.dtype(manifest.dtype)
        counts = np.array([shard.rows for shard in self._shards], dtype=np.int64)
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        self.weights = tuple(source.weight for source in manifest.sources)
        owners = [shard.source for shard in self._shards]
        self.of_source = tuple(np.bincount(owners, counts, len(self.weights)).astype(np.int64).tolist())
        self._open: OrderedDict[int, tuple[IO[bytes], int]] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 (B,) -> int64 (B, S). Raises OSError."""
        found = np.empty((len(rows), self.length), dtype=self._dtype)
        shards = np.searchsorted(self._ends, rows, side="right")
        places = (rows - self._starts[shards]) * self.length * self._dtype.itemsize
        for number, (shard, place) in enumerate(zip(shards.tolist(), places.tolist(), strict=True)):
            file, header = self._opened(shard)
            if os.preadv(file.fileno(), [found[number].data], header + place) != found[number].nbytes:
                raise OSError(f"{self.folder / self._shards[shard].file} has become shorter")
        return found.astype(np.int64)

    def _opened(self, number: int) -> tuple[IO[bytes], int]:
        """A shard, and the bytes before its first row."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        if len(self._open) >= _OPEN_SHARDS:
            self._open.popitem(last=False)[1][0].close()
        shard = self._shards[number]
        path = self.folder / shard.file
        file = path.open("rb", buffering=0)
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if shape != (shard.rows, self.length) or dtype != self._dtype:
            raise UserError(
                f"shard {path} has shape {shape} of {dtype}, its manifest says ({shard.rows}, {self.length}) of "
                f"{self._dtype}: prepare the corpus again"
            )
        self._open[number] = (file, file.tell())
        return self._open[number]


def make_batch(
    rows: Rows, masker: Masker, row_B: NDArray[np.int64], sample_B: NDArray[np.int64], step: int | None = None
) -> Batch:
    """Tensors of one micro-batch, named as the arguments of the model's forward.

    Args:
        step: the optimizer step that they are for, by which the share of masked tokens goes; None: held-out rows.
    """
    masked = masker(rows[row_B], sample_B, step)
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
        warmup: rows of another length, and how many of the first optimizer steps train on them. Samples are counted
            through; which row a sample is depends on the step's length.
    """

    def __init__(
        self,
        rows: Rows,
        masker: Masker,
        seed: int,
        share: Share,
        pin: bool = False,
        patience: float | None = None,
        warmup: tuple[Rows, int] | None = None,
    ) -> None:
        self.rows, self.masker, self.share = rows, masker, share
        self.pin, self.patience = pin, patience
        self.passed_over: tuple[Span, ...] = ()
        short, steps = warmup or (rows, 0)
        parts = [(each, Order(seed, each.of_source, rows.weights)) for each in (short, rows)]
        self._of: Schedule[tuple[Rows, Order]] = Schedule((1, parts[0]), (steps + 1, parts[1]))

    def length(self, number: int) -> int:
        """Tokens a row at an optimizer step, counted from 1."""
        return self._of(number)[0].length

    def samples(self, cursor: int) -> tuple[NDArray[np.int64], int]:
        """Global indices of the step that starts at `cursor`, int64 (global batch,), and the cursor after it."""
        return samples_from(cursor, self.share.global_batch, self.passed_over)

    def sample_rows(self, cursor: int, number: int = 1) -> NDArray[np.int64]:
        """Corpus rows of the whole global batch of optimizer step `number`, which starts at `cursor`: int64 (global
        batch,)."""
        return self._of(number)[1](self.samples(cursor)[0])

    def step(self, cursor: int, number: int = 1) -> list[Batch]:
        """The micro-batches of this rank for optimizer step `number`, which starts at sample `cursor`."""
        share = self.share
        rows, order = self._of(number)
        per_rank = share.micro_batch * share.accumulation
        mine = self.samples(cursor)[0][share.rank * per_rank : (share.rank + 1) * per_rank]
        batches = []
        for sample_B in mine.reshape(share.accumulation, share.micro_batch):
            batch = make_batch(rows, self.masker, order(sample_B), sample_B, number)
            batches.append({name: tensor.pin_memory() for name, tensor in batch.items()} if self.pin else batch)
        return batches

    def iterate(self, cursor: int, number: int = 1) -> Generator[list[Batch]]:
        """Endless steps from `cursor`, the first of them optimizer step `number`; one thread stays one step ahead, but
        where the masks of a step need the scores of the one before it.

        To be closed when done with.

        Raises:
            RunError: a batch that cannot be read, or does not come in time: the file system behind it hangs.
        """
        asked: SimpleQueue[tuple[int, int] | None] = SimpleQueue()
        ready: SimpleQueue[list[Batch] | BaseException] = SimpleQueue()

        def work() -> None:
            while (place := asked.get()) is not None:
                try:
                    ready.put(self.step(*place))
                except BaseException as error:
                    ready.put(error)

        # A daemon: a read that hangs for good must not keep the process.
        thread = Thread(target=work, name="sctd-data", daemon=True)
        thread.start()
        asked.put((cursor, number))
        try:
            while True:
                batches = self._wait_for(ready, cursor)
                cursor, number = self.samples(cursor)[1], number + 1
                waits = self.masker.awaits(number)
                if not waits:
                    asked.put((cursor, number))
                yield batches
                if waits:
                    asked.put((cursor, number))
        finally:
            asked.put(None)
            thread.join(_FAREWELL)  # a thread at work when the interpreter ends would abort it

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
    """Held-out rows of this rank, the same rows and masks at every call and for any number of ranks: of a split that
    has more than `limit`, a sample of all its sources.

    Every rank gets as many batches, since under ZeRO-3 a forward is collective; with each comes how many of its rows
    count, 0 for one that only keeps step with the others.

    Args:
        limit: rows over all ranks, at most. batch: rows a batch.
    """
    total = min(limit, len(rows))
    chosen = np.arange(total)
    if total < len(rows):
        chosen = np.sort(row_of_sample(int(hash64(masker.seed, STREAM_VALID, 1)), chosen, len(rows)))
    mine = chosen[rank::world]
    offset = int(hash64(masker.seed, STREAM_VALID) >> np.uint64(1))  # far away from any training sample's index
    most = -(-total // world)
    for start in range(0, most, batch):
        row_B = mine[start : start + batch]
        count, row_B = len(row_B), row_B if len(row_B) else chosen[:1]
        yield count, make_batch(rows, masker, row_B, row_B + (offset >> 1))
