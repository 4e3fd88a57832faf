"""A small corpus that needs no network: the English documentation that every Python carries, about 2 MB."""

import ast
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

MIN_EMBEDDED_WORDS = 5
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "turtledemo", "site-packages", "dist-packages",
                   "__pycache__"}  # fmt: skip


def embedded_documents() -> Iterator[str]:
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
