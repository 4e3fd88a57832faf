"""Probing by layer (Figures 4 and 8): what a linear classifier reads out of each layer's frozen sentence vectors.

A task is a file in SentEval's form: split (tr, va or te), label and sentence, separated by tabs.
"""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sctd.bench.result import device_name
from sctd.config import nearest
from sctd.errors import UserError
from sctd.evaluate.analyse.layers import nothing, sentence_vectors
from sctd.evaluate.analyse.pictures import probe_picture, require_picture
from sctd.evaluate.encoder import Encoder, open_encoder
from sctd.evaluate.results import Record, probe_key
from sctd.files import write_atomically

PROBES = {"tense": ("Tense", "past_present.txt"), "subj_number": ("SubjNum", "subj_number.txt")}
_SPLITS = {"tr": "train", "va": "valid", "te": "test"}
_STRENGTHS = (0.001, 0.01, 0.1, 1.0)  # inverse of the regularisation, as scikit-learn counts it
_ITERATIONS = 2000
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class ProbeTask:
    """Sentences and their labels by split (train, valid, test). `data`: hash of all of them."""

    name: str
    title: str
    sentences: dict[str, list[str]]
    labels: dict[str, list[str]]
    data: str

    @property
    def rows(self) -> dict[str, int]:
        return {split: len(labels) for split, labels in self.labels.items()}


def probe(
    checkpoints: Sequence[str],
    tasks: Sequence[str],
    data_dir: Path | None,
    pooling: str,
    out: Path | None,
    picture: Path | None,
) -> None:
    """Probe every checkpoint on every task, keep the results beside them, print a table for each task.

    What is finished for the same encoder, pooling and data is not measured again.

    Args:
        tasks: names, or files. data_dir: with the files of the names. out: of the results of the only checkpoint.
        picture: where the curves of all checkpoints go.

    Raises:
        UserError: before anything is measured, for what cannot be read.
    """
    if picture is not None:
        require_picture(picture)
    if out is not None and len(checkpoints) > 1:
        raise UserError(f"--out {out} is the folder of one checkpoint, {len(checkpoints)} were given: call it for each")
    found = [read_task(task, data_dir) for task in dict.fromkeys(tasks)]
    if len({task.name for task in found}) < len(found):
        raise UserError(f"two of the probing tasks have one name ({', '.join(t.name for t in found)}): rename a file")
    encoders = [open_encoder(spec) for spec in dict.fromkeys(checkpoints)]
    folders = [encoder.results(out) for encoder in encoders]
    names = distinct_names([encoder.name for encoder in encoders], [encoder.spec for encoder in encoders])
    panels = []
    for task in found:
        curves = {}
        for name, encoder, folder in zip(names, encoders, folders, strict=True):
            path = folder / "probe" / f"{probe_key({'task': task.name, 'pooling': pooling})}.json"
            curves[name] = _result(encoder, path, task, pooling, name)
        print(_table(task, pooling, curves))
        panels.append((task.title, curves))
    if picture is not None:
        arms = {name: encoder.facts.get("arm") for name, encoder in zip(names, encoders, strict=True)}
        probe_picture(picture, panels, arms)
        print(f"written {picture}")


def read_task(spec: str, data_dir: Path | None) -> ProbeTask:
    """The probing task of this name, from its file in `data_dir` or in `probing/` below it, or the one of a file.

    Raises:
        UserError: no such task or file, or one of another form, with the number of the line.
    """
    path = Path(spec).expanduser()
    if spec in PROBES:
        title, path = PROBES[spec][0], _find(spec, data_dir)
    elif path.is_file():
        spec = title = path.stem
        if spec in PROBES:
            raise UserError(f"{path}: '{spec}' is the name of a task of sctd: rename the file")
    else:
        raise UserError(f"probing task {spec!r}: no file in SentEval's form, and no task: {nearest(spec, PROBES)}")
    sentences: dict[str, list[str]] = {split: [] for split in _SPLITS.values()}
    labels: dict[str, list[str]] = {split: [] for split in _SPLITS.values()}
    first: dict[str, int] = {}
    digest = hashlib.sha256()
    for number, (split, label, sentence) in _lines(path):
        sentences[split].append(sentence)
        labels[split].append(label)
        first.setdefault(label, number)
        digest.update(f"{split}\t{label}\t{sentence}\n".encode())
    for code, split in _SPLITS.items():
        if not labels[split]:
            raise UserError(f"{path} has no {split} rows: mark some lines with {code}")
    known = set(labels["train"])
    if len(known) < 2:
        raise UserError(f"{path}: its training rows have one label alone ({', '.join(known)}): two or more are needed")
    for label, number in first.items():
        if label not in known:
            raise UserError(f"{path}, line {number}: label {label!r} is in no training row: correct it, or add some")
    return ProbeTask(spec, title, sentences, labels, digest.hexdigest()[:16])


