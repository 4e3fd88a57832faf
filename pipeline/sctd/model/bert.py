"""BERT (Devlin et al. 2019) as one readable module.

- Post-LayerNorm, learned positions, exact GELU, dropout after each sub-layer, tied output embeddings, no NSP.
- A layer takes its queries apart from its context: `layer(x_BQD, context_BSD)` updates Q positions that attend to S.
  With one argument it is plain self-attention. Token dropping and the last layer's short output are this and no more.
- No padding is expected: rows are packed full. A mask is honoured where one is given.
- Dropout is a hash of (row seed, site, position, column), not a stream of random numbers: it depends on nothing else.

Legend: B rows, S positions a row, Q query positions, M predicted positions, D hidden size, H heads, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sctd.model.attention import Attention, Mask
from sctd.model.heads import MlmHead
from sctd_kernels import dropout, dropout_add_norm, linear_gelu


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
        self.rate = shape.dropout

    def forward(self, ids_BS: Tensor, row_seed_B: Tensor | None = None) -> Tensor:
        segment = torch.zeros(1, dtype=torch.long, device=ids_BS.device)
        place_SD = self.position(torch.arange(ids_BS.shape[1], device=ids_BS.device)) + self.token_type(segment)
        x_BSD = self.norm(self.word(ids_BS) + place_SD)
        return dropout(x_BSD, self.rate, row_seed_B if self.training else None, site=0)


class AddNorm(nn.Module):
    """LayerNorm(residual + dropout(x)), one pass over memory where the kernels are fused.

    Args:
        site: number of this place in the network, for the dropout's hash.
    """

    def __init__(self, shape: BertShape, site: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.hidden_size))
        self.bias = nn.Parameter(torch.zeros(shape.hidden_size))
        self.eps = shape.layer_norm_eps
        self.rate = shape.dropout
        self.site = site

    def forward(self, x_BTD: Tensor, residual_BTD: Tensor, row_seed_B: Tensor | None) -> Tensor:
        seed_B = row_seed_B if self.training else None
        return dropout_add_norm(x_BTD, residual_BTD, self.weight, self.bias, self.eps, self.rate, seed_B, self.site)


class ApexAddNorm(AddNorm):
    """The same with apex' fused LayerNorm."""

    def forward(self, x_BTD: Tensor, residual_BTD: Tensor, row_seed_B: Tensor | None) -> Tensor:
        from apex.normalization.fused_layer_norm import fused_layer_norm_affine

        dropped_BTD = dropout(x_BTD, self.rate, row_seed_B if self.training else None, self.site)
        return fused_layer_norm_affine(residual_BTD + dropped_BTD, self.weight, self.bias, self.weight.shape, self.eps)


ADD_NORMS = {"native": AddNorm, "apex": ApexAddNorm}


class Layer(nn.Module):
    """Attention and feed-forward, each with dropout, residual and LayerNorm after it.

    Args:
        number: place of the layer in the stack.
        layer_norm: native | apex.
        recompute: forget the activations, and compute them again in the backward.
    """

    def __init__(self, shape: BertShape, number: int, layer_norm: str = "native", recompute: bool = False) -> None:
        super().__init__()
        add_norm = ADD_NORMS[layer_norm]
        self.attention = Attention(shape.hidden_size, shape.heads, shape.attention_dropout)
        self.attention_norm = add_norm(shape, site=2 * number + 1)
        self.expand = nn.Linear(shape.hidden_size, shape.intermediate_size)
        self.contract = nn.Linear(shape.intermediate_size, shape.hidden_size)
        self.output_norm = add_norm(shape, site=2 * number + 2)
        self.recompute = recompute

    def forward(
        self,
        x_BQD: Tensor,
        context_BSD: Tensor | None = None,
        mask: Mask | None = None,
        row_seed_B: Tensor | None = None,
    ) -> Tensor:
        """(B, Q, D) -> (B, Q, D).

        Args:
            context_BSD: what the queries attend to; None for themselves.
            mask: who may attend to whom; None for all to all.
            row_seed_B: int64, seeds of the dropout; without them, and in evaluation, nothing is dropped.
        """
        if self.recompute and self.training:
            keep_random = self.attention.dropout > 0  # all other dropout is a hash of the row seeds
            return checkpoint(
                self._forward, x_BQD, context_BSD, mask, row_seed_B, use_reentrant=False, preserve_rng_state=keep_random
            )
        return self._forward(x_BQD, context_BSD, mask, row_seed_B)

    def _forward(
        self, x_BQD: Tensor, context_BSD: Tensor | None, mask: Mask | None, row_seed_B: Tensor | None
    ) -> Tensor:
        context_BSD = x_BQD if context_BSD is None else context_BSD
        x_BQD = self.attention_norm(self.attention(x_BQD, context_BSD, mask), x_BQD, row_seed_B)
        inner_BQE = linear_gelu(x_BQD, self.expand.weight, self.expand.bias)
        return self.output_norm(self.contract(inner_BQE), x_BQD, row_seed_B)


class Bert(nn.Module):
    """Embeddings, layers and the masked-language-model head.

    Args:
        layer_norm, recompute: see `Layer`.
    """

    def __init__(self, shape: BertShape, layer_norm: str = "native", recompute: bool = False) -> None:
        super().__init__()
        self.shape = shape
        self.embeddings = Embeddings(shape)
        self.layers = nn.ModuleList(Layer(shape, number, layer_norm, recompute) for number in range(shape.layers))
        self.head = MlmHead(shape.hidden_size, shape.vocab_size, shape.layer_norm_eps)
        self.apply(self._init)

    def forward(self, ids_BS: Tensor, mask: Mask | None = None, row_seed_B: Tensor | None = None) -> Tensor:
        """Logits at all positions, (B, S, V). Training computes them at predicted positions only."""
        x_BSD = self.embeddings(ids_BS, row_seed_B)
        for layer in self.layers:
            x_BSD = layer(x_BSD, mask=mask, row_seed_B=row_seed_B)
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
