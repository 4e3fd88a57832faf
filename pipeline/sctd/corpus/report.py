"""What a preparation did, for people: report.html, one page without network and scripts; the same in report.json."""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from sctd.page import (
    BLUE,
    ORANGE,
    as_bytes,
    as_count,
    as_percent,
    as_share,
    as_short,
    as_time,
    bar_height,
    draw_bars,
    draw_picture,
    escaped,
    html_halves,
    html_page,
    html_table,
    html_tiles,
    number_tick,
    percent_tick,
)

Facts = dict[str, Any]

_SHOWN_TOKENS = 25  # in the picture; the table has all
_SHOWN_BARS = 40  # with a name each
_LONGEST_SETTING = 240
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


def write_report(folder: Path, facts: Facts) -> None:
    """Write report.json, the facts as they are, and report.html, the same drawn and explained; both flushed to disk.
    Equal facts give equal bytes. Raises OSError."""
    _write(folder / "report.json", json.dumps(facts, indent=2) + "\n")
    _write(folder / "report.html", page(facts))


def page(facts: Facts) -> str:
    """report.html."""
    title = f"Corpus {escaped(facts['name'])}"
    versions = ", ".join(f"{escaped(name)} {escaped(version)}" for name, version in facts["versions"].items())
    made = escaped(facts["made"]).replace("T", " ").replace("+00:00", " UTC")
    parts = [
        f"<h1>{title}</h1>",
        f'<p class="made">Prepared {made} with {versions}.</p>',
        f"<p>{_summary(facts)}</p>",
        _tiles(facts),
        *(section(facts) for section in (_rows, _sources, _lengths, _tokens, _left_out, _stages, _ranks, _settings)),
    ]
    return html_page(title, parts)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


# ---- the sections ------------------------------------------------------------------------------------------------


def _summary(facts: Facts) -> str:
    read, names = facts["read"], [source["name"] for source in facts["sources"]]
    origin = f"the source {escaped(names[0])}" if len(names) == 1 else f"{len(names)} sources"
    packed = ", or ".join(
        f"{rows['train']:,} rows of {as_count(length)} tokens for training (and {rows['valid']:,} held out)"
        for length, rows in facts["rows"].items()
    )
    entropy = facts["unigram_entropy"]
    return (
        f"{as_count(read['documents'])} documents ({as_bytes(read['bytes'])} of text) were read from {origin}; "
        f"{as_count(facts['documents'])} of them are in the corpus, with {as_count(facts['tokens'])} tokens of a "
        f"vocabulary of {as_count(facts['vocab_size'])}. They fill {packed}. A model that knows no more than how often "
        f"each token occurs has a loss of {entropy:.3f} nats (perplexity {math.exp(entropy):,.0f}): training must come "
        "below that."
    )


def _tiles(facts: Facts) -> str:
    tiles = [
        (as_short(facts["documents"]), "documents"),
        (as_short(facts["tokens"]), "tokens"),
        (as_short(facts["words"]), "words"),
        (as_bytes(facts["text_bytes"]), "text"),
        (f"{facts['tokens_per_word']:.3f}", "tokens a word"),
        (as_share(facts["unknown_share"]), "unknown tokens"),
        (f"{facts['unigram_entropy']:.3f} nats", "unigram entropy"),
        (as_time(facts["seconds"]), "to prepare"),
    ]
    return html_tiles(tiles)


def _rows(facts: Facts) -> str:
    head = ["tokens a row", "train rows", "held-out rows", "rows that cut a document", "share", "special rows dropped",
            "tokens left over"]  # fmt: skip
    body = []
    for length, rows in facts["rows"].items():
        share = rows["cut_documents"] / max(1, rows["train"] + rows["valid"])
        counts = [rows[key] for key in ("train", "valid", "cut_documents")]
        rest = [as_count(rows["special_rows"]), as_count(rows["unfinished_tokens"])]
        body.append([as_count(length), *map(as_count, counts), as_share(share), *rest])
    note = (
        "Rows are full: a document that does not fit goes on in the next row. Rows with more special tokens than "
        "others are dropped, and so is what does not fill a last row."
    )
    return f'<h2>Rows</h2>\n<p class="note">{note}</p>\n' + html_table(head, body, texts=0)


