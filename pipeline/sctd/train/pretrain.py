"""From a configuration to a trained, exported model: builds every part of a run and hands them to the loop."""

import dataclasses
import hashlib
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from sctd.config import Config, to_yaml
from sctd.corpus.manifest import Manifest, read_manifest, verify_shards
from sctd.corpus.prepare import load_corpus_tokenizer
from sctd.data.masking import Masker
from sctd.data.stream import Rows, Share, TrainStream
from sctd.errors import UserError
from sctd.model.bert import BertShape
from sctd.objective.arms import ARMS
from sctd.objective.build import build_model
from sctd.objective.schedule import HybridScheduleHook
from sctd.train import checkpoint
from sctd.train.accounting import device_peak, step_flops
from sctd.train.checkpoint import Progress
from sctd.train.distributed import World, barrier, init_world
from sctd.train.engine import build_engine, read_deepspeed_json, resolve
from sctd.train.export import CORPUS_COPY, bert_shape, export_run, fill_mask, read_run
from sctd.train.loop import Run, train
from sctd.train.monitor import format_seconds, read_metrics
from sctd_kernels import backend

DEEPSPEED_COPY = "deepspeed.json"  # the merged DeepSpeed configuration, kept with the run
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Keys that may differ when a run is resumed: they change when and what is reported, not what is computed.
_FREE_AT_RESUME = {
    "run.dir", "run.examples", "data.corpus", "train.stop_at", "train.log_every", "train.valid_every",
    "train.valid_rows", "train.save_every", "train.keep_checkpoints", "train.micro_batch_size",
    "train.checkpoint_activations",
}  # fmt: skip


def pretrain(config: Config, resume: bool = False, deepspeed_config: str | None = None) -> None:
    """Run a pretraining job to its end, on every rank of it.

    Args:
        resume: continue the newest whole checkpoint in `run.dir`.
        deepspeed_config: path of a DeepSpeed JSON that wins over the recipe.

    Raises:
        UserError: bad input of any kind, before anything is written.
    """
    user_json = read_deepspeed_json(deepspeed_config)
    corpus = Path(config.data.corpus)
    if not config.data.corpus:
        raise UserError("data.corpus is not set: pass data.corpus=FOLDER, made by `sctd prepare`")
    manifest = read_manifest(corpus)
    verify_shards(corpus, manifest, full=os.environ.get("RANK", "0") == "0")  # one rank hashes, all look at sizes
    tokenizer = load_corpus_tokenizer(corpus, manifest)
    shape = bert_shape(config, manifest)
    run_dir = Path(config.run.dir)
    _check_run_dir(run_dir, resume)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    world = init_world()
    _check_device(config, world.device.type)
    say = print if world.is_main else _silent
    config, ds_config = resolve(config, user_json, world.size)
    if resume:
        _check_same_run(config, ds_config, run_dir)
    path = checkpoint.agree_on_checkpoint(run_dir, world) if resume else None

    run = _build(config, ds_config, world, shape, corpus, manifest, tokenizer)
    progress = Progress(ledger=run.identity["data"])
    if path is None:
        _start_run_dir(run_dir, config, ds_config, world)
    else:
        progress = _restore(run, path)
        say(f"resuming {run_dir} at step {progress.step} ({path.name})")
    if progress.step >= (config.train.stop_at or config.train.steps):
        say(f"{run_dir} is at step {progress.step} already, nothing to train")
    else:
        _introduce(run, manifest, say)
        progress = train(run, progress)
        say(f"trained to step {progress.step} in {format_seconds(progress.seconds)}")
    barrier()
    dist.destroy_process_group()  # the others need not wait for what rank 0 does alone
    if world.is_main:
        _finish(run_dir, config, manifest, say)


