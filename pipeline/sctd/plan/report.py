"""`sctd plan`: the prediction for a recipe on a number of GPUs, as text."""

import re
from dataclasses import dataclass, fields, replace

from sctd.config import Config
from sctd.errors import UserError
from sctd.objective.build import shape_of
from sctd.objective.flops import StepFlops
from sctd.plan import speed
from sctd.plan.memory import STAGES, Memory, largest_micro_batch, memory, parameter_count
from sctd.plan.speed import StepTime, step_time
from sctd.plan.steps import Step, shares
from sctd.train.engine.devices import GPUS, Gpu

USABLE = 0.92  # of a GPU's memory: CUDA, NCCL and fragments take the rest
_VOCABULARY = 30522  # BERT's, where neither recipe nor corpus says
_PARTS = {
    "parameters": "parameters",
    "masters": "float32 masters",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "logits": "logits of the head",
    "buffers": "temporary buffers",
}
_GB = 1e9


@dataclass(frozen=True)
class Machine:
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


@dataclass(frozen=True)
class Job:
    """What runs: the kinds of its optimizer steps, with their shares of all."""

    config: Config
    steps: dict[Step, float]

    @property
    def work(self) -> StepFlops:
        """Of the first step; shape, length and recomputation are those of all."""
        return next(iter(self.steps)).work

    def mean(self) -> float:
        """Model FLOPs of a row, over the schedule."""
        return sum(share * work.row(phase, keep) for (work, phase, keep), share in self.steps.items())

    def executed(self) -> float:
        """The same of all that is computed, some of it twice."""
        return sum(share * work.hardware_row(phase, keep) for (work, phase, keep), share in self.steps.items())


@dataclass(frozen=True)
class Forecast:
    """One ZeRO stage: `largest` micro-batch that fits, the one that runs (0: none), and its step."""

    stage: int
    memory: Memory
    largest: int
    micro_batch: int
    time: StepTime | None


def plan(recipe: str, config: Config, gpus: str, seq_len: int | None = None) -> str:
    """The report for `config` on GPUs such as "8xA100-40GB".

    Args:
        seq_len: tokens a row; None: `model.max_positions`.

    Raises:
        UserError: an unknown GPU, or sizes that do not fit together.
    """
    machine = parse_gpus(gpus)
    check(config, machine, seq_len)
    length = seq_len or config.model.max_positions
    job, baseline = make_job(config, length), make_job(replace(config, arm="baseline"), length)
    forecasts = [forecast(job, machine, stage) for stage in STAGES]
    lines = [
        *_heading(recipe, job, machine),
        "",
        *_flops(job, baseline),
        "",
        *_memory(job, machine, forecasts),
        "",
        *_time(job, machine, forecasts),
        "",
        *_verdict(job, baseline, machine, forecasts),
    ]
    return "\n".join(lines)


def parse_gpus(text: str) -> Machine:
    """ "8xA100-40GB" or "H200-141GB" (one)."""
    found = re.fullmatch(r"(?:([1-9]\d{0,5})x)?(.+)", text, re.IGNORECASE)
    names = {name.lower(): name for name in GPUS}
    if not found or found[2].lower() not in names:
        raise UserError(f"--gpus {text!r}: write NxMODEL with a MODEL of {', '.join(GPUS)}")
    name = names[found[2].lower()]
    return Machine(name, GPUS[name], int(found[1] or 1))


def check(config: Config, machine: Machine, seq_len: int | None) -> None:
    """What no run on this machine could work with."""
    positions, train = config.model.max_positions, config.train
    if seq_len is not None and not 8 <= seq_len <= positions:
        raise UserError(f"--seq-len {seq_len}: it must be from 8 to model.max_positions, which is {positions}")
    if train.precision == "bf16" and not machine.gpu.bf16:
        raise UserError(f"train.precision is bf16, which {machine.name} does not compute: add train.precision=fp16")
    if config.optimizer.name == "muon" and train.zero_stage == 3:
        raise UserError(
            "train.zero_stage is 3, where optimizer.name=muon has no whole matrices: use 0, 1 or 2, or "
            "optimizer.name=adamw"
        )
    share = train.batch_size // machine.gpus
    micro = min(train.micro_batch_size or share, share)
    if share == 0 or share * machine.gpus != train.batch_size or share % micro:
        raise UserError(
            f"train.batch_size {train.batch_size} does not divide into {machine.gpus} GPUs x micro-batches of "
            f"{train.micro_batch_size or share}: change train.batch_size, train.micro_batch_size or --gpus"
        )


