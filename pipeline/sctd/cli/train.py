"""The verbs of pretraining: pretrain, plan, bench, slurm, doctor, status, checkpoints, verify-resume, export."""

import argparse
import os
from pathlib import Path
from typing import Any

from sctd.cli.arguments import add_recipe, add_verb, positive
from sctd.cli.evaluate import require_libraries
from sctd.config import Config, load_config, recipe_names, to_yaml

_RUN = "folder of a pretraining run"
_DEEPSPEED = "DeepSpeed configuration; where both set a value, it wins over the recipe"


def add_verbs(verbs: Any) -> None:
    """Add these verbs to the command line."""
    verb = add_verb(verbs, "pretrain", "train the model of a recipe", _pretrain)
    _add_run(verb)
    verb.add_argument("--deepspeed_config", "--deepspeed-config", metavar="JSON", help=_DEEPSPEED)
    verb.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)  # launch scripts often pass it
    verb.add_argument("--resume", action="store_true", help="continue from the newest whole checkpoint in run.dir")
    verb.add_argument("--print-config", action="store_true", help="print the merged configuration, and do not train")
    verb.epilog = f"Shipped recipes: {', '.join(recipe_names())}."

    verb = add_verb(verbs, "plan", "predict memory, time and cost of a recipe on given GPUs", _plan)
    add_recipe(verb)
    verb.add_argument("--gpus", required=True, metavar="NxMODEL", help="number and model, such as 8xA100-40GB")
    verb.add_argument("--seq-len", type=int, help="tokens per row (default: model.max_positions)")

    verb = add_verb(verbs, "bench", "time the training steps of all arms, or the kernels, on this machine", _bench)
    add_recipe(verb, default="bert-base-sctd")
    verb.add_argument("--sizes", default="4x512,16x128", metavar="ROWSxLENGTH,...", help="batches to time")
    arms = "full, drop, align, random_ltd, deepspeed_random_ltd"
    text = f"some of {arms} (default: all); with drop and align also the mean step of SCTD"
    verb.add_argument("--arms", metavar="NAME,...", help=text)
    verb.add_argument("--rounds", type=int, default=5, help="timings per median")
    verb.add_argument("--out", type=Path, default=Path("."), help="folder for the results")
    verb.add_argument("--kernels", action="store_true", help="time the kernels instead of whole steps")
    verb.add_argument("--profile", action="store_true", help="trace one DROP step and one ALIGN step instead")

    verb = add_verb(verbs, "slurm", "write the batch script of a recipe, and submit it", _slurm)
    _add_run(verb)
    verb.add_argument("--nodes", type=positive, required=True, help="number of nodes")
    verb.add_argument("--gpus-per-node", type=int, default=8, help="also the ranks per node; 0: one rank on CPUs")
    verb.add_argument("--cpus-per-task", type=positive, help="CPU cores per rank (default: that of the partition)")
    verb.add_argument("--time", default="24:00:00", help="time limit of each attempt, as sbatch reads it")
    verb.add_argument("--deepspeed_config", "--deepspeed-config", metavar="JSON", help=_DEEPSPEED)
    verb.add_argument("--dry-run", action="store_true", help="write and print the script, and do not submit it")
    verb.epilog = "Account and partition: set SBATCH_ACCOUNT and SBATCH_PARTITION, which sbatch reads."

    verb = add_verb(verbs, "doctor", "check that this machine, or all ranks of this job, can train", _doctor)
    verb.add_argument("run", type=Path, nargs="?", default=Path("runs"), help="folder that a run would write to")
    verb.epilog = "Start it as you would start training. Exit code 0: ready; 1: not ready."

    verb = add_verb(verbs, "status", "show the progress of a run, and the jobs that worked on it", _status)
    verb.add_argument("run", type=Path, help=_RUN)

    verb = add_verb(verbs, "checkpoints", "list the checkpoints of a run, and verify each", _checkpoints)
    verb.add_argument("run", type=Path, help=_RUN)

    verb = add_verb(verbs, "verify-resume", "kill a run, resume it, and compare it with an uninterrupted one", _verify)
    add_recipe(verb)
    verb.add_argument("--ranks", type=positive, default=1, help="ranks of the killed run")
    verb.add_argument("--resume-ranks", type=positive, help="ranks of the resumed run (default: the same)")
    verb.add_argument("--steps", type=positive, default=10, help="steps before the kill, and again after it")

    verb = add_verb(verbs, "export", "write a run as a transformers BERT or ModernBERT", _export)
    verb.add_argument("run", type=Path, help=_RUN)
    verb.add_argument("--out", required=True, type=Path, help="folder for the exported model")
    verb.add_argument("--step", type=positive, help="step of the checkpoint (default: the newest)")


