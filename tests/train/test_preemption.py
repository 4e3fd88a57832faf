"""Stopping on request: a run that was stopped anywhere ends as if it never had been."""

import os
import pty
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sctd.files import free_port
from sctd.signals import Mailbox
from sctd.train.engine.distributed import World
from sctd.train.keep.attempts import read_attempts
from sctd.train.keep.checkpoint import newest_whole
from sctd.train.keep.preemption import Requests
from support import Child, assert_same_run, environment, launcher, records, sctd, start_ranks, train, until

STEPS = ("train.steps=40", "train.log_every=1", "train.save_every=0")
LONG = ("train.steps=4000", "train.save_every=0", "run.examples=[]")

# A run whose second save takes longer than a test, and says in a file of each rank when it is there.
SLOW = """
import os, sys, time
from pathlib import Path
import sctd.train.keep.checkpoint as checkpoint
from sctd.cli import main
write, saves = checkpoint._write_rank, []
def slow_write(*args):
    saves.append(args)
    if len(saves) > 1:
        Path(sys.argv[1], f"saving-{os.environ['RANK']}").touch()
        time.sleep(60)
    return write(*args)
checkpoint._write_rank = slow_write
sys.exit(main(sys.argv[2:]))
"""

# An export that takes its time in one place.
SLOW_EXPORT = """
import sys, time
def wait(*_):
    print("here", flush=True)
    time.sleep(60)
def write(*_):
    import slow_import
if __name__ == "__main__":
    import sctd.train.keep.export as export
    from sctd.cli import main
    export.write_model = {"write": wait, "import": write}[sys.argv.pop(1)]
    sys.exit(main())
"""


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Uninterrupted runs of one and of two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    for ranks in (1, 2):
        train(recipe, folder / str(ranks), *STEPS, ranks=ranks if ranks > 1 else 0)
    return {ranks: folder / str(ranks) for ranks in (1, 2)}


def start(recipe: Path, run_dir: Path, ranks: int) -> list[Child]:
    """A run in the background that has trained its first steps: its ranks."""
    children = start_ranks("pretrain", recipe, f"run.dir={run_dir}", *STEPS, ranks=ranks, merged=True)
    ended = lambda: any(each.poll() is not None for each in children)  # noqa: E731
    until(lambda: ended() or has_trained(run_dir, 3), "third step", 120)
    assert not ended(), children[0].output
    return children


def has_trained(run_dir: Path, steps: int) -> bool:
    return (run_dir / "metrics.jsonl").exists() and len(records(run_dir)) >= steps


def finish(recipe: Path, run_dir: Path, ranks: int, whole: dict[int, Path]) -> None:
    assert len(records(run_dir)) < 40, "the run ended before it was asked to stop"
    train(recipe, run_dir, *STEPS, "--resume", ranks=ranks if ranks > 1 else 0)
    assert_same_run(run_dir, whole[ranks])


def by_file(process: Child, run_dir: Path) -> None:
    (run_dir / "STOP").touch()


@pytest.mark.parametrize(
    "ask",
    [
        lambda process, _: process.send_signal(signal.SIGUSR1),
        lambda process, _: process.send_signal(signal.SIGINT),
        lambda process, _: process.send_signal(signal.SIGHUP),
        by_file,
    ],
    ids=["SIGUSR1", "SIGINT", "SIGHUP", "STOP"],
)
def test_one_rank_is_asked_to_stop(
    ask: Callable[[Child, Path], None], recipe: Path, tmp_path: Path, whole: dict[int, Path]
) -> None:
    (process,) = start(recipe, tmp_path, 1)
    ask(process, tmp_path)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "continue with --resume" in said and not (tmp_path / "STOP").exists()
    assert (tmp_path / "stopped").exists() == (ask is by_file)  # so that a job script knows that a person asked
    finish(recipe, tmp_path, 1, whole)


