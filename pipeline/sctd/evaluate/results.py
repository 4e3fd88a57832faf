"""The files that evaluations leave, read back: what the report, the model card and the tables are made from.

RUN/evaluation/step-00020000/     or the folder given with --out
  encoder.json                    what was evaluated
  finetune/TASK/CELL/result.json  one fine-tuning: scores of each epoch; predictions-{best,last}.jsonl beside it
  probe/TASK.json                 accuracy of each layer
RUN/evaluation/drift.json         over the checkpoints of a run
"""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sctd.errors import UserError
from sctd.evaluate.encoder import ENCODER, EVALUATION, evaluation_folder, is_of_others
from sctd.files import read_json_object
from sctd.train.keep import checkpoint

Record = dict[str, Any]

SETTING = ("lr", "batch_size", "steps", "max_length", "shots")  # keys of a cell; seeds of one setting are one score


@dataclass(frozen=True)
class Score:
    """A task's result over seeds, with one setting of everything else.

    Args:
        values: main metric of each seed, by seed, at the chosen epoch, in the metric's own unit (most: 0 to 1).
        others: the same of the task's further metrics.
        setting: what SETTING names.
        suite: that the task belongs to.
    """

    task: str
    metric: str
    values: dict[int, float]
    others: dict[str, dict[int, float]]
    setting: Record
    suite: str

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values())

    @property
    def deviation(self) -> float:
        """Sample standard deviation over seeds; NaN for one seed."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else math.nan

    def of(self, metric: str) -> "Score":
        """The same of one of its further metrics."""
        values = self.values if metric == self.metric else self.others[metric]
        return replace(self, metric=metric, values=values, others={})

    @property
    def how(self) -> str:
        """Its setting in words."""
        shots = f", {self.setting['shots']} examples a class" if self.setting["shots"] else ""
        return "LR {lr:g}, batch {batch_size}, {steps:,} steps, {max_length} tokens".format(**self.setting) + shots

    @property
    def counted(self) -> float:
        """What the task counts in an average over tasks: as in the paper, the mean of all metrics of one of GLUE's."""
        further = self.others.values() if self.suite == "glue" else ()
        return statistics.fmean([self.mean, *(statistics.fmean(values.values()) for values in further)])


def read_cells(folder: Path) -> list[Record]:
    """Every finished fine-tuning cell below an evaluation folder, in the order of their paths.

    Raises:
        UserError: a result that cannot be read.
    """
    return [_read(path) for path in sorted(folder.glob("finetune/*/*/result.json"))]


def probe_key(probe: Record) -> str:
    """Its task, and the pooling where that is not the default one."""
    return str(probe["task"]) + ("" if probe.get("pooling", "mean") == "mean" else f"-{probe['pooling']}")


def read_probes(folder: Path) -> list[Record]:
    """Every probing result below an evaluation folder."""
    return [_read(path) for path in sorted(folder.glob("probe/*.json"))]


def drift_file(run_dir: Path) -> Path:
    return run_dir / EVALUATION / "drift.json"


def read_drift(run_dir: Path) -> Record | None:
    """The drift over the checkpoints of a run."""
    return _read(drift_file(run_dir)) if drift_file(run_dir).is_file() else None


def scores(cells: Iterable[Record], epoch: str = "best") -> list[Score]:
    """Cells gathered over their seeds, one score for each task and setting, in the order of the cells.

    Args:
        epoch: best (on the dev set) | last.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for cell in cells:
        key = tuple(cell[name] for name in ("task", *SETTING))
        groups.setdefault((*key, cell.get("data"), tuple(cell["metrics"])), []).append(cell)
    found = []
    for (task, *setting, _, _), members in groups.items():
        main, *rest = members[0]["metrics"]
        values = {name: {cell["seed"]: cell["scores"][epoch][name] for cell in members} for name in (main, *rest)}
        named = dict(zip(SETTING, setting, strict=True))
        found.append(Score(task, main, values.pop(main), values, named, members[0]["suite"]))
    return found


def best_scores(cells: Iterable[Record], epoch: str = "best") -> dict[str, Score]:
    """For each task (`TASK` or `TASK-32shot`) the setting with the highest mean: what a grid search reports.

    Of settings with as many seeds as any: a trial with one seed does not stand for the others.
    """
    best: dict[str, Score] = {}
    for score in scores(cells, epoch):
        name = score.task + (f"-{score.setting['shots']}shot" if score.setting["shots"] else "")
        if name not in best or (len(score.values), score.mean) > (len(best[name].values), best[name].mean):
            best[name] = score
    return best


def _read(path: Path) -> Record:
    found = read_json_object(path)
    if found is None:
        raise UserError(f"{path} cannot be read: remove it, and evaluate again")
    return found


# ---- the model card ------------------------------------------------------------------------------------------------


def score_rows(run_dir: Path, step: int | None = None) -> list[tuple[str, str]]:
    """(what was measured, result with its uncertainty) of a run's checkpoint of this step, or of its newest whole one.

    Results of other weights that this run had at that step are left out.
    """
    if step is None:
        newest = checkpoint.newest_whole(run_dir, log=lambda _: None)  # what is damaged, the export says
    else:
        newest = next((path for path in checkpoint.checkpoints(run_dir) if checkpoint.step_of(path) == step), None)
    if newest is None:
        return []
    folder = evaluation_folder(run_dir, checkpoint.step_of(newest))
    if not (folder / ENCODER).is_file() or is_of_others(folder, newest):
        return []
    cells = read_cells(folder)
    titles = {cell["task"]: cell["title"] for cell in cells}
    rows = []
    for score in best_scores(cells).values():
        shots = f", {score.setting['shots']} examples a class" if score.setting["shots"] else ""
        of = score.setting
        how = f"LR {of['lr']:g}, batch {of['batch_size']}, {of['steps']:,} steps, best epoch on its dev set"
        rows.append((f"{titles[score.task]}{shots}: {score.metric}, {how}", _result(score)))
    for probe in read_probes(folder):
        accuracies = [layer["accuracy"] for layer in probe["layers"]]
        best = max(range(len(accuracies)), key=accuracies.__getitem__)
        text = f"{accuracies[-1]:.1%} at the last layer, best {accuracies[best]:.1%} at layer {best}"
        pooled = ", vectors of [CLS]" if probe.get("pooling") == "cls" else ""
        rows.append((f"{probe['title']} probe: accuracy on frozen layers{pooled}", text))
    return rows


def _result(score: Score) -> str:
    seeds = len(score.values)
    if seeds == 1:
        return f"{score.mean:.4f}, one seed"
    return f"{score.mean:.4f} +- {score.deviation:.4f} (standard deviation over {seeds} seeds)"
