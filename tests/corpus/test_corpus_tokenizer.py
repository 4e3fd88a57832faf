"""Tokenizers: load, train, save, hash; and that transformers agrees with what is saved."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from sctd.corpus import tokenizer as module
from sctd.corpus.tokenizer import (
    SPECIAL_TOKENS,
    SpecialIds,
    corpus_encoder,
    encode_documents,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    tokenizer_hash,
    train_tokenizer,
    vocab_size,
)
from sctd.errors import UserError

BERT_VOCAB = Path(__file__).parents[2].parent / "shared" / "data" / "vocab" / "bert-base-uncased-vocab.txt"
TEXTS = [f"The quick brown fox number {i} jumps over the lazy dogs; naïve café, quickly jumping." for i in range(50)]
needs_bert_vocab = pytest.mark.skipif(not BERT_VOCAB.is_file(), reason="../shared/data is not here")


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


def vocab_file(folder: Path, *pieces: str) -> str:
    path = folder / "vocab.txt"
    path.write_text("\n".join([*SPECIAL_TOKENS, *pieces]) + "\n", encoding="utf-8")
    return str(path)


def error(spec: str) -> str:
    with pytest.raises(UserError) as caught:
        load_tokenizer(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_special_ids_of_a_trained_tokenizer(trained: Tokenizer) -> None:
    assert special_ids(trained) == SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)
    assert special_ids(trained).all == (0, 1, 2, 3, 4)
    assert len(TEXTS[0]) < vocab_size(trained) <= 300


def test_training_makes_word_pieces_that_read_back(trained: Tokenizer) -> None:
    encoded = trained.encode("The quick dogs jumping", add_special_tokens=False)
    assert encoded.tokens[0] == "the" and "quick" in encoded.tokens
    assert trained.decode(encoded.ids) == "the quick dogs jumping"


def test_training_cased() -> None:
    assert train_tokenizer(TEXTS, 300, lowercase=False).encode("The", add_special_tokens=False).tokens == ["The"]


def test_training_twice_in_fresh_processes_gives_the_same_ids(trained: Tokenizer) -> None:
    code = (
        "import sys, json; from sctd.corpus.tokenizer import *;"
        "print(tokenizer_hash(train_tokenizer(json.load(sys.stdin), 300)))"
    )
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        result = subprocess.run(
            [sys.executable, "-c", code], input=json.dumps(TEXTS), capture_output=True, text=True, env=environment
        )
        assert result.stdout.strip() == tokenizer_hash(trained), result.stderr


def test_training_with_bounded_memory_and_scaled_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DISTINCT_WORDS", 20)
    monkeypatch.setattr(module, "MAX_TRAINING_WORDS", 100)
    assert train_tokenizer(TEXTS, 300).encode("quick", add_special_tokens=False).tokens == ["quick"]


def test_words_are_counted_whole_where_their_spellings_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in scripts without spaces, in which hardly a chunk comes twice."""
    monkeypatch.setattr(module, "MAX_DISTINCT_WORDS", 60)
    texts = (f"Word,{i}x, word.{i}y; word" for i in range(200))
    words, between_space = module.count_words(texts, module._wordpiece({}, lowercase=True))
    assert words["word"] == 600 and words[","] == 400 and between_space == 600


def test_special_tokens_in_the_documents_are_text() -> None:
    """They teach the pieces of their letters, and no id is given twice."""
    learned = train_tokenizer([*TEXTS, "[MASK] [SEP] [unused0] [unused1]"] * 3, 300, lowercase=False)
    assert special_ids(learned).all == (0, 1, 2, 3, 4)
    ids = encode_documents(corpus_encoder(learned), ["[MASK] [SEP] [unused0]"])[0]
    spare = [index for piece, index in learned.get_vocab().items() if piece.startswith("[unused")]
    assert "mask" not in learned.get_vocab() and not {*special_ids(learned).all, *spare} & set(ids.tolist())


@pytest.mark.parametrize("wanted", [256, 300, 320, 5000])
def test_the_size_is_a_multiple_of_64(wanted: int) -> None:
    learned = train_tokenizer(TEXTS, wanted)
    spare = sorted(index for piece, index in learned.get_vocab().items() if piece.startswith("[unused"))
    size = vocab_size(learned)
    assert size % 64 == 0 and size < wanted + 64 and len(spare) < 64
    assert spare == list(range(size - len(spare), size))


def test_training_a_vocabulary_that_is_too_small() -> None:
    with pytest.raises(UserError, match="too small"):
        train_tokenizer(TEXTS, 10)


def test_vocab_case_is_inferred(tmp_path: Path) -> None:
    assert load_tokenizer(vocab_file(tmp_path, "hello", "é")).encode("HELLO", add_special_tokens=False).ids == [5]
    cased = load_tokenizer(vocab_file(tmp_path, "Hello", "hello"))
    assert cased.encode("Hello hello HELLO", add_special_tokens=False).ids == [5, 6, 1]


