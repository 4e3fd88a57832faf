"""The module that the engine wraps: one forward computes the loss of one micro-batch in its phase.

The paths share the embeddings and the trunk, and the first of the middle layers, whose kept rows are the same in both:
its queries are the kept tokens, its keys and values come from all of them.

The last layer updates only the positions that a loss looks at ([CLS] and the predicted ones; keys and values come
from all): nothing else leaves the network, so nothing is lost. With `semantic_positions: all` the alignment looks at
every position and the last layer is computed in full.

Legend: B rows, S positions, M predicted positions, Q = 1 + M output positions, D hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sctd.config import ObjectiveConfig
from sctd.model.attention import Mask, segment_mask
from sctd.model.bert import Bert
from sctd.model.token_dropping import LayerPlan, TokenDropping
from sctd.objective.importance import ImportanceTable
from sctd.objective.schedule import Phase
from sctd.objective.semantic import hidden_kl
from sctd_kernels import gather_rows, mix_rows, token_losses

_FULL_PATH = 1  # stream of row seeds: where the paths of an ALIGN step part, they drop out different elements


@dataclass
class PathOutput:
    """One path: X_{l-1} at all positions, X_l at the positions that losses look at, and the MLM loss per target."""

    penultimate_BSD: Tensor
    last: Tensor
    losses_BM: Tensor
    is_correct_BM: Tensor | None


class PretrainingModel(nn.Module):
    """BERT with the losses of its arm.

    Args:
        dropping: None for an arm that drops nothing.
        importance: None for an arm that does not choose by importance.
        align_full: whether an ALIGN step runs the full path.
        document_end: id that ends each document ([SEP]) where attention stays inside documents, else None.
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
    ) -> None:
        super().__init__()
        self.bert = bert
        self.plan = plan
        self.objective = objective
        self.dropping = dropping
        self.importance = importance
        self.align_full = align_full
        self.document_end = document_end

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

        Args:
            input_ids: int64 (B, S), corrupted.
            positions: int64 (B, M), the predicted positions; labels: int64 (B, M), their original ids.
            row_seed: int64 (B,), orders ties of the selection.
            phase: set by the hybrid schedule hook. keep: K, likewise.
        """
        segments_BS = self._documents(input_ids)
        mask = None if segments_BS is None else segment_mask(segments_BS, segments_BS)
        trunk_BSD = self.bert.embeddings(input_ids, row_seed)
        for layer in self.bert.layers[: self.plan.first_dropped]:
            trunk_BSD = layer(trunk_BSD, None, mask, row_seed)

        middle = self.bert.layers[self.plan.middle]
        drop = full = first_BSD = None
        if phase is Phase.FULL or (phase is Phase.ALIGN and self.align_full):
            first_BSD = middle[0](trunk_BSD, None, mask, row_seed)
            full_BSD = first_BSD
            seed = mix_rows(row_seed, _FULL_PATH) if phase is Phase.ALIGN else row_seed
            for layer in middle[1:]:
                full_BSD = layer(full_BSD, None, mask, seed)
            full = self._tail(full_BSD, positions, labels, segments_BS, mask, seed, None)
        if phase is not Phase.FULL:
            assert self.dropping is not None, "a dropping phase needs a dropping arm"
            scores_V = sum_count_2V = None
            if self.importance is not None:
                scores_V = self.importance.scores_V
                sum_count_2V = self.importance.sum_count_2V if self.training else None
            merged_BSD = self.dropping(middle, trunk_BSD, input_ids, scores_V, row_seed, keep, segments_BS, first_BSD)
            drop = self._tail(merged_BSD, positions, labels, segments_BS, mask, row_seed, sum_count_2V)
        return self._combine(drop, full, input_ids)

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
            last = last_layer(hidden_BSD, None, mask, row_seed_B)
            targets_BMD = gather_rows(last, positions_BM)
        else:
            outputs_BQ = torch.cat([torch.zeros_like(positions_BM[:, :1]), positions_BM], dim=1)
            if segments_BS is not None:
                mask = segment_mask(segments_BS.gather(1, outputs_BQ), segments_BS)
            last = last_layer(gather_rows(hidden_BSD, outputs_BQ), hidden_BSD, mask, row_seed_B)
            targets_BMD = last[:, 1:]
        logits_NV = self.bert.logits(targets_BMD.flatten(0, 1))
        losses_BM = token_losses(logits_NV, labels_BM.flatten(), sum_count_2V).view(labels_BM.shape)
        is_correct_BM = None if self.training else logits_NV.argmax(-1).view(labels_BM.shape) == labels_BM
        return PathOutput(hidden_BSD, last, losses_BM, is_correct_BM)

    def _combine(
        self, drop: PathOutput | None, full: PathOutput | None, ids_BS: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of arm and phase: the mean of the MLM terms plus lambda times the sum of the KL terms.

        The switches of the terms speak of ALIGN steps, where both paths are there; one path alone is its MLM loss.
        """
        cfg, aligns = self.objective, drop is not None and full is not None
        parts, mlm, semantic = {}, [], []
        if drop is not None:
            parts["mlm_drop"] = drop.losses_BM.mean()
            mlm += [parts["mlm_drop"]] if cfg.mlm_drop or not aligns else []
        if full is not None:
            parts["mlm_full"] = full.losses_BM.mean()
            mlm += [parts["mlm_full"]] if cfg.mlm_full or not aligns else []
        if drop is not None and full is not None:
            if cfg.kl_global:
                parts["kl_global"] = self._kl(full.last, drop.last, ids_BS)
                semantic.append(parts["kl_global"])
            if cfg.kl_local:
                parts["kl_local"] = self._kl(full.penultimate_BSD, drop.penultimate_BSD, ids_BS)
                semantic.append(parts["kl_local"])
        terms = [term / len(mlm) for term in mlm] + [cfg.kl_weight * term for term in semantic]
        loss = sum(terms[1:], terms[0])
        if full is not None and full.is_correct_BM is not None:
            parts["accuracy"] = full.is_correct_BM.float().mean()
        return loss, {"loss": loss.detach(), **{name: value.detach() for name, value in parts.items()}}

    def _kl(self, teacher_BTD: Tensor, student_BTD: Tensor, ids_BS: Tensor) -> Tensor:
        if self.objective.detach_teacher:
            teacher_BTD = teacher_BTD.detach()
        if self.objective.semantic_positions == "cls":
            return hidden_kl(teacher_BTD[:, 0], student_BTD[:, 0])
        assert self.dropping is not None
        return hidden_kl(teacher_BTD.flatten(0, 1), student_BTD.flatten(0, 1), (ids_BS != self.dropping.pad).flatten())
