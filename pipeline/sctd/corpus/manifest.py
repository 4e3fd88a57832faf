"""manifest.json: what a prepared corpus holds, how it was made, and the hashes of its shards."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sctd.corpus.tokenizer import SpecialIds, load_tokenizer, tokenizer_hash
from sctd.errors import UserError

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 2
SPLITS = ("train", "valid")


@dataclass(frozen=True)
class Ends:
    """One .npy file beside a shard: int64, ascending, the places row x seq_len + position of the [SEP] ids that end a
    document. A row's last [SEP] that is not among them cuts its document, which goes on in the next row."""

    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Shard:
    """One .npy file of rows [rows, seq_len], all from one source, and the ends of the documents in it."""

    file: str
    rows: int
    sha256: str
    bytes: int
    source: int
    ends: Ends


@dataclass(frozen=True)
class Split:
    """Rows of one split and length over its shards, in order; the shards of a source stand together."""

    rows: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class SourceTotals:
    """What one source gave to both splits. `weight`: its share of the samples in training, None where none was
    given."""

    name: str
    spec: str
    weight: float | None
    documents: int
    text_bytes: int
    tokens: int


@dataclass(frozen=True)
class Manifest:
    """All about a prepared corpus. `tokens` counts the ids of all documents before packing, without [CLS] and [SEP];
    `unigram_entropy` is in nats, over the ids of the train documents without special ones; `max_token_id` is over all
    documents. `splits[length][split]`: the same documents, packed once for each of `seq_lens` (ascending)."""

    format_version: int
    seq_lens: tuple[int, ...]
    vocab_size: int
    dtype: str
    tokenizer_hash: str
    special_ids: SpecialIds
    unigram_entropy: float
    max_token_id: int
    documents: int
    text_bytes: int
    tokens: int
    sources: tuple[SourceTotals, ...]
    settings: dict[str, Any]
    splits: dict[int, dict[str, Split]]
    dropped: dict[str, int]

    @property
    def seq_len(self) -> int:
        """The longest rows."""
        return self.seq_lens[-1]

    def split(self, length: int, name: str) -> Split:
        """Rows of `length` tokens. UserError where the corpus was not packed to that length."""
        if length not in self.splits:
            packed = " and ".join(map(str, self.seq_lens))
            raise UserError(
                f"rows of {length} tokens are not in the corpus, it has {packed}: prepare it with --seq-len {length}"
            )
        return self.splits[length][name]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json and flush it to disk."""
    with (folder / MANIFEST_NAME).open("w", encoding="utf-8") as stream:
        json.dump(dataclasses.asdict(manifest), stream, indent=2)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared corpus. UserError if the folder or the manifest is missing, damaged or too new."""
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise UserError(f"{folder}: no such corpus folder; make it with `sctd prepare`")
    if not path.is_file():
        raise UserError(f"{folder}: no {MANIFEST_NAME} in it, so it is not a prepared corpus; run `sctd prepare`")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); run `sctd prepare` anew") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: not a JSON object; run `sctd prepare` anew")
    if state.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {state.get('format_version')!r}, this code reads {FORMAT_VERSION}; "
            "run `sctd prepare` anew or use the sctd that made it"
        )
    try:
        return _manifest(state)
    except _Damage as error:
        raise UserError(f"{path}: {error}; run `sctd prepare` anew") from error


def verify_shards(folder: Path, manifest: Manifest, part: tuple[int, int] | None = None) -> None:
    """Compare the size of every file with the manifest, and the sha256 of a part of them.

    Args:
        part: (i, n) hashes every n-th file from the i-th on, so that n ranks hash each once; None hashes nothing.

    Raises:
        UserError: naming the first bad file.
    """
    for number, item in enumerate(corpus_files(manifest)):
        verify_file(folder, item, hashed=part is not None and number % part[1] == part[0])


def verify_file(folder: Path, item: Shard | Ends, hashed: bool) -> None:
    """Compare the size of one file with the manifest, and its sha256 if asked. UserError where they differ."""
    path = folder / item.file
    if not path.is_file():
        raise UserError(f"{path}: shard is missing; restore it or run `sctd prepare` anew")
    size = path.stat().st_size
    if size != item.bytes:
        raise UserError(f"{path}: shard has {size} bytes, its manifest says {item.bytes}; run `sctd prepare` anew")
    if hashed and file_sha256(path) != item.sha256:
        raise UserError(f"{path}: shard was altered (its sha256 differs); run `sctd prepare` anew")


