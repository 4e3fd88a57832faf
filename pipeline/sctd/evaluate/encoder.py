"""What is evaluated: any BERT-like model that transformers can load, a run of ours, a checkpoint of one, or weights."""

import copy
import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sctd.corpus.tokenizer import special_ids, transformers_tokenizer
from sctd.errors import UserError
from sctd.files import read_json_object, sha256, write_json
from sctd.model.convert import to_hf_config, to_hf_state
from sctd.model.shape import BertShape
from sctd.train.keep import checkpoint
from sctd.train.keep.export import EXPORT, export_run, read_facts, seal_of

EVALUATION = "evaluation"  # the folder in a run that holds a folder for each evaluated step
ENCODER = "encoder.json"  # what the results beside it were measured on
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_SMALL = ("config.json", "tokenizer.json", "vocab.txt")
_IDENTITY = 16  # hexadecimal digits


@dataclass(frozen=True)
class Weights:
    """A model in memory: a configuration of transformers, a state dict under its names, and its fast tokenizer."""

    config: Any
    state: dict[str, Tensor]
    tokenizer: Any


@dataclass(frozen=True)
class Encoder:
    """A checkpoint that can be evaluated.

    Args:
        spec: as the user named it.
        source: the folder or hub id that transformers loads, or weights in memory.
        name: for tables: of the run, the folder or the hub id; a run's earlier checkpoint is NAME@STEP.
        identity: hash of weights, configuration and vocabulary; results of different identities are never mixed.
        home: the folder that its results go to; None where it is in no run, and the user has to say.
        facts: of an export of ours: arm, step, tokens, dropped (first and one behind the last dropped layer), ...
    """

    spec: str
    source: str | Weights
    name: str = ""
    identity: str = ""
    home: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def results(self, out: Path | None = None) -> Path:
        """The folder of its results, `out` or its home, marked as this encoder's.

        Raises:
            UserError: no folder is known, or it holds the results of another encoder.
        """
        folder = out or self.home
        if folder is None:
            raise UserError(f"{self.spec} is not part of a run: say with --out where its results go")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is not a folder: choose another one with --out")
        if not (folder / ENCODER).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            facts = {"spec": self.spec, "name": self.name, "identity": self.identity, "facts": self.facts}
            write_json(folder / ENCODER, facts)
        mark = read_mark(folder)
        if mark["identity"] != self.identity:
            raise UserError(f"{folder} holds results of another checkpoint ({mark['spec']}): choose another --out")
        return folder


def open_encoder(spec: str) -> Encoder:
    """What `spec` is: a run (its newest whole checkpoint), a checkpoint of a run, a transformers folder or a hub id.

    A checkpoint of ours is exported first, into the folder of its results.

    Raises:
        UserError: nothing of the kind, or no encoder of BERT's kind.
    """
    path = Path(spec).expanduser()
    if (path / "config.yaml").is_file():
        newest = checkpoint.newest_whole(path)
        if newest is None:
            raise UserError(f"{spec}: this run has no checkpoint yet: train it to its first save")
        return _of_run(spec, path, newest)
    run = path.absolute().parent.parent
    if (run / "config.yaml").is_file() and path.absolute() in checkpoint.checkpoints(run):
        damage = checkpoint.verify(path)
        if damage:
            raise UserError(f"checkpoint {spec} is damaged ({damage}): choose another one")
        return _of_run(spec, run, path)
    if path.is_dir():
        facts, home, name = read_facts(path), None, path.resolve()
        if name.name == EXPORT:
            name = name.parent
            home = evaluation_folder(name, facts["step"]) if facts and (name / "config.yaml").is_file() else None
        return _checked(Encoder(spec, str(path), name.name, _hash(path), home, facts))
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise UserError(f"{spec}: no such folder: give a run, a checkpoint of it, a transformers folder or a hub id")
    commit = getattr(load_config(spec), "_commit_hash", None) or ""
    return _checked(Encoder(spec, spec, spec, hashlib.sha256(f"{spec} {commit}".encode()).hexdigest()[:_IDENTITY]))


def from_memory(state: dict[str, Tensor], shape: BertShape, tokenizer: Tokenizer) -> Encoder:
    """The encoder of these weights of ours; no file is written. It computes what their export would, bit for bit."""
    special = special_ids(tokenizer)
    config = to_hf_config(shape, special.pad, special.cls, special.sep)
    fast = transformers_tokenizer(tokenizer, shape.max_positions, has_token_types=not shape.is_modern)
    return Encoder("the run's weights", Weights(config, to_hf_state(state, shape), fast))


def load_config(source: str | Weights) -> Any:
    """The transformers configuration of a folder, hub id or weights.

    Raises:
        UserError: there is none.
    """
    if isinstance(source, Weights):
        return copy.deepcopy(source.config)
    from huggingface_hub.utils import logging
    from transformers import AutoConfig

    logging.set_verbosity_error()  # a machine without network says so once, here
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)  # None would ask whoever sits there
    except Exception as error:  # the hub client raises from a dozen unrelated classes
        what = "no config.json that transformers can read" if Path(source).is_dir() else "no folder, and not on the hub"
        raise UserError(f"{source}: {what} ({type(error).__name__}): give a run, a folder or a hub id") from None


