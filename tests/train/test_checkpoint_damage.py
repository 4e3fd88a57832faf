"""A damaged checkpoint is named and passed over, whatever was damaged and however."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sctd.errors import UserError
from sctd.train.checkpoint import newest_whole
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
