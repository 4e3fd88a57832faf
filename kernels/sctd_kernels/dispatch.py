"""Which implementation of an operation runs: `SCTD_KERNELS=auto|torch|triton|cuda`, decided once per kind of device.

- torch: the reference, on any device.
- triton: on GPUs, and on CPUs under Triton's interpreter (`TRITON_INTERPRET=1`), which is for tests.
- cuda: CUDA C++, compiled with nvcc on first use; Triton where an operation has none.
- auto: triton on GPUs where Triton is installed, else torch.

What the operations share on the host is here too: the way to a backend, and the checks of what they are given.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

CHOICES = ("auto", "torch", "triton", "cuda")
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def backend(device_type: str = "cpu") -> str:
    """Name of the implementation in use for tensors on devices of this type.

    Raises:
        ValueError: SCTD_KERNELS names something that does not exist, or that cannot run on this kind of device.
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


class Operation:
    """One raw operation, without checks and gradients, over its backends.

    The reference returns its results. `triton.py` and `cuda.py` beside it have a function of the same name that fills
    them in: it takes the results first, allocated by `empty`, and then the arguments of the reference.

    torch.compile traces through the reference, and sees a kernel as the operator `torch.ops.sctd.NAME`. Eager calls go
    straight to the kernel: torch's dispatcher would cost more than the small ones do.

    Args:
        reference: its annotations are the operator's schema, its module's package is where kernels are looked for.
        empty: the results for given arguments, not yet filled in; by default one like the first argument.
        has_cuda: CUDA C++ pays where rows are searched or moved; a plain stream over memory gains nothing over Triton.
        mutates: names of the arguments that are changed.
        strided: kernels take their arguments as they lie in memory; otherwise all are made contiguous before.
    """

    def __init__(
        self,
        reference: Callable[..., Any],
        empty: Callable[..., Any] = lambda first, *_: first.new_empty(first.shape),
        *,
        has_cuda: bool = False,
        mutates: Sequence[str] = (),
        strided: bool = False,
    ) -> None:
        self.reference, self.has_cuda = reference, has_cuda
        self._name, self._package = reference.__name__, reference.__module__.rpartition(".")[0]
        self._empty, self._strided = empty, strided
        schema = torch.library.infer_schema(reference, mutates_args=mutates)
        operator = torch.library.custom_op(f"sctd::{self._name}", self._eager, mutates_args=mutates, schema=schema)
        operator.register_fake(empty)
        self._operator = getattr(torch.ops.sctd, self._name).default

    def __call__(self, *arguments: Any) -> Any:
        chosen = backend(arguments[0].device.type)
        if chosen != "torch" and torch.compiler.is_compiling():
            return self._operator(*arguments)
        return self.run(chosen, *arguments)

    def run(self, chosen: str, *arguments: Any) -> Any:
        """The results of this backend, whatever SCTD_KERNELS says."""
        if chosen == "torch":
            return self.reference(*arguments)
        results = self._empty(*arguments)
        first = results if isinstance(results, Tensor) else results[0]
        if first.numel():
            file = "cuda" if chosen == "cuda" and self.has_cuda else "triton"
            fill = getattr(importlib.import_module(f"{self._package}.{file}"), self._name)
            if not self._strided:
                arguments = tuple(map(_contiguous, arguments))
            with torch.cuda.device_of(first):  # kernels are launched on the current device
                fill(results, *arguments)
        return results

    def _eager(self, *arguments: Any) -> Any:
        return self.run(backend(arguments[0].device.type), *arguments)


def _contiguous(argument: Any) -> Any:
    if isinstance(argument, list):
        return [tensor.contiguous() for tensor in argument]
    return argument.contiguous() if isinstance(argument, Tensor) else argument


def say(tensor: Tensor) -> str:
    """A tensor in an error message."""
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"


def either(dtypes: Sequence[torch.dtype]) -> str:
    """Dtypes in an error message."""
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def require(what: str, tensor: Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype], beside: Tensor) -> None:
    """Raise a ValueError unless the tensor has this shape, one of these dtypes, and the device of `beside`."""
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype not in dtypes or tensor.device != beside.device:
        wanted = f"{either(dtypes)} {tuple(shape)} on {beside.device}"
        raise ValueError(f"{what} must be {wanted} to fit {say(beside)}, got {say(tensor)}")


def require_range(what: str, index: Tensor, into: Tensor, dim: int) -> None:
    """Raise a ValueError unless all entries are places along this dimension of `into`.

    Only on CPUs: the host of a GPU would have to wait.
    """
    if index.device.type == "cpu" and not torch.compiler.is_compiling() and index.numel():
        low, high = (int(value) for value in index.aminmax())
        if low < 0 or high >= into.shape[dim]:
            raise ValueError(
                f"{what} {tuple(index.shape)} are {low}..{high}, out of range 0..{into.shape[dim] - 1} of {say(into)}"
            )
