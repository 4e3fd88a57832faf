"""A recipe as a batch job: `sctd slurm` writes the script into the run's folder, prints it and submits it."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sctd
from sctd.config import absolute_run
from sctd.corpus.manifest import read_manifest
from sctd.errors import RunError, UserError
from sctd.files import write_atomically
from sctd.train.command import asked_dir, read_command
from sctd.train.init import absolute_source
from sctd.train.keep.branch import find_parent
from sctd.train.keep.export import read_run
from sctd.train.keep.run_folder import check_run_dir, check_same_run, holds_run
from sctd.train.pretrain import check
from sctd.train.slurm import seconds_of

_ONE_WORD = re.compile(r"[^\s*?\"'\\$`]+")  # for a shell, without quotes
_WARNING = 600  # seconds before the limit at which ranks are told to save

SCRIPT = """#!/usr/bin/env bash
# Written by `sctd slurm`. Variables: slurm/job.sh.
#SBATCH --job-name={name}
#SBATCH --chdir={project}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={tasks}
{gpus}{cpus}#SBATCH --time={time}
#SBATCH --signal=USR1@{warning}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={log}

RECIPE={recipe}
BRANCH_FROM={parent}
CORPUS={corpus}
RUN={run_dir}
ARGS={arguments}
DEEPSPEED_CONFIG={deepspeed}
# shellcheck source=slurm/job.sh
. slurm/job.sh
"""


@dataclass(frozen=True)
class Allocation:
    """What the job asks SLURM for.

    Args:
        cpus_per_task: None: as many as the partition gives. time: as sbatch reads it. deepspeed_config: path of a JSON.
    """

    nodes: int
    gpus_per_node: int
    cpus_per_task: int | None
    time: str
    deepspeed_config: str | None


def submit(words: Sequence[str], branch_from: str | None, allocation: Allocation, dry_run: bool) -> None:
    """Write the script of a run to `run.dir`/job.sh, print it, and hand it to sbatch.

    Args:
        words, branch_from: as `read_command` takes them.

    Raises:
        UserError: whatever the job itself would refuse, and a missing sbatch or slurm folder.
        RunError: sbatch does not answer.
    """
    run_dir, script = _script(words, branch_from, allocation)
    if not dry_run and shutil.which("sbatch") is None:
        raise UserError("sbatch is not installed here: log in to a machine that submits jobs, or pass --dry-run")
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "job.sh"
    write_atomically(path, script)
    print(script)
    if dry_run:
        print(f"written to {path}; submit it with: sbatch {path}")
        return
    try:
        done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        raise RunError(f"sbatch does not answer ({error}): try again with: sbatch {path}") from None
    if done.returncode != 0:
        raise UserError(f"sbatch refused {path}: {' '.join(done.stderr.split())}")
    print(f"submitted as job {done.stdout.strip()}, its log: {run_dir / 'job.log'}")
    print(f"see its progress with: sctd status {run_dir}")


def limit_seconds(time: str) -> int:
    """Seconds of a time limit as sbatch reads it.

    Raises:
        UserError: not a time, or less than a minute.
    """
    seconds = seconds_of(time)
    if seconds is None:
        raise UserError(f"--time is {time!r}: write minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS")
    if seconds < 60:
        raise UserError(f"--time is {time!r}: give the job at least a minute")
    return seconds


def _script(words: Sequence[str], branch_from: str | None, allocation: Allocation) -> tuple[Path, str]:
    """The folder of the run, and the script of a job that it would not refuse."""
    run_dir = asked_dir(words, branch_from)
    resume = holds_run(run_dir)  # then the job continues that run
    words = [f"init.from={_source(word[10:], run_dir)}" if word.startswith("init.from=") else word for word in words]
    config = read_command(words, resume, branch_from).config
    if allocation.gpus_per_node < 0:
        raise UserError(f"--gpus-per-node is {allocation.gpus_per_node}: it must be at least 0")
    if not config.data.corpus:
        raise UserError("data.corpus is not set: pass data.corpus=FOLDER, made by `sctd prepare`")
    tasks = max(1, allocation.gpus_per_node)
    config, ds_config = check(config, allocation.deepspeed_config, allocation.nodes * tasks)
    run_dir = Path(config.run.dir).absolute()
    if check_run_dir(run_dir, resume):
        check_same_run(config, ds_config, run_dir)
    elif config.run.branch_from:
        find_parent(config, ds_config, read_manifest(Path(config.data.corpus)))
    recipe = words[0] if branch_from is None else ""
    own = [word for word in words if not word.startswith(("run.dir=", "data.corpus=")) and word != recipe]
    for word in own:
        if not _ONE_WORD.fullmatch(word):
            raise UserError(f"override {word!r} is more than one word for a shell: write it into a YAML recipe")
    values = {
        "name": run_dir.name,
        "project": _project(),
        "log": f"{run_dir}/job.log".replace("%", "%%"),
        "recipe": Path(recipe).absolute() if recipe.endswith((".yaml", ".yml")) else recipe,
        "parent": absolute_run(branch_from) if branch_from else "",
        "corpus": Path(config.data.corpus).absolute(),
        "run_dir": run_dir,
        "arguments": " ".join(own),
        "deepspeed": Path(allocation.deepspeed_config).absolute() if allocation.deepspeed_config else "",
    }
    script = SCRIPT.format(
        **{name: shlex.quote(str(value)) for name, value in values.items()},
        nodes=allocation.nodes,
        tasks=tasks,
        gpus=f"#SBATCH --gpus-per-node={allocation.gpus_per_node}\n" if allocation.gpus_per_node else "",
        cpus=f"#SBATCH --cpus-per-task={allocation.cpus_per_task}\n" if allocation.cpus_per_task else "",
        time=allocation.time,
        warning=min(_WARNING, limit_seconds(allocation.time) // 3),
    )
    return run_dir, script


def _source(name: str, run_dir: Path) -> str:
    """`init.from` with its full path, as above; a run that was started from that source has its name already."""
    stored = read_run(run_dir).init.from_ if holds_run(run_dir) else ""
    source = absolute_source(name)
    return stored if absolute_source(stored) == source else source


def _project() -> Path:
    """The folder with slurm/job.sh: the current one, or that of the package's source."""
    for folder in (Path.cwd(), Path(sctd.__file__).parents[2]):
        if (folder / "slurm" / "job.sh").is_file():
            return folder
    raise UserError("there is no slurm/job.sh here: change to the folder of the project")
