"""Raw text to a prepared corpus, on one process or on many ranks.

Three stages: each piece of the sources is encoded; what limits and near duplicates leave out is settled; each bin of
documents is packed. All that is finished stays in a hidden folder beside `out`, so that a start after an interruption
repeats nothing, and is moved to `out` at the end: `out` is whole or does not exist.
"""

import dataclasses
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sctd.corpus.manifest import MANIFEST_NAME, Manifest, load_corpus_tokenizer, read_manifest, verify_shards
from sctd.corpus.prepare.binning import Pack
from sctd.corpus.prepare.encode import Encode
from sctd.corpus.prepare.job import (
    Job,
    Wanted,
    bin_count,
    changed_settings,
    check,
    expected_bytes,
    limits_of,
    locked,
    read_json,
    settings_of,
    timed,
    versions,
    work_folder,
    write_json,
)
from sctd.corpus.prepare.publish import publish
from sctd.corpus.prepare.select import SELECTED, Reached, select
from sctd.corpus.prepare.team import Task, Team, left_behind
from sctd.corpus.sources.source import parse_sources, plan_pieces
from sctd.corpus.tokenizer import load_tokenizer, save_tokenizer, tokenizer_hash
from sctd.errors import UserError

# Bytes on disk for each byte of text: ids at one for three bytes at most, their index; and the rows of each length.
_WORK_SHARE, _ROWS_SHARE = 0.75, 0.7
_JOB, _TOKENIZER = "job.json", "tokenizer"


def prepare(wanted: Wanted, out: Path, team: Team | None = None, log: Callable[[str], Any] = print) -> Manifest:
    """Write the corpus folder `out`: shards, manifest.json, report and the tokenizer as a Hugging Face folder.

    A corpus that `out` already holds, made with the same settings from the same files, is returned as it is; one that
    was begun with them is continued. All ranks of `team` call this alike.

    Raises:
        UserError: bad settings or data, an `out` that holds anything else, no room on the disk, a corpus without a
            full train and valid row.
        RunError: a rank that died.
    """
    team = team or Team(log)
    team.same("installation", versions())
    out = Path(os.path.realpath(out))  # the rename must replace the folder behind a link, not the link
    with ExitStack() as held:
        try:
            return _prepare(wanted, out, team, held, log)
        except OSError as error:  # faults of the sources arrive as UserError
            hint = "free space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
            raise UserError(
                f"{out}: cannot be written ({error.strerror or error}); {hint} and start again, what is finished is "
                "kept"
            ) from error


def _prepare(wanted: Wanted, out: Path, team: Team, held: ExitStack, log: Callable[[str], Any]) -> Manifest:
    def say(line: str) -> None:
        team.main(lambda: log(line))

    work = work_folder(out)
    settings, present = team.main(lambda: _look(wanted, out))
    if present is not None:
        say(f"{out}: already prepared with these settings, nothing to do")
        team.main(lambda: _clear_away(work, settings))
        return present
    team.main(lambda: _hold(held, locked(work)))
    team.main(lambda: _hold(held, _tidied(work)))
    job = team.main(lambda: _begin(wanted, settings, out, log))

    stages: tuple[tuple[str, Task, Callable[[], list[int]]], ...] = (
        ("encode", Encode(job), lambda: _pieces_to_do(job, log)),
        ("pack", Pack(job), lambda: _bins_to_do(job)),
    )
    for name, task, to_do in stages:
        with ExitStack() as clock:
            todo = team.main(to_do)
            team.main(partial(_hold, clock, timed(job, name)))
            team.each(todo, task, work / "claims" / name)
    manifest = team.main(lambda: publish(job))
    say(f"{out}: done, unigram entropy {manifest.unigram_entropy:.3f} nats; see {out / 'report.html'}")
    return manifest


# ---- before ------------------------------------------------------------------------------------------------------


def _look(wanted: Wanted, out: Path) -> tuple[dict[str, Any], Manifest | None]:
    """The settings, and the corpus in `out` if it was made with them. UserError for an `out` that is not free."""
    check(wanted)
    settings = settings_of(wanted)
    if wanted.tokenizer is not None:
        settings["tokenizer_hash"] = tokenizer_hash(load_tokenizer(wanted.tokenizer))
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return settings, None
    if not (out / MANIFEST_NAME).is_file():
        kind = "a folder with other files" if out.is_dir() else "a file"
        raise UserError(f"{out}: exists and is {kind}, not a prepared corpus; choose another --out or remove it")
    manifest = read_manifest(out)
    if changed := changed_settings(settings, manifest.settings):
        raise UserError(
            f"{out}: holds a corpus made with other settings ({', '.join(changed)}; for sources also a changed file); "
            "choose another --out or remove it"
        )
    verify_shards(out, manifest)
    load_corpus_tokenizer(out, manifest)
    return settings, manifest


def _clear_away(work: Path, settings: dict[str, Any]) -> None:
    """What an end just after the corpus got its name has left of its work."""
    if not work.is_dir():
        return
    with suppress(UserError), locked(work):  # or the one that gave it its name is still at it
        if not (work / _JOB).is_file() or not changed_settings(settings, read_json(work / _JOB)["settings"]):
            shutil.rmtree(work, ignore_errors=True)


