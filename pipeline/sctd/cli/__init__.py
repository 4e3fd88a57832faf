"""The command line: verbs only, each calls one function. Bad input: one line on stderr, exit code 2."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sctd import __version__, cli_corpus, cli_evaluate
from sctd.config import load_config, recipe_names, to_yaml
from sctd.errors import EXIT_BAD_INPUT, EXIT_FAILED, RunError, UserError

_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "PMI_RANK")  # as launchers name it, before we look closer


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code is 0, 2 for bad input, 74 for a failing machine, or the verb's own (75: stopped)."""
    try:
        args = _parse(argv)
        return args.call(args) or 0
    except (UserError, OSError) as error:  # of the file system's errors all have a cause outside the program
        return _report(error, EXIT_BAD_INPUT)
    except RunError as error:
        return _report(error, EXIT_FAILED)


def _report(error: Exception, code: int) -> int:
    """One line for one mistake: what all ranks find, rank 0 says; what one of them finds, it says after a while."""
    message = " ".join(str(error).split())
    rank = next((os.environ[name] for name in _RANKS if name in os.environ), "0")
    if rank != "0":
        # When rank 0 has said it, its launcher ends this process meanwhile; the exit code must still tell what it was.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
        time.sleep(5)
        message = f"rank {rank}: {message}"
    print(f"sctd: error: {message}", file=sys.stderr)
    return code


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of a verb; overrides may stand before, between and behind its options."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    strangers = [word for word in rest if word.startswith("-") or not hasattr(args, "overrides")]
    if strangers:
        parser.error(f"unrecognized arguments: {' '.join(strangers)}")
    if rest:
        args.overrides += rest
    return args


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sctd", description="BERT pretraining with (semantic-consistent) token dropping.")
    parser.add_argument("--version", action="version", version=f"sctd {__version__}")
    # The deepspeed launcher adds this before the verb; LOCAL_RANK in the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB", parser_class=_Parser)
    cli_corpus.add_verbs(verbs)
    _add_pretrain(verbs.add_parser("pretrain", help="train a recipe"))
    _add_bench(verbs.add_parser("bench", help="time every arm, and the kernels, on this machine"))
    _add_plan(verbs.add_parser("plan", help="memory, time and cost of a recipe on given GPUs, predicted"))
    _add_slurm(verbs.add_parser("slurm", help="write the batch script of a recipe, and submit it"))
    _add_run(verbs.add_parser("status", help="where a run stands, and the chain of its jobs"), _status)
    _add_run(verbs.add_parser("checkpoints", help="the checkpoints of a run, each verified"), _checkpoints)
    _add_doctor(verbs.add_parser("doctor", help="whether this machine, or this job, can train"))
    _add_verify_resume(verbs.add_parser("verify-resume", help="kill a run, resume it, compare with one left alone"))
    _add_export(verbs.add_parser("export", help="a run -> a plain transformers BERT or ModernBERT"))
    cli_evaluate.add_verbs(verbs)
    return parser


def _add_pretrain(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("recipe", help="name of a shipped recipe, or a YAML file; shipped: " + ", ".join(recipe_names()))
    verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="override any config key")
    verb.add_argument("--deepspeed_config", "--deepspeed-config", metavar="JSON", help="wins over the recipe")
    verb.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)  # launch scripts often pass it
    verb.add_argument("--resume", action="store_true", help="continue the newest whole checkpoint in run.dir")
    verb.add_argument("--print-config", action="store_true", help="print the merged configuration and stop")
    verb.set_defaults(call=_pretrain)


def _add_plan(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("recipe", help="name of a shipped recipe, or a YAML file")
    verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="override any config key")
    verb.add_argument("--gpus", required=True, metavar="NxMODEL", help="for example 8xA100-40GB")
    verb.add_argument("--seq-len", type=int, help="tokens a row (default: model.max_positions)")
    verb.set_defaults(call=_plan)


def _add_slurm(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("recipe", help="name of a shipped recipe, or a YAML file")
    verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="override any config key")
    verb.add_argument("--nodes", type=_positive, required=True)
    verb.add_argument("--gpus-per-node", type=int, default=8, help="and as many tasks; 0: CPUs (default %(default)s)")
    verb.add_argument("--cpus-per-task", type=_positive, help="default: what the partition gives")
    verb.add_argument(
        "--time", default="24:00:00", help="limit of each attempt, as sbatch reads it (default %(default)s)"
    )
    verb.add_argument("--deepspeed_config", "--deepspeed-config", metavar="JSON", help="wins over the recipe")
    verb.add_argument("--dry-run", action="store_true", help="write and print the script, and do not submit it")
    verb.epilog = "Account and partition are read from SBATCH_ACCOUNT and SBATCH_PARTITION, as sbatch does."
    verb.set_defaults(call=_slurm)


