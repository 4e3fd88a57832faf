"""Output heads."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sctd_kernels import linear_gelu


class MlmHead(nn.Module):
    """Dense, GELU, LayerNorm, then the tied word embeddings and a bias of its own.

    Args:
        bias: of the dense layer and the norm.
    """

    def __init__(self, hidden_size: int, vocab_size: int, eps: float, bias: bool = True) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size, bias)
        self.norm = nn.LayerNorm(hidden_size, eps=eps, bias=bias)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor, word_VD: Tensor) -> Tensor:
        return F.linear(self.norm(linear_gelu(x, self.dense.weight, self.dense.bias)), word_VD, self.bias)
