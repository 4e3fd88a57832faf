"""What a report is about, read from the folders that the user names: runs, ablations, evaluations."""

import functools
import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from sctd.config import Config, parse_run
from sctd.corpus.manifest import Manifest, read_manifest
from sctd.errors import UserError
from sctd.evaluate.ablate.ablations import ABLATION, Line, Variant, read_ablation, read_line
from sctd.evaluate.encoder import ENCODER, EVALUATION, distinct_names, read_mark
from sctd.evaluate.results import SETTING, Record, Score, best_scores, read_cells, read_drift, read_probes
from sctd.train.flops import flops_until
from sctd.train.keep.attempts import read_attempts
from sctd.train.keep.earlier import read_earlier
from sctd.train.keep.export import CORPUS_COPY, read_run
from sctd.train.keep.metrics import latest, read_metrics

_RUN = "config.yaml"


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
    def scores(self) -> dict[str, dict[str, Score]]:
        """By epoch (best on the dev set, last) and task (`TASK` or `TASK-32shot`)."""
        return {epoch: best_scores(self.cells, epoch) for epoch in ("best", "last")}

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
    def begins(self) -> tuple[Path, int]:
        """The run that it has branched from, and the last step they have in common; itself, and 0."""
        parent, step = parse_run(self.config.run.branch_from)
        return (parent.resolve(), step) if step is not None else (self.folder.resolve(), 0)

    @functools.cached_property
    def points(self) -> tuple[Record, ...]:
        """Its records with `flops` (of the model, so far) and `hours` (of training)."""
        flops = self._flops([record["step"] for record in self.records])
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
                found["flops"] = self._flops([step])[0]
            hours = self.known("hours")
            if "hours" in found and step <= self.step:
                found["hours"] = float(np.interp(step, list(hours), list(hours.values())))
            self._looked_up[step] = found
        return self._looked_up[step]

    def _flops(self, steps: Sequence[int]) -> list[float]:
        return flops_until(self.config, self.manifest, steps, read_earlier(self.folder))

    @functools.cached_property
    def _looked_up(self) -> dict[int, Record]:
        """What `at` has found, by step."""
        return {}

    @functools.cached_property
    def keys(self) -> set[str]:
        """Of everything on record."""
        return set().union(*self.records)

    def known(self, key: str) -> dict[int, float]:
        """What is on record under this key, by step; what is no finite number is left out."""
        return self._by_key.get(key, {})

    @functools.cached_property
    def _by_key(self) -> dict[str, dict[int, float]]:
        found: dict[str, dict[int, float]] = defaultdict(dict)
        for point in self.points:
            for key, value in point.items():
                if finite(value):
                    found[key][point["step"]] = value
        return found

    @functools.cached_property
    def corpus(self) -> str:
        """Identity of the rows that it can train on."""
        shards = [shard.sha256 for length in self.manifest.splits.values() for shard in length["train"].shards]
        return hashlib.sha256("".join([self.manifest.tokenizer_hash, *shards]).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Ablation:
    """`lines`: of each run what it has come to, and how it was scored at its end."""

    folder: Path
    kind: str
    title: str
    recipe: str
    lines: tuple[tuple[Line, Evaluation], ...]


@dataclass(frozen=True)
class Inputs:
    """All that a report is about. `others`: checkpoints that belong to none of the runs."""

    runs: tuple[Run, ...]
    others: tuple[Evaluation, ...]
    ablations: tuple[Ablation, ...]

    @property
    def evaluations(self) -> list[Evaluation]:
        """Of every evaluated checkpoint."""
        found = [each for run in self.runs for each in run.evaluations.values()]
        return [*found, *self.others, *(each for ablation in self.ablations for _, each in ablation.lines)]


def gather(folders: Sequence[Path]) -> Inputs:
    """Read everything below the folders; each folder counts once.

    Raises:
        UserError: a folder that is neither run, ablation nor evaluation, or a file in one that cannot be read.
    """
    kinds: dict[str, list[Path]] = {_RUN: [], ABLATION: [], ENCODER: []}
    for folder in {folder.resolve(): folder for folder in folders}.values():
        kinds[_kind(folder, list(kinds))].append(folder)
    names = distinct_names([folder.resolve().name for folder in kinds[_RUN]], [str(folder) for folder in kinds[_RUN]])
    runs = [_run(folder, name) for folder, name in zip(kinds[_RUN], names, strict=True)]
    inside = {evaluation.folder.resolve() for run in runs for evaluation in run.evaluations.values()}
    others = []
    for each in [_evaluation(folder) for folder in kinds[ENCODER] if folder.resolve() not in inside]:
        owners = [place for place, run in enumerate(runs) if _is_of(each, run)]
        if len(owners) != 1:  # of none, or nobody knows of which
            others.append(each)
            continue
        run, step = runs[owners[0]], each.facts["step"]
        old = run.evaluations.get(step, replace(each, cells=(), probes=()))
        both = replace(old, cells=old.cells + each.cells, probes=old.probes + each.probes)
        runs[owners[0]] = replace(run, evaluations=run.evaluations | {step: both})
    names = distinct_names([each.name for each in others], [str(each.folder) for each in others])
    named = (replace(each, name=name) for each, name in zip(others, names, strict=True))
    return Inputs(tuple(runs), tuple(named), tuple(map(_ablation, kinds[ABLATION])))


def _kind(folder: Path, marks: Sequence[str]) -> str:
    """The file that tells what a folder is."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: give runs, folders of ablations, or of evaluations")
    for mark in marks:
        if (folder / mark).is_file():
            return mark
    below = sorted(path.parent.name for mark in marks for path in folder.glob(f"*/{mark}"))
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
        _check(folder / EVALUATION / "drift.json", drift, "drift")
    records, attempts = read_metrics(folder), read_attempts(folder)
    return Run(folder, name, config, manifest, tuple(records), tuple(attempts), evaluations, drift)


def _evaluation(folder: Path) -> Evaluation:
    mark = read_mark(folder) if (folder / ENCODER).is_file() else {}
    cells, probes = read_cells(folder), read_probes(folder)
    for path, cell in zip(sorted(folder.glob("finetune/*/*/result.json")), cells, strict=True):
        _check(path, cell, "cell")
    for path, probe in zip(sorted(folder.glob("probe/*.json")), probes, strict=True):
        _check(path, probe, "probe")
    name = str(mark.get("name") or folder.resolve().name)
    return Evaluation(folder, name, dict(mark.get("facts") or {}), tuple(cells), tuple(probes))


def _is_of(evaluation: Evaluation, run: Run) -> bool:
    """Whether an evaluation that was kept elsewhere (`--out`) is of this run."""
    facts = evaluation.facts
    key = (facts.get("run"), facts.get("arm"), facts.get("seed"))
    return "step" in facts and key == (run.folder.resolve().name, run.config.arm, run.config.run.seed)


def _ablation(folder: Path) -> Ablation:
    facts = read_ablation(folder)
    lines = []
    for row in facts["rows"]:
        variant = Variant(row["label"], row.get("value", ""), row["run"], tuple(row.get("overrides", ())))
        place = folder / variant.run
        line = read_line(variant, read_run(place), place) if (place / _RUN).is_file() else Line(variant, 0, 0)
        lines.append((line, _evaluation(place / EVALUATION / f"step-{line.goal:08d}")))
    return Ablation(folder, facts["kind"], str(facts.get("title") or facts["kind"]), str(facts["recipe"]), tuple(lines))


def _check(path: Path, record: Record, kind: str) -> None:
    """Touch everything that a report takes from a file."""
    try:
        if kind == "cell":
            [record[key] for key in ("task", "title", "suite", "seed", *SETTING)]
            [float(record["scores"][epoch][metric]) for epoch in ("best", "last") for metric in record["metrics"]]
        elif kind == "probe":
            record["title"].strip(), sum(record["dropped"] or (0, 0)), record["layers"][0]
            [float(layer["accuracy"]) + layer["layer"] for layer in record["layers"]]
        else:
            record["arm"].strip(), record["encoder"].strip(), float(record["sentences"])
            [(float(p["cosine"]) + float(p["deviation"]) + p["step"], p["valid_loss"]) for p in record["points"]]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is not as evaluations write it ({what}): remove it, and evaluate again") from None


def key_of(cell: Record) -> str:
    """The task of a cell as `best_scores` names it."""
    return f"{cell['task']}-{cell['shots']}shot" if cell.get("shots") else str(cell["task"])


def finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)
