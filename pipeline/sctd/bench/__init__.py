"""Measurements of the product against what its users have today, side by side in one process."""

import re
from pathlib import Path

from sctd.config import Config
from sctd.errors import UserError


def bench(
    config: Config, recipe: str, sizes: str, rounds: int, out: Path, kernels: bool = False, profile: bool = False
) -> None:
    """Measure what is asked for, print a table and write a JSON named after the device.

    Args:
        sizes: `ROWSxLENGTH,...`.
        kernels, profile: measure the kernels, or trace two steps, instead of timing the arms.

    Raises:
        UserError: sizes that cannot be read or run.
    """
    pairs = [_read_size(text) for text in sizes.split(",")]
    if rounds < 1:
        raise UserError(f"--rounds is {rounds}: it must be at least 1")
    if kernels and profile:
        raise UserError("--kernels and --profile are two measurements: ask for one at a time")
    from sctd.bench.paths import make_shape

    for _, length in pairs:
        make_shape(config, length)  # refuses rows that are too long
    if profile:
        from sctd.bench.profile import profile_steps

        profile_steps(config, *pairs[0], out)
    elif kernels:
        from sctd.bench.kernels import bench_kernels

        bench_kernels(config, pairs, rounds, out)
    else:
        from sctd.bench.step import bench_steps

        bench_steps(config, recipe, pairs, rounds, out)


def _read_size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip())
    if not found:
        raise UserError(f"--sizes: {text.strip()!r} is no size: write ROWSxLENGTH, say 4x512")
    return int(found[1]), int(found[2])
