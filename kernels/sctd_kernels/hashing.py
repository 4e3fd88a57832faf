"""Counter-based 32-bit hashes in torch, equal on every device and for every split of the batch.

The mixer is the finaliser of MurmurHash3 (Appleby, public domain). It is a bijection on 32 bits, and so is
`position -> hash_positions(seed, position)` for a fixed seed: two positions of one row never collide.
"""

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def _fmix32(x: Tensor) -> Tensor:
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _MASK32
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)


def hash_positions(row_seed_B: Tensor, length: int) -> Tensor:
    """Hash of (row seed, position): int64 (B, length) with values in [0, 2**32), distinct within a row.

    `row_seed_B` is int64 (B,); all of its 64 bits count.
    """
    low = (row_seed_B & _MASK32)[:, None]
    high = ((row_seed_B >> 32) & _MASK32)[:, None]
    position = torch.arange(length, device=row_seed_B.device)[None, :]
    return _fmix32(_fmix32((position + low) & _MASK32) ^ high)


def mix_rows(row_seed_B: Tensor, stream: int) -> Tensor:
    """Independent row seeds for another draw on the same rows (say, one per layer): int64 (B,)."""
    low = _fmix32((row_seed_B & _MASK32) ^ ((0x9E3779B9 * (stream + 1)) & _MASK32))
    high = _fmix32(((row_seed_B >> 32) & _MASK32) ^ low)
    return (high << 31) ^ low
