"""Where the weights of a new run come from: `init.from`.

A model of transformers (hub id or folder, with or without its masked-language-model head), an export, a run or a step
of one. Sizes are the checkpoint's; the tokenizer must be the corpus', which may have grown (`--add-vocabulary`).

    name -> open_source -> Source (shape, tokenizer)       light: configuration and tokenizer only
         -> sized        -> the recipe with the source's sizes
         -> Source.read  -> weights under our names, rows and positions grown, in float32
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from sctd.config import (
    Config,
    ModelConfig,
    absolute_run,
    config_from_dict,
    keys_said,
    load_config,
    parse_run,
    to_dict,
)
from sctd.corpus.manifest import load_corpus_tokenizer, read_manifest
from sctd.corpus.tokenizer import grown_pieces, load_tokenizer, vocab_size
from sctd.errors import UserError, one_line
from sctd.files import read_json_object
from sctd.model.convert import from_hf_config, from_hf_state
from sctd.model.shape import BertShape
from sctd.objective.build import MEASURED_STEPS, bert_shape, has_table, measuring_steps, row_lengths
from sctd.train.keep import checkpoint
from sctd.train.keep.export import CORPUS_COPY, read_run

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*.json", "vocab.txt"]
_INDEX = "model.safetensors.index.json"
_FIXED = (  # by the checkpoint
    "family", "layers", "hidden_size", "heads", "intermediate_size", "layer_norm_eps", "window", "global_every",
    "local_theta",
)  # fmt: skip
_KEPT = ("dropout", "attention_dropout", "initializer_range")  # unless the recipe sets them


@dataclass(frozen=True)
class Source:
    """A model to start from.

    Args:
        name: as the user has it.
        load: its weights under our names, in any floating-point type, and the names of those that have no place here.
        has_table: whether it has importance scores; load_scores: they, float32 (V,).
    """

    name: str
    shape: BertShape
    tokenizer: Tokenizer
    load: Callable[[], tuple[dict[str, Tensor], list[str]]]
    has_table: bool = False
    load_scores: Callable[[], Tensor | None] = lambda: None

    def read(self, shape: BertShape, tokenizer: Tokenizer, positions: str) -> "Start":
        """The weights for a model of `shape`, whose vocabulary and positions may have grown.

        Args:
            tokenizer: the corpus'. positions: see `init.positions`.

        Raises:
            UserError: another tokenizer, or weights that are missing, of another size or unreadable.
        """
        try:
            grown = grown_pieces(self.tokenizer, tokenizer)
        except UserError as error:
            raise UserError(f"init.from: the corpus was not made with the tokenizer of {self.name}: {error}") from None
        state, left_out = self._blamed(self.load)
        state = {name: tensor.float() for name, tensor in state.items()}
        if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
            raise UserError(
                f"init.from={self.name}: {broken[0]} has numbers that are not finite: use another checkpoint"
            )
        for name in ("embeddings.word.weight", "head.bias"):
            if name in state:
                state[name] = _grow_rows(state[name], shape.vocab_size, grown)
        if not shape.is_modern:
            table_SD = state["embeddings.position.weight"]
            state["embeddings.position.weight"] = _grow_positions(table_SD, shape.max_positions, positions)
        scores_V = self._blamed(self.load_scores)
        if scores_V is not None and len(scores_V) != shape.vocab_size:
            scores_V = _grow_rows(scores_V, shape.vocab_size, grown)
        return Start(self.name, state, len(grown), self.shape.max_positions, left_out, scores_V)

    def _blamed(self, load: Callable[[], Any]) -> Any:
        try:
            return load()
        except (UserError, OSError, SafetensorError) as error:
            raise UserError(f"init.from={self.name}: {one_line(error)}") from None


@dataclass(frozen=True)
class Start:
    """The weights that a run starts from.

    Args:
        state: by our names, float32, without those of the head where the source has none.
        grown: rows of the vocabulary that begin as means. positions: of the source.
        scores_V: float32, importance scores; None: to be measured.
    """

    name: str
    state: dict[str, Tensor]
    grown: int
    positions: int
    left_out: list[str]
    scores_V: Tensor | None

    @property
    def has_head(self) -> bool:
        return any(name.startswith("head.") for name in self.state)

    def load_into(self, model: torch.nn.Module) -> None:
        """Into a `Bert` of the shape that `state` was read for; a head that it lacks stays as it was initialised."""
        missing, unexpected = model.load_state_dict(self.state, strict=False)
        assert not unexpected and all(name.startswith("head.") for name in missing), (missing, unexpected)

    def describe(self, shape: BertShape) -> str:
        """A line: what was taken, and what begins anew."""
        parts = [f"{self.name}: {shape.layers} layers x {shape.hidden_size}"]
        if not self.has_head:
            parts.append("no masked-language-model head: it begins as initialised, tied to the word embeddings")
        if self.grown:
            parts.append(f"{self.grown:,} new pieces begin as the mean of the pieces that they were")
        if shape.max_positions > self.positions and not shape.is_modern:
            parts.append(f"positions {self.positions} -> {shape.max_positions}")
        if self.left_out:
            more = f" and {len(self.left_out) - 1} more" if len(self.left_out) > 1 else ""
            parts.append(f"left out: {self.left_out[0]}{more}")
        return "; ".join(parts)


def load_sized(recipe: str, overrides: Sequence[str] = (), resume: bool = False) -> Config:
    """`load_config`, with the sizes of the model that `init.from` names, if it names one.

    Args:
        resume: whether the run goes on: its own sizes hold then.

    Raises:
        UserError: see `load_config` and `sized`; a run that was not started from that model.
    """
    config = load_config(recipe, overrides)
    if not config.init.from_:
        return config
    run_dir, stored = Path(config.run.dir), None
    if resume and any(checkpoint.checkpoints(run_dir)):
        stored = read_run(run_dir)
        if absolute_source(stored.init.from_) != absolute_source(config.init.from_):
            other = f"from {stored.init.from_}" if stored.init.from_ else "from random weights"
            raise UserError(
                f"--resume: {run_dir} was started {other}, and goes on with its own weights: leave out init.from, or "
                "start another run.dir without --resume"
            )
        config = replace(config, init=replace(config.init, from_=stored.init.from_))
    return sized(config, keys_said(recipe, overrides), stored)


def sized(config: Config, said: Collection[str], stored: Config | None = None) -> Config:
    """The configuration with the sizes of the model that `init.from` names.

    Args:
        said: keys that the recipe or the command line sets.
        stored: configuration of the run that is resumed, if one is: the source may be gone by then.

    Raises:
        UserError: no such source, or a recipe that contradicts it.
    """
    if stored is not None:
        if "objective.importance_warmup" not in said:
            config = replace(
                config, objective=replace(config.objective, importance_warmup=stored.objective.importance_warmup)
            )
        taken = {item.name: getattr(stored.model, item.name) for item in fields(ModelConfig)}
        return _with_model(config, {name: value for name, value in taken.items() if f"model.{name}" not in said})
    source = open_source(config.init.from_)
    shape, model = source.shape, config.model
    taken = {name: getattr(shape, name) for name in _FIXED}
    taken |= {name: getattr(shape, name) for name in _KEPT if f"model.{name}" not in said}
    taken["theta"] = shape.rotary_theta if shape.is_modern else None  # it must not change with the positions
    manifest = read_manifest(Path(config.data.corpus)) if config.data.corpus else None
    rows, ids = (row_lengths(config, manifest)[0], manifest.vocab_size) if manifest else (0, 0)
    taken["vocab_size"] = max(shape.vocab_size, ids)
    wanted = max(rows, model.max_positions if "model.max_positions" in said else 0)
    if wanted > shape.max_positions and config.init.positions == "error" and not shape.is_modern:
        raise UserError(
            f"init.from: {wanted} positions are needed, and {source.name} has {shape.max_positions}: "
            "init.positions=interpolate or tile makes them, or prepare the corpus with a smaller --seq-len"
        )
    taken["max_positions"] = max(shape.max_positions, wanted)
    for name, value in taken.items():
        mine = getattr(model, name)
        larger = name == "vocab_size" and not 0 < mine < value
        if f"model.{name}" in said and mine != value and not larger:
            raise UserError(
                f"init.from: model.{name} is {mine!r} in the recipe, and {value!r} in {source.name}"
                f"{' with this corpus' if name in ('vocab_size', 'max_positions') else ''}: leave it out, or use the "
                "recipe `continue`, which sets no sizes"
            )
    warmup = config.objective.importance_warmup
    if warmup is None:
        warmup = 0 if source.has_table or not has_table(config) else min(MEASURED_STEPS, config.train.steps // 2)
    elif warmup == 0 and has_table(config) and not source.has_table:
        raise UserError(
            f"init.from: objective.importance_warmup is 0, and {source.name} has no importance table: all tokens would "
            "be equal to a model that knows them; leave it out"
        )
    return _with_model(_with_warmup(config, warmup), taken | {"vocab_size": max(taken["vocab_size"], model.vocab_size)})


def _with_warmup(config: Config, steps: int | None) -> Config:
    return replace(config, objective=replace(config.objective, importance_warmup=steps))


def _with_model(config: Config, taken: dict[str, Any]) -> Config:
    try:
        return config_from_dict(to_dict(replace(config, model=replace(config.model, **taken))))
    except UserError as error:
        raise UserError(f"init.from={config.init.from_}: with the sizes of that model, {error}") from None


def absolute_source(name: str) -> str:
    """The name of a source as it is to be called from another folder; hub ids stay."""
    return absolute_run(name) if name and parse_run(name)[0].exists() else name


def open_source(name: str) -> Source:
    """A model to start from, without its weights.

    Args:
        name: hub id, folder of transformers, export, RUN or RUN@STEP.

    Raises:
        UserError: there is no such model, or it is not one of ours.
    """
    run_dir, step = parse_run(name)
    if (run_dir / "config.yaml").is_file() or step is not None:
        return _open_run(name, run_dir, step)
    folder = Path(name).expanduser()
    if not folder.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(f"init.from={name}: there is no such folder")
        folder = _download(name)
    return _open_folder(name, folder)


def _open_run(name: str, run_dir: Path, step: int | None) -> Source:
    config, corpus = read_run(run_dir), run_dir / CORPUS_COPY
    path, manifest = checkpoint.choose(run_dir, step), read_manifest(corpus)

    def load() -> tuple[dict[str, Tensor], list[str]]:
        weights = checkpoint.read_weights(path)
        return {key.removeprefix("bert."): tensor for key, tensor in weights.items()}, []

    tokenizer, scores = load_corpus_tokenizer(corpus, manifest), partial(checkpoint.read_importance, path)
    measured = has_table(config) and checkpoint.step_of(path) not in measuring_steps(config)[:-1]
    return Source(name, bert_shape(config, manifest), tokenizer, load, measured, scores if measured else lambda: None)


def _open_folder(name: str, folder: Path) -> Source:
    config = _read_config(name, folder)
    try:
        shape, tokenizer = from_hf_config(config), load_tokenizer(str(folder))
    except UserError as error:
        raise UserError(f"init.from={name}: {error}") from None
    if vocab_size(tokenizer) > shape.vocab_size:
        raise UserError(f"init.from={name}: its tokenizer has {vocab_size(tokenizer):,} ids, and its config.json says "
                        f"vocab_size {shape.vocab_size:,}: they do not belong together")  # fmt: skip
    files = _weight_files(name, folder)

    def load() -> tuple[dict[str, Tensor], list[str]]:
        state: dict[str, Tensor] = {}
        for file in files:
            state |= load_file(file)
        return from_hf_state(state, shape)

    return Source(name, shape, tokenizer, load)


def _read_config(name: str, folder: Path) -> "PreTrainedConfig":
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise UserError(f"init.from={name}: no model of transformers (no config.json) and no run (no config.yaml)")
    try:
        return AutoConfig.from_pretrained(str(folder))
    except Exception as error:  # it raises from many unrelated classes
        raise UserError(f"init.from={name}: config.json cannot be read: {one_line(error)}") from None


def _weight_files(name: str, folder: Path) -> list[Path]:
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = read_json_object(folder / _INDEX)
    if index is not None and isinstance(index.get("weight_map"), dict):
        parts = sorted({folder / str(part) for part in index["weight_map"].values()})
        if gone := [part.name for part in parts if not part.is_file()]:
            raise UserError(f"init.from={name}: {gone[0]} is missing, which {_INDEX} names: fetch it again")
        return parts
    code = "from transformers import AutoModelForMaskedLM as M, AutoTokenizer as T; "
    code += f"[each.from_pretrained('{name}').save_pretrained('OUT') for each in (M, T)]"
    raise UserError(
        f"init.from={name}: no model.safetensors; a .bin is a pickle, which can run any code when it is read: if you "
        f'trust it, convert it with: python -c "{code}"'
    )


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except Exception as error:  # the hub client raises from a dozen unrelated classes
        raise UserError(
            f"init.from={name}: no such folder or run, and the hub does not give it ({type(error).__name__}: "
            f"{one_line(error).split('. ')[0][:80]}): check the name, or "
            "download it where there is a network, and name the folder"
        ) from None


def _grow_rows(rows: Tensor, size: int, grown: dict[int, list[int]]) -> Tensor:
    """(V, ...) -> (`size`, ...): a grown row is the mean of its pieces' rows, one without a piece the mean of all."""
    whole = rows.new_empty(size, *rows.shape[1:])
    whole[: len(rows)] = rows
    whole[len(rows) :] = rows.mean(0)
    for number, pieces in grown.items():
        whole[number] = rows[pieces].mean(0)
    return whole


def _grow_positions(table_SD: Tensor, size: int, how: str) -> Tensor:
    """(S, D) -> (`size`, D)."""
    positions = len(table_SD)
    if size == positions:
        return table_SD
    if how == "tile":
        return table_SD[torch.arange(size) % positions]
    return F.interpolate(table_SD.T[None], size=size, mode="linear", align_corners=True)[0].T.contiguous()
