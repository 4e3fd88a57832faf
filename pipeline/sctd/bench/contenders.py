"""The models that are compared, each with a batch: ours by arm, transformers, and DeepSpeed's random-LTD."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from sctd.bench.timing import DEVICE
from sctd.config import Config
from sctd.corpus.tokenizer import SpecialIds
from sctd.data.masking import Masker
from sctd.errors import UserError
from sctd.model.convert import HEADS, to_hf_config
from sctd.model.shape import BertShape
from sctd.model.token_dropping import kept_tokens
from sctd.objective.build import build_model, shape_of
from sctd.objective.pretraining import PretrainingModel
from sctd.objective.schedule import Phase
from sctd.train.engine.devices import DTYPES
from sctd.train.flops import step_flops

SPECIAL = SpecialIds(pad=0, unk=100, cls=101, sep=102, mask=103)
_VOCABULARY = 30522  # where the recipe leaves it to a corpus

# name -> (arm, phase); in the order of the table
OURS = {
    "full": ("baseline", Phase.FULL),
    "drop": ("token_drop", Phase.DROP),
    "align": ("sctd", Phase.ALIGN),
    "random_ltd": ("random_ltd", Phase.DROP),
}
LTD = "deepspeed_random_ltd"
CONTENDERS = ("transformers", *OURS, LTD)


def choose(arms: str | None) -> list[str]:
    """The contenders to measure: those named, beside the two that the others are compared with."""
    asked = set(CONTENDERS) if arms is None else {name.strip() for name in arms.split(",")}
    strangers = sorted(asked - set(CONTENDERS))
    if strangers:
        raise UserError(f"--arms: there is no {strangers[0]!r}; choose from {','.join(CONTENDERS)}")
    return [name for name in CONTENDERS if name in asked | {"transformers", "full"}]


class Contender:
    """One of `CONTENDERS` at one size, with fused AdamW: a forward or a whole training step on call.

    Args:
        flops: of one step, forward and backward, as the arm's mathematics needs them.
    """

    def __init__(self, name: str, config: Config, rows: int, length: int) -> None:
        torch.manual_seed(0)
        self.shape = make_shape(config, length)
        batch = make_batch(config, self.shape.vocab_size, rows, length)
        arm, phase = OURS.get(name, ("baseline", Phase.FULL))
        config = replace(config, arm=arm)
        keep = kept_tokens(config.model.keep_ratio, length)
        self.model: nn.Module
        if name == "transformers":
            self.model, self._loss = _transformers(config, self.shape, batch)
        else:
            self.model, self._loss = _ours(config, self.shape, batch, phase, keep, name == LTD)
        self.model.to(DEVICE).train()
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        precision = config.train.precision
        self._autocast = torch.autocast(DEVICE.type, DTYPES[precision], enabled=precision != "fp32")
        of_arm, of_phase = OURS["random_ltd"] if name == LTD else (arm, phase)  # DeepSpeed's counts as ours does
        self.flops = rows * step_flops(replace(config, arm=of_arm), self.shape, length).row(of_phase, keep)

    def forward(self) -> None:
        """The forward of training, without what the backward would need."""
        with torch.no_grad(), self._autocast:
            self._loss()

    def step(self) -> None:
        """Forward, backward, optimizer."""
        with self._autocast:
            loss = self._loss()
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def make_shape(config: Config, length: int) -> BertShape:
    model = config.model
    if length > model.max_positions:
        raise UserError(f"--sizes: rows of {length} tokens, model.max_positions is {model.max_positions}: raise it")
    if 0 < model.vocab_size <= SPECIAL.mask + 1:
        raise UserError(
            f"model.vocab_size is {model.vocab_size}: the rows measured here need more than {SPECIAL.mask + 1}"
        )
    return shape_of(config, model.vocab_size or _VOCABULARY)


def make_batch(config: Config, vocab: int, rows: int, length: int) -> dict[str, Tensor]:
    """Random tokens, packed full, masked as in training."""
    generator = np.random.default_rng(0)
    ids = generator.integers(SPECIAL.mask + 1, vocab, (rows, length))
    ids[:, 0], ids[:, -1] = SPECIAL.cls, SPECIAL.sep
    masker = Masker(0, vocab, SPECIAL.mask, SPECIAL.all, config.data.mask_probability)
    masked = masker(ids, np.arange(rows))
    batch = {
        "input_ids": torch.from_numpy(masked.input_ids_BS),
        "positions": torch.from_numpy(masked.positions_BM),
        "labels": torch.from_numpy(masked.labels_BM),
        "row_seed": torch.arange(rows),
    }
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def _ours(
    config: Config, shape: BertShape, batch: dict[str, Tensor], phase: Phase, keep: int, ltd: bool
) -> tuple[nn.Module, Callable[[], Tensor]]:
    model = _with_random_ltd(config, shape, keep) if ltd else build_model(config, shape, SPECIAL, DEVICE)

    def loss() -> Tensor:
        value, _ = model(**batch, phase=phase, keep=keep)
        if model.importance is not None:
            model.importance.commit(True)
        return value

    return model, loss


def _transformers(config: Config, shape: BertShape, batch: dict[str, Tensor]) -> tuple[nn.Module, Callable[[], Tensor]]:
    hf = to_hf_config(shape, SPECIAL.pad, SPECIAL.cls, SPECIAL.sep)
    model = getattr(transformers, HEADS[shape.family])._from_config(hf, attn_implementation="sdpa")
    if config.train.checkpoint_activations:
        model.gradient_checkpointing_enable()
    if config.train.compile:
        model.compile()
    labels = torch.full_like(batch["input_ids"], -100).scatter_(1, batch["positions"], batch["labels"])
    return model, lambda: model(input_ids=batch["input_ids"], labels=labels).loss


class _RandomLtdLayer(nn.Module):
    """A layer inside DeepSpeed's wrapper, which passes on keyword arguments only."""

    def __init__(self, wrapper: nn.Module) -> None:
        super().__init__()
        self.wrapper = wrapper

    def forward(self, x: Tensor, context: None, mask: None, row_seed_B: Tensor) -> Tensor:
        return self.wrapper(x, row_seed_B=row_seed_B)


