"""Numbers and lists in words."""

import re
from collections.abc import Sequence

MINUS = "−"


def counted(number: int, one: str, many: str = "") -> str:
    """`1 run`, `3 runs`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def listed(words: Sequence[str], joint: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`."""
    return f" {joint} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else list(words))


def signed(value: float, digits: int = 2) -> str:
    """With its sign, and none where it is rounded to 0."""
    text = f"{abs(value):.{digits}f}"
    return text if not float(text) else f"{MINUS if value < 0 else '+'}{text}"


def as_saving(share: float) -> str:
    """As the paper prints it: what a cost comes to relative to the baseline's."""
    return f"{signed(-100 * share, 1)} %"


def as_less(share: float, what: str) -> str:
    """`12.1 % less time`, or `more`."""
    return f"{abs(100 * share):.1f} % {'less' if share >= 0 else 'more'} {what}"


def opening(label: str) -> str:
    """A label at the start of a sentence."""
    return label[:1].upper() + label[1:]


def as_hours(hours: float) -> str:
    return f"{hours:,.2f}" if hours >= 0.1 else f"{hours:.2g}"


def as_flops(flops: float) -> str:
    """`1.52e20`."""
    return f"{flops:.2e}".replace("e+", "e").replace("e0", "e")


def file_name(name: str) -> str:
    """Without what may be no part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", name)


def short_name(source: str) -> str:
    """The last part of a path; names of the hub as they are."""
    return source if source.startswith("hf:") else source.rpartition("/")[2] or source
