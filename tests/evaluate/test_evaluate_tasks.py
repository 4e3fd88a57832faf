"""The shipped tasks are Table 7's; users' YAML files are taken or refused with one line."""

from pathlib import Path

import pytest

from sctd.errors import UserError
from sctd.evaluate.tasks.task import METRICS, Task, bio_tags, entity_types, load_task, load_tasks, task_names

# lr, batch size, steps, epochs, tokens, classes, main metric
TABLE_7 = {
    "cola": (2e-5, 32, 2668, None, 256, 2, "matthews"),
    "mrpc": (1e-5, 32, 1148, None, 256, 2, "accuracy"),
    "stsb": (2e-5, 32, 1799, None, 256, 0, "pearson"),
    "rte": (1e-5, 16, 2036, None, 256, 2, "accuracy"),
    "mnli": (1e-5, 256, 15484, None, 256, 3, "accuracy"),
    "sst2": (1e-5, 64, 10467, None, 256, 2, "accuracy"),
    "boolq": (1e-5, 16, None, 10, 512, 2, "accuracy"),
    "cb": (2e-5, 16, None, 20, 256, 3, "accuracy"),
    "multirc": (2e-5, 32, None, 10, 512, 2, "f1"),
    "copa": (2e-5, 16, None, 10, 256, 0, "accuracy"),
    "squad1": (3e-5, 12, None, 2, 384, 0, "exact_match"),
    "squad2": (3e-5, 12, None, 2, 384, 0, "exact_match"),
    "conll03": (None, None, None, 10, 256, 9, "f1"),
    "ontonotes": (None, None, None, 10, 256, 37, "f1"),
    "sickr": (None, None, None, 10, 256, 0, "spearman"),
}


def test_the_shipped_tasks_are_those_of_table_7() -> None:
    assert set(task_names()) == set(TABLE_7)
    for name, expected in TABLE_7.items():
        task = load_task(name)
        values = (task.lr, task.batch_size, task.steps, task.epochs, task.max_length)
        assert (*values, len(task.classes), task.metrics[0]) == expected, name


@pytest.mark.parametrize("name", task_names())
def test_a_shipped_task_says_where_its_rows_are(name: str) -> None:
    task = load_task(name)
    assert task.folders
    assert task.hub is not None
    for splits in (task.files, task.hub.splits):
        assert {"train", "dev"} <= splits.keys()
    assert all(folder == "".join(filter(str.isalnum, folder.lower())) for folder in task.folders)


def test_every_entity_type_has_both_tags() -> None:
    for name, count in (("conll03", 4), ("ontonotes", 18)):
        classes = load_task(name).classes
        types = entity_types(classes)
        assert len(types) == count
        assert classes[0] == "O"
        assert set(classes) == set(bio_tags(types))


