"""SCTD_KERNELS: what it takes, for which devices, and what it says of the rest."""

import pytest
import torch

from sctd_kernels import backend, dispatch, gather_rows, select


@pytest.fixture(autouse=True)
def nothing_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCTD_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_HAS_TRITON", True)


@pytest.mark.parametrize(
    ("asked", "device_type", "found"),
    [
        (None, "cpu", "torch"),
        ("auto", "cpu", "torch"),
        ("auto", "cuda", "triton"),
        (None, "cuda", "triton"),
        ("torch", "cuda", "torch"),
        ("triton", "cuda", "triton"),
        ("cuda", "cuda", "cuda"),
    ],
)
def test_what_runs_where(monkeypatch: pytest.MonkeyPatch, asked: str | None, device_type: str, found: str) -> None:
    if asked is not None:
        monkeypatch.setenv("SCTD_KERNELS", asked)
    assert backend(device_type) == found


def test_auto_does_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_HAS_TRITON", False)
    assert backend("cuda") == "torch"
    monkeypatch.setenv("SCTD_KERNELS", "triton")
    with pytest.raises(ValueError, match="Triton is not installed"):
        backend("cuda")


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCTD_KERNELS", "triton")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        select(torch.zeros(1, 2), 1, torch.arange(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend("cpu") == "triton"


def test_cuda_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCTD_KERNELS", "cuda")
    with pytest.raises(ValueError, match="the tensors are on cpu"):
        select(torch.zeros(1, 2), 1, torch.arange(1))


@pytest.mark.parametrize("asked", ["tritn", "", "TORCH"])
def test_unknown_name_is_refused_at_first_use(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setenv("SCTD_KERNELS", asked)
    with pytest.raises(ValueError, match=f"SCTD_KERNELS={asked}: .*torch"):
        gather_rows(torch.zeros(1, 2, 1), torch.zeros(1, 1, dtype=torch.long))
