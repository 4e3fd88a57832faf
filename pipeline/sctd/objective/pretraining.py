"""The module that the engine wraps: one forward computes the loss of one micro-batch in its phase.

The paths share the embeddings and the trunk, and the first of the middle layers, whose kept rows are the same in both:
its queries are the kept tokens, its keys and values come from all of them.

The last layer updates only the positions that a loss looks at ([CLS] and the predicted ones; keys and values come
from all): nothing else leaves the network, so nothing is lost. With `semantic_positions: all` the alignment looks at
every position and the last layer is computed in full.

The alignment compares states as the next module reads them: in a modernbert after the norm of that module.

Legend: B rows, S positions, M predicted positions, Q = 1 + M output positions, D hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sctd.config import ObjectiveConfig
from sctd.model.attention import Mask, segment_mask
from sctd.model.bert import Bert
from sctd.model.token_dropping import LayerPlan, TokenDropping
from sctd.objective.importance import ImportanceTable
from sctd.objective.schedule import Phase
from sctd_kernels import gather_rows, mix_rows, token_losses

_FULL_PATH = 1  # stream of row seeds: where the paths of an ALIGN step part, they drop out different elements


@dataclass
class PathOutput:
    """One path: X_{l-1} at all positions, X_l at the positions that losses look at, and the MLM loss per target.

    logits_BMV: in evaluation alone.
    """

    penultimate_BSD: Tensor
    last: Tensor
    losses_BM: Tensor
    logits_BMV: Tensor | None


class PretrainingModel(nn.Module):
    """BERT with the losses of its arm.

    Args:
        dropping: None for an arm that drops nothing.
        importance: None where neither the kept tokens nor the masks are chosen by it.
        align_full: whether an ALIGN step runs the full path.
        document_end: id that ends each document ([SEP]) where attention stays inside documents, else None.
        keep_by_importance: whether the dropping path keeps the most important tokens, else random ones.
    """

    def __init__(
        self,
        bert: Bert,
        plan: LayerPlan,
        objective: ObjectiveConfig,
        dropping: TokenDropping | None = None,
        importance: ImportanceTable | None = None,
        align_full: bool = True,
        document_end: int | None = None,
        keep_by_importance: bool = True,
    ) -> None:
        super().__init__()
        self.bert = bert
        self.plan = plan
        self.objective = objective
        self.dropping = dropping
        self.importance = importance
        self.align_full = align_full
        self.document_end = document_end
        self.keep_by_importance = keep_by_importance

    @property
    def tables(self) -> dict[str, Tensor]:
        """What training moves beside the parameters, by name: float32 and whole on every rank, part of checkpoints."""
        if self.importance is None:
            return {}
        table = self.importance
        found = {"scores": table.scores_V, "masking": table.snapshot_V, "measured": table.seen_V}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        labels: Tensor,
        row_seed: Tensor,
        phase: Phase = Phase.FULL,
        keep: int = 0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch and its parts, detached.

        In evaluation the full path also hands out `accuracy` and `logits`, (B, M, V).

        Args:
            input_ids: int64 (B, S), corrupted.
            positions: int64 (B, M), the predicted positions; labels: int64 (B, M), their original ids.
            row_seed: int64 (B,), orders ties of the selection.
            phase: set by the hybrid schedule hook. keep: K, likewise.
        """
        drop, full = self.paths(input_ids, positions, labels, row_seed, phase, keep)
        parts = self.parts(drop, full, input_ids)
        loss, semantic = self.mlm(parts), self.semantic(parts)
        loss = loss if semantic is None else loss + semantic
        if full is not None and full.logits_BMV is not None:
            parts["accuracy"] = (full.logits_BMV.argmax(-1) == labels).float().mean()
            parts["logits"] = full.logits_BMV
        return loss, {"loss": loss.detach(), **{name: value.detach() for name, value in parts.items()}}

    def paths(
        self, ids_BS: Tensor, positions_BM: Tensor, labels_BM: Tensor, row_seed_B: Tensor, phase: Phase, keep: int
    ) -> tuple[PathOutput | None, PathOutput | None]:
        """The dropping and the full path, as far as the phase has them."""
        segments_BS = self._documents(ids_BS)
        mask = None if segments_BS is None else segment_mask(segments_BS, segments_BS)
        trunk_BSD = self.bert.embeddings(ids_BS, row_seed_B)
        for layer in self.bert.layers[: self.plan.first_dropped]:
            trunk_BSD = layer(trunk_BSD, None, mask, row_seed_B)

        middle = self.bert.layers[self.plan.middle]
        scores_V = sum_count_2V = None
        if self.importance is not None:
            scores_V = self.importance.scores_V if self.keep_by_importance else None
            sum_count_2V = self.importance.sum_count_2V if self.training else None
        drop = full = first_BSD = None
        if phase is Phase.FULL or (phase is Phase.ALIGN and self.align_full):
            first_BSD = middle[0](trunk_BSD, None, mask, row_seed_B)
            full_BSD = first_BSD
            seed_B = mix_rows(row_seed_B, _FULL_PATH) if phase is Phase.ALIGN else row_seed_B
            for layer in middle[1:]:
                full_BSD = layer(full_BSD, None, mask, seed_B)
            # The table gathers the losses of the path that trains alone, and of the dropping one where both do.
            gathers = sum_count_2V if phase is Phase.FULL else None
            full = self._tail(full_BSD, positions_BM, labels_BM, segments_BS, mask, seed_B, gathers)
        if phase is not Phase.FULL:
            assert self.dropping is not None, "a dropping phase needs a dropping arm"
            merged_BSD = self.dropping(middle, trunk_BSD, ids_BS, scores_V, row_seed_B, keep, segments_BS, first_BSD)
            drop = self._tail(merged_BSD, positions_BM, labels_BM, segments_BS, mask, row_seed_B, sum_count_2V)
        return drop, full

    def _documents(self, ids_BS: Tensor) -> Tensor | None:
        """Number of the document that each position belongs to, its separator included: int32 (B, S)."""
        if self.document_end is None:
            return None
        ends_BS = (ids_BS == self.document_end).int()
        return (ends_BS.cumsum(1) - ends_BS).int()

    def _tail(
        self,
        hidden_BSD: Tensor,
        positions_BM: Tensor,
        labels_BM: Tensor,
        segments_BS: Tensor | None,
        mask: Mask | None,
        row_seed_B: Tensor,
        sum_count_2V: Tensor | None,
    ) -> PathOutput:
        *whole, last_layer = self.bert.layers[self.plan.tail]
        for layer in whole:
            hidden_BSD = layer(hidden_BSD, None, mask, row_seed_B)
        if self.objective.semantic_positions == "all":
            last = self.bert.norm(last_layer(hidden_BSD, None, mask, row_seed_B))
            targets_BMD = gather_rows(last, positions_BM)
        else:
            outputs_BQ = torch.cat([torch.zeros_like(positions_BM[:, :1]), positions_BM], dim=1)
            if segments_BS is not None:
                mask = segment_mask(segments_BS.gather(1, outputs_BQ), segments_BS)
            outputs_BQD = gather_rows(hidden_BSD, outputs_BQ)
            last = self.bert.norm(last_layer(outputs_BQD, hidden_BSD, mask, row_seed_B, outputs_BQ))
            targets_BMD = last[:, 1:]
        logits_NV = self.bert.logits(targets_BMD.flatten(0, 1))
        losses_BM = token_losses(logits_NV, labels_BM.flatten(), sum_count_2V).view(labels_BM.shape)
        logits_BMV = None if self.training else logits_NV.view(*labels_BM.shape, -1)
        return PathOutput(hidden_BSD, last, losses_BM, logits_BMV)

    def parts(self, drop: PathOutput | None, full: PathOutput | None, ids_BS: Tensor) -> dict[str, Tensor]:
        """The terms by name, each without its weight; those that this phase and these switches have."""
        cfg, parts = self.objective, {}
        if drop is not None:
            parts["mlm_drop"] = drop.losses_BM.mean()
        if full is not None:
            parts["mlm_full"] = full.losses_BM.mean()
        if drop is not None and full is not None:
            if cfg.kl_global:
                parts["kl_global"] = self._kl(full.last, drop.last, ids_BS)
            if cfg.kl_local:
                states = full.penultimate_BSD, drop.penultimate_BSD
                parts["kl_local"] = self._kl(*states, ids_BS, self.bert.layers[-1].read)
        return parts

    def mlm(self, parts: dict[str, Tensor]) -> Tensor:
        """Mean of the MLM terms. The switches speak of ALIGN steps, where both paths are there; one path alone is its
        own MLM loss. 0 where both are switched off."""
        cfg, both = self.objective, {"mlm_drop", "mlm_full"} <= parts.keys()
        wanted = {"mlm_drop": cfg.mlm_drop or not both, "mlm_full": cfg.mlm_full or not both}
        terms = [parts[name] for name, counts in wanted.items() if counts and name in parts]
        return sum(terms[1:], terms[0]) / len(terms) if terms else torch.zeros_like(parts["mlm_drop"])

    def semantic(self, parts: dict[str, Tensor]) -> Tensor | None:
        """lambda times the sum of the KL terms; None where there is none."""
        terms = [parts[name] for name in ("kl_global", "kl_local") if name in parts]
        return self.objective.kl_weight * sum(terms[1:], terms[0]) if terms else None

    def _kl(
        self, teacher_BTD: Tensor, student_BTD: Tensor, ids_BS: Tensor, read: Any = lambda states: states
    ) -> Tensor:
        """Over [CLS], or over all positions but [PAD], of states as `read` reads them."""
        counts_N = None
        if self.objective.semantic_positions == "cls":
            teacher_ND, student_ND = teacher_BTD[:, 0], student_BTD[:, 0]
        else:
            assert self.dropping is not None
            teacher_ND, student_ND = teacher_BTD.flatten(0, 1), student_BTD.flatten(0, 1)
            counts_N = (ids_BS != self.dropping.pad).flatten()
        teacher_ND, student_ND = read(teacher_ND), read(student_ND)
        return hidden_kl(teacher_ND.detach() if self.objective.detach_teacher else teacher_ND, student_ND, counts_N)


def hidden_kl(teacher_PD: Tensor, student_PD: Tensor, counts_P: Tensor | None = None) -> Tensor:
    """KL(p(teacher) || p(student)), p the softmax over the hidden dimension, in float32; mean over positions (Zhong et
    al. 2023, equations 2 and 3).

    The mean (not the sum) over positions keeps the weight lambda independent of the batch size.

    Args:
        counts_P: bool, the positions that the mean is taken over; None for all.
    """
    teacher = F.log_softmax(teacher_PD.float(), dim=-1)
    student = F.log_softmax(student_PD.float(), dim=-1)
    if counts_P is None:
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    kl_P = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return (kl_P * counts_P).sum() / counts_P.sum()
