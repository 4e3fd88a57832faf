"""Pieces that a WordPiece vocabulary lacks for a text, learned or from a file of words, and what each of them saves.

A new piece also changes how the greedy match goes on behind it, so what it saves is found by splitting the words anew.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sctd.corpus.tokenizer import CONTINUES, MAX_WORD_CHARS, grow_tokenizer, split_words, vocab_size
from sctd.errors import UserError
from sctd.present.words import counted

MAX_ADDED = 100_000
_MAX_JOIN = 8  # pieces that become one; longer joins grow from shorter ones
_MAX_PLACES = 1_500_000  # pieces of words held, about 0.6 GB; of larger samples the rarest words are left out
_LEAST_USES = 2  # of a piece in the sample, as when a vocabulary is learned from nothing
_SHOWN = 50

Pieces = tuple[str, ...]
UNKNOWN: Pieces = ("[UNK]",)


@dataclass(frozen=True)
class Effect:
    """What a piece would do: tokens saved, its occurrences, the words that change, whether one becomes [UNK]."""

    saved: int
    uses: int
    changed: dict[int, Pieces]
    loses_words: bool


class SplitText:
    """The words of a text, as pieces of a vocabulary that grows."""

    def __init__(self, counts: Counter[str], vocabulary: Iterable[str]) -> None:
        self._vocabulary = {*vocabulary}
        self._words: list[str] = []  # those of several pieces, the most frequent first
        self._counts: list[int] = []
        self._pieces: list[Pieces] = []
        # (piece, the character behind it) -> words. A new piece can only change words with the longest piece that it
        # begins with: where the new one matches, that is what the greedy match took so far.
        self._with: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
        self.tokens = places = 0
        for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            pieces = self._split(word)
            self.tokens += count * len(pieces)
            if len(pieces) > 1 and places + len(pieces) <= _MAX_PLACES:
                places += len(pieces)
                self._words.append(word)
                self._counts.append(count)
                self._pieces.append(pieces)
                self._note(len(self._words) - 1)

    def __contains__(self, piece: str) -> bool:
        return piece in self._vocabulary

    def split(self) -> Iterator[tuple[Pieces, int]]:
        """Words of several pieces, and how often they occur."""
        return zip(self._pieces, self._counts, strict=True)

    def effect(self, piece: str) -> Effect:
        """What a piece that the vocabulary lacks would do."""
        least, text = (3, piece[2:]) if piece.startswith(CONTINUES) else (1, piece)
        begins = (piece[:end] for end in range(len(piece) - 1, least - 1, -1))
        head = next((begin for begin in begins if begin in self._vocabulary), None)
        saved = uses = 0
        changed: dict[int, Pieces] = {}
        self._vocabulary.add(piece)
        for number in self._with.get((head, piece[len(head)]), ()) if head else ():
            if text in (word := self._words[number]):
                before, after = self._pieces[number], self._split(word)
                if after != before:
                    changed[number] = after
                    saved += self._counts[number] * (len(before) - len(after))
                    uses += self._counts[number] * after.count(piece)
        self._vocabulary.remove(piece)
        return Effect(saved, uses, changed, UNKNOWN in changed.values())

    def add(self, piece: str, effect: Effect) -> None:
        """Make it a piece."""
        self._vocabulary.add(piece)
        self.tokens -= effect.saved
        for number, after in effect.changed.items():
            self._pieces[number] = after
            self._note(number)

    def _split(self, word: str) -> Pieces:
        """As WordPiece does: from the left, always the longest piece that is there."""
        pieces, start = [], 0
        while start < len(word):
            prefix = CONTINUES if start else ""
            for end in range(len(word), start, -1):
                if (piece := prefix + word[start:end]) in self._vocabulary:
                    break
            else:
                return UNKNOWN
            pieces.append(piece)
            start = end
        return tuple(pieces)

    def _note(self, number: int) -> None:
        pieces = self._pieces[number]
        for piece, behind in zip(pieces, pieces[1:], strict=False):
            self._with[piece, behind[len(CONTINUES)]].add(number)


def learn_pieces(text: SplitText, most: int) -> dict[str, int]:
    """The pieces that shorten the text most, and the tokens that each saves beyond those before it: `most`, or as many
    as save any. The same words give the same pieces in the same order.

    Greedy: candidates are joins of neighbouring pieces within a word. What a candidate saves is looked up when its
    turn comes, and it waits for another turn if that is less than others promise (lazy evaluation of a heap).
    """
    hoped = {join: 0 for pieces, _ in text.split() for join in _joins(pieces)}  # the most that each saves, about
    for pieces, count in text.split():
        for part, inside in _parts(pieces):
            if part in hoped:
                hoped[part] += inside * count
    heap = [(-saved, piece) for piece, saved in hoped.items() if saved >= _LEAST_USES]
    hoped.clear()
    heapq.heapify(heap)
    found: dict[str, int] = {}
    while heap and len(found) < most:
        _, piece = heapq.heappop(heap)
        if piece in text:
            continue
        effect = text.effect(piece)
        if effect.saved < 1 or effect.uses < _LEAST_USES or effect.loses_words:
            continue
        if heap and (-effect.saved, piece) > heap[0]:
            heapq.heappush(heap, (-effect.saved, piece))
            continue
        found[piece] = effect.saved
        text.add(piece, effect)
        for join in sorted({join for pieces in effect.changed.values() for join in _joins(pieces)}):
            if join not in text:  # new, or worth more now
                heapq.heappush(heap, (-text.effect(join).saved, join))
    return found


def _joins(pieces: Pieces) -> Iterator[str]:
    """Neighbouring pieces as one."""
    for start, piece in enumerate(pieces):
        for behind in pieces[start + 1 : start + _MAX_JOIN]:
            piece += behind[len(CONTINUES) :]
            yield piece


def _parts(pieces: Pieces) -> Iterator[tuple[str, int]]:
    """Parts of the word that begin with a piece and go beyond it, and how many ends of pieces are inside: so many
    tokens are saved where the part ends with a piece too, and perhaps where it does not."""
    for start, part in enumerate(pieces):
        for inside, behind in enumerate(pieces[start + 1 : start + _MAX_JOIN], 1):
            for letter in behind[len(CONTINUES) :]:
                part += letter
                yield part, inside


# ---- words of a file ---------------------------------------------------------------------------------------------


def read_words(path: Path) -> tuple[str, ...]:
    """The words of a file with one a line. UserError for a file that cannot be read, for what is not a word, none or
    too many."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"--add-vocabulary {path}: cannot be read ({why}); give a number, or a UTF-8 file with a word a line"
        ) from error
    words: dict[str, None] = {}
    for number, line in enumerate(lines, 1):
        word, where = line.strip(), f"--add-vocabulary {path}, line {number}"
        if len(word.split()) > 1:
            raise UserError(f"{where}: {word[:60]!r} has white space inside; write one word a line")
        if len(word) > MAX_WORD_CHARS:
            raise UserError(f"{where}: a word of {len(word)} characters; WordPiece takes at most {MAX_WORD_CHARS}")
        if word.startswith(CONTINUES):
            raise UserError(f"{where}: {word!r} continues a word; write whole words, without {CONTINUES}")
        if word:
            words[word] = None
    if not words:
        raise UserError(f"--add-vocabulary {path}: no words in it; write one a line")
    if len(words) > MAX_ADDED:
        raise UserError(f"--add-vocabulary {path}: {len(words):,} words; at most {MAX_ADDED:,} can be added")
    return tuple(words)


