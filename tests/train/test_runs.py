"""Whole runs through the command line: what a run leaves, resuming bit for bit, ranks, ZeRO stages, arms."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

from sctd.corpus.prepare.prepare import prepare
from sctd.corpus.prepare.settings import CorpusSettings
from sctd.corpus.sources.source import read_documents
from sctd.train.keep.checkpoint import read_importance
from support import ROOT, assert_same_run, records, sctd, train
from texts import write

METRICS = """step phase loss mlm_drop mlm_full kl_global kl_local lr grad_norm samples tokens tokens_per_s mfu
seconds""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten uninterrupted steps of the sctd arm."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    train(recipe, run_dir, "run.examples=['the [MASK] of the object.']", "train.valid_every=5")
    return run_dir


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "export" / "model.safetensors")


def test_metrics_have_every_key_and_the_schedule(finished: Path) -> None:
    found = records(finished)
    assert [record["step"] for record in found] == list(range(1, 11))
    assert [record["phase"] for record in found] == ["drop", "drop", "drop", "align"] * 2 + ["drop", "drop"]
    assert all(set(METRICS) <= record.keys() for record in found)
    for record in found:
        aligned = record["phase"] == "align"
        assert record["mlm_drop"] > 0 and record["grad_norm"] > 0 and record["mfu"] > 0
        assert (record["mlm_full"] is not None) == (record["kl_global"] is not None) == aligned
        assert (record.get("valid_loss") is not None) == (record["step"] in (5, 10))
        assert (record.get("kl_gradient", 0.0) > 0) == aligned and record["flops"] > 0 and record["flops_per_s"] > 0
        if record["step"] in (5, 10):
            assert record["breakthrough_step"] is None and record["valid_gap"] < 1 and 0 < record["context_use"] < 1
    assert found[-1]["samples"] == 80 and found[-1]["tokens"] == 80 * 64


def test_looking_at_a_run_changes_no_bit_of_it(finished: Path, recipe: Path, tmp_path: Path) -> None:
    """Gradients of the KL terms, validations and logs at every step, or at none but the first and the last."""
    train(recipe, tmp_path / "run", "train.log_every=100")
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 10]
    assert all(weights(tmp_path / "run")[name].equal(tensor) for name, tensor in weights(finished).items())


MODERN = (
    "model.family=modernbert", "optimizer.name=muon", "schedule.full_start=2", "schedule.full_finish=2",
    "data.mask_stages=[[7,0.3]]", "train.precision=auto",
)  # fmt: skip


def test_a_modern_run_resumes_bit_for_bit_in_any_phase(recipe: Path, tmp_path: Path) -> None:
    """Muon on two ranks under ZeRO-1; stopped in the full start, and where more is masked than before."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(recipe, whole, *MODERN, ranks=2)
    for stop in (1, 7):
        train(recipe, parts, *MODERN, f"train.stop_at={stop}", *(["--resume"] if stop > 1 else []), ranks=2)
    train(recipe, parts, *MODERN, "--resume", ranks=2)
    assert_same_run(whole, parts)
    phases = [record["phase"] for record in records(whole)]
    assert phases == ["full"] * 2 + ["drop", "align"] + ["drop"] * 3 + ["align"] + ["full"] * 2
    assert [record["keep"] for record in records(whole)] == [64] * 2 + [32] * 6 + [64] * 2
    chosen = yaml.safe_load((whole / "config.yaml").read_text())["train"]["precision"]
    assert chosen in ("bf16", "fp32")
    model = AutoModelForMaskedLM.from_pretrained(whole / "export")
    assert type(model).__name__ == "ModernBertForMaskedLM"
    refused = sctd("pretrain", recipe, f"run.dir={parts}", *MODERN[1:], "model.family=bert", "--resume")
    assert refused.returncode == 2 and "model.family is 'bert'" in refused.stderr and refused.stderr.count("\n") == 1


def test_recomputing_activations_changes_no_bit(recipe: Path, finished: Path, tmp_path: Path) -> None:
    train(recipe, tmp_path / "run", "train.checkpoint_activations=true")
    assert_same_run(tmp_path / "run", finished)


def test_dropout_does_not_depend_on_the_micro_batch(recipe: Path, finished: Path, tmp_path: Path) -> None:
    """Attention dropout, which is torch's, is off; all other dropout belongs to the rows."""
    runs = []
    for micro in (2, 8):
        runs.append(tmp_path / f"micro-{micro}")
        train(recipe, runs[-1], f"train.micro_batch_size={micro}", "model.attention_dropout=0", "train.steps=4")
    few, all_at_once = ([record["loss"] for record in records(run)] for run in runs)
    assert few == pytest.approx(all_at_once, rel=1e-5)


