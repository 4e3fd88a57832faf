"""prepare: what it writes, that it repeats, that it continues, that `out` is whole or not there, and every refusal."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sctd.corpus.manifest import Manifest, load_corpus_tokenizer, read_manifest, verify_shards
from sctd.corpus.prepare import encode, job, limits, pack
from sctd.corpus.prepare import prepare as module
from sctd.corpus.prepare import rows as shards
from sctd.corpus.prepare.encode import document_hash, falls_to_valid
from sctd.corpus.prepare.prepare import prepare
from sctd.corpus.prepare.publish import unigram_entropy
from sctd.corpus.prepare.rows import Packer
from sctd.corpus.prepare.settings import parse_bytes
from sctd.corpus.sources.clean import Cleaning
from sctd.corpus.tokenizer import SpecialIds, corpus_encoder, encode_documents, tokenizer_hash
from sctd.errors import UserError
from sctd.files import write_json
from texts import assert_same_corpus, documents, run, settings, write

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A small .jsonl of 200 distinct documents of 30 words."""
    return write(tmp_path / "data.jsonl", documents(200))


def error(source: str, out: Path, **changes: Any) -> str:
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        run(source, out, **changes)
    assert sorted(out.parent.iterdir()) == before, "something was left behind"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rows_of(folder: Path, manifest: Manifest, split: str, length: int = 16, source: int | None = None) -> np.ndarray:
    found = [s for s in manifest.split(length, split).shards if source in (None, s.source)]
    return np.concatenate([np.load(folder / shard.file) for shard in found])


# ---- what it writes


def test_corpus_is_complete(tmp_path: Path, source: str) -> None:
    out = tmp_path / "deep" / "corpus"
    manifest = run(source, out)
    assert read_manifest(out) == manifest
    assert [path.name for path in out.parent.iterdir()] == ["corpus"]
    names = {"manifest.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "report.json", "report.html"}
    shard_names = {f"{split}-16-00000{ending}" for split in ("train", "valid") for ending in (".npy", ".ends.npy")}
    assert {p.name for p in out.iterdir()} == names | shard_names
    verify_shards(out, manifest, part=(0, 1))
    train, valid = rows_of(out, manifest, "train"), rows_of(out, manifest, "valid")
    assert train.dtype == np.uint16 and train.shape == (manifest.split(16, "train").rows, 16)
    assert len(valid) == manifest.split(16, "valid").rows > 0
    assert manifest.documents == 200 and set(manifest.dropped.values()) - {0} == {manifest.dropped["unfinished_tokens"]}
    assert max(train.max(), valid.max()) <= manifest.max_token_id < manifest.vocab_size <= 320


def test_rows_are_the_documents_in_the_order_of_their_hashes(tmp_path: Path, source: str) -> None:
    """A slow preparation of the same documents, all in one list."""
    out = tmp_path / "out"
    manifest = run(source, out, seed=3, seq_lens=(16, 48))
    encoder = corpus_encoder(load_corpus_tokenizer(out, manifest))
    texts = documents(200)
    hashes = {text: document_hash(text, 3) for text in texts}
    counts = np.zeros(manifest.vocab_size, dtype=np.int64)
    for split in ("train", "valid"):
        mine = [text for text in texts if falls_to_valid(hashes[text][2], 0.1) == (split == "valid")]
        ids = encode_documents(encoder, sorted(mine, key=lambda text: hashes[text]))
        for length in (16, 48):
            expected, ends = Packer(length, manifest.special_ids).add(ids)
            assert np.array_equal(rows_of(out, manifest, split, length), expected)
            (shard,) = manifest.split(length, split).shards
            assert np.array_equal(np.load(out / shard.ends.file), ends)
        if split == "train":
            counts += np.bincount(np.concatenate(ids), minlength=len(counts))
    assert manifest.tokens == sum(len(ids) for ids in encode_documents(encoder, texts))
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts)
    share = counts[counts > 0] / counts.sum()
    assert manifest.unigram_entropy == pytest.approx(-(share * np.log(share)).sum())


def test_documents_are_shuffled_by_seed(tmp_path: Path, source: str) -> None:
    first, second = run(source, tmp_path / "a", seed=1), run(source, tmp_path / "b", seed=2)
    a, b = rows_of(tmp_path / "a", first, "train"), rows_of(tmp_path / "b", second, "train")
    assert first.tokens == second.tokens and (a[:50] != b[:50]).any(axis=1).mean() > 0.9


def test_two_runs_give_the_same_bytes(tmp_path: Path, source: str) -> None:
    assert run(source, tmp_path / "a") == run(source, tmp_path / "b")
    assert_same_corpus(tmp_path / "a", tmp_path / "b")


