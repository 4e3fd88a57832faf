"""To and from transformers' BertForMaskedLM and ModernBertForMaskedLM: same logits, same names, nothing else; and what
is refused."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    PreTrainedModel,
)

from sctd.config import FAMILIES
from sctd.errors import UserError
from sctd.model.bert import Bert, BertShape
from sctd.model.convert import from_hf_config, from_hf_state, to_hf_config, to_hf_state
from small_models import load_hf

SHAPES = {
    "two layers": BertShape(99, 2, 32, 2, 64, 40),
    "one head, odd layers": BertShape(61, 3, 24, 1, 40, 17, layer_norm_eps=1e-5),
    "wide": BertShape(500, 4, 96, 6, 384, 64, dropout=0.2, attention_dropout=0.3, initializer_range=0.05),
    "modern": BertShape(99, 2, 32, 2, 48, 40, family="modernbert"),
    "modern, one head, odd layers": BertShape(61, 3, 24, 1, 40, 17, layer_norm_eps=1e-5, family="modernbert"),
    "modern, longest short": BertShape(70, 2, 32, 2, 48, 512, 0.2, 0.3, 1e-5, 0.05, family="modernbert"),
    "modern, long": BertShape(70, 2, 32, 2, 48, 1100, family="modernbert"),
    "modern, windows": BertShape(
        70, 5, 32, 2, 48, 60, family="modernbert", theta=1.6e5, window=16, global_every=2, local_theta=500.0
    ),
    "modern, all local but the first": BertShape(70, 4, 32, 2, 48, 40, family="modernbert", window=6, global_every=4),
    "modern, other theta": BertShape(70, 2, 32, 2, 48, 30, family="modernbert", theta=77.5),
}
OF_FAMILY = {"bert": SHAPES["two layers"], "modernbert": SHAPES["modern"]}
HEADS = {"bert": BertForMaskedLM, "modernbert": ModernBertForMaskedLM}
both = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> BertShape:
    return SHAPES[request.param]


def make_theirs(shape: BertShape) -> PreTrainedModel:
    return HEADS[shape.family](to_hf_config(shape, pad_token_id=0))


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Every weight differs from its neutral start: a bias or a LayerNorm that is lost must show."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(1.0)
    return model.eval()


def inputs(shape: BertShape) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and an attention mask with holes in the middle and at the end."""
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(shape.vocab_size, (3, shape.max_positions), generator=rng)
    mask = torch.rand(ids.shape, generator=rng) < 0.7
    mask[:, 0], mask[1, -5:] = True, False
    return ids, mask


@torch.no_grad()
def assert_same_logits(ours: Bert, theirs: PreTrainedModel) -> None:
    ids, mask = inputs(ours.shape)
    expected = theirs(input_ids=ids).logits
    assert expected.std() > 0.1, "the comparison is empty"
    torch.testing.assert_close(ours(ids), expected, atol=1e-5, rtol=1e-5)
    short = ids[:, :5]
    torch.testing.assert_close(ours(short), theirs(input_ids=short).logits, atol=1e-5, rtol=1e-5)
    masked = theirs(input_ids=ids, attention_mask=mask.long()).logits
    assert (masked - expected).abs().max() > 1e-3, "the mask makes no difference"
    torch.testing.assert_close(ours(ids, mask[:, None, None]), masked, atol=1e-5, rtol=1e-5)


def test_from_transformers(shape: BertShape) -> None:
    theirs = randomise(make_theirs(shape))
    ours = load_hf(theirs.config, theirs.state_dict()).eval()
    assert ours.shape == shape
    assert_same_logits(ours, theirs)


def test_to_transformers_and_back(shape: BertShape, tmp_path: Path) -> None:
    ours = randomise(Bert(shape))
    state = to_hf_state(ours.state_dict(), shape)
    to_hf_config(shape, pad_token_id=3).save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, info = HEADS[shape.family].from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert theirs.config.pad_token_id == 3 and theirs.dtype == torch.float32
    assert_same_logits(ours, theirs.eval())
    back = load_hf(theirs.config, theirs.state_dict())
    assert back.shape == shape
    for name, tensor in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_names_are_theirs_and_all_of_them(shape: BertShape) -> None:
    ours = Bert(shape)
    state = to_hf_state(ours.state_dict(), shape)
    theirs = make_theirs(shape)
    parameters = dict(theirs.named_parameters())  # tied ones once
    assert set(state) == set(parameters)
    assert {name: t.shape for name, t in state.items()} == {name: p.shape for name, p in parameters.items()}
    assert all(tensor.is_contiguous() for tensor in state.values())
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()
    found, left_out = from_hf_state(theirs.state_dict(), shape)
    assert set(found) == set(ours.state_dict()) and not left_out


