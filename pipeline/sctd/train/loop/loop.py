"""The training loop, on one screen. Everything it calls is a small object with one job."""

from collections.abc import Iterator
from pathlib import Path

from sctd.data.stream import Batch
from sctd.errors import UserError
from sctd.train.engine.distributed import from_main, together
from sctd.train.keep import checkpoint
from sctd.train.keep.checkpoint import Progress, Saver
from sctd.train.keep.preemption import Requests
from sctd.train.loop.guards import GoBack, Skips
from sctd.train.loop.recorder import Recorder
from sctd.train.loop.run import Run

_ROLLBACKS = 3


def train(run: Run, progress: Progress) -> Progress:
    """Train from `progress` to `train.stop_at`, or until asked to stop, logging, validating and saving on the way.

    Where `train.rollback_after` steps in a row had gradients that are not finite, training goes back to the newest
    checkpoint and passes over the samples of those steps.
    """
    cfg = run.config.train
    requests = Requests(run.mailbox, run.run_dir, run.world, cfg.timeout)
    saver = Saver(run.engine, run.run_dir, run.identity, run.world, cfg)
    since, rollbacks = -1, 0  # the step of the last rollback, and rollbacks to it in a row
    while rollbacks < _ROLLBACKS:
        recorder = Recorder(run, progress, requests)
        if progress.step == 0 and run.config.init.from_:
            recorder.first()
        run.stream.passed_over = (*run.config.data.skip_samples, *progress.passed_over)
        run.renew_masks(progress.step, begins=True)
        batches = run.stream.iterate(progress.cursor, progress.step + 1)
        try:
            return _train(run, progress, batches, recorder, requests, saver)
        except GoBack as wrong:
            saver.wait()
            progress = _go_back(run, wrong, recorder)
            rollbacks = rollbacks + 1 if progress.step == since else 1
            since = progress.step
        finally:
            batches.close()
            recorder.monitor.close()
    raise UserError(
        f"went back {_ROLLBACKS} times to step {since} for gradients that were not finite: branch from there, or from "
        f"an earlier checkpoint, with a lower rate: sctd pretrain --branch-from {run.run_dir}@{since} "
        "optimizer.lr=... run.dir=NEW"
    )


def _train(
    run: Run, progress: Progress, batches: Iterator[list[Batch]], recorder: Recorder, requests: Requests, saver: Saver
) -> Progress:
    cfg, last_step, window = run.config.train, run.last_step, recorder.window
    skips = Skips(cfg.rollback_after, cfg.precision)
    run.engine.train()

    for step in range(progress.step + 1, last_step + 1):
        run.seed_dropout(step)
        rate = run.set_learning_rate(step)
        for batch in window.wait_for(batches):
            on_device = {name: tensor.to(run.world.device, non_blocking=True) for name, tensor in batch.items()}
            with window.pace.forward():
                loss, parts = run.engine(**on_device)
            run.engine.backward(loss)
            run.engine.step()
            recorder.meter.add(parts)
        applied = run.watch.applied()
        if run.importance is not None:
            run.commit_importance(step, applied)
            run.renew_masks(step)
        first, end = run.advance(progress)
        if not applied:
            recorder.monitor.say(f"step {step} skipped, its gradients are not finite: samples {first} to {end}")
        skips.add(applied, first, end)
        window.add(step)
        recorder.monitor.advance(step)
        requests.agree(saver.failed)
        if requests.failed:
            saver.wait()  # raises what went wrong, on all ranks

        validates = step == last_step or is_due(step, cfg.valid_every)
        evaluates = is_due(step, run.config.evaluation.every)
        if validates or evaluates or requests.stop or step == 1 or is_due(step, cfg.log_every):
            recorder.write(rate, on_device, validates, evaluates)
        if step == last_step or requests.stop or requests.save or is_due(step, cfg.save_every):
            progress.seconds = recorder.clock.seconds()
            requests.save = False
            with recorder.clock.paused():
                saver.save(progress)
        if requests.stop:
            break
    requests.collect()
    saver.wait()
    return progress


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens at this one."""
    return every > 0 and step % every == 0


def _go_back(run: Run, wrong: GoBack, recorder: Recorder) -> Progress:
    path = from_main(run.world, lambda: checkpoint.newest_whole(run.run_dir))
    if path is None:
        raise UserError(
            f"{run.config.train.rollback_after} steps in a row had gradients that are not finite ({wrong}), and there "
            "is no checkpoint to go back to: start again with a lower optimizer.lr, or save earlier with "
            "train.save_every"
        )
    progress = restore(run, path)
    progress.passed_over.append(wrong.span)
    recorder.monitor.say(f"going back to step {progress.step} ({path.name}), and passing over {wrong}")
    return progress


def restore(run: Run, path: Path) -> Progress:
    """Put a verified checkpoint into the run.

    Raises:
        RunError, UserError: on all ranks, for what keeps any of them from reading it.
    """
    progress = together(run.world, lambda: checkpoint.load(run.engine, path))[run.world.rank]
    run.watch.look()
    return progress