def _build(
    config: Config,
    ds_config: dict[str, Any],
    world: World,
    shape: BertShape,
    corpus: Path,
    manifest: Manifest,
    tokenizer: Tokenizer,
) -> Run:
    arm, seed = ARMS[config.arm], config.run.seed
    torch.manual_seed(seed)
    model = build_model(config, shape, manifest.special_ids, world.device)
    hook = HybridScheduleHook(
        drops=arm.drops,
        interval=config.objective.interval if arm.aligns else 0,
        keep_ratio=config.model.keep_ratio,
        length=manifest.seq_len,
        grow_steps=config.train.steps if arm.keep_grows else 0,
    )
    engine = build_engine(model, config, ds_config, hook, world)
    masker = _masker(config, manifest, tokenizer)
    micro, accumulation = ds_config["train_micro_batch_size_per_gpu"], ds_config["gradient_accumulation_steps"]
    share = Share(world.rank, world.size, micro, accumulation)
    rows = Rows(corpus, manifest, "train")
    return Run(
        config=config,
        run_dir=Path(config.run.dir),
        world=world,
        engine=engine,
        hook=hook,
        importance=model.importance,
        stream=TrainStream(rows, masker, seed, share, pin=world.device.type == "cuda"),
        valid_rows=Rows(corpus, manifest, "valid"),
        masker=masker,
        tokenizer=tokenizer,
        flops=step_flops(config, shape, manifest.seq_len),
        peak_flops=device_peak(world.device, _DTYPES[config.train.precision]),
        identity={"tokenizer": manifest.tokenizer_hash, "data": _data_hash(manifest)},
        own_learning_rate="scheduler" not in ds_config,
    )


def _masker(config: Config, manifest: Manifest, tokenizer: Tokenizer) -> Masker:
    continuation_V = None
    if config.data.whole_word:
        continuation_V = np.zeros(manifest.vocab_size, dtype=bool)
        for piece, number in tokenizer.get_vocab().items():
            continuation_V[number] = piece.startswith("##")
    special, seed = manifest.special_ids, config.run.seed
    return Masker(seed, manifest.vocab_size, special.mask, special.all, config.data.mask_probability, continuation_V)


def _data_hash(manifest: Manifest) -> str:
    hashes = "".join(shard.sha256 for shard in manifest.splits["train"].shards)
    return hashlib.sha256(hashes.encode()).hexdigest()[:16]


def _check_run_dir(run_dir: Path, resume: bool) -> None:
    if (run_dir / "config.yaml").exists() and not resume:
        raise UserError(f"run.dir {run_dir} holds a run: pass --resume to continue it, or choose another run.dir")
    standing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK):
        raise UserError(
            f"run.dir {run_dir} cannot be made: {standing} is no folder to write in: choose another run.dir"
        )
    if resume and not run_dir.is_dir():
        raise UserError(f"--resume: {run_dir} does not exist: start the run without --resume")


def _check_device(config: Config, device: str) -> None:
    """What this machine must have for what the configuration asks for."""
    try:
        backend(device)
    except ValueError as error:
        raise UserError(str(error)) from None
    if config.train.cuda_graphs and device != "cuda":
        raise UserError(f"train.cuda_graphs is true, but this runs on {device}: set it to false, or use a GPU")
    if config.attention.scope == "document" and device == "cuda" and config.model.attention_dropout:
        raise UserError(
            "attention.scope is document, and model.attention_dropout is "
            f"{config.model.attention_dropout}: block masks on GPUs have no dropout, set it to 0"
        )
    if config.model.layer_norm == "apex" and importlib.util.find_spec("apex") is None:
        raise UserError(
            "model.layer_norm is apex, but apex is not installed: build it from github.com/NVIDIA/apex "
            "with --cpp_ext and --cuda_ext, or use model.layer_norm=native"
        )
    if config.train.compile and device == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise UserError("train.compile is true, but there is no C++ compiler: install g++, or set it to false")


def _check_same_run(config: Config, ds_config: dict[str, Any], run_dir: Path) -> None:
    new, old = (_flat(dataclasses.asdict(item)) for item in (config, read_run(run_dir)))
    before = json.loads((run_dir / DEEPSPEED_COPY).read_text(encoding="utf-8"))
    for section in ("optimizer", "scheduler"):
        if _plain(ds_config.get(section)) != before.get(section):
            raise UserError(f"--resume: {run_dir} was started with another DeepSpeed '{section}': pass that JSON")
    for key, value in new.items():
        if key not in _FREE_AT_RESUME and value != old[key]:
            raise UserError(
                f"--resume: {key} is {value!r}, the run in {config.run.dir} was started with {old[key]!r}: "
                "keep it, or start another run.dir"
            )