def test_one_rank_of_two_is_asked_and_both_stop(recipe: Path, tmp_path: Path, whole: dict[int, Path]) -> None:
    children = start(recipe, tmp_path, 2)
    children[1].send_signal(signal.SIGTERM)  # not the one that writes
    said = [each.communicate(timeout=60)[0] for each in children]
    assert "continue with --resume" in said[0] and [each.returncode for each in children] == [75, 75], said
    finish(recipe, tmp_path, 2, whole)


def test_a_signal_before_the_first_step_ends_the_process(recipe: Path, tmp_path: Path) -> None:
    """Rank 0 of two waits for a second one that never comes: it says so, and stops when asked."""
    told = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    asked = {signal.SIGTERM: 75, signal.SIGINT: 130}  # a scheduler is to start it again, a user did not want it
    children = [
        Child(["pretrain", recipe, f"run.dir={tmp_path / 'run'}"], merged=True, MASTER_PORT=str(free_port()), **told)
        for _ in asked
    ]
    for process, (number, code) in zip(children, asked.items(), strict=True):
        until(lambda process=process: "waiting for rank 1 of 2" in process.output, "a word on rank 1")
        process.send_signal(number)
        said, _ = process.communicate(timeout=30)
        assert process.returncode == code and f"{number.name}) before the first step" in said, said
        assert said.count("sctd: ") == 1 and "Traceback" not in said, said


def test_ctrl_c_again_ends_all_ranks_at_once(recipe: Path, tmp_path: Path) -> None:
    """In the middle of a save; what a launcher sends on top of the first Ctrl-C does not count."""
    script, run_dir = tmp_path / "slow.py", tmp_path / "run"
    script.write_text(SLOW, encoding="utf-8")
    words = (tmp_path, "pretrain", recipe, f"run.dir={run_dir}", *STEPS[:2], "train.save_every=2")
    children = start_ranks(*words, ranks=2, program=script, merged=True)
    saving = lambda: all((tmp_path / f"saving-{rank}").exists() for rank in (0, 1))  # noqa: E731
    until(saving, lambda: f"a second save: {children[0].output}", 120)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        for each in children:
            each.send_signal(number)
    time.sleep(1.2)
    assert [each.poll() for each in children] == [None, None], children[0].output
    for each in children:
        each.send_signal(signal.SIGINT)
    said = [each.communicate(timeout=5)[0] for each in children]
    assert [each.returncode for each in children] == [130, 130] and "Traceback" not in "".join(said), said
    assert said[0].count("interrupted (SIGINT); ") == 1 and "interrupted" not in said[1]
    assert newest_whole(run_dir) == run_dir / "checkpoints" / "step-00000002"
    assert read_attempts(run_dir)[0]["ended"]["code"] == 130
    assert "  interrupted  (" in sctd("status", run_dir).stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
@pytest.mark.parametrize("at", ["write", "import"])
def test_an_interrupted_export_leaves_nothing(
    at: str, number: signal.Signals, whole: dict[int, Path], tmp_path: Path
) -> None:
    """Not even where the exception would be raised in an import, which may swallow it."""
    (tmp_path / "slow_import.py").write_text("import slow_write\nslow_write.wait()\n", encoding="utf-8")
    (tmp_path / "slow_write.py").write_text(SLOW_EXPORT, encoding="utf-8")
    process = Child([at, "export", whole[1], "--out", tmp_path / "out"], tmp_path, program=tmp_path / "slow_write.py")
    until(lambda: "here" in process.output, process.communicate, 60)
    assert (tmp_path / ".out.tmp").is_dir()
    process.send_signal(number)
    _, said = process.communicate(timeout=4)  # sooner than an end by force
    assert process.returncode == 130, said
    assert said == f"sctd: interrupted ({number.name}); nothing half written is left: start again\n"
    assert {path.name for path in tmp_path.iterdir()} <= {"slow_import.py", "slow_write.py", "__pycache__"}


