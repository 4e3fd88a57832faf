"""Sentence vectors of every layer of a frozen encoder, each sentence encoded once.

A vector is the mean over the sentence's own tokens. [CLS] and [SEP] are left out: they are no words, and token dropping
never drops them, so that they would hide what the dropped layers do to words. Or it is [CLS] alone.

Legend: N sentences, B of a batch, T tokens, L layers, D hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sctd.evaluate.encoder import Encoder, best_device, load_tokenizer, load_weights

POOLINGS = ("mean", "cls")
_TOKENS = {"cpu": 2048, "cuda": 32768}  # of a batch, padding included
_LARGEST = float(np.finfo(np.float16).max)


def nothing() -> None:
    """For a `check` that has nothing to say."""


def sentence_vectors(
    encoder: Encoder, sentences: Sequence[str], pooling: str, check: Callable[[], None] = nothing
) -> NDArray[np.float16]:
    """float16 (L + 1, N, D): of the embeddings' output, and of the output of each layer.

    Half precision keeps BERT-large's vectors of 20,000 sentences within 1 GB of memory; its rounding is far below
    what a classifier on standardised columns can see.

    Args:
        pooling: mean | cls. check: called before each batch; what it raises ends the work.

    Raises:
        UserError: a model or tokenizer that cannot be loaded.
    """
    tokenizer, device = load_tokenizer(encoder), best_device()
    # With its head: a body alone would be given a new pooler where the checkpoint has none.
    model = load_weights(encoder, "AutoModelForMaskedLM").base_model.to(device).eval()
    limit = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    encoded = tokenizer(list(sentences), truncation=True, max_length=limit, return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    found: NDArray[np.float16] | None = None
    for rows in batches([len(row) for row in ids], _TOKENS[device.type]):
        check()
        ids_BT = _padded([ids[row] for row in rows], tokenizer.pad_token_id).to(device)
        there_BT = _padded([[1] * len(ids[row]) for row in rows], 0).to(device)
        word_BT = 1 - _padded([special[row] for row in rows], 1).to(device)
        with torch.inference_mode():
            hidden = model(input_ids=ids_BT, attention_mask=there_BT, output_hidden_states=True).hidden_states
            pooled_LBD = torch.stack([_pool(layer_BTD, word_BT, pooling) for layer_BTD in _as_read(model, hidden)])
        if found is None:
            found = np.empty((len(hidden), len(ids), pooled_LBD.shape[-1]), dtype=np.float16)
        # Models without a LayerNorm at the end of each layer have columns beyond the range.
        found[:, rows] = pooled_LBD.clamp(-_LARGEST, _LARGEST).half().cpu().numpy()
    assert found is not None, "there are sentences"
    return found


def _as_read(model: Any, hidden: Sequence[Tensor]) -> list[Tensor]:
    """States as the next module reads them. A ModernBERT reads each sum through a norm; transformers returns the sums
    themselves, but the last layer's behind the final norm."""
    if model.config.model_type != "modernbert":
        return list(hidden)
    return [*(layer.attn_norm(states) for layer, states in zip(model.layers, hidden, strict=False)), hidden[-1]]


def batches(lengths: Sequence[int], budget: int) -> Iterator[NDArray[np.int64]]:
    """Rows of similar length together: row numbers of each batch of at most `budget` positions, or of one row."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * lengths[order[stop]] <= budget:
            stop += 1
        yield order[start:stop]
        start = stop


def _pool(hidden_BTD: Tensor, word_BT: Tensor, pooling: str) -> Tensor:
    if pooling == "cls":
        return hidden_BTD[:, 0]
    weight_B1T = word_BT.to(hidden_BTD.dtype).unsqueeze(1)
    total_BD = torch.bmm(weight_B1T, hidden_BTD).squeeze(1)
    return total_BD / word_BT.sum(1, keepdim=True).clamp(min=1)


def _padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])
