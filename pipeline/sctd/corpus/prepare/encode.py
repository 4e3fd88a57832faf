"""A piece of a source to tokens on disk: read, clean, tokenize, hash.

A piece leaves the ids of its documents in one file, in runs that are sorted by bin, and an index with a line for each
document, sorted by hash, so that the packing of a bin reads a stretch of it.
"""

import hashlib
import os
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from tokenizers import Tokenizer

from sctd.corpus.prepare.job import Job
from sctd.corpus.prepare.limits import Reached, is_reached
from sctd.corpus.prepare.near import Sketcher
from sctd.corpus.prepare.rows import row_dtype, save_array
from sctd.corpus.prepare.team import Rank
from sctd.corpus.sources.clean import Cleaner
from sctd.corpus.sources.source import Faults, read_piece
from sctd.corpus.tokenizer import corpus_encoder, encode_documents, special_ids, vocab_size
from sctd.files import write_json

BATCH_CHARS = 1 << 20
BATCH_DOCUMENTS = 4096
RUN_BYTES = 32 << 20  # of ids, held in memory between writes
PROGRESS_SECONDS = 5.0

# A document in the index. high, low: its hash. offset: of its first id in the file of ids. position: its number in
# the piece. length: ids. unknown: [UNK] among them.
INDEX = np.dtype(
    [("high", "<u8"), ("low", "<u8"), ("offset", "<i8"), ("position", "<u4"), ("length", "<u4"), ("bytes", "<u4"),
     ("words", "<u4"), ("unknown", "<u4"), ("valid", "?")]
)  # fmt: skip


def document_hash(document: str, seed: int) -> tuple[int, int, int]:
    """Three times 64 bits of a hash of (seed, text): the document's identity and place, and its split."""
    digest = hashlib.blake2b(document.encode(), digest_size=24, key=str(seed).encode()[:64]).digest()
    return tuple(int.from_bytes(digest[start : start + 8], "big") for start in (0, 8, 16))  # type: ignore[return-value]


def falls_to_valid(bits: int, fraction: float) -> bool:
    """Whether a document belongs to the held-out split, from the last of its three hashes."""
    return bits < fraction * 2.0**64


def bin_of(high: np.ndarray, bins: int) -> np.ndarray:
    """The bin of each document: int64, by the upper 32 bits of its hash."""
    return ((high >> np.uint64(32)) * np.uint64(bins) >> np.uint64(32)).astype(np.int64)