def test_attention_inside_documents_trains(recipe: Path, finished: Path, tmp_path: Path) -> None:
    train(recipe, tmp_path / "run", "attention.scope=document")
    losses = [record["loss"] for record in records(tmp_path / "run")]
    assert losses != [record["loss"] for record in records(finished)] and losses[-1] < losses[0]


def test_a_compiled_run_has_the_losses_of_a_plain_one(recipe: Path, tmp_path: Path) -> None:
    """With a real C++ compiler, which takes minutes; the graph of ALIGN steps is looked at in the model's tests."""
    small = ["arm=token_drop", "model.layers=2", "model.attention_dropout=0", "train.steps=2"]
    for name, compiled in (("plain", "false"), ("compiled", "true")):
        train(recipe, tmp_path / name, *small, f"train.compile={compiled}")
    plain, compiled = ([record["loss"] for record in records(tmp_path / name)] for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_align_loss_is_made_of_its_terms(finished: Path) -> None:
    for record in records(finished):
        if record["phase"] == "align":
            mlm = (record["mlm_drop"] + record["mlm_full"]) / 2
            expected = mlm + 0.05 * (record["kl_global"] + record["kl_local"])
            assert record["loss"] == pytest.approx(expected, rel=1e-6)
        else:
            assert record["loss"] == record["mlm_drop"]


def test_tensorboard_events_hold_scalars_histogram_and_texts(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished)).Reload()
    tags = events.Tags()
    wanted = {"train/loss", "train/mlm_drop", "train/kl_local", "train/lr", "speed/tokens_per_s", "valid/loss"}
    assert wanted <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 11))
    logged = [record["loss"] for record in records(finished)]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(logged)
    assert tags["histograms"] == ["importance/scores"]
    texts = {tag for tag in tags["tensors"] if tag.startswith("importance/")}
    assert texts == {"importance/highest/text_summary", "importance/lowest/text_summary"}


def test_export_is_a_plain_transformers_bert(finished: Path) -> None:
    folder = finished / "export"
    model, report = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(folder))
    answers = pipeline("fill-mask", str(folder), device="cpu")("the [MASK] of the object.")
    assert len(answers) == 5 and abs(sum(a["score"] for a in answers)) <= 1
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| arm | sctd |" in card and "| optimizer steps | 10 of a horizon of 10 |" in card
    assert "importance" not in " ".join(load_file(folder / "model.safetensors"))


def test_export_verb_writes_the_same_model_again(finished: Path, tmp_path: Path) -> None:
    for _ in range(2):  # an export may be replaced by an export
        done = sctd("export", finished, "--out", tmp_path / "my-bert")
        assert done.returncode == 0, done.stderr
    again = load_file(tmp_path / "my-bert" / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights(finished).items())


def test_the_run_prints_its_course(recipe: Path, tmp_path: Path) -> None:
    done = train(recipe, tmp_path / "run", "run.examples=['the [MASK] of it.']", "train.steps=2")
    for text in (
        "arm       sctd, 32 of 64 tokens",
        "step  1/2",
        "unigram entropy",
        "the [MASK] of it.  ->",
        "tensorboard",
    ):
        assert text in done.stdout.replace("step 1/2", "step  1/2"), text


