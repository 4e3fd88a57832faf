"""Rows come out the same from every form that a task's data has; what is wrong with a file is said in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sctd.errors import UserError
from sctd.evaluate.tasks.rows import ChoiceRow, SpanRow, SplitRows, TagRow, TextRow, has_split, read_rows
from sctd.evaluate.tasks.task import load_task
from support import ROOT

REAL = ROOT.parent / "shared" / "data"
# Rows of training and dev in the data's own description; MultiRC's are of answers.
REAL_ROWS = {
    "cola": (8551, 1043),
    "sst2": (67349, 872),
    "mrpc": (4076, 1725),
    "stsb": (5749, 1500),
    "rte": (2490, 277),
    "mnli": (8000, 1815),
    "cb": (250, 56),
    "copa": (400, 100),
    "boolq": (2600, 670),
    "squad1": (8309, 2261),
    "squad2": (9226, 2647),
    "sickr": (4500, 500),
}


def save(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def save_json_lines(path: Path, *records: dict[str, Any]) -> Path:
    return save(path, "".join(json.dumps(record) + "\n" for record in records))


def read(spec: str, folder: Path | None, split: str = "train") -> SplitRows:
    return read_rows(load_task(spec), split, folder)


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- GLUE --------------------------------------------------------------------------------------------------------


def test_cola_has_no_header(tmp_path: Path) -> None:
    save(tmp_path / "train.tsv", 'gj04\t1\t\tHe said "no" and left.\r\nks08\t0\t*\tThem is here.\r\n\r\n')
    rows = read("cola", tmp_path)
    assert rows.rows == (TextRow('He said "no" and left.', None, 1), TextRow("Them is here.", None, 0))
    assert rows.classes == ("unacceptable", "acceptable")
    assert rows.origin == str(tmp_path / "train.tsv")


def test_sst2_with_a_byte_order_mark_and_crlf(tmp_path: Path) -> None:
    save(tmp_path / "train.tsv", b'\xef\xbb\xbfsentence\tlabel\r\n"a \xc2\x85 b\t0\r\nfine ," c\t1')
    assert read("sst2", tmp_path).rows == (TextRow('"a \x85 b', None, 0), TextRow('fine ," c', None, 1))


def test_mrpc_in_both_distributions(tmp_path: Path) -> None:
    text = '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tHe said: "Go.\tGo", he said.\n'
    save(tmp_path / "msr_paraphrase_train.txt", text)
    expected = (TextRow('He said: "Go.', 'Go", he said.', 1),)
    assert read("mrpc", tmp_path).rows == expected
    save(tmp_path / "train.tsv", text.replace("\n1\t", "\n0\t"))
    assert read("mrpc", tmp_path).rows == (TextRow('He said: "Go.', 'Go", he said.', 0),)


def test_stsb_in_both_distributions(tmp_path: Path) -> None:
    save(
        tmp_path / "glue" / "STS-B" / "train.tsv",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        '0\tnews\tx\t2012\t1\tnone\tnone\t"A plane\tAn air plane\t4.750\n',
    )
    save(
        tmp_path / "plain" / "sts-train.csv",
        'news\tx\t2012\t0001\t4.750\t"A plane\tAn air plane\nnews\tx\t2012\t0002\t0\ta, b\tc\thttp://x\thttp://y\n',
    )
    rows = read("stsb", tmp_path / "plain").rows
    assert rows == (TextRow('"A plane', "An air plane", 4.75), TextRow("a, b", "c", 0.0))
    assert read("stsb", tmp_path / "glue").rows == rows[:1]


def test_labels_are_words_or_numbers(tmp_path: Path) -> None:
    save(tmp_path / "a" / "train.tsv", "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tnot_entailment\n")
    save(tmp_path / "b" / "train.tsv", "sentence1\tsentence2\tlabel\tidx\nA.\tB.\t1\t0\n")
    save_json_lines(tmp_path / "c" / "train.jsonl", {"premise": "A.", "hypothesis": "B.", "label": "not_entailment"})
    for folder in "abc":
        assert read("rte", tmp_path / folder).rows == (TextRow("A.", "B.", 1),)


def test_mnli_leaves_out_what_annotators_disagreed_on(tmp_path: Path) -> None:
    records = [
        {"sentence1": "a", "sentence2": "b", "gold_label": label, "annotator_labels": ["neutral"]}
        for label in ("neutral", "-", "contradiction")
    ]
    save_json_lines(tmp_path / "multinli_1.0_train.jsonl", *records)
    save_json_lines(tmp_path / "multinli_1.0_dev_matched.jsonl", *records[:1])
    rows = read("mnli", tmp_path)
    assert [row.label for row in rows.rows if isinstance(row, TextRow)] == [1, 2]
    assert rows.left_out == 1
    assert not has_split(load_task("mnli"), "dev_mm", tmp_path)
    header = "index\tpairID\tsentence1\tsentence2\tlabel1\tgold_label\n"
    for name in ("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv"):
        save(tmp_path / name, header + "0\tx\ta\tb\tneutral\tentailment\n")
    assert has_split(load_task("mnli"), "dev_mm", tmp_path)
    assert read("mnli", tmp_path, "dev_mm").rows == (TextRow("a", "b", 0),)
    save_json_lines(tmp_path / "only" / "train.jsonl", {"premise": "a", "hypothesis": "b", "label": "-"})
    assert "none of its 1 rows has a label" in refused(lambda: read("mnli", tmp_path / "only"))


# ---- SuperGLUE ---------------------------------------------------------------------------------------------------


def test_superglue(tmp_path: Path) -> None:
    save_json_lines(
        tmp_path / "BoolQ" / "train.jsonl", {"question": "is it", "passage": "It is.", "idx": 0, "label": True}
    )
    save_json_lines(tmp_path / "google" / "BoolQ" / "train.jsonl", {"question": "q", "passage": "p", "answer": False})
    save_json_lines(tmp_path / "CB" / "val.jsonl", {"premise": "p", "hypothesis": "h", "label": "contradiction"})
    assert read("boolq", tmp_path).rows == (TextRow("is it", "It is.", 1),)
    assert read("boolq", tmp_path / "google").rows == (TextRow("q", "p", 0),)
    assert read("cb", tmp_path, "dev").rows == (TextRow("p", "h", 1),)


def test_copas_question_becomes_words(tmp_path: Path) -> None:
    record = {
        "premise": "It rained.",
        "choice1": "We got wet.",
        "choice2": "We sang.",
        "question": "effect",
        "label": 0,
    }
    save_json_lines(tmp_path / "train.jsonl", record, record | {"question": "cause", "label": 1})
    choices = ("We got wet.", "We sang.")
    assert read("copa", tmp_path).rows == (
        ChoiceRow("It rained. What happened as a result?", choices, 0),
        ChoiceRow("It rained. What was the cause of this?", choices, 1),
    )
    save_json_lines(tmp_path / "train.jsonl", record, record | {"question": "why"})
    assert "train.jsonl, line 2: question 'why' is not one of cause, effect" in refused(lambda: read("copa", tmp_path))


def test_multirc_has_a_row_for_each_answer(tmp_path: Path) -> None:
    answers = [{"text": "Yes.", "idx": 0, "label": 1}, {"text": "No.", "idx": 1, "label": 0}]
    questions = [{"question": "A?", "answers": answers, "idx": 0}, {"question": "B?", "answers": answers[:1], "idx": 1}]
    save_json_lines(tmp_path / "train.jsonl", {"idx": 7, "passage": {"text": "P.", "questions": questions}})
    rows = read("multirc", tmp_path).rows
    assert rows == (
        TextRow("A? Yes.", "P.", 1, "7-0"),
        TextRow("A? No.", "P.", 0, "7-0"),
        TextRow("B? Yes.", "P.", 1, "7-1"),
    )
    flat = {"paragraph": "P.", "question": "A?", "answer": "Yes.", "label": 1}
    save_json_lines(tmp_path / "train.jsonl", flat | {"idx": {"paragraph": 7, "question": 0, "answer": 0}})
    assert read("multirc", tmp_path).rows == rows[:1]
    save_json_lines(tmp_path / "train.jsonl", {"idx": {"paragraph": 7, "question": 0}, "question": "A?", "label": 1})
    assert "line 1: no column 'answer'; there are idx, question, label" in refused(lambda: read("multirc", tmp_path))
    save_json_lines(tmp_path / "train.jsonl", {"idx": 7, "passage": {"text": "P."}})
    message = refused(lambda: read("multirc", tmp_path))
    assert "line 1: not in the form of SuperGLUE's MultiRC (KeyError: 'questions')" in message


# ---- SQuAD -------------------------------------------------------------------------------------------------------


def squad_file(path: Path, *questions: dict[str, Any], context: str = "Ann saw Bob. Bob saw Ann.") -> Path:
    questions = tuple({"id": str(number), "question": "Who?"} | question for number, question in enumerate(questions))
    return save(path, json.dumps({"data": [{"title": "t", "paragraphs": [{"context": context, "qas": questions}]}]}))


def answer(text: str, start: int) -> dict[str, Any]:
    return {"text": text, "answer_start": start}


def test_squads_answers_are_put_where_the_context_has_them(tmp_path: Path) -> None:
    questions = [
        {"answers": [answer("Bob", 8)]},
        {"answers": [answer("Bob", 15), answer("Bob", 9)]},
        {"answers": [answer("Bob", 99)]},
        {"answers": [answer("Eve", 0)]},
    ]
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        squad_file(tmp_path / name, *questions)
    rows = read("squad1", tmp_path)
    assert [row.answers for row in rows.rows if isinstance(row, SpanRow)] == [
        (("Bob", 8),),
        (("Bob", 13), ("Bob", 8)),
        (("Bob", 13),),
    ]
    assert rows.left_out == 1
    dev = read("squad1", tmp_path, "dev")
    assert len(dev.rows) == 4
    assert dev.left_out == 0
    assert dev.rows[3] == SpanRow("3", "Who?", "Ann saw Bob. Bob saw Ann.", (("Eve", 0),))


def test_questions_without_an_answer(tmp_path: Path) -> None:
    impossible = {"is_impossible": True, "answers": [], "plausible_answers": [answer("Bob", 8)]}
    for name in ("train-v2.0.json", "train-v1.1.json"):
        squad_file(tmp_path / name, {"answers": [answer("Ann", 0)], "is_impossible": False}, impossible)
    rows = read("squad2", tmp_path)
    assert [row.answers for row in rows.rows if isinstance(row, SpanRow)] == [(("Ann", 0),), ()]
    message = refused(lambda: read("squad1", tmp_path))
    assert "train-v1.1.json, question 2: no answer, which SQuAD v1.1 does not have" in message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not valid JSON"),
        ("[1]", "after question 0 it does not follow SQuAD's JSON (TypeError"),
        (
            '{"data": [{"paragraphs": [{"context": "x", "qas": ["q"]}]}]}',
            "after question 1 it does not follow SQuAD's JSON",
        ),
        (
            '{"data": [{"paragraphs": [{"qas": [{}]}]}]}',
            "after question 1 it does not follow SQuAD's JSON (KeyError: 'context')",
        ),
        ('{"data": []}', "is empty"),
        (b'{"data": "\xff"}', "the byte at offset 10 is not UTF-8"),
    ],
)
def test_squad_files_that_are_none(tmp_path: Path, text: str | bytes, problem: str) -> None:
    save(tmp_path / "train-v1.1.json", text)
    message = refused(lambda: read("squad1", tmp_path))
    assert problem in message
    assert "train-v1.1.json" in message


# ---- tags --------------------------------------------------------------------------------------------------------


def names(rows: SplitRows) -> list[list[tuple[str, str]]]:
    return [
        [(token, rows.classes[tag]) for token, tag in zip(row.tokens, row.tags, strict=True)]
        for row in rows.rows
        if isinstance(row, TagRow)
    ]


def test_conll_files_are_read_as_bio(tmp_path: Path) -> None:
    iob1 = (
        "-DOCSTART- -X- O O\r\n\r\nU.N. NNP I-NP I-ORG\r\nmet NN I-NP O\r\nAnn NNP I-NP I-PER\r\nLee NNP I-NP I-PER\r\n"
        "Bob NNP I-NP B-PER\r\n\r\n\r\nParis NNP I-NP I-LOC\r\n"
    )
    bio = "U.N.\tB-ORG\nmet\tO\nAnn\tB-PER\nLee\tI-PER\nBob\tB-PER\n\nParis\tB-LOC\n\n"
    bioes = "U.N. S-ORG\nmet O\nAnn B-PER\nLee E-PER\nBob S-PER\n\nParis S-LOC"
    expected = [
        [("U.N.", "B-ORG"), ("met", "O"), ("Ann", "B-PER"), ("Lee", "I-PER"), ("Bob", "B-PER")],
        [("Paris", "B-LOC")],
    ]
    for name, text in (("eng.train", iob1), ("train.txt", bio), ("train.conll", bioes)):
        save(tmp_path / name.replace(".", "-") / name, text)
        assert names(read("conll03", tmp_path / name.replace(".", "-"))) == expected, name


def test_ontonotes_in_its_brackets(tmp_path: Path) -> None:
    cells = ["(PERSON*", "*)", "*", "(GPE)", "(DATE*", "*)", "(DATE)"]
    lines = [f"bc/x 0 {n} w{n} NN (TOP* - - - spk {cell} (ARG0* -" for n, cell in enumerate(cells)]
    text = "#begin document (bc/x); part 000\n" + "\n".join(lines) + "\n\n" + lines[3] + " extra\n#end document\n"
    for language, number in (("english", 1), ("english", 2), ("chinese", 3)):
        folder = tmp_path / "conll-2012" / "v4" / "data" / "train" / "data" / language
        save(folder / "bc" / f"{number}.v4_gold_conll", text)
    rows = read("ontonotes", tmp_path)
    assert len(rows.rows) == 4
    assert [tag for _, tag in names(rows)[0]] == ["B-PERSON", "I-PERSON", "O", "B-GPE", "B-DATE", "I-DATE", "B-DATE"]
    assert names(rows)[1] == [("w3", "B-GPE")]
    assert rows.origin.endswith("english/bc")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Ann B-PER\nBob\n", "line 2: 1 columns where 2 are expected"),
        ("a NN B-PER\nb O\n", "line 2: 2 columns where 3 are expected"),
        (
            "Ann B-PER\n\na O\nBob B-FOO\n",
            "sentence at line 3: tag 'B-FOO' is not of the types PER, ORG, LOC, MISC",
        ),
        ("Ann person\n", "sentence at line 1: tag 'person' is neither O nor begins with B- or I-"),
        ("-DOCSTART- O\n\n", "is empty"),
    ],
)
def test_column_files_that_are_wrong(tmp_path: Path, text: str, problem: str) -> None:
    save(tmp_path / "train.txt", text)
    assert problem in refused(lambda: read("conll03", tmp_path))


# ---- SICK, and where files are -----------------------------------------------------------------------------------


def test_sick(tmp_path: Path) -> None:
    header = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\r\n"
    save(tmp_path / "SICK_train.txt", header + "1\tA boy\tA girl\t3.5\tNEUTRAL\r\n")
    assert read("sickr", tmp_path).rows == (TextRow("A boy", "A girl", 3.5),)


@pytest.mark.parametrize("folder", [".", "CoLA", "cola", "glue/CoLA", "GLUE/cola"])
def test_a_tasks_folder_or_one_above_it_is_given(tmp_path: Path, folder: str) -> None:
    save(tmp_path / "data" / folder / "TRAIN.tsv", "a\t1\t\tWell.\n")
    save(tmp_path / "data" / folder / "dev.tsv", "a\t0\t*\tGood.\n")
    assert read("cola", tmp_path / "data").rows == (TextRow("Well.", None, 1),)
    assert has_split(load_task("cola"), "dev", tmp_path / "data")


def test_all_splits_come_from_one_folder(tmp_path: Path) -> None:
    save(tmp_path / "cola" / "dev.tsv", "a\t0\t*\tOther.\n")
    save(tmp_path / "glue" / "CoLA" / "train.tsv", "a\t1\t\tWell.\n")
    save(tmp_path / "glue" / "CoLA" / "dev.tsv", "a\t0\t*\tGood.\n")
    assert read("cola", tmp_path, "dev").rows == (TextRow("Good.", None, 0),)


def test_files_cut_out_of_others_are_read_with_their_own(tmp_path: Path) -> None:
    """The official dev set beside them holds their training rows."""
    row = json.dumps({"question": "is it", "passage": "It is.", "answer": True}) + "\n"
    for name in ("split-train.jsonl", "val.jsonl"):
        save(tmp_path / "BoolQ" / name, row)
    message = refused(lambda: read("boolq", tmp_path, "dev"))
    assert f"boolq: no dev rows: looked in {tmp_path / 'BoolQ'} for split-dev.jsonl:" in message
    save(tmp_path / "BoolQ" / "split-dev.jsonl", row * 2)
    assert len(read("boolq", tmp_path, "dev").rows) == 2
    save(tmp_path / "BoolQ" / "train.jsonl", row)
    assert len(read("boolq", tmp_path, "dev").rows) == 1


def test_squad2_is_not_read_from_v1s_folder(tmp_path: Path) -> None:
    for folder, name in (("squad", "train-v1.1.json"), ("squad_v2", "train-v2.0.json")):
        (tmp_path / folder).mkdir()
        squad_file(tmp_path / folder / name, {"answers": [answer("Ann", 0)]}, {"answers": [], "is_impossible": True})
    shutil.copy(tmp_path / "squad_v2" / "train-v2.0.json", tmp_path / "squad")
    assert read("squad2", tmp_path).origin == str(tmp_path / "squad_v2" / "train-v2.0.json")
    squad_file(tmp_path / "squad_v2" / "train-v2.0.json", {"answers": [answer("Ann", 0)]})
    assert "every question has an answer, as in SQuAD v1.1" in refused(lambda: read("squad2", tmp_path))


def test_a_missing_file_names_places_and_forms(tmp_path: Path) -> None:
    message = refused(lambda: read("mrpc", tmp_path))
    assert f"mrpc: no train rows: looked in {tmp_path} (it has no folder mrpc)" in message
    assert "for train.tsv, msr_paraphrase_train.txt, train-*.parquet" in message
    save(tmp_path / "MRPC" / "train.tsv", "Quality\t#1 String\t#2 String\n1\ta\tb\n")
    message = refused(lambda: read("mrpc", tmp_path, "dev"))
    assert f"mrpc: no dev rows: looked in {tmp_path / 'MRPC'} for dev.tsv, msr_paraphrase_test.txt" in message
    assert "no such folder" in refused(lambda: read("mrpc", tmp_path / "nowhere"))


# ---- what is wrong with tables -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("text\tlabel\na\t1\n", "line 1: no column 'sentence'; there are text, label"),
        ("sentence\tlabel\na\t1\nb\n", "line 3: 1 columns where 2 are expected (sentence, label)"),
        ("sentence\tlabel\na\tb\t1\n", "line 2: 3 columns where 2 are expected"),
        ("sentence\tlabel\na\t1\nb\t2\n", "line 3: label '2' is not one of the classes negative, positive"),
        ("sentence\tlabel\na\t\n", "line 2: label '' is not one of the classes"),
        ("sentence\tlabel\n", "is empty"),
        ("", "is empty"),
        ("\n\n", "is empty"),
        (b"sentence\tlabel\nab\xe9\t1\n", "the byte at offset 17 is not UTF-8"),
        (b"\xff\xfes\x00", "the byte at offset 0 is not UTF-8"),
        (b"sentence\tlabel\na\t2\nb\xe9\t1\n", "line 2: label '2' is not one of"),  # what comes first
    ],
)
def test_tables_that_are_wrong(tmp_path: Path, text: str | bytes, problem: str) -> None:
    path = save(tmp_path / "train.tsv", text)
    message = refused(lambda: read("sst2", tmp_path))
    assert problem in message
    assert message.startswith(str(path))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("[1]", "line 2: not a JSON object"),
        ('{"premise": "a"', "line 2: not a JSON object"),
        ('{"premise": "a", "label": "neutral"}', "line 2: no column 'hypothesis'; there are premise, label"),
        ('{"premise": null, "hypothesis": "b", "label": 0}', "line 2: column 'premise' has no value"),
        ('{"premise": ["a"], "hypothesis": "b", "label": 0}', "line 2: column 'premise' must hold text, found list"),
        ('{"premise": "a", "hypothesis": "b", "label": [0]}', "line 2: a label must be a word or a number, found list"),
        ('{"premise": "a", "hypothesis": "b", "label": 3}', "line 2: label '3' is not one of the classes"),
    ],
)
def test_json_lines_that_are_wrong(tmp_path: Path, line: str, problem: str) -> None:
    save(tmp_path / "train.jsonl", '{"premise": "a", "hypothesis": "b", "label": "neutral"}\n' + line + "\n")
    assert problem in refused(lambda: read("cb", tmp_path))


def test_scores_that_are_none(tmp_path: Path) -> None:
    for score in ("high", "nan", "inf", ""):
        save(tmp_path / "sts-train.csv", f"n\tx\t2012\t1\t{score}\ta\tb\n")
        assert f"line 1: label '{score}' is not a number" in refused(lambda: read("stsb", tmp_path))


# ---- a user's own ------------------------------------------------------------------------------------------------


def own(folder: Path, text: str) -> str:
    return str(save(folder / "mine.yaml", text))


def test_own_tables_in_every_form(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(
        pyarrow.table({"a": ["x, y", 'say "z"'], "b": ["u\nv", "w"], "l": [10, 9]}), tmp_path / "t.parquet"
    )
    save(tmp_path / "t.csv", '\ufeffa,b,l\r\n"x, y","u\nv",10\r\n"say ""z""",w,9\r\n')
    save_json_lines(tmp_path / "t.jsonl", {"a": "x, y", "b": "u\nv", "l": 10.0}, {"a": 'say "z"', "b": "w", "l": "9"})
    expected = (TextRow("x, y", "u\nv", 1), TextRow('say "z"', "w", 0))
    for ending in ("parquet", "csv", "jsonl"):
        files = f"{{train: t.{ending}, dev: t.{ending}}}"
        rows = read(own(tmp_path, f"{{kind: classification, text: a, pair: b, label: l, files: {files}}}"), None)
        assert rows.rows == expected, ending
        assert rows.classes == ("9", "10")


