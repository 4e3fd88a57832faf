"""One piece of work, and everyone who can do it."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sctd.bench.timing import DEVICE, kernel_seconds, medians

COPY = "copy of the same bytes"
OURS = "sctd, "  # and the backend
Call = Callable[[], Any]


@dataclass
class Group:
    """Args:
    candidates: by name; the copy joins them where bytes are given.
    moved: bytes that the work must read and write at least; None where it does more than move.
    seconds: of one call, as a host sees it. kernel_seconds: of one call on the GPU alone; empty on a CPU.
    """

    candidates: dict[str, Call]
    moved: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    kernel_seconds: dict[str, float] = field(default_factory=dict)

    def measure(self, rounds: int, repeat: int, say: str) -> None:
        """Fill in the seconds, and let go of the candidates with all their tensors."""
        if self.moved is not None:
            self.candidates[COPY] = torch.empty(self.moved // 2, dtype=torch.uint8, device=DEVICE).clone
        self.seconds = medians(self.candidates, rounds, repeat, say)
        for name, call in self.candidates.items():
            found = kernel_seconds(call, repeat)
            if found is not None:
                self.kernel_seconds[name] = found
        self.candidates.clear()

    def compared(self) -> dict[str, float]:
        """What ratios are made of: the kernels' own time where all of it is known."""
        return self.kernel_seconds if len(self.kernel_seconds) == len(self.seconds) else self.seconds


def ours(backends: list[str], call: Call) -> dict[str, Call]:
    return {f"{OURS}{backend}": call for backend in backends}


def forward(calls: dict[str, Call]) -> dict[str, Call]:
    """Without what a backward would need."""
    return {name: _under(name, torch.no_grad()(call)) for name, call in calls.items()}


def with_backward(calls: dict[str, Call], of: Sequence[Tensor]) -> dict[str, Call]:
    """Followed by the gradients of these tensors."""
    return {name: _under(name, _differentiated(call, of)) for name, call in calls.items()}


def _under(name: str, call: Call) -> Call:
    """The backend is asked for by the backward too, so the choice must stand around both."""
    if not name.startswith(OURS):
        return call

    def chosen() -> Any:
        before = os.environ.get("SCTD_KERNELS", "auto")
        os.environ["SCTD_KERNELS"] = name.removeprefix(OURS)
        try:
            return call()
        finally:
            os.environ["SCTD_KERNELS"] = before

    return chosen


def _differentiated(call: Call, of: Sequence[Tensor]) -> Call:
    grads: list[Tensor] = []

    def both() -> Any:
        out = call()
        outs = out if isinstance(out, tuple) else (out,)
        if not grads:
            grads.extend(torch.ones_like(each) for each in outs)
        return torch.autograd.grad(outs, of, grads)

    return both
