"""The DeepSpeed engine of a run: its configuration, its optimizer, and the hybrid schedule hook on it."""

import contextlib
import io
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from sctd.config import Config, OptimizerConfig, config_from_dict, merge_dicts, to_dict, validate
from sctd.errors import UserError
from sctd.objective.schedule import HybridScheduleHook
from sctd.train.engine.distributed import World
from sctd.train.engine.muon import Muon, layer_matrices

_PRECISION_KEYS = ("bf16", "fp16", "torch_autocast")
_FLOAT32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
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
        if value != "auto" and (inner != {} or value == {}):  # a section of nothing but `auto` says nothing
            kept[key] = inner
    return kept


def resolve(config: Config, user: dict[str, Any], world_size: int) -> tuple[Config, dict[str, Any]]:
    """Merge recipe and DeepSpeed JSON: the configuration as it will run, and the full JSON for the engine.

    Where both speak, the JSON wins, and the returned configuration says what it says.

    Raises:
        UserError: batch sizes that do not multiply out, two precisions at once, a stage that is not supported, or what
            Muon does not go with.
    """
    total, micro, accumulation = _batch_sizes(config, user, world_size)
    stage = user.get("zero_optimization", {}).get("stage", config.train.zero_stage)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"DeepSpeed config: zero_optimization.stage is {stage!r}: it must be 0, 1, 2 or 3")
    offloads = _offloads(user, stage)
    precision = _precision(config, user, stage)
    _check_muon(config.optimizer, user, stage)
    clip = user.get("gradient_clipping", config.optimizer.clip)
    optimizer = config.optimizer
    shared = {key: getattr(optimizer, key) for key in ("lr", "betas", "eps", "weight_decay")}
    params = shared | user.get("optimizer", {}).get("params", {})
    config = replace(
        config,
        train=replace(config.train, batch_size=total, micro_batch_size=micro, precision=precision, zero_stage=stage),
        optimizer=replace(optimizer, clip=clip, **{key: params[key] for key in shared}),
    )
    if user:  # whatever its values are, they stand in the configuration now
        try:
            config = config_from_dict(to_dict(config))
        except UserError as error:
            raise UserError(f"DeepSpeed config: {error}") from None
    clip, params = config.optimizer.clip, params | {key: getattr(config.optimizer, key) for key in shared}
    validate(config)
    base: dict[str, Any] = {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it would synchronise the device twice a micro-step
        "zero_optimization": {"stage": stage},
    }
    if user.get("optimizer", {}).get("type") in ("Adam", "AdamW"):
        base["optimizer"] = {"params": {key: params[key] for key in shared}}
    if offloads:  # DeepSpeed would insist on its own CPU Adam; torch's fused one runs on CPUs too
        base["zero_force_ds_cpu_optimizer"] = False
    if config.optimizer.name == "apex_lamb":
        base["zero_allow_untested_optimizer"] = True
    if "torch_autocast" not in user and not (stage == 0 and any(key in user for key in _PRECISION_KEYS)):
        base |= _precision_block(precision, stage)
    return config, merge_dicts(base, user)


def _precision_block(precision: str, stage: int) -> dict[str, Any]:
    """Gradients are summed over micro-batches and ranks in float32; an overflow skips the step and is counted."""
    if precision in ("auto", "fp32"):  # what `auto` becomes is known where the run is
        return {}
    if stage == 0:  # float32 parameters under autocast: without ZeRO there is nobody to keep a float32 copy
        return {"torch_autocast": {"enabled": True, "dtype": {"bf16": "bfloat16", "fp16": "float16"}[precision]}}
    if precision == "bf16":
        return {"bf16": {"enabled": True, "check_grad_overflow": True}, **_FLOAT32_SUMS}
    return {"fp16": {"enabled": True, "initial_scale_power": 16}, **_FLOAT32_SUMS}


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


def _offloads(user: dict[str, Any], stage: int) -> bool:
    """Whether the optimizer runs on the CPU, its states kept there."""
    zero = user.get("zero_optimization", {})
    for name in ("offload_optimizer", "offload_param"):
        section = zero.get(name, {})
        if not isinstance(section, dict):
            raise UserError(f"DeepSpeed config: zero_optimization.{name} must be an object, found {section!r}")
        device = section.get("device", "none")
        if device not in ("none", "cpu"):
            raise UserError(f"DeepSpeed config: zero_optimization.{name}.device is {device!r}: use 'none' or 'cpu'")
        if device == "cpu" and stage == 0:
            raise UserError(f"DeepSpeed config: zero_optimization.{name} needs stage 1, 2 or 3, found stage 0")
    return zero.get("offload_optimizer", {}).get("device") == "cpu"


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


def _check_muon(cfg: OptimizerConfig, user: dict[str, Any], stage: int) -> None:
    name = user.get("optimizer", {}).get("type", "")
    if str(name).lower() == "muon":
        raise UserError(
            f"DeepSpeed config: optimizer.type is {name!r}, which takes fused matrices for one: remove that section, "
            "and use optimizer.name=muon"
        )
    if cfg.name != "muon":
        return
    for section, ours in (("optimizer", "optimizer"), ("scheduler", "schedule")):
        if section in user:
            raise UserError(
                f"DeepSpeed config: the section '{section}' does not go with optimizer.name=muon: remove it, and set "
                f"{ours}.* in the recipe, or use optimizer.name=adamw"
            )
    for name in ("offload_optimizer", "offload_param"):
        if user.get("zero_optimization", {}).get(name, {}).get("device", "none") != "none":
            raise UserError(
                f"DeepSpeed config: zero_optimization.{name} does not go with optimizer.name=muon, whose products are "
                "too much for a CPU: remove it, or use optimizer.name=adamw"
            )
    if stage == 3:
        raise UserError(
            "ZeRO stage 3 does not go with optimizer.name=muon, which needs whole matrices: use train.zero_stage=0, "
            "1 or 2, or optimizer.name=adamw"
        )
    if stage == 0 and user.get("bf16", {}).get("enabled"):
        raise UserError(
            "DeepSpeed config: bf16 without ZeRO does not go with optimizer.name=muon: use stage 1 or torch_autocast"
        )


