"""What is to be prepared, and the folder in which it grows: `.NAME.work` beside the corpus, until that is whole.

job.json             settings, versions and number of bins; another start with the same settings continues
tokenizer/           as it will stand in the corpus
pieces/4f1c...*      what the encoding of a piece left, under a hash of what the piece is made from; its .json is
                     written last
select.json          where the limits cut, written when all pieces are there
bins/0007.*          shards, rests and counts of a bin; its .json is written last
claims/              which rank works at what
"""

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import socket
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from sctd import __version__
from sctd.corpus.prepare.pack import MIN_SEQ_LEN
from sctd.corpus.sources.clean import Cleaning
from sctd.corpus.sources.source import Form, Piece, Source, fingerprint, parse_sources
from sctd.corpus.tokenizer import MIN_VOCAB_SIZE
from sctd.errors import UserError

MEGABYTE = 1_000_000
BIN_BYTES = 32 * MEGABYTE  # of text, about: a rank holds one bin's tokens in memory
MAX_BINS = 4096
_MIN_PLAN = 1000
_STAGES = "stages.json"
# What file systems say that have no locks.
_CANNOT_LOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@dataclass(frozen=True)
class Wanted:
    """The settings of a corpus; everything that can change what comes out is here.

    Args:
        sources: `SPEC` or `NAME=SPEC`. seq_lens: tokens a row, each length packed from the same tokens.
        tokenizer: spec for load_tokenizer; None learns a WordPiece vocabulary of `vocab_size` from train documents.
        valid_fraction: share of the documents held out, by a hash of (seed, text).
        weights: `NAME=SHARE` of the samples in training. max_documents, max_tokens: `N` of each source, or `NAME=N`.
        near_duplicates: Jaccard similarity from which a document is left out; None: only exact duplicates are.
        shard_plan: bytes of text in a piece, the unit of work.
        on_error: stop | skip, at faults of the data.
    """

    sources: tuple[str, ...]
    seq_lens: tuple[int, ...] = (512,)
    tokenizer: str | None = None
    vocab_size: int = 30522
    valid_fraction: float = 0.01
    seed: int = 1
    weights: tuple[str, ...] = ()
    max_documents: tuple[str, ...] = ()
    max_tokens: tuple[str, ...] = ()
    form: Form = field(default_factory=Form)
    cleaning: Cleaning = field(default_factory=Cleaning)
    near_duplicates: float | None = None
    shard_plan: int = 64 * MEGABYTE
    on_error: str = "stop"