def test_suites_names_and_files_are_named_together(tmp_path: Path) -> None:
    own = write(tmp_path, "mine", "{kind: regression, text: a, label: b, files: {train: t.tsv, dev: d.tsv}}")
    assert [task.name for task in load_tasks(["rte", "superglue", str(own), "cb, rte"])] == [
        "rte", "boolq", "cb", "copa", "multirc", "mine",
    ]  # fmt: skip
    assert [task.name for task in load_tasks(["squad,ner"])] == ["squad1", "squad2", "conll03", "ontonotes"]
    assert len(load_tasks(["glue"])) == 6


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    files = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        text = f"{{kind: regression, text: {folder}, label: b, files: {{train: t.tsv, dev: d.tsv}}}}"
        files.append(str(write(tmp_path / folder, "mine", text)))
    assert len(load_tasks([files[0], files[0]])) == 1
    with pytest.raises(UserError, match="another task is called 'mine'"):
        load_tasks(files)


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("rtee", "did you mean 'rte'"),
        ("supergleu", "did you mean 'superglue'"),
        ("no/such.yaml", "no/such.yaml: no such file"),
        (" , ", "no task is given"),
    ],
)
def test_unknown_tasks(spec: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as error:
        load_tasks([spec])
    assert "\n" not in str(error.value)


def test_a_user_writes_what_differs_from_the_defaults(tmp_path: Path) -> None:
    text = "kind: classification\ntext: review\nlabel: stars\nfiles: {train: train.tsv, dev: dev.tsv}\n"
    task = load_task(str(write(tmp_path, "reviews", text)))
    assert task == Task(
        name="reviews", title="reviews", suite="own", kind="classification", classes=(),
        metrics=("accuracy", "macro_f1"), lr=2e-5, batch_size=32, steps=None, epochs=10.0, max_length=256,
        text=("review",), label=("stars",), files={"train": ("train.tsv",), "dev": ("dev.tsv",)}, home=tmp_path,
    )  # fmt: skip
    more = text + "classes: [1, 2, 3]\nsteps: 50\nlr: 3e-4\nmetrics: matthews\ntitle: Reviews\n"
    task = load_task(str(write(tmp_path, "reviews", more)))
    assert (task.classes, task.steps, task.epochs, task.lr) == (("1", "2", "3"), 50, None, 3e-4)
    assert (task.metrics, task.title) == (("matthews",), "Reviews")
    tags = load_task(str(write(tmp_path, "ner", "{kind: tags, classes: [X, Y], files: {train: a.conll, dev: b.bio}}")))
    assert tags.classes == ("O", "B-X", "I-X", "B-Y", "I-Y")
    assert tags.metrics == METRICS["tags"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("kind: span", "kind is 'span': it must be one of classification, regression, tags"),
        ("kind: [a]", "kind must be text"),
        ("labels: a", "unknown key 'labels': did you mean 'label'"),
        ("suite: glue", "unknown key 'suite'"),
        ("form: squad", "unknown key 'form'"),
        ("lr: -1", "lr must be a number above 0, found -1"),
        ("lr: fast", "lr must be a number above 0"),
        ("steps: 1.5", "steps must be a whole number above 0"),
        ("{steps: 5, epochs: 5}", "give either steps or epochs"),
        ("classes: [no, yes]", "in quotes where YAML reads truth values"),
        ("classes: [a]", "only one class"),
        ("classes: [a, b, a]", "named twice"),
        ("{classes: [a, b, c], metrics: [f1]}", "f1 needs two classes, not 3"),
        ("metrics: [acuracy]", "metric 'acuracy' is not one of classification: did you mean 'accuracy'"),
        ("metrics: [exact_match]", "exact_match is only for MultiRC and SQuAD"),
        ("{kind: regression, classes: [a, b]}", "regression has no classes"),
        ("text: null", "text must be a name"),
        ("files: {train: a.tsv, test: b.tsv}", "files must be a mapping of train, dev, dev_mm"),
        ("files: {train: a.tsv}", "no file or split of the hub is given for dev"),
        ("files: {train: a.xlsx, dev: a.xlsx}", "file a.xlsx: its ending must be one of .tsv"),
        ("hub: {id: some/set}", "hub must be a mapping with id and splits"),
        ("hub: {id: some/set, splits: {train: 1}}", "hub must be a mapping with id and splits"),
    ],
)
def test_a_users_file_is_refused(tmp_path: Path, change: str, problem: str) -> None:
    import yaml

    tree = {"kind": "classification", "text": "a", "label": "b", "files": {"train": "t.tsv", "dev": "d.tsv"}}
    path = write(tmp_path, "mine", yaml.safe_dump(tree | yaml.safe_load(change)))
    with pytest.raises(UserError) as error:
        load_task(str(path))
    assert problem in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [", "not valid YAML"),
        ("- a", "must be a mapping of keys, found list"),
        ("", "must be a mapping of keys, found NoneType"),
        ("{kind: regression, text: a, label: b}", "files is missing"),
        ("{kind: regression, label: b, files: {train: a.tsv, dev: a.tsv}}", "text is missing"),
    ],
)
def test_what_is_no_task(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as error:
        load_task(str(write(tmp_path, "mine", text)))
    assert "\n" not in str(error.value)


def test_a_users_file_takes_no_shipped_name(tmp_path: Path) -> None:
    text = "{kind: regression, text: a, label: b, files: {train: t.tsv, dev: d.tsv}}"
    with pytest.raises(UserError, match="'rte' is the name of a task of sctd: rename the file"):
        load_task(str(write(tmp_path, "rte", text)))


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text, encoding="utf-8")
    return path
