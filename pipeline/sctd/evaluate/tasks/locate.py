"""Where a task's files are: in a folder of the user's, under the names that they usually have."""

import fnmatch
from pathlib import Path

from sctd.errors import UserError
from sctd.evaluate.tasks.task import Task

_FAMILIES = ("split-", "msr_paraphrase_")  # of files that belong together, by the beginnings of their names


def find_files(task: Task, split: str, data_dir: Path | None) -> list[Path]:
    """The files of a split, in the order of their names: one, or all that a pattern matches.

    Args:
        data_dir: the task's folder, or one that has it up to two levels below; None for a user's task whose files are
            beside its YAML.

    Raises:
        UserError: none is there.
    """
    folders = _folders(task, data_dir)
    for folder in folders:
        if found := _in_folder(folder, _names(task, split, folder)):
            return found
    where = " and ".join(map(str, folders))
    if data_dir and task.home is None and folders == [data_dir]:
        where += f" (it has no folder {' or '.join(task.folders)})"
    names = ", ".join(_names(task, split, folders[0]))
    advice = "put one of them there, or leave out --data-dir to read the hub's"
    if task.home is not None:
        advice = "correct files in its YAML, or --data-dir"
    raise UserError(f"{task.name}: no {split} rows: looked in {where} for {names}: {advice}")


def has_files(task: Task, split: str, data_dir: Path | None) -> bool:
    """Whether `find_files` would find any."""
    return any(_in_folder(folder, _names(task, split, folder)) for folder in _folders(task, data_dir))


def _names(task: Task, split: str, folder: Path) -> list[str]:
    """What the split's files may be called in a folder, the best first; the last are those of a clone of the hub's.

    Some training files go with dev files of their own alone: other ones that may be in the folder hold rows of theirs.
    """
    names = list(task.files.get(split, ()))
    if task.hub and split in task.hub.splits:
        pattern = f"{task.hub.splits[split]}-*.parquet"
        places = dict.fromkeys(["", "data/", f"{task.hub.config or 'plain_text'}/"])
        names += [f"{place}{pattern}" for place in places]
    if split == "train" or task.home is not None:
        return names
    training = _in_folder(folder, _names(task, "train", folder))
    family = next((each for each in _FAMILIES if training and training[0].name.lower().startswith(each)), "")
    return [name for name in names if name.startswith(family)]


def _folders(task: Task, data_dir: Path | None) -> list[Path]:
    """Folders to look in, the best first. All splits of a task of ours come from the first that has training rows."""
    if data_dir is not None and not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir}: no such folder: give the one that holds {task.title}")
    if task.home is not None:
        return [folder for folder in (data_dir, task.home) if folder]
    assert data_dir is not None
    below = _subfolders(data_dir)
    level_two = [folder for parent in below for folder in _subfolders(parent)]
    named = [folder for folder in (*below, *level_two) if _letters(folder.name) in task.folders]
    named.sort(key=lambda folder: task.folders.index(_letters(folder.name)))
    own = _letters(data_dir.resolve().name) in task.folders
    folders = [data_dir, *named] if own else [*named, data_dir]
    return next(([folder] for folder in folders if _in_folder(folder, _names(task, "train", folder))), folders)


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []


def _letters(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _in_folder(folder: Path, names: list[str]) -> list[Path]:
    """The files of the first name that is there; names of files are compared without regard to case."""
    for name in names:
        if (folder / name).is_file():
            return [folder / name]
        try:
            if "/" in name:
                found = list(folder.glob(name))
            else:
                found = [path for path in folder.iterdir() if fnmatch.fnmatchcase(path.name.lower(), name.lower())]
        except (OSError, ValueError, NotImplementedError):  # no folder to look into, or no pattern
            found = []
        if files := sorted(path for path in found if path.is_file()):
            return files
    return []
