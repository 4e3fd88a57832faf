"""Packing against a slow, obvious oracle."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sctd.corpus.prepare.rows import Packer
from sctd.corpus.tokenizer import SpecialIds

SPECIAL = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)
DOCUMENTS = st.lists(st.lists(st.integers(0, 30) | st.integers(5, 30), max_size=40), max_size=30)


def oracle(documents: list[list[int]], seq_len: int) -> tuple[list[tuple[list[int], list[int]]], int]:
    """All rows, one id after the other, each with the positions where documents end, and the ids left in the begun
    one."""
    rows, row, ends = [], [SPECIAL.cls], []
    for document in documents:
        if not document:
            continue
        for index in document:
            if len(row) == seq_len - 1:
                rows.append(([*row, SPECIAL.sep], ends))
                row, ends = [SPECIAL.cls], []
            row.append(index)
        row.append(SPECIAL.sep)
        ends.append(len(row) - 1)
        if len(row) == seq_len - 1:
            row.append(SPECIAL.sep)
        if len(row) == seq_len:
            rows.append((row, ends))
            row, ends = [SPECIAL.cls], []
    # A payload that is full but not yet closed waits for its separator, which always comes with the document's end.
    return rows, len(row) - 1


def enough(row: list[int]) -> bool:
    return 2 * sum(index not in SPECIAL.all for index in row) >= len(row)


@settings(max_examples=300, deadline=None)
@given(documents=DOCUMENTS, seq_len=st.integers(8, 24), chunk=st.integers(1, 7))
def test_rows_and_ends_are_those_of_the_oracle(documents: list[list[int]], seq_len: int, chunk: int) -> None:
    everything, unfinished = oracle(documents, seq_len)
    expected = [(row, ends) for row, ends in everything if enough(row)]
    packer, got = Packer(seq_len, SPECIAL), []
    for start in range(0, len(documents), chunk):
        rows, ends = packer.add(documents[start : start + chunk])
        assert rows.dtype == np.int32 and rows.shape[1] == seq_len and ends.dtype == np.int64
        got += [(row.tolist(), (ends[ends // seq_len == n] % seq_len).tolist()) for n, row in enumerate(rows)]
    assert got == expected
    assert packer.special_rows == len(everything) - len(expected)
    assert packer.unfinished_tokens == unfinished


@settings(max_examples=100, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(5, 30), min_size=1, max_size=40), max_size=30), seq_len=st.integers(8, 24)
)
def test_no_token_is_lost_added_or_moved(documents: list[list[int]], seq_len: int) -> None:
    packer = Packer(seq_len, SPECIAL)
    rows, _ = packer.add(documents)
    assert (rows[:, 0] == SPECIAL.cls).all() and (rows[:, -1] == SPECIAL.sep).all() and not (rows == SPECIAL.pad).any()
    if not packer.special_rows:
        kept = rows[~np.isin(rows, SPECIAL.all)].tolist()
        left = [index for part in packer.rest() for index in part.tolist()]
        assert kept + left == [index for document in documents for index in document]


def test_a_row_by_hand() -> None:
    packer = Packer(8, SPECIAL)
    rows, ends = packer.add([[5, 6, 7], [8] * 9])
    assert rows.tolist() == [[2, 5, 6, 7, 3, 8, 8, 3], [2, 8, 8, 8, 8, 8, 8, 3]] and ends.tolist() == [4]
    assert [part.tolist() for part in packer.rest()] == [[8]]


def test_document_that_ends_with_the_payload_gets_one_separator() -> None:
    rows, ends = Packer(8, SPECIAL).add([[5] * 6, [6] * 6])
    assert rows.tolist() == [[2, *[5] * 6, 3], [2, *[6] * 6, 3]] and ends.tolist() == [7, 15]


def test_rows_of_special_ids_are_dropped_and_counted() -> None:
    packer = Packer(8, SPECIAL)
    rows, ends = packer.add([[1] * 6, [5, 5, 5, 1, 1, 1], [5, 5, 5, 5, 1, 1]])
    assert rows.tolist() == [[2, 5, 5, 5, 5, 1, 1, 3]] and ends.tolist() == [7]
    assert packer.special_rows == 2


def test_nothing_in_nothing_out() -> None:
    packer = Packer(8, SPECIAL)
    for documents in ([], [[]]):
        rows, ends = packer.add(documents)
        assert rows.shape == (0, 8) and ends.shape == (0,)
    assert packer.rest() == []


def test_too_short_a_row_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        Packer(3, SPECIAL)
