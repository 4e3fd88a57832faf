"""Pieces added to a vocabulary: what they save by the real tokenizer, where they go, and what old pieces they were."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from pages import Reader
from sctd.corpus import vocabulary as module
from sctd.corpus.manifest import load_corpus_tokenizer, read_manifest
from sctd.corpus.prepare.prepare import prepare
from sctd.corpus.prepare.team import Team, Workers
from sctd.corpus.sources.clean import Cleaning
from sctd.corpus.sources.source import read_documents
from sctd.corpus.tokenizer import (
    SPECIAL_TOKENS,
    corpus_encoder,
    count_words,
    encode_documents,
    grow_tokenizer,
    grown_pieces,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    train_tokenizer,
    vocab_size,
)
from sctd.corpus.vocabulary import SplitText, add_vocabulary, learn_pieces, word_pieces
from sctd.errors import UserError
from texts import assert_same_corpus, documents, run, settings, write

LETTERS = "abcdeghilmnoprstuvy"


def base_vocabulary(*more: str, unused: int = 3) -> list[str]:
    """Special tokens, slots, letters and a few pieces, as small as it can be and still like BERT's."""
    slots = [f"[unused{number}]" for number in range(unused)]
    return ["[PAD]", *slots, *SPECIAL_TOKENS[1:], *LETTERS, *(f"##{letter}" for letter in LETTERS), *more]


def tokenizer_of(folder: Path, pieces: list[str]) -> Tokenizer:
    path = folder / "vocab.txt"
    path.write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
    return load_tokenizer(str(path))


@pytest.fixture
def base(tmp_path: Path) -> Tokenizer:
    return tokenizer_of(tmp_path, base_vocabulary("token", "##iz", "##er", "##ation", "##able"))


def pieces_of(tokenizer: Tokenizer, text: str) -> list[str]:
    return tokenizer.encode(text, add_special_tokens=False).tokens


def message(function: object, *arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)  # type: ignore[operator]
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- where they go


def test_slots_first_then_the_end_filled_to_a_multiple_of_64(base: Tokenizer) -> None:
    size = vocab_size(base)
    grown = grow_tokenizer(base, ["tokenizer", "##izable"])
    assert vocab_size(grown) == size and [grown.id_to_token(index) for index in (1, 2, 3)] == [
        "tokenizer", "##izable", "[unused2]"
    ]  # fmt: skip
    grown = grow_tokenizer(base, ["tokenizer", "##izable", "tone", "##star", "lemon"])
    assert vocab_size(grown) == 64 and [grown.id_to_token(size + index) for index in range(3)] == [
        "##star", "lemon", "[unused3]"
    ]  # fmt: skip
    assert special_ids(grown) == special_ids(base)
    for index in (0, *range(4, size)):
        assert grown.id_to_token(index) == base.id_to_token(index)
    assert pieces_of(grown, "Tokenizer tokenizable lemonstar") == ["tokenizer", "token", "##izable", "lemon", "##star"]


def test_transformers_reads_the_grown_tokenizer_alike(base: Tokenizer, tmp_path: Path) -> None:
    base.add_special_tokens(["[ENT]"])  # has its id behind the model's pieces, where others would go
    grown = grow_tokenizer(base, ["tokenizer", "##star", "lemon", "tone"])
    assert grown.token_to_id("[ENT]") == base.token_to_id("[ENT]") and vocab_size(grown) == 64
    save_tokenizer(grown, tmp_path / "grown", 64)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "grown")
    for text in ("Tokenizer lemonstar tones", "the [ENT] [MASK] élan", "[unused2]"):
        assert loaded(text)["input_ids"] == grown.encode(text).ids
    assert len(loaded) == 64 and not grown_pieces(grown, load_tokenizer(str(tmp_path / "grown" / "vocab.txt")))


