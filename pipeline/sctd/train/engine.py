"""The DeepSpeed engine of a run: its configuration, its optimizer, and the hybrid schedule hook on it."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from torch import nn

from sctd.config import Config, merge_dicts
from sctd.errors import UserError
from sctd.objective.schedule import HybridScheduleHook
from sctd.train.distributed import World

_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


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
    return _without_auto(tree)


def _without_auto(tree: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in tree.items() if value != "auto"}
    return {key: _without_auto(value) if isinstance(value, dict) else value for key, value in kept.items()}


def resolve(config: Config, user: dict[str, Any], world_size: int) -> tuple[Config, dict[str, Any]]:
    """Merge recipe and DeepSpeed JSON: the configuration as it will run, and the full JSON for the engine.

    Where both speak, the JSON wins, and the returned configuration says what it says.

    Raises:
        UserError: batch sizes that do not multiply out, two precisions at once, or a stage that is not supported.
    """
    total, micro, accumulation = _batch_sizes(config, user, world_size)
    precision = _precision(config, user)
    stage = user.get("zero_optimization", {}).get("stage", config.train.zero_stage)
    if stage not in (0, 1, 2):
        raise UserError(f"DeepSpeed config: zero_optimization.stage is {stage!r}: it must be 0, 1 or 2")
    clip = user.get("gradient_clipping", config.optimizer.clip)
    rate = user.get("optimizer", {}).get("params", {}).get("lr", config.optimizer.lr)
    config = replace(
        config,
        train=replace(config.train, batch_size=total, micro_batch_size=micro, precision=precision, zero_stage=stage),
        optimizer=replace(config.optimizer, clip=clip, lr=rate),
    )
    base: dict[str, Any] = {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "steps_per_print": None,
        "zero_optimization": {"stage": stage},
    }
    if config.optimizer.name == "apex_lamb":
        base["zero_allow_untested_optimizer"] = True
    if precision == "bf16":
        # Gradients are summed over micro-batches and ranks in float32; an overflow skips the step and is counted.
        base["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if stage > 0:
            base["data_types"] = {"grad_accum_dtype": "fp32"}
    elif precision == "fp16":
        base["fp16"] = {"enabled": True, "initial_scale_power": 16}
    return config, merge_dicts(base, user)


def _batch_sizes(config: Config, user: dict[str, Any], world: int) -> tuple[int, int, int]:
    total, micro, accumulation = (user.get(key) for key in _BATCH_KEYS)
    for key in _BATCH_KEYS:
        value = user.get(key)
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
            "change train.batch_size, train.micro_batch_size or the DeepSpeed config"
        )
    return total, micro, accumulation


def _precision(config: Config, user: dict[str, Any]) -> str:
    asked = [name for name in ("bf16", "fp16") if user.get(name, {}).get("enabled")]
    if len(asked) == 2:
        raise UserError("DeepSpeed config: bf16 and fp16 are both enabled; enable one")
    if asked:
        return asked[0]
    refused = [name for name in ("bf16", "fp16") if user.get(name, {}).get("enabled") is False]
    return "fp32" if config.train.precision in refused else config.train.precision


def build_engine(
    model: nn.Module, config: Config, ds_config: dict[str, Any], hook: HybridScheduleHook, world: World
) -> DeepSpeedEngine:
    """`deepspeed.initialize` with the run's optimizer, and the hybrid schedule as a forward pre-hook."""
    groups = list(_parameter_groups(model, config.optimizer.weight_decay))
    optimizer = None if "optimizer" in ds_config else _optimizer(groups, config, world.device)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=groups, optimizer=optimizer, config=ds_config, dist_init_required=False
    )
    engine.register_forward_pre_hook(hook, with_kwargs=True)
    return engine


def _parameter_groups(model: nn.Module, weight_decay: float) -> Iterable[dict[str, Any]]:
    """Matrices decay; biases and LayerNorm do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    yield {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay}
    yield {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}


def _optimizer(groups: list[dict[str, Any]], config: Config, device: torch.device) -> torch.optim.Optimizer:
    cfg = config.optimizer
    common = {"lr": cfg.lr, "betas": cfg.betas, "eps": cfg.eps}
    if cfg.name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **common)
    if cfg.name == "deepspeed_adamw":
        if device.type == "cuda":
            return deepspeed.ops.adam.FusedAdam(groups, adam_w_mode=True, **common)
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **common)
    try:
        from apex.optimizers import FusedAdam, FusedLAMB
    except ImportError:
        raise UserError(
            f"optimizer.name is {cfg.name}, but apex is not installed: build it from github.com/NVIDIA/apex "
            "with --cpp_ext and --cuda_ext, or use optimizer.name=adamw"
        ) from None
    return FusedAdam(groups, adam_w_mode=True, **common) if cfg.name == "apex_adam" else FusedLAMB(groups, **common)
