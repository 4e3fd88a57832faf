"""Near duplicates, with the library datasketch: MinHash of word shingles, and locality-sensitive hashing to find
candidates (Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3)."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from sctd.errors import UserError

PERMUTATIONS = 128
SHINGLE_WORDS = 5
_SEED, _SCHEME = 1, "affine32"


def check_threshold(threshold: float) -> None:
    """UserError for what is no similarity, and where the library is missing."""
    if not 0.0 < threshold <= 1.0:
        raise UserError(f"--near-duplicates {threshold}: a Jaccard similarity is above 0 and at most 1, such as 0.8")
    _library()


def _library() -> Any:
    try:
        import datasketch
    except ImportError:
        raise UserError('--near-duplicates needs the library datasketch: pip install "sctd[near]"') from None
    return datasketch


class Sketcher:
    """MinHash sketches of documents, the same in every process."""

    def __init__(self) -> None:
        self._datasketch = _library()
        # Drawn once: drawing them costs more than the sketch of a short document.
        self._permutations = self._datasketch.MinHash(PERMUTATIONS, _SEED, scheme=_SCHEME).permutations

    def sketch(self, texts: Sequence[str]) -> np.ndarray:
        """uint32 (documents, PERMUTATIONS): the sketches of their sets of shingles of five lower-case words."""
        found = np.empty((len(texts), PERMUTATIONS), dtype=np.uint32)
        for row, text in enumerate(texts):
            sketch = self._datasketch.MinHash(
                PERMUTATIONS, _SEED, hashfunc=_hash32, permutations=self._permutations, scheme=_SCHEME
            )
            sketch.update_batch(shingles(text))
            found[row] = sketch.hashvalues
        return found


def shingles(text: str) -> list[bytes]:
    """The runs of five words of a text, each once; a shorter text is one shingle."""
    words = text.lower().split()
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return [run.encode() for run in {" ".join(words[start : start + SHINGLE_WORDS]) for start in range(last)}]


def _hash32(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little")


def duplicates(sketches: Iterable[np.ndarray], threshold: float) -> np.ndarray:
    """Which documents are left out: bool, one for each, in the given order.

    A document is left out where an earlier one that stays has an estimated Jaccard similarity of `threshold` or more
    to it. Candidates come from locality-sensitive hashing, which overlooks a few near the threshold.
    """
    datasketch = _library()
    index = datasketch.MinHashLSH(threshold=min(threshold, 0.99), num_perm=PERMUTATIONS)
    kept: dict[int, np.ndarray] = {}
    twins: list[bool] = []
    for block in sketches:
        for values in block:
            sketch = datasketch.LeanMinHash(seed=_SEED, hashvalues=values, scheme=_SCHEME)
            found = index.query(sketch)
            twin = any(np.count_nonzero(kept[key] == values) >= threshold * PERMUTATIONS for key in found)
            if not twin:
                kept[len(twins)] = values
                index.insert(len(twins), sketch)
            twins.append(twin)
    return np.array(twins, dtype=bool)
