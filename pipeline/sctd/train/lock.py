"""One job at a time on a folder of a run."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sctd.errors import UserError
from sctd.train.distributed import World, from_main

# What file systems say that have no locks.
_CANNOT_LOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_PATIENCE = 10.0  # seconds for a job that is just ending, as the one before a requeued one may be


@contextmanager
def locked(run_dir: Path, world: World) -> Iterator[None]:
    """Hold the folder, which is made where it is not there. The lock goes with the process, however it ends.

    Raises:
        UserError: on all ranks, if another job holds it.
    """
    held: list[IO[str]] = []
    from_main(world, lambda: held.append(_lock(run_dir)))
    try:
        yield
    finally:
        for file in held:
            file.close()


def holder(run_dir: Path) -> str | None:
    """Who holds the folder now: process, host and job; None where nobody does."""
    try:
        with (run_dir / ".lock").open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                return file.read().strip() if error.errno in (errno.EAGAIN, errno.EACCES) else None
    except OSError:
        pass
    return None


def _lock(run_dir: Path) -> IO[str]:
    run_dir.mkdir(parents=True, exist_ok=True)
    file = (run_dir / ".lock").open("a+", encoding="utf-8")
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in _CANNOT_LOCK:
                break  # a file system that cannot lock: better unguarded than not at all
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        if time.monotonic() > deadline:
            file.seek(0)
            holder = file.read().strip() or "another job"
            raise UserError(f"run.dir {run_dir} is in use by {holder}: wait for its end, or choose another run.dir")
        time.sleep(0.5)
    file.truncate(0)
    job = os.environ.get("SLURM_JOB_ID")
    file.write(f"process {os.getpid()} on {socket.gethostname()}" + (f", job {job}" if job else ""))
    file.flush()
    return file
