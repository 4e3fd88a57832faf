"""Text files, read from any byte on: .txt and .jsonl, plain and compressed.

A piece is a range of bytes [a, b) of the decompressed text. Let A be the beginning of the first line behind a (0 for
the first piece), and B likewise; the lines from A to B are the piece's. What is read before A of a compressed file is
decompressed and thrown away.
"""

import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from sctd.corpus.sources.pieces import Faults, Form, Piece, pieces_from
from sctd.errors import UserError, one_line

ENDINGS = (".txt", ".jsonl", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".xz", ".zst")
EMPTY = "is empty; remove it, or fetch it again"
MAX_TEXT_FILE_DOCUMENT = 1 << 20  # characters; a .txt without blank lines must not become one document of many GB
_BLOCK = 1 << 20
_PROBE = 4 << 20  # bytes of text that tell how far a file is compressed
BROKEN = (EOFError, lzma.LZMAError, zlib.error, OSError)

Stream = IO[bytes] | io.BufferedIOBase


def ending_of(path: Path) -> str:
    """The ending that tells the form, without that of the compression. UserError for an unknown one."""
    ending = path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix
    if ending not in ENDINGS:
        raise UserError(
            f"{path}: unknown ending; known are {', '.join(ENDINGS)}, each also with {', '.join(COMPRESSIONS)}"
        )
    return ending


