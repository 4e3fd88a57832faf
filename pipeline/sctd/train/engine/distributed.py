"""The process group of a job, and the device of this process."""

import os
import socket
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError

from sctd.errors import RunError, UserError
from sctd.train.engine.cpu import keep_freed_memory, repeatable_products, share_cores
from sctd.train.engine.launch import Launch

_GLANCE = 1.0  # seconds
_QUIET = 10.0  # seconds of waiting for other ranks that are worth no word
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init_world(launch: Launch, timeout: float) -> World:
    """Join the process group of the job: NCCL on GPUs, gloo elsewhere.

    Args:
        timeout: seconds after which a collective that the others do not join is an error.

    Raises:
        UserError: more processes on this machine than it shows them GPUs.
        RunError: ranks that did not come, named.
    """
    launch.export(os.environ)
    # DeepSpeed 0.19 calls collectives under names that torch 2.13 has announced to rename, thousands of times.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if get_accelerator().device_name() == "cuda":  # DeepSpeed's word, which DS_ACCELERATOR overrules
        device = torch.device("cuda", _gpu(launch))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        share_cores(launch.local_size)
        keep_freed_memory()
        repeatable_products()
        # DeepSpeed would compile its shared-memory collectives on first use: that takes a C++ compiler and half a
        # minute, for reductions whose order gloo fixes anyway.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = _meet(launch, timeout)
    deepspeed.init_distributed(backend, verbose=False, timeout=timedelta(seconds=timeout))
    del store  # held until here: the group's own store shares its server
    return World(dist.get_rank(), dist.get_world_size(), device)


def _meet(launch: Launch, timeout: float) -> dist.Store:
    """Wait for all ranks, so that one that never comes is named: torch only counts them."""
    patience = timedelta(seconds=timeout)
    hosts_itself = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun hosts it for its processes
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    names = [f"sctd/{attempt}/{rank}" for rank in range(launch.size)]
    try:
        store = dist.TCPStore(
            launch.address, launch.port, launch.size, launch.rank == 0 and hosts_itself, patience,
            wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip
        store.set(names[launch.rank], socket.gethostname())
        _wait_for_all(launch, store, names, timeout)
    except dist.DistError as error:
        what = " ".join(str(error).split())
        raise RunError(
            f"rank {launch.rank} of {launch.size} did not reach the others at {launch.address}:{launch.port}: {what}"
        ) from None
    return store


def _wait_for_all(launch: Launch, store: dist.Store, names: list[str], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    told = False
    while True:
        # A little at a time: a signal is heard in between.
        patience = min(_GLANCE, max(0.001, deadline - time.monotonic()))
        try:
            return store.wait(names, timedelta(seconds=patience))
        except dist.DistStoreError:
            came = {rank: store.get(name).decode() for rank, name in enumerate(names) if store.check([name])}
        missing = [rank for rank in range(launch.size) if rank not in came]
        if missing and time.monotonic() >= deadline:
            raise RunError(
                f"missing after {timeout:.0f} s: rank {_spans(missing)} of {launch.size}; "
                f"there: rank {_spans(list(came))}, on {', '.join(dict.fromkeys(came.values()))}"
            )
        if missing and launch.rank == 0 and not told and time.monotonic() >= deadline - timeout + _QUIET:
            told = True
            print(f"waiting for rank {_spans(missing)} of {launch.size}, up to {timeout:.0f} s", flush=True)


def _spans(numbers: list[int]) -> str:
    """Ascending numbers, briefly: `0-3, 6`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in spans)


def _gpu(launch: Launch) -> int:
    """The process's GPU: its own number, or the only one where a launcher shows each process just its own."""
    visible = torch.cuda.device_count()
    if visible == 1:
        return 0
    if launch.local_rank >= visible:
        raise UserError(
            f"process {launch.local_rank} of this machine has no GPU: {visible} are visible; start as many processes "
            "as there are GPUs"
        )
    return launch.local_rank


def from_main(world: World, call: Callable[[], T]) -> T:
    """What `call` answers on rank 0, on every rank. Its answer is pickled on the way.

    Raises:
        UserError: of rank 0's call, on every rank, with the same message.
        RunError: so too, and for what the file system refused.
    """
    answer: list[Any] = [None, None]
    if world.is_main:
        try:
            answer[0] = call()
        except (UserError, RunError) as error:
            answer[1] = error
        except OSError as error:
            answer[1] = RunError(str(error))
    if world.size > 1:
        dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def together(world: World, call: Callable[[], T]) -> T:
    """What `call` answers on this rank, once it has succeeded on all of them.

    Raises:
        UserError: of the first rank's call that refused, on every rank.
        RunError: so too, and for what the file system refused.
    """
    answer, problem = None, None
    try:
        answer = call()
    except (UserError, RunError) as error:
        problem = type(error)(f"rank {world.rank}: {error}" if world.size > 1 else str(error))
    except (OSError, SafetensorError) as error:
        problem = RunError(f"rank {world.rank}: {error}")
    problems: list[Any] = [problem] * world.size
    if world.size > 1:
        dist.all_gather_object(problems, problem)
    for problem in problems:
        if problem is not None:
            raise problem
    return cast(T, answer)


def barrier() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()
