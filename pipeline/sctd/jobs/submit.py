"""A recipe as a batch job: `sctd slurm` writes the script beside the run, prints it and submits it."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sctd
from sctd.config import load_config
from sctd.errors import RunError, UserError
from sctd.files import write_atomically
from sctd.train.keep.run_folder import check_run_dir, check_same_run
from sctd.train.pretrain import check

_TIME = re.compile(r"((\d+)-)?(\d+)(:(\d+))?(:(\d+))?", re.ASCII)
_PLAIN = re.compile(r"[^\s*?\"'\\$`]+")  # what a shell takes as one word, as it stands
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
CORPUS={corpus}
RUN={run_dir}
ARGS={arguments}
DEEPSPEED_CONFIG={deepspeed}
# shellcheck source=slurm/job.sh
. slurm/job.sh
"""


@dataclass(frozen=True)
class Wanted:
    """What the job asks SLURM for.

    cpus_per_task: None for what the partition gives. time: as sbatch reads it. deepspeed_config: path of a JSON.
    """

    nodes: int
    gpus_per_node: int
    cpus_per_task: int | None
    time: str
    deepspeed_config: str | None


def submit(recipe: str, overrides: Sequence[str], wanted: Wanted, dry_run: bool) -> None:
    """Write the script of a recipe to `run.dir`/job.sh, print it, and hand it to sbatch.

    Raises:
        UserError: whatever the job itself would refuse, and a missing sbatch or slurm folder.
        RunError: sbatch does not answer.
    """
    run_dir, script = _script(recipe, overrides, wanted)
    if not dry_run and shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here: log in where jobs are submitted, or pass --dry-run")
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
    print(f"look at it with: sctd status {run_dir}")


def _script(recipe: str, overrides: Sequence[str], wanted: Wanted) -> tuple[Path, str]:
    config = load_config(recipe, overrides)
    if wanted.gpus_per_node < 0:
        raise UserError(f"--gpus-per-node is {wanted.gpus_per_node}: it must be at least 0")
    if not config.data.corpus:
        raise UserError("data.corpus is not set: pass data.corpus=FOLDER, made by `sctd prepare`")
    tasks = max(1, wanted.gpus_per_node)
    config, ds_config = check(config, wanted.deepspeed_config, wanted.nodes * tasks)
    run_dir = Path(config.run.dir).absolute()
    resume = (run_dir / "config.yaml").exists()  # then the job continues it
    check_run_dir(run_dir, resume)
    if resume:
        check_same_run(config, ds_config, run_dir)
    own = [word for word in overrides if not word.startswith(("run.dir=", "data.corpus="))]
    for word in own:
        if not _PLAIN.fullmatch(word):
            raise UserError(f"override {word!r} is more than one word for a shell: write it into a YAML recipe")
    project = _project()
    values = {
        "recipe": Path(recipe).absolute() if recipe.endswith((".yaml", ".yml")) else recipe,
        "corpus": Path(config.data.corpus).absolute(),
        "run_dir": run_dir,
        "project": project,
        "arguments": " ".join(own),
        "deepspeed": Path(wanted.deepspeed_config).absolute() if wanted.deepspeed_config else "",
    }
    quoted = {name: shlex.quote(str(value)) for name, value in values.items()}
    seconds = limit_seconds(wanted.time)
    script = SCRIPT.format(
        **quoted,
        name=shlex.quote(run_dir.name),
        nodes=wanted.nodes,
        tasks=tasks,
        gpus=f"#SBATCH --gpus-per-node={wanted.gpus_per_node}\n" if wanted.gpus_per_node else "",
        cpus=f"#SBATCH --cpus-per-task={wanted.cpus_per_task}\n" if wanted.cpus_per_task else "",
        log=shlex.quote(f"{run_dir}/job.log".replace("%", "%%")),
        time=wanted.time,
        warning=min(_WARNING, seconds // 3),
    )
    return run_dir, script


def _project() -> Path:
    """The folder with slurm/job.sh: here, or where the package's source is."""
    for folder in (Path.cwd(), Path(sctd.__file__).parents[2]):
        if (folder / "slurm" / "job.sh").is_file():
            return folder
    raise UserError("there is no slurm/job.sh here: call this in the project's folder")


def limit_seconds(time: str) -> int:
    """Of a time as sbatch reads it: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    found = _TIME.fullmatch(time)
    if not found:
        raise UserError(f"--time is {time!r}: write minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS")
    days, one, two, three = (int(found[group] or 0) for group in (2, 3, 5, 7))
    if found[1]:
        seconds = 86400 * days + 3600 * one + 60 * two + three
    elif found[7]:
        seconds = 3600 * one + 60 * two + three
    else:
        seconds = 60 * one + two
    if seconds < 60:
        raise UserError(f"--time is {time!r}: give the job a minute at least")
    return seconds
