"""What is wrong with the data: told at once, or counted."""

from collections.abc import Callable

from sctd.errors import UserError

_EXAMPLES = 5


class Faults:
    """Where a reader turns with a fault.

    Args:
        on_error: stop raises it; skip counts it, and the reader goes on behind it.

    `counts` has the faults by kind, `examples` the first few in words.
    """

    def __init__(self, on_error: str = "stop") -> None:
        self.on_error = on_error
        self.counts: dict[str, int] = {}
        self.examples: list[str] = []

    def found(self, kind: str, words: Callable[[], str]) -> None:
        """`words` are asked for only where they are told: to name a line may take long."""
        if self.on_error == "stop":
            raise UserError(words())
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(words())


def one_line(error: BaseException) -> str:
    """The text of a foreign exception, fit for a one-line message."""
    return " ".join(str(error).split())[:300] or type(error).__name__
