"""The folder of a run: what it must be like to be trained in, and what it is started with."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sctd.config import Config, to_dict, to_yaml
from sctd.errors import UserError
from sctd.files import Held, lock, read_json_object, write_atomically, write_json
from sctd.train.engine.distributed import World, barrier, from_main
from sctd.train.keep.checkpoint import checkpoint_folder, checkpoints
from sctd.train.keep.export import CORPUS_COPY, EXPORT, read_run, require_free

_PATIENCE = 10.0  # seconds for a job that is just ending, as the one before a requeued one may be
_DEEPSPEED_COPY = "deepspeed.json"  # the merged DeepSpeed configuration
# Keys that may differ when a run is resumed: they change when and what is reported, not what is computed.
_FREE_AT_RESUME = {
    "run.dir", "run.examples", "data.corpus", "train.stop_at", "train.log_every", "train.valid_every",
    "train.valid_rows", "train.save_every", "train.keep_checkpoints", "train.micro_batch_size",
    "train.checkpoint_activations", "train.async_save", "train.zero_stage",
    "train.rollback_after", "train.timeout", "data.skip_samples",
    "evaluation.every", "evaluation.probes", "evaluation.task", "evaluation.steps", "evaluation.data_dir",
}  # fmt: skip


def check_run_dir(run_dir: Path, resume: bool) -> None:
    """Refuse a folder that a run cannot be started or resumed in, before anything is written."""
    begun = (run_dir / "config.yaml").exists() or any(checkpoints(run_dir))
    if begun and not resume:
        raise UserError(f"run.dir {run_dir} holds a run: pass --resume to continue it, or choose another run.dir")
    standing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK):
        raise UserError(
            f"run.dir {run_dir} cannot be made: {standing} is not a writable folder: choose another run.dir"
        )
    require_free(run_dir / EXPORT)
    if resume and not run_dir.is_dir():
        raise UserError(f"--resume: {run_dir} does not exist: start the run without --resume")


def check_same_run(config: Config, ds_config: dict[str, Any], run_dir: Path) -> None:
    """Refuse to resume a run with settings that change what it computes; one without a configuration has none yet."""
    if not (run_dir / "config.yaml").exists() and not checkpoint_folder(run_dir).exists():
        return
    new, old = (_flat(to_dict(item)) for item in (config, read_run(run_dir)))
    before = read_json_object(run_dir / _DEEPSPEED_COPY)
    if before is None:
        raise UserError(f"--resume: {run_dir / _DEEPSPEED_COPY} is not readable: restore it from a backup")
    now = json.loads(json.dumps(ds_config))  # as it is read back from a file
    for section in ("optimizer", "scheduler"):
        if now.get(section) != before.get(section):
            raise UserError(f"--resume: {run_dir} was started with another DeepSpeed '{section}': pass that JSON")
    for key, value in new.items():
        chosen = (key, value) == ("train.precision", "auto")  # means the precision that the run was started with
        if key not in _FREE_AT_RESUME and value != old[key] and not chosen:
            raise UserError(
                f"--resume: {key} is {value!r}, the run in {config.run.dir} was started with {old[key]!r}: "
                "keep it, or start another run.dir"
            )


def start_run_dir(run_dir: Path, config: Config, ds_config: dict[str, Any], world: World) -> None:
    """Write down what is about to run."""
    if world.is_main:
        (run_dir / CORPUS_COPY).mkdir(parents=True, exist_ok=True)
        write_json(run_dir / _DEEPSPEED_COPY, ds_config)
        for name in ("manifest.json", "tokenizer.json"):
            shutil.copy(Path(config.data.corpus) / name, run_dir / CORPUS_COPY / name)
        write_atomically(run_dir / "config.yaml", to_yaml(config))  # last: where it is, the rest is
    barrier()


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


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
