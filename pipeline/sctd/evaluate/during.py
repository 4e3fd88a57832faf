"""What is measured of a run's weights while it trains: probing, and a short fine-tuning on one task."""

from collections.abc import Callable
from pathlib import Path

from sctd.config import EvaluationConfig
from sctd.evaluate.analyse.probe import layer_accuracies, read_task
from sctd.evaluate.encoder import Encoder
from sctd.evaluate.finetune.material import read_material
from sctd.evaluate.finetune.training import Setting, fit
from sctd.evaluate.tasks.rows import read_rows
from sctd.evaluate.tasks.task import Task, load_task
from sctd.train.loop.evaluation import Evaluator

_SEED = 1
_LR, _BATCH_SIZE = 5e-5, 32  # of a task that the paper searches the grid for


def build_evaluator(config: EvaluationConfig) -> Evaluator:
    """What measures a transformers folder as this configuration says.

    Its scores: `probe_TASK`, accuracy at the last layer; `probe_TASK_best`, at the best one; `TASK`, main metric on the
    dev set at the end of the fine-tuning.

    Raises:
        UserError: a task that is not known, or whose rows cannot be read.
    """
    data_dir = Path(config.data_dir) if config.data_dir else None
    probes = [read_task(name, data_dir) for name in config.probes]
    task = load_task(config.task) if config.task else None
    if task is not None:
        for split in ("train", "dev"):
            read_rows(task, split, data_dir)

    def evaluate(folder: Path, check: Callable[[], None]) -> dict[str, float]:
        encoder = Encoder("the run's weights", str(folder), name="", identity="")
        scores: dict[str, float] = {}
        for probe in probes:
            accuracies = [layer["accuracy"] for layer in layer_accuracies(encoder, probe, "mean", check)]
            scores |= {f"probe_{probe.name}": accuracies[-1], f"probe_{probe.name}_best": max(accuracies)}
        if task is not None:
            scores[task.name] = _fine_tuned(encoder, task, data_dir, config.steps, check)
        return scores

    return evaluate


def _fine_tuned(encoder: Encoder, task: Task, data_dir: Path | None, steps: int, check: Callable[[], None]) -> float:
    setting = Setting(task.lr or _LR, task.batch_size or _BATCH_SIZE, steps, _SEED)
    outcome = fit(encoder, read_material(task, data_dir, encoder).data(None, _SEED), setting, check=check)
    return float(outcome.curve[-1][task.metrics[0]])
