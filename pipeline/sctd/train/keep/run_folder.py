"""The folder of a run: what it must be like to be trained in, what it is started with, and what may change later."""

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import IO, Any

from sctd.config import Config, parse_run, to_dict, to_yaml
from sctd.corpus.manifest import Manifest, read_manifest
from sctd.errors import UserError
from sctd.files import Held, lock, read_json, read_json_object, write_atomically, write_json
from sctd.objective.build import build_hook, row_lengths
from sctd.schedule import learning_rate
from sctd.train.engine.distributed import World, from_main
from sctd.train.keep.checkpoint import checkpoints, has_latest
from sctd.train.keep.earlier import read_earlier, settings_until, write_earlier
from sctd.train.keep.export import CORPUS_COPY, EXPORT, read_run, require_free
from sctd.train.keep.metrics import read_metrics

_PATIENCE = 10.0  # seconds for a job that is just ending, as the one before a requeued one may be
_DEEPSPEED_COPY = "deepspeed.json"  # the merged DeepSpeed configuration
_OVERRIDES = "overrides.json"  # those of the command line, which a resume repeats
_NOT_REPEATED = ("run.dir", "run.branch_from", "train.stop_at")
# Keys that may differ when a run is resumed: they change speed, and when and what is reported.
_FREE_AT_RESUME = {
    "run.dir", "run.examples", "run.branch_from", "data.corpus", "train.stop_at", "train.log_every",
    "train.valid_every", "train.valid_rows", "train.save_every", "train.keep_checkpoints", "train.micro_batch_size",
    "train.checkpoint_activations", "train.async_save", "train.zero_stage", "train.compile", "train.cuda_graphs",
    "train.rollback_after", "train.timeout", "data.skip_samples", "model.layer_norm",
    "evaluation.every", "evaluation.probes", "evaluation.task", "evaluation.steps", "evaluation.data_dir",
}  # fmt: skip
# Keys that not even a branch changes: the weights and the optimizer's states would not fit.
FIXED = (
    "model.family", "model.layers", "model.hidden_size", "model.heads", "model.intermediate_size",
    "model.max_positions", "model.vocab_size", "model.layer_norm_eps", "model.theta", "model.window",
    "model.global_every", "model.local_theta", "optimizer.name",
)  # fmt: skip


def holds_run(run_dir: Path) -> bool:
    """Whether there is anything in a folder that training has made and that could be lost."""
    return any(checkpoints(run_dir)) or has_latest(run_dir) or (run_dir / EXPORT).exists()


def check_run_dir(run_dir: Path, resume: bool) -> bool:
    """Refuse a folder that a run cannot be started or resumed in, before anything is written.

    Returns:
        Whether it holds a run, which goes on; else one can be started there.
    """
    require_free(run_dir / EXPORT)
    begun = holds_run(run_dir)
    if begun and not resume:
        raise UserError(f"run.dir {run_dir} holds a run: pass --resume to continue it, or choose another run.dir")
    standing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK):
        raise UserError(
            f"run.dir {run_dir} cannot be made: {standing} is not a writable folder: choose another run.dir"
        )
    if resume and not run_dir.is_dir():
        raise UserError(f"--resume: {run_dir} does not exist: start the run without --resume")
    if begun and not any(checkpoints(run_dir)) and not has_latest(run_dir):
        raise UserError(
            f"--resume: {run_dir} holds an export, and no checkpoint: restore one from a backup, or choose another "
            "run.dir"
        )
    return begun


