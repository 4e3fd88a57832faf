"""Fine-tuning throughput against transformers' `Trainer`: same task, rows, model, batch size and padding.

    python benchmarks/finetune.py --checkpoint runs/base/export --data-dir DATA

The sides take turns, each in a process of its own: the loop of `sctd finetune`; Trainer with its rows grouped by
length, which is its fast setting; Trainer as it is; on a CPU also the grouped Trainer with an allocator that keeps
freed memory, as ours does. A turn is one pass over the same rows, from the start of its first step to the end of its
last; building models, encoding and evaluating are not in it. On all sides rows are padded to multiples of 8, AdamW is
fused, gradients are clipped. Trainer needs `pip install accelerate`. Writes
results/finetune-LAYERSxWIDTH-TASK-<device>.json.
"""

import argparse
import importlib.util
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sctd.bench.result import write_result
from sctd.evaluate.encoder import best_device, load_config, open_encoder
from sctd.evaluate.finetune.finetune import prepare_machine
from sctd.evaluate.finetune.task_data import TaskData, build_model, read_task_data
from sctd.evaluate.finetune.training import Setting, fit, precision
from sctd.evaluate.tasks.rows import TextRow
from sctd.evaluate.tasks.task import load_task
from sctd.train.engine.devices import keep_freed_memory, share_cores

RESULTS = Path(__file__).parent / "results"
OURS, GROUPED, PLAIN, KEPT = "sctd", "Trainer, grouped by length", "Trainer", "Trainer, grouped, memory kept"
DEV_ROWS = 8  # ours evaluates at the end of a pass; this is not timed


def data_of(args: argparse.Namespace) -> TaskData:
    """The task with so many of its training rows, the same on all sides."""
    found = read_task_data(load_task(args.task), args.data_dir, open_encoder(args.checkpoint))
    if not isinstance(found.train.rows[0], TextRow):
        raise SystemExit(f"--task {args.task}: choose one of texts with classes or scores")
    rows = list(found.train.rows)
    random.Random(0).shuffle(rows)
    dev = {"dev": replace(found.dev["dev"], rows=found.dev["dev"].rows[:DEV_ROWS])}
    return replace(found, train=replace(found.train, rows=tuple(rows[: args.rows])), dev=dev)


def our_turn(found: TaskData, batch_size: int) -> Callable[[int], float]:
    prepare_machine()
    found.features(None, 1)  # encoded before the clock starts
    steps = found.steps(1, batch_size, None)
    return lambda seed: fit(found, Setting(1e-5, batch_size, steps, seed)).seconds


def their_turn(found: TaskData, batch_size: int, side: str) -> Callable[[int], float]:
    import datasets
    from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

    datasets.disable_progress_bars()
    if not torch.cuda.is_available():
        share_cores(1)
        if side == KEPT:
            keep_freed_memory()
    tokenizer, limit = found.coding.tokenizer, found.coding.limit
    rows: Any = found.train.rows
    encoded = tokenizer(
        [row.text for row in rows],
        [row.pair for row in rows] if rows[0].pair is not None else None,
        truncation=True,
        max_length=limit,
    )
    columns = dict(encoded) | {
        "labels": [row.label for row in rows],
        "length": [len(ids) for ids in encoded["input_ids"]],
    }
    dataset = datasets.Dataset.from_dict(columns)

    class Clock(TrainerCallback):
        seconds = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.seconds = -time.perf_counter()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds += time.perf_counter()

    def turn(seed: int) -> float:
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            settings = TrainingArguments(
                folder, per_device_train_batch_size=batch_size, num_train_epochs=1, learning_rate=1e-5,
                weight_decay=0.01, warmup_steps=0.06, max_grad_norm=1.0, seed=seed, save_strategy="no",
                logging_strategy="no", report_to="none", disable_tqdm=True, bf16=precision(best_device()) == "bf16",
                train_sampling_strategy="random" if side == PLAIN else "group_by_length",
            )  # fmt: skip
            Trainer(
                model=build_model(found.encoder, found.task, found.train.classes, seed),
                args=settings,
                train_dataset=dataset,
                data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8),
                callbacks=[clock],
            ).train()
        return clock.seconds

    return turn


def serve(args: argparse.Namespace) -> None:
    """A side's process: for each line that comes in, the seconds of a turn go out."""
    found = data_of(args)
    batch_size = args.batch_size or found.task.batch_size
    turn = our_turn(found, batch_size) if args.side == OURS else their_turn(found, batch_size, args.side)
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    for line in sys.stdin:
        print(turn(int(line)), file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="as of `sctd finetune`")
    parser.add_argument("--data-dir", type=Path, help="as of `sctd finetune`")
    parser.add_argument("--task", default="rte", help="of texts with classes or scores (default %(default)s)")
    parser.add_argument("--batch-size", type=int, help="default: the task's")
    parser.add_argument("--rows", type=int, default=512, help="training rows of a turn (default %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="turns of each side, behind a first (default %(default)s)"
    )
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return serve(args)
    if importlib.util.find_spec("accelerate") is None:
        raise SystemExit("Trainer cannot be run: pip install accelerate")
    found = data_of(args)
    sides = [OURS, GROUPED, PLAIN] + ([] if torch.cuda.is_available() else [KEPT])
    seconds = take_turns(sides, args.rounds)
    count, tokens = len(found.train.rows), int(found.features(None, 1).tokens_N.sum())
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    print("| side | s a pass | examples/s | tokens/s | of Trainer, grouped |\n|---|---|---|---|---|")
    for side, median in medians.items():
        rates = f"{count / median:,.1f} | {tokens / median:,.0f}"
        print(f"| {side} | {median:.2f} | {rates} | {medians[GROUPED] / median:.2f} |")
    config = load_config(found.encoder.source)
    size = f"{config.num_hidden_layers}x{config.hidden_size}"
    result = {
        "model": size, "task": args.task, "batch_size": args.batch_size or found.task.batch_size, "rows": count,
        "tokens": tokens, "max_length": found.coding.limit, "precision": precision(best_device()),
        "rounds": args.rounds, "seconds": seconds, "medians": medians,
        "examples_per_s": {side: count / median for side, median in medians.items()},
    }  # fmt: skip
    print(f"written {write_result(RESULTS, f'finetune-{size}-{args.task}', result)}")
    return None


def take_turns(sides: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of each turn; the first of each side warms it up and is not among them."""
    processes = {}
    for side in sides:
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
        processes[side] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side, process in processes.items():
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(f"{number + 1}\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                raise SystemExit(f"{side} ended with exit code {process.wait()}: see above")
            if number:
                seconds[side].append(float(answer))
        print(f"  round {number}/{rounds}", file=sys.stderr)
    for process in processes.values():
        process.communicate("")
    return seconds


if __name__ == "__main__":
    main()
