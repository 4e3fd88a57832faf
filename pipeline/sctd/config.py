"""Recipes: frozen dataclasses <- recipe YAML <- dotted overrides.

Everything that a run can vary is a field here, is printed by `--print-config` and stored with the run; `sctd config`
lists the fields with the explanations given here. A recipe may `extends:` another one; later layers win. An unknown key
is an error that names the nearest known one.
"""

import contextlib
import dataclasses
import difflib
import itertools
import json
import keyword
import math
import operator
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sctd.errors import UserError

FAMILIES = ("bert", "modernbert")
BASELINE = "baseline"  # the arm that others are compared with
ARMS = (BASELINE, "token_drop", "sctd", "random_drop", "random_ltd")
_RECIPES = Path(__file__).parent / "recipes"
_WEEK = 7 * 24 * 3600
BOUNDS = {
    "gt": ("above", operator.gt), "ge": ("at least", operator.ge),
    "lt": ("below", operator.lt), "le": ("at most", operator.le),
}  # fmt: skip
_TYPES = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
# PyYAML's constructors let these through: 2024-13-45, 0b_, !!int x, !!timestamp x, a thousand brackets.
_UNREADABLE = (yaml.YAMLError, ValueError, AttributeError, RecursionError)


def setting(default: Any, text: str, choices: tuple[Any, ...] = (), **bounds: float | str) -> Any:
    """A field of a recipe.

    Args:
        text: one line of explanation, for `sctd config`.
        choices: all values that it may have; empty: any of its type.
        bounds: gt, ge, lt, le: a number, or the key that has it, as in `stop_at: le="train.steps"`; for a list, of each
            item.
    """
    return field(default=default, metadata={"text": text, "choices": choices, "bounds": bounds})


@dataclass(frozen=True)
class RunConfig:
    """The folder of the run, and its seed."""

    dir: str = setting("", "folder of the run; empty: runs/RECIPE")
    seed: int = setting(1, "seed of initial weights, data order, masks, dropout", ge=0)
    examples: tuple[str, ...] = setting((), "sentences with one [MASK], filled in at the end")
    branch_from: str = setting("", "RUN@STEP that the run goes on from, as --branch-from has it; empty: none")


@dataclass(frozen=True)
class InitConfig:
    """The weights that a run starts from."""

    from_: str = setting("", "model to start from: hub id, folder of transformers, RUN or RUN@STEP; empty: random")
    positions: str = setting("error", "positions beyond those of init.from: none, repeated, or stretched to fit",
                             ("error", "tile", "interpolate"))  # fmt: skip


@dataclass(frozen=True)
class DataConfig:
    """The corpus, the length of its rows, and masking."""

    corpus: str = setting("", "folder made by `sctd prepare`")
    seq_len: int = setting(0, "tokens per row; 0: the corpus' longest rows", ge=0)
    warmup_seq_len: int = setting(0, "tokens per row at first; 0: data.seq_len", ge=0)
    warmup_steps: int = setting(0, "optimizer steps on rows of data.warmup_seq_len", ge=0, le="train.steps")
    mask_probability: float = setting(0.15, "share of the tokens to predict in every row", gt=0, le=0.5)
    mask_stages: tuple[tuple[int, float], ...] = setting(
        (), "[step, share] pairs: the share to predict from that step on; validation uses the last"
    )
    whole_word: bool = setting(False, "mask whole words instead of single tokens")
    mask_by: str = setting("random", "importance: tokens with a high MLM loss so far are predicted more often",
                           ("random", "importance"))  # fmt: skip
    span_length: float = setting(0.0, "mask spans of whole words of this mean length; 0: no spans", ge=0, le=5.5)
    replace: tuple[float, float, float] = setting(
        (0.8, 0.1, 0.1), "shares of the tokens to predict: [MASK], a random token, unchanged", ge=0, le=1
    )
    skip_samples: tuple[tuple[int, int], ...] = setting((), "[first, end) ranges of sample indices to skip")


