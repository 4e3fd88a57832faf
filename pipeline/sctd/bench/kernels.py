"""The kernels against what one would write without them, and against a plain copy of the same bytes.

Legend: B rows, S positions a row, K kept positions a row, D hidden size, V vocabulary.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sctd.bench.paths import SPECIAL, make_batch, make_shape, random_ltd_missing
from sctd.bench.result import write_result
from sctd.bench.timing import DEVICE, medians
from sctd.config import Config
from sctd.model.token_dropping import kept_tokens
from sctd_kernels import dropout_add_norm, linear_gelu, merge, select, split, token_losses

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_RATE = 0.1
Candidates = dict[str, Callable[[], object]]
T = TypeVar("T")


def bench_kernels(config: Config, sizes: list[tuple[int, int]], rounds: int, out: Path) -> None:
    """Print the table and write `kernels-<device>.json` into `out`."""
    backends = ["torch", "triton", "cuda"] if DEVICE.type == "cuda" else ["torch"]
    missing = random_ltd_missing()
    repeat = 20 if DEVICE.type == "cuda" else 3
    results = {}
    for rows, length in sizes:
        seconds: dict[str, dict[str, float]] = {}
        for title, candidates in _groups(config, rows, length, backends, missing is None).items():
            seconds[title] = medians(candidates, rounds, repeat, say=f"{rows}x{length} {title}")
        results[f"{rows}x{length}"] = seconds
    print(_table(results))
    if missing:
        print(f"DeepSpeed's random-LTD is not in the table: {missing}")
    result = {"precision": config.train.precision, "rounds": rounds, "repeat": repeat, "seconds": results}
    print(f"written {write_result(out, 'kernels', result)}")


def _groups(config: Config, rows: int, length: int, backends: list[str], has_ltd: bool) -> dict[str, Candidates]:
    shape, dtype = make_shape(config, length), _DTYPES[config.train.precision]
    batch = make_batch(config, shape.vocab_size, rows, length)
    ids_BS, seed_B, keep = batch["input_ids"], batch["row_seed"], kept_tokens(config.model.keep_ratio, length)
    table_V = torch.rand(shape.vocab_size, device=DEVICE)
    table_V[[SPECIAL.cls, SPECIAL.sep, SPECIAL.mask]] = float("inf")
    hidden_BSD = torch.randn(rows, length, shape.hidden_size, device=DEVICE, dtype=dtype).requires_grad_()
    grad_BSD = torch.randn_like(hidden_BSD)
    moved = torch.randn(rows, length + keep, shape.hidden_size, device=DEVICE, dtype=dtype)

    def ours() -> Tensor:
        selection = select(ids_BS, keep, seed_B, table_V=table_V)
        kept_BKD, rest_BSD = split(hidden_BSD, selection)
        return merge(rest_BSD, kept_BKD, selection)

    def plain() -> Tensor:
        kept_BK = table_V[ids_BS].topk(keep, dim=1).indices.sort(dim=1).values
        index_BKD = kept_BK[..., None].expand(-1, -1, hidden_BSD.shape[-1])
        return hidden_BSD.scatter(1, index_BKD, hidden_BSD.gather(1, index_BKD))

    others = {"topk + gather + scatter": plain, "the same, compiled": torch.compile(plain)}
    if has_ltd:
        others["DeepSpeed random-LTD ops"] = _random_ltd(hidden_BSD, keep)
    together: Candidates = {}
    with_backward: Candidates = {}
    choose: Candidates = {
        f"sctd, {b}": _under(b, lambda: select(ids_BS, keep, seed_B, table_V=table_V)) for b in backends
    }
    choose["topk + sort"] = lambda: table_V[ids_BS].topk(keep, dim=1).indices.sort(dim=1)
    for name, call in {**{f"sctd, {b}": _under(b, ours) for b in backends}, **others}.items():
        together[name] = torch.no_grad()(call)
        with_backward[name] = _backward(call, hidden_BSD, grad_BSD)
    together["copy of the same bytes"] = moved.clone
    with_backward["copy of the same bytes"] = lambda: (moved.clone(), moved.clone())
    groups: dict[str, Candidates] = {
        "select + split + merge": together,
        "select + split + merge, with backward": with_backward,
        "select": choose,
    }
    return groups | _elementwise(config, hidden_BSD, seed_B, [b for b in backends if b != "cuda"])


def _elementwise(config: Config, x_BSD: Tensor, seed_B: Tensor, backends: list[str]) -> dict[str, Candidates]:
    """Dropout + residual + LayerNorm, linear + GELU and cross-entropy, each with its backward."""
    shape = make_shape(config, x_BSD.shape[1])
    width, inner, dtype = shape.hidden_size, shape.intermediate_size, x_BSD.dtype
    weight_D, bias_D = torch.ones(width, device=DEVICE), torch.zeros(width, device=DEVICE)
    expand_ED = torch.randn(inner, width, device=DEVICE, dtype=dtype).mul_(0.02).requires_grad_()
    bias_E = torch.zeros(inner, device=DEVICE, dtype=dtype).requires_grad_()
    targets = max(1, round(0.15 * x_BSD.shape[1])) * len(x_BSD)
    logits_NV = torch.randn(targets, shape.vocab_size, device=DEVICE, dtype=dtype).requires_grad_()
    labels_N = torch.randint(shape.vocab_size, (targets,), device=DEVICE)
    sums_2V = torch.zeros(2, shape.vocab_size, dtype=torch.int64, device=DEVICE)
    weight_D, bias_D = weight_D.to(dtype).requires_grad_(), bias_D.to(dtype).requires_grad_()
    rest_BSD = torch.randn_like(x_BSD)

    def add_norm() -> Tensor:
        return dropout_add_norm(x_BSD, rest_BSD, weight_D, bias_D, 1e-12, _RATE, seed_B, 1)

    def plain_add_norm() -> Tensor:
        return F.layer_norm(rest_BSD + F.dropout(x_BSD, _RATE), (width,), weight_D, bias_D, 1e-12)

    def gelu() -> Tensor:
        return linear_gelu(x_BSD, expand_ED, bias_E)

    def plain_gelu() -> Tensor:
        return F.gelu(F.linear(x_BSD, expand_ED, bias_E))

    def losses() -> Tensor:
        return token_losses(logits_NV, labels_N, sums_2V)

    def plain_losses() -> Tensor:
        found = F.cross_entropy(logits_NV.float(), labels_N, reduction="none")
        sums_2V[0].index_add_(0, labels_N, found.detach().long())
        sums_2V[1].index_add_(0, labels_N, torch.ones_like(labels_N))
        return found

    groups: dict[str, Candidates] = {}
    for title, ours, plain in (
        ("dropout + residual + LayerNorm", add_norm, plain_add_norm),
        ("linear + GELU", gelu, plain_gelu),
        ("cross-entropy + accumulators", losses, plain_losses),
    ):
        calls = {f"sctd, {b}": _under(b, ours) for b in backends} | {
            "torch": plain,
            "torch, compiled": torch.compile(plain),
        }
        of = logits_NV if ours is losses else x_BSD
        groups[f"{title}, with backward"] = {name: _backward(call, of, None) for name, call in calls.items()}
    return groups


def _under(backend: str, call: Callable[[], T]) -> Callable[[], T]:
    def chosen() -> T:
        os.environ["SCTD_KERNELS"] = backend
        try:
            return call()
        finally:
            del os.environ["SCTD_KERNELS"]

    return chosen


def _backward(call: Callable[[], Tensor], of: Tensor, grad: Tensor | None) -> Callable[[], object]:
    def both() -> object:
        out = call()
        return torch.autograd.grad(out, of, torch.ones_like(out) if grad is None else grad)

    return both


def _random_ltd(hidden_BSD: Tensor, keep: int) -> Callable[[], Tensor]:
    from deepspeed.ops.random_ltd.dropping_utils import GatherTokens, ScatterTokens, gpt_sample_tokens

    rows, length, _ = hidden_BSD.shape

    def call() -> Tensor:
        index, _ = gpt_sample_tokens(keep, length, rows, 1, device=str(hidden_BSD.device))
        whole, kept = GatherTokens.apply(hidden_BSD, index[0], True)
        return ScatterTokens.apply(whole, kept, index[0], True)

    return call


def _table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = ["| rows x length | work | by | microseconds | x sctd |", "|---|---|---|---|---|"]
    for size, groups in results.items():
        for title, seconds in groups.items():
            best = min(value for name, value in seconds.items() if name.startswith("sctd"))
            for name, value in seconds.items():
                lines.append(f"| {size} | {title} | {name} | {1e6 * value:,.1f} | {value / best:.2f} |")
    return "\n".join(lines)
