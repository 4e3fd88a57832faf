"""`train.precision: auto`: which one a device computes in fastest."""

import time

import torch

_SECONDS = 0.2  # for each precision: a CPU may be busy with other work for a while
_SIZE = 512


def fastest_precision(device: torch.device) -> tuple[str, str]:
    """The precision, and why: bf16 on GPUs that have it, else fp16; on a CPU the faster of bf16 and fp32, timed."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU has it"
        return "fp16", "this GPU has no bf16"
    rates = {name: _rate(dtype) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    slow, fast = sorted(rates, key=lambda name: rates[name])
    return fast, f"{rates[fast] / rates[slow]:.1f} times as fast as {slow} on this CPU"


def _rate(dtype: torch.dtype) -> float:
    """Matrix products a second, the fastest of those in a short time."""
    a = torch.ones(_SIZE, _SIZE, dtype=dtype)
    fastest, deadline = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        torch.mm(a, a)
        fastest = min(fastest, time.perf_counter() - start)
    return 1.0 / fastest
