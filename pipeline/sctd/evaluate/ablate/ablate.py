"""One of the paper's ablations: its recipes are written, its runs trained or submitted, fine-tuned and collected."""

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from sctd.config import Config, apply_override, load_config, to_dict
from sctd.errors import EXIT_BAD_INPUT, RunError, UserError
from sctd.evaluate.ablate.ablations import ABLATION, Ablation, Row, describe, find_ablation, read_ablation
from sctd.evaluate.ablate.pretraining import Pretraining, words
from sctd.evaluate.ablate.table import as_csv, as_markdown, as_text, goal_of, is_finished, read_line
from sctd.evaluate.finetune import finetune
from sctd.evaluate.tasks.locate import find_files
from sctd.evaluate.tasks.task import load_tasks
from sctd.files import write_atomically
from sctd.jobs.submit import Wanted, limit_seconds, submit
from sctd.train.keep.checkpoint import checkpoints
from sctd.train.keep.export import record_at
from sctd.train.keep.metrics import format_seconds
from sctd.train.keep.preemption import EXIT_STOPPED
from sctd.train.keep.run_folder import check_run_dir, check_same_run
from sctd.train.pretrain import check

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
class Scoring:
    """What finished runs are fine-tuned on; no tasks: on nothing."""

    tasks: tuple[str, ...]
    data_dir: Path | None
    seeds: int


@dataclass(frozen=True)
class _Run:
    """A row, the configuration of its run, and where its recipe is."""

    row: Row
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
    scoring: Scoring,
    dry_run: bool,
) -> int:
    """Write the recipes of an ablation, train and fine-tune what is not finished, print what there is as a table.

    Args:
        kind: objectives | lambda | interval | selection.
        recipe, overrides: as `sctd pretrain` takes them, the same for all runs.
        out: folder of the runs; None: runs/ablate-KIND.
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
    runs = [_run(row, recipe, overrides, out) for row in ablation.rows]
    _check_folder(out, ablation, common, runs)
    left = [run for run in runs if not run.finished]
    for run in left:
        _check_run(run, machine.world)
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
    config = to_dict(_absolute(load_config(recipe, overrides)))
    flat = {f"{name}.{key}": value for name, part in config.items() if name != "arm" for key, value in part.items()}
    return {key: value for key, value in flat.items() if key not in ablation.keys | {"run.dir"}}


def _run(row: Row, recipe: str, overrides: Sequence[str], out: Path) -> _Run:
    config = _absolute(load_config(recipe, [*overrides, *row.overrides]))
    return _Run(row, replace(config, run=replace(config.run, dir=str(out / row.run))), out / f"{row.run}.yaml")


def _absolute(config: Config) -> Config:
    """With the corpus' full path: the recipes lie in another folder than the user stands in."""
    if not config.data.corpus:
        raise UserError("data.corpus is not set: pass data.corpus=FOLDER, made by `sctd prepare`")
    return replace(config, data=replace(config.data, corpus=str(Path(config.data.corpus).absolute())))


def _recipe(run: _Run, recipe: str, overrides: Sequence[str]) -> str:
    """The YAML of a run: the user's recipe, with the overrides of the user and of the row."""
    is_file = recipe.endswith((".yaml", ".yml"))
    tree: dict[str, Any] = {"extends": str(Path(recipe).absolute()) if is_file else recipe}
    for override in (*overrides, *run.row.overrides):
        apply_override(tree, override)
    tree.setdefault("run", {})["dir"] = run.config.run.dir
    tree.setdefault("data", {})["corpus"] = run.config.data.corpus
    return f"# Written by `sctd ablate`: {run.row.label}.\n{yaml.safe_dump(tree, sort_keys=False)}"


# ---- checks ------------------------------------------------------------------------------------------------------


def _check_options(ablation: Ablation, overrides: Sequence[str], machine: Machine, scoring: Scoring) -> None:
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


def _check_folder(out: Path, ablation: Ablation, common: dict[str, Any], runs: Sequence[_Run]) -> None:
    """An ablation that has begun goes on as it was; any other folder must be empty."""
    if not (out / ABLATION).exists():
        if out.exists() and (not out.is_dir() or any(path.name[0] != "." for path in out.iterdir())):
            raise UserError(f"{out} holds something that is no ablation: choose another folder with --out")
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


