"""The paper's ablations: which runs each is made of, the file that says so beside them, and what they came to.

ABLATION/
  ablation.json      kind, title, recipe, config and rows, each with label, value, run and overrides
  RUN.yaml, RUN/     recipe and folder of each row's run
  ablation.csv, .md  the table
"""

import csv
import io
import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sctd.config import BASELINE, Config, nearest
from sctd.corpus.manifest import read_manifest
from sctd.errors import UserError
from sctd.evaluate.encoder import evaluation_folder, is_of_others
from sctd.evaluate.results import Score, best_scores, read_cells
from sctd.files import read_json_object, write_atomically
from sctd.present.table import Table, as_markdown
from sctd.train.flops import flops_until, saving
from sctd.train.keep import checkpoint
from sctd.train.keep.export import CORPUS_COPY, EXPORT, read_facts, record_at
from sctd.train.keep.metrics import read_metrics

ABLATION = "ablation.json"
_LAMBDAS = (0.0, 0.01, 0.05, 0.25, 0.5)
_INTERVALS = (5, 10, 20, 50)
# Terms of an ALIGN step beside the dropping path's own MLM loss, in Table 4's order: label, and name in folders.
_TERMS = {"mlm_full": ("L_MLM", "mlm"), "kl_local": ("KL_local", "local"), "kl_global": ("KL_global", "global")}
_NONE = "-"
_NOTES = """Loss: held out, full path, in nats. Hours: of training. Clock, FLOPs: against the baseline on as many steps.
Scores: percent, best epoch on the dev set, mean over seeds +- their standard deviation. Mean: over the tasks, each of
GLUE's with all its metrics.
"""


@dataclass(frozen=True)
class Variant:
    """One run of an ablation.

    Args:
        value: what sets it apart: lambda, F, terms joined by +, or the arm.
        run: its folder, and its recipe without .yaml. overrides: over the user's recipe and overrides.
    """

    label: str
    value: float | str
    run: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Ablation:
    kind: str
    title: str
    rows: tuple[Variant, ...]

    @property
    def keys(self) -> set[str]:
        """The config keys that its rows set."""
        return {override.partition("=")[0] for row in self.rows for override in row.overrides}


def find_ablation(kind: str) -> Ablation:
    """The ablation of this kind.

    Raises:
        UserError: there is none.
    """
    if kind not in ABLATIONS:
        raise UserError(f"ablation '{kind}' not found: {nearest(kind, ABLATIONS)}")
    return ABLATIONS[kind]


def describe(ablation: Ablation, recipe: str, config: dict[str, Any]) -> str:
    """The text of ablation.json. `config`: what all runs have in common, by section.key."""
    rows = [asdict(row) for row in ablation.rows]
    facts = {"kind": ablation.kind, "title": ablation.title, "recipe": recipe, "config": config, "rows": rows}
    return json.dumps(facts, indent=1) + "\n"


def read_ablation(folder: Path) -> dict[str, Any]:
    """What `describe` wrote there.

    Raises:
        UserError: it cannot be read.
    """
    found = read_json_object(folder / ABLATION) or {}
    rows, kind, config = (found.get(key) for key in ("rows", "kind", "config"))
    rows_are_whole = isinstance(rows, list) and all(
        isinstance(row, dict) and isinstance(row.get("label"), str) and isinstance(row.get("run"), str) for row in rows
    )
    if not (rows_are_whole and isinstance(kind, str) and isinstance(config, dict)):
        raise UserError(f"{folder / ABLATION} cannot be read: restore it from a backup, or choose another folder")
    return found


def _arm(arm: str, label: str) -> Variant:
    return Variant(label, arm, arm.replace("_", "-"), (f"arm={arm}",))


def _objective(terms: Sequence[str]) -> Variant:
    switches = [f"objective.{term}={'true' if term in terms else 'false'}" for term in _TERMS]
    return Variant(
        label=" + ".join(_TERMS[term][0] for term in terms),
        value="+".join(terms),
        run="-".join(_TERMS[term][1] for term in terms),
        overrides=("arm=sctd", "objective.mlm_drop=true", *switches),
    )


def _number(name: str, value: float, run: str, key: str) -> Variant:
    return Variant(f"{name} = {value:g}", value, run, ("arm=sctd", f"{key}={value:g}"))


_SUBSETS = itertools.chain.from_iterable(itertools.combinations(_TERMS, size) for size in (1, 2, 3))
_BASELINE, _TOKEN_DROP = _arm(BASELINE, "baseline"), _arm("token_drop", "token drop")
_ALL = (
    Ablation("objectives", "Training objectives (Table 4)", (_BASELINE, _TOKEN_DROP, *map(_objective, _SUBSETS))),
    Ablation(
        "lambda",
        "Weight lambda of the semantic terms (Figure 7)",
        tuple(_number("lambda", weight, f"lambda-{weight:g}", "objective.kl_weight") for weight in _LAMBDAS),
    ),
    Ablation(
        "interval",
        "Interval F between ALIGN steps (Table 5)",
        (_BASELINE, _TOKEN_DROP, *(_number("F", steps, f"f{steps}", "objective.interval") for steps in _INTERVALS)),
    ),
    Ablation(
        "selection",
        "Choice of the kept tokens",
        (_BASELINE, _arm("token_drop", "importance"), _arm("random_drop", "random"), _arm("random_ltd", "random-LTD")),
    ),
)
ABLATIONS = {ablation.kind: ablation for ablation in _ALL}


