"""The process group of a job, and the device of this process."""

import os
import socket
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError

from sctd.errors import RunError, UserError, one_line
from sctd.train.engine.devices import keep_freed_memory, repeatable_products, share_cores
from sctd.train.engine.launch import Launch

_GLANCE = 1.0  # seconds
_QUIET = 10.0  # seconds of waiting for other ranks before a message says so
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
        where = f"{launch.address}:{launch.port}"
        raise RunError(
            f"rank {launch.rank} of {launch.size} cannot reach the others at {where}: {one_line(error)}"
        ) from None
    return store


def _wait_for_all(launch: Launch, store: dist.Store, names: list[str], timeout: float) -> None:
    deadline, reported = time.monotonic() + timeout, False
    while True:
        patience = min(_GLANCE, max(0.001, deadline - time.monotonic()))  # a signal is heard in between
        try:
            return store.wait(names, timedelta(seconds=patience))
        except dist.DistStoreError:
            present = {rank: store.get(name).decode() for rank, name in enumerate(names) if store.check([name])}
        missing = [rank for rank in range(launch.size) if rank not in present]
        if missing and time.monotonic() >= deadline:
            raise RunError(
                f"missing after {timeout:.0f} s: rank {_spans(missing)} of {launch.size}; "
                f"present: rank {_spans(list(present))}, on {', '.join(dict.fromkeys(present.values()))}"
            )
        if missing and launch.rank == 0 and not reported and time.monotonic() >= deadline - timeout + _QUIET:
            reported = True
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
            f"process {launch.local_rank} of this machine has no GPU: {visible} are visible; start one process for "
            "each GPU"
        )
    return launch.local_rank


def from_main(world: World, call: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """The result of `call` on rank 0, on every rank. It is pickled on the way.

    Args:
        group: of all ranks; None: the default one.

    Raises:
        UserError, RunError: of rank 0's call, on every rank; what the file system refused is a RunError.
    """
    answers: list[Any] = [_outcome(call) if world.is_main else None]
    if world.size > 1:
        dist.broadcast_object_list(answers, src=0, group=group)
    answer, problem = answers[0]
    if problem is not None:
        raise problem
    return answer


def together(world: World, call: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """The results of `call` on all ranks, in their order, on every rank, once it has succeeded on all of them.

    Args:
        group: of all ranks; None: the default one.

    Raises:
        UserError, RunError: of the first rank that failed, on every rank; what the file system refused is a RunError.
    """
    outcomes: list[Any] = [_outcome(call)] * world.size
    if world.size > 1:
        dist.all_gather_object(outcomes, outcomes[0], group=group)
    for rank, (_, problem) in enumerate(outcomes):
        if problem is not None:
            raise type(problem)(f"rank {rank}: {problem}" if world.size > 1 else str(problem))
    return [answer for answer, _ in outcomes]


def _outcome(call: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The result of a call, or its error: other ranks need both."""
    try:
        return call(), None
    except (UserError, RunError) as error:
        return None, error
    except (OSError, SafetensorError) as error:
        return None, RunError(str(error))


def host_group(world: World, timeout: float) -> dist.ProcessGroup | None:
    """A group of all ranks over gloo, whose exchanges cannot meet those of the training; None for a single rank.

    Args:
        timeout: seconds that a rank waits for the others.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if world.size > 1 else None


def barrier() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()
