"""The chain of jobs that a run is made of: a line in `attempts.jsonl` when one starts on it, and one when it ends."""

import contextlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sctd import __version__
from sctd.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, RunError, UserError
from sctd.files import append_json_line, read_json_lines
from sctd.train.engine.distributed import World
from sctd.train.keep.checkpoint import Progress

_FILE = "attempts.jsonl"
_SLURM = {"job": "SLURM_JOB_ID", "restart": "SLURM_RESTART_COUNT"}


@dataclass
class Attempt:
    """Where one job is.

    Args:
        progress: of the training, which moves it on. code: the exit code that it is about to end with.
    """

    run_dir: Path
    active: bool
    progress: Progress | None = None
    code: int = 1

    def begin(self, progress: Progress, ranks: int) -> None:
        """When the run is about to train from there on."""
        self.progress = progress
        job = {key: os.environ[name] for key, name in _SLURM.items() if name in os.environ}
        place = {"host": socket.gethostname(), "pid": os.getpid()}
        self.write({"start": _now(), "step": progress.step, "ranks": ranks, **job, **place, "version": __version__})

    def end(self, code: int) -> None:
        """When the process is about to end; what is said first counts."""
        if self.progress is not None:
            self.write({"end": _now(), "step": self.progress.step, "code": code})
        self.active = False

    def write(self, line: dict[str, Any]) -> None:
        if self.active:
            with contextlib.suppress(OSError):  # a full disk must not hide the error that ended the job
                append_json_line(self.run_dir / _FILE, line)


@contextmanager
def attempt(run_dir: Path, world: World) -> Iterator[Attempt]:
    """The attempt of this process at the run; its end is written however it ends, unless it is killed."""
    this = Attempt(run_dir, world.is_main)
    try:
        yield this
    except (UserError, RunError, OSError) as error:
        this.code = EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_FAILED
        raise
    except KeyboardInterrupt:
        this.code = EXIT_INTERRUPTED
        raise
    finally:
        this.end(this.code)


def read_attempts(run_dir: Path) -> list[dict[str, Any]]:
    """Oldest first: the line of each start, with the line of its end, if there is one, under `ended`."""
    found: list[dict[str, Any]] = []
    for record in read_json_lines(run_dir / _FILE):
        if record.keys() >= {"start", "step", "ranks", "host", "pid"}:
            found.append(record)
        elif record.keys() >= {"end", "step", "code"} and found:
            found[-1]["ended"] = record
    return found


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