def word_pieces(words: Iterable[str], tokenizer: Tokenizer) -> tuple[list[str], dict[str, int]]:
    """Whole words as the tokenizer normalizes them, without those that are one piece already; and counts of `words`,
    `one_piece`, `split`, those of which the pre-tokenizer makes several words, which are added one by one, and
    `harmful`, 0 so far."""
    known = tokenizer.get_vocab()
    counts, found = dict.fromkeys(("words", "one_piece", "split", "harmful"), 0), dict.fromkeys("")
    for word in words:
        parts = split_words(tokenizer, word)
        counts["words"] += 1
        counts["one_piece"] += all(part in known for part in parts)
        counts["split"] += len(parts) > 1
        found |= dict.fromkeys(part for part in parts if part not in known)
    return list(found), counts


# ---- both --------------------------------------------------------------------------------------------------------


def add_vocabulary(
    tokenizer: Tokenizer, wanted: int | tuple[str, ...], words: Counter[str], between_space: int
) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer with so many learned pieces more, or with these words; and facts for the report.

    Args:
        words, between_space: of a sample of the text, from count_words.

    Raises:
        UserError: not WordPiece as BERT has it.
    """
    text = SplitText(words, tokenizer.get_vocab())
    before, counts = text.tokens, None
    if isinstance(wanted, int):
        saved = learn_pieces(text, wanted)
    else:
        pieces, counts = word_pieces(wanted, tokenizer)
        saved = {}
        for piece in pieces:
            effect = text.effect(piece)
            if effect.loses_words:  # longer words would begin with it, and have no pieces for their rest
                counts["harmful"] += 1
                continue
            text.add(piece, effect)
            saved[piece] = effect.saved
    grown = grow_tokenizer(tokenizer, list(saved))
    ids, size = grown.get_vocab(), vocab_size(tokenizer)
    slots = sum(ids[piece] < size for piece in saved)
    shown = sorted(saved, key=lambda piece: -saved[piece])[:_SHOWN]
    return grown, {
        "wanted": wanted if isinstance(wanted, int) else len(wanted),
        "file": counts,
        "added": len(saved),
        "in_slots": slots,
        "appended": len(saved) - slots,
        "vocab_size": vocab_size(grown),
        "sample_words": between_space,
        "tokens_per_word_before": before / max(1, between_space),
        "tokens_per_word": text.tokens / max(1, between_space),
        "saved_share": (before - text.tokens) / max(1, before),
        "pieces": [
            {
                "piece": piece,
                "id": ids[piece],
                "was": [token.value for token in tokenizer.model.tokenize(piece)],
                "saved": saved[piece],
                "share": saved[piece] / max(1, before),
            }
            for piece in shown
        ],
    }


def said_of_additions(facts: dict[str, Any]) -> str:
    """What add_vocabulary did, in a line."""
    if (file := facts["file"]) is not None:
        words = counted(file["words"], "word")
        of = f" of {words} (already pieces: {file['one_piece']:,}, taken apart: {file['split']:,}" + (
            f", left out since longer words would become unknown: {file['harmful']:,})" if file["harmful"] else ")"
        )
    else:
        of = "" if facts["added"] == facts["wanted"] else f" of {facts['wanted']:,}: no more save any tokens"
    places = f"{facts['in_slots']:,} in [unused] slots, {facts['appended']:,} appended, {facts['vocab_size']:,} ids"
    before, after = facts["tokens_per_word_before"], facts["tokens_per_word"]
    return (
        f"{counted(facts['added'], 'piece')} added{of}; {places}; {before:.3f} -> {after:.3f} tokens a word, "
        f"{facts['saved_share']:.2%} fewer tokens"
    )
