"""Semantic alignment of the token-dropping path with the full path (Zhong et al. 2023, equations 2 and 3)."""

import torch.nn.functional as F
from torch import Tensor


def hidden_kl(teacher_PD: Tensor, student_PD: Tensor, counts_P: Tensor | None = None) -> Tensor:
    """KL(p(teacher) || p(student)), p the softmax over the hidden dimension, in float32; mean over positions.

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
