"""What tests of whole runs share: a small real corpus and a small recipe."""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import support
from sctd.corpus.prepare.prepare import prepare
from sctd.corpus.prepare.settings import CorpusSettings
from sctd.corpus.sources.source import read_documents

# Without a GPU, Triton kernels run under Triton's interpreter, which must be chosen before anything imports triton.
assert "triton" not in sys.modules
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Tests send signals, which a job in the background, or under nohup, ignores and lets its children ignore.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

# Dropout on, F = 4, two micro-batches a step: small, but nothing of the method is switched off.
RECIPE = """
arm: sctd
model: {{layers: 4, hidden_size: 32, heads: 2, intermediate_size: 64, max_positions: 64}}
objective: {{interval: 4}}
optimizer: {{lr: 1.0e-3}}
schedule: {{warmup_steps: 2}}
data: {{corpus: {corpus}}}
train: {{steps: 10, batch_size: 8, micro_batch_size: 2, precision: fp32, log_every: 1, valid_rows: 8}}
"""


LONGEST = ["demo", "slurm", "train", "evaluate"]  # folders


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make check` leaves out: tests that start processes or train, and kernels that are compiled.

    The longest files come first, so that at the end no worker waits for another.
    """
    items.sort(key=lambda item: LONGEST.index(item.path.parent.name) if item.path.parent.name in LONGEST else 9)
    starters = [support.sctd, support.train, support.Child, support.launched, support.start_ranks, subprocess]
    for item in items:
        module = vars(getattr(item, "module", None) or support)
        starts = any(value is starter for value in module.values() for starter in starters)
        if starts or "shell" in module or {"recipe", "slurm"} & {*getattr(item, "fixturenames", ())}:
            item.add_marker("run")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tests are many small operations, on a machine that others use too."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 64 tokens from the first documents of the embedded corpus, with a vocabulary of 512."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = itertools.islice(read_documents("embedded"), 60)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    out = folder / "packed"
    wanted = CorpusSettings((str(folder / "text.jsonl"),), seq_lens=(64,), vocab_size=512, valid_fraction=0.1)
    prepare(wanted, out, log=lambda _: None)
    return out


@pytest.fixture(scope="session")
def recipe(corpus: Path) -> Path:
    path = corpus.parent / "tiny.yaml"
    path.write_text(RECIPE.format(corpus=corpus), encoding="utf-8")
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for two checkpoints of the tiny model, and little more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2200k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
