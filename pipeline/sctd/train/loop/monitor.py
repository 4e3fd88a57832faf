"""What a run reports: `metrics.jsonl`, TensorBoard scalars under stable names, one console line for each record.

Numbers stay on the device between log steps; a log step reads them back once.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from sctd.files import write_atomically
from sctd.objective.importance import INITIAL, ImportanceTable
from sctd.train.engine.distributed import World
from sctd.train.keep.metrics import EVALUATED, LOSSES, format_seconds, read_metrics

_SPEED = (
    "tokens_per_s", "flops_per_s", "mfu", "hfu", "padding", "data_wait", "seconds", "step_seconds", "rank_spread",
    "slowest_rank",
)  # fmt: skip
_VALID = ("context_use", "breakthrough_step")
_SLOW = 1.5  # times the middle rank's forward that are worth a word


class LossMeter:
    """Running means of the losses of a log window, kept on the device; a term counts where it was computed."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(LOSSES), dtype=torch.float64, device=device)
        self._counts = [0] * len(LOSSES)

    def add(self, parts: dict[str, Tensor]) -> None:
        for place, name in enumerate(LOSSES):
            if name in parts:
                self._sums[place] += parts[name]
                self._counts[place] += 1

    def read(self, grad_norm: Tensor | float | None) -> dict[str, float | None]:
        """Means over ranks and micro-batches since the last call, None for a term that did not occur.

        Waits for the device, once: the step's `grad_norm` comes along.
        """
        if dist.get_world_size() > 1:
            dist.all_reduce(self._sums)
        on_device = [self._sums / dist.get_world_size()]
        if isinstance(grad_norm, Tensor):
            on_device.append(grad_norm.reshape(1).to(self._sums))
        numbers = torch.cat(on_device).tolist()
        norm = numbers.pop() if isinstance(grad_norm, Tensor) else grad_norm
        means = [total / count if count else None for total, count in zip(numbers, self._counts, strict=True)]
        self._sums.zero_()
        self._counts = [0] * len(LOSSES)
        return {**dict(zip(LOSSES, means, strict=True)), "grad_norm": norm}


class Monitor:
    """Writers of rank 0; on other ranks every call does nothing.

    Args:
        first_step: the step that training continues from; later records of an earlier attempt are removed.
        left: seconds from a record to the last step.
    """

    def __init__(
        self, run_dir: Path, world: World, first_step: int, steps: int, left: Callable[[dict[str, Any]], float]
    ) -> None:
        self._active = world.is_main
        self._steps, self._left = steps, left
        if not self._active:
            return
        _forget_after(run_dir, first_step)
        self._file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._full = False
        self._board = SummaryWriter(str(run_dir), purge_step=first_step + 1)
        # On a terminal a bar shows the progress; in a log file the lines of `log` do.
        hidden = not sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True, disable=hidden, leave=False)

    def say(self, text: str) -> None:
        if self._active:
            with contextlib.suppress(OSError):  # a terminal that was just closed; SIGHUP comes next
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()

    def advance(self, step: int) -> None:
        if self._active:
            self._bar.update(step - self._bar.n)

    def log(self, record: dict[str, Any]) -> None:
        """Write the record of a step, and print its line."""
        if not self._active:
            return
        self.write(record)
        self._bar.set_postfix_str(f"loss {record['loss']:.3f}, {record['tokens_per_s']:,.0f} tok/s")
        self.say(_line(record, self._steps, self._left(record)))

    def write(self, record: dict[str, Any]) -> None:
        """Append a record to `metrics.jsonl` and TensorBoard."""
        if not self._active:
            return
        with self._or_say_once():
            self._file.write(json.dumps(_finite(record)) + "\n")
            self._file.flush()  # what does not fit stays in its buffer until it does
        with self._or_say_once():
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(_board_name(name), value, record["step"])

    def importance(self, table: ImportanceTable | None, tokenizer: Tokenizer, step: int, top: int = 12) -> None:
        """Histogram of the importance table, and its highest and lowest tokens as text."""
        if not self._active or table is None:
            return
        scores = table.scores_V.cpu()
        order = scores.argsort(stable=True)
        seen = order[scores[order] != INITIAL].tolist()
        with self._or_say_once():
            self._board.add_histogram("importance/scores", scores, step)
            for name, ids in (("highest", seen[::-1][:top]), ("lowest", seen[:top])):
                rows = "\n".join(f"| `{tokenizer.id_to_token(token)}` | {scores[token]:.3f} |" for token in ids)
                self._board.add_text(f"importance/{name}", f"| token | score |\n|---|---|\n{rows}", step)

    def close(self) -> None:
        if self._active:
            self._bar.close()
            for file in (self._file, self._board):
                with self._or_say_once():
                    file.close()

    @contextlib.contextmanager
    def _or_say_once(self) -> Iterator[None]:
        """Records that find no room are no reason to end a run; a checkpoint that finds none is."""
        try:
            yield
        except OSError as error:
            if not self._full:
                self.say(f"metrics cannot be written ({error}): training goes on without them")
            self._full = True


class Clock:
    """Seconds of training, earlier parts of a resumed run included; validation, evaluation and saving are taken out."""

    def __init__(self, seconds: float) -> None:
        self._start = time.perf_counter() - seconds

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before


def _board_name(name: str) -> str:
    if name.startswith(EVALUATED):
        return name
    if name in _VALID:
        return f"valid/{name}"
    if name.startswith("valid_"):
        return f"valid/{name.removeprefix('valid_')}"
    return f"{'speed' if name in _SPEED else 'train'}/{name}"


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinity are not JSON: they become null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def _line(record: dict[str, Any], steps: int, eta: float) -> str:
    step, width = record["step"], len(str(steps))
    fields = [
        f"step {step:>{width}}/{steps} {step / steps:6.1%}",
        f"{record['phase']:<5}",
        f"loss {record['loss']:7.4f}",
        f"lr {record['lr']:.2e}",
        f"grad {record['grad_norm']:6.3f}" if record["grad_norm"] is not None else "grad      -",
        f"{record['tokens_per_s']:>9,.0f} tok/s",
        f"mfu {record['mfu']:5.1%}" if record["mfu"] is not None else "mfu     -",
        f"wait {record['data_wait']:5.1%}",
        f"eta {format_seconds(eta):>8}",
    ]
    if record["skipped_steps"]:
        fields.append(f"SKIPPED {record['skipped_steps']} (overflow)")
    if record["rank_spread"] > _SLOW:
        fields.append(f"rank {record['slowest_rank']} is SLOW, {record['rank_spread']:.1f}x")
    if record.get("valid_loss") is not None:
        fields.append(f"valid {record['valid_loss']:.4f} acc {record['valid_accuracy']:.1%}")
        if "valid_gap" in record:
            fields.append(f"gap {record['valid_gap']:.2f} context {record['context_use']:.2f}")
            if record["breakthrough_step"] == step:
                fields.append("BREAKTHROUGH")
    fields += [f"{key} {value:.4f}" for key, value in record.items() if key.startswith(EVALUATED)]
    return "  ".join(fields)


def _forget_after(run_dir: Path, step: int) -> None:
    """Drop records beyond the step that a resumed run starts from: those steps are trained, and logged, again. A run
    that starts at its beginning validates there again."""
    kept = [json.dumps(record) + "\n" for record in read_metrics(run_dir) if record["step"] <= step and step > 0]
    write_atomically(run_dir / "metrics.jsonl", "".join(kept))