def _hold(held: ExitStack, context: AbstractContextManager[None]) -> None:
    held.enter_context(context)


def _begin(wanted: Wanted, settings: dict[str, Any], out: Path, log: Callable[[str], Any]) -> Job:
    """The job that the work folder holds, or a new one, with its tokenizer."""
    work = work_folder(out)
    stored = read_json(work / _JOB) if (work / _JOB).is_file() else None
    sources = parse_sources(wanted.sources)
    limits = limits_of(wanted, sources)
    pieces = tuple(plan_pieces(sources, wanted.form, wanted.shard_plan))
    size = expected_bytes(limits, pieces)
    job = Job(wanted, out, sources, limits, pieces, settings, bin_count(size))
    if stored is None:
        _empty(work)  # a tokenizer may be there, of settings that nobody knows
    elif not (changed := changed_settings({**settings, "versions": versions()}, stored["settings"])):
        return dataclasses.replace(job, bins=stored["bins"])
    elif changed == ["sources"] and wanted.tokenizer is not None and _are_same(settings, stored["settings"]):
        _keep_unchanged(job)
    elif any((work / "pieces").glob("*.json")):
        raise UserError(
            f"{work}: holds an unfinished corpus with other settings ({', '.join(changed)}); finish it with those, "
            "remove it, or choose another --out"
        )
    else:
        _empty(work)
    _check_room(job, size)
    for name in ("pieces", "bins"):
        (work / name).mkdir(exist_ok=True)
    if not (work / _TOKENIZER).is_dir():
        tokenizer = load_tokenizer(wanted.tokenizer) if wanted.tokenizer is not None else _learn(job, log)
        save_tokenizer(tokenizer, work / f".{_TOKENIZER}", model_max_length=wanted.seq_lens[-1])
        os.rename(work / f".{_TOKENIZER}", work / _TOKENIZER)
    write_json(work / _JOB, {"settings": {**settings, "versions": versions()}, "bins": job.bins})
    return job


def _are_same(settings: dict[str, Any], stored: dict[str, Any]) -> bool:
    """Whether only files of the sources were changed, and not the sources."""
    return [source["spec"] for source in settings["sources"]] == [source["spec"] for source in stored["sources"]]


def _keep_unchanged(job: Job) -> None:
    """After a file of a source was mended: keep what is finished of the others."""
    names = set(job.names)
    for path in [*(job.work / "pieces").iterdir(), *(job.work / "bins").iterdir()]:
        if path.name.split(".")[0] not in names:
            path.unlink()
    for name in ("claims", "final"):
        shutil.rmtree(job.work / name, ignore_errors=True)
    (job.work / "select.json").unlink(missing_ok=True)


def _empty(work: Path) -> None:
    """All but the lock."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def _check_room(job: Job, size: int) -> None:
    needed = int(size * (_WORK_SHARE + _ROWS_SHARE * len(job.wanted.seq_lens)))
    there = sum(path.stat().st_size for path in job.work.rglob("*") if path.is_file())
    free = shutil.disk_usage(job.work).free
    if needed - there > free:
        raise UserError(
            f"{job.out.parent}: about {_size(needed)} are needed for {_size(size)} of text, and {_size(free)} are "
            "free; free space, choose another --out, or limit the sources"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def _learn(job: Job, log: Callable[[str], Any]) -> Tokenizer:
    from sctd.corpus.prepare.learn import train_documents_tokenizer

    wanted = job.wanted
    log(f"learning a WordPiece vocabulary of {wanted.vocab_size:,} from the train documents")
    return train_documents_tokenizer(job)


def _pieces_to_do(job: Job, log: Callable[[str], Any]) -> list[int]:
    reached = Reached(job)
    passed = {number for number in range(len(job.pieces)) if reached.before(number)}
    todo = [n for n in range(len(job.pieces)) if n not in passed and not job.piece(n, ".json").is_file()]
    there = len(job.pieces) - len(passed) - len(todo)
    missing = set(todo)
    under_way = sorted(
        f"{job.pieces[item].title} (rank {name})"
        for item, name in left_behind(job.work / "claims" / "encode").items()
        if item in missing
    )
    if there or under_way:
        where = f"; the start before ended at {', '.join(under_way)}" if under_way else ""
        log(f"continuing: {there} of {len(job.pieces)} pieces are there{where}")
    return todo


def _bins_to_do(job: Job) -> list[int]:
    if not (job.work / SELECTED).is_file():
        with timed(job, "select"):
            select(job)
    return [number for number in range(job.bins) if not job.bin(number, ".json").is_file()]


@contextmanager
def _tidied(work: Path) -> Iterator[None]:
    """At bad input or a full disk, remove a work folder that holds nothing worth keeping."""
    try:
        yield
    except (UserError, OSError):
        if not any((work / "pieces").glob("*.json")) and not (work / "final").is_dir():
            shutil.rmtree(work, ignore_errors=True)
        raise
