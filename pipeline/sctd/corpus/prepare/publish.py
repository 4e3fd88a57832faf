"""The end of a preparation: rests to rows, shards to their names, manifest and report; then the folder's own name."""

import os
import shutil
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from sctd.corpus.manifest import FORMAT_VERSION, SPLITS, Manifest, Shard, SourceTotals, Split, from_json, write_manifest
from sctd.corpus.prepare.job import ADDITIONS, Job, versions
from sctd.corpus.prepare.limits import Cuts
from sctd.corpus.prepare.pack import LENGTH_BINS, pack_rests
from sctd.corpus.prepare.rows import row_dtype
from sctd.corpus.report import write_report
from sctd.corpus.tokenizer import SpecialIds, load_tokenizer, special_ids, tokenizer_hash, vocab_size
from sctd.errors import UserError
from sctd.files import read_json, read_json_object, sync

_TOP = 50
_EXAMPLES = 10
_SHOWN = ("documents", "tokens", "text_bytes", "unigram_entropy", "vocab_size", "settings")  # of the manifest

Facts = dict[str, Any]  # as JSON has them


def publish(job: Job, cuts: Cuts) -> Manifest:
    """Put the corpus together and give it its name. UserError if a length and split have no full row."""
    tokenizer = load_tokenizer(str(job.work / "tokenizer"))
    special, dtype = special_ids(tokenizer), row_dtype(vocab_size(tokenizer))
    bins = [read_json(job.bin(number, ".json")) for number in range(job.bins)]
    packed = [row for facts in bins for row in facts["rows"]] + list(pack_rests(job, special, dtype))
    sums: dict[str, Any] = dict.fromkeys(("tokens", "sources", "lengths"), 0)
    for number in range(job.bins):
        with np.load(job.bin(number, ".npz")) as arrays:
            sums = {name: sums[name] + arrays[name] for name in sums}
    documents, text_bytes, tokens, words, unknown = sums["sources"].sum(axis=0).tolist()
    pieces = _pieces(job, cuts)
    final = job.work / "final"
    final.mkdir(exist_ok=True)
    for torn in final.glob(".*.tmp"):
        torn.unlink()
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        seq_lens=job.settings.seq_lens,
        vocab_size=vocab_size(tokenizer),
        dtype=dtype.name,
        tokenizer_hash=tokenizer_hash(tokenizer),
        special_ids=special,
        unigram_entropy=unigram_entropy(sums["tokens"][0], special),
        max_token_id=int(np.flatnonzero(sums["tokens"].any(axis=0)).max(initial=0)),
        documents=documents,
        text_bytes=text_bytes,
        tokens=tokens,
        sources=tuple(
            SourceTotals(source.name, source.spec, share, *totals[:3])
            for source, share, totals in zip(
                job.settings.named_sources, job.settings.shares, sums["sources"].tolist(), strict=True
            )
        ),
        settings=job.identity,
        splits={
            length: {split: _gather(job, final, packed, split, length) for split in SPLITS}
            for length in job.settings.seq_lens
        },
        dropped=_dropped(bins, packed, pieces),
    )
    if problem := _missing_rows(job, manifest):
        shutil.rmtree(job.work, ignore_errors=True)  # other settings are needed: nothing of this can be used again
        raise UserError(problem)
    for path in (job.work / "tokenizer").iterdir():
        shutil.copyfile(path, final / path.name)
        sync(final / path.name)
    counts = {"words": words, "tokens_per_word": tokens / max(1, words), "unknown_share": unknown / max(1, tokens)}
    write_report(final, _report_facts(job, manifest, pieces, packed, sums, tokenizer) | counts)
    write_manifest(final, manifest)
    sync(final)
    os.rename(final, job.out)  # replaces an empty folder, fails on any other
    sync(job.out.parent)
    shutil.rmtree(job.work, ignore_errors=True)
    return manifest


def unigram_entropy(counts: np.ndarray, special: SpecialIds) -> float:
    """Entropy in nats of the id counts [vocab_size], special ids left out: the MLM loss of a model that has learned
    the frequencies of tokens and nothing else."""
    ordinary = counts.astype(np.float64)
    ordinary[list(special.all)] = 0.0
    share = ordinary[ordinary > 0] / ordinary.sum()
    return float(-(share * np.log(share)).sum())


def _gather(job: Job, final: Path, packed: list[Facts], split: str, length: int) -> Split:
    """Move the shards of a split to their names; one that an earlier start has moved stays where it is."""
    shards: list[Shard] = []
    mine = [row for row in packed if row["split"] == split and row["length"] == length]
    for row in sorted(mine, key=lambda row: row["source"]):  # stable: bin after bin, then the rests
        for shard in from_json(tuple[Shard, ...], row["shards"]):
            name = f"{split}-{length}-{len(shards):05d}"
            files = {shard.file: f"{name}.npy", shard.ends.file: f"{name}.ends.npy"}
            for before, after in files.items():
                if (job.work / "bins" / before).exists():
                    os.rename(job.work / "bins" / before, final / after)
            ends = replace(shard.ends, file=files[shard.ends.file])
            shards.append(replace(shard, file=files[shard.file], ends=ends))
    return Split(sum(shard.rows for shard in shards), tuple(shards))


def _pieces(job: Job, cuts: Cuts) -> list[Facts]:
    """What the encoding of each piece that counts has left, with the number of its documents beyond the limit."""
    found = []
    for number, cut in enumerate(cuts):
        if cut != 0:
            facts = read_json(job.piece(number, ".json"))
            found.append({**facts, "beyond_limit": 0 if cut is None else facts["documents"] - cut})
    return found


