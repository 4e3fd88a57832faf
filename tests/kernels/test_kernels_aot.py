"""Every Triton kernel of the package compiles to a real cubin, no GPU needed.

Each `triton.py` lists what to compile as KERNELS: (kernel, types of its arguments, values of its constants). Arguments
that stand in neither are None.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT

MODULES = sorted(path.parent.name for path in (ROOT / "kernels/sctd_kernels").glob("*/triton.py"))
COMPILE = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

module = importlib.import_module(f"sctd_kernels.{sys.argv[1]}.triton")
for kernel, signature, constants in module.KERNELS:
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    values = {name: constants.get(name) for name, kind in types.items() if kind == "constexpr"}
    stray = {*signature, *constants} - {*kernel.arg_names}
    built = triton.compile(ASTSource(kernel, types, values), target=GPUTarget("cuda", int(sys.argv[2]), 32))
    size = len(built.asm["cubin"]) if "cubin" in built.asm else 0
    print(json.dumps({"name": kernel.__name__, "size": size, "stray": sorted(stray)}))
kernels = sorted(name for name in vars(module) if name.endswith("_kernel") and hasattr(vars(module)[name], "arg_names"))
print(json.dumps(kernels))
"""


def test_the_package_has_triton_kernels() -> None:
    assert {"select", "gather_merge"} <= {*MODULES}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", MODULES)
def test_kernels_compile(name: str, capability: int, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, name, str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    *built, present = [json.loads(line) for line in done.stdout.splitlines()]
    assert present, f"no function of {name}/triton.py is named *_kernel"
    assert {kernel["name"] for kernel in built} >= {*present}, "a kernel is missing in KERNELS"
    for kernel in built:
        assert kernel["size"] > 1000 and not kernel["stray"], kernel
