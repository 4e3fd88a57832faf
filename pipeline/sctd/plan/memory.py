"""Bytes that training takes on each GPU, part by part.

Parameters, gradients and optimizer states follow the engine: ZeRO-0 keeps float32 parameters and runs under autocast,
the other stages keep 16-bit parameters and float32 copies; gradients are summed in float32. Activations are counted
tensor by tensor: what each operation of the model keeps for its backward.

Legend: S positions a row, Q queries and C context of a layer, M predicted positions, D hidden size, E inner size,
H heads, V vocabulary, N parameters.
"""

import functools
from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields

import torch

from sctd.model.bert import Bert
from sctd.model.shape import BertShape
from sctd.objective.schedule import Phase
from sctd.plan.workload import Step
from sctd.train.flops import StepFlops

STAGES = (0, 1, 2, 3)
_BUCKET = 500_000_000  # elements that DeepSpeed reduces at once
_LIVE = 1_000_000_000  # parameters that ZeRO-3 keeps gathered
_FLOAT = 4
_MOMENTS = 2 * _FLOAT  # of a norm: mean and deviation at a position


@dataclass(frozen=True)
class Storage:
    """Bytes of an element: `product` in matrix products, `hidden` in the states between them."""

    product: int
    hidden: int

    @property
    def casts(self) -> bool:
        """Whether each product copies its input to another dtype, as autocast does."""
        return self.product != self.hidden


def storage_of(precision: str, stage: int) -> Storage:
    if precision == "fp32":
        return Storage(_FLOAT, _FLOAT)
    return Storage(2, _FLOAT if stage == 0 else 2)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a step, by part."""

    parameters: float
    float32_copies: float
    gradients: float
    optimizer_states: float
    activations: float
    logits: float
    buffers: float

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))


@functools.cache
def parameter_count(shape: BertShape) -> int:
    """N; the output embeddings are the word embeddings."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Bert(shape).parameters())


def matrix_parameters(shape: BertShape) -> int:
    """How many of N are in the matrices of the layers."""
    inner = (3 if shape.is_modern else 2) * shape.intermediate_size
    return shape.layers * shape.hidden_size * (4 * shape.hidden_size + inner)


def memory(
    steps: Iterable[Step], gpus: int, stage: int, precision: str, micro_batch: int, muon: bool = False
) -> Memory:
    """That of the kind of step that takes most, with the Triton kernels.

    Args:
        micro_batch: rows that a GPU runs at once.
        muon: whether Muon updates the layers' matrices, with one moment instead of AdamW's two.
    """
    found = (_step_memory(step, gpus, stage, precision, micro_batch, muon) for step in steps)
    return max(found, key=lambda taken: taken.total)


def _step_memory(step: Step, gpus: int, stage: int, precision: str, micro_batch: int, muon: bool) -> Memory:
    work, phase, keep = step
    count, store = parameter_count(work.shape), storage_of(precision, stage)
    low, part = store.product, 1 if stage == 0 else gpus
    # Stages 0 and 1 keep the whole float32 sum on every GPU, stage 1 also the 16-bit gradients of the micro-batch.
    gradients = _FLOAT / gpus if stage >= 2 else _FLOAT + (low if stage == 1 and low < _FLOAT else 0)
    return Memory(
        parameters=count * (_FLOAT if stage == 0 else low) / (gpus if stage == 3 else 1),
        float32_copies=0 if stage == 0 else _FLOAT * count / part,
        gradients=count * gradients,
        optimizer_states=_FLOAT * (2 * count - (matrix_parameters(work.shape) if muon else 0)) / part,
        activations=micro_batch * saved(work, phase, keep, store),
        # Of every path, and the gradient of one.
        logits=micro_batch * (work.heads(phase) + 1) * work.targets * work.shape.vocab_size * low,
        buffers=_fixed_buffers(count, stage, precision, store) + micro_batch * _working_set(work, phase, keep, store),
    )


def largest_micro_batch(
    steps: Collection[Step], gpus: int, stage: int, precision: str, usable: float, muon: bool = False
) -> int:
    """Rows that fit into `usable` bytes; 0 if not even one does."""
    empty, one = (memory(steps, gpus, stage, precision, rows, muon).total for rows in (0, 1))
    return max(0, int((usable - empty) // (one - empty)))


def _fixed_buffers(count: int, stage: int, precision: str, store: Storage) -> float:
    """Copies of the weights in the dtype of the products, and the buckets in which gradients are reduced."""
    if stage == 0:
        return (store.product * count if store.casts else 0) + _FLOAT * min(count, _BUCKET)
    if stage == 1:  # DeepSpeed has two optimizers for it; bf16 gets the one whose bucket is no larger than N
        return (_FLOAT + store.product) * min(count, _BUCKET) if precision == "bf16" else _FLOAT * _BUCKET
    return store.product * (_BUCKET + (min(count, _LIVE) if stage == 3 else 0))  # a bucket of full size for any N


def saved(work: StepFlops, phase: Phase, keep: int, store: Storage, plain: bool = False) -> float:
    """Bytes that the forward of one row keeps for the backward, without the logits.

    Args:
        plain: whether the torch kernels run, which store what the Triton kernels recompute: dropout masks, and the GELU
            in a GeGLU.
    """
    width, layers = work.shape.hidden_size, work.layers(phase, keep)
    if work.recompute:
        kept = [float(_inputs(work, *layer) * store.hidden) for layer in layers]
    else:
        kept = [layer_saved(work, *layer, store, plain) for layer in layers]
    norm = width * store.hidden + _MOMENTS
    ends = work.length * (norm + 8)
    if work.shape.is_modern:  # a norm after the last layer, and none before the first attention
        ends += work.heads(phase) * work.outputs * norm - (0 if work.recompute else work.length * norm)
    head = work.targets * (3 * width * store.product + norm + 8)
    alignment = 0
    if phase is Phase.ALIGN and work.align_full and work.outputs == work.length:
        alignment = 2 * 2 * _FLOAT * work.length * width  # the log-softmax of two pairs of states
    return ends + sum(kept) + work.heads(phase) * head + alignment


def layer_saved(work: StepFlops, queries: int, context: int, store: Storage, plain: bool = False) -> float:
    """Bytes that one layer keeps of one row."""
    shape = work.shape
    width, inner, product = shape.hidden_size, shape.intermediate_size, store.product
    norm = width * store.hidden + _MOMENTS
    entering = _inputs(work, queries, context)
    inputs = ((queries + context) * width if store.casts else entering) * product
    attention = 2 * (queries + context) * width * product + queries * shape.heads * _FLOAT
    if shape.is_modern:
        turned = context * width * product  # keys; the values keep the projection of both
        norms = (entering // width + queries) * norm
        return inputs + attention + turned + queries * (width + (3 + plain) * inner) * product + norms
    masks = width if plain and shape.dropout else 0
    return inputs + attention + queries * (width + 2 * inner) * product + 2 * queries * (norm + masks)


def _inputs(work: StepFlops, queries: int, context: int) -> int:
    """Elements that enter a layer; queries that are their own context enter once."""
    return (queries if queries == context else queries + context) * work.shape.hidden_size


def _working_set(work: StepFlops, phase: Phase, keep: int, store: Storage) -> float:
    """What the backward of one layer holds meanwhile: its gradients, and its activations if they are recomputed."""
    shape = work.shape
    inner = (3 if shape.is_modern else 2) * shape.intermediate_size
    gradients = work.length * (inner + 4 * shape.hidden_size) * store.product
    again = max(layer_saved(work, *layer, store) for layer in work.layers(phase, keep))
    return gradients + (again if work.recompute else 0)
