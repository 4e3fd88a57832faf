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
from sctd.errors import EXIT_BAD_INPUT, EXIT_FAILED, RunError, UserError
from sctd.files import append_json_line, read_json_lines
from sctd.train.engine.distributed import World
from sctd.train.keep.checkpoint import Progress

_FILE = "attempts.jsonl"
_SLURM = {"job": "SLURM_JOB_ID", "restart": "SLURM_RESTART_COUNT"}


@dataclass
class Attempt:
    """Where one job is, as it tells the file.

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
        self._write({"start": _now(), "step": progress.step, "ranks": ranks, **job, **place, "version": __version__})

    def end(self) -> None:
        if self.progress is not None:
            self._write({"end": _now(), "step": self.progress.step, "code": self.code})

    def _write(self, line: dict[str, Any]) -> None:
        if self.active:
            # A full disk is no reason to lose what else there is to say.
            with contextlib.suppress(OSError):
                append_json_line(self.run_dir / _FILE, line)


@contextmanager
def attempt(run_dir: Path, world: World) -> Iterator[Attempt]:
    """The attempt of this process at the run; its end is written however it leaves, if it leaves at all."""
    this = Attempt(run_dir, world.is_main)
    try:
        yield this
    except UserError:
        this.code = EXIT_BAD_INPUT
        raise
    except (RunError, OSError):
        this.code = EXIT_FAILED
        raise
    finally:
        this.end()


def read_attempts(run_dir: Path) -> list[dict[str, Any]]:
    """Oldest first: what each said at its start, and under `ended` what it said at its end, if it came to one."""
    found: list[dict[str, Any]] = []
    for record in read_json_lines(run_dir / _FILE):
        if record.keys() >= {"start", "step", "ranks", "host", "pid"}:
            found.append(record)
        elif record.keys() >= {"end", "step", "code"} and found:
            found[-1]["ended"] = record
    return found


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
