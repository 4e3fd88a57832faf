"""WordPiece tokenizers as BERT has them: load, train, save as a Hugging Face folder, identify by hash."""

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from sctd.errors import UserError, one_line

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # in the order of SpecialIds
_SPECIAL_NAMES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")  # as transformers calls them
CONTINUES = "##"  # in front of a piece that continues a word
MIN_VOCAB_SIZE = 256
_MULTIPLE = 64
_UNUSED = re.compile(r"\[unused\d+\]")
MAX_WORD_CHARS = 100  # WordPiece turns longer words into [UNK], as in BERT
MAX_DISTINCT_WORDS = 4_000_000  # held while counting; the rarest are forgotten beyond
MAX_TRAINING_WORDS = 100_000_000  # occurrences fed to the trainer; counts of larger corpora are scaled down


@dataclass(frozen=True)
class SpecialIds:
    """Token ids of [PAD], [UNK], [CLS], [SEP] and [MASK]."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int

    @property
    def all(self) -> tuple[int, ...]:
        return (self.pad, self.unk, self.cls, self.sep, self.mask)


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """The five special ids. UserError naming those that the vocabulary lacks."""
    ids = {token: index for token in SPECIAL_TOKENS if (index := tokenizer.token_to_id(token)) is not None}
    missing = [token for token in SPECIAL_TOKENS if token not in ids]
    if missing:
        raise UserError(f"tokenizer: no {', '.join(missing)} in its vocabulary; use a BERT WordPiece tokenizer")
    return SpecialIds(*ids.values())


def vocab_size(tokenizer: Tokenizer) -> int:
    """Number of token ids, added tokens included: the least embedding rows that a model needs."""
    return max(tokenizer.get_vocab().values()) + 1


# ---- load --------------------------------------------------------------------------------------------------------


def load_tokenizer(spec: str) -> Tokenizer:
    """A BERT tokenizer from a vocab.txt, a tokenizer.json, a folder with either, or a hub id.

    Truncation and padding of a stored tokenizer are switched off. UserError if it cannot be read, if a special token
    is missing or if the ids have gaps.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        stored = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()]
        if not stored:
            raise UserError(f"{spec}: neither tokenizer.json nor vocab.txt in this folder")
        path = stored[0]
    if path.is_file():
        tokenizer = _from_vocab(path) if path.suffix == ".txt" else _from_json(path)
    elif path.suffix in (".txt", ".json") or spec.startswith((".", "/", "~")):
        raise UserError(f"{spec}: no such tokenizer file or folder")
    else:
        tokenizer = _from_hub(spec)
    try:
        special_ids(tokenizer)
    except UserError as error:
        raise UserError(f"{spec}: {error}") from error
    if len(set(tokenizer.get_vocab().values())) != vocab_size(tokenizer):
        raise UserError(f"{spec}: the vocabulary's ids have gaps; number its tokens from 0 without holes")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _from_vocab(path: Path) -> Tokenizer:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a vocabulary ({error})") from error
    pieces = [line.rstrip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    if len(set(pieces)) != len(pieces):
        twice = next(piece for piece, count in Counter(pieces).items() if count > 1)
        raise UserError(f"{path}: the piece {twice!r} occurs more than once; a vocab.txt has one piece a line")
    cased = any(piece != piece.lower() for piece in pieces if not (piece.startswith("[") and piece.endswith("]")))
    return _wordpiece({piece: index for index, piece in enumerate(pieces)}, lowercase=not cased)


def _from_json(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{path}: cannot be read as a tokenizer.json ({one_line(error)})") from error


def _from_hub(name: str) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(name).backend_tokenizer
        return Tokenizer.from_str(backend.to_str())
    except Exception as error:  # the hub client raises from a dozen unrelated classes
        raise UserError(
            f"{name}: no such file, and the hub gives no such tokenizer ({type(error).__name__}: "
            f"{one_line(error)}); check the name, or give a vocab.txt or tokenizer.json"
        ) from error


def _wordpiece(vocabulary: dict[str, int], lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=MAX_WORD_CHARS))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    # A special token that the vocabulary lacks must stay lacking: adding it would append an id.
    tokenizer.add_special_tokens([token for token in SPECIAL_TOKENS if token in vocabulary])
    _set_template(tokenizer)
    return tokenizer


def _set_template(tokenizer: Tokenizer) -> None:
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    if all(index is not None for _, index in ids):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=ids
        )


