"""A task's rows from the Hugging Face hub, by `datasets`, which keeps them on this machine."""

from collections.abc import Iterator
from typing import Any

from sctd.errors import UserError
from sctd.evaluate.tasks.tables import Record, Table, named_classes, with_names
from sctd.evaluate.tasks.task import Task

_BATCH_ROWS = 1000


def open_hub(task: Task, split: str) -> Table:
    """The records of a split, with classes by their names where the hub knows them.

    Raises:
        UserError: the hub has none, or cannot be reached.
    """
    import datasets

    hub = task.hub
    assert hub is not None
    if split not in hub.splits:
        raise UserError(f"{task.name}: {hub.id} has no split for {split}: give --data-dir with the task's files")
    try:
        found = datasets.load_dataset(hub.id, hub.config, split=hub.splits[split], revision=hub.revision)
    except Exception as error:  # the hub client raises from a dozen unrelated classes
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(
            f"{task.name}: {hub.id} cannot be read from the hub ({reason}): give --data-dir with the task's files"
        ) from None
    return Table(hub.id, "row", _records(found))


def _records(found: Any) -> Iterator[tuple[int, Record]]:
    classes = named_classes(found.features)
    number = 0
    for batch in found.iter(_BATCH_ROWS):
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield number, with_names(dict(zip(batch, values, strict=True)), classes)