@dataclass(frozen=True)
class Limit:
    """What is taken of one source at most, in the order of reading, before duplicates are removed."""

    documents: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Job:
    """A preparation that was planned: the same for any number of ranks."""

    wanted: Wanted
    out: Path
    sources: tuple[Source, ...]
    limits: tuple[Limit, ...]
    pieces: tuple[Piece, ...]
    settings: dict[str, Any]
    bins: int

    @property
    def work(self) -> Path:
        return work_folder(self.out)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the files of each piece: hashes of all that the piece is made from, so that what is finished stays when
        another file of the sources has changed, and with it the numbers of the pieces."""
        sources = self.settings["sources"]
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
        return self.work / "bins" / f"{number:04d}{ending}"


def work_folder(out: Path) -> Path:
    """Where a corpus grows."""
    return out.parent / f".{out.name}.work"


def expected_bytes(limits: Sequence[Limit], pieces: Sequence[Piece]) -> int:
    """Text that will be taken, estimated from the pieces and the limits of the sources."""
    total = 0
    for source, limit in enumerate(limits):
        size = sum(piece.bytes for piece in pieces if piece.source == source)
        most = [count * each for count, each in ((limit.documents, 10_000), (limit.tokens, 6)) if count is not None]
        total += min([size, *most])
    return total


def bin_count(text_bytes: int) -> int:
    """Bins for so much text."""
    return min(MAX_BINS, max(1, -(-text_bytes // BIN_BYTES)))


# ---- what the settings must be -----------------------------------------------------------------------------------


def check(wanted: Wanted) -> None:
    """UserError for the first setting that no corpus can be made with."""
    sources = parse_sources(wanted.sources)
    if not wanted.seq_lens:
        raise UserError("no row length given; use for example --seq-len 128,512")
    for length in wanted.seq_lens:
        if length < MIN_SEQ_LEN:
            raise UserError(f"seq_len {length} is too short; use {MIN_SEQ_LEN} or more (BERT uses 128 and 512)")
    if list(wanted.seq_lens) != sorted(set(wanted.seq_lens)):
        raise UserError(f"--seq-len {','.join(map(str, wanted.seq_lens))}: name each length once, the shortest first")
    if not 0.0 < wanted.valid_fraction < 1.0:
        raise UserError(f"valid_fraction {wanted.valid_fraction} is not between 0 and 1; use for example 0.01")
    if wanted.tokenizer is None and wanted.vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"vocab_size {wanted.vocab_size} is too small for WordPiece; use {MIN_VOCAB_SIZE} or more")
    if wanted.shard_plan < _MIN_PLAN:
        raise UserError(f"--shard-plan {wanted.shard_plan}: pieces of text have {_MIN_PLAN} bytes or more")
    if wanted.on_error not in ("stop", "skip"):
        raise UserError(f"--on-error {wanted.on_error}: must be stop or skip")
    if wanted.near_duplicates is not None:
        from sctd.corpus.prepare.near import check_threshold

        check_threshold(wanted.near_duplicates)
    wanted.cleaning.check()
    weights(wanted, sources)
    limits_of(wanted, sources)


def weights(wanted: Wanted, sources: tuple[Source, ...]) -> list[float | None]:
    """The share of each source in training, None where none was given."""
    found: list[float | None] = [None] * len(sources)
    for text in wanted.weights:
        number, value = _named(text, sources, "--weight")
        if number is None:
            raise UserError(f"--weight {text}: write it as NAME=SHARE, NAME being a source's: {_names(sources)}")
        found[number] = _number(value, float, "--weight", text)
        if not 0.0 < (found[number] or 0.0) <= 1.0:
            raise UserError(f"--weight {text}: a share is above 0 and at most 1")
    given = [weight for weight in found if weight is not None]
    if None in found and given and sum(given) >= 1.0:
        rest = ", ".join(source.name for source, weight in zip(sources, found, strict=True) if weight is None)
        raise UserError(f"--weight: {sum(given):g} in all leaves nothing for {rest}; lower them, or weight that too")
    return found


def limits_of(wanted: Wanted, sources: tuple[Source, ...]) -> tuple[Limit, ...]:
    """The limits of each source."""
    found = [Limit() for _ in sources]
    for key, texts in (("documents", wanted.max_documents), ("tokens", wanted.max_tokens)):
        for text in sorted(texts, key=lambda text: "=" in text):  # what is said of one source wins
            option = f"--max-{key}"
            number, value = _named(text, sources, option)
            count = _number(value, int, option, text)
            if count < 1:
                raise UserError(f"{option} {text}: must be at least 1")
            for place in range(len(sources)) if number is None else [number]:
                found[place] = dataclasses.replace(found[place], **{key: count})
    return tuple(found)


def _named(text: str, sources: tuple[Source, ...], option: str) -> tuple[int | None, str]:
    name, separator, value = text.rpartition("=")
    if not separator:
        return None, text
    for number, source in enumerate(sources):
        if source.name == name:
            return number, value
    raise UserError(f"{option} {text}: no source is called {name!r}; there is {_names(sources)}")


def _names(sources: tuple[Source, ...]) -> str:
    return ", ".join(source.name for source in sources)


def _number(value: str, kind: type, option: str, text: str) -> Any:
    try:
        number = float(value.replace("_", ""))
        if kind is int and not number.is_integer():
            raise ValueError
        return kind(number)
    except (ValueError, OverflowError):
        raise UserError(f"{option} {text}: {value!r} is not a {'whole ' if kind is int else ''}number") from None


def parse_bytes(text: str) -> int:
    """`64MB`, `1GB`, `500kB` or a plain number, in bytes. UserError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d*)?|\.\d+)\s*([kKMGT]?)B?\s*", text)
    if match is None:
        raise UserError(f"{text!r} is not a size; write it like 64MB or 1GB")
    scale = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    return int(float(match[1]) * scale[match[2].replace("K", "k")])


# ---- the folder --------------------------------------------------------------------------------------------------


def settings_of(wanted: Wanted) -> dict[str, Any]:
    """The settings as JSON has them, with what identifies the text: names, sizes and times of files."""
    plain = json.loads(json.dumps(dataclasses.asdict(wanted)))
    plain["sources"] = json.loads(json.dumps(fingerprint(parse_sources(wanted.sources))))
    if wanted.tokenizer is not None:
        plain["vocab_size"] = None
    return plain


def changed_settings(settings: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    """Names of those that differ."""
    return [key for key in settings if stored.get(key) != settings[key]]


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
    """Hold a work folder, which is made where it is not there. UserError if another process holds it."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _CANNOT_LOCK:
                file.seek(0)
                holder = file.read().strip() or "another process"
                problem = f"{work}: {holder} is preparing this corpus; wait for it, or choose another --out"
                raise UserError(problem) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


@contextmanager
def timed(job: Job, stage: str) -> Iterator[None]:
    """Add the time that passes inside to what a stage has taken, over all starts."""
    start = time.monotonic()
    yield
    taken = stage_seconds(job)
    write_json(job.work / _STAGES, {**taken, stage: taken.get(stage, 0.0) + time.monotonic() - start})


def stage_seconds(job: Job) -> dict[str, float]:
    """Wall-clock seconds of each finished stage."""
    return read_json(job.work / _STAGES) if (job.work / _STAGES).is_file() else {}


def write_json(path: Path, content: Any) -> None:
    """Whole, and on disk, or not there at all."""
    hidden = path.with_name(f".{path.name}.part")
    with hidden.open("w", encoding="utf-8") as stream:
        json.dump(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(hidden, path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def fsync_path(path: Path) -> None:
    """Make a file's content, or the renames in a folder, last."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
