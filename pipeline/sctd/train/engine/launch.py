"""Rank and world size of this process, for every launcher."""

import re
import socket
import subprocess
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from sctd.errors import UserError
from sctd.files import free_port

_LAST_PORT = 65535
_DERIVED_PORTS = 20000  # and as many above it: below the range that systems give out by themselves


@dataclass(frozen=True)
class Launch:
    """One process of a job.

    Args:
        launcher: `environment` (deepspeed, torchrun and whatever else sets RANK), `slurm`, `mpi` or `none`.
        local_rank, local_size: among the processes on this machine.
        address, port: where the ranks meet; rank 0 listens there.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int

    def export(self, environment: MutableMapping[str, str]) -> None:
        """Set the variables that torch and DeepSpeed read."""
        environment.update(
            RANK=str(self.rank), WORLD_SIZE=str(self.size), LOCAL_RANK=str(self.local_rank),
            LOCAL_WORLD_SIZE=str(self.local_size), MASTER_ADDR=self.address, MASTER_PORT=str(self.port),
        )  # fmt: skip


def discover(env: Mapping[str, str]) -> Launch:
    """This process's place in its job, as its launcher set it; a job of one process without a launcher.

    `mpirun` inside an allocation of SLURM is MPI's job, `srun --mpi=...` is SLURM's.

    Raises:
        UserError: a launcher that sets only some variables, or whose package is missing.
    """
    launch = _discover(env)
    if not 0 <= launch.rank < launch.size:
        raise UserError(f"the launcher says rank {launch.rank} of {launch.size}: ranks must be below the world size")
    if launch.port > _LAST_PORT:
        raise UserError(f"MASTER_PORT is {launch.port}: ports end at {_LAST_PORT}")
    return launch


def world_size(env: Mapping[str, str]) -> int:
    """WORLD_SIZE, the number of ranks to check a configuration for; 1 where it is not set."""
    size = _number(env, "WORLD_SIZE", 1)
    if size < 1:
        raise UserError(f"WORLD_SIZE is {size}: it must be at least 1")
    return size


def _discover(env: Mapping[str, str]) -> Launch:
    if "RANK" in env:
        return _from_environment(env)
    if _number(env, "OMPI_COMM_WORLD_SIZE", 1) > 1:
        return _from_mpi(env)
    if _number(env, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return _from_slurm(env)
    if _number(env, "PMI_SIZE", 1) > 1:
        return _from_mpi(env)
    return Launch("none", 0, 1, 0, 1, "127.0.0.1", free_port())


def _from_environment(env: Mapping[str, str]) -> Launch:
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    if missing:
        raise UserError(f"RANK is set, but not {', '.join(missing)}: start with a launcher that sets all of them")
    size = _number(env, "WORLD_SIZE")
    local_size = _number(env, "LOCAL_WORLD_SIZE", _number(env, "LOCAL_SIZE", 1))
    rank, local = _number(env, "RANK"), _number(env, "LOCAL_RANK", 0)
    return Launch("environment", rank, size, local, local_size, env["MASTER_ADDR"], _number(env, "MASTER_PORT"))


def _from_slurm(env: Mapping[str, str]) -> Launch:
    """One task of an `srun`. The first node of the step is where rank 0 runs."""
    job, step = _number(env, "SLURM_JOB_ID", 0), _number(env, "SLURM_STEP_ID", 0)
    return Launch(
        "slurm",
        rank=_number(env, "SLURM_PROCID"),
        size=_number(env, "SLURM_STEP_NUM_TASKS"),
        local_rank=_number(env, "SLURM_LOCALID"),
        local_size=_tasks_here(env),
        address=env.get("MASTER_ADDR") or _first_host(env.get("SLURM_STEP_NODELIST", "")),
        port=_number(env, "MASTER_PORT", _DERIVED_PORTS + (job * 7 + step) % _DERIVED_PORTS),
    )


def _tasks_here(env: Mapping[str, str]) -> int:
    """Of `SLURM_STEP_TASKS_PER_NODE`, which counts equal nodes together: `8(x3),4`."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE", "1")
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part, re.ASCII)
        if not found:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE is {text!r} in the environment: srun writes it as 8(x3),4")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts[min(_number(env, "SLURM_NODEID", 0), len(counts) - 1)]


def _first_host(nodes: str) -> str:
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise UserError(
            f"cannot find the first host of {nodes!r}: scontrol says {error}; set MASTER_ADDR to its name"
        ) from None


def _from_mpi(env: Mapping[str, str]) -> Launch:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"started by mpirun, but mpi4py cannot be used ({error}): pip install 'sctd[mpi]' on every node, or start "
            "with srun, torchrun or deepspeed"
        ) from None
    comm = MPI.COMM_WORLD
    here = comm.Split_type(MPI.COMM_TYPE_SHARED)
    alone = here.Get_size() == comm.Get_size()
    chosen = ("127.0.0.1" if alone else socket.gethostname(), free_port())
    address, port = comm.bcast(chosen if comm.Get_rank() == 0 else None)
    address, port = env.get("MASTER_ADDR", address), _number(env, "MASTER_PORT", port)
    return Launch("mpi", comm.Get_rank(), comm.Get_size(), here.Get_rank(), here.Get_size(), address, port)


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    if name not in env and default is not None:
        return default
    text = env.get(name, "")
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"{name} is {text!r} in the environment: the launcher must set it to a whole number")
    return int(text)
