"""A planned preparation, and the work folder `.NAME.work` beside the corpus in which it grows."""

import dataclasses
import hashlib
import json
import platform
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from sctd import __version__
from sctd.corpus.prepare.settings import MEGABYTE, CorpusSettings
from sctd.corpus.sources.source import Piece
from sctd.errors import UserError
from sctd.files import Held, lock, read_json, write_json

BIN_BYTES = 32 * MEGABYTE  # of text, about: a rank holds one bin's tokens in memory
MAX_BINS = 4096
DOCUMENT_BYTES, TOKEN_BYTES = 10_000, 6  # of text, at most about
ADDITIONS = "additions.json"  # in the work folder: what was added to the tokenizer, for the report


@dataclass(frozen=True)
class Job:
    """A preparation that was planned: the same for any number of ranks. `identity` is that of the settings."""

    settings: CorpusSettings
    out: Path
    pieces: tuple[Piece, ...]
    identity: dict[str, Any]

    @property
    def work(self) -> Path:
        return work_folder(self.out)

    @cached_property
    def text_bytes(self) -> int:
        """Text that will be taken, estimated from the pieces and the limits of the sources."""
        total = 0
        for source, limit in enumerate(self.settings.limits):
            size = sum(piece.bytes for piece in self.pieces if piece.source == source)
            limits = ((limit.documents, DOCUMENT_BYTES), (limit.tokens, TOKEN_BYTES))
            most = [count * each for count, each in limits if count is not None]
            total += min([size, *most])
        return total

    @cached_property
    def bins(self) -> int:
        return min(MAX_BINS, max(1, -(-self.text_bytes // BIN_BYTES)))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the files of each piece: hashes of all that the piece is made from, so that what is finished stays when
        another file of the sources has changed, and with it the numbers of the pieces."""
        sources = self.identity["sources"]
        states = [{path: (size, mtime) for path, size, mtime in source.get("files", [])} for source in sources]
        found = []
        for piece in self.pieces:
            state = states[piece.source].get(piece.spec, sources[piece.source])
            made_from = json.dumps([dataclasses.asdict(piece), state]).encode()
            found.append(hashlib.blake2b(made_from, digest_size=16).hexdigest())
        return tuple(found)

    def piece(self, number: int, ending: str) -> Path:
        return self.work / "pieces" / f"{self.names[number]}{ending}"

    def bin(self, number: int, ending: str) -> Path:
        return self.work / "bins" / f"{number:04d}-of-{self.bins:04d}{ending}"

    @cached_property
    def stage_seconds(self) -> dict[str, float]:
        """Wall-clock seconds of the stages so far, over all starts."""
        path = self.work / "stages.json"
        return read_json(path) if path.is_file() else {}

    def add_seconds(self, stage: str, seconds: float) -> None:
        self.stage_seconds[stage] = self.stage_seconds.get(stage, 0.0) + seconds
        write_json(self.work / "stages.json", self.stage_seconds)


def work_folder(out: Path) -> Path:
    """Where a corpus grows."""
    return out.parent / f".{out.name}.work"


def versions() -> dict[str, str]:
    """Of what decides which tokens a text becomes."""
    return {
        "sctd": __version__,
        "python": platform.python_version(),
        "tokenizers": tokenizers.__version__,
        "numpy": np.__version__,
        "unicode": unicodedata.unidata_version,
    }


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """Hold a work folder, which is made if needed. UserError if another process holds it."""
    work.mkdir(parents=True, exist_ok=True)
    try:
        held = lock(work / "lock")
    except Held as error:
        raise UserError(f"{work}: {error} is preparing this corpus; wait for it, or choose another --out") from None
    with held:
        yield