def check_same_run(config: Config, ds_config: dict[str, Any], run_dir: Path) -> None:
    """Refuse to resume a run with settings that change its course; one without a checkpoint has none yet."""
    if not holds_run(run_dir):
        return
    stored = read_run(run_dir)
    before = read_deepspeed_copy(run_dir)
    now = json.loads(json.dumps(ds_config))  # as it is read back from a file
    for section in ("optimizer", "scheduler"):
        if now.get(section) != before.get(section):
            raise UserError(f"--resume: {run_dir} was started with another DeepSpeed '{section}': pass that JSON")
    parent = config.run.branch_from
    if parent and not is_same_parent(parent, stored.run.branch_from):
        was = f"a branch of {stored.run.branch_from}" if stored.run.branch_from else "no branch"
        raise UserError(f"--branch-from {parent}: {run_dir} holds another run, {was}: choose another run.dir")
    new, old = flat(to_dict(config)), flat(to_dict(stored))
    if new["train.precision"] == "auto":
        new["train.precision"] = old["train.precision"]
    changed = [key for key, value in new.items() if key not in _FREE_AT_RESUME and value != old[key]]
    if new["train.steps"] > old["train.steps"]:
        changed.remove("train.steps")
    if changed:
        raise UserError(_refusal(run_dir, changed, new, old))


def _refusal(run_dir: Path, changed: Sequence[str], new: dict[str, Any], old: dict[str, Any]) -> str:
    said = ", ".join(f"{key} is {new[key]!r} and not {old[key]!r}" for key in changed)
    keep = f"to keep what the run has: sctd pretrain {run_dir}/config.yaml --resume"
    keep += " train.stop_at=null" if old["train.stop_at"] else ""
    words = " ".join(_override(key, new[key]) for key in changed)
    if changed == ["train.steps"]:
        change = f"train.steps may only grow; to end earlier: train.stop_at={new['train.steps']}"
    elif {*changed} & {*FIXED}:
        change = "to change it, start another run.dir"
    else:
        change = f"to change it, branch: sctd pretrain --branch-from {run_dir} {words} run.dir=NEW"
    return f"--resume: {run_dir} was started otherwise ({said}); {keep}; {change}"


def _override(key: str, value: Any) -> str:
    """As a shell reads it."""
    return shlex.quote(f"{key}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}")


def is_same_parent(asked: str, stored: str) -> bool:
    """Whether `RUN` or `RUN@STEP` is what a run has branched from."""
    (folder, step), (old_folder, old_step) = parse_run(asked), parse_run(stored)
    return folder.resolve() == old_folder.resolve() and step in (None, old_step)


def read_deepspeed_copy(run_dir: Path) -> dict[str, Any]:
    """The merged DeepSpeed configuration that a run was started with.

    Raises:
        UserError: it is not there, or no JSON.
    """
    found = read_json_object(run_dir / _DEEPSPEED_COPY)
    if found is None:
        raise UserError(f"{run_dir / _DEEPSPEED_COPY} is not readable: restore it from a backup")
    return found


def read_overrides(run_dir: Path) -> list[str]:
    """Those that a resume repeats; none where no run has been started."""
    try:
        return [str(word) for word in read_json(run_dir / _OVERRIDES)]
    except (OSError, ValueError, TypeError):
        return []


def identity_of(config: Config, manifest: Manifest) -> dict[str, Any]:
    """What must be the same wherever a checkpoint is continued: hashes of the tokenizer and of the rows."""
    shards = [shard for length in row_lengths(config, manifest) for shard in manifest.split(length, "train").shards]
    data_hash = hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()[:16]
    return {"tokenizer": manifest.tokenizer_hash, "data": data_hash}


def branch_of(run_dir: Path) -> str:
    """RUN@STEP that a run has branched from, or was to; empty for none, and where there is no readable run."""
    try:
        return read_run(run_dir).run.branch_from
    except UserError:
        return ""


