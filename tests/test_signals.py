"""What signals do to a process that does not train; tests/train/test_preemption.py has what they do to a training."""

import os
import signal
import time
from pathlib import Path

import pytest

from sctd.signals import Mailbox
from support import Child, until

# A verb within a library that catches every exception.
STUBBORN = """
import sys, time
import sctd.cli
def catch_all(args):
    while True:
        try:
            print("here", flush=True)
            time.sleep(60)
        except BaseException:
            pass
sctd.cli.config._config = catch_all
sys.exit(sctd.cli.main())
"""


@pytest.mark.parametrize(("presses", "seconds"), [(1, 8), (2, 3)])
def test_an_interrupt_that_is_swallowed_ends_the_process(presses: int, seconds: float, tmp_path: Path) -> None:
    """By itself after some seconds; by Ctrl-C again at once."""
    (tmp_path / "stubborn.py").write_text(STUBBORN, encoding="utf-8")
    process = Child(["config"], program=tmp_path / "stubborn.py")
    until(lambda: "here" in process.output, "the verb")
    for _ in range(presses):
        process.send_signal(signal.SIGINT)
        time.sleep(1.2)
        assert process.poll() is None or presses == 2
    _, said = process.communicate(timeout=seconds)
    assert process.returncode == 130 and said == "sctd: interrupted (SIGINT)\n", said


def test_what_nohup_has_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Mailbox().listening():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            child = os.fork()
            if child == 0:  # a forked process answers signals for itself
                os.kill(os.getpid(), signal.SIGTERM)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)
