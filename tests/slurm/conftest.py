import shutil
from collections.abc import Iterator

import pytest

from cluster import Slurm, search_path

_NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    missing = [name for name in _NEEDED if shutil.which(name, path=search_path()) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
