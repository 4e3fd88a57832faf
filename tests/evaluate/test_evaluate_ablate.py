"""Ablations: their rows, recipes and refusals, a real one that is interrupted and continued, and their tables."""

import csv
import io
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from sctd.cli import main
from sctd.config import load_config
from sctd.corpus.manifest import read_manifest
from sctd.errors import RunError, UserError
from sctd.evaluate.ablate.ablate import Machine, _failure, ablate
from sctd.evaluate.ablate.ablations import ABLATIONS, Line, Variant, read_ablation, table_of, write_tables
from sctd.evaluate.finetune.finetune import Options
from sctd.evaluate.results import Score
from sctd.present.table import as_text
from sctd.train.keep.attempts import read_attempts
from support import environment, records, until

SMALL = ("model.layers=2", "train.batch_size=2", "train.micro_batch_size=1", "train.valid_rows=2", "train.steps=40")
HERE, NOTHING = Machine(1, None, 0, "24:00:00"), Options((), None, 5)


@pytest.fixture(autouse=True)
def children_run_this_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)


def test_rows_are_those_of_the_paper(recipe: Path) -> None:
    configs = {
        kind: [load_config(str(recipe), row.overrides) for row in ablation.rows] for kind, ablation in ABLATIONS.items()
    }
    terms = [(c.objective.mlm_full, c.objective.kl_local, c.objective.kl_global) for c in configs["objectives"][2:]]
    assert [config.arm for config in configs["objectives"]] == ["baseline", "token_drop", *["sctd"] * 7]
    assert terms == [  # the ticks of Table 4, from top to bottom
        (True, False, False), (False, True, False), (False, False, True),
        (True, True, False), (True, False, True), (False, True, True), (True, True, True),
    ]  # fmt: skip
    assert all(config.objective.mlm_drop for config in configs["objectives"])
    assert [(c.arm, c.objective.kl_weight) for c in configs["lambda"]] == [
        ("sctd", weight) for weight in (0, 0.01, 0.05, 0.25, 0.5)
    ]
    assert [config.arm for config in configs["interval"]] == ["baseline", "token_drop", *["sctd"] * 4]
    assert [config.objective.interval for config in configs["interval"][2:]] == [5, 10, 20, 50]
    assert [config.arm for config in configs["selection"]] == ["baseline", "token_drop", "random_drop", "random_ltd"]


