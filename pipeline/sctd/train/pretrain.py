"""From a configuration to a trained, exported model: builds every part of a run and hands them to the loop."""

import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from tokenizers import Tokenizer

from sctd.config import Config
from sctd.corpus.manifest import Manifest, load_corpus_tokenizer, read_manifest, verify_shards
from sctd.data.masking import build_masker
from sctd.data.stream import Rows, Share, TrainStream
from sctd.errors import EXIT_INTERRUPTED, EXIT_STOPPED, UserError
from sctd.objective.build import bert_shape, build_hook, build_model, measuring_steps, row_lengths
from sctd.schedule import learning_rate
from sctd.signals import Mailbox, Stage
from sctd.train.engine.devices import DTYPES, device_peak, fastest_precision
from sctd.train.engine.distributed import World, barrier, from_main, init_world
from sctd.train.engine.engine import StepWatch, build_engine
from sctd.train.engine.launch import Launch, discover
from sctd.train.engine.muon import describe
from sctd.train.engine.resolve import read_deepspeed_json, resolve
from sctd.train.flops import Work
from sctd.train.init import Start, open_source
from sctd.train.keep import checkpoint
from sctd.train.keep.attempts import Attempt, attempt
from sctd.train.keep.branch import Parent, branched, find_parent, make_branch
from sctd.train.keep.checkpoint import Progress
from sctd.train.keep.earlier import read_earlier
from sctd.train.keep.export import EXPORT, export_run, fill_mask, read_run
from sctd.train.keep.metrics import format_seconds, read_metrics
from sctd.train.keep.run_folder import (
    check_run_dir,
    check_same_run,
    extend,
    identity_of,
    locked,
    start_run_dir,
)
from sctd.train.loop.evaluation import Evaluation, Evaluator
from sctd.train.loop.loop import restore, train
from sctd.train.loop.run import Run
from sctd_kernels import backend


def pretrain(
    config: Config,
    resume: bool = False,
    deepspeed_config: str | None = None,
    evaluator: Evaluator | None = None,
    overrides: Sequence[str] = (),
) -> int:
    """Run a pretraining job to its end, or until it is asked to stop, on every rank of it.

    Args:
        config: with `run.branch_from`, a run that has no checkpoint yet starts at that one of its parent.
        resume: continue the newest whole checkpoint in `run.dir`; a run that has none yet starts at its beginning.
        deepspeed_config: path of a DeepSpeed JSON that wins over the recipe.
        evaluator: measures the weights every `evaluation.every` steps.
        overrides: of the command line, which a resume repeats.

    Returns:
        The process's exit code: 0 at the end, EXIT_STOPPED where a checkpoint waits to be resumed.

    Raises:
        UserError: bad input of any kind, before anything is written.
        RunError: a failure of the machine: a full disk, ranks that do not come, data that cannot be read.
    """
    launch = discover(os.environ)
    user_json = read_deepspeed_json(deepspeed_config)
    corpus = _open_corpus(config, launch)
    run_dir = Path(config.run.dir)
    goes_on = check_run_dir(run_dir, resume)  # else it begins, here or at a checkpoint of its parent
    asked, (config, ds_config) = config, resolve(config, user_json, launch.size)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    mailbox = Mailbox(speaks=launch.rank == 0)
    with mailbox.listening():
        world = init_world(launch, config.train.timeout)
        say = print if world.is_main else _silent
        if config.train.precision == "auto":
            config, ds_config = _with_precision(asked, user_json, world, goes_on, say)
        plan = _plan(config, ds_config, corpus, world, goes_on)
        with locked(run_dir, world), attempt(run_dir, world) as this:
            plan, path = _settle(plan, corpus, world, resume, overrides, say)
            run = _build(plan.config, plan.ds_config, world, corpus, mailbox, evaluator, plan.start)
            progress = _begin(run, plan, path, resume, overrides, say)
            mailbox.kept = "steps since the last save are lost: continue with --resume"
            mailbox.stage, mailbox.ending = Stage.TRAIN, lambda: this.end(EXIT_INTERRUPTED)
            if plan.goes_on:
                _extend(run, progress, say)
            this.code = _train_and_end(run, progress, this, say)
            return this.code


def check(config: Config, deepspeed_config: str | None, world: int) -> tuple[Config, dict[str, Any]]:
    """The configuration, and the DeepSpeed JSON, as so many ranks would run them.

    Raises:
        UserError: what `pretrain` would refuse of the recipe, the DeepSpeed JSON and the corpus, where one is given.
    """
    if config.data.corpus:
        bert_shape(config, read_manifest(Path(config.data.corpus)))
    return resolve(config, read_deepspeed_json(deepspeed_config), world)


