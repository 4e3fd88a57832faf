"""What is evaluated on: one short YAML a task, those in `tasks/` and those of users.

A task's YAML holds
    title, suite, kind, classes, metrics      what it is; the first metric is the main one
    lr, batch_size, steps | epochs, max_length   how it is fine-tuned; without LR and batch size the grid is searched
    text, pair, label                         columns, each a name or names in the order of preference
    columns                                   what the columns of a file without a header line are called
    files                                     of each split, names or patterns in the order of preference
    folders, hub                              where it is usually found
Users write kind, text, label and files, and what else differs from the defaults.
"""

import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sctd.config import nearest
from sctd.errors import UserError

SUITES = ("glue", "superglue", "squad", "ner", "semantic")
METRICS = {
    "classification": ("accuracy", "f1", "macro_f1", "matthews", "exact_match"),
    "regression": ("pearson", "spearman"),
    "choice": ("accuracy",),
    "span": ("exact_match", "f1"),
    "tags": ("f1", "precision", "recall"),
}
SPLITS = ("train", "dev", "dev_mm")
OUTSIDE = "O"  # the tag of a word in no entity
_SHIPPED = Path(__file__).parent / "catalogue"
_OWN_METRICS = {kind: METRICS[kind] for kind in ("regression", "tags")} | {"classification": ("accuracy", "macro_f1")}
_OWN_DEFAULTS = {"suite": "own", "lr": 2e-5, "batch_size": 32, "max_length": 256}
_OWN_EPOCHS = 10.0
_TABLES = (".tsv", ".csv", ".txt", ".jsonl", ".parquet")  # what a user's classification or regression is read from
_NOT_GIVEN = {"name", "home"}  # fields of a task that its YAML does not have
_OURS = {"suite", "form", "folders", "no_answer"}  # and those that only ours have


@dataclass(frozen=True)
class Hub:
    """A data set of the hub, as `datasets.load_dataset` takes it.

    Args:
        splits: ours -> the hub's.
        revision: a branch of it; None: the main one.
    """

    id: str
    splits: dict[str, str]
    config: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Task:
    """A task, its defaults and where its rows are.

    Args:
        name: cola, mrpc, ...; of a user's task the stem of its YAML.
        suite: glue | superglue | squad | ner | semantic | own.
        kind: classification | regression | choice | span | tags.
        classes: of classification and tags (these: BIO tags, "O" first); () where there are none, or where a user's
            task has those of its training rows.
        metrics: the first one is the main one.
        lr, batch_size: None where the paper searches the grid.
        steps, epochs: one of them.
        max_length: tokens.
        files: of each split, names or patterns, the first that is there is read.
        folders: names that its folder usually has, in lower case and without punctuation.
        columns: names of what is in a file without a header line.
        text, pair, label: names of columns in the order of preference.
        form: table | multirc | copa | squad | conll: how its rows lie in files.
        no_answer: questions may have none (SQuAD v2).
        home: the folder of a user's YAML, which its files count from.
    """

    name: str
    title: str
    suite: str
    kind: str
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    lr: float | None
    batch_size: int | None
    steps: int | None
    epochs: float | None
    max_length: int
    files: dict[str, tuple[str, ...]] = field(hash=False)
    folders: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    pair: tuple[str, ...] = ()
    label: tuple[str, ...] = ()
    form: str = "table"
    no_answer: bool = False
    hub: Hub | None = field(default=None, hash=False)
    home: Path | None = None


def task_names() -> list[str]:
    """The tasks that ship with sctd."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def load_task(spec: str) -> Task:
    """The task of this name, or of a user's YAML.

    Raises:
        UserError: no such task, or a YAML that describes none.
    """
    if not spec.endswith((".yaml", ".yml")):
        if spec not in task_names():
            raise UserError(f"task '{spec}' not found: {nearest(spec, [*task_names(), *SUITES])}, or give a YAML file")
        return _read(_SHIPPED / f"{spec}.yaml", None)
    path = Path(spec).expanduser()
    if not path.is_file():
        raise UserError(f"task {spec}: no such file: give a task's name ({', '.join(task_names())}) or a YAML file")
    if path.stem in task_names():
        raise UserError(f"task {spec}: '{path.stem}' is the name of a task of sctd: rename the file")
    return _read(path, path.parent)


def load_tasks(specs: Sequence[str]) -> list[Task]:
    """Tasks in the order of `specs`: names, YAML files and suites, also several separated by commas; each once.

    Raises:
        UserError: see `load_task`; or two YAML files of one name.
    """
    names = [name.strip() for spec in specs for name in spec.split(",") if name.strip()]
    tasks: dict[str, Task] = {}
    for name in names:
        found = map(load_task, task_names() if name in SUITES else [name])
        for task in (task for task in found if name not in SUITES or task.suite == name):
            if task != tasks.setdefault(task.name, task):
                raise UserError(f"task {name}: another task is called '{task.name}' too: rename one of the files")
    if not tasks:
        raise UserError(f"no task is given: give some of {', '.join(task_names())}, a suite or a YAML file")
    return list(tasks.values())


def bio_tags(types: Sequence[str]) -> tuple[str, ...]:
    """O, then B- and I- of each entity type."""
    return (OUTSIDE, *(f"{prefix}-{kind}" for kind in types for prefix in "BI"))


def entity_types(tags: Iterable[str]) -> list[str]:
    """The types of BIO tags, each once, in the order of their first tags."""
    return list(dict.fromkeys(tag.partition("-")[2] for tag in tags if tag != OUTSIDE))


# ---- from YAML ---------------------------------------------------------------------------------------------------


def _read(path: Path, home: Path | None) -> Task:
    given = _given(path, own=home is not None)
    kind, kinds = given.get("kind"), METRICS if home is None else _OWN_METRICS
    if kind not in kinds:
        raise UserError(f"task {path}: kind is {kind!r}: it must be one of {', '.join(sorted(kinds))}")
    defaults: dict[str, Any] = dict.fromkeys(("lr", "batch_size", "steps", "epochs")) | {"files": {}, "classes": ()}
    if home is not None:
        if "files" not in given and "hub" not in given:
            raise UserError(f"task {path}: files is missing: write files: {{train: NAME, dev: NAME}}")
        defaults |= _OWN_DEFAULTS | {"title": path.stem, "metrics": _OWN_METRICS[kind]}
        if "steps" not in given:
            defaults["epochs"] = _OWN_EPOCHS
        if kind == "tags":
            defaults |= {"form": "conll", "text": ("tokens",), "label": ("tags", "ner_tags")}
    given = defaults | given
    if kind == "tags" and given["classes"] and given["classes"][0] != OUTSIDE:
        given["classes"] = bio_tags(given["classes"])
    task = Task(**given | {"name": path.stem, "home": home})
    for wrong in _faults(task):
        raise UserError(f"task {path}: {wrong}")
    return task


def _given(path: Path, own: bool) -> dict[str, Any]:
    """The keys and values of a YAML, each of its field's type."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"task {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"task {path}: must be a mapping of keys, found {type(tree).__name__}")
    hints = typing.get_type_hints(Task)
    keys = [key for key in hints if key not in _NOT_GIVEN | (_OURS if own else set())]
    given = {}
    for key, value in tree.items():
        if key not in keys:
            raise UserError(f"task {path}: unknown key {key!r}: {nearest(str(key), keys)}")
        hint = hints[key]
        wanted, cast = _TYPES[typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint]
        given[key] = cast(value)
        if given[key] is None:
            raise UserError(f"task {path}: {key} must be {wanted}, found {value!r}")
    return given


