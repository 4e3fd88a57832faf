"""Whether a machine, or the ranks of a job, can train: `sctd doctor`, alone or under any launcher."""

import importlib.util
import os
import platform
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sctd.errors import UserError
from sctd.train.checkpoint import checkpoints, size_of
from sctd.train.distributed import World, init_world
from sctd.train.launch import discover
from sctd_kernels import backend

_NEEDED = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "numpy", "tensorboard", "safetensors")
_OPTIONAL = {
    "triton": "kernels on GPUs",
    "mpi4py": "starting with mpirun",
    "apex": "optimizer.name=apex_*, model.layer_norm=apex",
}
_PATIENCE = 60.0  # seconds for the ranks to meet
_PROBE = 8 << 20  # bytes that are written to see how fast the disk is
_ROOM = 5e9  # bytes: two checkpoints of BERT-base
_INODES = 10_000
_FILES = 1024  # open files that a process needs
_SHARED = 1 << 30  # bytes of /dev/shm
_DRIFT = 2.0  # seconds between the clocks of two machines
_BUFFERS = (1 << 20, 64 << 20)


@dataclass(frozen=True)
class Finding:
    """One line of the report. `level`: ok, warn or FAIL."""

    level: str
    name: str
    text: str


def doctor(folder: Path) -> bool:
    """Look at everything that a run in `folder` needs, on all ranks, and print what was found.

    Returns:
        Whether training can start: nothing FAILs on any rank.
    """
    launch = discover(os.environ)
    local = [*_packages(), *_devices(launch.local_rank, launch.local_size), *_system(), *_disk(folder), *_slurm(folder)]
    try:
        world = init_world(launch, _PATIENCE)
    except (RuntimeError, ValueError, UserError) as error:
        what = f"rank {launch.rank} of {launch.size} did not meet the others at {launch.address}:{launch.port}"
        found = [*local, Finding("FAIL", "ranks", f"{what} within {_PATIENCE:.0f} s: {_line(error)}")]
        _print(found)
        return False
    found = _gathered([*local, *_kernels(world)], world) + (_links(world) if world.size > 1 else [])
    if world.is_main:
        _print(found)
        failures, warnings = (sum(finding.level == level for finding in found) for level in ("FAIL", "warn"))
        print(f"{'NOT READY' if failures else 'ready'}: {failures} failures, {warnings} warnings, {world.size} ranks")
    dist.destroy_process_group()
    return not any(finding.level == "FAIL" for finding in found)


def _print(found: list[Finding]) -> None:
    for finding in found:
        print(f"{finding.level:<5} {finding.name:<14} {finding.text}")


def _packages() -> Iterator[Finding]:
    versions = {name: _version(name) for name in _NEEDED}
    missing = [name for name, found in versions.items() if found is None]
    text = ", ".join(f"{name} {found}" for name, found in versions.items() if found)
    yield Finding("ok", "versions", f"python {platform.python_version()}, {text}")
    if missing:
        yield Finding("FAIL", "versions", f"missing: {', '.join(missing)}; pip install sctd")
    for name, brings in _OPTIONAL.items():
        found = _version(name) if importlib.util.find_spec(name) else None
        yield Finding("ok", name, found or f"not installed; it would bring {brings}")


def _devices(local_rank: int, local_size: int) -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding("ok", "device", f"no GPU; {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads")
        return
    count = torch.cuda.device_count()
    if 1 < count <= local_rank or count < local_size and count > 1:
        yield Finding("FAIL", "device", f"{local_size} ranks on this machine, but {count} GPUs: start as many as GPUs")
        return
    device = 0 if count == 1 else local_rank
    free, total = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_name(device)
    level = "ok" if free > 0.9 * total else "warn"
    busy = "" if level == "ok" else "; another process uses it"
    yield Finding(
        level, "device", f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, CUDA {torch.version.cuda}{busy}"
    )


def _system() -> Iterator[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    level = "ok" if files >= _FILES else "warn"
    yield Finding(level, "open files", f"up to {files}" + ("" if level == "ok" else f"; raise it: ulimit -n {_FILES}"))
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        level = "ok" if size >= _SHARED else "warn"
        hint = "" if level == "ok" else "; NCCL needs more: in a container, raise --shm-size"
        yield Finding(level, "shared memory", f"{size / 1e9:.1f} GB{hint}")


def _disk(folder: Path) -> Iterator[Finding]:
    """Room, speed and locks where the run will write; leaves nothing behind."""
    standing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK):
        yield Finding("FAIL", "folder", f"{folder}: {standing} is no folder to write in; choose another run.dir")
        return
    usage, inodes = shutil.disk_usage(standing), os.statvfs(standing).f_favail
    newest = next(iter(checkpoints(folder)), None)
    wanted = 2.0 * size_of(newest) if newest else _ROOM
    level = "ok" if usage.free > wanted else "FAIL" if newest else "warn"
    hint = "" if level == "ok" else f"; two checkpoints take {wanted / 1e9:.1f} GB: make room"
    yield Finding(level, "disk", f"{folder}: {usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB free{hint}")
    if 0 < inodes < _INODES:
        yield Finding("warn", "inodes", f"{folder}: {inodes} left; remove old files")
    try:
        speed = _write_speed(standing)
    except OSError as error:
        yield Finding("FAIL", "disk", f"{folder} cannot be written: {_line(error)}")
        return
    yield Finding("ok", "disk speed", f"{speed / 1e6:.0f} MB/s written and on disk")


