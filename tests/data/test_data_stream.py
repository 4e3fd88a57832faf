"""Batches of a small corpus: for any number of ranks the same samples, for any cursor the same continuation."""

import contextlib
import itertools
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sctd.config import Config, DataConfig
from sctd.corpus.manifest import Manifest, load_corpus_tokenizer
from sctd.corpus.prepare.prepare import prepare
from sctd.corpus.prepare.settings import CorpusSettings
from sctd.data import stream as stream_module
from sctd.data.masking import Masker, build_masker, target_count
from sctd.data.order import row_of_sample
from sctd.data.stream import Batch, Rows, Share, TrainStream, make_batch, valid_batches
from sctd.errors import RunError, UserError
from texts import documents, write

SEED, LENGTH = 3, 32
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "sigma"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("stream")
    rng = np.random.default_rng(0)
    documents = [f"Document {i}: " + " ".join(rng.choice(WORDS, 40)) for i in range(120)]
    (folder / "text.txt").write_text("\n\n".join(documents) + "\n")
    out = folder / "corpus"
    wanted = CorpusSettings((str(folder / "text.txt"),), (LENGTH,), vocab_size=320, valid_fraction=0.25)
    manifest = prepare(wanted, out, log=lambda line: None)
    return out, manifest


@pytest.fixture(scope="module")
def rows(corpus: tuple[Path, Manifest]) -> Rows:
    return Rows(*corpus, "train", LENGTH)


@pytest.fixture(scope="module")
def valid(corpus: tuple[Path, Manifest]) -> Rows:
    return Rows(*corpus, "valid", LENGTH)


@pytest.fixture(scope="module")
def masker(corpus: tuple[Path, Manifest]) -> Masker:
    special = corpus[1].special_ids
    return Masker(SEED, corpus[1].vocab_size, special.mask, special.all, 0.15)


def keys(batches: list[Batch]) -> list[tuple]:
    """The rows of some batches, each as one comparable value."""
    return [
        tuple(tuple(np.atleast_1d(batch[name][row].numpy()).tolist()) for name in sorted(batch))
        for batch in batches
        for row in range(len(batch["row_seed"]))
    ]


# ---- rows


def test_rows_are_those_of_the_files(corpus: tuple[Path, Manifest], rows: Rows) -> None:
    folder, manifest = corpus
    expected = np.concatenate([np.load(folder / shard.file) for shard in manifest.split(LENGTH, "train").shards])
    assert len(rows) == len(expected) == manifest.split(LENGTH, "train").rows > 30
    assert np.array_equal(rows[np.arange(len(rows))], expected)
    found = rows[np.array([5, 0, 5])]
    assert found.dtype == np.int64 and np.array_equal(found, expected[[5, 0, 5]])


def test_rows_of_several_shards(corpus: tuple[Path, Manifest], rows: Rows, tmp_path: Path) -> None:
    manifest = corpus[1]
    everything = rows[np.arange(len(rows))]
    edges = [0, 1, 8, 20, len(rows)]
    shards = []
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        np.save(tmp_path / f"{number}.npy", everything[start:end].astype(np.uint16))
        shards.append(replace(manifest.split(LENGTH, "train").shards[0], file=f"{number}.npy", rows=end - start))
    split = replace(manifest.split(LENGTH, "train"), shards=tuple(shards))
    found = Rows(tmp_path, replace(manifest, splits={LENGTH: {"train": split}}), "train", LENGTH)
    assert len(found) == len(rows)
    order = np.random.default_rng(0).permutation(len(rows))
    assert np.array_equal(found[order], everything[order])


@pytest.mark.parametrize("change", ["rows", "length", "flat"])
def test_a_shard_of_another_shape_is_refused(corpus: tuple[Path, Manifest], tmp_path: Path, change: str) -> None:
    folder, manifest = corpus
    shard = manifest.split(LENGTH, "train").shards[0]
    array = np.load(folder / shard.file)
    array = {"rows": array[:-1], "length": array[:, :-1], "flat": array.ravel()}[change]
    np.save(tmp_path / shard.file, array)
    with pytest.raises(UserError) as caught:
        Rows(tmp_path, manifest, "train", LENGTH)[np.arange(1)]
    text = str(caught.value)
    assert shard.file in text and str(array.shape) in text and f"({shard.rows}, {LENGTH})" in text and "\n" not in text