# ---- what they came to ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A run's results; those from `loss` on are None until it is finished.

    Args:
        step: that it has come to. goal: that it ends at.
        loss: held out, in nats. hours: of training. flops: of the model, over all steps.
        baseline_flops: of as many steps of the baseline on the same rows.
        scores: by task.
    """

    variant: Variant
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


def read_line(variant: Variant, config: Config, run_dir: Path) -> Line:
    """What this run has come to."""
    goal = goal_of(config)
    if not is_finished(config, run_dir):
        return Line(variant, max((record["step"] for record in read_metrics(run_dir)), default=0), goal)
    record, manifest = record_at(run_dir, goal), read_manifest(run_dir / CORPUS_COPY)
    seconds, evaluated = record.get("seconds"), evaluation_folder(run_dir, goal)
    there = [path for path in checkpoint.checkpoints(run_dir) if checkpoint.step_of(path) == goal]
    others = any(is_of_others(evaluated, path) for path in there)  # of a run that was begun anew
    return Line(
        variant,
        goal,
        goal,
        loss=record.get("valid_loss"),
        hours=None if seconds is None else seconds / 3600,
        flops=flops_until(config, manifest, [goal])[0],
        baseline_flops=flops_until(replace(config, arm=BASELINE), manifest, [goal])[0],
        scores={} if others else best_scores(read_cells(evaluated)),
    )


def table_of(lines: Sequence[Line]) -> Table:
    """For reading."""
    tasks, baseline = _tasks(lines), _baseline_hours(lines)
    head = ["run", "steps", "held-out loss", "hours", "clock", "FLOPs", *(["mean"] if len(tasks) > 1 else []), *tasks]
    rows = []
    for line in lines:
        mean = _mean(line, tasks)
        row = [
            line.variant.label,
            f"{line.goal:,}" if line.finished else f"{line.step:,} of {line.goal:,}",
            _NONE if line.loss is None else f"{line.loss:.4f}",
            _NONE if line.hours is None else f"{line.hours:.3g}",
            _change(saving(line.hours, baseline)),
            _change(saving(line.flops, line.baseline_flops)),
        ]
        row += [_NONE if mean is None else f"{100 * mean:.2f}"] if len(tasks) > 1 else []
        rows.append(row + [_score((line.scores or {}).get(task)) for task in tasks])
    return Table("ablation", "", head, rows)


def write_tables(folder: Path, lines: Sequence[Line], title: str, recipe: str) -> Table:
    """ablation.csv, and ablation.md: the table for reading, and what its numbers are. Returns that table."""
    table = table_of(lines)
    head = f"# {title}\n\nRecipe `{recipe}`, one run each, seeds and data the same."
    write_atomically(folder / "ablation.md", f"{head}\n\n{as_markdown(table)}\n\n{_NOTES}")
    write_atomically(folder / "ablation.csv", csv_of(lines))
    return table


def csv_of(lines: Sequence[Line]) -> str:
    """Every number in full; savings and scores are fractions."""
    tasks, baseline, out = _tasks(lines), _baseline_hours(lines), io.StringIO()
    names = ["label", "value", "run", "step", "goal", "valid_loss", "hours", "clock_saved", "flops", "flops_saved",
             "mean"]  # fmt: skip
    per_task = [name for task in tasks for name in (task, f"{task}_deviation", f"{task}_seeds")]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*names, *per_task])
    for line in lines:
        variant, saved = line.variant, saving(line.flops, line.baseline_flops)
        row = [variant.label, variant.value, variant.run, line.step, line.goal, line.loss]
        row += [line.hours, saving(line.hours, baseline), line.flops, saved, _mean(line, tasks)]
        for task in tasks:
            score = (line.scores or {}).get(task)
            if score is None:
                row += [None, None, None]
            else:
                row += [score.mean, score.deviation if len(score.values) > 1 else None, len(score.values)]
        writer.writerow(row)
    return out.getvalue()


def _tasks(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(task for line in lines for task in line.scores or {}))


def _mean(line: Line, tasks: Sequence[str]) -> float | None:
    """Over the tasks, where the run has been fine-tuned on all that any run has."""
    scores = line.scores or {}
    return statistics.fmean(scores[task].counted for task in tasks) if tasks and scores.keys() >= set(tasks) else None


def _baseline_hours(lines: Sequence[Line]) -> float | None:
    return next((line.hours for line in lines if line.variant.value == BASELINE), None)


def _change(saved: float | None) -> str:
    """As the paper prints savings: -21.5%."""
    return _NONE if saved is None else f"{-saved:+.1%}" if saved else "0.0%"


def _score(score: Score | None) -> str:
    if score is None:
        return _NONE
    deviation = f" +- {100 * score.deviation:.2f}" if len(score.values) > 1 else ""
    return f"{100 * score.mean:.2f}{deviation}"
