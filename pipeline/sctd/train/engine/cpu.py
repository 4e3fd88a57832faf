"""How a process uses the processors and the memory of its machine when it trains without a GPU."""

import ctypes
import os

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_NEVER = -1


def share_cores(ranks: int) -> None:
    """Ranks on one machine split its cores, unless the user has said how many threads each gets."""
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        return
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))


def keep_freed_memory() -> None:
    """Let the allocator keep what is freed instead of handing it back to the kernel.

    Every large tensor is otherwise fetched anew, page by page, which costs a training step more than its elementwise
    work does. Where the C library is not glibc, nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)


def repeatable_products() -> None:
    """Have MKL add in the same order at every run: by default its threads share a matrix product as they find time.

    Rarely, and on a busy machine more often, a sum would come out one rounding apart, and the run with it. To be called
    before the first product; a value that the user has set stays.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO")
