"""The model on a GPU: block masks, no host synchronisation, and the compiled step with CUDA graphs."""

import pytest
import torch
from torch import Tensor

from sctd.config import FAMILIES, ObjectiveConfig
from sctd.model.attention import Attention, segment_mask
from sctd.model.bert import Bert, BertShape
from sctd.model.token_dropping import LayerPlan, TokenDropping
from sctd.objective.importance import ImportanceTable
from sctd.objective.pretraining import PretrainingModel
from sctd.objective.schedule import Phase
from sctd_kernels import rotary_table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

VOCAB, LENGTH, KEEP, SEP = 500, 256, 128, 3
both = pytest.mark.parametrize("family", FAMILIES)


def make_model(
    document_end: int | None = None, dropout: float = 0.1, family: str = "bert", device: str = "cuda"
) -> PretrainingModel:
    torch.manual_seed(0)
    shape = BertShape(VOCAB, 4, 128, 2, 256, LENGTH, dropout=dropout, attention_dropout=0.0, family=family)
    model = PretrainingModel(
        Bert(shape, device=device),
        LayerPlan(4, 1, 1),
        ObjectiveConfig(),
        TokenDropping(VOCAB, (1, 2, 3, 4), 0, device=device),
        ImportanceTable(VOCAB, (0, 1, 2, 3, 4), 0.9, device),
        document_end=document_end,
    )
    return model.to(device)


def make_batch() -> tuple[Tensor, ...]:
    ids = torch.randint(5, VOCAB, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[:, 100], ids[:, -1] = 2, SEP, SEP
    positions = torch.arange(1, 39).expand(4, 38).contiguous()
    return tuple(tensor.cuda() for tensor in (ids, positions, ids.gather(1, positions), torch.arange(4)))


def step(model: PretrainingModel, batch: tuple[Tensor, ...], phase: Phase) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        loss, _ = model(*batch, phase=phase, keep=KEEP)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("turns", [False, True])
def test_block_mask_equals_the_dense_one(turns: bool) -> None:
    torch.manual_seed(0)
    table_2Sh = rotary_table(256, 64, 10_000.0, "cuda") if turns else None
    attention = Attention(128, 2, 0.0, table_2Sh).cuda()
    context = torch.randn(2, 256, 128, device="cuda", requires_grad=True)
    segments = (torch.rand(2, 256, device="cuda") < 0.03).int().cumsum(1)
    dense = segments[:, None, :, None] == segments[:, None, None, :]
    found = []
    for mask in (dense, segment_mask(segments, segments)):
        out = attention(context, context, mask)
        found.append((out, *torch.autograd.grad(out.square().sum(), [context, *attention.parameters()])))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3)


@both
@pytest.mark.parametrize("document_end", [None, SEP])
@pytest.mark.parametrize("phase", list(Phase))
def test_a_step_does_not_wait_for_the_device(phase: Phase, document_end: int | None, family: str) -> None:
    model, batch = make_model(document_end, family=family), make_batch()
    for _ in range(2):  # compiles what is compiled on first use
        step(model, batch, phase)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, batch, phase)
        model.importance.commit(True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@both
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_steps_equal_plain_ones(mode: str | None, family: str) -> None:
    plain, compiled, batch = make_model(family=family), make_model(family=family), make_batch()
    torch._dynamo.mark_static_address(compiled.importance.sum_count_2V)
    compiled.compile(fullgraph=True, mode=mode)
    for _ in range(4):  # CUDA graphs are recorded on the second call and replayed from the third on
        for phase in Phase:
            losses = step(plain, batch, phase), step(compiled, batch, phase).clone()
            torch.testing.assert_close(*losses, rtol=2e-2, atol=2e-2)
    assert torch.equal(plain.importance.sum_count_2V[1], compiled.importance.sum_count_2V[1])


@both
@pytest.mark.parametrize("phase", list(Phase))
def test_the_gpu_agrees_with_the_cpu(phase: Phase, family: str) -> None:
    """Same dropout masks, same selection, same losses: hashes do not know the device."""
    model, host, batch = make_model(family=family), make_model(family=family, device="cpu"), make_batch()
    host.load_state_dict(model.state_dict())
    loss, _ = model(*batch, phase=phase, keep=KEEP)
    expected, _ = host(*(tensor.cpu() for tensor in batch), phase=phase, keep=KEEP)
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(model.importance.sum_count_2V[1].cpu(), host.importance.sum_count_2V[1])


def test_the_rotary_table_is_the_cpus() -> None:
    """Every device turns by the same numbers, and no cast reaches them."""
    model = make_model(family="modernbert").bfloat16()
    table_2Sh = model.bert.layers[0].attention.rotary.table_2Sh
    assert table_2Sh.is_cuda and torch.equal(table_2Sh.cpu(), rotary_table(LENGTH, 64, 10_000.0))
