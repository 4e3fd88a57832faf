"""Runs that go on otherwise: branches from a checkpoint, longer horizons, and folders that are started anew."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from sctd.cli import main
from sctd.config import Config, config_from_dict, merge_dicts, to_dict, to_yaml
from sctd.corpus.manifest import read_manifest
from sctd.corpus.prepare.prepare import prepare
from sctd.corpus.prepare.settings import CorpusSettings
from sctd.errors import UserError
from sctd.report.gather import gather
from sctd.report.groups import group
from sctd.report.record import record_section
from sctd.report.summary import tiles
from sctd.train.command import read_command
from sctd.train.flops import flops_until
from sctd.train.keep.branch import branched, find_parent, make_branch
from sctd.train.keep.checkpoint import newest_whole, verify
from sctd.train.keep.checkpoint import read_manifest as read_checkpoint
from sctd.train.keep.earlier import read_earlier, settings_until
from sctd.train.keep.export import read_run
from sctd.train.keep.run_folder import (
    check_run_dir,
    check_same_run,
    extend,
    follows_alike,
    identity_of,
    read_deepspeed_copy,
    read_overrides,
    start_run_dir,
)
from support import assert_same_run, records, sctd, train

SAVES = ("train.save_every=3", "train.keep_checkpoints=9", "train.valid_rows=2", "objective.kl_weight=0.1")


@pytest.fixture(scope="module")
def parent(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps of the sctd arm, with checkpoints of steps 3, 6, 9 and 10."""
    run_dir = tmp_path_factory.mktemp("branch") / "parent"
    train(recipe, run_dir, *SAVES)
    return run_dir


