"""A bin of documents to rows: all that have hashes of one range, so that equal documents meet in one bin.

The order within a bin is that of the hashes, which depend on the seed: the corpus is shuffled, and comes out the same
for any number of ranks.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

from sctd.corpus.manifest import SPLITS
from sctd.corpus.prepare.encode import INDEX, lines_of_bin
from sctd.corpus.prepare.job import Job
from sctd.corpus.prepare.limits import Cuts
from sctd.corpus.prepare.rows import Packer, row_dtype, write_shards
from sctd.corpus.prepare.team import Rank
from sctd.corpus.tokenizer import SpecialIds, load_tokenizer, special_ids, vocab_size
from sctd.files import sync, write_json

LENGTH_BINS = 32  # of the histogram: documents of 2^i to 2^(i+1) - 1 tokens

_DOCUMENT = np.dtype([*INDEX.descr, ("piece", "<u4"), ("source", "<u2")])


@dataclass(frozen=True)
class Pack:
    """The second stage: bin by bin."""

    job: Job
    cuts: Cuts

    def title(self, item: int) -> str:
        return f"bin {item + 1} of {self.job.bins}"

    def __call__(self, item: int, rank: Rank) -> None:
        job = self.job
        tokenizer = load_tokenizer(str(job.work / "tokenizer"))
        vocabulary, dtype = vocab_size(tokenizer), row_dtype(vocab_size(tokenizer))
        documents, left_out = _without_copies(job, _of_bin(job, item, self.cuts))
        ids = _ids_of(job, documents, dtype)
        rank.look_around()
        sources = range(len(job.settings.sources))
        # What publishing adds up over the bins, and below the parts of documents that do not fill a row.
        arrays = {
            "tokens": np.zeros((len(SPLITS), vocabulary), dtype=np.int64),
            "lengths": np.bincount(np.frexp(documents["length"].astype(np.float64))[1] - 1, minlength=LENGTH_BINS),
            "sources": np.array([_totals(documents[documents["source"] == source]) for source in sources]),
        }
        packed = []
        for source, split in product(sources, SPLITS):
            where = np.flatnonzero((documents["source"] == source) & (documents["valid"] == (split == "valid")))
            texts = [ids[place] for place in where]
            if texts:
                arrays["tokens"][SPLITS.index(split)] += np.bincount(np.concatenate(texts), minlength=vocabulary)
            for length in job.settings.seq_lens:
                place = (source, split, length)
                facts, rest = pack_rows(job, f"{item:04d}", texts, place, special_ids(tokenizer), dtype)
                packed.append({**facts, "unfinished_tokens": 0})  # they continue among the rests
                arrays[_rest(place)] = np.concatenate(rest).astype(dtype) if rest else np.empty(0, dtype)
                arrays[f"{_rest(place)}-ends"] = np.cumsum([len(part) for part in rest], dtype=np.int64)
        with job.bin(item, ".npz").open("wb") as stream:
            np.savez(stream, allow_pickle=False, **arrays)
        sync(job.bin(item, ".npz"))
        write_json(job.bin(item, ".json"), {"left_out": left_out, "rows": packed})
        rank.log(f"rank {rank.name}: {self.title(item)}: {len(documents):,} documents packed")


def pack_rows(
    job: Job,
    name: str,
    texts: list[np.ndarray],
    place: tuple[int, str, int],
    special: SpecialIds,
    dtype: np.dtype,
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Write the rows that documents fill, for one place (source, split, length). Returns what was written, as JSON has
    it, and what is left of the documents in the row begun last."""
    source, split, length = place
    packer = Packer(length, special)
    rows, ends = packer.add(texts)
    shards = write_shards(job.work / "bins", f"{name}-{split}-{length}-{source}", rows, ends, dtype, source)
    closing = np.unique(ends[ends % length >= length - 2] // length)
    facts = {
        "source": source, "split": split, "length": length, "special_rows": packer.special_rows,
        "cut_documents": len(rows) - len(closing), "unfinished_tokens": packer.unfinished_tokens,
        "shards": [asdict(shard) for shard in shards],
    }  # fmt: skip
    return facts, packer.rest()


def pack_rests(job: Job, special: SpecialIds, dtype: np.dtype) -> Iterator[dict[str, Any]]:
    """The rows that the rests of all bins fill, written like those of a bin."""
    for place in product(range(len(job.settings.sources)), SPLITS, job.settings.seq_lens):
        parts: list[np.ndarray] = []
        for number in range(job.bins):
            with np.load(job.bin(number, ".npz")) as arrays:
                ends = arrays[f"{_rest(place)}-ends"]
                parts += np.split(arrays[_rest(place)], ends[:-1]) if len(ends) else []
        yield pack_rows(job, "rest", parts, place, special, dtype)[0]


def _rest(place: tuple[int, str, int]) -> str:
    return "rest-{}-{}-{}".format(*place)


def _of_bin(job: Job, number: int, cuts: Cuts) -> np.ndarray:
    """The index lines of a bin from all pieces, limits applied, in the order of their hashes and then of reading."""
    parts = [np.empty(0, dtype=_DOCUMENT)]
    for piece, cut in enumerate(cuts):
        if cut == 0:
            continue
        lines = lines_of_bin(np.load(job.piece(piece, ".index.npy"), mmap_mode="r"), number, job.bins)
        if cut is not None:
            lines = lines[lines["position"] < cut]
        part = np.empty(len(lines), dtype=_DOCUMENT)
        for name in INDEX.names or ():
            part[name] = lines[name]
        part["piece"], part["source"] = piece, job.pieces[piece].source
        parts.append(part)
    documents = np.concatenate(parts)
    return documents[np.lexsort((documents["position"], documents["piece"], documents["low"], documents["high"]))]


def _without_copies(job: Job, documents: np.ndarray) -> tuple[np.ndarray, Counter[str]]:
    """Without copies of earlier documents, without near ones where those are looked for, and without empty ones; and
    how many of each were left out."""
    counts: Counter[str] = Counter()

    def drop(reason: str, which: np.ndarray) -> None:
        nonlocal documents
        counts[reason] = int(np.count_nonzero(which))
        documents = documents[~which]

    hashes = documents[["high", "low"]]
    drop("exact_duplicates", np.concatenate([[False], hashes[1:] == hashes[:-1]])[: len(documents)])
    if job.settings.near_duplicates is not None:
        near = np.zeros(len(documents), dtype=bool)
        for piece in np.unique(documents["piece"]):
            inside = documents["piece"] == piece
            near[inside] = np.load(job.piece(int(piece), ".twins.npy"))[documents["position"][inside]]
        drop("near_duplicates", near)
    drop("without_tokens", documents["length"] == 0)
    return documents, counts


def _ids_of(job: Job, documents: np.ndarray, dtype: np.dtype) -> list[np.ndarray]:
    """The ids of each document; a bin's stand together in each run, so that this reads stretches."""
    ids: list[np.ndarray] = [np.empty(0, dtype)] * len(documents)
    for piece in np.unique(documents["piece"]):
        inside = np.flatnonzero(documents["piece"] == piece)
        with job.piece(int(piece), ".ids").open("rb") as stream:
            for place in inside[np.argsort(documents["offset"][inside])].tolist():
                offset, length = (int(documents[name][place]) * dtype.itemsize for name in ("offset", "length"))
                stream.seek(offset)
                ids[place] = np.frombuffer(stream.read(length), dtype)
    return ids


def _totals(documents: np.ndarray) -> list[int]:
    """Documents, bytes, tokens, words, unknown tokens."""
    names = ("bytes", "length", "words", "unknown")
    return [len(documents), *(int(documents[name].sum(dtype=np.int64)) for name in names)]
