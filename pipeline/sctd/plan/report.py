"""`sctd plan`: the prediction for a recipe on a number of GPUs, as text."""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from sctd.config import Config
from sctd.errors import UserError
from sctd.plan import speed
from sctd.plan.memory import STAGES, Memory, largest_micro_batch, memory, parameter_count
from sctd.plan.speed import StepTime, step_time
from sctd.plan.workload import Workload, make_workload
from sctd.train.engine.devices import GPUS, Gpu
from sctd.train.engine.resolve import resolve

USABLE = 0.92  # of a GPU's memory: CUDA, NCCL and fragmentation take the rest
_GB = 1e9


@dataclass(frozen=True)
class Cluster:
    name: str
    gpu: Gpu
    gpus: int

    @property
    def usable(self) -> float:
        return USABLE * self.gpu.capacity

    def precision(self, config: Config) -> str:
        """`train.precision`, or what `auto` stands for here."""
        asked = config.train.precision
        return asked if asked != "auto" else "bf16" if self.gpu.bf16 else "fp16"

    def peak(self, config: Config) -> float:
        """FLOP/s of one GPU in that precision."""
        return self.gpu.single if self.precision(config) == "fp32" else self.gpu.half

    def rows(self, config: Config) -> tuple[int, int]:
        """Rows of an optimizer step for each GPU, and how many of them the recipe runs at once."""
        share = config.train.batch_size // self.gpus
        return share, min(config.train.micro_batch_size or share, share)


@dataclass(frozen=True)
class Forecast:
    """One ZeRO stage: `memory` and `limit` with the recipe's micro-batch, and the step with the one that fits.

    Args:
        largest: micro-batch that fits. micro_batch: the one that runs (0: none).
        limit: what the step waits for most: compute, bandwidth or all-reduce; capacity if the recipe's micro-batch does
            not fit.
    """

    stage: int
    memory: Memory
    largest: int
    micro_batch: int
    time: StepTime | None
    limit: str


def plan(recipe: str, config: Config, gpus: str, seq_len: int | None = None) -> str:
    """The report for `config` on GPUs such as "8xA100-40GB".

    Args:
        seq_len: tokens per row; None: `model.max_positions`.

    Raises:
        UserError: an unknown GPU, or what a run on it would refuse.
    """
    machine, positions = parse_gpus(gpus), config.model.max_positions
    if seq_len is not None and not 8 <= seq_len <= positions:
        raise UserError(f"--seq-len {seq_len}: it must be from 8 to model.max_positions, which is {positions}")
    if config.train.precision == "bf16" and not machine.gpu.bf16:
        raise UserError(f"train.precision is bf16, which {machine.name} does not support: add train.precision=fp16")
    config, _ = resolve(config, {}, machine.gpus)
    length = seq_len or positions
    workload, baseline = make_workload(config, length), make_workload(replace(config, arm="baseline"), length)
    forecasts = [forecast(workload, machine, stage) for stage in STAGES]
    parts = (
        _heading(recipe, workload, machine),
        _flops(workload, baseline),
        _memory(workload, machine, forecasts),
        _time(workload, machine, forecasts),
        _result(workload, baseline, machine, forecasts[config.train.zero_stage]),
    )
    return "\n\n".join("\n".join(lines) for lines in parts)


def parse_gpus(text: str) -> Cluster:
    """ "8xA100-40GB" or "H200-141GB" (one)."""
    found = re.fullmatch(r"(?:([1-9]\d{0,5})x)?(.+)", text, re.IGNORECASE)
    names = {name.lower(): name for name in GPUS}
    if not found or found[2].lower() not in names:
        raise UserError(f"--gpus {text!r}: write NxMODEL with a MODEL of {', '.join(GPUS)}")
    name = names[found[2].lower()]
    return Cluster(name, GPUS[name], int(found[1] or 1))