def test_loading_from_every_form_gives_one_hash(tmp_path: Path, trained: Tokenizer) -> None:
    save_tokenizer(trained, tmp_path, model_max_length=64)
    forms = [tmp_path, tmp_path / "tokenizer.json", tmp_path / "vocab.txt"]
    assert {tokenizer_hash(load_tokenizer(str(form))) for form in forms} == {tokenizer_hash(trained)}
    assert tokenizer_hash(module._from_hub(str(tmp_path))) == tokenizer_hash(trained)
    (tmp_path / "tokenizer.json").unlink()
    assert tokenizer_hash(load_tokenizer(str(tmp_path))) == tokenizer_hash(trained)


def test_hash_ignores_truncation_and_padding_but_not_what_decides_ids(tmp_path: Path, trained: Tokenizer) -> None:
    other = Tokenizer.from_str(trained.to_str())
    other.enable_truncation(5)
    other.enable_padding(length=9)
    assert tokenizer_hash(other) == tokenizer_hash(trained)
    other.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.truncation is None and loaded.padding is None
    other.normalizer = None
    assert tokenizer_hash(other) != tokenizer_hash(trained)
    assert tokenizer_hash(train_tokenizer(TEXTS[:1] * 2, 300)) != tokenizer_hash(trained)


def test_special_token_spelled_in_a_text_is_text(trained: Tokenizer) -> None:
    other = Tokenizer.from_str(trained.to_str())
    other.enable_truncation(2)
    ids = encode_documents(corpus_encoder(other), ["the [MASK] [SEP] fox"])[0]
    assert len(ids) > 4 and not {3, 4} & set(ids.tolist())


def test_missing_special_tokens_are_named(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\nword\n")
    assert "no [SEP], [MASK]" in error(str(path))


def test_unreadable_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "neither tokenizer.json nor vocab.txt" in error(str(tmp_path))
    assert "no such tokenizer" in error(str(tmp_path / "nothing"))
    assert "no such tokenizer" in error("vocabulary/nothing.txt")
    assert "more than once" in error(vocab_file(tmp_path, "a", "b", "a"))
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe")
    assert "cannot be read as a vocabulary" in error(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    assert "cannot be read as a tokenizer.json" in error(str(tmp_path))


def test_ids_with_gaps(tmp_path: Path, trained: Tokenizer) -> None:
    state = json.loads(trained.to_str())
    state["model"]["vocab"]["far"] = 5000
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    assert "gaps" in error(str(tmp_path))


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = error("sctd-nobody/does-not-exist")
    assert "sctd-nobody/does-not-exist" in message and "check the name" in message


def test_transformers_loads_the_saved_folder(tmp_path: Path, trained: Tokenizer) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(trained, tmp_path, model_max_length=64)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("The QUICK café, naïve!", "", "日本 unknown-word"):
        plain = trained.encode(text, add_special_tokens=False).ids
        assert loaded(text)["input_ids"] == [2, *plain, 3]
        assert loaded(text, add_special_tokens=False)["input_ids"] == plain
    assert loaded("the fox", "dogs")["token_type_ids"] == [0] * (2 + len(loaded.tokenize("the fox"))) + [1, 1]
    assert loaded.model_max_length == 64 and loaded.mask_token_id == 4 and loaded.pad_token_id == 0
    assert loaded("the [MASK]")["input_ids"][-2] == 4
    assert loaded.decode(loaded("the fox")["input_ids"], skip_special_tokens=True) == "the fox"


def test_transformers_loads_a_tokenizer_with_another_normalizer(tmp_path: Path, trained: Tokenizer) -> None:
    from tokenizers import normalizers
    from transformers import AutoTokenizer

    other = Tokenizer.from_str(trained.to_str())
    other.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    save_tokenizer(other, tmp_path, model_max_length=64)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("Ｔhe fox")["input_ids"] == [2, *other.encode("Ｔhe fox", add_special_tokens=False).ids, 3]
    assert "token_type_ids" in loaded("the")


def test_fill_mask_pipeline(tmp_path: Path, trained: Tokenizer) -> None:
    from transformers import BertConfig, BertForMaskedLM, pipeline

    config = BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    save_tokenizer(trained, tmp_path, model_max_length=64)
    assert len(pipeline("fill-mask", model=str(tmp_path))("The quick [MASK] fox.")) == 5


@needs_bert_vocab
def test_bert_vocabulary(tmp_path: Path) -> None:
    bert = load_tokenizer(str(BERT_VOCAB))
    assert special_ids(bert) == SpecialIds(pad=0, unk=100, cls=101, sep=102, mask=103)
    assert vocab_size(bert) == 30522
    assert bert.encode("Hello, Wörld").ids == [101, 7592, 1010, 2088, 102]
    save_tokenizer(bert, tmp_path, model_max_length=512)
    assert (tmp_path / "vocab.txt").read_bytes() == BERT_VOCAB.read_bytes()
