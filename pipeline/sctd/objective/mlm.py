"""Masked-language-model loss, kept per token so that the importance table gets it without a second pass."""

import torch.nn.functional as F
from torch import Tensor


def token_losses(logits_BMV: Tensor, labels_BM: Tensor) -> Tensor:
    """Cross-entropy of each predicted position in nats, computed in float32: (B, M, V), (B, M) -> (B, M)."""
    flat = F.cross_entropy(logits_BMV.flatten(0, 1).float(), labels_BM.flatten(), reduction="none")
    return flat.view(labels_BM.shape)
