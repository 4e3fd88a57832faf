"""SCTD_KERNELS: what it takes, and that it is read once."""

from collections.abc import Iterator

import pytest
import torch

from sctd_kernels import backend, gather_rows
from sctd_kernels import dispatch as module


@pytest.fixture(autouse=True)
def fresh_choice() -> Iterator[None]:
    module.backend.cache_clear()
    yield
    module.backend.cache_clear()


@pytest.mark.parametrize("asked", [None, "auto", "torch"])
def test_known_names(monkeypatch: pytest.MonkeyPatch, asked: str | None) -> None:
    if asked is None:
        monkeypatch.delenv("SCTD_KERNELS", raising=False)
    else:
        monkeypatch.setenv("SCTD_KERNELS", asked)
    assert backend() in module.AVAILABLE
    if asked == "torch":
        assert backend() == "torch"


@pytest.mark.parametrize("asked", ["tritn", "", "TORCH"])
def test_unknown_name_is_refused_at_first_use(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setenv("SCTD_KERNELS", asked)
    with pytest.raises(ValueError, match=f"SCTD_KERNELS={asked}: .*torch"):
        gather_rows(torch.zeros(1, 2, 1), torch.zeros(1, 1, dtype=torch.long))


def test_the_choice_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCTD_KERNELS", "torch")
    assert backend() == "torch"
    monkeypatch.setenv("SCTD_KERNELS", "nonsense")
    assert backend() == "torch"
