"""Held-out loss on the full path, whatever the arm: the same rows and masks at every call and for any rank count."""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from sctd.data.masking import Masker
from sctd.data.stream import Rows, valid_batches
from sctd.train.distributed import World


@torch.no_grad()
def validate(
    engine: DeepSpeedEngine,
    rows: Rows,
    masker: Masker,
    limit: int,
    batch: int,
    world: World,
    stop: Callable[[], bool],
) -> dict[str, float]:
    """Mean cross-entropy in nats, share of targets predicted right, and perplexity, over all ranks.

    Args:
        stop: asked before each batch, on all ranks; where it says so there is nothing to tell, an empty answer.
    """
    engine.eval()
    totals, stopped = torch.zeros(3, dtype=torch.float64, device=world.device), False
    for count, tensors in valid_batches(rows, masker, limit, batch, world.rank, world.size):
        if stopped := stop():
            break
        _, parts = engine(**{name: tensor.to(world.device) for name, tensor in tensors.items()})
        loss, accuracy = parts["mlm_full"], parts["accuracy"]
        totals += count * torch.stack([loss, accuracy, torch.ones_like(loss)]).double()
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
    }
