"""Files of rows, as records with named values: .tsv and .txt (tabs, no quoting), .csv, .jsonl and .parquet."""

import csv
import json
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sctd.errors import UserError

_BOM = b"\xef\xbb\xbf"
_SHOWN = 200  # characters of what stands in a line
NO_LABEL = "-"  # MultiNLI's word for a row whose annotators did not agree

Record = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Records of one file or hub data set.

    Args:
        name: for messages.
        unit: what the places count: line | row | question | sentence at line.
        records: (place from 1, values by the names of their columns).
    """

    name: str
    unit: str
    records: Iterator[tuple[int, Record]]

    def wrong(self, place: int, problem: str) -> UserError:
        """What is wrong with the record of this place."""
        return UserError(f"{self.name}, {self.unit} {place}: {problem}")

    def value(self, place: int, record: Record, names: Sequence[str]) -> Any:
        """The record's value in the first of these columns that it has.

        Raises:
            UserError: it has none of them, or no value there.
        """
        name = next((name for name in names if name in record), None)
        if name is None:
            raise self.wrong(place, _no_column(names, record))
        if record[name] is None:
            raise self.wrong(place, f"column '{name}' has no value: fill it in or remove the row")
        return record[name]

    def text(self, place: int, record: Record, names: Sequence[str]) -> str:
        """The same of a column that must hold text."""
        value = self.value(place, record, names)
        if not isinstance(value, str):
            raise self.wrong(place, f"column {_either(names)} must hold text, found {type(value).__name__}")
        return value


def open_table(path: Path, wanted: Sequence[Sequence[str]], columns: Sequence[str]) -> Table:
    """The table in a file; it is read as its records are asked for, and faults come up there, as UserError.

    Args:
        wanted: for each value that is needed, the names that its column may have. A first line of text in which all
            of them are found is a header.
        columns: names of the columns where there is no header; () where there must be one.
    """
    if path.suffix == ".jsonl":
        return Table(str(path), "line", _json_records(path))
    if path.suffix == ".parquet":
        return Table(str(path), "row", _parquet_records(path))
    return Table(str(path), "line", _cell_records(path, wanted, columns))


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text without its end) of the lines of a UTF-8 file; a byte order mark and CRs are taken away.

    Raises:
        UserError: it cannot be read, or other bytes are in it.
    """
    offset = 0
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                start = len(_BOM) if number == 1 and raw.startswith(_BOM) else 0
                try:
                    yield number, raw[start:].rstrip(b"\r\n").decode()
                except UnicodeDecodeError as error:
                    raise not_utf8(path, offset + start + error.start) from None
                offset += len(raw)
    except OSError as error:
        raise unreadable(path, error) from None


def read_text(path: Path) -> str:
    """The whole of a UTF-8 file, with the same errors."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None
    start = len(_BOM) if raw.startswith(_BOM) else 0
    try:
        return raw[start:].decode()
    except UnicodeDecodeError as error:
        raise not_utf8(path, start + error.start) from None


def not_utf8(path: Path, offset: int) -> UserError:
    """The error for a byte that is no UTF-8."""
    return UserError(f"{path}: the byte at offset {offset} is not UTF-8: convert the file, or fetch it again")


def unreadable(path: Path, error: Exception) -> UserError:
    """The error for a file that the system or its library does not read."""
    reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {' '.join(str(error).split())}"
    return UserError(f"{path}: cannot be read ({reason}): fetch it again")


def named_classes(schema: Any) -> dict[str, list[str]]:
    """Names of the numbers in columns that hold classes or lists of them, of `datasets`' features."""
    from datasets import ClassLabel

    inner = {name: getattr(feature, "feature", feature) for name, feature in schema.items()}
    return {name: feature.names for name, feature in inner.items() if isinstance(feature, ClassLabel)}


def with_names(record: Record, classes: dict[str, list[str]]) -> Record:
    """The record with classes by their names instead of their numbers; -1, the hub's number of none, is NO_LABEL."""

    def name(names: list[str], value: Any) -> Any:
        if isinstance(value, list):
            return [name(names, item) for item in value]
        if not isinstance(value, int) or value >= len(names):
            return value
        return names[value] if value >= 0 else NO_LABEL

    return record | {column: name(names, record[column]) for column, names in classes.items()}


# ---- forms -------------------------------------------------------------------------------------------------------


def _cell_records(path: Path, wanted: Sequence[Sequence[str]], columns: Sequence[str]) -> Iterator[tuple[int, Record]]:
    header: list[str] | None = None
    for number, cells in _cells(path):
        if header is None:
            stripped = [cell.strip() for cell in cells]
            missing = [names for names in wanted if not set(names) & set(stripped)]
            if not missing:
                header = stripped
                continue
            if not columns:
                raise UserError(f"{path}, line {number}: {_no_column(missing[0], stripped)}")
            header = []
        expected = header or columns
        if len(cells) < len(expected) or (header and len(cells) > len(expected)):
            raise UserError(
                f"{path}, line {number}: {len(cells)} columns where {len(expected)} are expected "
                f"({', '.join(expected)}): correct the line"
            )
        yield number, dict(zip(expected, cells, strict=False))


def _cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of the lines that are not blank. Tabs in the first line make any file one without quoting."""
    source = lines(path)
    first = next(source, None)
    if first is None:
        return
    rest = _chain(first, source)
    if path.suffix != ".csv" or "\t" in first[1]:
        yield from ((number, line.split("\t")) for number, line in rest if line.strip())
        return
    reader = csv.reader((line + "\n" for _, line in rest), strict=True)
    try:
        yield from ((reader.line_num, cells) for cells in reader if any(cells))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not valid CSV ({error}): correct its quotes") from None


def _chain(first: tuple[int, str], rest: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield first
    yield from rest


def _json_records(path: Path) -> Iterator[tuple[int, Record]]:
    for number, line in lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: not a JSON object: correct the line")
        yield number, record


def _parquet_records(path: Path) -> Iterator[tuple[int, Record]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            classes: dict[str, list[str]] = {}
            if b"huggingface" in (file.schema_arrow.metadata or {}):
                from datasets import Features

                classes = named_classes(Features.from_arrow_schema(file.schema_arrow))
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield number, with_names(record, classes)
    except (pyarrow.ArrowException, OSError) as error:
        raise unreadable(path, error) from None


def _no_column(names: Sequence[str], there: Iterable[str]) -> str:
    found = textwrap.shorten(", ".join(there), _SHOWN, placeholder=" ...")
    return f"no column {_either(names)}; there are {found}: rename the column that holds it"


def _either(names: Sequence[str]) -> str:
    return " or ".join(f"'{name}'" for name in names)
