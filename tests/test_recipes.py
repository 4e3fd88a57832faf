"""Recipes: those of the paper are held to the last key, all others are what their names say."""

import dataclasses
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from sctd import config as module
from sctd.config import FAMILIES, Config, config_from_dict, load_config, merge_dicts, recipe_names, to_dict, to_yaml

SHIPPED = sorted(path.stem for path in (Path(module.__file__).parent / "recipes").glob("*.yaml"))
SECTIONS = {f.name: f.default_factory for f in fields(Config) if f.name != "arm"}


def test_recipes_are_listed() -> None:
    sizes, arms = ("mini", "base", "large"), ("baseline", "token-drop", "sctd")
    grid = [f"{family}-{size}-{arm}" for family in FAMILIES for size in sizes for arm in arms]
    assert recipe_names() == SHIPPED == sorted([*grid, "continue", "demo", "demo-bert"])


@pytest.mark.parametrize("recipe", SHIPPED)
def test_every_recipe_loads_and_round_trips(recipe: str) -> None:
    config = load_config(recipe)
    assert config.run.dir == f"runs/{recipe}"
    assert config_from_dict(yaml.safe_load(to_yaml(config))) == config
    assert config_from_dict(to_dict(config)) == config


@pytest.mark.parametrize("recipe", [name for name in SHIPPED if name.split("-")[0] in FAMILIES])
def test_names_say_what_recipes_hold(recipe: str) -> None:
    family, size, arm = recipe.split("-", 2)
    config = load_config(recipe)
    assert config.arm == arm.replace("-", "_") and config.model.family == family
    shape = config.model.layers, config.model.hidden_size, config.model.heads, config.model.intermediate_size
    known = {
        "bert": {"mini": (4, 256, 4, 1024), "base": (12, 768, 12, 3072), "large": (24, 1024, 16, 4096)},
        "modernbert": {"mini": (6, 256, 4, 384), "base": (22, 768, 12, 1152), "large": (28, 1024, 16, 2624)},
    }
    assert shape == known[family][size]
    if size != "mini":
        assert (config.train.steps, config.train.batch_size) == (250_000, 1024)


@pytest.mark.parametrize("size", ["mini", "base", "large"])
def test_arms_of_a_size_differ_in_the_arm_alone(size: str) -> None:
    configs = {arm: load_config(f"bert-{size}-{arm}") for arm in ("baseline", "token-drop", "sctd")}
    plain = [dataclasses.replace(c, arm="", run=dataclasses.replace(c.run, dir="")) for c in configs.values()]
    assert plain[0] == plain[1] == plain[2]


