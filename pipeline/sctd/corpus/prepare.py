"""Raw text to a prepared corpus: one pass to learn a vocabulary if none is given, one to encode, pack and write.

The corpus grows in a temporary folder beside `out` and is renamed when it is complete and on disk, so that `out` is
whole or does not exist.
"""

import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from sctd.corpus.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    SPLITS,
    Manifest,
    Split,
    read_manifest,
    verify_shards,
    write_manifest,
)
from sctd.corpus.pack import MIN_SEQ_LEN, Packer
from sctd.corpus.shards import ShardWriter, row_dtype
from sctd.corpus.sources import Document, fingerprint, read_all
from sctd.corpus.tokenizer import (
    SpecialIds,
    corpus_encoder,
    encode_documents,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    tokenizer_hash,
    train_tokenizer,
)
from sctd.corpus.tokenizer import vocab_size as count_ids
from sctd.errors import UserError

BATCH_CHARS = 1 << 20
BATCH_DOCUMENTS = 4096
PROGRESS_SECONDS = 5.0

Log = Callable[[str], Any]


def prepare(
    sources: list[str],
    out: Path,
    seq_len: int,
    tokenizer: str | None,
    vocab_size: int,
    valid_fraction: float,
    seed: int,
    log: Log = print,
) -> Manifest:
    """Write the corpus folder `out`: shards, manifest.json and the tokenizer as a Hugging Face folder.

    `tokenizer` is a spec for load_tokenizer; None learns a WordPiece vocabulary of `vocab_size` from the train
    documents. A document belongs to the valid split by a hash of (seed, text). A corpus that `out` already holds,
    made with the same settings from the same files, is returned as it is. UserError for bad arguments or data, for an
    `out` that holds anything else, and for a corpus without a full train and valid row.
    """
    _check_arguments(sources, seq_len, valid_fraction)
    settings = {
        "sources": [fingerprint(source) for source in sources],
        "seq_len": seq_len,
        "tokenizer": tokenizer,
        "vocab_size": vocab_size if tokenizer is None else None,
        "valid_fraction": valid_fraction,
        "seed": seed,
    }
    out = Path(os.path.realpath(out))  # the rename must replace the folder behind a link, not the link
    given = load_tokenizer(tokenizer) if tokenizer is not None else None
    if (present := _present_corpus(out, settings, given)) is not None:
        log(f"{out}: already prepared with these settings, nothing to do")
        return present
    temporary = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        temporary.mkdir(parents=True)
        manifest = _build(sources, temporary, given, settings, log)
        _publish(temporary, out)
    except OSError as error:  # faults of the sources arrive as UserError
        raise UserError(f"{out}: cannot be written ({error.strerror or error}); free space or change --out") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    log(f"{out}: done, unigram entropy {manifest.unigram_entropy:.3f} nats")
    return manifest


def load_corpus_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer that a corpus was made with. UserError if it is missing or was altered since."""
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    if tokenizer_hash(tokenizer) != manifest.tokenizer_hash:
        raise UserError(
            f"{folder / 'tokenizer.json'}: not the tokenizer that this corpus was made with (its hash differs from "
            "the manifest's); restore it or run `sctd prepare` anew"
        )
    return tokenizer


# ---- before and after --------------------------------------------------------------------------------------------


def _check_arguments(sources: list[str], seq_len: int, valid_fraction: float) -> None:
    if not sources:
        raise UserError("no source given; name files, a glob, hf:name or embedded")
    if seq_len < MIN_SEQ_LEN:
        raise UserError(f"seq_len {seq_len} is too short; use {MIN_SEQ_LEN} or more (BERT uses 128 and 512)")
    if not 0.0 < valid_fraction < 1.0:
        raise UserError(f"valid_fraction {valid_fraction} is not between 0 and 1; use for example 0.01")


def _present_corpus(out: Path, settings: dict[str, Any], given: Tokenizer | None) -> Manifest | None:
    """The corpus in `out` if it was made with these settings, None if `out` is free, else UserError."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST_NAME).is_file():
        kind = "a folder with other files" if out.is_dir() else "a file"
        raise UserError(f"{out}: exists and is {kind}, not a prepared corpus; choose another --out or remove it")
    manifest = read_manifest(out)
    changed = [key for key, value in settings.items() if manifest.settings.get(key) != value]
    if not changed and given is not None and tokenizer_hash(given) != manifest.tokenizer_hash:
        changed = ["tokenizer"]
    if changed:
        raise UserError(
            f"{out}: holds a corpus made with other settings ({', '.join(changed)}; for sources also a changed file); "
            "choose another --out or remove it"
        )
    verify_shards(out, manifest, full=False)
    load_corpus_tokenizer(out, manifest)
    return manifest


