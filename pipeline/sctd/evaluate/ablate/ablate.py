"""One of the paper's ablations: its recipes are written, its runs trained or submitted, fine-tuned and collected."""

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from sctd.config import Config, apply_override, to_dict
from sctd.errors import EXIT_BAD_INPUT, EXIT_STOPPED, RunError, UserError
from sctd.evaluate.ablate.ablations import (
    ABLATION,
    Ablation,
    Variant,
    describe,
    find_ablation,
    goal_of,
    is_finished,
    read_ablation,
    read_line,
    write_tables,
)
from sctd.evaluate.ablate.pretraining import Pretraining, words
from sctd.evaluate.finetune.finetune import Options, finetune
from sctd.evaluate.tasks.locate import find_files
from sctd.evaluate.tasks.task import load_tasks
from sctd.files import write_atomically
from sctd.present.table import as_text
from sctd.train.init import absolute_source, load_sized
from sctd.train.keep.checkpoint import checkpoints
from sctd.train.keep.export import record_at
from sctd.train.keep.metrics import format_seconds
from sctd.train.keep.run_folder import check_run_dir, check_same_run
from sctd.train.pretrain import check
from sctd.train.submit import Allocation, limit_seconds, submit

_LOG = "pretrain.log"  # in the folder of a run: what its process said
_ERROR = "sctd: error: "


@dataclass(frozen=True)
class Machine:
    """Where the runs train: on `ranks` processes here, or with `nodes` in jobs of SLURM.

    time: limit of a job, as sbatch reads it.
    """

    ranks: int
    nodes: int | None
    gpus_per_node: int
    time: str

    @property
    def world(self) -> int:
        """Ranks of a run."""
        return self.ranks if self.nodes is None else self.nodes * max(1, self.gpus_per_node)


@dataclass(frozen=True)
class Trial:
    """A variant, the configuration of its run, and where its recipe is."""

    variant: Variant
    config: Config
    recipe: Path

    @property
    def folder(self) -> Path:
        return self.recipe.with_suffix("")

    @property
    def begun(self) -> bool:
        return (self.folder / "config.yaml").exists() or any(checkpoints(self.folder))

    @property
    def finished(self) -> bool:
        return is_finished(self.config, self.folder)


def ablate(
    kind: str,
    recipe: str,
    overrides: Sequence[str],
    out: Path | None,
    machine: Machine,
    scoring: Options,
    dry_run: bool,
) -> int:
    """Write the recipes of an ablation, train and fine-tune what is not finished, print what there is as a table.

    Args:
        kind: objectives | lambda | interval | selection.
        recipe, overrides: as `sctd pretrain` takes them, the same for all runs.
        out: folder of the runs; None: runs/ablate-KIND.
        scoring: what finished runs are fine-tuned on; no tasks: on nothing.
        dry_run: write and print recipes and commands, and run nothing.

    Returns:
        The exit code: 0, or that of a run that was stopped and waits to be continued.

    Raises:
        UserError: bad input of any kind, before anything is written; or a run that finds its input bad.
        RunError: a run that failed.
    """
    ablation = find_ablation(kind)
    out = (out or Path("runs") / f"ablate-{kind}").absolute()
    common = _common(ablation, recipe, overrides)
    _check_options(ablation, overrides, machine, scoring)
    runs = [_trial(variant, recipe, overrides, out) for variant in ablation.rows]
    _check_folder(out, ablation, common, runs)
    left = [run for run in runs if not run.finished]
    for run in left:  # whatever the run itself would refuse
        config, ds_config = check(run.config, None, machine.world)
        check_run_dir(run.folder, resume=run.begun)
        if run.begun:
            check_same_run(config, ds_config, run.folder)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / ABLATION, describe(ablation, recipe, common))  # first: so that the folder is known as ours
    for run in runs:
        write_atomically(run.recipe, _recipe(run, recipe, overrides))
    if dry_run:
        _show(runs, left, machine, scoring)
        return 0
    code = 0
    try:
        if machine.nodes is None:
            code = _train(runs, machine.ranks)
        else:
            _submit(left, machine, machine.nodes)
        if scoring.tasks and not code:
            _finetune([run for run in runs if run.finished], scoring)
    finally:
        _collect(ablation, recipe, runs, out)
    return code


