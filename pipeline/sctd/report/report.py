"""`sctd report`: runs, ablations and evaluations as one self-contained page, and its tables and pictures as files.

OUT.html       the page
OUT-tables/    README.md, the same for a repository; each table as .csv and .md, each picture as .png
"""

import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from sctd import __version__
from sctd.errors import UserError
from sctd.files import write_atomically
from sctd.page import escaped, html_page, html_tiles, printable
from sctd.report.ablations import ablation_section
from sctd.report.arms import Group, group, partners
from sctd.report.compare import Comparison, comparison_table, comparisons, forest, say
from sctd.report.cost import cost_section
from sctd.report.document import Section
from sctd.report.drift import drift_section
from sctd.report.gather import Material, gather
from sctd.report.losses import loss_section
from sctd.report.probing import probe_section
from sctd.report.progress import progress_section
from sctd.report.record import missing_section, record_section
from sctd.report.scores import Subject, score_tables, subjects
from sctd.report.summary import summary_section, tiles
from sctd.report.words import listed

_MARK = "made by sctd report"
_INDEX = "README.md"
_WRITTEN = (".csv", ".md", ".png")
_CSS = """
body { max-width: 64rem; }
p, ul, figure .note { max-width: 52rem; }
nav { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; margin: 1rem 0 0; font-size: .9rem; }
nav a { color: var(--blue); text-decoration: none; }
h2 { scroll-margin-top: 1rem; }
p, li { overflow-wrap: anywhere; }
li { font-size: inherit; margin: .15rem 0; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); }
figure { margin: 1.5rem 0; }
figcaption { font-weight: 600; font-size: .95rem; margin: 0 0 .3rem; }
figure .note { margin: .3rem 0 0; font-size: .85rem; }
.scroll { overflow-x: auto; }
.scroll table { margin: 0; }
.scroll th { white-space: nowrap; }
.scroll td.text, .scroll td.text:first-child { min-width: 7.5rem; overflow-wrap: break-word; }
.scroll th.text:first-child, .scroll td.text:first-child { position: sticky; left: 0; background: #fff; }
th, td { padding-right: .9rem; } th:last-child, td:last-child { padding-right: 0; }
td small { display: block; color: var(--soft); font-size: .82em; line-height: 1.15; }
tr.paper td, .scroll tr.paper td.text { background: #f7f5f0; color: var(--soft); }
tr.paper td.text { padding-left: .4rem; }
tr.paper td:last-child { padding-right: .4rem; }
.wide table { font-size: .8rem; } .wide th, .wide td { padding-right: .6rem; }
@media (max-width: 40rem) { body { padding: 1.5rem 1rem 3rem; } h1 { font-size: 1.5rem; }
  .picture svg { min-width: 34rem; } }
@media print {
  nav { display: none; } .scroll { overflow: visible; }
  p, ul, figure .note { max-width: none; }
  section > div { break-inside: avoid; }
  figure { margin: .9rem 0; } figure { break-inside: avoid; } figcaption { break-after: avoid; }
  figure .note { break-before: avoid; break-after: auto; }
  .scroll table { font-size: 10.5px; } .wide table { font-size: 8.6px; } .wide th, .wide td { padding-right: .3rem; }
  .scroll td.text, .scroll td.text:first-child { min-width: 0; } .wide td.text { white-space: normal; }
  .scroll th.text:first-child, .scroll td.text:first-child { position: static; }
  tr.paper td { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
"""


def report(folders: Sequence[Path], out: Path, title: str) -> None:
    """Write the page, and beside it the folder of its tables and pictures.

    Args:
        folders: runs, folders of ablations, and folders of evaluations.

    Raises:
        UserError: a folder with nothing to report, a file that cannot be read, or an `out` that is something else.
    """
    tables = out.with_name(f"{out.stem}-tables")
    _require_free(out, tables)
    material = gather(folders)
    temporary = tables.with_name(f".{tables.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        page = _write(material, title, temporary)
        shutil.rmtree(tables, ignore_errors=True)
        temporary.rename(tables)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    write_atomically(out, page)
    count = sum(path.suffix == ".csv" for path in tables.iterdir())
    print(f"written {out}, and {tables} with {count} tables and {len(list(tables.glob('*.png')))} pictures")


def sections_of(material: Material) -> list[Section]:
    """The report, in its order; what there is nothing of is left out, and `missing_section` says so."""
    groups = group(material)
    found = subjects(groups, material.others)
    compared = comparisons(found, groups)
    summary = summary_section(material, groups, found, compared)
    made = {
        "losses": loss_section(groups) if groups else None,
        "costs": cost_section(groups) if groups else None,
        "scores": _score_section(groups, found, compared),
        "scores over training": progress_section(groups),
        "probing": probe_section(groups, material.others),
        "drift": drift_section(groups),
        "ablations": ablation_section(material.ablations),
    }
    absent = [what for what, section in made.items() if section is None]
    if absent:
        summary.parts.append(f"Left out, because there is nothing of it in these folders: {listed(absent)}.")
    there = [section for section in made.values() if section is not None]
    return [summary, *there, record_section(material, groups), missing_section(material, groups, found)]


def _score_section(groups: Sequence[Group], found: Sequence[Subject], compared: Sequence[Comparison]) -> Section | None:
    section = Section("scores", "Scores")
    if not found:
        return None
    section.parts += [say(each) for each in compared]
    by_group = {id(each.group): each for each in found if each.group is not None}
    uneven = [
        f"{a.label} and {b.label}"
        for a, b in partners(groups)
        if id(a) in by_group and id(b) in by_group and by_group[id(a)].step != by_group[id(b)].step
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
    if compared:
        section.parts.append(forest(compared))
    section.parts += score_tables(found, groups)
    section.parts += [comparison_table(each, f"difference-{number}") for number, each in enumerate(compared, 1)]
    return section


def _write(material: Material, title: str, files: Path) -> str:
    """The files of tables and pictures; returns the page."""
    sections = sections_of(material)
    made = f"Made {datetime.now(UTC).strftime('%Y-%m-%d')} with sctd {__version__}"
    links = "".join(f'<a href="#{section.name}">{escaped(section.title)}</a>' for section in sections)
    figures = html_tiles([(escaped(value), escaped(what)) for value, what in tiles(material, group(material))])
    parts = [f"<h1>{escaped(title)}</h1>", f'<p class="made">{made}.</p>', f"<nav>{links}</nav>", figures]
    for section in sections:
        parts.append(section.html(files))
        section.write_tables(files)
    index = [
        f"# {printable(title)}",
        f"{made}; the page is beside this folder.",
        *(section.markdown() for section in sections),
    ]
    (files / _INDEX).write_text("\n\n".join([*index, f"<!-- {_MARK} -->\n"]), encoding="utf-8")
    head = f'<meta name="generator" content="{_MARK}">\n<style>{_CSS}</style>\n'
    return html_page(escaped(title), parts, head)


def _require_free(out: Path, tables: Path) -> None:
    """A report may replace an earlier report, nothing else."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {out}: give a name that ends in .html")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.absolute().parent}: make it")
    for path, mark in ((out, out), (tables, tables / _INDEX)):
        ours = mark.is_file() and _MARK in mark.read_text(encoding="utf-8", errors="replace")
        if path.exists() and not ours:
            raise UserError(f"--out {out}: {path} is there and no report of sctd: choose another name")
    strangers = [path.name for path in tables.glob("*") if path.suffix not in _WRITTEN]
    if strangers:
        raise UserError(
            f"--out {out}: {tables} holds {strangers[0]}, which no report wrote: move it, or choose another name"
        )
