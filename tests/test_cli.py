"""Bad input: one line on stderr that says what, where and what to do, exit code 2, no traceback, nothing written."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from sctd.cli import main
from support import ROOT, sctd, train


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that the verb prints when it refuses."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("sctd: error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bert-base-sctdd"], ["bert-base-sctdd", "bert-base-sctd"]),
        (["demo", "model.keep_ration=0.5"], ["model.keep_ration", "keep_ratio"]),
        (["demo", "modle.layers=4"], ["modle", "model"]),
        (["demo", "model.keep_ratio=0"], ["model.keep_ratio", "above 0"]),
        (["demo", "model.keep_ratio=1.5"], ["model.keep_ratio", "at most 1"]),
        (["demo", "model.layers=5"], ["model.layers", "even"]),
        (["demo", "objective.interval=0"], ["objective.interval", "at least 1"]),
        (["demo", "train.steps=many"], ["train.steps", "whole number"]),
        (["demo", "train.steps"], ["train.steps", "section.key=value"]),
        (["demo", "arm=sctx"], ["arm", "sctd"]),
        (["demo", "model.family=modernbret"], ["model.family", "'modernbret'", "modernbert"]),
        (["demo", "model.heads=128"], ["model.heads", "128", "it has 1"]),
        (["demo", "model.positions=sinusoidal"], ["model.positions", "'sinusoidal'", "modernbert"]),
        (["demo", "model.layer_norm=apex"], ["model.layer_norm", "'apex'", "modernbert"]),
        (["demo", "schedule.full_start=1171"], ["schedule.full_finish", "130", "129"]),
        (["demo", "data.mask_stages=[[5,0.2],[4,0.1]]"], ["data.mask_stages", "[[5, 0.2], [4, 0.1]]", "rising"]),
        (["demo", "data.mask_stages=[[5,0.6]]"], ["data.mask_stages", "0.6", "at most 0.5"]),
        (["demo", "optimizer.muon_lr=0"], ["optimizer.muon_lr", "above 0"]),
        (["demo", "attention.scope=documents"], ["attention.scope", "document"]),
        (["demo", "model.layer_norm=apx"], ["model.layer_norm", "apex"]),
        (["demo", "train.cuda_graphs=true"], ["train.cuda_graphs", "train.compile"]),
        (["demo", "data.corpus="], ["data.corpus", "sctd prepare"]),
        (["demo", "--deepspeed_config", "nowhere.json"], ["nowhere.json", "No such file"]),
        (["demo", "--resum"], ["--resum"]),
        ([], ["recipe"]),
    ],
)
def test_pretrain_refuses(capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]) -> None:
    line = refused(capsys, "pretrain", *arguments)
    assert all(word in line for word in words), line


def test_unknown_verb_and_no_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert "pretrian" in refused(capsys, "pretrian")
    assert "VERB" in refused(capsys)


def test_corpus_without_or_with_a_damaged_manifest(
    capsys: pytest.CaptureFixture[str], corpus: Path, recipe: Path, tmp_path: Path
) -> None:
    run = f"run.dir={tmp_path / 'run'}"
    line = refused(capsys, "pretrain", recipe, f"data.corpus={tmp_path / 'none'}", run)
    assert str(tmp_path / "none") in line
    (tmp_path / "empty").mkdir()
    line = refused(capsys, "pretrain", recipe, f"data.corpus={tmp_path / 'empty'}", run)
    assert "manifest.json" in line and "sctd prepare" in line
    damaged = tmp_path / "damaged"
    shutil.copytree(corpus, damaged)
    text = (damaged / "manifest.json").read_text()
    (damaged / "manifest.json").write_text(text[: len(text) // 2])
    assert "manifest.json" in refused(capsys, "pretrain", recipe, f"data.corpus={damaged}", run)
    assert not (tmp_path / "run").exists()


def test_tokenizer_or_shard_that_does_not_match(
    capsys: pytest.CaptureFixture[str], corpus: Path, recipe: Path, tmp_path: Path
) -> None:
    run = f"run.dir={tmp_path / 'run'}"
    other = tmp_path / "tokenizer"
    shutil.copytree(corpus, other)
    tree = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    tree["model"]["vocab"]["surplus"] = len(tree["model"]["vocab"])
    (other / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    assert "tokenizer" in refused(capsys, "pretrain", recipe, f"data.corpus={other}", run)
    cut = tmp_path / "cut"
    shutil.copytree(corpus, cut)
    shard = cut / "train-64-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-2])
    assert "train-64-00000.npy" in refused(capsys, "pretrain", recipe, f"data.corpus={cut}", run)
    assert not (tmp_path / "run").exists()


def test_a_shard_altered_in_place(
    capsys: pytest.CaptureFixture[str], corpus: Path, recipe: Path, tmp_path: Path
) -> None:
    altered = tmp_path / "altered"
    shutil.copytree(corpus, altered)
    data = bytearray((altered / "valid-64-00000.npy").read_bytes())
    data[-1] ^= 1
    (altered / "valid-64-00000.npy").write_bytes(data)
    line = refused(capsys, "pretrain", recipe, f"data.corpus={altered}", f"run.dir={tmp_path / 'run'}")
    assert "valid-64-00000.npy" in line
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    line = refused(capsys, "pretrain", recipe, f"run.dir={tmp_path / 'file' / 'run'}")
    assert str(tmp_path / "file") in line


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"SCTD_KERNELS": "abacus"}, "SCTD_KERNELS=abacus"),
        ({"SCTD_KERNELS": "triton", "TRITON_INTERPRET": "0"}, "run on a GPU, or set TRITON_INTERPRET=1"),
        ({"SCTD_KERNELS": "cuda"}, "the tensors are on cpu"),
    ],
)
def test_kernels_that_are_not_there(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = sctd("pretrain", recipe, f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (["train.compile=true", "train.cuda_graphs=true"], "use a GPU"),
        (["model.layer_norm=apex"], "model.layer_norm=native"),
    ],
)
def test_what_this_machine_lacks(recipe: Path, tmp_path: Path, override: list[str], words: str) -> None:
    if torch.cuda.is_available() or importlib.util.find_spec("apex"):
        pytest.skip("this machine has what the test asks for in vain: a GPU, or apex")
    done = sctd("pretrain", recipe, f"run.dir={tmp_path / 'run'}", *override)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_deepspeed_json_with_an_unknown_key(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1, "bucket": 5}}')
    done = sctd("pretrain", recipe, f"run.dir={tmp_path / 'run'}", "--deepspeed_config", tmp_path / "ds.json")
    assert done.returncode == 2 and "'bucket'" in done.stderr and "Traceback" not in done.stderr


def test_vocabulary_smaller_than_a_token_id_and_rows_too_long(
    capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path
) -> None:
    run = f"run.dir={tmp_path / 'run'}"
    line = refused(capsys, "pretrain", recipe, run, "model.vocab_size=100")
    assert "model.vocab_size is 100" in line and "token id" in line
    line = refused(capsys, "pretrain", recipe, run, "model.max_positions=32")
    assert "rows of 64 tokens" in line and "model.max_positions" in line
    assert not (tmp_path / "run").exists()


def test_run_dir_that_holds_another_run(capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-00000004\n")  # and no checkpoint: it was removed
    line = refused(capsys, "pretrain", recipe, f"run.dir={tmp_path}")
    assert "holds a run" in line and "--resume" in line
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_resume_without_a_run(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "pretrain", recipe, f"run.dir={tmp_path / 'none'}", "--resume")
    assert "does not exist" in line
    assert "holds no run" in refused(capsys, "export", tmp_path / "none", "--out", tmp_path / "out")
    (tmp_path / "run" / "checkpoints" / "step-00000004").mkdir(parents=True)  # and no config.yaml, no manifest
    done = sctd("pretrain", recipe, f"run.dir={tmp_path / 'run'}", "--resume")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "holds no run" in done.stderr


def test_resume_refuses_another_configuration(recipe: Path, tmp_path: Path) -> None:
    run = f"run.dir={tmp_path / 'run'}"
    train(recipe, tmp_path / "run", "train.stop_at=2", "train.valid_rows=2")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for override, words in (
        ("objective.kl_weight=0.1", ["objective.kl_weight is 0.1", "0.05"]),
        ("arm=token_drop", ["arm is 'token_drop'"]),
    ):
        done = sctd("pretrain", recipe, run, override, "--resume")
        assert done.returncode == 2 and all(word in done.stderr for word in words), done.stderr
        assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_export_does_not_overwrite_something_else(recipe: Path, tmp_path: Path) -> None:
    train(recipe, tmp_path / "run", "train.stop_at=1", "train.valid_rows=2")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "README.md").write_text("years of work")
    done = sctd("export", tmp_path / "run", "--out", tmp_path / "thesis")
    assert done.returncode == 2 and "choose another folder" in done.stderr
    assert (tmp_path / "thesis" / "README.md").read_text() == "years of work"


def test_optional_apex_asked_for_and_absent(recipe: Path, tmp_path: Path) -> None:
    """Where apex is installed the run works instead; both ends are checked."""
    done = sctd("pretrain", recipe, f"run.dir={tmp_path / 'run'}", "optimizer.name=apex_adam", "train.steps=2")
    try:
        import apex  # noqa: F401
    except ImportError:
        assert done.returncode == 2 and "apex is not installed" in done.stderr and "optimizer.name=adamw" in done.stderr
    else:
        assert done.returncode == 0, done.stderr


def test_prepare_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "no file matches" in refused(capsys, "prepare", "--source", tmp_path / "*.txt", "--out", out)
    (tmp_path / "a.txt").write_bytes(b"fine\nnot \xff fine\n")
    line = refused(capsys, "prepare", "--source", tmp_path / "a.txt", "--out", out)
    assert "a.txt" in line and "line 2" in line
    (tmp_path / "b.txt").write_text("")
    assert "b.txt" in refused(capsys, "prepare", "--source", tmp_path / "b.txt", "--out", out)
    assert not out.exists()


def test_print_config_shows_the_merged_result(capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    assert main(["pretrain", "bert-large-sctd", "model.keep_ratio=0.25", "--print-config"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree["arm"] == "sctd" and tree["model"]["keep_ratio"] == 0.25 and tree["model"]["layers"] == 24
    path = str(ROOT / "ds_configs" / "zero2_fp16.json")
    assert main(["pretrain", "demo", "--deepspeed_config", path, "--print-config"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree["train"]["precision"] == "fp16" and tree["train"]["zero_stage"] == 2


def test_overrides_may_stand_between_options(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train.steps=2000", "--print-config", "train.log_every=7", "--deepspeed", "arm=baseline"]
    assert main(["--local_rank=0", "pretrain", "demo", *arguments]) == 0
    out = capsys.readouterr().out
    assert "steps: 2000" in out and "log_every: 7" in out and "arm: baseline" in out
    assert "stray" in refused(capsys, "export", "runs/x", "--out", "y", "stray")
    assert "--stray" in refused(capsys, "pretrain", "demo", "a.b=1", "--stray")


def test_every_shipped_deepspeed_json_parses() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    paths = sorted((ROOT / "ds_configs").glob("*.json"))
    assert len(paths) >= 7
    for path in paths:
        DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, **json.loads(path.read_text(encoding="utf-8"))})
