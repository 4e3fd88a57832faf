"""The DeepSpeed engine of a run: its optimizer, and the hybrid schedule hook on it."""

import contextlib
import io
from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from sctd.config import Config, OptimizerConfig
from sctd.errors import UserError
from sctd.objective.schedule import HybridScheduleHook
from sctd.train.engine.distributed import World
from sctd.train.engine.muon import Muon, layer_matrices


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
        with contextlib.redirect_stdout(io.StringIO()):  # bf16 prints memory sizes, whatever the log level
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

    ZeRO's optimizers skip a step whose gradients are not finite, and report it; autocast's scaler skips it silently.
    Without ZeRO and without a scaler nothing would: there the watch itself clips, and drops such gradients.
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
        """Note the current scale: call it when anything but a step has set it."""
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
        """Of the last step, before clipping; None where it is not computed."""
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
