"""A small model of an arm beside the count of its work, for tests that hold one against the other."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from sctd.config import config_from_dict
from sctd.corpus.tokenizer import SpecialIds
from sctd.model.bert import Bert
from sctd.model.convert import from_hf_config, from_hf_state
from sctd.objective.build import build_model, shape_of
from sctd.objective.pretraining import PretrainingModel
from sctd.objective.schedule import Phase
from sctd.train.flops import StepFlops, step_flops

VOCABULARY = 500


def load_hf(config: PreTrainedConfig, state: dict[str, Tensor]) -> Bert:
    """Our model with the weights of a masked language model of transformers."""
    model = Bert(from_hf_config(config))
    model.load_state_dict(from_hf_state(state, model.shape)[0])
    return model


def small(
    arm: str,
    length: int,
    where: str = "cls",
    recompute: bool = False,
    dropout: float = 0.0,
    family: str = "bert",
    **objective: Any,
) -> tuple[PretrainingModel, StepFlops]:
    """Six layers of 64 columns, and the count of a row of `length` tokens; `where`: semantic_positions."""
    sizes = {"layers": 6, "hidden_size": 64, "heads": 4, "intermediate_size": 256, "max_positions": length}
    config = config_from_dict(
        {
            "arm": arm,
            "model": sizes | {"family": family, "dropout": dropout, "attention_dropout": 0.0},
            "objective": {"semantic_positions": where} | objective,
            "train": {"checkpoint_activations": recompute},
        }
    )
    shape = shape_of(config, VOCABULARY)
    return build_model(config, shape, SpecialIds(0, 1, 2, 3, 4)), step_flops(config, shape, length)


def small_batch(rows: int, length: int, targets: int) -> dict[str, Tensor]:
    return {
        "input_ids": torch.randint(5, VOCABULARY, (rows, length)),
        "positions": torch.arange(1, 1 + targets).expand(rows, -1).contiguous(),
        "labels": torch.randint(5, VOCABULARY, (rows, targets)),
        "row_seed": torch.arange(rows),
    }


def phases(arm: str, keep: int = 32) -> list[tuple[Phase, int]]:
    """The phases that occur in a run of this arm, with K."""
    dropping = {"baseline": [], "sctd": [Phase.DROP, Phase.ALIGN]}.get(arm, [Phase.DROP])
    return [(phase, keep) for phase in (Phase.FULL, *dropping)]


def counted(model: PretrainingModel, batch: dict[str, Tensor], phase: Phase, keep: int) -> int:
    """FLOPs of forward and backward by torch's own counter."""
    # Attention as plain products: the counter knows them on every device.
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with plain, FlopCounterMode(display=False) as counter:
        model(**batch, phase=phase, keep=keep)[0].backward()
    return counter.get_total_flops()
