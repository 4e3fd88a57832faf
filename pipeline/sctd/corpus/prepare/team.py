"""Who does the work: this process, processes of this machine (`--workers`), or the ranks of an MPI job.

All of them do a stage the same way: each takes the next item that nobody has taken, by making a claim file, so that
fast ranks do more and nothing has to be distributed. The files also tell which item a rank was working at when it died.
"""

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

from sctd.errors import RunError, UserError

T = TypeVar("T")
_GLANCE = 5.0  # seconds between looks at whether another rank has failed
_FAILED = "failed"  # a file among the claims: a rank has failed, the others stop
_PR_SET_PDEATHSIG = 1


class Task(Protocol):
    """The work of a stage, done item by item in any order on any rank; travels to the workers by pickle."""

    def title(self, item: int) -> str:
        """The item in words, for messages."""

    def __call__(self, item: int, rank: "Rank") -> None:
        """Do one item. UserError for bad input; what it writes must tell whether it is finished."""


class Rank:
    """One of those that work at a stage."""

    def __init__(self, name: str, claims: Path, log: Callable[[str], Any]) -> None:
        self.name = name
        self.log = log
        self._claims = claims
        self._next_look = 0.0
        self._at = ""  # the item under way, in words

    def work(self, items: Sequence[int], task: Task) -> None:
        """Do all items that nobody else takes. Raises what the task raises, and tells the others to stop."""
        for item in items:
            self.look_around()
            self._at = task.title(item)
            try:
                if self._claim(item):
                    task(item, self)
            except _Abandoned:
                raise
            except BaseException as error:
                with contextlib.suppress(OSError):  # the disk may be full
                    (self._claims / _FAILED).touch()
                if not isinstance(error, OSError):
                    raise
                file = f" {error.filename}" if error.filename else ""
                raise UserError(
                    f"{self._at}:{file} {error.strerror or error}: fix that, or free space, and start again; "
                    "finished work is kept"
                ) from error

    def outcome(self, items: Sequence[int], task: Task) -> UserError | RunError | None:
        """`work`, returning the error for the user. What is not the user's fault also gets a stack trace on stderr."""
        try:
            self.work(items, task)
        except _Abandoned:
            pass
        except (UserError, RunError) as error:
            return error
        except Exception as error:
            traceback.print_exc()
            return RunError(f"rank {self.name} failed at {self._at}: {type(error).__name__}: {error}")
        return None

    def look_around(self) -> None:
        """To be called every now and then: ends the work here if another rank has failed."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _GLANCE
            if (self._claims / _FAILED).exists():
                raise _Abandoned

    def _claim(self, item: int) -> bool:
        try:
            with (self._claims / f"{item:06d}").open("x", encoding="utf-8") as file:
                file.write(self.name)
            return True
        except FileExistsError:
            return False


class _Abandoned(Exception):
    """Another rank has failed."""


def _clear(claims: Path) -> None:
    claims.mkdir(parents=True, exist_ok=True)
    for path in claims.iterdir():
        path.unlink()


def left_behind(claims: Path) -> dict[int, str]:
    """Items that were claimed, and by whom; those that are not finished were under way when a job ended."""
    found = {}
    for path in claims.iterdir() if claims.is_dir() else []:
        if path.name.isdecimal():
            with contextlib.suppress(OSError):
                found[int(path.name)] = path.read_text(encoding="utf-8")
    return found


class Team:
    """This process alone; the others are made like it."""

    size = 1

    def __init__(self, log: Callable[[str], Any] = print) -> None:
        self.log = log

    def main(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises on the first rank, on all of them."""
        return function()

    def same(self, what: str, value: Mapping[str, str]) -> None:
        """UserError, on all ranks, if one of them has another value."""

    def each(self, items: Sequence[int], task: Task, claims: Path) -> None:
        """Do every item once. UserError for bad input that any rank found, RunError for a rank that died."""
        _clear(claims)
        Rank("0", claims, self.log).work(items, task)