def build_engine(
    model: nn.Module, config: Config, ds_config: dict[str, Any], hook: HybridScheduleHook, world: World
) -> DeepSpeedEngine:
    """`deepspeed.initialize` with the run's optimizer, and the hybrid schedule as a forward pre-hook.

    Raises:
        UserError: a value in the DeepSpeed JSON that DeepSpeed refuses; a model without a matrix that Muon could move.
    """
    groups = list(_parameter_groups(model, config.optimizer))
    on_cpu = ds_config.get("zero_force_ds_cpu_optimizer") is False or world.device.type == "cpu"
    optimizer = None if "optimizer" in ds_config else _optimizer(groups, config, on_cpu)
    try:
        with contextlib.redirect_stdout(
            io.StringIO()
        ):  # its bf16 optimizer prints memory sizes, whatever the log level
            engine, *_ = deepspeed.initialize(
                model=model, model_parameters=groups, optimizer=optimizer, config=ds_config, dist_init_required=False
            )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"DeepSpeed config: {error.title}, '{where}': {first['msg']}") from None
    if isinstance(optimizer, Muon):
        optimizer.bind(engine)
    engine.register_forward_pre_hook(hook, with_kwargs=True)
    return engine


class StepWatch:
    """Whether the last optimizer step was applied, and its gradient norm, for every ZeRO stage and precision.

    ZeRO's optimizers skip a step whose gradients are not finite, and tell; autocast's scaler skips it in silence.
    Without ZeRO and without a scaler nobody would: there the watch itself clips, and drops such gradients.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine
        self._scaler = engine.torch_autocast_z0_gradscaler
        self.look()
        self._norm: Tensor | None = None
        self._clip = engine.gradient_clipping()
        if self._scaler is None and not engine.zero_optimization() and isinstance(engine.optimizer, Optimizer):
            engine._config.gradient_clipping = 0.0  # done here, where its norm is not thrown away
            engine.optimizer.register_step_pre_hook(self._before_step)

    def look(self) -> None:
        """Note the scale as it stands: call when it was set by anything but a step."""
        self._scale = self._scaler.get_scale() if self._scaler else 0.0

    def applied(self) -> bool:
        """Call once after each optimizer step. All ranks have the same gradients then, and the same answer."""
        if self._scaler is not None:
            before, self._scale = self._scale, self._scaler.get_scale()
            applied = self._scale >= before  # it lowers its scale where it has skipped a step
        elif self._norm is not None:
            applied = bool(self._norm.isfinite())
        else:
            return self._engine.was_step_applied()
        self._engine.skipped_steps += not applied
        return applied

    def grad_norm(self) -> Tensor | float | None:
        """Of the last step, before clipping; None where nobody computes it."""
        return self._engine.get_global_grad_norm() if self._norm is None else self._norm

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if not self._norm.isfinite():
            for parameter in parameters:
                parameter.grad = None  # a step without gradients changes nothing
        elif self._clip > 0:
            clip_grads_with_norm_(parameters, self._clip, self._norm)


def _parameter_groups(model: nn.Module, cfg: OptimizerConfig) -> Iterable[dict[str, Any]]:
    """Matrices decay; biases and norms do not. Muon's come last.

    `peak_lr` is the rate that the schedule multiplies.
    """
    found = layer_matrices(model) if cfg.name == "muon" else {}
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    others = [parameter for name, parameter in named if name not in found]
    yield {"params": [p for p in others if p.dim() > 1], "weight_decay": cfg.weight_decay, "peak_lr": cfg.lr}
    yield {"params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0, "peak_lr": cfg.lr}
    if found:
        moved = [parameter for name, parameter in named if name in found]
        rate = {"lr": cfg.muon_lr, "peak_lr": cfg.muon_lr}
        yield {"params": moved, "weight_decay": cfg.weight_decay, "muon": True, **rate}


def _optimizer(groups: list[dict[str, Any]], config: Config, on_cpu: bool) -> torch.optim.Optimizer:
    cfg = config.optimizer
    common: dict[str, Any] = {"lr": cfg.lr, "betas": cfg.betas, "eps": cfg.eps}
    if cfg.name == "muon":
        if Muon not in ZERO_SUPPORTED_OPTIMIZERS:  # else DeepSpeed would refuse it as untested
            ZERO_SUPPORTED_OPTIMIZERS.append(Muon)
        return Muon(groups, **common)
    if cfg.name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **common)
    if cfg.name == "deepspeed_adamw":
        try:
            if on_cpu:
                return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **common)
            return deepspeed.ops.adam.FusedAdam(groups, adam_w_mode=True, **common)
        except (ImportError, RuntimeError, OSError) as error:
            raise UserError(
                f"optimizer.name is deepspeed_adamw, but DeepSpeed cannot compile it here ({error}): install a C++ "
                "compiler (on GPUs also nvcc), or use optimizer.name=adamw"
            ) from None
    try:
        from apex.optimizers import FusedAdam, FusedLAMB
    except ImportError:
        raise UserError(
            f"optimizer.name is {cfg.name}, but apex is not installed: build it from github.com/NVIDIA/apex "
            "with --cpp_ext and --cuda_ext, or use optimizer.name=adamw"
        ) from None
    return FusedAdam(groups, adam_w_mode=True, **common) if cfg.name == "apex_adam" else FusedLAMB(groups, **common)
