"""What the loop counts between two log records, and how it is read back and shown."""

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sctd.config import config_from_dict
from sctd.data.stream import Batch
from sctd.objective.build import build_hook, shape_of
from sctd.objective.schedule import Phase
from sctd.train.flops import Work
from sctd.train.keep.checkpoint import Progress
from sctd.train.keep.metrics import LOSSES
from sctd.train.loop import monitor, recorder
from sctd.train.loop.monitor import LossMeter
from sctd.train.loop.recorder import Window
from small_models import VOCABULARY, small

PAD, LENGTH, SHORT, ROWS = 7, 64, 32, 8


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As much of a run as the window looks at: sctd with F = 2 and recomputation, its first step on short rows, its
    fourth and last on the full path; two ranks of 1 GFLOP/s."""
    monkeypatch.setattr(recorder, "special_ids", lambda tokenizer: SimpleNamespace(pad=PAD))
    config = config_from_dict(
        {
            "arm": "sctd",
            "data": {"warmup_seq_len": SHORT, "warmup_steps": 1},
            "model": {"layers": 6, "hidden_size": 64, "heads": 4, "intermediate_size": 256, "max_positions": LENGTH},
            "objective": {"interval": 2},
            "schedule": {"warmup_steps": 0, "full_finish": 1},
            "train": {"steps": 4, "batch_size": ROWS, "checkpoint_activations": True},
        }
    )
    return SimpleNamespace(
        tokenizer=None,
        hook=build_hook(config, LENGTH),
        work=Work(config, shape_of(config, VOCABULARY), (LENGTH, SHORT)),
        stream=SimpleNamespace(length=lambda step: SHORT if step == 1 else LENGTH),
        peak_flops=1e9,
        world=SimpleNamespace(size=2, device=torch.device("cpu")),
        config=config,
        engine=SimpleNamespace(skipped_steps=0),
    )


def slow_batches(padded: list[int], seconds: float) -> Iterator[list[Batch]]:
    """Steps of two micro-batches whose first one has so many [PAD]; each keeps the loop waiting."""
    for count in padded:
        time.sleep(seconds)
        first = torch.full((2, LENGTH), 9)
        first.flatten()[:count] = PAD
        yield [{"input_ids": first}, {"input_ids": torch.full((2, LENGTH), 9)}]


def test_window_counts_flops_padding_and_waiting(run: Any) -> None:
    work, short = (small("sctd", length, recompute=True)[1] for length in (LENGTH, SHORT))
    progress, batches = Progress(), slow_batches([64, 0, 32], 0.02)
    window = Window(run, progress)
    for step in (1, 2):
        assert len(window.wait_for(batches)) == 2
        with window.pace.forward():
            time.sleep(0.01)
        window.add(step)
    progress.step, progress.cursor, progress.seconds, progress.tokens = 2, 2 * ROWS, 0.5, ROWS * (SHORT + LENGTH)
    record = window.read(progress, lambda mine: [mine, mine + 3.0])
    model = ROWS * (short.row(Phase.DROP, 16) + work.row(Phase.ALIGN, 32))
    executed = ROWS * (short.hardware_row(Phase.DROP, 16) + work.hardware_row(Phase.ALIGN, 32))
    assert record["flops"] == pytest.approx(model) and record["flops_per_s"] == pytest.approx(model / 0.5)
    assert record["mfu"] == pytest.approx(model / 0.5 / 2e9)
    assert record["hfu"] == pytest.approx(executed / 0.5 / 2e9) and record["hfu"] > 1.2 * record["mfu"]
    assert record["padding"] == 64 / (2 * 4 * LENGTH)
    assert 0.04 / 0.5 <= record["data_wait"] < 0.5
    assert record["tokens_per_s"] == ROWS * (SHORT + LENGTH) / 0.5
    assert 1.9 < record["rank_spread"] < 2 and record["slowest_rank"] == 1

    window.wait_for(batches)  # a new window starts from nothing
    window.add(3)
    progress.step, progress.seconds, progress.tokens = 3, 1.5, progress.tokens + ROWS * LENGTH
    again = window.read(progress, lambda mine: [mine])
    assert again["padding"] == 32 / (4 * LENGTH) and again["step_seconds"] == 1.0
    drop = ROWS * work.row(Phase.DROP, 32)
    assert again["mfu"] == pytest.approx(drop / 1.0 / 2e9) and again["flops"] == pytest.approx(model + drop)
    assert again["tokens_per_s"] == ROWS * LENGTH and again["keep"] == 32

    window.wait_for(slow_batches([0], 0.0))
    window.add(4)
    progress.step, progress.seconds = 4, 2.5
    full = window.read(progress, lambda mine: [mine])
    assert full["flops_per_s"] == pytest.approx(ROWS * work.row(Phase.FULL, 0))


def test_utilisation_is_null_on_an_unknown_device(run: Any) -> None:
    run.peak_flops = None
    progress = Progress()
    window = Window(run, progress)
    window.wait_for(slow_batches([0], 0.0))
    window.add(1)
    progress.step, progress.seconds = 1, 1.0
    record = window.read(progress, lambda mine: [mine])
    assert record["mfu"] is None and record["hfu"] is None and record["padding"] == 0


@pytest.mark.parametrize(
    ("norm", "expected"), [(None, None), (1.5, 1.5), (torch.tensor(2.5), 2.5), (torch.tensor([0.5]), 0.5)]
)
def test_losses_and_gradient_norm_are_read_in_one_go(
    monkeypatch: pytest.MonkeyPatch, norm: Tensor | float | None, expected: float | None
) -> None:
    monkeypatch.setattr(monitor.dist, "get_world_size", lambda: 1)
    meter = LossMeter(torch.device("cpu"))
    meter.add({"loss": torch.tensor(1.0), "mlm_drop": torch.tensor(1.0)})
    meter.add({"loss": torch.tensor(2.0), "mlm_drop": torch.tensor(4.0), "kl_local": torch.tensor(0.25)})
    reads = []
    for name in ("tolist", "item", "__float__"):
        original = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, original=original: reads.append(1) or original(self))
    found = meter.read(norm)
    assert len(reads) == 1
    assert found == {
        "loss": 1.5, "mlm_drop": 2.5, "mlm_full": None, "kl_global": None, "kl_local": 0.25, "grad_norm": expected
    }  # fmt: skip
    assert meter.read(None) == dict.fromkeys((*LOSSES, "grad_norm"))


def test_console_line_names_the_wait_and_fits_a_screen() -> None:
    record = {
        "step": 250000, "phase": "align", "loss": 10.3456, "lr": 2e-4, "grad_norm": 12.345, "tokens_per_s": 9123456.0,
        "mfu": 0.512, "data_wait": 0.002, "skipped_steps": 0, "rank_spread": 1.2, "slowest_rank": 3,
    }  # fmt: skip
    line = monitor._line(record, 250000, 360000.0)
    assert "mfu 51.2%" in line and "wait  0.2%" in line
    assert len(line) <= 140 and "rank" not in line
    assert "rank 3 is SLOW, 2.1x" in monitor._line(record | {"rank_spread": 2.1}, 250000, 360000.0)


def test_speeds_stand_together_on_the_board() -> None:
    names = ("tokens_per_s", "mfu", "hfu", "padding", "data_wait", "step_seconds")
    assert all(monitor._board_name(name) == f"speed/{name}" for name in names)
    assert monitor._board_name("loss") == "train/loss" and monitor._board_name("valid_loss") == "valid/loss"