def _sources(facts: Facts) -> str:
    sources = facts["sources"]
    head = ["source", "read from", "documents", "text", "tokens", "share of tokens", "weight in training"]
    body = [
        [escaped(s["name"]), escaped(s["spec"]), as_count(s["documents"]), as_bytes(s["text_bytes"]),
         as_count(s["tokens"]), as_share(s["share"]), "" if s["weight"] is None else f"{s['weight']:g}"]
        for s in sources
    ]  # fmt: skip
    picture = ""
    if len(sources) > 1:
        largest = sorted(sources, key=lambda source: -source["share"])[:_SHOWN_BARS]
        names, shares, weights = ([source[key] for source in largest] for key in ("name", "share", "weight"))
        height = bar_height(len(names) if weights == [None] * len(names) else 2 * len(names))
        what = "Share of the tokens by source"
        picture = _draw(what, height, lambda axis: _share_bars(axis, names, shares, weights))
    return "<h2>Sources</h2>\n" + picture + html_table(head, body, texts=2)


def _share_bars(axis: Axes, names: list[str], shares: list[float], weights: list[float | None]) -> None:
    given = [(place, weight) for place, weight in enumerate(weights) if weight is not None]
    height = 0.36 if given else 0.7
    draw_bars(
        axis, names, shares, as_percent, height=height, shift=-height / 2 if given else 0.0, label="share of tokens"
    )
    if given:
        places, values = [place + height / 2 for place, _ in given], [weight for _, weight in given]
        bars = axis.barh(places, values, height, color=ORANGE, label="weight in training")
        axis.bar_label(bars, [as_percent(value) for value in values], padding=3)
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    axis.xaxis.set_major_formatter(percent_tick)
    axis.set_xlim(0, 1.12 * max([*shares, *(weight for _, weight in given)]) or 1)


