"""Probing finds what was planted in sentences, layer by layer, and nothing where there is nothing to find."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

from sctd.cli import main
from sctd.errors import UserError
from sctd.evaluate.analyse import probe as module
from sctd.evaluate.analyse.probe import layer_accuracies, read_task, sentence_vectors
from sctd.evaluate.encoder import open_encoder
from sctd.evaluate.finetune.features import batches
from sctd.present.pictures import colours, draw_probe
from small_models import load_hf
from support import ROOT, train
from tiny_bert import FILLER

SIGNS = {"PAST": "was", "PRES": "method"}
DATA = ROOT.parent / "shared" / "data" / "probing"


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("probe") / "tiny"
    train(recipe, run_dir, "train.steps=12", "train.save_every=6")
    return run_dir


def planted(path: Path, signs: dict[str, str] | None, rows: int = 300) -> Path:
    """A file in SentEval's form; a sentence's label decides one of its words, or nothing at all."""
    draw, lines = random.Random(1), []
    for number in range(2 * rows):
        label = ("PAST", "PRES")[number % 2]
        words = draw.choices(FILLER, k=draw.randint(4, 12))
        if signs:
            words[draw.randrange(len(words))] = signs[label]
        split = "tr" if number < rows else ("va", "te")[number // 2 % 2]
        lines.append(f"{split}\t{label}\t{' '.join(words)}\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word tells the tense; nothing tells the number."""
    folder = tmp_path_factory.mktemp("data")
    planted(folder / "past_present.txt", SIGNS)
    planted(folder / "probing" / "subj_number.txt", None)
    return folder


# ---- vectors


def test_vectors_are_those_of_each_sentence_alone(run: Path) -> None:
    encoder = open_encoder(str(run))
    sentences = ["A list of values.", "If not", "the number of objects in it is 3 " * 5]
    tokenizer, model = AutoTokenizer.from_pretrained(encoder.source), AutoModel.from_pretrained(encoder.source)
    means, firsts = (sentence_vectors(encoder, sentences, pooling) for pooling in ("mean", "cls"))
    assert means.shape == firsts.shape == (5, 3, 32)
    for number, sentence in enumerate(sentences):
        with torch.no_grad():
            hidden = model(**tokenizer(sentence, return_tensors="pt"), output_hidden_states=True).hidden_states
        expected = torch.stack([layer[0, 1:-1].mean(0) for layer in hidden]).numpy()
        np.testing.assert_allclose(means[:, number], expected, atol=4e-3)
        np.testing.assert_allclose(firsts[:, number], torch.stack([layer[0, 0] for layer in hidden]), atol=4e-3)


