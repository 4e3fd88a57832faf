"""Floating-point operations of a step, from its shapes, and the peak of the device it runs on.

A multiply-add counts as two. Forward and backward are counted as three forwards. Only matrix products count.
Legend: S positions a row, K kept, Q query positions, M predicted positions, D hidden size, V vocabulary.
"""

import time
from dataclasses import dataclass

import torch

from sctd.model.bert import BertShape
from sctd.model.token_dropping import LayerPlan
from sctd.objective.schedule import Phase

# Dense bf16 peaks of the vendors' data sheets, in FLOP/s.
_GPU_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12, "V100": 125e12}


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one row, forward and backward, by phase.

    Args:
        targets: M. outputs: Q of the last layer (1 + M, or S where it is computed in full).
        per_layer: every middle layer sees K tokens only (random-LTD), its first one too.
    """

    shape: BertShape
    plan: LayerPlan
    length: int
    targets: int
    outputs: int
    align_full: bool = True
    per_layer: bool = False

    def row(self, phase: Phase, keep: int) -> float:
        trunk = self.plan.first_dropped * self._layer(self.length, self.length)
        tail = (self.plan.full_tail - 1) * self._layer(self.length, self.length)
        tail += self._layer(self.outputs, self.length) + self._head()
        middle = self.plan.layers - self.plan.first_dropped - self.plan.full_tail
        full_path = middle * self._layer(self.length, self.length) + tail
        first = self._layer(keep, keep if self.per_layer else self.length)
        drop_path = first + (middle - 1) * self._layer(keep, keep) + tail
        paths = {
            Phase.FULL: full_path,
            Phase.DROP: drop_path,
            # The full path's first middle layer serves the dropping path too.
            Phase.ALIGN: full_path + drop_path - first if self.align_full else drop_path,
        }
        return 3.0 * (trunk + paths[phase])

    def _layer(self, queries: int, context: int) -> float:
        width, inner = self.shape.hidden_size, self.shape.intermediate_size
        projections = 4 * queries * width * width + 4 * context * width * width
        return projections + 4 * queries * context * width + 4 * queries * width * inner

    def _head(self) -> float:
        return 2.0 * self.targets * self.shape.hidden_size * (self.shape.hidden_size + self.shape.vocab_size)


def device_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak matrix throughput in FLOP/s: the data sheet's (bf16) on a known GPU, measured on a CPU, else None."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for key, peak in _GPU_PEAKS.items() if key in name), None)
    size = 1024
    a = torch.randn(size, size).to(dtype)
    fastest = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(a, a)
        fastest = min(fastest, time.perf_counter() - start)
    return 2.0 * size**3 / fastest
