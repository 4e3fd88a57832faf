"""The command line as a user calls it, for tests of whole runs."""

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from safetensors.torch import load_file

from sctd.files import free_port

ROOT = Path(__file__).parents[1]
T = TypeVar("T")
MASK32 = 0xFFFFFFFF


class Child:
    """`sctd ARGUMENTS` in a child of the nursery: what subprocess.Popen is, so far as tests need it. Killed when this
    is deleted.

    Args:
        merged: standard error goes where standard output goes.
        program: a script of Python to run instead.
        variables: of its environment, beside those of `environment`.
    """

    def __init__(
        self,
        arguments: Sequence[Any],
        cwd: Path = ROOT,
        merged: bool = False,
        program: Path | str = "sctd",
        **variables: str,
    ) -> None:
        self._out = tempfile.TemporaryFile()  # noqa: SIM115
        self._err = self._out if merged else tempfile.TemporaryFile()  # noqa: SIM115
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(300)  # for the nursery to start
        call = {
            "program": str(program),
            "arguments": [str(argument) for argument in arguments],
            "folder": str(cwd),
            "environment": environment() | variables,
        }
        descriptors = [file.fileno() for file in (self._out, self._err, theirs)]
        with theirs:
            socket.send_fds(nursery(), [json.dumps(call).encode()], descriptors)
        self.pid = self._hear()
        self.returncode: int | None = None

    def _hear(self) -> int:
        said = self._socket.recv(64)
        assert said, "the nursery has ended"
        return int(said)

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        if self.returncode is None and select.select([self._socket], [], [], 0)[0]:
            self.returncode = self._hear()
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        if self.returncode is None and not select.select([self._socket], [], [], timeout)[0]:
            self.kill()
            raise subprocess.TimeoutExpired("sctd", timeout, self.output)
        code = self.poll()
        assert code is not None
        return code

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        self.wait(timeout)
        return self.output, "" if self._err is self._out else _text(self._err)

    @property
    def output(self) -> str:
        """What it has written so far."""
        return _text(self._out)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it is just ending
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _text(file: IO[bytes]) -> str:
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, 0).decode("utf-8")


@functools.cache
def nursery() -> socket.socket:
    """The way to nursery.py, which is started when it is first needed and ends with this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, str(ROOT / "tests" / "nursery.py"), str(theirs.fileno())]
    process = subprocess.Popen(command, env=environment(), pass_fds=[theirs.fileno()])
    theirs.close()
    atexit.register(process.wait)
    atexit.register(ours.shutdown, socket.SHUT_RDWR)  # called before `wait`
    return ours


def sctd(*arguments: Any, ranks: int = 0, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """`sctd ARGUMENTS` in a process of its own; with `ranks`, in so many that a launcher has told of each other.

    As launchers do, it ends all when one fails, and what they say is one text.
    """
    if not ranks:
        child = Child(arguments, cwd, **variables)
        out, err = child.communicate()
        return subprocess.CompletedProcess(arguments, child.wait(), out, err)
    children = start_ranks(*arguments, ranks=ranks, cwd=cwd, **variables)
    codes = until(lambda: _codes(children), "the end of all ranks, or the failure of one", 600)
    for each in children:
        each.terminate()
    said = [each.communicate() for each in children]
    code = next((code for code in codes if code), 0)
    return subprocess.CompletedProcess(arguments, code, *("".join(texts) for texts in zip(*said, strict=True)))


def _codes(children: Sequence[Child]) -> list[int | None]:
    """The exit codes, once all have ended or one has failed; until then nothing."""
    codes = [each.poll() for each in children]
    return codes if any(codes) or None not in codes else []


def start_ranks(*arguments: Any, ranks: int, **more: Any) -> list[Child]:
    """The ranks of a job, told of each other as torchrun would."""
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [Child(arguments, RANK=str(rank), LOCAL_RANK=str(rank), **common, **more) for rank in range(ranks)]


def launched(name: str, ranks: int, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """`sctd ARGUMENTS` under a real launcher: deepspeed, torchrun or mpirun."""
    command = [*launcher(name, ranks), "sctd", *map(str, arguments)]
    return subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300)


def launcher(name: str, ranks: int) -> list[str]:
    """The words that stand before a module's name, to start it so many times on this machine."""
    scripts, port = Path(sys.executable).parent, str(free_port())  # another job may hold the default port
    return {
        "deepspeed": [str(scripts / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", port, "--module"],
        "torchrun": [str(scripts / "torchrun"), "--nproc-per-node", str(ranks), "--master-port", port, "-m"],
        "mpirun": ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(ranks), sys.executable, "-m"],
    }[name]


def environment() -> dict[str, str]:
    """Of a process that runs this tree's code on one thread of a CPU."""
    scripts = Path(sys.executable).parent
    return os.environ | {
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT / 'pipeline'}:{ROOT / 'kernels'}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }


def until(condition: Callable[[], T], what: str | Callable[[], str], seconds: float = 60) -> T:
    """What `condition` answers as soon as that is true of itself."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"{what if isinstance(what, str) else what()}: not within {seconds:g} s")


def train(recipe: Path, run_dir: Path, *arguments: Any, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    """A pretraining run that must succeed."""
    done = sctd("pretrain", recipe, f"run.dir={run_dir}", *arguments, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def fmix32(x: int) -> int:
    """MurmurHash3's finaliser in plain Python integers."""
    x ^= x >> 16
    x = x * 0x85EBCA6B & MASK32
    x ^= x >> 13
    x = x * 0xC2B2AE35 & MASK32
    return x ^ x >> 16


def tie_hash(seed: int, position: int) -> int:
    """The hash that orders ties: both halves of the row's seed mixed into the position."""
    return fmix32(fmix32(position + seed & MASK32) ^ (seed >> 32 & MASK32))


def accumulate(table: Any, labels: Any, losses: Any) -> None:
    """Hand given losses to an importance table, as the cross-entropy does with those it computes."""
    from sctd_kernels.cross_entropy import reference

    reference.accumulate(losses.flatten(), labels.flatten(), table.sum_count_2V)


def assert_same_run(a: Path, b: Path) -> None:
    """The same parameters, losses and data, bit for bit."""
    left, right = (load_file(run / "export" / "model.safetensors") for run in (a, b))
    assert left.keys() == right.keys()
    assert all(left[name].equal(right[name]) for name in left)
    for key in ("step", "phase", "loss", "mlm_drop", "mlm_full", "kl_global", "kl_local", "lr", "samples", "ledger"):
        assert [record[key] for record in records(a)] == [record[key] for record in records(b)], key
