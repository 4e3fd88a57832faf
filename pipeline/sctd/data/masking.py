"""Dynamic masking (Devlin et al. 2019): 15 % of the tokens, of those 80 % [MASK], 10 % random, 10 % unchanged.

Every row has exactly the same number of targets, so that shapes are static and a mean over rows is a mean over
targets; where the share changes in the course of a run, so it is in each stage. A target is never a special token. All
draws are functions of (seed, global sample index, position).

Training may draw whole words, spans of words, or by the importance of tokens, and show its targets in other shares.
Held-out rows are masked uniformly, 80 / 10 / 10, by tokens or by whole words, so that the losses of runs compare.

Legend: B rows, S positions a row, M targets a row, V vocabulary, L words of a span at most.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from sctd.config import Config, value_of
from sctd.corpus.manifest import Manifest
from sctd.data.draws import STREAM_KIND, STREAM_MASK, STREAM_SPAN, STREAM_TOKEN, below, hash64, unit
from sctd.errors import UserError
from sctd.schedule import Schedule

RENEWAL = 100  # optimizer steps that masks are drawn by the same importance scores
STANDARD = (0.8, 0.1, 0.1)  # shares of the targets that show [MASK], a random token, themselves
_LAST = np.uint64(0xFFFFFFFFFFFFFFFF)
_LEAST = 1e-6  # of an importance score: keys, up to 37 / _LEAST, stay below _LAST
_LONGEST = 10  # words of a span, as in SpanBERT


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


def build_masker(config: Config, manifest: Manifest, tokenizer: Tokenizer, renewal: int = 1) -> "Masker":
    """The masks of a training on a corpus, drawn from `run.seed`.

    Args:
        renewal: see `Masker`.

    Raises:
        UserError: words are to be masked that the tokenizer does not mark.
    """
    data, special, seed = config.data, manifest.special_ids, config.run.seed
    continuation_V = np.zeros(manifest.vocab_size, dtype=bool)
    for piece, number in tokenizer.get_vocab().items():
        continuation_V[number] = piece.startswith("##")
    if not continuation_V.any():
        for key in ("data.whole_word", "data.span_length"):
            if value_of(config, key):
                raise UserError(f"{key} is set, but no piece of the corpus' tokenizer is marked as the continuation of "
                                "a word (##): words are known in WordPiece alone, leave it out")  # fmt: skip
    return Masker(
        seed,
        manifest.vocab_size,
        special.mask,
        special.all,
        mask_share(config),
        continuation_V if data.whole_word else None,
        data.replace,
        Spans(seed, data.span_length, continuation_V) if data.span_length else None,
        data.mask_by == "importance",
        renewal,
    )


class Spans:
    """Cuts rows into spans of whole words, of random lengths (Joshi et al. 2020, SpanBERT).

    A span has n words with a probability proportional to (1 - p)^(n - 1), n = 1 .. 10, where p is what makes `mean` the
    mean of n; 0.2 for SpanBERT's 3.8. It ends early at a special token.

    Args:
        mean: words, from 1 to 5.5. continuation_V: bool (V,), pieces that continue a word.
    """

    def __init__(self, seed: int, mean: float, continuation_V: NDArray[np.bool_]) -> None:
        self.seed, self.continuation_V = seed, continuation_V
        self._upto_L = np.cumsum(_geometric(mean))

    def __call__(
        self, ids_BS: NDArray[np.int64], is_special_BS: NDArray[np.bool_], sample_B1: NDArray[np.uint64]
    ) -> NDArray[np.int64]:
        """The first position of the span that each position belongs to, (B, S)."""
        rows, length = ids_BS.shape
        opens_BS = is_special_BS.copy()  # where a span begins whatever was drawn: at special tokens and behind them
        opens_BS[:, 1:] |= is_special_BS[:, :-1]
        opens_BS[:, 0] = True
        begins_BS = opens_BS | ~self.continuation_V[ids_BS]
        word_BS = begins_BS.cumsum(axis=1) - 1
        bits_BS = hash64(self.seed, STREAM_SPAN, sample_B1, np.arange(length, dtype=np.uint64))
        words_BS = 1 + np.searchsorted(self._upto_L[:-1], unit(bits_BS), side="right")
        is_first_BW = np.zeros((rows, length + 1), dtype=bool)  # by word; those behind the row meet in the last column
        np.put_along_axis(is_first_BW, np.minimum(words_BS.cumsum(axis=1), length), True, axis=1)
        opens_BS |= begins_BS & np.take_along_axis(is_first_BW, word_BS, axis=1)
        return np.maximum.accumulate(np.where(opens_BS, np.arange(length), 0), axis=1)


def _geometric(mean: float) -> NDArray[np.float64]:
    """Probabilities of 1 .. 10, each the same fraction of the one before, with this mean (by bisection)."""
    low, high, number_L = 0.0, 1.0, np.arange(1, _LONGEST + 1)
    for _ in range(60):
        fraction = (low + high) / 2
        share_L = fraction ** (number_L - 1) / (fraction ** (number_L - 1)).sum()
        low, high = (fraction, high) if share_L @ number_L < mean else (low, fraction)
    return share_L


class Masker:
    """Chooses and corrupts targets.

    Args:
        special: ids that are never targets and never drawn as random tokens.
        share: of a row's tokens that are targets, by optimizer step; a number: at every step.
        continuation_V: bool (V,), pieces that continue a word; given for whole-word masking, else None. The number
            of targets is exact there too: the last word drawn may be masked in part.
        replace: shares of the targets that training shows as [MASK], as a random token, as they are.
        spans: what training masks spans of, whole but for the last one; all tokens of a span show the same of the
            three, as in SpanBERT.
        by_importance: training draws targets one after the other, each with a probability proportional to its score in
            what `draw_by` was given last, a word's or span's being the mean of its pieces'; before that, uniformly.
        renewal: a step before which scores are taken, beside the regular ones.
    """

    def __init__(
        self,
        seed: int,
        vocab_size: int,
        mask_id: int,
        special: tuple[int, ...],
        share: Schedule[float] | float,
        continuation_V: NDArray[np.bool_] | None = None,
        replace: tuple[float, float, float] = STANDARD,
        spans: Spans | None = None,
        by_importance: bool = False,
        renewal: int = 1,
    ) -> None:
        self.seed = seed
        self.mask_id = mask_id
        self.share = share if isinstance(share, Schedule) else Schedule((1, share))
        self.continuation_V = continuation_V
        self.replace = replace
        self.spans = spans
        self.by_importance = by_importance
        self.renewal = renewal
        self._score_V = np.ones(vocab_size)
        self._is_special_V = np.zeros(vocab_size, dtype=bool)
        self._is_special_V[list(special)] = True
        self._regular = np.flatnonzero(~self._is_special_V)

    def draw_by(self, scores_V: NDArray[np.float32]) -> None:
        """Use these importance scores from the next batch on."""
        self._score_V = scores_V.astype(np.float64)

    def awaits(self, step: int) -> bool:
        """Whether the masks of an optimizer step, counted from 1, need scores of the end of the step before it: those
        of a run are taken at its start and every `RENEWAL` steps."""
        return self.by_importance and ((step - 1) % RENEWAL == 0 or step == self.renewal)

    def __call__(self, ids_BS: NDArray[np.integer], sample_B: NDArray[np.int64], step: int | None = None) -> MaskedRows:
        """Mask rows.

        Args:
            ids_BS: original ids. sample_B: global sample index of each row.
            step: the optimizer step that they are for; None: held-out rows, masked by the share of the last stage,
                uniformly and 80 / 10 / 10 whatever training does.

        Raises:
            UserError: a row with fewer maskable tokens than targets.
        """
        shown_BS = ids_BS.astype(np.int64)
        sample_B1 = sample_B.astype(np.uint64)[:, None]
        share = self.share(self.share.starts[-1] if step is None else step)
        to_mask, to_random, _ = STANDARD if step is None else self.replace
        positions_BM, alike_BM = self._choose(
            shown_BS, sample_B1, target_count(share, ids_BS.shape[1]), step is not None
        )
        labels_BM = np.take_along_axis(shown_BS, positions_BM, axis=1)
        kind_BM = hash64(self.seed, STREAM_KIND, sample_B1, alike_BM.astype(np.uint64)) / 2.0**64
        token_BM = below(hash64(self.seed, STREAM_TOKEN, sample_B1, positions_BM.astype(np.uint64)), len(self._regular))
        shown_BM = np.where(kind_BM < to_mask + to_random, self._regular[token_BM], labels_BM)
        shown_BM[kind_BM < to_mask] = self.mask_id
        np.put_along_axis(shown_BS, positions_BM, shown_BM, axis=1)
        return MaskedRows(shown_BS, positions_BM, labels_BM)

    def _choose(
        self, ids_BS: NDArray[np.int64], sample_B1: NDArray[np.uint64], count: int, trains: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The M positions of each row with the smallest random keys, and for each the position whose draw decides what
        it shows. Pieces of a word or span share the key of its start."""
        length = ids_BS.shape[1]
        is_special_BS = self._is_special_V[ids_BS]
        maskable = length - is_special_BS.sum(axis=1)
        if maskable.min() < count:
            row = int(maskable.argmin())
            raise UserError(
                f"sample {int(sample_B1[row, 0])}: {int(maskable[row])} maskable tokens for {count} targets; "
                "lower data.mask_probability or data.mask_stages, or prepare the corpus again"
            )
        spans = self.spans if trains else None
        start = np.arange(length)
        if spans is not None:
            start = spans(ids_BS, is_special_BS, sample_B1)
        elif self.continuation_V is not None:
            start = np.maximum.accumulate(np.where(self.continuation_V[ids_BS], 0, start), axis=1)
        key_BS: NDArray[Any] = hash64(self.seed, STREAM_MASK, sample_B1, start.astype(np.uint64))
        if trains and self.by_importance:
            key_BS = _weighted(key_BS, self._scores(ids_BS, is_special_BS, start))
        key_BS[is_special_BS] = _LAST
        if start.ndim == 1:
            order_BS = np.argpartition(key_BS, count - 1, axis=1)
        else:  # equal keys: in the order of the row
            order_BS = np.argsort(key_BS, axis=1, kind="stable")
        positions_BM = np.sort(order_BS[:, :count], axis=1)
        return positions_BM, positions_BM if spans is None else np.take_along_axis(start, positions_BM, axis=1)

    def _scores(
        self, ids_BS: NDArray[np.int64], is_special_BS: NDArray[np.bool_], start: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Of each position, or where they are drawn together the mean over those that share its start."""
        score_BS = self._score_V[ids_BS]
        if start.ndim == 1:
            return score_BS
        group_BS = start + np.arange(len(ids_BS))[:, None] * ids_BS.shape[1]
        counts_BS = ~is_special_BS  # a piece behind [CLS] has it as its start
        total, number = (
            np.bincount(group_BS.ravel(), values.ravel(), ids_BS.size) for values in (score_BS * counts_BS, counts_BS)
        )
        return (total / np.maximum(number, 1))[group_BS]


def _weighted(bits_BS: NDArray[np.uint64], weight_BS: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys whose smallest are a weighted sample without replacement: exponential variates of these rates (Efraimidis
    and Spirakis 2006, their u^(1/w) on a logarithmic scale). With equal weights they have the order of the bits."""
    variates_BS: NDArray[np.float64] = -np.log1p(-unit(bits_BS)) / np.maximum(weight_BS, _LEAST)
    return variates_BS