def lines_of_bin(index: np.ndarray, number: int, bins: int) -> np.ndarray:
    """A stretch of an index that is sorted by hash."""
    borders = [-(-(border << 32) // bins) << 32 for border in (number, number + 1)]
    first, end = (bisect_left(index, border, key=lambda line: int(line["high"])) for border in borders)
    return index[first:end]


@dataclass(frozen=True)
class Encode:
    """The first stage: piece by piece."""

    job: Job

    @cached_property
    def _reached(self) -> Reached:
        return Reached(self.job)

    def title(self, item: int) -> str:
        return self.job.pieces[item].title

    def __call__(self, item: int, rank: Rank) -> None:
        job, piece, start = self.job, self.job.pieces[item], time.monotonic()
        if self._reached.before(piece.source, item):
            return
        faults, cleaner = Faults(job.settings.on_error), Cleaner(job.settings.cleaning)
        read = read_bytes = 0

        def cleaned() -> Iterator[str]:
            nonlocal read, read_bytes
            for text in read_piece(piece, job.settings.form, faults):
                read += 1
                read_bytes += utf8_bytes(text)
                if (clean := cleaner(text)) is not None:
                    yield clean

        def rate() -> str:
            speed = read_bytes / 1e6 / max(time.monotonic() - start, 1e-9)
            return f"{encoder.documents:,} documents, {read_bytes / 1e6:,.1f} MB, {speed:.1f} MB/s"

        encoder, speak = _Encoder(job, item), start + PROGRESS_SECONDS
        with encoder.ids:  # a full disk must not leave it open
            for batch in batches(cleaned()):
                encoder.add(batch)
                rank.look_around()
                if encoder.is_full():
                    break
                if time.monotonic() > speak:
                    speak = time.monotonic() + PROGRESS_SECONDS
                    rank.log(f"rank {rank.name}: {piece.title}: {rate()}")
            encoder.close()
        facts = {
            "documents": encoder.documents, "tokens": encoder.tokens, "source": piece.source, "rank": rank.name,
            "read": read, "read_bytes": read_bytes, "seconds": time.monotonic() - start, "counts": cleaner.counts,
            "faults": faults.counts, "examples": faults.examples,
        }  # fmt: skip
        write_json(job.piece(item, ".json"), facts)
        rank.log(f"rank {rank.name}: piece {item + 1} of {len(job.pieces)} ({piece.title}): {rate()}")


def utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Lists of about BATCH_CHARS characters."""
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_CHARS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@lru_cache(maxsize=1)
def _loaded(state: str) -> Tokenizer:
    """Of what a tokenizer.json holds; made once for all pieces of a process."""
    return corpus_encoder(Tokenizer.from_str(state))


class _Encoder:
    """Documents in, files of a piece out."""

    def __init__(self, job: Job, item: int) -> None:
        self._job, self._item = job, item
        self._tokenizer = _loaded((job.work / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
        self._dtype = row_dtype(vocab_size(self._tokenizer))
        self._unknown = special_ids(self._tokenizer).unk
        self._sketcher = Sketcher() if job.settings.near_duplicates is not None else None
        self.ids = job.piece(item, ".ids.part").open("wb")
        self._written = self._run_bytes = 0
        self._run: list[np.ndarray] = []
        self._index: list[np.ndarray] = []
        self._lines: list[tuple[int, ...]] = []
        self._sketches: list[np.ndarray] = []
        self.documents = self.tokens = 0

    def add(self, texts: list[str]) -> None:
        seed, fraction = self._job.settings.seed, self._job.settings.valid_fraction
        if self._sketcher is not None:
            self._sketches.append(self._sketcher.sketch(texts))
        for text, ids in zip(texts, encode_documents(self._tokenizer, texts), strict=True):
            high, low, split = document_hash(text, seed)
            unknown, words = int(np.count_nonzero(ids == self._unknown)), len(text.split())
            valid = falls_to_valid(split, fraction)
            self._lines.append((high, low, 0, self.documents, len(ids), utf8_bytes(text), words, unknown, valid))
            self._run.append(ids.astype(self._dtype))
            self._run_bytes += self._run[-1].nbytes
            self.documents += 1
            self.tokens += len(ids)
        if self._run_bytes >= RUN_BYTES:
            self._flush()

    def is_full(self) -> bool:
        """Whether this piece alone reaches the source's limit."""
        limit = self._job.settings.limits[self._job.pieces[self._item].source]
        return is_reached(limit, (self.documents, self.tokens))

    def _flush(self) -> None:
        lines = np.array(self._lines, dtype=INDEX)
        order = np.argsort(bin_of(lines["high"], self._job.bins), kind="stable")
        lines = lines[order]
        lengths = lines["length"].astype(np.int64)
        lines["offset"] = self._written + np.cumsum(lengths) - lengths
        for place in order:
            self.ids.write(self._run[place].data)
        self._written += int(lengths.sum())
        self._index.append(lines)
        self._run, self._lines, self._run_bytes = [], [], 0

    def close(self) -> None:
        """Everything on disk under its name."""
        self._flush()
        self.ids.flush()
        os.fsync(self.ids.fileno())
        self.ids.close()
        job, item = self._job, self._item
        lines = np.concatenate(self._index)
        save_array(job.piece(item, ".index.npy"), lines[np.argsort(lines["high"], kind="stable")])
        if self._sketches:
            save_array(job.piece(item, ".sketch.npy"), np.concatenate(self._sketches))
        os.replace(job.piece(item, ".ids.part"), job.piece(item, ".ids"))
