"""Packing against a slow, obvious oracle."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sctd.corpus.pack import Packer, is_special, pack
from sctd.corpus.tokenizer import SpecialIds

SPECIAL = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)
DOCUMENTS = st.lists(st.lists(st.integers(0, 30) | st.integers(5, 30), max_size=40), max_size=30)


def oracle(documents: list[list[int]], seq_len: int) -> tuple[list[list[int]], int]:
    """All rows, one id after the other, and the number of ids left in the begun one."""
    rows, row = [], [SPECIAL.cls]
    for document in documents:
        if not document:
            continue
        for index in document:
            if len(row) == seq_len - 1:
                rows.append([*row, SPECIAL.sep])
                row = [SPECIAL.cls]
            row.append(index)
        row.append(SPECIAL.sep)
        if len(row) == seq_len - 1:
            row.append(SPECIAL.sep)
        if len(row) == seq_len:
            rows.append(row)
            row = [SPECIAL.cls]
    # A payload that is full but not yet closed waits for its separator, which always comes with the document's end.
    return rows, len(row) - 1


def enough(row: list[int]) -> bool:
    return 2 * sum(index not in SPECIAL.all for index in row) >= len(row)


@settings(max_examples=300, deadline=None)
@given(documents=DOCUMENTS, seq_len=st.integers(8, 24), chunk=st.integers(1, 7))
def test_rows_are_those_of_the_oracle(documents: list[list[int]], seq_len: int, chunk: int) -> None:
    expected, unfinished = oracle(documents, seq_len)
    got = list(pack(documents, seq_len, SPECIAL, chunk))
    assert [row.tolist() for row in got] == [row for row in expected if enough(row)]
    packer = Packer(seq_len, SPECIAL)
    rows = packer.add(documents)
    assert rows.shape == (len(got), seq_len) and rows.dtype == np.int32
    assert packer.special_rows == sum(not enough(row) for row in expected)
    assert packer.unfinished_tokens == unfinished
    assert packer.empty_documents == sum(not document for document in documents)


@settings(max_examples=100, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(5, 30), min_size=1, max_size=40), max_size=30), seq_len=st.integers(8, 24)
)
def test_no_token_is_lost_added_or_moved(documents: list[list[int]], seq_len: int) -> None:
    packer = Packer(seq_len, SPECIAL)
    rows = packer.add(documents)
    assert (rows[:, 0] == SPECIAL.cls).all() and (rows[:, -1] == SPECIAL.sep).all() and not (rows == SPECIAL.pad).any()
    assert (is_special(rows, SPECIAL) == np.isin(rows, SPECIAL.all)).all()
    if not packer.special_rows:
        kept = rows[~is_special(rows, SPECIAL)].tolist()
        flat = [index for document in documents for index in document]
        assert kept == flat[: len(kept)] and len(flat) - len(kept) <= packer.unfinished_tokens


def test_a_row_by_hand() -> None:
    rows = [row.tolist() for row in pack([[5, 6, 7], [8] * 9], 8, SPECIAL)]
    assert rows == [[2, 5, 6, 7, 3, 8, 8, 3], [2, 8, 8, 8, 8, 8, 8, 3]]


def test_document_that_ends_with_the_payload_gets_one_separator() -> None:
    assert [row.tolist() for row in pack([[5] * 6, [6] * 6], 8, SPECIAL)] == [[2, *[5] * 6, 3], [2, *[6] * 6, 3]]


def test_rows_of_special_ids_are_dropped_and_counted() -> None:
    packer = Packer(8, SPECIAL)
    assert packer.add([[1] * 6, [5, 5, 5, 1, 1, 1], [5, 5, 5, 5, 1, 1]]).tolist() == [[2, 5, 5, 5, 5, 1, 1, 3]]
    assert packer.special_rows == 2


def test_nothing_in_nothing_out() -> None:
    packer = Packer(8, SPECIAL)
    assert packer.add([]).shape == (0, 8) and packer.add([[]]).shape == (0, 8)
    assert list(pack([], 8, SPECIAL)) == []


def test_too_short_a_row_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        Packer(3, SPECIAL)
