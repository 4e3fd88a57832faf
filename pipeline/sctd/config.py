"""Recipes: frozen dataclasses <- recipe YAML <- dotted overrides.

Everything that a run can vary is a field here, is printed by `--print-config` and stored with the run. A recipe may
`extends:` another one; later layers win. An unknown key is an error that names the nearest known one.
"""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sctd.errors import UserError

FAMILIES = ("bert", "modernbert")
ARMS = ("baseline", "token_drop", "sctd", "random_drop", "random_ltd")
_RECIPES = Path(__file__).parent / "recipes"
_NOT_NEGATIVE = (
    "model.vocab_size", "model.layer_norm_eps", "model.initializer_range", "objective.kl_weight", "optimizer.eps",
    "optimizer.weight_decay", "optimizer.clip", "schedule.power", "schedule.final_lr",
)  # fmt: skip
_LONGEST = 7 * 24 * 3600
# PyYAML's constructors let these through: 2024-13-45, 0b_, !!int x, !!timestamp x, a thousand brackets.
_UNREADABLE = (yaml.YAMLError, ValueError, AttributeError, RecursionError)


@dataclass(frozen=True)
class RunConfig:
    dir: str = ""  # empty: runs/<recipe>
    seed: int = 1
    examples: tuple[str, ...] = ()  # sentences with [MASK], filled in and printed at the end


@dataclass(frozen=True)
class DataConfig:
    corpus: str = ""  # folder made by `sctd prepare`
    seq_len: int = 0  # tokens a row; 0: the longest that the corpus was packed to
    warmup_seq_len: int = 0  # of the first steps, where the corpus has rows of two lengths; 0: all have seq_len
    warmup_steps: int = 0  # optimizer steps on rows of warmup_seq_len
    mask_probability: float = 0.15  # share of a row's tokens that are predicted, an exact number in each row
    # [first optimizer step, share], ...: what the share becomes from these steps on; the last one validates
    mask_stages: tuple[tuple[int, float], ...] = ()
    whole_word: bool = False
    skip_samples: tuple[tuple[int, int], ...] = ()  # half-open spans of sample indices that are never trained on


@dataclass(frozen=True)
class ModelConfig:
    family: str = "bert"  # bert | modernbert (pre-norm, rotary positions, GeGLU, no biases)
    vocab_size: int = 0  # 0: as many as the corpus' tokenizer has
    layers: int = 12
    hidden_size: int = 768
    heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 512
    positions: str = "learned"  # learned | sinusoidal: how a bert's table of positions begins; both are trained
    dropout: float = 0.1
    attention_dropout: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    keep_ratio: float = 0.5  # share of the tokens that dropped layers see
    first_dropped: int | None = None  # first layer without all queries; null: layers/2 - 1 (random_ltd: 1)
    full_tail: int = 1  # layers at the end that see all tokens again
    layer_norm: str = "native"  # native | apex


@dataclass(frozen=True)
class AttentionConfig:
    scope: str = "row"  # row | document: whether tokens see other documents packed into their row


@dataclass(frozen=True)
class ObjectiveConfig:
    interval: int = 10  # F: every F-th optimizer step is an ALIGN step
    kl_weight: float = 0.05  # lambda
    # The terms of an ALIGN step; a DROP step has the first one alone, whatever is set here.
    mlm_drop: bool = True
    mlm_full: bool = True
    kl_global: bool = True
    kl_local: bool = True
    semantic_positions: str = "cls"  # cls | all
    detach_teacher: bool = True
    importance_beta: float = 0.995


@dataclass(frozen=True)
class OptimizerConfig:
    name: str = "adamw"  # adamw | muon | deepspeed_adamw | apex_adam | apex_lamb
    lr: float = 2e-4
    muon_lr: float = 0.02  # of the matrices inside the layers, which Muon moves; AdamW at `lr` moves all else
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.01
    clip: float = 1.0  # of the global gradient norm; 0: off