def test_own_classes_are_those_of_the_training_rows(tmp_path: Path) -> None:
    spec = own(
        tmp_path, "{kind: classification, text: a, label: l, columns: [l, a], files: {train: t.tsv, dev: d.tsv}}"
    )
    save(tmp_path / "t.tsv", "yes\tA\nno\tB\nmaybe\tC\n")
    save(tmp_path / "d.tsv", "no\tA\n")
    dev = read_rows(load_task(spec), "dev", None)
    assert dev.classes == ("maybe", "no", "yes")
    assert dev.rows == (TextRow("A", None, 1),)
    save(tmp_path / "d.tsv", "No\tA\nperhaps\tB\n")
    message = refused(lambda: read_rows(load_task(spec), "dev", None))
    assert message.endswith("d.tsv, line 2: label 'perhaps' is not one of the classes maybe, no, yes: correct it")
    save(tmp_path / "t.tsv", "yes\tA\nyes\tB\n")
    assert "its labels are yes: two classes or more" in refused(lambda: read_rows(load_task(spec), "train", None))
    save(tmp_path / "t.tsv", "yes\tA\nno\tB\n\tC\n")
    assert "t.tsv, line 3: it has no label" in refused(lambda: read_rows(load_task(spec), "train", None))


def test_numbers_are_names_where_classes_are_numbers(tmp_path: Path) -> None:
    text = "{kind: classification, classes: [1, 2], text: a, label: l, files: {train: t.tsv, dev: t.tsv}}"
    save(tmp_path / "t.tsv", "a\tl\nA\t2\n")
    spec = own(tmp_path, text)
    assert read_rows(load_task(spec), "train", None).rows == (TextRow("A", None, 1),)
    save(tmp_path / "t.tsv", "a\tl\nA\t0\n")
    assert "label '0' is not one of the classes 1, 2" in refused(lambda: read_rows(load_task(spec), "train", None))


