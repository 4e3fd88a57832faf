"""Dynamic masking: which targets, what they show, and that a row's mask is its own whatever batch it is in."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sctd.config import load_config
from sctd.data.masking import RENEWAL, MaskedRows, Masker, Spans, mask_share, target_count
from sctd.errors import UserError
from sctd.schedule import Schedule

VOCAB, SPECIAL, MASK_ID = 200, (0, 1, 2, 3, 4), 4


def make(probability: float | Schedule[float] = 0.15, seed: int = 1, whole_word: bool = False) -> Masker:
    """Ids from 100 on are pieces that continue a word."""
    return Masker(seed, VOCAB, MASK_ID, SPECIAL, probability, np.arange(VOCAB) >= 100 if whole_word else None)


def make_rows(rows: int, length: int, seed: int = 0, special_share: float = 0.05) -> np.ndarray:
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, VOCAB, (rows, length)).astype(np.uint16)
    ids[rng.random(ids.shape) < special_share] = 1
    ids[:, 0], ids[:, -1] = 2, 3
    return ids


def assert_well_formed(masked: MaskedRows, ids: np.ndarray, count: int) -> None:
    assert {array.dtype for array in (masked.input_ids_BS, masked.positions_BM, masked.labels_BM)} == {
        np.dtype("int64")
    }
    assert masked.positions_BM.shape == masked.labels_BM.shape == (len(ids), count)
    assert (np.diff(masked.positions_BM, axis=1) > 0).all(), "positions are not ascending and distinct"
    originals = np.take_along_axis(ids.astype(np.int64), masked.positions_BM, axis=1)
    assert np.array_equal(masked.labels_BM, originals)
    assert not np.isin(masked.labels_BM, SPECIAL).any(), "a special token is a target"
    untouched = np.ones(ids.shape, dtype=bool)
    np.put_along_axis(untouched, masked.positions_BM, False, axis=1)
    assert np.array_equal(masked.input_ids_BS[untouched], ids[untouched])


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 6),
    length=st.integers(8, 90),
    probability=st.floats(0.01, 0.4),
    seed=st.integers(0, 2**31),
    whole_word=st.booleans(),
)
def test_every_row_is_well_formed(rows: int, length: int, probability: float, seed: int, whole_word: bool) -> None:
    masker, ids = make(probability, seed, whole_word), make_rows(rows, length, seed)
    count = max(1, round(probability * length))
    assert target_count(probability, length) == count
    before = ids.copy()
    assert_well_formed(masker(ids, np.arange(rows) + seed), ids, count)
    assert np.array_equal(ids, before)


@pytest.mark.parametrize(("length", "count"), [(128, 19), (512, 77), (2, 1), (8, 1)])
def test_number_of_targets(length: int, count: int) -> None:
    assert target_count(0.15, length) == count


def test_shares_of_masked_random_and_kept() -> None:
    """80 / 10 / 10 within 3 sigma over 152,000 targets; a random token may be the original one."""
    ids = make_rows(2000, 512)
    masked = make()(ids, np.arange(2000))
    shown = np.take_along_axis(masked.input_ids_BS, masked.positions_BM, axis=1)
    count = shown.size
    assert count > 150_000
    regular = VOCAB - len(SPECIAL)
    for share, found in (
        (0.8, (shown == MASK_ID).mean()),
        (0.1 + 0.1 / regular, (shown == masked.labels_BM).mean()),
        (0.1 - 0.1 / regular, ((shown != MASK_ID) & (shown != masked.labels_BM)).mean()),
    ):
        assert abs(found - share) < 3 * (share * (1 - share) / count) ** 0.5
    random = shown[(shown != MASK_ID) & (shown != masked.labels_BM)]
    assert not np.isin(random, SPECIAL).any()
    counts = np.bincount(random, minlength=VOCAB)[5:]
    assert np.abs(counts - random.size / regular).max() < 4.5 * (random.size / regular) ** 0.5, "not uniform"


def test_targets_are_uniform_over_positions() -> None:
    ids = make_rows(4000, 66, special_share=0.0)
    counts = np.bincount(make()(ids, np.arange(4000)).positions_BM.ravel(), minlength=66)
    assert counts[0] == counts[-1] == 0
    share = 10 / 64
    assert np.abs(counts[1:-1] - 4000 * share).max() < 4.5 * (4000 * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("whole_word", [False, True])
def test_a_mask_is_a_function_of_seed_and_sample(whole_word: bool) -> None:
    ids, sample = make_rows(20, 60), np.arange(20) + 10**12
    whole = make(whole_word=whole_word)(ids, sample)
    order = np.random.default_rng(1).permutation(20)
    shuffled = make(whole_word=whole_word)(ids[order], sample[order])
    for row in range(20):
        alone = make(whole_word=whole_word)(ids[row : row + 1], sample[row : row + 1])
        place = int(np.flatnonzero(order == row)[0])
        for name in ("input_ids_BS", "positions_BM", "labels_BM"):
            assert np.array_equal(getattr(alone, name)[0], getattr(whole, name)[row])
            assert np.array_equal(getattr(shuffled, name)[place], getattr(whole, name)[row])


def test_another_seed_or_sample_draws_another_mask() -> None:
    ids = np.repeat(make_rows(1, 60), 40, axis=0)
    drawn = {tuple(row) for row in make()(ids, np.arange(40)).positions_BM.tolist()}
    drawn |= {tuple(row) for row in make(seed=2)(ids, np.arange(40)).positions_BM.tolist()}
    assert len(drawn) == 80
    same = [make(seed=s)(ids, np.arange(40)) for s in (1, 2)]
    assert not np.array_equal(same[0].input_ids_BS, same[1].input_ids_BS)


def words_of(row: np.ndarray) -> list[list[int]]:
    """Positions of each word, in order: pieces follow the token that they continue, [CLS] or not."""
    words: list[list[int]] = []
    for position, token in enumerate(row.tolist()):
        if token >= 100 and words:
            words[-1].append(position)
        else:
            words.append([position])
    return [kept for word in words if (kept := [s for s in word if row[s] not in SPECIAL])]


def test_whole_words() -> None:
    """Targets are whole words but for at most one a row, which is cut so that the number is exact."""
    ids = make_rows(300, 64, special_share=0.0)
    masker = make(0.3, whole_word=True)
    masked = masker(ids, np.arange(300))
    cut_rows = 0
    for row, positions in zip(ids, masked.positions_BM.tolist(), strict=True):
        assert len(positions) == 19
        cut = [word for word in words_of(row) if 0 < len(set(word) & set(positions)) < len(word)]
        assert len(cut) <= 1
        assert all(sorted(set(word) & set(positions)) == word[: len(set(word) & set(positions))] for word in cut)
        cut_rows += bool(cut)
    assert 0 < cut_rows < 300
    plain = make(0.3)(ids, np.arange(300))
    partial = sum(0 < len(set(word) & set(positions)) < len(word)
                  for row, positions in zip(ids, plain.positions_BM.tolist(), strict=True)
                  for word in words_of(row))  # fmt: skip
    assert partial > 5 * cut_rows, "without whole_word, words are torn apart"


def test_whole_words_differ_between_samples() -> None:
    ids = np.repeat(make_rows(1, 200), 30, axis=0)
    assert len({tuple(row) for row in make(whole_word=True)(ids, np.arange(30)).positions_BM.tolist()}) == 30


@pytest.mark.parametrize("whole_word", [False, True])
def test_a_row_with_too_few_tokens_is_refused(whole_word: bool) -> None:
    ids = make_rows(3, 40, special_share=0.0)
    ids[1, 5:] = 0  # 4 maskable tokens for 6 targets
    with pytest.raises(UserError) as caught:
        make(whole_word=whole_word)(ids, np.array([70, 71, 72]))
    text = str(caught.value)
    assert "sample 71" in text and "4 maskable" in text and "6 targets" in text
    assert "data.mask_probability" in text and "data.mask_stages" in text
    assert "\n" not in text


def test_all_maskable_tokens_may_be_targets() -> None:
    ids = make_rows(2, 40, special_share=0.0)
    ids[:, 7:-1] = 0
    masked = make()(ids, np.arange(2))
    assert masked.positions_BM.tolist() == [[1, 2, 3, 4, 5, 6]] * 2


# ---- a share that changes in the course of a run

STAGES = {1: 0.3, 2: 0.3, 3: 0.2, 4: 0.2, 5: 0.1, 6: 0.1, 1000: 0.1}  # by optimizer step


def staged(whole_word: bool = False) -> Masker:
    config = load_config("demo", ["data.mask_probability=0.3", "data.mask_stages=[[3,0.2],[5,0.1]]"])
    return make(mask_share(config), whole_word=whole_word)


def same(one: MaskedRows, other: MaskedRows) -> bool:
    names = ("input_ids_BS", "positions_BM", "labels_BM")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


@pytest.mark.parametrize("whole_word", [False, True])
@pytest.mark.parametrize("length", [16, 60, 128])
def test_each_stage_masks_as_if_it_were_alone(length: int, whole_word: bool) -> None:
    """At the steps around its borders too, whatever the length of a row: a warm-up has shorter ones."""
    ids, sample, masker = make_rows(20, length), np.arange(20) + 77, staged(whole_word)
    for step, share in STAGES.items():
        masked = masker(ids, sample, step)
        assert masked.positions_BM.shape == (20, round(share * length)), step
        assert_well_formed(masked, ids, round(share * length))
        assert same(masked, make(share, whole_word=whole_word)(ids, sample)), step


def test_held_out_rows_are_masked_as_in_the_last_stage() -> None:
    ids, sample = make_rows(20, 60), np.arange(20)
    assert same(staged()(ids, sample), make(0.1)(ids, sample))
    assert same(make(0.3)(ids, sample), make(0.3)(ids, sample, 5)), "without stages there is one share"


def test_a_smaller_share_masks_some_of_the_same_positions() -> None:
    ids, sample = make_rows(20, 60), np.arange(20)
    many, few = (staged()(ids, sample, step) for step in (1, 5))
    for row in range(20):
        assert set(few.positions_BM[row].tolist()) < set(many.positions_BM[row].tolist())
        shown = few.positions_BM[row]
        assert np.array_equal(many.input_ids_BS[row, shown], few.input_ids_BS[row, shown])


def test_stages_may_rise_and_begin_at_the_last_step() -> None:
    config = load_config("demo", ["train.steps=1300", "data.mask_stages=[[2,0.3],[1300,0.5]]"])
    share = mask_share(config)
    assert [share(step) for step in (1, 2, 1299, 1300)] == [0.15, 0.3, 0.3, 0.5]


# ---- other ways to choose and to show targets

CONTINUES = np.arange(VOCAB) >= 100
SCORES = np.random.default_rng(3).uniform(0, 12, VOCAB).astype(np.float32)
WAYS = {
    "replace": {"replace": (0.5, 0.2, 0.3)},
    "spans": {"spans": 3.0},
    "importance": {"by_importance": True},
    "importance of words": {"by_importance": True, "continuation_V": CONTINUES},
    "importance of spans": {"by_importance": True, "spans": 2.0},
}
every_way = pytest.mark.parametrize("way", WAYS)


def other(way: str, probability: float | Schedule[float] = 0.15, seed: int = 1) -> Masker:
    options = dict(WAYS[way])
    if "spans" in options:
        options["spans"] = Spans(seed, options["spans"], CONTINUES)
    masker = Masker(seed, VOCAB, MASK_ID, SPECIAL, probability, **options)
    masker.draw_by(SCORES)
    return masker


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 6),
    length=st.integers(8, 90),
    probability=st.floats(0.01, 0.4),
    seed=st.integers(0, 2**31),
    way=st.sampled_from(sorted(WAYS)),
)
def test_the_number_of_targets_is_exact_in_every_way(
    rows: int, length: int, probability: float, seed: int, way: str
) -> None:
    ids = make_rows(rows, length, seed)
    masked = other(way, probability, seed)(ids, np.arange(rows) + seed, 1)
    assert_well_formed(masked, ids, max(1, round(probability * length)))


@every_way
def test_a_mask_is_a_function_of_the_sample_in_every_way(way: str) -> None:
    """And of no batch or step: a smaller share masks some of the same positions."""
    ids, sample, order = make_rows(20, 60), np.arange(20) + 10**12, np.random.default_rng(1).permutation(20)
    masker = other(way)
    whole, shuffled = masker(ids, sample, 1), masker(ids[order], sample[order], 7)
    for name in ("input_ids_BS", "positions_BM", "labels_BM"):
        assert np.array_equal(getattr(shuffled, name), getattr(whole, name)[order])
    assert not same(whole, other(way, seed=2)(ids, sample, 1)) and not same(whole, masker(ids, sample + 1, 1))
    few = other(way, 0.1)(ids, sample, 1)
    assert all(set(a) < set(b) for a, b in zip(few.positions_BM.tolist(), whole.positions_BM.tolist(), strict=True))


@every_way
def test_held_out_rows_are_masked_as_always(way: str) -> None:
    ids, sample = make_rows(20, 60), np.arange(20)
    assert same(other(way)(ids, sample), make(whole_word="words" in way)(ids, sample))
    assert not same(other(way)(ids, sample, 1), make(whole_word="words" in way)(ids, sample, 1))


def test_shares_of_masked_random_and_kept_as_asked() -> None:
    ids = make_rows(1000, 512)
    masked = other("replace")(ids, np.arange(1000), 1)
    assert np.array_equal(masked.positions_BM, make()(ids, np.arange(1000)).positions_BM)
    shown, regular = np.take_along_axis(masked.input_ids_BS, masked.positions_BM, axis=1), VOCAB - len(SPECIAL)
    assert (shown == MASK_ID).mean() == pytest.approx(0.5, abs=0.01)
    assert (shown == masked.labels_BM).mean() == pytest.approx(0.3 + 0.2 / regular, abs=0.01)


def runs_of(row: np.ndarray, positions: list[int]) -> list[list[int]]:
    """Targets that stand side by side."""
    runs: list[list[int]] = []
    for position in positions:
        if runs and runs[-1][-1] == position - 1:
            runs[-1].append(position)
        else:
            runs.append([position])
    return runs


@pytest.mark.parametrize("mean", [1.0, 1.5, 3.0, 3.8, 5.5])
def test_spans_have_the_mean_length_that_was_asked_for(mean: float) -> None:
    """In words of 2 tokens on average, 640 targets of 32,000: runs of them are spans, hardly any touch, one is cut."""
    ids = make_rows(30, 32_000, special_share=0.0)
    masker = Masker(1, VOCAB, MASK_ID, SPECIAL, 0.02, spans=Spans(1, mean, CONTINUES))
    masked = masker(ids, np.arange(30), 1)
    assert masked.positions_BM.shape == (30, 640)
    lengths, torn = [], 0
    for row, positions in zip(ids, masked.positions_BM.tolist(), strict=True):
        for run in runs_of(row, positions):
            lengths.append(sum(row[position] < 100 or position == 1 for position in run) or 1)
            torn += (row[run[0]] >= 100 and run[0] > 1) or row[run[-1] + 1] >= 100
    assert torn <= 30, "more than the last span of a row is cut"
    assert np.mean(lengths) == pytest.approx(mean, rel=0.05)


def test_lengths_of_spans_are_geometric() -> None:
    """SpanBERT's: p = 0.2, at most 10 words, 3.8 on average; a span ends at a special token, too."""
    ids = make_rows(200, 512, special_share=0.0)
    first = Spans(1, 3.797, CONTINUES)(
        ids.astype(np.int64), np.isin(ids, SPECIAL), np.arange(200, dtype=np.uint64)[:, None]
    )
    begins = (ids < 100).astype(int)
    begins[:, 1] = 1
    words = np.concatenate([np.bincount(f, b)[np.unique(f)][1:-2] for f, b in zip(first, begins, strict=True)])
    share = np.bincount(words.astype(int), minlength=11)[1:] / len(words)
    assert len(share) == 10 and len(words) > 10_000
    np.testing.assert_allclose(share, 0.2 * 0.8 ** np.arange(10) / (1 - 0.8**10), atol=0.015)
    ids[:, 1::5] = 3
    first = Spans(1, 5.5, CONTINUES)(
        ids.astype(np.int64), np.isin(ids, SPECIAL), np.arange(200, dtype=np.uint64)[:, None]
    )
    assert (first[:, 2::5] == np.arange(2, 512, 5)).all() and (first[:, 1::5] == np.arange(1, 512, 5)).all()


