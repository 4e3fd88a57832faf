"""What a process does when it is asked to end: by Ctrl-C (SIGINT), a closed terminal (SIGHUP), a scheduler (SIGTERM,
SIGUSR1).

| stage | a signal | Ctrl-C again |
|---|---|---|
| WORK | interrupts the main thread, which tidies up; the process ends with 130 | ends the process |
| START | ends the process: with 75 for a scheduler, which is to start it again, else with 130 | |
| TRAIN | is noted: the loop saves at the end of the step, and the process ends with 75 | ends the process with 130 |
| FINISH | SIGINT, SIGHUP: as in WORK; a scheduler's is noted, since little is left to do | ends the process |

One Ctrl-C arrives more than once, because the terminal sends SIGINT to every process in the foreground, and launchers
pass on what they get:

    torchrun   its ranks have sessions of their own, without the terminal: it sends them SIGINT, at the second
               Ctrl-C SIGTERM, and SIGKILL 30 s later (--shutdown-timeout)
    deepspeed  SIGINT of the terminal, milliseconds later SIGTERM to the first rank, to the next one once that has
               ended, and SIGKILL to each 30 s later
    mpirun     SIGTERM after a second, SIGKILL after another one (--mca odls_base_sigkill_timeout SECONDS)
    srun       nothing; if pressed twice within a second SIGINT and at once SIGKILL, which leaves no time for a save

So `again` means a SIGINT that comes a second or more after the first one, or, under torchrun, a SIGTERM.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum, auto
from threading import Lock, Thread
from types import FrameType
from typing import NoReturn

import psutil

from sctd.errors import EXIT_INTERRUPTED, EXIT_STOPPED
from sctd.files import remove_unfinished

_USERS = (signal.SIGINT, signal.SIGHUP)
_SCHEDULERS = (signal.SIGTERM, signal.SIGUSR1)
_OURS = frozenset({*_USERS, *_SCHEDULERS})
_AGAIN = 1.0  # seconds
_PATIENCE = 5.0  # seconds for the main thread to tidy up; it may be deep in a library that does not return


class Stage(Enum):
    """What the process is at: the table above."""

    WORK = auto()
    START = auto()
    TRAIN = auto()
    FINISH = auto()


class Mailbox:
    """The signals that this process has received, and what is done about them.

    A thread reads them from a socket that the interpreter writes to, so that they are heard while the main thread
    waits in a library: for other ranks, or for a vocabulary to be learned.

    Args:
        stage: whoever goes on to another one sets it. speaks: prints; of the ranks of a job, one does.

    Attributes:
        kept: what is kept and how to go on, for the line that the process ends with.
        signals: names of those that were noted, in order.
        noted, ending: called by the thread: after the first signal in TRAIN, before the process is ended at once.
    """

    def __init__(self, stage: Stage = Stage.START, speaks: bool = True) -> None:
        self.stage, self.kept, self._speaks = stage, "", speaks
        self.signals: list[str] = []
        self.noted: Callable[[], None] = lambda: None
        self.ending: Callable[[], None] = lambda: None
        self._pressed: float | None = None  # when the first SIGINT came
        self._interrupted, self._by = False, ""
        self._ended = Lock()
        self._terminals: list[int] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While it lasts, signals come here; those that were ignored when the process started (nohup) stay ignored."""
        numbers = [number for number in _OURS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
        before = {number: signal.signal(number, self._in_main) for number in numbers}
        self._terminals = [descriptor for descriptor in (0, 1, 2) if os.isatty(descriptor)]
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        thread = Thread(target=self._listen, args=(ours,), name="sctd-signals", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            if self._interrupted:  # this is the interrupt, or what a library has made of it
                self._end(EXIT_INTERRUPTED, self._line)
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            theirs.close()
            thread.join()
            ours.close()

    def _interrupts(self, number: int) -> bool:
        """Whether the signal interrupts the main thread."""
        return self.stage is Stage.WORK or self.stage is Stage.FINISH and number in _USERS

    def _in_main(self, number: int, frame: FrameType | None) -> None:
        if self._interrupts(number) and not self._interrupted:
            self._interrupted, self._by = True, signal.Signals(number).name
            if _imports(frame):  # which may swallow an exception
                remove_unfinished()
                self._end(EXIT_INTERRUPTED, self._line)
            raise KeyboardInterrupt

    def _listen(self, pipe: socket.socket) -> None:
        with suppress(TimeoutError):
            while heard := pipe.recv(64):
                for number in sorted(_OURS.intersection(heard)):  # what came at once, in any order: the user's first
                    self._hear(signal.Signals(number))
                    if self._interrupts(number):
                        pipe.settimeout(_PATIENCE)
            return
        self._end(EXIT_INTERRUPTED, self._line)

    def _hear(self, number: signal.Signals) -> None:
        if number is signal.SIGHUP:
            self._leave_terminal()
        self._by = self._by or number.name
        if self._again(number):
            self._end(EXIT_INTERRUPTED, self._line)
        if self.stage is Stage.START:
            code = EXIT_STOPPED if number in _SCHEDULERS else EXIT_INTERRUPTED
            self._end(code, f"stopped on request ({number.name}) before the first step: start again")
        if self._interrupts(number):
            return
        self.signals.append(number.name)
        if self.stage is Stage.TRAIN and len(self.signals) == 1:
            if sys.stderr is not None and sys.stderr.isatty():
                self._say(f"{number.name}: ends when this step is saved; Ctrl-C again ends it at once")
            self.noted()

    def _again(self, number: signal.Signals) -> bool:
        now = time.monotonic()
        if self._pressed is None:
            self._pressed = now if number is signal.SIGINT else None
            return False
        counts = number is signal.SIGINT or number is signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ
        return counts and now - self._pressed >= _AGAIN

    def _leave_terminal(self) -> None:
        """Print nowhere if the terminal is gone: each line would be an error."""
        for descriptor in self._terminals:
            if not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_RDWR)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)

    @property
    def _line(self) -> str:
        return f"interrupted ({self._by})" + (f"; {self.kept}" if self.kept else "")

    def _end(self, code: int, line: str) -> NoReturn:
        """End the process, whatever other threads, other ranks and exit handlers wait for."""
        self._ended.acquire()  # the other thread may be here too
        with suppress(Exception):
            self.ending()
        with suppress(Exception):  # a closed stream
            sys.stdout.flush()
        self._say(line)
        os._exit(code)

    def _say(self, line: str) -> None:
        if self._speaks:
            with suppress(Exception):
                start = "\n" if sys.stderr.isatty() else ""  # behind ^C, or a bar
                print(f"{start}sctd: {line}", file=sys.stderr, flush=True)


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported there."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def kill_tree(process: int) -> None:
    """SIGKILL to a process and all its descendants, at one moment."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process)
        for one in [parent, *parent.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()


def _in_child() -> None:
    """A forked process shares the socket: its signals would be heard here."""
    for number in _OURS:
        if isinstance(getattr(signal.getsignal(number), "__self__", None), Mailbox):
            signal.signal(number, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_in_child)