def _with_random_ltd(config: Config, shape: BertShape, keep: int) -> PretrainingModel:
    """All layers but the first and the last behind `deepspeed`'s random-LTD wrapper and its CUDA operations."""
    from deepspeed.runtime.data_pipeline.data_routing.basic_layer import RandomLayerTokenDrop

    # Its operations are no graph: what is compiled breaks at each of them.
    model = build_model(replace(config, train=replace(config.train, compile=False)), shape, SPECIAL, DEVICE)
    layers = model.bert.layers
    middle = range(1, len(layers) - 1)
    # What its wrapper asks of a scheduler, at a constant number of kept tokens.
    scheduler = SimpleNamespace(
        state={"max_value": 1 << 20}, random_ltd_layer_num=len(middle), get_current_seq=lambda: keep
    )
    options = {
        "model_mask_name": None, "micro_batch_size": 0, "hidden_state_order": "batch_seq_dim", "model_type": "decoder",
    }  # fmt: skip
    for number, place in enumerate(middle):
        wrapper = RandomLayerTokenDrop(layers[place])
        wrapper.init_config(options, scheduler, number)
        layers[place] = _RandomLtdLayer(wrapper)
    if config.train.compile:
        model.compile()
    return model


def random_ltd_missing(family: str = "bert") -> str | None:
    """Why DeepSpeed's random-LTD operations cannot be used here, in layers of this family; None where they can."""
    if family == "modernbert":
        return "its wrapper does not pass on the places of the kept tokens, which rotary positions need"
    try:
        from deepspeed.ops.op_builder import RandomLTDBuilder

        RandomLTDBuilder().load()
    except Exception as error:  # a build can fail in any way; whichever it is goes into the table
        return " ".join(str(error).split())[:120] or type(error).__name__
    return None
