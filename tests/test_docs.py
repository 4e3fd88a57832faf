"""What README and docs name is there: links, files, options, keys, and the drawing of the house."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from readme import COMMANDS, PAGES
from sctd.cli import main
from sctd.config import keys
from support import ROOT

PACKAGE = ROOT / "pipeline" / "sctd"
BASES = (ROOT, ROOT / "docs", PACKAGE)


def _code(text: str) -> list[str]:
    """Code within sentences and tables."""
    return [
        " ".join(found.split()) for found in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    ]


CODE = {page: [*_code(text), *COMMANDS[page]] for page, text in PAGES.items()}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[page]):
        file, _, heading = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        if heading:
            assert heading in _anchors(target.read_text(encoding="utf-8")), link


def test_no_placeholder_is_left() -> None:
    assert not [page for page, text in PAGES.items() if re.search(r"RESULT_|ARMS_|TODO|TBD", text)]


def test_every_page_is_in_the_table_of_contents() -> None:
    assert not [page for page in PAGES if page != "README.md" and f"]({page})" not in PAGES["README.md"]]


def _anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_are_there(page: str) -> None:
    for name in re.findall(r"[\w./-]+\.(?:py|cuh?|sh)\b", PAGES[page]):
        found = any((base / name).is_file() for base in BASES)
        assert found or ("/" not in name and any(ROOT.glob(f"[pk]*/**/{name}"))), name
    for name in re.findall(r"\b(?:ds_configs|benchmarks|pipeline|slurm|tests)/[\w./-]*\w", PAGES[page]):
        assert (ROOT / name).exists(), name


def test_folders_of_the_tour_are_there() -> None:
    for name in re.findall(r"`([\w/]+/)`", PAGES["docs/architecture.md"]):
        assert any((base / name).is_dir() for base in BASES), name


def test_keys_are_those_of_the_configuration() -> None:
    known = {"section.key", *keys()}
    for page, code in CODE.items():
        named = {key for text in code for key in re.findall(r"(?:^|[\s'`])([a-z_]+\.[a-z_]+|arm)=", text)}
        assert named <= known, (page, named - known)


def test_verbs_have_the_options_that_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    helps = {"": ""}
    for page, code in CODE.items():
        for text in code:
            for verb, rest in re.findall(r"\bsctd ([a-z][a-z-]+)(.*)", text):
                if verb not in helps:
                    with pytest.raises(SystemExit):  # which an unknown verb does not raise
                        main([verb, "--help"])
                    helps[verb] = capsys.readouterr().out
                assert not [option for option in _options(rest) if option not in _options(helps[verb])], (
                    f"{page}: {text}"
                )
    every = {option for text in helps.values() for option in _options(text)} | {"--resume"}
    bare = {(page, option) for page, code in CODE.items() for text in code for option in _options(text[:40])
            if text.startswith("--")}  # fmt: skip
    assert not [(page, option) for page, option in bare if option not in every]


def _options(text: str) -> list[str]:
    return re.findall(r"(?<![\w-])--[a-z][a-z_-]*", text)


def test_targets_of_make_are_there() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = {word for code in CODE.values() for text in code for word in re.findall(r"^make ([a-z]+)", text)}
    assert named <= {*targets}


def test_the_drawing_of_the_house_is_what_imports_say() -> None:
    drawing = [line.split("|")[0].split() for line in PAGES["docs/architecture.md"].splitlines() if _is_floor(line)]
    floors = {name.strip("/").removesuffix(".py"): level for level, names in enumerate(drawing) for name in names}
    rooms = {path.stem for path in PACKAGE.iterdir() if path.name[0] not in "._" and path.name != "py.typed"}
    assert floors.keys() == rooms
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for imported in _imports(path):
            below = room == imported or room.startswith("__") or floors[room] < floors[imported]
            assert below, f"{path} imports {imported}"


def _is_floor(line: str) -> bool:
    return re.match(r"    [a-z][\w/. ]*\|", line) is not None


def _imports(path: Path) -> Iterator[str]:
    """The rooms that a module imports from."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sctd":
            names = [node.module] if "." in str(node.module) else [f"sctd.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("sctd.")]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name and not name.startswith("sctd.__"))
