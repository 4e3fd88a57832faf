"""What every measurement writes beside its numbers: device, versions, date."""

import json
import os
import platform
import re
from pathlib import Path
from typing import Any

from sctd.train.engine.devices import device_name, measured_on


def facts() -> dict[str, Any]:
    tuned = ("MALLOC_", "OMP_NUM_THREADS", "SCTD_KERNELS")  # the environment's say in how fast it is
    return {
        **measured_on("torch", "transformers", "deepspeed", "numpy"),
        "python": platform.python_version(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(tuned)},
    }


def write_result(folder: Path, name: str, result: dict[str, Any]) -> Path:
    """Write `FOLDER/NAME-<device>.json` with the facts of this machine in front."""
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    path = folder / f"{name}-{device}.json"
    path.write_text(json.dumps({**facts(), **result}, indent=1) + "\n", encoding="utf-8")
    return path
