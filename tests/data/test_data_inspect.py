"""`sctd inspect` tells what training sees: order, masks, borders of documents and sources are checked against it."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from sctd.cli import main
from sctd.config import Config, DataConfig, RunConfig, load_config
from sctd.corpus.manifest import Manifest, SourceTotals, Split, read_manifest, write_manifest
from sctd.corpus.prepare.rows import Packer, row_dtype, write_shards
from sctd.corpus.tokenizer import (
    SPECIAL_TOKENS,
    corpus_encoder,
    encode_documents,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    tokenizer_hash,
    vocab_size,
)
from sctd.data.inspect import inspect
from sctd.data.masking import build_masker, target_count
from sctd.data.stream import Rows, Share, TrainStream, make_batch
from sctd.errors import UserError

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "sigma"]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##s", "##ing", "."]
LENGTHS = (16, 32)
SEED = 5
NAMES = ("greek", "more")
EARLIER = "--- continues row "
LATER = "--- continues in "


def documents(source: int) -> list[str]:
    rng = np.random.default_rng(source)
    texts = [" ".join(rng.choice(WORDS) + rng.choice(["", "s", "ing"]) for _ in range(n)) for n in range(3, 60)]
    return [f"{text}." for text in texts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of two sources and two lengths, each source and split in two files."""
    folder = tmp_path_factory.mktemp("inspect") / "corpus"
    folder.mkdir()
    (folder.parent / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    tokenizer = load_tokenizer(str(folder.parent / "vocab.txt"))
    save_tokenizer(tokenizer, folder, LENGTHS[-1])
    ids = [encode_documents(corpus_encoder(tokenizer), documents(source)) for source in range(2)]
    splits = {
        length: {split: packed(folder, split, length, ids, tokenizer) for split in ("train", "valid")}
        for length in LENGTHS
    }
    sources = tuple(
        SourceTotals(name, f"{name}.txt", None, len(texts), sum(map(len, documents(number))), sum(map(len, texts)))
        for number, (name, texts) in enumerate(zip(NAMES, ids, strict=True))
    )
    tokens = sum(source.tokens for source in sources)
    manifest = Manifest(
        2, LENGTHS, vocab_size(tokenizer), "uint16", tokenizer_hash(tokenizer), special_ids(tokenizer), 2.5,
        len(PIECES) - 1, sum(source.documents for source in sources), sum(source.text_bytes for source in sources),
        tokens, sources, {}, splits, {},
    )  # fmt: skip
    write_manifest(folder, manifest)
    return folder


def packed(folder: Path, split: str, length: int, ids: list[list[np.ndarray]], tokenizer: Tokenizer) -> Split:
    shards = []
    for source, texts in enumerate(ids):
        for part in range(2):
            rows, ends = Packer(length, special_ids(tokenizer)).add(texts[part::2])
            name = f"{split}-{length}-{source}{part}"
            shards += write_shards(folder, name, rows, ends, row_dtype(vocab_size(tokenizer)), source)
    return Split(sum(shard.rows for shard in shards), tuple(shards))


def told_rows(said: str) -> list[str]:
    """The part of each row."""
    return [part for part in said.split("\n\n")[1:] if "row " in part.splitlines()[0] and "targets" in part]


def told_words(part: str) -> list[str]:
    """What stands in a row, without what is said about it."""
    lines = [line.strip() for line in part.splitlines()[1:]]
    return " ".join(line for line in lines if not line.startswith("---")).split()


def said_by(words: list[str], tokenizer: Tokenizer, side: int) -> list[str]:
    """The ids' pieces that training is shown (0), or that stood there before (1)."""
    found: list[str] = []
    for word in words:
        if match := re.fullmatch(r"\[(.*)(<-|=|:)(.*)\]", word):
            other, sign, piece = match.groups()
            shown = {":": "[MASK]", "=": piece, "<-": other}[sign]
            found.append((shown, piece)[side])
            continue
        while word.startswith("##") or word not in PIECES:
            piece = next(p for p in PIECES if word == p or (p.startswith("##") and word == p[2:]) or word.startswith(p))
            found.append(piece)
            word = word.removeprefix(piece)
            if not word:
                break
            word = f"##{word}"
        else:
            found.append(word)
    return found


@pytest.mark.parametrize("length", LENGTHS)
def test_rows_are_those_of_a_training(folder: Path, length: int) -> None:
    manifest, tokenizer = read_manifest(folder), load_tokenizer(str(folder / "tokenizer.json"))
    said = told_rows(inspect(folder, 20, length, "train", SEED))
    assert len(said) == 20
    rows = Rows(folder, manifest, "train", length)
    masker = build_masker(Config(run=RunConfig(seed=SEED)), manifest, tokenizer)
    stream = TrainStream(rows, masker, SEED, Share(0, 1, 20, 1))
    row_B, (batch,) = stream.sample_rows(0), stream.step(0)
    for number, part in enumerate(said):
        title, words = part.splitlines()[0], told_words(part)
        assert title.startswith(f"sample {number:,}: row {row_B[number]:,} of {len(rows):,}, source ")
        shown = [tokenizer.token_to_id(piece) for piece in said_by(words, tokenizer, 0)]
        assert shown == batch["input_ids"][number].tolist()
        before = [tokenizer.token_to_id(piece) for piece in said_by(words, tokenizer, 1)]
        assert before == rows[row_B[number : number + 1]][0].tolist()
        counts = [int(n) for n in re.findall(r"(\d+) (?:hidden|replaced|kept)", title)]
        assert sum(counts) == target_count(0.15, length) == int(re.search(r"targets: (\d+)", title)[1])
        assert counts[0] == sum(word.startswith("[MASK:") for word in words)


def test_rows_are_shown_as_a_training_with_these_keys_masks_them(folder: Path) -> None:
    manifest, tokenizer = read_manifest(folder), load_tokenizer(str(folder / "tokenizer.json"))
    keys = ["data.span_length=3", "data.replace=[0, 1, 0]", "data.mask_probability=0.3"]
    data = DataConfig(span_length=3, replace=(0, 1, 0), mask_probability=0.3)
    masker = build_masker(Config(run=RunConfig(seed=SEED), data=data), manifest, tokenizer)
    (batch,) = TrainStream(Rows(folder, manifest, "train", 32), masker, SEED, Share(0, 1, 9, 1)).step(0)
    said = told_rows(inspect(folder, 9, 32, "train", SEED, keys))
    shown = [[tokenizer.token_to_id(piece) for piece in said_by(told_words(part), tokenizer, 0)] for part in said]
    assert shown == batch["input_ids"].tolist() and all("targets: 10 (0 hidden" in part for part in said)
    held_out = inspect(folder, 9, 32, "valid", SEED, keys)
    assert held_out == inspect(folder, 9, 32, "valid", SEED, keys[2:]), "validation is masked as always"


def test_the_sources_of_rows(folder: Path) -> None:
    manifest = read_manifest(folder)
    said = told_rows(inspect(folder, manifest.split(32, "train").rows, None, "train", SEED))
    limit = sum(shard.rows for shard in manifest.split(32, "train").shards if shard.source == 0)
    for part in said:
        row, source = re.search(r"row (\d+) of \d+, source (\w+)", part).groups()
        assert source == NAMES[int(row) >= limit]
    assert len(said) == len({re.search(r"row (\d+)", part)[1] for part in said}), "an epoch has each row once"


@pytest.mark.parametrize("length", LENGTHS)
def test_documents_can_be_put_together_again(folder: Path, length: int) -> None:
    """Following the marks from row to row gives the documents that were packed, but for what the files' ends cut."""
    manifest, tokenizer = read_manifest(folder), load_tokenizer(str(folder / "tokenizer.json"))
    total = manifest.split(length, "valid").rows
    said = told_rows(inspect(folder, total, length, "valid", SEED))
    assert len(said) == total
    by_row = {int(re.search(r"row (\d+)", part)[1]): part for part in said}
    found: list[list[str]] = []
    begun: list[str] = []
    for row in range(total):
        lines = [line.strip() for line in by_row[row].splitlines()[1:]]
        if lines[0].startswith(EARLIER):
            assert lines.pop(0) == f"{EARLIER}{row - 1} ---"
        else:
            begun = []
        words: list[str] = []
        for line in lines:
            if line.startswith("---"):
                pieces = said_by(words, tokenizer, 1)
                begun += [piece for piece in pieces if piece not in ("[CLS]", "[SEP]")]
                words = []
            if line == "--- end of a document ---":
                found.append(begun)
                begun = []
            elif line.startswith(LATER):
                assert line in (f"{LATER}row {row + 1} ---", f"{LATER}another file ---")
            elif not line.startswith("---"):
                words += line.split()
    texts = [text for source in range(2) for part in range(2) for text in documents(source)[part::2]]
    tokens = [tokenizer.encode(text, add_special_tokens=False).tokens for text in texts]
    assert all(document in tokens for document in found)
    assert len(found) >= len(tokens) - 4 * 4, "short documents at the ends of four files"


def test_valid_rows_have_the_masks_of_no_sample(folder: Path) -> None:
    manifest, tokenizer = read_manifest(folder), load_tokenizer(str(folder / "tokenizer.json"))
    (part,) = told_rows(inspect(folder, 1, 16, "valid", SEED))
    assert not part.startswith("sample")
    row = int(re.search(r"row (\d+)", part)[1])
    rows = Rows(folder, manifest, "valid", 16)
    masker = build_masker(Config(run=RunConfig(seed=SEED)), manifest, tokenizer)
    training = make_batch(rows, masker, np.array([row]), np.array([row]))
    shown = [tokenizer.token_to_id(piece) for piece in said_by(told_words(part), tokenizer, 0)]
    assert shown != training["input_ids"][0].tolist()


def with_weights(folder: Path, out: Path, *weights: float | None) -> Path:
    """The same corpus, its sources weighted."""
    shutil.copytree(folder, out)
    manifest = read_manifest(folder)
    sources = [replace(source, weight=weight) for source, weight in zip(manifest.sources, weights, strict=True)]
    write_manifest(out, replace(manifest, sources=tuple(sources)))
    return out


def test_weights_decide_the_order(folder: Path, tmp_path: Path) -> None:
    said = inspect(with_weights(folder, tmp_path / "corpus", None, 0.75), 40, 16, "train", SEED)
    assert "tokens (49.9%), weight 0.75" in said
    sources = [re.search(r"source (\w+)", part)[1] for part in told_rows(said)]
    assert abs(sources.count("more") - 30) <= 2


def test_the_header(folder: Path) -> None:
    said = inspect(folder, 1, None, "train", SEED)
    manifest = read_manifest(folder)
    assert f"{manifest.documents} documents, {manifest.tokens:,} tokens" in said and "entropy 2.500 nats" in said
    for length in LENGTHS:
        assert f"{manifest.split(length, 'train').rows:,} of {length} tokens for training" in said
    assert all(f"{name} ({name}.txt): 57 documents" in said for name in NAMES)
    assert "row of" not in said and f"of {manifest.split(32, 'train').rows}," in said, "the longest rows"


def test_bad_input_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="--rows 0: must be at least 1"):
        inspect(folder, 0, None, "train", SEED)
    with pytest.raises(UserError, match="rows of 64 tokens are not in the corpus, it has 16 and 32"):
        inspect(folder, 1, 64, "train", SEED)
    with pytest.raises(UserError, match="data.mask_by=importance': rows can be shown with data.mask_probability, "):
        inspect(folder, 1, None, "train", SEED, ["data.mask_by=importance"])
    with pytest.raises(UserError, match="data.replace' is .*three shares that add up to 1"):
        inspect(folder, 1, None, "train", SEED, ["data.replace=[1, 1, 0]"])
    assert main(["inspect", str(folder / "none")]) == 2
    assert "no such corpus folder" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "valid"])
