"""What a run was trained with before its settings changed: of a branch its parent's, of an extended run its shorter
horizon. What adds up over a run, such as FLOPs, is counted by them."""

from dataclasses import replace
from pathlib import Path

from sctd.config import Config, config_from_dict, to_dict
from sctd.corpus.manifest import read_manifest
from sctd.errors import UserError
from sctd.files import read_json, write_json
from sctd.objective.build import bert_shape, row_lengths
from sctd.train.keep.export import CORPUS_COPY, read_run

_FILE = "earlier.json"
Stretches = list[tuple[int, Config]]  # the last step of each, and its settings with vocabulary and row length set


def read_earlier(run_dir: Path) -> Stretches:
    """Oldest first; empty for a run whose settings have not changed.

    Raises:
        UserError: the file is not as it was written.
    """
    file = run_dir / _FILE
    try:
        return [(each["until"], config_from_dict(each["config"])) for each in read_json(file)] if file.exists() else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not readable ({error}): restore it from a backup") from None


def write_earlier(run_dir: Path, stretches: Stretches) -> None:
    if stretches:
        write_json(run_dir / _FILE, [{"until": last, "config": to_dict(config)} for last, config in stretches])
    else:
        (run_dir / _FILE).unlink(missing_ok=True)


def settings_until(run_dir: Path, step: int) -> Stretches:
    """What a run was trained with up to this step, its present settings included."""
    config, manifest = read_run(run_dir), read_manifest(run_dir / CORPUS_COPY)
    config = replace(
        config,
        model=replace(config.model, vocab_size=bert_shape(config, manifest).vocab_size),
        data=replace(config.data, seq_len=row_lengths(config, manifest)[0]),
    )
    before = [(last, each) for last, each in read_earlier(run_dir) if last < step]
    after = [each for last, each in read_earlier(run_dir) if last >= step]
    return [*before, (step, (after or [config])[0])]
