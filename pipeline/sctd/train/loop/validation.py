"""Held-out loss on the full path, whatever the arm: the same rows and masks at every call and for any rank count.

Beside it `context_use`: how much the predictions at [MASK] depend on the tokens around it. A model that knows only how
frequent tokens are predicts the same everywhere.

Legend: B rows of a batch, M predicted positions, N of them that are masked, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor

from sctd.data.masking import Masker
from sctd.data.stream import Rows, valid_batches
from sctd.train.engine.distributed import World

_MASKS = 512  # about as many contexts are compared, over all ranks


@torch.no_grad()
def held_out(
    engine: DeepSpeedEngine, rows: Rows, masker: Masker, limit: int, batch: int, world: World, stop: Callable[[], bool]
) -> dict[str, float]:
    """Mean cross-entropy in nats, share of targets predicted right, perplexity and context use, over all ranks.

    Args:
        limit: rows, at most. batch: rows at once.
        stop: asked before each batch, on all ranks; once it is true the answer is empty.
    """
    engine.eval()
    totals, stopped = torch.zeros(3, dtype=torch.float64, device=world.device), False
    contexts = [torch.empty(0, engine.module.bert.shape.vocab_size, device=world.device)]
    row = world.rank  # rows go round the ranks
    for count, tensors in valid_batches(rows, masker, limit, batch, world.rank, world.size):
        if stopped := stop():
            break
        _, parts = engine(**{name: tensor.to(world.device) for name, tensor in tensors.items()})
        loss, accuracy = parts["mlm_full"], parts["accuracy"]
        totals += count * torch.stack([loss, accuracy, torch.ones_like(loss)]).double()
        ids_BS, positions_BM = tensors["input_ids"], tensors["positions"]
        compared = len(range(row, max(1, _MASKS // positions_BM.shape[1]), world.size))
        row += count * world.size
        if compared and count:
            is_mask_BM = (ids_BS.gather(1, positions_BM) == masker.mask_id)[: min(compared, count)]
            logits_BMV = parts["logits"][: len(is_mask_BM)]
            contexts.append(logits_BMV[is_mask_BM.to(world.device)].float().softmax(-1))
        del parts  # logits are large
    engine.train()
    if stopped:
        return {}
    if world.size > 1:
        dist.all_reduce(totals)
    loss_sum, correct, rows_seen = totals.tolist()
    return {
        "valid_loss": loss_sum / rows_seen,
        "valid_accuracy": correct / rows_seen,
        "valid_perplexity": math.exp(min(loss_sum / rows_seen, 50.0)),
        "context_use": context_use(torch.cat(contexts), world),
    }


def context_use(predicted_NV: Tensor, world: World) -> float:
    """Mean total variation distance between the distribution predicted at a mask and the mean of those at all masks.

    0: every context gets the same prediction; towards 1: each its own.

    Args:
        predicted_NV: float32, distributions of this rank.
    """
    sums_V1 = torch.cat([predicted_NV.double().sum(0), predicted_NV.new_tensor([len(predicted_NV)]).double()])
    if world.size > 1:
        dist.all_reduce(sums_V1)
    count = sums_V1[-1].clamp(min=1)
    distance = (predicted_NV - (sums_V1[:-1] / count).float()).abs().sum().double() / 2
    if world.size > 1:
        dist.all_reduce(distance)
    return float(distance / count)
