"""The CUDA C++ kernels where there is no GPU: their logic on a CPU, and how they are compiled.

The sources are compiled by g++ over the shim in `host_cuda/`, whose threads take turns on one CPU thread, and run from
the same Python functions as on GPUs. That proves what they compute: indices, digits, ranks, tails, rounding, and that
no barrier is missing between threads that take turns in either order; an access that is not aligned ends the process.
It proves nothing of real memory ordering or speed; tests/gpu runs the same checks natively.
"""

import ctypes
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernel_checks import HALVES, check, check_moves, check_select, numbers, oracle, random_selection, select_cases
from sctd_kernels import Selection, cuda_library, dispatch, merge, nvcc, select, split
from sctd_kernels.gather_merge import GATHER, MERGE, MERGE_BACKWARD, SPLIT_BACKWARD
from sctd_kernels.select import SELECT
from support import ROOT

KERNELS = ROOT / "kernels/sctd_kernels"
HOST = Path(__file__).parent / "host_cuda"
needs_nvcc = pytest.mark.skipif(nvcc.find() is None, reason="nvcc is not installed")


def compile_for_host(sources: list[Path], out: Path) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-fno-gnu-unique"]
    flags += ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]  # GPUs forgive neither
    command = ["g++", *flags, "-I", str(HOST), "-x", "c++", *map(str, sources), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return cuda_library.load(out)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_for_host(nvcc.sources(), tmp_path_factory.mktemp("host") / "kernels.so")


@pytest.fixture(scope="module", params=["first to last", "last to first"])
def on_cuda(request: pytest.FixtureRequest, host: ctypes.CDLL) -> Iterator[None]:
    """SCTD_KERNELS=cuda for CPU tensors, in both orders in which threads and blocks can take their turns."""
    host.sctd_host_reverse(request.param == "last to first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_library, "_kernels_and_stream", lambda device: (host, 0))
        patch.setattr(dispatch, "backend", lambda device_type: "cuda")
        yield
    host.sctd_host_reverse(0)


def same(found: Any, expected: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@settings(deadline=None, max_examples=50)
@given(select_cases())
def test_select_equals_the_oracle(on_cuda: None, case: dict[str, Any]) -> None:
    check_select(case)


@pytest.mark.parametrize("length", [1, 2, 31, 33, 255, 256, 257, 1023, 1024, 1025, 2048, 3000, 8191, 8192])
def test_select_of_every_length(on_cuda: None, length: int) -> None:
    """Up to 1024 positions a thread has one, beyond that a few, and some threads none."""
    rng = torch.Generator().manual_seed(length)
    scores = torch.randint(0, 3, (2, length), generator=rng).float()
    for keep in {1, max(1, length // 2), length}:
        check_select({"scores_BS": scores, "keep": keep, "row_seed_B": torch.arange(2) - (2 << 50)})


@pytest.mark.parametrize("low", [0, 1, 8, 16, 24])
def test_select_by_any_digit(on_cuda: None, low: int) -> None:
    """Scores that differ in one byte, or in two neighbouring ones, of their 32 bits."""
    bits = (torch.arange(600) * 7 % 256 << low) + (0x3F000000 if low < 24 else 0)
    scores = bits.to(torch.int32).view(torch.float32).view(2, 300)
    for keep in (1, 120, 299):
        check_select({"scores_BS": scores.nan_to_num(0.0), "keep": keep, "row_seed_B": torch.arange(2)})


@pytest.mark.parametrize("dtype", HALVES)
def test_every_16_bit_score(on_cuda: None, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    scores = patterns.view(dtype)[torch.randperm(2**16, generator=rng)].view(8, 8192)
    arguments = torch.arange(8), None, None, None, []
    for keep in (100, 4096, 8000):
        assert same(*(SELECT.run(chosen, scores, keep, *arguments) for chosen in ("cuda", "torch")))


def test_negative_zero_ties_with_zero(on_cuda: None) -> None:
    zeros, seeds = torch.tensor([0.0, -0.0]).repeat(20, 9), torch.arange(20)
    for dtype in (torch.float32, *HALVES):
        check_select({"scores_BS": zeros.to(dtype), "keep": 7, "row_seed_B": seeds})
    ids = torch.arange(18).repeat(20, 1)
    check_select({"scores_BS": ids, "keep": 7, "row_seed_B": seeds, "table_V": zeros[0]})


def test_nan_ranks_as_the_lowest_score(on_cuda: None) -> None:
    scores = torch.tensor([[float("nan"), float("-inf"), 0.0, -float("nan"), float("-inf"), -1e38]]).repeat(20, 1)
    for dtype in (torch.float32, *HALVES):
        narrowed, seeds = scores.to(dtype), torch.arange(20)
        found = SELECT.run("cuda", narrowed, 4, seeds, None, None, None, [])
        check(Selection(*found), oracle(narrowed.float(), 4, seeds.tolist()), 6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ids_outside_of_the_table_are_moved_into_it(on_cuda: None, dtype: torch.dtype) -> None:
    far = 2**40 if dtype == torch.int64 else 2**31 - 1
    ids = torch.tensor([[-5, 0, 3, 99, far, -far, -1, 4, 1, 2]], dtype=dtype).repeat(9, 1)
    beside = float("inf")  # what a wrong id would find
    table = torch.tensor([-beside, 3.0, 0.0, 2.0, 1.0, beside])[1:5]
    arguments = ids, 5, torch.arange(9), None, None, table, []
    assert same(*(SELECT.run(chosen, *arguments) for chosen in ("cuda", "torch")))


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_forced_positions_and_all_that_is_carried(on_cuda: None, share: float) -> None:
    """With 0.8, more positions are forced to stay, and to go, than there is room for; some are both."""
    rng = torch.Generator().manual_seed(0)
    forced = {name: torch.rand(4, 90, generator=rng) < share for name in ("forced_keep_BS", "forced_drop_BS")}
    whole = torch.randint(-(2**62), 2**62, (4, 90), generator=rng)
    kinds = torch.bool, torch.int32, torch.int64
    for carry in [(whole.to(a),) for a in kinds] + [(whole.to(a), (whole >> 3).to(b)) for a in kinds for b in kinds]:
        case = {"scores_BS": torch.randn(4, 90, generator=rng), "keep": 40, "row_seed_B": whole[:, 0]}
        check_select({**case, **forced, "carry": carry})


def test_select_of_strided_arguments(on_cuda: None) -> None:
    rng = torch.Generator().manual_seed(2)
    scores, mask = torch.randn(31, 6, generator=rng).T, (torch.rand(31, 12, generator=rng) < 0.3).T[::2]
    seeds = torch.arange(12)[::2]
    forced = {"forced_keep_BS": mask, "forced_drop_BS": mask.flip(0)}
    carry = mask, torch.randint(0, 99, (31, 6), generator=rng).T
    check_select({"scores_BS": scores, "keep": 10, "row_seed_B": seeds, **forced, "carry": carry})
    ids, table = torch.randint(0, 40, (31, 6), generator=rng).T, torch.randn(40, 2, generator=rng)[:, 1]
    check_select({"scores_BS": ids, "keep": 10, "row_seed_B": seeds, "table_V": table})


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 4),
    length=st.integers(1, 70),
    width=st.sampled_from([1, 3, 4, 8, 16, 33, 128, 130]),
    dtype=st.sampled_from([torch.float32, torch.float64, *HALVES]),
    data=st.data(),
)
def test_moves_equal_torch(
    on_cuda: None, rows: int, length: int, width: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    keep, seed = data.draw(st.integers(1, length)), data.draw(st.integers(0, 1000))
    check_moves(rows, length, keep, width, dtype, seed=seed)


@pytest.mark.parametrize("width", [257, 515, 1024, 2056, 4104])
def test_moves_of_wide_rows(on_cuda: None, width: int) -> None:
    """Rows of as many units as a block has threads, and of more."""
    for dtype in (torch.float32, torch.bfloat16):
        check_moves(2, 13, 5, width, dtype)


def shifted(tensor: Tensor, by: int) -> Tensor:
    """An equal tensor that begins `by` numbers after an aligned address."""
    return torch.cat((tensor.new_zeros(by), tensor.flatten()))[by:].view(tensor.shape)


@pytest.mark.parametrize("by", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unaligned_addresses(on_cuda: None, dtype: torch.dtype, by: int) -> None:
    """Rows of whole vectors at addresses that no vector may be read from."""
    selection = random_selection(3, 20, 7)
    maps = selection.kept_BK, selection.inverse_BS
    hidden, rest = (shifted(numbers(3, 20, 16, seed=seed, dtype=dtype), by) for seed in (0, 1))
    kept = shifted(numbers(3, 7, 16, seed=2, dtype=dtype), by)
    assert hidden.is_contiguous() and hidden.data_ptr() % 16 == by * dtype.itemsize % 16
    results = []
    for chosen in ("cuda", "torch"):
        parts = [GATHER.run(chosen, hidden, maps[0]), MERGE.run(chosen, hidden, kept, *maps)]
        parts += [*MERGE_BACKWARD.run(chosen, hidden, *maps), SPLIT_BACKWARD.run(chosen, kept, rest, *maps)]
        results.append([*parts, SPLIT_BACKWARD.run(chosen, kept, None, *maps)])
    assert same(*results)


def test_any_dtype_can_be_moved(on_cuda: None) -> None:
    selection = random_selection(2, 9, 4)
    for dtype in (torch.bool, torch.uint8, torch.int64):
        hidden = torch.arange(2 * 9 * 3).view(2, 9, 3).to(dtype)
        found, expected = (GATHER.run(chosen, hidden, selection.kept_BK) for chosen in ("cuda", "torch"))
        assert torch.equal(found, expected)


def test_positions_out_of_range_are_moved_into_it(on_cuda: None) -> None:
    hidden = numbers(2, 5, 3, seed=0, dtype=torch.float32)
    found = GATHER.run("cuda", hidden, torch.tensor([[-1, 2**40], [4, 5]]))
    assert torch.equal(found, torch.stack([hidden[0, [0, 4]], hidden[1, [4, 4]]]))


@pytest.mark.parametrize("dtype", HALVES)
def test_sums_round_as_torch_does(on_cuda: None, dtype: torch.dtype) -> None:
    """Every 16-bit number plus another; among them NaN, infinities, overflows and subnormal sums."""
    rng = torch.Generator().manual_seed(0)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    kept = patterns.view(dtype).view(1, 128, 512)
    rest = patterns[torch.randperm(2**16, generator=rng)].view(dtype).view(1, 128, 512)
    positions = torch.arange(128)[None]
    found = SPLIT_BACKWARD.run("cuda", kept, rest, positions, positions)
    expected = kept + rest
    assert torch.equal(found.isnan(), expected.isnan()) and expected.isnan().any() and expected.isinf().any()
    assert torch.equal(found.nan_to_num(0.0).view(torch.int16), expected.nan_to_num(0.0).view(torch.int16))


def test_a_dropped_gradient_passes_unchanged(on_cuda: None) -> None:
    """-0.0 + 0 would be 0.0."""
    kept, rest = torch.ones(1, 1, 5), torch.full((1, 2, 5), -0.0)
    found = SPLIT_BACKWARD.run("cuda", kept, rest, torch.tensor([[0]]), torch.tensor([[0, -1]]))
    assert found[0].signbit().tolist() == [[False] * 5, [True] * 5]


@pytest.mark.parametrize("shape", [(0, 8, 3), (2, 8, 0)])
def test_nothing_to_move(on_cuda: None, shape: tuple[int, int, int]) -> None:
    hidden = torch.zeros(shape, requires_grad=True)
    selection = select(torch.zeros(shape[:2]), 4, torch.arange(shape[0]), carry=(torch.zeros(shape[:2]).bool(),))
    kept, rest = split(hidden, selection)
    merge(rest, kept, selection).sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == shape


def test_a_refused_launch_says_why(on_cuda: None) -> None:
    """30,000 keys do not fit into the shared memory of a block."""
    with pytest.raises(RuntimeError, match=r"select: .* invalid argument; it was given torch.float32 \(1, 30000\)"):
        SELECT.run("cuda", torch.zeros(1, 30000), 5, torch.arange(1), None, None, None, [])
    check_select({"scores_BS": torch.zeros(1, 300), "keep": 5, "row_seed_B": torch.arange(1)})


BARRIERS = {
    "none": "",
    "before the first histogram": "  clear(shared.histograms[0]);\n  __syncthreads();",
    "after a histogram": "    }\n    __syncthreads();\n    find_digit",
    "after a digit": "turn]);\n    __syncthreads();",
    "before the running sum": "  from[thread] = count;\n  __syncthreads();",
    "in the running sum": "    to[thread] = count;\n    __syncthreads();",
}
SELECT_ONCE = """
import ctypes, json, sys

library, order, scores, seed, keep, expected = json.loads(sys.stdin.read())
kernels, count = ctypes.CDLL(library), len(scores)
kernels.sctd_host_reverse(order)
numbers, seeds = (ctypes.c_float * count)(*scores), (ctypes.c_int64 * 1)(seed)
outputs = [(ctypes.c_int64 * (3 * count))() for _ in range(3)]
nothing, zero, one = ctypes.c_void_p(), ctypes.c_int64(0), ctypes.c_int64(1)
carry = [nothing, nothing, zero] * 2
sizes = one, ctypes.c_int64(count), ctypes.c_int64(keep)
code = kernels.sctd_select(numbers, zero, nothing, zero, seeds, nothing, nothing, *carry, *outputs, *sizes, nothing)
sys.exit(code != 0 or outputs[0][:keep] != expected)
"""


@pytest.mark.parametrize("where", BARRIERS)
def test_the_shim_shows_a_missing_barrier(where: str, tmp_path: Path) -> None:
    """Each barrier of the selection left out in turn, in a process of its own: threads in some order get it wrong."""
    source, place = (KERNELS / "select/cuda.cu").read_text(encoding="utf-8"), BARRIERS[where]
    assert where == "none" or source.count(place) == 1
    (tmp_path / "select").mkdir()
    shutil.copy(KERNELS / "launch.cuh", tmp_path)
    copy = tmp_path / "select/cuda.cu"
    copy.write_text(source.replace(place, place.replace("__syncthreads();", "")), encoding="utf-8")
    compile_for_host([copy], tmp_path / "copy.so")
    scores = numbers(1, 300, seed=0, dtype=torch.float32)
    [expected] = oracle(scores, 130, [5])
    wrong = 0
    for order in (0, 1):
        case = json.dumps([str(tmp_path / "copy.so"), order, scores[0].tolist(), 5, 130, expected])
        wrong += subprocess.run([sys.executable, "-c", SELECT_ONCE], input=case, text=True).returncode != 0
    assert (wrong > 0) == (where != "none")


def cuobjdump() -> str | None:
    """The toolkit's, or the one that Triton brings."""
    spec = importlib.util.find_spec("triton")
    bundled = Path(spec.origin).parent / "backends/nvidia/bin" if spec and spec.origin else None
    return shutil.which("cuobjdump") or (bundled and shutil.which("cuobjdump", path=str(bundled)))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What SCTD_BUILD_CUDA=1 puts into the package."""
    path = tmp_path_factory.mktemp("nvcc") / "kernels.so"
    compiler = nvcc.find()
    assert compiler is not None
    nvcc.compile_library(compiler, nvcc.BUILT_IN_TARGETS, path)
    return path


@needs_nvcc
def test_nvcc_compiles_every_launcher(compiled: Path) -> None:
    library = cuda_library.load(compiled)
    assert b"invalid configuration" in library.sctd_error_text(9)
    for name in ("select", "gather", "merge", "merge_backward", "split_backward"):
        assert hasattr(library, f"sctd_{name}")
    assert os.listdir(compiled.parent) == [compiled.name], "nvcc left something behind"


@needs_nvcc
@pytest.mark.skipif(cuobjdump() is None, reason="cuobjdump is not installed")
def test_the_library_has_code_for_both_architectures(compiled: Path) -> None:
    listed = {}
    for kind in ("elf", "ptx"):
        command = [str(cuobjdump()), f"--list-{kind}", str(compiled)]
        listed[kind] = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "sm_80" in listed["elf"] and "sm_90" in listed["elf"] and "sm_90" in listed["ptx"]


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would take these launches")
def test_without_a_gpu_the_driver_is_named(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = cuda_library.load(compiled)
    monkeypatch.setattr(cuda_library, "_kernels_and_stream", lambda device: (library, 0))
    with pytest.raises(RuntimeError, match=r"gather: .*(driver|device).*; it was given torch.float32 \(1, 4, 2\)"):
        GATHER.run("cuda", torch.zeros(1, 4, 2), torch.tensor([[1, 2]]))


def fake_nvcc(folder: Path, body: str) -> None:
    """A compiler that notes each of its runs in `runs`, and then does as `body` says; $out is what it should write."""
    (folder / "bin").mkdir(parents=True)
    script = folder / "bin/nvcc"
    lines = [
        "#!/bin/sh",
        'if [ "$1" = --version ]; then echo version 1; exit; fi',
        f'echo "$@" >> "{folder}/runs"',
        'while [ "$1" != -o ]; do shift; done; out="$2"',
        body,
    ]
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    script.chmod(0o755)


@pytest.fixture
def toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("SCTD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cuda"


def test_the_library_is_compiled_once_for_each_architecture(toolkit: Path) -> None:
    fake_nvcc(toolkit, 'echo library > "$out"')
    paths = [cuda_library._compiled(architecture) for architecture in ("80", "90", "80")]
    assert paths[0] == paths[2] != paths[1]
    runs = (toolkit / "runs").read_text(encoding="utf-8").splitlines()
    assert len(runs) == 2 and "arch=compute_80,code=sm_80" in runs[0] and "sm_90" in runs[1]
    assert all(str(source) in runs[0] for source in nvcc.sources())


def test_sources_and_compiler_name_the_library(toolkit: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_nvcc(toolkit, "exit 1")
    compiler = nvcc.find()
    assert compiler == str(toolkit / "bin/nvcc")
    shutil.copytree(KERNELS, tmp_path / "package")
    monkeypatch.setattr(nvcc, "PACKAGE", tmp_path / "package")
    names = {nvcc.fingerprint(compiler, ["a"]), nvcc.fingerprint(compiler, ["b"])}
    for path in ("package/launch.cuh", "package/select/cuda.cu", "package/gather_merge/cuda.cu", "cuda/bin/nvcc"):
        text = (tmp_path / path).read_text(encoding="utf-8").replace("version 1", "version 2")
        (tmp_path / path).write_text(text + "\n", encoding="utf-8")
        names.add(nvcc.fingerprint(compiler, ["a"]))
    assert len(names) == 6


def test_ranks_that_compile_at_once_all_find_a_whole_library(toolkit: Path) -> None:
    """Four compilers write at their own pace; nobody sees half a library, and nothing is left beside it."""
    fake_nvcc(toolkit, 'printf half > "$out"; sleep 0.1; printf half >> "$out"')
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: cuda_library._compiled("90"), range(4)))
        texts = [path.read_text(encoding="utf-8") for path in paths]
    assert texts == ["halfhalf"] * 4 and os.listdir(paths[0].parent) == [paths[0].name]


def test_missing_nvcc_is_said_in_one_line(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(toolkit))
    with pytest.raises(ValueError, match=r"^SCTD_KERNELS=cuda: nvcc was not found .* or unset SCTD_KERNELS$"):
        cuda_library._compiled("90")


def test_what_nvcc_complains_of_is_said_in_one_line(toolkit: Path) -> None:
    fake_nvcc(toolkit, "echo 'x.cu(3): warning: y' >&2; echo 'x.cu(7): error: no such thing' >&2; exit 2")
    with pytest.raises(ValueError, match=r"^SCTD_KERNELS=cuda: .*compute_90.*: x.cu\(7\): error: no such thing; .*$"):
        cuda_library._compiled("90")
    assert not list((toolkit.parent / "cache").glob("*/*"))


@needs_nvcc
def test_an_architecture_that_nvcc_does_not_know(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCTD_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"^SCTD_KERNELS=cuda: .*compute_999.*; try another CUDA toolkit.*$"):
        cuda_library._compiled("999")


@pytest.mark.parametrize(("major", "taken"), [(7, False), (8, True), (9, True), (12, True)])
def test_a_library_in_the_package_is_taken(monkeypatch: Any, tmp_path: Path, major: int, taken: bool) -> None:
    """By every GPU that its code, or the driver's translation of it, can serve."""
    monkeypatch.setattr(nvcc, "BUILT_IN", tmp_path / "kernels.so")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr(cuda_library, "_compiled", lambda architecture: Path(architecture))
    monkeypatch.setattr(cuda_library, "load", lambda path: path)
    device = torch.device("cuda", 0)
    assert cuda_library.library.__wrapped__(device) == Path(f"{major}0")
    nvcc.BUILT_IN.touch()
    assert cuda_library.library.__wrapped__(device) == (nvcc.BUILT_IN if taken else Path(f"{major}0"))


@pytest.fixture
def sources_of_package(tmp_path: Path) -> Path:
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    folder = tmp_path / "sources"
    for name in ("kernels/sctd_kernels", "pipeline/sctd"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def build(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", "built"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def test_a_package_built_with_the_library(sources_of_package: Path, toolkit: Path) -> None:
    fake_nvcc(toolkit, 'echo library > "$out"')
    done = build(sources_of_package, {**os.environ, "SCTD_BUILD_CUDA": "1"})
    assert done.returncode == 0, done.stderr
    package = sources_of_package / "built/sctd_kernels"
    for name in (nvcc.BUILT_IN.name, "launch.cuh", "select/cuda.cu", "gather_merge/cuda.cu", "py.typed"):
        assert (package / name).is_file(), name
    run = (toolkit / "runs").read_text(encoding="utf-8")
    assert all(target in run for target in nvcc.BUILT_IN_TARGETS)


def test_a_package_built_without(sources_of_package: Path, toolkit: Path) -> None:
    environment = {**os.environ, "PATH": str(toolkit)}
    done = build(sources_of_package, environment | {"SCTD_BUILD_CUDA": "1"})
    assert done.returncode == 1 and "SCTD_BUILD_CUDA=1: nvcc was not found" in done.stderr.splitlines()[-1]
    done = build(sources_of_package, environment)
    assert done.returncode == 0, done.stderr
    assert (sources_of_package / "built/sctd_kernels/select/cuda.cu").is_file()
    assert not (sources_of_package / "built/sctd_kernels" / nvcc.BUILT_IN.name).exists()
