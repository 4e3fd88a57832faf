"""Raw moves of whole rows by the CUDA C++ kernels of `cuda.cu`.

Legend: B rows, S positions a row, K kept positions a row, D hidden size.
"""

import torch
from torch import Tensor

from sctd_kernels.cuda_library import launch

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # as in sctd_split_backward


def gather(hidden_BSD: Tensor, index_BK: Tensor) -> Tensor:
    """out[b, k] = hidden[b, index[b, k]]; an index out of range is moved to the nearest one."""
    batch, length, width = hidden_BSD.shape
    keep = index_BK.shape[1]
    out_BKD = hidden_BSD.new_empty(batch, keep, width)
    if out_BKD.numel():
        row_bytes = width * hidden_BSD.element_size()
        launch("gather", hidden_BSD.contiguous(), index_BK.contiguous(), out_BKD, batch, length, keep, row_bytes)
    return out_BKD


def split_backward(grad_kept_BKD: Tensor, grad_rest_BSD: Tensor | None, kept_BK: Tensor, inverse_BS: Tensor) -> Tensor:
    """out[b, s] = grad_rest[b, s] + (grad_kept[b, inverse[b, s]] where kept, else 0), added in float32 or wider."""
    batch, length = inverse_BS.shape
    _, keep, width = grad_kept_BKD.shape
    out_BSD = grad_kept_BKD.new_empty(batch, length, width)
    if out_BSD.numel():
        launch(
            "split_backward",
            grad_kept_BKD.contiguous(),
            None if grad_rest_BSD is None else grad_rest_BSD.contiguous(),
            inverse_BS.contiguous(),
            out_BSD,
            _KINDS[out_BSD.dtype],
            batch,
            length,
            keep,
            width,
        )
    return out_BSD


def merge(hidden_BSD: Tensor, kept_BKD: Tensor, kept_BK: Tensor, inverse_BS: Tensor) -> Tensor:
    """out[b, s] = kept[b, inverse[b, s]] where kept, else hidden[b, s]."""
    batch, length, width = hidden_BSD.shape
    out_BSD = torch.empty_like(hidden_BSD, memory_format=torch.contiguous_format)
    if out_BSD.numel():
        tensors = hidden_BSD.contiguous(), kept_BKD.contiguous(), inverse_BS.contiguous(), out_BSD
        launch("merge", *tensors, batch, length, kept_BK.shape[1], width * hidden_BSD.element_size())
    return out_BSD


def merge_backward(grad_BSD: Tensor, kept_BK: Tensor, inverse_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of hidden, zero where kept, and of kept."""
    batch, length, width = grad_BSD.shape
    keep = kept_BK.shape[1]
    grad_hidden_BSD = torch.empty_like(grad_BSD, memory_format=torch.contiguous_format)
    grad_kept_BKD = grad_BSD.new_empty(batch, keep, width)
    if grad_BSD.numel():
        tensors = grad_BSD.contiguous(), inverse_BS.contiguous(), grad_hidden_BSD, grad_kept_BKD
        launch("merge_backward", *tensors, batch, length, keep, width * grad_BSD.element_size())
    return grad_hidden_BSD, grad_kept_BKD
