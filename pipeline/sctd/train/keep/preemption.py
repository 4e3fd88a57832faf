"""Stopping and saving on request, agreed by all ranks at a step boundary.

Signals are only noted (signals.py), so that none can interrupt a save. Files named STOP and SAVE in the folder of the
run ask for the same from a shell. At each step boundary the ranks exchange what they were asked for, over gloo and one
step behind the training, so that neither the device nor the network is waited for.
"""

import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sctd.signals import Mailbox
from sctd.train.engine.distributed import World, host_group

REQUEST_FILES = ("STOP", "SAVE")
STOPPED = "stopped"  # what a STOP that was seen is renamed to: who asked for it does not want the job to come back
_LOOK_EVERY = 1.0  # seconds between looks into the folder, which may be on a slow network


class Requests:
    """Requests to the job: the same on every rank.

    Args:
        mailbox: of this process. run_dir: where rank 0 looks for STOP and SAVE.
        timeout: seconds that a rank waits for the others.

    Attributes:
        stop, save: requested and agreed; who acts on `save` resets it.
        failed: the background save of a rank has failed.
    """

    def __init__(self, mailbox: Mailbox, run_dir: Path, world: World, timeout: float) -> None:
        self.stop = self.save = self.failed = False
        self._mailbox, self._run_dir, self._world = mailbox, run_dir, world
        if world.is_main:
            with suppress(OSError):
                (run_dir / STOPPED).unlink()  # of an earlier job
        self._group = host_group(world, timeout)
        self._pending: tuple[Tensor, dist.Work] | None = None
        self._looked = 0.0

    def agree(self, failed: bool = False) -> None:
        """Call at every step boundary on all ranks: learn what any of them was asked for before the one before."""
        mine = torch.tensor([bool(self._mailbox.signals), False, failed], dtype=torch.uint8)
        if self._world.is_main and time.monotonic() - self._looked >= _LOOK_EVERY:
            self._looked = time.monotonic()
            mine |= torch.tensor([*map(self._take, REQUEST_FILES), False], dtype=torch.uint8)
        self.collect()
        if self._group is None:
            self._note(mine)
        else:
            self._pending = mine, dist.all_reduce(mine, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def gather(self, value: float) -> list[float]:
        """A number of each rank, on every rank."""
        values = [torch.zeros(1, dtype=torch.float64) for _ in range(self._world.size)]
        if self._group is None:
            return [value]
        dist.all_gather(values, torch.tensor([value], dtype=torch.float64), group=self._group)
        return [float(one) for one in values]

    def collect(self) -> None:
        """Wait for the exchange that is under way, if there is one."""
        if self._pending is not None:
            asked, work = self._pending
            self._pending = None
            work.wait()
            self._note(asked)

    def _note(self, asked: Tensor) -> None:
        stop, save, failed = asked.tolist()
        self.stop, self.save, self.failed = self.stop or bool(stop), self.save or bool(save), bool(failed)

    def _take(self, name: str) -> bool:
        """Whether the file is there; it is moved away, so that it counts only once."""
        with suppress(OSError):  # a folder on a network may fail for a moment
            file = self._run_dir / name
            if name == "STOP":
                file.replace(self._run_dir / STOPPED)
            else:
                file.unlink()
            return True
        return False
