"""Bytes that training takes on each GPU, part by part.

Parameters, gradients and optimizer states follow the engine: ZeRO-0 keeps float32 parameters and runs under autocast,
the other stages keep 16-bit ones and float32 masters; gradients are summed in float32. Activations are counted tensor
by tensor: what each operation of the model keeps for its backward.

Legend: S positions a row, Q queries and C context of a layer, M predicted positions, D hidden size, E inner size,
H heads, V vocabulary, N parameters.
"""

from dataclasses import dataclass, fields

from sctd.model.bert import BertShape
from sctd.objective.schedule import Phase
from sctd.train.accounting import StepFlops

STAGES = (0, 1, 2, 3)
_BUCKET = 500_000_000  # elements that DeepSpeed reduces at once
_LIVE = 1_000_000_000  # parameters that ZeRO-3 keeps gathered
_FLOAT = 4


@dataclass(frozen=True)
class Storage:
    """Bytes of an element: `product` in matrix products, `hidden` in the states between them.

    Where they differ (autocast), each product copies its input.
    """

    product: int
    hidden: int

    @property
    def casts(self) -> bool:
        return self.product != self.hidden


def storage_of(precision: str, stage: int) -> Storage:
    if precision == "fp32":
        return Storage(_FLOAT, _FLOAT)
    return Storage(2, _FLOAT if stage == 0 else 2)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a step, by part."""

    parameters: float
    masters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))


def parameter_count(shape: BertShape) -> int:
    """N, exactly; the head shares the word embeddings."""
    width, inner, vocab = shape.hidden_size, shape.intermediate_size, shape.vocab_size
    embeddings = (vocab + shape.max_positions + 2) * width + 2 * width
    attention = 4 * width * (width + 1)
    feed_forward = 2 * width * inner + inner + width
    head = width * (width + 1) + 2 * width + vocab
    return embeddings + shape.layers * (attention + feed_forward + 4 * width) + head


def memory(
    work: StepFlops,
    phases: list[tuple[Phase, int]],
    gpus: int,
    stage: int,
    precision: str,
    micro_batch: int,
    masks: bool = False,
) -> Memory:
    """The peak over the phases of an arm.

    Args:
        phases: (phase, K) of the steps that occur.
        micro_batch: rows that a GPU runs at once.
        masks: whether dropout masks are stored (the torch kernels do) or worked out again (the Triton kernels).
    """
    count, store = parameter_count(work.shape), storage_of(precision, stage)
    phase, keep = max(phases, key=lambda step: saved(work, step[0], step[1], store, masks))
    low = store.product
    part = 1 if stage == 0 else gpus
    return Memory(
        parameters=count * (_FLOAT if stage == 0 else low) / (gpus if stage == 3 else 1),
        masters=0 if stage == 0 else _FLOAT * count / part,
        gradients=_gradients(count, gpus, stage, low),
        optimizer=2 * _FLOAT * count / part,
        activations=micro_batch * saved(work, phase, keep, store, masks),
        logits=micro_batch * logits(work, phase, store),
        buffers=_fixed_buffers(count, stage, precision) + micro_batch * _working_set(work, phase, keep, store, masks),
    )


def largest_micro_batch(
    work: StepFlops, phases: list[tuple[Phase, int]], gpus: int, stage: int, precision: str, usable: float
) -> int:
    """Rows that fit into `usable` bytes, 0 where not one does."""
    empty, one = (memory(work, phases, gpus, stage, precision, rows).total for rows in (0, 1))
    return max(0, int((usable - empty) // (one - empty)))


def _gradients(count: int, gpus: int, stage: int, low: int) -> float:
    """Stages 0 and 1 sum all of them on every GPU; beside the float32 sum stand those of the micro-batch at hand."""
    if stage == 0:
        return _FLOAT * count
    if stage == 1:
        return _FLOAT * count + (low * count if low < _FLOAT else 0)
    return _FLOAT * count / gpus


def _fixed_buffers(count: int, stage: int, precision: str) -> float:
    """Copies of the weights in the products' dtype, and what the reduction of gradients works in."""
    store = storage_of(precision, stage)
    low = store.product
    if stage == 0:
        return (low * count if store.casts else 0) + _FLOAT * min(count, _BUCKET)
    if stage == 1:  # of DeepSpeed's two optimizers for it, bf16 gets the one that flattens what there is
        return (_FLOAT + low) * min(count, _BUCKET) if precision == "bf16" else _FLOAT * _BUCKET
    return low * _BUCKET + (low * min(count, _LIVE) if stage == 3 else 0)  # a bucket of full size, whatever N is


def saved(work: StepFlops, phase: Phase, keep: int, store: Storage, masks: bool) -> float:
    """Bytes that one row's forward keeps for its backward, the logits apart."""
    width = work.shape.hidden_size
    if work.recompute:
        kept = [float(_inputs(work, *layer) * store.hidden) for layer in work.layers(phase, keep)]
    else:
        kept = [layer_saved(work, *layer, store, masks) for layer in work.layers(phase, keep)]
    embeddings = work.length * (width * store.hidden + 2 * _FLOAT + 8)
    head = work.targets * (width * (3 * store.product + store.hidden) + 2 * _FLOAT + 8)
    alignment = 0
    if phase is Phase.ALIGN and work.align_full and work.outputs == work.length:
        alignment = 2 * 2 * _FLOAT * work.length * width  # the log-softmax of two pairs of states
    return embeddings + sum(kept) + work.heads(phase) * head + alignment


def layer_saved(work: StepFlops, queries: int, context: int, store: Storage, masks: bool) -> float:
    """Bytes that one layer keeps of one row."""
    shape = work.shape
    width, product = shape.hidden_size, store.product
    inputs = (queries + context) * width if store.casts else _inputs(work, queries, context)
    attention = 2 * (queries + context) * width * product + queries * shape.heads * _FLOAT
    feed_forward = queries * (width + 2 * shape.intermediate_size) * product
    norms = 2 * queries * (width * (store.hidden + masks) + 2 * _FLOAT)
    return inputs * product + attention + feed_forward + norms


def logits(work: StepFlops, phase: Phase, store: Storage) -> float:
    """Bytes of one row's logits, and of the gradient of one path's."""
    return (work.heads(phase) + 1) * work.targets * work.shape.vocab_size * store.product


def _inputs(work: StepFlops, queries: int, context: int) -> int:
    """Elements that enter a layer; queries that are their own context enter once."""
    return (queries if queries == context else queries + context) * work.shape.hidden_size


def _working_set(work: StepFlops, phase: Phase, keep: int, store: Storage, masks: bool) -> float:
    """What the backward of one layer holds for a while: its gradients, and its activations where it ran again."""
    shape = work.shape
    gradients = work.length * (2 * shape.intermediate_size + 4 * shape.hidden_size) * store.product
    again = max(layer_saved(work, *layer, store, masks) for layer in work.layers(phase, keep))
    return gradients + (again if work.recompute else 0)
