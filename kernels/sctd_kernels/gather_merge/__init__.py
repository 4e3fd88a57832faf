"""Take the kept rows out of a sequence, and put them back."""

from torch import Tensor

from sctd_kernels.dispatch import backend
from sctd_kernels.gather_merge import reference
from sctd_kernels.select import Selection

__all__ = ["gather", "gather_rows", "merge"]

_GATHER = {"torch": reference.gather}
_MERGE = {"torch": reference.merge}


def gather_rows(hidden_BSD: Tensor, index_BK: Tensor) -> Tensor:
    """States at the given positions: (B, S, D), int64 (B, K) with distinct entries in a row -> (B, K, D).

    Raises:
        ValueError: shapes that do not fit.
    """
    if hidden_BSD.dim() != 3 or index_BK.dim() != 2 or hidden_BSD.shape[0] != index_BK.shape[0]:
        raise ValueError(f"gather: hidden {tuple(hidden_BSD.shape)} does not fit index {tuple(index_BK.shape)}")
    return _GATHER[backend()](hidden_BSD, index_BK)


def gather(hidden_BSD: Tensor, selection: Selection) -> Tensor:
    """States of the kept positions: (B, S, D) -> (B, K, D)."""
    return gather_rows(hidden_BSD, selection.kept_BK)


def merge(hidden_BSD: Tensor, kept_BKD: Tensor, selection: Selection) -> Tensor:
    """`hidden_BSD` with its kept positions replaced by `kept_BKD`: out[b, s] = kept[b, inverse[b, s]] or hidden[b, s].

    The gradient of a kept position flows to `kept_BKD` alone, that of a dropped one to `hidden_BSD` alone.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    fits = hidden_BSD.dim() == 3 and selection.inverse_BS.shape == hidden_BSD.shape[:2]
    if not fits or kept_BKD.shape != (*selection.kept_BK.shape, hidden_BSD.shape[2]):
        raise ValueError(
            f"merge: hidden {tuple(hidden_BSD.shape)}, kept {tuple(kept_BKD.shape)} and a selection of "
            f"{tuple(selection.kept_BK.shape)} positions do not fit"
        )
    if kept_BKD.dtype != hidden_BSD.dtype:
        raise ValueError(f"merge: hidden is {hidden_BSD.dtype}, kept is {kept_BKD.dtype}")
    return _MERGE[backend()](hidden_BSD, kept_BKD, selection.kept_BK)
