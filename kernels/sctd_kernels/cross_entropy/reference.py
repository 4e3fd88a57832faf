"""Cross-entropy in plain torch. Legend: N predicted positions, V vocabulary."""

import torch
from torch import Tensor

FIXED_POINT = 2.0**24  # of the accumulated losses: 6e-8 nats; a sum overflows beyond 5e11 nats
MAX_LOSS = 1e4  # a larger loss is accumulated as this
_CHUNK = 32  # rows a pass: their float32 logits stay in a CPU's cache


def _chunks(rows: int) -> list[slice]:
    step = max(1, rows) if torch.compiler.is_compiling() else _CHUNK
    return [slice(start, start + step) for start in range(0, max(1, rows), step)]


def token_losses(logits_NV: Tensor, labels_N: Tensor, sum_count_2V: Tensor | None) -> tuple[Tensor, Tensor]:
    """Losses and the logarithm of each row's normaliser, both float32 (N,)."""
    normaliser_N = torch.cat([logits_NV[part].float().logsumexp(1) for part in _chunks(len(labels_N))])
    losses_N = normaliser_N - logits_NV.gather(1, labels_N[:, None])[:, 0].float()
    if sum_count_2V is not None:
        accumulate(losses_N, labels_N, sum_count_2V)
    return losses_N, normaliser_N


def accumulate(losses_N: Tensor, labels_N: Tensor, sum_count_2V: Tensor) -> None:
    counts = losses_N.isfinite()
    values = losses_N.double().where(counts, 0.0).clamp(0.0, MAX_LOSS)
    sum_count_2V[0].index_add_(0, labels_N, (values * FIXED_POINT).round().long())
    sum_count_2V[1].index_add_(0, labels_N, counts.long())


def token_losses_backward(logits_NV: Tensor, labels_N: Tensor, normaliser_N: Tensor, grad_N: Tensor) -> Tensor:
    """(softmax - one-hot of the label) x the loss's gradient, in the dtype of the logits."""
    parts = []
    for part in _chunks(len(labels_N)):
        share = (logits_NV[part].float() - normaliser_N[part, None]).exp_().mul_(grad_N[part, None])
        parts.append(share.scatter_add_(1, labels_N[part, None], -grad_N[part, None]).to(logits_NV.dtype))
    return torch.cat(parts)
