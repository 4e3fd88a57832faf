"""A bin of documents to rows: all that have hashes of one range, so that equal documents meet in one bin.

The order within a bin is that of the hashes, which depend on the seed: the corpus is shuffled, and comes out the same
for any number of ranks.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from sctd.corpus.manifest import SPLITS, Shard
from sctd.corpus.prepare.encode import INDEX, lines_of_bin
from sctd.corpus.prepare.job import Job, read_json, write_json
from sctd.corpus.prepare.pack import Packer
from sctd.corpus.prepare.select import SELECTED
from sctd.corpus.prepare.team import Rank
from sctd.corpus.shards import row_dtype, save_array, write_shards
from sctd.corpus.tokenizer import SpecialIds, load_tokenizer, special_ids, vocab_size

LENGTH_BINS = 32  # of the histogram: documents of 2^i to 2^(i+1) - 1 tokens

_DOCUMENT = np.dtype([*INDEX.descr, ("piece", "<u4"), ("source", "<u2")])


@dataclass(frozen=True)
class Pack:
    """The second stage: bin by bin."""

    job: Job

    def title(self, item: int) -> str:
        return f"bin {item + 1} of {self.job.bins}"

    def __call__(self, item: int, rank: Rank) -> None:
        job = self.job
        tokenizer = load_tokenizer(str(job.work / "tokenizer"))
        special, vocabulary = special_ids(tokenizer), vocab_size(tokenizer)
        dtype = row_dtype(vocabulary)
        cuts = read_json(job.work / SELECTED)["cuts"]
        documents, counts = _without_twins(job, _of_bin(job, item, cuts))
        ids = _ids_of(job, documents, dtype)
        rank.look_around()
        token_counts = np.zeros(vocabulary, dtype=np.int64)
        facts: dict[str, Any] = {"left_out": counts, "lengths": _histogram(documents), "max_token_id": 0}
        facts["sources"] = {
            str(source): _totals(documents[documents["source"] == source]) for source in range(len(job.sources))
        }
        facts["rows"], rests = [], {}
        for source in range(len(job.sources)):
            for split in SPLITS:
                where = np.flatnonzero((documents["source"] == source) & (documents["valid"] == (split == "valid")))
                texts = [ids[place] for place in where]
                if texts:
                    flat = np.concatenate(texts)
                    facts["max_token_id"] = max(facts["max_token_id"], int(flat.max(initial=0)))
                    if split == "train":
                        token_counts += np.bincount(flat, minlength=vocabulary)
                for length in job.wanted.seq_lens:
                    packed, rest = pack_rows(job, f"{item:04d}", texts, (source, split, length), special, dtype)
                    facts["rows"].append({**packed, "unfinished_tokens": 0})  # they go on among the rests
                    rests[f"{source}-{split}-{length}"] = rest
        save_array(job.bin(item, ".counts.npy"), token_counts)
        _save_rests(job, item, rests, dtype)
        write_json(job.bin(item, ".json"), facts)
        rank.log(f"rank {rank.name}: {self.title(item)}: {len(documents):,} documents packed")


def pack_rows(
    job: Job,
    name: str,
    texts: list[np.ndarray],
    place: tuple[int, str, int],
    special: SpecialIds,
    dtype: np.dtype,
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Write the rows that documents fill, for one (source, split, length). Returns what was written, as JSON has it,
    and what is left of the documents in the row begun last."""
    source, split, length = place
    packer = Packer(length, special)
    rows, ends = packer.add(texts)
    shards = write_shards(job.work / "bins", f"{name}-{split}-{length}-{source}", rows, ends, dtype, source)
    closing = np.unique(ends[ends % length >= length - 2] // length)
    facts = {
        "source": source, "split": split, "length": length, "rows": len(rows), "special_rows": packer.special_rows,
        "cut_documents": len(rows) - len(closing), "unfinished_tokens": packer.unfinished_tokens,
        "shards": [_plain(shard) for shard in shards],
    }  # fmt: skip
    return facts, packer.rest()


def _plain(shard: Shard) -> dict[str, Any]:
    return {**vars(shard), "ends": vars(shard.ends)}


def _of_bin(job: Job, number: int, cuts: list[int | None]) -> np.ndarray:
    """The index lines of a bin from all pieces, limits applied, in the order of their hashes and then of reading."""
    parts = []
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
    documents = np.concatenate(parts) if parts else np.empty(0, dtype=_DOCUMENT)
    return documents[np.lexsort((documents["position"], documents["piece"], documents["low"], documents["high"]))]


def _without_twins(job: Job, documents: np.ndarray) -> tuple[np.ndarray, Counter[str]]:
    """Without copies of earlier documents, without near ones where those are looked for, and without empty ones."""
    counts: Counter[str] = Counter()
    first = np.ones(len(documents), dtype=bool)
    first[1:] = (documents["high"][1:] != documents["high"][:-1]) | (documents["low"][1:] != documents["low"][:-1])
    counts["exact_duplicates"] = int(np.count_nonzero(~first))
    documents = documents[first]
    if job.wanted.near_duplicates is not None and len(documents):
        near = np.zeros(len(documents), dtype=bool)
        for piece in np.unique(documents["piece"]):
            inside = documents["piece"] == piece
            near[inside] = np.load(job.piece(int(piece), ".twins.npy"))[documents["position"][inside]]
        counts["near_duplicates"] = int(np.count_nonzero(near))
        documents = documents[~near]
    empty = documents["length"] == 0
    counts["without_tokens"] = int(np.count_nonzero(empty))
    return documents[~empty], counts


def _ids_of(job: Job, documents: np.ndarray, dtype: np.dtype) -> list[np.ndarray]:
    """The ids of each document; a bin's stand together in each run, so that this reads stretches."""
    ids: list[np.ndarray] = [np.empty(0, dtype)] * len(documents)
    for piece in np.unique(documents["piece"]):
        inside = np.flatnonzero(documents["piece"] == piece)
        inside = inside[np.argsort(documents["offset"][inside])]
        with job.piece(int(piece), ".ids").open("rb") as stream:
            for place, offset, length in zip(
                inside.tolist(),
                documents["offset"][inside].tolist(),
                documents["length"][inside].tolist(),
                strict=True,
            ):
                if stream.tell() != offset * dtype.itemsize:
                    stream.seek(offset * dtype.itemsize)
                ids[place] = np.frombuffer(stream.read(length * dtype.itemsize), dtype)
    return ids


def _totals(documents: np.ndarray) -> dict[str, int]:
    sums = {name: int(documents[name].sum(dtype=np.int64)) for name in ("length", "bytes", "words", "unknown")}
    return {"documents": len(documents), **sums}


def _histogram(documents: np.ndarray) -> list[int]:
    exponents = np.frexp(documents["length"].astype(np.float64))[1] - 1
    return np.bincount(exponents, minlength=LENGTH_BINS).tolist()


def _save_rests(job: Job, item: int, rests: dict[str, list[np.ndarray]], dtype: np.dtype) -> None:
    """One file: the parts of documents end to end, and where each ends."""
    arrays: dict[str, np.ndarray] = {}
    for name, parts in rests.items():
        arrays[f"{name}-ids"] = np.concatenate(parts).astype(dtype) if parts else np.empty(0, dtype)
        arrays[f"{name}-ends"] = np.cumsum([len(part) for part in parts], dtype=np.int64)
    with job.bin(item, ".rests.npz").open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)


def load_rests(job: Job, item: int, source: int, split: str, length: int) -> list[np.ndarray]:
    """Parts of documents that did not fill a row of their bin."""
    with np.load(job.bin(item, ".rests.npz")) as arrays:
        name = f"{source}-{split}-{length}"
        return np.split(arrays[f"{name}-ids"], arrays[f"{name}-ends"][:-1]) if len(arrays[f"{name}-ends"]) else []