def plan_text(source: int, path: Path, form: Form, piece_bytes: int) -> list[Piece]:
    """Equal ranges of about `piece_bytes`; a file that holds one document is one piece."""
    size = _text_bytes(path)
    whole = ending_of(path) == ".txt" and form.txt == "file"
    parts = 1 if whole else max(1, round(size / piece_bytes))
    starts = [size * part // parts for part in range(parts)]
    return pieces_from(source, str(path), "text", path.name, starts, [size // parts] * parts)


def _text_bytes(path: Path) -> int:
    """Of the decompressed text: known, or estimated from its beginning."""
    size = path.stat().st_size
    if path.suffix not in COMPRESSIONS or size == 0:
        return size
    try:
        with path.open("rb", buffering=0) as raw:
            stream = open_text(path, raw)
            text, taken = len(stream.read(_PROBE)), min(size, raw.tell())
    except BROKEN:
        return size  # the reader will say what is wrong with it
    return size if not text else max(1, int(size * text / max(1, taken)))


def open_text(path: Path, raw: Any = None) -> Stream:
    """The decompressed bytes of a file, or of `raw` in its place."""
    if path.suffix in COMPRESSIONS and path.stat().st_size == 0:
        raise EOFError("no bytes")  # gzip and zstd would read it as an empty text
    if path.suffix == ".gz":
        return gzip.open(raw or path, "rb")
    if path.suffix == ".xz":
        return lzma.open(raw or path, "rb")
    if path.suffix == ".zst":
        return _open_zstd(path, raw)
    return path.open("rb", buffering=_BLOCK)


def _open_zstd(path: Path, raw: Any) -> io.BufferedReader:
    # pyarrow comes with `datasets` and, unlike zstandard's stream_reader, reports a truncated file.
    import pyarrow

    if not pyarrow.Codec.is_available("zstd"):
        raise UserError(f"{path}: this pyarrow cannot read zstd; pip install a pyarrow wheel or recompress to .xz")
    file = str(path) if raw is None else pyarrow.PythonFile(raw, mode="r")
    return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"), _BLOCK)  # type: ignore[arg-type]


# ---- reading -----------------------------------------------------------------------------------------------------


def read_text(piece: Piece, form: Form, faults: Faults) -> Iterator[str]:
    """Documents of a range of a file."""
    path = Path(piece.spec)
    if path.stat().st_size == 0:
        faults.found("empty", str(path), EMPTY)
        return
    lines = _Lines(path, piece, faults)
    if ending_of(path) == ".jsonl":
        yield from _json_documents(lines, form.field, faults)
    elif form.txt == "file":
        text = lines.decoded(0, b"".join(raw for _, raw in lines))
        if text is not None:
            yield text
    else:
        yield from _text_documents(lines, piece)


class _Lines:
    """(offset, line with its end) from A on, without an end: the caller knows where to stop."""

    def __init__(self, path: Path, piece: Piece, faults: Faults) -> None:
        self.path, self._faults = path, faults
        self.end = piece.end  # b
        self._first = piece.start  # A, as soon as it is found
        self._given = 0  # lines so far

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        offset = self._first
        begun = offset == 0
        try:
            with open_text(self.path) as stream:
                _skip(stream, offset)
                if offset:
                    offset += len(stream.readline())
                self._first, begun = offset, True
                for raw in stream:
                    self._given += 1
                    yield offset, raw
                    offset += len(raw)
                if offset == 0:
                    self._faults.found("empty", str(self.path), EMPTY)
        except BROKEN as error:
            if not begun and self._faults.on_error == "skip":
                return  # the file breaks off before this piece begins: the piece that holds the break counts it
            if isinstance(error, OSError) and error.errno:
                self._faults.found("unreadable", str(self.path), f"cannot be read ({error.strerror})")
                return
            place = f"line {self._number}" if self._number else "its beginning"
            problem = f"compressed file is truncated or damaged after {place} ({one_line(error)}); fetch it again"
            self._faults.found("truncated", str(self.path), problem)

    def decoded(self, offset: int, raw: bytes) -> str | None:
        """The text of a line, or None where it is not UTF-8 and faults are skipped."""
        try:
            # Only a file's beginning can hold a byte order mark.
            return raw.decode("utf-8-sig" if offset == 0 else "utf-8")
        except UnicodeDecodeError as error:
            start = len(raw) - len(error.object) + error.start  # the error does not count the byte order mark
            behind = raw[start:-1].count(b"\n")  # lines, where `raw` is more than one
            self._faults.found(
                "undecodable",
                lambda: f"{self.path}, line {self._number - behind}, byte {offset + start}",
                f"byte 0x{raw[start]:02x} is not valid UTF-8; convert the file to UTF-8",
            )
            return None

    def where(self) -> str:
        """The place of the line that was given last."""
        return f"{self.path}, line {self._number}"

    @property
    def _number(self) -> int:
        return self._before + self._given

    @cached_property
    def _before(self) -> int:
        """Lines before A. Reads the file from its beginning, as far as it can be read."""
        count, left = 0, self._first
        with suppress(*BROKEN), open_text(self.path) as stream:
            while left > 0 and (block := stream.read(min(_BLOCK, left))):
                count += block.count(b"\n")
                left -= len(block)
        return count


def _skip(stream: Stream, count: int) -> None:
    if count and isinstance(stream, io.BufferedReader) and isinstance(stream.raw, io.FileIO):
        stream.seek(count)
        return
    while count > 0 and (block := stream.read(min(_BLOCK, count))):
        count -= len(block)


def _json_documents(lines: _Lines, field: str, faults: Faults) -> Iterator[str]:
    for offset, raw in lines:
        if lines.end is not None and offset > lines.end:
            return
        if raw.isspace() or (text := lines.decoded(offset, raw)) is None:
            continue
        try:
            record = json.loads(text)
        except (RecursionError, ValueError) as error:
            problem = f"not valid JSON ({one_line(error)}); a .jsonl file has one JSON object a line"
            faults.found("json", lines.where, problem)
            continue
        if (found := text_of(record, field, lines.where, faults)) is not None:
            yield found


def _text_documents(lines: _Lines, piece: Piece) -> Iterator[str]:
    """Between the first blank line at or behind A, which may be the file's beginning, and the first at or behind B.

    A document beyond MAX_TEXT_FILE_DOCUMENT is cut at the next line end; one that holds undecodable bytes is left out.
    """
    document: list[str] = []
    size, mine, is_whole = 0, piece.start == 0, True
    for offset, raw in lines:
        if raw.isspace():
            if document and is_whole and mine:
                yield "\n".join(document)
            document, size, is_whole, mine = [], 0, True, True
            if lines.end is not None and offset > lines.end:
                return
            continue
        if not mine or not is_whole:
            continue
        text = lines.decoded(offset, raw)
        if text is None:
            document, is_whole = [], False
            continue
        document.append(text.rstrip("\r\n"))
        size += len(text)
        if size >= MAX_TEXT_FILE_DOCUMENT:
            yield "\n".join(document)
            document, size = [], 0
    if document and is_whole and mine:
        yield "\n".join(document)


def text_of(record: object, field: str, where: str | Callable[[], str], faults: Faults) -> str | None:
    """The text of a record, or None where it has none and faults are skipped."""
    if not isinstance(record, dict):
        kind, problem = "record", f"expected a JSON object with the key {field!r}, found {type(record).__name__}"
    elif field not in record:
        kind, problem = "field", f"no key {field!r}; its keys are {', '.join(map(str, record)) or 'none'}"
    elif not isinstance(text := record[field], str):
        kind, problem = "record", f"{field!r} is {type(text).__name__}, not a string; fix or remove this entry"
    else:
        try:
            text.encode("utf-8")  # JSON can spell half of a surrogate pair, which no tokenizer takes
            return text
        except UnicodeEncodeError as error:
            kind, found = "undecodable", "half of a surrogate pair, or a byte that is not valid UTF-8,"
            problem = f"{field!r} holds {found} at character {error.start}; fix or remove this entry"
    faults.found(kind, where, problem)
    return None
