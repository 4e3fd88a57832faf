"""Which implementation runs: `SCTD_KERNELS=auto|torch`, read once per process."""

import functools
import os

AVAILABLE = ("torch",)


@functools.cache
def backend() -> str:
    """Name of the implementation in use.

    Raises:
        ValueError: SCTD_KERNELS names something that this build does not have.
    """
    asked = os.environ.get("SCTD_KERNELS", "auto")
    if asked == "auto":
        return AVAILABLE[0]
    if asked not in AVAILABLE:
        raise ValueError(f"SCTD_KERNELS={asked}: this build has {', '.join(AVAILABLE)}; unset it or name one of these")
    return asked
