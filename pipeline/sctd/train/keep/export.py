"""A run as a plain `transformers` BERT or ModernBERT: safetensors, config, tokenizer and model card in one folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from sctd.config import Config, config_from_dict
from sctd.corpus.manifest import Manifest, load_corpus_tokenizer, read_manifest
from sctd.corpus.tokenizer import save_tokenizer, special_ids
from sctd.errors import UserError
from sctd.files import new_folder, read_json_object, write_json
from sctd.model.convert import HEADS, to_hf_config, to_hf_state
from sctd.model.shape import BertShape
from sctd.objective.arms import ARMS
from sctd.objective.build import bert_shape, row_lengths
from sctd.train.keep import checkpoint
from sctd.train.keep.checkpoint import choose
from sctd.train.keep.metrics import latest, read_metrics

EXPORT = "export"  # the folder in a run that its end exports to
FACTS = "sctd.json"  # in an export: where it comes from
CORPUS_COPY = "corpus"  # manifest and tokenizer of the corpus, kept with the run so that it can be exported alone
_MARK = "made by sctd export"


def read_run(run_dir: Path) -> Config:
    """The configuration stored with a run.

    Raises:
        UserError: the folder holds no run.
    """
    try:
        tree = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{run_dir} holds no run (no config.yaml): give the run.dir of a pretraining run") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{run_dir / 'config.yaml'} is not readable YAML: restore it from a backup") from None
    return config_from_dict(tree)


def export_run(run_dir: Path, out: Path, step: int | None = None, scores: Sequence[tuple[str, str]] = ()) -> None:
    """Write a checkpoint of a run to `out` as a folder of transformers: BertForMaskedLM or ModernBertForMaskedLM.

    Args:
        step: which one; None: the newest whole one.
        scores: (what was measured, result with its uncertainty) for the model card.

    Raises:
        UserError: no run, no such checkpoint or not whole, or an `out` that holds something else.
    """
    config, out = read_run(run_dir), out.resolve()
    require_free(out)
    path, corpus = choose(run_dir, step), run_dir / CORPUS_COPY
    manifest = read_manifest(corpus)
    weights = checkpoint.read_weights(path)
    state = {name.removeprefix("bert."): tensor for name, tensor in weights.items()}
    with new_folder(out) as folder:
        write_model(folder, state, bert_shape(config, manifest), load_corpus_tokenizer(corpus, manifest))
        write_json(folder / FACTS, _facts(config, run_dir, path))
        card = _model_card(config, manifest, checkpoint.step_of(path), run_dir, scores)
        (folder / "README.md").write_text(card, encoding="utf-8")


def write_model(folder: Path, state: dict[str, Tensor], shape: BertShape, tokenizer: Tokenizer) -> None:
    """config.json, model.safetensors and tokenizer of a transformers model, from our state dict."""
    special = special_ids(tokenizer)
    hf_config = to_hf_config(shape, special.pad, special.cls, special.sep)
    hf_config.dtype = torch.float32
    hf_config.save_pretrained(folder)
    save_file(to_hf_state(state, shape), folder / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(tokenizer, folder, shape.max_positions, has_token_types=not shape.is_modern)


def read_facts(folder: Path) -> dict[str, Any]:
    """Where an export comes from: run, arm, seed, step, tokens, seconds, dropped layers; empty for other folders."""
    facts = read_json_object(folder / FACTS) or {}
    return facts if {"run", "arm", "step", "checkpoint"} <= facts.keys() else {}


def seal_of(path: Path) -> str:
    """The hash that vouches for all files of a checkpoint.

    Raises:
        UserError: its manifest cannot be read.
    """
    manifest = read_json_object(path / checkpoint.MANIFEST) or {}
    if "sha256" not in manifest:
        raise UserError(f"checkpoint {path} is damaged (its manifest is unreadable): choose another step")
    return str(manifest["sha256"])


def _facts(config: Config, run_dir: Path, path: Path) -> dict[str, Any]:
    step, arm = checkpoint.step_of(path), ARMS[config.arm]
    middle, record = arm.layer_plan(config.model).middle, record_at(run_dir, step)
    return {
        "run": run_dir.resolve().name,
        "arm": config.arm,
        "seed": config.run.seed,
        "step": step,
        "checkpoint": seal_of(path),
        "steps": config.train.steps,
        "dropped": [middle.start, middle.stop] if arm.drops else None,
        **{key: record.get(key) for key in ("tokens", "seconds", "valid_loss")},
    }


def fill_mask(folder: Path, sentences: Sequence[str], top: int = 3) -> list[str]:
    """Each sentence with its [MASK] filled by the exported model, and the runners-up, one line each."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    pipe = transformers.pipeline("fill-mask", str(folder), device="cpu", top_k=top)
    answers = [[f"{each['token_str']} {each['score']:.0%}" for each in pipe(sentence)] for sentence in sentences]
    return [f"{sentence}  ->  {', '.join(options)}" for sentence, options in zip(sentences, answers, strict=True)]


