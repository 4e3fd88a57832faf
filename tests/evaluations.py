"""Result files in the form in which evaluations write them, for tests of what reads them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sctd.evaluate.tasks.task import load_task

# Of the two arms that `write_evaluations` knows: main metric by seed, and of MRPC both.
RTE = {"baseline": [0.55, 0.57, 0.56], "sctd": [0.60, 0.62, 0.58]}
COLA = {"baseline": [0.10, 0.14, 0.12], "sctd": [0.11, 0.12, 0.10]}
MRPC = {"baseline": ([0.70, 0.71, 0.72], [0.80, 0.81, 0.82]), "sctd": ([0.69, 0.70, 0.71], [0.79, 0.82, 0.79])}


def at_step(run: Path, step: int = 10) -> Path:
    """The folder of the evaluations of one of its checkpoints."""
    return run / "evaluation" / f"step-{step:08d}"


def write_evaluations(run: Path, arm: str) -> None:
    """Fine-tunings at two steps, a probe and drift."""
    write_cells(at_step(run), "rte", {"accuracy": RTE[arm]}, drop=0.02)
    write_cells(at_step(run), "cola", {"matthews": COLA[arm]})
    write_cells(at_step(run), "mrpc", {"accuracy": MRPC[arm][0], "f1": MRPC[arm][1]})
    write_cells(at_step(run, 4), "rte", {"accuracy": [value - 0.03 for value in RTE[arm]]})
    aligned = arm == "sctd"
    write_probe(at_step(run), "tense", [0.6, 0.7, 0.8, 0.8, 0.9 - 0.06 * aligned], [1, 3] if aligned else None)
    write_drift(run, arm, {2: 0.3, 10: 0.5 - 0.1 * aligned})


def write_json(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record), encoding="utf-8")


def write_cells(
    folder: Path, task: str, scores: Mapping[str, Sequence[float]], drop: float = 0.0, **changes: Any
) -> None:
    """Fine-tunings of a task of ours: of each metric the values by seed, from 1. `drop`: by how much the last epoch is
    lower than the best one."""
    of = load_task(task)
    for seed, values in enumerate(zip(*scores.values(), strict=True), 1):
        best = {"epoch": 3, "step": 30, "loss": 0.4, **dict(zip(scores, values, strict=True))}
        last = {"epoch": 5, "step": 50, "loss": 0.2, **{name: best[name] - drop for name in scores}}
        cell = {
            "task": task, "title": of.title, "suite": of.suite, "kind": of.kind, "metrics": list(scores),
            "lr": of.lr or 5e-5, "batch_size": of.batch_size or 16, "seed": seed, "shots": None,
            "steps": of.steps or 50, "epochs": of.epochs or 5, "max_length": 256, "rows": {"train": 2490, "dev": 277},
            "data": f"rows-of-{task}", "origin": "files", "encoder": "0" * 16, "scores": {"best": best, "last": last},
            "curve": [best, last], "seconds": 9.0, "examples_per_s": 100.0, "tokens_per_s": 1e4,
            "device": "a processor", "versions": {"torch": "2.9"}, "date": "2026-03-04",
        } | changes  # fmt: skip
        shots = f"-{cell['shots']}shot" if cell["shots"] else ""
        write_json(folder / "finetune" / task / f"lr1e-05-b16-seed{seed}{shots}" / "result.json", cell)


def write_probe(folder: Path, task: str, accuracies: Sequence[float], dropped: Sequence[int] | None = None) -> None:
    layers = [
        {"layer": number, "accuracy": accuracy, "valid_accuracy": accuracy, "c": 0.1, "converged": True}
        for number, accuracy in enumerate(accuracies)
    ]
    record = {
        "task": task, "title": task.title(), "pooling": "mean", "encoder": "0" * 16, "data": f"rows-of-{task}",
        "rows": {"train": 1000, "valid": 500, "test": 500}, "layers": layers, "dropped": dropped, "seconds": 1.0,
        "device": "a processor", "versions": {"torch": "2.9"}, "date": "2026-03-04",
    }  # fmt: skip
    write_json(folder / "probe" / f"{task}.json", record)


def write_drift(run_dir: Path, arm: str, cosines: Mapping[int, float], **changes: Any) -> None:
    points = [
        {"step": step, "cosine": cosine, "deviation": 0.01, "cosine_full": cosine, "deviation_full": 0.01,
         "valid_loss": 6.0 - cosine}
        for step, cosine in cosines.items()
    ]  # fmt: skip
    record = {
        "encoder": "a sentence encoder", "sentences": 40, "data": "sentences", "corpus": "corpus", "arm": arm,
        "seed": 1, "points": points, "device": "a processor", "versions": {"torch": "2.9"}, "date": "2026-03-04",
    } | changes  # fmt: skip
    write_json(run_dir / "evaluation" / "drift.json", record)


def write_mark(folder: Path, name: str, **facts: Any) -> None:
    """encoder.json."""
    write_json(folder / "encoder.json", {"spec": name, "name": name, "identity": "0" * 16, "facts": facts})
