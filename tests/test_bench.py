"""`sctd bench` on tiny sizes, through the command line."""

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sctd.bench.contenders import LTD, Contender
from sctd.bench.profile import summary
from sctd.bench.work import elementwise, moves
from sctd.cli import main
from sctd.config import load_config
from support import sctd

TINY = ["bert-mini-sctd", "model.layers=4", "model.vocab_size=600", "model.hidden_size=64", "train.precision=fp32"]
MODERN = ["modernbert-mini-sctd", *TINY[1:]]
BETWEEN = {
    "bert": ("dropout + residual + LayerNorm", "linear + GELU", "cross-entropy + accumulators"),
    "modernbert": ("rotary positions of queries and keys", "GeGLU", "cross-entropy + accumulators"),
}
SIZE = ["--sizes", "2x64", "--rounds", "1"]


def test_the_table_of_steps(tmp_path: Path) -> None:
    done = sctd("bench", *TINY, *SIZE, "--arms", "drop,align,deepspeed_random_ltd", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("bench-4x64-fp32-*.json")
    result = json.loads(path.read_text())
    assert {"device", "date", "versions", "rounds", "config", "missing"} <= result.keys()
    found = result["sizes"]["2x64"]
    assert {"transformers", "full", "drop", "align", "sctd"} <= found.keys() and "random_ltd" not in found
    for row in found.values():
        assert row["forward"] > 0 and row["step"] > 0 and row["mfu"] > 0 and row["peak_mib"] > 50
    mean = (9 * found["drop"]["step"] + found["align"]["step"]) / 10
    assert found["sctd"]["step"] == pytest.approx(mean)
    assert found["drop"]["flops"] < found["full"]["flops"] < found["align"]["flops"]
    assert done.stdout.startswith("bert-mini-sctd: bert, 4 layers of 64, fp32, nothing compiled; ")
    assert "| 2x64 | SCTD, mean step |" in done.stdout and path.name in done.stdout
    for why in result["missing"].values():
        assert f"random-LTD, DeepSpeed's ops is not in the table: {why}" in done.stdout


def test_the_table_of_a_modernbert(tmp_path: Path) -> None:
    done = sctd("bench", *MODERN, *SIZE, "--arms", LTD, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("bench-modernbert-4x64-fp32-*.json")
    result = json.loads(path.read_text())
    assert result["sizes"]["2x64"].keys() == {"transformers", "full"}
    assert done.stdout.startswith("modernbert-mini-sctd: modernbert, 4 layers of 64, fp32, nothing compiled; ")
    assert "places of the kept tokens" in result["missing"][LTD] and result["missing"][LTD] in done.stdout


def test_the_table_of_kernels(tmp_path: Path) -> None:
    done = sctd("bench", *TINY, *SIZE, "--kernels", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("kernels-fp32-*.json")
    result = json.loads(path.read_text())
    groups, moved = result["seconds"]["2x64"], result["moved"]["2x64"]
    moves = groups["select + split + merge"]
    assert {"sctd, torch", "topk + gather + scatter", "the same, compiled", "copy of the same bytes"} <= moves.keys()
    assert all(seconds > 0 for group in groups.values() for seconds in group.values())
    assert {"select", "split", "merge", "split, with backward", "merge, with backward"} <= {*groups}
    for title in BETWEEN["bert"]:
        assert groups[f"{title}, with backward"].keys() == {"sctd, torch", "torch", "torch, compiled"}
    # 2 rows of 64 positions, 32 of them kept, 64 numbers of 4 bytes a state; each state is read and written.
    assert (moved["split"], moved["merge"]) == (2 * 2 * 32 * 64 * 4, 2 * 2 * 64 * 64 * 4)
    assert "2x64: select + split + merge takes " in done.stdout


def test_a_profile(tmp_path: Path) -> None:
    done = sctd("bench", *MODERN[:-1], *SIZE, "--profile", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.match(r"precision (bf16|fp32): .* on this CPU\nDROP step", done.stdout) or torch.cuda.is_available()
    for phase in ("drop", "align"):
        with gzip.open(tmp_path / f"trace-{phase}.json.gz", "rt") as file:
            assert json.load(file)["traceEvents"]
    (path,) = tmp_path.glob("profile-*.json")
    steps = json.loads(path.read_text())["steps"]
    for step in steps.values():
        assert step["ms"] > 0 and sum(" ms " in line for line in step["summary"]) == 10
        assert all(line in done.stdout for line in step["summary"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sizes", "4by512"], "ROWSxLENGTH"),
        (["--sizes", "0x512"], "'0x512'"),
        (["--sizes", "2x1024"], "model.max_positions is 512"),
        (["--rounds", "0"], "--rounds"),
        (["--arms", "drop,alone"], "there is no 'alone'"),
        (["model.vocab_size=100"], "model.vocab_size is 100"),
        (["--out", __file__], "test_bench.py"),
        (["--kernels", "--profile"], "one at a time"),
        (["model.layers=3"], "model.layers"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main(["bench", "bert-mini-sctd", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said


class TorchRandomLtd:
    """DeepSpeed's random-LTD operations in plain torch, for machines that cannot build them."""

    def token_sort_(self, index: Tensor, _length: int) -> Tensor:
        return index.sort(dim=-1).values

    def token_gather(self, whole: Tensor, index: Tensor, batch_first: bool) -> Tensor:
        assert batch_first and index.dtype == torch.int32
        return whole.gather(1, self._wide(index, whole))

    def token_scatter_(self, whole: Tensor, part: Tensor, index: Tensor, batch_first: bool) -> Tensor:
        assert batch_first and whole.dtype == part.dtype and whole.is_contiguous() and part.is_contiguous()
        return whole.scatter_(1, self._wide(index, part), part)

    def _wide(self, index: Tensor, like: Tensor) -> Tensor:
        return index.long()[..., None].expand(-1, -1, like.shape[-1])


@pytest.fixture
def torch_random_ltd(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.random_ltd import dropping_utils

    monkeypatch.setattr(dropping_utils, "random_ltd_module", TorchRandomLtd())


@pytest.mark.usefixtures("torch_random_ltd")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_model_behind_deepspeeds_random_ltd(precision: str) -> None:
    config = load_config(TINY[0], [*TINY[1:-1], f"train.precision={precision}"])
    theirs, ours = Contender(LTD, config, 2, 64), Contender("random_ltd", config, 2, 64)
    seen = []
    for layer in theirs.model.bert.layers:
        inner = layer.wrapper.random_ltd_layer if hasattr(layer, "wrapper") else layer
        inner.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0].shape[1]))
    theirs.forward()
    assert seen == [64, 32, 32, 11]  # the last layer answers for [CLS] and the 10 predicted positions alone
    for each in (theirs, ours):
        before = each.model.bert.layers[0].expand.weight.clone()
        each.step()
        assert not torch.equal(before, each.model.bert.layers[0].expand.weight)
    assert theirs.flops == ours.flops


@pytest.mark.parametrize("words", [TINY, MODERN], ids=[*BETWEEN])
def test_what_lies_between_products_is_the_same_in_torch(words: list[str]) -> None:
    config = load_config(words[0], words[1:])
    groups = elementwise(config, 2, 64, ["torch"])
    assert [*groups] == [f"{title}, with backward" for title in BETWEEN[config.model.family]]
    for title, group in groups.items():
        found = [group.candidates[name]() for name in ("sctd, torch", "torch")]
        if "dropout" not in title:
            torch.testing.assert_close(*found)


@pytest.mark.usefixtures("torch_random_ltd")
def test_all_who_move_tokens_move_the_same() -> None:
    for title, group in moves(load_config(TINY[0], TINY[1:]), 2, 64, ["torch"], has_ltd=True).items():
        assert "DeepSpeed random-LTD" in group.candidates
        found = {name: call() for name, call in group.candidates.items() if "compiled" not in name}
        if title in ("split, with backward", "merge", "merge, with backward"):
            plain = found["gather" if "split" in title else "scatter"]
            torch.testing.assert_close(found["sctd, torch"], plain)


def test_what_is_slow_in_a_profile() -> None:
    times = [("aten::mm", 300.0, 3), ("void at::native::vectorized_layer_norm_kernel<float>(int)", 600.0, 2)]
    shares, first, second = summary([*times, ("aten::view", 100.0, 9)])[:3]
    assert shares == "dropout, norm, GELU 60.0%, matrix products 30.0%, the rest 10.0%"
    (shares, *_) = summary([("_rotate_kernel", 300.0, 4), ("_geglu_kernel", 100.0, 2)])
    assert shares == "rotary positions 75.0%, dropout, norm, GELU 25.0%"
    assert first.split() == ["60.0%", "0.60", "ms", "2", "x", "vectorized_layer_norm_kernel<float>(int)"]
    assert second.endswith("aten::mm")