# What the paper's recipes compute, to the last key: a later default must not change it.
PAPER: dict[str, Any] = {
    "run": {"seed": 1, "examples": [], "branch_from": ""},
    "init": {"from": "", "positions": "error"},
    "data": {
        "corpus": "", "seq_len": 0, "warmup_seq_len": 0, "warmup_steps": 0, "mask_probability": 0.15,
        "mask_stages": [], "whole_word": False, "mask_by": "random", "span_length": 0.0, "replace": [0.8, 0.1, 0.1],
        "skip_samples": [],
    },
    "model": {
        "family": "bert", "vocab_size": 0, "max_positions": 512, "positions": "learned", "theta": None,
        "window": 0, "global_every": 3, "local_theta": 10_000.0, "dropout": 0.1, "attention_dropout": 0.1,
        "layer_norm_eps": 1e-12, "initializer_range": 0.02, "keep_ratio": 0.5,
        "first_dropped": None, "full_tail": 1, "layer_norm": "native",
    },
    "attention": {"scope": "row"},
    "objective": {
        "interval": 10, "kl_weight": 0.05, "mlm_drop": True, "mlm_full": True, "kl_global": True, "kl_local": True,
        "semantic_positions": "cls", "detach_teacher": True, "importance_beta": 0.995,
        "importance_warmup": None,
    },
    "optimizer": {
        "name": "adamw", "muon_lr": 0.02, "betas": [0.9, 0.999], "eps": 1e-6, "weight_decay": 0.01, "clip": 1.0,
    },
    "schedule": {
        "name": "polynomial", "power": 1.0, "decay_steps": 0, "final_lr": 0.0, "full_start": 0, "full_finish": 0,
    },
    "train": {
        "stop_at": None, "precision": "auto", "zero_stage": 1, "compile": False, "cuda_graphs": False,
        "checkpoint_activations": False, "rollback_after": 5, "timeout": 1800.0, "valid_rows": 1024,
        "keep_checkpoints": 2, "async_save": True,
    },
    "evaluation": {"every": 0, "probes": [], "task": "", "steps": 100, "data_dir": ""},
}  # fmt: skip
PAPER_SIZES: dict[str, dict[str, Any]] = {
    "mini": {
        "model": {"layers": 4, "hidden_size": 256, "heads": 4, "intermediate_size": 1024},
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup_steps": 1000},
        "train": {
            "steps": 20_000, "batch_size": 256, "micro_batch_size": None, "log_every": 20, "valid_every": 1000,
            "save_every": 1000,
        },
    },
    "base": {
        "model": {"layers": 12, "hidden_size": 768, "heads": 12, "intermediate_size": 3072},
        "optimizer": {"lr": 2e-4},
        "schedule": {"warmup_steps": 25_000},
        "train": {
            "steps": 250_000, "batch_size": 1024, "micro_batch_size": 32, "log_every": 50, "valid_every": 5000,
            "save_every": 2500,
        },
    },
    "large": {
        "model": {"layers": 24, "hidden_size": 1024, "heads": 16, "intermediate_size": 4096},
        "optimizer": {"lr": 2e-4},
        "schedule": {"warmup_steps": 25_000},
        "train": {
            "steps": 250_000, "batch_size": 1024, "micro_batch_size": 16, "log_every": 50, "valid_every": 5000,
            "save_every": 2500,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("arm", ["baseline", "token-drop", "sctd"])
@pytest.mark.parametrize("size", list(PAPER_SIZES))
def test_the_papers_recipes_are_these(size: str, arm: str) -> None:
    recipe = f"bert-{size}-{arm}"
    mine = {"arm": arm.replace("-", "_"), "run": {"dir": f"runs/{recipe}"}}
    assert to_dict(load_config(recipe)) == merge_dicts(merge_dicts(PAPER, PAPER_SIZES[size]), mine)


@pytest.mark.parametrize("size", ["mini", "base", "large"])
def test_the_modern_recipes(size: str) -> None:
    """The baseline, and the arms between a full start and a full finish that is part of the decay."""
    baseline, *arms = (load_config(f"modernbert-{size}-{arm}") for arm in ("baseline", "token-drop", "sctd"))
    model, train, schedule = baseline.model, baseline.train, baseline.schedule
    assert model.hidden_size // model.heads == 64 and model.intermediate_size % 64 == 0
    assert (model.dropout, model.attention_dropout, model.layer_norm_eps) == (0.0, 0.0, 1e-5)
    assert schedule.name == "wsd" and 0 < schedule.warmup_steps < schedule.decay_steps < train.steps / 2
    assert schedule.full_start == schedule.full_finish == 0 and train.precision == "auto"
    for config in arms:
        phases = config.schedule.full_start, config.schedule.full_finish
        assert phases == (0.3 * train.steps, 0.1 * train.steps) and phases[1] <= schedule.decay_steps
        plain = dataclasses.replace(config.schedule, full_start=0, full_finish=0)
        assert dataclasses.replace(config, arm="baseline", schedule=plain, run=baseline.run) == baseline


def test_the_demos() -> None:
    """The same run in both families, small enough for two cores, with everything in it."""
    modern, bert = load_config("demo"), load_config("demo-bert")
    assert (modern.model.family, bert.model.family) == ("modernbert", "bert")
    assert bert.model.positions == "sinusoidal"
    for config in (modern, bert):
        assert config.arm == "sctd" and config.optimizer.name == "muon" and config.run.dir.startswith("runs/demo")
        schedule, steps = config.schedule, config.train.steps
        assert 0 < schedule.full_start < steps - schedule.full_finish < steps <= 3000
        assert schedule.full_finish <= schedule.decay_steps
        assert len(config.run.examples) == 3 and config.data.corpus == "runs/demo-corpus"
    assert (modern.train, modern.schedule, modern.data) == (bert.train, bert.schedule, bert.data)


def test_defaults_are_the_methods() -> None:
    config = Config()
    objective, model = config.objective, config.model
    assert (objective.interval, objective.kl_weight, objective.importance_beta) == (10, 0.05, 0.995)
    assert (objective.semantic_positions, objective.detach_teacher) == ("cls", True)
    assert all((objective.mlm_drop, objective.mlm_full, objective.kl_global, objective.kl_local))
    assert (model.keep_ratio, model.first_dropped, model.full_tail) == (0.5, None, 1)
    assert config.data.mask_probability == 0.15 and config.data.mask_stages == ()
    assert (config.schedule.full_start, config.schedule.full_finish) == (0, 0)
    assert (model.family, model.positions, config.train.precision) == ("bert", "learned", "auto")
