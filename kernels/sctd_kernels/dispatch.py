"""Which implementation runs: `SCTD_KERNELS=auto|torch|triton|cuda`, decided once per kind of device.

- torch: the reference, on any device.
- triton: on GPUs, and on CPUs under Triton's interpreter (`TRITON_INTERPRET=1`), which is for tests.
- cuda: CUDA C++, compiled with nvcc on first use.
- auto: triton on GPUs where Triton is installed, else torch.
"""

import importlib.util
import os

CHOICES = ("auto", "torch", "triton", "cuda")
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def backend(device_type: str = "cpu") -> str:
    """Name of the implementation in use for tensors on devices of this type.

    Raises:
        ValueError: SCTD_KERNELS names something that there is not, or that cannot run on this kind of device.
    """
    asked = os.environ.get("SCTD_KERNELS", "auto")
    if asked not in CHOICES:
        raise ValueError(f"SCTD_KERNELS={asked}: unset it or name one of {', '.join(CHOICES)}")
    on_gpu = device_type == "cuda"
    if asked == "auto":
        return "triton" if on_gpu and _HAS_TRITON else "torch"
    if asked == "triton":
        if not _HAS_TRITON:
            raise ValueError("SCTD_KERNELS=triton: Triton is not installed; `pip install triton`, or unset it")
        if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"SCTD_KERNELS=triton: Triton has no {device_type} kernels; run on a GPU, or set TRITON_INTERPRET=1"
            )
    if asked == "cuda" and not on_gpu:
        raise ValueError(f"SCTD_KERNELS=cuda: the tensors are on {device_type}; run on a GPU, or unset it")
    return asked