class Workers(Team):
    """So many processes of this machine."""

    def __init__(self, size: int, log: Callable[[str], Any] = print) -> None:
        super().__init__(log)
        self.size = size

    def each(self, items: Sequence[int], task: Task, claims: Path) -> None:
        _clear(claims)
        context = multiprocessing.get_context("spawn")
        workers: dict[Any, tuple[int, Any]] = {}  # by the pipe for a worker's log lines and its error
        try:
            for number in range(min(self.size, max(1, len(items)))):
                reading, writing = context.Pipe(duplex=False)
                arguments = (number, list(items), task, claims, writing, os.getpid())
                process = context.Process(target=_worker, args=arguments, daemon=True)
                _start(process)
                writing.close()
                workers[reading] = number, process
            talking = set(workers)
            while talking:
                ready: list[Any] = wait(talking)
                for pipe in ready:
                    try:
                        message = pipe.recv()
                    except EOFError:  # it has ended
                        talking.discard(pipe)
                        _check_end(*workers[pipe], task, claims)
                        continue
                    if isinstance(message, Exception):
                        raise message
                    self.log(message)
        finally:
            for _, process in workers.values():
                process.kill()
                process.join()


def _start(process: Any) -> None:
    """With the signals of a terminal or scheduler blocked in it, from its first moment: they are for the parent."""
    resource_tracker.ensure_running()  # else `start` begins with it, which unblocks them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP, signal.SIGTERM})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _check_end(number: int, process: Any, task: Task, claims: Path) -> None:
    """RunError unless a worker has ended well."""
    process.join()
    if (code := process.exitcode) == 0:
        return
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    at = [item for item, name in sorted(left_behind(claims).items()) if name == str(number)]
    where = f" at {task.title(at[-1])}" if at else ""
    raise RunError(f"worker {number} {how}{where}: start again to continue, finished work is kept")


def _worker(number: int, items: list[int], task: Task, claims: Path, pipe: Any, parent: int) -> None:
    # The parent may be killed without a chance to end its workers.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # each worker tokenizes on one thread
    problem = Rank(str(number), claims, pipe.send).outcome(items, task)
    if problem is not None:
        pipe.send(problem)
        sys.exit(1)


class Mpi(Team):
    """The ranks of an MPI job."""

    def __init__(self, log: Callable[[str], Any] = print) -> None:
        try:
            import mpi4py

            mpi4py.rc.finalize = False
            from mpi4py import MPI
        except ImportError as error:
            hint = "build mpi4py against the MPI that starts the job: pip install mpi4py"
            raise UserError(f"started by MPI, but mpi4py cannot be imported ({error}): {hint}") from None
        self._comm = MPI.COMM_WORLD
        self.size, self.rank = self._comm.Get_size(), self._comm.Get_rank()
        self.name = f"{self.rank} ({socket.gethostname()})"
        self._failed = False
        atexit.register(self._leave, MPI.Finalize)
        super().__init__(log)

    def _leave(self, finalize: Callable[[], None]) -> None:
        """Finalizing waits for all ranks. After a failure the first has to end alone: once it has printed the error,
        the launcher ends the others before each of them prints the same."""
        if not self._failed:
            finalize()

    def _fail(self, error: Exception) -> NoReturn:
        self._failed = True
        raise error

    def main(self, function: Callable[[], T]) -> T:
        answer: tuple[Any, Exception | None] = (None, None)
        if self.rank == 0:
            try:
                answer = (function(), None)
            except Exception as error:
                answer = (None, error)
                if not isinstance(error, UserError | RunError | OSError):
                    traceback.print_exc()
        value, problem = self._comm.bcast(answer, root=0)
        if problem is not None:
            self._fail(problem)
        return value

    def same(self, what: str, value: Mapping[str, str]) -> None:
        (first, mine), *others = self._comm.allgather((self.name, dict(value)))
        for name, other in others:
            for key in mine:
                if other.get(key) != mine[key]:
                    found = f"rank {name} has {key} {other.get(key)}, rank {first} has {mine[key]}"
                    self._fail(UserError(f"{found}: use the same {what} on all ranks"))

    def each(self, items: Sequence[int], task: Task, claims: Path) -> None:
        self.main(lambda: _clear(claims))
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # each rank tokenizes on one thread
        problems = self._comm.allgather(Rank(self.name, claims, self.log).outcome(items, task))
        for problem in filter(None, problems):
            self._fail(problem)


def team(workers: int | None, environ: Mapping[str, str], log: Callable[[str], Any] = print) -> Team:
    """The team that this process was started in.

    Raises:
        UserError: `workers` under MPI, or ranks that know nothing of each other.
    """
    tasks = max(int(environ.get(name) or 1) for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"))
    if tasks > 1:
        if workers is not None:
            raise UserError("--workers: this job has several ranks already, leave it out")
        found = Mpi(log)
        if found.size == 1:
            raise UserError(
                f"{tasks} tasks were started that do not know each other: use `srun --mpi=pmix` or mpirun, and an "
                "mpi4py that was built for that MPI"
            )
        return found
    return Team(log) if workers in (None, 1) else Workers(workers, log)
