"""A run that starts from a trained model: of transformers, an export, a run or a step of one; and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BertConfig, BertForMaskedLM, ModernBertConfig, ModernBertForMaskedLM

from sctd.config import parse_run
from sctd.corpus.manifest import load_corpus_tokenizer, read_manifest
from sctd.corpus.tokenizer import load_tokenizer, save_tokenizer
from sctd.errors import UserError
from sctd.jobs.verify import compare
from sctd.objective.build import measuring_steps
from sctd.objective.importance import INITIAL
from sctd.train.init import absolute_source, load_sized, open_source
from sctd.train.keep.checkpoint import choose, read_importance, read_weights
from sctd.train.keep.export import read_run
from support import records, sctd, train

SIZES = ("layers", "hidden_size", "heads", "intermediate_size", "max_positions", "vocab_size")


@pytest.fixture(scope="module")
def parent(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps of the sctd arm, with checkpoints at 5 and 10."""
    run_dir = tmp_path_factory.mktemp("runs") / "parent"
    train(recipe, run_dir, "train.save_every=5", "schedule.name=wsd")
    return run_dir


@pytest.fixture(scope="module")
def plain(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe without sizes, as `continue` is."""
    path = tmp_path_factory.mktemp("recipes") / "plain.yaml"
    path.write_text(
        f"arm: sctd\nobjective: {{interval: 4}}\nschedule: {{warmup_steps: 1}}\ndata: {{corpus: {corpus}}}\n"
        "train: {steps: 8, batch_size: 8, precision: fp32, log_every: 1, valid_rows: 8}\n"
    )
    return path


@pytest.fixture(scope="module")
def continued(plain: Path, parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps that start from the parent's export, on two ranks."""
    run_dir = tmp_path_factory.mktemp("runs") / "continued"
    words = (
        f"init.from={parent / 'export'}",
        "objective.importance_warmup=3",
        "train.save_every=3",
        "train.keep_checkpoints=4",
    )
    (run_dir.parent / "said").write_text(train(plain, run_dir, *words, ranks=2).stdout)
    return run_dir


def test_the_first_validation_is_what_the_model_was_worth(parent: Path, continued: Path) -> None:
    first, last = records(continued)[0], records(parent)[-1]
    assert first["step"] == 0 and first["valid_loss"] == pytest.approx(last["valid_loss"], abs=1e-4)
    assert records(continued)[1]["step"] == 1
    said = (continued.parent / "said").read_text()
    assert f"held-out  loss {first['valid_loss']:.4f} before the first step" in said
    assert f"start     {parent / 'export'}: 4 layers x 32" in said


def test_the_proof_of_resume_reads_such_runs(continued: Path) -> None:
    found = compare(continued, continued)
    assert found.bitwise and found.same_data


def test_sizes_are_the_checkpoints(parent: Path, continued: Path) -> None:
    old, new = read_run(parent).model, read_run(continued).model
    assert all(getattr(old, name) == getattr(new, name) for name in SIZES if name != "vocab_size")
    assert new.vocab_size == 512 and read_run(continued).init.from_ == str(parent / "export")


def test_importance_is_measured_on_the_full_path_first(parent: Path, continued: Path) -> None:
    assert [record["phase"] for record in records(continued)[1:]] == ["full"] * 3 + ["align", *["drop"] * 3, "align"]
    assert list(measuring_steps(read_run(continued))) == [1, 2, 3]
    scores_V = read_importance(choose(continued, 3))
    assert scores_V is not None
    assert (scores_V == INITIAL).sum() == 5  # the special ids
    assert scores_V[scores_V != INITIAL].median() == pytest.approx(records(parent)[-1]["valid_loss"], abs=1.0)
    start = open_source(f"{continued}@3")
    assert start.has_table


def test_resumed_as_if_never_stopped(plain: Path, parent: Path, tmp_path: Path) -> None:
    """Also where the source is gone by then, and in the midst of the measuring."""
    source = shutil.copytree(parent / "export", tmp_path / "source")
    words = (f"init.from={source}", "objective.importance_warmup=3")
    train(plain, tmp_path / "whole", *words)
    train(plain, tmp_path / "parts", *words, "train.stop_at=2")
    assert not open_source(str(tmp_path / "parts")).has_table  # which is only half measured
    shutil.rmtree(source)
    train(plain, tmp_path / "parts", *words, "--resume")
    left, right = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("whole", "parts"))
    assert all(left[name].equal(right[name]) for name in left)
    assert [r["loss"] for r in records(tmp_path / "whole")[1:]] == [r["loss"] for r in records(tmp_path / "parts")[1:]]


