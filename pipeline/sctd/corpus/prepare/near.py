"""Near duplicates, with the library datasketch: MinHash of word shingles, and locality-sensitive hashing to find
candidates (Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3)."""

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from sctd.errors import UserError

PERMUTATIONS = 128
SHINGLE_WORDS = 5
_SEED, _SCHEME = 1, "affine32"
_ODD = np.uint64(0x9E3779B97F4A7C15)
_AT_ONCE = 1 << 13  # shingles; each takes 1 kB while it is hashed
_KNOWN_WORDS = 1 << 18  # whose hashes are remembered
_FOUND = 0.9  # of the pairs that are just similar enough; of nearer ones more


def check_threshold(threshold: float) -> None:
    """UserError unless it is a similarity and the library is installed."""
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
                PERMUTATIONS, _SEED, hashfunc=int, permutations=self._permutations, scheme=_SCHEME
            )
            runs = shingles(text)
            for start in range(0, len(runs), _AT_ONCE):
                sketch.update_batch(runs[start : start + _AT_ONCE].tolist())
            found[row] = sketch.hashvalues
        return found


def shingles(text: str) -> np.ndarray:
    """uint32: a hash of each run of five words; a shorter text is one run. Words lie between white space, so that a
    script without spaces is compared by whole lines or more."""
    words = np.array([_hash(word) for word in text.lower().split()], dtype=np.uint64)
    runs = max(1, len(words) - SHINGLE_WORDS + 1)
    mixed = np.zeros(runs, dtype=np.uint64)
    for first in range(min(SHINGLE_WORDS, len(words))):
        mixed = mixed * _ODD + words[first : first + runs]  # modulo 2^64
    return (mixed >> np.uint64(32)).astype(np.uint32)


@lru_cache(_KNOWN_WORDS)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def duplicates(sketches: Iterable[np.ndarray], threshold: float) -> np.ndarray:
    """Which documents are left out: bool, one for each, in the given order.

    A document is left out where an earlier one that stays has an estimated Jaccard similarity of `threshold` or more
    to it. Candidates come from locality-sensitive hashing, which overlooks a few near the threshold; the estimate from
    their sketches decides.
    """
    datasketch = _library()
    index = datasketch.MinHashLSH(num_perm=PERMUTATIONS, params=bands(threshold))
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


def bands(threshold: float) -> tuple[int, int]:
    """How many bands of how many values: the longest, so the fewest false candidates, that share one whole band in at
    least _FOUND of the pairs of this similarity."""
    longest = 1
    for length in range(1, PERMUTATIONS // 2 + 1):
        if 1.0 - (1.0 - threshold**length) ** (PERMUTATIONS // length) >= _FOUND:
            longest = length
    return PERMUTATIONS // longest, longest
