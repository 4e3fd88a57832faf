"""A tokenizer learned from a sample of the sources."""

import hashlib
import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from sctd.corpus.prepare.encode import document_hash, falls_to_valid, utf8_bytes
from sctd.corpus.prepare.job import TOKEN_BYTES, Job
from sctd.corpus.sources.clean import Cleaner, Cleaning
from sctd.corpus.sources.source import Faults, Form, Piece, parse_sources, plan_pieces, read_piece
from sctd.corpus.tokenizer import (
    corpus_encoder,
    count_words,
    encode_documents,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    train_tokenizer,
    vocab_size,
)
from sctd.corpus.vocabulary import add_vocabulary, said_of_additions
from sctd.errors import UserError

SAMPLE_BYTES = 1_000_000_000  # of text; more does not change the pieces by much
_PIECE_BYTES = 64_000_000
_LEAST_CHANCE = 1 / 8  # of a document that is read to be taken: how much of a huge corpus is read for a small sample
_JUDGED_DOCUMENTS, _JUDGED_CHARACTERS = 2000, 10_000
_MAX_LENGTH = 512


def learn(
    sources: Sequence[str],
    out: Path,
    size: int,
    lowercase: bool,
    sample_bytes: int,
    seed: int,
    form: Form,
    on_error: str,
    log: Callable[[str], Any] = print,
) -> Tokenizer:
    """Learn a WordPiece vocabulary of `size` ids from about `sample_bytes` of text, and write it to the folder `out`.

    Raises:
        UserError: bad input, or an `out` that holds something.
    """
    out = Path(os.path.realpath(out))  # the rename must replace the folder behind a link, not the link
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; choose another --out or remove it")
    if sample_bytes < 1:
        raise UserError(f"--sample {sample_bytes}: must be at least 1 byte")
    pieces = plan_pieces(parse_sources(sources), form, _PIECE_BYTES)
    faults, seen = Faults(on_error), _Seen()
    documents = seen.watched(sample(pieces, form, faults, sample_bytes, seed))
    tokenizer = train_tokenizer(documents, size, lowercase)
    if not seen.documents:
        raise UserError(
            f"{', '.join(sources)}: no document in the sample; name sources that hold text, or raise --sample"
        )
    hidden = out.parent / f".{out.name}.part"
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        save_tokenizer(tokenizer, hidden, _MAX_LENGTH)
        os.rename(hidden, out)  # replaces an empty folder, fails on any other
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    ids = np.concatenate(encode_documents(corpus_encoder(tokenizer), seen.judged))
    unknown = np.count_nonzero(ids == special_ids(tokenizer).unk) / max(1, len(ids))
    words = sum(len(text.split()) for text in seen.judged)
    skipped = f", {sum(faults.counts.values()):,} faults skipped" if faults.counts else ""
    log(
        f"{out}: {vocab_size(tokenizer):,} pieces from {seen.documents:,} documents, {seen.bytes / 1e6:,.1f} MB; "
        f"{len(ids) / max(1, words):.3f} tokens a word, {unknown:.3%} unknown{skipped}"
    )
    return tokenizer


def sample(
    pieces: Sequence[Piece],
    form: Form,
    faults: Faults,
    sample_bytes: int,
    seed: int,
    cleaning: Cleaning | None = None,
) -> Iterator[str]:
    """Clean documents of about so many bytes, from each piece its share, or all where the sources have no more.

    A document is taken by a hash of (seed, text). Of a large piece only the beginning is read.
    """
    sizes = [max(1, piece.bytes) for piece in pieces]
    share = sample_bytes / max(1, sum(sizes))
    chance = max(share, _LEAST_CHANCE)
    cleaner, room = Cleaner(cleaning or Cleaning()), 0.0
    for piece, size in zip(pieces, sizes, strict=True):
        room += share * size
        for raw in read_piece(piece, form, faults) if room > 0 else ():
            text = cleaner(raw)
            if text is not None and (chance >= 1.0 or _chosen(text, seed, chance)):
                yield text
                room -= utf8_bytes(text)
                if room <= 0:
                    break


def corpus_tokenizer(job: Job, log: Callable[[str], Any]) -> tuple[Tokenizer, dict[str, Any] | None]:
    """The tokenizer of a corpus: the given one, with a vocabulary added to it if that is asked for, or a new one.
    Beside it what add_vocabulary says of the additions. Only train documents are learned from."""
    settings = job.settings
    if settings.tokenizer is None:
        log(f"learning a WordPiece vocabulary of {settings.vocab_size:,} from the train documents")
        return train_tokenizer(_train_documents(job), settings.vocab_size), None
    tokenizer = load_tokenizer(settings.tokenizer)
    if settings.added is None:
        return tokenizer, None
    log(f"adding to the vocabulary of {settings.tokenizer}: reading train documents")
    tokenizer, facts = add_vocabulary(tokenizer, settings.added, *count_words(_train_documents(job), tokenizer))
    log(said_of_additions(facts))
    return tokenizer, facts


def _train_documents(job: Job) -> Iterator[str]:
    """Of the documents that the limits leave and that are not held out all, or a sample of SAMPLE_BYTES."""
    settings, share = job.settings, min(1.0, SAMPLE_BYTES / max(1, job.text_bytes))
    for source, limit in enumerate(settings.limits):
        pieces = [piece for piece in job.pieces if piece.source == source]
        size, faults = int(share * sum(piece.bytes for piece in pieces)), Faults(settings.on_error)
        documents = sample(pieces, settings.form, faults, size, settings.seed, settings.cleaning)
        room = math.inf if limit.tokens is None else share * limit.tokens * TOKEN_BYTES
        for text in itertools.islice(documents, limit.documents and math.ceil(share * limit.documents)):
            if room <= 0:
                break
            room -= utf8_bytes(text)
            if not falls_to_valid(document_hash(text, settings.seed)[2], settings.valid_fraction):
                yield text


def _chosen(text: str, seed: int, share: float) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=f"sample {seed}".encode()[:64]).digest()
    return int.from_bytes(digest, "big") < share * 2.0**64


class _Seen:
    """What went into the learning: counts, and documents from all over it to judge the result by."""

    def __init__(self) -> None:
        self.documents = self.bytes = 0
        self.judged: list[str] = []
        self._stride = 1

    def watched(self, documents: Iterator[str]) -> Iterator[str]:
        for text in documents:
            if self.documents % self._stride == 0:
                self.judged.append(text[:_JUDGED_CHARACTERS])
                if len(self.judged) == 2 * _JUDGED_DOCUMENTS:
                    self.judged, self._stride = self.judged[::2], 2 * self._stride
            self.documents += 1
            self.bytes += utf8_bytes(text)
            yield text
