"""BERT (Devlin et al. 2019) as one readable module, and the encoder of either family.

- Post-LayerNorm, learned positions, exact GELU, dropout after each sub-layer, tied output embeddings, no NSP. What the
  modernbert family has in place of that is in `modernbert.py`; all else is the same.
- A layer takes its queries apart from its context: `layer(x_BQD, context_BSD)` updates Q positions that attend to S.
- No padding is expected: rows are packed full. A mask is honoured where one is given.
- Dropout is a hash of (row seed, site, position, column), not a stream of random numbers: it depends on nothing else.

Legend: B rows, S positions a row, Q query positions, M predicted positions, D hidden size, H heads, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sctd.model.attention import Attention, Mask
from sctd.model.layer import EncoderLayer
from sctd.model.modernbert import ModernEmbeddings, ModernLayer
from sctd.model.shape import BertShape
from sctd_kernels import dropout, dropout_add_norm, linear_gelu, rotary_table

__all__ = ["Bert", "BertShape", "Embeddings", "Layer"]

_SLOWEST = 10_000.0  # of sinusoidal positions (Vaswani et al. 2017)


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


class Layer(EncoderLayer):
    """Attention and feed-forward, each with dropout, residual and LayerNorm after it.

    Args:
        number: place of the layer in the stack.
        layer_norm: native | apex.
        recompute: see `EncoderLayer`.
    """

    def __init__(self, shape: BertShape, number: int, layer_norm: str = "native", recompute: bool = False) -> None:
        super().__init__(shape.attention_dropout, recompute)
        add_norm = {"native": AddNorm, "apex": ApexAddNorm}[layer_norm]
        self.attention = Attention(shape.hidden_size, shape.heads, shape.attention_dropout)
        self.attention_norm = add_norm(shape, site=2 * number + 1)
        self.expand = nn.Linear(shape.hidden_size, shape.intermediate_size)
        self.contract = nn.Linear(shape.intermediate_size, shape.hidden_size)
        self.output_norm = add_norm(shape, site=2 * number + 2)

    def compute(
        self,
        x_BQD: Tensor,
        context_BSD: Tensor | None,
        mask: Mask | None,
        seed_B: Tensor | None,
        place_BQ: Tensor | None,
    ) -> Tensor:
        """Places play no part: the embeddings have them."""
        x_BQD = self.attention_norm(self.attention(x_BQD, context_BSD, mask), x_BQD, seed_B)
        inner_BQE = linear_gelu(x_BQD, self.expand.weight, self.expand.bias)
        return self.output_norm(self.contract(inner_BQE), x_BQD, seed_B)


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


class Bert(nn.Module):
    """Embeddings, layers and the masked-language-model head of either family.

    Args:
        layer_norm: see `Layer`; modernbert has the native one alone.
        recompute: see `EncoderLayer`.
        device: of the table of rotary positions, which is no parameter and does not move with the others.

    Attributes:
        norm: after the last layer, before the head; the identity where each layer ends in one.
    """

    def __init__(
        self, shape: BertShape, layer_norm: str = "native", recompute: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.shape = shape
        width, eps, numbers = shape.hidden_size, shape.layer_norm_eps, range(shape.layers)
        if shape.is_modern:
            thetas = [shape.local_theta if shape.is_local(number) else shape.rotary_theta for number in numbers]
            tables = {each: rotary_table(shape.max_positions, width // shape.heads, each, device) for each in thetas}
            self.embeddings: Embeddings | ModernEmbeddings = ModernEmbeddings(shape)
            self.layers = nn.ModuleList(
                ModernLayer(shape, number, tables[theta], recompute) for number, theta in enumerate(thetas)
            )
            self.norm: nn.Module = nn.LayerNorm(width, eps=eps, bias=False)
        else:
            self.embeddings = Embeddings(shape)
            self.layers = nn.ModuleList(Layer(shape, number, layer_norm, recompute) for number in numbers)
            self.norm = nn.Identity()
        self.head = MlmHead(width, shape.vocab_size, eps, bias=not shape.is_modern)
        self._init()

    def forward(self, ids_BS: Tensor, mask: Mask | None = None, row_seed_B: Tensor | None = None) -> Tensor:
        """Logits at all positions, (B, S, V). Training computes them at predicted positions only."""
        x_BSD = self.embeddings(ids_BS, row_seed_B)
        for layer in self.layers:
            x_BSD = layer(x_BSD, mask=mask, row_seed_B=row_seed_B)
        return self.logits(self.norm(x_BSD))

    def logits(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., V), through the tied word embeddings. `x` is after `norm`."""
        return self.head(x, self.embeddings.word.weight)

    def _init(self) -> None:
        """Every initialisation there is: N(0, range) for matrices, 0 for biases, LayerNorm at identity.

        In a modernbert, whose states are sums over all layers, what each adds begins smaller by sqrt(2 L).
        """
        deviation = self.shape.initializer_range
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=deviation)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for layer in self.layers:
            if isinstance(layer, ModernLayer):
                for matrix in (layer.attention.out.weight, layer.contract.weight):
                    nn.init.normal_(matrix, std=deviation / (2 * self.shape.layers) ** 0.5)
        if isinstance(self.embeddings, Embeddings) and self.shape.positions == "sinusoidal":
            table_SD = self.embeddings.position.weight
            table_SD.data.copy_(sinusoids(*table_SD.shape) * 2**0.5 * deviation)


def sinusoids(positions: int, width: int) -> Tensor:
    """Sines in the even columns and cosines in the odd ones, of wavelengths from 2 pi up to 10,000 x 2 pi (Vaswani et
    al. 2017): float32 (positions, width). Their standard deviation is about 1 / sqrt(2)."""
    column = torch.arange(0, width, 2, dtype=torch.float64)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * _SLOWEST ** (-column / width)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :width].float()