def _plain(tree: Any) -> Any:
    return json.loads(json.dumps(tree))  # as it is read back from a file


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _restore(run: Run, path: Path) -> Progress:
    facts = checkpoint.read_manifest(path)
    for key, what in (("tokenizer", "tokenizer"), ("data", "corpus")):
        if facts[key] != run.identity[key]:
            raise UserError(
                f"--resume: {path} was trained with another {what} than data.corpus holds: pass that corpus"
            )
    if facts["world_size"] != run.world.size:
        raise UserError(
            f"--resume: {path} was saved by {facts['world_size']} ranks, this job has {run.world.size}: "
            f"start it on {facts['world_size']}"
        )
    progress, table = checkpoint.load(run.engine, path)
    if run.importance is not None and table is not None:
        run.importance.load_state_dict(table)
    return progress


def _start_run_dir(run_dir: Path, config: Config, ds_config: dict[str, Any], world: World) -> None:
    if world.is_main:
        (run_dir / CORPUS_COPY).mkdir(parents=True, exist_ok=True)
        (run_dir / DEEPSPEED_COPY).write_text(json.dumps(ds_config, indent=2) + "\n", encoding="utf-8")
        for name in ("manifest.json", "tokenizer.json"):
            shutil.copy(Path(config.data.corpus) / name, run_dir / CORPUS_COPY / name)
        (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    barrier()


def _introduce(run: Run, manifest: Manifest, say: Callable[[str], None]) -> None:
    cfg, engine, world, share = run.config, run.engine, run.world, run.stream.share
    parameters = sum(parameter.numel() for parameter in engine.module.parameters()) / 1e6
    schedule = f", ALIGN every {run.hook.interval} steps" if run.hook.interval else ""
    keep = f", {run.hook.keep(1)} of {manifest.seq_len} tokens in dropped layers" if run.hook.drops else ""
    entropy = f"unigram entropy {manifest.unigram_entropy:.3f} nats"
    rows = f"{share.global_batch} rows a step = {share.world} x {share.micro_batch} x {share.accumulation}"
    say(f"model     {cfg.model.layers} layers x {cfg.model.hidden_size}, {parameters:.1f}M parameters")
    say(f"arm       {cfg.arm}{keep}{schedule}")
    say(f"corpus    {cfg.data.corpus}: {len(run.stream.rows):,} rows, {entropy}")
    say(f"engine    DeepSpeed, ZeRO-{cfg.train.zero_stage}, {cfg.train.precision}, {world.size} x {world.device.type}")
    say(f"batch     {rows} (ranks x rows at once x accumulation)")
    say(f"run       {run.run_dir}")


def _finish(run_dir: Path, config: Config, manifest: Manifest, say: Callable[[str], None]) -> None:
    validations = [record for record in read_metrics(run_dir) if record.get("valid_loss") is not None]
    if validations:
        last = validations[-1]
        gap = manifest.unigram_entropy - last["valid_loss"]
        side = "below" if gap > 0 else "ABOVE"
        entropy = f"{abs(gap):.2f} nats {side} the unigram entropy {manifest.unigram_entropy:.4f}"
        say(f"held-out  loss {last['valid_loss']:.4f}, {entropy}; masked accuracy {last['valid_accuracy']:.1%}")
    out = run_dir / "export"
    export_run(run_dir, out)
    say(f"exported  {out}")
    if config.run.examples:
        for line in fill_mask(out, config.run.examples):
            say(f"  {line}")
    say("next")
    say(f"  tensorboard --logdir {run_dir.parent if str(run_dir.parent) != '.' else run_dir}")
    say(f"  python -c \"from transformers import pipeline; print(pipeline('fill-mask', '{out}')('A [MASK] object.'))\"")
    say(f"  sctd export {run_dir} --out my-bert/")


def _silent(text: str) -> None:
    pass
