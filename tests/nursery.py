"""A process that has imported what a run needs, and forks one child for each call of `sctd`.

Imports of torch, DeepSpeed and transformers take five seconds; the tests make hundreds of such calls. A child differs
from `python -m sctd` in nothing else: it has its own environment, folder, standard streams, process group and end.

Started by support.py, one for each worker of pytest, and spoken to over the Unix socket whose path is its argument.
Each connection carries one call, as JSON beside the descriptors of the two output streams, and gets back the child's
pid and later its exit code.
"""

import contextlib
import io
import json
import os
import runpy
import selectors
import signal
import socket
import sys

PARENT = os.getppid()


def serve(path: str) -> None:
    """Until the parent is gone. Returns in each child, which is then to run its call."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen()
    ready = selectors.DefaultSelector()
    ready.register(listener, selectors.EVENT_READ)
    callers: dict[int, tuple[int, socket.socket]] = {}
    while True:
        for key, _ in ready.select(timeout=5):
            if key.fd != listener.fileno():  # a child has ended
                pid, caller = callers.pop(key.fd)
                ready.unregister(key.fd)
                os.close(key.fd)
                _, status = os.waitpid(pid, 0)
                answer(caller, os.waitstatus_to_exitcode(status))
                caller.close()
                continue
            caller, _ = listener.accept()
            call, streams, _, _ = socket.recv_fds(caller, 1 << 20, 2)
            pid = os.fork()
            if pid == 0:
                for connection in (listener, caller, *(held for _, held in callers.values())):
                    connection.close()
                return become(json.loads(call), streams)
            for stream in streams:
                os.close(stream)
            answer(caller, pid)
            watched = os.pidfd_open(pid)
            callers[watched] = pid, caller
            ready.register(watched, selectors.EVENT_READ)
        if os.getppid() != PARENT:
            os._exit(0)


def answer(caller: socket.socket, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # who called has stopped waiting
        caller.send(str(number).encode())


def become(call: dict, streams: list[int]) -> None:
    os.setpgid(0, 0)
    for number, stream in zip((1, 2), streams, strict=True):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(number, "w", closefd=False), "utf-8") for number in (1, 2))
    os.chdir(call["folder"])
    os.environ.clear()
    os.environ.update(call["environment"])
    sys.argv = [call["program"], *call["arguments"]]


def prepare() -> None:
    """What a run imports, so that no child has to."""
    import sctd.cli
    import sctd.evaluate.during
    import sctd.train.pretrain  # noqa: F401


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for pytest
    prepare()
    serve(sys.argv[1])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.argv[0] == "sctd":
        runpy.run_module("sctd", run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
