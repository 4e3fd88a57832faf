"""The encoder of both families: initialisation, dropout, places, short outputs and masks."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sctd.config import FAMILIES
from sctd.model import bert as bert_module
from sctd.model import modernbert as modern_module
from sctd.model.bert import Bert, BertShape
from sctd_kernels import gather_rows, rotary_table

SHAPES = {family: BertShape(200, 2, 64, 4, 256, 32, family=family) for family in FAMILIES}
both = pytest.mark.parametrize("family", FAMILIES)


@both
def test_initialisation(family: str) -> None:
    """N(0, 0.02) for every matrix, zero biases, LayerNorm at identity; nothing is left at torch's defaults.

    What a layer of a modernbert adds begins smaller by sqrt(2 L), here 2.
    """
    torch.manual_seed(0)
    bert, smaller = Bert(SHAPES[family]), []
    for name, parameter in bert.named_parameters():
        if "norm" in name:
            assert bool((parameter == (1.0 if name.endswith("weight") else 0.0)).all()), name
        elif parameter.dim() == 1:
            assert bool((parameter == 0).all()), name
        else:
            is_residual = name.endswith(("attention.out.weight", "contract.weight"))
            smaller += [name] if is_residual else []
            wanted = 0.01 if family == "modernbert" and is_residual else 0.02
            sigma = wanted / (2 * parameter.numel()) ** 0.5
            assert abs(float(parameter.detach().std()) - wanted) < 5 * sigma, name
            assert abs(float(parameter.detach().mean())) < 5 * wanted / parameter.numel() ** 0.5, name
    assert len(smaller) == 4


def test_residual_outputs_shrink_with_the_root_of_the_depth() -> None:
    for layers in (2, 8):
        torch.manual_seed(0)
        bert = Bert(replace(SHAPES["modernbert"], layers=layers, initializer_range=0.1))
        for layer in bert.layers:
            for matrix in (layer.attention.out.weight, layer.contract.weight):
                assert float(matrix.detach().std()) == pytest.approx(0.1 / math.sqrt(2 * layers), rel=0.05)


def test_a_modernbert_has_no_bias_but_that_of_the_output() -> None:
    bert = Bert(SHAPES["modernbert"])
    assert [name for name, _ in bert.named_parameters() if name.endswith("bias")] == ["head.bias"]
    assert isinstance(bert.layers[0].attention_norm, nn.Identity), "the embeddings' norm stands before it"
    assert isinstance(bert.layers[1].attention_norm, nn.LayerNorm) and isinstance(bert.norm, nn.LayerNorm)


@both
def test_output_embeddings_are_tied(family: str) -> None:
    bert = Bert(SHAPES[family])
    vocabulary = SHAPES[family].vocab_size
    assert [name for name, p in bert.named_parameters() if p.shape[0] == vocabulary] == [
        "embeddings.word.weight",
        "head.bias",
    ]
    ids = torch.arange(8)[None]
    before = bert.eval()(ids)
    with torch.no_grad():
        bert.embeddings.word.weight[100] += 1.0  # an id that is not in the row: only its logit moves
    assert torch.where((bert(ids) != before).any(1)[0])[0].tolist() == [100]


@pytest.mark.parametrize("width", [48, 15])
def test_sinusoidal_positions(width: int) -> None:
    """Each row is the known function, at the deviation of the other matrices, and nothing else begins otherwise."""
    shape = BertShape(50, 2, width, 1, 64, 200)
    models = []
    for positions in ("learned", "sinusoidal"):
        torch.manual_seed(0)
        models.append(Bert(replace(shape, positions=positions)))
    learned, sinusoidal = (dict(model.named_parameters()) for model in models)
    name = "embeddings.position.weight"
    assert all(torch.equal(learned[other], sinusoidal[other]) for other in learned if other != name)
    table = sinusoidal[name]
    assert table.requires_grad and table.shape == (200, width)
    for place in (0, 1, 17, 199):
        angles = [place / 10_000 ** ((column - column % 2) / width) for column in range(width)]
        waves = [math.cos(angle) if column % 2 else math.sin(angle) for column, angle in enumerate(angles)]
        expected = torch.tensor(waves) * 0.02 * math.sqrt(2)
        torch.testing.assert_close(table[place].detach(), expected, rtol=1e-5, atol=1e-8)
    assert float(table.detach().square().mean().sqrt()) == pytest.approx(0.02, rel=1e-5 if width % 2 == 0 else 0.05)
    distances = torch.cdist(table.detach(), table.detach()) + torch.eye(200)
    assert float(distances.min()) > 1e-3, "two rows are the same"


@both
def test_a_layer_updates_its_queries_over_a_context(family: str) -> None:
    """Some queries over all keys are those rows of the whole; over a masked context, of the context without them."""
    torch.manual_seed(0)
    layer = Bert(replace(SHAPES[family], initializer_range=0.2)).layers[1].eval()
    x = torch.randn(2, 9, 64)
    whole = layer(x)
    place = torch.tensor([[0, 4, 7], [2, 3, 8]])
    some = layer(gather_rows(x, place), x, None, None, place)
    torch.testing.assert_close(some, gather_rows(whole, place), atol=1e-5, rtol=1e-5)
    unplaced = layer(gather_rows(x, place), x)
    assert (family == "bert") == torch.allclose(unplaced, some, atol=1e-4)
    mask = (torch.arange(9) < 6).view(1, 1, 1, 9)
    torch.testing.assert_close(layer(x[:, :6], x, mask), layer(x[:, :6]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer(x, mask=mask)[:, :6], layer(x[:, :6]), atol=1e-5, rtol=1e-5)


@both
def test_tokens_alone_are_a_row_in_which_the_others_are_hidden(family: str) -> None:
    """What the dropped layers do: kept tokens are their own context, and stand where they stood."""
    torch.manual_seed(0)
    layer = Bert(replace(SHAPES[family], initializer_range=0.2)).layers[1].eval()
    x, place = torch.randn(2, 9, 64), torch.tensor([[0, 4, 7], [2, 3, 8]])
    alone = layer(gather_rows(x, place), None, None, None, place)
    is_kept_BS = torch.zeros(2, 9, dtype=torch.bool).scatter(1, place, True)
    whole = layer(x, mask=is_kept_BS[:, None, None])
    torch.testing.assert_close(alone, gather_rows(whole, place), atol=1e-5, rtol=1e-5)


def test_rotary_positions_are_relative() -> None:
    """A row and the same row further on are the same, and a row in another order is not: places are all it has."""
    torch.manual_seed(0)
    layer = Bert(replace(SHAPES["modernbert"], initializer_range=0.2)).layers[1].eval()
    x, place = torch.randn(1, 6, 64), torch.arange(6)[None]
    torch.testing.assert_close(layer(x, place_BQ=place + 20), layer(x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(layer(x, place_BQ=place.flip(1)), layer(x), atol=1e-3)


def test_casts_do_not_touch_the_rotary_table() -> None:
    """In bfloat16 places from 256 on would fall together. The table is float32, in no state and the layers' alone."""
    shape = replace(SHAPES["modernbert"], max_positions=600)
    bert = Bert(shape)
    expected = rotary_table(600, 16, 160_000.0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        tables = [layer.attention.rotary.table_2Sh for layer in bert.to(dtype).layers]
        assert bert.norm.weight.dtype == dtype and all(table is tables[0] for table in tables)
        assert tables[0].dtype == torch.float32 and torch.equal(tables[0], expected)
    assert not [name for name in bert.state_dict() if "rotary" in name or "table" in name]
    assert len(list(bert.buffers())) == 0
    low = bert.bfloat16().layers[0].attention
    assert low.rotary(torch.ones(1, 600, 4, 16, dtype=torch.bfloat16), None).dtype == torch.bfloat16


@both
def test_dropout_acts_in_training_only_and_is_a_function_of_the_row_seeds(family: str) -> None:
    torch.manual_seed(0)
    bert = Bert(replace(SHAPES[family], dropout=0.5, attention_dropout=0.0))
    ids, seeds = torch.arange(32).expand(2, 32), torch.tensor([5, 6])
    first = bert(ids, row_seed_B=seeds)
    assert torch.equal(bert(ids, row_seed_B=seeds), first)
    assert not torch.equal(first[0], first[1]) and not torch.equal(bert(ids, row_seed_B=seeds + 2)[0], first[0])
    torch.testing.assert_close(bert(ids[:1], row_seed_B=seeds[1:])[0], first[1], atol=1e-6, rtol=1e-5)
    bert.eval()
    assert torch.equal(bert(ids, row_seed_B=seeds), bert(ids))


@both
def test_attention_dropout_acts_in_training_only(family: str) -> None:
    torch.manual_seed(0)
    bert = Bert(replace(SHAPES[family], dropout=0.0, attention_dropout=0.5))
    ids = torch.arange(32)[None]
    assert not torch.equal(bert(ids), bert(ids))
    bert.eval()
    assert torch.equal(bert(ids), bert(ids))


@both
def test_dropout_sites(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the embeddings, two a layer (after attention and after the feed-forward), each a site of its own."""
    calls: list[tuple[float, int]] = []
    real, real_norm = bert_module.dropout, bert_module.dropout_add_norm

    def dropout(x: Tensor, rate: float, seed: Tensor | None, site: int) -> Tensor:
        assert seed is not None
        calls.append((rate, site))
        return real(x, rate, seed, site)

    for module in (bert_module, modern_module):
        monkeypatch.setattr(module, "dropout", dropout)
    monkeypatch.setattr(bert_module, "dropout_add_norm", lambda *args: calls.append(args[5::2]) or real_norm(*args))
    Bert(SHAPES[family])(torch.arange(8)[None], row_seed_B=torch.zeros(1, dtype=torch.int64))
    assert calls == [(0.1, site) for site in range(5)]


@both
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_recomputed_activations_change_no_bit(rate: float, family: str) -> None:
    torch.manual_seed(0)
    bert = Bert(replace(SHAPES[family], dropout=0.2, attention_dropout=rate))
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


@both
def test_rows_do_not_see_each_other(family: str) -> None:
    torch.manual_seed(0)
    bert = Bert(SHAPES[family]).eval()
    ids = torch.randint(200, (4, 32))
    torch.testing.assert_close(bert(ids)[2:3], bert(ids[2:3]), atol=1e-6, rtol=1e-5)
