"""The raw moves as operators that torch.compile takes whole, over whichever kernels are in use."""

import importlib
from types import ModuleType

import torch
from torch import Tensor

from sctd_kernels.dispatch import backend


def kernels(chosen: str) -> ModuleType:
    return importlib.import_module(f"sctd_kernels.gather_merge.{chosen}")


def _in_use(tensor: Tensor) -> ModuleType:
    return kernels(backend(tensor.device.type))


@torch.library.custom_op("sctd::gather", mutates_args=())
def gather(hidden_BSD: Tensor, index_BK: Tensor) -> Tensor:
    return _in_use(hidden_BSD).gather(hidden_BSD, index_BK)


@gather.register_fake
def _(hidden_BSD: Tensor, index_BK: Tensor) -> Tensor:
    return hidden_BSD.new_empty(*index_BK.shape, hidden_BSD.shape[2])


@torch.library.custom_op("sctd::split_backward", mutates_args=())
def split_backward(grad_kept_BKD: Tensor, grad_rest_BSD: Tensor | None, kept_BK: Tensor, inverse_BS: Tensor) -> Tensor:
    return _in_use(grad_kept_BKD).split_backward(grad_kept_BKD, grad_rest_BSD, kept_BK, inverse_BS)


@split_backward.register_fake
def _(grad_kept_BKD: Tensor, grad_rest_BSD: Tensor | None, kept_BK: Tensor, inverse_BS: Tensor) -> Tensor:
    return grad_kept_BKD.new_empty(*inverse_BS.shape, grad_kept_BKD.shape[2])


@torch.library.custom_op("sctd::merge", mutates_args=())
def merge(hidden_BSD: Tensor, kept_BKD: Tensor, kept_BK: Tensor, inverse_BS: Tensor) -> Tensor:
    return _in_use(hidden_BSD).merge(hidden_BSD, kept_BKD, kept_BK, inverse_BS)


@merge.register_fake
def _(hidden_BSD: Tensor, kept_BKD: Tensor, kept_BK: Tensor, inverse_BS: Tensor) -> Tensor:
    return hidden_BSD.new_empty(hidden_BSD.shape)


@torch.library.custom_op("sctd::merge_backward", mutates_args=())
def merge_backward(grad_BSD: Tensor, kept_BK: Tensor, inverse_BS: Tensor) -> tuple[Tensor, Tensor]:
    return _in_use(grad_BSD).merge_backward(grad_BSD, kept_BK, inverse_BS)


@merge_backward.register_fake
def _(grad_BSD: Tensor, kept_BK: Tensor, inverse_BS: Tensor) -> tuple[Tensor, Tensor]:
    return grad_BSD.new_empty(grad_BSD.shape), grad_BSD.new_empty(*kept_BK.shape, grad_BSD.shape[2])
