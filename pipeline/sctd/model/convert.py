"""To and from transformers: `BertForMaskedLM` for the bert family, `ModernBertForMaskedLM` for modernbert.

The names differ, and which projections share a matrix. Each family is a table of names and no code.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sctd.errors import UserError
from sctd.model.bert import Bert
from sctd.model.shape import BertShape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

HEADS = {"bert": "BertForMaskedLM", "modernbert": "ModernBertForMaskedLM"}  # classes of transformers, by family

# (ours, theirs) by prefix; `{}` is the layer number. Several prefixes are matrices that are stacked on
# the other side, each with its share of the rows.
_Names = str | tuple[tuple[str, int], ...]
_Map = tuple[tuple[_Names, _Names], ...]
_BERT: _Map = (
    ("embeddings.word.weight", "bert.embeddings.word_embeddings.weight"),
    ("embeddings.position.weight", "bert.embeddings.position_embeddings.weight"),
    ("embeddings.token_type.weight", "bert.embeddings.token_type_embeddings.weight"),
    ("embeddings.norm", "bert.embeddings.LayerNorm"),
    ("layers.{}.attention.query", "bert.encoder.layer.{}.attention.self.query"),
    (
        "layers.{}.attention.key_value",
        (("bert.encoder.layer.{}.attention.self.key", 1), ("bert.encoder.layer.{}.attention.self.value", 1)),
    ),
    ("layers.{}.attention.out", "bert.encoder.layer.{}.attention.output.dense"),
    ("layers.{}.attention_norm", "bert.encoder.layer.{}.attention.output.LayerNorm"),
    ("layers.{}.expand", "bert.encoder.layer.{}.intermediate.dense"),
    ("layers.{}.contract", "bert.encoder.layer.{}.output.dense"),
    ("layers.{}.output_norm", "bert.encoder.layer.{}.output.LayerNorm"),
    ("head.dense", "cls.predictions.transform.dense"),
    ("head.norm", "cls.predictions.transform.LayerNorm"),
    ("head.bias", "cls.predictions.bias"),
)
_MODERN: _Map = (
    ("embeddings.word.weight", "model.embeddings.tok_embeddings.weight"),
    ("embeddings.norm.weight", "model.embeddings.norm.weight"),
    (
        (("layers.{}.attention.query.weight", 1), ("layers.{}.attention.key_value.weight", 2)),
        "model.layers.{}.attn.Wqkv.weight",
    ),
    ("layers.{}.attention.out.weight", "model.layers.{}.attn.Wo.weight"),
    ("layers.{}.attention_norm.weight", "model.layers.{}.attn_norm.weight"),
    ("layers.{}.expand.weight", "model.layers.{}.mlp.Wi.weight"),
    ("layers.{}.contract.weight", "model.layers.{}.mlp.Wo.weight"),
    ("layers.{}.output_norm.weight", "model.layers.{}.mlp_norm.weight"),
    ("norm.weight", "model.final_norm.weight"),
    ("head.dense.weight", "head.dense.weight"),
    ("head.norm.weight", "head.norm.weight"),
    ("head.bias", "decoder.bias"),
)
_ABSENT = "layers.0.attention_norm"  # of a modernbert: its embeddings are normalised

# What a configuration must say for this model to compute the same; a key that is not there does.
_BERT_SAYS = {
    "hidden_act": "gelu", "type_vocab_size": 2, "is_decoder": False, "position_embedding_type": "absolute",
    "tie_word_embeddings": True,
}  # fmt: skip
_MODERN_SAYS = {
    "hidden_activation": "gelu", "classifier_activation": "gelu", "norm_bias": False, "attention_bias": False,
    "mlp_bias": False, "decoder_bias": True, "classifier_bias": False, "tie_word_embeddings": True,
}  # fmt: skip

# What the names of a head's weights begin with.
_HEADS: dict[str, tuple[str, ...]] = {"bert": ("cls.predictions.",), "modernbert": ("head.", "decoder.")}
_SHARED = ("head.dense.weight", "head.norm.weight")
_COPIES = (".position_ids", "decoder.weight", "decoder.bias")  # buffers, and what is tied to another weight
_ROBERTA = "its positions begin at 2, it has no token types, and its tokenizer is no WordPiece"
_OTHERS = {
    "roberta": _ROBERTA, "xlm-roberta": _ROBERTA, "camembert": _ROBERTA,
    "electra": "its embeddings have a width of their own", "albert": "its layers share weights",
    "distilbert": "it has no token types", "deberta-v2": "its attention has relative positions",
}  # fmt: skip

# Fields of a shape by the keys that a configuration has them under; of several keys for one field the last is read.
_SIZES = {
    "vocab_size": "vocab_size", "num_hidden_layers": "layers", "hidden_size": "hidden_size",
    "num_attention_heads": "heads", "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_positions", "initializer_range": "initializer_range",
}  # fmt: skip
_BERT_SIZES = _SIZES | {
    "hidden_dropout_prob": "dropout", "attention_probs_dropout_prob": "attention_dropout",
    "layer_norm_eps": "layer_norm_eps",
}  # fmt: skip
_MODERN_SIZES = _SIZES | {
    "embedding_dropout": "dropout", "classifier_dropout": "dropout", "mlp_dropout": "dropout",
    "attention_dropout": "attention_dropout", "norm_eps": "layer_norm_eps",
}  # fmt: skip


def to_hf_config(
    shape: BertShape, pad_token_id: int, cls_token_id: int | None = None, sep_token_id: int | None = None
) -> "PreTrainedConfig":
    """The transformers configuration of a shape."""
    from transformers import BertConfig, ModernBertConfig  # takes a second, and most commands convert nothing

    keys: dict[str, str] = _MODERN_SIZES if shape.is_modern else _BERT_SIZES
    common: dict[str, Any] = {key: getattr(shape, field) for key, field in keys.items()}
    common |= {"pad_token_id": pad_token_id, "architectures": [HEADS[shape.family]]}
    if not shape.is_modern:
        return BertConfig(**common, hidden_act="gelu", type_vocab_size=2)
    local = shape.local_theta if shape.window else shape.rotary_theta
    common |= {"local_attention": shape.window} if shape.window else {}
    return ModernBertConfig(
        **common,
        layer_types=_layer_types(shape),
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": shape.rotary_theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        cls_token_id=cls_token_id,
        sep_token_id=sep_token_id,
        bos_token_id=cls_token_id,
        eos_token_id=sep_token_id,
    )


def from_hf_config(config: "PreTrainedConfig") -> BertShape:
    """The shape of a transformers BERT or ModernBERT.

    Raises:
        UserError: an architecture that this model does not compute (another activation, stretched rotations, ...).
    """
    if config.model_type not in ("bert", "modernbert"):
        why = _OTHERS.get(config.model_type, "it is another architecture")
        raise UserError(f"checkpoint's config.json: model_type is {config.model_type!r}, only 'bert' and 'modernbert' "
                        f"can be loaded: {why}")  # fmt: skip
    modern = config.model_type == "modernbert"
    for key, wanted in (_MODERN_SAYS if modern else _BERT_SAYS).items():
        found = getattr(config, key, wanted)
        if found != wanted:
            raise UserError(f"checkpoint's config.json: {key} is {found!r}, only {wanted!r} can be loaded")
    keys: dict[str, str] = _MODERN_SIZES if modern else _BERT_SIZES
    sizes: dict[str, Any] = {field: getattr(config, key) for key, field in keys.items()}
    if not modern:
        return BertShape(**sizes)
    shape = BertShape(**sizes, family="modernbert")
    thetas = {}
    for kind in sorted({*config.layer_types}):
        rotation = config.rope_parameters[kind]
        if (found := rotation.get("rope_type", "default")) != "default":
            raise UserError(f"checkpoint's config.json: rope_type is {found!r}, only 'default' can be loaded")
        thetas[kind] = float(rotation["rope_theta"])
    theta = thetas.get("full_attention")
    if theta is not None and theta != shape.rotary_theta:
        shape = replace(shape, theta=theta)
    if "sliding_attention" in thetas:
        others = [number for number, kind in enumerate(config.layer_types) if number and kind == "full_attention"]
        shape = replace(
            shape,
            window=config.local_attention,
            global_every=others[0] if others else shape.layers,
            local_theta=thetas["sliding_attention"],
        )
    if list(config.layer_types) != _layer_types(shape):
        raise UserError("checkpoint's config.json: layer_types follow no pattern: every n-th layer must have "
                        "'full_attention', from the first, and the others 'sliding_attention'")  # fmt: skip
    return shape


def _layer_types(shape: BertShape) -> list[str]:
    return ["sliding_attention" if shape.is_local(number) else "full_attention" for number in range(shape.layers)]


def to_hf_state(state: dict[str, Tensor], shape: BertShape) -> dict[str, Tensor]:
    """Our state dict under the names of transformers, each tensor contiguous, tied ones once."""
    found: dict[str, Tensor] = {}
    for ours, theirs in _pairs(shape):
        found |= _moved(state, ours, theirs)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def from_hf_state(state: dict[str, Tensor], shape: BertShape) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of a transformers model under our names, with or without its masked-language-model head, and the
    names of those that have no place here (poolers, heads of other tasks).

    Raises:
        UserError: a weight that is missing, of another size, or that is a part of the encoder and has no place here.
    """
    theirs = {_full_name(name, shape): tensor for name, tensor in state.items()}
    names = {name for _, sources in _pairs(shape) for name, _ in sources}
    head = {name for name in names if name.startswith(_HEADS[shape.family])}
    # A classifier of modernbert has the dense layer and the norm of that head too, but not its output's bias.
    wanted = names if (head - set(_SHARED)) & theirs.keys() else names - head
    if missing := sorted(wanted - theirs.keys()):
        raise UserError(
            f"checkpoint has no weight {missing[0]!r} (in all, {len(missing)} of {len(wanted)} are missing)"
        )
    left_out = [name for name in theirs.keys() - wanted if not name.endswith(_COPIES)]
    if strange := sorted(name for name in left_out if re.search(r"\b(layers?\.\d|embeddings\.)", name)):
        raise UserError(f"checkpoint has a weight {strange[0]!r}, which this architecture has no place for")
    found: dict[str, Tensor] = {}
    for ours, sources in _pairs(shape):
        if all(name in wanted for name, _ in sources):
            found |= _moved(theirs, sources, ours)
    with torch.device("meta"):
        expected = Bert(shape).state_dict()
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            sizes = f"{tuple(tensor.shape)}, and not {tuple(expected[name].shape)}"
            raise UserError(f"checkpoint's weights do not fit its config.json: {name} is {sizes}")
    return found, sorted(left_out)


