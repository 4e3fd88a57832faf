"""Checkpoints that are whole or invisible, and belong to no number of ranks and no ZeRO stage.

Each rank writes what it holds under a temporary name; then every file is fsynced and hashed, the manifest written, the
folder renamed, and `latest` replaced. Loading verifies: a checkpoint whose files differ from its manifest is named and
passed over, the newest whole one is taken. Nothing in it is a pickle.
"""

import hashlib
import json
import math
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deepspeed import DeepSpeedEngine
from safetensors.torch import save_file
from torch import Tensor

from sctd import __version__
from sctd.config import TrainConfig
from sctd.errors import RunError, UserError
from sctd.files import read_json, sha256, sync, write_atomically, write_json
from sctd.train.engine.distributed import World, from_main, host_group, together
from sctd.train.engine.state import PARAMETER, TABLE, StateFiles, restore, snapshot

MANIFEST = "manifest.json"
_STATE = "state.json"
_LATEST = "latest"
_SEAL = "sha256"  # key of the manifest
_NAME = re.compile(r"step-(\d{8,})")
_RANK_FILES = "rank-*.safetensors"
_HASHERS = 4


@dataclass
class Progress:
    """The progress of a run: everything beside the state of model and optimizer.

    step: optimizer steps done. cursor: samples consumed. ledger: rolling hash of the rows trained on so far.
    seconds: time spent training. passed_over: spans of samples that training went back from.
    tokens: positions trained on, which is samples times the length that their step's rows had.
    """

    step: int = 0
    cursor: int = 0
    ledger: str = ""
    seconds: float = 0.0
    passed_over: list[tuple[int, int]] = field(default_factory=list)
    tokens: int = 0


def checkpoint_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


class Saver:
    """Writes the checkpoints of a run. All ranks make one, and call it at the same steps.

    Args:
        identity: what must match at a resume (hashes of tokenizer and data); goes into the manifest.
        cfg: how many to keep, whether to write while training goes on, how long ranks wait for each other.
    """

    def __init__(
        self, engine: DeepSpeedEngine, run_dir: Path, identity: dict[str, Any], world: World, cfg: TrainConfig
    ) -> None:
        self._engine, self._folder, self._identity = engine, checkpoint_folder(run_dir), identity
        self._world, self._cfg, self._group = world, cfg, host_group(world, cfg.timeout)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sctd-save")
        self._pending: Future[None] | None = None

    def save(self, progress: Progress) -> None:
        """Write a checkpoint of this step, point `latest` at it and remove old ones.

        Raises:
            RunError: on all ranks, for what keeps any of them from writing; the checkpoints before are untouched.
        """
        self.wait()
        name = f"step-{progress.step:08d}"
        temporary = self._folder / f".{name}.tmp"
        tensors, facts = snapshot(self._engine, self._world)
        size = sum(tensor.nbytes for tensor in tensors.values()) * self._world.size
        from_main(self._world, lambda: _make_room(temporary, size))
        facts["progress"] = asdict(progress)
        self._pending = self._thread.submit(self._write, name, temporary, tensors, facts)
        if not self._cfg.async_save:
            self.wait()

    @property
    def failed(self) -> bool:
        """Whether the last save ended with an error, which `wait` raises."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Until the last save is on disk.

        Raises:
            RunError: on all ranks, if it could not be written.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _write(self, name: str, temporary: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        world, group = self._world, self._group
        try:
            entries = together(world, lambda: _write_rank(temporary, world.rank, tensors), group)
            from_main(world, lambda: self._commit(name, temporary, facts, dict(entries)), group)
        except RunError as error:
            if world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise RunError(f"cannot save {self._folder / name}: {error}; checkpoints before it are untouched") from None
        if world.is_main:
            _prune(self._folder.parent, self._folder / name, self._cfg.keep_checkpoints)

    def _commit(self, name: str, temporary: Path, facts: dict[str, Any], files: dict[str, Any]) -> None:
        manifest = {"step": facts["progress"]["step"], "world_size": self._world.size, "version": __version__}
        _describe(temporary, facts, manifest | self._identity | {"files": files})
        _publish(temporary, self._folder / name)


def load(engine: DeepSpeedEngine, path: Path) -> Progress:
    """Restore the engine from a verified checkpoint."""
    facts = read_json(path / _STATE)
    progress = Progress(**facts["progress"])
    progress.passed_over = [(first, end) for first, end in progress.passed_over]
    restore(engine, StateFiles(path, _RANK_FILES), facts, progress.step)
    return progress


def adopt(path: Path, run_dir: Path, identity: dict[str, Any], anew: bool) -> None:
    """Make a checkpoint of another run the first one of this run. Its files are shared where the file system can.

    Args:
        identity: as `Saver` has it. anew: whether the data begins anew, with the cursor at 0.

    Raises:
        OSError: a full disk, or files that are gone; nothing is left of it.
    """
    temporary, manifest = checkpoint_folder(run_dir) / f".{path.name}.tmp", read_manifest(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name in (*manifest["files"], MANIFEST):
            _share(path / name, temporary / name)
        if anew:
            facts = read_json(path / _STATE)
            facts["progress"] |= {"cursor": 0, "ledger": identity["data"], "passed_over": []}
            del manifest[_SEAL]
            _describe(temporary, facts, manifest | identity)
        sync(temporary)
        _publish(temporary, checkpoint_folder(run_dir) / path.name)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _share(file: Path, other: Path) -> None:
    """The same content under another path, without taking space where the file system has links."""
    try:
        other.hardlink_to(file)
    except OSError:  # another file system, or one without links
        shutil.copyfile(file, other)
        sync(other)


def checkpoints(run_dir: Path) -> list[Path]:
    """Those of a run, newest first, whole or not; temporary ones are not seen."""
    found = checkpoint_folder(run_dir).glob("step-*")
    return sorted((path for path in found if _NAME.fullmatch(path.name) and path.is_dir()), key=step_of, reverse=True)


def has_latest(run_dir: Path) -> bool:
    """Whether a checkpoint was ever finished there; it may have been removed since."""
    return (checkpoint_folder(run_dir) / _LATEST).exists()


def step_of(path: Path) -> int:
    """The optimizer step that a checkpoint was made at, by its name."""
    return int(path.name.removeprefix("step-"))


def size_of(path: Path) -> int:
    """Bytes of all files of a checkpoint."""
    return sum(file.stat().st_size for file in path.iterdir())


def newest_whole(run_dir: Path, log: Any = print) -> Path | None:
    """The newest checkpoint of a run whose files are those of its manifest; None where none was ever finished.

    Raises:
        UserError: there were some, and none is whole.
    """
    folder = checkpoint_folder(run_dir)
    candidates = checkpoints(run_dir)
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


def choose(run_dir: Path, step: int | None = None) -> Path:
    """The whole checkpoint of a run at a step; None: the newest.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if step is None:
        newest = newest_whole(run_dir)
        if newest is None:
            raise UserError(f"no checkpoint in {run_dir} yet: train it to its first save")
        return newest
    found = {step_of(path): path for path in checkpoints(run_dir)}
    if step not in found:
        steps = ", ".join(map(str, sorted(found))) or "none"
        near = f"; the nearest is {min(found, key=lambda each: abs(each - step))}" if found else ""
        raise UserError(f"{run_dir} has no checkpoint of step {step}: there are {steps}{near}")
    damage = verify(found[step])
    if damage:
        raise UserError(f"checkpoint {found[step]} is damaged ({damage}): choose another step")
    return found[step]


