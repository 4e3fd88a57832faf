"""Files and folders that are whole or not there, locks, JSON lines, and a free port."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_HELD = (errno.EAGAIN, errno.EACCES)
_CANNOT_LOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # file systems without locks
_UNFINISHED: set[Path] = set()  # hidden folders of `new_folder`


def sync(path: Path) -> None:
    """Flush the content of a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """The file has the old text or the new one, whatever happens meanwhile, and it is on disk."""
    own = f"{os.getpid()}-{threading.get_ident()}"  # two processes or threads may write the same file
    temporary = path.with_name(f".{path.name}.{own}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # after an error, such as a full disk
    sync(path.parent)


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    """Atomically, with a newline at the end."""
    write_atomically(path, json.dumps(content, indent=indent) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_json_object(path: Path) -> dict[str, Any] | None:
    """None where the file is missing, cannot be read, or holds no JSON object."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` to write into; it replaces `out` at the end, and is removed after an error."""
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    _UNFINISHED.add(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(out, ignore_errors=True)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _UNFINISHED.discard(temporary)


def remove_unfinished() -> None:
    """For a process that is about to end within `new_folder`, without its end being raised there."""
    for folder in _UNFINISHED:
        shutil.rmtree(folder, ignore_errors=True)


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file, in order. Lines torn by a kill are skipped; a missing file has none."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Held(Exception):
    """Another process holds the lock; the message says which."""


def lock(path: Path, patience: float = 0.0) -> IO[str]:
    """Lock a file, which is made if needed, and write into it who holds it. Closing the file, or the end of the
    process, releases it. A file system without locks locks nothing.

    Args:
        patience: seconds to wait for another process that holds it.

    Raises:
        Held: it still holds it.
    """
    file = path.open("a+", encoding="utf-8")
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in _CANNOT_LOCK:
                break
            if error.errno not in _HELD:
                file.close()
                raise
        if time.monotonic() > deadline:
            file.seek(0)
            who = file.read().strip()
            file.close()
            raise Held(who or "another process")
        time.sleep(min(0.5, patience))
    file.truncate(0)
    job = os.environ.get("SLURM_JOB_ID")
    file.write(f"process {os.getpid()} on {socket.gethostname()}" + (f", job {job}" if job else ""))
    file.flush()
    return file


def holder(path: Path) -> str | None:
    """Who holds the lock now: process, host and job; None if nobody does."""
    try:
        with path.open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                return file.read().strip() if error.errno in _HELD else None
    except OSError:
        pass
    return None


def free_port() -> int:
    """A TCP port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