class _Corpus(NamedTuple):
    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer


def _open_corpus(config: Config, launch: Launch) -> _Corpus:
    """The corpus, checked: every rank looks at the sizes of all files; each file is hashed by one of them."""
    if not config.data.corpus:
        raise UserError("data.corpus is not set: pass data.corpus=FOLDER, made by `sctd prepare`")
    folder = Path(config.data.corpus)
    manifest = read_manifest(folder)
    bert_shape(config, manifest)
    verify_shards(folder, manifest, part=(launch.rank, launch.size))
    return _Corpus(folder, manifest, load_corpus_tokenizer(folder, manifest))


@dataclass(frozen=True)
class _Plan:
    """A run as it will be.

    Args:
        goes_on: from a checkpoint of its own.
        parent: of a branch that begins. start: the weights of a new run, if they are not random.
    """

    config: Config
    ds_config: dict[str, Any]
    goes_on: bool
    parent: Parent | None = None
    start: Start | None = None


def _plan(config: Config, ds_config: dict[str, Any], corpus: _Corpus, world: World, goes_on: bool) -> _Plan:
    """What is to be trained, and with what it begins; nothing is written."""
    _check_device(config, ds_config, world.device.type)
    if goes_on:
        return _Plan(config, ds_config, goes_on=True)
    if config.run.branch_from:
        parent = from_main(world, lambda: find_parent(config, ds_config, corpus.manifest))
        return _Plan(branched(config, parent), ds_config, goes_on=False, parent=parent)
    start = _open_start(config, corpus) if config.init.from_ else None
    return _Plan(config, ds_config, goes_on=False, start=start)


def _settle(
    plan: _Plan, corpus: _Corpus, world: World, resume: bool, overrides: Sequence[str], say: Callable[[str], None]
) -> tuple[_Plan, Path | None]:
    """The plan, now that no other job is in the folder, and the checkpoint that training begins at.

    The folder of a branch is filled here; that of a new run only when all of it is built.
    """
    config, ds_config, parent = plan.config, plan.ds_config, plan.parent
    run_dir = Path(config.run.dir)
    if from_main(world, lambda: check_run_dir(run_dir, resume)):
        check_same_run(config, ds_config, run_dir)
        config = replace(config, run=replace(config.run, branch_from=read_run(run_dir).run.branch_from))
        plan = _Plan(config, ds_config, goes_on=True)
    elif parent is not None:
        identity = identity_of(config, corpus.manifest)
        say("\n".join(from_main(world, lambda: make_branch(parent, config, ds_config, identity, overrides))))
    else:
        return replace(plan, goes_on=False), None
    return plan, from_main(world, lambda: checkpoint.newest_whole(run_dir))


def _open_start(config: Config, corpus: _Corpus) -> Start:
    """The weights that `init.from` names, for this corpus."""
    shape = bert_shape(config, corpus.manifest)
    return open_source(config.init.from_).read(shape, corpus.tokenizer, config.init.positions)


def _build(
    config: Config, ds_config: dict[str, Any], world: World, corpus: _Corpus, mailbox: Mailbox,
    evaluator: Evaluator | None, start: Start | None,
) -> Run:  # fmt: skip
    folder, manifest, tokenizer = corpus
    cfg, shape, lengths = config.train, bert_shape(config, manifest), row_lengths(config, manifest)
    torch.manual_seed(config.run.seed)
    model = build_model(config, shape, manifest.special_ids, world.device)
    if start is not None:
        start.load_into(model.bert)
        if start.scores_V is not None and model.importance is not None:
            model.importance.restore(start.scores_V)
    hook = build_hook(config, lengths[0])
    engine = build_engine(model, config, ds_config, hook, world)
    measured = measuring_steps(config)
    masker = build_masker(config, manifest, tokenizer, renewal=measured.stop if measured else 1)
    micro, accumulation = ds_config["train_micro_batch_size_per_gpu"], ds_config["gradient_accumulation_steps"]
    share = Share(world.rank, world.size, micro, accumulation)
    rows, *shorter = (Rows(folder, manifest, "train", length) for length in lengths)
    warmup = (shorter[0], config.data.warmup_steps) if shorter else None
    has_scheduler = "scheduler" in ds_config
    return Run(
        config=config,
        run_dir=Path(config.run.dir),
        world=world,
        engine=engine,
        hook=hook,
        importance=model.importance,
        stream=TrainStream(rows, masker, config.run.seed, share, world.device.type == "cuda", cfg.timeout, warmup),
        valid_rows=Rows(folder, manifest, "valid", lengths[0]),
        masker=masker,
        tokenizer=tokenizer,
        work=Work(config, shape, lengths),
        peak_flops=device_peak(world.device, DTYPES[cfg.precision]),
        identity=identity_of(config, manifest),
        mailbox=mailbox,
        watch=StepWatch(engine),
        unigram_entropy=manifest.unigram_entropy,
        rate=None if has_scheduler else learning_rate(config.schedule, config.optimizer.lr, cfg.steps),
        evaluation=evaluator and Evaluation(evaluator, engine, shape, tokenizer, world, cfg.timeout),
    )