def test_own_files_beside_the_yaml_or_in_the_data_folder(tmp_path: Path) -> None:
    spec = own(tmp_path / "home", "{kind: regression, text: a, label: l, files: {train: in/t.csv, dev: d.csv}}")
    save(tmp_path / "home" / "in" / "t.csv", "a,l\nx,1\n")
    save(tmp_path / "data" / "d.csv", "a,l\ny,-2e-1\n")
    task = load_task(spec)
    assert read_rows(task, "train", tmp_path / "data").rows == (TextRow("x", None, 1.0),)
    assert read_rows(task, "dev", tmp_path / "data").rows == (TextRow("y", None, -0.2),)
    message = refused(lambda: read_rows(task, "dev", None))
    assert f"mine: no dev rows: looked in {tmp_path / 'home'} for d.csv: correct files in its YAML" in message


def test_own_csv_with_broken_quotes(tmp_path: Path) -> None:
    spec = own(tmp_path, "{kind: regression, text: a, label: l, files: {train: t.csv, dev: t.csv}}")
    save(tmp_path / "t.csv", 'a,l\n"x" y,1\n')
    assert "t.csv, line 2: not valid CSV" in refused(lambda: read_rows(load_task(spec), "train", None))
    save(tmp_path / "t.csv", 'a,l\n"x,1\n')
    assert "t.csv, line 2: not valid CSV" in refused(lambda: read_rows(load_task(spec), "train", None))


