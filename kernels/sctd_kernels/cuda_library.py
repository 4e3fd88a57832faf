"""The CUDA C++ kernels as one library, compiled for the present GPU on first use, and called through ctypes.

A compiled library is kept in $SCTD_CACHE, or else in ~/.cache/sctd_kernels, under a hash of all that it is made from.
"""

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from sctd_kernels import nvcc


@functools.cache
def library(device: torch.device) -> ctypes.CDLL:
    """The kernels for this GPU.

    Raises:
        ValueError: there is no nvcc, or it cannot compile them.
    """
    major, minor = torch.cuda.get_device_capability(device)
    built_in = nvcc.BUILT_IN.exists() and major >= 8
    return load(nvcc.BUILT_IN if built_in else _compiled(f"{major}{minor}"))


def load(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    found.sctd_error_text.restype = ctypes.c_char_p
    return found


def _compiled(architecture: str) -> Path:
    compiler = nvcc.find()
    if compiler is None:
        raise ValueError(
            "SCTD_KERNELS=cuda: nvcc was not found in CUDA_HOME or on PATH; install the CUDA toolkit, "
            "or unset SCTD_KERNELS"
        )
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    cache = Path(os.environ.get("SCTD_CACHE") or Path.home() / ".cache/sctd_kernels")
    path = cache / nvcc.fingerprint(compiler, [target]) / nvcc.BUILT_IN.name
    if not path.exists():
        try:
            nvcc.compile_library(compiler, [target], path)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"SCTD_KERNELS=cuda: {error}; try another CUDA toolkit, or unset SCTD_KERNELS") from error
    return path


def launch(name: str, *arguments: Tensor | int | None) -> None:
    """Call the launcher `sctd_<name>` in the current stream of the current device, and do not wait.

    Tensors are on that device and contiguous, as they are handed over as they lie in memory. None is a null pointer.

    Raises:
        RuntimeError: CUDA refused the launch; names the tensors and says why.
    """
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    kernels, stream = _kernels_and_stream(tensors[0].device)
    code = getattr(kernels, f"sctd_{name}")(*map(_as_c, arguments), ctypes.c_void_p(stream))
    if code != 0:
        shapes = ", ".join(f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in tensors)
        why = kernels.sctd_error_text(code).decode()
        raise RuntimeError(
            f"{name}: the CUDA kernel on {tensors[0].device} did not start, {why}; it was given {shapes}"
        )


def _kernels_and_stream(device: torch.device) -> tuple[ctypes.CDLL, int]:
    """What tests replace to run the kernels elsewhere."""
    return library(device), torch.cuda.current_stream(device).cuda_stream


def _as_c(argument: Tensor | int | None) -> ctypes.c_void_p | ctypes.c_int64:
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())