def _check_run(run: _Run, world: int) -> None:
    """Whatever the run itself would refuse, on so many ranks."""
    config, ds_config = check(run.config, None, world)
    check_run_dir(run.folder, resume=run.begun)
    if run.begun:
        check_same_run(config, ds_config, run.folder)


# ---- runs --------------------------------------------------------------------------------------------------------


def _train(runs: Sequence[_Run], ranks: int) -> int:
    """Train what is not finished, one run after the other; 0, or the exit code of a run that was stopped."""
    pretraining = Pretraining()
    with pretraining.listening():
        for number, run in enumerate(runs, start=1):
            if run.finished:
                continue
            run.folder.mkdir(exist_ok=True)
            log = run.folder / _LOG
            said = log.stat().st_size if log.exists() else 0
            place = f"[{number}/{len(runs)}] {run.row.label}"
            print(f"{place}: {'goes on' if run.begun else 'starts'}, its log: {log}", flush=True)
            code = pretraining.run(run.recipe, ranks, run.begun, log)
            if code == EXIT_STOPPED:
                print(f"{place}: stopped; called again, it goes on", flush=True)
                return code
            if code:
                raise _failure(f"{place}: ended with exit code {code}", code, log, said)
            print(f"{place}: {_outcome(run)}", flush=True)
    return EXIT_STOPPED if pretraining.stopping else 0


def _failure(what: str, code: int, log: Path, start: int) -> Exception:
    """With the error that stands in the log beyond byte `start`, if one does."""
    text = log.read_bytes()[start:].decode("utf-8", errors="replace")
    errors = [line.split(_ERROR, 1)[1] for line in text.splitlines() if _ERROR in line]
    message = f"{what}{f' ({errors[-1]})' if errors else ''}: see {log}; finished runs are kept"
    return UserError(message) if code == EXIT_BAD_INPUT else RunError(message)


def _outcome(run: _Run) -> str:
    record = record_at(run.folder, goal_of(run.config))
    loss = record.get("valid_loss")
    held_out = f"held-out loss {loss:.4f}, " if loss is not None else ""
    return f"{record['step']:,} steps, {held_out}{format_seconds(record['seconds'])} of training"


def _submit(left: Sequence[_Run], machine: Machine, nodes: int, dry_run: bool = False) -> None:
    """A job for each run that is in no queue yet."""
    jobs = {} if dry_run else _queued()
    wanted = Wanted(nodes, machine.gpus_per_node, None, machine.time, None)
    for run in left:
        job = jobs.get(str(run.folder / "job.sh"))
        if job:
            print(f"{run.row.label}: in the queue already, as job {job}")
        else:
            submit(str(run.recipe), [], wanted, dry_run)


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


def _show(runs: Sequence[_Run], left: Sequence[_Run], machine: Machine, scoring: Scoring) -> None:
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


def _finetune(runs: Sequence[_Run], scoring: Scoring) -> None:
    """Each run, whatever becomes of the others; the first error is raised at the end."""
    errors = []
    for run in runs:
        print(f"\n{run.row.label}:")
        wanted = finetune.Wanted(scoring.tasks, scoring.data_dir, scoring.seeds)
        try:
            finetune.finetune(str(run.folder), wanted, out=None, cell=None, count=False)
        except UserError as error:
            errors.append(f"{run.row.label}: {error}")
    if errors:
        more = f" (and {len(errors) - 1} more of the runs)" if len(errors) > 1 else ""
        raise UserError(f"{errors[0]}{more}")


def _collect(ablation: Ablation, recipe: str, runs: Sequence[_Run], out: Path) -> None:
    lines = [read_line(run.row, run.config, run.folder) for run in runs]
    write_atomically(out / "ablation.csv", as_csv(lines))
    write_atomically(out / "ablation.md", as_markdown(lines, ablation.title, recipe))
    print(f"\n{ablation.title}: {out}\n{as_text(lines)}")