@dataclass(frozen=True)
class ScheduleConfig:
    name: str = "linear"  # linear | polynomial | cosine | wsd
    warmup_steps: int = 0
    power: float = 1.0  # of polynomial
    decay_steps: int = 0  # of wsd: length of its last phase
    final_lr: float = 0.0
    # Optimizer steps on the full path before the first dropping one, and after the last one, of arms that drop.
    full_start: int = 0
    full_finish: int = 0


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000  # horizon of the schedules
    stop_at: int | None = None  # end earlier, saved, without changing the schedules
    batch_size: int = 256  # rows an optimizer step, over all ranks
    micro_batch_size: int | None = None  # rows a rank runs at once; null: its whole share
    precision: str = "auto"  # auto (bf16 on GPUs, the faster of bf16 and fp32 on CPUs) | bf16 | fp16 | fp32
    zero_stage: int = 1
    compile: bool = False  # the whole model through torch.compile
    cuda_graphs: bool = False  # replay the compiled micro-step as CUDA graphs
    checkpoint_activations: bool = False  # compute each layer again in the backward instead of storing it
    rollback_after: int = 5  # skipped steps in a row before the newest checkpoint is gone back to; 0: never
    timeout: float = 1800.0  # seconds that a rank waits for its next batch, or for the other ranks
    log_every: int = 10
    valid_every: int = 0  # 0: at the end only
    valid_rows: int = 1024  # at most
    save_every: int = 0  # 0: at the end only
    keep_checkpoints: int = 2
    async_save: bool = True  # write checkpoints while training goes on; false: training waits for the disk


@dataclass(frozen=True)
class EvaluationConfig:
    """While the run trains; `sctd finetune` and `sctd probe` evaluate what it leaves."""

    every: int = 0  # optimizer steps between evaluations; 0: never
    probes: tuple[str, ...] = ()  # of every layer: tense, subj_number, or files in SentEval's form
    task: str = ""  # to fine-tune on, with the first seed
    steps: int = 100  # of the fine-tuning
    data_dir: str = ""  # folder with the files of both


@dataclass(frozen=True)
class Config:
    arm: str = "sctd"
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def recipe_names() -> list[str]:
    """The recipes that ship with sctd."""
    return sorted(path.stem for path in _RECIPES.glob("*.yaml"))


def load_config(recipe: str, overrides: typing.Sequence[str] = ()) -> Config:
    """The merged, validated configuration of a run.

    Args:
        recipe: name of a shipped recipe, or path of a YAML file.
        overrides: `section.key=value`, the value read as YAML; `arm=value` at the top.

    Raises:
        UserError: unknown recipe, key or value.
    """
    tree = _read_recipe(recipe, seen=())
    for override in overrides:
        apply_override(tree, override)
    run = tree.setdefault("run", {})
    if isinstance(run, dict) and not run.get("dir"):
        run["dir"] = f"runs/{Path(recipe).stem}"
    config = _build(Config, tree, where="")
    validate(config)
    return config


def config_from_dict(tree: dict[str, Any]) -> Config:
    """The configuration stored with a run."""
    config = _build(Config, tree, where="")
    validate(config)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict of a configuration, fit for YAML and JSON."""
    return _plain(dataclasses.asdict(config))


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """A hint for an error message: ' (did you mean X?)', or the known names where none is near."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _read_recipe(recipe: str, seen: tuple[str, ...]) -> dict[str, Any]:
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else _RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        raise UserError(f"recipe '{recipe}' not found: {nearest(recipe, recipe_names())}")
    if recipe in seen:
        raise UserError(f"recipe '{recipe}' extends itself by way of {' -> '.join(seen)}: break the circle")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except _UNREADABLE as error:
        raise UserError(f"recipe {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path}: must be a mapping of sections, found {type(tree).__name__}")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if str(parent).endswith((".yaml", ".yml")):
        parent = path.parent / str(parent)  # a path counts from the recipe that names it
    return merge_dicts(_read_recipe(str(parent), (*seen, recipe)), tree)


def merge_dicts(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """A new tree: `top` over `base`, section by section."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = merge_dicts(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Put `section.key=value` into a recipe's tree, the value read as YAML. UserError where it is none."""
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise UserError(f"override {override!r}: write it as section.key=value")
    try:
        value = yaml.safe_load(text)
    except _UNREADABLE:
        raise UserError(f"override {override!r}: its value is not YAML") from None
    *sections, key = name.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"override {override!r}: {section!r} is a value, not a section")
    tree[key] = value


def _build(cls: type, tree: Any, where: str) -> Any:
    if not isinstance(tree, dict):
        raise UserError(f"config section '{where}' must be a mapping, found {tree!r}")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in hints:
            raise UserError(f"unknown config key {path!r}: {nearest(str(key), hints)}")
        hint = hints[key]
        is_section = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        values[key] = _build(hint, value, path) if is_section else _cast(hint, value, path)
    return cls(**values)