def test_own_tags(tmp_path: Path) -> None:
    spec = own(tmp_path, "{kind: tags, files: {train: t.bio, dev: d.jsonl}}")
    save(tmp_path / "t.bio", "Ann I-who\nin O\nRome I-place\n")
    save_json_lines(tmp_path / "d.jsonl", {"tokens": ["Bob", "ran"], "tags": ["B-who", "O"]})
    task = load_task(spec)
    assert read_rows(task, "train", None).classes == ("O", "B-place", "I-place", "B-who", "I-who")
    assert names(read_rows(task, "dev", None)) == [[("Bob", "B-who"), ("ran", "O")]]
    save_json_lines(tmp_path / "d.jsonl", {"tokens": ["Bob"], "tags": ["B-who", "O"]})
    assert "line 1: 1 words, but 2 tags" in refused(lambda: read_rows(task, "dev", None))
    save(tmp_path / "t.bio", "a O\n")
    assert "all its words are tagged O" in refused(lambda: read_rows(task, "train", None))


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    save(tmp_path / "train-00000-of-00001.parquet", "hello")
    assert "train-00000-of-00001.parquet: cannot be read" in refused(lambda: read("cola", tmp_path))


# ---- the hub -----------------------------------------------------------------------------------------------------


def test_rows_of_the_hub_and_of_its_files(tmp_path: Path) -> None:
    """`datasets` reads a folder as it reads the hub; classes have other numbers there, and their names count."""
    from datasets import ClassLabel, Dataset, Features, List, Value

    texts = Features({"sentence": Value("string"), "label": ClassLabel(names=["Positive", "Negative"])})
    tags = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "I-b", "B-b"]))})
    for name, features, rows in (
        ("texts", texts, {"sentence": ["good", "bad", "so"], "label": [0, 1, -1]}),
        ("tags", tags, {"tokens": [["a", "b", "c"]], "ner_tags": [[2, 1, 0]]}),
    ):
        (tmp_path / name).mkdir()
        for split in ("train", "validation"):
            Dataset.from_dict(rows, features=features).to_parquet(tmp_path / name / f"{split}-00000-of-00001.parquet")
    hub = f"{{id: {tmp_path / 'texts'}, splits: {{train: train, dev: validation}}}}"
    spec = own(
        tmp_path, f"{{kind: classification, classes: [negative, positive], text: sentence, label: label, hub: {hub}}}"
    )
    rows = read_rows(load_task(spec), "train", None)
    assert rows.rows == (TextRow("good", None, 1), TextRow("bad", None, 0))
    assert rows.left_out == 1
    assert rows.origin == str(tmp_path / "texts")
    assert not has_split(load_task(spec), "dev_mm", None)
    assert read("sst2", tmp_path / "texts").rows == rows.rows
    for folder in ("data", "sst2"):  # as repositories of the hub are laid out
        shutil.copytree(tmp_path / "texts", tmp_path / "clone" / "SST-2" / folder)
        assert read("sst2", tmp_path / "clone").rows == rows.rows
        shutil.rmtree(tmp_path / "clone")
    spec = own(tmp_path, f"{{kind: tags, hub: {hub.replace('texts', 'tags')}}}")
    assert names(read_rows(load_task(spec), "dev", None)) == [[("a", "B-b"), ("b", "I-b"), ("c", "O")]]


