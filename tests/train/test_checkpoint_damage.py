"""A damaged checkpoint is named and passed over, whatever was damaged and however."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sctd.errors import UserError
from sctd.train.keep.checkpoint import newest_whole, verify
from support import sctd, train


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of its steps 2 and 4."""
    run_dir = tmp_path_factory.mktemp("damage") / "run"
    train(recipe, run_dir, "train.steps=4", "train.save_every=2", "train.keep_checkpoints=2")
    return run_dir


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink], ids=["truncated", "one bit flipped", "deleted"])
def test_every_file_is_guarded(damage: Callable[[Path], None], run: Path) -> None:
    newest = run / "checkpoints" / "step-00000004"
    files = [file for file in sorted(newest.rglob("*")) if file.is_file()]
    assert {file.name for file in files} == {"manifest.json", "state.json", "rank-00000.safetensors"}
    for file in files:
        before, said = file.read_bytes(), []
        damage(file)
        assert newest_whole(run, said.append) == run / "checkpoints" / "step-00000002", file
        assert len(said) == 1 and file.name in said[0] and str(newest) in said[0]
        file.write_bytes(before)
    assert newest_whole(run) == newest


def test_a_file_more_is_not_loaded(run: Path) -> None:
    """Whoever can write there could add a pickle; what the manifest does not name is damage too."""
    stranger = run / "checkpoints" / "step-00000004" / "mp_rank_01_model_states.pt"
    stranger.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    said: list[str] = []
    assert newest_whole(run, said.append) == run / "checkpoints" / "step-00000002"
    assert stranger.name in said[0]
    stranger.unlink()


def test_a_manifest_that_says_something_else_is_damaged(run: Path) -> None:
    """Another tokenizer or corpus in it would let a foreign run be continued."""
    file = run / "checkpoints" / "step-00000004" / "manifest.json"
    before = file.read_text(encoding="utf-8")
    for key, value in json.loads(before).items():
        altered = json.loads(before) | {key: value + 1 if isinstance(value, int) else f"{value}x"}
        file.write_text(json.dumps(altered), encoding="utf-8")
        assert "manifest.json" in (verify(file.parent) or "whole"), key
    file.write_text(before, encoding="utf-8")
    assert verify(file.parent) is None


def test_what_is_no_checkpoint_is_left_alone(recipe: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-00000009.txt").write_text("a note")
    shutil.copytree(folder / "step-00000004", folder / "step-backup")
    assert newest_whole(tmp_path / "run") == folder / "step-00000004"
    assert sctd("checkpoints", tmp_path / "run").stdout.count("whole") == 2
    train(recipe, tmp_path / "run", "train.steps=4", "train.save_every=2", "--resume")
    assert (folder / "step-00000009.txt").exists() and (folder / "step-backup").exists()


def test_a_fresh_start_over_checkpoints_is_refused(recipe: Path, run: Path, tmp_path: Path) -> None:
    """Its configuration is lost, its checkpoints are not, and must not be by a start that forgot them."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").unlink()
    done = sctd("pretrain", recipe, f"run.dir={tmp_path / 'run'}", "train.steps=4")
    assert done.returncode == 2 and "holds a run" in done.stderr
    assert newest_whole(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "step-00000004"


def test_none_whole_is_an_error_and_no_fresh_start(recipe: Path, run: Path) -> None:
    damaged = [folder / "manifest.json" for folder in (run / "checkpoints").glob("step-*")]
    before = [file.read_bytes() for file in damaged]
    for file in damaged:
        truncate(file)
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        newest_whole(run, lambda _: None)
    done = sctd("pretrain", recipe, f"run.dir={run}", "train.steps=4", "--resume")
    assert done.returncode == 2 and "none of the 2 checkpoints" in done.stderr
    for file, data in zip(damaged, before, strict=True):
        file.write_bytes(data)