# ---- train -------------------------------------------------------------------------------------------------------


def train_tokenizer(documents: Iterable[str], vocab_size: int, lowercase: bool = True) -> Tokenizer:
    """A BERT WordPiece tokenizer of about `vocab_size` pieces; the same documents give the same ids.

    The size is rounded up to a multiple of 64, which matrix products on GPUs like; where the documents yield fewer
    pieces, [unused0], [unused1], ... fill up to the next multiple. Memory is bounded by the number of distinct words,
    not by the corpus. UserError if `vocab_size` is too small.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"vocab_size {vocab_size} is too small for WordPiece; use {MIN_VOCAB_SIZE} or more")
    vocab_size = _rounded(vocab_size)
    words, _ = count_words(documents, _wordpiece({}, lowercase))
    # The trainer numbers the ##characters as its hash map yields them, which differs from run to run, and ties
    # between merges are broken by these numbers. Entering the alphabet as "special" tokens pins the numbers.
    alphabet, continuing = _alphabet(words, limit=min(1000, max(100, vocab_size // 8)))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        special_tokens=[*SPECIAL_TOKENS, *alphabet, *("##" + char for char in continuing)],
        show_progress=False,
    )
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learner.train_from_iterator(_repeated(words), trainer)
    vocabulary = learner.get_vocab()
    first = len(vocabulary)
    vocabulary |= {f"[unused{index - first}]": index for index in range(first, _rounded(first))}
    tokenizer = _wordpiece(vocabulary, lowercase)
    assert special_ids(tokenizer).all == tuple(range(len(SPECIAL_TOKENS)))
    return tokenizer


def _rounded(size: int) -> int:
    return -(-size // _MULTIPLE) * _MULTIPLE


def count_words(documents: Iterable[str], tokenizer: Tokenizer) -> tuple[Counter[str], int]:
    """Occurrences of the words that the tokenizer's normalizer and pre-tokenizer make of the documents, and how many
    words there are between white space."""
    # BERT's word boundaries include all white space, so that counting can come first and each spelling is split once.
    chunks: Counter[str] = Counter()
    words: Counter[str] = Counter()
    between_space = 0

    def split_up() -> None:
        for chunk, count in chunks.items():
            for word in split_words(tokenizer, chunk):
                if len(word) <= MAX_WORD_CHARS:
                    words[word] += count
        chunks.clear()
        _forget_rarest(words)

    for document in documents:
        found = document.split()
        between_space += len(found)
        chunks.update(found)
        if len(chunks) > MAX_DISTINCT_WORDS // 4:
            split_up()
    split_up()
    return words, between_space


def split_words(tokenizer: Tokenizer, text: str) -> list[str]:
    """What the tokenizer's model gets of a text: its words, normalized."""
    if (normalizer := tokenizer.normalizer) is not None:
        text = normalizer.normalize_str(text)
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def _forget_rarest(counts: Counter[str]) -> None:
    floor = 1
    while len(counts) > MAX_DISTINCT_WORDS:
        for word in [word for word, count in counts.items() if count <= floor]:
            del counts[word]
        floor *= 2


def _alphabet(words: Counter[str], limit: int) -> tuple[list[str], list[str]]:
    """The `limit` most frequent characters, and those of them that occur inside words; both sorted."""
    counts: Counter[str] = Counter()
    inside: set[str] = set()
    for word, count in words.items():
        for char in word:
            counts[char] += count
        inside.update(word[1:])
    kept = sorted(sorted(counts, key=lambda char: (-counts[char], char))[:limit])
    return kept, [char for char in kept if char in inside]


