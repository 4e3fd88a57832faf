"""The verbs that come before training: prepare, train-tokenizer, inspect."""

import argparse
import os
from pathlib import Path
from typing import Any

from sctd.errors import UserError

SOURCES = (
    "file or glob of .txt .jsonl .parquet .arrow (plain, .gz, .xz, .zst), hf:NAME[:CONFIG[:SPLIT]], or 'embedded'; "
    "NAME= before it gives the source a name; may be repeated"
)


def add_verbs(verbs: Any) -> None:
    """Add them to the command line's."""
    _add_prepare(verbs.add_parser("prepare", help="raw text -> tokenizer and packed rows, on one rank or many"))
    _add_train_tokenizer(verbs.add_parser("train-tokenizer", help="raw text -> a WordPiece vocabulary"))
    _add_inspect(verbs.add_parser("inspect", help="rows of a corpus, with masks as training will see them"))


def _add_sources(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--source", action="append", required=True, metavar="[NAME=]SOURCE", help=SOURCES)
    verb.add_argument("--field", default="text", help="key or column that holds the text (default %(default)s)")
    verb.add_argument(
        "--txt-documents",
        choices=("blank-line", "file"),
        default="blank-line",
        help="what separates the documents of .txt (default %(default)s)",
    )
    verb.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="at faults of the data (default %(default)s)"
    )
    verb.add_argument("--vocab-size", type=int, default=30522, help="of a new tokenizer (default %(default)s)")


def _add_prepare(verb: argparse.ArgumentParser) -> None:
    _add_sources(verb)
    verb.add_argument("--out", required=True, type=Path, help="folder of the corpus")
    verb.add_argument("--tokenizer", help="vocab.txt, tokenizer.json, folder or hub id; default: train a new one")
    verb.add_argument(
        "--seq-len", default="512", metavar="N[,N]", help="tokens a row; 128,512 packs both (default %(default)s)"
    )
    verb.add_argument("--valid-fraction", type=float, default=0.01, help="documents held out (default %(default)s)")
    verb.add_argument("--seed", type=int, default=1, help="of order and held-out split (default %(default)s)")
    verb.add_argument(
        "--weight", action="append", default=[], metavar="NAME=SHARE", help="share of a source in training"
    )
    for key in ("documents", "tokens"):
        verb.add_argument(
            f"--max-{key}", action="append", default=[], metavar="[NAME=]N", help=f"{key} of each source, or of one"
        )
    verb.add_argument("--min-characters", type=int, default=0, help="leave out shorter documents (default %(default)s)")
    verb.add_argument(
        "--max-symbols",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="leave out documents with a larger share of neither letters, digits nor spaces (default %(default)s)",
    )
    verb.add_argument(
        "--near-duplicates",
        type=float,
        metavar="SIMILARITY",
        help="leave out documents that are at least so similar to an earlier one, such as 0.8",
    )
    verb.add_argument(
        "--shard-plan", default="64MB", metavar="SIZE", help="text in a piece of work (default %(default)s)"
    )
    verb.add_argument("--workers", type=int, metavar="N", help="processes on this machine (default 1)")
    verb.epilog = "Under mpirun or `srun --mpi=pmix` all ranks share the work."
    verb.set_defaults(call=_prepare)


def _add_train_tokenizer(verb: argparse.ArgumentParser) -> None:
    _add_sources(verb)
    verb.add_argument("--out", required=True, type=Path, help="folder of the tokenizer")
    verb.add_argument("--cased", action="store_true", help="keep upper case and accents")
    verb.add_argument(
        "--sample", default="1GB", metavar="SIZE", help="text to learn from, spread over the sources (default 1GB)"
    )
    verb.add_argument("--seed", type=int, default=1, help="of the sample (default %(default)s)")
    verb.set_defaults(call=_train_tokenizer)


def _add_inspect(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("corpus", type=Path, help="folder made by `sctd prepare`")
    verb.add_argument("--rows", type=int, default=3, help="how many (default %(default)s)")
    verb.add_argument("--seq-len", type=int, help="which rows, where there are two lengths (default: the longest)")
    verb.add_argument("--split", choices=("train", "valid"), default="train", help="(default %(default)s)")
    verb.add_argument("--seed", type=int, default=1, help="run.seed of the training (default %(default)s)")
    verb.set_defaults(call=_inspect)


def _prepare(args: argparse.Namespace) -> None:
    from sctd.corpus.prepare.job import Wanted, parse_bytes
    from sctd.corpus.prepare.prepare import prepare
    from sctd.corpus.prepare.team import team
    from sctd.corpus.sources.clean import Cleaning
    from sctd.corpus.sources.source import Form

    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1")
    wanted = Wanted(
        sources=tuple(args.source),
        seq_lens=_lengths(args.seq_len),
        tokenizer=args.tokenizer,
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
    prepare(wanted, args.out, team(args.workers, os.environ))


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted(int(length) for length in text.split(",")))
    except ValueError:
        raise UserError(f"--seq-len {text}: write one length, or several like 128,512") from None


def _train_tokenizer(args: argparse.Namespace) -> None:
    from sctd.corpus.prepare.job import parse_bytes
    from sctd.corpus.prepare.learn import learn
    from sctd.corpus.sources.source import Form

    form, sample = Form(args.field, args.txt_documents), parse_bytes(args.sample)
    learn(args.source, args.out, args.vocab_size, not args.cased, sample, args.seed, form, args.on_error)


def _inspect(args: argparse.Namespace) -> None:
    from sctd.data.inspect import inspect

    print(inspect(args.corpus, args.rows, args.seq_len, args.split, args.seed))
