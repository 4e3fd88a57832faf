"""The whole model under torch.compile: one graph without breaks for each phase, and the same numbers."""

import pytest
import torch

from sctd.config import ObjectiveConfig
from sctd.model.bert import Bert, BertShape
from sctd.model.token_dropping import LayerPlan, TokenDropping
from sctd.objective.importance import ImportanceTable
from sctd.objective.pretraining import PretrainingModel
from sctd.objective.schedule import Phase

VOCAB, LENGTH, SEP = 60, 32, 3


pytestmark = pytest.mark.run


def make_model(per_layer: bool, document_end: int | None, family: str) -> PretrainingModel:
    torch.manual_seed(0)
    layers, first = {"bert": (4, 1), "modernbert": (3, 0)}[family]  # tracing takes seconds for each layer
    shape = BertShape(VOCAB, layers, 32, 2, 64, LENGTH, dropout=0.1, attention_dropout=0.0, family=family)
    return PretrainingModel(
        Bert(shape),
        LayerPlan(layers, first, 1),
        ObjectiveConfig(),
        TokenDropping(VOCAB, (1, 2, 3, 4), 0, per_layer),
        None if per_layer else ImportanceTable(VOCAB, (0, 1, 2, 3, 4), 0.9),
        document_end=document_end,
    )


@pytest.mark.parametrize(
    ("phase", "per_layer", "document_end", "family"),
    [
        (Phase.DROP, False, None, "bert"),
        (Phase.ALIGN, False, None, "bert"),
        (Phase.FULL, False, None, "bert"),
        (Phase.ALIGN, False, SEP, "bert"),
        (Phase.DROP, True, None, "bert"),
        (Phase.DROP, False, None, "modernbert"),
        (Phase.ALIGN, False, None, "modernbert"),
        (Phase.FULL, False, None, "modernbert"),
    ],
)
def test_one_graph_with_the_same_numbers(phase: Phase, per_layer: bool, document_end: int | None, family: str) -> None:
    ids = torch.randint(5, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[:, 12], ids[:, -1] = 2, SEP, SEP
    positions = torch.arange(1, 11).expand(3, 10).contiguous()
    batch = (ids, positions, ids.gather(1, positions), torch.arange(3))
    plain, compiled = (make_model(per_layer, document_end, family) for _ in range(2))
    compiled.compile(fullgraph=True, backend="aot_eager")
    losses = []
    for model in (plain, compiled):
        loss, _ = model(*batch, phase=phase, keep=16)
        loss.backward()
        losses.append(loss.detach())
    ulps = {"bert": 0.0, "modernbert": 1e-6}[family]  # eagerly, a rotation rounds its sums once less
    torch.testing.assert_close(*losses, rtol=ulps, atol=0)
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-6, atol=1e-7)
    if plain.importance is not None and compiled.importance is not None:
        sums, counts = zip(plain.importance.sum_count_2V, compiled.importance.sum_count_2V, strict=True)
        torch.testing.assert_close(*(sum_V.double() for sum_V in sums), rtol=ulps, atol=0)
        assert torch.equal(*counts)
