"""What self-contained HTML pages are built from: style sheet, SVG pictures, tables, and numbers in words.

A page needs neither network nor scripts, reads well in a window of any width and on paper, and equal content gives
equal bytes.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

BLUE, ORANGE = "#2b6cb0", "#d1742b"
_WIDTH = 9.0  # inches
_DPI = 150
_LONGEST_NAME = 30  # of a bar
# Text stays text: the browser has the glyphs of all scripts, and the page can be searched.
_STYLE: Any = {
    "svg.fonttype": "none", "text.parse_math": False, "font.family": "sans-serif", "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9aa3ad", "axes.titlelocation": "left",
    "axes.axisbelow": True, "axes.grid": True, "grid.color": "#e6e9ed", "grid.linewidth": 0.8,
    "text.color": "#1b2430", "axes.labelcolor": "#1b2430", "xtick.color": "#1b2430", "ytick.color": "#1b2430",
    "xtick.major.size": 0, "ytick.major.size": 0, "legend.frameon": False,
}  # fmt: skip
_CSS = """
:root { --ink: #1b2430; --soft: #566272; --line: #dfe3e8; --blue: #2b6cb0; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2.5rem 1.5rem 4rem; background: #fff; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .7rem; border-top: 1px solid var(--line); }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
.made, .note { color: var(--soft); font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: .7rem; margin: 1.4rem 0; }
.tiles div { border: 1px solid var(--line); border-top: 3px solid var(--blue); border-radius: 4px;
  padding: .6rem .8rem; }
.tiles b { display: block; font-size: 1.35rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: .85rem; }
svg { display: block; width: 100%; height: auto; margin: .6rem 0 1rem; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, "DejaVu Sans", sans-serif !important; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; margin: .3rem 0 1rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; vertical-align: top; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
td { white-space: nowrap; }
td.text, th.text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
td.text:first-child { min-width: 8.5rem; } th.text { white-space: nowrap; }
.halves { display: grid; grid-template-columns: 1fr 1fr; gap: 0 2.5rem; align-items: start; }
ul { padding-left: 1.2rem; } li { overflow-wrap: anywhere; font-size: .9rem; }
@media (max-width: 40rem) { .tiles { grid-template-columns: repeat(2, 1fr); } .halves { grid-template-columns: 1fr; } }
@media print {
  @page { size: A4; margin: 15mm; }
  html { font-size: 12px; }
  body { max-width: none; padding: 0; font-size: 12px; }
  h2, .note { break-after: avoid; } h2 { margin-top: 1.4rem; } svg, .tiles, tr, p { break-inside: avoid; }
  thead { display: table-header-group; }
  .tiles div, .tiles { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
"""


def html_page(title: str, parts: Iterable[str], head: str = "") -> str:
    """A whole page.

    Args:
        title, parts, head: HTML; `head` comes after the style sheet.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_CSS}</style>\n{head}</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def html_tiles(pairs: Iterable[tuple[str, str]]) -> str:
    """Figures that stand out: (value, what it is), both HTML."""
    return '<div class="tiles">' + "".join(f"<div><b>{a}</b><span>{b}</span></div>" for a, b in pairs) + "</div>"


def html_table(head: Sequence[str], body: Iterable[Sequence[str]], texts: int, kinds: Sequence[str] = ()) -> str:
    """Cells are HTML already; the first `texts` columns are words, the others numbers.

    Args:
        kinds: a class for each row of the body; empty: none has one.
    """

    def line(tag: str, cells: Sequence[str], kind: str = "") -> str:
        words = (f'<{tag} class="text">{cell}</{tag}>' for cell in cells[:texts])
        row = f'<tr class="{kind}">' if kind else "<tr>"
        return f"{row}{''.join(words)}{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells[texts:])}</tr>"

    rows = list(body)
    lines = "\n".join(line("td", cells, kind) for cells, kind in zip(rows, kinds or [""] * len(rows), strict=True))
    return f"<table>\n<thead>{line('th', head)}</thead>\n<tbody>\n{lines}\n</tbody>\n</table>"


def html_halves(head: Sequence[str], body: Sequence[Sequence[str]], texts: int) -> str:
    """A long and narrow table as two beside each other."""
    half = -(-len(body) // 2)
    parts = [part for part in (body[:half], body[half:]) if part]
    return f'<div class="halves">{"".join(html_table(head, part, texts) for part in parts)}</div>'


# ---- pictures ----------------------------------------------------------------------------------------------------


def draw_picture(title: str, height: float, fill: Callable[[Figure], None], png: Path | None = None) -> str:
    """An SVG to stand in a page. The title salts its ids, so that those of two pictures differ.

    Args:
        height: inches, of a width of 9. png: where the same picture goes as a file of its own.
    """
    stream = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser has it
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        fill(figure)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(stream, metadata=nothing)
        if png is not None:
            figure.set_layout_engine("none")  # it is laid out already
            figure.set_dpi(_DPI)
            FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    _, _, svg = stream.getvalue().partition("<svg ")
    # Groups are numbered anew in each picture, and nothing refers to them.
    svg = re.sub(r'<g id="[^"]*"/>\s*', "", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(?<!stroke-)\b(width|height)="[\d.]+pt" ?', "", svg, count=2)  # the page decides
    return f'<svg role="img" aria-label="{escape(title)}" {svg}'


def bar_height(count: int) -> float:
    """Inches for so many horizontal bars."""
    return 0.6 + 0.25 * max(2, count)


def draw_bars(
    axis: Axes,
    names: Sequence[str],
    values: Sequence[float],
    say: Callable[[float], str],
    unit: str = "",
    height: float = 0.7,
    shift: float = 0.0,
    label: str = "",
) -> None:
    """Horizontal bars from top to bottom, each with its name and its value."""
    places = range(len(names))
    drawn = axis.barh([place + shift for place in places], values, height, color=BLUE, label=label)
    axis.bar_label(drawn, [say(value) for value in values], padding=3)
    axis.set_yticks(places, [_shortened(name) for name in names])
    axis.set_ylim(max(len(names), 2) - 0.5, -0.5)
    axis.set_xlim(0, 1.12 * max(values, default=0.0) or 1)
    axis.grid(axis="y", visible=False)
    axis.xaxis.set_major_formatter(number_tick)
    axis.set_xlabel(unit)


def number_tick(value: float, _: float) -> str:
    return as_short(value)


def percent_tick(value: float, _: float) -> str:
    return f"{100 * value:g} %"


def _shortened(name: str) -> str:
    name = printable(name)
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."


# ---- words and numbers -------------------------------------------------------------------------------------------


def printable(value: Any) -> str:
    """Without what neither HTML nor UTF-8 can hold, such as parts of file names that are no text."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(value))


def escaped(value: Any) -> str:
    return escape(printable(value))


def as_count(value: Any) -> str:
    return f"{int(value):,}"


def as_short(value: float) -> str:
    """1,234,567 as 1.23 million."""
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.3g}"


def as_bytes(value: float) -> str:
    """A number of bytes."""
    for size, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:,.2f} {name}"
    return f"{value:,.0f} bytes"


def as_percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def as_share(value: float) -> str:
    """As many digits as a small share needs."""
    if value == 0:
        return "0 %"
    if value < 1e-6:
        return "below 0.0001 %"
    return f"{100 * value:.2f} %" if value >= 1e-3 else f"{100 * value:.2g} %"


def as_time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{seconds / 60:.1f} min"
