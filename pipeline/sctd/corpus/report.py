"""What a preparation did, for people: report.html, one page without network and scripts; the same in report.json."""

import io
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

Facts = dict[str, Any]

_BLUE, _ORANGE, _GREY = "#2b6cb0", "#d1742b", "#8a94a0"
_WIDTH = 9.0  # inches
_SHOWN_TOKENS = 25  # in the picture; the table has all
_SHOWN_BARS = 40  # with a name each
_LONGEST_SETTING = 240
# Text stays text: the browser has the glyphs of all scripts, and the page can be searched.
_STYLE: Any = {
    "svg.fonttype": "none", "text.parse_math": False, "font.family": "sans-serif", "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9aa3ad", "axes.titlelocation": "left",
    "axes.axisbelow": True, "axes.grid": True, "grid.color": "#e6e9ed", "grid.linewidth": 0.8,
    "text.color": "#1b2430", "axes.labelcolor": "#1b2430", "xtick.color": "#1b2430", "ytick.color": "#1b2430",
    "xtick.major.size": 0, "ytick.major.size": 0, "legend.frameon": False,
}  # fmt: skip
_REASONS = {
    "blank": "blank",
    "too_short": "too short",
    "symbols": "too many symbols",
    "faults": "faults in the data",
    "exact_duplicates": "exact duplicates",
    "near_duplicates": "near duplicates",
    "without_tokens": "without tokens",
    "beyond_limit": "beyond a limit",
}
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


def write_report(folder: Path, facts: Facts) -> None:
    """Write report.json, the facts as they are, and report.html, the same drawn and explained; both flushed to disk.
    Equal facts give equal bytes. Raises OSError."""
    _write(folder / "report.json", json.dumps(facts, indent=2) + "\n")
    _write(folder / "report.html", page(facts))


