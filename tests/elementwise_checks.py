"""What the elementwise operations and the cross-entropy must compute, written apart from them."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sctd_kernels import dropout, dropout_add_norm, linear_gelu, token_losses
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


def check_gelu(rows: int, width: int, inner: int, dtype: torch.dtype, device: str = "cpu") -> None:
    rng = torch.Generator().manual_seed(rows + width + inner)
    inputs = [torch.randn(*size, generator=rng).to(dtype) for size in ((rows, width), (inner, width), (inner,))]
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    before = F.linear(*exact)
    cumulative = torch.tensor([[math.erf(v / math.sqrt(2)) for v in row] for row in before.tolist()]).view(rows, inner)
    wanted = before.detach() * (1 + cumulative) / 2
    moved = [tensor.clone().to(device).requires_grad_() for tensor in inputs]
    out = linear_gelu(*moved)
    scale = float(wanted.abs().max()) + 1
    torch.testing.assert_close(out.cpu().double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)
    found = torch.autograd.grad(out.sum(), moved)
    expected = torch.autograd.grad(F.gelu(before).sum(), exact)
    for one, other in zip(found, expected, strict=True):
        bound = TOLERANCE[dtype] * (float(other.detach().abs().max()) + 1)
        torch.testing.assert_close(one.cpu().double(), other, rtol=TOLERANCE[dtype], atol=bound)


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
