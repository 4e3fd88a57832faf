"""Small texts for tests of the corpus, and a task to try a team with."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sctd.corpus.manifest import Manifest
from sctd.corpus.prepare.prepare import prepare
from sctd.corpus.prepare.settings import CorpusSettings
from sctd.corpus.prepare.team import Rank
from sctd.errors import UserError

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "sigma"]


def documents(count: int, seed: int = 0) -> list[str]:
    """Distinct documents of about 30 words."""
    rng = np.random.default_rng(seed)
    return [f"Document {seed} {i}: " + " ".join(rng.choice(WORDS, 30)) for i in range(count)]


def write(path: Path, texts: Sequence[str]) -> str:
    """The path of a .jsonl of them."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def settings(*sources: str, **changes: Any) -> CorpusSettings:
    """Of a small preparation."""
    return CorpusSettings(sources, **{"seq_lens": (16,), "vocab_size": 320, "valid_fraction": 0.1, **changes})


def run(source: str | Sequence[str], out: Path, **changes: Any) -> Manifest:
    """Prepare it."""
    sources = [source] if isinstance(source, str) else source
    return prepare(settings(*sources, **changes), out, log=lambda line: None)


def assert_same_corpus(a: Path, b: Path) -> None:
    """All but the reports, which tell the time."""
    for path in a.iterdir():
        if not path.name.startswith("report."):
            assert path.read_bytes() == (b / path.name).read_bytes(), path.name


class Note:
    """A task that writes down who did what."""

    def __init__(self, folder: Path, bad: int | None = None, how: str = "user") -> None:
        self.folder, self.bad, self.how = folder, bad, how

    def title(self, item: int) -> str:
        return f"item {item}"

    def __call__(self, item: int, rank: Rank) -> None:
        if item == self.bad:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise {"user": UserError("bad item"), "disk": OSError(28, "No space left on device", "x.npy")}.get(
                self.how, ZeroDivisionError("oh")
            )
        with (self.folder / str(item)).open("x") as file:
            file.write(rank.name)
        rank.log(f"did {item}")
