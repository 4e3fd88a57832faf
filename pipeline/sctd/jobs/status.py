"""Where a run stands: `sctd status` and `sctd checkpoints`."""

import shutil
import subprocess
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from sctd.config import Config
from sctd.corpus import manifest as corpus
from sctd.errors import EXIT_BAD_INPUT, EXIT_FAILED
from sctd.files import holder
from sctd.objective.build import bert_shape, row_lengths
from sctd.objective.flops import Work
from sctd.train.keep.attempts import read_attempts
from sctd.train.keep.checkpoint import MANIFEST, checkpoints, read_manifest, size_of, step_of, verify
from sctd.train.keep.export import CORPUS_COPY, read_run
from sctd.train.keep.metrics import format_seconds, read_metrics
from sctd.train.keep.preemption import EXIT_STOPPED, REQUEST_FILES
from sctd.train.keep.run_folder import lock_file

_ENDS = {
    0: "done",
    EXIT_STOPPED: "stopped, saved",
    EXIT_BAD_INPUT: "bad input",
    EXIT_FAILED: "failed: disk, network or a rank",
}


def status(run_dir: Path) -> str:
    """What a run has come to, the chain of its jobs, and what it is asked for; a few lines.

    Raises:
        UserError: the folder holds no run.
    """
    config, records, attempts = read_run(run_dir), read_metrics(run_dir), read_attempts(run_dir)
    held = holder(lock_file(run_dir))
    model = config.model
    lines = [f"run          {run_dir}: {config.arm}, {model.family}, {model.layers} layers x {model.hidden_size}"]
    lines += _progress(run_dir, config, records) if records else ["progress     no step is on record yet"]
    lines += [f"checkpoints  {_newest(run_dir)}"]
    lines += [f"now          {f'held by {held}' if held else 'nobody works on it'}"]
    asked = [name for name in REQUEST_FILES if (run_dir / name).exists()]
    lines += [f"asked        {', '.join(asked)}, not yet seen by the run"] if asked else []
    lines += [f"attempts     {len(attempts)}"] if attempts else []
    for number, attempt in enumerate(attempts, start=1):
        last = number == len(attempts)
        reached = records[-1]["step"] if last and records else None
        lines.append(f"  {number:>3}  {_attempt(attempt, last and held is not None, reached)}")
    if attempts and "job" in attempts[-1]:
        lines += _queue(attempts[-1]["job"])
    return "\n".join(lines)


def list_checkpoints(run_dir: Path) -> str:
    """A line for each checkpoint of a run, newest first, each verified file by file.

    Raises:
        UserError: the folder holds no run.
    """
    read_run(run_dir)
    rows = [f"{'step':>9}  {'size':>9}  {'ranks':>5}  {'saved':<16}  state"]
    for path in checkpoints(run_dir):
        with suppress(FileNotFoundError):  # removed meanwhile by the run, which makes newer ones
            rows.append(_checkpoint(path))
    return "\n".join(rows) if len(rows) > 1 else f"{run_dir} has no checkpoint yet"


def _checkpoint(path: Path) -> str:
    damage = verify(path)
    facts = {} if damage and MANIFEST in damage else read_manifest(path)
    when = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    size = f"{size_of(path) / 1e6:.1f} MB"
    return f"{step_of(path):>9}  {size:>9}  {facts.get('world_size', '?'):>5}  {when}  {damage or 'whole'}"


def _progress(run_dir: Path, config: Config, records: list[dict[str, Any]]) -> list[str]:
    last, goal = records[-1], config.train.steps  # not stop_at, which each job may set anew
    manifest = corpus.read_manifest(run_dir / CORPUS_COPY)
    work = Work(config, bert_shape(config, manifest), row_lengths(config, manifest))
    eta = format_seconds(work.seconds_left(last, goal))
    held_out = [record for record in records if record.get("valid_loss") is not None][-1:]
    valid = f", held-out {held_out[0]['valid_loss']:.4f} at step {held_out[0]['step']}" if held_out else ""
    context = [_context(held_out[0])] if held_out and held_out[0].get("context_use") is not None else []
    mfu = f", MFU {last['mfu']:.1%}" if last["mfu"] is not None else ""
    skipped = f", {last['skipped_steps']} steps skipped" if last["skipped_steps"] else ""
    spent = format_seconds(last["seconds"])
    return [
        f"progress     step {last['step']:,} of {goal:,} ({last['step'] / goal:.1%}), {last['tokens']:,} tokens, "
        f"{spent} of training, {eta} to go{skipped}",
        f"loss         {'not finite' if last['loss'] is None else format(last['loss'], '.4f')}{valid}",
        *context,
        f"speed        {last['tokens_per_s']:,.0f} tokens/s{mfu}, {last['step_seconds']:.3g} s a step",
    ]


def _context(record: dict[str, Any]) -> str:
    """Whether the last validation shows a model that uses contexts."""
    step = record["breakthrough_step"]
    since = "not yet 1 nat below it" if step is None else f"1 nat below it since step {step:,}"
    side = "below" if record["valid_gap"] > 0 else "above"
    gap = f"{abs(record['valid_gap']):.2f} nats {side} the unigram entropy ({since})"
    return (
        f"learning     {gap}, context use {record['context_use']:.2f}, masked accuracy {record['valid_accuracy']:.1%}"
    )


def _newest(run_dir: Path) -> str:
    found = checkpoints(run_dir)
    names = ", ".join(path.name for path in found)
    return f"{names} ({size_of(found[0]) / 1e6:.1f} MB each)" if found else "none yet"


def _attempt(attempt: dict[str, Any], running: bool, reached: int | None) -> str:
    ended = attempt.get("ended")
    if ended:
        how, last = _ends(ended["code"]), f"{ended['step']:,}"
    else:
        how, last = ("running" if running else "killed"), "?" if reached is None else f"{reached:,}"
    job = f"job {attempt['job']}, restart {attempt.get('restart', 0)}" if "job" in attempt else f"pid {attempt['pid']}"
    until = ended["end"][11:19] if ended else "..."
    steps = f"steps {attempt['step']:,} to {last}"
    where = f"{attempt['host']}, {job}, {attempt['ranks']} ranks"
    return f"{attempt['start'][:10]} {attempt['start'][11:19]} to {until}  {steps}  {how}  ({where})"


def _ends(code: int) -> str:
    return _ENDS.get(code, f"failed with exit code {code}")


def _queue(job: str) -> list[str]:
    """What SLURM says of the newest job, where this machine can ask it."""
    if shutil.which("squeue") is None:
        return []
    command = ["squeue", "-h", "-j", job, "-o", "%T, %M of %l, %R"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        said = f"squeue does not answer: {error}"
    return [f"queue        job {job}: {said or 'not in the queue'}"]