def corpus_files(manifest: Manifest) -> Iterator[Shard | Ends]:
    """All files of rows and of documents' ends, in a fixed order."""
    for length in manifest.seq_lens:
        for split in manifest.splits[length].values():
            for shard in split.shards:
                yield shard
                yield shard.ends


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---- JSON to dataclasses -----------------------------------------------------------------------------------------


class _Damage(ValueError):
    pass


def _manifest(state: dict[str, Any]) -> Manifest:
    fields = {
        name: _get(state, name, int)
        for name in ("format_version", "vocab_size", "max_token_id", "documents", "text_bytes", "tokens")
    }
    lengths = _get(state, "seq_lens", list)
    if not lengths or not all(isinstance(length, int) for length in lengths) or lengths != sorted(set(lengths)):
        raise _Damage("key 'seq_lens' is not a list of ascending lengths")
    special = _get(state, "special_ids", dict)
    splits = _get(state, "splits", dict)
    dropped = _get(state, "dropped", dict)
    sources = tuple(_source(source) for source in _get(state, "sources", list))
    return Manifest(
        **fields,
        seq_lens=tuple(lengths),
        dtype=_get(state, "dtype", str),
        tokenizer_hash=_get(state, "tokenizer_hash", str),
        special_ids=SpecialIds(*(_get(special, f.name, int) for f in dataclasses.fields(SpecialIds))),
        unigram_entropy=float(_get(state, "unigram_entropy", int | float)),
        sources=sources,
        settings=_get(state, "settings", dict),
        splits={length: _splits(_get(splits, str(length), dict), len(sources)) for length in lengths},
        dropped={name: _get(dropped, name, int) for name in dropped},
    )


def _source(state: Any) -> SourceTotals:
    if not isinstance(state, dict):
        raise _Damage("a source is not a JSON object")
    weight = None if state.get("weight") is None else float(_get(state, "weight", int | float))
    counts = [_get(state, name, int) for name in ("documents", "text_bytes", "tokens")]
    return SourceTotals(_get(state, "name", str), _get(state, "spec", str), weight, *counts)


def _splits(state: dict[str, Any], sources: int) -> dict[str, Split]:
    return {name: _split(_get(state, name, dict), sources) for name in SPLITS}


def _split(state: dict[str, Any], sources: int) -> Split:
    shards = tuple(_shard(shard) for shard in _get(state, "shards", list))
    rows = _get(state, "rows", int)
    if rows != sum(shard.rows for shard in shards):
        raise _Damage("the rows of a split are not the sum of its shards'")
    order = [shard.source for shard in shards]
    if order != sorted(order) or any(not 0 <= source < sources for source in order):
        raise _Damage("the shards of a split are not in the order of the sources")
    return Split(rows, shards)


def _shard(state: Any) -> Shard:
    if not isinstance(state, dict):
        raise _Damage("a shard is not a JSON object")
    ends = _get(state, "ends", dict)
    return Shard(
        _file_name(state), _get(state, "rows", int), _get(state, "sha256", str), _get(state, "bytes", int),
        _get(state, "source", int), Ends(_file_name(ends), _get(ends, "sha256", str), _get(ends, "bytes", int)),
    )  # fmt: skip


def _file_name(state: dict[str, Any]) -> str:
    name = _get(state, "file", str)
    if Path(name).name != name:
        raise _Damage(f"shard {name!r} lies outside of the corpus folder")
    return name


def _get(state: dict[str, Any], key: str, kind: Any) -> Any:
    if key not in state:
        raise _Damage(f"key {key!r} is missing")
    if not isinstance(state[key], kind) or isinstance(state[key], bool):
        raise _Damage(f"key {key!r} is of the wrong type ({type(state[key]).__name__})")
    return state[key]


def load_corpus_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer that a corpus was made with. UserError if it is missing or was altered since."""
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    if tokenizer_hash(tokenizer) != manifest.tokenizer_hash:
        raise UserError(
            f"{folder / 'tokenizer.json'}: not the tokenizer that this corpus was made with (its hash differs from "
            "the manifest's); restore it or run `sctd prepare` anew"
        )
    return tokenizer