class Terminal:
    """A command in the foreground of a terminal of its own."""

    def __init__(self, command: list[str]) -> None:
        self.pid, self.keys = pty.fork()
        if self.pid == 0:
            os.execve(command[0], command, environment())
        self.said = b""

    def shows(self, text: str) -> bool:
        try:
            self.said += os.read(self.keys, 1 << 16)
        except OSError:  # the command has ended
            return True
        return text.encode() in self.said

    def close(self) -> None:
        """The window is closed: SIGHUP, and no line can be printed any more."""
        os.close(self.keys)

    def code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_terminal_that_is_closed(recipe: Path, tmp_path: Path) -> None:
    terminal = Terminal([sys.executable, "-m", "sctd", "pretrain", str(recipe), f"run.dir={tmp_path}", *LONG])
    until(lambda: terminal.shows("step    2/4000"), terminal.said.decode, 120)
    terminal.close()
    assert terminal.code() == 75
    (ended,) = read_attempts(tmp_path)
    assert ended["ended"]["code"] == 75 and newest_whole(tmp_path) is not None


def test_ctrl_c_under_torchrun(recipe: Path, tmp_path: Path) -> None:
    """The ranks are in no terminal: torchrun passes it on."""
    command = [*launcher("torchrun", 2), "sctd", "pretrain", str(recipe), f"run.dir={tmp_path}", *LONG]
    terminal = Terminal(command)
    until(lambda: terminal.shows("step    2/4000"), terminal.said.decode, 120)
    os.write(terminal.keys, b"\x03")
    until(lambda: terminal.shows("and saved: continue with --resume"), terminal.said.decode)
    terminal.code()
    assert b"stopped on request (SIGINT)" in terminal.said and b"Error" not in terminal.said, terminal.said.decode()
    assert read_attempts(tmp_path)[0]["ended"]["code"] == 75 and newest_whole(tmp_path) is not None
    terminal.close()


def test_requests_that_cannot_be_read_are_none(tmp_path: Path) -> None:
    (tmp_path / "STOP").mkdir()
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "full").touch()
    (tmp_path / "SAVE").mkdir()
    requests = Requests(Mailbox(), tmp_path, World(0, 1, torch.device("cpu")), 1.0)
    requests.agree()
    assert not requests.stop and not requests.save


def test_a_save_on_request(recipe: Path, tmp_path: Path, whole: dict[int, Path]) -> None:
    (process,) = start(recipe, tmp_path, 1)
    (tmp_path / "SAVE").touch()
    until(lambda: (tmp_path / "checkpoints" / "latest").exists(), "a checkpoint")
    process.kill()  # so that there is nothing but this checkpoint to go on from
    process.communicate()
    assert not (tmp_path / "SAVE").exists()
    finish(recipe, tmp_path, 1, whole)


def test_a_run_that_died_before_its_first_save_starts_again(
    recipe: Path, tmp_path: Path, whole: dict[int, Path]
) -> None:
    (process,) = start(recipe, tmp_path, 1)
    process.kill()
    process.communicate()
    done = train(recipe, tmp_path, *STEPS, "--resume")
    assert "has no checkpoint yet" in done.stdout
    assert_same_run(tmp_path, whole[1])


def test_a_second_job_on_a_run_is_refused(recipe: Path, tmp_path: Path, whole: dict[int, Path]) -> None:
    (process,) = start(recipe, tmp_path, 1)
    process.send_signal(signal.SIGSTOP)  # so that it does not end before the second one asks
    try:
        began = time.monotonic()
        second = sctd("pretrain", recipe, f"run.dir={tmp_path}", *STEPS, "--resume")
        assert second.returncode == 2 and time.monotonic() - began < 60
        assert f"in use by process {process.pid} on" in second.stderr
    finally:
        process.send_signal(signal.SIGCONT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert_same_run(tmp_path, whole[1])
