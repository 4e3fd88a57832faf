"""The arms of an experiment: how tokens are chosen, which layers drop, and whether steps align."""

from dataclasses import dataclass
from enum import StrEnum

from sctd.config import ModelConfig, ObjectiveConfig
from sctd.model.token_dropping import LayerPlan


class KeepBy(StrEnum):
    """How the kept tokens of a row are chosen."""

    NONE = "none"  # all layers see all tokens
    IMPORTANCE = "importance"  # by the importance table
    RANDOM = "random"  # special tokens and [MASK] kept, the rest drawn at random
    RANDOM_PER_LAYER = "random_per_layer"  # a fresh random subset for each layer


@dataclass(frozen=True)
class Arm:
    """`aligns`: has ALIGN steps. `keep_grows`: K rises linearly to S over the run. `first_dropped`: where not L/2-1."""

    keep_by: KeepBy
    aligns: bool = False
    keep_grows: bool = False
    first_dropped: int | None = None

    @property
    def drops(self) -> bool:
        return self.keep_by is not KeepBy.NONE

    def layer_plan(self, model: ModelConfig) -> LayerPlan:
        first = model.first_dropped
        if first is None:
            first = model.layers // 2 - 1 if self.first_dropped is None else self.first_dropped
        return LayerPlan(model.layers, min(first, model.layers - model.full_tail - 1), model.full_tail)

    def needs_full_path(self, objective: ObjectiveConfig) -> bool:
        """Whether any term of an ALIGN step looks at the full path."""
        return self.aligns and (objective.mlm_full or objective.kl_global or objective.kl_local)


ARMS = {
    "baseline": Arm(KeepBy.NONE),
    "token_drop": Arm(KeepBy.IMPORTANCE),
    "sctd": Arm(KeepBy.IMPORTANCE, aligns=True),
    "random_drop": Arm(KeepBy.RANDOM),
    # Yao et al. 2022 leave the first and the last layer whole and grow the subset to the full sequence.
    "random_ltd": Arm(KeepBy.RANDOM_PER_LAYER, keep_grows=True, first_dropped=1),
}