@both
def test_gradients_equal_those_of_transformers(family: str) -> None:
    shape = OF_FAMILY[family]
    ours = randomise(Bert(shape)).double()
    theirs = make_theirs(shape).double().eval()
    theirs.load_state_dict(to_hf_state(ours.state_dict(), shape), strict=False)
    theirs.tie_weights()
    ids, mask = inputs(shape)
    ids = ids.clamp(min=1)  # as input, transformers gives the embedding of [PAD] no gradient; rows here hold no [PAD]
    ours(ids, mask[:, None, None]).square().sum().backward()
    theirs(input_ids=ids, attention_mask=mask.long()).logits.square().sum().backward()
    grads = {name: p.grad for name, p in ours.named_parameters()}
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    # transformers rotates in float32, in a model of float64 too
    tolerance = {"bert": {"rtol": 1e-8, "atol": 1e-8}, "modernbert": {"rtol": 1e-4, "atol": 1e-4}}[family]
    for name, grad in to_hf_state(grads, shape).items():
        assert family == "bert" or grad.abs().max() > 1.0, name
        torch.testing.assert_close(grad, expected[name], **tolerance)


def test_config_carries_every_size_and_rate() -> None:
    shape = BertShape(123, 4, 36, 3, 77, 55, 0.15, 0.25, 3e-7, 0.011)
    config = to_hf_config(shape, pad_token_id=9)
    assert from_hf_config(config) == shape
    assert config.architectures == ["BertForMaskedLM"] and config.pad_token_id == 9 and config.hidden_act == "gelu"
    modern = to_hf_config(replace(shape, family="modernbert"), 9, cls_token_id=7, sep_token_id=8)
    assert from_hf_config(modern) == replace(shape, family="modernbert")
    assert modern.architectures == ["ModernBertForMaskedLM"] and modern.pad_token_id == 9
    assert (modern.cls_token_id, modern.sep_token_id, modern.bos_token_id, modern.eos_token_id) == (7, 8, 7, 8)
    assert modern.embedding_dropout == modern.mlp_dropout == 0.15 and modern.attention_dropout == 0.25
    assert modern.layer_types == ["full_attention"] * 4


def test_how_positions_began_is_no_part_of_a_checkpoint() -> None:
    shape = SHAPES["two layers"]
    assert from_hf_config(to_hf_config(replace(shape, positions="sinusoidal"), 0)) == shape


@pytest.mark.parametrize(("positions", "theta"), [(64, 1e4), (512, 1e4), (513, 1.6e5), (8192, 1.6e5)])
def test_rotary_theta_goes_by_the_number_of_positions(positions: int, theta: float) -> None:
    shape = replace(SHAPES["modern"], max_positions=positions)
    config = to_hf_config(shape, 0)
    assert shape.rotary_theta == theta == config.rope_parameters["full_attention"]["rope_theta"]
    assert from_hf_config(config) == shape and from_hf_config(config).theta is None
    other = replace(shape, theta=170_000.0 - theta)
    assert other.rotary_theta == 170_000.0 - theta and from_hf_config(to_hf_config(other, 0)) == other


def test_a_published_configuration_of_an_earlier_transformers() -> None:
    """answerdotai/ModernBERT-base, were each of its layers global."""
    config = ModernBertConfig(global_attn_every_n_layers=1, global_rope_theta=160_000.0, local_rope_theta=10_000.0)
    shape = from_hf_config(config)
    assert shape == BertShape(50368, 22, 768, 12, 1152, 8192, 0.0, 0.0, 1e-5, 0.02, "modernbert")
    assert from_hf_config(ModernBertConfig(global_attn_every_n_layers=1, global_rope_theta=500.0)).rotary_theta == 500


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "relu"),
        ("hidden_act", "gelu_new"),
        ("type_vocab_size", 1),
        ("is_decoder", True),
        ("model_type", "roberta"),
        ("position_embedding_type", "relative_key"),
        ("tie_word_embeddings", False),
    ],
)
def test_other_architectures_are_refused(key: str, value: Any) -> None:
    config = to_hf_config(SHAPES["two layers"], 0)
    setattr(config, key, value)
    with pytest.raises(UserError) as caught:
        from_hf_config(config)
    assert key in str(caught.value) and repr(value) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_activation", "relu"),
        ("hidden_activation", "gelu_new"),
        ("classifier_activation", "silu"),
        ("norm_bias", True),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("decoder_bias", False),
        ("classifier_bias", True),
        ("tie_word_embeddings", False),
        ("model_type", "modernbert-decoder"),
    ],
)
def test_other_modern_architectures_are_refused(key: str, value: Any) -> None:
    config = to_hf_config(SHAPES["modern"], 0)
    setattr(config, key, value)
    with pytest.raises(UserError) as caught:
        from_hf_config(config)
    assert key in str(caught.value) and repr(value) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types follow no pattern"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}},
            "rope_type is 'linear'",
        ),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "rope_parameters": None}, "rope_type is 'dynamic'"),
    ],
)
def test_odd_windows_and_stretched_rotations_are_refused(changes: dict[str, Any], said: str) -> None:
    config = ModernBertConfig(**{**to_hf_config(SHAPES["modern"], 0).to_dict(), **changes})
    with pytest.raises(UserError) as caught:
        from_hf_config(config)
    assert said in str(caught.value) and "config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_the_published_modernbert_has_windows() -> None:
    shape = from_hf_config(ModernBertConfig())
    assert (shape.window, shape.global_every, shape.local_theta, shape.rotary_theta) == (128, 3, 10_000.0, 160_000.0)
    assert [number for number in range(22) if not shape.is_local(number)] == list(range(0, 22, 3))
    assert from_hf_config(to_hf_config(shape, 0)) == shape