def layer_accuracies(
    encoder: Encoder, task: ProbeTask, pooling: str, check: Callable[[], None] = nothing
) -> list[Record]:
    """For the embeddings' output and for each layer: test accuracy, with the regularisation that validates best.

    Args:
        check: called between pieces of work; what it raises ends it.
    """
    texts = [sentence for sentences in task.sentences.values() for sentence in sentences]
    _, numbers = np.unique([label for labels in task.labels.values() for label in labels], return_inverse=True)
    ends = np.cumsum(list(task.rows.values()))[:-1]
    targets = np.split(numbers, ends)
    found = []
    for layer, vectors_ND in enumerate(sentence_vectors(encoder, texts, pooling, check)):
        check()
        found.append({"layer": layer, **_classify(np.split(vectors_ND.astype(np.float32), ends), targets)})
    return found


def _classify(vectors: Sequence[NDArray[np.float32]], targets: Sequence[NDArray[np.int64]]) -> Record:
    """Vectors (N, D) and classes (N,) of train, validation and test -> accuracies, and the regularisation chosen."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(vectors[0])
    train, valid, test = (scaler.transform(part) for part in vectors)
    # From strong to weak regularisation, each solution the start of the next.
    model = LogisticRegression(max_iter=_ITERATIONS, tol=_TOLERANCE, warm_start=True)
    best: Record = {"valid_accuracy": -1.0}
    for strength in _STRENGTHS:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model.set_params(C=strength).fit(train, targets[0])
        accuracy = float(model.score(valid, targets[1]))
        if accuracy > best["valid_accuracy"]:
            converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
            tested = float(model.score(test, targets[2]))
            best = {"accuracy": tested, "valid_accuracy": accuracy, "c": strength, "converged": converged}
    return best


def _result(encoder: Encoder, path: Path, task: ProbeTask, pooling: str, name: str) -> Record:
    """The result in this file, measured now where it is not there or is that of something else."""
    wanted = {"task": task.name, "pooling": pooling, "encoder": encoder.identity, "data": task.data}
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
        if all(found.get(key) == value for key, value in wanted.items()) and found["layers"]:
            return found
    except (OSError, ValueError, TypeError, KeyError):
        pass
    start = time.perf_counter()
    layers = layer_accuracies(encoder, task, pooling)
    seconds = time.perf_counter() - start
    unfinished = [str(layer["layer"]) for layer in layers if not layer["converged"]]
    if unfinished:
        print(f"{name}, {task.name}: no convergence in {_ITERATIONS} iterations at layer {', '.join(unfinished)}")
    result = {
        **wanted,
        "title": task.title,
        "rows": task.rows,
        "layers": layers,
        "dropped": encoder.facts.get("dropped"),
        "seconds": seconds,
        "device": device_name(),
        "versions": {package: version(package) for package in ("sctd", "torch", "transformers", "scikit-learn")},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(result, indent=1) + "\n")
    print(f"{name}, {task.name}: {sum(task.rows.values()):,} sentences, {len(layers)} layers in {seconds:.1f} s")
    return result


def _table(task: ProbeTask, pooling: str, curves: dict[str, Record]) -> str:
    """Layers down, checkpoints across; * marks what a layer that dropped tokens in training has put out."""
    width = max(8, *map(len, curves)) + 3
    what = "mean of the words' vectors" if pooling == "mean" else "vector of [CLS]"
    lines = [f"{task.title}: accuracy on {task.rows['test']:,} test sentences, {what}"]
    lines.append("layer" + "".join(f"{name:>{width}} " for name in curves))
    for layer in range(max(len(curve["layers"]) for curve in curves.values())):
        cells = [_cell(curve, layer) for curve in curves.values()]
        lines.append(f"{layer:>5}" + "".join(f"{cell:>{width + 1}}" for cell in cells))
    return "\n".join(lines)


def _cell(curve: Record, layer: int) -> str:
    if layer >= len(curve["layers"]):
        return " "
    first, end = curve["dropped"] or (0, 0)
    mark = "*" if first < layer <= end else " "
    return f"{curve['layers'][layer]['accuracy']:.1%}{mark}"


def _find(name: str, data_dir: Path | None) -> Path:
    file = PROBES[name][1]
    if data_dir is None:
        raise UserError(f"probing task {name}: say which folder holds {file}: --data-dir, or evaluation.data_dir")
    places = [data_dir / file, data_dir / "probing" / file]
    for place in places:
        if place.is_file():
            return place
    raise UserError(f"probing task {name}: there is neither {places[0]} nor {places[1]}: it is a file of SentEval's")


def _lines(path: Path) -> Iterator[tuple[int, tuple[str, str, str]]]:
    """(number of the line, (split, label, sentence)); empty lines are passed over."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): convert it") from None
    for number, line in enumerate(text.split("\n"), 1):
        parts = line.split("\t")
        if not line.strip():
            continue
        if len(parts) != 3 or parts[0] not in _SPLITS or not parts[1]:
            raise UserError(f"{path}, line {number}: no tr, va or te, a label and a sentence, with tabs between them")
        yield number, (_SPLITS[parts[0]], parts[1], parts[2])


def distinct_names(names: Sequence[str], specs: Sequence[str]) -> list[str]:
    """Each name, or where two are the same, what the user called it."""
    return [spec if names.count(name) > 1 else name for name, spec in zip(names, specs, strict=True)]
