"""FLOPs of a run so far: against adding up its steps one by one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sctd.config import ARMS, Config, load_config
from sctd.corpus.manifest import Manifest, read_manifest
from sctd.objective.build import build_hook
from sctd.train.accounting import step_flops
from sctd.train.export import bert_shape, row_lengths
from sctd.train.flops import flops_until


def one_by_one(config: Config, manifest: Manifest, steps: int) -> float:
    shape, lengths = bert_shape(config, manifest), row_lengths(config, manifest)
    hook = build_hook(config, lengths[0])
    total = 0.0
    for step in range(1, steps + 1):
        length = lengths[-1] if step <= config.data.warmup_steps else lengths[0]
        work = step_flops(config, shape, length)
        total += config.train.batch_size * work.row(hook.phase(step), hook.keep(step, length))
    return total


def two_lengths(manifest: Manifest) -> Manifest:
    """The same corpus, as if it were packed to rows of 32 too."""
    return replace(manifest, seq_lens=(32, 64), splits={32: manifest.splits[64], 64: manifest.splits[64]})


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(("interval", "warmup"), [(1, 0), (4, 0), (7, 30), (10, 97)])
def test_as_many_as_its_steps_have(recipe: Path, corpus: Path, arm: str, interval: int, warmup: int) -> None:
    data: dict[str, Any] = {"warmup_seq_len": 32, "warmup_steps": warmup} if warmup else {}
    config = load_config(str(recipe), [f"arm={arm}", f"objective.interval={interval}", "train.steps=97"])
    config = replace(config, data=replace(config.data, **data))
    manifest = two_lengths(read_manifest(corpus)) if warmup else read_manifest(corpus)
    steps = [0, 1, interval, 29, 30, 31, 64, 97]
    found = flops_until(config, manifest, steps)
    assert found == pytest.approx([one_by_one(config, manifest, step) for step in steps], rel=1e-12)


def test_arms_cost_what_their_paths_do(recipe: Path, corpus: Path) -> None:
    manifest = read_manifest(corpus)
    cost = {arm: flops_until(load_config(str(recipe), [f"arm={arm}"]), manifest, [10])[0] for arm in ARMS}
    assert cost["token_drop"] == cost["random_drop"] < cost["sctd"] < cost["baseline"]
    assert cost["token_drop"] < cost["random_ltd"] < cost["baseline"]
