"""Token dropping as a layer stack: how many, which, in which layers. Fake layers count who passed through them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sctd.config import ModelConfig
from sctd.errors import UserError
from sctd.model.token_dropping import TokenDropping, kept_tokens
from sctd.objective.arms import ARMS

PAD, UNK, CLS, SEP, MASK = range(5)
ALWAYS = (CLS, SEP, MASK, UNK)
VOCAB = 100


class Counting(nn.Module):
    """Adds 2**number: after the stack, the binary digits of a position tell which layers updated it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.seen: list[tuple[Any, Any, Any]] = []

    def forward(
        self, x: Tensor, context: Tensor | None, mask: Tensor | None, row_seed: Tensor | None, place: Tensor | None
    ) -> Tensor:
        assert row_seed is not None, "no seeds for its dropout"
        assert place is not None and place.shape == x.shape[:2], "no places of its tokens"
        self.seen.append((x, context, mask))
        return x + 2.0**self.number


def stack(count: int) -> nn.ModuleList:
    return nn.ModuleList(Counting(number) for number in range(count))


def passes(dropping: TokenDropping, layers: nn.ModuleList, ids: Tensor, keep: int, seed: int = 0) -> Tensor:
    """Bit sets (B, S) of the layers that updated each position."""
    hidden = torch.zeros(*ids.shape, 2)
    out = dropping(layers, hidden, ids, None, torch.arange(len(ids)) + (seed << 32), keep)
    assert out.shape == hidden.shape and torch.equal(out[..., 0], out[..., 1])
    return out[..., 0].long()


# ---- K and the layer plan


@pytest.mark.parametrize(
    ("ratio", "length", "kept"),
    [
        (0.5, 512, 256),
        (0.5, 128, 64),
        (0.25, 512, 128),
        (0.3, 512, 160),  # 153.6, nearest multiple of 16
        (0.7, 128, 96),  # 89.6
        (0.52, 128, 64),  # 66.6
        (0.01, 512, 16),  # at least one multiple
        (0.99, 24, 16),
        (0.99, 31, 31),  # at most S
        (0.5, 8, 8),
        (1.0, 100, 100),  # all, whatever the multiple
        (1.0, 512, 512),
        (1, 7, 7),
    ],
)
def test_kept_tokens(ratio: float, length: int, kept: int) -> None:
    assert kept_tokens(ratio, length) == kept


def test_kept_tokens_is_the_nearest_multiple_of_16() -> None:
    for length in range(1, 600):
        for ratio in (0.1, 0.25, 0.5, 0.66, 0.9, 0.999):
            kept = kept_tokens(ratio, length)
            assert kept == length if length <= 16 else 16 <= kept <= length
            if kept not in (16, length):
                assert kept % 16 == 0 and abs(kept - ratio * length) <= 8


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.0001, 2.0, float("nan")])
def test_kept_tokens_refuses_other_ratios(ratio: float) -> None:
    with pytest.raises(UserError, match="keep_ratio"):
        kept_tokens(ratio, 128)


@pytest.mark.parametrize(
    ("arm", "model", "first", "tail"),
    [
        ("token_drop", ModelConfig(layers=12), 5, 1),
        ("sctd", ModelConfig(layers=24), 11, 1),
        ("baseline", ModelConfig(layers=12), 5, 1),
        ("random_drop", ModelConfig(layers=4), 1, 1),
        ("random_ltd", ModelConfig(layers=12), 1, 1),
        ("token_drop", ModelConfig(layers=2), 0, 1),
        ("random_ltd", ModelConfig(layers=2), 0, 1),
        ("sctd", ModelConfig(layers=12, first_dropped=3, full_tail=4), 3, 4),
        ("random_ltd", ModelConfig(layers=12, first_dropped=3), 3, 1),
        ("token_drop", ModelConfig(layers=12, full_tail=11), 0, 11),
    ],
)
def test_layer_plan(arm: str, model: ModelConfig, first: int, tail: int) -> None:
    plan = ARMS[arm].layer_plan(model)
    numbers = list(range(model.layers))
    assert numbers[: plan.first_dropped] == numbers[:first]
    assert numbers[plan.middle] == numbers[first : model.layers - tail] != []
    assert numbers[plan.tail] == numbers[model.layers - tail :]


# ---- one selection for all layers


def test_kept_rows_pass_all_layers_and_dropped_rows_none() -> None:
    layers = stack(4)
    ids = torch.randint(5, 100, (6, 20))
    marks = passes(TokenDropping(VOCAB, ALWAYS, PAD), layers, ids, keep=9)
    assert set(marks.unique().tolist()) == {0, 0b1111}
    assert (marks == 0b1111).sum(1).tolist() == [9] * 6


def test_only_the_first_layer_has_the_dropped_tokens_as_keys() -> None:
    layers = stack(3)
    ids = torch.randint(5, 100, (2, 20))
    passes(TokenDropping(VOCAB, ALWAYS, PAD), layers, ids, keep=7)
    shapes = [
        (x.shape[1], None if context is None else context.shape[1]) for ((x, context, _),) in (m.seen for m in layers)
    ]
    assert shapes == [(7, 20), (7, None), (7, None)]


