"""Data sets of the Hugging Face hub, streamed: nothing is stored on this machine."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sctd.corpus.faults import Faults, one_line
from sctd.corpus.sources.pieces import Form, Piece, titles
from sctd.corpus.sources.readers import text_of
from sctd.errors import UserError

_UNKNOWN_BYTES = 100_000_000  # of text in each file of a data set that does not tell its size


def plan_hub(source: int, spec: str) -> list[Piece]:
    """A piece for each file that the data set streams from."""
    found = _opened(spec)
    name, _, split = _parts(spec)
    size = (found.info.splits or {}).get(split, None) if found.info else None
    count = found.num_shards
    here = sum(path.stat().st_size for path in Path(name).rglob("*") if path.is_file())
    total = getattr(size, "num_bytes", None) or here or count * _UNKNOWN_BYTES
    return [
        Piece(source, spec, "hub", number, count, total // count, title)
        for number, title in enumerate(titles(spec, count))
    ]


def read_hub(piece: Piece, form: Form, faults: Faults) -> Iterator[str]:
    """The field of one shard's records."""
    row = 0
    try:
        for record in _opened(piece.spec).shard(num_shards=piece.end, index=piece.start):
            row += 1
            text = text_of(record, form.field, partial("{}, row {}".format, piece.title, row), faults)
            if text is not None:
                yield text
    except UserError:
        raise
    except Exception as error:  # the hub client raises from a dozen unrelated classes
        problem = str(_unreadable(piece.title, row, error))
        faults.found("unreadable", lambda: problem)


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
        raise _unreadable(spec, 0, error) from error


def _unreadable(where: str, row: int, error: Exception) -> UserError:
    return UserError(
        f"{where}: cannot be read after row {row} ({type(error).__name__}: {one_line(error)}); check the name, config "
        "and split, and that this machine reaches the hub"
    )
