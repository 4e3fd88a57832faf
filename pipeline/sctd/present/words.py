"""Numbers, lists and names in words, the same on every page, in every table and message."""

import re
from collections.abc import Sequence
from html import escape
from typing import Any

MINUS = "−"


def counted(number: int, one: str) -> str:
    """`1 run`, `3 runs`."""
    return f"{number:,} {one if number == 1 else one + 's'}"


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else list(words))


def signed(value: float, digits: int = 2) -> str:
    """With its sign; without one where it rounds to 0."""
    text = f"{abs(value):.{digits}f}"
    return text if not float(text) else f"{MINUS if value < 0 else '+'}{text}"


def as_saving(share: float) -> str:
    """The change of a cost relative to the baseline's, as the paper prints it."""
    return f"{signed(-100 * share, 1)} %"


def as_p(p: float | None) -> str:
    if p is None:
        return "no test"
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


def as_hours(hours: float) -> str:
    return f"{hours:,.2f}" if hours >= 0.1 else f"{hours:.2g}"


def as_flops(flops: float) -> str:
    """`1.52e20`."""
    return f"{flops:.2e}".replace("e+", "e").replace("e0", "e")


def as_short(value: float) -> str:
    """1,234,567 as 1.23 million."""
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.3g}"


def as_bytes(value: float) -> str:
    for size, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:,.2f} {name}"
    return f"{value:,.0f} bytes"


def as_percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def as_share(value: float) -> str:
    """In percent, with as many digits as a small share needs."""
    if value == 0:
        return "0 %"
    if value < 1e-6:
        return "below 0.0001 %"
    return f"{100 * value:.2f} %" if value >= 1e-3 else f"{100 * value:.2g} %"


def as_time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{seconds / 60:.1f} min"


def file_name(name: str) -> str:
    """Without characters that a file's name may not have."""
    return re.sub(r"[^\w.-]+", "-", name)


def short_name(source: str) -> str:
    """The last part of a path; names of the hub as they are."""
    return source if source.startswith("hf:") else source.rpartition("/")[2] or source


def printable(value: Any) -> str:
    """Without what neither HTML nor UTF-8 can hold, such as bytes of file names that are not text."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(value))


def escaped(value: Any) -> str:
    """For HTML."""
    return escape(printable(value))
