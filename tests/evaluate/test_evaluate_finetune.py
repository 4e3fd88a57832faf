"""`sctd finetune`: which cells there are, that finished ones are never run again, and what is written and printed."""

import csv
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from sctd.cli import main
from sctd.evaluate.results import read_cells
from tiny_bert import tiny_bert, tiny_tokenizer, write_conll, write_lines, write_rte, write_squad, write_stsb

pytestmark = pytest.mark.run
QUICK = ("--steps", 10, "--lr", 1e-3, "--batch-size", 16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for write in (write_rte, write_stsb, write_conll):
        write(folder, 64, 24)
    return write_squad(folder, 64, 24)


class Caller:
    """Calls the command line with a checkpoint, data and a folder for results."""

    def __init__(self, checkpoint: Path, data: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.checkpoint, self.data, self.out, self._capsys = checkpoint, data, out, capsys

    def __call__(self, *words: Any, code: int = 0, data: Path | None = None, checkpoint: Path | None = None) -> str:
        """What is printed, errors included."""
        arguments = ["finetune", checkpoint or self.checkpoint, "--data-dir", data or self.data, "--out", self.out]
        got = main([str(word) for word in (*arguments, *words)])
        said = self._capsys.readouterr()
        assert got == code, said.out + said.err
        return said.out + said.err

    def results(self) -> dict[str, Any]:
        """Of each finished cell, by TASK/CELL."""
        found = sorted(self.out.glob("finetune/*/*/result.json"))
        return {f"{path.parts[-3]}/{path.parts[-2]}": json.loads(path.read_text()) for path in found}


@pytest.fixture
def call(checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Caller:
    return Caller(checkpoint, data, tmp_path / "out", capsys)


# ---- results


def test_a_result_has_all_that_others_read(call: Caller, data: Path) -> None:
    said = call("--task", "rte", "--seeds", 2, *QUICK)
    found = call.results()
    assert list(found) == [f"rte/lr0.001-b16-seed{seed}-10steps" for seed in (1, 2)]
    result = found["rte/lr0.001-b16-seed2-10steps"]
    facts = {
        "task": "rte", "title": "RTE", "suite": "glue", "kind": "classification", "metrics": ["accuracy"], "lr": 1e-3,
        "batch_size": 16, "seed": 2, "shots": None, "steps": 10, "epochs": 2.5, "max_length": 64,
        "rows": {"train": 64, "dev": 24}, "origin": str(data / "RTE" / "train.tsv"),
    }  # fmt: skip
    assert {key: result[key] for key in facts} == facts
    assert set(result) == facts.keys() | {
        "data", "encoder", "scores", "curve", "seconds", "examples_per_s", "tokens_per_s", "precision", "device",
        "versions", "date",
    }  # fmt: skip
    assert result["encoder"] == json.loads((call.out / "encoder.json").read_text())["identity"]
    assert [point["step"] for point in result["curve"]] == [4, 8, 10]
    assert result["scores"]["last"] == result["curve"][-1] and result["scores"]["best"] in result["curve"]
    assert all(result[key] > 0 for key in ("seconds", "examples_per_s", "tokens_per_s"))
    assert len(read_cells(call.out)) == 2
    for seed in (1, 2):
        assert sum(line.startswith(f"rte lr0.001-b16-seed{seed}-10steps  epoch") for line in said.splitlines()) == 3
    assert "the model takes 64 tokens, not the task's 256" in said and "(2 of 2)" in said


def test_predictions_give_the_scores(call: Caller) -> None:
    call("--task", "rte", "--seeds", 1, *QUICK)
    ((cell, result),) = call.results().items()
    for name in ("best", "last"):
        path = call.out / "finetune" / cell / f"predictions-{name}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["row"] for line in lines] == list(range(24)) and {line["split"] for line in lines} == {"dev"}
        assert {line["label"] for line in lines} == {"entailment", "not_entailment"}
        right = statistics.fmean(line["prediction"] == line["label"] for line in lines)
        assert right == pytest.approx(result["scores"][name]["accuracy"])


def test_predictions_of_other_kinds_are_words(call: Caller) -> None:
    call("--task", "squad1,conll03,stsb", "--seeds", 1, *QUICK)
    lines = {}
    for path in call.out.glob("finetune/*/*/predictions-last.jsonl"):
        lines[path.parts[-3]] = json.loads(path.read_text().splitlines()[0])
    assert lines["squad1"]["key"] == "dev-0" and isinstance(lines["squad1"]["prediction"], str)
    assert lines["squad1"]["label"][0].startswith("gold")
    tags = lines["conll03"]
    assert set(tags["label"]) & {"B-PER", "B-LOC"} and len(tags["prediction"]) == len(tags["label"])
    assert isinstance(lines["stsb"]["prediction"], float) and isinstance(lines["stsb"]["label"], float)


def test_the_table_has_mean_and_deviation_of_all_seeds(call: Caller) -> None:
    said = call("--task", "stsb", "--seeds", 3, *QUICK)
    values = [result["scores"]["best"]["pearson"] for result in call.results().values()]
    cell = f"{statistics.fmean(values):.4f} +- {statistics.stdev(values):.4f}"
    (line,) = (line for line in said.splitlines() if line.startswith("stsb  pearson"))
    assert cell in line and line.endswith("3      LR 0.001, batch 16, 10 steps, 64 tokens")
    assert any(line.startswith("stsb  spearman") for line in said.splitlines())
    assert f"| stsb | pearson | {cell} |" in (call.out / "finetune" / "scores.md").read_text()
    with (call.out / "finetune" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["metric"], row["epoch"]) for row in rows] == [
        ("pearson", "best"), ("pearson", "last"), ("spearman", "best"), ("spearman", "last")
    ]  # fmt: skip
    assert float(rows[0]["mean"]) == pytest.approx(statistics.fmean(values), abs=1e-5) and rows[0]["seeds"] == "3"
    assert rows[0]["values"].split()[2] == f"3:{values[2]:.6g}"


def test_the_mismatched_set_counts_where_it_is_there(call: Caller, tmp_path: Path) -> None:
    folder, texts = tmp_path / "data" / "MNLI", ["the red list", "a blue object", "the value is not green"]
    names = ("entailment", "neutral", "contradiction")
    for name, count in (("train", 48), ("dev_matched", 24), ("dev_mismatched", 12)):
        records = [
            {"sentence1": texts[row % 3], "sentence2": "the list", "gold_label": names[row % 3]} for row in range(count)
        ]
        write_lines(folder / f"multinli_1.0_{name}.jsonl", records)
    call("--task", "mnli", "--seeds", 1, *QUICK, data=tmp_path / "data")
    ((cell, result),) = call.results().items()
    assert result["metrics"] == ["accuracy", "accuracy_mm"]
    assert result["rows"] == {"train": 48, "dev": 24, "dev_mm": 12}
    lines = (call.out / "finetune" / cell / "predictions-best.jsonl").read_text().splitlines()
    splits = [json.loads(line)["split"] for line in lines]
    assert splits == ["dev"] * 24 + ["dev_mm"] * 12
    (folder / "multinli_1.0_dev_mismatched.jsonl").unlink()
    shutil.rmtree(call.out)
    call("--task", "mnli", "--seeds", 1, *QUICK, data=tmp_path / "data")
    assert next(iter(call.results().values()))["metrics"] == ["accuracy"]


# ---- going on


def times(call: Caller) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in call.out.glob("finetune/*/*/result.json")}


def test_what_is_finished_is_not_run_again(call: Caller) -> None:
    call("--task", "rte", "--seeds", 3, *QUICK)
    before, results = times(call), call.results()
    shutil.rmtree(call.out / "finetune" / "rte" / "lr0.001-b16-seed2-10steps")
    (call.out / "finetune" / "rte" / "lr0.001-b16-seed3-10steps" / "result.json").unlink()  # killed while it wrote
    said = call("--task", "rte", "--seeds", 3, *QUICK)
    assert "1 of 3 fine-tunings are finished already" in said and "seed1-10steps  epoch" not in said
    after = times(call)
    assert sum(after[path] == before[path] for path in after) == 1
    for cell, result in call.results().items():
        same = ("curve", "scores", "data", "encoder")
        assert {key: result[key] for key in same} == {key: results[cell][key] for key in same}
    said = call("--task", "rte", "--seeds", 3, *QUICK)
    assert times(call) == after and "3 of 3" in said and "epoch 1 " not in said and "3      LR 0.001" in said


def test_more_seeds_tasks_and_settings_join_what_is_there(call: Caller) -> None:
    call("--task", "rte", "--seeds", 1, *QUICK)
    before = times(call)
    call("--task", "rte,stsb", "--seeds", 2, *QUICK)
    said = call("--task", "rte", "--seeds", 1, "--lr", 1e-3, "--batch-size", 16, "--epochs", 1)
    assert before.items() <= times(call).items()
    assert set(call.results()) == {
        "rte/lr0.001-b16-seed1-10steps", "rte/lr0.001-b16-seed2-10steps", "rte/lr0.001-b16-seed1-4steps",
        "stsb/lr0.001-b16-seed1-10steps", "stsb/lr0.001-b16-seed2-10steps",
    }  # fmt: skip
    assert "4 steps" in said and "10 steps" not in said
    assert (call.out / "finetune" / "scores.md").read_text().count("\n| rte ") == 2


def test_results_of_another_checkpoint_are_not_mixed_in(call: Caller, tmp_path: Path) -> None:
    call("--task", "rte", "--seeds", 1, *QUICK)
    other = tiny_bert(tmp_path / "other", seed=1)
    assert "holds results of another checkpoint" in one_line(call("--task", "rte", *QUICK, code=2, checkpoint=other))
    path = next(iter(times(call)))
    path.write_text(path.read_text().replace(json.loads(path.read_text())["encoder"], "0" * 16))
    assert "another checkpoint" in one_line(call("--task", "rte", "--seeds", 1, *QUICK, code=2))


def test_results_of_other_rows_are_not_mixed_in(call: Caller, data: Path, tmp_path: Path) -> None:
    call("--task", "rte", "--seeds", 1, *QUICK)
    before = times(call)
    for split in ("train", "dev"):
        copy = shutil.copytree(data, tmp_path / split)
        path = copy / "RTE" / f"{split}.tsv"
        path.write_text(path.read_text().replace("red", "green", 1))
        said = one_line(call("--task", "rte", "--seeds", 2, *QUICK, code=2, data=copy))
        assert "another hash of the rows" in said and "--out" in said
    assert times(call) == before


def test_a_result_that_was_trained_for_longer_or_is_torn_is_named(call: Caller) -> None:
    call("--task", "rte", "--seeds", 1, *QUICK)
    path = next(iter(times(call)))
    path.write_text(path.read_text().replace('"steps": 10', '"steps": 11'))
    assert "another number of steps" in one_line(call("--task", "rte", "--seeds", 1, *QUICK, code=2))
    path.write_text(path.read_text()[:100])
    assert str(path) in one_line(call("--task", "rte", "--seeds", 1, *QUICK, code=2))


def test_a_cell_that_fails_leaves_the_others(call: Caller) -> None:
    """Both seeds of a task fail, those of the other are kept; the table has what there is."""
    call("--task", "stsb", "--seeds", 2, *QUICK)
    said = call("--task", "rte", "--seeds", 2, "--lr", 1e30, "--steps", 150, code=2)
    assert said.count("FAILED: the loss is not finite") + said.count("FAILED: the model's outputs are not") == 2
    assert "2 of 2 fine-tunings failed" in said and "Traceback" not in said
    assert len(call.results()) == 2 and not list(call.out.glob("finetune/rte/*/*"))
    assert "stsb" in (call.out / "finetune" / "scores.md").read_text()


# ---- which cells


def test_one_cell_at_a_time_comes_to_the_same(call: Caller, tmp_path: Path) -> None:
    words = ("--task", "rte,stsb", "--seeds", 2, *QUICK)
    assert call(*words, "--count") == "4\n" and not call.results()
    for number in (3, 0, 2):
        assert "written" not in call(*words, "--cell", number)
    assert list(call.results()) == [
        "rte/lr0.001-b16-seed1-10steps", "stsb/lr0.001-b16-seed1-10steps", "stsb/lr0.001-b16-seed2-10steps"
    ]  # fmt: skip
    before = times(call)
    assert "1 of 1 fine-tunings are finished already" in call(*words, "--cell", 2)
    said = call(*words)
    assert before.items() <= times(call).items() and len(times(call)) == 4 and said.count("(1 of 1)") == 1
    alone = call.results()
    call.out = tmp_path / "together"
    call(*words)
    for cell, result in call.results().items():
        assert result["curve"] == alone[cell]["curve"]


def test_a_task_without_its_own_values_takes_the_grid(call: Caller) -> None:
    assert call("--task", "conll03", "--seeds", 2, "--count") == "24\n"
    assert call("--task", "conll03", "--seeds", 2, "--lr", 1e-4, "--count") == "6\n"
    assert call("--task", "rte", "--seeds", 2, "--count") == "2\n"
    assert call("--task", "rte", "--seeds", 2, "--grid", "--count") == "24\n"
    assert call("--task", "rte", "--seeds", 2, "--grid", "--batch-size", 4, "--count") == "8\n"
    assert call("--task", "glue", "--count") == "30\n"


def test_of_a_grid_the_best_setting_stands_first(call: Caller) -> None:
    said = call("--task", "stsb", "--seeds", 1, "--grid", "--batch-size", 16, "--steps", 4)
    lines = [line for line in said.splitlines() if line.startswith("stsb  pearson")]
    means = [float(line.split()[2]) for line in lines]
    assert len(lines) == 4 and means == sorted(means, reverse=True)
    assert {line.split("LR ")[1].split(",")[0] for line in lines} == {"1e-05", "2e-05", "3e-05", "5e-05"}
    with (call.out / "finetune" / "scores.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4 * 2 * 2


def test_shorter_rows_are_a_setting_of_their_own(call: Caller) -> None:
    quick = ("--task", "rte", "--seeds", 1, *QUICK)
    call(*quick, "--max-length", 256)  # the task's own
    said = call(*quick, "--max-length", 16)
    found = {name: result["max_length"] for name, result in call.results().items()}
    assert found == {"rte/lr0.001-b16-seed1-10steps": 64, "rte/lr0.001-b16-seed1-10steps-16tokens": 16}
    assert "longer than 16 tokens" in said and "10 steps, 16 tokens" in said
    with (call.out / "finetune" / "scores.csv").open() as file:
        assert [line["max_length"] for line in csv.DictReader(file)].count("16") == 2


def test_few_shots_have_a_name_and_the_same_steps_for_all_seeds(call: Caller, data: Path, tmp_path: Path) -> None:
    """Though some draws of 4 sentences a type are larger than others."""
    task, files = tmp_path / "entities.yaml", data / "conll03"
    task.write_text(f"kind: tags\nfiles: {{train: {files / 'train.txt'}, dev: {files / 'valid.txt'}}}\n")
    words = ("--task", task, "--shots", 4, "--seeds", 5, "--lr", 1e-3, "--batch-size", 1)
    said = call(*words, "--epochs", 2)
    found = call.results()
    rows = [result["rows"]["train"] for result in found.values()]
    steps = 2 * found[min(found)]["rows"]["train"]
    assert len(found) == 5 and all(name.endswith(f"-{steps}steps-4shot") for name in found)
    assert {result["steps"] for result in found.values()} == {steps} and len(set(rows)) > 1 and min(rows) >= 4
    assert "4 of each class to train on" in said and "5      LR 0.001, batch 1" in said


def test_own_length_is_the_tasks(call: Caller, tmp_path: Path, data: Path) -> None:
    """A user's task: its epochs, and its name."""
    task = tmp_path / "colours.yaml"
    table = data / "RTE"
    task.write_text(
        f"kind: classification\ntext: sentence2\nlabel: label\nepochs: 1.5\nbatch_size: 16\nlr: 1e-3\n"
        f"files: {{train: {table / 'train.tsv'}, dev: {table / 'dev.tsv'}}}\n"
    )
    call("--task", task, "--seeds", 1)
    assert list(call.results()) == ["colours/lr0.001-b16-seed1"]
    result = call.results()["colours/lr0.001-b16-seed1"]
    assert result["steps"] == 6 and result["suite"] == "own" and result["metrics"] == ["accuracy", "macro_f1"]
    call("--task", task, "--seeds", 1, "--epochs", 1.5)
    assert len(call.results()) == 1
    task.write_text(task.read_text().replace("1.5", "2"))
    assert "another number of steps" in one_line(call("--task", task, "--seeds", 1, code=2))


# ---- what is evaluated


def test_a_runs_results_go_to_its_folder(modern: Path, data: Path, tmp_path: Path) -> None:
    words = ["--task", "rte", "--data-dir", str(data), "--seeds", "1", *map(str, QUICK)]
    assert main(["finetune", str(modern), *words]) == 0
    path = modern / "evaluation/step-00000012/finetune/rte/lr0.001-b16-seed1-10steps/result.json"
    assert json.loads(path.read_text())["max_length"] == 64, "no table of positions: what the run was made for"
    assert main(["export", str(modern), "--out", str(tmp_path / "export")]) == 0
    assert "RTE: accuracy" in (tmp_path / "export" / "README.md").read_text()


OTHERS = {
    "roberta": (RobertaConfig, RobertaForMaskedLM, {"pad_token_id": 0, "type_vocab_size": 1}),
    "distilbert": (DistilBertConfig, DistilBertForMaskedLM, {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}),
    "electra": (ElectraConfig, ElectraForMaskedLM, {"embedding_size": 16}),
    "modernbert": (ModernBertConfig, ModernBertForMaskedLM, {"pad_token_id": 0}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_encoders_go_through(name: str, call: Caller, tmp_path: Path) -> None:
    """With rows longer than their positions, of which RoBERTa has fewer than its configuration says."""
    config, head, own = OTHERS[name]
    tokenizer = tiny_tokenizer(tmp_path / name)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(1)
    whole = config(
        vocab_size=len(tokenizer), max_position_embeddings=20, **(own if name == "distilbert" else sizes | own)
    )
    head(whole).save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / name)
    call("--task", "rte,squad1,conll03", "--seeds", 1, *QUICK, checkpoint=tmp_path / name)
    results = call.results()
    assert len(results) == 3 and {result["max_length"] for result in results.values()} == {
        19 if name == "roberta" else 20
    }


# ---- bad input


def one_line(said: str) -> str:
    assert said.startswith("sctd: error: ") and said.count("\n") == 1, said
    return said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--task", "rte", "--cell", 5), "--cell 5: there are 5, from 0 to 4"),
        (("--task", "rte", "--cell", -1), "--cell -1"),
        (("--task", "rte", "--seeds", 0), "--seeds 0: must be at least 1"),
        (("--task", "rte", "--shots", 0), "--shots 0"),
        (("--task", "rte", "--batch-size", -3), "--batch-size -3"),
        (("--task", "rte", "--steps", 0), "--steps 0"),
        (("--task", "rte", "--max-length", 15), "--max-length 15: must be at least 16"),
        (("--task", "rte", "--epochs", "nan"), "--epochs nan"),
        (("--task", "rte", "--lr", "inf"), "--lr inf"),
        (("--task", "rte", "--steps", 5, "--epochs", 1), "--steps and --epochs"),
        (("--task", "rtf"), "did you mean 'rte'"),
        (("--task", "rte", "--shots", 33), "32 rows of"),
        (("--task", "rte,cb", "--steps", 2), "cb: no train rows"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_run(call: Caller, words: tuple[Any, ...], expected: str) -> None:
    assert expected in one_line(call(*words, code=2))
    assert not call.results()


def test_a_checkpoint_of_another_kind_is_refused(call: Caller, tmp_path: Path) -> None:
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "gpt" / "model.safetensors").write_bytes(b"")
    assert "not an encoder like BERT" in one_line(call("--task", "rte", code=2, checkpoint=tmp_path / "gpt"))
    large = tiny_bert(tmp_path / "large")
    vocabulary = json.loads((large / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"]["beyond"] = len(vocabulary["model"]["vocab"])
    (large / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert "tokenizer" in one_line(call("--task", "rte", code=2, checkpoint=large))
    torn = tiny_bert(tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:500])
    call.out = tmp_path / "torn-out"
    said = call("--task", "rte", "--seeds", 1, *QUICK, code=2, checkpoint=torn)
    assert "its weights cannot be loaded" in said and "Traceback" not in said
