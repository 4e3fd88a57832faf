"""BERT (Devlin et al. 2019) as one readable module.

- Post-LayerNorm, learned positions, exact GELU, dropout after each sub-layer, tied output embeddings, no NSP.
- A layer takes its queries apart from its context: `layer(x_BQD, context_BSD)` updates Q positions that attend to S.
  With one argument it is plain self-attention. Token dropping and the last layer's short output are this and no more.
- No padding is expected: rows are packed full. A key mask is honoured where one is given.

Legend: B rows, S positions a row, Q query positions, M predicted positions, D hidden size, H heads, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sctd.model.heads import MlmHead


@dataclass(frozen=True)
class BertShape:
    """Sizes and rates that define a BERT."""

    vocab_size: int
    layers: int
    hidden_size: int
    heads: int
    intermediate_size: int
    max_positions: int
    dropout: float = 0.1
    attention_dropout: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02


class Embeddings(nn.Module):
    """Word + position + token type, normalised. Rows are one segment: only token type 0 is used."""

    def __init__(self, shape: BertShape) -> None:
        super().__init__()
        self.word = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.position = nn.Embedding(shape.max_positions, shape.hidden_size)
        self.token_type = nn.Embedding(2, shape.hidden_size)
        self.norm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, ids_BS: Tensor) -> Tensor:
        segment = torch.zeros(1, dtype=torch.long, device=ids_BS.device)
        place_SD = self.position(torch.arange(ids_BS.shape[1], device=ids_BS.device)) + self.token_type(segment)
        return self.dropout(self.norm(self.word(ids_BS) + place_SD))


class Attention(nn.Module):
    """Multi-head attention of Q queries over a context of S positions."""

    def __init__(self, shape: BertShape) -> None:
        super().__init__()
        width = shape.hidden_size
        self.heads = shape.heads
        self.dropout = shape.attention_dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BQD: Tensor, context_BSD: Tensor, key_mask_BS: Tensor | None) -> Tensor:
        k, v = (self._split(part) for part in self.key_value(context_BSD).chunk(2, dim=-1))
        q = self._split(self.query(x_BQD))
        mask = None if key_mask_BS is None else key_mask_BS[:, None, None, :]
        rate = self.dropout if self.training else 0.0
        mixed_BHQd = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)
        return self.out(mixed_BHQd.transpose(1, 2).reshape(x_BQD.shape))

    def _split(self, x_BTD: Tensor) -> Tensor:
        batch, length, width = x_BTD.shape
        return x_BTD.view(batch, length, self.heads, width // self.heads).transpose(1, 2)


class Layer(nn.Module):
    """Attention and feed-forward, each with dropout, residual and LayerNorm after it."""

    def __init__(self, shape: BertShape) -> None:
        super().__init__()
        self.attention = Attention(shape)
        self.attention_norm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)
        self.expand = nn.Linear(shape.hidden_size, shape.intermediate_size)
        self.contract = nn.Linear(shape.intermediate_size, shape.hidden_size)
        self.output_norm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x_BQD: Tensor, context_BSD: Tensor | None = None, key_mask_BS: Tensor | None = None) -> Tensor:
        context_BSD = x_BQD if context_BSD is None else context_BSD
        x_BQD = self.attention_norm(x_BQD + self.dropout(self.attention(x_BQD, context_BSD, key_mask_BS)))
        return self.output_norm(x_BQD + self.dropout(self.contract(F.gelu(self.expand(x_BQD)))))


class Bert(nn.Module):
    """Embeddings, layers and the masked-language-model head."""

    def __init__(self, shape: BertShape) -> None:
        super().__init__()
        self.shape = shape
        self.embeddings = Embeddings(shape)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.head = MlmHead(shape.hidden_size, shape.vocab_size, shape.layer_norm_eps)
        self.apply(self._init)

    def forward(self, ids_BS: Tensor, key_mask_BS: Tensor | None = None) -> Tensor:
        """Logits at all positions, (B, S, V). Training computes them at predicted positions only."""
        x_BSD = self.embeddings(ids_BS)
        for layer in self.layers:
            x_BSD = layer(x_BSD, key_mask_BS=key_mask_BS)
        return self.logits(x_BSD)

    def logits(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., V), through the tied word embeddings."""
        return self.head(x, self.embeddings.word.weight)

    def _init(self, module: nn.Module) -> None:
        """Every initialisation there is: N(0, range) for matrices, 0 for biases, LayerNorm at identity."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.shape.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
