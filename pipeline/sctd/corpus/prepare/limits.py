"""Between encoding and packing: where the limits cut, and which documents nearly repeat an earlier one."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from sctd.corpus.prepare import near
from sctd.corpus.prepare.job import Job
from sctd.corpus.prepare.rows import save_array
from sctd.corpus.prepare.settings import Limit
from sctd.files import read_json, write_json

Cuts = list[int | None]  # for each piece the number of its documents that are taken; None: all

CUTS = "cuts.json"


class Reached:
    """Where the finished pieces of each source reach its limit. Each piece is read once."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.taken = np.zeros((len(job.settings.limits), 2), dtype=np.int64)  # documents and tokens of each source
        self._next: dict[int, int] = {}  # piece of each source; those of a source stand together
        for number, piece in enumerate(job.pieces):
            self._next.setdefault(piece.source, number)

    def before(self, source: int, end: int) -> bool:
        """Whether the pieces of a source before piece `end` reach its limit; False where one is not finished yet."""
        limit, taken = self._job.settings.limits[source], self.taken[source]
        while limit != Limit() and self._next[source] < end and not is_reached(limit, taken):
            counts = _counts(self._job.piece(self._next[source], ".json"))
            if counts is None:
                return False
            taken += counts
            self._next[source] += 1
        return self._next[source] <= end and is_reached(limit, taken)


def is_reached(limit: Limit, taken: Iterable[int]) -> bool:
    """Whether so many (documents, tokens) are all that a source may give."""
    most = zip((limit.documents, limit.tokens), taken, strict=True)
    return any(allowed is not None and have >= allowed for allowed, have in most)


def _counts(path: Path) -> np.ndarray | None:
    """Documents and tokens of a finished piece."""
    if not path.is_file():
        return None
    facts = read_json(path)
    return np.array([facts["documents"], facts["tokens"]], dtype=np.int64)


def apply_limits(job: Job) -> Cuts:
    """How much of each piece is taken, also in `cuts.json`. Where near duplicates are looked for, writes `.twins.npy`
    beside each piece: bool, in reading order. Does nothing a second time."""
    path = job.work / CUTS
    if not path.is_file():
        cuts = _cuts(job)
        if job.settings.near_duplicates is not None:
            _mark_twins(job, cuts, job.settings.near_duplicates)
        write_json(path, cuts)
    return read_json(path)


def _cuts(job: Job) -> Cuts:
    cuts: Cuts = []
    reached = Reached(job)
    for number, piece in enumerate(job.pieces):
        if reached.before(piece.source, number):
            cuts.append(0)
            continue
        before = reached.taken[piece.source].copy()
        cuts.append(_fitting(job, number, before) if reached.before(piece.source, number + 1) else None)
    return cuts


def _fitting(job: Job, number: int, before: np.ndarray) -> int:
    """How many documents of a piece keep within what its source may still give."""
    limit = job.settings.limits[job.pieces[number].source]
    index = np.load(job.piece(number, ".index.npy"))
    lengths = index["length"][np.argsort(index["position"])].astype(np.int64)
    fits = len(lengths)
    if limit.tokens is not None:
        fits = int(np.searchsorted(np.cumsum(lengths), limit.tokens - before[1], side="right"))
    return fits if limit.documents is None else min(limit.documents - int(before[0]), fits)


def _mark_twins(job: Job, cuts: Cuts, threshold: float) -> None:
    sizes: list[int] = []

    def sketches() -> Iterator[np.ndarray]:
        for number, cut in enumerate(cuts):
            path = job.piece(number, ".sketch.npy")
            found = np.load(path)[:cut] if cut != 0 and path.is_file() else np.empty((0, near.PERMUTATIONS), np.uint32)
            sizes.append(len(found))
            yield found

    twins = near.duplicates(sketches(), threshold)
    for number, part in enumerate(np.split(twins, np.cumsum(sizes)[:-1])):
        save_array(job.piece(number, ".twins.npy"), part)