@pytest.mark.parametrize("step", [5, None])
def test_a_run_gives_its_weights_and_its_table(plain: Path, parent: Path, tmp_path: Path, step: int | None) -> None:
    name = str(parent) if step is None else f"{parent}@{step}"
    config = load_sized(str(plain), [f"init.from={name}"])
    assert config.objective.importance_warmup == 0 and not measuring_steps(config)
    source = open_source(name)
    start = source.read(source.shape, source.tokenizer, "error")
    path = choose(parent, step)
    expected = read_weights(path)
    assert expected.keys() == {f"bert.{key}" for key in start.state}
    assert all(expected[f"bert.{key}"].equal(tensor) for key, tensor in start.state.items())
    assert start.scores_V is not None and start.scores_V.equal(read_importance(path))


def test_from_a_model_without_a_head(plain: Path, parent: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(parent / "export", tmp_path / "encoder")
    state = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("bert."): tensor for name, tensor in state.items() if name.startswith("bert.")}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    done = train(plain, tmp_path / "run", f"init.from={folder}", "train.steps=2")
    assert "no masked-language-model head: it begins as initialised, tied to the word embeddings" in done.stdout
    first, found = records(tmp_path / "run")[0], load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert first["valid_loss"] > 5 and found.keys() == state.keys()


# ---- vocabulary and positions


@pytest.fixture
def source_folder(parent: Path, tmp_path: Path) -> Path:
    return shutil.copytree(parent / "export", tmp_path / "source")


def test_rows_of_new_pieces_begin_as_the_mean_of_their_pieces(parent: Path, corpus: Path, tmp_path: Path) -> None:
    old = load_corpus_tokenizer(corpus, read_manifest(corpus))
    state = json.loads(old.to_str())
    state["model"]["vocab"] |= {"documentation": 512, "##alize": 513}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    source, grown = open_source(str(parent)), load_tokenizer(str(tmp_path / "tokenizer.json"))
    shape = replace(source.shape, vocab_size=576)
    start = source.read(shape, grown, "error")
    before = read_weights(choose(parent))
    pieces = old.encode("documentation", add_special_tokens=False).ids
    assert len(pieces) > 1 and start.grown == 2
    for ours in ("embeddings.word.weight", "head.bias"):
        rows, new = before[f"bert.{ours}"], start.state[ours]
        assert new[:512].equal(rows) and len(new) == 576
        assert new[512].equal(rows[pieces].mean(0)) and not new[513].equal(new[512])
    assert "2 new pieces begin as the mean of the pieces that they were" in start.describe(shape)


