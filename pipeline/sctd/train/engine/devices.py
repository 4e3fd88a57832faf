"""What the devices that a run may use can do."""

import re
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """Figures of a vendor's data sheet, without sparsity.

    Args:
        half: FLOP/s of 16-bit matrix products. single: FLOP/s in float32.
        bandwidth: bytes/s of its memory. capacity: bytes of it.
        link: bytes/s to its neighbours in one direction, NVLink or else PCIe.
        bf16: whether its 16-bit products come in bf16, not in fp16 alone.
    """

    half: float
    single: float
    bandwidth: float
    capacity: float
    link: float
    bf16: bool = True


_PEAK_SECONDS = 0.5  # how long a CPU is measured: it may be busy with other work for a while

GPUS = {
    "A100-40GB": Gpu(312e12, 19.5e12, 1555e9, 40e9, 300e9),
    "A100-80GB": Gpu(312e12, 19.5e12, 2039e9, 80e9, 300e9),
    "H100-80GB": Gpu(989e12, 67e12, 3350e9, 80e9, 450e9),
    "H200-141GB": Gpu(989e12, 67e12, 4800e9, 141e9, 450e9),
    "A10": Gpu(125e12, 31.2e12, 600e9, 24e9, 32e9),
    "L40S": Gpu(362e12, 91.6e12, 864e9, 48e9, 32e9),
    "V100-32GB": Gpu(125e12, 15.7e12, 900e9, 32e9, 150e9, bf16=False),
}


def device_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak matrix throughput in FLOP/s: the data sheet's on a known GPU, measured on a CPU, else None."""
    if device.type == "cuda":
        gpu = gpu_named(torch.cuda.get_device_name(device))
        if gpu is None:
            return None
        return gpu.single if dtype is torch.float32 else gpu.half
    size = 1024
    a = torch.randn(size, size).to(dtype)
    fastest, deadline = float("inf"), time.perf_counter() + _PEAK_SECONDS
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        torch.mm(a, a)
        fastest = min(fastest, time.perf_counter() - start)
    return 2.0 * size**3 / fastest


def gpu_named(name: str) -> Gpu | None:
    """By a driver's name for it, such as `NVIDIA A100-SXM4-40GB`; sizes of memory do not matter to its speed here."""
    words = re.findall(r"\w+", name)
    return next((gpu for key, gpu in GPUS.items() if key.split("-")[0] in words), None)
