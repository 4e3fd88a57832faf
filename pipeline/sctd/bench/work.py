"""What the kernels do, and who else does it: moves of tokens, and what lies between matrix products.

Legend: B rows, S positions a row, K kept positions a row, H heads, d width of a head, D hidden size, E inner size,
N predictions, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

from sctd.bench.contenders import SPECIAL, make_batch, make_shape
from sctd.bench.timing import DEVICE, Call, Comparison, forward, ours, with_backward
from sctd.config import Config
from sctd.data.masking import target_count
from sctd.model.shape import BertShape
from sctd.model.token_dropping import kept_tokens
from sctd.train.engine.devices import DTYPES
from sctd_kernels import (
    FIXED_POINT,
    Selection,
    dropout_add_norm,
    geglu,
    linear_gelu,
    merge,
    rotary_table,
    rotate,
    select,
    split,
    token_losses,
)  # fmt: skip

TOGETHER = "select + split + merge"
_LTD = "DeepSpeed random-LTD"
_RATE, _EPS = 0.1, 1e-12
Work = tuple[Call, Call, list[Tensor]]  # ours, torch's, and the gradients of what


def moves(config: Config, rows: int, length: int, backends: list[str], has_ltd: bool) -> dict[str, Comparison]:
    """Selecting, splitting and merging, each alone and all together, forward and with the backward behind it."""
    shape, keep = make_shape(config, length), kept_tokens(config.model.keep_ratio, length)
    batch = make_batch(config, shape.vocab_size, rows, length)
    ids_BS, seed_B = batch["input_ids"], batch["row_seed"]
    table_V = torch.rand(shape.vocab_size, device=DEVICE)
    table_V[[SPECIAL.cls, SPECIAL.sep, SPECIAL.mask]] = float("inf")
    dtype = DTYPES[config.train.precision]
    hidden_BSD = torch.randn(rows, length, shape.hidden_size, device=DEVICE, dtype=dtype).requires_grad_()
    kept_BKD = hidden_BSD.detach()[:, :keep].clone().requires_grad_()

    def choose() -> Selection:
        return select(ids_BS, keep, seed_B, table_V=table_V)

    def together() -> Tensor:
        selection = choose()
        kept_BKD, rest_BSD = split(hidden_BSD, selection)
        return merge(rest_BSD, kept_BKD, selection)

    def topk() -> Tensor:
        return table_V[ids_BS].topk(keep, dim=1).indices.sort(dim=1).values

    def wide(index_BK: Tensor) -> Tensor:
        return index_BK[..., None].expand(-1, -1, shape.hidden_size)

    def plain() -> Tensor:
        index_BKD = wide(topk())
        return hidden_BSD.scatter(1, index_BKD, hidden_BSD.gather(1, index_BKD))

    selection = choose()
    index_BKD = wide(selection.kept_BK)
    calls: dict[str, dict[str, Call]] = {
        "select": ours(backends, choose) | {"topk + sort": topk},
        "split": ours(backends, lambda: split(hidden_BSD, selection))
        | {"gather": lambda: (hidden_BSD.gather(1, index_BKD), hidden_BSD)},
        "merge": ours(backends, lambda: merge(hidden_BSD, kept_BKD, selection))
        | {"scatter": lambda: hidden_BSD.scatter(1, index_BKD, kept_BKD)},
        TOGETHER: ours(backends, together)
        | {"topk + gather + scatter": plain, "the same, compiled": torch.compile(plain)},
    }
    if has_ltd:
        for title, call in _deepspeed(hidden_BSD, kept_BKD).items():
            calls[title][_LTD] = call
    of = {"split": [hidden_BSD], "merge": [hidden_BSD, kept_BKD], TOGETHER: [hidden_BSD]}
    found = {}
    for title, (alone, both) in _moved(ids_BS, hidden_BSD, keep).items():
        found[title] = Comparison(forward(calls[title]), alone)
        if title in of:
            found[f"{title}, with backward"] = Comparison(with_backward(calls[title], of[title]), both)
    return found


def _moved(ids_BS: Tensor, hidden_BSD: Tensor, keep: int) -> dict[str, tuple[int, int]]:
    """Bytes that are read and written, in a forward and with its backward, by one pass for each of them."""
    rows, length, width = hidden_BSD.shape
    state = rows * width * hidden_BSD.element_size()
    maps = 3 * ids_BS.nbytes  # ids in, both lists of positions and the inverse out
    split_forward, split_both = 2 * keep * state, (3 * keep + 2 * length) * state
    merge_forward, merge_both = 2 * length * state, (keep + 4 * length) * state
    return {
        "select": (maps, maps),
        "split": (split_forward, split_both),
        "merge": (merge_forward, merge_both),
        TOGETHER: (maps + split_forward + merge_forward, maps + split_both + merge_both),
    }


def _deepspeed(hidden_BSD: Tensor, kept_BKD: Tensor) -> dict[str, Call]:
    """DeepSpeed's operations; its choice is at random."""
    from deepspeed.ops.random_ltd.dropping_utils import GatherTokens, ScatterTokens, gpt_sample_tokens

    def sample() -> Tensor:
        index_1BK, _ = gpt_sample_tokens(kept_BKD.shape[1], *hidden_BSD.shape[1::-1], 1, device=str(DEVICE))
        return index_1BK[0]

    def together() -> Tensor:
        index_BK = sample()
        rest_BSD, kept_BKD = GatherTokens.apply(hidden_BSD, index_BK, True)
        return ScatterTokens.apply(rest_BSD, kept_BKD, index_BK, True)

    index_BK = sample()
    return {
        "select": sample,
        "split": lambda: GatherTokens.apply(hidden_BSD, index_BK, True),
        "merge": lambda: ScatterTokens.apply(hidden_BSD, kept_BKD, index_BK, True),
        TOGETHER: together,
    }