@pytest.mark.parametrize("position", ["absolute", None])
def test_plain_bert_is_not_refused(position: str | None) -> None:
    extra = {} if position is None else {"position_embedding_type": position}
    assert from_hf_config(BertConfig(**extra)).layers == 12


@both
def test_a_missing_weight_is_named(family: str) -> None:
    theirs = make_theirs(OF_FAMILY[family])
    names = {
        "bert": ("bert.encoder.layer.1.attention.self.value.bias", "cls.predictions.transform.dense.weight"),
        "modernbert": ("model.layers.1.attn.Wqkv.weight", "model.final_norm.weight", "head.norm.weight"),
    }[family]
    for name in names:
        state = {key: value for key, value in theirs.state_dict().items() if key != name}
        with pytest.raises(UserError, match=f"no weight '{name}' .in all, 1 of"):
            load_hf(theirs.config, state)


@both
def test_without_a_head_the_encoder_is_what_it_was(family: str) -> None:
    """As a file of the plain encoder, and as one of a classifier, which says what has no place here."""
    shape = OF_FAMILY[family]
    whole = randomise(make_theirs(shape)).state_dict()
    expected, _ = from_hf_state(whole, shape)
    encoder = {name: tensor for name, tensor in expected.items() if not name.startswith("head.")}
    prefix = {"bert": "bert.", "modernbert": "model."}[family]
    bare = {name.removeprefix(prefix): tensor for name, tensor in whole.items() if name.startswith(prefix)}
    classes = {"bert": BertForSequenceClassification, "modernbert": ModernBertForSequenceClassification}
    classifier = classes[family](to_hf_config(shape, 0))
    classifier.load_state_dict(whole, strict=False)
    poolers = {"bert": ["bert.pooler.dense.bias", "bert.pooler.dense.weight"], "modernbert": []}[family]
    heads = {"bert": [], "modernbert": ["head.dense.weight", "head.norm.weight"]}[family]
    for state, left_out in (
        (bare, []),
        (classifier.state_dict(), sorted([*poolers, "classifier.bias", "classifier.weight", *heads])),
    ):
        found, strangers = from_hf_state(state, shape)
        assert found.keys() == encoder.keys() and strangers == left_out
        assert all(torch.equal(found[name], tensor) for name, tensor in encoder.items())


def test_names_of_old_files_are_read() -> None:
    shape = OF_FAMILY["bert"]
    state = randomise(make_theirs(shape)).state_dict()
    old = {re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", name): tensor for name, tensor in state.items()}
    old = {re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", name): tensor for name, tensor in old.items()}
    old["bert.embeddings.position_ids"] = torch.arange(40)[None]
    assert any(name.endswith("gamma") for name in old)
    found, left_out = from_hf_state(old, shape)
    expected, _ = from_hf_state(state, shape)
    assert not left_out and all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_part_that_the_encoder_has_no_place_for_is_refused() -> None:
    shape = OF_FAMILY["bert"]
    name = "bert.encoder.layer.0.crossattention.self.query.weight"
    state = make_theirs(shape).state_dict() | {name: torch.ones(2, 2)}
    with pytest.raises(UserError, match=r"a weight 'bert\.encoder\.layer\.0\.crossattention.*no place"):
        from_hf_state(state, shape)


@both
def test_weights_of_the_other_family_are_refused(family: str) -> None:
    mine, other = OF_FAMILY[family], next(shape for name, shape in OF_FAMILY.items() if name != family)
    with pytest.raises(UserError, match="checkpoint has no weight"):
        load_hf(to_hf_config(mine, 0), make_theirs(other).state_dict())


@both
def test_a_weight_of_another_size_is_refused(family: str) -> None:
    theirs = make_theirs(OF_FAMILY[family])
    config = type(theirs.config)(**{**theirs.config.to_dict(), "vocab_size": 98})
    with pytest.raises(UserError, match="do not fit its config.json: embeddings.word.weight is") as caught:
        load_hf(config, theirs.state_dict())
    assert "\n" not in str(caught.value)
