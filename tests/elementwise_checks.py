"""What the elementwise operations, rotation and the cross-entropy must compute, written apart from them."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sctd_kernels import dropout, dropout_add_norm, geglu, linear_gelu, rotary_table, rotate, token_losses
from support import MASK32, fmix32

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def kept(seed: int, site: int, position: int, column: int, threshold: int) -> bool:
    """Whether dropout keeps an element, from the definition: three hashes, and half of the last one's bits."""
    low = fmix32((seed & MASK32) ^ (0x9E3779B9 * (site + 1) & MASK32))
    high = fmix32((seed >> 32 & MASK32) ^ low)
    low ^= high << 31 & MASK32
    key = fmix32(fmix32(position + low & MASK32) ^ high >> 1)
    bits = fmix32(key ^ (0x9E3779B9 * (column // 2) & MASK32))
    return ((bits >> 16 * (column % 2) & 0xFFFF) ^ 0x8000) >= threshold


def keep_mask(seeds: Tensor, site: int, length: int, width: int, rate: float) -> Tensor:
    threshold = round(rate * 65536)
    rows = [
        [[kept(seed, site, position, column, threshold) for column in range(width)] for position in range(length)]
        for seed in seeds.tolist()
    ]
    return torch.tensor(rows)


def check_dropout(shape: tuple[int, int, int], dtype: torch.dtype, rate: float, device: str = "cpu") -> None:
    rng = torch.Generator().manual_seed(sum(shape))
    x = (torch.rand(shape, generator=rng) + 0.5).to(dtype)
    seeds = torch.randint(-(2**63), 2**63 - 1, shape[:1], generator=rng)
    mask = keep_mask(seeds, 7, *shape[1:], rate)
    moved = x.clone().to(device).requires_grad_()
    out = dropout(moved, rate, seeds.to(device), 7)
    (grad,) = torch.autograd.grad(out.float().sum(), moved)
    for found in (out, grad):
        assert found.dtype == dtype and torch.equal(found.cpu() != 0, mask)
    scale = 65536 / (65536 - round(rate * 65536))
    torch.testing.assert_close(out.cpu(), x * mask * scale, rtol=TOLERANCE[dtype], atol=0)


def check_add_norm(
    shape: tuple[int, int, int], x_dtype: torch.dtype, dtype: torch.dtype, rate: float, device: str = "cpu"
) -> None:
    """Value and all four gradients, against autograd over float64 torch with the mask from the definition."""
    rng = torch.Generator().manual_seed(sum(shape))
    x, residual, grad = (torch.randn(shape, generator=rng) for _ in range(3))
    weight, bias = torch.randn(shape[2], generator=rng) + 1, torch.randn(shape[2], generator=rng)
    seeds = torch.randint(2**62, shape[:1], generator=rng)
    inputs = [x.to(x_dtype), *(tensor.to(dtype) for tensor in (residual, weight, bias))]
    scale = 65536 / (65536 - round(rate * 65536))
    mask = keep_mask(seeds, 3, *shape[1:], rate) * scale
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    wanted = F.layer_norm(exact[1] + exact[0] * mask, shape[2:], exact[2], exact[3], 1e-5)
    moved = [tensor.clone().to(device).requires_grad_() for tensor in inputs]
    out = dropout_add_norm(*moved, 1e-5, rate, seeds.to(device) if rate else None, 3)
    assert out.dtype == dtype
    given = grad.to(dtype)
    found = [out, *torch.autograd.grad(out, moved, given.to(device))]
    expected = [wanted, *torch.autograd.grad(wanted, exact, given.double())]
    tolerance = max(TOLERANCE[x_dtype], TOLERANCE[dtype])
    for one, other in zip(found, expected, strict=True):
        bound = tolerance * max(1.0, float(other.detach().abs().max()))
        torch.testing.assert_close(one.cpu().double(), other, rtol=tolerance, atol=bound)


def check_gelu(
    rows: int, width: int, inner: int, dtype: torch.dtype, has_bias: bool = True, device: str = "cpu"
) -> None:
    rng = torch.Generator().manual_seed(rows + width + inner)
    sizes = ((rows, width), (inner, width), (inner,))[: 2 + has_bias]
    inputs = [torch.randn(*size, generator=rng).to(dtype) for size in sizes]
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    before = F.linear(*exact)
    wanted = before.detach() * normal_below(before)
    moved = [tensor.clone().to(device).requires_grad_() for tensor in inputs]
    out = linear_gelu(*moved) if has_bias else linear_gelu(*moved, None)
    assert_near(out, wanted)
    found = torch.autograd.grad(out.sum(), moved)
    for one, other in zip(found, torch.autograd.grad(F.gelu(before).sum(), exact), strict=True):
        assert_near(one, other)


def normal_below(x: Tensor) -> Tensor:
    """The normal distribution up to x: half of 1 + erf(x / sqrt 2)."""
    return torch.tensor([(1 + math.erf(value / math.sqrt(2))) / 2 for value in x.flatten().tolist()]).view(x.shape)


def assert_near(found: Tensor, wanted: Tensor) -> None:
    """Equal within the tolerance of the dtype that was found, beside the largest number wanted."""
    tolerance = TOLERANCE[found.dtype]
    scale = float(wanted.detach().abs().max()) + 1 if wanted.numel() else 1.0
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=tolerance, atol=tolerance * scale)


def check_geglu(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> None:
    """Value, and gradients of both halves against torch's own in float64."""
    rng = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=rng).to(dtype)
    exact = x.double().requires_grad_()
    inner, gate = exact.tensor_split(2, -1)
    wanted = F.gelu(inner) * gate
    moved = x.clone().to(device).requires_grad_()
    out = geglu(moved)
    assert out.dtype == dtype and out.is_contiguous()
    assert_near(out, inner.detach() * normal_below(inner) * gate.detach())
    grad = torch.randn(wanted.shape, generator=rng).to(dtype)
    assert_near(*torch.autograd.grad(out, moved, grad.to(device)), *torch.autograd.grad(wanted, exact, grad.double()))


def check_rotate(shape: tuple[int, int, int, int], dtype: torch.dtype, placed: bool, device: str = "cpu") -> None:
    """A part of a fused projection turned, and its gradient turned back, as complex numbers in float64."""
    rows, length, heads, width = shape
    rng = torch.Generator().manual_seed(sum(shape))
    table = rotary_table(length + 7, width, 100.0, "cpu")
    place = torch.randint(length + 7, (rows, length), generator=rng) if placed else torch.arange(length).repeat(rows, 1)
    fused = torch.randn(rows, length, 3, heads, width, generator=rng).to(dtype)
    grad = torch.randn(shape, generator=rng).to(dtype)
    turn = torch.complex(*table.double())[place][:, :, None]
    moved = fused.clone().to(device).requires_grad_()
    out = rotate(moved.unbind(2)[1], table.to(device), place.to(device) if placed else None)
    assert out.dtype == dtype and out.shape == shape and out.is_contiguous()
    (found,) = torch.autograd.grad(out, moved, grad.to(device))
    assert not found[:, :, ::2].any()
    for one, given, by in ((out, fused[:, :, 1], turn), (found[:, :, 1], grad, turn.conj())):
        turned = torch.complex(*given.double().tensor_split(2, -1)) * by
        assert_near(one, torch.cat([turned.real, turned.imag], -1))


def check_token_losses(count: int, vocab: int, dtype: torch.dtype, device: str = "cpu") -> None:
    rng = torch.Generator().manual_seed(count + vocab)
    logits = (torch.randn(count, vocab, generator=rng) * 5).to(dtype)
    labels = torch.randint(vocab, (count,), generator=rng)
    weights = torch.randn(count, generator=rng)
    sums = torch.zeros(2, vocab, dtype=torch.int64, device=device)
    moved = logits.clone().to(device).requires_grad_()
    losses = token_losses(moved, labels.to(device), sums)
    assert losses.dtype == torch.float32 and losses.shape == (count,)
    exact = logits.double().numpy()
    top = exact.max(axis=1, initial=-np.inf)
    wanted = top + np.log(np.exp(exact - top[:, None]).sum(1)) - exact[np.arange(count), labels.numpy()]
    np.testing.assert_allclose(losses.detach().cpu().numpy(), wanted, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(losses, moved, weights.to(device))
    share = np.exp(exact - top[:, None]) / np.exp(exact - top[:, None]).sum(1, keepdims=True)
    share[np.arange(count), labels.numpy()] -= 1
    np.testing.assert_allclose(
        grad.cpu().double().numpy(), share * weights[:, None].numpy(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )
    # The accumulators hold exactly what the losses that came out say: half-to-even fixed point, counted at the label.
    expected = np.zeros((2, vocab), dtype=np.int64)
    for label, loss in zip(labels.tolist(), losses.tolist(), strict=True):
        expected[:, label] += (round(min(max(loss, 0.0), 1e4) * 2**24), 1)
    assert np.array_equal(sums.cpu().numpy(), expected)
