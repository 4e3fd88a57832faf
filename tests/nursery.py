"""A process that has imported what a run needs, and forks one child for each call of `sctd`.

Imports of torch, DeepSpeed and transformers take nine seconds; the tests make hundreds of such calls. A child has its
own environment, folder, output streams, process group and end, as `python -m sctd` has. It differs in what is settled
before the fork: the hash seed of strings, and variables that are read by an import, such as DS_ACCELERATOR.

Started by support.py, one for each worker of pytest, with the number of a socket as its argument. A message there is
one call: JSON, with the descriptors of both output streams and of a socket that gets the child's pid and later its exit
code. Closing the other end of that socket ends the child; the end of pytest ends all.
"""

import contextlib
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys


def serve(calls: socket.socket) -> None:
    """Until pytest has ended. Returns in each child, which is then to run its call."""
    ready = selectors.PollSelector()  # an epoll would be shared with the children
    ready.register(calls, selectors.EVENT_READ)
    while True:
        key, _ = ready.select()[0]
        if key.data is not None:
            pid, ended, caller = key.data
            if key.fd == caller:  # closed at the other end
                kill(pid)
            _, status = os.waitpid(pid, 0)
            answer(caller, os.waitstatus_to_exitcode(status))
            for descriptor in (ended, caller):
                ready.unregister(descriptor)
                os.close(descriptor)
            continue
        call, descriptors, _, _ = socket.recv_fds(calls, 1 << 20, 3)
        if not call:
            for pid in {each.data[0] for each in ready.get_map().values() if each.data}:
                kill(pid)
            os._exit(0)
        *streams, caller = descriptors
        pid = os.fork()
        if pid == 0:
            for descriptor in (*ready.get_map(), caller):  # not unregistered, which would be for both processes
                os.close(calls.detach() if descriptor == calls.fileno() else descriptor)
            return become(json.loads(call), streams)
        answer(caller, pid)
        ended = os.pidfd_open(pid)
        for descriptor in (ended, caller):
            ready.register(descriptor, selectors.EVENT_READ, (pid, ended, caller))
        for stream in streams:
            os.close(stream)


def kill(pid: int) -> None:
    """A child, and what it has started."""
    for end in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            end(pid, signal.SIGKILL)


def answer(caller: int, number: int) -> None:
    with contextlib.suppress(ConnectionError):  # who called has stopped waiting
        os.write(caller, str(number).encode())


def become(call: dict, streams: list[int]) -> None:
    os.setpgid(0, 0)
    for number, stream in zip((1, 2), streams, strict=True):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(call["folder"])
    os.environ.clear()
    os.environ.update(call["environment"])
    sys.argv = [call["program"], *call["arguments"]]
    sys.path[0] = call["folder"] if call["program"] == "sctd" else os.path.dirname(call["program"])


# What a run imports on its way, the slow ones by name: torch's compiler for any optimizer, DeepSpeed's for any engine.
NAMES = """
sctd.cli sctd.train.pretrain sctd.evaluate.during sctd.evaluate.analyse.drift sctd.evaluate.ablate.ablate
sctd.report.report sctd.jobs.doctor sctd.jobs.status sctd.jobs.verify sctd.plan.report sctd.corpus.prepare.prepare
torch._dynamo torch._inductor.compile_fx torch.utils.tensorboard deepspeed.runtime.zero.muon.muon_optimizer
transformers.models.auto.modeling_auto transformers.models.bert.modeling_bert transformers.pipelines.fill_mask
transformers.models.modernbert.modeling_modernbert matplotlib.figure matplotlib.backends.backend_svg
""".split()  # noqa: SIM905


def prepare() -> None:
    for name in NAMES:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked safely"
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # what stays in a buffer here, each child would write


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for pytest
    prepare()
    serve(socket.socket(fileno=int(sys.argv[1])))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.argv[0] == "sctd":
        runpy.run_module("sctd", run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
