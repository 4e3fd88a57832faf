"""What can be evaluated and where its results go; results read back, and what exports and their cards say."""

import json
import math
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from sctd.cli import main
from sctd.errors import UserError
from sctd.evaluate.encoder import ENCODER, Encoder, load_tokenizer, open_encoder, read_mark
from sctd.evaluate.results import best_scores, read_cells, read_drift, read_probes, score_rows, scores
from sctd.train.keep.checkpoint import read_weights
from sctd.train.keep.export import export_run, read_facts, seal_of
from support import records, train


@pytest.fixture(scope="module")
def trained(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of sctd, saved at steps 3 and 6."""
    run = tmp_path_factory.mktemp("encoder") / "tiny"
    train(recipe, run, "train.steps=6", "train.save_every=3", "train.valid_every=3")
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "tiny")


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step-{number:08d}"


def has_weights_of(checkpoint: Path, folder: str) -> bool:
    """Whether the model there has the embeddings of a checkpoint of ours."""
    words = load_file(Path(folder) / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    return any(tensor.shape == words.shape and tensor.equal(words) for tensor in read_weights(checkpoint).values())


# ---- what is evaluated


def test_a_run_is_its_newest_checkpoint_as_it_was_exported(trained: Path) -> None:
    encoder = open_encoder(str(trained))
    assert (encoder.name, encoder.source) == ("tiny", str(trained / "export"))
    assert encoder.home == trained / "evaluation" / "step-00000006" and not encoder.home.exists()
    last = records(trained)[-1]
    wanted = {
        "run": "tiny", "arm": "sctd", "seed": 1, "step": 6, "steps": 6, "dropped": [1, 3], "tokens": 6 * 8 * 64,
        "seconds": last["seconds"], "valid_loss": last["valid_loss"], "checkpoint": seal_of(step(trained, 6)),
    }  # fmt: skip
    assert encoder.facts == wanted
    assert len(load_tokenizer(encoder)) == 512


def test_an_earlier_checkpoint_is_exported_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = open_encoder(str(step(run, 3)))
    assert encoder.name == "tiny@3" and encoder.home == run / "evaluation" / "step-00000003"
    assert Path(encoder.source) == encoder.home / "export" and encoder.facts["step"] == 3
    assert encoder.facts["valid_loss"] == records(run)[2]["valid_loss"] and encoder.facts["tokens"] == 3 * 8 * 64
    assert has_weights_of(step(run, 3), encoder.source) and not has_weights_of(step(run, 6), encoder.source)
    assert encoder.identity != open_encoder(str(run)).identity
    written = (Path(encoder.source) / "README.md").stat()
    monkeypatch.chdir(run / "checkpoints")
    assert open_encoder("step-00000003").identity == encoder.identity
    assert (Path(encoder.source) / "README.md").stat() == written
    assert open_encoder("step-00000006").name == "tiny" == open_encoder("..").name
    assert [path.name for path in encoder.home.iterdir()] == ["export"]  # nothing temporary is left


def test_an_export_is_that_of_its_run_and_a_copy_of_it_is_on_its_own(run: Path, tmp_path: Path) -> None:
    here, there = open_encoder(str(run)), open_encoder(str(run / "export"))
    assert (there.name, there.home, there.identity, there.facts) == ("tiny", here.home, here.identity, here.facts)
    copy = open_encoder(str(shutil.copytree(run / "export", tmp_path / "mine")))
    assert (copy.name, copy.home, copy.identity) == ("mine", None, here.identity)
    vocabulary = tmp_path / "mine" / "vocab.txt"
    vocabulary.write_text(vocabulary.read_text(encoding="utf-8").replace("the\n", "eht\n", 1), encoding="utf-8")
    assert open_encoder(str(tmp_path / "mine")).identity != here.identity


def test_a_damaged_checkpoint_is_passed_over_or_refused(run: Path) -> None:
    file = step(run, 6) / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert open_encoder(str(run)).name == "tiny@3"
    with pytest.raises(UserError, match="step-00000006 is damaged"):
        open_encoder(str(step(run, 6)))
    (step(run, 6) / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        open_encoder(str(step(run, 6)))


def test_an_export_of_other_weights_is_made_anew(run: Path) -> None:
    """As if another run had been in this folder, and evaluated at this step."""
    encoder = open_encoder(str(step(run, 3)))
    facts = Path(encoder.source) / "sctd.json"
    shutil.copy(run / "export" / "model.safetensors", encoder.source)
    facts.write_text(json.dumps(encoder.facts | {"checkpoint": "0" * 64}), encoding="utf-8")
    again = open_encoder(str(step(run, 3)))
    assert again == encoder and has_weights_of(step(run, 3), again.source)


def test_many_may_open_a_checkpoint_at_once(run: Path) -> None:
    open_encoder(str(run))  # so that modules are loaded once

    def use(_: int) -> tuple[Encoder, Path]:
        encoder = open_encoder(str(step(run, 3)))
        return encoder, encoder.results()

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(use, range(6)))
    assert all(each == found[0] for each in found)
    assert sorted(path.name for path in found[0][1].iterdir()) == [ENCODER, "export"]
    assert read_mark(found[0][1])["identity"] == found[0][0].identity


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("./none", "./none: no such folder"),
        ("runs/base/step-3", "no such folder"),
        ("empty", "no weights"),
        ("bare", "no config.json"),
        ("torn", "no config.json"),
        ("gpt2", "a gpt2 model is not an encoder"),
        ("bart", "a bart model is not an encoder"),
        ("decoder", "is not an encoder"),
        ("own-code", "no config.json"),
        ("begun", "no checkpoint yet"),
    ],
)
def test_what_is_no_encoder_is_refused(
    spec: str, words: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((run / "export" / "config.json").read_text(encoding="utf-8"))
    code = {"auto_map": {"AutoConfig": "code.Code"}, "model_type": "own"}
    configs = {
        "torn": "{", "gpt2": json.dumps({"model_type": "gpt2"}), "bart": json.dumps({"model_type": "bart"}),
        "decoder": json.dumps(config | {"is_decoder": True}), "own-code": json.dumps(config | code),
    }  # fmt: skip
    for name in ("empty", "bare", *configs):
        (tmp_path / name).mkdir()
        if name != "empty":
            shutil.copy(run / "export" / "model.safetensors", tmp_path / name)
        if name in configs:
            (tmp_path / name / "config.json").write_text(configs[name], encoding="utf-8")
    (tmp_path / "own-code" / "code.py").write_text("from pathlib import Path\nPath('executed').touch()\n")
    (tmp_path / "begun").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "begun")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        open_encoder(spec)
    assert words in str(refused.value) and "\n" not in str(refused.value) and not Path("executed").exists()


@pytest.mark.parametrize(
    ("vocabulary", "words"),
    [
        (None, "no fast tokenizer"),
        (["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abc"], "has 8 ids, the model 512 embeddings"),
        (["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(600))], "has 605 ids, the model 512"),
    ],
)
def test_tokenizers_that_do_not_fit_are_refused(
    vocabulary: Sequence[str] | None, words: str, run: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(run / "export", tmp_path / "mine")
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink()
    if vocabulary is not None:
        (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary), encoding="utf-8")
    encoder = open_encoder(str(folder))
    with pytest.raises(UserError, match=words):
        load_tokenizer(encoder)


# ---- where results go


def test_results_of_two_encoders_are_never_mixed(run: Path, tmp_path: Path) -> None:
    new, old = open_encoder(str(run)), open_encoder(str(step(run, 3)))
    assert new.results() == new.home and new.results() == new.home
    mark = read_mark(new.results())
    assert (mark["name"], mark["identity"], mark["facts"]) == (new.name, new.identity, new.facts)
    with pytest.raises(UserError, match="holds results of another checkpoint"):
        old.results(new.home)
    assert old.results(tmp_path / "own" / "place") == tmp_path / "own" / "place"
    homeless = open_encoder(str(shutil.copytree(run / "export", tmp_path / "mine")))
    with pytest.raises(UserError, match="say with --out"):
        homeless.results()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a folder"):
        homeless.results(tmp_path / "file")
    for text in ("", "[]", "[1]", '{"spec": "x"}'):
        (tmp_path / "own" / "place" / ENCODER).write_text(text)
        with pytest.raises(UserError, match="cannot be read"):
            old.results(tmp_path / "own" / "place")


# ---- results, read back


def cell(task: str, seed: int, score: float, **changes: Any) -> dict[str, Any]:
    facts = {"task": task, "title": task.upper(), "suite": "glue", "metrics": ["accuracy", "f1"], "seed": seed}
    values = {"best": {"accuracy": score, "f1": score / 2}, "last": {"accuracy": 0.0, "f1": 0.0}}
    setting = {"lr": 1e-5, "batch_size": 16, "steps": 100, "max_length": 256, "shots": None}
    return {**facts, **setting, "scores": values, **changes}


def write_cells(folder: Path, cells: Sequence[dict[str, Any]]) -> None:
    for number, each in enumerate(cells):
        path = folder / "finetune" / each["task"] / f"cell-{number}" / "result.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(each), encoding="utf-8")


def test_cells_are_gathered_over_seeds_and_the_best_setting_is_found(tmp_path: Path) -> None:
    write_cells(
        tmp_path,
        [
            cell("mrpc", 1, 0.7), cell("mrpc", 2, 0.9), cell("mrpc", 1, 0.75, lr=5e-5),
            cell("mrpc", 1, 0.5, shots=32), cell("rte", 1, 0.6, suite="superglue"),
        ],
    )  # fmt: skip
    cells = read_cells(tmp_path)
    assert len(cells) == 5
    found = scores(cells)
    assert [(score.task, score.setting["lr"], score.setting["shots"]) for score in found] == [
        ("mrpc", 1e-5, None), ("mrpc", 5e-5, None), ("mrpc", 1e-5, 32), ("rte", 1e-5, None),
    ]  # fmt: skip
    two, one = found[:2]
    assert two.values == {1: 0.7, 2: 0.9} and two.mean == pytest.approx(0.8)
    assert two.deviation == pytest.approx(math.sqrt(0.02)) and math.isnan(one.deviation)
    assert two.counted == pytest.approx((0.8 + 0.4) / 2) and found[3].counted == pytest.approx(0.6)
    best = best_scores(cells)
    assert list(best) == ["mrpc", "mrpc-32shot", "rte"] and best["mrpc"] == two
    assert {score.mean for score in scores(cells, "last")} == {0.0}


def test_results_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    assert read_cells(tmp_path) == read_probes(tmp_path) == [] and read_drift(tmp_path) is None
    write_cells(tmp_path, [cell("rte", 1, 0.5)])
    (tmp_path / "finetune" / "rte" / "cell-0" / "result.json").write_text("{")
    with pytest.raises(UserError, match=r"cell-0/result.json cannot be read"):
        read_cells(tmp_path)


# ---- exports and their cards


def test_the_card_has_the_scores_of_the_checkpoint_that_is_exported(run: Path, tmp_path: Path) -> None:
    new, old = open_encoder(str(run)).results(), open_encoder(str(step(run, 3))).results()
    write_cells(new, [cell("rte", 1, 0.75), cell("rte", 2, 0.5), cell("my|own", 1, 0.25, shots=8)])
    write_cells(old, [cell("rte", 1, 0.125)])
    (new / "probe").mkdir()
    layers = [{"layer": layer, "accuracy": accuracy} for layer, accuracy in enumerate((0.5, 0.9, 0.8))]
    (new / "probe" / "tense.json").write_text(json.dumps({"title": "Tense", "layers": layers}), encoding="utf-8")
    assert main(["export", str(run), "--out", str(tmp_path / "new")]) == 0
    card = (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
    how = "LR 1e-05, batch 16, 100 steps, best epoch on its dev set"
    assert f"| RTE: accuracy, {how} | 0.6250 +- 0.1768 (standard deviation over 2 seeds) |" in card
    assert f"| MY\\|OWN, 8 examples a class: accuracy, {how} | 0.2500, one seed |" in card
    assert "| Tense probe: accuracy on frozen layers | 80.0% at the last layer, best 90.0% at layer 1 |" in card
    assert main(["export", str(run), "--out", str(tmp_path / "old"), "--step", "3"]) == 0
    card = (tmp_path / "old" / "README.md").read_text(encoding="utf-8")
    assert "| 0.1250, one seed |" in card and "0.6250" not in card and "Tense" not in card
    assert "| optimizer steps | 3 of a horizon of 6 |" in card and read_facts(tmp_path / "old")["step"] == 3
    damaged = step(run, 6) / "rank-00000.safetensors"
    damaged.write_bytes(b"")
    assert score_rows(run) == score_rows(run, 3) != []  # the newest whole one, as the export takes it


def test_scores_of_other_weights_are_not_on_the_card(run: Path) -> None:
    home = open_encoder(str(run)).results()
    write_cells(home, [cell("rte", 1, 0.5)])
    assert len(score_rows(run)) == 1
    mark = read_mark(home)
    mark["facts"]["checkpoint"] = "0" * 64
    (home / ENCODER).write_text(json.dumps(mark), encoding="utf-8")
    assert score_rows(run) == [] == score_rows(run, 3) == score_rows(run, 99) == score_rows(run.parent)


def test_exports_of_what_is_not_there_are_refused(run: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--step", "4"]) == 2
    said = capsys.readouterr().err
    assert "has no checkpoint of step 4: there are 3, 6" in said and said.count("\n") == 1
    (step(run, 3) / "state.json").unlink()
    with pytest.raises(UserError, match="state.json is missing"):
        export_run(run, tmp_path / "out", 3)
    with pytest.raises(UserError, match="holds no run"):
        export_run(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"step": 3}', "\xff"])
def test_facts_that_are_none_of_ours_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "sctd.json").write_text(text, encoding="latin-1")
    assert read_facts(tmp_path) == {} == read_facts(tmp_path / "none")