def _begin(
    run: Run, plan: _Plan, path: Path | None, resume: bool, overrides: Sequence[str], say: Callable[[str], None]
) -> Progress:
    """Where the training starts: at a checkpoint, or at the beginning of a folder that is made for it now."""
    if path is not None:
        facts = checkpoint.read_manifest(path)
        for key, what in (("tokenizer", "tokenizer"), ("data", "corpus")):
            if facts[key] != run.identity[key]:
                raise UserError(
                    f"--resume: {path} was trained with another {what} than data.corpus holds: pass that corpus"
                )
        progress = restore(run, path)
        run.work.set_earlier(read_earlier(run.run_dir))
        say(f"resuming {run.run_dir} at step {progress.step} ({path.name})")
        return progress
    if resume:
        say(f"{run.run_dir} has no checkpoint yet: starting at its beginning")
    for line in from_main(run.world, lambda: start_run_dir(run.run_dir, run.config, plan.ds_config, overrides)):
        say(line)
    if plan.start is not None:
        say(f"start     {plan.start.describe(run.engine.module.bert.shape)}")
    return Progress(ledger=run.identity["data"])


def _extend(run: Run, progress: Progress, say: Callable[[str], None]) -> None:
    """Write down a longer horizon, if the run has one now."""
    steps, has_scheduler = run.config.train.steps, run.rate is None
    for line in from_main(run.world, lambda: extend(run.run_dir, steps, progress.step, has_scheduler)):
        say(line)
    run.work.set_earlier(read_earlier(run.run_dir))


def _train_and_end(run: Run, progress: Progress, this: Attempt, say: Callable[[str], None]) -> int:
    """Train to the goal, and export; the exit code."""
    steps, mailbox = run.config.train.steps, run.mailbox
    goal = run.config.train.stop_at or steps
    if progress.step >= goal:
        more = f": train.stop_at is {goal}: pass train.stop_at=null to go on to {steps}" if goal < steps else ""
        say(f"{run.run_dir} is at step {progress.step} already, nothing to train{more}")
    else:
        _introduce(run, say)
        this.begin(progress, run.world.size)
        this.progress = progress = train(run, progress)
        say(f"trained to step {progress.step} in {format_seconds(progress.seconds)}")
    barrier()
    dist.destroy_process_group()  # the others need not wait for what rank 0 does alone
    if progress.step < goal:
        why = mailbox.signals[0] if mailbox.signals else "a file or another rank"
        say(f"stopped on request ({why}), and saved: continue with --resume")
        return EXIT_STOPPED
    if run.world.is_main:
        mailbox.kept = f"trained and saved: `sctd export {run.run_dir} --out FOLDER` writes the model"
        mailbox.stage = Stage.FINISH
        _finish(run, say)
    return 0


def _with_precision(
    asked: Config, user_json: dict[str, Any], world: World, goes_on: bool, say: Callable[[str], None]
) -> tuple[Config, dict[str, Any]]:
    """The configuration and the DeepSpeed JSON, with the precision that `auto` becomes here."""
    precision, why = from_main(world, lambda: _precision(Path(asked.run.dir), goes_on, world.device))
    say(f"precision {precision}: {why}")
    return resolve(replace(asked, train=replace(asked.train, precision=precision)), user_json, world.size)


def _precision(run_dir: Path, goes_on: bool, device: torch.device) -> tuple[str, str]:
    """What `auto` becomes, and why: a resumed run keeps its precision, a new one gets the fastest on this device."""
    if goes_on:
        return read_run(run_dir).train.precision, "as the run was started"
    return fastest_precision(device)


