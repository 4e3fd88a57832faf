"""Who am I among how many: rank, world and device of this process, for every way of being started."""

import os
import socket
import warnings
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from sctd.errors import UserError
from sctd.train.cpu import keep_freed_memory, share_cores


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init_world() -> World:
    """Join the process group of the launcher (`deepspeed`, `torchrun`), or form a group of one.

    NCCL on GPUs, gloo elsewhere.

    Raises:
        UserError: started as several tasks by something that does not number them.
    """
    if "RANK" not in os.environ:
        _refuse_other_launchers()
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    # DeepSpeed 0.19 calls collectives under names that torch 2.13 has announced to rename, thousands of times.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if get_accelerator().device_name() == "cuda":  # DeepSpeed's word, which DS_ACCELERATOR overrules
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        share_cores()
        keep_freed_memory()
        # DeepSpeed would compile its shared-memory collectives on first use: that takes a C++ compiler and half a
        # minute, for reductions whose order gloo fixes anyway.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
    return World(dist.get_rank(), dist.get_world_size(), device)


def _refuse_other_launchers() -> None:
    """Several tasks that do not know of each other would all train, and write, the same run."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        if int(os.environ.get(name, "1")) > 1:
            raise UserError(f"{name} is {os.environ[name]}, but RANK is not set: start with deepspeed or torchrun")


def barrier() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