def _dropped(bins: list[Facts], packed: list[Facts], pieces: list[Facts]) -> dict[str, int]:
    """Documents that were left out and why, and what the packing left out of all lengths and splits."""
    dropped: Counter[str] = Counter({"exact_duplicates": 0, "near_duplicates": 0, "without_tokens": 0})
    for facts in bins:
        dropped.update(facts["left_out"])
    for facts in pieces:
        dropped.update({f"cleaning_{key}": n for key, n in facts["counts"].items() if key not in ("nfc", "control")})
        dropped.update({f"fault_{key}": n for key, n in facts["faults"].items()})
        dropped["beyond_limit"] += facts["beyond_limit"]
    for row in packed:
        dropped["special_rows"] += row["special_rows"]
        dropped["unfinished_tokens"] += row["unfinished_tokens"]
    return dict(dropped)


def _missing_rows(job: Job, manifest: Manifest) -> str:
    """What the settings make impossible: a length and split without a full row, a weighted source without one. Empty
    where nothing is missing."""
    sources, fraction = manifest.sources, job.settings.valid_fraction
    where = ", ".join(source.spec for source in sources)
    if not manifest.documents:
        kinds = {
            key: n for key, n in manifest.dropped.items() if n and key not in ("special_rows", "unfinished_tokens")
        }
        counts = ", ".join(f"{n:,} {key.removeprefix('cleaning_').replace('_', ' ')}" for key, n in kinds.items())
        left_out = f" but those left out ({counts})" if counts else ""
        return f"{where}: no documents in it{left_out}; name a source that holds text, or leave out less"
    found = f"{where}: {manifest.documents:,} documents with {manifest.tokens:,} tokens do not fill one"
    for length, splits in manifest.splits.items():
        if not splits["train"].rows:
            hint = f"add text, lower --seq-len or lower --valid-fraction (now {fraction})"
            return f"{found} train row of {length}; {hint}"
        if not splits["valid"].rows:
            return f"{found} valid row of {length}; raise --valid-fraction (now {fraction}) or add text"
        filled = {shard.source for shard in splits["train"].shards}
        for number, source in enumerate(sources):
            if source.weight is not None and number not in filled:
                option = f"--weight {source.name}={source.weight:g}"
                return f"{option}: {source.name} has no train row of {length}; leave the weight out"
    return ""


# ---- for the report ----------------------------------------------------------------------------------------------


def _report_facts(
    job: Job,
    manifest: Manifest,
    pieces: list[Facts],
    packed: list[Facts],
    sums: dict[str, np.ndarray],
    tokenizer: Tokenizer,
) -> Facts:
    read = sum(facts["read"] for facts in pieces)
    dropped = manifest.dropped
    faults = sum(n for key, n in dropped.items() if key.startswith("fault_"))
    left_out = {key.removeprefix("cleaning_"): n for key, n in dropped.items() if key.startswith("cleaning_")}
    left_out |= {"faults": faults} | {
        key: dropped[key] for key in ("exact_duplicates", "near_duplicates", "without_tokens", "beyond_limit")
    }
    lengths = sums["lengths"]
    last = int(np.flatnonzero(lengths).max(initial=0)) + 1
    return {
        "name": job.out.name,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "seconds": sum(job.stage_seconds.values()),
        **{name: getattr(manifest, name) for name in _SHOWN},
        "read": {"documents": read, "bytes": sum(facts["read_bytes"] for facts in pieces)},
        "cleaned": {key: sum(facts["counts"].get(key, 0) for facts in pieces) for key in ("nfc", "control")},
        "left_out": {key: {"documents": n, "share": n / max(1, read + faults)} for key, n in left_out.items()},
        "rows": {str(length): _rows(manifest, packed, length) for length in manifest.seq_lens},
        "length_histogram": {
            "edges": [2**exponent for exponent in range(min(last, LENGTH_BINS) + 1)],
            "documents": lengths[:last].tolist(),
        },
        "additions": read_json_object(job.work / ADDITIONS),
        "top_tokens": _top(sums["tokens"][0], tokenizer),
        "sources": [{**vars(source), "share": source.tokens / max(1, manifest.tokens)} for source in manifest.sources],
        "ranks": _ranks(pieces),
        "stages": [{"name": name, "seconds": seconds} for name, seconds in job.stage_seconds.items()],
        "fault_examples": [line for facts in pieces for line in facts["examples"]][:_EXAMPLES],
    }


def _rows(manifest: Manifest, packed: list[Facts], length: int) -> dict[str, int]:
    mine = [row for row in packed if row["length"] == length]
    sums = {name: sum(row[name] for row in mine) for name in ("special_rows", "unfinished_tokens", "cut_documents")}
    return {split: manifest.splits[length][split].rows for split in SPLITS} | sums


def _top(counts: np.ndarray, tokenizer: Tokenizer) -> list[Facts]:
    best = np.argsort(-counts, kind="stable")[:_TOP]
    total = max(1, int(counts.sum()))
    return [
        {"token": tokenizer.id_to_token(int(i)), "id": int(i), "count": int(counts[i]), "share": counts[i] / total}
        for i in best
        if counts[i]
    ]


def _ranks(pieces: list[Facts]) -> list[Facts]:
    found: dict[str, Facts] = {}
    for facts in pieces:
        rank = found.setdefault(facts["rank"], {"name": facts["rank"], "pieces": 0, "text_bytes": 0, "seconds": 0.0})
        rank["pieces"] += 1
        rank["text_bytes"] += facts["read_bytes"]
        rank["seconds"] += facts["seconds"]
    for rank in found.values():
        rank["mb_per_s"] = rank["text_bytes"] / 1e6 / max(rank["seconds"], 1e-9)
    return [found[name] for name in sorted(found)]
