"""Probing by layer (Figures 4 and 8): what a linear classifier reads out of each layer's frozen sentence vectors.

A task is a file in SentEval's form: split (tr, va or te), label and sentence, separated by tabs. A vector is the mean
over the sentence's own tokens. [CLS] and [SEP] are left out: they are no words, and token dropping never drops them, so
that they would hide what the dropped layers do to words. Or it is [CLS] alone.

Legend: N sentences, B of a batch, T tokens, L layers, D hidden size.
"""

import hashlib
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sctd.config import nearest
from sctd.errors import UserError
from sctd.evaluate.encoder import Encoder, best_device, distinct_names, load_tokenizer, load_weights, open_encoder
from sctd.evaluate.finetune.features import Coding, Features, batches, gather, nothing
from sctd.evaluate.results import Record, probe_key
from sctd.evaluate.tasks.tables import lines
from sctd.files import read_json_object, write_json
from sctd.present.pictures import colours, draw_probes, require_picture, write_picture
from sctd.present.table import Table, as_text
from sctd.train.engine.devices import measured_on

_TOKENS = {"cpu": 2048, "cuda": 32768}  # of a batch, padding included
_LARGEST = float(np.finfo(np.float16).max)
PROBES = {"tense": ("Tense", "past_present.txt"), "subj_number": ("SubjNum", "subj_number.txt")}
_SPLITS = {"tr": "train", "va": "valid", "te": "test"}
_STRENGTHS = (0.001, 0.01, 0.1, 1.0)  # inverse of the regularisation, as scikit-learn counts it
_ITERATIONS = 2000
_TOLERANCE = 1e-4


def sentence_vectors(
    encoder: Encoder, sentences: Sequence[str], pooling: str, check: Callable[[], None] = nothing
) -> NDArray[np.float16]:
    """float16 (L + 1, N, D): of the embeddings' output, and of the output of each layer.

    Half precision keeps BERT-large's vectors of 20,000 sentences within 1 GB of memory; its rounding is far below
    what a classifier on standardised columns can see.

    Args:
        pooling: mean | cls. check: called before each batch; what it raises ends the work.

    Raises:
        UserError: a model or tokenizer that cannot be loaded.
    """
    tokenizer, device = load_tokenizer(encoder), best_device()
    # With its head: a body alone would be given a new pooler where the checkpoint has none.
    model = load_weights(encoder, "AutoModelForMaskedLM").base_model.to(device).eval()
    limit = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    fields, special_T = gather(
        sentences,
        Coding(tokenizer, limit, types=False),
        lambda part: tokenizer(list(part), truncation=True, max_length=limit).encodings,
        lambda encoding: np.array(encoding.special_tokens_mask, dtype=np.int32),
    )
    features = Features(**fields, labels={}, multiple=1)
    found: NDArray[np.float16] | None = None
    for rows in batches(features.lengths_N.tolist(), _TOKENS[device.type]):
        check()
        word_BT = torch.from_numpy(1 - features.padded(special_T, *features.places(rows), 1)).to(device)
        with torch.inference_mode():
            hidden = model(**features.batch(rows, device), output_hidden_states=True).hidden_states
            pooled_LBD = torch.stack([_pool(layer_BTD, word_BT, pooling) for layer_BTD in _as_read(model, hidden)])
        if found is None:
            found = np.empty((len(hidden), len(features), pooled_LBD.shape[-1]), dtype=np.float16)
        # Models without a LayerNorm at the end of each layer have columns beyond the range.
        found[:, rows] = pooled_LBD.clamp(-_LARGEST, _LARGEST).half().cpu().numpy()
    assert found is not None, "there are sentences"
    return found


def _as_read(model: Any, hidden: Sequence[Tensor]) -> list[Tensor]:
    """States as the next module reads them. A ModernBERT reads each sum through a norm; transformers returns the sums
    themselves, but the last layer's behind the final norm."""
    if model.config.model_type != "modernbert":
        return list(hidden)
    return [*(layer.attn_norm(states) for layer, states in zip(model.layers, hidden, strict=False)), hidden[-1]]


def _pool(hidden_BTD: Tensor, word_BT: Tensor, pooling: str) -> Tensor:
    if pooling == "cls":
        return hidden_BTD[:, 0]
    weight_B1T = word_BT.to(hidden_BTD.dtype).unsqueeze(1)
    total_BD = torch.bmm(weight_B1T, hidden_BTD).squeeze(1)
    return total_BD / word_BT.sum(1, keepdim=True).clamp(min=1)


