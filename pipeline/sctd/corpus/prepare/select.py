"""Between encoding and packing: where the limits cut, and which documents are nearly another's twin."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sctd.corpus.prepare.job import Job, Limit, read_json, write_json
from sctd.corpus.shards import save_array

SELECTED = "select.json"


class Reached:
    """Where the pieces of each source, as far as they are finished in a row, reach its limit. Each is read once."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._taken = np.zeros((len(job.sources), 2), dtype=np.int64)
        self._next: dict[int, int] = {}  # piece of each source; those of a source stand together
        for number, piece in enumerate(job.pieces):
            self._next.setdefault(piece.source, number)

    def before(self, number: int) -> bool:
        """Whether the pieces before this one have reached the limit of their source."""
        job, source = self._job, self._job.pieces[number].source
        limit, taken = job.limits[source], self._taken[source]
        while limit != Limit() and self._next[source] < number and not _is_reached(limit, taken):
            counts = _counts(job.piece(self._next[source], ".json"))
            if counts is None:
                return False
            taken += counts
            self._next[source] += 1
        return self._next[source] <= number and _is_reached(limit, taken)


def _is_reached(limit: Limit, taken: np.ndarray) -> bool:
    most = zip((limit.documents, limit.tokens), taken, strict=True)
    return any(allowed is not None and have >= allowed for allowed, have in most)


def _counts(path: Path) -> np.ndarray | None:
    """Documents and tokens of a finished piece."""
    try:
        facts = read_json(path)
    except FileNotFoundError:
        return None
    return np.array([facts["documents"], facts["tokens"]], dtype=np.int64)


def select(job: Job) -> None:
    """Write `select.json`: for each piece the number of its documents that are taken, None for all; and where near
    duplicates are looked for, `.twins.npy` beside each piece: bool, in reading order."""
    cuts = _cuts(job)
    if job.wanted.near_duplicates is not None:
        _mark_twins(job, cuts)
    write_json(job.work / SELECTED, {"cuts": cuts})


def _cuts(job: Job) -> list[int | None]:
    """How many documents of each piece are taken, in the order of reading; None for all."""
    cuts: list[int | None] = []
    taken = np.zeros((len(job.sources), 2), dtype=np.int64)
    for number, piece in enumerate(job.pieces):
        limit, before = job.limits[piece.source], taken[piece.source].copy()
        if _is_reached(limit, before):
            cuts.append(0)
            continue
        counts = _counts(job.piece(number, ".json"))
        assert counts is not None, "a piece that no limit keeps out is finished"
        taken[piece.source] += counts
        beyond = _is_reached(limit, taken[piece.source])
        cuts.append(_fitting(job, number, limit, before) if beyond else None)
    return cuts


def _fitting(job: Job, number: int, limit: Limit, before: np.ndarray) -> int:
    """So many documents of a piece keep within what is left."""
    index = np.load(job.piece(number, ".index.npy"))
    lengths = index["length"][np.argsort(index["position"])].astype(np.int64)
    fits = len(lengths)
    if limit.tokens is not None:
        fits = int(np.searchsorted(np.cumsum(lengths), limit.tokens - before[1], side="right"))
    return fits if limit.documents is None else min(limit.documents - int(before[0]), fits)


def _mark_twins(job: Job, cuts: list[int | None]) -> None:
    from sctd.corpus.prepare.near import duplicates

    sizes: list[int] = []

    def sketches() -> Iterator[np.ndarray]:
        for number, cut in enumerate(cuts):
            path = job.piece(number, ".sketch.npy")
            found = np.load(path)[:cut] if cut != 0 and path.is_file() else None
            sizes.append(0 if found is None else len(found))
            if found is not None and len(found):
                yield found

    assert job.wanted.near_duplicates is not None
    twins = duplicates(sketches(), job.wanted.near_duplicates)
    for number, part in enumerate(np.split(twins, np.cumsum(sizes)[:-1])):
        save_array(job.piece(number, ".twins.npy"), part)
