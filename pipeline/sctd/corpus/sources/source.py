"""Sources of text, and their cut into pieces, which does not depend on who will read them.

A source is one of
    embedded                    English documentation that every Python carries (about 2 MB, needs no network)
    path or glob                .txt, .jsonl (a key of each line), .parquet and .arrow (a column); all of them also with
                                .gz, .xz or .zst
    hf:name[:config[:split]]    a data set of the Hugging Face hub (or a folder it can load), streamed

Every fault of the data is a one-line UserError that names the file and the line or row.
"""

import glob
import os
import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sctd.corpus.sources.embedded import embedded_documents
from sctd.corpus.sources.hub import plan_hub, read_hub
from sctd.corpus.sources.pieces import Faults, Form, Piece, pieces_from
from sctd.corpus.sources.readers import ending_of, plan_text, read_text
from sctd.errors import UserError

EMBEDDED = "embedded"
HUB = "hf:"
_EMBEDDED_BYTES = 2_000_000
_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Source:
    """A source under the name that weights, limits and the report call it by."""

    name: str
    spec: str


def parse_sources(texts: Sequence[str]) -> tuple[Source, ...]:
    """`SPEC` or `NAME=SPEC` each. UserError for two of one name, and for none at all."""
    if not texts:
        raise UserError("no source given; name files, a glob, hf:name or embedded")
    sources: list[Source] = []
    for text in texts:
        name, separator, spec = text.partition("=")
        given = bool(separator) and _NAME.fullmatch(name) is not None and not os.path.exists(text)
        if not given:
            name, spec = _name_of(text), text
        if not spec:
            raise UserError(f"--source {text}: names no file; write it as NAME=SPEC")
        taken = {source.name for source in sources}
        if given and name in taken:
            raise UserError(f"--source {text}: two sources are called {name!r}; give them different names")
        numbers = iter(range(2, len(texts) + 2))
        plain = name
        while name in taken:
            name = f"{plain}-{next(numbers)}"
        sources.append(Source(name, spec))
    return tuple(sources)


def _name_of(spec: str) -> str:
    if spec.startswith(HUB):
        spec = spec.removeprefix(HUB).split(":")[0]
    name = re.sub(r"[^\w.-]+", "", Path(spec).name.split(".")[0]).strip("-_.")
    return name or re.sub(r"[^\w.-]+", "", Path(spec).parent.name) or "text"


def fingerprint(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """What identifies the text without reading it: names, specs, and of local files names, sizes and mtimes."""
    found: list[dict[str, Any]] = []
    for source in sources:
        facts: dict[str, Any] = {"name": source.name, "spec": source.spec}
        if source.spec == EMBEDDED:
            facts["python"] = platform.python_version()
        elif paths := _local_files(source.spec):
            files = [(path, path.stat()) for path in paths]
            facts["files"] = [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in files]
        found.append(facts)
    return found


def _local_files(spec: str) -> list[Path]:
    """Files of this machine, none for a data set of the hub."""
    if not spec.startswith(HUB):
        return source_files(spec)
    folder = Path(spec.removeprefix(HUB).split(":")[0])
    return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []


def plan_pieces(sources: Sequence[Source], form: Form, piece_bytes: int) -> list[Piece]:
    """The pieces of all sources in reading order, of about so many bytes of text each. UserError, see above."""
    pieces: list[Piece] = []
    for number, source in enumerate(sources):
        if source.spec == EMBEDDED:
            pieces += pieces_from(number, EMBEDDED, EMBEDDED, "the embedded corpus", [0], [_EMBEDDED_BYTES])
        elif source.spec.startswith(HUB):
            pieces += plan_hub(number, source.spec)
        else:
            for path in source_files(source.spec):
                plan = plan_text
                if ending_of(path) in (".parquet", ".arrow"):
                    from sctd.corpus.sources.tables import plan_table as plan
                pieces += plan(number, path, form, piece_bytes)
    return pieces


def read_piece(piece: Piece, form: Form, faults: Faults) -> Iterator[str]:
    """The documents of a piece that are not blank, in their order."""
    if piece.kind == EMBEDDED:
        documents = embedded_documents()
    elif piece.kind == "text":
        documents = read_text(piece, form, faults)
    elif piece.kind == "hub":
        documents = read_hub(piece, form, faults)
    else:
        from sctd.corpus.sources.tables import read_table

        documents = read_table(piece, form, faults)
    return (document for document in documents if document.strip())


def read_documents(spec: str) -> Iterator[str]:
    """All documents of one spec in a fixed order; the first fault is raised."""
    form = Form()
    for piece in plan_pieces([Source("text", spec)], form, 1 << 62):
        yield from read_piece(piece, form, Faults())


def source_files(spec: str) -> list[Path]:
    """Local files of a path or glob, sorted by name. UserError if none matches or one has an unknown ending."""
    expanded = os.path.expanduser(spec)
    if os.path.isdir(expanded):
        raise UserError(f"{spec}: is a folder; name its files with a glob, for example {spec.rstrip('/')}/*.jsonl")
    # A name that exists is taken literally, so that brackets in file names need no escaping.
    names = [expanded] if os.path.isfile(expanded) else glob.glob(expanded, recursive=True)
    paths = [Path(name) for name in sorted(names) if not os.path.isdir(name)]
    if not paths:
        raise UserError(f"{spec}: no file matches; check the path or quote the glob (a hub data set is hf:name)")
    for path in paths:
        ending_of(path)
        if not path.is_file():
            raise UserError(f"{path}: is a broken link or not a regular file; repair or remove it")
        if str(path) != os.fsencode(path).decode("utf-8", "replace"):
            raise UserError(f"{ascii(str(path))}: the name of the file is not UTF-8; rename it")
    return paths
