"""The end of a preparation: rests to rows, shards to their names, manifest and report; then the folder's own name."""

import os
import shutil
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from sctd.corpus.manifest import (
    FORMAT_VERSION,
    SPLITS,
    Ends,
    Manifest,
    Shard,
    SourceTotals,
    Split,
    write_manifest,
)
from sctd.corpus.prepare.binning import LENGTH_BINS, load_rests, pack_rows
from sctd.corpus.prepare.job import Job, fsync_path, read_json, stage_seconds, versions, weights
from sctd.corpus.prepare.select import SELECTED
from sctd.corpus.report import write_report
from sctd.corpus.shards import row_dtype
from sctd.corpus.tokenizer import SpecialIds, load_tokenizer, special_ids, tokenizer_hash, vocab_size
from sctd.errors import UserError

_TOP = 50
_EXAMPLES = 10


def publish(job: Job) -> Manifest:
    """Put the corpus together and give it its name. UserError where it has no full row of a length and split."""
    tokenizer = load_tokenizer(str(job.work / "tokenizer"))
    special, dtype = special_ids(tokenizer), row_dtype(vocab_size(tokenizer))
    bins = [read_json(job.bin(number, ".json")) for number in range(job.bins)]
    counts = sum(np.load(job.bin(number, ".counts.npy")) for number in range(job.bins))
    packed = [row for facts in bins for row in facts["rows"]]
    for source in range(len(job.sources)):
        for split in SPLITS:
            for length in job.wanted.seq_lens:
                parts = [part for number in range(job.bins) for part in load_rests(job, number, source, split, length)]
                packed.append(pack_rows(job, "rest", parts, (source, split, length), special, dtype)[0])
    final = job.work / "final"
    final.mkdir(exist_ok=True)
    splits = {
        length: {split: _gather(job, final, packed, split, length) for split in SPLITS}
        for length in job.wanted.seq_lens
    }
    totals, dropped = _totals(job, bins), _dropped(job, bins, packed)
    _check_rows(job, splits, totals, dropped)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        seq_lens=job.wanted.seq_lens,
        vocab_size=vocab_size(tokenizer),
        dtype=dtype.name,
        tokenizer_hash=tokenizer_hash(tokenizer),
        special_ids=special,
        unigram_entropy=unigram_entropy(counts, special),
        max_token_id=max(facts["max_token_id"] for facts in bins),
        documents=sum(source["documents"] for source in totals),
        text_bytes=sum(source["bytes"] for source in totals),
        tokens=sum(source["length"] for source in totals),
        sources=tuple(
            SourceTotals(source.name, source.spec, weight, total["documents"], total["bytes"], total["length"])
            for source, weight, total in zip(job.sources, weights(job.wanted, job.sources), totals, strict=True)
        ),
        settings=job.settings,
        splits=splits,
        dropped=dropped,
    )
    for path in (job.work / "tokenizer").iterdir():
        shutil.copyfile(path, final / path.name)
        fsync_path(final / path.name)
    write_report(final, _facts(job, manifest, bins, packed, counts, tokenizer))
    write_manifest(final, manifest)
    fsync_path(final)
    os.rename(final, job.out)  # replaces an empty folder, fails on any other
    fsync_path(job.out.parent)
    shutil.rmtree(job.work, ignore_errors=True)
    return manifest


def unigram_entropy(counts: np.ndarray, special: SpecialIds) -> float:
    """Entropy in nats of the id counts [vocab_size], special ids left out: the MLM loss of a model that has learned
    the frequencies of tokens and nothing else."""
    ordinary = counts.astype(np.float64)
    ordinary[list(special.all)] = 0.0
    share = ordinary[ordinary > 0] / ordinary.sum()
    return float(-(share * np.log(share)).sum())