def forecast(workload: Workload, machine: Cluster, stage: int) -> Forecast:
    """Memory with the recipe's micro-batch, and the time with it or, if it does not fit, the largest that does."""
    precision, muon = machine.precision(workload.config), workload.config.optimizer.name == "muon"
    share, wanted = machine.rows(workload.config)
    taken = memory(workload.steps, machine.gpus, stage, precision, wanted, muon)
    largest = largest_micro_batch(workload.steps, machine.gpus, stage, precision, machine.usable, muon)
    micro = max((rows for rows in range(1, min(wanted, largest) + 1) if share % rows == 0), default=0)
    time, limit = None, "capacity"
    if micro:
        time = step_time(workload.steps, machine.gpu, machine.gpus, stage, precision, micro, share // micro)
    if time is not None and micro == wanted:
        parts = {"compute": time.compute, "bandwidth": time.bandwidth, "all-reduce": time.exchange}
        limit = max(parts, key=lambda name: parts[name])
    return Forecast(stage, taken, largest, micro, time, limit)


def _heading(recipe: str, workload: Workload, machine: Cluster) -> list[str]:
    config, gpu, shape = workload.config, machine.gpu, workload.work.shape
    share, micro = machine.rows(config)
    vocabulary = f"{shape.vocab_size} token ids" + ("" if config.model.vocab_size else " (assumed)")
    fabric = f"{speed.FABRIC / _GB:.0f} GB/s per GPU between nodes of {speed.NODE}, " * (machine.gpus > speed.NODE)
    return [
        f"recipe    {recipe}, arm {config.arm}, {machine.precision(config)}: a prediction from shapes and data sheets",
        f"model     {shape.family}, {shape.layers} layers x {shape.hidden_size}, {vocabulary}, "
        f"{parameter_count(shape) / 1e6:.1f}M parameters, rows of {workload.work.length} tokens",
        f"batch     {config.train.batch_size} rows per step = {machine.gpus} GPUs x {micro} at once x {share // micro}",
        f"machine   {machine.gpus} x {machine.name}: {machine.peak(config) / 1e12:g} TFLOP/s, "
        f"{gpu.bandwidth / _GB:g} GB/s, {gpu.capacity / _GB:g} GB, link {gpu.link / _GB:g} GB/s",
        f"assumed   matrix products {speed.PRODUCTS:.0%} and attention {speed.ATTENTION:.0%} of peak, memory "
        f"{speed.BANDWIDTH:.0%} and link {speed.LINK:.0%} of bandwidth,",
        f"          {USABLE:.0%} of the memory, {fabric}fused kernels, no overlap",
    ]


def _flops(workload: Workload, baseline: Workload) -> list[str]:
    """FLOPs by kind of step, and their mean."""
    rows: dict[str, float] = {}
    for phase in dict.fromkeys(step.phase for step in workload.steps):
        steps = {step: share for step, share in workload.steps.items() if step.phase is phase}
        share = sum(steps.values())
        rows[f"{phase}, {share:.0%} of steps"] = Workload(workload.config, steps).mean() / share
    rows[f"mean of {workload.config.arm}"] = workload.mean()
    if workload.work.recompute:
        rows["with recomputation"] = workload.executed()
    rows["baseline"] = baseline.mean()
    length, batch, full = workload.work.length, workload.config.train.batch_size, baseline.mean()
    return [
        f"{'FLOPs':<22}{'GF/token':>12}{'TF/step':>12}{'of baseline':>14}",
        *(
            f"  {name:<20}{flops / length / 1e9:>12.4f}{flops * batch / 1e12:>12,.1f}{flops / full:>13.1%}"
            for name, flops in rows.items()
        ),
    ]


def _memory(workload: Workload, machine: Cluster, forecasts: list[Forecast]) -> list[str]:
    """GB by part as the recipe has it; the total with activations recomputed if it stores them, or the reverse."""
    config, train = workload.config, workload.config.train
    turned = replace(train, checkpoint_activations=not train.checkpoint_activations)
    other = make_workload(replace(config, train=turned), workload.work.length)
    others = [forecast(other, machine, item.stage) for item in forecasts]
    stages = [f"ZeRO-{item.stage}" + "*" * (item.stage == train.zero_stage) for item in forecasts]
    fits = ["yes" if item.memory.total <= machine.usable else "NO" for item in forecasts]

    def sizes(name: str, items: list[Forecast], part: str = "total") -> str:
        return _row(name, [f"{getattr(item.memory, part) / _GB:.2f}" for item in items])

    return [
        _row(f"GB per GPU, {machine.rows(config)[1]} rows at once", stages),
        *(sizes(f"  {part.name.replace('_', ' ')}", forecasts, part.name) for part in fields(Memory)),
        sizes("  total", forecasts),
        _row(f"  fits in {machine.usable / _GB:.1f}", fits),
        _row("  largest micro-batch", [str(item.largest) for item in forecasts]),
        f"  with train.checkpoint_activations={str(turned.checkpoint_activations).lower()}",
        sizes("    total", others),
        _row("    largest micro-batch", [str(item.largest) for item in others]),
        "  * the recipe's stage",
    ]


def _time(workload: Workload, machine: Cluster, forecasts: list[Forecast]) -> list[str]:
    rows, tokens = workload.config.train.batch_size, workload.config.train.batch_size * workload.work.length
    steps, peak = workload.config.train.steps, machine.gpus * machine.peak(workload.config)
    by_seconds: dict[str, Callable[[float], str]] = {
        "seconds per step": lambda step: f"{step:.3f}",
        "rows/s": lambda step: f"{rows / step:,.0f}",
        "tokens/s": lambda step: f"{tokens / step:,.0f}",
        "MFU": lambda step: f"{rows * workload.mean() / step / peak:.1%}",
        "HFU": lambda step: f"{rows * workload.executed() / step / peak:.1%}",
        f"days for {steps} steps": lambda step: f"{steps * step / 86400:.2f}",
        "GPU-hours": lambda step: f"{steps * step * machine.gpus / 3600:,.0f}",
    }
    return [
        _row("time, with a micro-batch of", [str(item.micro_batch or "-") for item in forecasts]),
        *(
            _row(f"  {name}", [text(item.time.total) if item.time else "-" for item in forecasts])
            for name, text in by_seconds.items()
        ),
        _row("  bound by", [item.limit for item in forecasts]),
    ]


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<34}" + "".join(f"{cell:>12}" for cell in cells)


def _result(workload: Workload, baseline: Workload, machine: Cluster, chosen: Forecast) -> list[str]:
    arm, time = workload.config.arm, chosen.time
    if time is None:
        return [f"result    ZeRO-{chosen.stage} does not fit with one row: recompute activations, or take larger GPUs"]
    lines = [
        f"result    ZeRO-{chosen.stage}: {time.total:.3f} s per step = {time.compute:.3f} compute + "
        f"{time.bandwidth:.3f} memory traffic + {time.exchange:.3f} all-reduce; bound by {chosen.limit}"
    ]
    if chosen.micro_batch < machine.rows(workload.config)[1]:
        lines.append(f"          set train.micro_batch_size={chosen.micro_batch}: the recipe's does not fit")
    full = forecast(baseline, machine, chosen.stage).time
    if arm != "baseline" and full is not None:
        flops, seconds = 1 - workload.mean() / baseline.mean(), 1 - time.total / full.total
        lines.append(f"          {arm} saves {flops:.0%} of the baseline's FLOPs and {seconds:.0%} of its time")
    return lines
