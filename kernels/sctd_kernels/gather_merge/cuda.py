"""Raw moves of whole rows by the CUDA C++ kernels of `cuda.cu`, which fill in what is passed first.

Legend: B rows, S positions a row, K kept positions a row, D hidden size.
"""

import torch
from torch import Tensor

from sctd_kernels.cuda_library import launch

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # as in sctd_split_backward


def _row_bytes(states: Tensor) -> int:
    return states.shape[2] * states.element_size()


def gather(out_BKD: Tensor, hidden_BSD: Tensor, index_BK: Tensor) -> None:
    """An index out of range is moved to the nearest one."""
    batch, length, _ = hidden_BSD.shape
    launch("gather", hidden_BSD, index_BK, out_BKD, batch, length, index_BK.shape[1], _row_bytes(hidden_BSD))


def split_backward(
    out_BSD: Tensor, grad_kept_BKD: Tensor, grad_rest_BSD: Tensor | None, kept_BK: Tensor, inverse_BS: Tensor
) -> None:
    """Added in float32 or wider."""
    sizes = (*inverse_BS.shape, *grad_kept_BKD.shape[1:])
    launch("split_backward", grad_kept_BKD, grad_rest_BSD, inverse_BS, out_BSD, _KINDS[out_BSD.dtype], *sizes)


def merge(out_BSD: Tensor, hidden_BSD: Tensor, kept_BKD: Tensor, kept_BK: Tensor, inverse_BS: Tensor) -> None:
    sizes = (*inverse_BS.shape, kept_BK.shape[1], _row_bytes(hidden_BSD))
    launch("merge", hidden_BSD, kept_BKD, inverse_BS, out_BSD, *sizes)


def merge_backward(grads: tuple[Tensor, Tensor], grad_BSD: Tensor, kept_BK: Tensor, inverse_BS: Tensor) -> None:
    sizes = (*inverse_BS.shape, kept_BK.shape[1], _row_bytes(grad_BSD))
    launch("merge_backward", grad_BSD, inverse_BS, *grads, *sizes)
