"""From a configuration to the module that trains: model, arm, losses and importance table."""

import torch

from sctd.config import Config
from sctd.corpus.tokenizer import SpecialIds
from sctd.model.bert import Bert, BertShape
from sctd.model.token_dropping import TokenDropping
from sctd.objective.arms import ARMS, Selection
from sctd.objective.importance import ImportanceTable
from sctd.objective.pretraining import PretrainingModel
from sctd.objective.schedule import HybridScheduleHook
from sctd.schedule import Schedule, ramp


def build_model(
    config: Config, shape: BertShape, special: SpecialIds, device: torch.device | str = "cpu"
) -> PretrainingModel:
    """The module of `config.arm`, on the CPU; its tables are on `device` already.

    Compiled where `train.compile` says so: one graph for each phase, none with breaks.
    """
    arm, train = ARMS[config.arm], config.train
    importance = dropping = None
    if arm.selection is Selection.IMPORTANCE:
        importance = ImportanceTable(shape.vocab_size, special.all, config.objective.importance_beta, device)
    if arm.drops:
        always = (special.cls, special.sep, special.mask, special.unk)
        per_layer = arm.selection is Selection.RANDOM_PER_LAYER
        dropping = TokenDropping(shape.vocab_size, always, special.pad, per_layer, device)
    model = PretrainingModel(
        Bert(shape, config.model.layer_norm, train.checkpoint_activations, device),
        arm.layer_plan(config.model),
        config.objective,
        dropping,
        importance,
        arm.needs_full_path(config.objective),
        special.sep if config.attention.scope == "document" else None,
    )
    if train.compile:
        if importance is not None:  # CUDA graphs write into it in place
            torch._dynamo.mark_static_address(importance.sum_count_2V)
        mode = "reduce-overhead" if train.cuda_graphs else None
        # Not `model.compile`: that compiles the engine's hooks too, again for each step they count.
        model.forward = torch.compile(model.forward, fullgraph=True, mode=mode)  # type: ignore[method-assign]
    return model


def build_hook(config: Config, length: int) -> HybridScheduleHook:
    """The hybrid schedule of `config.arm` on rows of `length` tokens."""
    arm, schedule, steps, ratio = ARMS[config.arm], config.schedule, config.train.steps, config.model.keep_ratio
    return HybridScheduleHook(
        drops=arm.drops,
        interval=config.objective.interval if arm.aligns else 0,
        keep_ratio=Schedule((1, ramp(0, steps, ratio, 1.0) if arm.keep_grows else ratio)),
        length=length,
        dropping=(schedule.full_start + 1, steps - schedule.full_finish),
    )
