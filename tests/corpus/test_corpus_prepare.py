"""prepare: what it writes, that it repeats, that it leaves nothing half-written, and every refusal."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sctd.corpus import prepare as module
from sctd.corpus import shards
from sctd.corpus.manifest import Manifest, read_manifest, verify_shards
from sctd.corpus.prepare import is_valid, load_corpus_tokenizer, prepare, unigram_entropy
from sctd.corpus.tokenizer import SpecialIds, tokenizer_hash
from sctd.errors import UserError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "sigma"]


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A small .jsonl of 200 distinct documents of 30 words."""
    rng = np.random.default_rng(0)
    texts = [f"Document {i}: " + " ".join(rng.choice(WORDS, 30)) for i in range(200)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(tmp_path / "data.jsonl")


def run(source: str, out: Path, **changes: Any) -> Manifest:
    arguments = {"seq_len": 16, "tokenizer": None, "vocab_size": 300, "valid_fraction": 0.1, "seed": 1, **changes}
    return prepare([source], out, log=lambda line: None, **arguments)


def error(source: str, out: Path, **changes: Any) -> str:
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        run(source, out, **changes)
    assert sorted(out.parent.iterdir()) == before, "something was left behind"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rows_of(folder: Path, manifest: Manifest, split: str) -> np.ndarray:
    return np.concatenate([np.load(folder / s.file, mmap_mode="r") for s in manifest.splits[split].shards])


def test_corpus_is_complete(tmp_path: Path, source: str) -> None:
    out = tmp_path / "deep" / "corpus"
    manifest = run(source, out)
    assert read_manifest(out) == manifest
    assert [path.name for path in out.parent.iterdir()] == ["corpus"]
    names = {"manifest.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"}
    assert {p.name for p in out.iterdir()} == names | {"train-00000.npy", "valid-00000.npy"}
    verify_shards(out, manifest, full=True)
    train, valid = rows_of(out, manifest, "train"), rows_of(out, manifest, "valid")
    assert train.dtype == np.uint16 and train.shape == (manifest.splits["train"].rows, 16)
    assert len(valid) == manifest.splits["valid"].rows > 0
    assert manifest.documents == 200 and manifest.dropped["empty_documents"] == 0
    assert max(train.max(), valid.max()) == manifest.max_token_id < manifest.vocab_size <= 300
    ids, counts = np.unique(train[train > 4], return_counts=True)
    assert manifest.unigram_entropy == pytest.approx(
        -sum(c / counts.sum() * math.log(c / counts.sum()) for c in counts)
    )
    assert len(ids) > 10


def test_rows_read_back_as_the_documents(tmp_path: Path, source: str) -> None:
    manifest = run(source, tmp_path / "out", seed=3)
    tokenizer = load_corpus_tokenizer(tmp_path / "out", manifest)
    texts = [json.loads(line)["text"] for line in Path(source).read_text().splitlines()]
    for split in ("train", "valid"):
        expected = " ".join(text.lower() for text in texts if is_valid(text, 3, 0.1) == (split == "valid"))
        rows = rows_of(tmp_path / "out", manifest, split)
        decoded = tokenizer.decode(rows[rows > 4].tolist())
        assert decoded and expected.replace(" ", "").startswith(decoded.replace(" ", ""))


def test_two_runs_give_the_same_bytes(tmp_path: Path, source: str) -> None:
    first, second = run(source, tmp_path / "a"), run(source, tmp_path / "b")
    assert first == second
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_split_follows_seed_and_text_only() -> None:
    texts = [f"text {i}" for i in range(4000)]
    share = sum(is_valid(text, 0, 0.25) for text in texts) / len(texts)
    assert 0.22 < share < 0.28
    assert [is_valid(text, 0, 0.25) for text in texts] != [is_valid(text, 1, 0.25) for text in texts]
    assert all(is_valid(text, 0, 0.5) for text in texts if is_valid(text, 0, 0.25))


def test_order_of_documents_does_not_change_the_split(tmp_path: Path, source: str) -> None:
    lines = Path(source).read_text().splitlines(keepends=True)
    (tmp_path / "turned.jsonl").write_text("".join(reversed(lines)))
    a, b = run(source, tmp_path / "a"), run(str(tmp_path / "turned.jsonl"), tmp_path / "b")
    assert a.tokenizer_hash == b.tokenizer_hash
    assert abs(a.splits["valid"].rows - b.splits["valid"].rows) <= 1


def test_shards_are_cut_at_the_size_limit(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(source, tmp_path / "whole")
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 100 * 16 * 2)
    cut = run(source, tmp_path / "cut")
    sizes = [shard.rows for shard in cut.splits["train"].shards]
    assert len(sizes) > 2 and set(sizes[:-1]) == {100} and 0 < sizes[-1] <= 100
    assert cut.splits["train"].shards[1].file == "train-00001.npy"
    assert (rows_of(tmp_path / "whole", whole, "train") == rows_of(tmp_path / "cut", cut, "train")).all()


def test_batch_size_does_not_change_the_rows(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(source, tmp_path / "whole")
    monkeypatch.setattr(module, "BATCH_CHARS", 500)
    assert run(source, tmp_path / "cut") == whole


def test_large_vocabulary_needs_uint32() -> None:
    assert shards.row_dtype(65536) == np.uint16 and shards.row_dtype(65537) == np.uint32


def test_entropy_of_known_counts() -> None:
    counts = np.array([9, 9, 9, 9, 9, 2, 2, 0])
    assert unigram_entropy(counts, SpecialIds(0, 1, 2, 3, 4)) == pytest.approx(math.log(2))


def test_progress_is_told(tmp_path: Path, source: str) -> None:
    lines: list[str] = []
    prepare([source], tmp_path / "out", 16, None, 300, 0.1, 1, log=lines.append)
    assert any("200 documents" in line and "MB/s" in line and "train" in line for line in lines)
    assert "unigram entropy" in lines[-1]


def test_again_with_the_same_settings_does_nothing(tmp_path: Path, source: str) -> None:
    out = tmp_path / "out"
    first = run(source, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    lines: list[str] = []
    assert prepare([source], out, 16, None, 300, 0.1, 1, log=lines.append) == first
    assert len(lines) == 1 and "already prepared" in lines[0]
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_again_with_other_settings_or_files_is_refused(tmp_path: Path, source: str) -> None:
    out = tmp_path / "out"
    run(source, out)
    assert "(seq_len;" in error(source, out, seq_len=32)
    assert "(valid_fraction, seed;" in error(source, out, seed=9, valid_fraction=0.2)
    assert "(tokenizer, vocab_size;" in error(source, out, tokenizer=str(out))
    Path(source).write_text(Path(source).read_text() + '{"text": "more"}\n')
    assert "(sources;" in error(source, out)


def test_again_with_an_altered_tokenizer_file_is_refused(tmp_path: Path, source: str) -> None:
    run(source, tmp_path / "first")
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text((tmp_path / "first" / "vocab.txt").read_text())
    run(source, tmp_path / "out", tokenizer=str(vocabulary))
    vocabulary.write_text(vocabulary.read_text() + "more\n")
    assert "(tokenizer;" in error(source, tmp_path / "out", tokenizer=str(vocabulary))


def test_again_over_a_damaged_corpus_is_told(tmp_path: Path, source: str) -> None:
    out = tmp_path / "out"
    run(source, out)
    (out / "train-00000.npy").write_bytes(b"")
    assert "train-00000.npy" in error(source, out)


def test_out_that_holds_something_else_is_refused(tmp_path: Path, source: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    assert "folder with other files" in error(source, out)
    assert (out / "thesis.tex").read_text() == "x"
    assert "is a file" in error(source, Path(source))


def test_out_may_be_an_empty_folder_or_a_link_to_one(tmp_path: Path, source: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    run(source, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "manifest.json").is_file()


def test_bad_arguments(tmp_path: Path, source: str) -> None:
    out = tmp_path / "out"
    assert "seq_len 4 is too short" in error(source, out, seq_len=4)
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        assert "valid_fraction" in error(source, out, valid_fraction=fraction)
    assert "too small" in error(source, out, vocab_size=10)
    assert "no such tokenizer" in error(source, out, tokenizer="missing.json")
    assert "no file matches" in error(str(tmp_path / "none*.txt"), out)
    with pytest.raises(UserError, match="no source"):
        prepare([], out, 16, None, 300, 0.1, 1)


def test_empty_corpora_say_what_to_change(tmp_path: Path, source: str) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "short.txt").write_text("just five words of text")
    out = tmp_path / "out"
    assert "no documents" in error(str(tmp_path / "empty.txt"), out)
    assert "lower --seq-len" in error(str(tmp_path / "short.txt"), out, seq_len=64)
    assert "raise --valid-fraction" in error(source, out, valid_fraction=1e-9)


def test_nothing_stays_when_a_source_breaks_late(tmp_path: Path, source: str) -> None:
    run(source, tmp_path / "first")
    with Path(source).open("ab") as stream:
        stream.write(b"{broken\n")
    assert "line 201" in error(source, tmp_path / "out", tokenizer=str(tmp_path / "first"))


def test_nothing_stays_when_the_disk_is_full(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    assert "No space left on device" in error(source, tmp_path / "out")


def test_nothing_stays_when_interrupted(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_manifest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["data.jsonl"]


def test_altered_tokenizer_is_told(tmp_path: Path, source: str) -> None:
    out = tmp_path / "out"
    manifest = run(source, out)
    assert tokenizer_hash(load_corpus_tokenizer(out, manifest)) == manifest.tokenizer_hash
    state = json.loads((out / "tokenizer.json").read_text())
    state["normalizer"]["lowercase"] = False
    (out / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="hash differs"):
        load_corpus_tokenizer(out, manifest)
    (out / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no such tokenizer"):
        load_corpus_tokenizer(out, manifest)


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
def test_wikipedia_with_the_bert_vocabulary(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    wiki = str(SHARED / "corpus" / "wiki-valid.jsonl.xz")
    vocabulary = str(SHARED / "vocab" / "bert-base-uncased-vocab.txt")
    out = tmp_path / "out"
    manifest = run(wiki, out, seq_len=128, tokenizer=vocabulary, valid_fraction=0.05)
    assert manifest.documents == 619 and manifest.vocab_size == 30522 and manifest.dropped["special_rows"] == 0
    assert 6.5 < manifest.unigram_entropy < 8.0
    rows = np.concatenate([rows_of(out, manifest, split) for split in ("train", "valid")])
    assert not (rows == 0).any() and (rows[:, 0] == 101).all() and (rows[:, -1] == 102).all()
    loaded = AutoTokenizer.from_pretrained(out)
    text = loaded.decode(rows[0], skip_special_tokens=True)
    assert loaded(text)["input_ids"] == rows[0].tolist() and loaded.model_max_length == 128
