"""What is measured of a run's weights while it trains: probing, and a short fine-tuning on one task."""

from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from sctd.config import EvaluationConfig
from sctd.evaluate.analyse.probe import layer_accuracies, read_task
from sctd.evaluate.encoder import from_memory
from sctd.evaluate.finetune.task_data import read_task_data
from sctd.evaluate.finetune.training import Setting, fit
from sctd.evaluate.tasks.rows import read_rows
from sctd.evaluate.tasks.task import load_task
from sctd.model.shape import BertShape
from sctd.train.loop.evaluation import Evaluator

_SEED = 1
_LR, _BATCH_SIZE = 5e-5, 32  # of a task that the paper searches the grid for


def build_evaluator(config: EvaluationConfig) -> Evaluator:
    """What measures weights as this configuration says.

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

    def evaluate(
        state: dict[str, Tensor], shape: BertShape, tokenizer: Tokenizer, check: Callable[[], None]
    ) -> dict[str, float]:
        encoder = from_memory(state, shape, tokenizer)
        scores: dict[str, float] = {}
        for probe in probes:
            accuracies = [layer["accuracy"] for layer in layer_accuracies(encoder, probe, "mean", check)]
            scores |= {f"probe_{probe.name}": accuracies[-1], f"probe_{probe.name}_best": max(accuracies)}
        if task is not None:
            setting = Setting(task.lr or _LR, task.batch_size or _BATCH_SIZE, config.steps, _SEED)
            outcome = fit(read_task_data(task, data_dir, encoder), setting, check=check)
            scores[task.name] = float(outcome.curve[-1][task.metrics[0]])
        return scores

    return evaluate
