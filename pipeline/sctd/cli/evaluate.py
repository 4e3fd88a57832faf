"""The verbs that come after training: finetune, probe, drift, ablate, report."""

import argparse
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

from sctd.cli.arguments import add_recipe, add_verb
from sctd.errors import UserError

_LIBRARIES = {"sklearn": "scikit-learn", "scipy": "scipy", "seqeval": "seqeval"}
_CHECKPOINT = "run, checkpoint folder of a run, transformers folder or hub id"
_DATA = "folder with the tasks' files in their usual forms; default: the hub"


def add_verbs(verbs: Any) -> None:
    """Add these verbs to the command line."""
    verb = add_verb(verbs, "finetune", "fine-tune a checkpoint on tasks, over several seeds", _finetune)
    verb.add_argument("checkpoint", help=_CHECKPOINT)
    verb.add_argument(
        "--task",
        action="append",
        required=True,
        help="name, suite (glue, superglue, squad, ner, semantic) or YAML; may be repeated",
    )
    verb.add_argument("--data-dir", type=Path, help=_DATA)
    verb.add_argument("--seeds", type=int, default=5, help="fine-tunings per setting")
    verb.add_argument("--grid", action="store_true", help="search LR 1e-5 2e-5 3e-5 5e-5 and batch 12 16 32")
    verb.add_argument("--shots", type=int, metavar="K", help="train on K examples of each class")
    verb.add_argument("--lr", type=float, help="peak learning rate (default: the task's)")
    verb.add_argument("--batch-size", type=int, help="examples per step (default: the task's)")
    verb.add_argument("--steps", type=int, help="optimizer steps (default: the task's)")
    verb.add_argument("--epochs", type=float, help="instead of --steps: passes over the training rows")
    verb.add_argument("--max-length", type=int, help="tokens per row (default: the task's)")
    verb.add_argument("--out", type=Path, help="folder of the results (default: RUN/evaluation/step-N)")
    verb.add_argument("--cell", type=int, metavar="N", help="run the N-th fine-tuning alone, from 0")
    verb.add_argument("--count", action="store_true", help="print how many fine-tunings there are, and stop")
    verb.epilog = "What is finished is not run again; called again, it continues and prints the table."

    verb = add_verb(verbs, "probe", "measure what each layer of a checkpoint knows", _probe)
    verb.add_argument("checkpoints", nargs="+", metavar="checkpoint", help=_CHECKPOINT)
    verb.add_argument(
        "--task", action="append", required=True, help="tense, subj_number, or SentEval file; may be repeated"
    )
    verb.add_argument("--data-dir", type=Path, help="folder with past_present.txt and subj_number.txt")
    verb.add_argument("--pooling", choices=("mean", "cls"), default="mean", help="sentence representation")
    verb.add_argument("--out", type=Path, help="folder of the results, for one checkpoint outside a run")
    verb.add_argument("--picture", type=Path, metavar="FILE", help="the curves of all checkpoints (.png, .svg, .pdf)")

    verb = add_verb(verbs, "drift", "measure semantic drift over the checkpoints of runs", _drift)
    verb.add_argument("runs", nargs="+", metavar="run", type=Path, help="folder of a pretraining run")
    verb.add_argument("--corpus", type=Path, help="corpus of the sentences, held-out rows (default: the first run's)")
    verb.add_argument("--sentences", type=int, default=1000, help="number of sentences")
    verb.add_argument(
        "--encoder",
        default="sentence-transformers/all-MiniLM-L6-v2",
        help="sentence-transformers folder, hub id, or an installed package with a model",
    )
    verb.add_argument("--picture", type=Path, metavar="FILE", help="the curves of all runs (.png, .svg, .pdf)")

    verb = add_verb(verbs, "ablate", "run or submit one of the paper's ablations, and collect its results", _ablate)
    verb.add_argument("kind", help="objectives (Table 4), lambda (Figure 7), interval (Table 5), selection")
    add_recipe(verb)
    verb.add_argument("--out", type=Path, help="folder of the runs (default: runs/ablate-KIND)")
    verb.add_argument("--ranks", type=int, default=1, help="processes of this machine per run")
    verb.add_argument("--nodes", type=int, help="submit each run to SLURM instead, on N nodes")
    verb.add_argument("--gpus-per-node", type=int, default=8, help="GPUs per node, with --nodes")
    verb.add_argument("--time", default="24:00:00", help="time limit of a job, with --nodes")
    verb.add_argument("--task", action="append", default=[], help="fine-tune each run on it, as `sctd finetune` does")
    verb.add_argument("--data-dir", type=Path, help=_DATA)
    verb.add_argument("--seeds", type=int, default=5, help="seeds of the fine-tuning")
    verb.add_argument("--dry-run", action="store_true", help="write and print the recipes, and run nothing")
    verb.epilog = "What is finished is not run again; called again, it continues and prints the table."

    verb = add_verb(verbs, "report", "write one page about runs and their evaluations, with tables", _report)
    verb.add_argument(
        "folders", nargs="+", metavar="folder", type=Path, help="runs, folders of ablations, and --out of evaluations"
    )
    verb.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="HTML file to write")
    verb.add_argument("--title", default="Pretraining report", help="heading of the page")


def require_libraries(**more: str) -> None:
    missing = [name for module, name in (_LIBRARIES | more).items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} not installed: pip install 'sctd[evaluation]'")


def _finetune(args: argparse.Namespace) -> None:
    require_libraries()
    from sctd.evaluate.finetune.finetune import Options, finetune

    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Options) if field.name != "tasks"}
    finetune(args.checkpoint, Options(tuple(args.task), **given), args.out, args.cell, args.count)


def _probe(args: argparse.Namespace) -> None:
    require_libraries()
    from sctd.evaluate.analyse.probe import probe

    probe(args.checkpoints, args.task, args.data_dir, args.pooling, args.out, args.picture)


def _drift(args: argparse.Namespace) -> None:
    require_libraries(sentence_transformers="sentence-transformers")
    from sctd.evaluate.analyse.drift import drift

    drift(args.runs, args.corpus, args.sentences, args.encoder, args.picture)


def _ablate(args: argparse.Namespace) -> int:
    if args.task:
        require_libraries()
    from sctd.evaluate.ablate.ablate import Machine, ablate
    from sctd.evaluate.finetune.finetune import Options

    machine = Machine(args.ranks, args.nodes, args.gpus_per_node, args.time)
    scoring = Options(tuple(args.task), args.data_dir, args.seeds)
    return ablate(args.kind, args.recipe, args.overrides, args.out, machine, scoring, args.dry_run)


def _report(args: argparse.Namespace) -> None:
    require_libraries()
    from sctd.report.report import report

    report(args.folders, args.out, args.title)
