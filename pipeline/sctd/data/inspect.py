"""`sctd inspect`: what a corpus holds, and rows of it in words, in the order and with the masks of a training."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from sctd.config import apply_override, config_from_dict
from sctd.corpus.manifest import Manifest, load_corpus_tokenizer, read_manifest, verify_file, verify_shards
from sctd.data.masking import build_masker
from sctd.data.stream import Rows, Share, TrainStream, valid_batches
from sctd.errors import UserError

_WIDTH = 110
_INDENT = "    "
_KEYS = ("data.mask_probability", "data.whole_word", "data.span_length", "data.replace")


def inspect(folder: Path, rows: int, length: int | None, split: str, seed: int, overrides: Sequence[str] = ()) -> str:
    """What a corpus holds, and its first rows as a training with `run.seed` = `seed` sees them.

    Args:
        rows: how many. length: tokens of each; None: the longest. split: train | valid.
        overrides: `section.key=value` of the training, keys that say how it masks.

    Raises:
        UserError: no such rows, a damaged corpus, or another key.
    """
    tree: dict[str, Any] = {"run": {"seed": seed}}
    for override in overrides:
        if override.partition("=")[0] not in _KEYS:
            raise UserError(f"override {override!r}: rows can be shown with {', '.join(_KEYS)}")
        apply_override(tree, override)
    config = config_from_dict(tree)
    if rows < 1:
        raise UserError(f"--rows {rows}: must be at least 1")
    manifest = read_manifest(folder)
    verify_shards(folder, manifest)
    tokenizer = load_corpus_tokenizer(folder, manifest)
    length = length or manifest.seq_len
    there = Rows(folder, manifest, split, length)
    masker = build_masker(config, manifest, tokenizer)
    files = _Files(folder, manifest, split, length)
    if split == "train":
        stream = TrainStream(there, masker, seed, Share(0, 1, rows, 1))
        row_B = stream.sample_rows(0)
        files.verify(row_B)
        (batch,) = stream.step(0)
        names = [f"sample {number:,}: " for number in range(rows)]
        shown = f"train rows in the order of run.seed={seed}"
    else:
        rows = min(rows, len(there))
        row_B, names, shown = np.arange(rows), [""] * rows, f"held-out rows with the masks of run.seed={seed}"
        files.verify(row_B)
        _, batch = next(valid_batches(there, masker, len(there), rows, 0, 1))
    parts = [_header(folder, manifest), f"shown     {shown}: [MASK:word] hidden, [other<-word] replaced, [=word] kept"]
    for name, row, *masked in zip(
        names, row_B.tolist(), *(batch[key].numpy() for key in ("input_ids", "positions", "labels")), strict=True
    ):
        parts.append(_row(name, files.place(row), manifest, tokenizer, *masked))
    return "\n\n".join(parts)


def _header(folder: Path, manifest: Manifest) -> str:
    lines = [
        f"corpus    {folder}: {manifest.documents:,} documents, {manifest.tokens:,} tokens of a vocabulary of "
        f"{manifest.vocab_size:,}, unigram entropy {manifest.unigram_entropy:.3f} nats"
    ]
    for length in manifest.seq_lens:
        train, valid = (manifest.split(length, split).rows for split in ("train", "valid"))
        lines.append(f"rows      {train:,} of {length} tokens for training, {valid:,} held out")
    for source in manifest.sources:
        share = source.tokens / max(1, manifest.tokens)
        weight = "" if source.weight is None else f", weight {source.weight:g}"
        lines.append(
            f"source    {source.name} ({source.spec}): {source.documents:,} documents, {source.tokens:,} tokens "
            f"({share:.1%}){weight}"
        )
    return "\n".join(lines)


# ---- where a row lies --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """A row among its neighbours. ends: positions of the [SEP] that end documents in it. before, after: the row with
    which it shares the document that it begins or ends with; -1: one in another file; None: none does."""

    row: int
    rows: int
    source: int
    ends: list[int]
    before: int | None
    after: int | None


class _Files:
    """The shards of a split, for what the rows themselves do not tell."""

    def __init__(self, folder: Path, manifest: Manifest, split: str, length: int) -> None:
        self._folder, self._length = folder, length
        self._shards = manifest.split(length, split).shards
        self._last = np.cumsum([shard.rows for shard in self._shards])

    def verify(self, row_B: NDArray[np.int64]) -> None:
        """UserError where one of the files that these rows lie in was altered."""
        for number in np.unique(np.searchsorted(self._last, row_B, side="right")):
            shard = self._shards[number]
            for item in (shard, shard.ends):
                verify_file(self._folder, item, hashed=True)

    def place(self, row: int) -> _Place:
        number = int(np.searchsorted(self._last, row, side="right"))
        shard = self._shards[number]
        inside = row - int(self._last[number]) + shard.rows
        ends = np.load(self._folder / shard.ends.file, mmap_mode="r", allow_pickle=False)
        begun = inside > 0 and self._is_cut(ends, inside - 1)
        cut = self._is_cut(ends, inside)
        after = (row + 1 if inside + 1 < shard.rows else -1) if cut else None
        positions = self._of(ends, inside)
        return _Place(row, int(self._last[-1]), shard.source, positions, row - 1 if begun else None, after)

    def _of(self, ends: NDArray[np.int64], inside: int) -> list[int]:
        first, last = np.searchsorted(ends, [inside * self._length, (inside + 1) * self._length])
        return (ends[first:last] - inside * self._length).tolist()

    def _is_cut(self, ends: NDArray[np.int64], inside: int) -> bool:
        """Whether a row's last document goes on: neither its last [SEP] nor the id before it ends one."""
        return not any(end >= self._length - 2 for end in self._of(ends, inside))


