"""Recipe and DeepSpeed JSON become one: the configuration as it will run, and the full JSON for the engine."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from sctd.config import Config, OptimizerConfig, config_from_dict, merge_dicts, to_dict
from sctd.errors import UserError

_PRECISION_KEYS = ("bf16", "fp16", "torch_autocast")
_FLOAT32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_OFFLOADS = ("offload_optimizer", "offload_param")


def read_deepspeed_json(path: str | None) -> dict[str, Any]:
    """The user's DeepSpeed configuration; `auto` values are left to the recipe.

    Raises:
        UserError: no such file, or not JSON.
    """
    if path is None:
        return {}
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"DeepSpeed config {path}: {error.strerror}; pass an existing JSON file") from None
    except ValueError as error:
        raise UserError(f"DeepSpeed config {path}: not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"DeepSpeed config {path}: must be a JSON object, found {type(tree).__name__}")
    for section in (*_PRECISION_KEYS, "zero_optimization", "optimizer", "scheduler"):
        if not isinstance(tree.get(section, {}), dict):
            raise UserError(f"DeepSpeed config {path}: '{section}' must be an object, found {tree[section]!r}")
    if not isinstance(tree.get("optimizer", {}).get("params", {}), dict):
        raise UserError(f"DeepSpeed config {path}: 'optimizer.params' must be an object")
    return _without_auto(tree)


def _without_auto(tree: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in tree.items():
        inner = _without_auto(value) if isinstance(value, dict) else value
        if value != "auto" and (inner != {} or value == {}):  # a section of nothing but `auto` is left out
            kept[key] = inner
    return kept


def resolve(config: Config, user: dict[str, Any], world_size: int) -> tuple[Config, dict[str, Any]]:
    """Merge recipe and DeepSpeed JSON: the configuration as it will run, and the full JSON for the engine.

    Where both set a value, the JSON wins, and the returned configuration has its value.

    Raises:
        UserError: batch sizes that do not multiply out, two precisions at once, a stage that is not supported, or what
            Muon does not go with.
    """
    total, micro, accumulation = _batch_sizes(config, user, world_size)
    stage, offloads = _zero(config, user)
    precision = _precision(config, user, stage)
    _check_muon(config.optimizer, user, stage, offloads)
    optimizer, clip = config.optimizer, user.get("gradient_clipping", config.optimizer.clip)
    shared = {key: getattr(optimizer, key) for key in ("lr", "betas", "eps", "weight_decay")}
    params = shared | user.get("optimizer", {}).get("params", {})
    config = replace(
        config,
        train=replace(config.train, batch_size=total, micro_batch_size=micro, precision=precision, zero_stage=stage),
        optimizer=replace(optimizer, clip=clip, **{key: params[key] for key in shared}),
    )
    try:  # with the JSON's values in it, the configuration is checked again
        config = config_from_dict(to_dict(config))
    except UserError as error:
        raise UserError(f"DeepSpeed config: {error}") from None
    optimizer = config.optimizer
    base: dict[str, Any] = {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.clip,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it would synchronise the device twice a micro-step
        "zero_optimization": {"stage": stage},
    }
    if user.get("optimizer", {}).get("type") in ("Adam", "AdamW"):
        base["optimizer"] = {"params": {key: getattr(optimizer, key) for key in shared}}
    if "offload_optimizer" in offloads:
        base["zero_force_ds_cpu_optimizer"] = False  # it would insist on its own Adam; torch's runs on CPUs too
    if optimizer.name == "apex_lamb":
        base["zero_allow_untested_optimizer"] = True
    if "torch_autocast" not in user and not (stage == 0 and any(key in user for key in _PRECISION_KEYS)):
        base |= _precision_block(precision, stage)
    return config, merge_dicts(base, user)


def _precision_block(precision: str, stage: int) -> dict[str, Any]:
    """Gradients are summed over micro-batches and ranks in float32; an overflow skips the step and is counted."""
    if precision in ("auto", "fp32"):  # `auto` is decided on the machine of the run
        return {}
    if stage == 0:  # float32 parameters under autocast: without ZeRO nothing keeps a float32 copy
        return {"torch_autocast": {"enabled": True, "dtype": {"bf16": "bfloat16", "fp16": "float16"}[precision]}}
    if precision == "bf16":
        return {"bf16": {"enabled": True, "check_grad_overflow": True}, **_FLOAT32_SUMS}
    return {"fp16": {"enabled": True, "initial_scale_power": 16}, **_FLOAT32_SUMS}


def _batch_sizes(config: Config, user: dict[str, Any], world: int) -> tuple[int, int, int]:
    total, micro, accumulation = given = [user.get(key) for key in _BATCH_KEYS]
    for key, value in zip(_BATCH_KEYS, given, strict=True):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UserError(f"DeepSpeed config: {key} is {value!r}: it must be a whole number of at least 1")
    if total is None:
        total = micro * accumulation * world if micro and accumulation else config.train.batch_size
    if micro is None:
        micro = total // (accumulation * world) if accumulation else config.train.micro_batch_size or total // world
        micro = max(1, min(micro, total // world))
    if accumulation is None:
        accumulation = max(1, total // (micro * world))
    if micro * accumulation * world != total:
        raise UserError(
            f"batch sizes do not multiply out: {micro} rows a micro-batch x {accumulation} accumulation steps x "
            f"{world} ranks = {micro * accumulation * world}, not {total}; "
            "change train.batch_size, train.micro_batch_size, the number of ranks (GPUs) or the DeepSpeed config"
        )
    return total, micro, accumulation


def _zero(config: Config, user: dict[str, Any]) -> tuple[int, list[str]]:
    """The stage of ZeRO, and what it keeps on the CPU."""
    zero = user.get("zero_optimization", {})
    stage = zero.get("stage", config.train.zero_stage)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"DeepSpeed config: zero_optimization.stage is {stage!r}: it must be 0, 1, 2 or 3")
    offloads = []
    for name in _OFFLOADS:
        section = zero.get(name, {})
        if not isinstance(section, dict):
            raise UserError(f"DeepSpeed config: zero_optimization.{name} must be an object, found {section!r}")
        device = section.get("device", "none")
        if device not in ("none", "cpu"):
            raise UserError(f"DeepSpeed config: zero_optimization.{name}.device is {device!r}: use 'none' or 'cpu'")
        if device == "cpu" and stage == 0:
            raise UserError(f"DeepSpeed config: zero_optimization.{name} needs stage 1, 2 or 3, found stage 0")
        offloads += [name] if device == "cpu" else []
    return stage, offloads


def _precision(config: Config, user: dict[str, Any], stage: int) -> str:
    sections = {name: user.get(name, {}) for name in _PRECISION_KEYS}
    asked = [name for name, section in sections.items() if section.get("enabled")]
    if len(asked) > 1:
        raise UserError(f"DeepSpeed config: {' and '.join(asked)} are enabled at once; enable one")
    if not asked:
        return "fp32" if any(name in user for name in _PRECISION_KEYS) else config.train.precision
    if asked[0] == "torch_autocast":
        return {"bfloat16": "bf16", "float16": "fp16"}.get(sections["torch_autocast"].get("dtype", ""), "bf16")
    if asked[0] == "fp16" and stage == 0:
        # DeepSpeed 0.19 divides the gradients by the loss scale there without having multiplied the loss by it.
        raise UserError("DeepSpeed config: fp16 without ZeRO trains on wrong gradients; use stage 1 or torch_autocast")
    return asked[0]


def _check_muon(cfg: OptimizerConfig, user: dict[str, Any], stage: int, offloads: list[str]) -> None:
    name = user.get("optimizer", {}).get("type", "")
    if str(name).lower() == "muon":
        raise UserError(
            f"DeepSpeed config: optimizer.type is {name!r}, which treats fused matrices as one: remove that section, "
            "and use optimizer.name=muon"
        )
    if cfg.name != "muon":
        return
    misfits = {
        f"DeepSpeed config: section '{section}'": f"remove it, and set {ours}.* in the recipe"
        for section, ours in (("optimizer", "optimizer"), ("scheduler", "schedule"))
        if section in user
    }
    what = "DeepSpeed config: zero_optimization."
    misfits |= {what + each: "its products are too slow on a CPU, remove it" for each in offloads}
    if stage == 3:
        misfits["ZeRO stage 3"] = "it needs whole matrices, use train.zero_stage=0, 1 or 2"
    if stage == 0 and user.get("bf16", {}).get("enabled"):
        misfits["bf16 without ZeRO"] = "use stage 1 or torch_autocast"
    for what, instead in misfits.items():
        raise UserError(f"{what} does not go with optimizer.name=muon: {instead}, or use optimizer.name=adamw")
