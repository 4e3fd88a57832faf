"""What a preparation did, for people: report.html, one page without network and scripts; the same in report.json."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sctd.corpus.vocabulary import said_of_additions
from sctd.files import write_atomically
from sctd.present.page import Points, Section, html_page, html_tiles
from sctd.present.pictures import BLUE, ORANGE, Picture, bar_picture, grid, number_tick, percent_tick
from sctd.present.table import Table
from sctd.present.words import as_bytes, as_percent, as_share, as_short, as_time, escaped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Facts = dict[str, Any]

_SHOWN_TOKENS = 25  # in the picture; the table has all
_SHOWN_BARS = 40  # with a name each
_LONGEST_SETTING = 240
_REASONS = {"symbols": "too many symbols", "faults": "faults in the data", "beyond_limit": "beyond a limit"}


def write_report(folder: Path, facts: Facts) -> None:
    """Write report.json, the facts as they are, and report.html, the same drawn and explained; both flushed to disk.
    Equal facts give equal bytes. Raises OSError."""
    write_atomically(folder / "report.json", json.dumps(facts, indent=2) + "\n")
    write_atomically(folder / "report.html", page(facts))


def page(facts: Facts) -> str:
    """report.html."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    made = facts["made"].replace("T", " ").replace("+00:00", " UTC")
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
    grown = [_additions] if facts["additions"] else []
    sections = (_rows, _sources, _lengths, *grown, _tokens, _left_out, _stages, _ranks, _settings)
    parts = [
        f'<p class="made">Prepared {escaped(made)} with {escaped(versions)}.</p>',
        f"<p>{escaped(_summary(facts))}</p>",
        html_tiles(tiles),
        *(section(facts).html() for section in sections),
    ]
    return html_page(f"Corpus {facts['name']}", parts)


def _summary(facts: Facts) -> str:
    read, names = facts["read"], [source["name"] for source in facts["sources"]]
    origin = f"the source {names[0]}" if len(names) == 1 else f"{len(names)} sources"
    packed = ", or ".join(
        f"{rows['train']:,} rows of {length} tokens for training (and {rows['valid']:,} held out)"
        for length, rows in facts["rows"].items()
    )
    entropy = facts["unigram_entropy"]
    return (
        f"{read['documents']:,} documents ({as_bytes(read['bytes'])} of text) were read from {origin}; "
        f"{facts['documents']:,} of them are in the corpus, with {facts['tokens']:,} tokens of a vocabulary of "
        f"{facts['vocab_size']:,}. They fill {packed}. A model that knows no more than how often each token occurs has "
        f"a loss of {entropy:.3f} nats (perplexity {math.exp(entropy):,.0f}): training must come below that."
    )


def _rows(facts: Facts) -> Section:
    head = ["tokens a row", "train rows", "held-out rows", "rows that cut a document", "share", "special rows dropped",
            "tokens left over"]  # fmt: skip
    body = []
    for length, rows in facts["rows"].items():
        train, valid, cut, special, rest = (
            rows[key] for key in ("train", "valid", "cut_documents", "special_rows", "unfinished_tokens")
        )
        share = as_share(cut / max(1, train + valid))
        body.append([length, f"{train:,}", f"{valid:,}", f"{cut:,}", share, f"{special:,}", f"{rest:,}"])
    note = (
        "Rows are full: a document that does not fit goes on in the next row. Rows with more special tokens than "
        "others are dropped, and so is what does not fill a last row."
    )
    return Section("rows", "Rows", [note, Table("rows", "Rows of the corpus", head, body, texts=0)])


def _sources(facts: Facts) -> Section:
    sources = facts["sources"]
    head = ["source", "read from", "documents", "text", "tokens", "share of tokens", "weight in training"]
    body = [
        [s["name"], s["spec"], f"{s['documents']:,}", as_bytes(s["text_bytes"]), f"{s['tokens']:,}",
         as_share(s["share"]), "" if s["weight"] is None else f"{s['weight']:g}"]
        for s in sources
    ]  # fmt: skip
    section = Section("sources", "Sources")
    if len(sources) > 1:
        largest = sorted(sources, key=lambda source: -source["share"])[:_SHOWN_BARS]
        names, shares, weights = ([source[key] for source in largest] for key in ("name", "share", "weight"))
        series = {"share of tokens": shares} | ({"weight in training": weights} if any(weights) else {})
        title = "Share of the tokens by source"
        section.parts.append(bar_picture("sources", title, names, series, as_percent, tick=percent_tick))
    section.parts.append(Table("sources", "Documents, text and tokens of each source", head, body, texts=2))
    return section


