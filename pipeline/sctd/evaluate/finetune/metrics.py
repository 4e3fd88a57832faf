"""How well predictions fit: the tasks' metrics, all as fractions, by the libraries that define them."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from sctd.evaluate.tasks.rows import Row, SpanRow, TagRow
from sctd.evaluate.tasks.task import Task

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def measure(
    task: Task, rows: Sequence[Row], predictions: Sequence[Any], classes: Sequence[str] = ()
) -> dict[str, float]:
    """Each metric of the task.

    Args:
        predictions: one for each row: a class's or choice's number, a score, an answer ("" for none), or the numbers of
            its words' tags.
        classes: those of the rows, where the task has none of its own.
    """
    assert len(rows) == len(predictions) > 0
    if task.kind == "tags":
        found = _entities(rows, predictions, task.classes or classes)
    elif task.kind == "span":
        found = _answers(rows, predictions)
    else:
        labels = np.array([row.label for row in rows])  # type: ignore[union-attr]
        guesses = np.array(predictions)
        found = {name: _of_labels(name, labels, guesses, rows) for name in task.metrics}
    return {name: float(found[name]) for name in task.metrics}


def _of_labels(name: str, labels: np.ndarray, guesses: np.ndarray, rows: Sequence[Row]) -> float:
    from scipy import stats
    from sklearn import metrics

    if name in ("pearson", "spearman"):
        # A correlation with what never changes is not defined; such a model has learned nothing.
        if np.ptp(labels) == 0 or np.ptp(guesses) == 0:
            return 0.0
        return (stats.pearsonr if name == "pearson" else stats.spearmanr)(labels, guesses).statistic
    if name == "accuracy":
        return metrics.accuracy_score(labels, guesses)
    if name == "matthews":
        return metrics.matthews_corrcoef(labels, guesses)
    if name == "f1":
        return metrics.f1_score(labels, guesses, zero_division=0)
    if name == "macro_f1":
        return metrics.f1_score(labels, guesses, average="macro", zero_division=0)
    assert name == "exact_match", name  # the share of MultiRC's questions of which each answer is judged rightly
    groups: dict[str, bool] = {}
    for row, is_right in zip(rows, labels == guesses, strict=True):
        group = row.group  # type: ignore[union-attr]
        groups[group] = groups.get(group, True) and bool(is_right)
    return float(np.mean(list(groups.values())))


def _entities(rows: Sequence[Row], predictions: Sequence[Any], classes: Sequence[str]) -> dict[str, float]:
    """Of whole entities: an I- that continues nothing of its type is none."""
    from seqeval.metrics.v1 import precision_recall_fscore_support
    from seqeval.scheme import IOB2

    gold, guesses = [], []
    for row, predicted in zip(rows, predictions, strict=True):
        assert isinstance(row, TagRow) and len(row.tags) == len(predicted)
        gold.append([classes[tag] for tag in row.tags])
        guesses.append([classes[tag] for tag in predicted])
    precision, recall, f1, _ = precision_recall_fscore_support(
        gold, guesses, scheme=IOB2, average="micro", zero_division=0
    )
    return {"f1": f1, "precision": precision, "recall": recall}


# ---- SQuAD -------------------------------------------------------------------------------------------------------


def _answers(rows: Sequence[Row], predictions: Sequence[str]) -> dict[str, float]:
    """The best scores over the gold answers. Those that are nothing but articles and punctuation do not count; where
    none is left, the gold answer is that there is none."""
    exact, overlap = [], []
    for row, predicted in zip(rows, predictions, strict=True):
        assert isinstance(row, SpanRow)
        words = _words(predicted)
        golds = [gold for gold in (_words(text) for text, _ in row.answers) if gold] or [[]]
        exact.append(words in golds)
        overlap.append(max(_overlap(gold, words) for gold in golds))
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(overlap))}


def _words(text: str) -> list[str]:
    """SQuAD's words: in lower case, without punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _overlap(gold: list[str], predicted: list[str]) -> float:
    """F1 of the words, as often as they occur; with no words on one side, whether there are none on the other."""
    if not gold or not predicted:
        return float(gold == predicted)
    shared = sum((Counter(gold) & Counter(predicted)).values())
    return 2 * shared / (len(gold) + len(predicted))
