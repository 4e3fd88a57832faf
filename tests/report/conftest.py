"""Two real runs, of two arms, for tests of reports, and a report on them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from evaluations import write_cells, write_evaluations, write_mark
from support import sctd, train


@pytest.fixture(scope="session")
def trained(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `baseline` and `sctd`, ten steps each."""
    folder = tmp_path_factory.mktemp("trained")
    for arm in ("baseline", "sctd"):
        train(recipe, folder / arm, f"arm={arm}", "train.valid_every=2")
        shutil.rmtree(folder / arm / "checkpoints")  # no report reads them
    return folder


@pytest.fixture(scope="session")
def evaluated(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Both runs with evaluations."""
    folder = tmp_path_factory.mktemp("evaluated")
    places = folder / "baseline", folder / "sctd"
    for place in places:
        shutil.copytree(trained / place.name, place)
        write_evaluations(place, place.name)
    return places


@pytest.fixture(scope="session")
def whole_report(evaluated: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page on both, and on a model that is none of ours."""
    folder = tmp_path_factory.mktemp("whole")
    write_mark(folder / "control", "bert-base-uncased")
    write_cells(folder / "control", "rte", {"accuracy": [0.66, 0.70]})
    out = folder / "report.html"
    done = sctd("report", *evaluated, folder / "control", "--out", out, "--title", "Arms & <more>")
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Callable[..., Path]:
    """`runs("sctd", "sctd-2", seed=2)`: a copy of a run in the test's own folder, its recipe changed."""

    def copy(source: str, name: str = "", seed: int = 1, arm: str = "", **sections: dict[str, object]) -> Path:
        place = tmp_path / (name or source)
        shutil.copytree(trained / source, place)
        path = place / "config.yaml"
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        config["run"]["seed"], config["arm"] = seed, arm or config["arm"]
        for section, values in sections.items():
            config[section] |= values
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return place

    return copy
