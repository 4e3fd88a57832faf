"""What lies between the matrix products of a layer, and the losses: ours against torch, plain and compiled.

Legend: B rows, S positions a row, D hidden size, E inner size, N predictions, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sctd.bench.candidates import Group, ours, with_backward
from sctd.bench.paths import DTYPES, make_shape
from sctd.bench.timing import DEVICE
from sctd.config import Config
from sctd.data.masking import target_count
from sctd_kernels import FIXED_POINT, dropout_add_norm, linear_gelu, token_losses

_RATE, _EPS = 0.1, 1e-12
Work = tuple[Callable[[], Tensor], Callable[[], Tensor], list[Tensor]]  # ours, torch's, and the gradients of what


def elementwise(config: Config, rows: int, length: int, backends: list[str]) -> dict[str, Group]:
    """Each with its backward."""
    shape, dtype = make_shape(config, length), DTYPES[config.train.precision]
    targets = rows * target_count(config.data.mask_probability, length)
    work = {
        "dropout + residual + LayerNorm": _add_norm(rows, length, shape.hidden_size, dtype),
        "linear + GELU": _gelu(rows, length, shape.hidden_size, shape.intermediate_size, dtype),
        "cross-entropy + accumulators": _losses(targets, shape.vocab_size, dtype),
    }
    groups = {}
    for title, (call, plain, of) in work.items():
        calls = ours(backends, call) | {"torch": plain, "torch, compiled": torch.compile(plain)}
        groups[f"{title}, with backward"] = Group(with_backward(calls, of))
    return groups


def _leaf(dtype: torch.dtype, *size: int) -> Tensor:
    return torch.randn(*size, device=DEVICE, dtype=dtype).requires_grad_()


def _add_norm(rows: int, length: int, width: int, dtype: torch.dtype) -> Work:
    x_BSD, rest_BSD = _leaf(dtype, rows, length, width), _leaf(dtype, rows, length, width)
    weight_D, bias_D, seed_B = _leaf(dtype, width), _leaf(dtype, width), torch.arange(rows, device=DEVICE)
    return (
        lambda: dropout_add_norm(x_BSD, rest_BSD, weight_D, bias_D, _EPS, _RATE, seed_B, 1),
        lambda: F.layer_norm(rest_BSD + F.dropout(x_BSD, _RATE), (width,), weight_D, bias_D, _EPS),
        [x_BSD, rest_BSD, weight_D, bias_D],
    )


def _gelu(rows: int, length: int, width: int, inner: int, dtype: torch.dtype) -> Work:
    x_BSD, weight_ED, bias_E = _leaf(dtype, rows, length, width), _leaf(dtype, inner, width), _leaf(dtype, inner)
    return (
        lambda: linear_gelu(x_BSD, weight_ED, bias_E),
        lambda: F.gelu(F.linear(x_BSD, weight_ED, bias_E)),
        [x_BSD, weight_ED, bias_E],
    )


def _losses(targets: int, vocab: int, dtype: torch.dtype) -> Work:
    logits_NV = _leaf(dtype, targets, vocab)
    labels_N = torch.randint(vocab, (targets,), device=DEVICE)
    sums_2V = torch.zeros(2, vocab, dtype=torch.int64, device=DEVICE)

    def plain() -> Tensor:
        losses_N = F.cross_entropy(logits_NV.float(), labels_N, reduction="none")
        sums_2V[0].index_add_(0, labels_N, (losses_N.detach() * FIXED_POINT).long())
        sums_2V[1].index_add_(0, labels_N, torch.ones_like(labels_N))
        return losses_N

    return lambda: token_losses(logits_NV, labels_N, sums_2V), plain, [logits_NV]
