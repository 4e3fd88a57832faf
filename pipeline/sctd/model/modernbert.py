"""What a ModernBERT (Warner et al. 2024) has in place of BERT's parts.

- LayerNorm before each sub-layer and after the last layer, none before the first attention: the embeddings' own is.
- Rotary positions in every layer, GeGLU, no bias in any matrix or norm but the output's.
- All layers attend to the whole row, unless the shape has windows, as published checkpoints do: then two of three see
  64 tokens on each side. They save no time here.
- Dropout after each sub-layer, as in BERT, by the same hash.

Legend: B rows, S positions a row, Q query positions, D hidden size, E inner size, h half a head's width.
"""

from torch import Tensor, nn

from sctd.model.attention import Attention, Mask, StackedLinear
from sctd.model.layer import EncoderLayer
from sctd.model.shape import BertShape
from sctd_kernels import dropout, geglu


class ModernEmbeddings(nn.Module):
    """Words, normalised; positions enter in the layers."""

    def __init__(self, shape: BertShape) -> None:
        super().__init__()
        self.word = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.norm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps, bias=False)
        self.rate = shape.dropout

    def forward(self, ids_BS: Tensor, row_seed_B: Tensor | None = None) -> Tensor:
        return dropout(self.norm(self.word(ids_BS)), self.rate, row_seed_B if self.training else None, site=0)


class ModernLayer(EncoderLayer):
    """x + attention(norm(x)), then x + GeGLU(norm(x)).

    Args:
        number: place of the layer in the stack.
        table_2Sh: see `Attention`.
        recompute: see `EncoderLayer`.
    """

    def __init__(self, shape: BertShape, number: int, table_2Sh: Tensor, recompute: bool = False) -> None:
        super().__init__(shape.attention_dropout, recompute)
        width, inner, eps = shape.hidden_size, shape.intermediate_size, shape.layer_norm_eps
        self.attention_norm = nn.LayerNorm(width, eps=eps, bias=False) if number else nn.Identity()
        window = shape.window if shape.is_local(number) else 0
        self.attention = Attention(width, shape.heads, shape.attention_dropout, table_2Sh, False, window)
        self.output_norm = nn.LayerNorm(width, eps=eps, bias=False)
        self.expand = StackedLinear(width, inner, 2, bias=False)  # what GELU sees, and the gate
        self.contract = nn.Linear(inner, width, bias=False)
        self.rate = shape.dropout
        self.site = 2 * number + 1

    def compute(
        self,
        x_BQD: Tensor,
        context_BSD: Tensor | None,
        mask: Mask | None,
        seed_B: Tensor | None,
        place_BQ: Tensor | None,
    ) -> Tensor:
        context_BSD = None if context_BSD is None else self.attention_norm(context_BSD)
        mixed_BQD = self.attention(self.attention_norm(x_BQD), context_BSD, mask, place_BQ)
        x_BQD = x_BQD + dropout(mixed_BQD, self.rate, seed_B, self.site)
        inner_BQE = geglu(self.expand(self.output_norm(x_BQD)))
        return x_BQD + dropout(self.contract(inner_BQE), self.rate, seed_B, self.site + 1)

    def read(self, x_BTD: Tensor) -> Tensor:
        return self.attention_norm(x_BTD)
