"""Muon (Jordan et al. 2024) for the matrices inside the layers, AdamW for all else: one optimizer, under ZeRO 0 to 2.

Muon updates a matrix by the orthogonal matrix nearest to its momentum (kellerjordan.github.io/posts/muon). That
takes the whole matrix, of which a rank under ZeRO may hold a stretch. Momentum is kept as the parameters are, in
stretches; matrices that a border between ranks cuts are put together once a step, by a sum of buffers that are zero
where a rank holds nothing. Such a sum is exact: from equal gradients, any number of ranks under any stage make equal
updates.

Legend: N matrices of one shape, R rows, C columns.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from sctd.errors import UserError
from sctd.train.engine.state import Stretch, stretches

_MOMENTUM = 0.95
_STEPS, _A, _B, _C = 5, 3.4445, -4.7750, 2.0315  # of Newton-Schulz: Jordan's
_EPS = 1e-7
_AT_ONCE = 1 << 25  # elements of the matrices that are multiplied together, which bounds the memory it takes
_OTHERS = ("embed", ".head.")  # in names of matrices that Muon must not move


@dataclass(frozen=True)
class Matrices:
    """What one parameter is to Muon: so many matrices of R x C, one below the other."""

    parts: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Elements of one matrix."""
        return self.rows * self.columns