# ---- the verb ------------------------------------------------------------------------------------------------------


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
        raise UserError(f"two probing tasks have the same name ({', '.join(t.name for t in found)}): rename a file")
    encoders = [open_encoder(spec) for spec in dict.fromkeys(checkpoints)]
    folders = [encoder.results(out) for encoder in encoders]
    names = distinct_names([encoder.name for encoder in encoders], [encoder.spec for encoder in encoders])
    panels = []
    for task in found:
        curves = {}
        for name, encoder, folder in zip(names, encoders, folders, strict=True):
            path = folder / "probe" / f"{probe_key({'task': task.name, 'pooling': pooling})}.json"
            curves[name] = _result(encoder, path, task, pooling, name)
        what = "mean of the words' vectors" if pooling == "mean" else "vector of [CLS]"
        print(f"{task.title}: accuracy on {task.rows['test']:,} test sentences, {what}\n{as_text(_table(curves))}")
        panels.append((task.title, curves))
    if picture is not None:
        arms = {name: encoder.facts.get("arm") for name, encoder in zip(names, encoders, strict=True)}
        write_picture(picture, 4.2 * len(panels), 3.6, draw_probes(panels, colours(arms), across=len(panels)))
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
    for number, line in enumerate(lines(path), 1):
        if not line.strip():
            continue
        code, _, rest = line.partition("\t")
        label, tab, sentence = rest.partition("\t")
        if code not in _SPLITS or not label or not tab or "\t" in sentence:
            raise UserError(f"{path}, line {number}: expected tr, va or te, a label and a sentence, with tabs between")
        sentences[_SPLITS[code]].append(sentence)
        labels[_SPLITS[code]].append(label)
        first.setdefault(label, number)
        digest.update(f"{_SPLITS[code]}\t{label}\t{sentence}\n".encode())
    for code, split in _SPLITS.items():
        if not labels[split]:
            raise UserError(f"{path} has no {split} rows: mark some lines with {code}")
    known = set(labels["train"])
    if len(known) < 2:
        raise UserError(f"{path}: its training rows have only one label ({', '.join(known)}): two or more are needed")
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
    identity = {"task": task.name, "pooling": pooling, "encoder": encoder.identity, "data": task.data}
    known = read_json_object(path) or {}
    if known.get("layers") and all(known.get(key) == value for key, value in identity.items()):
        return known
    start = time.perf_counter()
    layers = layer_accuracies(encoder, task, pooling)
    seconds = time.perf_counter() - start
    unfinished = [str(layer["layer"]) for layer in layers if not layer["converged"]]
    if unfinished:
        print(f"{name}, {task.name}: no convergence in {_ITERATIONS} iterations at layer {', '.join(unfinished)}")
    result = {
        **identity,
        "title": task.title,
        "rows": task.rows,
        "layers": layers,
        "dropped": encoder.facts.get("dropped"),
        "seconds": seconds,
        **measured_on("sctd", "torch", "transformers", "scikit-learn"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    print(f"{name}, {task.name}: {sum(task.rows.values()):,} sentences, {len(layers)} layers in {seconds:.1f} s")
    return result


def _table(curves: dict[str, Record]) -> Table:
    """Layers down, checkpoints across; * marks what a layer that dropped tokens in training has put out."""
    rows = []
    for layer in range(max(len(curve["layers"]) for curve in curves.values())):
        cells = [f"{layer}"]
        for curve in curves.values():
            first, end = curve["dropped"] or (0, 0)
            accuracy = curve["layers"][layer]["accuracy"] if layer < len(curve["layers"]) else None
            mark = "*" if first < layer <= end else " "
            cells.append("" if accuracy is None else f"{accuracy:.1%}{mark}")
        rows.append(cells)
    return Table("probe", "", ["layer", *curves], rows, texts=0)


def _find(name: str, data_dir: Path | None) -> Path:
    file = PROBES[name][1]
    if data_dir is None:
        raise UserError(f"probing task {name}: say which folder holds {file}: --data-dir, or evaluation.data_dir")
    places = [data_dir / file, data_dir / "probing" / file]
    for place in places:
        if place.is_file():
            return place
    raise UserError(f"probing task {name}: there is neither {places[0]} nor {places[1]}: it is a file of SentEval's")
