"""What pretraining text is cleaned of: one Unicode form, no control characters, and a floor for quality if asked."""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

from sctd.errors import UserError

# C0 and C1 controls but tab and line feed, the byte order mark, and two code points that are no characters. U+FFFD
# stays: it stands for a character that was lost, and counts as a symbol.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
_LINE_END = re.compile("\r\n?|[\x0b\x0c\x85]")  # a form feed must not join two words
_ORDINARY = re.compile(r"[\w\s]+")


@dataclass(frozen=True)
class Cleaning:
    """The floor below which a document is left out; switched off as it stands.

    Args:
        min_characters: of the cleaned text. max_symbols: share of characters that are neither letters, marks, digits
            nor white space.
    """

    min_characters: int = 0
    max_symbols: float = 1.0

    def check(self) -> None:
        """UserError for a floor that lets nothing in or means nothing."""
        if self.min_characters < 0:
            raise UserError(f"--min-characters {self.min_characters}: must be at least 0")
        if not 0.0 <= self.max_symbols <= 1.0:
            raise UserError(f"--max-symbols {self.max_symbols}: a share is from 0 to 1")


class Cleaner:
    """Cleans documents and counts: `nfc` and `control` those it changed, `blank`, `too_short` and `symbols` those it
    left out."""

    def __init__(self, cleaning: Cleaning) -> None:
        self.cleaning = cleaning
        self.counts: Counter[str] = Counter()

    def __call__(self, text: str) -> str | None:
        """The document in NFC, without control characters and outer white space; None where it is left out."""
        if _CONTROL.search(text):
            text = _CONTROL.sub("", _LINE_END.sub("\n", text))
            self.counts["control"] += 1
        # After the controls: what stood on either side of one may compose.
        if not unicodedata.is_normalized("NFC", text):
            text = unicodedata.normalize("NFC", text)
            self.counts["nfc"] += 1
        text = text.strip()
        if not text:
            self.counts["blank"] += 1
        elif len(text) < self.cleaning.min_characters:
            self.counts["too_short"] += 1
        elif self.cleaning.max_symbols < 1.0 and symbol_share(text) > self.cleaning.max_symbols:
            self.counts["symbols"] += 1
        else:
            return text
        return None


def symbol_share(text: str) -> float:
    """Characters of `text` that are neither letters, marks, digits nor white space, as a share of all."""
    # Python's \w knows letters and digits; marks, which join on to letters in many scripts, it does not.
    odd = _ORDINARY.sub("", text)
    marks = sum(unicodedata.category(char)[0] == "M" for char in odd)
    return (len(odd) - marks) / len(text)
