"""Scores for the model card of an export."""

from pathlib import Path

from sctd.evaluate.encoder import ENCODER, EVALUATION, is_of_others
from sctd.evaluate.results import Score, best_scores, read_cells, read_probes
from sctd.train.keep import checkpoint


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
