"""One DROP and one ALIGN step under torch's profiler: a trace for Perfetto, and the ten slowest operations."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from sctd.bench.contenders import Contender
from sctd.bench.result import write_result
from sctd.bench.timing import DEVICE, self_times, wait
from sctd.config import Config

_SLOWEST = 10
_WIDEST = 72  # characters of a name: templated kernels have hundreds

# Kinds of work by the names of operations and kernels; the first that matches counts.
_KINDS = {
    "attention": r"flash|fmha|sdpa|attention",
    "matrix products": r"gemm|nvjet|cutlass|cublas|aten::(add|b|baddb)?mm\b|aten::linear|mkldnn",
    "optimizer": r"adam|optimizer|multi_tensor",
    "losses": r"softmax|nll|losses|cross_entropy",
    "selecting and moving tokens": r"select_kernel|gather|merge|scatter|split|sort|topk|index",
    "rotary positions": r"rotate|rotary",
    "dropout, norm, GELU": r"norm|geg?lu|dropout|bernoulli",
    "copies and fills": r"copy|memcpy|memset|fill|zero|clone|cat\b",
}


def profile_steps(config: Config, rows: int, length: int, out: Path) -> None:
    """Write `trace-drop.json.gz` and `trace-align.json.gz` into `out`, for https://ui.perfetto.dev.

    What is printed goes into `profile-PRECISION-<device>.json` too.
    """
    result: dict[str, dict[str, Any]] = {}
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [])
    for name in ("drop", "align"):
        contender = Contender(name, config, rows, length)
        for _ in range(2):  # warms up
            contender.step()
        wait()
        with profile(activities=activities) as profiler:
            contender.step()
            wait()
        trace = out / f"trace-{name}.json.gz"
        profiler.export_chrome_trace(str(trace))
        print(f"{name.upper()} step, {rows}x{length}, {DEVICE.type}, {config.train.precision}: {trace}")
        times = self_times(profiler)
        result[name] = {"ms": sum(spent for _, spent, _ in times) / 1e3, "summary": summary(times)}
        print("\n".join(f"  {line}" for line in result[name]["summary"]))
        del contender
    precision = config.train.precision
    facts = {"size": f"{rows}x{length}", "precision": precision, "steps": result}
    print(f"written {write_result(out, f'profile-{precision}', facts)}")


def summary(times: list[tuple[str, float, int]]) -> list[str]:
    """Shares of the kinds of work, then the ten slowest operations by the time that they themselves take."""
    total = sum(microseconds for _, microseconds, _ in times) or 1.0
    kinds: dict[str, float] = defaultdict(float)
    for name, microseconds, _ in times:
        kinds[_kind(name)] += microseconds
    ranked = sorted(kinds.items(), key=lambda item: -item[1])
    shares = ", ".join(f"{kind} {spent / total:.1%}" for kind, spent in ranked)
    slowest = sorted(times, key=lambda time: -time[1])[:_SLOWEST]
    return [shares] + [
        f"{spent / total:6.1%} {spent / 1e3:10.2f} ms {count:6d} x  {_short(name)}" for name, spent, count in slowest
    ]


def _kind(name: str) -> str:
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "the rest")


def _short(name: str) -> str:
    plain = re.sub(r"^void |at::native::|\(anonymous namespace\)::", "", name)
    return plain if len(plain) <= _WIDEST else f"{plain[: _WIDEST - 3]}..."