def test_old_pieces_of_each_new_one(base: Tokenizer) -> None:
    grown = grow_tokenizer(base, ["tokenizer", "##izable", "##日a", "lemons"])
    old = {grown.id_to_token(index): ids for index, ids in grown_pieces(base, grown).items()}
    spelled = {piece: [base.id_to_token(index) for index in ids] for piece, ids in old.items()}
    assert spelled == {
        "tokenizer": ["token", "##iz", "##er"],
        "##izable": ["##iz", "##able"],
        "##日a": ["[UNK]"],
        "lemons": ["l", "##e", "##m", "##o", "##n", "##s"],
    }
    assert grown_pieces(base, base) == grown_pieces(grown, grown) == {}


def test_what_is_not_a_grown_vocabulary(base: Tokenizer, tmp_path: Path) -> None:
    grown = grow_tokenizer(base, ["tokenizer", "##izable", "tone", "##star"])
    assert "fewer than the 64" in message(grown_pieces, grown, base)
    other = tokenizer_of(tmp_path, base_vocabulary("tokens", "##iz", "##ier", "##ation", "##abler", "more"))
    said = message(grown_pieces, base, other)
    assert "3 ids" in said and f"{base.token_to_id('token')} 'token' -> 'tokens'" in said and "##able" in said
    swapped = [grown.id_to_token(index) for index in (0, 2, 1, *range(3, 64))]
    assert "2 ids" in message(grown_pieces, grown, tokenizer_of(tmp_path, swapped))
    cased = Tokenizer.from_str(base.to_str())
    cased.normalizer = normalizers.BertNormalizer(lowercase=False)
    assert "another normalizer" in message(grown_pieces, base, cased) and '"lowercase": false' in message(
        grown_pieces, base, cased
    )
    cased.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)  # as without it
    assert grown_pieces(base, cased) == {}


def test_only_wordpiece_grows(base: Tokenizer) -> None:
    other = Tokenizer(models.BPE({piece: index for index, piece in enumerate(base_vocabulary())}, []))
    other.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    assert "BPE" in message(grow_tokenizer, other, ["x"])


# ---- which


def tokens_of(tokenizer: Tokenizer, words: Counter[str]) -> int:
    return sum(count * len(tokenizer.model.tokenize(word)) for word, count in words.items())


def test_what_pieces_save_is_what_the_tokenizer_says() -> None:
    """On real text, with a vocabulary from other documents, each piece's saving adds up to what all of them save."""
    texts = list(itertools.islice(read_documents("embedded"), 60))
    base = train_tokenizer(texts[40:], 600)
    words, between_space = count_words(texts[:40], base)
    assert between_space == sum(len(text.split()) for text in texts[:40])
    text = SplitText(words, base.get_vocab())
    before = text.tokens
    assert before == tokens_of(base, words)
    found = learn_pieces(text, 150)
    grown = grow_tokenizer(base, list(found))
    assert len(found) == 150 and before - sum(found.values()) == text.tokens == tokens_of(grown, words)
    assert text.tokens < 0.85 * before and any(piece.startswith("##") for piece in found)
    shuffled = Counter(dict(reversed(words.items())))
    assert [*learn_pieces(SplitText(shuffled, base.get_vocab()), 150).items()] == [*found.items()]
    encoder = corpus_encoder(grown)
    assert sum(map(len, encode_documents(encoder, texts[:40]))) == text.tokens


