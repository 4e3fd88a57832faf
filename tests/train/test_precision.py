"""`train.precision: auto`: what it becomes on a device, and why."""

import pytest
import torch

from sctd.train.engine import devices
from sctd.train.engine.devices import fastest_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_cpu_gets_one_of_the_two_it_has() -> None:
    chosen, why = fastest_precision(CPU)
    other = {"bf16": "fp32", "fp32": "bf16"}[chosen]
    times, words = why.split(" ", 1)
    assert words == f"times as fast as {other} on this CPU" and float(times) >= 1.0


@pytest.mark.parametrize(("bf16", "chosen", "other"), [(30.0, "bf16", "fp32"), (4.0, "fp32", "bf16")])
def test_the_faster_one_is_chosen(monkeypatch: pytest.MonkeyPatch, bf16: float, chosen: str, other: str) -> None:
    rates = {torch.float32: 10.0, torch.bfloat16: bf16}
    monkeypatch.setattr(devices, "_products", rates.__getitem__)
    times = max(bf16, 10.0) / min(bf16, 10.0)
    assert fastest_precision(CPU) == (chosen, f"{times:.1f} times as fast as {other} on this CPU")


def test_the_rate_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other work on the machine makes products slower, and none faster."""
    now, seconds = [0.0], iter([0.05, 0.01, 0.08, 0.05, 0.05])
    monkeypatch.setattr(devices.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(devices.torch, "mm", lambda a, b: now.__setitem__(0, now[0] + next(seconds)))
    assert devices._products(torch.float32) == pytest.approx(100.0)


@pytest.mark.parametrize(("has", "chosen"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_gets_what_it_has(monkeypatch: pytest.MonkeyPatch, has: bool, chosen: str) -> None:
    def supported(including_emulation: bool = True) -> bool:
        assert not including_emulation, "an emulated bf16 is no gain"
        return has

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    found, why = fastest_precision(GPU)
    assert found == chosen and why == ("this GPU has it" if has else "this GPU has no bf16")
