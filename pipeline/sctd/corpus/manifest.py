"""manifest.json: what a prepared corpus holds, how it was made, and the hashes of its shards."""

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sctd.corpus.tokenizer import SpecialIds, load_tokenizer, tokenizer_hash
from sctd.errors import UserError
from sctd.files import read_json, sha256, write_json

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
    """Write manifest.json, whole and flushed to disk."""
    write_json(folder / MANIFEST_NAME, dataclasses.asdict(manifest), indent=2)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared corpus. UserError if the folder or the manifest is missing, damaged or too new."""
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise UserError(f"{folder}: no such corpus folder; make it with `sctd prepare`")
    if not path.is_file():
        raise UserError(f"{folder}: not a prepared corpus, it has no {MANIFEST_NAME}; run `sctd prepare`")
    try:
        state = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); run `sctd prepare` again") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: not a JSON object; run `sctd prepare` again")
    if (version := state.get("format_version")) != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {version!r}, this code reads {FORMAT_VERSION}; run `sctd prepare` again or use "
            "the sctd that made it"
        )
    try:
        manifest = from_json(Manifest, state)
        _check(manifest)
    except ValueError as error:
        raise UserError(f"{path}: {error}; run `sctd prepare` again") from error
    return manifest


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
        raise UserError(f"{path}: shard is missing; restore it or run `sctd prepare` again")
    size = path.stat().st_size
    if size != item.bytes:
        raise UserError(f"{path}: shard has {size} bytes, its manifest says {item.bytes}; run `sctd prepare` again")
    if hashed and sha256(path) != item.sha256:
        raise UserError(f"{path}: shard was altered (its sha256 differs); run `sctd prepare` again")


def corpus_files(manifest: Manifest) -> Iterator[Shard | Ends]:
    """All files of rows and of documents' ends, in a fixed order."""
    for length in manifest.seq_lens:
        for split in manifest.splits[length].values():
            for shard in split.shards:
                yield shard
                yield shard.ends


# ---- JSON to dataclasses -----------------------------------------------------------------------------------------


def from_json(kind: Any, value: Any, key: str = "") -> Any:
    """`value`, as JSON has it, as an object of type `kind`: a dataclass of this module or the type of a field. `key`:
    where it was found. ValueError naming the first key that is missing or of another type."""
    if type(value) is kind:
        return value
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        made = typing.cast(type, kind)
        hints = _hints(made)
        for name in hints:
            _require(name in value, f"key {name!r} is missing")
        return made(**{name: from_json(hint, value[name], name) for name, hint in hints.items()})
    if origin is tuple and isinstance(value, list):
        return tuple(from_json(inner[0], item, key) for item in value)
    if origin is dict and isinstance(value, dict):
        _require(inner[0] is str or all(map(str.isdecimal, value)), f"key {key!r} has keys that are not numbers")
        return {inner[0](name): from_json(inner[1], item, name) for name, item in value.items()}
    if origin is types.UnionType:
        return None if value is None else from_json(inner[0], value, key)
    if kind is float and type(value) is int:
        return float(value)
    _require(kind is Any, f"key {key!r} is of the wrong type ({type(value).__name__})")
    return value


@functools.cache  # a manifest has thousands of shards
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _check(manifest: Manifest) -> None:
    """ValueError where its parts do not belong together."""
    lengths, sources = manifest.seq_lens, range(len(manifest.sources))
    _require(lengths and list(lengths) == sorted(set(lengths)), "key 'seq_lens' is not a list of ascending lengths")
    for length in lengths:
        _require(length in manifest.splits, f"key '{length}' is missing")
        for name in SPLITS:
            _require(name in manifest.splits[length], f"key {name!r} is missing")
        for split in manifest.splits[length].values():
            rows, order = sum(shard.rows for shard in split.shards), [shard.source for shard in split.shards]
            _require(split.rows == rows, "the rows of a split are not the sum of its shards'")
            in_order = order == sorted(order) and all(source in sources for source in order)
            _require(in_order, "the shards of a split are not in the order of the sources")
    for item in corpus_files(manifest):
        _require(Path(item.file).name == item.file, f"shard {item.file!r} lies outside of the corpus folder")


def _require(holds: Any, problem: str) -> None:
    if not holds:
        raise ValueError(problem)


def load_corpus_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer that a corpus was made with. UserError if it is missing or was altered since."""
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    if tokenizer_hash(tokenizer) != manifest.tokenizer_hash:
        raise UserError(
            f"{folder / 'tokenizer.json'}: not the tokenizer that this corpus was made with (its hash differs from "
            "the manifest's); restore it or run `sctd prepare` again"
        )
    return tokenizer
