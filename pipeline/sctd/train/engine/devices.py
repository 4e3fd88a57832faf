"""What the devices that a run may use can do, and how a process on a CPU uses its cores and memory."""

import ctypes
import os
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_NEVER = -1


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


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # of train.precision
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
    return 2.0 * size**3 * _products(dtype, size, 0.5)


def gpu_named(name: str) -> Gpu | None:
    """By a driver's name for it, such as `NVIDIA A100-SXM4-40GB`; sizes of memory do not matter to its speed here."""
    words = re.findall(r"\w+", name)
    return next((gpu for key, gpu in GPUS.items() if key.split("-")[0] in words), None)


def device_name() -> str:
    """The GPU's name, or the CPU's with its number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    model = next((line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), "CPU")
    return f"{model}, {torch.get_num_threads()} threads"


def measured_on(*packages: str) -> dict[str, Any]:
    """What a measurement has beside its numbers: device, versions of these packages, date."""
    versions = {package: version(package) for package in packages}
    return {"device": device_name(), "versions": versions, "date": datetime.now(UTC).strftime("%Y-%m-%d")}


def fastest_precision(device: torch.device) -> tuple[str, str]:
    """What `train.precision: auto` becomes, and why: bf16 on GPUs that have it, else fp16; on a CPU the faster of bf16
    and fp32, timed."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU has it"
        return "fp16", "this GPU has no bf16"
    rates = {name: _products(dtype) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    slow, fast = sorted(rates, key=lambda name: rates[name])
    return fast, f"{rates[fast] / rates[slow]:.1f} times as fast as {slow} on this CPU"


def _products(dtype: torch.dtype, size: int = 512, seconds: float = 0.2) -> float:
    """Products of square matrices a second, by the fastest of a stretch of time: a CPU may be busy for a part of it."""
    a = torch.ones(size, size, dtype=dtype)
    fastest, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        torch.mm(a, a)
        fastest = min(fastest, time.perf_counter() - start)
    return 1.0 / fastest


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