def _common(ablation: Ablation, recipe: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What all runs have in common, by section.key: all that the rows do not set."""
    config = to_dict(_absolute(load_sized(recipe, overrides)))
    flat = {f"{name}.{key}": value for name, part in config.items() if name != "arm" for key, value in part.items()}
    return {key: value for key, value in flat.items() if key not in ablation.keys | {"run.dir"}}


def _trial(variant: Variant, recipe: str, overrides: Sequence[str], out: Path) -> Trial:
    config = _absolute(load_sized(recipe, [*overrides, *variant.overrides]))
    config = replace(config, run=replace(config.run, dir=str(out / variant.run)))
    return Trial(variant, config, out / f"{variant.run}.yaml")


def _absolute(config: Config) -> Config:
    """With the corpus' full path: the recipes lie in another folder than the user stands in."""
    if not config.data.corpus:
        raise UserError("data.corpus is not set: pass data.corpus=FOLDER, made by `sctd prepare`")
    return replace(
        config,
        data=replace(config.data, corpus=str(Path(config.data.corpus).absolute())),
        init=replace(config.init, from_=absolute_source(config.init.from_)),
    )


def _recipe(run: Trial, recipe: str, overrides: Sequence[str]) -> str:
    """The YAML of a run: the user's recipe, with the overrides of the user and of the row."""
    is_file = recipe.endswith((".yaml", ".yml"))
    tree: dict[str, Any] = {"extends": str(Path(recipe).absolute()) if is_file else recipe}
    for override in (*overrides, *run.variant.overrides):
        apply_override(tree, override)
    tree.setdefault("run", {})["dir"] = run.config.run.dir
    tree.setdefault("data", {})["corpus"] = run.config.data.corpus
    if run.config.init.from_:
        tree.setdefault("init", {})["from"] = run.config.init.from_
    return f"# Written by `sctd ablate`: {run.variant.label}.\n{yaml.safe_dump(tree, sort_keys=False)}"


# ---- checks ------------------------------------------------------------------------------------------------------


def _check_options(ablation: Ablation, overrides: Sequence[str], machine: Machine, scoring: Options) -> None:
    for option, value in (("--ranks", machine.ranks), ("--nodes", machine.nodes), ("--seeds", scoring.seeds)):
        if value is not None and value < 1:
            raise UserError(f"{option} is {value}: it must be at least 1")
    if machine.nodes is not None:
        limit_seconds(machine.time)
    if machine.nodes is not None and machine.ranks != 1:
        raise UserError("--ranks is for runs on this machine, --nodes for jobs of SLURM: give one of them")
    if machine.gpus_per_node < 0:
        raise UserError(f"--gpus-per-node is {machine.gpus_per_node}: it must be at least 0")
    for override in overrides:
        name, _, text = override.partition("=")
        if name == "run.dir":
            raise UserError(f"override {override!r}: the runs have folders of their own: pass --out instead")
        if name in ablation.keys:
            raise UserError(f"override {override!r}: ablation '{ablation.kind}' sets {name} itself: leave it out")
        if isinstance(yaml.safe_load(text), dict):
            raise UserError(f"override {override!r}: it sets a whole section: write its keys one by one")
    for task in load_tasks(scoring.tasks) if scoring.tasks else ():
        if scoring.data_dir is not None or task.home is not None:
            for split in ("train", "dev"):
                find_files(task, split, scoring.data_dir)


def _check_folder(out: Path, ablation: Ablation, common: dict[str, Any], runs: Sequence[Trial]) -> None:
    """An ablation that has begun goes on as it was; any other folder must be empty."""
    if not (out / ABLATION).exists():
        if out.exists() and (not out.is_dir() or any(path.name[0] != "." for path in out.iterdir())):
            raise UserError(f"{out} holds something other than an ablation: choose another folder with --out")
        return
    found = read_ablation(out)
    if found["kind"] != ablation.kind:
        raise UserError(f"{out} holds ablation '{found['kind']}': choose another folder with --out")
    if any(run.begun for run in runs):
        for key, value in common.items():
            before = found["config"].get(key)
            if value != before:
                raise UserError(
                    f"{key} is {value!r}, but the runs in {out} were started with {before!r}: "
                    "keep it, or choose another folder with --out"
                )


# ---- runs --------------------------------------------------------------------------------------------------------


def _train(runs: Sequence[Trial], ranks: int) -> int:
    """Train what is not finished, one run after the other; 0, or the exit code of a run that was stopped."""
    pretraining = Pretraining()
    with pretraining.listening():
        for number, run in enumerate(runs, start=1):
            if run.finished:
                continue
            run.folder.mkdir(exist_ok=True)
            log = run.folder / _LOG
            said = log.stat().st_size if log.exists() else 0
            place = f"[{number}/{len(runs)}] {run.variant.label}"
            print(f"{place}: {'continues' if run.begun else 'starts'}, log: {log}", flush=True)
            code = pretraining.run(run.recipe, ranks, run.begun, log)
            if code == EXIT_STOPPED:
                print(f"{place}: stopped; call it again to continue", flush=True)
                return code
            if code:
                raise _failure(f"{place}: ended with exit code {code}", code, log, said)
            record = record_at(run.folder, goal_of(run.config))
            loss = f"held-out loss {record['valid_loss']:.4f}, " if record.get("valid_loss") is not None else ""
            print(
                f"{place}: {record['step']:,} steps, {loss}{format_seconds(record['seconds'])} of training", flush=True
            )
    return EXIT_STOPPED if pretraining.stopping else 0


def _failure(what: str, code: int, log: Path, start: int) -> Exception:
    """With the error that stands in the log beyond byte `start`, if one does."""
    text = log.read_bytes()[start:].decode("utf-8", errors="replace")
    errors = [line.split(_ERROR, 1)[1] for line in text.splitlines() if _ERROR in line]
    message = f"{what}{f' ({errors[-1]})' if errors else ''}: see {log}; finished runs are kept"
    return UserError(message) if code == EXIT_BAD_INPUT else RunError(message)


def _submit(left: Sequence[Trial], machine: Machine, nodes: int, dry_run: bool = False) -> None:
    """A job for each run that is in no queue yet."""
    jobs = {} if dry_run else _queued()
    allocation = Allocation(nodes, machine.gpus_per_node, None, machine.time, None)
    for run in left:
        job = jobs.get(str(run.folder / "job.sh"))
        if job:
            print(f"{run.variant.label}: in the queue already, as job {job}")
        else:
            submit([str(run.recipe)], None, allocation, dry_run)


def _queued() -> dict[str, str]:
    """The user's jobs that wait or run, by their script."""
    if shutil.which("squeue") is None:
        return {}  # then there is no sbatch either, which `submit` says
    command = ["squeue", "--me", "-h", "-o", "%i %o"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise RunError(f"squeue does not answer ({error}): try again") from None
    pairs = (line.split(" ", 1) for line in done.stdout.splitlines())
    return {script.strip(): job for job, script in pairs}


def _show(runs: Sequence[Trial], left: Sequence[Trial], machine: Machine, scoring: Options) -> None:
    """What would run: recipes, and commands in their order."""
    for run in runs:
        print(f"--- {run.recipe}\n{run.recipe.read_text(encoding='utf-8')}")
    if machine.nodes is None:
        for run in left:
            print(shlex.join(words(run.recipe, machine.ranks, run.begun)))
    else:
        _submit(left, machine, machine.nodes, dry_run=True)
    data = ["--data-dir", str(scoring.data_dir)] if scoring.data_dir else []
    tasks = [word for task in scoring.tasks for word in ("--task", task)]
    for run in runs if scoring.tasks else ():
        print(shlex.join(["sctd", "finetune", str(run.folder), *tasks, *data, "--seeds", str(scoring.seeds)]))


def _finetune(runs: Sequence[Trial], scoring: Options) -> None:
    """Each run, whatever becomes of the others; the first error is raised at the end."""
    errors = []
    for run in runs:
        print(f"\n{run.variant.label}:")
        try:
            finetune(str(run.folder), scoring, out=None, cell=None, count=False)
        except UserError as error:
            errors.append(f"{run.variant.label}: {error}")
    if errors:
        more = f" (and {len(errors) - 1} more of the runs)" if len(errors) > 1 else ""
        raise UserError(f"{errors[0]}{more}")


def _collect(ablation: Ablation, recipe: str, runs: Sequence[Trial], out: Path) -> None:
    lines = [read_line(run.variant, run.config, run.folder) for run in runs]
    print(f"\n{ablation.title}: {out}\n{as_text(write_tables(out, lines, ablation.title, recipe))}")
