"""metrics.jsonl: what a run has logged, read back."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sctd.files import read_json_lines

LOSSES = ("loss", "mlm_drop", "mlm_full", "kl_global", "kl_local")
EVALUATED = "eval/"  # what the keys of evaluations begin with
_NEVER_ABSENT = ("loss", "valid_loss", "valid_perplexity")  # from a record that has their key


def format_seconds(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run so far, oldest first; the torn last line of a killed run is passed over."""
    records = read_json_lines(run_dir / "metrics.jsonl")
    return [record for record in records if isinstance(record.get("step"), int)]


def latest(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The newest value of each metric. Terms are null where they did not occur, and passed over; a loss is null where
    it was not finite, and that is what the run has come to: None."""
    found: dict[str, Any] = {}
    for record in records:
        found |= {key: value for key, value in record.items() if value is not None or key in _NEVER_ABSENT}
    return found
