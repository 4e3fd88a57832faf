"""Streams of documents from a source spec; nothing here ever holds a corpus in memory.

A spec is one of
    embedded                    English documentation that every Python carries (about 2 MB, needs no network)
    path or glob                .txt (documents separated by blank lines), .jsonl (key "text"), .parquet (column
                                "text"); text and JSON lines also with .gz, .xz or .zst
    hf:name[:config[:split]]    a data set of the Hugging Face hub (or a folder it can load), streamed

Every fault of the data is a one-line UserError that names the file and the line or row.
"""

import ast
import glob
import gzip
import io
import json
import lzma
import os
import platform
import re
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from sctd.errors import UserError

Document = str

KNOWN_ENDINGS = (".txt", ".jsonl", ".parquet")
KNOWN_COMPRESSIONS = (".gz", ".xz", ".zst")
MAX_TEXT_FILE_DOCUMENT = 1 << 20  # characters; a .txt without blank lines must not become one document of many GB
MIN_EMBEDDED_WORDS = 5
PARQUET_BATCH_ROWS = 1024
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "turtledemo", "site-packages", "dist-packages",
                   "__pycache__"}  # fmt: skip


def read_all(sources: Iterable[str]) -> Iterator[Document]:
    """Documents of several sources, one source after the other."""
    for source in sources:
        yield from read_documents(source)


def read_documents(source: str) -> Iterator[Document]:
    """Documents of one source spec in a fixed order; blank documents are left out. Raises UserError, see above."""
    if source == "embedded":
        return embedded_documents()
    if source.startswith("hf:"):
        return hub_documents(source)
    return (document for path in source_files(source) for document in read_file(path))


def fingerprint(source: str) -> dict[str, Any]:
    """What identifies the text behind a spec without reading it: names, sizes and mtimes of local files."""
    if source == "embedded":
        return {"spec": source, "python": platform.python_version()}
    if source.startswith("hf:"):
        return {"spec": source}
    files = [(path, path.stat()) for path in source_files(source)]
    return {"spec": source, "files": [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in files]}


# ---- local files -------------------------------------------------------------------------------------------------


def source_files(source: str) -> list[Path]:
    """Local files of a path or glob, sorted by name. UserError if none matches or one has an unknown ending."""
    expanded = os.path.expanduser(source)
    if os.path.isdir(expanded):
        raise UserError(f"{source}: is a folder; name its files with a glob, for example {source.rstrip('/')}/*.jsonl")
    # A name that exists is taken literally, so that brackets in file names need no escaping.
    names = [expanded] if os.path.isfile(expanded) else glob.glob(expanded, recursive=True)
    paths = [Path(name) for name in sorted(names) if os.path.isfile(name)]
    if not paths:
        raise UserError(f"{source}: no file matches; check the path or quote the glob (a hub data set is hf:name)")
    for path in paths:
        _reader_for(path)
    return paths


def read_file(path: Path) -> Iterator[Document]:
    """Documents of one file, in file order; the unit of work to hand to a rank."""
    return _reader_for(path)(path)


def _reader_for(path: Path) -> Callable[[Path], Iterator[Document]]:
    ending, compression = path.suffix, ""
    if ending in KNOWN_COMPRESSIONS:
        ending, compression = path.with_suffix("").suffix, ending
    readers = {".txt": _text_documents, ".jsonl": _json_documents, ".parquet": _parquet_documents}
    if ending not in readers or (compression and ending == ".parquet"):
        known = ", ".join(KNOWN_ENDINGS)
        raise UserError(
            f"{path}: unknown ending; known are {known}, and .txt and .jsonl also with {', '.join(KNOWN_COMPRESSIONS)}"
        )
    return readers[ending]


def _text_documents(path: Path) -> Iterator[Document]:
    """Documents separated by blank lines; one beyond MAX_TEXT_FILE_DOCUMENT is cut at the next line end."""
    lines: list[str] = []
    size = 0
    for _, line in _lines(path):
        if line.strip():
            lines.append(line)
            size += len(line)
        if lines and (not line.strip() or size >= MAX_TEXT_FILE_DOCUMENT):
            yield "\n".join(lines)
            lines, size = [], 0
    if lines:
        yield "\n".join(lines)


def _json_documents(path: Path) -> Iterator[Document]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{where}: not valid JSON ({error}); a .jsonl file has one JSON object a line") from error
        text = _text_of(record, where)
        if text.strip():
            yield text


def _parquet_documents(path: Path) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if "text" not in columns:
                raise UserError(f"{path}: no column 'text'; its columns are {', '.join(columns)}")
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    text = _text_of({"text": text}, f"{path}, row {row}")
                    if text.strip():
                        yield text
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as Parquet after row {row} ({one_line(error)})") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines (from 1) without their ends, decompressed and decoded as UTF-8."""
    number = 0
    try:
        with _open(path) as stream:
            for number, raw in enumerate(stream, 1):
                # Only the first line can start with a byte order mark.
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        bad = error.object[error.start]
        raise UserError(
            f"{path}, line {number}: byte 0x{bad:02x} is not valid UTF-8; convert the file to UTF-8"
        ) from error
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        raise UserError(
            f"{path}: compressed file is truncated or damaged after line {number} ({one_line(error)}); fetch it again"
        ) from error


