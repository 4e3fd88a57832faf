"""Sources: every form of spec, and every fault as one line."""

import dataclasses
import errno
import gzip
import itertools
import json
import lzma
import os
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sctd.corpus.sources import embedded, readers, tables
from sctd.corpus.sources.pieces import Form, Piece
from sctd.corpus.sources.source import (
    Faults,
    Source,
    fingerprint,
    parse_sources,
    plan_pieces,
    read_documents,
    read_piece,
    source_files,
)
from sctd.errors import UserError

TEXTS = ["First document,\nwith two lines.", "Zweites: größer, 日本語.", "third"]
SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "corpus"


def compress(ending: str, raw: bytes) -> bytes:
    if ending == ".zst":
        return pyarrow.compress(raw, codec="zstd", asbytes=True)
    return {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[ending](raw)


def write(path: Path, raw: bytes) -> str:
    path.write_bytes(compress(path.suffix if path.suffix in readers.COMPRESSIONS else "", raw))
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
    monkeypatch.setattr(readers, "MAX_TEXT_FILE_DOCUMENT", 10)
    path = write(tmp_path / "a.txt", b"aaaaaa\nbbbbbb\ncccccc\n")
    assert list(read_documents(path)) == ["aaaaaa\nbbbbbb", "cccccc"]


def test_parquet_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_BATCH_ROWS", 2)
    table = pyarrow.table({"n": [1, 2, 3, 4], "text": [*TEXTS, " "]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert list(read_documents(str(tmp_path / "a.parquet"))) == TEXTS


def test_glob_is_sorted_and_takes_brackets_in_names_literally(tmp_path: Path) -> None:
    for name in ("b", "a", "c[1]"):
        write(tmp_path / f"{name}.txt", name.encode())
    assert list(read_documents(str(tmp_path / "*.txt"))) == ["a", "b", "c[1]"]
    assert list(read_documents(str(tmp_path / "c[1].txt"))) == ["c[1]"]


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
    assert min(len(text.split()) for text in documents) >= embedded.MIN_EMBEDDED_WORDS
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
    found = {path.name: embedded._file_docstrings(path) for path in embedded._library_files(tmp_path)}
    assert found == {"broken.py": [], "latin.py": [], "ok.py": [["one"], [], ["two", "three"], ["four"]]}


def test_no_file_matches_or_is_a_folder(tmp_path: Path) -> None:
    assert "no file matches" in error(str(tmp_path / "*.txt"))
    assert "*.jsonl" in error(str(tmp_path))


def test_files_that_cannot_be_opened_are_told(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"x")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    assert "b.txt: is a broken link" in error(str(tmp_path / "*.txt"))
    (tmp_path / "b.txt").unlink()
    os.mkfifo(tmp_path / "c.txt")
    assert "not a regular file" in error(str(tmp_path / "*.txt"))
    (tmp_path / "c.jsonl.gz").mkdir()  # stands for a file without permission, which root always has
    (piece,) = readers.plan_text(0, tmp_path / "c.jsonl.gz", Form(), 1 << 20)
    with pytest.raises(UserError, match=r"c.jsonl.gz: cannot be read \(Is a directory\)"):
        list(read_piece(piece, Form(), Faults()))


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    """They cannot be printed, nor stand in a report."""
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "wb") as file:
        file.write(b"x")
    message = error(str(tmp_path / "*.txt"))
    assert "caf\\udce9.txt" in message and "rename it" in message
    write(tmp_path / "Größe 日本.txt", b"fine")
    assert list(read_documents(str(tmp_path / "Gr*.txt"))) == ["fine"]


def test_unknown_ending_lists_the_known(tmp_path: Path) -> None:
    for name in ("a.csv", "a.csv.gz", "a.gz", "a"):
        message = error(write(tmp_path / name, b"x"))
        assert name in message and ".txt, .jsonl, .parquet" in message and ".zst" in message


def test_unknown_ending_is_found_before_anything_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"x")
    write(tmp_path / "b.csv", b"x")
    with pytest.raises(UserError, match="unknown ending"):
        source_files(str(tmp_path / "*"))


def test_undecodable_bytes_name_file_and_line(tmp_path: Path) -> None:
    message = error(write(tmp_path / "a.txt", b"fine\n\nbad \xff here\n"))
    assert "a.txt, line 3, byte 10: byte 0xff" in message
    message = error(write(tmp_path / "a.txt", b"\xef\xbb\xbfbad \xfe here\n"))
    assert "a.txt, line 1, byte 7: byte 0xfe" in message
    for closed in (b"", b"\n"):
        path = write(tmp_path / "a.txt", b"fine\n\nbad \xff here\nand on" + closed)
        with pytest.raises(UserError, match="a.txt, line 3, byte 10: byte 0xff"):
            in_pieces(path, 1, Form(txt="file"))


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
    for damaged in (whole[: len(whole) // 2], whole[:-3], b"not compressed at all"):
        path.write_bytes(damaged)
        message = error(str(path))
        assert path.name in message and "truncated or damaged" in message
    for empty in (b"", compress(ending, b"")):
        path.write_bytes(empty)
        assert "is empty" in error(str(path))


def test_parquet_faults(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"title": ["a"], "body": ["b"]}), path)
    assert "no column 'text'; its columns are title, body" in error(str(path))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    assert "a.parquet, row 2: 'text' is NoneType" in error(str(path))
    pyarrow.parquet.write_table(pyarrow.table({"text": [["a"]], "x": [1]}), path)
    assert "a.parquet, row 1: 'text' is list" in error(str(path))
    path.write_bytes(path.read_bytes()[:-10])
    assert "cannot be read as Parquet" in error(str(path))


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    sources = parse_sources([f"mine={path}"])
    before = fingerprint(sources)
    assert before == fingerprint(sources) == json.loads(json.dumps(before)) and before[0]["name"] == "mine"
    path.write_text("xy")
    assert fingerprint(sources) != before
    assert fingerprint(parse_sources(["embedded"]))[0]["python"]
    assert fingerprint(parse_sources(["hf:a"])) == [{"name": "a", "spec": "hf:a"}]
    folder = parse_sources([f"hf:{tmp_path}"])
    before = fingerprint(folder)
    path.write_text("xyz")
    assert fingerprint(folder) != before


# ---- names


def test_names_of_sources(tmp_path: Path) -> None:
    odd = write(tmp_path / "a=b.txt", b"x")
    texts = ["wiki=/data/*.txt", "/data/books-*.jsonl.xz", "hf:org/set:en", "hf:org/set", "embedded", odd]
    names = [source.name for source in parse_sources(texts)]
    assert names == ["wiki", "books", "set", "set-2", "embedded", "ab"]
    assert parse_sources(texts)[0].spec == "/data/*.txt" and parse_sources(texts)[-1].spec == odd
    assert [source.name for source in parse_sources(["/data/*.jsonl"])] == ["data"]


@pytest.mark.parametrize(("texts", "said"), [([], "no source"), (["a=x", "a=y"], "called 'a'"), (["a="], "no file")])
def test_bad_names(texts: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_sources(texts)


# ---- pieces


def pieces_of(path: str, size: int, form: Form = Form()) -> list[Piece]:  # noqa: B008
    return plan_pieces([Source("a", path)], form, size)


def in_pieces(path: str, size: int, form: Form = Form()) -> list[list[str]]:  # noqa: B008
    return [list(read_piece(piece, form, Faults())) for piece in pieces_of(path, size, form)]


@settings(max_examples=150, deadline=None)
@given(
    lines=st.lists(st.text("aé日 \t", max_size=12), max_size=25),
    end=st.sampled_from(["\n", "\r\n"]),
    closed=st.booleans(),
    size=st.integers(1, 60),
    ending=st.sampled_from(["", ".gz", ".zst"]),
    kind=st.sampled_from([".txt", ".jsonl"]),
)
def test_each_document_is_read_once_whatever_the_pieces(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[str],
    end: str,
    closed: bool,
    size: int,
    ending: str,
    kind: str,
) -> None:
    if kind == ".jsonl":
        lines = [json.dumps({"text": line}, ensure_ascii=False) for line in lines]
    raw = (end.join(lines) + (end if closed else "")).encode()
    if not raw:
        return
    path = write(tmp_path_factory.mktemp("pieces") / f"a{kind}{ending}", raw)
    whole = list(read_documents(path))
    parts = in_pieces(path, size)
    assert [text for part in parts for text in part] == whole
    assert ending or len(parts) == max(1, round(len(raw) / size))


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst"])
def test_pieces_are_of_about_the_size_asked_for(tmp_path: Path, ending: str) -> None:
    texts = [f"document {i} " + "word " * 50 for i in range(4000)]
    path = write(tmp_path / f"a{ending}", json_lines(texts))
    size = len(json_lines(texts))
    parts = in_pieces(path, size // 5)
    assert [text for part in parts for text in part] == texts
    assert len(parts) == 5 and all(600 < len(part) < 1000 for part in parts)
    assert sum(piece.bytes for piece in pieces_of(path, size // 5)) == pytest.approx(size, rel=0.05)
    assert pieces_of(path, size // 5)[1].title == f"a{ending}, part 2 of 5"


def test_a_text_file_may_be_one_document(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"one\n\ntwo\n")
    assert in_pieces(path, 2, Form(txt="file")) == [["one\n\ntwo\n"]]
    assert in_pieces(path, 1 << 20, Form(txt="blank-line")) == [["one", "two"]]


def test_another_field(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "no", "body": "yes"}\n')
    assert in_pieces(path, 1 << 20, Form(field="body")) == [["yes"]]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["no"], "body": ["yes"]}), tmp_path / "b.parquet")
    assert in_pieces(str(tmp_path / "b.parquet"), 1 << 20, Form(field="body")) == [["yes"]]


TABLES = ["a.parquet", "a.parquet.gz", "file.arrow", "stream.arrow", "stream.arrow.xz", "file.arrow.zst"]


def write_table(path: Path, table: pyarrow.Table) -> str:
    """In many row groups or record batches; compressed where the name says so."""
    sink = pyarrow.BufferOutputStream()
    if ".parquet" in path.name:
        pyarrow.parquet.write_table(table, sink, row_group_size=100)
    else:
        new = pyarrow.ipc.new_file if path.name.startswith("file") else pyarrow.ipc.new_stream
        with new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    return write(path, sink.getvalue().to_pybytes())


@pytest.mark.parametrize("name", TABLES)
def test_tables_in_pieces(tmp_path: Path, name: str) -> None:
    texts = [f"document {i} " + "word " * 20 for i in range(1000)]
    path = write_table(tmp_path / name, pyarrow.table({"n": range(1000), "text": texts}))
    parts = in_pieces(path, 30_000)
    assert [text for part in parts for text in part] == texts
    assert len(parts) == 1 if name.endswith((".gz", ".xz", ".zst")) else 3 <= len(parts) <= 10


@pytest.mark.parametrize("name", TABLES)
def test_a_damaged_table_may_be_skipped(tmp_path: Path, name: str) -> None:
    path = Path(write_table(tmp_path / name, pyarrow.table({"text": [f"text {i}" for i in range(1000)]})))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = error(str(path))
    assert name in message and "cannot be read as" in message
    faults = Faults("skip")
    for piece in pieces_of(str(path), 1000):
        list(read_piece(piece, Form(), faults))
    assert sum(faults.counts.values()) >= 1 and name in faults.examples[0]


def test_rows_are_counted_from_the_beginning_of_a_table(tmp_path: Path) -> None:
    texts: list[str | None] = [f"text {i}" for i in range(1000)]
    texts[777] = None
    for name in ("a.parquet", "file.arrow"):
        path = write_table(tmp_path / name, pyarrow.table({"text": texts}))
        with pytest.raises(UserError, match=f"{name}, row 778: 'text' is NoneType"):
            in_pieces(path, 1000)


def test_hub_in_pieces(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"train-{number}.jsonl", json_lines([f"{number} {text}" for text in TEXTS]))
    parts = in_pieces(f"hf:{tmp_path}", 1)
    assert [len(part) for part in parts] == [3, 3, 3] and len({text for part in parts for text in part}) == 9


# ---- faults that are passed over


def test_faults_are_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    raw = json_lines(["one"]) + b'{"text": "caf\xe9"}\n{broken\n{"body": 1}\n{"text": 3}\n' + json_lines(["two"])
    path = write(tmp_path / "a.jsonl", raw)
    for size in (1 << 20, 20):
        faults = Faults("skip")
        found = [text for piece in pieces_of(path, size) for text in read_piece(piece, Form(), faults)]
        assert found == ["one", "two"]
        assert faults.counts == {"undecodable": 1, "json": 1, "field": 1, "record": 1}
        assert [line.split(":")[0].split(", ")[1] for line in faults.examples] == [f"line {n}" for n in (2, 3, 4, 5)]


def test_many_faults_cost_no_more_than_a_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The place of each is found by reading up to it, but only of those that are told."""
    path = write(tmp_path / "a.jsonl", b"{broken\n" * 1000 + b'{"body": 1}\n' * 1000 + json_lines(["fine"]))
    original, opened = readers.open_text, []
    monkeypatch.setattr(readers, "open_text", lambda path, raw=None: opened.append(path) or original(path, raw))
    for size in (1 << 20, 7000):
        pieces = pieces_of(path, size)
        faults = Faults("skip")
        opened.clear()
        assert [text for piece in pieces for text in read_piece(piece, Form(), faults)] == ["fine"]
        assert faults.counts == {"json": 1000, "field": 1000} and len(opened) <= 2 * len(pieces)


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow"])
def test_bad_bytes_in_a_table_cost_one_row(tmp_path: Path, name: str) -> None:
    rows = [f"text {i}".encode() for i in range(250)]
    rows[120] = b"caf\xe9"
    for binary, kind in ((pyarrow.binary(), pyarrow.string()), (pyarrow.large_binary(), pyarrow.large_string())):
        raw = pyarrow.array(rows, binary)
        column = pyarrow.Array.from_buffers(kind, len(raw), raw.buffers())
        path = write_table(tmp_path / name, pyarrow.table({"text": column}))
        with pytest.raises(UserError, match=f"{name}, row 121: 'text' holds .* not valid UTF-8, at character 3"):
            list(read_documents(path))
        faults = Faults("skip")
        (piece,) = pieces_of(path, 1 << 20)
        found = list(read_piece(piece, Form(), faults))
        assert faults.counts == {"undecodable": 1} and len(found) == 249 and found[120] == "text 121"


def test_no_room_to_unpack_is_no_fault_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_table(tmp_path / "a.parquet.gz", pyarrow.table({"text": ["fine"]}))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tables.shutil, "copyfileobj", full)
    (piece,) = pieces_of(path, 1 << 20)
    with pytest.raises(OSError, match="No space left"):
        list(read_piece(piece, Form(), Faults("skip")))


def test_a_text_document_with_bad_bytes_is_left_out_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"one\n\nbad \xff\nand on\n\ntwo\n")
    faults = Faults("skip")
    (piece,) = pieces_of(path, 1 << 20)
    assert list(read_piece(piece, Form(), faults)) == ["one", "two"] and faults.counts == {"undecodable": 1}


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_a_truncated_file_is_read_to_its_break(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh ", k=200)) for _ in range(8000)]
    whole = compress(ending, json_lines(texts))
    path.write_bytes(whole[: len(whole) * 2 // 3])
    faults = Faults("skip")
    (piece,) = pieces_of(str(path), 1 << 30)
    found = list(read_piece(piece, Form(), faults))
    assert 2000 < len(found) < 8000 and found == texts[: len(found)]
    assert faults.counts == {"truncated": 1} and "truncated or damaged after line" in faults.examples[0]
    # In pieces, of which the last two begin behind the break; a rank may come to them first.
    borders = [0, 400_000, 1_500_000, 1_600_000, None]
    pieces = [dataclasses.replace(piece, start=a or 0, end=b) for a, b in itertools.pairwise(borders)]
    cut = Faults("skip")
    assert [text for part in pieces for text in read_piece(part, Form(), cut)] == found
    assert cut.counts == {"truncated": 1} and cut.examples == faults.examples
    for part in pieces[-2:]:
        with pytest.raises(UserError, match="truncated or damaged after line"):
            list(read_piece(part, Form(), Faults()))


def test_an_empty_file_is_a_fault(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"")
    assert "a.jsonl: is empty" in error(path)
    faults = Faults("skip")
    assert [list(read_piece(piece, Form(), faults)) for piece in pieces_of(path, 9)] == [[]]
    assert faults.counts == {"empty": 1}


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
def test_wikipedia_sample() -> None:
    assert sum(1 for _ in read_documents(str(SHARED / "wiki-valid.jsonl.xz"))) == 619