def start_run_dir(run_dir: Path, config: Config, ds_config: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Write down what is about to run, in place of what was about to run there before.

    Returns:
        A line that says where the records of steps are, if any were trained there and no checkpoint of them is left.
    """
    said = _put_aside(run_dir)
    (run_dir / CORPUS_COPY).mkdir(parents=True, exist_ok=True)
    write_json(run_dir / _DEEPSPEED_COPY, ds_config)
    for name in ("manifest.json", "tokenizer.json"):
        shutil.copy(Path(config.data.corpus) / name, run_dir / CORPUS_COPY / name)
    write_json(run_dir / _OVERRIDES, [word for word in overrides if word.partition("=")[0] not in _NOT_REPEATED])
    write_atomically(run_dir / "config.yaml", to_yaml(config))  # last: where it is, the rest is
    return said


def _put_aside(run_dir: Path) -> list[str]:
    """Move the records of an earlier start into a folder of their own, or remove them where they tell of no step."""
    steps = [record["step"] for record in read_metrics(run_dir)]
    begin = parse_run(branch_of(run_dir))[1] or 0  # up to there they are its parent's
    names = ("metrics.jsonl", "events.out.tfevents.*", "earlier.json", _OVERRIDES, "config.yaml")
    found = [path for name in names for path in run_dir.glob(name)]
    if max(steps, default=0) <= begin:
        for path in found:
            path.unlink()
        return []
    place = next(place for n in count(1) if not (place := run_dir / f"before-{n}").exists())
    place.mkdir()
    for path in found:
        path.rename(place / path.name)
    return [f"records of an earlier start, up to step {max(steps):,}, are kept in {place}"]


def extend(run_dir: Path, steps: int, step: int, has_scheduler: bool) -> list[str]:
    """Give a run that is at `step` a longer horizon.

    Args:
        has_scheduler: whether the user's DeepSpeed JSON sets the learning rate.

    Returns:
        Lines that say what changes; none where it has this horizon.
    """
    old = read_run(run_dir)
    if steps == old.train.steps:
        return []
    new = replace(old, train=replace(old.train, steps=steps, stop_at=None))
    earlier = read_earlier(run_dir)
    length = row_lengths(old, read_manifest(run_dir / CORPUS_COPY))[0]
    alike = follows_alike(old, new, step, length, has_scheduler)
    if not alike:
        write_earlier(run_dir, settings_until(run_dir, step))
    write_json(run_dir / _OVERRIDES, [*read_overrides(run_dir), f"train.steps={steps}"])
    write_atomically(run_dir / "config.yaml", to_yaml(new))
    said = f"train.steps {old.train.steps:,} -> {steps:,}: the schedules are computed anew"
    if not has_scheduler:
        before, now = (learning_rate(c.schedule, c.optimizer.lr, c.train.steps)(step + 1) for c in (old, new))
        said += f"; learning rate of step {step + 1:,}: {now:.2e} (was {before:.2e})"
    if not alike:
        last = f"up to step {step:,} it followed a horizon of {old.train.steps:,} steps, as no run of {steps:,} does"
    elif earlier:
        last = f"up to step {earlier[-1][0]:,} it followed other settings"
    else:
        last = f"up to step {step:,} it is as if it had {steps:,} steps from the start"
    return [said, last]


def follows_alike(old: Config, new: Config, step: int, length: int, has_scheduler: bool) -> bool:
    """Whether all steps up to this one have the same learning rate, phase and kept tokens under both horizons."""

    def course(config: Config) -> Iterator[tuple[Any, ...]]:
        rate = learning_rate(config.schedule, config.optimizer.lr, config.train.steps)
        hook = build_hook(config, length)
        for number in range(1, step + 1):
            yield None if has_scheduler else rate(number), hook.phase(number), hook.keep(number)

    return all(one == other for one, other in zip(course(old), course(new), strict=True))


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration's tree by section.key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


@contextmanager
def locked(run_dir: Path, world: World) -> Iterator[None]:
    """Hold the folder of a run, which is made if needed. The lock goes with the process, however it ends.

    Raises:
        UserError: on all ranks, if another job holds it.
    """
    held: list[IO[str]] = []
    from_main(world, lambda: held.append(_lock(run_dir)))
    try:
        yield
    finally:
        for file in held:
            file.close()


def lock_file(run_dir: Path) -> Path:
    return run_dir / ".lock"


def _lock(run_dir: Path) -> IO[str]:
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        return lock(lock_file(run_dir), _PATIENCE)
    except Held as who:
        raise UserError(f"run.dir {run_dir} is in use by {who}: wait for its end, or choose another run.dir") from None