def _add_run(verb: argparse.ArgumentParser) -> None:
    """A recipe, or a run to branch from."""
    add_recipe(verb, is_optional=True)
    text = "begin at this checkpoint (RUN: the newest) with that run's settings, instead of those of a recipe"
    verb.add_argument("--branch-from", metavar="RUN@STEP", help=text)


def _words(args: argparse.Namespace) -> list[str]:
    """A recipe, if there is one, and overrides."""
    return [word for word in (args.recipe, *args.overrides) if word]


def _read_config(args: argparse.Namespace) -> Config:
    config = load_config(args.recipe, args.overrides)
    if config.init.from_:
        from sctd.train.init import load_sized

        config = load_sized(args.recipe, args.overrides)
    return config


def _pretrain(args: argparse.Namespace) -> int:
    from sctd.train.command import read_command

    command = read_command(_words(args), args.resume, args.branch_from)
    config = command.config
    if args.print_config:
        from sctd.train.engine.launch import world_size
        from sctd.train.engine.resolve import read_deepspeed_json, resolve

        config, _ = resolve(config, read_deepspeed_json(args.deepspeed_config), world_size(os.environ))
        print(to_yaml(config), end="")
        return 0
    evaluator = None
    if config.evaluation.every:
        require_libraries()
        from sctd.evaluate.during import build_evaluator

        evaluator = build_evaluator(config.evaluation)
    from sctd.train.pretrain import pretrain

    return pretrain(config, args.resume, args.deepspeed_config, evaluator, command.overrides)


def _plan(args: argparse.Namespace) -> None:
    config = _read_config(args)
    from sctd.plan.report import plan

    print(plan(args.recipe, config, args.gpus, args.seq_len))


def _bench(args: argparse.Namespace) -> None:
    if "=" in args.recipe:  # no recipe given: the first override stands in its place
        args.recipe, args.overrides = "bert-base-sctd", [args.recipe, *args.overrides]
    config = _read_config(args)
    from sctd.bench import bench

    bench(config, args.recipe, args.sizes, args.rounds, args.out, args.arms, args.kernels, args.profile)


def _slurm(args: argparse.Namespace) -> None:
    from sctd.train.submit import Allocation, submit

    allocation = Allocation(args.nodes, args.gpus_per_node, args.cpus_per_task, args.time, args.deepspeed_config)
    submit(_words(args), args.branch_from, allocation, args.dry_run)


def _doctor(args: argparse.Namespace) -> int:
    from sctd.jobs.doctor import doctor

    return 0 if doctor(args.run) else 1


def _status(args: argparse.Namespace) -> None:
    from sctd.jobs.status import status

    print(status(args.run))


def _checkpoints(args: argparse.Namespace) -> None:
    from sctd.jobs.status import list_checkpoints

    print(list_checkpoints(args.run))


def _verify(args: argparse.Namespace) -> int:
    from sctd.jobs.verify import verify_resume

    ranks = args.ranks
    return 0 if verify_resume(args.recipe, args.overrides, ranks, args.resume_ranks or ranks, args.steps) else 1


def _export(args: argparse.Namespace) -> None:
    from sctd.evaluate.results import score_rows
    from sctd.train.keep.export import export_run

    export_run(args.run, args.out, args.step, score_rows(args.run, args.step))
    print(f"exported {args.out}")
