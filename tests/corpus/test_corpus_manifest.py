"""The manifest: round trip, every kind of damage, altered shards."""

import json
from pathlib import Path
from typing import Any

import pytest

from sctd.corpus.manifest import (
    FORMAT_VERSION,
    Ends,
    Manifest,
    Shard,
    SourceTotals,
    Split,
    read_manifest,
    verify_shards,
    write_manifest,
)
from sctd.corpus.tokenizer import SpecialIds
from sctd.errors import UserError
from sctd.files import sha256


def corpus(folder: Path) -> Manifest:
    shards = []
    for name in ("train-16-00000", "valid-16-00000"):
        rows, ends = (folder / f"{name}.npy", folder / f"{name}.ends.npy")
        for path in (rows, ends):
            path.write_bytes(path.name.encode() * 10)
        beside = Ends(ends.name, sha256(ends), ends.stat().st_size)
        shards.append(Shard(rows.name, 7, sha256(rows), rows.stat().st_size, 0, beside))
    manifest = Manifest(
        format_version=FORMAT_VERSION, seq_lens=(16,), vocab_size=300, dtype="uint16", tokenizer_hash="ab",
        special_ids=SpecialIds(0, 1, 2, 3, 4), unigram_entropy=4.5, max_token_id=299, documents=3, text_bytes=99,
        tokens=50, sources=(SourceTotals("a", "embedded", 0.5, 3, 99, 50),), settings={"seed": 0, "sources": []},
        splits={16: {"train": Split(7, (shards[0],)), "valid": Split(7, (shards[1],))}}, dropped={"special_rows": 1},
    )  # fmt: skip
    write_manifest(folder, manifest)
    return manifest


def error(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_manifest(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(folder: Path, *keys: Any, value: Any = None) -> None:
    """Set (or with None delete) the entry under `keys` of a fresh manifest."""
    corpus(folder)
    state = json.loads((folder / "manifest.json").read_text())
    entry = state
    for key in keys[:-1]:
        entry = entry[key]
    if value is None:
        del entry[keys[-1]]
    else:
        entry[keys[-1]] = value
    (folder / "manifest.json").write_text(json.dumps(state))


def test_round_trip(tmp_path: Path) -> None:
    manifest = corpus(tmp_path)
    assert read_manifest(tmp_path) == manifest
    assert {"unigram_entropy", "seq_lens", "vocab_size"} <= set(json.loads((tmp_path / "manifest.json").read_text()))


def test_missing_folder_and_missing_manifest(tmp_path: Path) -> None:
    assert "no such corpus folder" in error(tmp_path / "nowhere")
    assert "run `sctd prepare`" in error(tmp_path)


@pytest.mark.parametrize("raw", [b"", b'{"format_version": 1', b"\xff\xfe", b"[]"])
def test_damaged_json(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(raw)
    assert "manifest.json" in error(tmp_path) and "again" in error(tmp_path)


@pytest.mark.parametrize(
    "keys",
    [("seq_lens",), ("special_ids", "mask"), ("splits", "16"), ("splits", "16", "valid"),
     ("splits", "16", "train", "shards", 0, "sha256"), ("splits", "16", "train", "shards", 0, "ends", "bytes"),
     ("sources", 0, "tokens"), ("unigram_entropy",), ("settings",)],
)  # fmt: skip
def test_missing_keys_are_named(tmp_path: Path, keys: tuple) -> None:
    change(tmp_path, *keys)
    assert f"key '{keys[-1]}' is missing" in error(tmp_path)


def test_wrong_types_are_named(tmp_path: Path) -> None:
    change(tmp_path, "seq_lens", value="128")
    assert "key 'seq_lens' is of the wrong type (str)" in error(tmp_path)
    change(tmp_path, "seq_lens", value=["16"])
    assert "key 'seq_lens' is of the wrong type (str)" in error(tmp_path)
    for lengths in ([], [512, 128], [16, 16]):
        change(tmp_path, "seq_lens", value=lengths)
        assert "not a list of ascending lengths" in error(tmp_path)
    change(tmp_path, "splits", "16", "train", "shards", value=[3])
    assert "key 'shards' is of the wrong type (int)" in error(tmp_path)
    change(tmp_path, "splits", "all", value={})
    assert "key 'splits' has keys that are not numbers" in error(tmp_path)


def test_inconsistent_rows_and_shards_outside_the_folder(tmp_path: Path) -> None:
    change(tmp_path, "splits", "16", "train", "rows", value=8)
    assert "not the sum" in error(tmp_path)
    for place in (("file",), ("ends", "file")):
        change(tmp_path, "splits", "16", "train", "shards", 0, *place, value="../train-16-00000.npy")
        assert "outside" in error(tmp_path)
    change(tmp_path, "splits", "16", "train", "shards", 0, "source", value=1)
    assert "order of the sources" in error(tmp_path)


def test_a_length_that_was_not_packed_is_told(tmp_path: Path) -> None:
    manifest = corpus(tmp_path)
    assert manifest.split(16, "train").rows == 7 and manifest.seq_len == 16
    with pytest.raises(UserError, match="rows of 32 tokens are not in the corpus, it has 16: .*--seq-len 32"):
        manifest.split(32, "train")


def test_unknown_version(tmp_path: Path) -> None:
    change(tmp_path, "format_version", value=99)
    assert "format version 99" in error(tmp_path)


def test_altered_shards_are_named(tmp_path: Path) -> None:
    manifest = corpus(tmp_path)
    verify_shards(tmp_path, manifest, part=(0, 1))
    shard = tmp_path / "valid-16-00000.npy"
    raw = bytearray(shard.read_bytes())
    raw[5] ^= 1
    shard.write_bytes(raw)
    verify_shards(tmp_path, manifest)  # the size alone does not tell
    found = []
    for rank in range(3):  # each file is hashed by one of three ranks
        try:
            verify_shards(tmp_path, manifest, part=(rank, 3))
        except UserError as error:
            found.append(str(error))
    assert len(found) == 1 and "valid-16-00000.npy: shard was altered (its sha256 differs)" in found[0]
    shard.write_bytes(raw[:-1])
    with pytest.raises(UserError, match=r"valid-16-00000.npy.*bytes"):
        verify_shards(tmp_path, manifest)
    shard.unlink()
    with pytest.raises(UserError, match=r"valid-16-00000.npy.*missing"):
        verify_shards(tmp_path, manifest)
    (tmp_path / "train-16-00000.ends.npy").unlink()
    with pytest.raises(UserError, match=r"train-16-00000.ends.npy.*missing"):
        verify_shards(tmp_path, manifest)
