"""Columns of Parquet and Arrow files. A compressed table is unpacked into a temporary file and is one piece."""

import errno
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from sctd.corpus.sources.pieces import Faults, Form, Piece, pieces_from
from sctd.corpus.sources.readers import BROKEN, COMPRESSIONS, EMPTY, ending_of, open_text, text_of
from sctd.errors import one_line

_BATCH_ROWS = 1024
_ARROW_MAGIC = b"ARROW1"
_UNREADABLE = (pyarrow.ArrowException, UnicodeDecodeError, *BROKEN)


def plan_table(source: int, path: Path, form: Form, piece_bytes: int) -> list[Piece]:
    """Runs of row groups or record batches of about `piece_bytes`. A table that cannot be opened is one piece: its
    reader says what is wrong."""
    kind = ending_of(path)[1:]
    sizes = [path.stat().st_size]
    if path.suffix not in COMPRESSIONS and sizes[0]:
        with suppress(*_UNREADABLE):
            sizes = _group_bytes(path, form.field) if kind == "parquet" else _batch_bytes(path, form.field)
    starts, run = [0], 0
    for number, size in enumerate(sizes):
        if run and run + size > piece_bytes:
            starts.append(number)
            run = 0
        run += size
    runs = [sum(sizes[start:end]) for start, end in itertools.zip_longest(starts, starts[1:])]
    return pieces_from(source, str(path), kind, path.name, starts, runs)


def read_table(piece: Piece, form: Form, faults: Faults) -> Iterator[str]:
    """The field of the rows of some row groups or record batches."""
    path = Path(piece.spec)
    if path.stat().st_size == 0:
        faults.found("empty", str(path), EMPTY)
        return
    row = 0
    try:
        with _unpacked(path) as plain:
            for row, texts in (_parquet if piece.kind == "parquet" else _arrow)(plain, piece, form.field):
                for text in texts:
                    row += 1
                    found = text_of({form.field: text}, form.field, f"{path}, row {row}", faults)
                    if found is not None:
                        yield found
    except _MissingColumn as error:
        faults.found("field", str(path), f"no column {form.field!r}; its columns are {error}")
    except _UNREADABLE as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise  # of the temporary file: no fault of the data
        problem = f"cannot be read as {piece.kind.capitalize()} after row {row} ({one_line(error)}); fetch it again"
        faults.found("unreadable", str(path), problem)


class _MissingColumn(Exception):
    """A table without the field; the message lists its columns."""


@contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    if path.suffix not in COMPRESSIONS:
        yield path
        return
    with tempfile.NamedTemporaryFile(suffix=ending_of(path)) as file:
        with open_text(path) as stream:
            shutil.copyfileobj(stream, file, 1 << 20)
        file.flush()
        yield Path(file.name)


def _parquet(plain: Path, piece: Piece, field: str) -> Iterator[tuple[int, list[Any]]]:
    """(rows before, texts) of each batch."""
    with pyarrow.parquet.ParquetFile(plain) as file:
        _check_column(field, file.schema_arrow.names)
        groups = range(file.num_row_groups)[piece.start : piece.end]
        row = sum(file.metadata.row_group(number).num_rows for number in range(piece.start))
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=list(groups), columns=[field]):
            yield row, _texts(batch.column(0))
            row += len(batch)


def _group_bytes(path: Path, field: str) -> list[int]:
    with pyarrow.parquet.ParquetFile(path) as file:
        columns = range(file.metadata.num_columns)
        place = next((n for n in columns if file.metadata.schema.column(n).path == field), None)
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        if place is None:
            return [group.total_byte_size for group in groups]
        return [group.column(place).total_uncompressed_size for group in groups]


def _arrow(plain: Path, piece: Piece, field: str) -> Iterator[tuple[int, list[Any]]]:
    """(rows before, texts) of each stretch of a batch."""
    row = 0
    with _batches(plain) as (names, batches):
        _check_column(field, names)
        for number, batch in enumerate(itertools.islice(batches, piece.end)):
            if number >= piece.start:
                column = batch.column(names.index(field))
                for start in range(0, len(column), _BATCH_ROWS):
                    yield row + start, _texts(column[start : start + _BATCH_ROWS])
            row += len(batch)


def _batch_bytes(path: Path, field: str) -> list[int]:
    with _batches(path) as (names, batches):
        place = names.index(field) if field in names else 0
        return [batch.column(place).nbytes for batch in batches]


@contextmanager
def _batches(path: Path) -> Iterator[tuple[list[str], Iterator[Any]]]:
    """Names of the columns and the record batches of an Arrow file, or of the stream that `datasets` stores."""
    with pyarrow.memory_map(str(path)) as source:
        is_file = source.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC
        source.seek(0)
        if is_file:
            file = pyarrow.ipc.open_file(source)
            yield file.schema.names, map(file.get_batch, range(file.num_record_batches))
        else:
            stream = pyarrow.ipc.open_stream(source)
            yield stream.schema.names, iter(stream)


def _texts(column: Any) -> list[Any]:
    """The values of a column; bytes that are not UTF-8 become halves of surrogate pairs, which are refused later."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        kind = pyarrow.large_binary() if pyarrow.types.is_large_string(column.type) else pyarrow.binary()
        raw = column.cast(kind).to_pylist()
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in raw]


def _check_column(field: str, columns: list[str]) -> None:
    if field not in columns:
        raise _MissingColumn(", ".join(columns))
