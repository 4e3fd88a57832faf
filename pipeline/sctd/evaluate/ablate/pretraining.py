"""Pretraining runs as processes of their own, one after the other, that are stopped when this one is."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from sctd.errors import EXIT_STOPPED
from sctd.files import free_port
from sctd.signals import Mailbox, Stage, kill_tree

# What another job's launcher says of this process: a run of ours is no rank of that job.
_OTHER_JOBS = ("SLURM_", "OMPI_", "PMI")
_ENDED = (-signal.SIGTERM, 256 - signal.SIGTERM)  # by SIGTERM: the process itself, and as deepspeed tells it


def words(recipe: Path, ranks: int, resume: bool) -> list[str]:
    """The command of a run, as a user would write it."""
    launcher = ["deepspeed", "--num_accelerators", str(ranks), "--module"] if ranks > 1 else []
    return [*launcher, "sctd", "pretrain", str(recipe), *(["--resume"] if resume else [])]


class Pretraining:
    """Runs one at a time. What this process is asked for meanwhile, the run is asked for."""

    def __init__(self) -> None:
        self._mailbox = Mailbox(Stage.TRAIN)
        self._mailbox.noted, self._mailbox.ending = self._stop, self._kill
        self._mailbox.kept = "the run is killed: call it again to continue from its last save"
        self._running: tuple[subprocess.Popen[bytes], int] | None = None  # and its number of ranks

    @property
    def stopping(self) -> bool:
        """Whether a signal asked for it; no further run is started."""
        return bool(self._mailbox.signals)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While it lasts, signals make the run under way save and stop; Ctrl-C again kills it."""
        with self._mailbox.listening():
            yield

    def run(self, recipe: Path, ranks: int, resume: bool, log: Path) -> int:
        """Train to the end, or to the stop; the exit code. What the run says is appended to `log`."""
        if self.stopping:
            return EXIT_STOPPED
        first, *rest = words(recipe, ranks, resume)
        launched = ["sctd", *rest]  # with this interpreter, whatever PATH says
        if first == "deepspeed":  # another job may hold the usual port
            launched = ["deepspeed.launcher.runner", "--master_port", str(free_port()), *rest]
        with log.open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", *launched],
                env={name: value for name, value in os.environ.items() if not name.startswith(_OTHER_JOBS)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,  # Ctrl-C is for this process, which passes it on as SIGTERM
            )
        self._running = process, ranks
        if self.stopping:  # since the look above
            _ask_to_stop(process, ranks)
        code = process.wait()
        self._running = None
        return EXIT_STOPPED if self.stopping and code in _ENDED else code

    def _stop(self) -> None:
        if self._running is not None:
            _ask_to_stop(*self._running)

    def _kill(self) -> None:
        if self._running is not None:
            kill_tree(self._running[0].pid)


def _ask_to_stop(process: "subprocess.Popen[bytes]", ranks: int) -> None:
    """SIGTERM to the ranks themselves: their launcher would not wait for them to save."""
    with suppress(psutil.NoSuchProcess):
        asked = [psutil.Process(process.pid)]
        if ranks > 1:
            asked += asked[0].children()  # deepspeed's launcher of this machine, below that of all machines
            asked = [rank for launcher in asked[1:] for rank in launcher.children()] or asked
        for one in asked:
            with suppress(psutil.NoSuchProcess):
                one.terminate()
