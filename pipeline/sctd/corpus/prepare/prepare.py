"""Raw text to a prepared corpus, on one process or on many ranks.

    --source files, hf:name, embedded          sources/, settings.py
      |
      |  plan (rank 0): cut into pieces of about --shard-plan bytes; learn or grow the tokenizer if need be (learn.py)
      v
    job.json tokenizer/                        the settings, and P pieces, the same for any number of ranks (job.py)
      |
      |  ENCODE piece by piece (encode.py; team.py shares the pieces out): read, clean, tokenize, hash (seed, text)
      v
    pieces/HASH.ids                            uint16 or uint32 [tokens], the documents in runs sorted by bin
               .index.npy                      INDEX [documents], sorted by hash: length, offset in .ids, split, ...
               .sketch.npy                     uint32 [documents, 128] for --near-duplicates (near.py)
               .json                           counts and faults; written last, the piece is finished
      |
      |  LIMITS (rank 0, limits.py): --max-documents, --max-tokens, near duplicates
      v
    cuts.json                                  [P] documents taken of each piece
    pieces/HASH.twins.npy                      bool [documents], nearly equal to an earlier one
      |
      |  PACK bin by bin (pack.py): bin b of B takes the b-th part of the range of hashes out of every piece, so that
      |  copies meet, and packs its documents in the order of their hashes, for each source, split and row length
      v
    bins/b-SPLIT-LENGTH-SOURCE-n.npy           shards: rows [rows, seq_len], and .ends.npy with the ends of documents
         b-of-B.npz                            rests (parts of documents, less than a row), token counts [2, vocab]
         b-of-B.json                           what the bin left out and its shards; written last, the bin is finished
      |
      |  PUBLISH (rank 0, publish.py): the rests of all bins become rows, the shards get their names
      v
    NAME/SPLIT-LENGTH-00000.npy .ends.npy      manifest.json report.html report.json tokenizer.json vocab.txt

All but the last line lies in the hidden folder `.NAME.work` beside the corpus. A start after an interruption repeats
nothing that is finished there, and the corpus NAME is whole or does not exist.
"""

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from sctd.corpus.manifest import MANIFEST_NAME, Manifest, load_corpus_tokenizer, read_manifest, verify_shards
from sctd.corpus.prepare.encode import Encode
from sctd.corpus.prepare.job import ADDITIONS, Job, locked, versions, work_folder
from sctd.corpus.prepare.learn import corpus_tokenizer
from sctd.corpus.prepare.limits import Reached, apply_limits
from sctd.corpus.prepare.pack import Pack
from sctd.corpus.prepare.publish import publish
from sctd.corpus.prepare.settings import CorpusSettings, changed_settings
from sctd.corpus.prepare.team import Team, left_behind
from sctd.corpus.sources.source import plan_pieces
from sctd.corpus.tokenizer import save_tokenizer
from sctd.errors import UserError
from sctd.files import new_folder, read_json, write_json

# Bytes on disk for each byte of text: ids at one for three bytes at most, their index; and the rows of each length.
_WORK_SHARE, _ROWS_SHARE = 0.75, 0.7

Log = Callable[[str], Any]


def prepare(settings: CorpusSettings, out: Path, team: Team | None = None, log: Log = print) -> Manifest:
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
            begun = team.main(lambda: _begin(settings, out, held, log))
            return begun if isinstance(begun, Manifest) else _run(begun, team, log)
        except OSError as error:  # faults of the sources arrive as UserError
            hint = "free space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "fix that"
            raise UserError(
                f"{out}: cannot be written ({error.strerror or error}); {hint} and start again, finished work is kept"
            ) from error


def _run(job: Job, team: Team, log: Log) -> Manifest:
    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        team.main(lambda: job.add_seconds(stage, time.monotonic() - start))

    claims = job.work / "claims"
    pieces = team.main(lambda: _pieces_to_do(job, log))
    with timed("encode"):
        team.each(pieces, Encode(job), claims / "encode")
    with timed("limits"):
        cuts = team.main(lambda: apply_limits(job))
    bins = team.main(lambda: [n for n in range(job.bins) if not job.bin(n, ".json").is_file()])
    with timed("pack"):
        team.each(bins, Pack(job, cuts), claims / "pack")
    manifest = team.main(lambda: publish(job, cuts))
    report = job.out / "report.html"
    team.main(lambda: log(f"{job.out}: done, unigram entropy {manifest.unigram_entropy:.3f} nats; see {report}"))
    return manifest