def _lengths(facts: Facts) -> str:
    edges, documents = facts["length_histogram"]["edges"], facts["length_histogram"]["documents"]
    marks = [int(length) for length in facts["rows"]]

    def draw(axis: Axes) -> None:
        axis.bar(edges[:-1], documents, [b - a for a, b in _pairs(edges)], align="edge", color=BLUE, edgecolor="white")
        axis.set_xscale("log", base=2)
        axis.set_xticks(edges[:: 1 + len(edges) // 16])
        axis.xaxis.set_major_formatter(number_tick)
        axis.yaxis.set_major_formatter(number_tick)
        axis.grid(axis="x", visible=False)
        axis.set_xlim(edges[0], edges[-1])
        for mark in marks:
            if edges[0] < mark < edges[-1]:
                axis.axvline(mark, color=ORANGE, lw=1.2, ls="--")
                axis.text(mark, 1.02, f"{mark:,}", transform=axis.get_xaxis_transform(), ha="center", color=ORANGE)
        axis.set_xlabel("tokens in a document; dashed: tokens a row")
        axis.set_ylabel("documents")

    body = [[f"{a:,} to {b - 1:,}", as_count(n)] for (a, b), n in zip(_pairs(edges), documents, strict=True)]
    table = html_halves(["tokens in a document", "documents"], body, texts=1)
    return "<h2>Lengths of documents</h2>\n" + _draw("Lengths of documents", 2.8, draw) + table


def _tokens(facts: Facts) -> str:
    tokens = facts["top_tokens"]
    first = tokens[:_SHOWN_TOKENS]
    names, shares = [token["token"] for token in first], [token["share"] for token in first]

    def draw(axis: Axes) -> None:
        draw_bars(axis, names, shares, as_percent)
        axis.xaxis.set_major_formatter(percent_tick)

    head = ["token", "id", "count", "share"]
    body = [[escaped(t["token"]), str(t["id"]), as_count(t["count"]), as_share(t["share"])] for t in tokens]
    picture = _draw("Share of the most frequent tokens", bar_height(len(first)), draw) if first else ""
    note = '<p class="note">Of the training documents, before packing.</p>\n'
    return "<h2>Most frequent tokens</h2>\n" + note + picture + html_halves(head, body, texts=1)


def _left_out(facts: Facts) -> str:
    reasons = {_REASONS.get(key, key.replace("_", " ")): found for key, found in facts["left_out"].items()}
    cleaned = facts["cleaned"]
    note = (
        f"Shares are of the documents read. In {as_count(cleaned['nfc'])} documents characters were composed (Unicode "
        f"NFC), from {as_count(cleaned['control'])} control characters were removed."
    )
    body = [[escaped(name), as_count(found["documents"]), as_share(found["share"])] for name, found in reasons.items()]
    parts = ["<h2>What was left out</h2>", f'<p class="note">{note}</p>']
    there = {name: found["documents"] for name, found in reasons.items() if found["documents"]}
    if there:
        names, values = list(there), list(there.values())
        height = bar_height(len(names))
        parts.append(
            _draw("Documents left out", height, lambda axis: draw_bars(axis, names, values, as_count, "documents"))
        )
    else:
        parts.append("<p>Nothing: every document that was read is in the corpus.</p>")
    parts.append(html_table(["reason", "documents", "share"], body, texts=1))
    if facts["fault_examples"]:
        parts.append("<p>The first faults:</p>\n<ul>")
        parts += [f"<li>{escaped(line)}</li>" for line in facts["fault_examples"]]
        parts.append("</ul>")
    return "\n".join(parts)


def _stages(facts: Facts) -> str:
    names = [stage["name"] for stage in facts["stages"]]
    seconds = [stage["seconds"] for stage in facts["stages"]]
    total = sum(seconds) or 1.0
    body = [
        [escaped(name), f"{value:,.1f}", as_share(value / total)] for name, value in zip(names, seconds, strict=True)
    ]
    height = bar_height(len(names))
    picture = _draw("Time of each stage", height, lambda axis: draw_bars(axis, names, seconds, as_time, "seconds"))
    return "<h2>Time</h2>\n" + picture + html_table(["stage", "seconds", "share"], body, texts=1)


def _ranks(facts: Facts) -> str:
    ranks = facts["ranks"]
    names, rates = [rank["name"] for rank in ranks], [rank["mb_per_s"] for rank in ranks]

    def draw(axis: Axes) -> None:
        if len(ranks) <= _SHOWN_BARS:
            draw_bars(axis, names, rates, lambda value: f"{value:,.2f}", "MB of text a second")
            return
        axis.bar(range(len(rates)), rates, 1.0, color=BLUE)
        axis.grid(axis="x", visible=False)
        axis.set_xlabel("ranks, in the order of the table")
        axis.set_ylabel("MB of text a second")

    head = ["rank", "pieces", "text", "seconds", "MB/s"]
    body = [
        [escaped(rank["name"]), as_count(rank["pieces"]), as_bytes(rank["text_bytes"]), f"{rank['seconds']:,.1f}",
         f"{rank['mb_per_s']:,.2f}"]
        for rank in ranks
    ]  # fmt: skip
    height = bar_height(len(ranks)) if len(ranks) <= _SHOWN_BARS else 2.4
    note = '<p class="note">What each rank read, cleaned and tokenized, and how fast.</p>\n'
    return "<h2>Ranks</h2>\n" + note + _draw("Speed of each rank", height, draw) + html_table(head, body, texts=1)


def _settings(facts: Facts) -> str:
    body = []
    for name, value in facts["settings"].items():
        said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if len(said) > _LONGEST_SETTING:
            said = f"{said[:_LONGEST_SETTING]} ... (all of it in report.json)"
        body.append([escaped(name), escaped(said)])
    return "<h2>Settings</h2>\n" + html_table(["setting", "value"], body, texts=2)


def _draw(title: str, height: float, draw: Callable[[Axes], None]) -> str:
    return draw_picture(title, height, lambda figure: draw(figure.add_subplot()))


def _pairs(edges: Sequence[int]) -> Iterable[tuple[int, int]]:
    return zip(edges[:-1], edges[1:], strict=True)
