"""Whether a machine, or the ranks of a job, can train: `sctd doctor`, alone or under any launcher."""

import fcntl
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
from sctd.train.engine.distributed import World, init_world
from sctd.train.engine.launch import discover
from sctd.train.keep.checkpoint import checkpoints, size_of
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
_SETTLES = 10.0  # seconds until a new file is seen from other machines
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
    local = [*_packages(), *_devices(launch.local_rank, launch.local_size), *_system(), *_disk(folder)]
    try:
        world = init_world(launch, _PATIENCE)
    except (OSError, RuntimeError, ValueError, UserError) as error:
        _print([*local, Finding("FAIL", "ranks", _line(error))])
        return False
    found = [*local, *_kernels(world)]
    if world.size > 1:
        found = [*_gathered(found, world), *_shared(folder, world), *_links(world)]
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
    room = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    yield Finding(level, "device", f"{name}, {room}, driver {_driver()}, CUDA {torch.version.cuda}{busy}")


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


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
    """Room, speed and locks where the run will write, and whether the job's time suffices; leaves nothing behind."""
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
    probe = standing / f".sctd-doctor-{socket.gethostname()}-{os.getpid()}"
    try:
        speed, locks = _write(probe)
    except OSError as error:
        yield Finding("FAIL", "disk", f"{folder} cannot be written: {_line(error)}")
        return
    finally:
        probe.unlink(missing_ok=True)
    yield Finding("ok", "disk speed", f"{speed / 1e6:.0f} MB/s written and on disk")
    if not locks:
        text = f"{folder}: its file system has none, so nothing keeps two jobs from writing to one run at once"
        yield Finding("warn", "locks", text)
    left = _time_left()
    if left is not None:
        seconds = size_of(newest) / speed if newest else 0.0
        level = "ok" if seconds < _to_seconds(left) / 2 else "warn"
        hint = "" if level == "ok" else "; ask for more time, or save on a faster disk"
        yield Finding(level, "time limit", f"{left} left; a checkpoint takes about {seconds:.0f} s{hint}")


def _write(probe: Path) -> tuple[float, bool]:
    """Bytes a second, fsync included, and whether the file can be locked."""
    start = time.perf_counter()
    with probe.open("wb") as file:
        file.write(os.urandom(_PROBE))
        file.flush()
        os.fsync(file.fileno())
        speed = _PROBE / (time.perf_counter() - start)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return speed, False
    return speed, True


def _time_left() -> str | None:
    """Of this SLURM job, as squeue says it; None outside of one."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    try:
        command = ["squeue", "-h", "-j", job, "-o", "%L"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return said or None


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
    all_of: list[Any] = [None] * world.size
    gpu = str(torch.cuda.get_device_properties(world.device).uuid) if world.device.type == "cuda" else None
    dist.all_gather_object(all_of, (socket.gethostname(), time.time(), mine, gpu))
    found = list(all_of[0][2])
    versions = [finding.text for finding in found if finding.name in ("versions", *_OPTIONAL)]
    holders: dict[str, int] = {}
    for rank, (host, _, theirs, uuid) in enumerate(all_of):
        if uuid is not None and holders.setdefault(uuid, rank) != rank:
            text = f"ranks {holders[uuid]} and {rank} use the same GPU of {host}: start one rank for each"
            found.append(Finding("FAIL", "device", text))
        for finding in theirs:
            differs = finding.name in ("versions", *_OPTIONAL) and finding.text not in versions
            if rank > 0 and (differs or finding.level != "ok"):
                level = "FAIL" if differs else finding.level
                found.append(Finding(level, finding.name, f"rank {rank} on {host}: {finding.text}"))
    clocks = [entry[1] for entry in all_of]
    drift = max(clocks) - min(clocks)
    return [*found, Finding("ok" if drift < _DRIFT else "warn", "clocks", f"within {drift:.1f} s of each other")]


def _shared(folder: Path, world: World) -> list[Finding]:
    """Whether all ranks see the same folder: each writes its part of a checkpoint there."""
    standing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    token: list[Any] = [None]
    mark: Path | None = None
    if world.is_main:
        try:
            mark = standing / f".sctd-doctor-{socket.gethostname()}-{os.getpid()}-shared"
            mark.touch()
            token = [mark.name]
        except OSError:
            mark = None  # the disk's own line says it
    try:
        dist.broadcast_object_list(token)
        seen: list[Any] = [None] * world.size
        dist.all_gather_object(seen, (socket.gethostname(), token[0] is None or _appears(standing / token[0])))
    finally:
        if mark is not None:
            mark.unlink(missing_ok=True)
    blind = sorted({host for host, sees in seen if not sees})
    if blind:
        text = f"{folder} on {', '.join(blind)} is not the folder that rank 0 sees: choose one that all nodes share"
        return [Finding("FAIL", "folder", text)]
    return [Finding("ok", "folder", f"{folder} is the same on all ranks")] if token[0] else []


def _appears(path: Path) -> bool:
    """Now or soon: network file systems remember for some seconds what was not there."""
    deadline = time.monotonic() + _SETTLES
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _links(world: World) -> list[Finding]:
    try:
        return list(_exchanges(world))
    except RuntimeError as error:  # of NCCL or gloo
        return [Finding("FAIL", "ring", f"rank {world.rank} on {socket.gethostname()}: {_line(error)}")]


def _exchanges(world: World) -> Iterator[Finding]:
    """A ring of all ranks, each handing its number to the next, then sums of known results, timed."""
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
    yield Finding("ok" if right else "FAIL", "ring", text)
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
        yield Finding("ok" if right else "FAIL", "all-reduce", text if right else "wrong sums")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