def make_job(config: Config, length: int) -> Job:
    return Job(config, shares(config, shape_of(config, config.model.vocab_size or _VOCABULARY), length))


def forecast(job: Job, machine: Machine, stage: int) -> Forecast:
    """Memory with the recipe's micro-batch, and the time with it or, where it does not fit, the largest that does."""
    train, precision = job.config.train, machine.precision(job.config)
    share = train.batch_size // machine.gpus
    wanted = min(train.micro_batch_size or share, share)
    muon = job.config.optimizer.name == "muon"
    largest = largest_micro_batch(job.steps, machine.gpus, stage, precision, machine.usable, muon)
    micro = max((rows for rows in range(1, min(wanted, largest) + 1) if share % rows == 0), default=0)
    taken = memory(job.steps, machine.gpus, stage, precision, wanted, muon)
    time = None
    if micro:
        time = step_time(job.steps, machine.gpu, machine.gpus, stage, precision, micro, share // micro)
    return Forecast(stage, taken, largest, micro, time)


def _heading(recipe: str, job: Job, machine: Machine) -> list[str]:
    config, gpu, shape, train = job.config, machine.gpu, job.work.shape, job.config.train
    share = train.batch_size // machine.gpus
    micro = min(train.micro_batch_size or share, share)
    vocabulary = f"{shape.vocab_size} token ids" + ("" if config.model.vocab_size else " (assumed)")
    precision = machine.precision(config)
    peak = gpu.single if precision == "fp32" else gpu.half
    count = parameter_count(shape)
    reach = f"products {speed.PRODUCTS:.0%} and attention {speed.ATTENTION:.0%} of peak"
    reach += f", memory {speed.BANDWIDTH:.0%} and link {speed.LINK:.0%} of their bandwidths, {USABLE:.0%} of the memory"
    fabric = f", {speed.FABRIC / _GB:.0f} GB/s for each GPU between nodes of {speed.NODE}"
    nodes = fabric if machine.gpus > speed.NODE else ""
    return [
        f"recipe    {recipe}, arm {config.arm}, {precision}: a prediction from shapes and data sheets",
        f"model     {shape.family}, {shape.layers} layers x {shape.hidden_size}, {vocabulary}, "
        f"{count / 1e6:.1f}M parameters, rows of {job.work.length} tokens",
        f"batch     {train.batch_size} rows a step = {machine.gpus} GPUs x {micro} at once x {share // micro}",
        f"machine   {machine.gpus} x {machine.name}: {peak / 1e12:g} TFLOP/s, {gpu.bandwidth / _GB:g} GB/s, "
        f"{gpu.capacity / _GB:g} GB, link {gpu.link / _GB:g} GB/s",
        f"assumed   {reach}{nodes}; fused kernels, nothing overlaps",
    ]


def _flops(job: Job, baseline: Job) -> list[str]:
    work, rows = job.work, job.config.train.batch_size
    full = baseline.mean()
    lines = [f"{'FLOPs':<22}{'GF/token':>12}{'TF/step':>12}{'of baseline':>14}"]
    for name in dict.fromkeys(phase for _, phase, _ in job.steps):
        steps = {step: share for step, share in job.steps.items() if step.phase is name}
        share = sum(steps.values())
        mean = replace(job, steps=steps).mean() / share
        lines.append(_flops_line(f"  {name}, {share:.0%} of steps", mean, work.length, rows, full))
    lines.append(_flops_line(f"  mean of {job.config.arm}", job.mean(), work.length, rows, full))
    if work.recompute:
        lines.append(_flops_line("  executed", job.executed(), work.length, rows, full))
    if job.config.arm != "baseline":
        lines.append(_flops_line("  baseline", full, work.length, rows, full))
    return lines


def _flops_line(name: str, row: float, length: int, rows: int, full: float) -> str:
    return f"{name:<22}{row / length / 1e9:>12.4f}{row * rows / 1e12:>12,.1f}{row / full:>13.1%}"


def _memory(job: Job, machine: Machine, forecasts: list[Forecast]) -> list[str]:
    config, train = job.config, job.config.train
    turned = replace(train, checkpoint_activations=not train.checkpoint_activations)
    other = make_job(replace(config, train=turned), job.work.length)
    others = [forecast(other, machine, item.stage) for item in forecasts]
    how = ("stored", "computed again")
    this, that = reversed(how) if job.work.recompute else how
    share = train.batch_size // machine.gpus
    head = f"GB per GPU, {min(train.micro_batch_size or share, share)} rows at once"
    lines = [_row(head, [f"ZeRO-{item.stage}" + "*" * (item.stage == train.zero_stage) for item in forecasts])]
    for part in fields(Memory):
        name = _PARTS[part.name] + (f", {this}" if part.name == "activations" else "")
        lines.append(_row(f"  {name}", [f"{getattr(item.memory, part.name) / _GB:.2f}" for item in forecasts]))
    lines += [
        _row("  total", [f"{item.memory.total / _GB:.2f}" for item in forecasts]),
        _row(f"  fits in {machine.usable / _GB:.1f}", [_fits(item.memory, machine) for item in forecasts]),
        _row("  largest micro-batch", [str(item.largest) for item in forecasts]),
        _row(f"  activations, {that}", [f"{item.memory.activations / _GB:.2f}" for item in others]),
        _row("    total", [f"{item.memory.total / _GB:.2f}" for item in others]),
        _row("    largest micro-batch", [str(item.largest) for item in others]),
        "  * the recipe's",
    ]
    return lines


def _fits(taken: Memory, machine: Machine) -> str:
    return "yes" if taken.total <= machine.usable else "NO"


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<34}" + "".join(f"{cell:>12}" for cell in cells)


