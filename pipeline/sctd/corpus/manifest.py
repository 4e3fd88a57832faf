"""manifest.json: what a prepared corpus holds, how it was made, and the hashes of its shards."""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sctd.corpus.tokenizer import SpecialIds
from sctd.errors import UserError

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
SPLITS = ("train", "valid")


@dataclass(frozen=True)
class Shard:
    """One .npy file of rows [rows, seq_len]."""

    file: str
    rows: int
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Split:
    """Rows of one split over its shards, in order."""

    rows: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """All about a prepared corpus. `tokens` counts the ids of all documents before packing, without [CLS] and [SEP];
    `unigram_entropy` is in nats, over the non-special ids of the train rows; `max_token_id` is over all rows."""

    format_version: int
    seq_len: int
    vocab_size: int
    dtype: str
    tokenizer_hash: str
    special_ids: SpecialIds
    unigram_entropy: float
    max_token_id: int
    documents: int
    text_bytes: int
    tokens: int
    sources: tuple[str, ...]
    settings: dict[str, Any]
    splits: dict[str, Split]
    dropped: dict[str, int]


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


def verify_shards(folder: Path, manifest: Manifest, full: bool) -> None:
    """Compare each shard's size, and with `full` its sha256, with the manifest. UserError naming the first bad file."""
    for split in manifest.splits.values():
        for shard in split.shards:
            path = folder / shard.file
            if not path.is_file():
                raise UserError(f"{path}: shard is missing; restore it or run `sctd prepare` anew")
            size = path.stat().st_size
            if size != shard.bytes:
                raise UserError(
                    f"{path}: shard has {size} bytes, its manifest says {shard.bytes}; run `sctd prepare` anew"
                )
            if full and file_sha256(path) != shard.sha256:
                raise UserError(f"{path}: shard was altered (its sha256 differs); run `sctd prepare` anew")


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
        for name in ("format_version", "seq_len", "vocab_size", "max_token_id", "documents", "text_bytes", "tokens")
    }
    special = _get(state, "special_ids", dict)
    splits = _get(state, "splits", dict)
    dropped = _get(state, "dropped", dict)
    return Manifest(
        **fields,
        dtype=_get(state, "dtype", str),
        tokenizer_hash=_get(state, "tokenizer_hash", str),
        special_ids=SpecialIds(*(_get(special, f.name, int) for f in dataclasses.fields(SpecialIds))),
        unigram_entropy=float(_get(state, "unigram_entropy", int | float)),
        sources=tuple(map(str, _get(state, "sources", list))),
        settings=_get(state, "settings", dict),
        splits={name: _split(_get(splits, name, dict)) for name in SPLITS},
        dropped={name: _get(dropped, name, int) for name in dropped},
    )


def _split(state: dict[str, Any]) -> Split:
    shards = tuple(_shard(shard) for shard in _get(state, "shards", list))
    rows = _get(state, "rows", int)
    if rows != sum(shard.rows for shard in shards):
        raise _Damage("the rows of a split are not the sum of its shards'")
    return Split(rows, shards)


def _shard(state: Any) -> Shard:
    if not isinstance(state, dict):
        raise _Damage("a shard is not a JSON object")
    shard = Shard(
        _get(state, "file", str), _get(state, "rows", int), _get(state, "sha256", str), _get(state, "bytes", int)
    )
    if Path(shard.file).name != shard.file:
        raise _Damage(f"shard {shard.file!r} lies outside of the corpus folder")
    return shard


def _get(state: dict[str, Any], key: str, kind: Any) -> Any:
    if key not in state:
        raise _Damage(f"key {key!r} is missing")
    if not isinstance(state[key], kind) or isinstance(state[key], bool):
        raise _Damage(f"key {key!r} is of the wrong type ({type(state[key]).__name__})")
    return state[key]
