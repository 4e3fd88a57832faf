"""What lies between the matrix products of a layer, and the losses: ours against torch, plain and compiled.

Legend: B rows, S positions a row, H heads, d width of a head, D hidden size, E inner size, N predictions, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

from sctd.bench.candidates import Group, ours, with_backward
from sctd.bench.paths import DTYPES, make_shape
from sctd.bench.timing import DEVICE
from sctd.config import Config
from sctd.data.masking import target_count
from sctd.model.shape import BertShape
from sctd_kernels import FIXED_POINT, dropout_add_norm, geglu, linear_gelu, rotary_table, rotate, token_losses

_RATE, _EPS = 0.1, 1e-12
Work = tuple[Callable[[], Any], Callable[[], Any], list[Tensor]]  # ours, torch's, and the gradients of what


def elementwise(config: Config, rows: int, length: int, backends: list[str]) -> dict[str, Group]:
    """What this family has of it, each with its backward."""
    shape, dtype = make_shape(config, length), DTYPES[config.train.precision]
    targets = rows * target_count(config.data.mask_probability, length)
    if shape.is_modern:
        work = {
            "rotary positions of queries and keys": _rotate(shape, rows, length, dtype),
            "GeGLU": _geglu(rows, length, shape.intermediate_size, dtype),
        }
    else:
        work = {
            "dropout + residual + LayerNorm": _add_norm(rows, length, shape.hidden_size, dtype),
            "linear + GELU": _gelu(rows, length, shape.hidden_size, shape.intermediate_size, dtype),
        }
    work["cross-entropy + accumulators"] = _losses(targets, shape.vocab_size, dtype)
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


def _rotate(shape: BertShape, rows: int, length: int, dtype: torch.dtype) -> Work:
    """torch's is what transformers does; its table is ready in both."""
    width = shape.hidden_size // shape.heads
    q_BSHd, k_BSHd = (_leaf(dtype, rows, length, shape.heads, width) for _ in range(2))
    table_2Sh = rotary_table(length, width, shape.rotary_theta, DEVICE)
    cosine_1Sd, sine_1Sd = table_2Sh.repeat(1, 1, 2)[:, None]
    return (
        lambda: (rotate(q_BSHd, table_2Sh), rotate(k_BSHd, table_2Sh)),
        lambda: apply_rotary_pos_emb(q_BSHd, k_BSHd, cosine_1Sd, sine_1Sd, unsqueeze_dim=2),
        [q_BSHd, k_BSHd],
    )


def _geglu(rows: int, length: int, inner: int, dtype: torch.dtype) -> Work:
    x_BSE = _leaf(dtype, rows, length, 2 * inner)

    def plain() -> Tensor:
        inner_BSE, gate_BSE = x_BSE.chunk(2, dim=-1)
        return F.gelu(inner_BSE) * gate_BSE

    return lambda: geglu(x_BSE), plain, [x_BSE]


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
