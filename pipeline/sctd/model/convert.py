"""To and from `transformers.BertForMaskedLM`: the names differ, and we keep key and value in one matrix."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sctd.errors import UserError
from sctd.model.bert import Bert, BertShape

if TYPE_CHECKING:
    from transformers import BertConfig

# (ours, theirs) by prefix; `{}` is the layer number.
_EMBEDDINGS = (
    ("embeddings.word.weight", "bert.embeddings.word_embeddings.weight"),
    ("embeddings.position.weight", "bert.embeddings.position_embeddings.weight"),
    ("embeddings.token_type.weight", "bert.embeddings.token_type_embeddings.weight"),
    ("embeddings.norm", "bert.embeddings.LayerNorm"),
    ("head.dense", "cls.predictions.transform.dense"),
    ("head.norm", "cls.predictions.transform.LayerNorm"),
    ("head.bias", "cls.predictions.bias"),
)
_LAYER = (
    ("layers.{}.attention.query", "bert.encoder.layer.{}.attention.self.query"),
    ("layers.{}.attention.out", "bert.encoder.layer.{}.attention.output.dense"),
    ("layers.{}.attention_norm", "bert.encoder.layer.{}.attention.output.LayerNorm"),
    ("layers.{}.expand", "bert.encoder.layer.{}.intermediate.dense"),
    ("layers.{}.contract", "bert.encoder.layer.{}.output.dense"),
    ("layers.{}.output_norm", "bert.encoder.layer.{}.output.LayerNorm"),
)
_KEY_VALUE = "layers.{}.attention.key_value"
_THEIR_SELF = "bert.encoder.layer.{}.attention.self"


def to_hf_config(shape: BertShape, pad_token_id: int) -> "BertConfig":
    from transformers import BertConfig  # takes a second, and most commands convert nothing

    return BertConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate_size,
        hidden_act="gelu",
        hidden_dropout_prob=shape.dropout,
        attention_probs_dropout_prob=shape.attention_dropout,
        max_position_embeddings=shape.max_positions,
        type_vocab_size=2,
        initializer_range=shape.initializer_range,
        layer_norm_eps=shape.layer_norm_eps,
        pad_token_id=pad_token_id,
        architectures=["BertForMaskedLM"],
    )


def from_hf_config(config: "BertConfig") -> BertShape:
    """The shape of a transformers BERT.

    Raises:
        UserError: an architecture that this model does not compute (another activation, relative positions, ...).
    """
    differences = {
        "hidden_act": "gelu",
        "type_vocab_size": 2,
        "model_type": "bert",
        "is_decoder": False,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
    }
    for key, wanted in differences.items():
        found = getattr(config, key, wanted)
        if found != wanted:
            raise UserError(f"checkpoint's config.json: {key} is {found!r}, only {wanted!r} can be loaded")
    return BertShape(
        vocab_size=config.vocab_size,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        max_positions=config.max_position_embeddings,
        dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
        layer_norm_eps=config.layer_norm_eps,
        initializer_range=config.initializer_range,
    )


def to_hf_state(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Our state dict under the names of `BertForMaskedLM`, each tensor contiguous, tied ones once."""
    renamed = _rename(state, layers, to_theirs=True)
    for number in range(layers):
        for kind in ("weight", "bias"):
            key, value = state[f"{_KEY_VALUE.format(number)}.{kind}"].chunk(2)
            renamed[f"{_THEIR_SELF.format(number)}.key.{kind}"] = key
            renamed[f"{_THEIR_SELF.format(number)}.value.{kind}"] = value
    return {name: tensor.contiguous() for name, tensor in renamed.items()}


def from_hf_state(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """A `BertForMaskedLM` state dict under our names."""
    renamed = _rename(state, layers, to_theirs=False)
    for number in range(layers):
        for kind in ("weight", "bias"):
            parts = [state[f"{_THEIR_SELF.format(number)}.{part}.{kind}"] for part in ("key", "value")]
            renamed[f"{_KEY_VALUE.format(number)}.{kind}"] = torch.cat(parts)
    return renamed


def load_hf(config: "BertConfig", state: dict[str, Tensor]) -> Bert:
    """Our model with the weights of a `BertForMaskedLM`.

    Raises:
        UserError: another architecture, or weights that are missing.
    """
    model = Bert(from_hf_config(config))
    try:
        model.load_state_dict(from_hf_state(state, model.shape.layers))
    except KeyError as error:
        raise UserError(f"checkpoint has no weight {error}: it must be a BertForMaskedLM") from None
    except RuntimeError as error:
        raise UserError(f"checkpoint's weights do not fit its config.json: {' '.join(str(error).split())}") from None
    return model


def _rename(state: dict[str, Tensor], layers: int, to_theirs: bool) -> dict[str, Tensor]:
    pairs = list(_EMBEDDINGS)
    pairs += [(ours.format(n), theirs.format(n)) for n in range(layers) for ours, theirs in _LAYER]
    renamed = {}
    for pair in pairs:
        source, target = pair if to_theirs else pair[::-1]
        endings = ("",) if source.endswith((".weight", ".bias")) else (".weight", ".bias")
        for ending in endings:
            renamed[target + ending] = state[source + ending]
    return renamed
