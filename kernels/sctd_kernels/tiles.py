"""What the Triton kernels share."""

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def own_rows(ROWS: tl.constexpr):
    """Rows of all that this program works on, in 64 bits: (ROWS, 1)."""
    return (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]


@triton.jit
def fmix32(x):
    """The finaliser of MurmurHash3, as in `hashing.py`."""
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    return x ^ (x >> 16)
