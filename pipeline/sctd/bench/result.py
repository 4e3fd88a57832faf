"""What every measurement writes beside its numbers: device, versions, date."""

import json
import os
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def device_name() -> str:
    """The GPU's name, or the CPU's with its number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    model = next((line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), "CPU")
    return f"{model}, {torch.get_num_threads()} threads"


def facts() -> dict[str, Any]:
    packages = ("torch", "transformers", "deepspeed", "numpy")
    tuned = ("MALLOC_", "OMP_NUM_THREADS", "SCTD_KERNELS")  # the environment's say in how fast it is
    return {
        "device": device_name(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(tuned)},
    }


def write_result(folder: Path, name: str, result: dict[str, Any]) -> Path:
    """Write `FOLDER/NAME-<device>.json` with the facts of this machine in front."""
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    path = folder / f"{name}-{device}.json"
    path.write_text(json.dumps({**facts(), **result}, indent=1) + "\n", encoding="utf-8")
    return path
