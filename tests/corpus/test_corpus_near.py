"""Near duplicates: found by similarity, in a fixed order, the same in every process."""

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from sctd.corpus.prepare import near
from sctd.corpus.prepare.near import PERMUTATIONS, Sketcher, bands, check_threshold, duplicates, shingles
from sctd.errors import UserError
from support import environment

pytest.importorskip("datasketch", reason="the extra `near` is not installed")

RNG = np.random.default_rng(0)
WORDS = [f"word{number}" for number in range(2000)]


def text(count: int = 300) -> str:
    return " ".join(RNG.choice(WORDS, count))


def changed(document: str, places: int) -> str:
    words = document.split()
    for place in np.linspace(0, len(words) - 1, places).astype(int):
        words[place] = "other"
    return " ".join(words)


def similarity(one: str, two: str) -> float:
    a, b = set(shingles(one).tolist()), set(shingles(two).tolist())
    return len(a & b) / len(a | b)


def test_shingles() -> None:
    """One for each run of five words, told apart by its words and their order."""
    assert len(shingles("A b c d e F")) == 2 and shingles("A b c d e F")[1:] == shingles("b c\nD e f")
    for short in ("", "too short", "four words of it"):
        assert len(shingles(short)) == 1 and shingles(short).tolist() == shingles(f" {short.upper()} ").tolist()
    runs = ("a b c d e", "b a c d e", "a b c d f", "a b c d", "b c d e", "")
    assert len({int(shingles(run)[0]) for run in runs}) == len(runs)
    assert len(set(shingles(" ".join(WORDS)).tolist())) == len(WORDS) - 4


def test_sketches_estimate_the_similarity() -> None:
    one = text()
    for places in (2, 10, 30):
        two = changed(one, places)
        a, b = Sketcher().sketch([one, two])
        estimate = np.count_nonzero(a == b) / PERMUTATIONS
        assert abs(estimate - similarity(one, two)) < 0.15


def test_a_long_document_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts, with the same result."""
    long = text(100_000)
    sketcher = Sketcher()
    shingles(long)  # the hashes of words are remembered
    tracemalloc.start()
    found = sketcher.sketch([long])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
    monkeypatch.setattr(near, "_AT_ONCE", 10**6)
    assert np.array_equal(found, sketcher.sketch([long]))


def test_the_later_of_two_is_left_out() -> None:
    one, other = text(), text()
    documents = [one, other, changed(one, 3), changed(other, 100), one.upper()]
    sketches = Sketcher().sketch(documents)
    assert duplicates([sketches], 0.7).tolist() == [False, False, True, False, True]
    assert duplicates([sketches[::-1]], 0.7).tolist() == [False, False, True, False, True]
    for cut in (1, 2, 4):
        assert duplicates([sketches[:cut], sketches[cut:]], 0.7).tolist() == duplicates([sketches], 0.7).tolist()
    assert duplicates([], 0.7).tolist() == []


def test_only_what_stays_makes_others_leave() -> None:
    """A chain in which each is near to the one before, and far from the first."""
    chain = [text()]
    for _ in range(3):
        words = chain[-1].split()
        chain.append(" ".join(words[45:] + text(45).split()))
    sketches = Sketcher().sketch(chain)
    twins = duplicates([sketches], 0.63).tolist()
    assert twins[:3] == [False, True, False]


def test_other_processes_make_the_same_sketches() -> None:
    script = (
        "from sctd.corpus.prepare.near import Sketcher\n"
        "print(Sketcher().sketch(['a b c d e f g h', 'x y'])[:, :5].tolist())"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", script], env=environment() | {"PYTHONHASHSEED": seed}, text=True, check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert found[0] == found[1] == f"{Sketcher().sketch(['a b c d e f g h', 'x y'])[:, :5].tolist()}\n"


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.8, 0.9, 0.99, 1.0])
def test_pairs_at_the_threshold_and_above_are_found(threshold: float) -> None:
    count, length = bands(threshold)
    assert count >= 2 and count * length <= PERMUTATIONS
    for above, found in ((threshold, 0.9), ((1 + threshold) / 2, 0.99)):
        assert 1 - (1 - above**length) ** count >= found
    same = RNG.integers(0, 1 << 32, (1, PERMUTATIONS), dtype=np.uint32).repeat(2, axis=0)
    assert duplicates([same], threshold).tolist() == [False, True]
    same[1, :1] += np.uint32(1)
    assert duplicates([same], threshold).tolist() == [False, threshold < 0.993]


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.1, float("nan")])
def test_thresholds_that_are_no_similarity(threshold: float) -> None:
    with pytest.raises(UserError, match="above 0 and at most 1"):
        check_threshold(threshold)


def test_a_missing_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(UserError, match=r"pip install \"sctd\[near\]\""):
        near.check_threshold(0.8)