def _open(path: Path) -> IO[bytes] | io.BufferedIOBase:
    compression = path.suffix if path.suffix in KNOWN_COMPRESSIONS else ""
    if compression and path.stat().st_size == 0:
        raise EOFError("no bytes")  # gzip and zstd would read it as an empty text
    if compression == ".gz":
        return gzip.open(path, "rb")
    if compression == ".xz":
        return lzma.open(path, "rb")
    if compression == ".zst":
        return _open_zstd(path)
    return path.open("rb", buffering=1 << 20)


def _open_zstd(path: Path) -> io.BufferedIOBase:
    # pyarrow comes with `datasets` and, unlike zstandard's stream_reader, reports a truncated file.
    import pyarrow

    if not pyarrow.Codec.is_available("zstd"):
        raise UserError(f"{path}: this pyarrow cannot read zstd; pip install a pyarrow wheel or recompress to .xz")
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 1 << 20)  # type: ignore[arg-type]


def _text_of(record: object, where: str) -> Document:
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object with the key 'text', found {type(record).__name__}")
    if "text" not in record:
        raise UserError(f"{where}: no key 'text'; its keys are {', '.join(map(str, record)) or 'none'}")
    text = record["text"]
    if not isinstance(text, str):
        raise UserError(f"{where}: 'text' is {type(text).__name__}, not a string; fix or remove this entry")
    try:
        text.encode("utf-8")  # JSON can spell half of a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: 'text' holds half of a surrogate pair at character {error.start}; fix or remove this entry"
        ) from error
    return text


def one_line(error: BaseException) -> str:
    """The text of a foreign exception, fit for a one-line message."""
    return " ".join(str(error).split())[:300] or type(error).__name__


# ---- hub ---------------------------------------------------------------------------------------------------------


def hub_documents(source: str) -> Iterator[Document]:
    """Column "text" of `hf:name[:config[:split]]`, streamed. The split is "train" unless named."""
    parts = source.removeprefix("hf:").split(":")
    if not parts[0] or len(parts) > 3:
        raise UserError(f"{source}: a hub data set is written hf:name, hf:name:config or hf:name:config:split")
    name, config, split = parts + [""] * (3 - len(parts))
    import datasets

    row = 0
    try:
        for record in datasets.load_dataset(name, config or None, split=split or "train", streaming=True):
            row += 1
            text = _text_of(record, f"{source}, row {row}")
            if text.strip():
                yield text
    except UserError:
        raise
    except Exception as error:  # the hub client raises from a dozen unrelated classes
        raise UserError(
            f"{source}: cannot be read after row {row} ({type(error).__name__}: {one_line(error)}); check the name, "
            "config and split, and that this machine reaches the hub"
        ) from error


# ---- embedded ----------------------------------------------------------------------------------------------------


def embedded_documents() -> Iterator[Document]:
    """The language reference that pydoc carries (a document a topic) and the standard library's docstrings (a
    document for each module's own, each top-level function and each class with all in it), in source order, without
    exact duplicates. Depends on nothing but the Python version."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for _, topic in sorted(topics.items()):
        if document := _new_text(topic, seen):
            yield document
    for path in _library_files(Path(sysconfig.get_path("stdlib"))):
        for docstrings in _file_docstrings(path):
            if paragraphs := [text for docstring in docstrings if (text := _new_text(docstring, seen))]:
                yield "\n".join(paragraphs)


def _new_text(raw: str, seen: set[str]) -> str:
    """`raw` with each paragraph on one line; empty if it is trivial or was seen before."""
    raw = re.sub(r"(?m)^[^\w\s]{3,}$", "", raw)  # underlines of headings
    text = "\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", raw.strip()))
    if len(text.split()) < MIN_EMBEDDED_WORDS or text in seen:
        return ""
    seen.add(text)
    return text


def _library_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def _file_docstrings(path: Path) -> list[list[str]]:
    """The docstrings of a source file, one list for the module's own and one for each of its statements."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escape sequences in the library's own sources
            module = ast.parse(path.read_text(encoding="utf-8"))
        return [[ast.get_docstring(module) or ""], *(list(_docstrings(child)) for child in module.body)]
    except (UnicodeDecodeError, SyntaxError, ValueError, OSError):
        return []


def _docstrings(node: ast.AST) -> Iterator[str]:
    documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    if isinstance(node, documented) and (docstring := ast.get_docstring(node)):
        yield docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield from _docstrings(child)