@pytest.mark.parametrize("stop", [3, 6])
def test_resume_is_bit_exact(recipe: Path, finished: Path, tmp_path: Path, stop: int) -> None:
    """Dropout on; neither stop is a multiple of F = 4."""
    run_dir = tmp_path / "run"
    common = ["train.valid_every=5"]
    train(recipe, run_dir, *common, f"train.stop_at={stop}")
    assert len(records(run_dir)) == stop
    train(recipe, run_dir, *common, "--resume")
    assert_same_run(finished, run_dir)


def test_resume_of_two_ranks_with_zero_1_is_bit_exact(recipe: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(recipe, whole, ranks=2)
    train(recipe, parts, "train.stop_at=5", ranks=2)
    train(recipe, parts, "--resume", ranks=2)
    assert_same_run(whole, parts)
    config = yaml.safe_load((whole / "config.yaml").read_text())
    assert config["train"]["zero_stage"] == 1


def test_resume_of_bf16_is_bit_exact(recipe: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(recipe, whole, "train.precision=bf16")
    train(recipe, parts, "train.precision=bf16", "train.stop_at=5")
    train(recipe, parts, "train.precision=bf16", "--resume")
    assert_same_run(whole, parts)


def test_resume_takes_the_newest_whole_checkpoint(recipe: Path, finished: Path, tmp_path: Path) -> None:
    """A torn newest checkpoint is named and passed over; its steps are trained again to the same end."""
    run_dir = tmp_path / "run"
    common = ["train.valid_every=5", "train.save_every=3"]
    train(recipe, run_dir, *common, "train.stop_at=7")
    newest = run_dir / "checkpoints" / "step-00000007" / "rank-00000.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    done = train(recipe, run_dir, *common, "--resume")
    assert "step-00000007 is damaged (rank-00000.safetensors has another sha256)" in done.stdout
    assert "at step 6" in done.stdout
    assert_same_run(finished, run_dir)


def test_a_damaged_checkpoint_never_pushes_out_a_whole_one(recipe: Path, tmp_path: Path) -> None:
    """With room for one, the newest torn and passed over: what is saved next must stay, and is what `latest` names."""
    run_dir = tmp_path / "run"
    common = ["train.keep_checkpoints=1", "train.valid_rows=2"]
    train(recipe, run_dir, *common, "train.stop_at=3")
    folder = run_dir / "checkpoints"
    shutil.copytree(folder / "step-00000003", folder / "step-00000009")
    (folder / "step-00000009" / "manifest.json").write_text("{}")
    done = train(recipe, run_dir, *common, "train.stop_at=5", "--resume")
    assert "step-00000009 is damaged" in done.stdout
    assert [path.name for path in folder.glob("step-*")] == ["step-00000005"]
    assert (folder / "latest").read_text() == "step-00000005\n"


def test_a_finished_run_can_be_called_again(recipe: Path, tmp_path: Path) -> None:
    train(recipe, tmp_path / "run", "train.steps=2", "train.valid_rows=2")
    before = weights(tmp_path / "run")
    done = train(recipe, tmp_path / "run", "train.steps=2", "train.valid_rows=2", "--resume")
    assert "nothing to train" in done.stdout
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path / "run").items())


def test_old_checkpoints_are_pruned_and_latest_points_at_the_newest(recipe: Path, tmp_path: Path) -> None:
    train(recipe, tmp_path / "run", "train.save_every=2", "train.keep_checkpoints=3")
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000006", "step-00000008", "step-00000010"]
    assert (folder / "latest").read_text() == "step-00000010\n"
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("arm", ["baseline", "token_drop", "random_drop", "random_ltd"])
def test_every_arm_trains(recipe: Path, tmp_path: Path, arm: str) -> None:
    run_dir = tmp_path / arm
    train(recipe, run_dir, f"arm={arm}", "train.steps=6", "train.batch_size=16", "train.micro_batch_size=16")
    found = records(run_dir)
    assert found[-1]["loss"] < found[0]["loss"]
    assert {record["phase"] for record in found} == ({"full"} if arm == "baseline" else {"drop"})
    assert "valid_loss" in found[-1]
    keeps = [record["keep"] for record in found]
    assert keeps == {"baseline": [64] * 6, "random_ltd": [32, 48, 48, 48, 64, 64]}.get(arm, [32] * 6)


