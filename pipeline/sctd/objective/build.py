"""From a configuration to the module that trains (model, arm, losses, importance table), its shape and its schedule."""

from dataclasses import fields

import torch

from sctd.config import Config, parse_run
from sctd.corpus.manifest import Manifest
from sctd.corpus.tokenizer import SpecialIds
from sctd.errors import UserError
from sctd.model.bert import Bert
from sctd.model.shape import BertShape
from sctd.model.token_dropping import TokenDropping
from sctd.objective.arms import ARMS, KeepBy
from sctd.objective.importance import ImportanceTable
from sctd.objective.pretraining import PretrainingModel
from sctd.objective.schedule import HybridScheduleHook
from sctd.schedule import Schedule, ramp

MEASURED_STEPS = 50  # that a new importance table needs, unless the recipe says otherwise


def build_model(
    config: Config, shape: BertShape, special: SpecialIds, device: torch.device | str = "cpu"
) -> PretrainingModel:
    """The module of `config.arm`, on the CPU; its tables are on `device` already.

    Compiled where `train.compile` says so: one graph for each phase, none with breaks.
    """
    arm, train = ARMS[config.arm], config.train
    importance = dropping = None
    keeps, masks = arm.keep_by is KeepBy.IMPORTANCE, config.data.mask_by == "importance"
    if has_table(config):
        importance = ImportanceTable(
            shape.vocab_size,
            special.all,
            config.objective.importance_beta,
            device,
            masks,
            bool(measuring_steps(config)),
        )
    if arm.drops:
        always = (special.cls, special.sep, special.mask, special.unk)
        per_layer = arm.keep_by is KeepBy.RANDOM_PER_LAYER
        dropping = TokenDropping(shape.vocab_size, always, special.pad, per_layer, device)
    model = PretrainingModel(
        Bert(shape, config.model.layer_norm, train.checkpoint_activations, device),
        arm.layer_plan(config.model),
        config.objective,
        dropping,
        importance,
        arm.needs_full_path(config.objective),
        special.sep if config.attention.scope == "document" else None,
        keeps,
    )
    if train.compile:
        if importance is not None:  # CUDA graphs write into it in place
            torch._dynamo.mark_static_address(importance.sum_count_2V)
        mode = "reduce-overhead" if train.cuda_graphs else None
        # Not `model.compile`: that compiles the engine's hooks too, again for each step they count.
        model.forward = torch.compile(model.forward, fullgraph=True, mode=mode)  # type: ignore[method-assign]
    return model


def measuring_steps(config: Config) -> range:
    """The optimizer steps that measure an importance table which knows nothing yet, on the full path: the first ones of
    a run that starts from a trained model, or of a branch."""
    _, begin = parse_run(config.run.branch_from)
    first = (begin or 0) + 1
    return range(first, first + (config.objective.importance_warmup or 0) * has_table(config))


def has_table(config: Config) -> bool:
    """Whether the run has an importance table."""
    return ARMS[config.arm].keep_by is KeepBy.IMPORTANCE or config.data.mask_by == "importance"


def build_hook(config: Config, length: int) -> HybridScheduleHook:
    """The hybrid schedule of `config.arm` on rows of `length` tokens."""
    arm, schedule, steps, ratio = ARMS[config.arm], config.schedule, config.train.steps, config.model.keep_ratio
    full_start = max(schedule.full_start, *measuring_steps(config)[-1:], 0)
    return HybridScheduleHook(
        drops=arm.drops,
        interval=config.objective.interval if arm.aligns else 0,
        keep_ratio=Schedule((1, ramp(0, steps, ratio, 1.0) if arm.keep_grows else ratio)),
        length=length,
        dropping=(full_start + 1, steps - schedule.full_finish),
    )


def bert_shape(config: Config, manifest: Manifest) -> BertShape:
    """The shape of a run's model; its vocabulary is the corpus' unless the recipe sets one.

    Raises:
        UserError: a vocabulary too small for the corpus, or rows longer than the model's positions.
    """
    model = config.model
    vocab = model.vocab_size or manifest.vocab_size
    if vocab < manifest.vocab_size:
        raise UserError(
            f"model.vocab_size is {vocab}, but the tokenizer has token ids up to {manifest.vocab_size - 1}: "
            f"set it to {manifest.vocab_size}, or to 0 to take the tokenizer's"
        )
    length = row_lengths(config, manifest)[0]
    if length > model.max_positions:
        raise UserError(
            f"the corpus has rows of {length} tokens, model.max_positions is {model.max_positions}: "
            "raise it, or prepare the corpus with a smaller --seq-len"
        )
    return shape_of(config, vocab)


def shape_of(config: Config, vocab_size: int) -> BertShape:
    """The shape that a recipe describes, with a vocabulary of this size."""
    names = {field.name for field in fields(BertShape)} & vars(config.model).keys()
    return BertShape(**{name: getattr(config.model, name) for name in names} | {"vocab_size": vocab_size})


def row_lengths(config: Config, manifest: Manifest) -> tuple[int, ...]:
    """Tokens a row of the training, and of its warm-up where it has one.

    Raises:
        UserError: a length that the corpus was not packed to, or a warm-up that is not shorter.
    """
    length, warmup = config.data.seq_len or manifest.seq_len, config.data.warmup_seq_len
    found = (length, warmup) if warmup else (length,)
    for each in found:
        manifest.split(each, "train")
    if warmup >= length:
        raise UserError(f"data.warmup_seq_len is {warmup}, but the rows after it have {length} tokens: lower it")
    return found
