"""The importance table of token dropping: a running mean of the MLM loss of each vocabulary id (Hou et al. 2022).

The table is float32 whatever the engine does to the model: steps of 0.5 % round away in bfloat16. It is therefore no
module, and no buffer of one. Within a step, losses are summed as 64-bit fixed-point integers. Integer sums do not
depend on the order of their terms, so the table is bit for bit the same for any split of the same losses into
micro-batches and ranks, on GPUs (whose scatter-adds have no order) too.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from sctd_kernels import FIXED_POINT

INITIAL = 10.0


class ImportanceTable:
    """One score per vocabulary id, the same on all ranks.

    Args:
        special: ids that are never updated.
        beta: share of the old value that an update keeps.
        for_masks: whether masks are drawn by it too.

    Attributes:
        scores_V: float32, the table.
        seen_V: float32, in how many of the measuring steps each id occurred; None where nothing is measured.
        snapshot_V: the table as it was at an earlier step, by which masks are drawn; None where they are not.
        sum_count_2V: int64, accumulators of the step's losses, filled by `sctd_kernels.token_losses`.
    """

    def __init__(
        self,
        vocab_size: int,
        special: tuple[int, ...],
        beta: float,
        device: torch.device | str = "cpu",
        for_masks: bool = False,
        measures: bool = False,
    ) -> None:
        self.scores_V = torch.full((vocab_size,), INITIAL, dtype=torch.float32, device=device)
        self.snapshot_V = self.scores_V.clone() if for_masks else None
        self.seen_V = torch.zeros_like(self.scores_V) if measures else None
        self.beta = beta
        self.sum_count_2V = torch.zeros(2, vocab_size, dtype=torch.int64, device=device)
        self._updatable_V = torch.ones(vocab_size, dtype=torch.bool, device=device)
        self._updatable_V[list(special)] = False

    @torch.no_grad()
    def commit(self, applied: bool, measuring: bool = False) -> None:
        """At the end of an optimizer step: all-reduce the sums and move each id that occurred towards its mean loss.

        Args:
            applied: whether the optimizer step was applied; a skipped one leaves the table unchanged.
            measuring: the table knows nothing yet: an id's first mean is its score, and later ones count as in a plain
                average, until that is slower than `beta`.
        """
        if applied:
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(self.sum_count_2V)
            total_V, count_V = self.sum_count_2V
            mean_V = (total_V.double() / (FIXED_POINT * count_V.clamp(min=1))).float()
            beta: float | Tensor = self.beta
            if measuring:
                assert self.seen_V is not None
                self.seen_V += count_V > 0
                beta = (1 - 1 / self.seen_V.clamp(min=1)).clamp(max=self.beta)
            moved_V = beta * self.scores_V + (1 - beta) * mean_V
            self.scores_V = torch.where((count_V > 0) & self._updatable_V, moved_V, self.scores_V)
        self.sum_count_2V.zero_()

    @torch.no_grad()
    def end_measuring(self) -> None:
        """Rank ids that did not occur meanwhile where the most important tenth of the others begins: they are rare."""
        assert self.seen_V is not None
        known_V = (self.seen_V > 0) & self._updatable_V
        if known_V.any():
            level = self.scores_V[known_V].quantile(0.9)
            self.scores_V = torch.where(known_V | ~self._updatable_V, self.scores_V, level)

    def restore(self, scores_V: Tensor) -> None:
        """Continue from the scores of a checkpoint."""
        self.scores_V.copy_(scores_V)
        self.sum_count_2V.zero_()