def test_tokens_attend_within_their_segment() -> None:
    layers = stack(3)
    ids = torch.arange(10, 20).expand(2, 10)
    scores = torch.arange(float(VOCAB))
    segments = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 0, 0, 3, 3]], dtype=torch.int32)
    dropping = TokenDropping(VOCAB, ALWAYS, PAD)
    dropping(layers, torch.zeros(2, 10, 2), ids, scores, torch.arange(2), 4, segments_BS=segments)
    first, *others = (module.seen[0][2] for module in layers)
    kept = segments[:, 6:]
    assert torch.equal(first[:, 0], kept[:, :, None] == segments[:, None, :])
    assert all(torch.equal(mask[:, 0], kept[:, :, None] == kept[:, None, :]) for mask in others)


def test_specials_stay_and_pad_goes_first() -> None:
    ids = torch.tensor([[CLS, 9, 9, UNK, 9, MASK, 9, 9, SEP, PAD, PAD, 9]]).expand(50, 12)
    scores = torch.zeros(VOCAB)
    scores[PAD], scores[list(ALWAYS)] = 1e9, -1e9
    hidden = torch.zeros(50, 12, 1)
    for keep in (4, 5, 10, 11):
        marks = TokenDropping(VOCAB, ALWAYS, PAD)(stack(1), hidden, ids, scores, torch.arange(50), keep)[..., 0].bool()
        assert bool(marks[:, [0, 3, 5, 8]].all()), "a special was dropped"
        assert int(marks[:, [9, 10]].sum()) == 50 * max(0, keep - 10)


def test_scores_choose_among_the_others() -> None:
    ids = torch.arange(50, 58)[None]
    scores = torch.zeros(VOCAB)
    scores[50:58] = torch.tensor([3.0, 1, 4, 1, 5, 9, 2, 6])
    marks = TokenDropping(VOCAB, ALWAYS, PAD)(stack(1), torch.zeros(1, 8, 1), ids, scores, torch.zeros(1).long(), 4)
    assert marks[0, :, 0].tolist() == [0, 0, 1, 0, 1, 1, 0, 1]


class Placed(nn.Module):
    """Its tokens hold where they stand, and it is told the same."""

    def forward(self, x: Tensor, context: Tensor | None, mask: object, row_seed: object, place: Tensor) -> Tensor:
        assert torch.equal(x[..., 0].long(), place) and place.dtype == torch.int64
        assert context is None or torch.equal(context[..., 0], torch.arange(20.0).expand(6, 20))
        return x


@pytest.mark.parametrize("per_layer", [False, True])
def test_layers_are_told_where_their_tokens_stand(per_layer: bool) -> None:
    layers = nn.ModuleList(Placed() for _ in range(4))
    ids, hidden = torch.randint(5, 100, (6, 20)), torch.arange(20.0).expand(6, 20)[..., None]
    dropping = TokenDropping(VOCAB, ALWAYS, PAD, per_layer)
    assert torch.equal(dropping(layers, hidden, ids, None, torch.arange(6), 9), hidden)


# ---- random-LTD


def test_random_ltd_draws_a_subset_for_each_layer() -> None:
    layers = stack(5)
    ids = torch.randint(5, 100, (8, 40))
    marks = passes(TokenDropping(VOCAB, ALWAYS, PAD, per_layer=True), layers, ids, keep=16)
    subsets = [(marks >> number) & 1 for number in range(5)]
    assert all(subset.sum(1).tolist() == [16] * 8 for subset in subsets)
    distinct = {tuple(row) for subset in subsets for row in subset.tolist()}
    assert len(distinct) == 40, "two layers or two rows share a subset"
    for module in layers:
        ((x, context, _),) = module.seen
        assert x.shape == (8, 16, 2) and context is None, "attention is among the kept tokens alone"


def test_random_ltd_subsets_are_uniform_and_specials_are_not_special() -> None:
    ids = torch.full((400, 32), 9)
    ids[:, 0], ids[:, 31], ids[:, 5] = CLS, SEP, MASK
    marks = passes(TokenDropping(VOCAB, ALWAYS, PAD, per_layer=True), stack(2), ids, keep=16)
    for number in range(2):
        counts = ((marks >> number) & 1).sum(0)
        assert counts.min() > 200 - 4.5 * 10 and counts.max() < 200 + 4.5 * 10


def test_random_ltd_subsets_change_with_the_seed_and_not_with_the_batch() -> None:
    dropping = TokenDropping(VOCAB, ALWAYS, PAD, per_layer=True)
    ids = torch.full((3, 32), 9)
    first, again, other = (passes(dropping, stack(3), ids, 16, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not bool((first == other).all(1).any())
    assert torch.equal(passes(dropping, stack(3), ids[:1], 16, 1), first[:1])


def test_random_ltd_drops_pad_first() -> None:
    ids = torch.full((20, 16), 9)
    ids[:, 10:] = PAD
    marks = passes(TokenDropping(VOCAB, ALWAYS, PAD, per_layer=True), stack(3), ids, keep=10)
    assert bool((marks[:, :10] == 0b111).all()) and bool((marks[:, 10:] == 0).all())


def test_it_holds_no_parameters() -> None:
    assert not isinstance(TokenDropping(VOCAB, ALWAYS, PAD), nn.Module)