# ---- a row in words ----------------------------------------------------------------------------------------------


def _row(name: str, place: _Place, manifest: Manifest, tokenizer: Tokenizer, *masked: NDArray[np.int64]) -> str:
    """One row. masked: input_ids_S, positions_M and labels_M."""
    words, kinds = _words(manifest, tokenizer, *masked)
    targets = ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("hidden", "replaced", "kept"))
    source = manifest.sources[place.source].name
    documents = len(place.ends) + (place.after is not None)
    title = (
        f"{name}row {place.row:,} of {place.rows:,}, source {source}, documents: {documents}, "
        f"targets: {len(kinds)} ({targets})"
    )
    lines = [title]
    if place.before is not None:
        lines.append(f"{_INDENT}--- continues row {place.before:,} ---")
    for start, end in pairwise(sorted({0, *(end + 1 for end in place.ends), len(words)})):
        text = _joined(words[start:end])
        lines += textwrap.wrap(text, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT, break_on_hyphens=False)
        if end - 1 in place.ends:
            lines.append(f"{_INDENT}--- end of a document ---")
    if place.after is not None:
        where = "another file" if place.after < 0 else f"row {place.after:,}"
        lines.append(f"{_INDENT}--- continues in {where} ---")
    return "\n".join(lines)


def _words(
    manifest: Manifest, tokenizer: Tokenizer, input_S: NDArray[np.int64], position_M: Any, label_M: Any
) -> tuple[list[str], list[str]]:
    """The tokens of a row, targets in brackets, and what became of each target."""
    words = [_piece(tokenizer, number) for number in input_S.tolist()]
    kinds = []
    for position, label in zip(position_M.tolist(), label_M.tolist(), strict=True):
        shown, piece = int(input_S[position]), _piece(tokenizer, label)
        if shown == manifest.special_ids.mask:
            kinds.append("hidden")
            words[position] = f"[MASK:{piece}]"
        elif shown == label:  # a random token may be the one that was there
            kinds.append("kept")
            words[position] = f"[={piece}]"
        else:
            kinds.append("replaced")
            words[position] = f"[{words[position]}<-{piece}]"
    return words, kinds


def _piece(tokenizer: Tokenizer, number: int) -> str:
    piece = tokenizer.id_to_token(number)
    assert piece is not None, number
    return piece if piece.isprintable() else ascii(piece)[1:-1]


def _joined(words: list[str]) -> str:
    """Words with spaces between them; pieces stand at their word unless one of both is a target."""
    text = ""
    for word in words:
        if word.startswith("##") and text and not text.endswith("]"):
            text += word[2:]
        else:
            text += f" {word}"
    return text.strip()