@pytest.fixture(scope="module")
def other_corpus(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other rows, of the same tokenizer."""
    out = tmp_path_factory.mktemp("other") / "packed"
    source = str(corpus.parent / "text.jsonl")
    wanted = CorpusSettings((source,), seq_lens=(64,), tokenizer=str(corpus), valid_fraction=0.1, seed=7)
    prepare(wanted, out, log=lambda _: None)
    return out


def branch(parent: str | Path, run_dir: Path, *words: str) -> str:
    done = sctd("pretrain", "--branch-from", parent, f"run.dir={run_dir}", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(["pretrain", *map(str, words)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


# ---- branches


def test_a_branch_at_its_own_settings_ends_as_the_run_it_left(parent: Path, tmp_path: Path) -> None:
    """Stopped on its way, and continued by the same command when its parent is gone."""
    old, run_dir = tmp_path / "old", tmp_path / "run"
    shutil.copytree(parent, old)
    said = branch(f"{old}@6", run_dir, "train.stop_at=8")
    assert f"branched from {old}@6" in said and "at step 6" in said and "another" not in said
    files = [run / "checkpoints" / "step-00000006" / "rank-00000.safetensors" for run in (old, run_dir)]
    assert os.path.samefile(*files), "linked, not copied"
    old.rename(tmp_path / "moved")
    assert "at step 8" in branch(f"{old}@6", run_dir, "--resume")
    assert verify(run_dir / "checkpoints" / "step-00000006") is None
    assert_same_run(parent, run_dir)
    for key in ("flops", "tokens", "skipped_steps"):
        assert [record[key] for record in records(run_dir)] == [record[key] for record in records(parent)], key
    config = read_run(run_dir)
    assert config.run.branch_from == f"{old}@6" and config.objective.kl_weight == 0.1
    status = sctd("status", run_dir).stdout
    assert f"branched     from {old}@6" in status and "step 10 of 10" in status


def test_a_branch_on_other_rows_begins_them_at_the_first(
    parent: Path, corpus: Path, other_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And its cursor is its own when it is resumed; the corpus of the parent is another one then."""
    run_dir, words = tmp_path / "run", ("arm=token_drop", "optimizer.lr=1e-4")
    before = read_checkpoint(parent / "checkpoints" / "step-00000006")
    said = branch(f"{parent}@6", run_dir, f"data.corpus={other_corpus}", *words, "train.stop_at=7")
    assert "another corpus" in said
    assert read_checkpoint(parent / "checkpoints" / "step-00000006") == before, "the parent's is as it was"
    found = records(run_dir)
    assert [record["samples"] for record in found] == [8, 16, 24, 32, 40, 48, 8]
    assert found[:6] == records(parent)[:6] and found[6]["tokens"] == 7 * 8 * 64
    assert found[6]["lr"] == pytest.approx(records(parent)[6]["lr"] / 10)
    done = sctd("pretrain", "--branch-from", f"{parent}@6", f"run.dir={run_dir}", f"data.corpus={corpus}", "--resume")
    assert done.returncode == 2 and "another corpus than data.corpus holds" in done.stderr, done.stderr


def test_an_arm_that_needs_a_table_measures_it_first(parent: Path, tmp_path: Path) -> None:
    """A branch of a branch, which has none: baseline steps, then full ones that measure, then dropping ones."""
    plain, again = tmp_path / "plain", tmp_path / "again"
    branch(f"{parent}@6", plain, "arm=baseline", "train.steps=8")
    said = branch(plain, again, "arm=sctd", "train.steps=12")
    assert "steps 9 to 10 on the full path measure the importance" in said
    phases = [record["phase"] for record in records(again)]
    assert phases == ["drop"] * 3 + ["align"] + ["drop"] * 2 + ["full"] * 4 + ["drop", "align"]
    # FLOPs and report: each step by the settings it was trained with, and shared beginnings once.
    manifest, flops = read_manifest(again / "corpus"), [record["flops"] for record in records(again)]
    by_arm = [flops_until(read_run(run), manifest, range(13)) for run in (parent, plain, again)]
    expected = [by_arm[0][6], by_arm[1][8] - by_arm[1][6], by_arm[2][12] - by_arm[2][8]]
    assert flops[-1] == pytest.approx(sum(expected)) and flops[5] == records(parent)[5]["flops"]
    arms = [[(last, config.arm) for last, config in settings_until(again, step)] for step in (4, 7, 9)]
    assert arms == [[(4, "sctd")], [(6, "sctd"), (7, "baseline")], [(6, "sctd"), (8, "baseline"), (9, "sctd")]]
    inputs = gather([parent, plain, again])
    assert [point["flops"] for point in inputs.runs[2].points] == pytest.approx(flops)
    groups = group(inputs)
    assert len(groups) == 3
    names = [row[0] for row in record_section(inputs, groups).parts[0].rows]  # type: ignore[union-attr]
    assert {"parent", "plain (from parent@6)", "again (from plain@8)"} == {*names}
    hours = dict((what, value) for value, what in tiles(inputs, groups))["of pretraining in all"]
    spent = [records(run)[-1]["seconds"] - records(begin)[step - 1]["seconds"] * (step > 0)
             for run, begin, step in ((parent, parent, 0), (plain, parent, 6), (again, plain, 8))]  # fmt: skip
    assert hours == f"{sum(spent) / 3600:.2g} h" or float(hours.split()[0]) == pytest.approx(sum(spent) / 3600, rel=0.1)


def wanted(parent: Path, run_dir: Path, *words: str, at: str = "@6") -> Config:
    return read_command([f"run.dir={run_dir}", *words], branch_from=f"{parent}{at}").config


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.layers=6"], "model.layers is 6, .* has 4"),
        (["model.family=modernbert"], "model.family is 'modernbert', .* has 'bert'"),
        (["model.vocab_size=640"], "model.vocab_size is 640, .* has 512"),
        (["optimizer.name=muon"], "optimizer.name is 'muon', .* start a new run with init.from="),
        (["init.from=some/model"], "init.from is 'some/model'"),
        (["train.steps=6"], "train.steps is 6, and the branch begins at step 6"),
        (["train.stop_at=5"], "train.stop_at is 5, and the branch begins at step 6"),
    ],
)
def test_what_a_branch_cannot_change(
    parent: Path, corpus: Path, tmp_path: Path, words: Sequence[str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        find_parent(wanted(parent, tmp_path / "run", *words), read_deepspeed_copy(parent), read_manifest(corpus))


def test_parents_that_are_none(
    parent: Path, corpus: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, old = f"run.dir={tmp_path / 'run'}", tmp_path / "old"
    for words, said in (
        (["--branch-from", f"{parent}@6"], "pass run.dir=FOLDER"),
        (["--branch-from", tmp_path, run], "holds no run"),
        ([recipe, "--branch-from", f"{parent}@6", run], "leave out the recipe"),
        (["--branch-from", f"{parent}@6", f"run.dir={parent}"], "that run's own folder"),
        (["--branch-from", f"{parent}@6", f"run.dir={parent}", "--resume"], "that run's own folder"),
        ([run], "the recipe is missing"),
    ):
        assert said in refused(capsys, *words)
    shutil.copytree(parent, old)
    assert "holds a run" in refused(capsys, "--branch-from", f"{parent}@6", f"run.dir={old}")
    ds_config, manifest = read_deepspeed_copy(parent), read_manifest(corpus)
    with pytest.raises(UserError, match="there are 3, 6, 9, 10; the nearest is 6"):
        find_parent(wanted(parent, tmp_path / "run", at="@7"), ds_config, manifest)
    with pytest.raises(UserError, match="holds another run, no branch"):
        check_same_run(read_command([f"run.dir={old}"], True, f"{parent}@6").config, ds_config, old)
    file = old / "checkpoints" / "step-00000006" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="is damaged"):
        find_parent(wanted(old, tmp_path / "run"), ds_config, manifest)
    facts = json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "manifest.json").write_text(json.dumps(facts | {"tokenizer_hash": "0"}), encoding="utf-8")
    with pytest.raises(UserError, match="the tokenizer of .* is not that of"):
        find_parent(wanted(parent, tmp_path / "run"), ds_config, read_manifest(tmp_path / "corpus"))
    assert not (tmp_path / "run").exists()


def test_a_branch_that_was_not_finished(
    parent: Path, corpus: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its parent removes the checkpoint meanwhile; the recipe alone is not what was to go on there."""
    old, run_dir = tmp_path / "old", tmp_path / "run"
    shutil.copytree(parent, old)
    manifest, ds_config = read_manifest(corpus), read_deepspeed_copy(parent)
    config = wanted(old, run_dir)
    begin = find_parent(config, ds_config, manifest)
    (begin.path / "rank-00000.safetensors").unlink()
    config = branched(config, begin)
    with pytest.raises(UserError, match="that checkpoint was removed by the run meanwhile"):
        make_branch(begin, config, ds_config, identity_of(config, manifest), [])
    assert not [*(run_dir / "checkpoints").iterdir()]
    said = refused(capsys, recipe, f"run.dir={run_dir}", "--resume")
    assert f"the branch of {old}@6 in {run_dir} was not finished: repeat its command with --branch-from" in said


def test_overrides_of_a_start_that_saved_nothing_are_not_repeated(recipe: Path, corpus: Path, tmp_path: Path) -> None:
    begun = config_from_dict({"data": {"corpus": str(corpus)}})
    start_run_dir(tmp_path, begun, {}, ["optimizer.lr=0.5"])
    command = read_command([str(recipe), f"run.dir={tmp_path}"], resume=True)
    assert command.config.optimizer.lr != 0.5 and command.overrides == [f"run.dir={tmp_path}"]


def test_what_a_branch_leaves_out(parent: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, ds_config, old = read_manifest(corpus), read_deepspeed_copy(parent), tmp_path / "old"
    shutil.copytree(parent, old)
    skipping = merge_dicts(to_dict(read_run(old)), {"data": {"skip_samples": [[0, 8]]}})
    (old / "config.yaml").write_text(to_yaml(config_from_dict(skipping)))
    for words, left in (
        (["run.seed=8"], ()),
        (["run.seed=8", "data.skip_samples=[[8,16]]"], ((8, 16),)),
        ([], ((0, 8),)),
    ):
        config = wanted(old, tmp_path / "run", *words)
        begin = find_parent(config, ds_config, manifest)
        config = branched(config, begin)
        assert config.data.skip_samples == left
        said = make_branch(begin, config, ds_config, identity_of(config, manifest), [])
        assert any("data.skip_samples of" in line for line in said) == (not left)
        assert ("data.skip_samples=[]" in read_overrides(tmp_path / "run")) == (not left)
    bare = replace(begin, has_table=False)
    with pytest.raises(UserError, match="importance_warmup is 0, and that run has no importance table"):
        branched(wanted(old, tmp_path / "run", "objective.importance_warmup=0"), bare)
    monkeypatch.chdir(tmp_path)
    assert find_parent(wanted(Path("old"), tmp_path / "run"), ds_config, manifest).name == f"{old}@6"
    scheduled = ds_config | {"scheduler": {"type": "WarmupLR"}}
    (old / "deepspeed.json").write_text(json.dumps(scheduled))
    with pytest.raises(UserError, match="'scheduler', which a branch does not take over: pass a JSON with one"):
        find_parent(wanted(old, tmp_path / "run"), ds_config, manifest)
    find_parent(wanted(old, tmp_path / "run"), scheduled, manifest)


# ---- longer horizons


def test_a_longer_horizon_with_the_overrides_of_the_start(recipe: Path, tmp_path: Path) -> None:
    """A constant rate: what came before is as it would have been."""
    words = ("schedule.name=wsd", "objective.kl_weight=0.2", "train.valid_rows=2")
    train(recipe, tmp_path / "run", *words, "train.steps=3")
    done = train(recipe, tmp_path / "run", "--resume", "train.steps=5")
    assert "train.steps 3 -> 5: the schedules are computed anew; learning rate of step 4: 1.00e-03" in done.stdout
    assert "up to step 3 it is as if it had 5 steps from the start" in done.stdout
    train(recipe, tmp_path / "whole", *words, "train.steps=5", "train.valid_every=3")
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert read_run(tmp_path / "run").train.steps == 5 and not read_earlier(tmp_path / "run")
    done = train(recipe, tmp_path / "run", "--resume", "train.steps=6", "train.stop_at=5")
    assert "train.steps 5 -> 6" in done.stdout and read_run(tmp_path / "run").train.steps == 6
    assert "nothing to train: train.stop_at is 5: pass train.stop_at=null to go on to 6" in done.stdout


def test_a_horizon_that_was_followed_is_remembered(parent: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(parent, run_dir)
    assert extend(run_dir, 10, 10, False) == []
    said = extend(run_dir, 20, 10, False)
    assert "learning rate of step 11: 5.26e-04 (was 0.00e+00)" in said[0] and "as no run of 20 does" in said[1]
    assert [(last, config.train.steps) for last, config in read_earlier(run_dir)] == [(10, 10)]
    assert read_run(run_dir).train.steps == 20 and read_overrides(run_dir)[-1] == "train.steps=20"


@pytest.mark.parametrize(
    ("change", "step", "alike"),
    [
        ({"schedule": {"name": "wsd", "decay_steps": 20}}, 80, True),
        ({"schedule": {"name": "wsd", "decay_steps": 20}}, 82, False),
        ({"schedule": {"name": "linear", "warmup_steps": 50}}, 50, True),
        ({"schedule": {"name": "cosine"}}, 3, False),
        ({"schedule": {"name": "wsd", "full_finish": 30}}, 70, True),
        ({"schedule": {"name": "wsd", "full_finish": 30}}, 71, False),
        ({"schedule": {"name": "wsd"}, "arm": "random_ltd"}, 90, False),
    ],
)
def test_horizons_are_compared_step_by_step(change: dict[str, object], step: int, alike: bool) -> None:
    old, new = (config_from_dict(merge_dicts(change, {"train": {"steps": steps}})) for steps in (100, 150))
    assert follows_alike(old, new, step, 64, has_scheduler=False) is alike


def test_what_a_resume_may_change(parent: Path, tmp_path: Path) -> None:
    ds_config, config = read_deepspeed_copy(parent), to_dict(read_run(parent))

    def check(**sections: dict[str, object]) -> None:
        check_same_run(config_from_dict(merge_dicts(config, sections)), ds_config, parent)

    check(train={"steps": 20, "compile": True, "cuda_graphs": True}, model={"layer_norm": "apex"})
    with pytest.raises(UserError, match=r"\(train.steps is 9 and not 10\).* train.stop_at=9$"):
        check(train={"steps": 9})
    with pytest.raises(UserError, match=f"--branch-from {parent} .*run.dir=NEW$") as caught:
        check(optimizer={"lr": 0.1}, data={"mask_stages": [[5, 0.2]]})
    said = str(caught.value)
    assert "optimizer.lr is 0.1 and not 0.001" in said and "'data.mask_stages=[[5,0.2]]' optimizer.lr=0.1" in said
    assert f"sctd pretrain {parent}/config.yaml --resume" in said
    with pytest.raises(UserError, match="start another run.dir$"):
        check(model={"layers": 6})
    stopped = tmp_path / "run"
    (stopped / "checkpoints" / "step-00000001").mkdir(parents=True)
    (stopped / "config.yaml").write_text(to_yaml(config_from_dict(merge_dicts(config, {"train": {"stop_at": 4}}))))
    shutil.copy(parent / "deepspeed.json", stopped)
    with pytest.raises(UserError, match="config.yaml --resume train.stop_at=null;"):
        check_same_run(config_from_dict(merge_dicts(config, {"optimizer": {"lr": 0.1}})), ds_config, stopped)


# ---- folders without a checkpoint


def test_a_folder_without_a_checkpoint_is_started_anew(recipe: Path, corpus: Path, tmp_path: Path) -> None:
    """As one that was killed before its first save is, with other settings; what others put there stays."""
    begun = config_from_dict({"arm": "baseline", "data": {"corpus": str(corpus)}})
    start_run_dir(tmp_path, begun, {}, ["arm=baseline"])
    (tmp_path / "events.out.tfevents.1").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    said = train(recipe, tmp_path, "train.stop_at=1", "train.valid_rows=2", "--resume").stdout
    assert f"records of an earlier start, up to step 1, are kept in {tmp_path / 'before-1'}" in said
    assert read_run(tmp_path).arm == "sctd" and [record["step"] for record in records(tmp_path)] == [1]
    assert not (tmp_path / "events.out.tfevents.1").exists() and (tmp_path / "notes.txt").read_text() == "mine"
    assert newest_whole(tmp_path) is not None and read_overrides(tmp_path) == ["train.valid_rows=2"]
    kept = {path.name for path in (tmp_path / "before-1").iterdir()}
    assert kept == {"config.yaml", "metrics.jsonl", "events.out.tfevents.1", "overrides.json"}
    assert [run.name for run in gather([tmp_path]).runs] == [tmp_path.name]


def test_records_that_tell_of_no_step_are_not_kept(corpus: Path, tmp_path: Path) -> None:
    """Those of a validation before the first step, and those that a branch has of its parent."""
    for begin, step in (("", 0), ("parent@6", 6)):
        config = {"run": {"branch_from": begin}, "data": {"corpus": str(corpus)}}
        start_run_dir(tmp_path, config_from_dict(config), {}, [])
        (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": step}) + "\n")
        assert start_run_dir(tmp_path, config_from_dict(config), {}, []) == []
        assert not (tmp_path / "metrics.jsonl").exists() and not (tmp_path / "before-1").exists()
    for n in (1, 2):
        (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 7}) + "\n")
        assert f"before-{n}" in start_run_dir(tmp_path, config_from_dict(config), {}, [])[0]


def test_an_export_alone_is_a_run_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(Config()))
    check_run_dir(tmp_path, resume=False)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "README.md").write_text("<!-- made by sctd export -->")
    with pytest.raises(UserError, match="holds a run"):
        check_run_dir(tmp_path, resume=False)
    with pytest.raises(UserError, match="holds an export, and no checkpoint"):
        check_run_dir(tmp_path, resume=True)
