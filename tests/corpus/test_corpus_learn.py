"""`sctd train-tokenizer`: what it writes, from which sample, and every refusal."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from sctd.corpus.prepare import learn as module
from sctd.corpus.prepare.learn import learn, sample
from sctd.corpus.sources.source import Faults, Form, parse_sources, plan_pieces, read_documents
from sctd.corpus.tokenizer import load_tokenizer, special_ids, tokenizer_hash, vocab_size
from sctd.errors import UserError
from texts import documents, write


def run(sources: list[str], out: Path, size: int = 300, lowercase: bool = True, **changes: Any) -> list[str]:
    lines: list[str] = []
    options = {"sample_bytes": 10**9, "seed": 1, "form": Form(), "on_error": "stop", "log": lines.append, **changes}
    learn(sources, out, size, lowercase, **options)
    return lines


@pytest.fixture
def source(tmp_path: Path) -> str:
    texts = [f"{text} The Café of Łódź is [MASK] and [CLS] open." for text in documents(300)]
    return write(tmp_path / "data.jsonl", texts)


@pytest.mark.parametrize("lowercase", [True, False])
def test_the_folder_is_a_transformers_tokenizer(tmp_path: Path, source: str, lowercase: bool) -> None:
    (line,) = run([source], tmp_path / "out", lowercase=lowercase)
    assert "300 documents" in line and "tokens a word" in line and "0.000% unknown" in line
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    assert vocab_size(tokenizer) % 64 == 0 and special_ids(tokenizer).all == (0, 1, 2, 3, 4)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "The Café is open." if not lowercase else "the cafe is open."
    assert loaded.decode(loaded("The Café is open.")["input_ids"], skip_special_tokens=True) == text
    assert loaded.tokenize("The") == (["the"] if lowercase else ["The"])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_size_is_a_multiple_of_64(tmp_path: Path) -> None:
    """Filled up where the text yields fewer pieces."""
    source = write(tmp_path / "data.jsonl", list(itertools.islice(read_documents("embedded"), 20)))
    for size, expected in ((500, 512), (513, 576), (30522, None)):
        run([source], tmp_path / str(size), size)
        tokenizer = load_tokenizer(str(tmp_path / str(size)))
        found = vocab_size(tokenizer)
        unused = sorted(tokenizer.get_vocab()[piece] for piece in tokenizer.get_vocab() if piece.startswith("[unused"))
        assert found == expected or (expected is None and 576 < found < 30_000 and found % 64 == 0)
        assert len(unused) < 64 and unused == list(range(found - len(unused), found))
        assert "[unused0]" not in tokenizer.encode("[unused0]").tokens


def test_the_same_sample_gives_the_same_tokenizer(tmp_path: Path, source: str) -> None:
    for name in ("a", "b"):
        run([source], tmp_path / name, sample_bytes=20_000)
    a, b = (load_tokenizer(str(tmp_path / name)) for name in ("a", "b"))
    assert tokenizer_hash(a) == tokenizer_hash(b)


def test_the_sample_is_spread_over_all_sources(tmp_path: Path, source: str) -> None:
    other = write(tmp_path / "other.jsonl", documents(300, seed=1))
    pieces = plan_pieces(parse_sources([source, other]), Form(), 10_000)
    size = sum(Path(name).stat().st_size for name in (source, other))
    found = list(sample(pieces, Form(), Faults(), size // 4, 1))
    shares = [sum(text.startswith(f"Document {n}") for text in found) / 300 for n in (0, 1)]
    assert all(0.15 < share < 0.35 for share in shares)
    assert found != list(sample(pieces, Form(), Faults(), size // 4, 2))
    assert len(list(sample(pieces, Form(), Faults(), 2 * size, 1))) == 600


def test_of_large_sources_the_beginnings_of_all_pieces_are_read(tmp_path: Path, source: str) -> None:
    pieces = plan_pieces(parse_sources([source]), Form(), 4_000)
    size = sum(piece.bytes for piece in pieces)
    found = list(sample(pieces, Form(), Faults(), size // 20, 1))
    numbers = [int(text.split()[2].rstrip(":")) for text in found]
    assert size / 40 < sum(map(len, found)) < size / 10
    assert numbers == sorted(numbers) and len({number // 60 for number in numbers}) >= 4
    # A source that understates its size does not swell the sample.
    small = [dataclasses.replace(piece, bytes=piece.bytes // 10) for piece in pieces]
    assert sum(map(len, sample(small, Form(), Faults(), 10_000, 1))) < 15_000


def test_what_judges_the_result_comes_from_all_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_JUDGED_DOCUMENTS", 4)
    seen = module._Seen()
    assert len(list(seen.watched(str(number) for number in range(100)))) == seen.documents == 100
    judged = [int(text) for text in seen.judged]
    assert 4 <= len(judged) < 8 and len(set(np.diff(judged))) == 1 and judged[0] == 0 and judged[-1] > 75


def test_a_link_to_an_empty_folder(tmp_path: Path, source: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    run([source], tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "vocab.txt").is_file()


def test_a_folder_that_was_filled_meanwhile_is_not_replaced(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, save = tmp_path / "out" / "thesis.tex", module.save_tokenizer

    def fill(*arguments: Any) -> None:
        mine.parent.mkdir()
        mine.touch()
        save(*arguments)

    monkeypatch.setattr(module, "save_tokenizer", fill)
    with pytest.raises(OSError, match="not empty"):
        run([source], mine.parent)
    assert mine.is_file()


def test_refusals(tmp_path: Path, source: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="exists already"):
        run([source], tmp_path / "full")
    with pytest.raises(UserError, match="too small"):
        run([source], tmp_path / "out", size=10)
    with pytest.raises(UserError, match="--sample 0"):
        run([source], tmp_path / "out", sample_bytes=0)
    (tmp_path / "blank.txt").write_text("\n\n")
    with pytest.raises(UserError, match="no document in the sample"):
        run([str(tmp_path / "blank.txt")], tmp_path / "out")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="is empty"):
        run([str(tmp_path / "empty.jsonl")], tmp_path / "out")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{broken\n')
    with pytest.raises(UserError, match=r"bad.jsonl, line 2"):
        run([str(bad)], tmp_path / "out")
    assert "1 faults skipped" in run([str(bad)], tmp_path / "out", on_error="skip")[0]