@dataclass(frozen=True)
class ModelConfig:
    """The encoder, and which of its layers drop tokens."""

    family: str = setting("bert", "modernbert: pre-norm, rotary positions, GeGLU, no biases", FAMILIES)
    vocab_size: int = setting(0, "number of token ids; 0: the tokenizer's", ge=0)
    layers: int = setting(12, "number of layers, even", ge=2)
    hidden_size: int = setting(768, "width of the hidden states", ge=1)
    heads: int = setting(12, "attention heads; they divide model.hidden_size", ge=1)
    intermediate_size: int = setting(3072, "inner width of the feed-forward layers", ge=1)
    max_positions: int = setting(512, "tokens in the longest row the model can read", ge=1)
    positions: str = setting("learned", "initial position embeddings of a bert",
                             ("learned", "sinusoidal"))  # fmt: skip
    theta: float | None = setting(
        None, "base of rotary positions; null: 10,000 for up to 512 of them, 160,000 beyond", gt=0
    )
    window: int = setting(0, "tokens that local layers of a modernbert attend to; 0: no layer is local", ge=0)
    global_every: int = setting(3, "with a window: every so many-th layer is global, from the first", ge=1)
    local_theta: float = setting(10_000.0, "base of rotary positions in local layers", gt=0)
    dropout: float = setting(0.1, "dropout of embeddings and of sub-layer outputs", ge=0, lt=1)
    attention_dropout: float = setting(0.1, "dropout of the attention weights", ge=0, lt=1)
    layer_norm_eps: float = setting(1e-12, "epsilon of LayerNorm", ge=0)
    initializer_range: float = setting(0.02, "standard deviation of the initial weights", ge=0)
    keep_ratio: float = setting(0.5, "share of the tokens that dropping layers keep", gt=0, le=1)
    first_dropped: int | None = setting(
        None, "first layer that drops tokens, from 0; null: model.layers / 2 - 1 (random_ltd: 1)", ge=0
    )
    full_tail: int = setting(1, "number of layers at the end without dropping", ge=1, lt="model.layers")
    layer_norm: str = setting("native", "implementation of LayerNorm", ("native", "apex"))


@dataclass(frozen=True)
class AttentionConfig:
    """What a token attends to."""

    scope: str = setting("row", "tokens attend to their row, or to their document in it", ("row", "document"))


@dataclass(frozen=True)
class ObjectiveConfig:
    """The losses. A DROP step has the masked-language-model (MLM) loss alone."""

    interval: int = setting(10, "F: every F-th optimizer step is an ALIGN step", ge=1)
    kl_weight: float = setting(0.05, "weight of the KL losses, lambda", ge=0)
    mlm_drop: bool = setting(True, "ALIGN steps: MLM loss of the dropping path")
    mlm_full: bool = setting(True, "ALIGN steps: MLM loss of the full path")
    kl_global: bool = setting(True, "ALIGN steps: KL loss after the last layer")
    kl_local: bool = setting(True, "ALIGN steps: KL loss before the last layer")
    semantic_positions: str = setting("cls", "positions that the KL losses compare", ("cls", "all"))
    detach_teacher: bool = setting(True, "no gradient of the KL losses in the full path")
    importance_beta: float = setting(0.995, "decay of the running mean of each token's loss", ge=0, lt=1)
    importance_warmup: int | None = setting(
        None, "first steps, on the full path, that measure a new importance table; null: 50 or 0",
        ge=0, le="train.steps",
    )  # fmt: skip


