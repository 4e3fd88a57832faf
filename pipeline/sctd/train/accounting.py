"""Floating-point operations of a step, from its shapes, and what the devices that it may run on can do.

A multiply-add counts as two. Forward and backward are counted as three forwards. Only matrix products count.
Legend: S positions a row, K kept, Q query positions, M predicted positions, D hidden size, V vocabulary.
"""

import re
import time
from dataclasses import dataclass

import torch

from sctd.config import Config
from sctd.data.masking import target_count
from sctd.model.shape import BertShape
from sctd.model.token_dropping import LayerPlan
from sctd.objective.arms import ARMS, Selection
from sctd.objective.schedule import Phase


@dataclass(frozen=True)
class Gpu:
    """Figures of a vendor's data sheet, without sparsity.

    Args:
        half: FLOP/s of 16-bit matrix products. single: FLOP/s in float32.
        bandwidth: bytes/s of its memory. capacity: bytes of it.
        link: bytes/s to its neighbours in one direction, NVLink or else PCIe.
        bf16: whether its 16-bit products come in bf16, not in fp16 alone.
    """

    half: float
    single: float
    bandwidth: float
    capacity: float
    link: float
    bf16: bool = True


_PEAK_SECONDS = 0.5  # how long a CPU is measured: it may be busy with other work for a while

GPUS = {
    "A100-40GB": Gpu(312e12, 19.5e12, 1555e9, 40e9, 300e9),
    "A100-80GB": Gpu(312e12, 19.5e12, 2039e9, 80e9, 300e9),
    "H100-80GB": Gpu(989e12, 67e12, 3350e9, 80e9, 450e9),
    "H200-141GB": Gpu(989e12, 67e12, 4800e9, 141e9, 450e9),
    "A10": Gpu(125e12, 31.2e12, 600e9, 24e9, 32e9),
    "L40S": Gpu(362e12, 91.6e12, 864e9, 48e9, 32e9),
    "V100-32GB": Gpu(125e12, 15.7e12, 900e9, 32e9, 150e9, bf16=False),
}


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one row, forward and backward, by phase.

    Args:
        targets: M. outputs: Q of the last layer (1 + M, or S where it is computed in full).
        per_layer: every middle layer sees K tokens only (random-LTD), its first one too.
        recompute: whether the backward runs each layer's forward again.
    """

    shape: BertShape
    plan: LayerPlan
    length: int
    targets: int
    outputs: int
    align_full: bool = True
    per_layer: bool = False
    recompute: bool = False

    def row(self, phase: Phase, keep: int) -> float:
        """Model FLOPs: what the arm's mathematics needs, however it is computed."""
        return 3.0 * (self._encoder(phase, keep) + self.heads(phase) * self._head())

    def hardware_row(self, phase: Phase, keep: int) -> float:
        """FLOPs that are executed: those of `row`, and of the layers that are computed again for the backward.

        What attention kernels compute again within themselves is not counted.
        """
        return self.row(phase, keep) + (self._again(phase, keep) if self.recompute else 0.0)

    def token(self, phase: Phase, keep: int, padding: float = 0.0) -> float:
        """Model FLOPs for each token that is no padding; `padding`: share of the positions that are."""
        return self.row(phase, keep) / (self.length * (1.0 - padding))

    def layers(self, phase: Phase, keep: int) -> list[tuple[int, int]]:
        """(queries, context) of each layer that runs; an ALIGN step runs some of them on both paths."""
        whole = (self.length, self.length)
        middle = self.plan.layers - self.plan.first_dropped - self.plan.full_tail
        tail = [whole] * (self.plan.full_tail - 1) + [(self.outputs, self.length)]
        first = (keep, keep if self.per_layer else self.length)
        dropping = [(keep, keep)] * (middle - 1) + tail
        paths = {
            Phase.FULL: [whole] * middle + tail,
            Phase.DROP: [first] + dropping,
            # The full path's first middle layer serves the dropping path too.
            Phase.ALIGN: [whole] * middle + tail + dropping if self.align_full else [first] + dropping,
        }
        return [whole] * self.plan.first_dropped + paths[phase]

    def heads(self, phase: Phase) -> int:
        """How many paths end in the head, each with M positions a row."""
        return 2 if phase is Phase.ALIGN and self.align_full else 1

    def attention(self, phase: Phase, keep: int) -> float:
        """The part of `row` that attention's two products take."""
        return 3.0 * sum(self._scores(*layer) for layer in self.layers(phase, keep))

    def _again(self, phase: Phase, keep: int) -> float:
        """What a recomputed forward costs. It ends where all that the backward needs is there: without dropout, the
        last product of a modernbert's layers feeds nothing that is."""
        last = 2.0 * self.shape.hidden_size * self.shape.intermediate_size
        unused = sum(queries for queries, _ in self.layers(phase, keep)) * last
        spared = self.shape.is_modern and not self.shape.dropout
        return self._encoder(phase, keep) - (unused if spared else 0.0)

    def _encoder(self, phase: Phase, keep: int) -> float:
        return sum(self._layer(*layer) for layer in self.layers(phase, keep))

    def _layer(self, queries: int, context: int) -> float:
        width, inner = self.shape.hidden_size, self.shape.intermediate_size
        projections = 4 * queries * width * width + 4 * context * width * width
        matrices = 3 if self.shape.is_modern else 2  # of the feed-forward: the gate has its own
        return projections + self._scores(queries, context) + 2 * matrices * queries * width * inner

    def _scores(self, queries: int, context: int) -> float:
        return 4.0 * queries * context * self.shape.hidden_size

    def _head(self) -> float:
        return 2.0 * self.targets * self.shape.hidden_size * (self.shape.hidden_size + self.shape.vocab_size)


def step_flops(config: Config, shape: BertShape, length: int, share: float | None = None) -> StepFlops:
    """The count for rows of `length` tokens under this configuration.

    Args:
        share: of the tokens that are predicted; None: as the run begins.
    """
    arm = ARMS[config.arm]
    targets = target_count(config.data.mask_probability if share is None else share, length)
    return StepFlops(
        shape,
        arm.layer_plan(config.model),
        length,
        targets,
        outputs=length if config.objective.semantic_positions == "all" else 1 + targets,
        align_full=arm.needs_full_path(config.objective),
        per_layer=arm.selection is Selection.RANDOM_PER_LAYER,
        recompute=config.train.checkpoint_activations,
    )


def device_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak matrix throughput in FLOP/s: the data sheet's on a known GPU, measured on a CPU, else None."""
    if device.type == "cuda":
        gpu = gpu_named(torch.cuda.get_device_name(device))
        if gpu is None:
            return None
        return gpu.single if dtype is torch.float32 else gpu.half
    size = 1024
    a = torch.randn(size, size).to(dtype)
    fastest, deadline = float("inf"), time.perf_counter() + _PEAK_SECONDS
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        torch.mm(a, a)
        fastest = min(fastest, time.perf_counter() - start)
    return 2.0 * size**3 / fastest


def gpu_named(name: str) -> Gpu | None:
    """By a driver's name for it, such as `NVIDIA A100-SXM4-40GB`; sizes of memory do not matter to its speed here."""
    words = re.findall(r"\w+", name)
    return next((gpu for key, gpu in GPUS.items() if key.split("-")[0] in words), None)
