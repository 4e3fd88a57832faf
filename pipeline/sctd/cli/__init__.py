"""The command line: verbs only, each calls one function. Bad input: one line on stderr, exit code 2."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext

from sctd import __version__
from sctd.cli import config, corpus, evaluate, train
from sctd.cli.arguments import Parser
from sctd.errors import EXIT_BAD_INPUT, EXIT_FAILED, RunError, UserError
from sctd.signals import Mailbox, Stage

_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "PMI_RANK")  # as launchers name it
_GOES_ON = "what is finished is kept: start again to continue"
_KEPT = {
    **dict.fromkeys(("prepare", "finetune", "ablate"), _GOES_ON),
    "verify-resume": "remove its run.dir before you start again",
    **dict.fromkeys(("train-tokenizer", "export", "report"), "nothing half written is left: start again"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code is 0, 2 for bad input, 74 for a failing machine, or the verb's own (75: stopped).

    Called without `argv`, as the program, it also answers signals, with 130.
    """
    if argv is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback when the interpreter is about to end, either
    mailbox = Mailbox(Stage.WORK, speaks=_rank() == "0")
    try:
        with mailbox.listening() if argv is None else nullcontext():
            args = _parse(argv)
            mailbox.kept = _KEPT.get(args.verb, "")
            if args.verb == "pretrain":
                mailbox.stage = Stage.START
            return args.call(args) or 0
    except (UserError, OSError) as error:  # errors of the file system have a cause outside the program
        return _fail(error, EXIT_BAD_INPUT)
    except RunError as error:
        return _fail(error, EXIT_FAILED)


def _fail(error: Exception, code: int) -> int:
    """One line for one mistake: rank 0 prints what all ranks find; the others print theirs only if rank 0 does not."""
    message = " ".join(str(error).split())
    rank = _rank()
    if rank != "0":
        # Once rank 0 has printed it, the launcher ends this process; the exit code must still say what it was.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
        time.sleep(5)
        message = f"rank {rank}: {message}"
    print(f"sctd: error: {message}", file=sys.stderr)
    return code


def _rank() -> str:
    return next((os.environ[name] for name in _RANKS if name in os.environ), "0")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of a verb; overrides may stand before, between and behind its options."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(args, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        args.overrides += rest
    return args


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="sctd", description="BERT pretraining with (semantic-consistent) token dropping.")
    parser.epilog = (
        "Exit codes: 0: done; 2: bad input; 74: a disk, the network or a rank failed; 75: stopped and saved; "
        "130: interrupted, by Ctrl-C, a closed terminal or SIGTERM."
    )
    parser.add_argument("--version", action="version", version=f"sctd {__version__}")
    # The deepspeed launcher adds this before the verb; LOCAL_RANK in the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(title="verbs", dest="verb", required=True, metavar="VERB", parser_class=Parser)
    corpus.add_verbs(verbs)
    config.add_verb(verbs)
    train.add_verbs(verbs)
    evaluate.add_verbs(verbs)
    return parser