def test_tokens_of_a_span_show_the_same() -> None:
    """As in SpanBERT: all are [MASK], or none is. Whole words are shown token by token."""
    ids = make_rows(200, 1000, special_share=0.0)
    for spans, share in ((Spans(1, 3.0, CONTINUES), 0.02), (None, 0.02)):
        masker = Masker(1, VOCAB, MASK_ID, SPECIAL, share, None if spans else CONTINUES, (0.5, 0.0, 0.5), spans)
        masked = masker(ids, np.arange(200), 1)
        runs = [
            shown[run] == MASK_ID
            for row, shown, positions in zip(ids, masked.input_ids_BS, masked.positions_BM.tolist(), strict=True)
            for run in runs_of(row, positions)
            if len(run) > 1
        ]
        mixed = np.mean([0 < run.sum() < len(run) for run in runs])
        assert mixed < 0.05 if spans else mixed > 0.4


def test_the_first_target_is_drawn_in_proportion_to_its_score() -> None:
    """One target of six tokens, then of three words of two, one and three pieces."""
    scores = np.zeros(VOCAB, dtype=np.float32)
    scores[[10, 11, 12, 110, 111, 112]] = [1, 2, 3, 5, 4, 6]
    rows = 40_000
    ids = np.repeat(np.array([[2, 10, 110, 11, 12, 111, 112, 3]]), rows, axis=0)
    for continuation_V, expected in (
        (None, {1: 1, 2: 5, 3: 2, 4: 3, 5: 4, 6: 6}),
        (CONTINUES, {1: (1 + 5) / 2, 3: 2, 4: (3 + 4 + 6) / 3}),
    ):
        masker = Masker(1, VOCAB, MASK_ID, SPECIAL, 0.125, continuation_V, by_importance=True)
        masker.draw_by(scores)
        found = np.bincount(masker(ids, np.arange(rows), 1).positions_BM.ravel(), minlength=8) / rows
        for position, weight in expected.items():
            assert found[position] == pytest.approx(weight / sum(expected.values()), abs=0.01)
        assert found.sum() == pytest.approx(sum(found[list(expected)]))


