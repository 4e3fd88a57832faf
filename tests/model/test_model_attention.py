"""Attention inside documents: by a dense mask, by a block mask, in every phase and layer, kept tokens or all."""

import pytest
import torch
from torch import Tensor

from sctd.config import FAMILIES, ObjectiveConfig
from sctd.model.attention import Attention, flex_mask, segment_mask
from sctd.model.bert import Bert, BertShape
from sctd.model.token_dropping import LayerPlan, TokenDropping
from sctd.objective.importance import ImportanceTable
from sctd.objective.pretraining import PretrainingModel
from sctd.objective.schedule import Phase
from sctd_kernels import rotary_table

VOCAB, LENGTH, SEP = 60, 48, 3
both = pytest.mark.parametrize("family", FAMILIES)


def test_queries_see_their_own_segment() -> None:
    mask = segment_mask(torch.tensor([[0, 2], [1, 1]]), torch.tensor([[0, 0, 2], [0, 1, 1]]))
    assert mask[:, 0].int().tolist() == [[[1, 1, 0], [0, 0, 1]], [[0, 1, 1], [0, 1, 1]]]


@torch.no_grad()  # on CPUs FlexAttention has no backward; tests/gpu has that part
@pytest.mark.parametrize(("queries", "turns"), [(200, False), (131, False), (131, True)])
def test_block_mask_equals_the_dense_one(queries: int, turns: bool) -> None:
    torch.manual_seed(0)
    attention = Attention(32, 2, 0.0, rotary_table(200, 16, 10_000.0) if turns else None)
    context = torch.randn(2, 200, 32)
    segments = (torch.rand(2, 200) < 0.05).int().cumsum(1)
    masks = segment_mask(segments[:, :queries], segments), flex_mask(segments[:, :queries], segments)
    dense, block = (attention(context[:, :queries], context, mask) for mask in masks)
    torch.testing.assert_close(block, dense, rtol=1e-4, atol=1e-4)


def make_model(document_end: int | None, family: str) -> PretrainingModel:
    torch.manual_seed(0)
    rates = {"dropout": 0.0, "attention_dropout": 0.0, "initializer_range": 0.2}
    shape = BertShape(VOCAB, 4, 32, 2, 64, LENGTH, **rates, family=family)
    table = ImportanceTable(VOCAB, (0, 1, 2, 3, 4), 0.9)
    dropping = TokenDropping(VOCAB, (1, 2, 3, 4), 0)
    cfg = ObjectiveConfig(kl_global=False, kl_local=False)
    return PretrainingModel(Bert(shape), LayerPlan(4, 1, 1), cfg, dropping, table, True, document_end)


def reach(document_end: int | None, phase: Phase, positions: list[int], family: str) -> Tensor:
    """bool (S,): the positions whose embedding the losses at `positions` depend on."""
    model = make_model(document_end, family)
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCAB, (1, LENGTH), generator=rng)
    ids[0, 0], ids[0, 15], ids[0, 31], ids[0, -1] = 2, SEP, SEP, SEP
    where = torch.tensor([positions])
    embedded: list[Tensor] = []
    model.bert.embeddings.register_forward_hook(lambda module, args, out: embedded.append(out))
    loss, _ = model(ids, where, ids.gather(1, where), torch.tensor([7]), phase=phase, keep=32)
    (grad,) = torch.autograd.grad(loss, embedded)
    return grad[0].abs().sum(-1) > 0


@both
@pytest.mark.parametrize("phase", list(Phase))
def test_losses_of_a_document_depend_on_that_document_alone(phase: Phase, family: str) -> None:
    assert torch.where(reach(SEP, phase, [17, 20, 30], family))[0].tolist() == list(range(16, 32))
    assert torch.where(reach(SEP, phase, [40], family))[0].tolist() == list(range(32, 48))
    assert bool(reach(None, phase, [40], family).all()), "without the scope a loss depends on the whole row"


@both
@pytest.mark.parametrize("phase", list(Phase))
def test_a_row_of_one_document_is_the_same_in_both_scopes(phase: Phase, family: str) -> None:
    ids = torch.randint(5, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[:, -1] = 2, SEP
    where = torch.tensor([[3, 9], [4, 40]])
    losses = [
        make_model(end, family)(ids, where, ids.gather(1, where), torch.tensor([7, 8]), phase=phase, keep=32)[0]
        for end in (None, SEP)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_windows_go_by_the_places_of_the_row() -> None:
    """A query that is asked alone, at its place, gets what it gets within the whole row; no key beyond half the window
    counts."""
    torch.manual_seed(3)
    attention = Attention(32, 4, 0.0, rotary_table(40, 8, 1e4), bias=False, window=10)
    x_BSD, place_BQ = torch.randn(2, 40, 32), torch.tensor([[0, 7, 20, 39], [1, 2, 30, 31]])
    whole_BSD = attention(x_BSD, None, None)
    some_BQD = torch.stack([row[places] for row, places in zip(x_BSD, place_BQ, strict=True)])
    expected = torch.stack([row[places] for row, places in zip(whole_BSD, place_BQ, strict=True)])
    torch.testing.assert_close(attention(some_BQD, x_BSD, None, place_BQ), expected)
    moved_BSD = x_BSD.clone()
    moved_BSD[:, 26:] += 1.0
    changed_S = (attention(moved_BSD, None, None) - whole_BSD).abs().amax((0, 2)) > 1e-6
    assert changed_S.nonzero()[0] == 21 and not changed_S[:21].any()
    # Of kept tokens that are their own context, those attend to each other that are near in the row.
    alone_BQD = attention(some_BQD, None, None, place_BQ)
    others_BQD = attention(some_BQD[:, :1], None, None, place_BQ[:, :1])
    torch.testing.assert_close(alone_BQD[0, 0], others_BQD[0, 0])  # the next one is 7 away
    assert not torch.allclose(alone_BQD[1, 0], others_BQD[1, 0])
