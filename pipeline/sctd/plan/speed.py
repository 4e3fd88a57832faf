"""Seconds of a step by a roofline: products at a reachable share of the peak, everything else at that of a bandwidth.

Kernels run one after another, and the exchange of gradients after them: their times add up.
Legend: S positions a row, K kept, Q queries of a layer, M predicted positions, D hidden size, E inner size, V
vocabulary, N parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from sctd.objective.flops import StepFlops
from sctd.objective.schedule import Phase
from sctd.plan.memory import Storage, parameter_count, storage_of
from sctd.plan.steps import Step
from sctd.train.engine.devices import Gpu

PRODUCTS = 0.65  # of the peak, in large matrix products
ATTENTION = 0.40  # of the peak, in attention
BANDWIDTH = 0.85  # of the memory's, in elementwise work
LINK = 0.70  # of the link's, in collectives
NODE = 8  # GPUs
FABRIC = 25e9  # bytes/s of a network adapter, 200 Gbit/s, of which a node has one for each GPU

# Passes over the states of a layer outside its products, so many times D and times E.
# bert: dropout + residual + LayerNorm and bias + GELU are one kernel each; the two of a layer read and write 4 x D,
# GELU 2 x E; their backwards as much and one E more; gradients of residuals and inputs are added up in 9 x D; gradients
# of biases read 5 x D and 1 x E.
# modernbert: two norms of 2 x D, two residuals of 3 x D, queries and keys turned in 2 x D each, GeGLU in 3 x E; their
# backwards: a norm 5 x D, it reads its states twice, a turn 2 x D, GeGLU 5 x E; gradients are added up in 9 x D. Each
# of its two dropouts, where there are any, takes 2 x D either way.
_FORWARD = {"bert": (8, 2), "modernbert": (14, 3)}
_BACKWARD = {"bert": (22, 4), "modernbert": (23, 5)}
_DROPOUT = {"bert": 0, "modernbert": 4}


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
    steps: Mapping[Step, float],
    gpu: Gpu,
    gpus: int,
    stage: int,
    precision: str,
    micro_batch: int,
    accumulation: int,
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
    moved += _optimizer_bytes(count, gpus, stage, accumulation)
    # A ring leaves each node once, and NCCL runs one ring for each adapter.
    link = gpu.link if gpus <= NODE else min(gpu.link, NODE * FABRIC)
    exchanged = _exchanged_bytes(count, gpus, stage, store.product, accumulation)
    return StepTime(compute, moved / (BANDWIDTH * gpu.bandwidth), exchanged / (LINK * link))


def _row_bytes(work: StepFlops, phase: Phase, keep: int, store: Storage) -> float:
    """Memory traffic of one row outside matrix products."""
    shape, forwards = work.shape, 2 if work.recompute else 1
    width, dropout = shape.hidden_size, _DROPOUT[shape.family] if shape.dropout else 0
    (wide, deep), (wide_back, deep_back) = _FORWARD[shape.family], _BACKWARD[shape.family]
    wide, deep = forwards * (wide + dropout) + wide_back + dropout, forwards * deep + deep_back
    queries = sum(layer[0] for layer in work.layers(phase, keep))
    total = queries * (wide * width * store.hidden + deep * shape.intermediate_size * store.product)
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
