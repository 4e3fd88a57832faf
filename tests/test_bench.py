"""`sctd bench` on tiny sizes, through the command line."""

import gzip
import json
from pathlib import Path

import pytest

from sctd.cli import main
from support import sctd

TINY = ["bert-mini-sctd", "model.layers=4", "model.vocab_size=600", "model.hidden_size=64", "train.precision=fp32"]
SIZE = ["--sizes", "2x64", "--rounds", "1"]


def test_the_table_of_steps(tmp_path: Path) -> None:
    done = sctd("bench", *TINY, *SIZE, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("bench-4x64-fp32-*.json")
    result = json.loads(path.read_text())
    assert {"device", "date", "versions", "rounds", "config", "deepspeed_random_ltd"} <= result.keys()
    found = result["sizes"]["2x64"]
    assert {"transformers", "full", "drop", "align", "sctd", "random_ltd"} <= found.keys()
    for row in found.values():
        assert row["forward"] > 0 and row["step"] > 0 and row["mfu"] > 0 and row["peak_mib"] > 50
    mean = (9 * found["drop"]["step"] + found["align"]["step"]) / 10
    assert found["sctd"]["step"] == pytest.approx(mean)
    assert found["drop"]["flops"] < found["full"]["flops"] < found["align"]["flops"]
    assert "| 2x64 | SCTD, mean step |" in done.stdout and path.name in done.stdout


def test_the_table_of_kernels(tmp_path: Path) -> None:
    done = sctd("bench", *TINY, *SIZE, "--kernels", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("kernels-*.json")
    groups = json.loads(path.read_text())["seconds"]["2x64"]
    moves = groups["select + split + merge"]
    assert {"sctd, torch", "topk + gather + scatter", "the same, compiled", "copy of the same bytes"} <= moves.keys()
    assert all(seconds > 0 for group in groups.values() for seconds in group.values())
    assert {"dropout + residual + LayerNorm, with backward", "cross-entropy + accumulators, with backward"} <= {*groups}


def test_a_profile(tmp_path: Path) -> None:
    done = sctd("bench", *TINY, *SIZE, "--profile", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    for phase in ("drop", "align"):
        with gzip.open(tmp_path / f"trace-{phase}.json.gz", "rt") as file:
            assert json.load(file)["traceEvents"]
    assert sum("%" in line and " ms " in line for line in done.stdout.splitlines()) == 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sizes", "4by512"], "ROWSxLENGTH"),
        (["--sizes", "0x512"], "'0x512'"),
        (["--sizes", "2x1024"], "model.max_positions is 512"),
        (["--rounds", "0"], "--rounds"),
        (["--kernels", "--profile"], "one at a time"),
        (["model.layers=3"], "model.layers"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main(["bench", "bert-mini-sctd", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said
