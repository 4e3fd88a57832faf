"""Every Triton kernel of the package compiles to a real cubin, no GPU needed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import ROOT

# What is compiled: kernel, types of its arguments, values of its constants. Arguments that stand in neither are None.
Listed = list[tuple[str, dict[str, str], dict[str, Any]]]
FLOATS = ("*fp32", "*bf16", "*fp16")
MODULES = sorted(path.parent.name for path in (ROOT / "kernels/sctd_kernels").glob("*/triton.py"))


def select() -> Listed:
    sizes = {"rows": "i32", "length": "i32", "keep": "i32", "vocabulary": "i32"}
    sizes_of_1 = dict.fromkeys(sizes, 1)  # which Triton turns into constants
    maps = {"seed_ptr": "*i64", "kept_ptr": "*i64", "dropped_ptr": "*i64", "inverse_ptr": "*i64"}
    table = {"scores_ptr": "*i64", "table_ptr": "*fp32", **maps}
    forced = {"forced_keep_ptr": "*u8", "forced_drop_ptr": "*u8"}
    carry = {"carry0_ptr": "*u8", "carried0_ptr": "*u8", "carry1_ptr": "*i64", "carried1_ptr": "*i64"}
    return [
        ("_select_kernel", {**table, **carry, **sizes}, {"ROWS": 1, "BLOCK_S": 512}),
        ("_select_kernel", {**table, **carry}, {"ROWS": 1, "BLOCK_S": 1, **sizes_of_1}),
        ("_select_kernel", {"scores_ptr": "*fp32", **forced, **maps, **sizes}, {"ROWS": 1, "BLOCK_S": 8192}),
        ("_select_kernel", {"scores_ptr": "*bf16", **forced, **carry, **maps, **sizes}, {"ROWS": 1, "BLOCK_S": 2}),
        ("_select_kernel", {"scores_ptr": "*fp16", **maps, **sizes}, {"ROWS": 1, "BLOCK_S": 128}),
    ]


def gather_merge() -> Listed:
    sizes = {"total": "i32", "length": "i32", "keep": "i32", "width": "i32"}
    common = {"ROWS": 8, "COLUMNS": 256}
    single = {"ROWS": 2048, "COLUMNS": 1, **dict.fromkeys(sizes, 1)}  # Triton turns sizes of 1 into constants
    listed: Listed = []
    for kind in FLOATS:
        added = {"kept_ptr": kind, "inverse_ptr": "*i64", "out_ptr": kind}
        kernels: Listed = [
            ("_gather_kernel", {"hidden_ptr": kind, "index_ptr": "*i64", "out_ptr": kind}, {}),
            ("_merge_kernel", {"rest_ptr": kind, **added}, {"ADD": False}),
            ("_merge_kernel", {"rest_ptr": kind, **added}, {"ADD": True}),
            ("_merge_kernel", added, {"ADD": True}),
            (
                "_merge_backward_kernel",
                {"grad_ptr": kind, "inverse_ptr": "*i64", "hidden_ptr": kind, "kept_ptr": kind},
                {},
            ),
        ]
        listed += [(kernel, {**types, **sizes}, {**values, **common}) for kernel, types, values in kernels]
        listed += [(kernel, types, {**values, **single}) for kernel, types, values in kernels]
    return listed


def elementwise() -> Listed:
    sizes = {"rows": "i32", "length": "i32", "width": "i32", "site": "i64", "threshold": "i32", "scale": "fp32"}
    tile = {"ROWS": 1, "BLOCK_D": 1024}
    listed: Listed = []
    for x, rest in (*zip(FLOATS, FLOATS, strict=True), ("*bf16", "*fp32")):
        facts = {"sum_ptr": rest, "mean_ptr": "*fp32", "rstd_ptr": "*fp32", **sizes}
        there = {"x_ptr": x, "residual_ptr": rest, "weight_ptr": rest, "bias_ptr": rest, "out_ptr": rest, "eps": "fp32"}
        back = {"grad_ptr": rest, "weight_ptr": rest, "grad_x_ptr": x, "grad_residual_ptr": rest, "tiles": "i32"}
        back |= {"grad_weight_ptr": "*fp32", "grad_bias_ptr": "*fp32"}
        listed.append(("_dropout_kernel", {"x_ptr": x, "out_ptr": x, "seed_ptr": "*i64", **sizes}, tile))
        for drops, seed in ((False, {}), (False, {"seed_ptr": "*i64"}), (True, {"seed_ptr": "*i64"})):
            listed.append(("_add_norm_kernel", {**there, **facts, **seed}, {"DROPS": drops, **tile}))
            listed.append(("_add_norm_backward_kernel", {**back, **facts, **seed}, {"DROPS": drops, **tile}))
        geglu = {"x_ptr": x, "out_ptr": x, "rows": "i32", "width": "i32"}
        for kernel, types in (("_bias_gelu_kernel", {**geglu, "bias_ptr": rest}), ("_geglu_kernel", geglu)):
            listed.append((kernel, types, {"ROWS": 2, "BLOCK_D": 1024}))
            listed.append((kernel, {**types, "grad_ptr": x}, {"ROWS": 2, "BLOCK_D": 1024}))
    return listed


def cross_entropy() -> Listed:
    facts = {"labels_ptr": "*i64", "normaliser_ptr": "*fp32", "rows": "i32", "vocabulary": "i32"}
    tile = {"ROWS": 1, "BLOCK_V": 4096}
    listed: Listed = []
    for kind in FLOATS:
        there = {"logits_ptr": kind, "losses_ptr": "*fp32", **facts}
        back = {"grad_ptr": "*fp32", "logits_ptr": kind, "out_ptr": kind, **facts}
        listed.append(("_losses_kernel", {**there, "sums_ptr": "*i64", "counts_ptr": "*i64"}, tile))
        listed += [("_losses_kernel", there, tile), ("_losses_backward_kernel", back, tile)]
    return listed


def rotary() -> Listed:
    names = ("rows", "length", "heads", "half", "places", "stride_B", "stride_T", "stride_H")
    return [
        (
            "_rotate_kernel",
            {"x_ptr": kind, "table_ptr": "*fp32", "out_ptr": kind, **place, **dict.fromkeys(names, "i32")},
            {"BACK": back, "ROWS": 32, "BLOCK_h": 32},
        )
        for kind in FLOATS
        for place in ({}, {"place_ptr": "*i64"})
        for back in (False, True)
    ]


KERNELS = {
    "select": select(), "gather_merge": gather_merge(), "elementwise": elementwise(), "cross_entropy": cross_entropy(),
    "rotary": rotary(),
}  # fmt: skip
COMPILE = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

module = importlib.import_module(f"sctd_kernels.{sys.argv[1]}.triton")
for name, signature, constants in json.load(sys.stdin):
    kernel = getattr(module, name)
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
    listed = json.dumps(KERNELS[name])
    done = subprocess.run(command, input=listed, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    *built, present = [json.loads(line) for line in done.stdout.splitlines()]
    assert present, f"no function of {name}/triton.py is named *_kernel"
    assert {kernel["name"] for kernel in built} >= {*present}, "a kernel is missing in KERNELS"
    for kernel in built:
        assert kernel["size"] > 1000 and not kernel["stray"], kernel