def read_manifest(path: Path) -> dict[str, Any]:
    return read_json(path / MANIFEST)


def verify(path: Path) -> str | None:
    """None for a whole checkpoint, else what is wrong with it."""
    try:
        manifest = read_manifest(path)
        files = {name: (int(entry["bytes"]), entry["sha256"]) for name, entry in manifest["files"].items()}
        if manifest.pop(_SEAL) != _seal(manifest):
            return f"{MANIFEST} is altered"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or unreadable"
    for name, (size, _) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
    with ThreadPoolExecutor(_HASHERS) as pool:
        found = dict(zip(files, pool.map(lambda name: sha256(path / name), files), strict=True))
    for name, (_, expected) in files.items():
        if found[name] != expected:
            return f"{name} has another sha256"
    present = {str(file.relative_to(path)) for file in path.rglob("[!.]*") if file.is_file()}
    strangers = sorted(present - {*files, MANIFEST})
    return f"{strangers[0]} is not in its manifest" if strangers else None


def read_weights(path: Path) -> dict[str, Tensor]:
    """Float32 parameters of a checkpoint by name, whatever its ranks and its ZeRO stage were."""
    files = StateFiles(path, _RANK_FILES)
    shapes = read_json(path / _STATE)["shapes"].items()
    return {name: files.read(PARAMETER, name, 0, math.prod(shape)).view(shape) for name, shape in shapes}


def read_importance(path: Path) -> Tensor | None:
    """The importance score of each vocabulary id; None for an arm that has none."""
    files = StateFiles(path, _RANK_FILES)
    size = files.length(TABLE, "scores")
    return files.read(TABLE, "scores", 0, size) if size else None


def _make_room(temporary: Path, size: int) -> None:
    """An empty folder on a file system with space for `size` bytes."""
    for stale in temporary.parent.glob(".step-*.tmp"):
        shutil.rmtree(stale)
    temporary.mkdir(parents=True)
    free = shutil.disk_usage(temporary).free
    if free < size:
        temporary.rmdir()
        raise RunError(
            f"cannot save {temporary.parent}: a checkpoint takes {size / 1e9:.3g} GB, {free / 1e9:.3g} GB are free: "
            "make room, or lower train.keep_checkpoints; checkpoints before it are untouched"
        )


def _write_rank(folder: Path, rank: int, tensors: dict[str, Tensor]) -> tuple[str, dict[str, Any]]:
    file = folder / f"rank-{rank:05d}.safetensors"
    save_file(tensors, file)
    sync(file)
    return file.name, _entry(file)


def _describe(folder: Path, facts: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Write state and manifest of a checkpoint whose other files are there."""
    write_json(folder / _STATE, facts)
    manifest["files"][_STATE] = _entry(folder / _STATE)
    sealed = json.dumps(manifest | {_SEAL: _seal(manifest)}, indent=1)
    write_atomically(folder / MANIFEST, sealed)  # no newline: a file that lost its last byte is no JSON


def _publish(temporary: Path, final: Path) -> None:
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    write_atomically(final.parent / _LATEST, final.name + "\n")


def _entry(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def _seal(manifest: dict[str, Any]) -> str:
    """sha256 of a manifest without its seal: it vouches for the files, and this for it."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _prune(run_dir: Path, newest: Path, keep: int) -> None:
    """Keep `keep` checkpoints up to the one just written. Later ones are damaged, or training would not be here."""
    found = checkpoints(run_dir)
    written = found.index(newest)
    for old in [*found[:written], *found[written + keep :]]:
        try:
            shutil.rmtree(old)
        except OSError as error:  # what cannot be removed costs space, not the run
            print(f"cannot remove {old}: {error}")