def _full_name(name: str, shape: BertShape) -> str:
    """As the model with a head has it: without one the prefix is left out, and old files say gamma and beta."""
    if not shape.is_modern:
        name = name.removesuffix(".gamma") + ".weight" if name.endswith("LayerNorm.gamma") else name
        name = name.removesuffix(".beta") + ".bias" if name.endswith("LayerNorm.beta") else name
        return f"bert.{name}" if name.startswith(("embeddings.", "encoder.", "pooler.")) else name
    return f"model.{name}" if name.startswith(("embeddings.", "layers.", "final_norm.")) else name


def _pairs(shape: BertShape) -> Iterator[tuple[list[tuple[str, int]], list[tuple[str, int]]]]:
    """(ours, theirs) for each tensor: names with their parts of the whole."""
    endings = ("",) if shape.is_modern else (".weight", ".bias")
    for pair in _MODERN if shape.is_modern else _BERT:
        ours, theirs = (((names, 1),) if isinstance(names, str) else names for names in pair)
        for number in range(shape.layers if "{}" in ours[0][0] else 1):
            if shape.is_modern and ours[0][0].format(number).startswith(_ABSENT):
                continue
            for ending in ("",) if ours[0][0].endswith((".weight", ".bias")) else endings:
                yield tuple([(name.format(number) + ending, part) for name, part in side] for side in (ours, theirs))  # type: ignore[misc]


def _moved(
    state: dict[str, Tensor], sources: list[tuple[str, int]], targets: list[tuple[str, int]]
) -> dict[str, Tensor]:
    parts = [state[name] for name, _ in sources]
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    if len(targets) == 1:
        return {targets[0][0]: whole}
    unit = len(whole) // sum(part for _, part in targets)
    return dict(zip((name for name, _ in targets), whole.split([unit * part for _, part in targets]), strict=True))
