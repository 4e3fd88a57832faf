"""Seconds of a step by a roofline: products at a reachable share of the peak, everything else at that of a bandwidth.

Kernels run one after another, and the exchange of gradients after them: their times add up.
Legend: S positions a row, K kept, Q queries of a layer, M predicted positions, D hidden size, E inner size, V
vocabulary, N parameters.
"""

from dataclasses import dataclass

from sctd.objective.schedule import Phase
from sctd.plan.memory import Storage, parameter_count, storage_of
from sctd.train.accounting import Gpu, StepFlops

PRODUCTS = 0.65  # of the peak, in large matrix products
ATTENTION = 0.40  # of the peak, in attention
BANDWIDTH = 0.85  # of the memory's, in elementwise work
LINK = 0.70  # of the link's, in collectives
NODE = 8  # GPUs
FABRIC = 25e9  # bytes/s of a network adapter, 200 Gbit/s, of which a node has one for each GPU

# Passes over the states of a layer, forward and backward, where dropout + residual + LayerNorm and bias + GELU are one
# kernel each: the two of a layer read and write 4 x D, GELU 2 x E; their backwards as much and one E more; gradients of
# residuals and inputs are added up in 9 x D; gradients of biases read 5 x D and 1 x E.
_WIDE, _INNER = 30, 6
_WIDE_FORWARD, _INNER_FORWARD = 8, 2


@dataclass(frozen=True)
class StepTime:
    """Mean seconds of an optimizer step, by what they are spent on."""

    compute: float
    bandwidth: float
    exchange: float

    @property
    def total(self) -> float:
        return self.compute + self.bandwidth + self.exchange


def step_time(
    work: StepFlops,
    steps: dict[tuple[Phase, int], float],
    gpu: Gpu,
    gpus: int,
    stage: int,
    precision: str,
    micro_batch: int,
    accumulation: int,
) -> StepTime:
    """Prediction for an optimizer step of `accumulation` micro-batches.

    Args:
        steps: share of the steps that have this phase and K.
    """
    store, rows = storage_of(precision, stage), micro_batch * accumulation
    count = parameter_count(work.shape)
    peak = gpu.single if precision == "fp32" else gpu.half
    compute = moved = 0.0
    for (phase, keep), share in steps.items():
        attention = work.attention(phase, keep) * (4 / 3 if work.recompute else 1)
        other = work.hardware_row(phase, keep) - attention
        compute += share * rows * (other / PRODUCTS + attention / ATTENTION) / peak
        moved += share * rows * _row_bytes(work, phase, keep, store)
    moved += _optimizer_bytes(count, gpus, stage, accumulation)
    # A ring leaves each node once, and NCCL runs one ring for each adapter.
    link = gpu.link if gpus <= NODE else min(gpu.link, NODE * FABRIC)
    exchanged = _exchanged_bytes(count, gpus, stage, store.product, accumulation)
    return StepTime(compute, moved / (BANDWIDTH * gpu.bandwidth), exchanged / (LINK * link))


def _row_bytes(work: StepFlops, phase: Phase, keep: int, store: Storage) -> float:
    """Memory traffic of one row outside matrix products."""
    width, inner = work.shape.hidden_size, work.shape.intermediate_size
    queries = sum(layer[0] for layer in work.layers(phase, keep))
    wide, deep = _WIDE, _INNER
    if work.recompute:
        wide, deep = wide + _WIDE_FORWARD, deep + _INNER_FORWARD
    total = queries * (wide * width * store.hidden + deep * inner * store.product)
    total += work.heads(phase) * 4 * work.targets * work.shape.vocab_size * store.product
    if phase is not Phase.FULL:
        middle = work.plan.layers - work.plan.first_dropped - work.plan.full_tail
        moves = middle if work.per_layer else 1
        total += moves * 4 * (keep + work.length) * width * store.hidden  # split and merge, there and back
    return total


def _optimizer_bytes(count: int, gpus: int, stage: int, accumulation: int) -> float:
    """Adam reads and writes three float32 values a parameter; each micro-batch adds its gradients to their sum."""
    update = (24 + 4 + 2) * count / (1 if stage == 0 else gpus)
    norm = 4 * count / (gpus if stage >= 2 else 1)
    return update + norm + accumulation * 10 * count


def _exchanged_bytes(count: int, gpus: int, stage: int, low: int, accumulation: int) -> float:
    """Sent by each GPU in rings: gradients in float32, parameters in `low` bytes.

    Stages 2 and 3 reduce after every micro-batch, stage 3 gathers twice in each.
    """
    ring = (gpus - 1) / gpus * count
    gathers = {0: 0, 1: 1, 2: 1, 3: 2 * accumulation}[stage]
    reductions = 2 if stage < 2 else accumulation
    return ring * (4 * reductions + low * gathers)