def test_each_piece_is_the_best_of_all_there_are(tmp_path: Path) -> None:
    """Against trying out every part of every word, on words in which a piece that fits can make the rest longer."""
    rng, best_total, found_total = np.random.default_rng(0), 0, 0
    for _ in range(5):
        more = {"".join(rng.choice([*"abcd"], rng.integers(2, 4))) for _ in range(12)}
        vocabulary = base_vocabulary(*sorted(more), *(f"##{piece}" for piece in sorted(more)))
        base = tokenizer_of(tmp_path, vocabulary)
        words = Counter({"".join(rng.choice([*"abcd"], 8)): int(rng.integers(1, 9)) for _ in range(60)})
        found = learn_pieces(SplitText(words, vocabulary), 5)
        grown = grow_tokenizer(base, list(found))
        found_total += tokens_of(base, words) - tokens_of(grown, words)
        parts = {
            (start > 0) * "##" + word[start:end] for word in words for start in range(8) for end in range(start + 2, 9)
        }
        text = SplitText(words, vocabulary)
        for _ in range(5):
            effects = {part: text.effect(part) for part in parts if part not in text}
            best = max(effects, key=lambda part: (effects[part].saved, part))
            best_total += effects[best].saved
            text.add(best, effects[best])
    assert found_total >= 0.99 * best_total > 0


def test_a_piece_that_makes_the_rest_longer_is_not_taken(tmp_path: Path) -> None:
    """`toni` would shorten one word, and lengthen another, which is `ton ##ize` now."""
    base = tokenizer_of(tmp_path, base_vocabulary("ton", "##ize", "##z"))
    text = SplitText(Counter({"tonis": 5, "tonize": 6}), base.get_vocab())
    assert text.effect("toni").saved == 5 - 6
    assert learn_pieces(text, 9) == {"tonis": 10, "tonize": 6}


def test_a_beginning_that_cuts_pieces_apart(tmp_path: Path) -> None:
    """`dis` ends with a piece in one rare word alone, and shortens others in which it ends within one. Then it is
    itself what others begin with."""
    base = tokenizer_of(tmp_path, base_vocabulary("di", "##st", "##so", "##sa", "##ta", "##ol", "##an"))
    text = SplitText(Counter({"dista": 5, "disol": 5, "disan": 5, "dise": 2}), base.get_vocab())
    assert learn_pieces(text, 9) == {"dis": 17, "disan": 5, "disol": 5, "dista": 5, "dise": 2}


def test_the_rarest_words_are_left_out_where_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_PLACES", 11)
    text = SplitText(Counter({"lemon": 9, "lemons": 5, "tar": 4}), base_vocabulary())
    assert text.tokens == 9 * 5 + 5 * 6 + 4 * 3
    assert learn_pieces(text, 9) == {"lemon": 56, "lemons": 5} and text.tokens == 9 + 5 + 4 * 3


def test_a_piece_that_saves_as_much_as_it_costs(tmp_path: Path) -> None:
    text = SplitText(Counter({"tonis": 1, "tonize": 1}), base_vocabulary("ton", "##ize", "##z"))
    assert text.effect("toni").uses == 2 and learn_pieces(text, 9) == {}


def test_no_piece_turns_a_word_into_an_unknown_one(tmp_path: Path) -> None:
    """Which is one token, and no saving."""
    base = tokenizer_of(tmp_path, [piece for piece in base_vocabulary("##at") if piece != "##t"])
    text = SplitText(Counter({"cat": 3, "bca": 9, "bcat": 1}), base.get_vocab())
    assert text.effect("bca").loses_words and "bca" not in learn_pieces(text, 9)


def test_pieces_that_save_nothing_are_not_added(base: Tokenizer) -> None:
    grown, facts = add_vocabulary(base, 1000, *count_words(["tokens tokens tokens tone of"] * 3, base))
    assert [piece["piece"] for piece in facts["pieces"]] == ["tokens", "tone"]
    assert (facts["wanted"], facts["added"], facts["in_slots"], facts["appended"]) == (1000, 2, 2, 0)
    assert "2 pieces added of 1,000: no more save any tokens" in module.said_of_additions(facts)
    assert (facts["tokens_per_word_before"], facts["tokens_per_word"]) == (11 / 5, 1.0)


# ---- words of a file