def _time(job: Job, machine: Machine, forecasts: list[Forecast]) -> list[str]:
    train, length = job.config.train, job.work.length
    single = machine.precision(job.config) == "fp32"
    peak = machine.gpus * (machine.gpu.single if single else machine.gpu.half)

    def cells(form: str, scale: float, power: int) -> list[str]:
        return [form.format(scale * item.time.total**power) if item.time else "-" for item in forecasts]

    rows, days = train.batch_size, train.steps / 86400
    return [
        _row("time, by micro-batch of", [str(item.micro_batch or "-") for item in forecasts]),
        _row("  seconds a step", cells("{:.3f}", 1, 1)),
        _row("  rows/s", cells("{:,.0f}", rows, -1)),
        _row("  tokens/s", cells("{:,.0f}", rows * length, -1)),
        _row("  mfu", cells("{:.1%}", rows * job.mean() / peak, -1)),
        _row("  hfu", cells("{:.1%}", rows * job.executed() / peak, -1)),
        _row(f"  days for {train.steps} steps", cells("{:.2f}", days, 1)),
        _row("  GPU-hours", cells("{:,.0f}", days * 24 * machine.gpus, 1)),
        _row("  bound by", [limit(job, machine, item) for item in forecasts]),
    ]


def limit(job: Job, machine: Machine, item: Forecast) -> str:
    """What the step waits for most; or the memory, where it does not hold the recipe's micro-batch."""
    share = job.config.train.batch_size // machine.gpus
    if item.time is None or item.micro_batch < min(job.config.train.micro_batch_size or share, share):
        return "capacity"
    parts = {"compute": item.time.compute, "bandwidth": item.time.bandwidth, "all-reduce": item.time.exchange}
    return max(parts, key=lambda name: parts[name])


def _verdict(job: Job, baseline: Job, machine: Machine, forecasts: list[Forecast]) -> list[str]:
    config = job.config
    chosen = forecasts[config.train.zero_stage]
    if chosen.time is None:
        return [f"result    ZeRO-{chosen.stage} does not fit with one row: recompute activations, or take larger GPUs"]
    time = chosen.time
    parts = f"{time.compute:.3f} s compute, {time.bandwidth:.3f} s memory traffic, {time.exchange:.3f} s gradients"
    lines = [
        f"result    ZeRO-{chosen.stage} (the recipe's): {time.total:.3f} s a step = {parts}; "
        f"bound by {_LIMITS[limit(job, machine, chosen)]}"
    ]
    if chosen.micro_batch < (config.train.micro_batch_size or 0):
        lines.append(f"          set train.micro_batch_size={chosen.micro_batch}: the recipe's does not fit")
    full = forecast(baseline, machine, chosen.stage).time
    if config.arm != "baseline" and full is not None:
        flops, seconds = 1 - job.mean() / baseline.mean(), 1 - time.total / full.total
        lines.append(f"          {config.arm} saves {flops:.0%} of the baseline's FLOPs and {seconds:.0%} of its time")
    return lines


_LIMITS = {
    "compute": "matrix products (compute)",
    "bandwidth": "memory bandwidth",
    "all-reduce": "the exchange of gradients between GPUs",
    "capacity": "memory capacity",
}