def _write_speed(folder: Path) -> float:
    """Bytes a second, fsync included."""
    probe = folder / f".sctd-doctor-{socket.gethostname()}-{os.getpid()}"
    try:
        start = time.perf_counter()
        with probe.open("wb") as file:
            file.write(os.urandom(_PROBE))
            file.flush()
            os.fsync(file.fileno())
        return _PROBE / (time.perf_counter() - start)
    finally:
        probe.unlink(missing_ok=True)


def _slurm(folder: Path) -> Iterator[Finding]:
    """Whether the job's time suffices for a checkpoint."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or shutil.which("squeue") is None:
        return
    said = subprocess.run(["squeue", "-h", "-j", job, "-o", "%L"], capture_output=True, text=True, timeout=60)
    left, newest = said.stdout.strip(), next(iter(checkpoints(folder)), None)
    if newest is None or not left:
        yield Finding("ok", "time limit", f"{left or 'unknown'} left")
        return
    seconds = size_of(newest) / _write_speed(folder)
    level = "ok" if seconds < _to_seconds(left) / 2 else "warn"
    hint = "" if level == "ok" else "; ask for more time, or save on a faster disk"
    yield Finding(level, "time limit", f"{left} left; a checkpoint takes about {seconds:.0f} s{hint}")


def _to_seconds(left: str) -> float:
    """Of squeue's [days-]hours:minutes:seconds; infinite for UNLIMITED."""
    days, _, clock = left.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdecimal() for part in parts):
        return float("inf")
    return 86400 * int(days or 0) + sum(int(part) * 60**power for power, part in enumerate(reversed(parts)))


def _kernels(world: World) -> list[Finding]:
    try:
        chosen = backend(world.device.type)
    except ValueError as error:
        return [Finding("FAIL", "kernels", _line(error))]
    tools = [name for name in ("nvcc", "g++") if shutil.which(name)]
    return [
        Finding("ok", "kernels", f"{chosen}; compilers: {', '.join(tools) or 'none, so train.compile stays false'}")
    ]


def _gathered(mine: list[Finding], world: World) -> list[Finding]:
    """Rank 0's findings, and with rank and host whatever is no `ok`, or another version, on another rank."""
    if world.size == 1:
        return mine
    all_of: list[Any] = [None] * world.size
    dist.all_gather_object(all_of, (socket.gethostname(), time.time(), mine))
    found = list(all_of[0][2])
    versions = [finding.text for finding in found if finding.name in ("versions", *_OPTIONAL)]
    for rank, (host, _, theirs) in enumerate(all_of[1:], start=1):
        for finding in theirs:
            differs = finding.name in ("versions", *_OPTIONAL) and finding.text not in versions
            if differs or finding.level != "ok":
                level = "FAIL" if differs else finding.level
                found.append(Finding(level, finding.name, f"rank {rank} on {host}: {finding.text}"))
    clocks = [clock for _, clock, _ in all_of]
    drift = max(clocks) - min(clocks)
    return [*found, Finding("ok" if drift < _DRIFT else "warn", "clocks", f"within {drift:.1f} s of each other")]


def _links(world: World) -> list[Finding]:
    """A ring of all ranks, each handing its number to the next, then sums of known results, timed."""
    found = []
    mine = torch.full((1024,), float(world.rank), device=world.device)
    theirs = torch.empty_like(mine)
    before, behind = (world.rank - 1) % world.size, (world.rank + 1) % world.size
    exchange = [dist.P2POp(dist.isend, mine, behind), dist.P2POp(dist.irecv, theirs, before)]
    for work in dist.batch_isend_irecv(exchange):
        work.wait()
    whole = torch.tensor([int(theirs.eq(before).all())], device=world.device)
    dist.all_reduce(whole, dist.ReduceOp.MIN)
    name = dist.get_backend()
    right = bool(whole.item())
    text = f"{world.size} ranks, {name}: each heard the one before it" if right else f"{name} delivers wrong numbers"
    found.append(Finding("ok" if right else "FAIL", "ring", text))
    for size in _BUFFERS:
        buffer = torch.ones(size // 4, device=world.device)
        dist.all_reduce(buffer)
        right = bool(buffer.eq(world.size).all())
        seconds = []
        for _ in range(3):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(buffer)
            buffer[0].item()  # waits for the device
            seconds.append(time.perf_counter() - start)
        moved = 2 * (world.size - 1) / world.size * size / min(seconds)
        text = f"{size >> 20} MB in {1e3 * min(seconds):.2f} ms, {moved / 1e9:.2f} GB/s a rank"
        found.append(Finding("ok" if right else "FAIL", "all-reduce", text if right else "wrong sums"))
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