def test_the_cut_into_pieces_does_not_change_the_rows(tmp_path: Path, source: str) -> None:
    whole, cut = run(source, tmp_path / "whole"), run(source, tmp_path / "cut", shard_plan=3000)
    assert len(rows_of(tmp_path / "cut", cut, "train")) and cut.splits == whole.splits
    facts = json.loads((tmp_path / "cut" / "report.json").read_text())
    assert sum(rank["pieces"] for rank in facts["ranks"]) > 5


def test_batches_and_runs_do_not_change_the_rows(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(source, tmp_path / "whole")
    monkeypatch.setattr(encode, "BATCH_CHARS", 500)
    monkeypatch.setattr(encode, "RUN_BYTES", 700)
    assert run(source, tmp_path / "cut") == whole


def test_many_bins_hold_the_same_documents(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(source, tmp_path / "whole")
    monkeypatch.setattr(job, "BIN_BYTES", 3000)
    cut = run(source, tmp_path / "cut", shard_plan=5000)
    assert len(cut.split(16, "train").shards) > 10
    assert (cut.documents, cut.tokens, cut.unigram_entropy) == (whole.documents, whole.tokens, whole.unigram_entropy)
    for split in ("train", "valid"):
        few, many = rows_of(tmp_path / "whole", whole, split), rows_of(tmp_path / "cut", cut, split)
        assert abs(len(few) - len(many)) <= 1, "a rest of a row is left at the end, not in every bin"
        lost = np.bincount(few[few > 4], minlength=320) - np.bincount(many[many > 4], minlength=320)
        assert np.abs(lost).sum() < 32


def test_shards_are_cut_at_the_size_limit(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(source, tmp_path / "whole")
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 100 * 16 * 2)
    cut = run(source, tmp_path / "cut")
    sizes = [shard.rows for shard in cut.split(16, "train").shards]
    assert len(sizes) > 2 and set(sizes[:-1]) == {100} and 0 < sizes[-1] <= 100
    assert cut.split(16, "train").shards[1].file == "train-16-00001.npy"
    assert (rows_of(tmp_path / "whole", whole, "train") == rows_of(tmp_path / "cut", cut, "train")).all()
    ends = []
    for number, shard in enumerate(cut.split(16, "train").shards):
        ends += (np.load(tmp_path / "cut" / shard.ends.file) + number * 1600).tolist()
    assert ends == np.load(tmp_path / "whole" / whole.split(16, "train").shards[0].ends.file).tolist()


def test_large_vocabulary_needs_uint32() -> None:
    assert shards.row_dtype(65536) == np.uint16 and shards.row_dtype(65537) == np.uint32


def test_entropy_of_known_counts() -> None:
    counts = np.array([9, 9, 9, 9, 9, 2, 2, 0])
    assert unigram_entropy(counts, SpecialIds(0, 1, 2, 3, 4)) == pytest.approx(math.log(2))


# ---- sources, limits, duplicates


def test_sources_keep_apart(tmp_path: Path, source: str) -> None:
    other = write(tmp_path / "other.jsonl", documents(80, seed=1))
    out = tmp_path / "out"
    manifest = run([f"books={source}", f"wiki={other}"], out, weights=("wiki=0.7",))
    assert [(s.name, s.weight, s.documents) for s in manifest.sources] == [("books", None, 200), ("wiki", 0.7, 80)]
    tokenizer = load_corpus_tokenizer(out, manifest)
    for number, mark in ((0, "document 0"), (1, "document 1")):
        rows = rows_of(out, manifest, "train", source=number)
        text = tokenizer.decode(rows[rows > 4].tolist())
        assert text.count(mark) > 50 and f"document {1 - number} " not in text
    assert sum(s.tokens for s in manifest.sources) == manifest.tokens


def test_copies_are_left_out_wherever_they_are(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "BIN_BYTES", 3000)
    alone = run(f"a={source}", tmp_path / "alone")
    again = write(tmp_path / "again.jsonl", [*documents(200)[::-1], *documents(10, seed=5), *documents(10, seed=5)])
    manifest = run([f"a={source}", f"b={again}"], tmp_path / "out", shard_plan=2000)
    assert manifest.dropped["exact_duplicates"] == 210
    assert [s.documents for s in manifest.sources] == [200, 10], "the first source keeps them"
    assert manifest.sources[0].text_bytes == alone.text_bytes


def test_near_duplicates_are_left_out_if_asked(tmp_path: Path) -> None:
    pytest.importorskip("datasketch", reason="the extra `near` is not installed")
    texts = documents(60)
    source = write(tmp_path / "data.jsonl", [*texts, *(f"{text} more" for text in texts[:20])])
    assert run(source, tmp_path / "plain").documents == 80
    manifest = run(source, tmp_path / "near", near_duplicates=0.8, shard_plan=3000)
    assert manifest.dropped["near_duplicates"] == 20 and manifest.documents == 60


@pytest.mark.parametrize("plan", [2000, 10**6])
def test_limits_take_the_first_documents(tmp_path: Path, source: str, plan: int) -> None:
    for limit, expected in (("1", 1), ("50", 50), ("999", 200)):
        changes = {"max_documents": (limit,), "shard_plan": plan, "valid_fraction": 0.3}
        if limit == "1":
            with pytest.raises(UserError, match="1 documents"):
                run(source, tmp_path / "one", **changes)
            continue
        manifest = run(source, tmp_path / limit, **changes)
        assert manifest.documents == expected
        first = documents(200)[:expected]
        assert manifest.text_bytes == sum(len(text) for text in first)
        facts = json.loads((tmp_path / limit / "report.json").read_text())
        assert sum(rank["pieces"] for rank in facts["ranks"]) <= 1 + expected * 250 // plan, "read on for nothing"


@pytest.mark.parametrize("plan", [2000, 10**6])
def test_token_budgets_hold(tmp_path: Path, source: str, plan: int) -> None:
    whole = run(source, tmp_path / "whole")
    other = write(tmp_path / "other.jsonl", documents(80, seed=1))
    manifest = run(
        [f"a={source}", f"b={other}"], tmp_path / "out", max_tokens=("b=500", "2000"), shard_plan=plan,
        tokenizer=str(tmp_path / "whole"),
    )  # fmt: skip
    longest = 2 * whole.tokens / whole.documents
    assert 2000 - longest < manifest.sources[0].tokens <= 2000 and 500 - longest < manifest.sources[1].tokens <= 500


def test_limits_look_at_each_piece_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        write(tmp_path / f"{number:02}.jsonl", documents(5, seed=number))
    original, looks = limits._counts, []
    monkeypatch.setattr(limits, "_counts", lambda path: looks.append(path) or original(path))
    glob = str(tmp_path / "*.jsonl")
    assert run(glob, tmp_path / "out", max_documents=("150",), valid_fraction=0.3).documents == 150
    assert len(looks) <= 3 * 40


def test_floors_and_faults_are_counted(tmp_path: Path, source: str) -> None:
    with Path(source).open("a") as stream:
        stream.write('{"text": "short"}\n{"text": "?!?!?! ...... !!!!!! ------ ??????"}\n{broken\n')
        stream.write(json.dumps({"text": "Cafe\u0301 with a bell \u0007 and enough words to stay"}) + "\n")
    manifest = run(source, tmp_path / "out", cleaning=Cleaning(10, 0.5), on_error="skip")
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    assert manifest.documents == 201
    assert {key: facts["left_out"][key]["documents"] for key in ("too_short", "symbols", "faults")} == {
        "too_short": 1, "symbols": 1, "faults": 1,
    }  # fmt: skip
    assert facts["cleaned"] == {"nfc": 1, "control": 1} and "line 203" in facts["fault_examples"][0]


# ---- again, and after an interruption


def test_progress_is_told(tmp_path: Path, source: str) -> None:
    lines: list[str] = []
    prepare(settings(source), tmp_path / "out", log=lines.append)
    assert any("200 documents" in line and "MB/s" in line and "data.jsonl" in line for line in lines)
    assert "unigram entropy" in lines[-1]


def test_again_with_the_same_settings_does_nothing(tmp_path: Path, source: str) -> None:
    out = tmp_path / "out"
    first = run(source, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    lines: list[str] = []
    assert prepare(settings(source), out, log=lines.append) == first
    assert len(lines) == 1 and "already prepared" in lines[0]
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_again_with_other_settings_or_files_is_refused(tmp_path: Path, source: str) -> None:
    out = tmp_path / "out"
    run(source, out)
    assert "(seq_lens;" in error(source, out, seq_lens=(32,))
    assert "(valid_fraction, seed;" in error(source, out, seed=9, valid_fraction=0.2)
    assert "tokenizer" in error(source, out, tokenizer=str(out))
    assert "(near_duplicates;" in error(source, out, near_duplicates=0.9)
    Path(source).write_text(Path(source).read_text() + '{"text": "more"}\n')
    assert "(sources;" in error(source, out)


def test_again_with_an_altered_tokenizer_file_is_refused(tmp_path: Path, source: str) -> None:
    run(source, tmp_path / "first")
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text((tmp_path / "first" / "vocab.txt").read_text())
    run(source, tmp_path / "out", tokenizer=str(vocabulary))
    vocabulary.write_text(vocabulary.read_text() + "more\n")
    assert "(tokenizer_hash;" in error(source, tmp_path / "out", tokenizer=str(vocabulary))


def test_again_over_a_damaged_corpus_is_told(tmp_path: Path, source: str) -> None:
    out = tmp_path / "out"
    run(source, out)
    (out / "train-16-00000.npy").write_bytes(b"")
    assert "train-16-00000.npy" in error(source, out)


class Power(Exception):
    """The end of the machine, at any place."""


@pytest.mark.parametrize("at", range(12))
def test_what_was_finished_is_not_repeated(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Ended before its n-th write of a finished part, twice; then run to the end."""
    changes = {"shard_plan": 6000, "seq_lens": (16, 32)}
    monkeypatch.setattr(job, "BIN_BYTES", 8000)
    whole = run(source, tmp_path / "whole", **changes)
    done: list[str] = []

    def failing(original: Any, allowed: int) -> Any:
        def write(path: Path, content: Any) -> None:
            if path.parent.name in ("pieces", "bins"):
                if len(done) >= allowed:
                    raise Power
                done.append(path.name)
            original(path, content)

        return write

    for allowed in (at, at + 1, 10**9):
        for place in (encode, pack):
            monkeypatch.setattr(place, "write_json", failing(write_json, allowed))
        if allowed < 10**9:
            with pytest.raises(Power):
                run(source, tmp_path / "out", **changes)
            assert not (tmp_path / "out").exists()
    run(source, tmp_path / "out", **changes)
    assert len(done) == len(set(done)) > 12, "something was done twice"
    assert_same_corpus(tmp_path / "whole", tmp_path / "out")
    assert not (tmp_path / ".out.work").exists() and read_manifest(tmp_path / "out") == whole


def test_an_end_while_files_get_their_names_is_continued(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, tmp_path / "whole")
    from sctd.corpus.prepare import publish

    monkeypatch.setattr(publish, "write_manifest", lambda *_: (_ for _ in ()).throw(Power()))
    with pytest.raises(Power):
        run(source, tmp_path / "out")
    monkeypatch.undo()
    run(source, tmp_path / "out")
    assert_same_corpus(tmp_path / "whole", tmp_path / "out")


def test_a_mended_file_costs_its_own_pieces_only(tmp_path: Path, source: str) -> None:
    run(source, tmp_path / "first")
    second = tmp_path / "second.jsonl"
    write(second, [*documents(50, seed=2)])
    second.write_text(second.read_text() + "{broken\n")
    changes = {"tokenizer": str(tmp_path / "first"), "shard_plan": 4000}
    with pytest.raises(UserError, match="line 51"):
        run([source, str(second)], tmp_path / "out", **changes)
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.work" / "pieces").glob("*.json")}
    assert len(finished) > 3
    write(second, documents(51, seed=2))
    lines: list[str] = []
    out = prepare(settings(source, str(second), **changes), tmp_path / "out", log=lines.append)
    kept = [line for line in lines if line.startswith("continuing")]
    assert len(kept) == 1 and out.documents == 251
    mended = run([source, str(second)], tmp_path / "anew", **changes)
    assert mended.tokens == out.tokens
    assert_same_corpus(tmp_path / "out", tmp_path / "anew")


def test_unfinished_work_of_other_settings_is_not_lost(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "write_json", lambda *_: (_ for _ in ()).throw(Power()))
    with pytest.raises(Power):
        run(source, tmp_path / "out")
    monkeypatch.undo()
    assert "unfinished corpus with other settings (seed)" in error(source, tmp_path / "out", seed=2)
    assert run(source, tmp_path / "out").documents == 200


def test_two_at_once_are_refused(tmp_path: Path, source: str) -> None:
    with job.locked(tmp_path / ".out.work"):
        assert f"process {os.getpid()}" in error(source, tmp_path / "out")
    assert run(source, tmp_path / "out").documents == 200


# ---- refusals


def test_out_that_holds_something_else_is_refused(tmp_path: Path, source: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    assert "folder with other files" in error(source, out)
    assert (out / "thesis.tex").read_text() == "x"
    assert "is a file" in error(source, Path(source))


def test_out_that_cannot_be_made_is_told(tmp_path: Path, source: str) -> None:
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\); fix that"):
        run(source, tmp_path / "data.jsonl" / "out")


def test_out_may_be_an_empty_folder_or_a_link_to_one(tmp_path: Path, source: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    run(source, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seq_lens": (4,)}, "seq_len 4 is too short"),
        ({"seq_lens": ()}, "no row length"),
        ({"seq_lens": (32, 32)}, "each length once"),
        ({"valid_fraction": 0.0}, "valid_fraction"),
        ({"valid_fraction": float("nan")}, "valid_fraction"),
        ({"vocab_size": 10}, "too small"),
        ({"tokenizer": "missing.json"}, "no such tokenizer"),
        ({"weights": ("0.5",)}, "NAME=SHARE"),
        ({"weights": ("nobody=0.5",)}, "no source is called 'nobody'; there is data"),
        ({"weights": ("data=1.5",)}, "at most 1"),
        ({"weights": ("data=much",)}, "'much' is not a number"),
        ({"max_tokens": ("0",)}, "at least 1"),
        ({"max_documents": ("1.5",)}, "not a whole number"),
        ({"shard_plan": 10}, "--shard-plan"),
        ({"near_duplicates": 1.5}, "near"),
    ],
)
def test_bad_settings(tmp_path: Path, source: str, changes: dict[str, Any], said: str) -> None:
    assert said in error(source, tmp_path / "out", **changes)


def test_weights_must_leave_something(tmp_path: Path, source: str) -> None:
    with pytest.raises(UserError, match="leaves nothing for b"):
        run([f"a={source}", f"b={source}"], tmp_path / "out", weights=("a=1",))


def test_a_weighted_source_needs_rows(tmp_path: Path, source: str) -> None:
    """Here it has none, as all its documents are copies."""
    again = write(tmp_path / "again.jsonl", documents(50))
    with pytest.raises(UserError, match="--weight b=0.5: b has no train row of 16; leave the weight out"):
        run([f"a={source}", f"b={again}"], tmp_path / "out", weights=("b=0.5",))
    assert not (tmp_path / ".out.work").exists()


@pytest.mark.parametrize(("text", "size"), [("64MB", 64 * 10**6), ("1.5GB", 1_500_000_000), ("10", 10), ("2k", 2000)])
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "ten", "1..2MB", "-1MB", ".", "9" * 400])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(UserError, match="64MB"):
        parse_bytes(text)


def test_empty_corpora_say_what_to_change(tmp_path: Path, source: str) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "short.txt").write_text("just five words of text")
    out = tmp_path / "out"
    assert "no documents" in error(str(tmp_path / "empty.txt"), out)
    assert "lower --seq-len" in error(str(tmp_path / "short.txt"), out, seq_lens=(64,))
    assert "raise --valid-fraction" in error(source, out, valid_fraction=1e-9)
    assert "but those left out (200 too short)" in error(source, out, cleaning=Cleaning(1000))


def test_nothing_stays_when_a_source_breaks(tmp_path: Path, source: str) -> None:
    run(source, tmp_path / "first")
    with Path(source).open("ab") as stream:
        stream.write(b"{broken\n")
    assert "line 201" in error(source, tmp_path / "out", tokenizer=str(tmp_path / "first"))


def test_no_room_is_told_before_the_start(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = Path(source).stat().st_size
    free = os.statvfs_result((4096, 4096, 0, 0, 1, 0, 0, 0, 0, 255))
    assert size > 4096
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free.f_bfree * 4096})())
    assert "0.04 MB of text, and 0.00 MB are free" in error(source, tmp_path / "out")


def test_a_full_disk_is_one_line(small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real file system that fills up while the corpus is written."""
    monkeypatch.setattr(module, "_check_room", lambda *_: None)
    source = write(tmp_path / "data.jsonl", documents(20_000))
    with pytest.raises(UserError, match="No space left on device"):
        run(source, small_disk / "out", shard_plan=200_000, tokenizer=str(vocabulary(tmp_path)))
    assert not (small_disk / "out").exists()


def vocabulary(folder: Path) -> Path:
    run(write(folder / "few.jsonl", documents(100)), folder / "few")
    return folder / "few"


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
    manifest = run(wiki, out, seq_lens=(128,), tokenizer=vocabulary, valid_fraction=0.05)
    assert manifest.documents == 619 and manifest.vocab_size == 30522 and manifest.dropped["special_rows"] == 0
    assert 6.5 < manifest.unigram_entropy < 8.0
    rows = np.concatenate([rows_of(out, manifest, split, 128) for split in ("train", "valid")])
    assert not (rows == 0).any() and (rows[:, 0] == 101).all() and (rows[:, -1] == 102).all()
    loaded = AutoTokenizer.from_pretrained(out)
    text = loaded.decode(rows[0], skip_special_tokens=True)
    assert loaded(text)["input_ids"][:3] == rows[0].tolist()[:3] and loaded.model_max_length == 128