def test_vectors_of_a_modernbert_are_what_the_next_module_reads(modern: Path) -> None:
    encoder = open_encoder(str(modern))
    weights = load_file(Path(encoder.source) / "model.safetensors")
    ours = load_hf(AutoConfig.from_pretrained(encoder.source), weights).eval()
    ids_1S = AutoTokenizer.from_pretrained(encoder.source)("the list of values.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = [ours.embeddings(ids_1S)]
        for layer in ours.layers:
            states.append(layer(states[-1]))
        reads = [*(layer.read for layer in ours.layers), ours.norm]
        expected = [read(state)[0, 1:-1].mean(0) for read, state in zip(reads, states, strict=True)]
    found = sentence_vectors(encoder, ["the list of values."], "mean")[:, 0]
    np.testing.assert_allclose(found, torch.stack(expected), atol=4e-3)


def test_a_sentence_beyond_the_positions_is_cut(run: Path) -> None:
    short, long = (["a list of values " * count] for count in (50, 100))
    encoder = open_encoder(str(run))
    assert (sentence_vectors(encoder, short, "mean") == sentence_vectors(encoder, long, "mean")).all()


def test_batches_have_each_row_once_and_keep_their_size() -> None:
    lengths = [random.Random(2).randint(3, 60) for _ in range(200)] + [500]
    found = list(batches(lengths, 256))
    assert sorted(np.concatenate(found).tolist()) == list(range(201))
    assert all(len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= 256 for rows in found)
    assert len(found) < 60 and found[-1].tolist() == [200]


# ---- classifiers


def test_a_planted_word_is_found_and_a_random_label_is_not(run: Path, data: Path) -> None:
    encoder = open_encoder(str(run))
    found = layer_accuracies(encoder, read_task("tense", data), "mean")
    assert [layer["layer"] for layer in found] == [0, 1, 2, 3, 4]
    assert found[0]["accuracy"] > 0.97 and all(layer["accuracy"] > 0.8 for layer in found)
    nothing = layer_accuracies(encoder, read_task("subj_number", data), "mean")
    assert all(abs(layer["accuracy"] - 0.5) < 0.17 for layer in nothing), nothing  # 4 sigma of 150 test rows


def test_cls_knows_nothing_before_the_first_layer(run: Path, data: Path) -> None:
    """There it is the same vector for every sentence; the layers then tell it."""
    found = layer_accuracies(open_encoder(str(run)), read_task("tense", data), "cls")
    assert found[0]["accuracy"] == 0.5 and max(layer["accuracy"] for layer in found[1:]) > 0.6


def test_more_than_two_labels(run: Path, tmp_path: Path) -> None:
    words = ["was", "method", "python", "class"]
    rows = [(split, word, f"the list of {word} and a value") for split in ("tr", "va", "te") for word in words * 20]
    (tmp_path / "four.txt").write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    task = read_task(str(tmp_path / "four.txt"), None)
    assert (task.name, task.rows) == ("four", {"train": 80, "valid": 80, "test": 80})
    assert layer_accuracies(open_encoder(str(run)), task, "mean")[0]["accuracy"] == 1.0


# ---- the verb


def probe(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["probe", *map(str, arguments)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_results_stay_beside_the_run_and_are_not_measured_again(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (run, run / "checkpoints" / "step-00000006", "--task", "tense", "--task", "subj_number")
    picture = tmp_path / "probe.svg"
    said = probe(capsys, *arguments, "--data-dir", data, "--picture", picture)
    result = run / "evaluation" / "step-00000012" / "probe" / "tense.json"
    record = json.loads(result.read_text(encoding="utf-8"))
    assert record["rows"] == {"train": 300, "valid": 150, "test": 150} and record["pooling"] == "mean"
    assert record["dropped"] == [1, 3] and record["encoder"] == open_encoder(str(run)).identity
    lines = said.splitlines()
    table = lines[lines.index(next(line for line in lines if line.startswith("Tense: "))) :]
    assert "tiny" in table[1] and "tiny@6" in table[1]
    marked = [line.split()[0] for line in table[2:7] if line.count("*") == 2]
    assert marked == ["2", "3"]  # what layers 1 and 2, counted from 0, put out
    assert f"{record['layers'][4]['accuracy']:.1%}" in table[6]
    assert said.count(" sentences, 5 layers in ") == 4 and "SubjNum" in picture.read_text(encoding="utf-8")

    assert " layers in " not in probe(capsys, *arguments, "--data-dir", data)
    assert probe(capsys, *arguments, "--data-dir", data, "--pooling", "cls").count(" layers in ") == 4
    assert json.loads(result.read_text(encoding="utf-8")) == record, "poolings have files of their own"
    result = result.with_name("tense-cls.json")
    other = planted(tmp_path / "past_present.txt", SIGNS, rows=40).parent
    assert " layers in " in probe(capsys, run, "--task", "tense", "--data-dir", other, "--pooling", "cls")
    result.write_text("{", encoding="utf-8")
    assert " layers in " in probe(capsys, run, "--task", "tense", "--data-dir", other, "--pooling", "cls")


def test_a_solver_that_was_ended_is_told(
    run: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "_ITERATIONS", 2)
    said = probe(capsys, run, "--task", "subj_number", "--data-dir", data, "--out", tmp_path / "results")
    assert "subj_number: no convergence in 2 iterations at layer " in said


def test_a_model_in_no_run(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run / "export", tmp_path / "mine")
    (tmp_path / "mine" / "sctd.json").unlink()
    out = tmp_path / "results"
    said = probe(capsys, tmp_path / "mine", "--task", "tense", "--data-dir", data, "--out", out)
    assert "*" not in said and json.loads((out / "probe" / "tense.json").read_text())["dropped"] is None
    assert main(["probe", str(tmp_path / "mine"), "--task", "tense", "--data-dir", str(data)]) == 2
    assert "--out" in capsys.readouterr().err


# ---- the picture


def test_dropped_layers_are_shaded_where_they_are() -> None:
    curve = {"layers": [{"layer": number, "accuracy": 0.5} for number in range(13)], "dropped": [5, 11]}
    axes = Figure().add_subplot()
    curves = {"a": curve, "b": curve, "c": {**curve, "dropped": None}}
    draw_probe(axes, "Tense", curves, dict.fromkeys("abc", "red"))
    (shade,) = axes.patches
    assert shade.get_x() == 5.5 and shade.get_x() + shade.get_width() == 11.5  # outputs 6 to 11 of layers 1 to 12
    assert [line.get_label() for line in axes.lines] == ["a", "b", "c"] and axes.lines[0].get_ydata()[0] == 50


def test_arms_have_their_colours_where_they_tell_runs_apart() -> None:
    assert colours({"x": "sctd", "y": "baseline"}) == {"x": "#2b6cb0", "y": "#555555"}
    assert len(set(colours({"x": "sctd", "y": "sctd", "z": None}).values())) == 3
    assert {*colours({"a": None, "b": None}, taken=["#2b6cb0", "#d1742b"]).values()}.isdisjoint({"#2b6cb0", "#d1742b"})


# ---- bad input


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tr\tPAST\n", ["line 1", "tabs"]),
        ("tr\tPAST\ta b\ntrain\tPRES\tc d\n", ["line 2", "tr, va or te"]),
        ("tr\tPAST\ta\nva\tPAST\ta\nte\tPAST\ta\n", ["one label", "PAST"]),
        ("tr\tPAST\ta\ntr\tPRES\ta\nva\tPAST\ta\n", ["no test rows", "te"]),
        ("tr\tPAST\ta\ntr\tPRES\ta\nva\tPAST\ta\n\nte\tFUTURE\ta\n", ["line 5", "FUTURE"]),
    ],
)
def test_files_of_another_form_are_refused(text: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "past_present.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_task("tense", tmp_path)
    assert all(word in str(caught.value) for word in [*words, str(tmp_path)]) and "\n" not in str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "past_present.txt").write_bytes(b"tr\tPAST\t\xff\xfe\n")
    with pytest.raises(UserError, match="UTF-8"):
        read_task("tense", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "tens"], ["tens", "did you mean 'tense'"]),
        (["--task", "tense"], ["--data-dir", "past_present.txt"]),
        (["--task", "tense", "--data-dir", "nowhere"], ["nowhere/past_present.txt", "nowhere/probing"]),
        (["--task", "tense", "--picture", "curve.jpeg"], ["curve.jpeg", ".png"]),
        (["--task", "tense", "--picture", "nowhere/curve.png"], ["nowhere", "folder"]),
        (["--task", "probing/tense.txt"], ["tense", "name of a task of sctd"]),
        (["more", "--task", "tense", "--out", "here"], ["--out here", "one checkpoint"]),
    ],
)
def test_the_verb_refuses(
    arguments: list[str],
    words: list[str],
    run: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "probing").mkdir()
    (tmp_path / "probing" / "tense.txt").write_text("tr\tPAST\tIt was.\n")
    assert main(["probe", str(run), *arguments]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and all(word in line for word in words), line


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no {DATA}")
def test_the_files_of_senteval_are_read() -> None:
    rows = {name: read_task(name, DATA.parent).rows for name in ("tense", "subj_number")}
    assert rows["subj_number"] == {"train": 10_000, "valid": 5_000, "test": 5_000}
    assert rows["tense"]["train"] == 10_000 and 4_900 < rows["tense"]["test"] <= 5_000