def best_device() -> torch.device:
    """Where models are evaluated: one GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_weights(encoder: Encoder, head: str, **options: Any) -> Any:
    """The transformers model of this class, in float32. `options`: of its configuration.

    Raises:
        UserError: its weights cannot be loaded.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    source, config, model = encoder.source, load_config(encoder.source), getattr(transformers, head)
    for name, value in options.items():
        setattr(config, name, value)
    try:
        if isinstance(source, str):
            return model.from_pretrained(source, config=config, dtype=torch.float32)
        with torch.device("meta"):
            model = type(model.from_config(config))  # Auto classes take no weights from memory, the model's own does
        state = {name: tensor.clone() for name, tensor in source.state.items()}  # fine-tuning changes what it is given
        return model.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    except Exception as error:  # the hub client and safetensors raise from a dozen unrelated classes
        what = " ".join(str(error).split())[:200]
        raise UserError(f"{encoder.spec}: its weights cannot be loaded ({type(error).__name__}: {what})") from None


def load_tokenizer(encoder: Encoder) -> Any:
    """Its fast transformers tokenizer.

    Raises:
        UserError: none, a slow one, or one with more ids than the model has embeddings.
    """
    from transformers import AutoTokenizer

    if isinstance(encoder.source, Weights):
        return copy.deepcopy(encoder.source.tokenizer)  # its users set truncation
    try:
        tokenizer = AutoTokenizer.from_pretrained(encoder.source, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{encoder.spec}: its tokenizer cannot be loaded ({type(error).__name__}): add it") from None
    # Where its files are missing, transformers makes one of the special tokens alone.
    if not tokenizer.is_fast or len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"{encoder.spec}: it has no fast tokenizer (tokenizer.json or vocab.txt): add one")
    size = load_config(encoder.source).vocab_size
    if not size / 2 <= len(tokenizer) <= size:  # vocabularies are padded, but not to twice their size
        raise UserError(
            f"{encoder.spec}: its tokenizer has {len(tokenizer)} ids, the model {size} embeddings: "
            "the tokenizer belongs to another model"
        )
    return tokenizer


def distinct_names(names: list[str], specs: list[str]) -> list[str]:
    """Each name, or where two are the same, what the user called it."""
    return [spec if names.count(name) > 1 else name for name, spec in zip(names, specs, strict=True)]


# ---- in runs -----------------------------------------------------------------------------------------------------


def evaluation_folder(run: Path, step: int) -> Path:
    """Where the results of a run's checkpoint go."""
    return run / EVALUATION / f"step-{step:08d}"


def read_mark(folder: Path) -> dict[str, Any]:
    """What `Encoder.results` wrote there: spec, name, identity, facts.

    Raises:
        UserError: it cannot be read.
    """
    mark = read_json_object(folder / ENCODER) or {}
    if not {"spec", "name", "identity", "facts"} <= mark.keys():
        raise UserError(f"{folder / ENCODER} cannot be read: give the folder of an evaluation")
    return mark


def is_of_others(folder: Path, path: Path) -> bool:
    """Whether the results in a folder are known to be of other weights than those of a checkpoint of a run."""
    return (folder / ENCODER).is_file() and read_mark(folder)["facts"].get("checkpoint") != seal_of(path)


def _of_run(spec: str, run: Path, path: Path) -> Encoder:
    """The encoder of a whole checkpoint, exported where it is not yet."""
    step, seal = checkpoint.step_of(path), seal_of(path)
    home = evaluation_folder(run, step)
    places = (run / EXPORT, home / EXPORT)
    source = next((place for place in places if read_facts(place).get("checkpoint") == seal), None)
    if source is None:
        source = _export(run, home, step)
    is_newest = step == checkpoint.step_of(checkpoint.checkpoints(run)[0])
    name = run.resolve().name + ("" if is_newest else f"@{step}")
    return _checked(Encoder(spec, str(source), name, _hash(source), home, read_facts(source)))


def _export(run: Path, home: Path, step: int) -> Path:
    """Export a checkpoint into the folder of its results; of processes that do so at once, the first one's stays."""
    out = home / EXPORT
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{EXPORT}-", dir=home) as own:
        made = Path(own) / EXPORT
        export_run(run, made, step)
        try:
            made.rename(out)
        except OSError:
            if read_facts(out) != read_facts(made):  # of another run that had this folder
                shutil.rmtree(out)
                made.rename(out)
    return out


def _checked(encoder: Encoder) -> Encoder:
    """Refuse what is not an encoder with masked language modelling in its past, before anything is computed."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config = load_config(encoder.source)
    decodes = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    if config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or decodes:
        raise UserError(f"{encoder.spec}: a {config.model_type} model is not an encoder like BERT: choose another one")
    return encoder


def _hash(folder: Path) -> str:
    """Of weights, vocabulary, and what the configuration says without the version of the library that wrote it."""
    files = sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
    if not files:
        raise UserError(f"{folder}: no weights (model.safetensors) in it: give a run, or a transformers folder")
    digest = hashlib.sha256()
    for path in (*(folder / name for name in _SMALL), *files):
        config = read_json_object(path) if path.name == "config.json" else None
        if config is not None:
            config.pop("transformers_version", None)
            digest.update(hashlib.sha256(json.dumps(config, sort_keys=True).encode()).digest())
        elif path.is_file():
            digest.update(bytes.fromhex(sha256(path)))
    return digest.hexdigest()[:_IDENTITY]
