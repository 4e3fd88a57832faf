"""To and from transformers.BertForMaskedLM: same logits, same names, nothing else; and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM

from sctd.errors import UserError
from sctd.model.bert import Bert, BertShape
from sctd.model.convert import from_hf_config, from_hf_state, load_hf, to_hf_config, to_hf_state

SHAPES = {
    "two layers": BertShape(99, 2, 32, 2, 64, 40),
    "one head, odd layers": BertShape(61, 3, 24, 1, 40, 17, layer_norm_eps=1e-5),
    "wide": BertShape(500, 4, 96, 6, 384, 64, dropout=0.2, attention_dropout=0.3, initializer_range=0.05),
}


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> BertShape:
    return SHAPES[request.param]


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
def assert_same_logits(ours: Bert, theirs: BertForMaskedLM) -> None:
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
    theirs = randomise(BertForMaskedLM(to_hf_config(shape, pad_token_id=0)))
    ours = load_hf(theirs.config, theirs.state_dict()).eval()
    assert ours.shape == shape
    assert_same_logits(ours, theirs)


def test_to_transformers_and_back(shape: BertShape, tmp_path: Path) -> None:
    ours = randomise(Bert(shape))
    state = to_hf_state(ours.state_dict(), shape.layers)
    to_hf_config(shape, pad_token_id=3).save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, info = BertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert theirs.config.pad_token_id == 3 and theirs.dtype == torch.float32
    assert_same_logits(ours, theirs.eval())
    back = load_hf(theirs.config, theirs.state_dict())
    assert back.shape == shape
    for name, tensor in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_names_are_theirs_and_all_of_them(shape: BertShape) -> None:
    ours = Bert(shape)
    state = to_hf_state(ours.state_dict(), shape.layers)
    theirs = BertForMaskedLM(to_hf_config(shape, pad_token_id=0))
    parameters = dict(theirs.named_parameters())  # tied ones once
    assert set(state) == set(parameters)
    assert {name: t.shape for name, t in state.items()} == {name: p.shape for name, p in parameters.items()}
    assert all(tensor.is_contiguous() for tensor in state.values())
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()
    assert set(from_hf_state(theirs.state_dict(), shape.layers)) == set(ours.state_dict())


def test_gradients_equal_those_of_transformers() -> None:
    shape = SHAPES["two layers"]
    ours = randomise(Bert(shape)).double()
    theirs = BertForMaskedLM(to_hf_config(shape, 0)).double().eval()
    theirs.load_state_dict(to_hf_state(ours.state_dict(), shape.layers), strict=False)
    theirs.tie_weights()
    ids, mask = inputs(shape)
    ids = ids.clamp(min=1)  # as input, transformers gives the embedding of [PAD] no gradient; rows here hold no [PAD]
    ours(ids, mask[:, None, None]).square().sum().backward()
    theirs(input_ids=ids, attention_mask=mask.long()).logits.square().sum().backward()
    grads = {name: p.grad for name, p in ours.named_parameters()}
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for name, grad in to_hf_state(grads, shape.layers).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-8, atol=1e-8)


def test_config_carries_every_size_and_rate() -> None:
    shape = BertShape(123, 4, 36, 3, 77, 55, 0.15, 0.25, 3e-7, 0.011)
    config = to_hf_config(shape, pad_token_id=9)
    assert from_hf_config(config) == shape
    assert config.architectures == ["BertForMaskedLM"] and config.pad_token_id == 9 and config.hidden_act == "gelu"


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


@pytest.mark.parametrize("position", ["absolute", None])
def test_plain_bert_is_not_refused(position: str | None) -> None:
    extra = {} if position is None else {"position_embedding_type": position}
    assert from_hf_config(BertConfig(**extra)).layers == 12


def test_a_missing_weight_is_named() -> None:
    theirs = BertForMaskedLM(to_hf_config(SHAPES["two layers"], 0))
    for name in ("bert.encoder.layer.1.attention.self.value.bias", "cls.predictions.bias"):
        state = {key: value for key, value in theirs.state_dict().items() if key != name}
        with pytest.raises(UserError, match=name):
            load_hf(theirs.config, state)


def test_a_weight_of_another_size_is_refused() -> None:
    theirs = BertForMaskedLM(to_hf_config(SHAPES["two layers"], 0))
    config = BertConfig(**{**theirs.config.to_dict(), "vocab_size": 98})
    with pytest.raises(UserError) as caught:
        load_hf(config, theirs.state_dict())
    assert "\n" not in str(caught.value)