@pytest.mark.parametrize("config", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_deepspeed_config_trains_alike_on_two_ranks(
    recipe: Path, tmp_path: Path, config: Path, reference: list[float]
) -> None:
    """Every shipped stage and precision follows one process in float32."""
    run_dir = tmp_path / "run"
    words = ("model.dropout=0", "model.attention_dropout=0", "--deepspeed_config", config)
    if json.loads(config.read_text()).get("fp16", {}).get("enabled") and not cpu_has_fp16():
        done = sctd("pretrain", recipe, f"run.dir={run_dir}", *words, ranks=2)
        assert done.returncode != 0 and "fp16, which DeepSpeed cannot train in on this cpu" in done.stderr + done.stdout
        assert not (run_dir / "config.yaml").exists()
        pytest.skip("this CPU has no products in float16; that it is told so was tested")
    train(recipe, run_dir, *words, ranks=2)
    losses = [record["loss"] for record in records(run_dir)]
    assert losses == pytest.approx(reference, abs=2e-3 if config.stem.endswith("fp32") else 1e-2)
    assert records(run_dir)[-1]["skipped_steps"] == 0
    aligned = [record["kl_gradient"] for record in records(run_dir) if record["phase"] == "align"]
    stage = json.loads(config.read_text())["zero_optimization"]["stage"]
    assert all(share is None if stage == 3 else 0 < share < 10 for share in aligned) and len(aligned) == 2


def cpu_has_fp16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


@pytest.fixture(scope="module")
def reference(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run_dir = tmp_path_factory.mktemp("runs") / "reference"
    train(recipe, run_dir, "model.dropout=0", "model.attention_dropout=0", "train.zero_stage=0")
    return [record["loss"] for record in records(run_dir)]


def test_accumulation_and_ranks_leave_the_data_alone(recipe: Path, finished: Path, tmp_path: Path) -> None:
    train(recipe, tmp_path / "run", "train.micro_batch_size=4", ranks=2)
    assert [r["ledger"] for r in records(tmp_path / "run")] == [r["ledger"] for r in records(finished)]


def test_importance_table_moves_and_is_the_same_on_all_ranks(recipe: Path, tmp_path: Path) -> None:
    """Read from the checkpoint of one rank and of two: the tables agree to rounding of the losses themselves."""
    tables = []
    for ranks in (1, 2):
        run_dir = tmp_path / str(ranks)
        train(recipe, run_dir, "model.dropout=0", "model.attention_dropout=0", "train.steps=3", ranks=ranks)
        tables.append(importance_table(run_dir, 3))
    assert tables[0].dtype == torch.float32
    assert 0 < (tables[0] != 10.0).sum() < tables[0].numel()
    torch.testing.assert_close(tables[0], tables[1], rtol=0, atol=1e-5)


def test_overflowing_steps_are_skipped_counted_and_shown(recipe: Path, tmp_path: Path) -> None:
    """A rate that blows the parameters up: later steps are not applied, and the importance table stands still."""
    run_dir = tmp_path / "run"
    huge = ("optimizer.lr=1e30", "optimizer.clip=0", "schedule.warmup_steps=0", "train.precision=bf16")
    done = train(recipe, run_dir, *huge, "train.steps=4", "train.save_every=1", "train.keep_checkpoints=4")
    assert [record["skipped_steps"] for record in records(run_dir)] == [0, 1, 2, 3]
    assert "SKIPPED 3 (overflow)" in done.stdout
    tables = [importance_table(run_dir, step) for step in (1, 2, 3, 4)]
    assert (tables[0] != 10.0).any()
    assert all(torch.equal(tables[0], table) for table in tables[1:])


def importance_table(run_dir: Path, step: int) -> torch.Tensor:
    scores = read_importance(run_dir / "checkpoints" / f"step-{step:08d}")
    assert scores is not None
    return scores


def test_masks_by_importance_resume_bit_for_bit(recipe: Path, tmp_path: Path) -> None:
    """Resumed at step 102, masks go on by the scores of step 100. Up to there all scores were 10: masks were random."""
    small = ("arm=baseline", "model.layers=2", "train.steps=104", "train.batch_size=2", "train.valid_rows=2")
    chosen = (*small, "data.mask_by=importance")
    whole, parts, random = tmp_path / "whole", tmp_path / "parts", tmp_path / "random"
    train(recipe, whole, *chosen)
    train(recipe, parts, *chosen, "train.stop_at=102")
    train(recipe, parts, *chosen, "--resume")
    assert_same_run(whole, parts)
    train(recipe, random, *small)
    one, other = ([record["loss"] for record in records(run)] for run in (whole, random))
    assert one[:100] == other[:100] and not set(one[100:]) & set(other[100:])


def test_a_killed_save_leaves_no_visible_checkpoint(recipe: Path, finished: Path, tmp_path: Path) -> None:
    """What a SIGKILL while saving leaves: a temporary folder. It is neither loaded nor counted."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    folder = run_dir / "checkpoints"
    (folder / "step-00000010").rename(folder / ".step-00000010.tmp")
    done = sctd("pretrain", recipe, f"run.dir={run_dir}", "train.valid_every=5", "--resume")
    assert done.returncode == 2
    assert "names a checkpoint, but there is none" in done.stderr


# ---- rows of two lengths


@pytest.fixture(scope="module")
def two_lengths(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose first five steps train on rows of 32 tokens, later ones on 64, of two weighted sources."""
    folder = tmp_path_factory.mktemp("lengths")
    texts = list(itertools.islice(read_documents("embedded"), 90))
    for name, part in (("a", texts[:60]), ("b", texts[60:])):
        write(folder / f"{name}.jsonl", part)
    sources = tuple(f"{name}={folder}/{name}.jsonl" for name in "ab")
    wanted = CorpusSettings(sources, (32, 64), vocab_size=512, valid_fraction=0.1, weights=("b=0.5",))
    prepare(wanted, folder / "corpus", log=lambda _: None)
    path = folder / "lengths.yaml"
    path.write_text(f"extends: {recipe}\ndata: {{corpus: {folder / 'corpus'}, warmup_seq_len: 32, warmup_steps: 5}}\n")
    return path


def test_a_warm_up_on_shorter_rows_resumes_at_any_step(two_lengths: Path, tmp_path: Path) -> None:
    """Before the switch, at it, behind it."""
    train(two_lengths, tmp_path / "whole")
    whole = records(tmp_path / "whole")
    assert [record["tokens"] for record in whole] == [
        256 * min(step, 5) + 512 * max(0, step - 5) for step in range(1, 11)
    ]
    assert [record["keep"] for record in whole] == [16] * 5 + [32] * 5
    for stop in (4, 5, 6):
        run = tmp_path / str(stop)
        train(two_lengths, run, f"train.stop_at={stop}")
        train(two_lengths, run, "--resume")
        assert_same_run(run, tmp_path / "whole")
        assert [record["tokens"] for record in records(run)][-1] == whole[-1]["tokens"]


def test_two_ranks_train_on_the_same_rows_of_two_lengths(two_lengths: Path, tmp_path: Path) -> None:
    for ranks in (0, 2):
        train(two_lengths, tmp_path / str(ranks), "model.dropout=0", "model.attention_dropout=0", ranks=ranks)
    one, two = (records(tmp_path / ranks) for ranks in ("0", "2"))
    assert [record["ledger"] for record in one] == [record["ledger"] for record in two]
    assert [record["loss"] for record in one] == pytest.approx([record["loss"] for record in two], rel=1e-4)


def test_lengths_that_the_corpus_has_not_are_refused(two_lengths: Path, tmp_path: Path) -> None:
    for override, said in (
        ("data.seq_len=48", "rows of 48 tokens are not in the corpus, it has 32 and 64"),
        ("data.warmup_seq_len=16", "rows of 16 tokens are not in the corpus"),
        ("data.warmup_seq_len=64", "lower it"),
        ("data.warmup_steps=0", "set together"),
    ):
        done = sctd("pretrain", two_lengths, f"run.dir={tmp_path / 'run'}", override)
        assert done.returncode == 2 and said in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()
