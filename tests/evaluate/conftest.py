"""A run of the modernbert family, and tasks that are measured while it trains."""

from pathlib import Path

import pytest

from support import train
from tiny_bert import write_order


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To probe on."""
    return write_order(tmp_path_factory.mktemp("task") / "order.txt", 400)


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of one's own to fine-tune on."""
    folder = tmp_path_factory.mktemp("own")
    for split, rows in (("train", 96), ("dev", 40)):
        lines = [f"the list {('is', 'was')[n % 2]} not empty {n}\t{('now', 'then')[n % 2]}\n" for n in range(rows)]
        (folder / f"{split}.tsv").write_text("words\ttense\n" + "".join(lines), encoding="utf-8")
    text = "kind: classification\ntext: words\nlabel: tense\nlr: 1e-3\nfiles: {train: train.tsv, dev: dev.tsv}\n"
    (folder / "when.yaml").write_text(text, encoding="utf-8")
    return folder / "when.yaml"


@pytest.fixture(scope="session")
def modern(recipe: Path, task: Path, own: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps of sctd, every 4 of them saved: on the full path, dropping, and on the full path again.

    Its weights begin so large that what it predicts is not the same token everywhere.
    """
    run_dir = tmp_path_factory.mktemp("modern") / "modern"
    model = ("model.family=modernbert", "model.layer_norm_eps=1e-5", "model.initializer_range=0.5")
    steps = ("train.steps=12", "train.save_every=4", "train.keep_checkpoints=9")
    phases = ("schedule.full_start=4", "schedule.full_finish=4")
    measured = ("evaluation.every=12", f"evaluation.probes=[{task}]", f"evaluation.task={own}", "evaluation.steps=12")
    train(recipe, run_dir, *model, *steps, *phases, *measured)
    return run_dir
