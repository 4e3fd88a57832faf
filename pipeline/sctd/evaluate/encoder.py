"""What is evaluated: any BERT-like model that transformers can load, or a run of ours, or a checkpoint of one."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sctd.errors import UserError
from sctd.train.keep import checkpoint
from sctd.train.keep.export import EXPORT, export_run, read_facts, seal_of

EVALUATION = "evaluation"  # the folder in a run that holds a folder for each evaluated step
ENCODER = "encoder.json"  # what the results beside it were measured on
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_SMALL = ("config.json", "tokenizer.json", "vocab.txt")
_IDENTITY = 16  # hexadecimal digits


@dataclass(frozen=True)
class Encoder:
    """A checkpoint that can be evaluated.

    Args:
        spec: as the user named it.
        source: the folder or hub id that transformers loads.
        name: for tables: of the run, the folder or the hub id; a run's earlier checkpoint is NAME@STEP.
        identity: hash of weights, configuration and vocabulary; results of different identities are never mixed.
        home: the folder that its results go to; None where it is in no run, and the user has to say.
        facts: of an export of ours: arm, step, tokens, dropped (first and one behind the last dropped layer), ...
    """

    spec: str
    source: str
    name: str
    identity: str
    home: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def results(self, out: Path | None = None) -> Path:
        """The folder of its results, `out` or its home, marked as this encoder's.

        Raises:
            UserError: no folder is known, or it holds the results of another encoder.
        """
        folder = out or self.home
        if folder is None:
            raise UserError(f"{self.spec} is in no run: say with --out where its results go")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is no folder: choose another one with --out")
        if not (folder / ENCODER).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            facts = {"spec": self.spec, "name": self.name, "identity": self.identity, "facts": self.facts}
            with _beside(folder / ENCODER) as own:
                (own / ENCODER).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
                (own / ENCODER).replace(folder / ENCODER)
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
        facts, home = read_facts(path), None
        whole = path.resolve()
        if facts and whole.name == EXPORT and (whole.parent / "config.yaml").is_file():
            home = _home(whole.parent, facts["step"])
        name = (whole.parent if whole.name == EXPORT else whole).name
        return _checked(Encoder(spec, str(path), name, _hash(path), home, facts))
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise UserError(f"{spec}: no such folder: give a run, a checkpoint of it, a transformers folder or a hub id")
    config = load_config(spec)
    commit = getattr(config, "_commit_hash", None) or ""
    return _checked(Encoder(spec, spec, spec, hashlib.sha256(f"{spec} {commit}".encode()).hexdigest()[:_IDENTITY]))


def load_config(source: str) -> Any:
    """The transformers configuration of a folder or hub id.

    Raises:
        UserError: there is none.
    """
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
    """The transformers model of this class, in float32.

    Raises:
        UserError: its weights cannot be loaded.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return getattr(transformers, head).from_pretrained(encoder.source, dtype=torch.float32, **options)
    except Exception as error:  # the hub client and safetensors raise from a dozen unrelated classes
        what = " ".join(str(error).split())[:200]
        raise UserError(f"{encoder.spec}: its weights cannot be loaded ({type(error).__name__}: {what})") from None


def load_tokenizer(encoder: Encoder) -> Any:
    """Its fast transformers tokenizer.

    Raises:
        UserError: none, a slow one, or one with more ids than the model has embeddings.
    """
    from transformers import AutoTokenizer

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


def read_mark(folder: Path) -> dict[str, Any]:
    """What `Encoder.results` wrote there: spec, name, identity, facts.

    Raises:
        UserError: it cannot be read.
    """
    try:
        mark = dict(json.loads((folder / ENCODER).read_text(encoding="utf-8")))
        if {"spec", "name", "identity", "facts"} <= mark.keys():
            return mark
    except (OSError, ValueError, TypeError):
        pass
    raise UserError(f"{folder / ENCODER} cannot be read: give the folder of an evaluation")


def _of_run(spec: str, run: Path, path: Path) -> Encoder:
    """The encoder of a whole checkpoint."""
    step, seal = checkpoint.step_of(path), seal_of(path)
    home = _home(run, step)
    places = (run / EXPORT, home / EXPORT)
    source = next((place for place in places if read_facts(place).get("checkpoint") == seal), None)
    if source is None:
        source = home / EXPORT
        _export(run, source, step)
    is_newest = step == checkpoint.step_of(checkpoint.checkpoints(run)[0])
    name = run.resolve().name + ("" if is_newest else f"@{step}")
    return _checked(Encoder(spec, str(source), name, _hash(source), home, read_facts(source)))


def _export(run: Path, out: Path, step: int) -> None:
    """Export a checkpoint; where other processes do so too, the first one's stays and the others take it."""
    with _beside(out) as own:
        made = own / EXPORT
        export_run(run, made, step)
        try:
            made.rename(out)
        except OSError:
            if read_facts(out) != read_facts(made):  # of another run that had this folder
                shutil.rmtree(out)
                made.rename(out)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A folder of this process's own next to `path`, gone at the end: other jobs may write the same path now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as name:
        yield Path(name)


def is_of_others(folder: Path, path: Path) -> bool:
    """Whether the results in a folder are known to be of other weights than those of a checkpoint of a run."""
    return (folder / ENCODER).is_file() and read_mark(folder)["facts"].get("checkpoint") != seal_of(path)


def _home(run: Path, step: int) -> Path:
    return run / EVALUATION / f"step-{step:08d}"


def _checked(encoder: Encoder) -> Encoder:
    """Refuse what is no encoder with masked language modelling in its past, before anything is computed."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config = load_config(encoder.source)
    decodes = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    if config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or decodes:
        raise UserError(f"{encoder.spec}: a {config.model_type} model is no encoder like BERT: give one")
    return encoder


def _config_hash(path: Path) -> bytes:
    """Of what a configuration says, without the version of the library that wrote it."""
    text = path.read_bytes()
    with suppress(ValueError, TypeError):  # what is none is refused where it is loaded
        config = dict(json.loads(text))
        config.pop("transformers_version", None)
        text = json.dumps(config, sort_keys=True).encode()
    return hashlib.sha256(text).digest()


def _hash(folder: Path) -> str:
    files = sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
    if not files:
        raise UserError(f"{folder}: no weights (model.safetensors) in it: give a run, or a transformers folder")
    digest = hashlib.sha256()
    for path in (*(folder / name for name in _SMALL), *files):
        if path.is_file():
            with path.open("rb") as file:
                whole = (
                    _config_hash(path) if path.name == "config.json" else hashlib.file_digest(file, "sha256").digest()
                )
            digest.update(whole)
    return digest.hexdigest()[:_IDENTITY]
