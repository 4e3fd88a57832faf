"""Preparations that ended at odd places, and files that were mended: nothing is taken for what it is not."""

import shutil
import string
from pathlib import Path
from types import SimpleNamespace

import pytest

from sctd.corpus.manifest import read_manifest
from sctd.corpus.prepare import encode, job, pack, publish
from sctd.corpus.prepare import prepare as module
from sctd.corpus.prepare.prepare import prepare
from sctd.corpus.prepare.team import Team
from sctd.errors import RunError, UserError
from texts import WORDS, assert_same_corpus, documents, run, settings, write


class Power(Exception):
    """The end of the machine, at any place."""


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write(tmp_path / "data.jsonl", documents(200))


def test_a_mended_file_may_be_refused_once_more(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of the other files must not be taken for something else at the start after that."""
    run(source, tmp_path / "first")
    paths = [write(tmp_path / f"{name}.jsonl", documents(count, seed=n)) for n, (name, count) in
             enumerate((("bad", 10), ("b", 60), ("c", 60), ("d", 60)), 10)]  # fmt: skip
    whole = Path(paths[3]).read_text()
    Path(paths[3]).write_text(whole + "{broken\n")
    changes = {"tokenizer": str(tmp_path / "first"), "shard_plan": 4000}
    with pytest.raises(UserError, match="line 61"):
        run(paths, tmp_path / "out", **changes)
    Path(paths[3]).write_text(whole)
    write(Path(paths[0]), documents(100, seed=10))  # more pieces than before: those of the others get other numbers
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0})())
        with pytest.raises(UserError, match="MB are free"):
            run(paths, tmp_path / "out", **changes)
    run(paths, tmp_path / "out", **changes)
    run(paths, tmp_path / "anew", **changes)
    assert_same_corpus(tmp_path / "out", tmp_path / "anew")


def test_a_mended_file_of_another_size(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are more bins now: what was kept is cut anew."""
    run(source, tmp_path / "first")
    monkeypatch.setattr(job, "BIN_BYTES", 20_000)
    bad = write(tmp_path / "bad.jsonl", [])
    changes = {"tokenizer": str(tmp_path / "first"), "shard_plan": 12_000}
    with pytest.raises(UserError, match="bad.jsonl: is empty"):
        run([source, bad], tmp_path / "out", **changes)
    kept = {path.name for path in (tmp_path / ".out.work" / "pieces").glob("*.json")}
    write(Path(bad), documents(150, seed=2))
    lines: list[str] = []
    prepare(settings(source, bad, **changes), tmp_path / "out", log=lines.append)
    assert lines[0].startswith(f"continuing: {len(kept)} of ")
    run([source, bad], tmp_path / "anew", **changes)
    assert_same_corpus(tmp_path / "out", tmp_path / "anew")


def test_what_was_under_way_is_named(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(encode, "write_json", lambda *_: (_ for _ in ()).throw(Power()))
        with pytest.raises(Power):
            run(source, tmp_path / "out")
    lines: list[str] = []
    prepare(settings(source), tmp_path / "out", log=lines.append)
    assert lines[0] == "continuing: 0 of 1 pieces are finished; the last start ended at data.jsonl (rank 0)"


def test_a_learned_tokenizer_outlives_a_dead_rank(tmp_path: Path, source: str) -> None:
    class Dying(Team):
        def each(self, *_: object) -> None:
            raise RunError("rank 1 is dead")

    with pytest.raises(RunError):
        prepare(settings(source), tmp_path / "out", Dying(print), log=lambda line: None)
    lines: list[str] = []
    prepare(settings(source), tmp_path / "out", log=lines.append)
    assert not any("learning" in line for line in lines)


def test_a_tokenizer_of_unknown_settings_is_not_used(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended when the tokenizer was learned, and the settings not yet written."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", lambda *_: (_ for _ in ()).throw(Power()))
        with pytest.raises(Power):
            run(source, tmp_path / "out")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase, *(f"##{c}" for c in WORDS[0])]
    (tmp_path / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)))
    assert run(source, tmp_path / "out", tokenizer=str(tmp_path / "vocab.txt")).vocab_size < 50


def test_an_end_before_the_work_was_removed(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        ending = SimpleNamespace(copyfile=shutil.copyfile, rmtree=lambda *_, **__: (_ for _ in ()).throw(Power()))
        patch.setattr(publish, "shutil", ending)
        with pytest.raises(Power):
            run(source, tmp_path / "out")
    assert (tmp_path / ".out.work").is_dir() and (tmp_path / "out").is_dir()
    run(source, tmp_path / "out")
    assert not (tmp_path / ".out.work").exists() and read_manifest(tmp_path / "out").documents == 200


def test_a_mended_file_may_be_put_back(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a start with the mended one was refused, the work goes on with the files that it was begun with."""
    run(source, tmp_path / "first")
    other = write(tmp_path / "other.jsonl", documents(60, seed=1))
    changes = {"tokenizer": str(tmp_path / "first"), "shard_plan": 4000}
    with monkeypatch.context() as patch:
        patch.setattr(pack, "write_json", lambda *_: (_ for _ in ()).throw(Power()))
        with pytest.raises(Power):
            run([source, other], tmp_path / "out", **changes)
    shutil.move(other, tmp_path / "kept")
    write(Path(other), documents(70, seed=1))
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0})())
        with pytest.raises(UserError, match="MB are free"):
            run([source, other], tmp_path / "out", **changes)
    shutil.move(tmp_path / "kept", other)
    run([source, other], tmp_path / "out", **changes)
    run([source, other], tmp_path / "again", **changes)
    assert_same_corpus(tmp_path / "out", tmp_path / "again")
