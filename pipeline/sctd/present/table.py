"""One model of a table, shown in four ways: HTML, Markdown, CSV with every number in full, and text for a console."""

import csv
import io
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sctd.present.words import as_saving, escaped, printable

NONE = "–"
PAPER = "paper"  # the kind of rows with the paper's numbers
_CONSOLE = str.maketrans({"±": "+-", "–": "-", "−": "-"})  # not every console has these


@dataclass(frozen=True)
class Number:
    """A cell.

    Args:
        value: in full, for CSV; None: there is none. said: for people.
        second: a number that belongs to it (a deviation, a saving), in CSV a column of its own; `aside`: for people.
    """

    value: float | int | str | None
    said: str
    second: float | None = None
    aside: str = ""

    def __str__(self) -> str:
        aside = self.aside if not self.aside or self.aside.startswith("±") else f"({self.aside})"
        return f"{self.said} {aside}".rstrip()


Cell = str | Number
Heading = str | tuple[str, str]
Say = str | Callable[[float], str]  # how a number is shown: a format such as ".2f", or a function
NOTHING = Number(None, NONE)


@dataclass(frozen=True)
class Table:
    """
    Args:
        name: of its files.
        head: headings; a newline is one on the page. The second of a pair is the heading of the cells' second numbers.
        texts: so many columns are words and stand on the left; numbers stand on the right.
        kinds: a class for each row, such as PAPER. note: what the columns mean.
        halves: on a page, two halves beside each other: for long and narrow tables.
    """

    name: str
    title: str
    head: Sequence[Heading]
    rows: Sequence[Sequence[Cell]]
    texts: int = 1
    kinds: Sequence[str] = ()
    note: str = ""
    halves: bool = False

    @property
    def heads(self) -> list[tuple[str, str]]:
        return [(head, "") if isinstance(head, str) else head for head in self.head]


# ---- cells ---------------------------------------------------------------------------------------------------------


def number(value: float | None, say: Say = ",") -> Number:
    """`say` by default: a count."""
    return NOTHING if value is None else Number(value, _said(value, say))


def change(saved: float | None) -> Number:
    """A cost relative to the baseline's: negative where it is saved."""
    return NOTHING if saved is None else Number(-saved, as_saving(saved))


def cost(value: float | None, saved: float | None, say: Say) -> Number:
    """A cost, and beside it its change relative to the baseline's, where there is any."""
    if value is None or not saved:
        return number(value, say)
    return Number(value, _said(value, say), -saved, as_saving(saved))


def over(values: Sequence[float | None], say: Say) -> Number:
    """The mean and the deviation, with as many digits; nothing where any value is None."""
    mean, spread = mean_of(values), spread_of(values)
    if mean is None:
        return NOTHING
    said = _said(mean, say)
    digits = len(said.partition(".")[2])
    return Number(mean, said, spread, "" if spread is None else f"± {spread:,.{digits}f}")


def mean_of(values: Sequence[float | None]) -> float | None:
    """None where there is none, or any is None."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def spread_of(values: Sequence[float | None]) -> float | None:
    """Sample standard deviation; None of fewer than two."""
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) > 1 else None


def _said(value: float, say: Say) -> str:
    return format(value, say) if isinstance(say, str) else say(value)


# ---- four ways -----------------------------------------------------------------------------------------------------


def as_html(table: Table) -> str:
    heads = ["<br>".join(map(escaped, title.split("\n"))) for title, _ in table.heads]
    rows = [[_html_cell(cell) for cell in row] for row in table.rows]
    kinds = list(table.kinds or [""] * len(rows))
    if not table.halves:
        return _html(heads, rows, kinds, table.texts)
    half = -(-len(rows) // 2)
    parts = [_html(heads, rows[cut], kinds[cut], table.texts) for cut in (slice(half), slice(half, None)) if rows[cut]]
    return f'<div class="halves">{"".join(parts)}</div>'


def as_markdown(table: Table) -> str:
    """The table alone, without its title and note."""
    heads = [plain(" ".join(title.split("\n"))) for title, _ in table.heads]
    rules = ["---"] * table.texts + ["---:"] * (len(heads) - table.texts)
    rows = [[plain(str(cell)) for cell in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rules, *rows))


def as_csv(table: Table) -> str:
    """Every number in full; a second number has a column of its own, `TITLE: SECOND`."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    heads = [(printable(title.replace("\n", " ")), second) for title, second in table.heads]
    writer.writerow(name for title, second in heads for name in ([title, f"{title}: {second}"] if second else [title]))
    for row in table.rows:
        cells: list[str] = []
        for (_, second), cell in zip(heads, row, strict=True):
            of = cell if isinstance(cell, Number) else Number(printable(cell), "")
            cells += [_full(of.value), _full(of.second)] if second else [_full(of.value)]
        writer.writerow(cells)
    return out.getvalue()


def as_text(table: Table) -> str:
    """Columns for a console, in ASCII where the cells are."""
    heads = [" ".join(title.split("\n")) for title, _ in table.heads]
    rows = [[str(cell).translate(_CONSOLE) for cell in row] for row in (heads, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = "<" * table.texts + ">" * (len(widths) - table.texts)
    lines = ([f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def plain(text: str) -> str:
    """For Markdown: characters that would be markup stand for themselves."""
    for sign in "\\|<>*_`[]":
        text = text.replace(sign, f"\\{sign}")
    return printable(text)


def _html(heads: Sequence[str], rows: Sequence[Sequence[str]], kinds: Sequence[str], texts: int) -> str:
    def line(tag: str, cells: Sequence[str], kind: str = "") -> str:
        words = "".join(f'<{tag} class="text">{cell}</{tag}>' for cell in cells[:texts])
        numbers = "".join(f"<{tag}>{cell}</{tag}>" for cell in cells[texts:])
        return (f'<tr class="{kind}">' if kind else "<tr>") + f"{words}{numbers}</tr>"

    body = "\n".join(line("td", cells, kind) for cells, kind in zip(rows, kinds, strict=True))
    return f"<table>\n<thead>{line('th', heads)}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _html_cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return escaped(cell)
    return escaped(cell.said) + (f"<small>{escaped(cell.aside)}</small>" if cell.aside else "")


def _full(value: float | int | str | None) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return f"{value:.10g}" if isinstance(value, float) else str(value)
