"""Runs in groups, which differ in their seed alone, and groups in classes, which differ in the method alone."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sctd.config import ARMS, to_dict
from sctd.evaluate.analyse.pictures import colours
from sctd.evaluate.results import Record
from sctd.report.gather import Evaluation, Material, Run
from sctd.report.paper import SHAPES, TITLES
from sctd.report.stats import mean_of

BASELINE, TOKEN_DROP, SCTD = "baseline", "token_drop", "sctd"
FAMILIES = {"bert": "BERT", "modernbert": "ModernBERT"}
_FAMILY = "model.family"
# How much is dropped, where and when: the same for two arms of which one adds the alignment alone.
_DROPPING = (
    "model.keep_ratio", "model.first_dropped", "model.full_tail", "schedule.full_start", "schedule.full_finish",
)  # fmt: skip
_METHOD = ("arm", "objective.", *_DROPPING)
# What says where, when and how fast, not what is computed.
_CIRCUMSTANCES = (
    "run.", "evaluation.", "data.corpus", "train.stop_at", "train.log_every", "train.valid_every", "train.save_every",
    "train.keep_checkpoints", "train.async_save", "train.micro_batch_size", "train.zero_stage", "train.compile",
    "train.cuda_graphs", "train.checkpoint_activations", "train.rollback_after", "train.timeout",
)  # fmt: skip
_SHOWN_KEYS = 2  # in a label
_OTHERS = ("#111111", "#1f9a9a", "#9a9a1f", "#7a5a3a", "#c2528b")


@dataclass(frozen=True)
class Group:
    """Runs of one arm and one recipe, over seeds.

    Args:
        kind: number of its class: groups of one class differ in the method alone.
    """

    label: str
    arm: str
    runs: tuple[Run, ...]
    kind: int
    colour: str = ""

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def trained(self) -> tuple[Run, ...]:
        """Those with anything on record."""
        return tuple(run for run in self.runs if run.records)

    @functools.cached_property
    def step(self) -> int:
        """The last step that all of them have on record."""
        return min((run.step for run in self.trained), default=0)

    def mean(self, key: str, step: int | None = None) -> float | None:
        """Of what is on record at a step, over the runs; None where one of them has nothing."""
        step = self.step if step is None else step
        return mean_of([run.at(step).get(key) for run in self.trained])

    @property
    def evaluated(self) -> list[int]:
        """Steps at which any of them was fine-tuned on a task."""
        return sorted({step for run in self.runs for step, found in run.evaluations.items() if found.cells})


def group(material: Material) -> list[Group]:
    """The groups, by class and arm."""
    flats = [settings(run) for run in material.runs]
    kinds: list[Record] = []
    found: dict[tuple[Any, ...], list[int]] = {}
    for place, flat in enumerate(flats):
        common = {key: value for key, value in flat.items() if not key.startswith(_METHOD)}
        if common not in kinds:
            kinds.append(common)
        method = {} if flat["arm"] == BASELINE else {key: flat[key] for key in flat if key.startswith(_METHOD)}
        key = (kinds.index(common), ARMS.index(flat["arm"]), tuple(sorted((k, str(v)) for k, v in method.items())))
        seed = material.runs[place].config.run.seed
        again = 0  # a run that repeats a seed is no further pretraining seed, but a group of its own
        while any(material.runs[other].config.run.seed == seed for other in found.get((*key, again), ())):
            again += 1
        found.setdefault((*key, again), []).append(place)
    members = [found[key] for key in sorted(found, key=lambda key: (*key[:2], found[key]))]
    keys = sorted(found, key=lambda key: (*key[:2], found[key]))
    labels = _labels([flats[places[0]] for places in members])
    groups = [
        Group(label, flats[places[0]]["arm"], tuple(material.runs[place] for place in places), key[0])
        for label, key, places in zip(labels, keys, members, strict=True)
    ]
    colour = colours({each.label: each.arm for each in groups})
    return [replace(each, colour=colour[each.label]) for each in groups]


def settings(run: Run) -> Record:
    """Everything by section.key that decides what a run computes, and the step it ends at."""
    flat: Record = {}
    for name, part in to_dict(run.config).items():
        flat |= {f"{name}.{key}": value for key, value in part.items()} if isinstance(part, dict) else {name: part}
    kept = {key: value for key, value in flat.items() if not key.startswith(_CIRCUMSTANCES)}
    return {**kept, "last step": run.goal, "corpus": run.corpus}


def differences(groups: Sequence[Group]) -> list[str]:
    """Keys beside the method in which their recipes differ."""
    flats = [settings(each.first) for each in groups]
    return [key for key in flats[0] if not key.startswith(_METHOD) and any(f[key] != flats[0][key] for f in flats)]


def partners(groups: Sequence[Group]) -> list[tuple[Group, Group]]:
    """(group, what it is compared with): the baseline of its class, and for SCTD token dropping that drops alike."""
    pairs = []
    for reference_arm, arms in ((BASELINE, ARMS[1:]), (TOKEN_DROP, (SCTD,))):
        for each in groups:
            found = [other for other in groups if other.arm == reference_arm and other.kind == each.kind]
            pairs += [(each, other) for other in found if each.arm in arms and drop_alike(each, other)]
    return pairs


def drop_alike(first: Group, second: Group) -> bool:
    """Whether one is the baseline, or they drop as much in the same layers and steps."""
    a, b = (settings(each.first) for each in (first, second))
    return BASELINE in (first.arm, second.arm) or all(a[key] == b[key] for key in _DROPPING)


def baseline_of(group: Group, groups: Sequence[Group]) -> Group | None:
    """The baseline of its class."""
    return next((each for each in groups if each.arm == BASELINE and each.kind == group.kind), None)


def size_of(group: Group) -> str:
    """The paper's size that it is nearest to."""
    model = group.first.config.model
    return "large" if model.layers * model.hidden_size**2 > 2 * SHAPES["base"][0] * SHAPES["base"][1] ** 2 else "base"