def _lengths(facts: Facts) -> Section:
    edges, documents = facts["length_histogram"]["edges"], facts["length_histogram"]["documents"]
    bins = list(itertools.pairwise(edges))

    def draw(axes: Axes) -> None:
        axes.bar(edges[:-1], documents, [b - a for a, b in bins], align="edge", color=BLUE, edgecolor="white")
        axes.set_xscale("log", base=2)
        axes.set_xticks(edges[:: 1 + len(edges) // 16])
        axes.xaxis.set_major_formatter(number_tick)
        axes.yaxis.set_major_formatter(number_tick)
        axes.grid(axis="x", visible=False)
        axes.set_xlim(edges[0], edges[-1])
        for mark in map(int, facts["rows"]):
            if edges[0] < mark < edges[-1]:
                axes.axvline(mark, color=ORANGE, lw=1.2, ls="--")
                axes.text(mark, 1.02, f"{mark:,}", transform=axes.get_xaxis_transform(), ha="center", color=ORANGE)
        axes.set(xlabel="tokens in a document; dashed: tokens a row", ylabel="documents")

    body = [[f"{a:,} to {b - 1:,}", f"{count:,}"] for (a, b), count in zip(bins, documents, strict=True)]
    table = Table("lengths", "Documents by length", ["tokens in a document", "documents"], body, halves=True)
    picture = Picture("lengths", "Lengths of documents", 2.8, grid([draw]))
    return Section("lengths", "Lengths of documents", [picture, table])


def _additions(facts: Facts) -> Section:
    added = facts["additions"]
    note = (
        f"{said_of_additions(added)}. Counted on {added['sample_words']:,} words of training documents. All other "
        "pieces kept their ids. What those that save most save, each beyond those before it:"
    )
    body = [
        [piece["piece"], str(piece["id"]), " ".join(piece["was"]), f"{piece['saved']:,}", as_share(piece["share"])]
        for piece in added["pieces"]
    ]
    head = ["piece", "id", "was", "tokens saved", "share"]
    table = Table("additions", "Added pieces that save most", head, body, texts=3)
    return Section("additions", "Added to the vocabulary", [note, table])


def _tokens(facts: Facts) -> Section:
    tokens = facts["top_tokens"]
    first = tokens[:_SHOWN_TOKENS]
    names, shares = [token["token"] for token in first], [token["share"] for token in first]
    body = [[t["token"], str(t["id"]), f"{t['count']:,}", as_share(t["share"])] for t in tokens]
    section = Section("tokens", "Most frequent tokens", ["Of the training documents, before packing."])
    if first:
        title = "Share of the most frequent tokens"
        section.parts.append(bar_picture("tokens", title, names, {"": shares}, as_percent, tick=percent_tick))
    head = ["token", "id", "count", "share"]
    section.parts.append(Table("tokens", "The most frequent tokens", head, body, halves=True))
    return section


def _left_out(facts: Facts) -> Section:
    reasons = {_REASONS.get(key, key.replace("_", " ")): found for key, found in facts["left_out"].items()}
    cleaned = facts["cleaned"]
    section = Section("left-out", "What was left out")
    section.parts.append(
        f"Shares are of the documents read. In {cleaned['nfc']:,} documents characters were composed (Unicode NFC), "
        f"from {cleaned['control']:,} control characters were removed."
    )
    there = {name: found["documents"] for name, found in reasons.items() if found["documents"]}
    if there:
        series = {"": list(there.values())}
        section.parts.append(
            bar_picture("left-out", "Documents left out", list(there), series, "{:,}".format, "documents")
        )
    else:
        section.parts.append("Nothing: every document that was read is in the corpus.")
    body = [[name, f"{found['documents']:,}", as_share(found["share"])] for name, found in reasons.items()]
    section.parts.append(Table("left-out", "Documents left out, by reason", ["reason", "documents", "share"], body))
    if facts["fault_examples"]:
        section.parts += ["The first faults:", Points(facts["fault_examples"])]
    return section


def _stages(facts: Facts) -> Section:
    names = [stage["name"] for stage in facts["stages"]]
    seconds = [stage["seconds"] for stage in facts["stages"]]
    total = sum(seconds) or 1.0
    body = [[name, f"{value:,.1f}", as_share(value / total)] for name, value in zip(names, seconds, strict=True)]
    picture = bar_picture("stages", "Time of each stage", names, {"": seconds}, as_time, "seconds")
    return Section("time", "Time", [picture, Table("stages", "Stages", ["stage", "seconds", "share"], body)])


def _ranks(facts: Facts) -> Section:
    ranks = facts["ranks"]
    names, rates = [rank["name"] for rank in ranks], [rank["mb_per_s"] for rank in ranks]

    def draw(axes: Axes) -> None:
        axes.bar(range(len(rates)), rates, 1.0, color=BLUE)
        axes.grid(axis="x", visible=False)
        axes.set(xlabel="ranks, in the order of the table", ylabel=unit)

    unit, title = "MB of text a second", "Speed of each rank"
    picture = Picture("ranks", title, 2.4, grid([draw]))
    if len(ranks) <= _SHOWN_BARS:
        picture = bar_picture("ranks", title, names, {"": rates}, "{:,.2f}".format, unit)
    body = [
        [rank["name"], f"{rank['pieces']:,}", as_bytes(rank["text_bytes"]), f"{rank['seconds']:,.1f}",
         f"{rank['mb_per_s']:,.2f}"]
        for rank in ranks
    ]  # fmt: skip
    table = Table("ranks", "Ranks, one by one", ["rank", "pieces", "text", "seconds", "MB/s"], body)
    note = "What each rank read, cleaned and tokenized, and how fast."
    return Section("ranks", "Ranks", [note, picture, table])


def _settings(facts: Facts) -> Section:
    said = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in facts["settings"].items()}
    body = [[name, _cut(value)] for name, value in said.items()]
    return Section("settings", "Settings", [Table("settings", "All settings", ["setting", "value"], body, texts=2)])


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_SETTING else f"{text[:_LONGEST_SETTING]} ... (all of it in report.json)"