def page(facts: Facts) -> str:
    """report.html."""
    title = f"Corpus {_text(facts['name'])}"
    versions = ", ".join(f"{_text(name)} {_text(version)}" for name, version in facts["versions"].items())
    made = _text(facts["made"]).replace("T", " ").replace("+00:00", " UTC")
    parts = [
        f"<h1>{title}</h1>",
        f'<p class="made">Prepared {made} with {versions}.</p>',
        f"<p>{_summary(facts)}</p>",
        _tiles(facts),
        *(section(facts) for section in (_rows, _sources, _lengths, _tokens, _left_out, _stages, _ranks, _settings)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


# ---- the sections ------------------------------------------------------------------------------------------------


def _summary(facts: Facts) -> str:
    read, names = facts["read"], [source["name"] for source in facts["sources"]]
    origin = f"the source {_text(names[0])}" if len(names) == 1 else f"{len(names)} sources"
    packed = ", or ".join(
        f"{rows['train']:,} rows of {_count(length)} tokens for training (and {rows['valid']:,} held out)"
        for length, rows in facts["rows"].items()
    )
    entropy = facts["unigram_entropy"]
    return (
        f"{_count(read['documents'])} documents ({_bytes(read['bytes'])} of text) were read from {origin}; "
        f"{_count(facts['documents'])} of them are in the corpus, with {_count(facts['tokens'])} tokens of a "
        f"vocabulary of {_count(facts['vocab_size'])}. They fill {packed}. A model that knows no more than how often "
        f"each token occurs has a loss of {entropy:.3f} nats (perplexity {math.exp(entropy):,.0f}): training must come "
        "below that."
    )


def _tiles(facts: Facts) -> str:
    tiles = [
        (_short(facts["documents"]), "documents"),
        (_short(facts["tokens"]), "tokens"),
        (_short(facts["words"]), "words"),
        (_bytes(facts["text_bytes"]), "text"),
        (f"{facts['tokens_per_word']:.3f}", "tokens a word"),
        (_share(facts["unknown_share"]), "unknown tokens"),
        (f"{facts['unigram_entropy']:.3f} nats", "unigram entropy"),
        (_time(facts["seconds"]), "to prepare"),
    ]
    return '<div class="tiles">' + "".join(f"<div><b>{a}</b><span>{b}</span></div>" for a, b in tiles) + "</div>"


def _rows(facts: Facts) -> str:
    head = ["tokens a row", "train rows", "held-out rows", "rows that cut a document", "share", "special rows dropped",
            "tokens left over"]  # fmt: skip
    body = []
    for length, rows in facts["rows"].items():
        share = rows["cut_documents"] / max(1, rows["train"] + rows["valid"])
        counts = [rows[key] for key in ("train", "valid", "cut_documents")]
        rest = [_count(rows["special_rows"]), _count(rows["unfinished_tokens"])]
        body.append([_count(length), *map(_count, counts), _share(share), *rest])
    note = (
        "Rows are full: a document that does not fit goes on in the next row. Rows with more special tokens than "
        "others are dropped, and so is what does not fill a last row."
    )
    return f'<h2>Rows</h2>\n<p class="note">{note}</p>\n' + _table(head, body, texts=0)


def _sources(facts: Facts) -> str:
    sources = facts["sources"]
    head = ["source", "read from", "documents", "text", "tokens", "share of tokens", "weight in training"]
    body = [
        [_text(s["name"]), _text(s["spec"]), _count(s["documents"]), _bytes(s["text_bytes"]), _count(s["tokens"]),
         _share(s["share"]), "" if s["weight"] is None else f"{s['weight']:g}"]
        for s in sources
    ]  # fmt: skip
    picture = ""
    if len(sources) > 1:
        largest = sorted(sources, key=lambda source: -source["share"])[:_SHOWN_BARS]
        names, shares, weights = ([source[key] for source in largest] for key in ("name", "share", "weight"))
        height = _bar_height(len(names) if weights == [None] * len(names) else 2 * len(names))
        what = "Share of the tokens by source"
        picture = _draw(what, height, lambda axis: _share_bars(axis, names, shares, weights))
    return "<h2>Sources</h2>\n" + picture + _table(head, body, texts=2)


def _share_bars(axis: Axes, names: list[str], shares: list[float], weights: list[float | None]) -> None:
    given = [(place, weight) for place, weight in enumerate(weights) if weight is not None]
    height = 0.36 if given else 0.7
    _bars(axis, names, shares, _percent, height=height, shift=-height / 2 if given else 0.0, label="share of tokens")
    if given:
        places, values = [place + height / 2 for place, _ in given], [weight for _, weight in given]
        bars = axis.barh(places, values, height, color=_ORANGE, label="weight in training")
        axis.bar_label(bars, [_percent(value) for value in values], padding=3)
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    axis.xaxis.set_major_formatter(_percent_tick)
    axis.set_xlim(0, 1.12 * max([*shares, *(weight for _, weight in given)]) or 1)


def _lengths(facts: Facts) -> str:
    edges, documents = facts["length_histogram"]["edges"], facts["length_histogram"]["documents"]
    marks = [int(length) for length in facts["rows"]]

    def draw(axis: Axes) -> None:
        axis.bar(edges[:-1], documents, [b - a for a, b in _pairs(edges)], align="edge", color=_BLUE, edgecolor="white")
        axis.set_xscale("log", base=2)
        axis.set_xticks(edges[:: 1 + len(edges) // 16])
        axis.xaxis.set_major_formatter(_number_tick)
        axis.yaxis.set_major_formatter(_number_tick)
        axis.grid(axis="x", visible=False)
        axis.set_xlim(edges[0], edges[-1])
        for mark in marks:
            if edges[0] < mark < edges[-1]:
                axis.axvline(mark, color=_ORANGE, lw=1.2, ls="--")
                axis.text(mark, 1.02, f"{mark:,}", transform=axis.get_xaxis_transform(), ha="center", color=_ORANGE)
        axis.set_xlabel("tokens in a document; dashed: tokens a row")
        axis.set_ylabel("documents")

    body = [[f"{a:,} to {b - 1:,}", _count(n)] for (a, b), n in zip(_pairs(edges), documents, strict=True)]
    table = _halves(["tokens in a document", "documents"], body, texts=1)
    return "<h2>Lengths of documents</h2>\n" + _draw("Lengths of documents", 2.8, draw) + table


def _tokens(facts: Facts) -> str:
    tokens = facts["top_tokens"]
    first = tokens[:_SHOWN_TOKENS]
    names, shares = [token["token"] for token in first], [token["share"] for token in first]

    def draw(axis: Axes) -> None:
        _bars(axis, names, shares, _percent)
        axis.xaxis.set_major_formatter(_percent_tick)

    head = ["token", "id", "count", "share"]
    body = [[_text(t["token"]), str(t["id"]), _count(t["count"]), _share(t["share"])] for t in tokens]
    picture = _draw("Share of the most frequent tokens", _bar_height(len(first)), draw) if first else ""
    note = '<p class="note">Of the training documents, before packing.</p>\n'
    return "<h2>Most frequent tokens</h2>\n" + note + picture + _halves(head, body, texts=1)


def _left_out(facts: Facts) -> str:
    reasons = {_REASONS.get(key, key.replace("_", " ")): found for key, found in facts["left_out"].items()}
    cleaned = facts["cleaned"]
    note = (
        f"Shares are of the documents read. In {_count(cleaned['nfc'])} documents characters were composed (Unicode "
        f"NFC), from {_count(cleaned['control'])} control characters were removed."
    )
    body = [[_text(name), _count(found["documents"]), _share(found["share"])] for name, found in reasons.items()]
    parts = ["<h2>What was left out</h2>", f'<p class="note">{note}</p>']
    there = {name: found["documents"] for name, found in reasons.items() if found["documents"]}
    if there:
        names, values = list(there), list(there.values())
        height = _bar_height(len(names))
        parts.append(_draw("Documents left out", height, lambda axis: _bars(axis, names, values, _count, "documents")))
    else:
        parts.append("<p>Nothing: every document that was read is in the corpus.</p>")
    parts.append(_table(["reason", "documents", "share"], body, texts=1))
    if facts["fault_examples"]:
        parts.append("<p>The first faults:</p>\n<ul>")
        parts += [f"<li>{_text(line)}</li>" for line in facts["fault_examples"]]
        parts.append("</ul>")
    return "\n".join(parts)


def _stages(facts: Facts) -> str:
    names = [stage["name"] for stage in facts["stages"]]
    seconds = [stage["seconds"] for stage in facts["stages"]]
    total = sum(seconds) or 1.0
    body = [[_text(name), f"{value:,.1f}", _share(value / total)] for name, value in zip(names, seconds, strict=True)]
    height = _bar_height(len(names))
    picture = _draw("Time of each stage", height, lambda axis: _bars(axis, names, seconds, _time, "seconds"))
    return "<h2>Time</h2>\n" + picture + _table(["stage", "seconds", "share"], body, texts=1)


def _ranks(facts: Facts) -> str:
    ranks = facts["ranks"]
    names, rates = [rank["name"] for rank in ranks], [rank["mb_per_s"] for rank in ranks]

    def draw(axis: Axes) -> None:
        if len(ranks) <= _SHOWN_BARS:
            _bars(axis, names, rates, lambda value: f"{value:,.2f}", "MB of text a second")
            return
        axis.bar(range(len(rates)), rates, 1.0, color=_BLUE)
        axis.grid(axis="x", visible=False)
        axis.set_xlabel("ranks, in the order of the table")
        axis.set_ylabel("MB of text a second")

    head = ["rank", "pieces", "text", "seconds", "MB/s"]
    body = [
        [_text(rank["name"]), _count(rank["pieces"]), _bytes(rank["text_bytes"]), f"{rank['seconds']:,.1f}",
         f"{rank['mb_per_s']:,.2f}"]
        for rank in ranks
    ]  # fmt: skip
    height = _bar_height(len(ranks)) if len(ranks) <= _SHOWN_BARS else 2.4
    note = '<p class="note">What each rank read, cleaned and tokenized, and how fast.</p>\n'
    return "<h2>Ranks</h2>\n" + note + _draw("Speed of each rank", height, draw) + _table(head, body, texts=1)


def _settings(facts: Facts) -> str:
    body = []
    for name, value in facts["settings"].items():
        said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if len(said) > _LONGEST_SETTING:
            said = f"{said[:_LONGEST_SETTING]} ... (all of it in report.json)"
        body.append([_text(name), _text(said)])
    return "<h2>Settings</h2>\n" + _table(["setting", "value"], body, texts=2)


# ---- pictures ----------------------------------------------------------------------------------------------------


def _draw(title: str, height: float, draw: Callable[[Axes], None]) -> str:
    """An SVG to stand in a page. The title salts its ids, so that those of two pictures differ."""
    stream = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser has it
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(stream, metadata=nothing)
    _, _, svg = stream.getvalue().partition("<svg ")
    # Groups are numbered anew in each picture, and nothing refers to them.
    svg = re.sub(r'<g id="[^"]*"/>\s*', "", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(?<!stroke-)\b(width|height)="[\d.]+pt" ?', "", svg, count=2)  # the page decides
    return f'<svg role="img" aria-label="{escape(title)}" {svg}'


def _bar_height(bars: int) -> float:
    """Inches for so many horizontal bars."""
    return 0.6 + 0.25 * max(2, bars)


def _bars(
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
    bars = axis.barh([place + shift for place in places], values, height, color=_BLUE, label=label)
    axis.bar_label(bars, [say(value) for value in values], padding=3)
    axis.set_yticks(places, [_shortened(name) for name in names])
    axis.set_ylim(max(len(names), 2) - 0.5, -0.5)
    axis.set_xlim(0, 1.12 * max(values, default=0.0) or 1)
    axis.grid(axis="y", visible=False)
    axis.xaxis.set_major_formatter(_number_tick)
    axis.set_xlabel(unit)


def _number_tick(value: float, _: float) -> str:
    return _short(value)


def _percent_tick(value: float, _: float) -> str:
    return f"{100 * value:g} %"


def _pairs(edges: Sequence[int]) -> Iterable[tuple[int, int]]:
    return zip(edges[:-1], edges[1:], strict=True)


# ---- words and numbers -------------------------------------------------------------------------------------------


def _table(head: Sequence[str], body: Iterable[Sequence[str]], texts: int) -> str:
    """Cells are HTML already; the first `texts` columns are words, the others numbers."""

    def line(tag: str, cells: Sequence[str]) -> str:
        words = (f'<{tag} class="text">{cell}</{tag}>' for cell in cells[:texts])
        return f"<tr>{''.join(words)}{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells[texts:])}</tr>"

    lines = "\n".join(line("td", cells) for cells in body)
    return f"<table>\n<thead>{line('th', head)}</thead>\n<tbody>\n{lines}\n</tbody>\n</table>"


def _halves(head: Sequence[str], body: Sequence[Sequence[str]], texts: int) -> str:
    """A long and narrow table as two beside each other."""
    half = -(-len(body) // 2)
    parts = [part for part in (body[:half], body[half:]) if part]
    return f'<div class="halves">{"".join(_table(head, part, texts) for part in parts)}</div>'


def _printable(value: Any) -> str:
    """Without what neither HTML nor UTF-8 can hold, such as parts of file names that are no text."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(value))


def _text(value: Any) -> str:
    return escape(_printable(value))


def _shortened(name: str) -> str:
    name = _printable(name)
    return name if len(name) <= 30 else f"{name[:27]}..."


def _count(value: Any) -> str:
    return f"{int(value):,}"


def _short(value: float) -> str:
    """1,234,567 as 1.23 million."""
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.3g}"


def _bytes(value: float) -> str:
    for size, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:,.2f} {name}"
    return f"{value:,.0f} bytes"


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _share(value: float) -> str:
    """As many digits as a small share needs."""
    if value == 0:
        return "0 %"
    if value < 1e-6:
        return "below 0.0001 %"
    return f"{100 * value:.2f} %" if value >= 1e-3 else f"{100 * value:.2g} %"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{seconds / 60:.1f} min"