def _publish(temporary: Path, out: Path) -> None:
    _fsync(temporary)
    os.rename(temporary, out)  # replaces an empty folder, fails on any other
    _fsync(out.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- the passes --------------------------------------------------------------------------------------------------


def _build(sources: list[str], folder: Path, given: Tokenizer | None, settings: dict[str, Any], log: Log) -> Manifest:
    """Both passes; leaves a complete corpus in `folder`."""
    tokenizer = given if given is not None else _learn_tokenizer(sources, settings, log)
    save_tokenizer(tokenizer, folder, model_max_length=settings["seq_len"])
    for path in folder.iterdir():
        _fsync(path)
    run = _Run(folder, tokenizer, settings, log)
    for batch in _batches(read_all(sources)):
        run.add(batch)
    splits = run.close()
    _check_rows(sources, splits, run, settings)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        seq_len=settings["seq_len"],
        vocab_size=count_ids(tokenizer),
        dtype=run.dtype.name,
        tokenizer_hash=tokenizer_hash(tokenizer),
        special_ids=run.special,
        unigram_entropy=unigram_entropy(run.train_counts, run.special),
        max_token_id=run.max_token_id,
        documents=run.documents,
        text_bytes=run.text_bytes,
        tokens=run.tokens,
        sources=tuple(sources),
        settings=settings,
        splits=splits,
        dropped=run.dropped(),
    )
    write_manifest(folder, manifest)
    return manifest


def _learn_tokenizer(sources: list[str], settings: dict[str, Any], log: Log) -> Tokenizer:
    size = settings["vocab_size"]
    log(f"learning a WordPiece vocabulary of {size:,} from the train documents")
    train = (text for text in read_all(sources) if not is_valid(text, settings["seed"], settings["valid_fraction"]))
    return train_tokenizer(train, size)


def is_valid(document: Document, seed: int, fraction: float) -> bool:
    """Whether a document belongs to the valid split; depends on its text, not on its place, so equal ones agree."""
    digest = hashlib.blake2b(document.encode(), digest_size=8, key=str(seed).encode()[:64]).digest()
    return int.from_bytes(digest, "big") < fraction * 2.0**64


def unigram_entropy(counts: np.ndarray, special: SpecialIds) -> float:
    """Entropy in nats of the id counts [vocab_size], special ids left out: the MLM loss of a model that has learned
    the frequencies of tokens and nothing else."""
    ordinary = counts.astype(np.float64)
    ordinary[list(special.all)] = 0.0
    share = ordinary[ordinary > 0] / ordinary.sum()
    return float(-(share * np.log(share)).sum())


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of about BATCH_CHARS characters."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_CHARS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Run:
    """The encoding pass: documents in, shards out, and all that is counted on the way."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, settings: dict[str, Any], log: Log) -> None:
        self.special = special_ids(tokenizer)
        self.dtype = row_dtype(count_ids(tokenizer))
        self.train_counts = np.zeros(count_ids(tokenizer), dtype=np.int64)
        self.documents = self.text_bytes = self.tokens = self.max_token_id = 0
        self._seed, self._fraction = settings["seed"], settings["valid_fraction"]
        self._encoder = corpus_encoder(tokenizer)
        self._packers = {name: Packer(settings["seq_len"], self.special) for name in SPLITS}
        self._writers = {name: ShardWriter(folder, name, settings["seq_len"], self.dtype) for name in SPLITS}
        self._log, self._start = log, time.monotonic()
        self._next_report = self._start + PROGRESS_SECONDS

    def add(self, batch: list[Document]) -> None:
        encoded = encode_documents(self._encoder, batch)
        self.documents += len(batch)
        self.text_bytes += sum(len(text.encode()) for text in batch)
        self.tokens += sum(len(ids) for ids in encoded)
        by_split: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
        for text, ids in zip(batch, encoded, strict=True):
            by_split["valid" if is_valid(text, self._seed, self._fraction) else "train"].append(ids)
        for name in SPLITS:
            rows = self._packers[name].add(by_split[name])
            self._writers[name].add(rows)
            self.max_token_id = max(self.max_token_id, int(rows.max(initial=0)))
            if name == "train":
                self.train_counts += np.bincount(rows.ravel(), minlength=len(self.train_counts))
        if time.monotonic() >= self._next_report:
            self._report()

    def close(self) -> dict[str, Split]:
        splits = {name: writer.close() for name, writer in self._writers.items()}
        self._report()
        return splits

    def dropped(self) -> dict[str, int]:
        """What the packing of both splits left out."""
        names = ("special_rows", "empty_documents", "unfinished_tokens")
        return {name: sum(getattr(packer, name) for packer in self._packers.values()) for name in names}

    def _report(self) -> None:
        now = time.monotonic()
        megabytes = self.text_bytes / 1e6
        rows = ", ".join(f"{writer.rows:,} {name}" for name, writer in self._writers.items())
        self._log(
            f"{self.documents:,} documents, {megabytes:,.1f} MB, {self.tokens:,} tokens, rows: {rows}, "
            f"{megabytes / max(now - self._start, 1e-9):.1f} MB/s"
        )
        self._next_report = now + PROGRESS_SECONDS


def _check_rows(sources: list[str], splits: dict[str, Split], run: _Run, settings: dict[str, Any]) -> None:
    where = ", ".join(sources)
    found = f"{run.documents:,} documents with {run.tokens:,} tokens"
    if not run.documents:
        raise UserError(f"{where}: no documents in it; name a source that holds text")
    if not splits["train"].rows:
        raise UserError(
            f"{where}: {found} do not fill one train row of {settings['seq_len']}; add text, lower --seq-len or lower "
            f"--valid-fraction (now {settings['valid_fraction']})"
        )
    if not splits["valid"].rows:
        raise UserError(
            f"{where}: {found} do not fill one valid row of {settings['seq_len']}; raise --valid-fraction "
            f"(now {settings['valid_fraction']}) or add text"
        )