@pytest.mark.parametrize("kind", ["objectives", "lambda", "interval"])
def test_a_dry_run_writes_what_would_run(
    kind: str, recipe: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(corpus.parent)  # so that recipe and corpus are relative paths
    out = tmp_path / "out"
    overrides = ["data.corpus=packed", "optimizer.lr=3e-4", "run.seed=7"]
    assert ablate(kind, recipe.name, overrides, out, Machine(2, None, 8, "1"), Options(("rte",), None, 3), True) == 0
    said = capsys.readouterr().out
    found = json.loads((out / "ablation.json").read_text(encoding="utf-8"))
    assert found == read_ablation(out) and found["kind"] == kind and found["recipe"] == recipe.name
    assert [row["label"] for row in found["rows"]] == [row.label for row in ABLATIONS[kind].rows]
    monkeypatch.chdir(tmp_path)
    for row in found["rows"]:
        path = out / f"{row['run']}.yaml"
        ends = [f"data.corpus={corpus}", f"run.dir={out / row['run']}"]
        assert load_config(str(path)) == load_config(str(recipe), [*overrides, *row["overrides"], *ends])
        assert path.read_text(encoding="utf-8") in said
        assert f"deepspeed --num_accelerators 2 --module sctd pretrain {path}\n" in said
        assert f"sctd finetune {out / row['run']} --task rte --seeds 3\n" in said
    assert not [path for path in out.iterdir() if path.is_dir()]
    # Nothing has begun: it may still become another one.
    assert ablate(kind, str(recipe), ["run.seed=8"], out, HERE, NOTHING, True) == 0
    assert load_config(str(out / f"{found['rows'][0]['run']}.yaml")).run.seed == 8


def test_a_dry_run_of_jobs_writes_their_scripts(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    jobs = ["--nodes", "2", "--gpus-per-node", "0", "--time", "1:00:00", "--dry-run"]
    assert main(["ablate", "selection", str(recipe), "train.steps=5", "--out", str(out), *jobs]) == 0
    assert capsys.readouterr().out.count("submit it with: sbatch") == 4
    script = (out / "random-ltd" / "job.sh").read_text(encoding="utf-8")
    for line in (
        f"RECIPE={out}/random-ltd.yaml",
        f"RUN={out}/random-ltd",
        "#SBATCH --nodes=2",
        "#SBATCH --time=1:00:00",
    ):
        assert f"{line}\n" in script


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("intervals", {}, "did you mean 'interval'"),
        ("interval", {"recipe": "bert-mini-sctdd"}, "did you mean 'bert-mini-sctd'"),
        ("interval", {"overrides": ["train.stepz=3"]}, "did you mean 'steps'"),
        ("interval", {"overrides": ["objective.interval=5"]}, "ablation 'interval' sets objective.interval itself"),
        ("lambda", {"overrides": ["arm=sctd"]}, "ablation 'lambda' sets arm itself"),
        ("objectives", {"overrides": ["objective.kl_local=false"]}, "sets objective.kl_local itself"),
        ("lambda", {"overrides": ["run.dir=runs/x"]}, "pass --out instead"),
        ("lambda", {"overrides": ["train={steps: 3}"]}, "write its keys one by one"),
        ("lambda", {"overrides": ["data.corpus="]}, "data.corpus is not set"),
        ("lambda", {"overrides": ["data.corpus=/nowhere"]}, "/nowhere"),
        ("lambda", {"overrides": ["model.max_positions=8"]}, "model.max_positions is 8"),
        ("lambda", {"machine": Machine(0, None, 8, "1")}, "--ranks is 0"),
        ("lambda", {"machine": Machine(3, None, 8, "1")}, "batch sizes do not multiply out"),
        ("lambda", {"machine": Machine(1, 0, 8, "1")}, "--nodes is 0"),
        ("lambda", {"machine": Machine(2, 1, 8, "1")}, "give one of them"),
        ("lambda", {"machine": Machine(1, 1, -1, "1")}, "--gpus-per-node is -1"),
        ("lambda", {"scoring": Options((), None, 0)}, "--seeds is 0"),
        ("lambda", {"scoring": Options(("rta",), None, 1)}, "did you mean 'rte'"),
        ("lambda", {"scoring": Options(("rte",), Path("/nowhere"), 1)}, "/nowhere"),
    ],
)
def test_what_is_refused_is_refused_before_anything_is_written(
    kind: str, changes: dict[str, Any], words: str, recipe: Path, tmp_path: Path
) -> None:
    wanted = {"recipe": str(recipe), "overrides": [], "machine": HERE, "scoring": NOTHING} | changes
    with pytest.raises(UserError) as refused:
        ablate(kind, out=tmp_path / "out", dry_run=True, **wanted)
    assert words in str(refused.value) and not (tmp_path / "out").exists()


