"""`sctd report`: runs, ablations and evaluations as one self-contained page, and its tables and pictures as files.

OUT.html       the page
OUT-tables/    README.md, the same for a repository; each table as .csv and .md, each picture as .png
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from sctd import __version__
from sctd.errors import UserError
from sctd.files import new_folder, write_atomically
from sctd.present.page import Section, html_page, html_tiles
from sctd.present.words import escaped, listed, printable
from sctd.report.analyses import ablation_section, drift_section, probe_section
from sctd.report.compare import Comparison, comparison_table, comparisons, forest
from sctd.report.gather import Inputs, gather
from sctd.report.groups import RunGroup, group
from sctd.report.record import missing_section, record_section
from sctd.report.scores import Subject, progress_section, score_tables, subjects
from sctd.report.summary import summary_section, tiles
from sctd.report.training import cost_section, loss_section

_MARK = "made by sctd report"
_INDEX = "README.md"
_WRITTEN = (".csv", ".md", ".png")


def report(folders: Sequence[Path], out: Path, title: str) -> None:
    """Write the page, and beside it the folder of its tables and pictures.

    Args:
        folders: runs, folders of ablations, and folders of evaluations.

    Raises:
        UserError: a folder with nothing to report, a file that cannot be read, or an `out` that is something else.
    """
    tables = out.with_name(f"{out.stem}-tables")
    _require_free(out, tables)
    inputs = gather(folders)
    with new_folder(tables) as files:
        page = _write(inputs, title, files)
    write_atomically(out, page)
    count = sum(path.suffix == ".csv" for path in tables.iterdir())
    print(f"written {out}, and {tables} with {count} tables and {len(list(tables.glob('*.png')))} pictures")


def sections_of(inputs: Inputs) -> list[Section]:
    """The report, in its order; what there is nothing of is left out, and `missing_section` says so."""
    groups = group(inputs)
    found = subjects(groups, inputs.others)
    compared = comparisons(found, groups)
    summary = summary_section(inputs, groups, compared)
    made = {
        "losses": loss_section(groups) if groups else None,
        "costs": cost_section(groups),
        "scores": _score_section(groups, found, compared),
        "scores over training": progress_section(groups),
        "probing": probe_section(groups, inputs.others),
        "drift": drift_section(groups),
        "ablations": ablation_section(inputs.ablations),
    }
    absent = [what for what, section in made.items() if section is None]
    if absent:
        summary.parts.append(f"Not in these folders, and left out: {listed(absent)}.")
    there = [section for section in made.values() if section is not None]
    return [summary, *there, record_section(inputs, groups), missing_section(inputs, groups, found)]


def _score_section(
    groups: Sequence[RunGroup], found: Sequence[Subject], compared: Sequence[Comparison]
) -> Section | None:
    """None where there is no score."""
    if not found:
        return None
    section = Section("scores", "Scores")
    scored = {id(each.group) for each in found}
    uneven = [
        f"{each.first.label} and {each.second.label}"
        for each in compared
        if not each.scored and {id(each.first), id(each.second)} <= scored
    ]
    if uneven:
        section.parts.append(f"Scored at different steps, and so not compared: {listed(uneven)}.")
    elsewhere = [
        f"{run.name} (of {each.label})"
        for each in found
        for run in (each.group.runs if each.group else ())
        if each.step not in run.evaluations or not run.evaluations[each.step].cells
    ]
    if elsewhere:
        section.parts.append(f"Not scored at the last scored step of its arm, and so in no mean: {listed(elsewhere)}.")
    with_items = [each for each in compared if each.items]
    if with_items:
        section.parts.append(forest(with_items))
    section.parts += score_tables(found, groups)
    section.parts += [comparison_table(each, f"difference-{number}") for number, each in enumerate(with_items, 1)]
    return section


def _write(inputs: Inputs, title: str, files: Path) -> str:
    """The files of tables and pictures; returns the page."""
    sections = sections_of(inputs)
    made = f"Made {datetime.now(UTC).strftime('%Y-%m-%d')} with sctd {__version__}"
    links = "".join(f'<a href="#{section.name}">{escaped(section.title)}</a>' for section in sections)
    figures = html_tiles(tiles(inputs, group(inputs)))
    parts = [f'<p class="made">{made}.</p>', f"<nav>{links}</nav>", figures]
    for section in sections:
        parts.append(section.html(files))
        section.write_tables(files)
    index = [f"# {printable(title)}", f"{made}; the page is beside this folder."]
    index += [*(section.markdown() for section in sections), f"<!-- {_MARK} -->\n"]
    (files / _INDEX).write_text("\n\n".join(index), encoding="utf-8")
    return html_page(title, parts, f'<meta name="generator" content="{_MARK}">\n')


def _require_free(out: Path, tables: Path) -> None:
    """A report may replace an earlier report, nothing else."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {out}: give a name that ends in .html")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.absolute().parent}: make it")
    for path, mark in ((out, out), (tables, tables / _INDEX)):
        ours = mark.is_file() and _MARK in mark.read_text(encoding="utf-8", errors="replace")
        if path.exists() and not ours:
            raise UserError(f"--out {out}: {path} exists and is not a report of sctd: choose another name")
    strangers = [path.name for path in tables.glob("*") if path.suffix not in _WRITTEN]
    if strangers:
        raise UserError(
            f"--out {out}: {tables} holds {strangers[0]}, which no report wrote: move it, or choose another name"
        )
