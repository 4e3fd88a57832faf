"""Recipe and DeepSpeed JSON become one configuration: the JSON wins, contradictions are errors that show the sum."""

import json
from pathlib import Path
from typing import Any

import pytest

from sctd.config import Config, load_config, to_yaml
from sctd.errors import UserError
from sctd.train.engine.resolve import read_deepspeed_json, resolve
from sctd.train.keep.run_folder import check_same_run


def config(**train: Any) -> Config:
    words = [f"train.{key}={value}" for key, value in train.items()]
    return load_config("demo", ["optimizer.name=adamw", *words])


@pytest.mark.parametrize(
    ("recipe", "user", "world", "expected"),
    [
        ({"batch_size": 64}, {}, 1, (64, 64, 1)),
        ({"batch_size": 64}, {}, 4, (64, 16, 1)),
        ({"batch_size": 64, "micro_batch_size": 8}, {}, 2, (64, 8, 4)),
        ({"batch_size": 8, "micro_batch_size": 32}, {}, 2, (8, 4, 1)),
        ({"batch_size": 64}, {"train_batch_size": 128}, 2, (128, 64, 1)),
        ({"batch_size": 64}, {"train_micro_batch_size_per_gpu": 4}, 2, (64, 4, 8)),
        ({"batch_size": 64}, {"gradient_accumulation_steps": 4}, 2, (64, 8, 4)),
        (
            {"batch_size": 64, "micro_batch_size": 2},
            {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3},
            5,
            (60, 4, 3),
        ),
    ],
)
def test_batch_sizes(recipe: dict[str, int], user: dict[str, int], world: int, expected: tuple[int, int, int]) -> None:
    resolved, merged = resolve(config(**recipe), user, world)
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert tuple(merged[key] for key in keys) == expected
    assert (resolved.train.batch_size, resolved.train.micro_batch_size) == expected[:2]


@pytest.mark.parametrize(
    ("recipe", "user", "world", "words"),
    [
        (
            {"batch_size": 64, "micro_batch_size": 24},
            {},
            1,
            "24 rows a micro-batch x 2 accumulation steps x 1 ranks",
        ),
        ({"batch_size": 10}, {}, 4, "= 8, not 10"),
        (
            {},
            {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 2},
            2,
            "8 rows a micro-batch x 2 accumulation steps x 2 ranks = 32, not 64",
        ),
        ({}, {"train_batch_size": 0}, 1, "train_batch_size is 0"),
    ],
)
def test_contradicting_batch_sizes(recipe: dict[str, int], user: dict[str, int], world: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve(config(**recipe), user, world)


def test_the_json_wins_and_the_configuration_says_so() -> None:
    user = {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000},
        "gradient_clipping": 0.5,
        "optimizer": {"type": "Adam", "params": {"lr": 0.25}},
    }
    resolved, merged = resolve(config(), user, 1)
    assert resolved.train.precision == "bf16" and resolved.train.zero_stage == 2
    assert resolved.optimizer.clip == 0.5 and resolved.optimizer.lr == 0.25
    assert merged["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert merged["optimizer"] == {
        "type": "Adam",
        "params": {"lr": 0.25, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.01},
    }
    assert merged["timers"] == {"throughput": {"enabled": False}}
    with pytest.raises(UserError, match="optimizer.lr"):
        resolve(config(), {"optimizer": {"type": "Adam", "params": {"lr": -1}}}, 1)


def test_gradients_are_summed_in_float32_unless_the_json_says_otherwise() -> None:
    bf16 = {"bf16": {"enabled": True}}
    assert resolve(config(), bf16, 1)[1]["data_types"] == {"grad_accum_dtype": "fp32"}
    asked = resolve(config(), {**bf16, "data_types": {"grad_accum_dtype": "bf16"}}, 1)[1]
    assert asked["data_types"] == {"grad_accum_dtype": "bf16"}
    autocast = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    resolved, merged = resolve(config(), autocast, 1)
    assert resolved.train.precision == "bf16" and "bf16" not in merged and "data_types" not in merged


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_precision_of_the_recipe(precision: str, stage: int) -> None:
    _, merged = resolve(config(precision=precision, zero_stage=stage), {}, 1)
    sections = {key for key in ("bf16", "fp16", "torch_autocast") if key in merged}
    expected = set() if precision == "fp32" else {"torch_autocast" if stage == 0 else precision}
    assert sections == expected
    assert ("data_types" in merged) == (precision != "fp32" and stage > 0)


@pytest.mark.parametrize(
    ("user", "words"),
    [
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16 and fp16"),
        ({"zero_optimization": {"stage": 4}}, "stage is 4"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param.*'none' or 'cpu'"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, "offload_optimizer must be an object"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "stage 1, 2 or 3"),
        ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 0}}, "use stage 1 or torch_autocast"),
    ],
)
def test_combinations_that_are_refused(user: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve(config(), user, 1)


def test_json_files(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_batch_size": "auto", "bf16": {"enabled": "auto"}, "gradient_clipping": 1.0}))
    user = read_deepspeed_json(str(path))
    assert user == {"gradient_clipping": 1.0}
    assert resolve(config(precision="bf16"), user, 1)[0].train.precision == "bf16"
    assert read_deepspeed_json(None) == {}
    for text, words in (
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ('{"bf16": true}', "'bf16' must be an object"),
        ('{"optimizer": "Adam"}', "'optimizer' must be an object"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            read_deepspeed_json(str(path))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_open_precision_stays_open(stage: int) -> None:
    """Until the device is known: for what only looks at a configuration."""
    resolved, merged = resolve(config(precision="auto", zero_stage=stage), {}, 2)
    assert resolved.train.precision == "auto" and not {"bf16", "fp16", "torch_autocast"} & merged.keys()
    decided, _ = resolve(config(precision="auto", zero_stage=stage), {"bf16": {"enabled": stage > 0}}, 2)
    assert decided.train.precision == ("bf16" if stage else "fp32")


@pytest.mark.parametrize(("asked", "taken"), [("auto", True), ("bf16", True), ("fp32", False)])
def test_auto_at_a_resume_is_what_the_run_has(tmp_path: Path, asked: str, taken: bool) -> None:
    started, ds_config = resolve(config(precision="bf16"), {}, 1)
    (tmp_path / "config.yaml").write_text(to_yaml(started), encoding="utf-8")
    (tmp_path / "deepspeed.json").write_text(json.dumps(ds_config), encoding="utf-8")
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    again, ds_config = resolve(config(precision=asked), {}, 1)
    if taken:
        check_same_run(again, ds_config, tmp_path)
    else:
        with pytest.raises(UserError, match="train.precision is 'fp32'"):
            check_same_run(again, ds_config, tmp_path)
