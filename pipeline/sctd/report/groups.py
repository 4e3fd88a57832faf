"""Runs in groups, which differ in their seed alone, and groups in classes, which differ in the method alone."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sctd.config import ARMS, BASELINE, to_dict
from sctd.evaluate.results import Record
from sctd.present.pictures import colours
from sctd.present.table import mean_of
from sctd.report.gather import Inputs, Run
from sctd.report.paper import SHAPES, TITLES
from sctd.report.stats import Difference, welch
from sctd.train.flops import saving

TOKEN_DROP, SCTD = "token_drop", "sctd"
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


@dataclass(frozen=True)
class RunGroup:
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

    def values(self, key: str, step: int | None = None) -> list[float | None]:
        """Of each run, the last on record at a step; by default at the group's."""
        return [run.at(self.step if step is None else step).get(key) for run in self.trained]

    def mean(self, key: str, step: int | None = None) -> float | None:
        """Over the runs; None where one of them has nothing."""
        return mean_of(self.values(key, step))

    @property
    def evaluated(self) -> list[int]:
        """Steps at which any of them was fine-tuned on a task."""
        return sorted({step for run in self.runs for step, found in run.evaluations.items() if found.cells})


def group(inputs: Inputs) -> list[RunGroup]:
    """The groups, by class and arm."""
    kinds: list[Record] = []
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in inputs.runs:
        flat = settings(run)
        common = {key: value for key, value in flat.items() if not key.startswith(_METHOD)}
        if common not in kinds:
            kinds.append(common)
        method = [] if flat["arm"] == BASELINE else [(k, str(v)) for k, v in flat.items() if k.startswith(_METHOD)]
        key = (kinds.index(common), ARMS.index(flat["arm"]), tuple(sorted(method)))
        # A run that repeats a seed, or the beginning of another one, is no further pretraining seed, but a group of its
        # own.
        again = 0
        while any(
            other.config.run.seed == run.config.run.seed or other.begins == run.begins
            for other in found.get((*key, again), ())
        ):
            again += 1
        found.setdefault((*key, again), []).append(run)
    members = sorted(found.items(), key=lambda item: item[0][:2])
    labels = _labels([settings(runs[0]) for _, runs in members])
    groups = [
        RunGroup(label, runs[0].config.arm, tuple(runs), key[0])
        for label, (key, runs) in zip(labels, members, strict=True)
    ]
    colour = colours({each.label: each.arm for each in groups})
    return [replace(each, colour=colour[each.label]) for each in groups]


def settings(run: Run) -> Record:
    """Everything by section.key that decides what a run computes, and the step it ends at."""
    flat: Record = {}
    for name, part in to_dict(run.config).items():
        flat |= {f"{name}.{key}": value for key, value in part.items()} if isinstance(part, dict) else {name: part}
    flat["objective.importance_warmup"] = flat["objective.importance_warmup"] or 0
    kept = {key: value for key, value in flat.items() if not key.startswith(_CIRCUMSTANCES)}
    return {**kept, "branched at step": run.begins[1], "last step": run.goal, "corpus": run.corpus}


def differences(groups: Sequence[RunGroup]) -> list[str]:
    """Keys beside the method in which their recipes differ."""
    flats = [settings(each.first) for each in groups]
    return [key for key in flats[0] if not key.startswith(_METHOD) and any(f[key] != flats[0][key] for f in flats)]


def partners(groups: Sequence[RunGroup]) -> list[tuple[RunGroup, RunGroup]]:
    """(group, what it is compared with): the baseline of its class, and for SCTD token dropping that drops alike."""
    pairs = []
    for reference_arm, arms in ((BASELINE, ARMS[1:]), (TOKEN_DROP, (SCTD,))):
        for each in groups:
            found = [other for other in groups if other.arm == reference_arm and other.kind == each.kind]
            pairs += [(each, other) for other in found if each.arm in arms and drop_alike(each, other)]
    return pairs


def drop_alike(first: RunGroup, second: RunGroup) -> bool:
    """Whether one is the baseline, or they drop as much in the same layers and steps."""
    a, b = (settings(each.first) for each in (first, second))
    return BASELINE in (first.arm, second.arm) or all(a[key] == b[key] for key in _DROPPING)


def baseline_of(group: RunGroup, groups: Sequence[RunGroup]) -> RunGroup | None:
    """The baseline of its class; None for a baseline."""
    found = next((each for each in groups if each.arm == BASELINE and each.kind == group.kind), None)
    return None if found is group else found


def saved(key: str, first: RunGroup, second: RunGroup | None) -> float | None:
    """The share of the second one's cost (hours or flops) that the first one saves on as many steps."""
    if second is None:
        return None
    step = min(first.step, second.step)
    return saving(first.mean(key, step), second.mean(key, step))


def loss_apart(first: RunGroup, second: RunGroup | None) -> Difference | None:
    """Held-out loss of the first minus the second's, where both are at one step and all their runs have one."""
    values = [group.values("valid_loss") for group in (first, second) if group]
    known = [[value for value in of if value is not None] for of in values]
    if second is None or first.step != second.step or not all(known) or known != values:
        return None
    return welch(*known)


def size_of(group: RunGroup) -> str:
    """The paper's size that it is nearest to."""
    model = group.first.config.model
    return "large" if model.layers * model.hidden_size**2 > 2 * SHAPES["base"][0] * SHAPES["base"][1] ** 2 else "base"


def is_papers(group: RunGroup) -> bool:
    """Whether the model is one of the paper's."""
    model = group.first.config.model
    return model.family == "bert" and (model.layers, model.hidden_size) in SHAPES.values()


def _labels(flats: Sequence[Record]) -> list[str]:
    """The arm; the family, wherever there are two; and where the arm has several groups, what sets this one apart."""
    labels: list[str] = []
    for flat in flats:
        others = [other for other in flats if other["arm"] == flat["arm"] and other != flat]
        apart = {key for other in others for key in flat if other[key] != flat[key]}
        shown = [_FAMILY] if any(other[_FAMILY] != flat[_FAMILY] for other in flats) else []
        while len(shown) < _SHOWN_KEYS and (left := [o for o in others if all(o[key] == flat[key] for key in shown)]):
            shown.append(max(flat, key=lambda key: sum(other[key] != flat[key] for other in left)))
        more = len(apart - set(shown))
        said = [_set_to(key, flat[key]) for key in shown] + ([f"{more} more"] if more else [])
        labels.append(TITLES[flat["arm"]] + (f" ({', '.join(said)})" if said else ""))
    again = [labels[:place].count(label) for place, label in enumerate(labels)]
    return [f"{label} no. {number + 1}" if number else label for label, number in zip(labels, again, strict=True)]


def _set_to(key: str, value: Any) -> str:
    section, _, name = key.rpartition(".")
    return FAMILIES[value] if key == _FAMILY else f"{section if name == 'name' else name} {value}"
