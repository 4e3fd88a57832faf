"""Whether a machine, or the ranks of a job, can train: `sctd doctor`, alone or under any launcher."""

import fcntl
import os
import platform
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sctd.errors import UserError, one_line
from sctd.train.engine.distributed import World, init_world
from sctd.train.engine.launch import discover
from sctd.train.keep.checkpoint import checkpoints, size_of
from sctd.train.slurm import seconds_of, squeue
from sctd_kernels import backend

_NEEDED = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "numpy", "tensorboard", "safetensors")
_OPTIONAL = {
    "triton": "kernels on GPUs",
    "mpi4py": "starting with mpirun",
    "apex": "optimizer.name=apex_*, model.layer_norm=apex",
}
_PATIENCE = 60.0  # seconds for the ranks to meet
_PROBE = 8 << 20  # bytes that are written to measure the disk
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
    """Check everything that a run in `folder` needs, on all ranks, and print what was found.

    Returns:
        Whether training can start: nothing FAILs on any rank.
    """
    launch = discover(os.environ)
    found = [*_packages(), *_devices(launch.local_rank, launch.local_size), *_system(), *_disk(folder)]
    try:
        world = init_world(launch, _PATIENCE)
    except (OSError, RuntimeError, ValueError, UserError) as error:
        _print([*found, Finding("FAIL", "ranks", one_line(error))])
        return False
    found.append(_kernels(world))
    if world.size > 1:
        found = [*_gathered(found, world), *_shared(folder, world)]
        try:
            found += _exchanges(world)
        except RuntimeError as error:  # of NCCL or gloo
            found.append(Finding("FAIL", "ring", f"rank {world.rank} on {socket.gethostname()}: {one_line(error)}"))
    if world.is_main:
        _print(found)
        failures, warnings = (sum(finding.level == level for finding in found) for level in ("FAIL", "warn"))
        print(f"{'NOT READY' if failures else 'ready'}: {failures} failures, {warnings} warnings, {world.size} ranks")
    dist.destroy_process_group()
    return not any(finding.level == "FAIL" for finding in found)


def _print(found: list[Finding]) -> None:
    for finding in found:
        print(f"{finding.level:<5} {finding.name:<14} {finding.text}")


def _judge(good: bool, name: str, text: str, advice: str, bad: str = "warn") -> Finding:
    return Finding("ok", name, text) if good else Finding(bad, name, f"{text}; {advice}")


def _packages() -> Iterator[Finding]:
    versions = {name: _version(name) for name in _NEEDED}
    missing = [name for name, found in versions.items() if found is None]
    text = ", ".join(f"{name} {found}" for name, found in versions.items() if found)
    yield Finding("ok", "versions", f"python {platform.python_version()}, {text}")
    if missing:
        yield Finding("FAIL", "versions", f"missing: {', '.join(missing)}; pip install sctd")
    for name, use in _OPTIONAL.items():
        yield Finding("ok", name, _version(name) or f"not installed; needed for {use}")


