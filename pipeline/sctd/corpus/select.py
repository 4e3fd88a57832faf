"""Between encoding and packing: where the limits cut, and which documents are nearly another's twin."""

from collections.abc import Iterator

import numpy as np

from sctd.corpus.job import Job, read_json, write_json
from sctd.corpus.shards import save_array

SELECTED = "select.json"


def skipped(job: Job) -> list[int]:
    """Pieces that no limit lets in any more, as far as finished pieces tell."""
    return [number for number, cut in enumerate(_cuts(job)) if cut == 0]


def select(job: Job) -> None:
    """Write `select.json`: for each piece the number of its documents that are taken, None for all; and where near
    duplicates are looked for, `.twins.npy` beside each piece: bool, in reading order."""
    cuts = _cuts(job)
    if job.wanted.near_duplicates is not None:
        _mark_twins(job, cuts)
    write_json(job.work / SELECTED, {"cuts": cuts})


def _cuts(job: Job) -> list[int | None]:
    """How many documents of each piece are taken, in the order of reading."""
    cuts: list[int | None] = [None] * len(job.pieces)
    taken: dict[int, list[int]] = {}  # source: documents, tokens
    for number, piece in enumerate(job.pieces):
        limit = job.limit(piece.source)
        if limit.documents is None and limit.tokens is None:
            continue
        documents, tokens = taken.setdefault(piece.source, [0, 0])
        room = [
            None if most is None else max(0, most - have)
            for most, have in ((limit.documents, documents), (limit.tokens, tokens))
        ]
        if 0 in room:
            cuts[number] = 0
            continue
        if not job.piece(number, ".json").is_file():
            taken[piece.source] = [-(1 << 60), -(1 << 60)]  # what follows cannot be known yet
            continue
        facts = read_json(job.piece(number, ".json"))
        here = [facts["documents"], facts["tokens"]]
        if any(most is not None and have > most for most, have in zip(room, here, strict=True)):
            cuts[number] = _fitting(job, number, *room)
            taken[piece.source] = [1 << 60, 1 << 60]
        else:
            taken[piece.source] = [documents + here[0], tokens + here[1]]
    return cuts


def _fitting(job: Job, number: int, documents: int | None, tokens: int | None) -> int:
    """So many documents of a piece keep within what is left."""
    index = np.load(job.piece(number, ".index.npy"))
    lengths = index["length"][np.argsort(index["position"])].astype(np.int64)
    fits = len(lengths) if tokens is None else int(np.searchsorted(np.cumsum(lengths), tokens, side="right"))
    return fits if documents is None else min(documents, fits)


def _mark_twins(job: Job, cuts: list[int | None]) -> None:
    from sctd.corpus.near import duplicates

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
