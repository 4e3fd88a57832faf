"""The same run with every backend of the kernels: 200 dropping steps of a small bert, and how far the losses part.

    python benchmarks/backends.py --corpus runs/demo-corpus

Runs torch (the reference) and every other backend that this machine has: Triton on a GPU or under its interpreter, CUDA
C++ on a GPU or, compiled for the host, without one. `NAME, selection only` takes that backend for select, gather and
merge alone, and torch for the rest: in float32 this must be the reference's run, bit for bit. `torch, nudged` is the
reference with a learning rate that is one part in ten million higher. How far it parts from the reference is what any
other rounding may do in so many steps: one score that falls on the other side of the K-th changes which tokens are
trained. Writes results/backends-<device>.json.

A run that is in --work already is not trained again, and is compared as far as it got. The interpreter has no erf but
Python's, a number at a time, which would make an hour of GELU; here it borrows torch's, and nothing else.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from sctd.bench.result import write_result
from sctd.config import load_config
from sctd.train.keep.metrics import read_metrics

RESULTS = Path(__file__).parent / "results"
RATE = load_config("demo-bert", []).optimizer.lr
PLAIN = ["optimizer.name=adamw", "schedule.full_start=0", "schedule.full_finish=0", "train.precision=fp32"]

# In a child process, so that each backend is chosen as a user chooses it. The patches are for the interpreter's erf,
# for `selection only`, and for CUDA C++ without a GPU: compiled by g++ over the tests' shim, its threads taking turns.
CHILD = """
import os, sys
import torch
from sctd.cli import main
from sctd_kernels import dispatch, elementwise
if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter
    interpreter.np_erf_fp32 = lambda array: torch.erf(torch.from_numpy(array)).numpy()
part = sys.argv.pop(1)
if part == "host":
    import subprocess, tempfile
    from pathlib import Path
    from sctd_kernels import cuda_library, nvcc
    built = Path(tempfile.mkdtemp()) / "kernels.so"
    shim = ["-I", os.environ["HOST_CUDA"], "-Wno-unknown-pragmas", "-fno-gnu-unique"]
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", *shim, "-x", "c++"]
    subprocess.run(["g++", *flags, *map(str, nvcc.sources()), "-o", built], check=True)
    library = cuda_library.load(built)
    cuda_library._kernels_and_stream = lambda device: (library, 0)
    dispatch.backend = lambda device_type: "cuda"
if part != "all":
    called = dispatch.Operation.__call__
    dispatch.Operation.__call__ = lambda self, *args: called(self, *args) if self.has_cuda else self.reference(*args)
    elementwise.backend = lambda device_type: "torch"
raise SystemExit(main(sys.argv[1:]))
"""


def run(backend: str, part: str, args: argparse.Namespace, folder: Path, rate: float = RATE) -> dict[str, Any]:
    """Losses of every step; held-out loss and a hash of the weights where the run came to its end."""
    overrides = [
        f"data.corpus={args.corpus}", f"run.dir={folder}", f"train.stop_at={args.steps}", "train.log_every=1",
        f"optimizer.lr={rate!r}", "train.valid_every=0", "train.valid_rows=128", "run.examples=[]",
        f"train.save_every={args.steps}",
    ]  # fmt: skip
    environment = os.environ | {"SCTD_KERNELS": backend}
    environment["HOST_CUDA"] = str(Path(__file__).parents[1] / "tests/kernels/host_cuda")
    if backend == "triton" and not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-c", CHILD, part, "pretrain", "demo-bert", *PLAIN, *overrides]
    if not (folder / "metrics.jsonl").exists():
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    weights = folder / "export" / "model.safetensors"
    records = read_metrics(folder)
    return {
        "losses": [record["loss"] for record in records],
        "valid_loss": records[-1].get("valid_loss"),
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--corpus", type=Path, required=True, help="rows of 128 tokens, as `make pretrain` prepares them"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/backends"))
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    reference = run("torch", "all", args, args.work / "torch")
    results: dict[str, Any] = {"torch": reference}
    results["torch, nudged"] = run("torch", "all", args, args.work / "torch-nudged", RATE * (1 + 1e-7))
    if not torch.cuda.is_available() and shutil.which("g++"):
        results["cuda on the host, selection only"] = run("torch", "host", args, args.work / "cuda-host")
    for backend in ["triton", "cuda"] if torch.cuda.is_available() else ["triton"]:
        results[f"{backend}, selection only"] = run(backend, "selection", args, args.work / f"{backend}-selection")
        results[backend] = run(backend, "all", args, args.work / f"{backend}-all")
    for found in results.values():
        pairs = list(zip(found["losses"], reference["losses"], strict=False))
        found["steps_compared"] = len(pairs)
        found["largest_difference"] = max(abs(one - other) for one, other in pairs)
        found["bitwise"] = found["weights_sha256"] == reference["weights_sha256"] and all(a == b for a, b in pairs)
    for name, found in results.items():
        losses = found["losses"]
        print(f"{name:<24} {len(losses)} steps, loss {losses[0]:.4f} -> {losses[-1]:.4f}", end="")
        if name != "torch":
            how = "bit for bit" if found["bitwise"] else f"within {found['largest_difference']:.1e}"
            print(f", {how} over {found['steps_compared']}", end="")
        if found["valid_loss"] is not None:
            print(f", held-out {found['valid_loss']:.4f}", end="")
        print()
    print(
        write_result(
            RESULTS, "backends", {"recipe": "demo-bert", "overrides": PLAIN, "steps": args.steps, "runs": results}
        )
    )


if __name__ == "__main__":
    main()
