"""What an ablation came to: a line for each run, as text, CSV and Markdown."""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sctd.config import Config
from sctd.corpus.manifest import read_manifest
from sctd.evaluate.ablate.ablations import Row
from sctd.evaluate.encoder import EVALUATION, is_of_others
from sctd.evaluate.results import Score, best_scores, read_cells
from sctd.objective.flops import flops_until, saving
from sctd.train.keep import checkpoint
from sctd.train.keep.export import CORPUS_COPY, EXPORT, read_facts, record_at
from sctd.train.keep.metrics import read_metrics

_BASELINE = "baseline"
_NONE = "-"
_NOTES = """Loss: held out, full path, in nats. Hours: of training. Clock, FLOPs: against the baseline on as many steps.
Scores: percent, best epoch on the dev set, mean over seeds +- their standard deviation. Mean: over the tasks, each of
GLUE's with all its metrics.
"""


@dataclass(frozen=True)
class Line:
    """A run's results; those from `loss` on are None until it is finished.

    Args:
        step: that it has come to. goal: that it ends at.
        loss: held out, in nats. hours: of training. flops: of the model, over all steps.
        baseline_flops: of as many steps of the baseline on the same rows.
        scores: by task.
    """

    row: Row
    step: int
    goal: int
    loss: float | None = None
    hours: float | None = None
    flops: float | None = None
    baseline_flops: float | None = None
    scores: dict[str, Score] | None = None

    @property
    def finished(self) -> bool:
        return self.scores is not None


def goal_of(config: Config) -> int:
    """The step that a run ends at."""
    return config.train.stop_at or config.train.steps


def is_finished(config: Config, run_dir: Path) -> bool:
    """Whether it was trained to its goal, and exported."""
    begun = (run_dir / "config.yaml").is_file()  # an export alone may be left of a run that was removed
    return begun and read_facts(run_dir / EXPORT).get("step") == goal_of(config)


def read_line(row: Row, config: Config, run_dir: Path) -> Line:
    """What this run has come to."""
    goal = goal_of(config)
    if not is_finished(config, run_dir):
        return Line(row, max((record["step"] for record in read_metrics(run_dir)), default=0), goal)
    record, manifest = record_at(run_dir, goal), read_manifest(run_dir / CORPUS_COPY)
    seconds, evaluated = record.get("seconds"), run_dir / EVALUATION / f"step-{goal:08d}"
    there = [path for path in checkpoint.checkpoints(run_dir) if checkpoint.step_of(path) == goal]
    others = any(is_of_others(evaluated, path) for path in there)  # of a run that was begun anew
    return Line(
        row,
        goal,
        goal,
        loss=record.get("valid_loss"),
        hours=None if seconds is None else seconds / 3600,
        flops=flops_until(config, manifest, [goal])[0],
        baseline_flops=flops_until(replace(config, arm=_BASELINE), manifest, [goal])[0],
        scores={} if others else best_scores(read_cells(evaluated)),
    )


def as_text(lines: Sequence[Line]) -> str:
    """Columns for a console."""
    table = _cells(lines)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in table
    )


def as_markdown(lines: Sequence[Line], title: str, recipe: str) -> str:
    """A page of its own: the table, and what its numbers are."""
    head, *rows = _cells(lines)
    table = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    body = "\n".join(f"| {' | '.join(row)} |" for row in table)
    return f"# {title}\n\nRecipe `{recipe}`, one run each, seeds and data the same.\n\n{body}\n\n{_NOTES}"


def as_csv(lines: Sequence[Line]) -> str:
    """Every number in full; savings and scores are fractions."""
    tasks, out = _tasks(lines), io.StringIO()
    names = [
        "label",
        "value",
        "run",
        "step",
        "goal",
        "valid_loss",
        "hours",
        "clock_saved",
        "flops",
        "flops_saved",
        "mean",
    ]
    per_task = [name for task in tasks for name in (task, f"{task}_deviation", f"{task}_seeds")]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*names, *per_task])
    baseline = _baseline_hours(lines)
    for line in lines:
        saved = saving(line.hours, baseline), saving(line.flops, line.baseline_flops)
        row = [line.row.label, line.row.value, line.row.run, line.step, line.goal, line.loss, line.hours, saved[0]]
        row += [line.flops, saved[1], _mean(line, tasks)]
        for task in tasks:
            score = (line.scores or {}).get(task)
            if score is None:
                row += [None, None, None]
            else:
                row += [score.mean, score.deviation if len(score.values) > 1 else None, len(score.values)]
        writer.writerow(row)
    return out.getvalue()


def _cells(lines: Sequence[Line]) -> list[list[str]]:
    """The table with its head, for reading."""
    tasks, baseline = _tasks(lines), _baseline_hours(lines)
    head = ["run", "steps", "held-out loss", "hours", "clock", "FLOPs", *(["mean"] if len(tasks) > 1 else []), *tasks]
    table = [head]
    for line in lines:
        mean = _mean(line, tasks)
        row = [
            line.row.label,
            f"{line.goal:,}" if line.finished else f"{line.step:,} of {line.goal:,}",
            _NONE if line.loss is None else f"{line.loss:.4f}",
            _NONE if line.hours is None else f"{line.hours:.3g}",
            _change(saving(line.hours, baseline)),
            _change(saving(line.flops, line.baseline_flops)),
        ]
        row += [_NONE if mean is None else f"{mean:.2%}"[:-1]] if len(tasks) > 1 else []
        table.append(row + [_score((line.scores or {}).get(task)) for task in tasks])
    return table


def _tasks(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(task for line in lines for task in line.scores or {}))


def _mean(line: Line, tasks: Sequence[str]) -> float | None:
    """Over the tasks, where the run has been fine-tuned on all that any run has."""
    scores = line.scores or {}
    return statistics.fmean(scores[task].counted for task in tasks) if tasks and scores.keys() >= set(tasks) else None


def _baseline_hours(lines: Sequence[Line]) -> float | None:
    return next((line.hours for line in lines if line.row.value == _BASELINE), None)


def _change(saved: float | None) -> str:
    """As the paper prints savings: -21.5%."""
    return _NONE if saved is None else f"{-saved:+.1%}" if saved else "0.0%"


def _score(score: Score | None) -> str:
    if score is None:
        return _NONE
    deviation = f" +- {100 * score.deviation:.2f}" if len(score.values) > 1 else ""
    return f"{100 * score.mean:.2f}{deviation}"
