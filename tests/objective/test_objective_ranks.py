"""The importance table over real process groups of 1, 2 and 3 ranks: the same bits everywhere."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

WORKER = """
import sys, torch, torch.distributed as dist
from datetime import timedelta
from sctd.objective.importance import ImportanceTable
from support import accumulate
torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
labels, losses = torch.load(f"{folder}/step.pt")
for world in (1, 2, 3):
    if rank >= world:
        continue
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world, timeout=timedelta(seconds=40)
    )
    table = ImportanceTable(50, (0, 1, 2, 3, 4), 0.995)
    for step in range(len(labels)):
        mine = labels[step].tensor_split(world)[rank], losses[step].tensor_split(world)[rank]
        for micro in range(world + rank):  # ranks differ in how they cut their share
            accumulate(table, *(part.tensor_split(world + rank)[micro] for part in mine))
        table.commit(applied=step != 1)
    torch.save(table.scores_V, f"{folder}/table-{world}-{rank}.pt")
    dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], torch.Tensor]:
    """(world, rank) -> table after three steps, the second of them skipped."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(step_data(), folder / "step.pt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", WORKER]
    workers = [subprocess.Popen([*command, str(rank), str(folder)], env=environment) for rank in range(3)]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0, 0]
    finally:
        for worker in workers:
            worker.kill()
    return {(w, r): torch.load(Path(folder) / f"table-{w}-{r}.pt") for w in (1, 2, 3) for r in range(w)}


def step_data() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    return torch.randint(45, (3, 24, 7), generator=rng), torch.rand(3, 24, 7, generator=rng) * 12


def test_equal_bits_on_all_ranks_and_for_any_number_of_ranks(tables: dict[tuple[int, int], torch.Tensor]) -> None:
    assert len(tables) == 6
    one = tables[1, 0].view(torch.int32)
    for place, table in tables.items():
        assert torch.equal(table.view(torch.int32), one), f"world, rank = {place}"


def test_the_table_over_ranks_equals_numpy(tables: dict[tuple[int, int], torch.Tensor]) -> None:
    labels, losses = (tensor.numpy() for tensor in step_data())
    expected = np.full(50, 10.0)
    for step in (0, 2):
        for token in set(labels[step].ravel().tolist()) - {0, 1, 2, 3, 4}:
            mean = losses[step].astype(np.float64)[labels[step] == token].mean()
            expected[token] = 0.995 * expected[token] + 0.005 * mean
    np.testing.assert_allclose(tables[3, 2].numpy(), expected, rtol=1e-6)
    assert bool((tables[3, 0][:5] == 10.0).all()) and bool((tables[3, 0][45:] == 10.0).all())
    assert bool((tables[3, 0][5:45] != 10.0).all())
