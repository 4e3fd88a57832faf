"""The plain BERT: initialisation, dropout, short outputs and masks."""

import pytest
import torch

from sctd.model import bert as model
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
    mask = (torch.arange(9) < 6).view(1, 1, 1, 9)
    torch.testing.assert_close(layer(x[:, :6], x, mask), layer(x[:, :6]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(layer(x, mask=mask)[:, :6], layer(x[:, :6]), atol=1e-6, rtol=1e-5)


def test_dropout_acts_in_training_only_and_is_a_function_of_the_row_seeds() -> None:
    torch.manual_seed(0)
    bert = Bert(BertShape(200, 2, 64, 4, 256, 32, 0.5, 0.0))
    ids, seeds = torch.arange(32).expand(2, 32), torch.tensor([5, 6])
    first = bert(ids, row_seed_B=seeds)
    assert torch.equal(bert(ids, row_seed_B=seeds), first)
    assert not torch.equal(first[0], first[1]) and not torch.equal(bert(ids, row_seed_B=seeds + 2)[0], first[0])
    torch.testing.assert_close(bert(ids[:1], row_seed_B=seeds[1:])[0], first[1], atol=1e-6, rtol=1e-5)
    bert.eval()
    assert torch.equal(bert(ids, row_seed_B=seeds), bert(ids))


def test_attention_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    bert = Bert(BertShape(200, 2, 64, 4, 256, 32, 0.0, 0.5))
    ids = torch.arange(32)[None]
    assert not torch.equal(bert(ids), bert(ids))
    bert.eval()
    assert torch.equal(bert(ids), bert(ids))


def test_dropout_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the embeddings, two a layer (after attention and after the feed-forward), each a site of its own."""
    calls: list[tuple[float, int]] = []
    real, real_norm = model.dropout, model.dropout_add_norm
    monkeypatch.setattr(
        model, "dropout", lambda x, rate, seed, site: calls.append((rate, site)) or real(x, rate, seed, site)
    )
    monkeypatch.setattr(model, "dropout_add_norm", lambda *args: calls.append(args[5::2]) or real_norm(*args))
    Bert(SHAPE)(torch.arange(8)[None], row_seed_B=torch.zeros(1, dtype=torch.int64))
    assert calls == [(0.1, site) for site in range(5)]


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_recomputed_activations_change_no_bit(rate: float) -> None:
    torch.manual_seed(0)
    bert = Bert(BertShape(200, 2, 64, 4, 256, 32, 0.2, rate))
    ids, seeds = torch.arange(64).view(2, 32), torch.arange(2)
    grads = []
    for recompute in (False, True):
        for layer in bert.layers:
            layer.recompute = recompute
        bert.zero_grad()
        torch.manual_seed(1)
        bert(ids, row_seed_B=seeds).square().mean().backward()
        grads.append([parameter.grad.clone() for parameter in bert.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_rows_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    bert = Bert(SHAPE).eval()
    ids = torch.randint(200, (4, 32))
    torch.testing.assert_close(bert(ids)[2:3], bert(ids[2:3]), atol=1e-6, rtol=1e-5)
