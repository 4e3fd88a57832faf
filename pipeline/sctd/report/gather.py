"""What a report is about, read from the folders that the user names: runs, ablations, evaluations."""

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from sctd.config import Config
from sctd.corpus.manifest import Manifest, read_manifest
from sctd.errors import UserError
from sctd.evaluate.ablate.ablations import ABLATION, Row, read_ablation
from sctd.evaluate.ablate.table import Line, read_line
from sctd.evaluate.analyse.probe import distinct_names
from sctd.evaluate.encoder import ENCODER, EVALUATION, read_mark
from sctd.evaluate.results import SETTING, Record, Score, best_scores, read_cells, read_drift, read_probes
from sctd.objective.flops import flops_until
from sctd.train.keep.attempts import read_attempts
from sctd.train.keep.export import CORPUS_COPY, read_run
from sctd.train.keep.metrics import latest, read_metrics

_RUN = "config.yaml"
_CELL = ("task", "title", "suite", "seed", *SETTING)


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one checkpoint.

    Args:
        facts: of an export of ours (arm, seed, step, dropped, ...); empty for other models.
        cells, probes: as `evaluate.results` reads them.
    """

    folder: Path
    name: str
    facts: Record
    cells: tuple[Record, ...]
    probes: tuple[Record, ...]

    @functools.cached_property
    def best(self) -> dict[str, Score]:
        """By task (`TASK` or `TASK-32shot`), each seed at its best dev epoch."""
        return best_scores(self.cells, "best")

    @functools.cached_property
    def last(self) -> dict[str, Score]:
        """The same at the last epoch."""
        return best_scores(self.cells, "last")

    def ways(self, task: str) -> set[tuple[Any, ...]]:
        """How a task was fine-tuned: hash of the rows, and every setting that was tried."""
        return {(cell.get("data"), *(cell[key] for key in SETTING)) for cell in self.cells if key_of(cell) == task}


@dataclass(frozen=True)
class Run:
    """A pretraining run. `evaluations`: by step. `drift`: over its checkpoints, where it was measured."""

    folder: Path
    name: str
    config: Config
    manifest: Manifest
    records: tuple[Record, ...]
    attempts: tuple[Record, ...]
    evaluations: dict[int, Evaluation]
    drift: Record | None

    @property
    def goal(self) -> int:
        """The step that it ends at."""
        return self.config.train.stop_at or self.config.train.steps

    @property
    def step(self) -> int:
        """The last one on record."""
        return self.records[-1]["step"] if self.records else 0

    @functools.cached_property
    def points(self) -> tuple[Record, ...]:
        """Its records with `flops` (of the model, so far) and `hours` (of training)."""
        flops = flops_until(self.config, self.manifest, [record["step"] for record in self.records])
        return tuple(
            {**record, "flops": work, "hours": None if seconds is None else seconds / 3600}
            for record, work in zip(self.records, flops, strict=True)
            for seconds in (record.get("seconds"),)
        )

    def at(self, step: int) -> Record:
        """The last value on record of everything up to this step; hours between two records and FLOPs at the step."""
        if step not in self._looked_up:
            found = latest(point for point in self.points if point["step"] <= step)
            if found:
                found["flops"] = flops_until(self.config, self.manifest, [step])[0]
            hours = self.known("hours")
            if "hours" in found and step <= self.step:
                found["hours"] = float(np.interp(step, list(hours), list(hours.values())))
            self._looked_up[step] = found
        return self._looked_up[step]

    @functools.cached_property
    def keys(self) -> set[str]:
        """Of everything on record."""
        return set().union(*self.records)

    def known(self, key: str) -> dict[int, float]:
        """What is on record under this key, by step; what is no finite number is left out."""
        if key not in self._by_key:
            self._by_key[key] = {point["step"]: point[key] for point in self.points if finite(point.get(key))}
        return self._by_key[key]

    @functools.cached_property
    def _by_key(self) -> dict[str, dict[int, float]]:
        """What `known` has found."""
        return {}

    @functools.cached_property
    def _looked_up(self) -> dict[int, Record]:
        """What `at` has found, by step."""
        return {}

    @functools.cached_property
    def corpus(self) -> str:
        """Identity of the rows that it can train on."""
        shards = [shard.sha256 for length in self.manifest.splits.values() for shard in length["train"].shards]
        return hashlib.sha256("".join([self.manifest.tokenizer_hash, *shards]).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Ablation:
    """`lines`: of each row what its run has come to (None where it has not begun), and how it was scored at its end."""

    folder: Path
    kind: str
    title: str
    recipe: str
    lines: tuple[tuple[Row, Line | None, Evaluation], ...]


@dataclass(frozen=True)
class Material:
    """All that a report is about. `others`: checkpoints that belong to none of the runs."""

    runs: tuple[Run, ...]
    others: tuple[Evaluation, ...]
    ablations: tuple[Ablation, ...]


def gather(folders: Sequence[Path]) -> Material:
    """Read everything below the folders; each folder counts once.

    Raises:
        UserError: a folder that is neither run, ablation nor evaluation, or a file in one that cannot be read.
    """
    runs: list[Path] = []
    others: list[Path] = []
    ablations: list[Path] = []
    for folder in {folder.resolve(): folder for folder in folders}.values():
        _kind(folder, runs, ablations, others).append(folder)
    names = distinct_names([folder.resolve().name for folder in runs], [str(folder) for folder in runs])
    found = [_run(folder, name) for folder, name in zip(runs, names, strict=True)]
    inside = {evaluation.folder.resolve() for run in found for evaluation in run.evaluations.values()}
    rest = [_evaluation(folder) for folder in others if folder.resolve() not in inside]
    found, rest = _give_back(found, rest)
    return Material(tuple(found), tuple(_named(rest)), tuple(map(_ablation, ablations)))


def _kind(folder: Path, runs: list[Path], ablations: list[Path], evaluations: list[Path]) -> list[Path]:
    """The list that a folder belongs to."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: give runs, folders of ablations, or of evaluations")
    for mark, kind in ((_RUN, runs), (ABLATION, ablations), (ENCODER, evaluations)):
        if (folder / mark).is_file():
            return kind
    below = sorted(path.parent.name for mark in (_RUN, ABLATION, ENCODER) for path in folder.glob(f"*/{mark}"))
    hint = f"; did you mean those in it ({', '.join(below[:3])}{', ...' if below[3:] else ''})?" if below else ""
    raise UserError(
        f"{folder} holds nothing to report: a run has {_RUN}, an ablation {ABLATION}, an evaluation {ENCODER}{hint}"
    )


