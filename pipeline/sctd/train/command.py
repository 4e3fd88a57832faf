"""What the command line of a training asks for: a new run, one that goes on, or a branch of one."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sctd.config import Config, load_config, parse_run, run_dir_of
from sctd.errors import UserError
from sctd.train.init import load_sized
from sctd.train.keep.export import read_run
from sctd.train.keep.run_folder import branch_of, holds_run, read_overrides

_OVERRIDE = re.compile(r"[\w.]*=")
# Where a run stopped, and how it began.
_NOT_INHERITED: tuple[str, ...] = ("train.stop_at=null", "objective.importance_warmup=null")


@dataclass(frozen=True)
class Command:
    """The configuration, and the overrides that make it of the recipe: those of earlier commands on the run first."""

    config: Config
    overrides: list[str]


def read_command(words: Sequence[str], resume: bool = False, branch_from: str | None = None) -> Command:
    """The configuration that a command line asks for.

    Where a run goes on (`resume`), the overrides that it was started with are repeated before those of the command
    line. A branch has the configuration of its parent, and the overrides of the command line.

    Args:
        words: a recipe, which a branch has not, and overrides.

    Raises:
        UserError: unknown recipe, key, value or parent; a recipe too many or too few; a branch without a run.dir.
    """
    if branch_from is not None:
        if _has_recipe(words):
            raise UserError(
                f"--branch-from {branch_from}: a branch has the settings of that run: leave out the recipe {words[0]}, "
                "and pass what changes as section.key=value"
            )
        return _branch(branch_from, words, resume)
    if not _has_recipe(words):
        raise UserError("the recipe is missing: name a shipped one (`sctd pretrain --help` lists them) or a YAML file")
    recipe, *overrides = words
    if resume:
        run_dir = run_dir_of(recipe, overrides)
        if holds_run(run_dir):
            overrides = [*read_overrides(run_dir), *overrides]
        elif parent := branch_of(run_dir):
            raise UserError(
                f"--resume: the branch of {parent} in {run_dir} was not finished: repeat its command with --branch-from"
            )
    return Command(load_sized(recipe, overrides, resume), overrides)


def asked_dir(words: Sequence[str], branch_from: str | None) -> Path:
    """The folder of the run that a command line asks for, whatever else it says; without a recipe the current one.

    Raises:
        UserError: unknown recipe; a branch without a run.dir.
    """
    if branch_from is None:
        return run_dir_of(words[0], words[1:]) if _has_recipe(words) else Path()
    given = [word.removeprefix("run.dir=") for word in words if word.startswith("run.dir=")]
    if not given or not given[-1]:
        raise UserError(f"--branch-from {branch_from}: a branch is a run of its own: pass run.dir=FOLDER")
    return Path(given[-1])


def _has_recipe(words: Sequence[str]) -> bool:
    return bool(words) and not _OVERRIDE.match(words[0])


def _branch(asked: str, overrides: Sequence[str], resume: bool) -> Command:
    (run_dir, _), own, reset = parse_run(asked), asked_dir(overrides, asked), _NOT_INHERITED
    if own.resolve() == run_dir.resolve():
        raise UserError(f"--branch-from {asked}: run.dir is that run's own folder: choose another one")
    if resume and holds_run(own):
        run_dir, reset = own, _NOT_INHERITED[:1]  # the branch goes on, though its parent may be gone
    read_run(run_dir)  # refuses what is no run
    config = load_config(str(run_dir / "config.yaml"), [*reset, *overrides])
    config = replace(config, run=replace(config.run, branch_from=asked))
    return Command(config, [*read_overrides(run_dir), *overrides])