@dataclass(frozen=True)
class OptimizerConfig:
    """What updates the weights."""

    name: str = setting("adamw", "muon: Muon for the layers' matrices, AdamW for the rest",
                        ("adamw", "muon", "deepspeed_adamw", "apex_adam", "apex_lamb"))  # fmt: skip
    lr: float = setting(2e-4, "peak learning rate", gt=0)
    muon_lr: float = setting(0.02, "peak learning rate of Muon's matrices", gt=0)
    betas: tuple[float, float] = setting((0.9, 0.999), "Adam's decay rates of the two moments", ge=0, lt=1)
    eps: float = setting(1e-6, "Adam's epsilon", ge=0)
    weight_decay: float = setting(0.01, "decoupled weight decay", ge=0)
    clip: float = setting(1.0, "largest norm of the gradients; 0: no clipping", ge=0)


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate, and when dropping begins and ends; steps are optimizer steps."""

    name: str = setting("linear", "decay; wsd: constant, then linear",
                        ("linear", "polynomial", "cosine", "wsd"))  # fmt: skip
    warmup_steps: int = setting(0, "steps of linear warm-up", ge=0, le="train.steps")
    power: float = setting(1.0, "exponent of the polynomial decay", ge=0)
    decay_steps: int = setting(0, "length of the decay at the end of wsd", ge=0)
    final_lr: float = setting(0.0, "learning rate at the end of the decay", ge=0)
    full_start: int = setting(0, "steps at the start without dropping", ge=0, le="train.steps")
    full_finish: int = setting(0, "steps at the end without dropping", ge=0, le="train.steps")


@dataclass(frozen=True)
class TrainConfig:
    """Length, batches, precision, memory, logging and checkpoints."""

    steps: int = setting(1000, "optimizer steps; all schedules end here", ge=1)
    stop_at: int | None = setting(None, "save and end here; the schedules do not change", ge=1, le="train.steps")
    batch_size: int = setting(256, "rows per optimizer step, over all ranks", ge=1)
    micro_batch_size: int | None = setting(None, "rows a rank runs at once; null: its whole share", ge=1)
    precision: str = setting("auto", "auto: bf16 on GPUs (fp16 without bf16); on CPUs the faster of bf16 and fp32",
                             ("auto", "bf16", "fp16", "fp32"))  # fmt: skip
    zero_stage: int = setting(1, "ZeRO stage of DeepSpeed", (0, 1, 2, 3))
    compile: bool = setting(False, "compile the model with torch.compile")
    cuda_graphs: bool = setting(False, "replay the compiled micro-step as CUDA graphs")
    checkpoint_activations: bool = setting(False, "recompute activations in the backward pass")
    rollback_after: int = setting(5, "skipped steps in a row before the run goes back to a checkpoint; 0: never", ge=0)
    timeout: float = setting(1800.0, "seconds a rank waits for data or other ranks", ge=1, le=_WEEK)
    log_every: int = setting(10, "steps between records in metrics.jsonl", ge=1)
    valid_every: int = setting(0, "steps between validations; 0: only at the end", ge=0)
    valid_rows: int = setting(1024, "held-out rows per validation, at most", ge=1)
    save_every: int = setting(0, "steps between checkpoints; 0: only at the end", ge=0)
    keep_checkpoints: int = setting(2, "newest checkpoints to keep", ge=1)
    async_save: bool = setting(True, "write checkpoints while training goes on")


@dataclass(frozen=True)
class EvaluationConfig:
    """Probing and fine-tuning while the run trains."""

    every: int = setting(0, "optimizer steps between evaluations; 0: never", ge=0)
    probes: tuple[str, ...] = setting((), "probes: tense, subj_number, or SentEval files")
    task: str = setting("", "task to fine-tune on; empty: none")
    steps: int = setting(100, "optimizer steps of the fine-tuning", ge=1)
    data_dir: str = setting("", "folder with the data of probes and task")


@dataclass(frozen=True)
class Config:
    arm: str = setting("sctd", "random_drop and random_ltd are for comparison", ARMS)
    run: RunConfig = field(default_factory=RunConfig)
    init: InitConfig = field(default_factory=InitConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def keys() -> dict[str, dataclasses.Field[Any]]:
    """Every configuration key, such as `train.steps`, with its field."""
    found: dict[str, dataclasses.Field[Any]] = {}
    for part in dataclasses.fields(Config):
        if dataclasses.is_dataclass(part.type):
            found |= {f"{part.name}.{item.name.rstrip('_')}": item for item in dataclasses.fields(part.type)}
        else:
            found[part.name] = part
    return found


def value_of(config: Config, key: str) -> Any:
    """The value of a key such as `train.steps`."""
    return operator.attrgetter(_attribute(key))(config)


def _attribute(key: str) -> str:
    """`init.from` is called `from_` in Python, which has a use for the word."""
    return key + "_" if keyword.iskeyword(key.rpartition(".")[2]) else key


def recipe_names() -> list[str]:
    """The recipes that ship with sctd."""
    return sorted(path.stem for path in _RECIPES.glob("*.yaml"))


def load_config(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """The merged, validated configuration of a run.

    Args:
        recipe: name of a shipped recipe, or path of a YAML file.
        overrides: `section.key=value`, the value read as YAML; `arm=value` at the top.

    Raises:
        UserError: unknown recipe, key or value.
    """
    return config_from_dict(_merged(recipe, overrides))


def run_dir_of(recipe: str, overrides: Sequence[str] = ()) -> Path:
    """The `run.dir` of a configuration whose other keys may not be settled yet.

    Raises:
        UserError: see `load_config`.
    """
    return Path(config_from_dict({"run": _merged(recipe, overrides)["run"]}).run.dir)


def _merged(recipe: str, overrides: Sequence[str]) -> dict[str, Any]:
    tree = _read_recipe(recipe, seen=())
    for override in overrides:
        apply_override(tree, override)
    run = tree.setdefault("run", {})
    if isinstance(run, dict) and not run.get("dir"):
        run["dir"] = f"runs/{Path(recipe).stem}"
    return tree


def keys_said(recipe: str, overrides: Sequence[str] = ()) -> set[str]:
    """The keys, such as `train.steps`, that a recipe or an override sets; the others have their defaults."""
    tree = _merged(recipe, overrides)
    return {f"{name}.{key}" for name, part in tree.items() if isinstance(part, dict) for key in part}


def config_from_dict(tree: dict[str, Any]) -> Config:
    """The validated configuration that a tree describes, such as the one stored with a run."""
    config: Config = _build(Config, tree, where="")
    validate(config)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested dicts and lists, as YAML and JSON read it."""
    plain = dataclasses.asdict(config, dict_factory=lambda pairs: {name.rstrip("_"): value for name, value in pairs})
    tree: dict[str, Any] = json.loads(json.dumps(plain))
    return tree


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def parse_run(text: str) -> tuple[Path, int | None]:
    """The folder of a run and a step of it, from `RUN@STEP` or `RUN` (None: its newest checkpoint)."""
    found = re.fullmatch(r"(.+)@(\d+)", text, re.DOTALL)
    return (Path(found[1]).expanduser(), int(found[2])) if found else (Path(text).expanduser(), None)