def _add_run(verb: argparse.ArgumentParser, call: Callable[[argparse.Namespace], None]) -> None:
    verb.add_argument("run", type=Path, help="folder of a pretraining run")
    verb.set_defaults(call=call)


def _add_doctor(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "run", type=Path, nargs="?", default=Path("runs"), help="where it will write (default %(default)s)"
    )
    verb.set_defaults(call=_doctor)


def _add_verify_resume(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("recipe", help="name of a shipped recipe, or a YAML file")
    verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="override any config key")
    verb.add_argument("--ranks", type=_positive, default=1, help="processes that are killed (default %(default)s)")
    verb.add_argument("--resume-ranks", type=_positive, help="processes that continue (default: as many)")
    verb.add_argument("--steps", type=_positive, default=10, help="before the kill, and after (default %(default)s)")
    verb.set_defaults(call=_verify_resume)


def _add_export(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run", type=Path, help="folder of a pretraining run")
    verb.add_argument("--out", required=True, type=Path, help="folder of the exported model")
    verb.add_argument("--step", type=_positive, help="of the checkpoint (default: the newest)")
    verb.set_defaults(call=_export)


def _add_bench(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("recipe", nargs="?", default="bert-base-sctd", help="its model is measured (default %(default)s)")
    verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="override any config key")
    verb.add_argument(
        "--sizes", default="4x512,16x128", metavar="ROWSxLENGTH,...", help="batches to measure (default %(default)s)"
    )
    verb.add_argument(
        "--arms",
        metavar="NAME,...",
        help="of full,drop,align,random_ltd,deepspeed_random_ltd (default: all; "
        "drop and align together give SCTD's mean step)",
    )
    verb.add_argument("--rounds", type=int, default=5, help="a median is over so many (default %(default)s)")
    verb.add_argument("--out", type=Path, default=Path("."), metavar="FOLDER", help="of the results (default: here)")
    verb.add_argument("--kernels", action="store_true", help="measure the kernels instead of whole steps")
    verb.add_argument("--profile", action="store_true", help="trace one DROP and one ALIGN step instead")
    verb.set_defaults(call=_bench)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _pretrain(args: argparse.Namespace) -> int:
    config = load_config(args.recipe, args.overrides)
    if args.print_config:
        from sctd.train.engine.engine import read_deepspeed_json, resolve
        from sctd.train.engine.launch import world_size

        config, _ = resolve(config, read_deepspeed_json(args.deepspeed_config), world_size(os.environ))
        print(to_yaml(config), end="")
        return 0
    evaluator = None
    if config.evaluation.every:
        cli_evaluate.require_libraries()
        from sctd.evaluate.during import build_evaluator

        evaluator = build_evaluator(config.evaluation)
    from sctd.train.pretrain import pretrain

    return pretrain(config, args.resume, args.deepspeed_config, evaluator)


def _bench(args: argparse.Namespace) -> None:
    if "=" in args.recipe:  # no recipe given: the first override stands in its place
        args.recipe, args.overrides = "bert-base-sctd", [args.recipe, *args.overrides]
    config = load_config(args.recipe, args.overrides)
    from sctd.bench import bench

    bench(config, args.recipe, args.sizes, args.rounds, args.out, args.arms, args.kernels, args.profile)


def _plan(args: argparse.Namespace) -> None:
    config = load_config(args.recipe, args.overrides)
    from sctd.plan.report import plan

    print(plan(args.recipe, config, args.gpus, args.seq_len))


def _slurm(args: argparse.Namespace) -> None:
    from sctd.jobs.submit import Wanted, submit

    wanted = Wanted(args.nodes, args.gpus_per_node, args.cpus_per_task, args.time, args.deepspeed_config)
    submit(args.recipe, args.overrides, wanted, args.dry_run)


def _status(args: argparse.Namespace) -> None:
    from sctd.jobs.status import status

    print(status(args.run))


def _checkpoints(args: argparse.Namespace) -> None:
    from sctd.jobs.status import list_checkpoints

    print(list_checkpoints(args.run))


def _doctor(args: argparse.Namespace) -> int:
    from sctd.jobs.doctor import doctor

    return 0 if doctor(args.run) else 1


def _verify_resume(args: argparse.Namespace) -> int:
    from sctd.verify import verify_resume

    ranks = args.ranks
    return 0 if verify_resume(args.recipe, args.overrides, ranks, args.resume_ranks or ranks, args.steps) else 1


def _export(args: argparse.Namespace) -> None:
    from sctd.evaluate.card import score_rows
    from sctd.train.keep.export import export_run

    export_run(args.run, args.out, args.step, score_rows(args.run, args.step))
    print(f"exported {args.out}")
