"""The report on a corpus: all facts in it, nothing in it that a browser would run or fetch, equal bytes again."""

import json
from pathlib import Path
from typing import Any

import pytest

from pages import Reader, assert_stands_for_itself
from sctd.corpus.report import page, write_report

REASONS = ("blank", "too_short", "symbols", "faults", "exact_duplicates", "near_duplicates", "without_tokens",
           "beyond_limit")  # fmt: skip


def facts(**changes: Any) -> dict[str, Any]:
    """Of a corpus from three sources, made by four ranks."""
    lengths = [3, 12, 40, 155, 610, 2210, 7100, 20123, 61000, 90211, 71500, 33011, 8100, 1500, 220, 12]
    words = list(",.-()'\"&:;") + [
        "the",
        "of",
        "and",
        "in",
        "to",
        "a",
        "##s",
        "was",
        "is",
        "for",
        "as",
        "on",
        "by",
        "with",
        "he",
    ]
    return {
        "name": "wiki-books", "made": "2026-03-04T05:06:07+00:00", "versions": {"sctd": "0.1.0", "tokenizers": "0.22"},
        "seconds": 5025.3, "documents": 295_707, "tokens": 412_345_678, "words": 301_234_567,
        "text_bytes": 1_812_345_678, "tokens_per_word": 1.3688, "unknown_share": 0.000123, "unigram_entropy": 7.1234,
        "vocab_size": 30522, "read": {"documents": 321_002, "bytes": 1_999_888_777},
        "cleaned": {"nfc": 4321, "control": 12},
        "left_out": {key: {"documents": 3000 * n, "share": 3000 * n / 321_002} for n, key in enumerate(REASONS)},
        "rows": {
            "128": {"train": 3_240_111, "valid": 32_011, "special_rows": 2, "unfinished_tokens": 99,
                    "cut_documents": 2_911_000},
            "512": {"train": 801_222, "valid": 8_011, "special_rows": 0, "unfinished_tokens": 310,
                    "cut_documents": 511_000},
        },
        "length_histogram": {"edges": [2**n for n in range(len(lengths) + 1)], "documents": lengths},
        "additions": None,
        "top_tokens": [
            {"token": word, "id": 1000 + n, "count": 22_000_000 // (n + 1), "share": 0.053 / (n + 1)}
            for n, word in enumerate(2 * words)
        ],
        "sources": [
            {"name": "wiki", "spec": "data/wiki/*.jsonl.xz", "weight": 0.6, "documents": 250_000, "tokens": 280_000_000,
             "text_bytes": 1_200_000_000, "share": 0.679},
            {"name": "books", "spec": "data/books/*.parquet", "weight": 0.3, "documents": 40_000,
             "tokens": 120_000_000, "text_bytes": 560_000_000, "share": 0.291},
            {"name": "notes", "spec": "notes.txt", "weight": None, "documents": 5_707, "tokens": 12_345_678,
             "text_bytes": 52_345_678, "share": 0.030},
        ],
        "ranks": [
            {"name": f"{n} (node{1 + n // 2})", "pieces": 8 - n % 2, "text_bytes": 500_000_000 - n * 9_000_000,
             "seconds": 1200.0 + n, "mb_per_s": 0.41 - 0.01 * n}
            for n in range(4)
        ],
        "stages": [{"name": "encode", "seconds": 4300.2}, {"name": "select", "seconds": 25.1},
                   {"name": "pack", "seconds": 700.0}],
        "fault_examples": ["data/wiki/a.jsonl.xz, line 17: not valid JSON (Expecting value)"],
        "settings": {"seed": 1, "seq_lens": [128, 512], "sources": [{"spec": "a", "files": [["f" * 99, 1, 2]] * 9}]},
    } | changes  # fmt: skip


def test_both_files_are_written_and_the_same_again(tmp_path: Path) -> None:
    given = facts()
    write_report(tmp_path, given)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == given
    first = (tmp_path / "report.html").read_bytes()
    write_report(tmp_path, given)
    assert (tmp_path / "report.html").read_bytes() == first


def test_the_page_stands_for_itself() -> None:
    assert_stands_for_itself(page(facts()))


def test_the_figures_are_there() -> None:
    said = " ".join(Reader(page(facts())).said)
    for expected in (
        "Corpus wiki-books", "412,345,678", "412 million", "1.369", "0.012 %", "7.123 nats", "1,241", "3,240,111",
        "32,011", "1 h 24 min", "too many symbols", "6,000", "data/books/*.parquet", "67.90 %",
        "2026-03-04 05:06:07 UTC", "3 (node2)", "line 17", "all of it in report.json",
    ):  # fmt: skip
        assert expected in said, expected
    assert Reader(page(facts())).tags.count("svg") == 6


def test_text_is_text() -> None:
    bad = "<script>alert('&')</script>"
    sources = [{**source, "name": f"{bad}{n}", "spec": bad} for n, source in enumerate(facts()["sources"])]
    ranks = [{**rank, "name": bad} for rank in facts()["ranks"]]
    tokens = [{"token": token, "id": 5, "count": 9, "share": 0.5} for token in (bad, "$x$", "$\\frac", "語", "&", "ل")]
    text = page(
        facts(name=bad, sources=sources, ranks=ranks, top_tokens=tokens, fault_examples=[bad], settings={bad: bad})
    )
    reader = Reader(text)
    assert "script" not in reader.tags
    said = " ".join(reader.said)
    assert "$x$" in said and "$\\frac" in said and said.count(bad) >= 10
    assert said.count("語") == said.count("ل") == 2, "in the picture and in the table"


def test_what_is_no_text_can_be_written(tmp_path: Path) -> None:
    """A file name's bytes that are not UTF-8 come as lone surrogates."""
    sources = [{**source, "name": "bad\udcff\x00", "spec": "bad\udcff\n.txt"} for source in facts()["sources"]]
    write_report(tmp_path, facts(sources=sources, fault_examples=["bad\udcff.txt: \x1b[31m"]))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "bad\ufffd.txt" in text and "\x1b" not in text and "\x00" not in text


@pytest.mark.parametrize("ranks", [1, 300])
def test_few_facts_and_many_ranks(ranks: int) -> None:
    nothing = {key: {"documents": 0, "share": 0.0} for key in REASONS}
    small = facts(
        left_out=nothing, fault_examples=[], sources=facts()["sources"][:1], seconds=0.2, stages=[],
        ranks=[{**facts()["ranks"][0], "name": str(n)} for n in range(ranks)],
        length_histogram={"edges": [1, 2], "documents": [7]}, top_tokens=[],
    )  # fmt: skip
    said = " ".join(Reader(page(small)).said)
    assert "every document that was read is in the corpus" in said and "the source wiki" in said and "0.2 s" in said
    assert said.count("MB of text a second") == 1