def _cast(hint: Any, value: Any, path: str) -> Any:
    """The value as the field's type, or an error; YAML reads 1e-4 as text, which a number field accepts."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _cast(args[0], value, path)
    if origin is tuple and isinstance(value, list | tuple):
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise UserError(f"config key '{path}' must be a list of {len(args)}, found {value!r}")
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        return tuple(_cast(kind, item, path) for kind, item in zip(kinds, value, strict=True))
    if hint is float and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    if hint is str and (value is None or (isinstance(value, int) and not isinstance(value, bool))):
        return "" if value is None else str(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not (isinstance(hint, type) and isinstance(value, hint)) or (hint is int and isinstance(value, bool)):
        raise UserError(f"config key '{path}' must be {_type_name(hint)}, found {value!r}")
    return value


def _type_name(hint: Any) -> str:
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    return names.get(hint, "a list")


def validate(config: Config) -> None:
    """Ranges and combinations that no run can work with.

    Raises:
        UserError: the first one found, with its key.
    """
    model, objective, train = config.model, config.objective, config.train
    _one_of("arm", config.arm, ARMS)
    _one_of("model.family", model.family, FAMILIES)
    _one_of("model.positions", model.positions, ("learned", "sinusoidal"))
    _one_of("objective.semantic_positions", objective.semantic_positions, ("cls", "all"))
    _one_of("attention.scope", config.attention.scope, ("row", "document"))
    _one_of("model.layer_norm", model.layer_norm, ("native", "apex"))
    _one_of("optimizer.name", config.optimizer.name, ("adamw", "muon", "deepspeed_adamw", "apex_adam", "apex_lamb"))
    _one_of("schedule.name", config.schedule.name, ("linear", "polynomial", "cosine", "wsd"))
    _one_of("train.precision", train.precision, ("auto", "bf16", "fp16", "fp32"))
    _require(0 < model.keep_ratio <= 1, "model.keep_ratio", model.keep_ratio, "above 0 and at most 1")
    shares = [("data.mask_probability", config.data.mask_probability)]
    shares += [("data.mask_stages", share) for _, share in config.data.mask_stages]
    stages = [list(stage) for stage in config.data.mask_stages]
    for key, share in shares:
        found = share if key == "data.mask_probability" else stages
        _require(0 < share <= 0.5, key, found, "above 0 and at most 0.5 in each stage")
    starts = [start for start, _ in config.data.mask_stages]
    _require(
        all(a < b for a, b in zip([1, *starts], starts, strict=False)) and max(starts, default=0) <= train.steps,
        "data.mask_stages",
        stages,
        f"[step, share] pairs with rising steps from 2 to train.steps={train.steps}",
    )
    _require(model.layers >= 2 and model.layers % 2 == 0, "model.layers", model.layers, "even and at least 2")
    for key in ("hidden_size", "heads", "intermediate_size", "max_positions"):
        _require(getattr(model, key) >= 1, f"model.{key}", getattr(model, key), "at least 1")
    _require(
        model.hidden_size % model.heads == 0,
        "model.heads",
        model.heads,
        f"a divisor of model.hidden_size={model.hidden_size}",
    )
    if model.family == "modernbert":
        width = model.hidden_size // model.heads
        _require(width % 2 == 0, "model.heads", model.heads, "such that a head has an even number of columns, which "
                 f"rotary positions turn in pairs: it has {width}")  # fmt: skip
        _require(model.positions == "learned", "model.positions", model.positions,
                 "left out where model.family is modernbert, whose positions are rotations")  # fmt: skip
        _require(model.layer_norm == "native", "model.layer_norm", model.layer_norm,
                 "native where model.family is modernbert")  # fmt: skip
    for key in ("dropout", "attention_dropout"):
        _require(0 <= getattr(model, key) < 1, f"model.{key}", getattr(model, key), "at least 0 and below 1")
    _require(1 <= model.full_tail < model.layers, "model.full_tail", model.full_tail, f"in 1..{model.layers - 1}")
    if model.first_dropped is not None:
        last = model.layers - model.full_tail - 1
        _require(0 <= model.first_dropped <= last, "model.first_dropped", model.first_dropped, f"in 0..{last}")
    _require(objective.interval >= 1, "objective.interval", objective.interval, "at least 1")
    _require(
        0 <= objective.importance_beta < 1,
        "objective.importance_beta",
        objective.importance_beta,
        "at least 0 and below 1",
    )
    terms = (objective.mlm_drop, objective.mlm_full, objective.kl_global, objective.kl_local)
    _require(any(terms), "objective", "without a term", "given one of mlm_drop, mlm_full, kl_global, kl_local")
    for key in ("steps", "batch_size", "log_every", "valid_rows", "keep_checkpoints"):
        _require(getattr(train, key) >= 1, f"train.{key}", getattr(train, key), "at least 1")
    for key in ("valid_every", "save_every"):
        _require(getattr(train, key) >= 0, f"train.{key}", getattr(train, key), "at least 0")
    _require(train.rollback_after >= 0, "train.rollback_after", train.rollback_after, "at least 0")
    _require(1 <= train.timeout <= _LONGEST, "train.timeout", train.timeout, f"in 1..{_LONGEST} seconds")
    for first, end in config.data.skip_samples:
        _require(0 <= first < end, "data.skip_samples", [first, end], "[first, end) with 0 <= first < end")
    data = config.data
    for key in ("seq_len", "warmup_seq_len", "warmup_steps"):
        _require(getattr(data, key) >= 0, f"data.{key}", getattr(data, key), "at least 0")
    _require(data.warmup_steps <= train.steps, "data.warmup_steps", data.warmup_steps, "at most train.steps")
    _require(
        bool(data.warmup_steps) == bool(data.warmup_seq_len),
        "data.warmup_steps",
        data.warmup_steps,
        "set together with data.warmup_seq_len",
    )
    _require(
        not data.seq_len or data.warmup_seq_len < data.seq_len,
        "data.warmup_seq_len",
        data.warmup_seq_len,
        f"below data.seq_len={data.seq_len}",
    )
    if train.micro_batch_size is not None:
        _require(train.micro_batch_size >= 1, "train.micro_batch_size", train.micro_batch_size, "at least 1")
    if train.stop_at is not None:
        _require(1 <= train.stop_at <= train.steps, "train.stop_at", train.stop_at, f"in 1..train.steps={train.steps}")
    _require(train.zero_stage in (0, 1, 2, 3), "train.zero_stage", train.zero_stage, "0, 1, 2 or 3")
    _require(train.compile or not train.cuda_graphs, "train.cuda_graphs", True, "false where train.compile is false")
    _require(config.run.seed >= 0, "run.seed", config.run.seed, "at least 0")
    for section in ("model", "objective", "optimizer", "schedule"):
        for name, value in dataclasses.asdict(getattr(config, section)).items():
            numbers = value if isinstance(value, tuple) else (value,)
            finite = all(math.isfinite(number) for number in numbers if isinstance(number, float))
            _require(finite, f"{section}.{name}", value, "finite")
    for key in ("lr", "muon_lr"):
        _require(getattr(config.optimizer, key) > 0, f"optimizer.{key}", getattr(config.optimizer, key), "above 0")
    betas = config.optimizer.betas
    _require(all(0 <= beta < 1 for beta in betas), "optimizer.betas", betas, "two numbers from 0 to below 1")
    for key in _NOT_NEGATIVE:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        _require(value >= 0, key, value, "at least 0")
    schedule = config.schedule
    _require(
        0 <= schedule.warmup_steps <= train.steps,
        "schedule.warmup_steps",
        schedule.warmup_steps,
        f"in 0..train.steps={train.steps}",
    )
    _require(
        0 <= schedule.decay_steps <= train.steps - schedule.warmup_steps,
        "schedule.decay_steps",
        schedule.decay_steps,
        "at least 0 and no longer than what follows the warm-up",
    )
    for key in ("full_start", "full_finish"):
        steps = getattr(schedule, key)
        _require(0 <= steps <= train.steps, f"schedule.{key}", steps, f"in 0..train.steps={train.steps}")
    _require(
        schedule.full_start + schedule.full_finish <= train.steps,
        "schedule.full_finish",
        schedule.full_finish,
        f"at most train.steps - schedule.full_start = {train.steps - schedule.full_start}: the two may not overlap",
    )
    _require(
        schedule.full_start + schedule.full_finish < train.steps or config.arm == "baseline",
        "schedule.full_start",
        schedule.full_start,
        f"less than train.steps - schedule.full_finish = {train.steps - schedule.full_finish}: no step would drop",
    )
    evaluation = config.evaluation
    _require(evaluation.every >= 0, "evaluation.every", evaluation.every, "at least 0")
    _require(evaluation.steps >= 1, "evaluation.steps", evaluation.steps, "at least 1")
    _require(
        not evaluation.every or bool(evaluation.probes or evaluation.task),
        "evaluation.every",
        evaluation.every,
        "0 where neither evaluation.probes nor evaluation.task names anything",
    )
    for text in config.run.examples:
        _require(text.count("[MASK]") == 1, "run.examples", text, "a sentence with one [MASK]")


def _one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"config key '{key}' is {value!r}: {nearest(value, known)}")


def _require(condition: bool, key: str, value: Any, wanted: str) -> None:
    if not condition:
        raise UserError(f"config key '{key}' is {value!r}: it must be {wanted}")
