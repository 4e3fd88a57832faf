"""Evaluation while a run trains: rank 0 measures the weights as they are, the other ranks wait for it.

What is measured is a copy of the weights in memory, so that no evaluation can touch what trains. A thread measures;
meanwhile the ranks go on exchanging what they are asked for, so that none waits for longer than a glance.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from deepspeed import DeepSpeedEngine
from tokenizers import Tokenizer
from torch import Tensor

from sctd.errors import one_line
from sctd.model.shape import BertShape
from sctd.train.engine.distributed import World, host_group
from sctd.train.engine.state import gather_weights
from sctd.train.keep.metrics import EVALUATED
from sctd.train.keep.preemption import Requests

# Weights by our names, their shape and tokenizer -> scores by name. It calls its last argument between pieces of work,
# and lets through what that raises.
Evaluator = Callable[[dict[str, Tensor], BertShape, Tokenizer, Callable[[], None]], dict[str, float]]
_GLANCE = 1.0  # seconds


class Interrupted(Exception):
    """The job was asked to stop while it evaluated."""


class Evaluation:
    """Measures the current weights. All ranks make one, and call it at the same steps.

    Args:
        timeout: seconds that a rank waits for the weights of another.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        engine: DeepSpeedEngine,
        shape: BertShape,
        tokenizer: Tokenizer,
        world: World,
        timeout: float,
    ) -> None:
        self._evaluator, self._engine, self._world = evaluator, engine, world
        self._shape, self._tokenizer = shape, tokenizer
        self._group = host_group(world, timeout)

    def __call__(self, requests: Requests, say: Callable[[str], None]) -> dict[str, float]:
        """The scores, under keys for `metrics.jsonl`, on rank 0; none where the job is asked to stop meanwhile.

        An evaluation that fails is no reason to end a run: `say` tells of it. Nothing of the training changes: not its
        random numbers either.
        """
        weights = gather_weights(self._engine, self._world, self._group)
        on_gpu = self._world.device.type == "cuda"
        stop = threading.Event()
        with torch.random.fork_rng([self._world.device] if on_gpu else []), ThreadPoolExecutor(1) as thread:
            task = thread.submit(self._measure, weights, stop) if self._world.is_main else None
            try:
                _wait_for(task, requests, stop)
            finally:
                stop.set()
        if on_gpu:
            torch.cuda.empty_cache()
        return {} if task is None else _scores(task, say)

    def _measure(self, weights: dict[str, Tensor], stop: threading.Event) -> dict[str, float]:
        def check() -> None:
            if stop.is_set():
                raise Interrupted

        state = {name.removeprefix("bert."): tensor for name, tensor in weights.items()}
        return self._evaluator(state, self._shape, self._tokenizer, check)


def _scores(task: Future[dict[str, float]], say: Callable[[str], None]) -> dict[str, float]:
    try:
        return {EVALUATED + name: score for name, score in task.result().items()}
    except Interrupted:
        say("evaluation left: the job is asked to stop")
    except Exception as error:
        say(f"evaluation failed ({type(error).__name__}: {one_line(error)}): training goes on without it")
    return {}


def _wait_for(task: Future[dict[str, float]] | None, requests: Requests, stop: threading.Event) -> None:
    """Until the task of rank 0 is done; the other ranks have none."""
    done = False
    while not done:
        if task is not None:
            wait([task], _GLANCE)
        requests.agree()
        if requests.stop:
            stop.set()
        done = any(requests.gather(float(task is not None and task.done())))