def _gather(job: Job, final: Path, packed: list[dict[str, Any]], split: str, length: int) -> Split:
    """Move the shards of a split to their names; one that an earlier start has moved stays where it is."""
    shards: list[Shard] = []
    mine = [row for row in packed if row["split"] == split and row["length"] == length]
    for row in sorted(mine, key=lambda row: row["source"]):  # stable: bin after bin, then the rests
        for shard in row["shards"]:
            name = f"{split}-{length}-{len(shards):05d}"
            files = {shard["file"]: f"{name}.npy", shard["ends"]["file"]: f"{name}.ends.npy"}
            for before, after in files.items():
                if (job.work / "bins" / before).exists():
                    os.rename(job.work / "bins" / before, final / after)
            ends = Ends(**{**shard["ends"], "file": f"{name}.ends.npy"})
            shards.append(Shard(**{**shard, "file": f"{name}.npy", "ends": ends}))
    return Split(sum(shard.rows for shard in shards), tuple(shards))


def _totals(job: Job, bins: list[dict[str, Any]]) -> list[dict[str, int]]:
    totals: list[Counter[str]] = [Counter() for _ in job.sources]
    for facts in bins:
        for source, counts in facts["sources"].items():
            totals[int(source)].update(counts)
    names = ("documents", "length", "bytes", "words", "unknown")
    return [{name: total[name] for name in names} for total in totals]


def _dropped(job: Job, bins: list[dict[str, Any]], packed: list[dict[str, Any]]) -> dict[str, int]:
    """Documents that were left out and why, and what the packing left out of all lengths and splits."""
    dropped: Counter[str] = Counter({"exact_duplicates": 0, "near_duplicates": 0, "without_tokens": 0})
    for facts in bins:
        dropped.update(facts["left_out"])
    for facts in _pieces(job):
        dropped.update({f"cleaning_{key}": n for key, n in facts["counts"].items() if key not in ("nfc", "control")})
        dropped.update({f"fault_{key}": n for key, n in facts["faults"].items()})
        dropped["beyond_limit"] += facts["beyond_limit"]
    for row in packed:
        dropped["special_rows"] += row["special_rows"]
        dropped["unfinished_tokens"] += row["unfinished_tokens"]
    return dict(dropped)


def _pieces(job: Job) -> list[dict[str, Any]]:
    """What the encoding of each piece that counts has left, with the number of its documents beyond the limit."""
    found = []
    for number, cut in enumerate(read_json(job.work / SELECTED)["cuts"]):
        if cut != 0:
            facts = read_json(job.piece(number, ".json"))
            found.append({**facts, "beyond_limit": 0 if cut is None else facts["documents"] - cut})
    return found


def _check_rows(
    job: Job, splits: dict[int, dict[str, Split]], totals: list[dict[str, int]], dropped: dict[str, int]
) -> None:
    where = ", ".join(source.spec for source in job.sources)
    documents, tokens = (sum(total[name] for total in totals) for name in ("documents", "length"))
    found, fraction = f"{documents:,} documents with {tokens:,} tokens", job.wanted.valid_fraction
    problem = ""
    if not documents:
        kinds = {key: n for key, n in dropped.items() if n and key not in ("special_rows", "unfinished_tokens")}
        counts = ", ".join(f"{n:,} {key.removeprefix('cleaning_').replace('_', ' ')}" for key, n in kinds.items())
        problem = f"{where}: no documents in it" + (f" but those left out ({counts})" if counts else "")
        problem += "; name a source that holds text, or leave out less"
    for length, split in splits.items():
        if not problem and not split["train"].rows:
            problem = (
                f"{where}: {found} do not fill one train row of {length}; add text, lower --seq-len or lower "
                f"--valid-fraction (now {fraction})"
            )
        if not problem and not split["valid"].rows:
            problem = (
                f"{where}: {found} do not fill one valid row of {length}; raise --valid-fraction (now {fraction}) or "
                "add text"
            )
        train = {shard.source for shard in split["train"].shards}
        for number, weight in enumerate(weights(job.wanted, job.sources)):
            if not problem and weight is not None and number not in train:
                name = job.sources[number].name
                problem = f"--weight {name}={weight:g}: {name} has no train row of {length}; leave the weight out"
    if problem:
        shutil.rmtree(job.work, ignore_errors=True)  # other settings are needed: nothing of this can be used again
        raise UserError(problem)


