"""Two hundred recipes and command lines that nobody should write: each works or ends with one line and exit code 2."""

import json
import random
from pathlib import Path

import pytest
import yaml

from sctd.cli import main
from sctd.config import load_config, recipe_names, to_dict
from support import sctd

VALUES = [
    "modernbert", "sinusoidal", "muon", [[3, 0.2]], [[2, 0.9]],
    None, True, -1, 0, 1, 3, 1.5, -0.0, 1e308, float("nan"), float("inf"), 10**30, "", " ", "x", "null", "é\u202e",
    "1e400", "a" * 5000, [], {}, [[]], [1, [2, "x"]], {"a": {"b": None}}, "2024-13-45", "!!int x",
]  # fmt: skip
TEXTS = [
    "", "a: b: c", "\t- x", "- 1\n- 2", "&a [*a]", "arm: &x sctd\nrun: *y", "arm: sctd\narm: [", "\x00", "{" * 2000,
    "42", "extends: nowhere", "extends: demo\nextends: [1]", "extends: {a: 1}", "extends: ../../x.yaml", "1: 2",
    "model: 3",
    "? [a]\n: b", "arm: !!python/object/apply:os.system [echo]", "train: {steps: !!float x}", "run: {dir: ~, seed: ~}",
]  # fmt: skip
OVERRIDES = [
    "=", "=x", "a", "a=", "a.b.c=1", ".=1", "..=", "train=1", "train.steps=", "train.steps=1e999", "train.steps=0x10",
    "train.steps=-5", "train.steps=true", "train.steps=1.5", "train.steps=[1]", "arm=", "arm=SCTD", "arm=[sctd]",
    "run.dir=", "run.dir=[1]", "run.seed=-1", "run.seed=99999999999999999999", "model.heads=0", "model.layers=1",
    "model.hidden_size=7", "model.keep_ratio=2", "model.keep_ratio=nan", "optimizer.lr=inf", "optimizer.lr=-1",
    "optimizer.betas=1", "optimizer.betas=[1,2,3]", "data.skip_samples=3", "data.skip_samples=[[1]]",
    "data.skip_samples=[[2,1]]", "data.skip_samples=[[0,1,2]]", "data.skip_samples=[[a,b]]", "data.mask_probability=5",
    "train.timeout=0", "train.timeout=1e99", "train.rollback_after=-1", "schedule.name=x", "objective.interval=0",
    "run.examples=[x]", "run.examples=5", "train.stop_at=0", "train.precision=fp8", "train.zero_stage=7",
    "model.dropout=1", "model.family=3", "model.family=", "model.family=modernbert", "model.family=[bert]",
    "model.positions=x", "model.positions=sinusoidal", "data.mask_stages=[[1]]", "data.mask_stages=[[2,9]]",
    "data.mask_stages=[[2,0.1],[2,0.1]]", "data.mask_stages={3: 0.1}", "data.mask_stages=[[1e99,0.1]]",
    "data.mask_stages=[[.inf,0.1]]", "schedule.full_start=-1", "schedule.full_start=1e99",
    "schedule.full_finish=.nan", "optimizer.muon_lr=0", "optimizer.muon_lr=[1]", "train.precision=auto",
]  # fmt: skip
LINES = [
    [], ["x"], ["--x"], ["pretrain"], ["pretrain", "nowhere"], ["pretrain", "demo", "--nope"], ["pretrain", "", "x"],
    ["pretrain", "/", "--print-config"], ["pretrain", "x.yaml", "--print-config"], ["export"], ["export", "/nowhere"],
    ["export", "/nowhere", "--out", "/nowhere/x"], ["status"], ["status", "/nowhere"], ["checkpoints", "/dev/null"],
    ["plan", "demo"], ["plan", "demo", "--gpus", ""], ["plan", "demo", "--gpus", "0xA100-40GB"],
    ["plan", "demo", "--gpus", "-1xA100-40GB"], ["plan", "demo", "--gpus", "8xNOPE"], ["plan", "demo", "--gpus", "8"],
    ["plan", "demo", "--gpus", "8xA100-40GB", "--seq-len", "0"], ["prepare"],
    ["prepare", "--source", "/nowhere", "--out", "x"],
    ["prepare", "--source", "embedded", "--out", "/dev/null/x"], ["slurm", "demo"], ["slurm", "demo", "--nodes", "x"],
    ["slurm", "demo", "--nodes", "1", "--time", "x"], ["verify-resume", "demo", "--ranks", "0"],
    ["bench", "--sizes", "x"],
    ["bench", "--rounds", "0"], ["bench", "--arms", "x"], ["doctor", "/dev/null/x", "y"],
    ["pretrain", "demo", "demo", "demo"],
]  # fmt: skip
CONFIGS = [
    "", "[]", "3", "{", '{"bf16": 3}', '{"bf16": {"enabled": "yes"}}', '{"zero_optimization": []}',
    '{"zero_optimization": {"stage": "two"}}', '{"zero_optimization": {"stage": null}}', '{"optimizer": {"params": 3}}',
    '{"optimizer": {"type": 5, "params": {"lr": "x"}}}', '{"optimizer": {"params": {"betas": 3}}}',
    '{"optimizer": {"params": {"lr": null}}}', '{"train_batch_size": "8"}', '{"train_batch_size": -8}',
    '{"train_batch_size": 8.5}', '{"train_micro_batch_size_per_gpu": 0}', '{"gradient_clipping": "x"}',
    '{"gradient_clipping": -1}', '{"gradient_clipping": null}', '{"gradient_accumulation_steps": [1]}',
    '{"torch_autocast": {"enabled": true, "dtype": 7}}', '{"zero_optimization": {"offload_optimizer": 3}}',
    '{"fp16": {"enabled": true}, "bf16": {"enabled": true}}', '{"optimizer": {"params": {"eps": "auto"}}}', "\xff\xfe",
]  # fmt: skip


