"""Self-contained HTML pages: sections of paragraphs, lists, tables and pictures; the same sections as Markdown.

A page needs neither network nor scripts, reads well in a window of any width and on paper, and equal content gives
equal bytes.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sctd.present.pictures import Picture, draw_picture
from sctd.present.table import Table, as_csv, as_html, as_markdown, plain
from sctd.present.words import escaped, printable

_WIDE = 9  # columns from which a table is set smaller
_CSS = """
:root { --ink: #1b2430; --soft: #566272; --line: #dfe3e8; --blue: #2b6cb0; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 2.5rem 1.5rem 4rem; background: #fff; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .7rem; border-top: 1px solid var(--line);
  scroll-margin-top: 1rem; }
p { margin: .4rem 0 .8rem; } p, ul, figure .note { max-width: 52rem; }
ul { padding-left: 1.2rem; } li { margin: .15rem 0; } p, li { overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; margin: 1rem 0 0; font-size: .9rem; }
nav a { color: var(--blue); text-decoration: none; }
.made, .note { color: var(--soft); font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .7rem; margin: 1.4rem 0; }
.tiles div { border: 1px solid var(--line); border-top: 3px solid var(--blue); border-radius: 4px;
  padding: .6rem .8rem; }
.tiles b { display: block; font-size: 1.25rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: .85rem; }
figure { margin: 1.5rem 0; }
figcaption { font-weight: 600; font-size: .95rem; margin: 0 0 .3rem; }
figure .note { margin: .3rem 0 0; font-size: .85rem; }
svg { display: block; width: 100%; height: auto; margin: .6rem 0 1rem; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, "DejaVu Sans", sans-serif !important; }
.scroll { overflow-x: auto; }
.halves { display: grid; grid-template-columns: 1fr 1fr; gap: 0 2.5rem; align-items: start; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; vertical-align: top; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th.text, td.text { text-align: left; } td.text { white-space: normal; overflow-wrap: break-word; min-width: 7.5rem; }
th.text:first-child, td.text:first-child { position: sticky; left: 0; background: #fff; }
td small { display: block; color: var(--soft); font-size: .82em; line-height: 1.15; }
tr.paper td, tr.paper td.text { background: #f7f5f0; color: var(--soft); }
tr.paper td.text { padding-left: .4rem; } tr.paper td:last-child { padding-right: .4rem; }
.wide table { font-size: .8rem; } .wide th, .wide td { padding-right: .6rem; }
@media (max-width: 40rem) { body { padding: 1.5rem 1rem 3rem; } h1 { font-size: 1.5rem; }
  .halves { grid-template-columns: 1fr; } .picture svg { min-width: 34rem; } }
@media print {
  @page { size: A4; margin: 15mm; }
  html { font-size: 12px; } body { max-width: none; padding: 0; font-size: 12px; }
  nav { display: none; } .scroll { overflow: visible; } p, ul, figure .note { max-width: none; }
  h2, .note, figcaption { break-after: avoid; } h2 { margin-top: 1.4rem; }
  svg, .tiles, tr, p, figure, section > div { break-inside: avoid; } thead { display: table-header-group; }
  figure { margin: .9rem 0; } figure .note { break-before: avoid; break-after: auto; }
  table { font-size: 10.5px; } .wide table { font-size: 8.6px; } .wide th, .wide td { padding-right: .3rem; }
  td.text { min-width: 0; } th.text:first-child, td.text:first-child { position: static; }
  .tiles, .tiles div, tr.paper td { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
"""


@dataclass(frozen=True)
class Points:
    """A list."""

    lines: Sequence[str]


Part = str | Points | Table | Picture


@dataclass
class Section:
    """`name`: its anchor. Parts that are text are paragraphs."""

    name: str
    title: str
    parts: list[Part] = field(default_factory=list)

    def html(self, files: Path | None = None) -> str:
        """On the page. `files`: the folder that its pictures are also written to."""
        said = []
        for part in self.parts:
            match part:
                case str():
                    said.append(f"<p>{_prose(part)}</p>")
                case Points():
                    said.append(f"<ul>{''.join(f'<li>{_prose(line)}</li>' for line in part.lines)}</ul>")
                case Table():
                    kind = "scroll wide" if len(part.head) >= _WIDE else "scroll"
                    said.append(_figure(part, f'<div class="{kind}" tabindex="0">{as_html(part)}</div>', "listing"))
                case Picture():
                    drawn = draw_picture(part, files / f"{part.name}.png" if files else None)
                    said.append(_figure(part, f'<div class="scroll">{drawn}</div>', "picture"))
        heading = f'<h2 id="{self.name}">{escaped(self.title)}</h2>'
        if self.parts and isinstance(self.parts[0], str):  # kept together on paper
            heading = f"<div>{heading}{said.pop(0)}</div>"
        return "\n".join([f"<section>{heading}", *said, "</section>"])

    def write_tables(self, files: Path) -> None:
        """Each table as CSV and Markdown."""
        for part in self.parts:
            if isinstance(part, Table):
                (files / f"{part.name}.csv").write_text(as_csv(part), encoding="utf-8")
                (files / f"{part.name}.md").write_text(_markdown(part) + "\n", encoding="utf-8")

    def markdown(self) -> str:
        """The section for a folder that has its pictures."""
        return "\n\n".join([f"## {printable(self.title)}", *map(_markdown, self.parts)])


def html_page(title: str, parts: Iterable[str], head: str = "") -> str:
    """A whole page. `title`: text; `parts`, and `head` before the style sheet: HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{head}<title>{escaped(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<h1>{escaped(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def html_tiles(pairs: Iterable[tuple[str, str]]) -> str:
    """Figures that stand out: (value, what it is)."""
    tiles = (f"<div><b>{escaped(value)}</b><span>{escaped(what)}</span></div>" for value, what in pairs)
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _figure(part: Table | Picture, inner: str, kind: str) -> str:
    """With its title above and its note below."""
    note = f'<p class="note">{_prose(part.note)}</p>' if part.note else ""
    return f'<figure class="{kind}"><figcaption>{escaped(part.title)}</figcaption>{inner}{note}</figure>'


def _prose(text: str) -> str:
    """HTML in which no number is parted from its unit."""
    return re.sub(r"(?<=\d) (?=%)|(?<=\bp) (?=[=<&])|(?<=[=<;]) (?=0\.)", "&nbsp;", escaped(text))


def _markdown(part: Part) -> str:
    match part:
        case str():
            return plain(part)
        case Points():
            return "\n".join(f"* {plain(line)}" for line in part.lines)
        case Table():
            note = f"\n\n{plain(part.note)}" if part.note else ""
            return f"**{plain(part.title)}**\n\n{as_markdown(part)}{note}"
        case Picture():
            title = plain(part.title)
            return f"![{title}]({part.name}.png)\n\n" + f"*{title}.* {plain(part.note)}".rstrip()
