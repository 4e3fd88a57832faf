"""Who does the work: this process, processes of this machine (`--workers`), or the ranks of an MPI job.

All of them do a stage the same way: each takes the next item that nobody has taken, by making a claim file, so that
the fast do more and nothing has to be dealt out. The files also tell who was at what when a rank died.
"""

import atexit
import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sctd.errors import RunError, UserError

T = TypeVar("T")
_GLANCE = 5.0  # seconds between looks at whether another rank has failed
_MARKER = "failed.json"
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

    def work(self, items: Sequence[int], task: Task) -> None:
        """Do all items that nobody else takes. Raises what the task raises, having told the others."""
        for item in items:
            self.look_around()
            try:
                if self._claim(item):
                    task(item, self)
            except _Abandoned:
                raise
            except OSError as error:
                file = f" {error.filename}" if error.filename else ""
                problem = UserError(
                    f"{task.title(item)}:{file} {error.strerror or error}: mend it, or free space, and start again; "
                    "what is finished is kept"
                )
                self._tell(problem, "")
                raise problem from error
            except BaseException as error:
                self._tell(error, task.title(item))
                raise

    def look_around(self) -> None:
        """To be called every now and then: ends the work here where another rank has failed."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _GLANCE
            if (self._claims / _MARKER).exists():
                raise _Abandoned

    def _claim(self, item: int) -> bool:
        try:
            with (self._claims / f"{item:06d}").open("x", encoding="utf-8") as file:
                file.write(self.name)
            return True
        except FileExistsError:
            return False

    def _tell(self, error: BaseException, title: str) -> None:
        if isinstance(error, UserError):
            kind, message = "user", str(error)
        else:
            kind, message = "run", f"rank {self.name} failed at {title}: {type(error).__name__}: {error}"
            if isinstance(error, Exception) and not isinstance(error, RunError):
                traceback.print_exc()
        # Where the disk is full, MPI or a worker's pipe has to tell.
        with contextlib.suppress(OSError):
            hidden = self._claims / f".{_MARKER}.{os.getpid()}"
            hidden.write_text(json.dumps({"kind": kind, "message": message}), encoding="utf-8")
            os.replace(hidden, self._claims / _MARKER)


class _Abandoned(Exception):
    """Another rank has failed."""


def _told(claims: Path) -> Exception | None:
    """The error that a rank has left word of."""
    try:
        told = json.loads((claims / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return UserError(told["message"]) if told["kind"] == "user" else RunError(told["message"])


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
        """UserError, on all ranks, where one of them has another value."""

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
        # What a worker has to say comes through its pipe, so that lines stay whole and `log` may be anything.
        ends = [context.Pipe(duplex=False) for _ in range(min(self.size, max(1, len(items))))]
        with one_thread_each():
            team = [
                context.Process(target=_worker, args=(number, list(items), task, claims, end, os.getpid()), daemon=True)
                for number, (_, end) in enumerate(ends)
            ]
            for process, (_, end) in zip(team, ends, strict=True):
                process.start()
                end.close()
        try:
            self._watch(team, [reading for reading, _ in ends], task, claims)
        finally:
            for process in team:
                process.kill()
                process.join()

    def _watch(self, team: Sequence[Any], pipes: Sequence[Any], task: Task, claims: Path) -> None:
        talking = dict(zip(pipes, range(len(team)), strict=True))
        while talking:
            ready = wait(list(talking))
            for pipe in [pipe for pipe in talking if pipe in ready]:
                with contextlib.suppress(EOFError):
                    said = pipe.recv()
                    if isinstance(said, UserError):
                        raise said
                    self.log(said)
                    continue
                number = talking.pop(pipe)  # it has ended
                team[number].join()
                if team[number].exitcode != 0:
                    raise _told(claims) or _death(number, team[number].exitcode, task, claims)


def _death(number: int, code: int, task: Task, claims: Path) -> RunError:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    at = [item for item, name in sorted(left_behind(claims).items()) if name == str(number)]
    where = f" at {task.title(at[-1])}" if at else ""
    return RunError(f"worker {number} {how}{where}: start again to continue, what is finished is kept")


def _worker(number: int, items: list[int], task: Task, claims: Path, pipe: Any, parent: int) -> None:
    # The parent may be killed without a chance to end its workers.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    try:
        Rank(str(number), claims, pipe.send).work(items, task)
    except _Abandoned:
        pass
    except UserError as error:
        pipe.send(error)
        sys.exit(1)
    except BaseException:
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
            raise UserError(f"started by MPI, but mpi4py cannot be used ({error}): {hint}") from None
        self._comm = MPI.COMM_WORLD
        self.size, self.rank = self._comm.Get_size(), self._comm.Get_rank()
        self.name = f"{self.rank} ({socket.gethostname()})"
        self._failed = False
        atexit.register(self._leave, MPI.Finalize)
        super().__init__(log)

    def _leave(self, finalize: Callable[[], None]) -> None:
        """Finalizing waits for all ranks. After a failure the first has to end alone: when it has said what happened,
        the launcher ends the others before each of them says the same."""
        if not self._failed:
            finalize()

    def main(self, function: Callable[[], T]) -> T:
        answer: tuple[Any, BaseException | None] = (None, None)
        if self.rank == 0:
            try:
                answer = (function(), None)
            except Exception as error:
                answer = (None, error)
                if not isinstance(error, UserError | RunError | OSError):
                    traceback.print_exc()
        value, problem = self._comm.bcast(answer, root=0)
        if problem is not None:
            self._failed = True
            raise problem
        return value

    def same(self, what: str, value: Mapping[str, str]) -> None:
        everywhere = self._comm.allgather((self.name, dict(value)))
        _, first = everywhere[0]
        for name, other in everywhere[1:]:
            for key in first:
                if other.get(key) != first[key]:
                    self._failed = True
                    raise UserError(
                        f"rank {name} has {key} {other.get(key)}, rank {everywhere[0][0]} has {first[key]}: "
                        f"give all ranks the same {what}"
                    )

    def each(self, items: Sequence[int], task: Task, claims: Path) -> None:
        self.main(lambda: _clear(claims))
        mine: tuple[str, str] | None = None
        try:
            with one_thread_each():
                Rank(self.name, claims, self.log).work(items, task)
        except _Abandoned:
            pass
        except UserError as error:
            mine = ("user", str(error))
        except Exception as error:
            mine = ("run", f"rank {self.name} failed: {type(error).__name__}: {error}")
        found = [error for error in self._comm.allgather(mine) if error is not None]
        if found:
            self._failed = True
            kind, message = found[0]
            raise UserError(message) if kind == "user" else RunError(message)


@contextlib.contextmanager
def one_thread_each() -> Any:
    """Several ranks on a machine: each tokenizes on one thread, unless the user says otherwise."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]


def team(workers: int | None, environ: Mapping[str, str], log: Callable[[str], Any] = print) -> Team:
    """The team that this process was started in.

    Raises:
        UserError: `workers` under MPI, or ranks that know nothing of each other.
    """
    tasks = max(int(environ.get(name) or 1) for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"))
    if tasks > 1:
        if workers is not None:
            raise UserError("--workers: this is a job of several ranks already, leave it out")
        found = Mpi(log)
        if found.size == 1:
            raise UserError(
                f"{tasks} tasks were started that do not know each other: use `srun --mpi=pmix` or mpirun, and an "
                "mpi4py that was built for that MPI"
            )
        return found
    return Team(log) if workers in (None, 1) else Workers(workers, log)
