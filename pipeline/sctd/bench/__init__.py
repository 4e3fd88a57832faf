"""Measurements of the product against what its users have today, side by side in one process."""

import re
from dataclasses import replace
from pathlib import Path

from sctd.config import Config
from sctd.errors import UserError


def bench(
    config: Config,
    recipe: str,
    sizes: str,
    rounds: int,
    out: Path,
    arms: str | None = None,
    kernels: bool = False,
    profile: bool = False,
) -> None:
    """Measure what is asked for, print a table and write a JSON named after the device.

    Args:
        sizes: `ROWSxLENGTH,...`.
        arms: `NAME,...`, those to measure beside `transformers` and `full`; None for all.
        kernels, profile: measure the kernels, or trace two steps, instead of timing the arms.

    Raises:
        UserError: sizes or names that cannot be read, or that cannot be run here.
        OSError: `out` cannot be a folder.
    """
    pairs = [_read_size(text) for text in sizes.split(",")]
    if rounds < 1:
        raise UserError(f"--rounds is {rounds}: it must be at least 1")
    if kernels and profile:
        raise UserError("--kernels and --profile are two measurements: ask for one at a time")
    import torch

    from sctd.bench.contenders import choose, make_shape
    from sctd.bench.kernels import bench_kernels
    from sctd.bench.profile import profile_steps
    from sctd.bench.step import bench_steps
    from sctd.bench.timing import DEVICE
    from sctd.train.engine.devices import fastest_precision, keep_freed_memory

    names = choose(arms)
    for _, length in pairs:
        make_shape(config, length)  # what cannot be run is said before anything is measured
    out.mkdir(parents=True, exist_ok=True)
    if config.train.precision == "auto":
        precision, why = fastest_precision(DEVICE)
        config = replace(config, train=replace(config.train, precision=precision))
        print(f"precision {precision}: {why}")
    if DEVICE.type == "cpu":
        keep_freed_memory()  # as training does: without it, page faults take a fifth of a step, and no path saves them
    try:
        if profile:
            profile_steps(config, *pairs[0], out)
        elif kernels:
            bench_kernels(config, pairs, rounds, out)
        else:
            bench_steps(config, recipe, pairs, rounds, out, names)
    except torch.OutOfMemoryError as error:
        raise UserError(f"--sizes {sizes}: out of GPU memory; measure fewer rows, or fewer --arms") from error


def _read_size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip())
    if not found:
        raise UserError(f"--sizes: {text.strip()!r} is not a size: write ROWSxLENGTH, such as 4x512")
    return int(found[1]), int(found[2])