@pytest.mark.parametrize("words", [False, True])
def test_equal_scores_mask_as_no_scores(words: bool) -> None:
    """At the start of a run, and where all scores are 0; a score of 0 among others is masked last of all."""
    ids, sample = make_rows(50, 60), np.arange(50)
    way, plain = "importance of words" if words else "importance", make(whole_word=words)(ids, sample, 1)
    for score in (10.0, 0.0):
        masker = other(way)
        masker.draw_by(np.full(VOCAB, score, dtype=np.float32))
        assert same(masker(ids, sample, 1), plain)
    scores = np.ones(VOCAB, dtype=np.float32)
    scores[50:100] = 0
    masker = other("importance", 0.4)
    masker.draw_by(scores)
    masked = masker(ids, sample, 1)
    assert_well_formed(masked, ids, 24)
    others = (np.isin(ids, SPECIAL) | ((ids >= 50) & (ids < 100))).sum(1)
    assert np.array_equal(
        ((masked.labels_BM >= 50) & (masked.labels_BM < 100)).sum(1), np.maximum(24 - (60 - others), 0)
    )


def test_scores_are_awaited_at_the_start_and_every_renewal() -> None:
    awaited = [step for step in range(1, 3 * RENEWAL) if other("importance").awaits(step)]
    assert awaited == [1, RENEWAL + 1, 2 * RENEWAL + 1]
    assert not any(make().awaits(step) for step in range(1, 3 * RENEWAL))
