"""Raw moves of whole rows in plain torch: no autograd, that is added once for all backends.

Rows of D contiguous numbers move by a flat row index. The generic `torch.gather`/`scatter` would need an index as large
as the data and a scatter-add backward; the positions of a row are distinct, so copies suffice.

Legend: B rows, S positions a row, K kept positions a row, D hidden size.
"""

import torch
from torch import Tensor


def _flat(index_BK: Tensor, length: int) -> Tensor:
    rows = torch.arange(index_BK.shape[0], device=index_BK.device)[:, None]
    return (index_BK + rows * length).flatten()


def gather(hidden_BSD: Tensor, index_BK: Tensor) -> Tensor:
    """out[b, k] = hidden[b, index[b, k]]."""
    _, length, width = hidden_BSD.shape
    rows = hidden_BSD.flatten(0, 1).index_select(0, _flat(index_BK, length))
    return rows.view(*index_BK.shape, width)


def split_backward(grad_kept_BKD: Tensor, grad_rest_BSD: Tensor | None, kept_BK: Tensor, inverse_BS: Tensor) -> Tensor:
    """out[b, s] = grad_rest[b, s] + (grad_kept[b, inverse[b, s]] where kept, else 0), added in float32 or wider."""
    batch, length = inverse_BS.shape
    width = grad_kept_BKD.shape[2]
    flat = _flat(kept_BK, length)
    added = grad_kept_BKD.flatten(0, 1)
    if grad_rest_BSD is None:
        out = added.new_zeros(batch * length, width)
    else:
        out = grad_rest_BSD.clone(memory_format=torch.contiguous_format).flatten(0, 1)
        added = added + out.index_select(0, flat)
    return out.index_copy_(0, flat, added).view(batch, length, width)


def merge(hidden_BSD: Tensor, kept_BKD: Tensor, kept_BK: Tensor, inverse_BS: Tensor) -> Tensor:
    """out[b, s] = kept[b, inverse[b, s]] where kept, else hidden[b, s]."""
    length = hidden_BSD.shape[1]
    out = hidden_BSD.clone(memory_format=torch.contiguous_format)
    out.flatten(0, 1).index_copy_(0, _flat(kept_BK, length), kept_BKD.flatten(0, 1))
    return out


def merge_backward(grad_BSD: Tensor, kept_BK: Tensor, inverse_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of hidden, zero where kept, and of kept."""
    width = grad_BSD.shape[2]
    flat = _flat(kept_BK, grad_BSD.shape[1])
    grad_kept = grad_BSD.flatten(0, 1).index_select(0, flat)
    grad_hidden = grad_BSD.clone(memory_format=torch.contiguous_format)
    grad_hidden.flatten(0, 1).index_fill_(0, flat, 0)
    return grad_hidden, grad_kept.view(*kept_BK.shape, width)