def _facts(
    job: Job,
    manifest: Manifest,
    bins: list[dict[str, Any]],
    packed: list[dict[str, Any]],
    counts: np.ndarray,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """What the report tells."""
    pieces, totals = _pieces(job), _totals(job, bins)
    words, unknown = (sum(total[name] for total in totals) for name in ("words", "unknown"))
    read = sum(facts["read"] for facts in pieces)
    changed: Counter[str] = Counter({"nfc": 0, "control": 0})
    for facts in pieces:
        changed.update({key: facts["counts"].get(key, 0) for key in ("nfc", "control")})
    dropped = manifest.dropped
    faults = sum(n for key, n in dropped.items() if key.startswith("fault_"))
    left_out = {key.removeprefix("cleaning_"): n for key, n in dropped.items() if key.startswith("cleaning_")}
    left_out |= {"faults": faults} | {
        key: dropped[key] for key in ("exact_duplicates", "near_duplicates", "without_tokens", "beyond_limit")
    }
    lengths = np.sum([facts["lengths"] for facts in bins], axis=0)
    last = int(np.flatnonzero(lengths).max(initial=0)) + 1
    return {
        "name": job.out.name,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "seconds": sum(stage_seconds(job).values()),
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "words": words,
        "text_bytes": manifest.text_bytes,
        "tokens_per_word": manifest.tokens / max(1, words),
        "unknown_share": unknown / max(1, manifest.tokens),
        "unigram_entropy": manifest.unigram_entropy,
        "vocab_size": manifest.vocab_size,
        "read": {"documents": read, "bytes": sum(facts["read_bytes"] for facts in pieces)},
        "cleaned": dict(changed),
        "left_out": {key: {"documents": n, "share": n / max(1, read + faults)} for key, n in left_out.items()},
        "rows": {str(length): _rows(manifest, packed, length) for length in manifest.seq_lens},
        "length_histogram": {
            "edges": [2**exponent for exponent in range(min(last, LENGTH_BINS) + 1)],
            "documents": lengths[:last].tolist(),
        },
        "top_tokens": _top(counts, tokenizer),
        "sources": [{**vars(source), "share": source.tokens / max(1, manifest.tokens)} for source in manifest.sources],
        "ranks": _ranks(pieces),
        "stages": [{"name": name, "seconds": seconds} for name, seconds in stage_seconds(job).items()],
        "fault_examples": [line for facts in pieces for line in facts["examples"]][:_EXAMPLES],
        "settings": manifest.settings,
    }


def _rows(manifest: Manifest, packed: list[dict[str, Any]], length: int) -> dict[str, int]:
    mine = [row for row in packed if row["length"] == length]
    sums = {name: sum(row[name] for row in mine) for name in ("special_rows", "unfinished_tokens", "cut_documents")}
    return {split: manifest.splits[length][split].rows for split in SPLITS} | sums


def _top(counts: np.ndarray, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    best = np.argsort(-counts, kind="stable")[:_TOP]
    total = max(1, int(counts.sum()))
    return [
        {"token": tokenizer.id_to_token(int(i)), "id": int(i), "count": int(counts[i]), "share": counts[i] / total}
        for i in best
        if counts[i]
    ]


def _ranks(pieces: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for facts in pieces:
        rank = found.setdefault(facts["rank"], {"name": facts["rank"], "pieces": 0, "text_bytes": 0, "seconds": 0.0})
        rank["pieces"] += 1
        rank["text_bytes"] += facts["read_bytes"]
        rank["seconds"] += facts["seconds"]
    for rank in found.values():
        rank["mb_per_s"] = rank["text_bytes"] / 1e6 / max(rank["seconds"], 1e-9)
    return [found[name] for name in sorted(found)]
