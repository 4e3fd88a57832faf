"""The plain BERT: initialisation, dropout, short outputs and masks."""

import pytest
import torch
from torch import nn

from sctd.model.bert import Bert, BertShape

SHAPE = BertShape(200, 2, 64, 4, 256, 32)


def test_initialisation() -> None:
    """N(0, 0.02) for every matrix, zero biases, LayerNorm at identity; nothing is left at torch's defaults."""
    torch.manual_seed(0)
    bert = Bert(SHAPE)
    for name, parameter in bert.named_parameters():
        if "norm" in name:
            assert bool((parameter == (1.0 if name.endswith("weight") else 0.0)).all()), name
        elif parameter.dim() == 1:
            assert bool((parameter == 0).all()), name
        else:
            sigma = 0.02 / (2 * parameter.numel()) ** 0.5
            assert abs(float(parameter.detach().std()) - 0.02) < 5 * sigma, name
            assert abs(float(parameter.detach().mean())) < 5 * 0.02 / parameter.numel() ** 0.5, name


def test_output_embeddings_are_tied() -> None:
    bert = Bert(SHAPE)
    assert [name for name, p in bert.named_parameters() if p.shape[0] == SHAPE.vocab_size] == [
        "embeddings.word.weight",
        "head.bias",
    ]


def test_a_layer_updates_its_queries_over_a_context() -> None:
    """Some queries over all keys are those rows of the whole; over a masked context, of the context without them."""
    torch.manual_seed(0)
    layer = Bert(SHAPE).layers[0].eval()
    x = torch.randn(2, 9, 64)
    whole = layer(x)
    torch.testing.assert_close(layer(x[:, [0, 4, 7]], x), whole[:, [0, 4, 7]], atol=1e-6, rtol=1e-5)
    mask = torch.arange(9).expand(2, 9) < 6
    torch.testing.assert_close(layer(x[:, :6], x, mask), layer(x[:, :6]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(layer(x, key_mask_BS=mask)[:, :6], layer(x[:, :6]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rates", [(0.5, 0.0), (0.0, 0.5)])
def test_dropout_acts_in_training_only(rates: tuple[float, float]) -> None:
    torch.manual_seed(0)
    bert = Bert(BertShape(200, 2, 64, 4, 256, 32, *rates))
    ids = torch.arange(32)[None]
    assert not torch.equal(bert(ids), bert(ids))
    bert.eval()
    assert torch.equal(bert(ids), bert(ids))


def test_dropout_sites() -> None:
    """One after the embeddings, two a layer (after attention and after the feed-forward); attention has its own."""
    bert = Bert(SHAPE)
    calls: list[str] = []
    for name, module in bert.named_modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    bert(torch.arange(8)[None])
    assert calls == ["embeddings.dropout"] + 2 * ["layers.0.dropout"] + 2 * ["layers.1.dropout"]


def test_rows_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    bert = Bert(SHAPE).eval()
    ids = torch.randint(200, (4, 32))
    torch.testing.assert_close(bert(ids)[2:3], bert(ids[2:3]), atol=1e-6, rtol=1e-5)