def test_a_hub_that_has_not_got_it(tmp_path: Path) -> None:
    hub = f"{{id: {tmp_path / 'nowhere'}, splits: {{train: train, dev: validation}}}}"
    task = load_task(own(tmp_path, f"{{kind: regression, text: a, label: b, hub: {hub}}}"))
    message = refused(lambda: read_rows(task, "train", None))
    assert "cannot be read from the hub" in message
    assert "give --data-dir" in message


# ---- digests, and the real thing ---------------------------------------------------------------------------------


def test_the_digest_is_of_the_rows_alone() -> None:
    rows = SplitRows((TextRow("a", None, 1), TextRow("b", "c", 0)), "here", ("x", "y"))
    assert len(rows.digest()) == 16
    assert rows.digest() == SplitRows(rows.rows, "there", ("x", "y")).digest()
    assert rows.digest() != SplitRows(rows.rows[::-1], "here", ("x", "y")).digest()
    assert rows.digest() != SplitRows((TextRow("a", None, 1), TextRow("b", "c", 1)), "here", ("x", "y")).digest()


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data in {REAL}")
@pytest.mark.parametrize("name", REAL_ROWS)
def test_real_data_has_the_rows_that_it_should(name: str) -> None:
    for split, count in zip(("train", "dev"), REAL_ROWS[name], strict=True):
        rows = read(name, REAL, split)
        assert len(rows.rows) + rows.left_out == count
        if name != "squad1" and name != "squad2":
            assert rows.left_out == 0


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data in {REAL}")
def test_real_multirc_has_its_passages_and_groups() -> None:
    for split, passages in (("train", 456), ("dev", 83)):
        rows = [row for row in read("multirc", REAL, split).rows if isinstance(row, TextRow)]
        assert len({row.group.partition("-")[0] for row in rows}) == passages
        assert len({(row.pair, row.group) for row in rows}) == len({row.group for row in rows})
