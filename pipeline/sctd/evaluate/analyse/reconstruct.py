"""Held-out sentences, corrupted as training corrupts, and what a checkpoint makes of them.

The model sees whole rows, as in training: sentences are cut out of the rows afterwards, at full stops, question and
exclamation marks. Rows, masks and sentences are the same for every checkpoint and every run.

Legend: B rows of a batch, S positions a row, M predicted positions.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from sctd.config import Config
from sctd.corpus.manifest import Manifest, load_corpus_tokenizer
from sctd.data.hashing import STREAM_VALID, hash64
from sctd.data.masking import build_masker
from sctd.data.order import row_of_sample
from sctd.data.stream import Batch, Rows, make_batch
from sctd.errors import UserError
from sctd.evaluate.encoder import best_device
from sctd.objective.build import bert_shape, build_hook, build_model
from sctd.objective.pretraining import PretrainingModel
from sctd.objective.schedule import Phase
from sctd.train.keep import checkpoint

_SEED = 1
_BATCH = 16  # rows
_SHORTEST, _LONGEST = 8, 128  # tokens of a sentence
_ENDS = (".", "?", "!")


@dataclass(frozen=True)
class Sentences:
    """Sentences, and the rows that they stand in.

    Args:
        batches: the corrupted rows, as the model takes them.
        places: row number over all batches, first position and one behind the last, of each sentence.
        texts: the original ones. data: hash of all of it.
    """

    tokenizer: Tokenizer
    length: int
    batches: list[Batch]
    places: list[tuple[int, int, int]]
    texts: list[str]
    data: str

    def cut(self, ids_RS: NDArray[np.int64]) -> list[str]:
        """The sentences of rows that were filled."""
        pieces = [ids_RS[row, start:end].tolist() for row, start, end in self.places]
        return self.tokenizer.decode_batch(pieces, skip_special_tokens=True)


def sample_sentences(corpus: Path, manifest: Manifest, length: int, wanted: int) -> Sentences:
    """`wanted` sentences, or as many as there are, of held-out rows in a random order that is always the same.

    A sentence has 8 to 128 tokens, is whole as far as full stops tell, and has at least one predicted position.

    Raises:
        UserError: a corpus without held-out rows of this length, or without sentences in them.
    """
    tokenizer = load_corpus_tokenizer(corpus, manifest)
    rows = Rows(corpus, manifest, "valid", length)
    masker = build_masker(Config(), manifest, tokenizer)
    ends = {number for mark in _ENDS if (number := tokenizer.token_to_id(mark)) is not None}
    order = row_of_sample(int(hash64(_SEED, STREAM_VALID)), np.arange(len(rows)), len(rows))
    batches, places, pieces, digest = [], [], [], hashlib.sha256()
    for start in range(0, len(order), _BATCH):
        row_B = order[start : start + _BATCH]
        batch = make_batch(rows, masker, row_B, row_B)
        original_BS = batch["input_ids"].scatter(1, batch["positions"], batch["labels"]).tolist()
        for row, (ids, targets) in enumerate(zip(original_BS, batch["positions"].tolist(), strict=True), start):
            for first, end in _spans(ids, ends, manifest.special_ids.sep):
                if any(first <= target < end for target in targets):
                    places.append((row, first, end))
                    pieces.append(ids[first:end])
        batches.append(batch)
        for tensor in batch.values():
            digest.update(tensor.numpy().tobytes())
        if len(places) >= wanted:
            break
    if not places:
        raise UserError(f"{corpus}: its held-out rows have no sentence of {_SHORTEST} tokens: give another --corpus")
    places = places[:wanted]
    digest.update(str(places).encode())
    texts = tokenizer.decode_batch(pieces[:wanted], skip_special_tokens=True)
    return Sentences(tokenizer, length, batches, places, texts, digest.hexdigest()[:16])


class Reconstructor:
    """A checkpoint of a run, as it trained.

    Args:
        config, manifest: of the run.

    Attributes:
        drops: whether the run drops tokens at the step of this checkpoint.

    Raises:
        UserError: a checkpoint that lacks weights.
    """

    def __init__(self, path: Path, config: Config, manifest: Manifest, length: int) -> None:
        self._device = best_device()
        self._model = _load(path, config, manifest, self._device).to(self._device).eval()
        hook, step = build_hook(config, length), checkpoint.step_of(path)
        self.drops, self._keep = hook.phase(step) is not Phase.FULL, hook.keep(step, length)

    def fill(self, batches: Sequence[Batch], drop: bool) -> NDArray[np.int64]:
        """Rows with the likeliest id at each predicted position, int64 (rows, S).

        Args:
            drop: through the dropping path, else through the full one, as the exported model is.
        """
        return np.concatenate([self._fill(batch, Phase.DROP if drop else Phase.FULL) for batch in batches])

    @torch.no_grad()
    def _fill(self, batch: Batch, phase: Phase) -> NDArray[np.int64]:
        found: list[torch.Tensor] = []
        # One path alone calls the head once, on the predicted positions of the batch.
        hook = self._model.bert.head.register_forward_hook(lambda _, __, logits: found.append(logits.argmax(-1)))
        try:
            on_device = {name: tensor.to(self._device) for name, tensor in batch.items()}
            self._model(**on_device, phase=phase, keep=self._keep)
        finally:
            hook.remove()
        (best,) = found
        return batch["input_ids"].scatter(1, batch["positions"], best.view(batch["positions"].shape).cpu()).numpy()


def _load(path: Path, config: Config, manifest: Manifest, device: torch.device) -> PretrainingModel:
    # How it is computed may differ from the training, what is computed does not.
    train = dataclasses.replace(config.train, compile=False, checkpoint_activations=False)
    config = dataclasses.replace(config, train=train, model=dataclasses.replace(config.model, layer_norm="native"))
    model = build_model(config, bert_shape(config, manifest), manifest.special_ids, device)
    model.load_state_dict(checkpoint.read_weights(path))
    scores_V = checkpoint.read_importance(path)
    if model.importance is not None and scores_V is not None:
        model.importance.restore(scores_V)
    return model


def _spans(ids: Sequence[int], ends: set[int], separator: int) -> Iterator[tuple[int, int]]:
    """[start, end) of the sentences of a row: what stands between two ends of sentences or documents, and ends in one
    of a sentence. What the row begins with may be the rest of one."""
    start = None
    for place, number in enumerate(ids):
        if number not in ends and number != separator:
            continue
        if start is not None and number in ends and _SHORTEST <= place + 1 - start <= _LONGEST:
            yield start, place + 1
        start = place + 1