def test_words_are_normalized_and_those_with_hyphens_taken_apart(base: Tokenizer) -> None:
    pieces, counts = word_pieces(["Lémon", "token", "lemon", "star-token", "日"], base)
    assert pieces == ["lemon", "star", "-", "日"]
    assert counts == {"words": 5, "one_piece": 1, "split": 1, "harmful": 0}
    grown, facts = add_vocabulary(base, ("lemon", "token", "star"), *count_words(["lemon Lemon stars"], base))
    assert pieces_of(grown, "lemon stars") == ["lemon", "star", "##s"]
    assert [(piece["piece"], piece["saved"]) for piece in facts["pieces"]] == [("lemon", 8), ("star", 3)]
    assert (
        "2 pieces added of 3 words (already pieces: 1, taken apart: 0); 2 in [unused] slots"
        in module.said_of_additions(facts)
    )


# ---- prepare


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of other words, and a text."""
    folder = tmp_path_factory.mktemp("place")
    save_tokenizer(
        tokenizer_of(folder, base_vocabulary("##ta", "##mma", "doc", *"kzj0123456789:")), folder / "base", 64
    )
    write(folder / "data.jsonl", documents(200))
    return folder


@pytest.fixture(scope="module")
def grown(place: Path) -> Path:
    run(str(place / "data.jsonl"), place / "grown", tokenizer=str(place / "base"), add_vocabulary="10")
    return place / "grown"


def test_the_corpus_holds_the_grown_tokenizer(place: Path, grown: Path) -> None:
    manifest = read_manifest(grown)
    tokenizer = load_corpus_tokenizer(grown, manifest)
    added = grown_pieces(load_tokenizer(str(place / "base")), tokenizer)
    assert len(added) == 10 and manifest.vocab_size == vocab_size(tokenizer) == 128 and {1, 2, 3} < added.keys()
    text = documents(3)[2]
    assert AutoTokenizer.from_pretrained(grown)(text)["input_ids"] == tokenizer.encode(text).ids
    assert manifest.settings["add_vocabulary"] == "10"
    facts = json.loads((grown / "report.json").read_text(encoding="utf-8"))
    additions = facts["additions"]
    assert (additions["added"], additions["in_slots"], additions["appended"]) == (10, 3, 7)
    assert additions["tokens_per_word"] < 0.8 * additions["tokens_per_word_before"]
    assert facts["tokens_per_word"] == pytest.approx(additions["tokens_per_word"], rel=0.02)
    assert additions["saved_share"] == pytest.approx(sum(piece["share"] for piece in additions["pieces"]))
    said = Reader((grown / "report.html").read_text(encoding="utf-8")).said
    assert "Added to the vocabulary" in said and all(piece["piece"] in said for piece in additions["pieces"])


def test_workers_grow_it_alike_and_once(place: Path, grown: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    changes = {"tokenizer": str(place / "base"), "add_vocabulary": "10", "shard_plan": 6000}
    for name, team in (("one", Team(lines.append)), ("two", Workers(2, lines.append))):
        prepare(settings(str(place / "data.jsonl"), **changes), tmp_path / name, team, lines.append)
    assert_same_corpus(tmp_path / "one", tmp_path / "two")
    assert (grown / "vocab.txt").read_bytes() == (tmp_path / "two" / "vocab.txt").read_bytes()
    assert sum("10 pieces added; 3 in [unused] slots, 7 appended, 128 ids; " in line for line in lines) == 2


def test_another_number_is_another_corpus(place: Path, grown: Path) -> None:
    changes = {"tokenizer": str(place / "base")}
    before = (grown / "report.json").read_bytes()
    run(str(place / "data.jsonl"), grown, **changes, add_vocabulary="10")
    assert (grown / "report.json").read_bytes() == before, "prepared again"
    for other in ("11", None):
        said = message(lambda o=other: run(str(place / "data.jsonl"), grown, **changes, add_vocabulary=o))
        assert "other settings (add_vocabulary; " in said


def test_words_of_a_file(place: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("\ufeffAlpha\nsigma\n\nlambda\nunseen\n", encoding="utf-8")
    bad = write(tmp_path / "bad.jsonl", documents(30, seed=1))
    changes = {"tokenizer": str(place / "base"), "add_vocabulary": str(words), "shard_plan": 6000}
    sources = [str(place / "data.jsonl"), bad]
    manifest = run(sources, tmp_path / "out", **changes)
    assert pieces_of(load_corpus_tokenizer(tmp_path / "out", manifest), "Alpha SIGMA") == ["alpha", "sigma"]
    facts = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["additions"]
    assert facts["file"] == {"words": 4, "one_piece": 0, "split": 0, "harmful": 0} and facts["pieces"][-1]["saved"] == 0
    words.write_text("alpha\nsigma\n", encoding="utf-8")
    assert "added_words" in message(lambda: run(sources, tmp_path / "out", **changes))


def test_bad_additions(place: Path, tmp_path: Path) -> None:
    def said(added: str | Path, tokenizer: Path | None = place / "base") -> str:
        given = {"tokenizer": tokenizer and str(tokenizer), "add_vocabulary": str(added)}
        text = message(lambda: run(str(place / "data.jsonl"), tmp_path / "out", **given))
        assert not list(tmp_path.glob("*out*")), "something was left behind"
        return text

    def words(text: str | bytes) -> Path:
        path = tmp_path / "words.txt"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    assert "no --tokenizer is given" in said("10", tokenizer=None)
    assert "from 1 to 100,000" in said("0") and "from 1 to" in said("-5") and "from 1 to" in said("100001")
    assert "not a whole number" in said("1.5")
    assert "nothing.txt: cannot be read (No such file" in said(tmp_path / "nothing.txt")
    assert "no words in it" in said(words("\n \n"))
    assert "cannot be read" in said(words(b"\xff\xfe\x00"))
    assert "line 2: 'two words' has white space" in said(words("one\ntwo words\n"))
    assert "line 1: a word of 101 characters" in said(words("a" * 101))
    assert "line 3: '##ing' continues a word" in said(words("\none\n##ing"))
    other = Tokenizer(models.BPE({piece: index for index, piece in enumerate(base_vocabulary())}, []))
    other.save(str(tmp_path / "bpe.json"))
    assert "its model is BPE" in said("10", tokenizer=tmp_path / "bpe.json")


def test_only_documents_of_the_corpus_are_learned_from(place: Path, tmp_path: Path) -> None:
    """Neither those beyond a limit nor those that the cleaning leaves out."""
    texts = [
        *(f"tiny {n}" for n in range(40)),
        *documents(80),
        *(text.replace("alpha", "omicron") for text in documents(200, seed=1)),
    ]
    source = write(tmp_path / "data.jsonl", texts)
    changes = {"tokenizer": str(place / "base"), "add_vocabulary": "40", "max_documents": ("80",)}
    run(source, tmp_path / "out", **changes, cleaning=Cleaning(min_characters=10))
    added = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["additions"]
    assert 33 * 60 < added["sample_words"] < 33 * 80, "some of 80 are held out"
    assert "alpha" in (tmp_path / "out" / "vocab.txt").read_text().split()
    assert "omic" not in (tmp_path / "out" / "vocab.txt").read_text()


def test_a_word_of_a_file_may_not_make_others_unknown(tmp_path: Path) -> None:
    """Without ##c, `abc` would begin with the new piece and have none for its rest."""
    base = tokenizer_of(tmp_path, ["[PAD]", "[unused0]", *SPECIAL_TOKENS[1:], "a", "##b", "##bc", "d", "##d"])
    grown, facts = add_vocabulary(base, ("ab", "dd"), *count_words(["abc ab dd"], base))
    assert pieces_of(grown, "abc ab dd") == ["a", "##bc", "a", "##b", "dd"] and facts["file"]["harmful"] == 1
    assert "left out since longer words would become unknown: 1)" in module.said_of_additions(facts)