def is_papers(group: Group) -> bool:
    """Whether the model is one of the paper's."""
    model = group.first.config.model
    return model.family == "bert" and (model.layers, model.hidden_size) in SHAPES.values()


def colours_of(others: Sequence[Evaluation]) -> dict[str, str]:
    """For checkpoints of no run."""
    return {each.name: _OTHERS[place % len(_OTHERS)] for place, each in enumerate(others)}


def _labels(flats: Sequence[Record]) -> list[str]:
    """The arm; the family, wherever there are two; and where the arm has several groups, what sets this one apart."""
    labels = []
    for flat in flats:
        others = [other for other in flats if other["arm"] == flat["arm"] and other != flat]
        apart = {key for other in others for key in flat if other[key] != flat[key]}
        shown = [_FAMILY] if any(other[_FAMILY] != flat[_FAMILY] for other in flats) else []
        while len(shown) < _SHOWN_KEYS and (left := [o for o in others if all(o[key] == flat[key] for key in shown)]):
            shown.append(max(flat, key=lambda key: sum(other[key] != flat[key] for other in left)))
        more = len(apart - set(shown))
        said = [_set_to(key, flat[key]) for key in shown] + ([f"{more} more"] if more else [])
        labels.append(TITLES[flat["arm"]] + (f" ({', '.join(said)})" if said else ""))
    return [_numbered(labels, place) for place in range(len(labels))]


def _set_to(key: str, value: Any) -> str:
    section, _, name = key.rpartition(".")
    return FAMILIES[value] if key == _FAMILY else f"{section if name == 'name' else name} {value}"


def _numbered(labels: Sequence[str], place: int) -> str:
    """With a number where other groups are called the same."""
    again = labels[:place].count(labels[place])
    return f"{labels[place]} no. {again + 1}" if again else labels[place]