def test_an_altered_shard_is_told(folder: Path, tmp_path: Path, split: str) -> None:
    for ending in (".npy", ".ends.npy"):
        out = tmp_path / ending[1:]
        shutil.copytree(folder, out)
        for path in out.glob(f"{split}-16-*{ending}"):
            raw = path.read_bytes()
            path.write_bytes(raw[:-200] + b"\xff" * 200)  # ids beyond the vocabulary
        with pytest.raises(UserError, match=f"{split}-16-.*{ending}: shard was altered"):
            inspect(out, 20, 16, split, SEED)


def test_the_verb(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--rows", "2", "--seq-len", "16", "--seed", str(SEED)]
    assert main(["inspect", str(folder), *words]) == 0
    assert capsys.readouterr().out == inspect(folder, 2, 16, "train", SEED) + "\n"
    key = "data.whole_word=true"
    assert main(["inspect", str(folder), *words, key]) == main(["inspect", str(folder), key, *words]) == 0
    assert capsys.readouterr().out == 2 * (inspect(folder, 2, 16, "train", SEED, [key]) + "\n")


@pytest.mark.parametrize("key", ["data.whole_word=true", "data.span_length=3"])
def test_words_of_a_tokenizer_that_marks_none_are_refused(folder: Path, key: str) -> None:
    """Byte-level BPE marks the beginnings of words, and not their continuations."""
    bpe = Tokenizer(models.BPE())
    bpe.add_special_tokens(list(SPECIAL_TOKENS))
    config = load_config("demo", [key])
    with pytest.raises(UserError, match=f"{key.split('=')[0]} is set, but no piece of the corpus' tokenizer is marked"):
        build_masker(config, read_manifest(folder), bpe)
    build_masker(load_config("demo"), read_manifest(folder), bpe)
