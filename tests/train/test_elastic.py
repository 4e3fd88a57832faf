"""A checkpoint belongs to no number of ranks and no ZeRO stage."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sctd.errors import UserError
from sctd.jobs.verify import compare
from sctd.train.engine.state import StateFiles
from sctd.train.keep.checkpoint import newest_whole, read_importance, read_weights
from support import records, sctd, train

# Attention's dropout is drawn for each rank; all other dropout belongs to the rows and stays on.
COMMON = ("train.batch_size=12", "train.micro_batch_size=2", "model.attention_dropout=0")
OFFLOAD = {"stage": 3, "offload_optimizer": {"device": "cpu"}}


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("elastic") / "whole"
    train(recipe, run_dir, *COMMON, "train.stop_at=8", ranks=2)
    return run_dir


@pytest.fixture(scope="module")
def saved(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five steps of two ranks under ZeRO-1; the next ALIGN step is still to come."""
    run_dir = tmp_path_factory.mktemp("elastic") / "saved"
    train(recipe, run_dir, *COMMON, "train.stop_at=5", ranks=2)
    return run_dir


@pytest.mark.parametrize(
    ("ranks", "zero"),
    [(1, {"stage": 0}), (3, {"stage": 2}), (2, OFFLOAD)],
    ids=["1 rank", "3 ranks", "ZeRO-3, offload"],
)
def test_another_job_continues_it(
    ranks: int, zero: dict[str, object], recipe: Path, whole: Path, saved: Path, tmp_path: Path
) -> None:
    run_dir, config = tmp_path / "run", tmp_path / "zero.json"
    shutil.copytree(saved, run_dir)
    config.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
    arguments = (*COMMON, "train.stop_at=8", "--resume", "--deepspeed_config", config)
    done = train(recipe, run_dir, *arguments, ranks=ranks if ranks > 1 else 0)
    assert "resuming" in done.stdout and f"{ranks} x cpu" in done.stdout
    for key in ("step", "phase", "samples", "ledger"):
        assert [record[key] for record in records(run_dir)] == [record[key] for record in records(whole)]
    found, expected = ([record["loss"] for record in records(run)][5:] for run in (run_dir, whole))
    assert found == pytest.approx(expected, rel=1e-5)
    ended, expected_weights = (read_weights(newest_whole(run) or run) for run in (run_dir, whole))
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(ended[name], tensor, rtol=0, atol=1e-5)
    tables = [read_importance(newest_whole(run) or run) for run in (run_dir, whole)]
    torch.testing.assert_close(*tables, rtol=1e-4, atol=0)


def test_stretches_are_put_together_from_any_files(tmp_path: Path) -> None:
    whole = torch.arange(10.0)
    save_file(
        {"parameter/a.b/0": whole[:3].clone(), "exp_avg/a.b/0": whole[:3] * 2}, tmp_path / "rank-00000.safetensors"
    )
    save_file({"parameter/a.b/3": whole[3:7].clone()}, tmp_path / "rank-00001.safetensors")
    save_file({"parameter/a.b/7": whole[7:].clone()}, tmp_path / "rank-00002.safetensors")
    files = StateFiles(tmp_path, "rank-*.safetensors")
    for start in range(10):
        for stop in range(start + 1, 11):
            assert torch.equal(files.read("parameter", "a.b", start, stop), whole[start:stop])
    assert files.length("parameter", "a.b") == 10 and files.length("exp_avg", "c") == 0
    with pytest.raises(UserError, match="holds 2 of 4 numbers of exp_avg a.b"):
        files.read("exp_avg", "a.b", 1, 5)


def test_verify_resume_is_the_proof(recipe: Path, tmp_path: Path) -> None:
    """Killed on two ranks, continued by one; the losses agree, and the data is the same."""
    run_dir = tmp_path / "proof"
    done = sctd(
        "verify-resume",
        recipe,
        f"run.dir={run_dir}",
        "train.steps=500",
        "--ranks",
        2,
        "--resume-ranks",
        1,
        "--steps",
        4,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same rows in the same order" in done.stdout and "OK: losses within 0.001" in done.stdout
    again = sctd("verify-resume", recipe, f"run.dir={run_dir}", "train.steps=500")
    assert again.returncode == 2 and "is not empty" in again.stderr


def test_verify_resume_of_one_rank_is_bitwise_and_notices_a_difference(recipe: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "proof"
    done = sctd("verify-resume", recipe, f"run.dir={run_dir}", "train.steps=500", "--steps", 4)
    assert done.returncode == 0 and done.stdout.count("bit for bit the same") == 3, done.stdout + done.stderr
    assert compare(run_dir / "killed", run_dir / "whole").bitwise
    lines = (run_dir / "whole" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    record = json.loads(lines[-1])
    lines[-1] = json.dumps(record | {"loss": record["loss"] + 1e-7})
    (run_dir / "whole" / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert not compare(run_dir / "killed", run_dir / "whole").bitwise