def _repeated(words: Counter[str]) -> Iterator[str]:
    """Each word as often as it occurs (scaled down for huge corpora): the trainer takes text, not counts."""
    scale = -(-words.total() // MAX_TRAINING_WORDS) or 1
    for word, count in words.items():
        remaining = count // scale
        while remaining > 0:
            yield (word + " ") * min(remaining, 10_000)
            remaining -= 10_000


# ---- grow --------------------------------------------------------------------------------------------------------


def grow_tokenizer(tokenizer: Tokenizer, pieces: Sequence[str]) -> Tokenizer:
    """A copy whose vocabulary has these pieces too; every other id keeps its piece.

    They take the [unusedN] slots in the order of their ids, then ids at the end; where any is appended, new [unusedN]
    fill up to a multiple of 64.

    Args:
        pieces: distinct and not in the vocabulary; `##` in front of what continues a word.

    Raises:
        UserError: not WordPiece as BERT has it.
    """
    check_wordpiece(tokenizer)
    state, known = json.loads(tokenizer.to_str()), tokenizer.get_vocab()
    assert len(set(pieces)) == len(pieces) and not known.keys() & set(pieces)
    added = {token["content"] for token in state["added_tokens"]}
    slots = sorted(index for piece, index in known.items() if _UNUSED.fullmatch(piece) and piece not in added)
    by_id = {index: piece for piece, index in known.items()} | dict(zip(slots, pieces, strict=False))
    appended, first = pieces[len(slots) :], len(by_id)
    by_id |= dict(enumerate(appended, first))
    if appended:
        names = (name for number in itertools.count() if (name := f"[unused{number}]") not in known)
        by_id |= dict(zip(range(len(by_id), _rounded(len(by_id))), names, strict=False))
    state["model"]["vocab"] = {by_id[index]: index for index in range(len(by_id))}
    return Tokenizer.from_str(json.dumps(state))


def check_wordpiece(tokenizer: Tokenizer) -> None:
    """UserError where the tokenizer is not WordPiece as BERT has it, the only kind whose vocabulary can grow."""
    model, is_whole = tokenizer.model, tokenizer.pre_tokenizer is not None
    if not (isinstance(model, models.WordPiece) and model.continuing_subword_prefix == CONTINUES and is_whole):
        kind = type(model).__name__
        raise UserError(
            f"tokenizer: its model is {kind}, and only the vocabulary of a BERT WordPiece tokenizer can grow; learn a "
            "new one with `sctd prepare --vocab-size` instead"
        )


def grown_pieces(old: Tokenizer, new: Tokenizer) -> dict[int, list[int]]:
    """What `old` makes of each piece that `new` has in addition: id in `new` -> ids in `old`; {} for equal ones.

    `new` may have other pieces only where `old` has [unusedN] or no id any more, and [unusedN] that fill up its end,
    which are left out here. A piece with characters that `old` does not know gets the id of [UNK].

    Raises:
        UserError: any other id has another piece, `new` has fewer ids, or they treat the text otherwise before it
            comes to pieces.
    """
    before, after = ({index: piece for piece, index in each.get_vocab().items()} for each in (old, new))
    if len(after) < len(before):
        raise UserError(f"tokenizer: {len(after):,} pieces, fewer than the {len(before):,} that were there before")
    for part, (was, now) in _treatment(old, new).items():
        if was != now:
            raise UserError(f"tokenizer: another {part}, {json.dumps(now)} and not {json.dumps(was)} as before")
    added = [index for index in sorted(after) if after[index] != before.get(index)]
    free = [index for index in added if index not in before or _UNUSED.fullmatch(before[index])]
    if len(free) < len(added):
        other = sorted({*added} - {*free})
        first = ", ".join(f"{index} {before[index]!r} -> {after[index]!r}" for index in other[:3])
        raise UserError(f"tokenizer: {len(other):,} ids have another piece than before: {first}")
    wanted = [index for index in free if not _UNUSED.fullmatch(after[index])]
    if wanted:
        check_wordpiece(old)
    return {index: [token.id for token in old.model.tokenize(after[index])] for index in wanted}


def _treatment(*tokenizers: Tokenizer) -> dict[str, tuple[Any, ...]]:
    """For each part that decides the ids of a text beside the vocabulary, what it is in each of the tokenizers."""
    found = []
    for tokenizer in tokenizers:
        state = json.loads(tokenizer.to_str())
        normalizer = dict(state["normalizer"] or {})
        if normalizer.get("type") == "BertNormalizer" and normalizer["strip_accents"] is None:
            normalizer["strip_accents"] = normalizer["lowercase"]  # which is what None stands for
        found.append((state["model"]["type"], normalizer, state["pre_tokenizer"]))
    return dict(zip(("model", "normalizer", "pre-tokenizer"), zip(*found, strict=True), strict=True))


# ---- use ---------------------------------------------------------------------------------------------------------


def corpus_encoder(tokenizer: Tokenizer) -> Tokenizer:
    """A copy for encoding corpora: no truncation, no padding, and "[MASK]" in a text is text, not the special id."""
    encoder = Tokenizer.from_str(tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    return encoder


def encode_documents(encoder: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text, int32, without [CLS] and [SEP]. `encoder` comes from corpus_encoder."""
    encodings = encoder.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """sha256 over all that decides which ids a text gets: vocabulary, normalizer, pre-tokenizer, model settings."""
    state = json.loads(tokenizer.to_str())
    decisive = {key: state[key] for key in ("model", "normalizer", "pre_tokenizer")}
    decisive["vocab"] = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def save_tokenizer(tokenizer: Tokenizer, folder: Path, model_max_length: int, has_token_types: bool = True) -> None:
    """Write tokenizer.json, tokenizer_config.json and vocab.txt, so that transformers.AutoTokenizer loads `folder`.

    transformers then adds [CLS] and [SEP]; `model_max_length` counts them. The tokenizer itself is not changed.

    Args:
        has_token_types: whether the model takes token types.
    """
    stored, config = _for_transformers(tokenizer, model_max_length, has_token_types)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(stored.to_str(pretty=True) + "\n", encoding="utf-8")
    pieces = sorted(stored.get_vocab().items(), key=lambda item: item[1])
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece, _ in pieces), encoding="utf-8", newline="\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def transformers_tokenizer(tokenizer: Tokenizer, model_max_length: int, has_token_types: bool = True) -> Any:
    """The transformers tokenizer that gives the ids of what `save_tokenizer` writes, in memory."""
    from transformers import PreTrainedTokenizerFast

    stored, config = _for_transformers(tokenizer, model_max_length, has_token_types)
    names = (*_SPECIAL_NAMES, "model_max_length", "model_input_names")
    return PreTrainedTokenizerFast(tokenizer_object=stored, **{name: config[name] for name in names if name in config})


def _for_transformers(tokenizer: Tokenizer, model_max_length: int, has_token_types: bool) -> tuple[Tokenizer, dict]:
    """A copy that adds [CLS] and [SEP], and what tokenizer_config.json says of it."""
    stored = Tokenizer.from_str(tokenizer.to_str())
    stored.no_truncation()
    stored.no_padding()
    _set_template(stored)
    config = _transformers_config(json.loads(stored.to_str()), model_max_length)
    if not has_token_types:
        config["model_input_names"] = ["input_ids", "attention_mask"]
    return stored, config


def _transformers_config(state: dict, model_max_length: int) -> dict:
    config = {**dict(zip(_SPECIAL_NAMES, SPECIAL_TOKENS, strict=True)), "model_max_length": model_max_length}
    normalizer = state["normalizer"] or {}
    is_bert = (
        state["model"]["type"] == "WordPiece"
        and normalizer.get("type") == "BertNormalizer"
        and normalizer["clean_text"]
        and state["pre_tokenizer"] == {"type": "BertPreTokenizer"}
    )
    if not is_bert:  # transformers' BertTokenizer would put its own normalizer in place of this one
        inputs = ["input_ids", "token_type_ids", "attention_mask"]
        return {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs, **config}
    return {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": normalizer["lowercase"],
        "strip_accents": normalizer["strip_accents"],
        "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
        **config,
    }