def test_folders_that_hold_something_else_are_refused(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["ablate", "lambda", str(recipe), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "holds something other than an ablation" in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match="holds something other than an ablation"):
        ablate("lambda", str(recipe), [], tmp_path / "notes.txt", HERE, NOTHING, True)
    out = tmp_path / "out"
    ablate("lambda", str(recipe), [], out, HERE, NOTHING, True)
    with pytest.raises(UserError, match="holds ablation 'lambda'"):
        ablate("interval", str(recipe), [], out, HERE, NOTHING, True)
    for text in ("{", "[]", '{"rows": [{"label": 1}]}', '{"rows": [], "kind": "lambda", "config": 3}'):
        (out / "ablation.json").write_text(text)
        with pytest.raises(UserError, match="cannot be read"):
            ablate("lambda", str(recipe), [], out, HERE, NOTHING, True)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of the user's: two classes, told by a word."""
    folder = tmp_path_factory.mktemp("task")
    for split, rows in (("train", 16), ("dev", 8)):
        lines = [f"the {'list' if row % 2 else 'module'} is number {row}\t{row % 2}" for row in range(rows)]
        (folder / f"{split}.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n", encoding="utf-8")
    text = "kind: classification\ntext: text\nlabel: label\nfiles: {train: train.tsv, dev: dev.tsv}\nsteps: 4\n"
    (folder / "word.yaml").write_text(text, encoding="utf-8")
    return folder / "word.yaml"


@pytest.fixture(scope="module")
def ablation(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Begun on two ranks and interrupted in its first run, then continued to its end on one."""
    out = tmp_path_factory.mktemp("ablation") / "out"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        with interrupted(out / "baseline"):
            code = ablate("selection", str(recipe), SMALL, out, Machine(2, None, 8, "1"), NOTHING, False)
        assert code == 75 and 0 < len(records(out / "baseline")) < 40
        assert not (out / "token-drop").exists() and (out / "ablation.csv").exists()  # every call makes the table
        assert ablate("selection", str(recipe), SMALL, out, HERE, NOTHING, False) == 0
    return out


@contextmanager
def interrupted(run_dir: Path) -> Iterator[None]:
    """SIGTERM to this process as soon as the run there has trained a step."""

    def wait() -> None:
        with suppress(AssertionError):
            until(lambda: (run_dir / "metrics.jsonl").exists() and records(run_dir), "the first step", 120)
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=wait)
    thread.start()
    yield
    thread.join()


def test_an_interrupted_ablation_saves_and_goes_on(ablation: Path) -> None:
    first, second = read_attempts(ablation / "baseline")
    assert first["ranks"] == 2 and first["ended"]["code"] == 75
    assert second["ranks"] == 1 and second["step"] == first["ended"]["step"] and second["ended"]["step"] == 40
    log = (ablation / "baseline" / "pretrain.log").read_text(encoding="utf-8")
    assert "SIGTERM" in log and "resuming" in log
    for row in ABLATIONS["selection"].rows[1:]:
        (only,) = read_attempts(ablation / row.run)
        assert only["ended"] == only["ended"] | {"code": 0, "step": 40}
        assert load_config(str(ablation / f"{row.run}.yaml")).arm == row.value
    assert len({records(ablation / row.run)[-1]["ledger"] for row in ABLATIONS["selection"].rows}) == 1


def test_called_again_it_trains_nothing_and_adds_scores(
    ablation: Path, recipe: Path, task: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {row.run: len(read_attempts(ablation / row.run)) for row in ABLATIONS["selection"].rows}
    code = ablate("selection", str(recipe), SMALL, ablation, HERE, Options((str(task),), None, 2), False)
    said = capsys.readouterr().out
    assert code == 0 and before == {run: len(read_attempts(ablation / run)) for run in before}
    rows = list(csv.DictReader(io.StringIO((ablation / "ablation.csv").read_text(encoding="utf-8"))))
    assert [row["label"] for row in rows] == ["baseline", "importance", "random", "random-LTD"]
    for row in rows:
        last = records(ablation / row["run"])[-1]
        assert float(row["valid_loss"]) == last["valid_loss"] and float(row["hours"]) == last["seconds"] / 3600
        assert row["word_seeds"] == "2" and 0 <= float(row["word"]) <= 1 and row["mean"] == row["word"]
    assert rows[0]["flops_saved"] == rows[0]["clock_saved"] == "0.0"
    dropped, ltd = float(rows[1]["flops_saved"]), float(rows[3]["flops_saved"])
    assert rows[1]["flops_saved"] == rows[2]["flops_saved"] and 0 < ltd < dropped < 0.5
    assert f"{-dropped:.1%}" in said and "random-LTD" in said.splitlines()[-1]
    assert f"{-dropped:.1%}" in (ablation / "ablation.md").read_text(encoding="utf-8")


def test_another_recipe_for_runs_that_have_begun_is_refused(ablation: Path, recipe: Path) -> None:
    for changed in ("train.steps=41", "train.valid_rows=4"):
        before = changed.replace("41", "40").replace("rows=4", "rows=2").partition("=")[2]
        with pytest.raises(UserError, match=f"{changed.partition('=')[0]} is .*were started with {before}"):
            ablate("selection", str(recipe), [*SMALL, changed], ablation, HERE, NOTHING, False)
    assert load_config(str(ablation / "baseline.yaml")).train.steps == 40


def test_a_run_that_fails_ends_the_ablation(recipe: Path, corpus: Path, tmp_path: Path) -> None:
    """A shard was altered: no glance at the corpus tells, the first run does."""
    damaged = tmp_path / "corpus"
    damaged.mkdir()
    for path in corpus.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    shard = damaged / read_manifest(damaged).split(64, "train").shards[0].file
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    out = tmp_path / "out"
    with pytest.raises(UserError) as failed:
        ablate("lambda", str(recipe), [*SMALL, f"data.corpus={damaged}"], out, HERE, NOTHING, False)
    log = out / "lambda-0" / "pretrain.log"
    for words in ("[1/5] lambda = 0", "exit code 2", shard.name, str(log)):
        assert words in str(failed.value)
    assert "sctd: error" in log.read_text(encoding="utf-8") and not (out / "lambda-0.01").exists()


def test_failures_of_the_machine_are_told_apart_from_bad_input(tmp_path: Path) -> None:
    log = tmp_path / "pretrain.log"
    log.write_bytes(b"sctd: error: of yesterday\n\xff\nTraceback\n")
    assert isinstance(_failure("F = 5", 2, log, 0), UserError)
    for code in (1, 74, -9):
        failure = _failure("F = 5", code, log, 26)
        assert isinstance(failure, RunError) and "yesterday" not in str(failure)
    assert "yesterday" in str(_failure("F = 5", 74, log, 0))


def test_tables_show_what_is_there(tmp_path: Path) -> None:
    """A finished baseline with two tasks, a finished run with one, and one that still trains."""
    rte = Score("rte", "accuracy", {1: 0.6, 2: 0.7}, {}, {}, "glue")
    mrpc = Score("mrpc", "accuracy", {1: 0.8}, {"f1": {1: 0.9}}, {}, "glue")
    lines = [
        Line(Variant("baseline", "baseline", "baseline", ()), 10, 10, 2.0, 4.93, 8e9, 8e9, {"rte": rte, "mrpc": mrpc}),
        Line(Variant("F = 5", 5, "f5", ()), 10, 10, 1.9, 4.69, 6e9, 8e9, {"rte": rte}),
        Line(Variant("F = 50", 50, "f50", ()), 3, 10),
    ]
    head, *rows = as_text(table_of(lines)).splitlines()
    assert head.split("  ")[0] == "run" and head.split()[-3:] == ["mean", "rte", "mrpc"]
    assert rows[0].split()[1:] == ["10", "2.0000", "4.93", "0.0%", "0.0%", "75.00", "65.00", "+-", "7.07", "80.00"]
    assert rows[1].split()[3:] == ["10", "1.9000", "4.69", "-4.9%", "-25.0%", "-", "65.00", "+-", "7.07", "-"]
    assert rows[2].split()[3:] == ["3", "of", "10", "-", "-", "-", "-", "-", "-", "-"]
    write_tables(tmp_path, lines, "T", "r")
    page = (tmp_path / "ablation.md").read_text(encoding="utf-8")
    assert "| F = 5 | 10 | 1.9000 | 4.69 | -4.9% | -25.0% | - | 65.00 +- 7.07 | - |" in page
    table = list(csv.DictReader(io.StringIO((tmp_path / "ablation.csv").read_text())))
    assert float(table[0]["mean"]) == pytest.approx((0.65 + 0.85) / 2) and table[0]["mrpc_deviation"] == ""
    assert float(table[1]["clock_saved"]) == pytest.approx(1 - 4.69 / 4.93) and table[1]["mean"] == ""
    assert (table[2]["step"], table[2]["goal"], table[2]["hours"], table[2]["rte"]) == ("3", "10", "", "")
