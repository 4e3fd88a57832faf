"""Dynamic masking (Devlin et al. 2019): 15 % of the tokens, of those 80 % [MASK], 10 % random, 10 % unchanged.

Every row has exactly the same number of targets, so that shapes are static and a mean over rows is a mean over
targets; where the share changes in the course of a run, so it is in each stage. A target is never a special token. All
draws are functions of (seed, global sample index, position).

Legend: B rows, S positions a row, M targets a row.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from sctd.config import Config
from sctd.corpus.manifest import Manifest
from sctd.data.draws import STREAM_KIND, STREAM_MASK, STREAM_TOKEN, below, hash64
from sctd.errors import UserError
from sctd.schedule import Schedule

_LAST = np.uint64(0xFFFFFFFFFFFFFFFF)
_MASK_SHARE, _RANDOM_SHARE = 0.8, 0.1


@dataclass(frozen=True)
class MaskedRows:
    """input_ids_BS with targets corrupted; positions_BM ascending; labels_BM the original ids there. All int64."""

    input_ids_BS: NDArray[np.int64]
    positions_BM: NDArray[np.int64]
    labels_BM: NDArray[np.int64]


def target_count(probability: float, length: int) -> int:
    """M of a row of `length` tokens: the same for every row, so that shapes are static."""
    return max(1, round(probability * length))


def mask_share(config: Config) -> Schedule[float]:
    """The share of a row's tokens that are predicted, by optimizer step."""
    return Schedule((1, config.data.mask_probability), *config.data.mask_stages)


def build_masker(config: Config, manifest: Manifest, tokenizer: Tokenizer) -> "Masker":
    """The masks of a training on a corpus, drawn from `run.seed`."""
    continuation_V = None
    if config.data.whole_word:
        continuation_V = np.zeros(manifest.vocab_size, dtype=bool)
        for piece, number in tokenizer.get_vocab().items():
            continuation_V[number] = piece.startswith("##")
    special, seed = manifest.special_ids, config.run.seed
    return Masker(seed, manifest.vocab_size, special.mask, special.all, mask_share(config), continuation_V)


class Masker:
    """Chooses and corrupts targets.

    Args:
        special: ids that are never targets and never drawn as random tokens.
        share: of a row's tokens that are targets, by optimizer step; a number: at every step.
        continuation_V: bool (V,), pieces that continue a word; given for whole-word masking, else None. The number
            of targets is exact there too: the last word drawn may be masked in part.
    """

    def __init__(
        self,
        seed: int,
        vocab_size: int,
        mask_id: int,
        special: tuple[int, ...],
        share: Schedule[float] | float,
        continuation_V: NDArray[np.bool_] | None = None,
    ) -> None:
        self.seed = seed
        self.mask_id = mask_id
        self.share = share if isinstance(share, Schedule) else Schedule((1, share))
        self.continuation_V = continuation_V
        self._is_special_V = np.zeros(vocab_size, dtype=bool)
        self._is_special_V[list(special)] = True
        self._regular = np.flatnonzero(~self._is_special_V)

    def __call__(self, ids_BS: NDArray[np.integer], sample_B: NDArray[np.int64], step: int | None = None) -> MaskedRows:
        """Mask rows.

        Args:
            ids_BS: original ids. sample_B: global sample index of each row.
            step: the optimizer step that they are for; None: held-out rows, masked as in the last stage.

        Raises:
            UserError: a row with fewer maskable tokens than targets.
        """
        shown_BS = ids_BS.astype(np.int64)
        sample_B1 = sample_B.astype(np.uint64)[:, None]
        share = self.share(self.share.starts[-1] if step is None else step)
        positions_BM = self._choose(shown_BS, sample_B1, target_count(share, ids_BS.shape[1]))
        labels_BM = np.take_along_axis(shown_BS, positions_BM, axis=1)
        kind_BM = hash64(self.seed, STREAM_KIND, sample_B1, positions_BM.astype(np.uint64)) / 2.0**64
        token_BM = below(hash64(self.seed, STREAM_TOKEN, sample_B1, positions_BM.astype(np.uint64)), len(self._regular))
        shown_BM = np.where(kind_BM < _MASK_SHARE + _RANDOM_SHARE, self._regular[token_BM], labels_BM)
        shown_BM[kind_BM < _MASK_SHARE] = self.mask_id
        np.put_along_axis(shown_BS, positions_BM, shown_BM, axis=1)
        return MaskedRows(shown_BS, positions_BM, labels_BM)

    def _choose(self, ids_BS: NDArray[np.int64], sample_B1: NDArray[np.uint64], count: int) -> NDArray[np.int64]:
        """The M positions of each row with the smallest random keys; pieces of a word share the key of its start."""
        length = ids_BS.shape[1]
        is_special_BS = self._is_special_V[ids_BS]
        maskable = length - is_special_BS.sum(axis=1)
        if maskable.min() < count:
            row = int(maskable.argmin())
            raise UserError(
                f"sample {int(sample_B1[row, 0])}: {int(maskable[row])} maskable tokens for {count} targets; "
                "lower data.mask_probability or data.mask_stages, or prepare the corpus again"
            )
        start = np.arange(length)
        if self.continuation_V is not None:
            start = np.maximum.accumulate(np.where(self.continuation_V[ids_BS], 0, start), axis=1)
        key_BS = hash64(self.seed, STREAM_MASK, sample_B1, start.astype(np.uint64))
        key_BS[is_special_BS] = _LAST
        if self.continuation_V is None:
            order_BS = np.argpartition(key_BS, count - 1, axis=1)
        else:  # equal keys: in the order of the row
            order_BS = np.argsort(key_BS, axis=1, kind="stable")
        return np.sort(order_BS[:, :count], axis=1)