def elementwise(config: Config, rows: int, length: int, backends: list[str]) -> dict[str, Comparison]:
    """What this family has between its matrix products, and the losses: each with its backward, also compiled."""
    shape, dtype = make_shape(config, length), DTYPES[config.train.precision]
    targets = rows * target_count(config.data.mask_probability, length)

    def leaf(*size: int) -> Tensor:
        return torch.randn(*size, device=DEVICE, dtype=dtype).requires_grad_()

    work = (_of_modernbert if shape.is_modern else _of_bert)(shape, rows, length, leaf)
    work["cross-entropy + accumulators"] = _losses(leaf(targets, shape.vocab_size))
    found = {}
    for title, (call, plain, of) in work.items():
        calls = ours(backends, call) | {"torch": plain, "torch, compiled": torch.compile(plain)}
        found[f"{title}, with backward"] = Comparison(with_backward(calls, of))
    return found


def _of_bert(shape: BertShape, rows: int, length: int, leaf: Callable[..., Tensor]) -> dict[str, Work]:
    width, inner = shape.hidden_size, shape.intermediate_size
    x_BSD, rest_BSD, weight_D, bias_D = leaf(rows, length, width), leaf(rows, length, width), leaf(width), leaf(width)
    weight_ED, bias_E, seed_B = leaf(inner, width), leaf(inner), torch.arange(rows, device=DEVICE)
    return {
        "dropout + residual + LayerNorm": (
            lambda: dropout_add_norm(x_BSD, rest_BSD, weight_D, bias_D, _EPS, _RATE, seed_B, 1),
            lambda: F.layer_norm(rest_BSD + F.dropout(x_BSD, _RATE), (width,), weight_D, bias_D, _EPS),
            [x_BSD, rest_BSD, weight_D, bias_D],
        ),
        "linear + GELU": (
            lambda: linear_gelu(x_BSD, weight_ED, bias_E),
            lambda: F.gelu(F.linear(x_BSD, weight_ED, bias_E)),
            [x_BSD, weight_ED, bias_E],
        ),
    }


def _of_modernbert(shape: BertShape, rows: int, length: int, leaf: Callable[..., Tensor]) -> dict[str, Work]:
    """torch's rotation is what transformers does; its table is ready in both."""
    width = shape.hidden_size // shape.heads
    q_BSHd, k_BSHd = (leaf(rows, length, shape.heads, width) for _ in range(2))
    table_2Sh = rotary_table(length, width, shape.rotary_theta, DEVICE)
    cosine_1Sd, sine_1Sd = table_2Sh.repeat(1, 1, 2)[:, None]
    x_BSE = leaf(rows, length, 2 * shape.intermediate_size)

    def plain_geglu() -> Tensor:
        inner_BSE, gate_BSE = x_BSE.chunk(2, dim=-1)
        return F.gelu(inner_BSE) * gate_BSE

    return {
        "rotary positions of queries and keys": (
            lambda: (rotate(q_BSHd, table_2Sh), rotate(k_BSHd, table_2Sh)),
            lambda: apply_rotary_pos_emb(q_BSHd, k_BSHd, cosine_1Sd, sine_1Sd, unsqueeze_dim=2),
            [q_BSHd, k_BSHd],
        ),
        "GeGLU": (lambda: geglu(x_BSE), plain_geglu, [x_BSE]),
    }


def _losses(logits_NV: Tensor) -> Work:
    targets, vocab = logits_NV.shape
    labels_N = torch.randint(vocab, (targets,), device=DEVICE)
    sums_2V = torch.zeros(2, vocab, dtype=torch.int64, device=DEVICE)

    def plain() -> Tensor:
        losses_N = F.cross_entropy(logits_NV.float(), labels_N, reduction="none")
        sums_2V[0].index_add_(0, labels_N, (losses_N.detach() * FIXED_POINT).long())
        sums_2V[1].index_add_(0, labels_N, torch.ones_like(labels_N))
        return losses_N

    return lambda: token_losses(logits_NV, labels_N, sums_2V), plain, [logits_NV]
