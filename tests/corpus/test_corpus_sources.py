"""Sources: every form of spec, and every fault as one line."""

import gzip
import itertools
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from sctd.corpus import sources
from sctd.corpus.sources import fingerprint, read_all, read_documents, source_files
from sctd.errors import UserError

TEXTS = ["First document,\nwith two lines.", "Zweites: größer, 日本語.", "third"]
SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "corpus"


def compress(ending: str, raw: bytes) -> bytes:
    if ending == ".zst":
        return pyarrow.compress(raw, codec="zstd", asbytes=True)
    return {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[ending](raw)


def write(path: Path, raw: bytes) -> str:
    path.write_bytes(compress(path.suffix if path.suffix in sources.KNOWN_COMPRESSIONS else "", raw))
    return str(path)


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)).encode()


def error(source: str) -> str:
    with pytest.raises(UserError) as caught:
        list(read_documents(source))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("ending", ["", ".gz", ".xz", ".zst"])
def test_text_and_json_lines_plain_and_compressed(tmp_path: Path, ending: str) -> None:
    assert list(read_documents(write(tmp_path / f"a.jsonl{ending}", json_lines(TEXTS)))) == TEXTS
    raw = ("\n\n" + "\n \n\n".join(TEXTS)).encode()
    assert list(read_documents(write(tmp_path / f"a.txt{ending}", raw))) == TEXTS


def test_text_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    raw = b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree"
    assert list(read_documents(write(tmp_path / "a.txt", raw))) == ["one\ntwo", "three"]


def test_text_file_without_blank_lines_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_TEXT_FILE_DOCUMENT", 10)
    path = write(tmp_path / "a.txt", b"aaaaaa\nbbbbbb\ncccccc\n")
    assert list(read_documents(path)) == ["aaaaaa\nbbbbbb", "cccccc"]


def test_parquet_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PARQUET_BATCH_ROWS", 2)
    table = pyarrow.table({"n": [1, 2, 3, 4], "text": [*TEXTS, " "]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert list(read_documents(str(tmp_path / "a.parquet"))) == TEXTS


def test_glob_is_sorted_and_takes_brackets_in_names_literally(tmp_path: Path) -> None:
    for name in ("b", "a", "c[1]"):
        write(tmp_path / f"{name}.txt", name.encode())
    assert list(read_documents(str(tmp_path / "*.txt"))) == ["a", "b", "c[1]"]
    assert list(read_documents(str(tmp_path / "c[1].txt"))) == ["c[1]"]
    assert list(read_all([str(tmp_path / "b.txt"), str(tmp_path / "a.txt")])) == ["b", "a"]


def test_blank_documents_are_left_out(tmp_path: Path) -> None:
    assert list(read_documents(write(tmp_path / "a.jsonl", json_lines(["", " \n", "x"]) + b"\n"))) == ["x"]


def test_hub_streams_a_local_folder(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", json_lines(TEXTS))
    write(folder / "test.jsonl", json_lines(["held out"]))
    assert list(read_documents(f"hf:{folder}")) == TEXTS
    assert list(read_documents(f"hf:{folder}:default:test")) == ["held out"]
    assert list(read_documents(f"hf:{folder}::test")) == ["held out"]
    assert "Bad split: nope" in error(f"hf:{folder}:default:nope")
    other = tmp_path / "other"
    other.mkdir()
    write(other / "train.jsonl", b'{"body": "x"}\n')
    assert "row 1: no key 'text'; its keys are body" in error(f"hf:{other}")


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = error("hf:sctd-nobody/does-not-exist")
    assert "hf:sctd-nobody/does-not-exist" in message and "check the name" in message


def test_hub_spec_malformed() -> None:
    for spec in ("hf:", "hf::a", "hf:a:b:c:d"):
        assert "hf:name:config:split" in error(spec)


def test_embedded_is_english_prose_in_a_fixed_order() -> None:
    documents = list(read_documents("embedded"))
    assert documents[:150] == list(itertools.islice(read_documents("embedded"), 150))
    assert len(set(documents)) == len(documents) > 500
    assert 1.8e6 < sum(len(text.encode()) for text in documents) < 2.4e6
    assert min(len(text.split()) for text in documents) >= sources.MIN_EMBEDDED_WORDS
    assert any("keep it sorted assuming a is sorted" in text for text in documents)


def test_embedded_docstrings_in_source_order(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.py").write_text('"""Not to be read at all, ever."""')
    (tmp_path / "latin.py").write_bytes(b'"""caf\xe9"""')
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "ok.py").write_text(
        '"""one"""\nif 1:\n  class A:\n    """two"""\n    def f(): "three"\n'
        'try: pass\nexcept Exception:\n  def g(): "four"\n'
    )
    found = {path.name: sources._file_docstrings(path) for path in sources._library_files(tmp_path)}
    assert found == {"broken.py": [], "latin.py": [], "ok.py": [["one"], [], ["two", "three"], ["four"]]}


def test_no_file_matches_or_is_a_folder(tmp_path: Path) -> None:
    assert "no file matches" in error(str(tmp_path / "*.txt"))
    assert "*.jsonl" in error(str(tmp_path))


def test_unknown_ending_lists_the_known(tmp_path: Path) -> None:
    for name in ("a.csv", "a.parquet.gz", "a.gz", "a"):
        message = error(write(tmp_path / name, b"x"))
        assert name in message and ".txt, .jsonl, .parquet" in message and ".zst" in message


def test_unknown_ending_is_found_before_anything_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"x")
    write(tmp_path / "b.csv", b"x")
    with pytest.raises(UserError, match="unknown ending"):
        source_files(str(tmp_path / "*"))


def test_undecodable_bytes_name_file_and_line(tmp_path: Path) -> None:
    message = error(write(tmp_path / "a.txt", b"fine\n\nbad \xff here\n"))
    assert "a.txt, line 3" in message and "0xff" in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": ', "not valid JSON"),
        (b'"text"', "expected a JSON object"),
        (b'{"body": "x", "id": 1}', "no key 'text'; its keys are body, id"),
        (b'{"text": null}', "'text' is NoneType"),
        (b'{"text": "a \\ud800"}', "surrogate"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_broken_json_lines_name_file_and_line(tmp_path: Path, line: bytes, expected: str) -> None:
    message = error(write(tmp_path / "a.jsonl", json_lines(["x"]) + line + b"\n"))
    assert "a.jsonl, line 2" in message and expected in message


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_truncated_empty_and_damaged_compressed_files(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    whole = compress(ending, json_lines([f"document number {i}" for i in range(5000)]))
    for damaged in (whole[: len(whole) // 2], whole[:-3], b"", b"not compressed at all"):
        path.write_bytes(damaged)
        message = error(str(path))
        assert path.name in message and "truncated or damaged" in message


def test_parquet_faults(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"title": ["a"], "body": ["b"]}), path)
    assert "no column 'text'; its columns are title, body" in error(str(path))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    assert "a.parquet, row 2: 'text' is NoneType" in error(str(path))
    path.write_bytes(path.read_bytes()[:-10])
    assert "cannot be read as Parquet" in error(str(path))


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    before = fingerprint(str(path))
    assert before == fingerprint(str(path)) == json.loads(json.dumps(before))
    path.write_text("xy")
    assert fingerprint(str(path)) != before
    assert fingerprint("embedded")["python"]
    assert fingerprint("hf:a") == {"spec": "hf:a"}


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
def test_wikipedia_sample() -> None:
    assert sum(1 for _ in read_documents(str(SHARED / "wiki-valid.jsonl.xz"))) == 619
