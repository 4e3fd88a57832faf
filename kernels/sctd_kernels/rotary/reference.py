"""Rotary position embedding in plain torch. Legend: B rows, T tokens a row, H heads, d width, h = d/2, S places."""

import torch
from torch import Tensor


def rotate(x_BTHd: Tensor, table_2Sh: Tensor, place_BT: Tensor | None, back: bool) -> Tensor:
    """Turned by the angles of the places or, with `back`, by their negatives; in float32 or wider."""
    wide = torch.promote_types(x_BTHd.dtype, torch.float32)
    turn = table_2Sh[:, None, : x_BTHd.shape[1]] if place_BT is None else table_2Sh[:, place_BT]
    cosine, sine = turn[:, :, :, None].to(wide)
    x_BTH2h = x_BTHd.to(wide).unflatten(-1, (2, -1))
    first, second = x_BTH2h.unbind(-2)
    sign = -1 if back else 1
    if torch.compiler.is_compiling():  # it makes one pass of this
        sine = sign * sine
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1).to(x_BTHd.dtype)
    out_BTH2h = torch.empty(x_BTH2h.shape, dtype=wide, device=x_BTHd.device)
    torch.mul(x_BTH2h, cosine[..., None, :], out=out_BTH2h)
    out_BTH2h[..., 0, :].addcmul_(second, sine, value=-sign)
    out_BTH2h[..., 1, :].addcmul_(first, sine, value=sign)
    return out_BTH2h.flatten(3).to(x_BTHd.dtype)
