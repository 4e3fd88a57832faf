"""Cleaning: what is changed, what is left out, in many scripts."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sctd.corpus.sources.clean import Cleaner, Cleaning, symbol_share
from sctd.errors import UserError


def cleaned(text: str, **floor: float) -> tuple[str | None, dict[str, int]]:
    cleaner = Cleaner(Cleaning(**floor))  # type: ignore[arg-type]
    return cleaner(text), dict(cleaner.counts)


@pytest.mark.parametrize(
    ("raw", "expected", "counts"),
    [
        ("plain text\n\twith a tab", "plain text\n\twith a tab", {}),
        ("  outer \n", "outer", {}),
        ("cafe\u0301", "caf\u00e9", {"nfc": 1}),
        ("bell\x07 and nul\x00", "bell and nul", {"control": 1}),
        ("a\r\nb\rc", "a\nb\nc", {"control": 1}),
        ("\ufeffmark", "mark", {"control": 1}),
        ("c1 \x85\x9f", "c1", {"control": 1}),
        ("one page\x0cthe next\x85line", "one page\nthe next\nline", {"control": 1}),
        ("e\x00\u0301", "\u00e9", {"control": 1, "nfc": 1}),
        ("lost \ufffd, \u200djoined", "lost \ufffd, \u200djoined", {}),
        (" \n\t", None, {"blank": 1}),
        ("\x00\x01", None, {"control": 1, "blank": 1}),
    ],
)
def test_what_is_changed(raw: str, expected: str | None, counts: dict[str, int]) -> None:
    assert cleaned(raw) == (expected, counts)


@given(st.text())
def test_the_result_is_clean_and_stays_as_it_is(text: str) -> None:
    found, _ = cleaned(text)
    if found is None:
        assert all(char.isspace() or unicodedata.category(char)[0] == "C" for char in text)
        return
    assert cleaned(found) == (found, {}) and found == found.strip()
    assert not any(unicodedata.category(char) == "Cc" and char not in "\n\t" for char in found)


def test_the_floor_of_length() -> None:
    assert cleaned("12345", min_characters=5) == ("12345", {})
    assert cleaned(" 1234 ", min_characters=5) == (None, {"too_short": 1})


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("all letters", 0.0),
        ("日本語のテキスト", 0.0),
        ("हिन्दी में", 0.0),  # vowel signs are marks
        ("اللُّغَة العربية", 0.0),
        ("a.b.", 0.5),
        ("....", 1.0),
        ("ab 😀", 0.25),
    ],
)
def test_symbols_in_many_scripts(text: str, share: float) -> None:
    assert symbol_share(text) == share
    assert cleaned(text, max_symbols=0.4)[0] == (text if share <= 0.4 else None)


@pytest.mark.parametrize("floor", [Cleaning(min_characters=-1), Cleaning(max_symbols=1.1), Cleaning(max_symbols=-0.1)])
def test_floors_that_mean_nothing(floor: Cleaning) -> None:
    with pytest.raises(UserError, match="--m"):
        floor.check()
