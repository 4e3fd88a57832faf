"""The backends that tests of elementwise operations go through."""

import importlib.util
import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", params=["torch", "triton"])
def asked(request: pytest.FixtureRequest) -> Iterator[str]:
    """SCTD_KERNELS for the module: torch, and Triton under its interpreter."""
    if request.param == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if request.param == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1, which GPUs have no use for")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCTD_KERNELS", request.param)
        yield request.param
