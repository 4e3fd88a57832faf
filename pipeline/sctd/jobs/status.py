"""Where a run stands: `sctd status` and `sctd checkpoints`."""

import shutil
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from sctd.config import Config
from sctd.corpus import manifest as corpus
from sctd.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED
from sctd.files import holder
from sctd.objective.build import bert_shape, row_lengths
from sctd.train.flops import Work
from sctd.train.keep.attempts import read_attempts
from sctd.train.keep.checkpoint import MANIFEST, checkpoints, read_manifest, size_of, step_of, verify
from sctd.train.keep.export import CORPUS_COPY, read_run
from sctd.train.keep.metrics import format_seconds, read_metrics
from sctd.train.keep.preemption import REQUEST_FILES
from sctd.train.keep.run_folder import lock_file
from sctd.train.slurm import squeue

_ENDS = {
    0: "done",
    EXIT_STOPPED: "stopped, saved",
    EXIT_BAD_INPUT: "bad input",
    EXIT_FAILED: "failed: disk, network or a rank",
    EXIT_INTERRUPTED: "interrupted",
}


def status(run_dir: Path) -> str:
    """Progress of a run, the jobs that worked on it, and requests that it has not seen yet; a few lines.

    Raises:
        UserError: the folder holds no run.
    """
    config, records, attempts = read_run(run_dir), read_metrics(run_dir), read_attempts(run_dir)
    held = holder(lock_file(run_dir))
    model, saved = config.model, checkpoints(run_dir)
    names = ", ".join(path.name for path in saved)
    asked = [name for name in REQUEST_FILES if (run_dir / name).exists()]
    lines = [f"run          {run_dir}: {config.arm}, {model.family}, {model.layers} layers x {model.hidden_size}"]
    lines += [f"branched     from {config.run.branch_from}"] if config.run.branch_from else []
    begun = bool(records) and records[-1]["step"] > 0  # a run with init.from has a record of what it began with
    lines += _progress(run_dir, config, records) if begun else ["progress     no step is recorded yet"]
    lines += [f"checkpoints  {names} ({size_of(saved[0]) / 1e6:.1f} MB each)" if saved else "checkpoints  none yet"]
    lines += [f"now          {f'running: {held}' if held else 'not running'}"]
    lines += [f"requests     {', '.join(asked)}, not yet seen by the run"] if asked else []
    lines += [f"attempts     {len(attempts)}"] if attempts else []
    for number, attempt in enumerate(attempts, start=1):
        last = number == len(attempts)
        reached = records[-1]["step"] if last and records else None
        lines.append(f"  {number:>3}  {_attempt(attempt, last and held is not None, reached)}")
    if attempts and "job" in attempts[-1] and shutil.which("squeue"):
        said = squeue(attempts[-1]["job"], "%T, %M of %l, %R")
        said = "squeue does not answer" if said is None else said or "not in the queue"
        lines.append(f"queue        job {attempts[-1]['job']}: {said}")
    return "\n".join(lines)


def list_checkpoints(run_dir: Path) -> str:
    """A line for each checkpoint of a run, newest first, each verified file by file.

    Raises:
        UserError: the folder holds no run.
    """
    read_run(run_dir)
    rows = [f"{'step':>9}  {'size':>9}  {'ranks':>5}  {'saved':<16}  state"]
    for path in checkpoints(run_dir):
        with suppress(FileNotFoundError):  # a run that is at work removes old ones
            damage = verify(path)
            facts = {} if damage and MANIFEST in damage else read_manifest(path)
            when = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
            size, ranks = f"{size_of(path) / 1e6:.1f} MB", facts.get("world_size", "?")
            rows.append(f"{step_of(path):>9}  {size:>9}  {ranks:>5}  {when}  {damage or 'whole'}")
    return "\n".join(rows) if len(rows) > 1 else f"{run_dir} has no checkpoint yet"


def _progress(run_dir: Path, config: Config, records: list[dict[str, Any]]) -> list[str]:
    last, goal = records[-1], config.train.steps  # not stop_at, which each job may set anew
    manifest = corpus.read_manifest(run_dir / CORPUS_COPY)
    work = Work(config, bert_shape(config, manifest), row_lengths(config, manifest))
    spent, left = format_seconds(last["seconds"]), format_seconds(work.seconds_left(last, goal))
    validated = next((record for record in reversed(records) if record.get("valid_loss") is not None), None)
    valid = f", held-out {validated['valid_loss']:.4f} at step {validated['step']}" if validated else ""
    mfu = f", MFU {last['mfu']:.1%}" if last["mfu"] is not None else ""
    skipped = f", {last['skipped_steps']} skipped steps" if last["skipped_steps"] else ""
    return [
        f"progress     step {last['step']:,} of {goal:,} ({last['step'] / goal:.1%}), {last['tokens']:,} tokens, "
        f"{spent} of training, {left} to go{skipped}",
        f"loss         {'not finite' if last['loss'] is None else format(last['loss'], '.4f')}{valid}",
        *([_learning(validated)] if validated and validated.get("context_use") is not None else []),
        f"speed        {last['tokens_per_s']:,.0f} tokens/s{mfu}, {last['step_seconds']:.3g} s per step",
    ]


def _learning(record: dict[str, Any]) -> str:
    """Whether the model used contexts at its last validation."""
    step = record["breakthrough_step"]
    since = "not yet 1 nat below it" if step is None else f"1 nat below it since step {step:,}"
    gap = f"{abs(record['valid_gap']):.2f} nats {'below' if record['valid_gap'] > 0 else 'above'} the unigram entropy"
    use = f"context use {record['context_use']:.2f}, masked accuracy {record['valid_accuracy']:.1%}"
    return f"learning     {gap} ({since}), {use}"


def _attempt(attempt: dict[str, Any], running: bool, reached: int | None) -> str:
    ended = attempt.get("ended")
    if ended:
        how, last = _ENDS.get(ended["code"], f"failed with exit code {ended['code']}"), f"{ended['step']:,}"
    else:
        how, last = ("running" if running else "killed"), "?" if reached is None else f"{reached:,}"
    job = f"job {attempt['job']}, restart {attempt.get('restart', 0)}" if "job" in attempt else f"pid {attempt['pid']}"
    begun, until = attempt["start"][:19].replace("T", " "), ended["end"][11:19] if ended else "..."
    where = f"{attempt['host']}, {job}, {attempt['ranks']} ranks"
    return f"{begun} to {until}  steps {attempt['step']:,} to {last}  {how}  ({where})"
