"""How strongly the alignment acts: the gradient of the KL terms beside that of the MLM terms."""

import torch
from torch import Tensor

from sctd.data.stream import Batch
from sctd.objective.pretraining import PretrainingModel
from sctd.objective.schedule import Phase

_ROWS = 8  # of a micro-batch: enough for a number that is plotted, at little cost
_SCALE = 2.0**16  # of both terms: small gradients are 0 in float16


def kl_gradient(model: PretrainingModel, batch: Batch, keep: int) -> float | None:
    """Norm of the KL terms' gradient (lambda included) relative to that of the MLM terms, over all parameters.

    Of an ALIGN step on the first rows of a micro-batch, without dropout. None where there is no KL or no MLM term, and
    under ZeRO-3, where no rank holds whole parameters.

    Args:
        keep: K.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        return None
    names = ("input_ids", "positions", "labels", "row_seed")
    ids_BS, positions_BM, labels_BM, seed_B = (batch[name][:_ROWS] for name in names)
    training = model.training
    model.eval()
    try:
        parts = model.parts(*model.paths(ids_BS, positions_BM, labels_BM, seed_B, Phase.ALIGN, keep), ids_BS)
        semantic, mlm = model.semantic(parts), model.mlm(parts)
        if semantic is None or not mlm.requires_grad:
            return None
        norms = [_norm(term, parameters) for term in (semantic, mlm)]
    finally:
        model.train(training)
    return float(norms[0] / norms[1].clamp(min=torch.finfo(torch.float32).tiny))


def _norm(term: Tensor, parameters: list[torch.nn.Parameter]) -> Tensor:
    grads = torch.autograd.grad(_SCALE * term, parameters, retain_graph=True, allow_unused=True)
    return torch.stack([grad.float().norm() for grad in grads if grad is not None]).norm()
