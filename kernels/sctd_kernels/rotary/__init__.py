"""Rotary position embedding: queries and keys are turned by angles that grow with their place.

Su et al. 2021, arXiv 2104.09864, in the rotate-half form: column i is turned with column i + d/2.

Legend: B rows, T tokens a row, H heads, d width of a head, h = d/2, S places of the table.
"""

from typing import Any

import torch
from torch import Tensor

from sctd_kernels.dispatch import Operation, require, require_range, say
from sctd_kernels.rotary import reference

__all__ = ["ROTATE", "rotary_table", "rotate"]

ROTATE = Operation(reference.rotate, strided=True)


def rotary_table(positions: int, head_width: int, theta: float, device: torch.device | str | None = None) -> Tensor:
    """Cosines and sines of the angles place x theta**(-2i/d): float32 (2, S, h), in transformers' own arithmetic.

    Worked out on the CPU, so that every device turns by the same numbers.

    Raises:
        ValueError: the width is odd.
    """
    if head_width % 2:
        raise ValueError(f"rotary_table: the width of a head must be even, got {head_width}")
    frequency_h = 1.0 / theta ** (torch.arange(0, head_width, 2, dtype=torch.float32, device="cpu") / head_width)
    angle_Sh = torch.arange(positions, dtype=torch.float32, device="cpu")[:, None] * frequency_h
    return torch.stack([angle_Sh.cos(), angle_Sh.sin()]).to(device)


def rotate(x_BTHd: Tensor, table_2Sh: Tensor, place_BT: Tensor | None = None) -> Tensor:
    """Turn each head of each token by the angles of its place: (B, T, H, d) -> (B, T, H, d), contiguous.

    Arithmetic is in float32. The gradient is the rotation back: no activation is saved.

    Args:
        x_BTHd: may be a strided view, say, a part of a fused projection.
        table_2Sh: float32 cosines and sines, from `rotary_table`.
        place_BT: int64, true position of each token; None: 0..T-1.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on CPUs also places out of range.
    """
    if x_BTHd.dim() != 4 or not x_BTHd.dtype.is_floating_point or x_BTHd.shape[3] % 2:
        raise ValueError(f"rotate: x must be floating (B, T, H, d) with an even d, got {say(x_BTHd)}")
    places = table_2Sh.shape[1] if table_2Sh.dim() > 1 else 0
    require("rotate: table", table_2Sh, (2, places, x_BTHd.shape[3] // 2), (torch.float32,), x_BTHd)
    if place_BT is not None:
        require("rotate: places", place_BT, x_BTHd.shape[:2], (torch.int64,), x_BTHd)
        require_range("rotate: places", place_BT, table_2Sh, 1)
    elif x_BTHd.shape[1] > places:
        raise ValueError(f"rotate: x {say(x_BTHd)} is longer than table {say(table_2Sh)}")
    return _Rotate.apply(x_BTHd, table_2Sh, place_BT)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTHd: Tensor, table_2Sh: Tensor, place_BT: Tensor | None) -> Tensor:
        ctx.save_for_backward(table_2Sh, place_BT)
        return ROTATE(x_BTHd, table_2Sh, place_BT, False)

    @staticmethod
    def backward(ctx: Any, grad_BTHd: Tensor) -> tuple[Tensor, None, None]:
        return ROTATE(grad_BTHd, *ctx.saved_tensors, True), None, None