def _run(folder: Path, name: str) -> Run:
    config, manifest = read_run(folder), read_manifest(folder / CORPUS_COPY)
    evaluations = {}
    for place in sorted((folder / EVALUATION).glob("step-*")):
        number = place.name.removeprefix("step-")
        if place.is_dir() and number.isdigit():
            found = _evaluation(place)
            if found.cells or found.probes:
                evaluations[int(number)] = found
    drift = read_drift(folder)
    if drift is not None:
        _check(folder / EVALUATION / "drift.json", lambda: _check_drift(drift))
    records, attempts = read_metrics(folder), read_attempts(folder)
    return Run(folder, name, config, manifest, tuple(records), tuple(attempts), evaluations, drift)


def _evaluation(folder: Path) -> Evaluation:
    mark = read_mark(folder) if (folder / ENCODER).is_file() else {}
    cells, probes = read_cells(folder), read_probes(folder)
    for path, cell in zip(sorted(folder.glob("finetune/*/*/result.json")), cells, strict=True):
        _check(path, functools.partial(_check_cell, cell))
    for path, probe in zip(sorted(folder.glob("probe/*.json")), probes, strict=True):
        _check(path, functools.partial(_check_probe, probe))
    name = str(mark.get("name") or folder.resolve().name)
    return Evaluation(folder, name, dict(mark.get("facts") or {}), tuple(cells), tuple(probes))


def _give_back(runs: list[Run], others: list[Evaluation]) -> tuple[list[Run], list[Evaluation]]:
    """Evaluations that were kept elsewhere (`--out`) go to the run they are of."""
    rest = []
    for other in others:
        facts = other.facts
        key = (facts.get("run"), facts.get("arm"), facts.get("seed"))
        of = [
            place
            for place, run in enumerate(runs)
            if key == (run.folder.resolve().name, run.config.arm, run.config.run.seed) and "step" in facts
        ]
        if len(of) != 1:  # of none, or nobody knows of which
            rest.append(other)
            continue
        mine = of[0]
        old = runs[mine].evaluations.get(facts["step"])
        both = other if old is None else replace(old, cells=old.cells + other.cells, probes=old.probes + other.probes)
        runs[mine] = replace(runs[mine], evaluations=runs[mine].evaluations | {facts["step"]: both})
    return runs, rest


def _named(evaluations: list[Evaluation]) -> Iterable[Evaluation]:
    names = distinct_names([each.name for each in evaluations], [str(each.folder) for each in evaluations])
    return (replace(each, name=name) for each, name in zip(evaluations, names, strict=True))


def _ablation(folder: Path) -> Ablation:
    facts = read_ablation(folder)
    lines = []
    for row in facts["rows"]:
        row = Row(row["label"], row.get("value", ""), row["run"], tuple(row.get("overrides", ())))
        place = folder / row.run
        line = read_line(row, read_run(place), place) if (place / _RUN).is_file() else None
        scored = _evaluation(place / EVALUATION / f"step-{line.goal if line else 0:08d}")
        lines.append((row, line, scored))
    return Ablation(folder, facts["kind"], str(facts.get("title") or facts["kind"]), str(facts["recipe"]), tuple(lines))


# ---- whether files hold what they should ---------------------------------------------------------------------------


def _check(path: Path, look: Callable[[], None]) -> None:
    try:
        look()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is not as evaluations write it ({what}): remove it, and evaluate again") from None


def _check_cell(cell: Record) -> None:
    for key in _CELL:
        cell[key]
    for epoch in ("best", "last"):
        for metric in cell["metrics"]:
            float(cell["scores"][epoch][metric])


def _check_probe(probe: Record) -> None:
    first, end = probe["dropped"] or (0, 0)
    probe["title"].strip(), first + end, probe["layers"][0]
    for layer in probe["layers"]:
        float(layer["accuracy"]) + layer["layer"]


def _check_drift(drift: Record) -> None:
    drift["arm"].strip(), drift["encoder"].strip(), float(drift["sentences"])
    for point in drift["points"]:
        float(point["cosine"]) + float(point["deviation"]) + point["step"]
        point["valid_loss"]


def key_of(cell: Record) -> str:
    """The task of a cell as `best_scores` names it."""
    return f"{cell['task']}-{cell['shots']}shot" if cell.get("shots") else str(cell["task"])


def finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)
