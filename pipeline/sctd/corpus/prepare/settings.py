"""What a corpus is to be made of and how: the settings, what they must be, and what identifies a corpus by them."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sctd.corpus.prepare.near import check_threshold
from sctd.corpus.prepare.rows import MIN_SEQ_LEN
from sctd.corpus.sources.clean import Cleaning
from sctd.corpus.sources.source import Form, Source, fingerprint, parse_sources
from sctd.corpus.tokenizer import MIN_VOCAB_SIZE, check_wordpiece, load_tokenizer, tokenizer_hash
from sctd.corpus.vocabulary import MAX_ADDED, read_words
from sctd.errors import UserError

MEGABYTE = 1_000_000
_MIN_PLAN = 1000


@dataclass(frozen=True)
class Limit:
    """The most that is taken of one source, in the order of reading, before duplicates are removed."""

    documents: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class CorpusSettings:
    """Everything that can change the content of a corpus.

    Args:
        sources: `SPEC` or `NAME=SPEC`. seq_lens: tokens a row, each length packed from the same tokens.
        tokenizer: spec for load_tokenizer; None learns a WordPiece vocabulary of `vocab_size` from train documents.
        add_vocabulary: so many pieces, learned from train documents, or the words of a file, to add to `tokenizer`.
        valid_fraction: share of the documents held out, by a hash of (seed, text).
        weights: `NAME=SHARE` of the samples in training. max_documents, max_tokens: `N` of each source, or `NAME=N`.
        near_duplicates: Jaccard similarity from which a document is left out; None: only exact duplicates are.
        shard_plan: bytes of text in a piece, the unit of work.
        on_error: stop | skip, at faults of the data.
    """

    sources: tuple[str, ...]
    seq_lens: tuple[int, ...] = (512,)
    tokenizer: str | None = None
    add_vocabulary: str | None = None
    vocab_size: int = 30522
    valid_fraction: float = 0.01
    seed: int = 1
    weights: tuple[str, ...] = ()
    max_documents: tuple[str, ...] = ()
    max_tokens: tuple[str, ...] = ()
    form: Form = field(default_factory=Form)
    cleaning: Cleaning = field(default_factory=Cleaning)
    near_duplicates: float | None = None
    shard_plan: int = 64 * MEGABYTE
    on_error: str = "stop"

    @cached_property
    def named_sources(self) -> tuple[Source, ...]:
        return parse_sources(self.sources)

    @cached_property
    def shares(self) -> tuple[float | None, ...]:
        """The weight of each source in training, None where none was given. UserError for a bad one."""
        shares: list[float | None] = [None] * len(self.named_sources)
        for text, number, value in self._by_source("--weight", self.weights):
            if number is None:
                names = ", ".join(source.name for source in self.named_sources)
                raise UserError(f"--weight {text}: write it as NAME=SHARE, with the name of a source: {names}")
            share = _number(value, float, "--weight", text)
            if not 0.0 < share <= 1.0:
                raise UserError(f"--weight {text}: a share is above 0 and at most 1")
            shares[number] = share
        given = sum(share or 0.0 for share in shares)
        rest = [source.name for source, share in zip(self.named_sources, shares, strict=True) if share is None]
        if rest and given >= 1.0:
            raise UserError(
                f"--weight: the shares add up to {given:g}, which leaves nothing for {', '.join(rest)}; lower them, "
                "or give that source a weight too"
            )
        return tuple(shares)

    @cached_property
    def limits(self) -> tuple[Limit, ...]:
        """The limits of each source. UserError for a bad one."""
        limits = [Limit()] * len(self.named_sources)
        for key, texts in (("documents", self.max_documents), ("tokens", self.max_tokens)):
            option = f"--max-{key}"
            for text, number, value in self._by_source(option, sorted(texts, key=lambda text: "=" in text)):
                count = _number(value, int, option, text)
                if count < 1:
                    raise UserError(f"{option} {text}: must be at least 1")
                for place in range(len(limits)) if number is None else [number]:  # NAME=N comes last and wins
                    limits[place] = dataclasses.replace(limits[place], **{key: count})
        return tuple(limits)

    @cached_property
    def added(self) -> int | tuple[str, ...] | None:
        """What is added to the tokenizer: a number of pieces to learn, or words. UserError for a bad one."""
        if (text := self.add_vocabulary) is None:
            return None
        if not re.fullmatch(r"[+-]?\d[\d_.]*", text):
            return read_words(Path(text).expanduser())
        count = _number(text, int, "--add-vocabulary", text)
        if not 1 <= count <= MAX_ADDED:
            raise UserError(f"--add-vocabulary {text}: a number of pieces is from 1 to {MAX_ADDED:,}")
        return count

    @property
    def learns(self) -> bool:
        """Whether the tokenizer depends on the documents."""
        return self.tokenizer is None or isinstance(self.added, int)

    def _by_source(self, option: str, texts: Sequence[str]) -> Iterator[tuple[str, int | None, str]]:
        """(text, number of the source that it names or None, value) of each `VALUE` or `NAME=VALUE`."""
        names = [source.name for source in self.named_sources]
        for text in texts:
            name, separator, value = text.rpartition("=")
            if separator and name not in names:
                raise UserError(f"{option} {text}: no source is called {name!r}; there is {', '.join(names)}")
            yield text, names.index(name) if separator else None, value

    def check(self) -> None:
        """UserError for the first setting that cannot work."""
        lengths, _ = self.seq_lens, self.named_sources  # reading the sources, and below shares and limits, checks them
        if not lengths:
            raise UserError("no row length given; use for example --seq-len 128,512")
        if (shortest := min(lengths)) < MIN_SEQ_LEN:
            raise UserError(f"seq_len {shortest} is too short; use {MIN_SEQ_LEN} or more (BERT uses 128 and 512)")
        if list(lengths) != sorted(set(lengths)):
            raise UserError(f"--seq-len {','.join(map(str, lengths))}: give each length once, the shortest first")
        if not 0.0 < self.valid_fraction < 1.0:
            raise UserError(f"valid_fraction {self.valid_fraction} is not between 0 and 1; use for example 0.01")
        if self.tokenizer is None and self.vocab_size < MIN_VOCAB_SIZE:
            raise UserError(f"vocab_size {self.vocab_size} is too small for WordPiece; use {MIN_VOCAB_SIZE} or more")
        if self.tokenizer is None and self.add_vocabulary is not None:
            raise UserError(
                f"--add-vocabulary {self.add_vocabulary}: no --tokenizer is given to add it to, so that a whole new "
                "vocabulary is learned; give one, or size the new one with --vocab-size"
            )
        if self.shard_plan < _MIN_PLAN:
            raise UserError(f"--shard-plan {self.shard_plan}: a piece of text has {_MIN_PLAN} bytes or more")
        if self.on_error not in ("stop", "skip"):
            raise UserError(f"--on-error {self.on_error}: must be stop or skip")
        if self.near_duplicates is not None:
            check_threshold(self.near_duplicates)
        self.cleaning.check()
        _ = self.shares, self.limits, self.added

    def identity(self) -> dict[str, Any]:
        """The settings as JSON has them, with what identifies the text (names, sizes and times of files) and the
        tokenizer. Two corpora of one identity are the same."""
        plain = dataclasses.asdict(self) | {"sources": fingerprint(self.named_sources)}
        if self.tokenizer is not None:
            tokenizer = load_tokenizer(self.tokenizer)
            plain |= {"vocab_size": None, "tokenizer_hash": tokenizer_hash(tokenizer)}
            if self.added is not None:
                check_wordpiece(tokenizer)
            if isinstance(self.added, tuple):
                plain["added_words_hash"] = hashlib.sha256("\n".join(self.added).encode()).hexdigest()
        return json.loads(json.dumps(plain))


def changed_settings(identity: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    """Names of those that differ."""
    return [key for key in identity if stored.get(key) != identity[key]]


def _number(value: str, kind: type, option: str, text: str) -> Any:
    try:
        number = float(value.replace("_", ""))
        if kind is int and not number.is_integer():
            raise ValueError
        return kind(number)
    except (ValueError, OverflowError):
        raise UserError(f"{option} {text}: {value!r} is not a {'whole ' if kind is int else ''}number") from None


def parse_bytes(text: str) -> int:
    """`64MB`, `1GB`, `500kB` or a plain number, in bytes. UserError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d*)?|\.\d+)\s*([kKMGT]?)B?\s*", text)
    if match is None:
        raise UserError(f"{text!r} is not a size; write it like 64MB or 1GB")
    return int(float(match[1]) * 1000 ** " kMGT".index(match[2].replace("K", "k") or " "))
