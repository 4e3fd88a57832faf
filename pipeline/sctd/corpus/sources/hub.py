"""Data sets of the Hugging Face hub, streamed: nothing is stored on this machine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sctd.corpus.sources.pieces import Faults, Form, Piece, pieces_from
from sctd.corpus.sources.readers import text_of
from sctd.errors import UserError, one_line

_UNKNOWN_BYTES = 100_000_000  # of text in each file of a data set that does not state its size


def plan_hub(source: int, spec: str) -> list[Piece]:
    """A piece for each file that the data set streams from."""
    found = _opened(spec)
    name, _, split = _parts(spec)
    stated = (found.info.splits or {}).get(split) if found.info else None
    local = sum(path.stat().st_size for path in Path(name).rglob("*") if path.is_file())
    count = found.num_shards
    total = getattr(stated, "num_bytes", None) or local or count * _UNKNOWN_BYTES
    return pieces_from(source, spec, "hub", spec, range(count), [total // count] * count)


def read_hub(piece: Piece, form: Form, faults: Faults) -> Iterator[str]:
    """The field of one shard's records."""
    row = 0
    try:
        whole = _opened(piece.spec)
        for record in whole.shard(num_shards=whole.num_shards, index=piece.start):
            row += 1
            if (text := text_of(record, form.field, f"{piece.title}, row {row}", faults)) is not None:
                yield text
    except UserError:
        raise
    except Exception as error:  # the hub client raises from a dozen unrelated classes
        faults.found("unreadable", piece.title, _unreadable(row, error))


def _parts(spec: str) -> tuple[str, str, str]:
    parts = spec.removeprefix("hf:").split(":")
    if not parts[0] or len(parts) > 3:
        raise UserError(f"{spec}: a hub data set is written hf:name, hf:name:config or hf:name:config:split")
    name, config, split = parts + [""] * (3 - len(parts))
    return name, config, split or "train"


def _opened(spec: str) -> Any:
    name, config, split = _parts(spec)
    import datasets

    try:
        return datasets.load_dataset(name, config or None, split=split, streaming=True)
    except Exception as error:
        raise UserError(f"{spec}: {_unreadable(0, error)}") from error


def _unreadable(row: int, error: Exception) -> str:
    return (
        f"cannot be read after row {row} ({type(error).__name__}: {one_line(error)}); check the name, config and "
        "split, and that this machine reaches the hub"
    )
