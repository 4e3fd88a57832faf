"""Compile the package's CUDA sources into one library; standard library only, because setup.py runs it too."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).parent
BUILT_IN = PACKAGE / "sctd_kernels_cuda.so"  # put there by SCTD_BUILD_CUDA=1 pip install .
# For that library: A100 and its family, H100 and H200, and code that drivers translate for what comes after.
BUILT_IN_TARGETS = ("arch=compute_80,code=sm_80", "arch=compute_90,code=[sm_90,compute_90]")
_FLAGS = ("-shared", "-O3", "-std=c++17", "-Xcompiler=-fPIC", "-cudart=static")


def find() -> str | None:
    """Path of nvcc: that of CUDA_HOME, else the first on PATH."""
    home = os.environ.get("CUDA_HOME")
    inside = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None
    return inside or shutil.which("nvcc")


def sources() -> list[Path]:
    return sorted(PACKAGE.glob("*/cuda.cu"))


def fingerprint(nvcc: str, targets: Sequence[str]) -> str:
    """Names a library by all that it is made from."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256("\n".join((version, *_FLAGS, *targets)).encode())
    for path in (*sorted(PACKAGE.glob("*.cuh")), *sources()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def compile_library(nvcc: str, targets: Sequence[str], out: Path) -> None:
    """Write `out` whole or not at all, whoever else is writing it at the same time.

    Args:
        targets: what nvcc's -gencode takes, one for each architecture.

    Raises:
        RuntimeError: nvcc refused; one line that ends with its first complaint.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        made = Path(folder) / out.name
        generate = [f"-gencode={target}" for target in targets]
        command = [nvcc, *_FLAGS, *generate, "-o", str(made), *map(str, sources())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            complaint = next((line for line in said if "error" in line or "fatal" in line), said[0] if said else "")
            raise RuntimeError(f"{nvcc} could not compile for {' '.join(targets)}: {complaint or done.returncode}")
        made.replace(out)
