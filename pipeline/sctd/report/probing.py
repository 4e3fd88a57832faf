"""What layers know (Figures 4 and 8)."""

import statistics
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from sctd.evaluate.analyse.pictures import draw_probe
from sctd.evaluate.results import Record, probe_key
from sctd.report import paper, stats
from sctd.report.arms import Group, colours_of, partners
from sctd.report.document import NOTHING, Cell, Fill, Head, Number, Picture, Points, Section, Table
from sctd.report.figures import add_legend
from sctd.report.gather import Evaluation
from sctd.report.stats import Difference
from sctd.report.words import file_name, listed, signed

_ACROSS = 2
_APART = {"at another step": "step", "on other sentences": "data"}  # why probes are not compared


def probe_section(groups: Sequence[Group], others: Sequence[Evaluation]) -> Section | None:
    """None where nothing was probed."""
    panels: dict[str, dict[str, Record]] = {}
    for label, (step, found) in {group.label: _last_probes(group) for group in groups}.items():
        for name, records in found.items():
            panels.setdefault(name, {})[label] = _mean_probe(records) | {"step": step}
    for other in others:
        for probe in other.probes:
            panels.setdefault(probe_key(probe), {})[other.name] = probe
    if not panels:
        return None
    colour = {group.label: group.colour for group in groups} | colours_of(others)
    section = Section("probing", "What each layer knows")
    section.parts.append(f"A linear classifier on frozen sentence vectors of each layer. {paper.PROBING}")
    title = "Probing accuracy by layer"
    note = "Shaded: layers that dropped tokens in training. Layer 0: embeddings."
    section.parts.append(Picture("probing", title, _height(len(panels)), _probes(panels, colour), note))
    said = [line for curves in panels.values() for line in _probe_words(curves, groups)]
    if said:
        section.parts.append(
            "Differences in points; p compares the shares that are right, as if sentences were drawn anew:"
        )
        section.parts.append(Points(said))
    section.parts += [_probe_table(name, curves) for name, curves in panels.items()]
    return section


def _title(probe: Record) -> str:
    return str(probe["title"]) + (", vectors of [CLS]" if probe.get("pooling") == "cls" else "")


def _last_probes(group: Group) -> tuple[int, dict[str, list[Record]]]:
    """The last step at which any run was probed, and by task the probes of each run there."""
    last = max((step for run in group.runs for step, found in run.evaluations.items() if found.probes), default=0)
    probes: dict[str, list[Record]] = {}
    for run in group.runs:
        for probe in run.evaluations[last].probes if last in run.evaluations else ():
            probes.setdefault(probe_key(probe), []).append(probe)
    return last, probes


def _mean_probe(records: Sequence[Record]) -> Record:
    """Over pretraining seeds."""
    layers = [
        {"layer": same[0]["layer"], "accuracy": statistics.fmean(layer["accuracy"] for layer in same)}
        for same in zip(*(record["layers"] for record in records), strict=False)
    ]
    return {**records[0], "layers": layers}


def _probes(panels: Mapping[str, Mapping[str, Record]], colour: Mapping[str, str]) -> Fill:
    def fill(figure: Figure) -> None:
        for place, curves in enumerate(panels.values(), 1):
            axes = figure.add_subplot(-(-len(panels) // _ACROSS), min(_ACROSS, len(panels)), place)
            draw_probe(axes, _title(next(iter(curves.values()))), curves, colour)
        add_legend(figure)

    return fill


def _height(panels: int) -> float:
    return 0.5 + 2.8 * -(-panels // _ACROSS)


def _probe_words(curves: Mapping[str, Record], groups: Sequence[Group]) -> list[str]:
    """Differences of arms, in points, at the last dropped layer and at the last layer."""
    title = _title(next(iter(curves.values())))
    said = []
    for first, second in partners(groups):
        if first.label not in curves or second.label not in curves:
            continue
        a, b = curves[first.label], curves[second.label]
        apart = [how for how, key in _APART.items() if a.get(key) != b.get(key)]
        if apart or len(a["layers"]) != len(b["layers"]):
            how = f"probed {listed(apart)}" if apart else "of another number of layers"
            said.append(f"{title}, {first.label} against {second.label}: {how}, so they are not compared.")
            continue
        last = len(a["layers"]) - 1
        trials = (a.get("rows") or {}).get("test", 0)
        places = [(a["dropped"][1], "the last dropped layer")] if a["dropped"] else []
        places += [(last, "the last layer")] if not places or places[0][0] != last else []
        found = [
            f"{_difference(a['layers'][layer]['accuracy'], b['layers'][layer]['accuracy'], trials)} at {name} ({layer})"
            for layer, name in places
        ]
        said.append(f"{title}, {first.label} against {second.label}: {listed(found)}.")
    return said


def _difference(a: float, b: float, trials: int) -> str:
    found = stats.two_shares(a, b, trials) if trials else Difference(a - b)
    return signed(100 * found.value, 1) + (f" ({stats.as_p(found.p)})" if found.p is not None else "")


def _probe_table(name: str, curves: Mapping[str, Record]) -> Table:
    heads = [Head("layer"), *(Head(label) for label in curves)]
    rows: list[list[Cell]] = []
    for layer in range(max(len(curve["layers"]) for curve in curves.values())):
        rows.append([str(layer), *(_accuracy(curve, layer) for curve in curves.values())])
    title = _title(next(iter(curves.values())))
    note = "Percent on the test sentences. ◦: the output of a layer that dropped tokens in training."
    return Table(f"probing-{file_name(name)}", f"{title}: accuracy by layer", heads, rows, note=note)


def _accuracy(curve: Record, layer: int) -> Cell:
    if layer >= len(curve["layers"]):
        return NOTHING
    first, end = curve["dropped"] or (0, 0)
    value = 100 * curve["layers"][layer]["accuracy"]
    return Number(value, f"{value:.1f}{' ◦' if first < layer <= end else ''}")
