"""The verbs that come before training: prepare, train-tokenizer, inspect."""

import argparse
import os
from pathlib import Path
from typing import Any

from sctd.cli.arguments import add_verb, positive
from sctd.errors import UserError

SOURCES = (
    "file or glob of .txt, .jsonl, .parquet or .arrow (also with .gz, .xz or .zst), hf:NAME[:CONFIG[:SPLIT]], or "
    "'embedded'; NAME= in front names the source; may be repeated"
)


def add_verbs(verbs: Any) -> None:
    """Add these verbs to the command line."""
    verb = add_verb(verbs, "prepare", "turn raw text into a tokenizer and packed rows", _prepare)
    _add_sources(verb)
    verb.add_argument("--out", required=True, type=Path, help="folder of the corpus")
    verb.add_argument("--tokenizer", help="vocab.txt, tokenizer.json, folder or hub id; default: train a new one")
    verb.add_argument(
        "--add-vocabulary",
        metavar="N|FILE",
        help="add to --tokenizer the N pieces that shorten the text most, or the words of a file with one a line",
    )
    verb.add_argument("--seq-len", default="512", metavar="N[,N]", help="tokens per row; 128,512 packs both")
    verb.add_argument("--valid-fraction", type=float, default=0.01, metavar="SHARE", help="share of documents held out")
    verb.add_argument("--seed", type=int, default=1, help="seed of order and held-out split")
    verb.add_argument(
        "--weight", action="append", default=[], metavar="NAME=SHARE", help="share of a source in the training samples"
    )
    for key in ("documents", "tokens"):
        verb.add_argument(
            f"--max-{key}",
            action="append",
            default=[],
            metavar="[NAME=]N",
            help=f"most {key} to take of each source, or of one",
        )
    verb.add_argument("--min-characters", type=int, default=0, help="leave out shorter documents")
    verb.add_argument(
        "--max-symbols",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="leave out documents with a larger share of symbols: not letters, digits or spaces",
    )
    verb.add_argument(
        "--near-duplicates",
        type=float,
        metavar="SIMILARITY",
        help="leave out documents that are at least so similar to an earlier one (Jaccard), such as 0.8",
    )
    verb.add_argument("--shard-plan", default="64MB", metavar="SIZE", help="text in one piece of work")
    verb.add_argument("--workers", type=positive, metavar="N", help="processes on this machine (default 1)")
    verb.epilog = "Under mpirun or `srun --mpi=pmix` all ranks share the work."

    verb = add_verb(verbs, "train-tokenizer", "learn a WordPiece vocabulary", _train_tokenizer)
    _add_sources(verb)
    verb.add_argument("--out", required=True, type=Path, help="folder of the tokenizer")
    verb.add_argument("--cased", action="store_true", help="keep upper case and accents")
    verb.add_argument("--sample", default="1GB", metavar="SIZE", help="text to learn from, spread over the sources")
    verb.add_argument("--seed", type=int, default=1, help="seed of the sample")

    verb = add_verb(verbs, "inspect", "show rows of a corpus, masked as training will see them", _inspect)
    verb.add_argument("corpus", type=Path, help="folder made by `sctd prepare`")
    verb.add_argument("--rows", type=int, default=3, help="rows to show")
    verb.add_argument("--seq-len", type=int, help="length of the rows to show (default: the longest)")
    verb.add_argument("--split", choices=("train", "valid"), default="train", help="part of the corpus")
    verb.add_argument("--seed", type=int, default=1, help="run.seed of the training")
    text = "how the training masks: data.whole_word=true, data.span_length=3, ..."
    verb.add_argument("overrides", nargs="*", metavar="section.key=value", help=text)


def _add_sources(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--source", action="append", required=True, metavar="[NAME=]SOURCE", help=SOURCES)
    verb.add_argument("--field", default="text", help="key or column that holds the text")
    verb.add_argument(
        "--txt-documents", choices=("blank-line", "file"), default="blank-line", help="what separates documents in .txt"
    )
    verb.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="what to do at bad data")
    verb.add_argument("--vocab-size", type=int, default=30522, help="size of a new tokenizer")


def _prepare(args: argparse.Namespace) -> None:
    from sctd.corpus.prepare.prepare import prepare
    from sctd.corpus.prepare.settings import CorpusSettings, parse_bytes
    from sctd.corpus.prepare.team import team
    from sctd.corpus.sources.clean import Cleaning
    from sctd.corpus.sources.source import Form

    settings = CorpusSettings(
        sources=tuple(args.source),
        seq_lens=_lengths(args.seq_len),
        tokenizer=args.tokenizer,
        add_vocabulary=args.add_vocabulary,
        vocab_size=args.vocab_size,
        valid_fraction=args.valid_fraction,
        seed=args.seed,
        weights=tuple(args.weight),
        max_documents=tuple(args.max_documents),
        max_tokens=tuple(args.max_tokens),
        form=Form(args.field, args.txt_documents),
        cleaning=Cleaning(args.min_characters, args.max_symbols),
        near_duplicates=args.near_duplicates,
        shard_plan=parse_bytes(args.shard_plan),
        on_error=args.on_error,
    )
    prepare(settings, args.out, team(args.workers, os.environ))


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted(int(length) for length in text.split(",")))
    except ValueError:
        raise UserError(f"--seq-len {text}: write one length, or several like 128,512") from None


def _train_tokenizer(args: argparse.Namespace) -> None:
    from sctd.corpus.prepare.learn import learn
    from sctd.corpus.prepare.settings import parse_bytes
    from sctd.corpus.sources.source import Form

    form, sample = Form(args.field, args.txt_documents), parse_bytes(args.sample)
    learn(args.source, args.out, args.vocab_size, not args.cased, sample, args.seed, form, args.on_error)


def _inspect(args: argparse.Namespace) -> None:
    from sctd.data.inspect import inspect

    print(inspect(args.corpus, args.rows, args.seq_len, args.split, args.seed, args.overrides))
