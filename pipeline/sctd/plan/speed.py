"""Seconds of a step by a roofline: products at a reachable share of the peak, all else at a share of the bandwidth.

Kernels run one after another, and the all-reduce of gradients after them: their times add up.
Legend: S positions a row, K kept, Q queries of a layer, M predicted positions, D hidden size, E inner size, V
vocabulary, N parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from sctd.objective.schedule import Phase
from sctd.plan.memory import Storage, parameter_count, storage_of
from sctd.plan.workload import Step
from sctd.train.engine.devices import Gpu
from sctd.train.flops import StepFlops

PRODUCTS = 0.65  # share of the peak in large matrix products
ATTENTION = 0.40  # share of the peak in attention
BANDWIDTH = 0.85  # share of the memory bandwidth in elementwise work
LINK = 0.70  # share of the link bandwidth in collectives
NODE = 8  # GPUs
FABRIC = 25e9  # bytes/s of a network adapter, 200 Gbit/s; a node has one for each GPU

# Elements read and written for each position of a layer outside its products, in multiples of (D, E).
# bert: dropout + residual + LayerNorm are one kernel, 4 x D, twice per layer; bias + GELU are one, 2 x E. The backward
# takes as much and one E more; adding up gradients of residuals and inputs 9 x D; gradients of biases 5 x D + 1 x E.
# modernbert: two norms of 2 x D, two residuals of 3 x D, rotation of queries and keys 2 x D each, GeGLU 3 x E. The
# backward: a norm 5 x D (it reads its states twice), a rotation 2 x D, GeGLU 5 x E, adding up gradients 9 x D. Each of
# the two dropouts, if there are any, takes 2 x D in either direction.
_FORWARD = {"bert": (8, 2), "modernbert": (14, 3)}
_BACKWARD = {"bert": (22, 4), "modernbert": (23, 5)}
_DROPOUT = {"bert": 0, "modernbert": 4}


@dataclass(frozen=True)
class StepTime:
    """Mean seconds of an optimizer step: matrix products, memory traffic outside them, all-reduce of gradients."""

    compute: float
    bandwidth: float
    exchange: float

    @property
    def total(self) -> float:
        return self.compute + self.bandwidth + self.exchange


def step_time(
    steps: Mapping[Step, float], gpu: Gpu, gpus: int, stage: int, precision: str, micro_batch: int, accumulation: int
) -> StepTime:
    """Prediction for an optimizer step of `accumulation` micro-batches.

    Args:
        steps: the kinds of steps, and their shares of all.
    """
    store, rows = storage_of(precision, stage), micro_batch * accumulation
    count = parameter_count(next(iter(steps)).work.shape)
    peak = gpu.single if precision == "fp32" else gpu.half
    compute = moved = 0.0
    for (work, phase, keep), share in steps.items():
        attention = work.attention(phase, keep) * (4 / 3 if work.recompute else 1)
        other = work.hardware_row(phase, keep) - attention
        compute += share * rows * (other / PRODUCTS + attention / ATTENTION) / peak
        moved += share * rows * _row_bytes(work, phase, keep, store)
    # Adam reads and writes three float32 values per parameter; each micro-batch adds its gradients to the sum.
    updated, summed = count / (1 if stage == 0 else gpus), count / (1 if stage < 2 else gpus)
    moved += (24 + 4 + 2) * updated + 4 * summed + accumulation * 10 * count
    # Each GPU sends gradients in float32 and parameters in 16 bits. Stages 2 and 3 reduce gradients after every
    # micro-batch; stage 3 gathers parameters twice in each.
    reductions = 2 if stage < 2 else accumulation
    gathers = {0: 0, 1: 1, 2: 1, 3: 2 * accumulation}[stage]
    sent = (gpus - 1) / gpus * count * (4 * reductions + store.product * gathers)
    # A ring leaves each node once, and NCCL runs one ring per adapter.
    link = gpu.link if gpus <= NODE else min(gpu.link, NODE * FABRIC)
    return StepTime(compute, moved / (BANDWIDTH * gpu.bandwidth), sent / (LINK * link))


def _row_bytes(work: StepFlops, phase: Phase, keep: int, store: Storage) -> float:
    """Memory traffic of one row outside matrix products."""
    shape, forwards = work.shape, 2 if work.recompute else 1
    width, dropout = shape.hidden_size, _DROPOUT[shape.family] if shape.dropout else 0
    (wide, deep), (wide_back, deep_back) = _FORWARD[shape.family], _BACKWARD[shape.family]
    wide, deep = forwards * (wide + dropout) + wide_back + dropout, forwards * deep + deep_back
    queries = sum(layer[0] for layer in work.layers(phase, keep))
    total = queries * (wide * width * store.hidden + deep * shape.intermediate_size * store.product)
    total += work.heads(phase) * 4 * work.targets * shape.vocab_size * store.product
    if phase is not Phase.FULL:
        middle = work.plan.layers - work.plan.first_dropped - work.plan.full_tail
        moves = middle if work.per_layer else 1
        total += moves * 4 * (keep + work.length) * width * store.hidden  # split and merge, forward and backward
    return total
