"""The elementwise operations, rotation and the cross-entropy natively on a GPU, in Triton and in torch."""

import os
from collections.abc import Iterator

import pytest
import torch

from elementwise_checks import (
    check_add_norm,
    check_dropout,
    check_geglu,
    check_gelu,
    check_rotate,
    check_token_losses,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs TRITON_INTERPRET unset"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, scope="module", params=["triton", "torch"])
def asked(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCTD_KERNELS", request.param)
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 33), (2, 40, 64)])
def test_dropout(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_dropout(shape, dtype, 0.1, "cuda")


@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", [*zip(DTYPES, DTYPES, strict=True), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("shape", [(2, 9, 768), (3, 5, 1023), (1, 40, 100)])
def test_add_norm(shape: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype], rate: float) -> None:
    check_add_norm(shape, *dtypes, rate, "cuda")


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 1), (30, 64, 256), (33, 20, 1500)])
def test_gelu(size: tuple[int, int, int], dtype: torch.dtype, has_bias: bool) -> None:
    check_gelu(*size, dtype, has_bias, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2,), (0, 6), (33, 2304), (3, 5, 2062)])
def test_geglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_geglu(shape, dtype, "cuda")


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (3, 70, 12, 64), (2, 33, 5, 22)])
def test_rotate(shape: tuple[int, int, int, int], dtype: torch.dtype, placed: bool) -> None:
    check_rotate(shape, dtype, placed, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(0, 5), (1, 1), (77, 30522), (100, 50)])
def test_token_losses(size: tuple[int, int], dtype: torch.dtype) -> None:
    check_token_losses(*size, dtype, "cuda")
