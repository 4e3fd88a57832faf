"""Scores for the model card of an export."""

from pathlib import Path

from sctd.evaluate.encoder import ENCODER, EVALUATION, read_mark
from sctd.evaluate.results import Score, best_scores, read_cells, read_probes
from sctd.train import checkpoint
from sctd.train.export import seal_of


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
    folder = run_dir / EVALUATION / f"step-{checkpoint.step_of(newest):08d}"
    if not (folder / ENCODER).is_file() or read_mark(folder)["facts"].get("checkpoint") != seal_of(newest):
        return []
    cells = read_cells(folder)
    titles = {cell["task"]: cell["title"] for cell in cells}
    rows = []
    for score in best_scores(cells).values():
        shots = f", {score.setting['shots']} examples a class" if score.setting["shots"] else ""
        rows.append((f"{titles[score.task]}{shots}: {score.metric}, best epoch on its dev set", _result(score)))
    for probe in read_probes(folder):
        accuracies = [layer["accuracy"] for layer in probe["layers"]]
        best = max(range(len(accuracies)), key=accuracies.__getitem__)
        text = f"{accuracies[-1]:.1%} at the last layer, best {accuracies[best]:.1%} at layer {best}"
        rows.append((f"{probe['title']} probe: accuracy on frozen layers", text))
    return rows


def _result(score: Score) -> str:
    seeds = len(score.values)
    if seeds == 1:
        return f"{score.mean:.4f}, one seed"
    return f"{score.mean:.4f} +- {score.deviation:.4f} (standard deviation over {seeds} seeds)"
