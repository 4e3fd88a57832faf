"""Selecting, splitting and merging natively on a GPU, by Triton and by CUDA C++."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_checks import HALVES, check_moves, check_select, select_cases
from sctd_kernels import backend, gather_rows, merge, select, split
from sctd_kernels.select import reference
from support import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs TRITON_INTERPRET unset"),
]


@pytest.fixture(autouse=True, scope="module", params=["triton", "cuda", "torch"])
def asked(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda" and shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCTD_KERNELS", request.param)
        assert backend("cuda") == request.param
        yield request.param


@settings(deadline=None, max_examples=150)
@given(select_cases())
def test_select_equals_the_oracle(case: dict[str, Any]) -> None:
    check_select(case, "cuda")


@pytest.mark.parametrize("length", [1, 31, 32, 127, 128, 512, 513, 1024, 2049, 4096, 8191, 8192])
def test_select_of_every_length(length: int) -> None:
    rng = torch.Generator().manual_seed(length)
    scores = torch.randint(0, 3, (4, length), generator=rng).float()
    for keep in {1, max(1, length // 2), length}:
        check_select({"scores_BS": scores, "keep": keep, "row_seed_B": torch.arange(4) - (2 << 50)}, "cuda")


@pytest.mark.parametrize("dtype", HALVES)
def test_every_16_bit_score(dtype: torch.dtype) -> None:
    """NaN, infinities, both zeros and subnormal numbers among them; nobody looks for NaN on a GPU."""
    rng = torch.Generator().manual_seed(0)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    scores = patterns.view(dtype)[torch.randperm(2**16, generator=rng)].view(8, 8192)
    found = select(scores.cuda(), 4000, torch.arange(8).cuda())
    expected = reference.select(scores, 4000, torch.arange(8), None, None, None, ())
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found[:3], expected[:3], strict=True))


def test_ids_outside_of_the_table_are_moved_into_it() -> None:
    ids, table = torch.tensor([[-5, 0, 3, 99, 2**40, -(2**40)]]).repeat(9, 1), torch.tensor([1.0, 0.0, 2.0, 3.0])
    found = select(ids.cuda(), 3, torch.arange(9).cuda(), table_V=table.cuda())
    expected = reference.select(ids, 3, torch.arange(9), None, None, table, ())
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found[:3], expected[:3], strict=True))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 4),
    length=st.integers(1, 70),
    width=st.sampled_from([1, 3, 8, 16, 33, 128, 130, 768]),
    dtype=st.sampled_from([torch.float32, *HALVES]),
    data=st.data(),
)
def test_moves_equal_torch(rows: int, length: int, width: int, dtype: torch.dtype, data: st.DataObject) -> None:
    keep, seed = data.draw(st.integers(1, length)), data.draw(st.integers(0, 1000))
    check_moves(rows, length, keep, width, dtype, "cuda", seed)


def test_moves_of_a_real_size() -> None:
    check_moves(32, 512, 256, 1024, torch.bfloat16, "cuda")


def test_offsets_beyond_32_bits() -> None:
    """The last rows lie more than 2**31 numbers from the first."""
    rows, length, width = 3, 8192, 98304
    if torch.cuda.mem_get_info()[0] < 16 * rows * length * width:
        pytest.skip("needs 40 GB of free GPU memory")
    hidden = torch.zeros(rows, length, width, dtype=torch.bfloat16, device="cuda")
    hidden[-1, -9:] = torch.arange(9, device="cuda")[:, None]
    selection = select(torch.arange(length, device="cuda").expand(rows, -1).float(), 8, torch.arange(rows).cuda())
    kept, rest = split(hidden, selection)
    assert kept[-1, :, -1].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    merged = merge(rest, kept + 10, selection)
    assert merged[-1, -9:, -1].tolist() == [0, 11, 12, 13, 14, 15, 16, 17, 18]


def step(hidden: torch.Tensor, ids: torch.Tensor, table: torch.Tensor, seeds: torch.Tensor) -> None:
    """Selection, split and merge, forward and backward, as in a training step."""
    selection = select(ids, 16, seeds, table_V=table, carry=(ids,))
    kept, rest = split(hidden, selection)
    merged = merge(rest, kept * 2, selection)
    (merged.sum() + gather_rows(merged, selection.kept_BK.flip(1)).square().sum()).backward()


def on_gpu() -> list[torch.Tensor]:
    hidden = torch.randn(4, 32, 64, device="cuda", requires_grad=True)
    ids = torch.randint(0, 50, (4, 32), device="cuda")
    return [hidden, ids, torch.rand(50, device="cuda"), torch.arange(4, device="cuda")]


def test_the_host_never_waits() -> None:
    tensors = on_gpu()
    step(*tensors)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_another_device_than_the_current_one() -> None:
    hidden = torch.randn(2, 32, 8, device="cuda:1")
    selection = select(hidden[..., 0].contiguous(), 16, torch.arange(2, device="cuda:1"))
    assert torch.equal(merge(hidden, split(hidden, selection)[0], selection), hidden)


def test_results_are_the_same_each_time() -> None:
    hidden, *others = on_gpu()
    grads: list[torch.Tensor] = []
    for _ in range(5):
        hidden.grad = None
        step(hidden, *others)
        assert hidden.grad is not None
        grads.append(hidden.grad)
    assert all(torch.equal(grad, grads[0]) for grad in grads)


def test_torch_compile_takes_it_whole() -> None:
    hidden, ids, table, seeds = on_gpu()

    def middle(hidden: torch.Tensor) -> torch.Tensor:
        selection = select(ids, 16, seeds, table_V=table)
        kept, rest = split(hidden, selection)
        return merge(rest, torch.tanh(kept), selection)

    torch._dynamo.reset()
    compiled = torch.compile(middle, fullgraph=True)
    outputs = [function(hidden) for function in (middle, compiled)]
    grads = [torch.autograd.grad(output.square().sum(), hidden)[0] for output in outputs]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*grads)


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(asked: str, tool: str, tmp_path: Path) -> None:
    if asked == "torch":
        pytest.skip("needs kernels of our own")
    script = (
        "import torch\n"
        "from sctd_kernels import gather_rows, merge, select, split\n"
        "for rows, length, keep, width in ((3, 37, 11, 5), (2, 512, 256, 64), (1, 8192, 4000, 8)):\n"
        "    hidden = torch.zeros(rows, length, width, device='cuda', requires_grad=True)\n"
        "    ids = torch.arange(rows * length, device='cuda').view(rows, length) % 7\n"
        "    seeds, table = (torch.arange(n, device='cuda') for n in (rows, 7))\n"
        "    selection = select(ids, keep, seeds, ids == 3, ids == 4, table_V=table.float(), carry=(ids, ids > 2))\n"
        "    kept, rest = split(hidden, selection)\n"
        "    merged = merge(rest, kept * 2, selection)\n"
        "    (merged.sum() + gather_rows(merged, selection.kept_BK.flip(1)).sum()).backward()\n"
        "torch.cuda.synchronize()\n"
    )
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    # torch's caching allocator would hide accesses that leave a tensor but not its block.
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py")], capture_output=True, text=True, env=environment, timeout=900
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