def _faults(task: Task) -> Iterator[str]:
    """What is wrong with a task whose values are each of their type."""
    if (task.steps is None) == (task.epochs is None):
        yield "give either steps or epochs"
    for metric in task.metrics:
        if metric not in METRICS[task.kind]:
            yield f"metric {metric!r} is not one of {task.kind}: {nearest(metric, METRICS[task.kind])}"
    if "exact_match" in task.metrics and task.form != "multirc" and task.kind != "span":
        yield "exact_match is only for MultiRC and SQuAD: use another metric"
    if task.classes and task.kind not in ("classification", "tags"):
        yield f"{task.kind} has no classes: remove them"
    if len(set(task.classes)) < len(task.classes):
        yield "a class is named twice: name each once"
    if len(task.classes) == 1:
        yield "there is only one class: name two or more"
    if "f1" in task.metrics and task.kind == "classification" and len(task.classes) not in (0, 2):
        yield f"f1 needs two classes, not {len(task.classes)}: use macro_f1 instead"
    for name in ("text", "label") if task.form == "table" else ():
        if not getattr(task, name):
            yield f"{name} is missing: name the column of the {name}"
    for split in ("train", "dev"):
        if split not in task.files and not (task.hub and split in task.hub.splits):
            yield f"no file or split of the hub is given for {split}: add it"
    if task.home is not None and task.kind != "tags":
        for name in (name for names in task.files.values() for name in names):
            if Path(name).suffix not in _TABLES:
                yield f"file {name}: its ending must be one of {', '.join(_TABLES)}"


def _number(value: Any) -> float | None:
    """YAML reads 1e-5 as text, which is taken for the number."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 < number < math.inf else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _names(value: Any) -> tuple[str, ...] | None:
    """A name or a list of them; numbers are names too. YAML's booleans are none: nobody can tell no from false."""
    values = value if isinstance(value, list) else [value]
    are_names = all(
        isinstance(name, str | int | float) and not isinstance(name, bool) and name != "" for name in values
    )
    return tuple(map(str, values)) if values and are_names else None


def _files(value: Any) -> dict[str, tuple[str, ...]] | None:
    if not isinstance(value, dict) or not value or not value.keys() <= set(SPLITS):
        return None
    files = {split: _names(names) for split, names in value.items()}
    return None if None in files.values() else files  # type: ignore[return-value]


def _hub(value: Any) -> Hub | None:
    if not isinstance(value, dict) or not {"id", "splits"} <= value.keys() <= {"id", "config", "revision", "splits"}:
        return None
    splits = value["splits"]
    if not isinstance(splits, dict) or not splits.keys() <= set(SPLITS):
        return None
    texts = [value["id"], *splits.values(), *(value[key] for key in ("config", "revision") if key in value)]
    return Hub(**value) if all(isinstance(text, str) and text for text in texts) else None


_TYPES: dict[Any, tuple[str, Callable[[Any], Any]]] = {
    float: ("a number above 0", _number),
    int: ("a whole number above 0", _whole),
    bool: ("true or false", lambda value: value if isinstance(value, bool) else None),
    str: ("text", lambda value: value if isinstance(value, str) and value else None),
    tuple[str, ...]: (
        "a name or a list of names, in quotes where YAML reads truth values (yes, no, true, ...)",
        _names,
    ),
    dict[str, tuple[str, ...]]: (f"a mapping of {', '.join(SPLITS)} to names of files", _files),
    Hub: (f"a mapping with id and splits ({', '.join(SPLITS)} to names), and where needed config and revision", _hub),
}