def _pieces_to_do(job: Job, log: Log) -> list[int]:
    reached = Reached(job)
    needed = [number for number, piece in enumerate(job.pieces) if not reached.before(piece.source, number)]
    missing = [number for number in needed if not job.piece(number, ".json").is_file()]
    unfinished = set(missing)
    under_way = sorted(
        f"{job.pieces[item].title} (rank {name})"
        for item, name in left_behind(job.work / "claims" / "encode").items()
        if item in unfinished
    )
    if len(missing) < len(needed) or under_way:
        where = f"; the last start ended at {', '.join(under_way)}" if under_way else ""
        log(f"continuing: {len(needed) - len(missing)} of {len(job.pieces)} pieces are finished{where}")
    return missing


# ---- before the first stage --------------------------------------------------------------------------------------


def _begin(settings: CorpusSettings, out: Path, held: ExitStack, log: Log) -> Job | Manifest:
    """The job with its work folder, which `held` keeps locked; or the corpus, if it is already there."""
    settings.check()
    work, identity = work_folder(out), settings.identity()
    if (present := _present(out, identity)) is not None:
        log(f"{out}: already prepared with these settings, nothing to do")
        _remove_work(work, identity)
        return present
    held.enter_context(locked(work))
    held.enter_context(_tidied(work))
    pieces = plan_pieces(settings.named_sources, settings.form, settings.shard_plan)
    job = Job(settings, out, tuple(pieces), identity)
    current, stored = {**identity, "versions": versions()}, _stored(work)
    changed = changed_settings(current, stored)
    if not changed:
        return job
    only_files = changed == ["sources"] and _specs(identity) == _specs(stored) and not settings.learns
    if stored and not only_files and any((work / "pieces").glob("*.json")):
        raise UserError(
            f"{work}: holds an unfinished corpus with other settings ({', '.join(changed)}); finish it with those, "
            "remove it, or choose another --out"
        )
    tokenizer_files = [path.stem for path in (work / "tokenizer").glob("*")]
    _empty(work, keep={"job", "stages", "additions", *tokenizer_files, *job.names} if only_files else set())
    _check_room(job)
    for name in ("pieces", "bins"):
        (work / name).mkdir(exist_ok=True)
    tokenizer, additions = corpus_tokenizer(job, log)
    if additions is not None:
        write_json(work / ADDITIONS, additions)
    if not only_files:  # else it is there already: without it, the work could not go on with the files as they were
        with new_folder(work / "tokenizer") as folder:
            save_tokenizer(tokenizer, folder, model_max_length=settings.seq_lens[-1])
    write_json(work / "job.json", current)
    return job


def _present(out: Path, identity: dict[str, Any]) -> Manifest | None:
    """The corpus in `out` if it was made with these settings. UserError if `out` holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST_NAME).is_file():
        kind = "a folder with other files" if out.is_dir() else "a file"
        raise UserError(f"{out}: exists and is {kind}, not a prepared corpus; choose another --out or remove it")
    manifest = read_manifest(out)
    if changed := changed_settings(identity, manifest.settings):
        raise UserError(
            f"{out}: holds a corpus made with other settings ({', '.join(changed)}; for sources also a changed file); "
            "choose another --out or remove it"
        )
    verify_shards(out, manifest)
    load_corpus_tokenizer(out, manifest)
    return manifest


def _stored(work: Path) -> dict[str, Any]:
    """Settings and versions of the job in a work folder; empty where none was begun."""
    return read_json(work / "job.json") if (work / "job.json").is_file() else {}


def _specs(identity: dict[str, Any]) -> list[str]:
    return [source["spec"] for source in identity["sources"]]


def _remove_work(work: Path, identity: dict[str, Any]) -> None:
    """What is left of the work if a start ended just after the corpus got its name."""
    if work.is_dir():
        with suppress(UserError), locked(work):  # or the start that gave it its name is still at it
            if not (stored := _stored(work)) or not changed_settings(identity, stored):
                shutil.rmtree(work, ignore_errors=True)


def _empty(work: Path, keep: set[str]) -> None:
    """Remove all files but the lock and those of these names, without their endings."""
    for path in list(work.rglob("*")):
        if path.is_file() and path.name.split(".")[0] not in {"lock", *keep}:
            path.unlink()


@contextmanager
def _tidied(work: Path) -> Iterator[None]:
    """At bad input or a full disk, remove a work folder that holds nothing worth keeping."""
    try:
        yield
    except (UserError, OSError):
        if not any((work / "pieces").glob("*.json")) and not (work / "final").is_dir():
            shutil.rmtree(work, ignore_errors=True)
        raise


def _check_room(job: Job) -> None:
    needed = int(job.text_bytes * (_WORK_SHARE + _ROWS_SHARE * len(job.settings.seq_lens)))
    there = sum(path.stat().st_size for path in job.work.rglob("*") if path.is_file())
    free = shutil.disk_usage(job.work).free
    if needed - there > free:
        raise UserError(
            f"{job.out.parent}: about {_size(needed)} are needed for {_size(job.text_bytes)} of text, and "
            f"{_size(free)} are free; free space, choose another --out, or limit the sources"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"