def one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> int:
    """The exit code, 0 or 2; with 2, one line was said, and what it says is no Python."""
    try:
        code = main(arguments)
    except SystemExit as end:  # argparse, of --help alone
        code = int(end.code or 0)
    said = capsys.readouterr().err
    assert code in (0, 2), f"{arguments}: {code}"
    if code == 2:
        assert said.startswith("sctd: error: ") and said.count("\n") == 1 and len(said) < 7000, f"{arguments}: {said}"
        assert "Traceback" not in said and "object at 0x" not in said, f"{arguments}: {said}"
    return code


def spoil(tree: dict[str, object], chance: random.Random) -> None:
    """Change one thing somewhere in a recipe."""
    node = tree
    while True:
        key = chance.choice(list(node)) if node else "x"
        below = node.get(key)
        if not isinstance(below, dict) or chance.random() < 0.2:
            break
        node = below
    how = chance.random()
    if how < 0.7:
        node[key] = chance.choice(VALUES)
    elif how < 0.85:
        node[key + chance.choice("xyz_")] = node.get(key)
    else:
        node[chance.choice([1, "", "a.b", "stepz"])] = chance.choice(VALUES)  # type: ignore[index]


@pytest.mark.parametrize("seed", range(8))
def test_spoilt_recipes(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chance, codes = random.Random(seed), []
    for number in range(15):
        tree = to_dict(load_config(chance.choice(recipe_names())))
        for _ in range(chance.randint(1, 3)):
            spoil(tree, chance)
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
        codes.append(one_line(["pretrain", str(path), "--print-config"], capsys))
    assert 2 in codes, "nothing was refused"


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_recipes_that_are_none(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    one_line(["pretrain", str(path), "--print-config"], capsys)


@pytest.mark.parametrize("override", OVERRIDES)
def test_overrides(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    one_line(["pretrain", "demo", override, "--print-config"], capsys)


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_command_lines(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert one_line(line, capsys) == 2


@pytest.mark.parametrize("text", CONFIGS, ids=range(len(CONFIGS)))
def test_deepspeed_configs(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(text.encode("latin-1"))
    code = one_line(["pretrain", "demo", "--deepspeed_config", str(path), "--print-config"], capsys)
    try:
        json.loads(text)
    except ValueError:
        assert code == 2


def test_a_process_says_it_the_same_way(tmp_path: Path) -> None:
    for arguments in (["pretrain", "demo", "train.steps=nan", f"run.dir={tmp_path}"], ["plan", "demo", "--gpus", "x"]):
        done = sctd(*arguments)
        assert done.returncode == 2 and done.stderr.startswith("sctd: error: ") and done.stderr.count("\n") == 1
