"""Checkpoints that are whole or invisible.

DeepSpeed writes under a temporary name; then every file is fsynced and hashed, the manifest written, the folder
renamed, and `latest` replaced. Loading verifies: a checkpoint whose files differ from its manifest is named and passed
over, the newest whole one is taken. Nothing is unpickled that was not verified.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import load_file, save_file
from torch import Tensor

from sctd import __version__
from sctd.errors import UserError
from sctd.train.distributed import World, barrier

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"  # float32, whole, for export and evaluation; resuming does not read it
_LATEST = "latest"
_CLIENT_KEY = "sctd"


@dataclass
class Progress:
    """Where a run stands: everything beside parameters, optimizer state and the importance table.

    step: optimizer steps done. cursor: samples consumed. ledger: rolling hash of the rows trained on so far.
    seconds: time spent training.
    """

    step: int = 0
    cursor: int = 0
    ledger: str = ""
    seconds: float = 0.0


def checkpoint_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def save(
    engine: DeepSpeedEngine,
    run_dir: Path,
    progress: Progress,
    importance: dict[str, Tensor] | None,
    identity: dict[str, Any],
    world: World,
    keep: int,
) -> Path:
    """Write a checkpoint of this step, point `latest` at it and remove old ones beyond `keep`. All ranks call it.

    Args:
        identity: what must match at a resume (hashes of tokenizer and data); goes into the manifest.
    """
    folder = checkpoint_folder(run_dir)
    name = f"step-{progress.step:08d}"
    temporary = folder / f".{name}.tmp"
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    barrier()
    scaler = engine.torch_autocast_z0_gradscaler
    state = {"progress": vars(progress), "importance": importance, "scaler": scaler and scaler.state_dict()}
    engine.save_checkpoint(str(folder), tag=temporary.name, client_state={_CLIENT_KEY: state}, save_latest=False)
    weights = _fp32_weights(engine, world)
    barrier()
    if world.is_main:
        save_file(weights, temporary / WEIGHTS)
        _seal(temporary, {"step": progress.step, "world_size": world.size, "version": __version__, **identity})
        final = folder / name
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        write_atomically(folder / _LATEST, name + "\n")
        _prune(folder, name, keep)
    barrier()
    return folder / name


def load(engine: DeepSpeedEngine, path: Path) -> tuple[Progress, dict[str, Tensor] | None]:
    """Restore the engine from a verified checkpoint. All ranks call it with the same path."""
    _, client = engine.load_checkpoint(str(path.parent), tag=path.name)
    state = client[_CLIENT_KEY]
    if engine.torch_autocast_z0_gradscaler is not None:
        engine.torch_autocast_z0_gradscaler.load_state_dict(state["scaler"])
    return Progress(**state["progress"]), state["importance"]


def newest_whole(run_dir: Path, log: Any = print) -> Path | None:
    """The newest checkpoint of a run whose files are those of its manifest; None where none was ever finished.

    Raises:
        UserError: there were some, and none is whole.
    """
    folder = checkpoint_folder(run_dir)
    candidates = _by_age(folder)
    for path in candidates:
        damage = verify(path)
        if damage is None:
            return path
        log(f"checkpoint {path} is damaged ({damage}): passed over")
    if candidates:
        raise UserError(f"none of the {len(candidates)} checkpoints in {folder} is whole: restore one from a backup")
    if (folder / _LATEST).exists():
        raise UserError(f"{folder / _LATEST} names a checkpoint, but there is none: restore one from a backup")
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / MANIFEST).read_text(encoding="utf-8"))


def verify(path: Path) -> str | None:
    """None for a whole checkpoint, else what is wrong with it."""
    try:
        files = {name: (int(entry["bytes"]), entry["sha256"]) for name, entry in read_manifest(path)["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or unreadable"
    for name, (size, sha256) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
        if _sha256(file) != sha256:
            return f"{name} has another sha256"
    present = {str(file.relative_to(path)) for file in path.rglob("[!.]*") if file.is_file()}
    strangers = sorted(present - {*files, MANIFEST})
    return f"{strangers[0]} is not in its manifest" if strangers else None


def read_weights(path: Path) -> dict[str, Tensor]:
    """Float32 parameters of a checkpoint by name, whatever its engine, its ranks and its ZeRO stage were."""
    return load_file(path / WEIGHTS)


def write_atomically(path: Path, text: str) -> None:
    """The file has the old text or the new one, whatever happens meanwhile."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _fsync(temporary)
    temporary.replace(path)
    _fsync(path.parent)


@torch.no_grad()
def _fp32_weights(engine: DeepSpeedEngine, world: World) -> dict[str, Tensor]:
    """The whole float32 weights on rank 0, gathered one by one from the optimizer's shards; empty elsewhere."""
    weights = {}
    for name, parameter in engine.module.named_parameters():
        master = safe_get_full_fp32_param(parameter)  # collective; None where the parameter is its own master
        if world.is_main:
            weights[name] = (parameter if master is None else master).detach().float().cpu().clone()
    return weights


def _prune(folder: Path, newest: str, keep: int) -> None:
    """Keep `keep` checkpoints up to the one just written. Later ones are damaged, or training would not be here."""
    checkpoints = _by_age(folder)
    written = checkpoints.index(folder / newest)
    for old in [*checkpoints[:written], *checkpoints[written + keep :], *folder.glob(".step-*.tmp")]:
        shutil.rmtree(old)


def _by_age(folder: Path) -> list[Path]:
    """Checkpoints, newest first; temporary ones are not seen."""
    return sorted(folder.glob("step-*"), reverse=True)


def _seal(folder: Path, facts: dict[str, Any]) -> None:
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        _fsync(file)
        files[str(file.relative_to(folder))] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    write_atomically(folder / MANIFEST, json.dumps({**facts, "files": files}, indent=1))
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
