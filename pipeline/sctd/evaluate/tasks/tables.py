"""Files of rows, as entries with named values: .tsv and .txt (tabs, no quoting), .csv, .jsonl, .parquet, and the hub's.

Lines are read here and not by a library: what is wrong with a file is said with the number of its line.
"""

import csv
import itertools
import json
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sctd.errors import UserError
from sctd.evaluate.tasks.task import Task

_SHOWN = 200  # characters of what stands in a line
_BATCH_ROWS = 1000
NO_LABEL = "-"  # MultiNLI's word for a row whose annotators did not agree


@dataclass(frozen=True)
class Entry:
    """One line, row, question or sentence of a file or hub data set.

    Args:
        where: it stands, for messages. values: by the names of their columns.
    """

    where: str
    values: dict[str, Any]

    def wrong(self, problem: str) -> UserError:
        return UserError(f"{self.where}: {problem}")

    def value(self, names: Sequence[str]) -> Any:
        """The value in the first of these columns that is there.

        Raises:
            UserError: there is none of them, or no value in it.
        """
        name = next((name for name in names if name in self.values), None)
        if name is None:
            raise self.wrong(_no_column(names, self.values))
        if self.values[name] is None:
            raise self.wrong(f"column '{name}' has no value: fill it in or remove the row")
        return self.values[name]

    def text(self, *names: str) -> str:
        """The same of a column that must hold text."""
        value = self.value(names)
        if not isinstance(value, str):
            raise self.wrong(f"column {_either(names)} must hold text, found {type(value).__name__}")
        return value


def table_entries(path: Path, wanted: Sequence[Sequence[str]], columns: Sequence[str]) -> Iterator[Entry]:
    """The entries of a table in a file; it is read as they are asked for, and faults come up there, as UserError.

    Args:
        wanted: for each value that is needed, the names that its column may have. A first line of text in which all
            of them are found is a header.
        columns: names of the columns where there is no header; () where there must be one.
    """
    if path.suffix == ".jsonl":
        return _json_lines(path)
    if path.suffix == ".parquet":
        return _parquet(path)
    return _lines_of_cells(path, wanted, columns)


def hub_entries(task: Task, split: str) -> Iterator[Entry]:
    """A split on the Hugging Face hub, read by `datasets`, which keeps it on this machine.

    Raises:
        UserError: the hub has none, or cannot be reached.
    """
    import datasets

    hub = task.hub
    assert hub is not None
    if split not in hub.splits:
        raise UserError(f"{task.name}: {hub.id} has no split for {split}: give --data-dir with the task's files")
    try:
        found = datasets.load_dataset(hub.id, hub.config, split=hub.splits[split], revision=hub.revision)
    except Exception as error:  # the hub client raises from a dozen unrelated classes
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(
            f"{task.name}: {hub.id} cannot be read from the hub ({reason}): give --data-dir with the task's files"
        ) from None
    return _rows(hub.id, found)


def read_text(path: Path) -> str:
    """The whole of a UTF-8 file, without a byte order mark.

    Raises:
        UserError: it cannot be read, or other bytes are in it.
    """
    try:
        return path.read_bytes().decode().removeprefix("\ufeff")
    except OSError as error:
        raise _unreadable(path, error) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: the byte at offset {error.start} is not UTF-8: convert the file, or download it again"
        ) from None


def lines(path: Path) -> Iterator[str]:
    """Its lines without their ends, read one by one; the same errors."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file):
                yield raw.decode("utf-8" if number else "utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        read_text(path)  # says where
    except OSError as error:
        raise _unreadable(path, error) from None


# ---- forms -------------------------------------------------------------------------------------------------------


def _lines_of_cells(path: Path, wanted: Sequence[Sequence[str]], columns: Sequence[str]) -> Iterator[Entry]:
    header: list[str] | None = None
    for number, cells in _cells(path):
        where = f"{path}, line {number}"
        if header is None:
            stripped = [cell.strip() for cell in cells]
            missing = [names for names in wanted if not set(names) & set(stripped)]
            if not missing:
                header = stripped
                continue
            if not columns:
                raise UserError(f"{where}: {_no_column(missing[0], stripped)}")
            header = []
        expected = header or columns
        if len(cells) < len(expected) or (header and len(cells) > len(expected)):
            raise UserError(
                f"{where}: {len(cells)} columns where {len(expected)} are expected ({', '.join(expected)}): "
                "correct the line"
            )
        yield Entry(where, dict(zip(expected, cells, strict=False)))


def _cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of the lines that are not blank. Tabs in the first line make any file one without quoting."""
    rest = lines(path)
    first = next(rest, "")
    found = itertools.chain([first], rest)
    if path.suffix != ".csv" or "\t" in first:
        yield from ((number, line.split("\t")) for number, line in enumerate(found, 1) if line.strip())
        return
    reader = csv.reader((line + "\n" for line in found), strict=True)
    try:
        yield from ((reader.line_num, cells) for cells in reader if any(cells))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not valid CSV ({error}): correct its quotes") from None


def _json_lines(path: Path) -> Iterator[Entry]:
    for number, line in enumerate(lines(path), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise UserError(f"{path}, line {number}: not a JSON object: correct the line")
        yield Entry(f"{path}, line {number}", values)


def _parquet(path: Path) -> Iterator[Entry]:
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            found = Dataset(file.read())
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    yield from _rows(str(path), found)


def _rows(name: str, found: Any) -> Iterator[Entry]:
    """Of a `datasets.Dataset`, classes by their names where it knows them."""
    from datasets import ClassLabel

    inner = {column: getattr(feature, "feature", feature) for column, feature in found.features.items()}
    classes = {column: feature.names for column, feature in inner.items() if isinstance(feature, ClassLabel)}
    number = 0
    for batch in found.iter(_BATCH_ROWS):
        for values in zip(*batch.values(), strict=True):
            number += 1
            row = dict(zip(batch, values, strict=True))
            named = {column: _named(row[column], names) for column, names in classes.items()}
            yield Entry(f"{name}, row {number}", row | named)


def _named(value: Any, names: Sequence[str]) -> Any:
    """The name of this class's number, or each of a list's; -1, the hub's number of none, is NO_LABEL."""
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    if not isinstance(value, int) or value >= len(names):
        return value
    return names[value] if value >= 0 else NO_LABEL


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {' '.join(str(error).split())}"
    return UserError(f"{path}: cannot be read ({reason}): download it again")


def _no_column(names: Sequence[str], there: Iterable[str]) -> str:
    found = textwrap.shorten(", ".join(there), _SHOWN, placeholder=" ...")
    return f"no column {_either(names)}; there are {found}: rename the column that holds it"


def _either(names: Sequence[str]) -> str:
    return " or ".join(f"'{name}'" for name in names)