def test_few_files_stay_open(
    rows: Rows, corpus: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And rows come from the right one, in whatever order they are asked for."""
    monkeypatch.setattr(stream_module, "_OPEN_SHARDS", 3)
    manifest, everything = corpus[1], rows[np.arange(len(rows))]
    shards = []
    for number, row in enumerate(everything):
        np.save(tmp_path / f"{number}.npy", row[None].astype(np.uint16))
        shards.append(replace(manifest.split(LENGTH, "train").shards[0], file=f"{number}.npy", rows=1))
    split = replace(manifest.split(LENGTH, "train"), shards=tuple(shards))
    found = Rows(tmp_path, replace(manifest, splits={LENGTH: {"train": split}}), "train", LENGTH)
    assert found._open == {}, "a file was touched before a row was asked for"
    for seed in range(5):
        order = np.random.default_rng(seed).integers(0, len(rows), 20)
        assert np.array_equal(found[order], everything[order])
        assert len(found._open) <= 3
    (tmp_path / "0.npy").write_bytes((tmp_path / "0.npy").read_bytes()[:-2])
    found._open.clear()
    with pytest.raises(OSError, match="0.npy has become shorter"):
        found[np.array([0])]


# ---- sources by weight, and rows of two lengths


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """Three sources of different sizes, the smallest with half of the samples; rows of two lengths."""
    folder = tmp_path_factory.mktemp("mixed")
    names = [write(folder / f"{n}.jsonl", documents(count, seed=n)) for n, count in enumerate((150, 60, 30))]
    wanted = CorpusSettings(
        tuple(f"s{n}={name}" for n, name in enumerate(names)), (16, LENGTH), vocab_size=320, valid_fraction=0.25,
        weights=("s2=0.5",),
    )  # fmt: skip
    return folder / "corpus", prepare(wanted, folder / "corpus", log=lambda line: None)


def source_of(rows: Rows, row: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum(rows.of_source), row, side="right")


def test_weights_decide_how_often_a_source_comes(mixed: tuple[Path, Manifest], masker: Masker) -> None:
    rows = Rows(*mixed, "train", 16)
    assert len(rows.of_source) == 3 and min(rows.of_source) > 0
    stream = TrainStream(rows, masker, SEED, Share(0, 1, 400, 1))
    for cursor in (0, 777, 10**9):
        count = np.bincount(source_of(rows, stream.sample_rows(cursor)), minlength=3)
        rest = 200 * rows.of_source[0] / (rows.of_source[0] + rows.of_source[1])
        assert count[2] in (199, 200, 201) and abs(count[0] - rest) <= 2
    size = rows.of_source[2]
    mine = [row for row in stream.sample_rows(0) if row >= len(rows) - size][:size]
    assert len(set(mine)) == min(size, len(mine)), "a row came twice before all had come"


def test_the_first_steps_train_on_shorter_rows(mixed: tuple[Path, Manifest]) -> None:
    masker = build_masker(Config(), mixed[1], load_corpus_tokenizer(*mixed))
    short, long = Rows(*mixed, "train", 16), Rows(*mixed, "train", LENGTH)
    stream = TrainStream(long, masker, SEED, Share(0, 1, 4, 2), warmup=(short, 3))
    plain = {16: TrainStream(short, masker, SEED, Share(0, 1, 4, 2)),
             LENGTH: TrainStream(long, masker, SEED, Share(0, 1, 4, 2))}  # fmt: skip
    for start in (1, 3, 4):
        steps = itertools.islice(stream.iterate(8 * (start - 1), start), 4)
        for number, batches in enumerate(steps, start):
            length = 16 if number <= 3 else LENGTH
            assert stream.length(number) == length == batches[0]["input_ids"].shape[1]
            assert keys(batches) == keys(plain[length].step(8 * (number - 1)))
            assert stream.sample_rows(8 * (number - 1), number).tolist() == plain[length].sample_rows(
                8 * (number - 1)
            ).tolist()  # fmt: skip


# ---- training


def test_batches_are_the_models_arguments(rows: Rows, masker: Masker) -> None:
    (batch,) = TrainStream(rows, masker, SEED, Share(0, 1, 4, 1)).step(0)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": (4, LENGTH),
        "positions": (4, 5),
        "labels": (4, 5),
        "row_seed": (4,),
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_step_holds_the_samples_that_follow_the_cursor(rows: Rows, masker: Masker) -> None:
    for cursor in (0, 8, 13, 10**9, 10**15):
        share = Share(0, 1, 8, 1)
        (batch,) = TrainStream(rows, masker, SEED, share).step(cursor)
        sample = np.arange(cursor, cursor + 8)
        row = row_of_sample(SEED, sample, len(rows))
        assert np.array_equal(TrainStream(rows, masker, SEED, share).sample_rows(cursor), row)
        restored = batch["input_ids"].scatter(1, batch["positions"], batch["labels"])
        assert np.array_equal(restored.numpy(), rows[row])
        assert np.array_equal(batch["input_ids"].numpy(), masker(rows[row], sample).input_ids_BS)
        assert len(set(batch["row_seed"].tolist())) == 8


SPLITS = [(1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4), (4, 1, 2), (1, 1, 8), (8, 1, 1)]


@pytest.mark.parametrize("cursor", [0, 40, 10**12])
def test_any_split_of_a_step_has_the_same_samples(rows: Rows, masker: Masker, cursor: int) -> None:
    expected = keys(TrainStream(rows, masker, SEED, Share(0, 1, 8, 1)).step(cursor))
    assert len(set(expected)) == 8
    for world, micro, accumulation in SPLITS:
        found: list[tuple] = []
        for rank in range(world):
            share = Share(rank, world, micro, accumulation)
            assert share.global_batch == 8
            batches = TrainStream(rows, masker, SEED, share).step(cursor)
            assert [len(batch["row_seed"]) for batch in batches] == [micro] * accumulation
            found += keys(batches)
        assert sorted(found) == sorted(expected), (world, micro, accumulation)


def test_an_epoch_visits_each_row_once(rows: Rows, masker: Masker) -> None:
    stream = TrainStream(rows, masker, SEED, Share(0, 1, 1, 1))
    for epoch in (0, 1):
        seen = [int(stream.sample_rows(epoch * len(rows) + place)[0]) for place in range(len(rows))]
        assert sorted(seen) == list(range(len(rows)))


def test_a_row_has_another_mask_in_each_epoch(rows: Rows, masker: Masker) -> None:
    stream = TrainStream(rows, masker, SEED, Share(0, 1, len(rows), 1))
    masks = []
    for epoch in range(2):
        (batch,) = stream.step(epoch * len(rows))
        order = stream.sample_rows(epoch * len(rows))
        masks.append(dict(zip(order.tolist(), map(tuple, batch["positions"].tolist()), strict=True)))
        masks[-1]["ties"] = tuple(sorted(batch["row_seed"].tolist()))
    assert masks[0]["ties"] != masks[1]["ties"]
    same = sum(masks[0][row] == masks[1][row] for row in range(len(rows)))
    assert same <= 1


def test_iteration_continues_at_any_cursor(rows: Rows, masker: Masker) -> None:
    def steps(cursor: int, count: int) -> list[list[tuple]]:
        stream = TrainStream(rows, masker, SEED, Share(1, 2, 2, 2))
        return [keys(batches) for batches in itertools.islice(stream.iterate(cursor), count)]

    straight = steps(0, 9)
    assert straight == [
        keys(TrainStream(rows, masker, SEED, Share(1, 2, 2, 2)).step(cursor)) for cursor in range(0, 72, 8)
    ]
    assert steps(0, 4) + steps(32, 5) == straight
    assert steps(40, 1) == straight[5:6]


def test_a_fault_in_the_background_reaches_the_loop(rows: Rows, masker: Masker) -> None:
    special = (0, 1, 2, 3, 4)
    greedy = Masker(SEED, len(masker._is_special_V), 4, special, 0.999)
    with pytest.raises(UserError, match="maskable"):
        next(TrainStream(rows, greedy, SEED, Share(0, 1, 2, 1)).iterate(0))


@pytest.mark.parametrize("spans", [[], [(10, 13)], [(0, 4), (20, 21)], [(9, 11), (10, 40), (41, 42)], [(5, 5)]])
def test_spans_are_passed_over(rows: Rows, masker: Masker, spans: list[tuple[int, int]]) -> None:
    """Ten steps of four samples are the first forty that no span holds, whatever rank and micro-batch take them."""
    allowed = [sample for sample in range(200) if not any(first <= sample < end for first, end in spans)][:40]
    stream = TrainStream(rows, masker, SEED, Share(0, 1, 4, 1))
    stream.passed_over = tuple(spans)
    cursor, seen = 0, []
    for _ in range(10):
        samples, cursor = stream.samples(cursor)
        seen += samples.tolist()
    assert seen == allowed and cursor == allowed[-1] + 1
    shares = [TrainStream(rows, masker, SEED, Share(rank, 2, 1, 2)) for rank in range(2)]
    for share in shares:
        share.passed_over = tuple(spans)
    assert keys([batch for share in shares for batch in share.step(0)]) == keys(stream.step(0))


def test_a_batch_that_does_not_come_ends_the_wait(rows: Rows, masker: Masker, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = TrainStream(rows, masker, SEED, Share(0, 1, 4, 1), patience=0.2)
    batches = stream.iterate(0)
    next(batches)
    monkeypatch.setattr(stream, "step", lambda *_: time.sleep(1.5))
    with pytest.raises(RunError, match=r"samples \d+ to \d+ of .* did not come within 0.2 s"):
        for _ in range(3):  # one may be under way
            next(batches)


def test_a_batch_that_cannot_be_read_says_which(rows: Rows, masker: Masker, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = TrainStream(rows, masker, SEED, Share(0, 1, 4, 1))

    def step(*_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(stream, "step", step)
    with pytest.raises(RunError, match="samples 0 to 4 of .* cannot be read: .*Input/output error"):
        next(stream.iterate(0))


# ---- a share of masked tokens that changes

STAGED = Config(data=DataConfig(mask_probability=0.4, mask_stages=((4, 0.25), (6, 0.1))))


def of_share(share: float) -> Config:
    return Config(data=DataConfig(mask_probability=share))


def test_a_step_has_the_targets_of_its_stage(mixed: tuple[Path, Manifest]) -> None:
    """From the start and from a resume within any stage; a warm-up on shorter rows does not care."""
    tokenizer = load_corpus_tokenizer(*mixed)
    short, long = Rows(*mixed, "train", 16), Rows(*mixed, "train", LENGTH)
    stream = TrainStream(long, build_masker(STAGED, mixed[1], tokenizer), SEED, Share(0, 1, 4, 2), warmup=(short, 2))
    straight = [keys(batches) for batches in itertools.islice(stream.iterate(0), 8)]
    for number, found in enumerate(straight, 1):
        share = 0.4 if number < 4 else 0.25 if number < 6 else 0.1
        rows = short if number <= 2 else long
        plain = TrainStream(rows, build_masker(of_share(share), mixed[1], tokenizer), SEED, Share(0, 1, 4, 2))
        (batch, _) = stream.step(8 * (number - 1), number)
        assert batch["labels"].shape == batch["positions"].shape == (4, target_count(share, rows.length))
        assert found == keys(plain.step(8 * (number - 1))), number
    for number in (3, 4, 5, 6, 7):  # the first step behind the checkpoint
        resumed = itertools.islice(stream.iterate(8 * (number - 1), number), 9 - number)
        assert [keys(batches) for batches in resumed] == straight[number - 1 :], number


def test_validation_is_masked_as_in_the_last_stage(mixed: tuple[Path, Manifest]) -> None:
    tokenizer, valid = load_corpus_tokenizer(*mixed), Rows(*mixed, "valid", LENGTH)
    staged, last = (build_masker(config, mixed[1], tokenizer) for config in (STAGED, of_share(0.1)))
    found, expected = (keys(counted(valid_batches(valid, masker, 12, 4, 0, 1))) for masker in (staged, last))
    assert len(expected) == 12 and found == expected


# ---- masks by importance

BY_IMPORTANCE = Config(data=DataConfig(mask_by="importance"))


def test_masks_by_importance_are_the_same_for_any_number_of_ranks(mixed: tuple[Path, Manifest]) -> None:
    """And others than random ones: of the rows of a step, rank by rank."""
    masker, rows = build_masker(BY_IMPORTANCE, mixed[1], load_corpus_tokenizer(*mixed)), Rows(*mixed, "train", LENGTH)
    masker.draw_by(np.random.default_rng(0).uniform(0, 12, mixed[1].vocab_size).astype(np.float32))
    one, *two = (
        TrainStream(rows, masker, SEED, share) for share in (Share(0, 1, 8, 1), Share(0, 2, 4, 1), Share(1, 2, 4, 1))
    )
    assert keys(one.step(24, 4)) == [key for stream in two for key in keys(stream.step(24, 4))]
    random = TrainStream(rows, build_masker(Config(), mixed[1], load_corpus_tokenizer(*mixed)), SEED, one.share)
    assert keys(random.step(24, 4)) != keys(one.step(24, 4))


def test_no_batch_is_prepared_before_the_scores_that_it_awaits(mixed: tuple[Path, Manifest]) -> None:
    """Step 101 is masked by what the masker is given while step 100 trains; a resume there begins with it."""
    masker, rows = build_masker(BY_IMPORTANCE, mixed[1], load_corpus_tokenizer(*mixed)), Rows(*mixed, "train", LENGTH)
    stream = TrainStream(rows, masker, SEED, Share(0, 1, 4, 1))
    scores = [np.random.default_rng(n).uniform(0, 12, mixed[1].vocab_size).astype(np.float32) for n in range(2)]
    masker.draw_by(scores[0])
    steps = stream.iterate(4 * 98, 99)
    with contextlib.closing(steps):
        found = [keys(next(steps)) for _ in range(2)]
        time.sleep(0.2)  # a thread that did not wait would be done by now
        masker.draw_by(scores[1])
        found += [keys(next(steps)) for _ in range(2)]
    expected = []
    for number in range(99, 103):
        masker.draw_by(scores[number > 100])
        expected.append(keys(stream.step(4 * (number - 1), number)))
    assert found == expected
    with contextlib.closing(stream.iterate(4 * 100, 101)) as steps:
        assert keys(next(steps)) == expected[2]


# ---- validation


@pytest.mark.parametrize(("limit", "batch"), [(1024, 4), (10, 4), (7, 3), (2, 5)])
def test_validation_is_the_same_for_any_number_of_ranks(valid: Rows, masker: Masker, limit: int, batch: int) -> None:
    expected = keys(counted(valid_batches(valid, masker, limit, batch, 0, 1)))
    assert len(expected) == len(set(expected)) == min(limit, len(valid))
    for world in (1, 2, 3):
        batches = [list(valid_batches(valid, masker, limit, batch, rank, world)) for rank in range(world)]
        assert len({len(part) for part in batches}) == 1, "under ZeRO-3 a forward is collective"
        shares = [keys(counted(part)) for part in batches]
        assert sorted(itertools.chain(*shares)) == sorted(expected)
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1, "ranks have unequal work"


def counted(batches: Iterable[tuple[int, Batch]]) -> list[Batch]:
    """The rows that count."""
    return [{name: tensor[:count] for name, tensor in batch.items()} for count, batch in batches]


def test_validation_rows_are_a_sample_of_the_held_out_ones(valid: Rows, masker: Masker) -> None:
    """Of a sample of them, in the order of the split."""
    assert len(valid) > 6
    restored = [
        batch["input_ids"].scatter(1, batch["positions"], batch["labels"])
        for _, batch in valid_batches(valid, masker, 6, 4, 0, 1)
    ]
    assert [len(part) for part in restored] == [4, 2]
    everything = [tuple(row) for row in valid[np.arange(len(valid))].tolist()]
    places = [everything.index(tuple(row)) for row in torch.cat(restored).tolist()]
    assert places == sorted(set(places)) and places != list(range(6))


def test_validation_masks_are_none_of_training(rows: Rows, masker: Masker) -> None:
    """The same rows as training samples 0, 1, ... would be masked otherwise."""
    ((_, held_out),) = valid_batches(rows, masker, 20, 20, 0, 1)
    training = make_batch(rows, masker, np.arange(20), np.arange(20))
    assert (held_out["positions"] == training["positions"]).all(1).sum() <= 1
    assert not set(held_out["row_seed"].tolist()) & set(training["row_seed"].tolist())


def test_whole_word_masking_on_a_real_vocabulary(corpus: tuple[Path, Manifest], rows: Rows) -> None:
    folder, manifest = corpus
    vocabulary = load_corpus_tokenizer(folder, manifest).get_vocab()
    continues = np.zeros(manifest.vocab_size, dtype=bool)
    continues[[number for piece, number in vocabulary.items() if piece.startswith("##")]] = True
    special = manifest.special_ids
    masked = Masker(1, manifest.vocab_size, special.mask, special.all, 0.15, continues)(
        rows[np.arange(30)], np.arange(30)
    )
    assert masked.positions_BM.shape == (30, 5)