def layer_matrices(model: nn.Module) -> dict[str, Matrices]:
    """What Muon moves, by the parameter's name: weights of the linear maps inside the layers.

    A linear map that is several in one says so in an attribute `parts`.

    Raises:
        UserError: there are none, or an embedding or an output head is among them.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found = {}
    for name, parameter in model.named_parameters():
        if ".layers." not in f".{name}" or parameter.dim() != 2 or not parameter.requires_grad:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(owner, nn.Linear) or id(parameter) in embeddings or any(word in name for word in _OTHERS):
            raise UserError(f"optimizer.name is muon, but {name} is no linear map of a layer: use optimizer.name=adamw")
        parts = getattr(owner, "parts", 1)
        found[name] = Matrices(parts, parameter.shape[0] // parts, parameter.shape[1])
    if not found:
        raise UserError("optimizer.name is muon, but the model has no matrix inside a layer: use optimizer.name=adamw")
    return found


def describe(model: nn.Module) -> str:
    """Who moves how much, for people."""
    found = layer_matrices(model)
    moved = sum(matrices.parts * matrices.size for matrices in found.values())
    others = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) - moved
    count = sum(matrices.parts for matrices in found.values())
    return f"muon {count} matrices, {moved / 1e6:.1f}M parameters; adamw {others / 1e6:.1f}M"


def newton_schulz(stack_NRC: Tensor) -> Tensor:
    """The matrices with their singular values brought near 1 (0.7 to 1.2; those far below the others stay lower)."""
    x = stack_NRC if stack_NRC.shape[-2] <= stack_NRC.shape[-1] else stack_NRC.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + _EPS)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x if stack_NRC.shape[-2] <= stack_NRC.shape[-1] else x.mT


@dataclass(frozen=True)
class _Piece:
    """What this rank holds of one matrix.

    Args:
        key: the parameter's name, and which of its matrices.
        matrix: its sizes. held: its place in the matrix, and where it lies.
        slot: where the whole matrix begins in the exchange; None where this rank holds all of it.
    """

    key: tuple[str, int]
    matrix: Matrices
    held: Stretch
    slot: int | None = None

    @property
    def update(self) -> Tensor:
        """What is held of the update, which has replaced the gradient."""
        assert self.held.flat.grad is not None
        return self.held.of(self.held.flat.grad)

    def whole(self, exchange: Tensor) -> Tensor:
        """The update of the whole matrix, (R, C)."""
        flat = self.update if self.slot is None else exchange.narrow(0, self.slot, self.matrix.size)
        return flat.view(self.matrix.rows, self.matrix.columns)


class Muon(Optimizer):
    """Moves the group that holds what `layer_matrices` names; AdamW, torch's fused one, moves the others.

    State: `momentum` of a Muon parameter, `exp_avg`, `exp_avg_sq` and `step` of the others, all float32. `step` uses up
    the gradients of the Muon half.

    Args:
        groups: one has `muon: True` and an `lr` of its own; each has a `weight_decay`, which is decoupled.
        lr, betas, eps: AdamW's.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "fused": True})
        self._batches: list[list[_Piece]] | None = None
        self._exchanged = 0  # elements of the matrices that borders cut, on all ranks
        self._ranks: dist.ProcessGroup | None = None

    def bind(self, engine: DeepSpeedEngine) -> None:
        """Look up where the engine has put the matrices. To be called once by all ranks, before the first step."""
        found = layer_matrices(engine.module)
        moved = [stretch for stretch in stretches(engine) if stretch.name in found]
        pieces = [piece for stretch in moved for piece in _pieces(stretch, found[stretch.name])]
        cut = {piece.key for piece in pieces if piece.held.length < piece.matrix.size}
        if dist.get_world_size() > 1:
            everyones: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyones, cut)
            cut = set().union(*everyones)
        slots: dict[tuple[str, int], int] = {}
        self._exchanged = 0
        for name, part in sorted(cut):
            slots[name, part] = self._exchanged
            self._exchanged += found[name].size
        self._batches = list(_batches([replace(piece, slot=slots.get(piece.key)) for piece in pieces]))
        self._ranks = engine.seq_data_parallel_group  # the one that ZeRO cuts the parameters for

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient. ZeRO calls it once for each group."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            if self._batches is None:  # DeepSpeed may step with gradients of 0, to see the state allocated
                if any(parameter.grad.any() for parameter in parameters):
                    raise RuntimeError("Muon.step before Muon.bind")
            elif group.get("muon"):
                self._muon(group, parameters)
            else:
                self._adamw(group, parameters)

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Momentum is Nesterov's, in the form of Jordan's code; a tall matrix' update is scaled by sqrt(R / C)."""
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        updates: list[Any] = [parameter.grad for parameter in parameters]
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(momenta, updates, 1 - _MOMENTUM)
        torch._foreach_lerp_(updates, momenta, _MOMENTUM)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        device = parameters[0].device
        exchange = self._exchange(device, _product_dtype(device))
        for batch in self._batches or ():
            pieces = [piece for piece in batch if piece.held.flat.grad is not None]
            if not pieces:
                continue
            rows, columns, held = pieces[0].matrix.rows, pieces[0].matrix.columns, [piece.held for piece in pieces]
            stack = exchange.new_empty(len(pieces), rows, columns)
            torch._foreach_copy_(list(stack), [piece.whole(exchange) for piece in pieces])
            moves = newton_schulz(stack).to(torch.float32).reshape(len(pieces), -1)
            mine = [move.narrow(0, each.start, each.length) for move, each in zip(moves, held, strict=True)]
            scale = -group["lr"] * math.sqrt(max(1, rows / columns))
            torch._foreach_add_([each.of(each.flat) for each in held], mine, alpha=scale)

    def _exchange(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The updates that borders cut, whole, one after the other. With more ranks than matrices these are all."""
        whole = torch.zeros(self._exchanged, dtype=dtype, device=device)
        for piece in itertools.chain.from_iterable(self._batches or ()):
            if piece.slot is not None:
                whole.narrow(0, piece.slot + piece.held.start, piece.held.length).copy_(piece.update)
        if self._exchanged:
            dist.all_reduce(whole, group=self._ranks)
        return whole

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter].update(
                    step=torch.zeros((), dtype=torch.float32, device=parameter.device),
                    exp_avg=torch.zeros_like(parameter),
                    exp_avg_sq=torch.zeros_like(parameter),
                )
        gradients: list[Any] = [parameter.grad for parameter in parameters]
        states = [self.state[parameter] for parameter in parameters]
        first, second, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
        adamw(
            parameters, gradients, first, second, [], steps, fused=True, amsgrad=False, maximize=False,
            beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"],
        )  # fmt: skip


def _pieces(stretch: Stretch, matrices: Matrices) -> Iterator[_Piece]:
    """A stretch of a parameter as stretches of its matrices."""
    for part in range(matrices.parts):
        first = part * matrices.size
        low, high = max(stretch.start, first), min(stretch.start + stretch.length, first + matrices.size)
        if low < high:
            held = replace(stretch, start=low - first, length=high - low, offset=stretch.offset + low - stretch.start)
            yield _Piece((stretch.name, part), matrices, held)


def _batches(pieces: list[_Piece]) -> Iterator[list[_Piece]]:
    """Those of one shape together, as many as are multiplied at once."""
    by_shape: dict[tuple[int, int], list[_Piece]] = {}
    for piece in pieces:
        by_shape.setdefault((piece.matrix.rows, piece.matrix.columns), []).append(piece)
    for alike in by_shape.values():
        count = max(1, _AT_ONCE // alike[0].matrix.size)
        yield from (alike[first : first + count] for first in range(0, len(alike), count))


def _product_dtype(device: torch.device) -> torch.dtype:
    """Newton-Schulz tolerates bfloat16's rounding (Jordan et al.); CPUs compute in what is exact everywhere."""
    fast = device.type != "cpu" and get_accelerator().is_bf16_supported()
    return torch.bfloat16 if fast else torch.float32
