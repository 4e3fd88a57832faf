"""What a report is made of: sections of paragraphs, lists, tables and pictures, as HTML, Markdown and CSV."""

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from sctd.page import draw_picture, escaped, html_table, printable
from sctd.report.stats import mean_of, spread_of
from sctd.report.words import as_saving

NONE = "–"
PAPER = "paper"  # the class of rows that are the paper's
_WIDE = 9  # columns from which a table is set smaller


@dataclass(frozen=True)
class Number:
    """A cell of a table.

    Args:
        value: in full, for CSV; None: there is none. said: for people.
        second: what belongs to it (a deviation, a saving), under a heading of its own in CSV; `aside`: for people.
    """

    value: float | int | str | None
    said: str
    second: float | None = None
    aside: str = ""


Cell = str | Number
Fill = Callable[[Figure], None]
NOTHING = Number(None, NONE)


@dataclass(frozen=True)
class Head:
    """Heading of a column; a newline in it is one on the page. `second`: heading of its cells' second numbers."""

    title: str
    second: str = ""


@dataclass(frozen=True)
class Table:
    """`name`: of its files. `texts`: so many columns are words. `kinds`: of rows, such as PAPER."""

    name: str
    title: str
    head: Sequence[Head]
    rows: Sequence[Sequence[Cell]]
    texts: int = 1
    kinds: Sequence[str] = ()
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """`name`: of its file. `height`: inches, of a width of 9."""

    name: str
    title: str
    height: float
    fill: Fill
    note: str = ""


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

    def html(self, files: Path) -> str:
        """On the page; its pictures are also written to `files`, as its tables are by `write_tables`."""
        said = []
        for part in self.parts:
            match part:
                case str():
                    said.append(f"<p>{_prose(part)}</p>")
                case Points():
                    said.append(f"<ul>{''.join(f'<li>{_prose(line)}</li>' for line in part.lines)}</ul>")
                case Table():
                    said.append(_table_html(part))
                case Picture():
                    drawn = draw_picture(part.title, part.height, part.fill, files / f"{part.name}.png")
                    said.append(_captioned(part.title, part.note, f'<div class="scroll">{drawn}</div>', "picture"))
        heading = f'<h2 id="{self.name}">{escaped(self.title)}</h2>'
        if self.parts and isinstance(self.parts[0], str):  # kept together on paper
            heading = f"<div>{heading}{said.pop(0)}</div>"
        return "\n".join([f"<section>{heading}", *said, "</section>"])

    def write_tables(self, files: Path) -> None:
        """Each table as CSV and Markdown."""
        for part in self.parts:
            if isinstance(part, Table):
                (files / f"{part.name}.csv").write_text(as_csv(part), encoding="utf-8")
                (files / f"{part.name}.md").write_text(as_markdown(part) + "\n", encoding="utf-8")

    def markdown(self) -> str:
        """The section for a folder that has its pictures."""
        said = [f"## {printable(self.title)}"]
        for part in self.parts:
            match part:
                case str():
                    said.append(_plain(part))
                case Points():
                    said.append("\n".join(f"* {_plain(line)}" for line in part.lines))
                case Table():
                    said.append(as_markdown(part))
                case Picture():
                    said.append(f"![{_plain(part.title)}]({part.name}.png)")
                    said += [f"*{_plain(part.title)}.* {_plain(part.note)}".rstrip()]
        return "\n\n".join(said)


def whole(value: int) -> Number:
    """A count."""
    return Number(value, f"{value:,}")


def number(value: float | None, say: Callable[[float], str]) -> Number:
    return NOTHING if value is None else Number(value, say(value))


def change(saved: float | None) -> Number:
    """A cost relative to the baseline's: negative where it is saved."""
    return NOTHING if saved is None else Number(-saved, as_saving(saved))


def cost(value: float | None, saved: float | None, say: Callable[[float], str]) -> Number:
    """A cost, and beside it what share of the baseline's is saved, where any is."""
    if value is None or not saved:
        return number(value, say)
    return Number(value, say(value), -saved, as_saving(saved))


def over(values: Sequence[float | None], say: Callable[[float], str]) -> Number:
    """The mean of these and their deviation, with as many digits; nothing where any is None."""
    mean, spread = mean_of(values), spread_of(values)
    if mean is None:
        return NOTHING
    digits = len(say(mean).partition(".")[2])
    return Number(mean, say(mean), spread, "" if spread is None else f"± {spread:,.{digits}f}")


def as_csv(table: Table) -> str:
    """Every number in full; a deviation or saving has a column of its own."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_spread((printable(_one_line(head.title)), head.second) for head in table.head))
    for row in table.rows:
        cells = []
        for head, cell in zip(table.head, row, strict=True):
            first, second = (cell.value, cell.second) if isinstance(cell, Number) else (printable(cell), None)
            cells += [_full(first), _full(second)] if head.second else [_full(first)]
        writer.writerow(cells)
    return out.getvalue()


def as_markdown(table: Table) -> str:
    heads = [_plain(_one_line(head.title)) for head in table.head]
    rows = [[_plain(_in_line(cell)) for cell in row] for row in table.rows]
    rules = ["---"] * table.texts + ["---:"] * (len(heads) - table.texts)
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rules, *rows))
    note = f"\n\n{_plain(table.note)}" if table.note else ""
    return f"**{_plain(table.title)}**\n\n{lines}{note}"


def _table_html(table: Table) -> str:
    heads = ["<br>".join(map(escaped, head.title.split("\n"))) for head in table.head]
    body = html_table(heads, [[_html(cell) for cell in row] for row in table.rows], table.texts, table.kinds)
    kind = "scroll wide" if len(table.head) >= _WIDE else "scroll"
    return _captioned(table.title, table.note, f'<div class="{kind}" tabindex="0">{body}</div>', "listing")


def _prose(text: str) -> str:
    """HTML in which no number is parted from its unit."""
    return re.sub(r"(?<=\d) (?=%)|(?<=\bp) (?=[=<&])|(?<=[=<;]) (?=0\.)", "&nbsp;", escaped(text))


def _captioned(title: str, note: str, inner: str, kind: str) -> str:
    """With its title above and its note below."""
    below = f'<p class="note">{_prose(note)}</p>' if note else ""
    return f'<figure class="{kind}"><figcaption>{escaped(title)}</figcaption>{inner}{below}</figure>'


def _html(cell: Cell) -> str:
    if isinstance(cell, str):
        return escaped(cell)
    return escaped(cell.said) + (f"<small>{escaped(cell.aside)}</small>" if cell.aside else "")


def _in_line(cell: Cell) -> str:
    if isinstance(cell, str):
        return cell
    return f"{cell.said} {cell.aside}".rstrip() if cell.aside.startswith("±") else _in_brackets(cell)


def _in_brackets(cell: Number) -> str:
    return f"{cell.said} ({cell.aside})" if cell.aside else cell.said


def _one_line(title: str) -> str:
    return title.replace("\n", " ")


def _plain(text: str) -> str:
    """For Markdown: signs that would be markup stand for themselves."""
    for sign in "\\|<>*_`[]":
        text = text.replace(sign, f"\\{sign}")
    return printable(text)


def _spread(pairs: Iterable[tuple[str, str]]) -> list[str]:
    return [name for first, second in pairs for name in ([first, f"{first}: {second}"] if second else [first])]


def _full(value: float | int | str | None) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return f"{value:.10g}" if isinstance(value, float) else str(value)