def _check_device(config: Config, ds_config: dict[str, Any], device: str) -> None:
    """Refuse what this machine lacks for the configuration."""
    for name, has in (("fp16", get_accelerator().is_fp16_supported), ("bf16", get_accelerator().is_bf16_supported)):
        if ds_config.get(name, {}).get("enabled") and not has():
            others = "bf16 or fp32" if name == "fp16" else "fp16 or fp32"
            raise UserError(
                f"train.precision is {name}, which DeepSpeed cannot train in on this {device}: use {others}"
            )
    try:
        backend(device)
    except ValueError as error:
        raise UserError(str(error)) from None
    has_compiler = any(map(shutil.which, ("g++", "clang++", "c++")))
    model, on_gpu = config.model, device == "cuda"
    for missing, message in (
        (config.train.cuda_graphs and not on_gpu,
         f"train.cuda_graphs is true, but this runs on {device}: set it to false, or use a GPU"),
        (config.attention.scope == "document" and on_gpu and model.attention_dropout > 0,
         f"attention.scope is document, and model.attention_dropout is {model.attention_dropout}: block masks on GPUs "
         "have no dropout, set it to 0"),
        (config.attention.scope == "document" and on_gpu and model.window > 0,
         f"attention.scope is document, and model.window is {model.window}: block masks on GPUs have no windows, use "
         "attention.scope=row"),
        (model.layer_norm == "apex" and importlib.util.find_spec("apex") is None,
         "model.layer_norm is apex, but apex is not installed: build it from github.com/NVIDIA/apex with --cpp_ext and "
         "--cuda_ext, or use model.layer_norm=native"),
        (config.train.compile and not on_gpu and not has_compiler,
         "train.compile is true, but there is no C++ compiler: install g++, or set it to false"),
    ):  # fmt: skip
        if missing:
            raise UserError(message)


def _introduce(run: Run, say: Callable[[str], None]) -> None:
    cfg, hook, share, schedule = run.config, run.hook, run.stream.share, run.config.schedule
    parameters = sum(parameter.numel() for parameter in run.engine.module.parameters()) / 1e6
    arm = cfg.arm
    if hook.drops:
        arm += f", {hook.keep(1)} of {hook.length} tokens in dropped layers"
    if hook.interval:
        arm += f", ALIGN every {hook.interval} steps"
    if hook.drops and schedule.full_start + schedule.full_finish:
        arm += f", full path in the first {schedule.full_start:,} and the last {schedule.full_finish:,} steps"
    if measured := measuring_steps(cfg):
        arm += f"; steps {measured[0]:,} to {measured[-1]:,} on the full path measure the importance of tokens"
    say(
        f"model     {cfg.model.family}, {cfg.model.layers} layers x {cfg.model.hidden_size}, "
        f"{parameters:.1f}M parameters"
    )
    say(f"arm       {arm}")
    entropy = f"unigram entropy {run.unigram_entropy:.3f} nats"
    say(f"corpus    {cfg.data.corpus}: {len(run.stream.rows):,} rows, {entropy}")
    if cfg.data.warmup_steps:
        say(f"warm-up   rows of {cfg.data.warmup_seq_len} tokens for {cfg.data.warmup_steps:,} steps")
    ranks = f"{run.world.size} x {run.world.device.type}"
    say(f"engine    DeepSpeed, ZeRO-{cfg.train.zero_stage}, {cfg.train.precision}, {ranks}")
    if cfg.optimizer.name == "muon":
        say(f"optimizer {describe(run.engine.module)}")
    rows = f"{share.global_batch} rows a step = {share.world} x {share.micro_batch} x {share.accumulation}"
    say(f"batch     {rows} (ranks x rows at once x accumulation)")
    say(f"run       {run.run_dir}")


def _finish(run: Run, say: Callable[[str], None]) -> None:
    run_dir, out = run.run_dir, run.run_dir / EXPORT
    last = next((each for each in reversed(read_metrics(run_dir)) if each.get("valid_loss") is not None), None)
    if last is not None:
        gap = run.unigram_entropy - last["valid_loss"]
        side = "below" if gap > 0 else "ABOVE"
        entropy = f"{abs(gap):.2f} nats {side} the unigram entropy {run.unigram_entropy:.4f}"
        use = f"; context use {last['context_use']:.2f}" if last.get("context_use") is not None else ""
        say(f"held-out  loss {last['valid_loss']:.4f}, {entropy}; masked accuracy {last['valid_accuracy']:.1%}{use}")
    export_run(run_dir, out)
    say(f"exported  {out}")
    if run.config.run.examples:
        for line in fill_mask(out, run.config.run.examples):
            say(f"  {line}")
    say("next")
    say(f"  tensorboard --logdir {run_dir.parent if str(run_dir.parent) != '.' else run_dir}")
    say(f"  python -c \"from transformers import pipeline; print(pipeline('fill-mask', '{out}')('A [MASK] object.'))\"")
    say(f"  sctd export {run_dir} --out my-bert/")


def _silent(text: str) -> None:
    pass