def require_free(out: Path) -> None:
    """An export may replace an earlier export, nothing else.

    Raises:
        UserError: something else is there.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    card = out / "README.md"
    if not (card.is_file() and _MARK in card.read_text(encoding="utf-8", errors="replace")):
        raise UserError(f"{out} holds something that is no export of a run: choose another folder")


def _model_card(config: Config, manifest: Manifest, step: int, run_dir: Path, scores: Sequence[tuple[str, str]]) -> str:
    record, model = record_at(run_dir, step), config.model
    rows = [
        ("arm", config.arm),
        ("optimizer steps", f"{step:,} of a horizon of {config.train.steps:,}"),
        ("rows a step", f"{config.train.batch_size:,} of {row_lengths(config, manifest)[0]} tokens"),
        ("layers x hidden size", f"{model.layers} x {model.hidden_size}"),
        ("optimizer, precision", f"{config.optimizer.name}, {config.train.precision}"),
        ("share of tokens kept in dropped layers", "all" if config.arm == "baseline" else f"{model.keep_ratio:.0%}"),
        ("data", ", ".join(source.spec for source in manifest.sources)),
        ("documents, tokens in the corpus", f"{manifest.documents:,}, {manifest.tokens:,}"),
        ("unigram entropy of the corpus (nats)", f"{manifest.unigram_entropy:.3f}"),
    ]
    origins = {"started from the weights of": config.init.from_, "branched from": config.run.branch_from}
    rows += [(label, name) for label, name in origins.items() if name]
    start, finish = config.schedule.full_start, config.schedule.full_finish
    if config.arm != "baseline" and start + finish:
        rows.append(("steps on the full path", f"the first {start:,} and the last {finish:,}"))
    if config.data.mask_stages:
        stages = "".join(f", {share:.0%} from step {first:,}" for first, share in config.data.mask_stages)
        rows.append(("share of tokens predicted", f"{config.data.mask_probability:.0%}{stages}"))
    labels = {
        "loss": "training loss, last log window (nats)",
        "valid_loss": "held-out MLM loss, full path (nats)",
        "valid_accuracy": "held-out masked accuracy",
        "seconds": "seconds of training",
    }
    rows += [(label, f"{record[key]:.4g}") for key, label in labels.items() if record.get(key) is not None]
    evaluation = f"## Evaluation\n\n| measured | result |\n|---|---|\n{_rows(scores)}\n" if scores else ""
    name, head = {"bert": "BERT", "modernbert": "ModernBERT"}[model.family], HEADS[model.family]
    untrained = "No next-sentence prediction: token type embeddings beyond type 0 are untrained.\n\n"
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: fill-mask\ntags: [{model.family}, masked-lm, token-dropping]\n"
        f"---\n\n# {name} pretrained with sctd ({config.arm})\n\n"
        f"A plain `{head}`: token dropping is a way of training and leaves no trace in the architecture.\n\n"
        f"| | |\n|---|---|\n{_rows(rows)}\n{evaluation}"
        f"{untrained if model.family == 'bert' else ''}"
        f"<!-- {_MARK} -->\n"
    )


def _rows(pairs: Sequence[tuple[str, str]]) -> str:
    """Of a Markdown table; globs and titles may hold what ends a cell."""
    cells = ([" ".join(text.split()).replace("|", "\\|") for text in pair] for pair in pairs)
    return "".join(f"| {name} | {value} |\n" for name, value in cells)


def record_at(run_dir: Path, step: int) -> dict[str, Any]:
    """The last logged value of each metric up to `step`; None is a loss that was not finite."""
    return latest(record for record in read_metrics(run_dir) if record["step"] <= step)