def absolute_run(text: str) -> str:
    """`RUN` or `RUN@STEP` as it is to be called from another folder."""
    path, step = parse_run(text)
    return f"{path.absolute()}" + ("" if step is None else f"@{step}")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an error message: `did you mean 'X'?`, or the known names where none is near."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


def _read_recipe(recipe: str, seen: tuple[str, ...]) -> dict[str, Any]:
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else _RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        raise UserError(f"recipe '{recipe}' not found: {nearest(recipe, recipe_names())}")
    if recipe in seen:
        raise UserError(f"recipe '{recipe}' extends itself through {' -> '.join(seen)}: break the circle")
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
    """Put `section.key=value` into a recipe's tree, the value read as YAML.

    Raises:
        UserError: it cannot be read.
    """
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise UserError(f"override {override!r}: write it as section.key=value")
    try:
        value = yaml.safe_load(text)
    except _UNREADABLE:
        raise UserError(f"override {override!r}: the value is not valid YAML") from None
    *sections, key = name.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"override {override!r}: {section!r} is a value, not a section")
    tree[key] = value


def _build(cls: Any, tree: Any, where: str) -> Any:
    if not isinstance(tree, dict):
        raise UserError(f"config section '{where}' must be a mapping, found {tree!r}")
    hints = {name.rstrip("_"): hint for name, hint in typing.get_type_hints(cls).items()}
    values = {}
    for key, value in tree.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in hints:
            raise UserError(f"unknown config key {path!r}: {nearest(str(key), hints)}")
        hint = hints[key]
        make = _build if dataclasses.is_dataclass(hint) else _cast
        values[_attribute(str(key))] = make(hint, value, path)
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
    kind = type(value)  # not isinstance: a bool is an int
    if kind is hint:
        return value
    if hint is float and kind in (str, int):
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    if hint is str and (kind is int or value is None):
        return "" if value is None else str(value)
    if hint is int and kind is float and value.is_integer():
        return int(value)
    raise UserError(f"config key '{path}' must be {type_name(hint)}, found {value!r}")


def type_name(hint: Any) -> str:
    """The type of a field, as a user calls it: `a whole number or null`."""
    if typing.get_origin(hint) is types.UnionType:
        return f"{type_name(typing.get_args(hint)[0])} or null"
    return _TYPES.get(hint, "a list")


def validate(config: Config) -> None:
    """Refuse what no run can work with: values outside their choices and bounds, and combinations.

    Raises:
        UserError: the first one found, with its key.
    """
    for key, item in keys().items():
        value, choices = value_of(config, key), item.metadata["choices"]
        if choices and value not in choices:
            hint = nearest(value, choices) if isinstance(value, str) else f"known: {', '.join(map(str, choices))}"
            raise UserError(f"config key '{key}' is {value!r}: {hint}")
    for holds, key, wanted in itertools.chain(_bounds(config), _combinations(config)):
        if not holds:
            value = json.loads(json.dumps(value_of(config, key)))  # tuples as lists, as users write them
            raise UserError(f"config key '{key}' is {value!r}: it must be {wanted}")
    objective = config.objective
    if not (objective.mlm_drop or objective.mlm_full or objective.kl_global or objective.kl_local):
        raise UserError("config section 'objective' has no loss: set mlm_drop, mlm_full, kl_global or kl_local to true")