def _devices(local_rank: int, local_size: int) -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding("ok", "device", f"no GPU; {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads")
        return
    count = torch.cuda.device_count()
    if count > 1 and count < max(local_rank + 1, local_size):
        yield Finding("FAIL", "device", f"{local_size} ranks on this machine, but {count} GPUs: start one rank per GPU")
        return
    device = 0 if count == 1 else local_rank
    free, total = torch.cuda.mem_get_info(device)
    room = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    text = f"{torch.cuda.get_device_name(device)}, {room}, driver {_driver()}, CUDA {torch.version.cuda}"
    yield _judge(free > 0.9 * total, "device", text, "another process uses it")


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _system() -> Iterator[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield _judge(files >= _FILES, "open files", f"up to {files}", f"raise the limit: ulimit -n {_FILES}")
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        advice = "NCCL needs more: in a container, raise --shm-size"
        yield _judge(size >= _SHARED, "shared memory", f"{size / 1e9:.1f} GB", advice)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _disk(folder: Path) -> Iterator[Finding]:
    """Free space, speed and locks where the run will write, and the job's time limit; leaves nothing behind."""
    parent = _existing(folder)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        yield Finding("FAIL", "folder", f"{folder}: {parent} is not a writable folder; choose another run.dir")
        return
    usage, inodes = shutil.disk_usage(parent), os.statvfs(parent).f_favail
    newest = next(iter(checkpoints(folder)), None)
    size = size_of(newest) if newest else 0
    needed = 2.0 * size if newest else _ROOM
    text = f"{folder}: {usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB free"
    advice = f"two checkpoints take {needed / 1e9:.1f} GB: make room"
    yield _judge(usage.free > needed, "disk", text, advice, bad="FAIL" if newest else "warn")
    if 0 < inodes < _INODES:
        yield Finding("warn", "inodes", f"{folder}: {inodes} left; remove old files")
    probe = parent / f".sctd-doctor-{socket.gethostname()}-{os.getpid()}"
    try:
        speed, locks = _write(probe)
    except OSError as error:
        yield Finding("FAIL", "disk", f"{folder} cannot be written: {one_line(error)}")
        return
    finally:
        probe.unlink(missing_ok=True)
    yield Finding("ok", "disk speed", f"{speed / 1e6:.0f} MB/s, fsync included")
    if not locks:
        text = f"{folder}: its file system has no locks, so nothing keeps two jobs from writing to one run"
        yield Finding("warn", "locks", text)
    left = squeue(os.environ["SLURM_JOB_ID"], "%L") if "SLURM_JOB_ID" in os.environ else None
    if left:
        limit, seconds = seconds_of(left), size / speed
        text = f"{left} left; a checkpoint takes about {seconds:.0f} s"
        enough = limit is None or seconds < limit / 2
        yield _judge(enough, "time limit", text, "ask for more time, or use a faster disk")


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


def _kernels(world: World) -> Finding:
    try:
        chosen = backend(world.device.type)
    except ValueError as error:
        return Finding("FAIL", "kernels", one_line(error))
    tools = [name for name in ("nvcc", "g++") if shutil.which(name)]
    return Finding("ok", "kernels", f"{chosen}; compilers: {', '.join(tools) or 'none: leave train.compile=false'}")


def _gathered(mine: list[Finding], world: World) -> list[Finding]:
    """Rank 0's findings, and those of other ranks that are not ok or name another version."""
    gathered: list[Any] = [None] * world.size
    gpu = str(torch.cuda.get_device_properties(world.device).uuid) if world.device.type == "cuda" else None
    dist.all_gather_object(gathered, (socket.gethostname(), time.time(), mine, gpu))
    found = list(gathered[0][2])
    versions = [finding.text for finding in found if finding.name in ("versions", *_OPTIONAL)]
    holders: dict[str, int] = {}
    for rank, (host, _, theirs, uuid) in enumerate(gathered):
        if uuid is not None and holders.setdefault(uuid, rank) != rank:
            text = f"ranks {holders[uuid]} and {rank} use the same GPU of {host}: start one rank per GPU"
            found.append(Finding("FAIL", "device", text))
        for finding in theirs:
            differs = finding.name in ("versions", *_OPTIONAL) and finding.text not in versions
            if rank > 0 and (differs or finding.level != "ok"):
                level = "FAIL" if differs else finding.level
                found.append(Finding(level, finding.name, f"rank {rank} on {host}: {finding.text}"))
    clocks = [entry[1] for entry in gathered]
    drift = max(clocks) - min(clocks)
    return [*found, _judge(drift < _DRIFT, "clocks", f"within {drift:.1f} s of each other", "synchronise them")]


def _shared(folder: Path, world: World) -> list[Finding]:
    """Whether all ranks see the same folder: each writes its part of a checkpoint there."""
    made: list[Any] = [None]
    mark = _existing(folder) / f".sctd-doctor-{socket.gethostname()}-{os.getpid()}-shared"
    if world.is_main:
        with suppress(OSError):  # then the line of the disk says so
            mark.touch()
            made = [mark.name]
    try:
        dist.broadcast_object_list(made)
        if made[0] is None:
            return []
        seen: list[Any] = [None] * world.size
        deadline = time.monotonic() + _SETTLES  # network file systems cache that a file does not exist
        while not (sees := mark.with_name(made[0]).exists()) and time.monotonic() < deadline:
            time.sleep(0.2)
        dist.all_gather_object(seen, (socket.gethostname(), sees))
    finally:
        if world.is_main and made[0] is not None:
            mark.unlink(missing_ok=True)
    blind = sorted({host for host, sees in seen if not sees})
    if blind:
        text = f"{folder} on {', '.join(blind)} is not the folder that rank 0 sees: choose one that all nodes share"
        return [Finding("FAIL", "folder", text)]
    return [Finding("ok", "folder", f"{folder} is the same on all ranks")]


def _exchanges(world: World) -> Iterator[Finding]:
    """Each rank sends its number to the next one in a ring; then sums of known results, timed."""
    mine = torch.full((1024,), float(world.rank), device=world.device)
    theirs = torch.empty_like(mine)
    before, behind = (world.rank - 1) % world.size, (world.rank + 1) % world.size
    exchange = [dist.P2POp(dist.isend, mine, behind), dist.P2POp(dist.irecv, theirs, before)]
    for work in dist.batch_isend_irecv(exchange):
        work.wait()
    whole = torch.tensor([int(theirs.eq(before).all())], device=world.device)
    dist.all_reduce(whole, dist.ReduceOp.MIN)
    right, backend_name = bool(whole.item()), dist.get_backend()
    text = f"{world.size} ranks, {backend_name}: each received from the one before it"
    yield Finding("ok", "ring", text) if right else Finding("FAIL", "ring", f"{backend_name} delivers wrong numbers")
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
        text = f"{size >> 20} MB in {1e3 * min(seconds):.2f} ms, {moved / 1e9:.2f} GB/s per rank"
        yield Finding("ok" if right else "FAIL", "all-reduce", text if right else "wrong sums")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
