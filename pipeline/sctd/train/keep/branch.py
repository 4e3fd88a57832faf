"""Branches: new runs that go on from a checkpoint of another run, the parent, with settings of their own.

A branch is a folder that holds the parent's checkpoint and its records up to there; from then on it is a run as any
other, and `--resume` continues it. The checkpoint is put in last: without it, the folder can be started anew.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sctd.config import Config, parse_run, value_of
from sctd.corpus.manifest import Manifest, read_manifest
from sctd.errors import UserError
from sctd.files import write_atomically
from sctd.objective.build import MEASURED_STEPS, has_table, measuring_steps
from sctd.train.keep import checkpoint
from sctd.train.keep.earlier import settings_until, write_earlier
from sctd.train.keep.export import CORPUS_COPY, read_run
from sctd.train.keep.metrics import read_metrics
from sctd.train.keep.run_folder import FIXED, identity_of, read_deepspeed_copy, start_run_dir

_FREE_WITH_INIT = ("optimizer.name", "model.max_positions", "model.vocab_size")


@dataclass(frozen=True)
class Parent:
    """Where a branch begins: a verified checkpoint of a run.

    Args:
        run_dir: with its full path. config: of the run. has_table: of importance.
        other: "corpus" or "seed", where the branch has another one, and its data begins anew; else empty.
    """

    run_dir: Path
    config: Config
    path: Path
    has_table: bool
    other: str

    @property
    def step(self) -> int:
        """The last one that the branch has in common with it."""
        return checkpoint.step_of(self.path)

    @property
    def name(self) -> str:
        """RUN@STEP."""
        return f"{self.run_dir}@{self.step}"


def find_parent(config: Config, ds_config: dict[str, Any], manifest: Manifest) -> Parent:
    """The checkpoint that `run.branch_from` names, once all is checked that could keep it from being continued.

    Args:
        config: of the branch. manifest: of its corpus.

    Raises:
        UserError: no such run or step, a damaged checkpoint, or settings that do not go with it.
    """
    asked = config.run.branch_from
    run_dir, step = parse_run(asked)
    old, old_manifest = read_run(run_dir), read_manifest(run_dir / CORPUS_COPY)
    if manifest.tokenizer_hash != old_manifest.tokenizer_hash:
        raise UserError(
            f"--branch-from {asked}: the tokenizer of {config.data.corpus} is not that of {old.data.corpus}, which "
            f"{run_dir} was trained on: prepare the text with --tokenizer {old.data.corpus}, or start a new run with "
            f"init.from={asked}"
        )
    ids = [each.model.vocab_size or of.vocab_size for each, of in ((config, manifest), (old, old_manifest))]
    values = {key: (value_of(config, key), value_of(old, key)) for key in (*FIXED, "init.from")}
    for key, (new, before) in (values | {"model.vocab_size": tuple(ids)}).items():
        if new != before:
            fresh = f", or start a new run with init.from={asked}" if key in _FREE_WITH_INIT else ""
            raise UserError(
                f"--branch-from {asked}: {key} is {new!r}, {run_dir} has {before!r}: a branch keeps the model, and the "
                f"optimizer with its states: leave it out{fresh}"
            )
    before = read_deepspeed_copy(run_dir)
    kinds = [each.get("optimizer", {}).get("type") for each in (ds_config, before)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"--branch-from {asked}: the DeepSpeed optimizer is {kinds[0]}, {run_dir} has {kinds[1]}: pass a JSON with "
            "that one"
        )
    if "scheduler" in before and "scheduler" not in ds_config:
        raise UserError(
            f"--branch-from {asked}: {run_dir} was trained with a DeepSpeed 'scheduler', which a branch does not take "
            "over: pass a JSON with one"
        )
    with _kept(asked):
        path = checkpoint.choose(run_dir, step)
        is_same = checkpoint.read_manifest(path)["data"] == identity_of(config, manifest)["data"]
        other = "corpus" if not is_same else "seed" if config.run.seed != old.run.seed else ""
        parent = Parent(run_dir.resolve(), old, path, checkpoint.read_importance(path) is not None, other)
    measured, goal = measuring_steps(old), config.train.stop_at or config.train.steps
    if parent.step in measured[:-1]:
        raise UserError(
            f"--branch-from {asked}: step {parent.step} is one of those that measure the importance of tokens, which "
            f"end at step {measured[-1]}: choose a later step"
        )
    if goal <= parent.step:
        key = "train.stop_at" if config.train.stop_at else "train.steps"
        raise UserError(
            f"--branch-from {asked}: {key} is {goal}, and the branch begins at step {parent.step}: pass a {key} "
            "beyond it"
        )
    return parent


def make_branch(
    parent: Parent, config: Config, ds_config: dict[str, Any], identity: dict[str, Any], overrides: Sequence[str]
) -> list[str]:
    """Fill the folder of a branch.

    Args:
        identity: as checkpoints of the branch will have it. overrides: of its command line, and of its parent's.

    Returns:
        Lines that say where it begins.

    Raises:
        UserError: the checkpoint is gone by now.
    """
    run_dir, step = Path(config.run.dir), parent.step
    overrides = [*overrides, f"objective.importance_warmup={config.objective.importance_warmup}"]
    left_out = config.data.skip_samples != parent.config.data.skip_samples and not config.data.skip_samples
    if left_out:
        overrides.append("data.skip_samples=[]")
    lines = [*start_run_dir(run_dir, config, ds_config, overrides), f"branched from {parent.name}"]
    records = [record for record in read_metrics(parent.run_dir) if record["step"] <= step]
    write_atomically(run_dir / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    write_earlier(run_dir, settings_until(parent.run_dir, step))
    with _kept(parent.name):
        checkpoint.adopt(parent.path, run_dir, identity, anew=bool(parent.other))
    if parent.other:
        lines.append(f"another {parent.other}: the data begins at its first sample, in an order of its own")
    if left_out:
        lines.append(f"data.skip_samples of {parent.run_dir} is left out: it counts samples of another order")
    return lines


@contextmanager
def _kept(asked: str) -> Iterator[None]:
    """While the files of a checkpoint are read, which a run that is at work may remove."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(
            f"--branch-from {asked}: that checkpoint was removed by the run meanwhile: choose another step, or raise "
            "the run's train.keep_checkpoints"
        ) from None


def branched(config: Config, parent: Parent) -> Config:
    """The configuration of a branch, with what is settled by where it begins.

    Raises:
        UserError: it needs an importance table that neither comes with its parent nor is to be measured.
    """
    warmup, needed = config.objective.importance_warmup, has_table(config) and not parent.has_table
    if warmup is None:
        warmup = min(MEASURED_STEPS, (config.train.steps - parent.step) // 2) if needed else 0
    elif warmup == 0 and needed:
        raise UserError(
            f"--branch-from {parent.name}: objective.importance_warmup is 0, and that run has no importance table: all "
            "tokens would be equal to a model that knows them; leave it out"
        )
    skipped = config.data.skip_samples
    if parent.other and skipped == parent.config.data.skip_samples:
        skipped = ()  # they count samples of another order
    return replace(
        config,
        data=replace(config.data, skip_samples=skipped),
        objective=replace(config.objective, importance_warmup=warmup),
        run=replace(config.run, branch_from=parent.name),
    )