_Rule = tuple[bool, str, str]  # whether it holds, the key, and what its value must be


def _bounds(config: Config) -> Iterator[_Rule]:
    # Section `train` first: other keys are bounded by train.steps.
    for key, item in sorted(keys().items(), key=lambda pair: not pair[0].startswith("train.")):
        value = value_of(config, key)
        limits, said = [], []
        for name, bound in item.metadata["bounds"].items():
            words, holds = BOUNDS[name]
            limit = value_of(config, bound) if isinstance(bound, str) else bound
            limits.append((holds, limit))
            said.append(f"{words} {bound}={limit}" if isinstance(bound, str) else f"{words} {bound}")
        wanted = ("a list of numbers " if isinstance(value, tuple) else "") + " and ".join(said)
        for number in value if isinstance(value, tuple) else (value,):
            yield not isinstance(number, float) or math.isfinite(number), key, "finite"
            yield number is None or all(holds(number, limit) for holds, limit in limits), key, wanted


def _combinations(config: Config) -> Iterator[_Rule]:
    model, data, train, schedule = config.model, config.data, config.train, config.schedule
    yield model.layers % 2 == 0, "model.layers", "even"
    yield math.isclose(sum(data.replace), 1.0), "data.replace", "three shares that add up to 1"
    width, rest = divmod(model.hidden_size, model.heads)
    yield rest == 0, "model.heads", f"a divisor of model.hidden_size={model.hidden_size}"
    if model.family == "modernbert":
        wanted = f"such that a head has an even number of columns for its rotary positions: it has {width}"
        yield width % 2 == 0, "model.heads", wanted
        yield model.positions == "learned", "model.positions", "left out: a modernbert has rotary positions"
        yield model.layer_norm == "native", "model.layer_norm", "native where model.family is modernbert"
    else:
        yield model.window == 0, "model.window", "0 where model.family is bert"
    last = model.layers - model.full_tail - 1
    yield (model.first_dropped or 0) <= last, "model.first_dropped", f"at most {last}, before model.full_tail begins"

    steps = train.steps
    starts = [1, *(start for start, _ in data.mask_stages), steps + 1]
    wanted = f"[step, share] pairs with rising steps from 2 to train.steps={steps}"
    yield all(first < second for first, second in itertools.pairwise(starts)), "data.mask_stages", wanted
    shares_fit = all(0 < share <= 0.5 for _, share in data.mask_stages)
    yield shares_fit, "data.mask_stages", "[step, share] pairs with shares above 0 and at most 0.5"
    ranges_fit = all(0 <= first < end for first, end in data.skip_samples)
    yield ranges_fit, "data.skip_samples", "[first, end) ranges with 0 <= first < end"
    yield not 0 < data.span_length < 1, "data.span_length", "0, or at least 1"
    both = bool(data.warmup_steps) == bool(data.warmup_seq_len)
    yield both, "data.warmup_steps", "set together with data.warmup_seq_len"
    shorter = not data.seq_len or data.warmup_seq_len < data.seq_len
    yield shorter, "data.warmup_seq_len", f"below data.seq_len={data.seq_len}"

    yield train.compile or not train.cuda_graphs, "train.cuda_graphs", "false where train.compile is false"
    left = steps - schedule.warmup_steps
    yield schedule.decay_steps <= left, "schedule.decay_steps", f"at most the {left} steps after the warm-up"
    left = steps - schedule.full_start
    wanted = f"at most train.steps - schedule.full_start = {left}: the two may not overlap"
    yield schedule.full_finish <= left, "schedule.full_finish", wanted
    left = steps - schedule.full_finish
    warmup = config.objective.importance_warmup or 0
    wanted = f"below train.steps - schedule.full_finish = {left}"
    yield not warmup or warmup < left, "objective.importance_warmup", wanted
    wanted = f"below train.steps - schedule.full_finish = {left}: no step would drop tokens"
    yield schedule.full_start < left or config.arm == "baseline", "schedule.full_start", wanted

    evaluation, every = config.evaluation, "0, unless evaluation.probes or evaluation.task says what to evaluate"
    yield not evaluation.every or bool(evaluation.probes or evaluation.task), "evaluation.every", every
    wrong = [text for text in config.run.examples if text.count("[MASK]") != 1]
    yield not wrong, "run.examples", f"sentences with one [MASK] each, unlike {wrong[:1]}"