def test_another_tokenizer_is_named_piece_by_piece(plain: Path, source_folder: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((source_folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = (next(piece for piece, index in vocabulary.items() if index == number) for number in (300, 301))
    vocabulary |= {first: 301, second: 300}
    (source_folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    done = sctd("pretrain", plain, f"init.from={source_folder}", f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 2 and "the corpus was not made with the tokenizer of" in done.stderr
    assert "2 ids have another piece than before: 300" in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["tile", "interpolate"])
def test_more_positions_than_the_checkpoint_has(plain: Path, parent: Path, how: str) -> None:
    wanted = [f"init.from={parent}", "model.max_positions=96"]
    with pytest.raises(UserError, match=r"96 positions are needed, and .* has 64: init\.positions=interpolate or tile"):
        load_sized(str(plain), wanted)
    config = load_sized(str(plain), [*wanted, f"init.positions={how}"])
    assert config.model.max_positions == 96
    source = open_source(str(parent))
    start = source.read(replace(source.shape, max_positions=96), source.tokenizer, how)
    table_SD, new_SD = read_weights(choose(parent))["bert.embeddings.position.weight"], None
    new_SD = start.state["embeddings.position.weight"]
    assert new_SD.shape == (96, 32) and new_SD[0].equal(table_SD[0])
    if how == "tile":
        assert new_SD[:64].equal(table_SD) and new_SD[64:].equal(table_SD[:32])
    else:
        assert torch.allclose(new_SD[95], table_SD[63])
        assert torch.allclose(new_SD[19], 0.4 * table_SD[12] + 0.6 * table_SD[13], atol=1e-6)  # 19 x 63 / 95 = 12.6


# ---- what is refused


def refused(plain: Path, run_dir: Path, *words: object) -> str:
    """The one line, after which nothing is there that was not before."""
    done = sctd("pretrain", plain, f"run.dir={run_dir}", *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stdout, done.stderr
    assert not run_dir.exists()
    return done.stderr


def test_a_recipe_that_contradicts_the_checkpoint(recipe: Path, plain: Path, parent: Path) -> None:
    assert load_sized(str(recipe), [f"init.from={parent}"]).model.hidden_size == 32  # says the same sizes
    for key, value, said in (
        ("layers", 6, "model.layers is 6 in the recipe, and 4 in"),
        ("family", "modernbert", "model.family is 'modernbert' in the recipe, and 'bert' in"),
        ("max_positions", 32, "model.max_positions is 32"),
        ("vocab_size", 100, "model.vocab_size is 100"),
    ):
        with pytest.raises(UserError, match=said):
            load_sized(str(plain), [f"init.from={parent}", f"model.{key}={value}", *(["data.corpus="] * 1)])
    config = load_sized(str(plain), [f"init.from={parent}", "model.dropout=0.3"])
    assert config.model.dropout == 0.3 and config.model.attention_dropout == 0.1


def test_pickled_weights_are_refused_with_the_conversion(plain: Path, source_folder: Path, tmp_path: Path) -> None:
    weights = load_file(source_folder / "model.safetensors")
    (source_folder / "model.safetensors").unlink()
    torch.save(weights, source_folder / "pytorch_model.bin")
    said = refused(plain, tmp_path / "run", f"init.from={source_folder}")
    assert "pickle" in said and f"from_pretrained('{source_folder}').save_pretrained('OUT')" in said


def test_what_is_no_model_of_ours_is_one_line(plain: Path, source_folder: Path, parent: Path, tmp_path: Path) -> None:
    config = json.loads((source_folder / "config.json").read_text())
    for changes, said in (
        ({"hidden_act": "relu"}, "hidden_act is 'relu', only 'gelu' can be loaded"),
        (
            {"model_type": "roberta"},
            "model_type is 'roberta', only 'bert' and 'modernbert' can be loaded: its positions",
        ),
        ({"model_type": "distilbert"}, "it has no token types"),
        ({"num_hidden_layers": 5}, "checkpoint has no weight 'bert.encoder.layer.4.attention"),
    ):
        (source_folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=said):
            source = open_source(str(source_folder))
            source.read(source.shape, source.tokenizer, "error")
    (source_folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(UserError, match="its tokenizer has 512 ids, and its config.json says vocab_size 100"):
        open_source(str(source_folder))
    (source_folder / "config.json").write_text("{")
    for name, said in (
        (source_folder, "config.json cannot be read"),
        (tmp_path / "nowhere", "there is no such folder"),
        (tmp_path, "no model of transformers (no config.json) and no run"),
        (f"{parent}@7", "has no checkpoint of step 7: there are 5, 10; the nearest is"),
        ("nobody/no-such-model", "init.from=nobody/no-such-model: no such folder or run, and the hub does not give it"),
    ):
        with pytest.raises(UserError) as caught:
            open_source(str(name))
        assert said in str(caught.value) and "\n" not in str(caught.value)
    (source_folder / "model.safetensors").write_bytes(b"torn")
    (source_folder / "config.json").write_text(json.dumps(config))
    assert f"init.from={source_folder}: " in refused(plain, tmp_path / "run", f"init.from={source_folder}")


def test_a_table_that_knows_nothing_is_refused(plain: Path, parent: Path) -> None:
    name = str(parent / "export")
    with pytest.raises(UserError, match="importance_warmup is 0, and .* has no importance table"):
        load_sized(str(plain), [f"init.from={name}", "objective.importance_warmup=0"])
    config = load_sized(str(plain), [f"init.from={name}", "arm=baseline"])
    assert config.objective.importance_warmup == 0


def test_a_run_goes_on_with_its_own_weights(recipe: Path, parent: Path, continued: Path) -> None:
    before = (parent / "config.yaml").read_text()
    done = sctd("pretrain", recipe, f"run.dir={parent}", f"init.from={continued}", "--resume")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "was started from random weights, and goes on with its own weights: leave out init.from" in done.stderr
    assert (parent / "config.yaml").read_text() == before


def test_a_source_by_its_full_name(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(parent.parent)
    assert absolute_source("parent@5") == f"{parent}@5" and absolute_source("parent/export") == str(parent / "export")
    assert absolute_source("bert-base-uncased") == "bert-base-uncased" and absolute_source("") == ""


def test_names_of_runs_with_steps() -> None:
    assert parse_run("runs/a@b@120") == (Path("runs/a@b"), 120)
    assert parse_run("runs/a@x") == (Path("runs/a@x"), None)


def test_a_published_bert_in_several_files(tmp_path: Path, corpus: Path) -> None:
    """As the hub has it: weights in half precision, in two files with an index, and a vocab.txt."""
    sizes = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 64}
    model = BertForMaskedLM(BertConfig(**sizes)).half()
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    save_tokenizer(load_corpus_tokenizer(corpus, read_manifest(corpus)), tmp_path, 64)
    (tmp_path / "tokenizer.json").unlink()
    source = open_source(str(tmp_path))
    start = source.read(source.shape, source.tokenizer, "error")
    theirs = model.bert.embeddings.word_embeddings.weight.float()
    assert start.state["embeddings.word.weight"].equal(theirs) and start.has_head
    assert AutoConfig.from_pretrained(tmp_path).vocab_size == source.shape.vocab_size
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(UserError, match=r"model-00002.* is missing, which model\.safetensors\.index\.json names"):
        open_source(str(tmp_path))


def test_a_modernbert_keeps_its_windows(plain: Path, corpus: Path, tmp_path: Path) -> None:
    """Into the run and out of it again; all arms' paths see the places that the windows speak of."""
    sizes = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    sizes |= {f"{name}_token_id": number for number, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
    config = ModernBertConfig(**sizes, intermediate_size=48, max_position_embeddings=64, local_attention=16)
    ModernBertForMaskedLM(config).save_pretrained(tmp_path / "source")
    save_tokenizer(load_corpus_tokenizer(corpus, read_manifest(corpus)), tmp_path / "source", 64, False)
    words = (f"init.from={tmp_path / 'source'}", "train.steps=4", "objective.importance_warmup=1")
    train(plain, tmp_path / "run", *words)
    assert [record["phase"] for record in records(tmp_path / "run")] == ["full", "full", "drop", "drop", "align"]
    found = AutoConfig.from_pretrained(tmp_path / "run" / "export")
    assert found.layer_types == config.layer_types and "sliding_attention" in found.layer_types
    assert found.local_attention == 16 and found.rope_parameters == config.rope_parameters
