"""What preparing and loading a corpus costs.

    python benchmarks/corpus.py --text "wiki-train-*.jsonl.xz" --vocab vocab.txt

Preparation against bare `tokenizers` on the same text and one core; two MPI ranks against one, whole commands; peak
memory for 100 MB and for 1 GB of text; loading with masking on one core; the opening of a corpus of 10,000 shards; and
sample 10^9 against sample 0. Writes results/corpus-<device>.json; nothing else should run meanwhile.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sctd.bench.result import write_result
from sctd.config import Config
from sctd.corpus.manifest import Ends, Shard, Split, load_corpus_tokenizer, read_manifest, write_manifest
from sctd.corpus.sources.source import read_documents
from sctd.data.masking import build_masker
from sctd.data.stream import Rows, Share, TrainStream

RESULTS = Path(__file__).parent / "results"
ROUNDS = 3
MANY_SHARDS = 10_000
# One core for each process: what is compared is work, not threads.
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def texts_of(args: argparse.Namespace) -> Iterator[str]:
    """Documents of the given text, again and again, each round with other words: no two are equal."""
    for round_ in range(1000):
        for text in read_documents(args.text):
            yield text if not round_ else " ".join(changed(word, round_) for word in text.split(" "))


def changed(word: str, round_: int) -> str:
    """A word with its letters turned by a place that belongs to the word and the round, in one of eight cases."""
    shift = hashlib.blake2b(f"{round_} {word}".encode(), digest_size=1).digest()[0]
    if shift % 8 or not word.isascii() or not word.isalpha():
        return word
    return "".join(chr((ord(char) - 97 + round_) % 26 + 97) for char in word.lower())


def make_text(args: argparse.Namespace, megabytes: int) -> list[Path]:
    """So many MB of documents as .jsonl files of 25 MB."""
    folder = args.work / f"text-{megabytes}"
    paths = sorted(folder.glob("*.jsonl"))
    if paths:
        return paths
    folder.mkdir(parents=True)
    texts = texts_of(args)
    for number in range(-(-megabytes // 25)):
        size, path = 0, folder / f"{number:03d}.jsonl"
        with path.open("w", encoding="utf-8") as stream:
            for text in texts:
                size += len(text.encode())
                stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                if size >= 25_000_000:
                    break
    return sorted(folder.glob("*.jsonl"))


def prepare(args: argparse.Namespace, text: str, name: str, ranks: int = 0) -> dict[str, float]:
    """One `sctd prepare`, whole command: seconds, the rate of its encoding, and the peak memory of its fattest rank."""
    out = args.work / name
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "sctd", "prepare", "--source", text, "--tokenizer", str(args.vocab)]
    command += ["--seq-len", "128,512", "--shard-plan", "12MB", "--out", str(out)]
    if ranks:
        command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "core", "-n", str(ranks), *command]
    else:
        command = ["taskset", "-c", "0", *command]
    watch = [sys.executable, "-c", _WATCH, *command]
    start = time.perf_counter()
    done = subprocess.run(watch, env=os.environ | ONE_THREAD, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)
    facts = json.loads((out / "report.json").read_text())
    encode = next(stage["seconds"] for stage in facts["stages"] if stage["name"] == "encode")
    size = facts["read"]["bytes"]
    peak = float(done.stdout.strip().splitlines()[-1])
    return {"seconds": seconds, "bytes": size, "encode_mb_per_s": size / 1e6 / encode, "peak_mib": peak}


# Runs a command and prints the largest resident set among it and what it started.
_WATCH = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
sys.exit(code)
"""


def bare(args: argparse.Namespace, text: str) -> float:
    """MB/s of `encode_batch` alone, on one core, over documents that are in memory."""
    script = f"""
import sys, time
from sctd.corpus.prepare.encode import batches
from sctd.corpus.sources.source import read_documents
from sctd.corpus.tokenizer import corpus_encoder, load_tokenizer
encoder = corpus_encoder(load_tokenizer({str(args.vocab)!r}))
parts = list(batches(read_documents({text!r})))
size = sum(len(text.encode()) for part in parts for text in part)
start = time.perf_counter()
for part in parts:
    encoder.encode_batch(part, add_special_tokens=False)
print(size / 1e6 / (time.perf_counter() - start))
"""
    command = ["taskset", "-c", "0", sys.executable, "-c", script]
    return float(
        subprocess.run(command, env=os.environ | ONE_THREAD, capture_output=True, text=True, check=True).stdout
    )


def against_bare(args: argparse.Namespace) -> dict[str, Any]:
    """In turns: bare tokenizing, and the preparation of the same file."""
    text = str(make_text(args, 25)[0])
    pairs = [(bare(args, text), prepare(args, text, "one-core")) for _ in range(ROUNDS)]
    one = [pair[0] for pair in pairs]
    encode = [pair[1]["encode_mb_per_s"] for pair in pairs]
    whole = [pair[1]["bytes"] / 1e6 / pair[1]["seconds"] for pair in pairs]
    ratios = [e / b for e, b in zip(encode, one, strict=True)]
    medians = {"bare_mb_per_s": one, "encode_mb_per_s": encode, "command_mb_per_s": whole, "of_bare": ratios}
    return {name: statistics.median(values) for name, values in medians.items()}


def ranks(args: argparse.Namespace) -> dict[str, Any]:
    """In turns: one MPI rank, and two."""
    text = f"{make_text(args, args.megabytes)[0].parent}/*.jsonl"
    pairs = [[prepare(args, text, f"ranks-{n}", n) for n in (1, 2)] for _ in range(ROUNDS)]
    seconds = [statistics.median(pair[n]["seconds"] for pair in pairs) for n in (0, 1)]
    encode = [statistics.median(pair[n]["encode_mb_per_s"] for pair in pairs) for n in (0, 1)]
    ratio = statistics.median(one["seconds"] / two["seconds"] for one, two in pairs)
    stage = statistics.median(two["encode_mb_per_s"] / one["encode_mb_per_s"] for one, two in pairs)
    size = pairs[0][0]["bytes"] / 1e6
    return {"megabytes": size, "seconds": seconds, "encode_mb_per_s": encode, "ratio": ratio, "encode_ratio": stage}


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of one process for little and for much text."""
    found = {}
    for megabytes in (100, 1000):
        text = f"{make_text(args, megabytes)[0].parent}/*.jsonl"
        found[f"peak_mib_{megabytes}_mb"] = prepare(args, text, f"memory-{megabytes}")["peak_mib"]
        if megabytes == 1000:
            shutil.rmtree(args.work / "text-1000")
    return found


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second through reading, permuting and masking, on one core."""
    folder = args.work / "ranks-2"
    manifest = read_manifest(folder)
    masker = build_masker(Config(), manifest, load_corpus_tokenizer(folder, manifest))
    os.sched_setaffinity(0, {0})
    found = {}
    for length, size in ((128, 256), (512, 64)):
        rows = Rows(folder, manifest, "train", length)
        stream = TrainStream(rows, masker, 1, Share(0, 1, size, 1))
        rates = []
        for _ in range(ROUNDS):
            start, steps = time.perf_counter(), 40
            for step in range(steps):
                stream.step(step * size, step + 1)
            rates.append(steps * size * length / (time.perf_counter() - start))
        found[f"tokens_per_s_{length}"] = statistics.median(rates)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    for length in (128, 512):
        found[f"bert_base_tokens_per_s_{length}"] = bert_base(args, length)
    return found


def bert_base(args: argparse.Namespace, length: int) -> float:
    """Tokens a second that token dropping, the fastest way to train it, takes of BERT-base on this machine."""
    rows = 2048 // length
    folder = args.work / f"bench-{length}"
    words = ["bert-base-sctd", "model.attention_dropout=0", "train.precision=fp32", "--arms", "drop", "--rounds", "1"]
    command = [sys.executable, "-m", "sctd", "bench", *words, "--sizes", f"{rows}x{length}", "--out", str(folder)]
    subprocess.run(command, capture_output=True, check=True)
    size = json.loads(next(folder.glob("*.json")).read_text())["sizes"][f"{rows}x{length}"]
    return rows * length / size["drop"]["step"]


def far_samples(args: argparse.Namespace) -> dict[str, Any]:
    """A corpus of 10,000 shards: to open it, and to take samples from its beginning and from far behind it."""
    folder = args.work / "many"
    source = read_manifest(args.work / "ranks-2")
    rows, length = 64, 128
    if not folder.is_dir():
        folder.mkdir()
        part = np.load(args.work / "ranks-2" / source.split(length, "train").shards[0].file)[:rows]
        np.save(folder / "rows.npy", part)
        np.save(folder / "ends.npy", np.zeros(0, dtype=np.int64))
        for number in range(MANY_SHARDS):
            os.link(folder / "rows.npy", folder / f"train-{number}.npy")
    size = (folder / "rows.npy").stat().st_size
    ends = Ends("ends.npy", "", (folder / "ends.npy").stat().st_size)
    shards = tuple(Shard(f"train-{number}.npy", rows, "", size, 0, ends) for number in range(MANY_SHARDS))
    split = Split(rows * MANY_SHARDS, shards)
    manifest = replace(source, seq_lens=(length,), splits={length: {"train": split, "valid": split}})
    write_manifest(folder, manifest)
    tokenizer = load_corpus_tokenizer(args.work / "ranks-2", source)
    masker = build_masker(Config(), manifest, tokenizer)
    opening = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        stream = TrainStream(Rows(folder, read_manifest(folder), "train", length), masker, 1, Share(0, 1, 8, 1))
        stream.step(0, 1)
        opening.append(time.perf_counter() - start)
    times: dict[int, list[float]] = {0: [], 10**9: []}
    for _ in range(50):
        for cursor, found in times.items():
            start = time.perf_counter()
            stream.step(cursor + len(found) * 8, 1)
            found.append(time.perf_counter() - start)
    near, far = (statistics.median(found) for found in times.values())
    return {"shards": MANY_SHARDS, "open_seconds": statistics.median(opening), "step_at_0": near, "step_at_1e9": far}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="a source of `sctd prepare`, of real documents")
    parser.add_argument("--vocab", required=True, type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/bench-corpus"), help="folder for the corpora")
    parser.add_argument("--megabytes", type=int, default=100, help="of text for the ranks (default %(default)s)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "against_bare": against_bare, "ranks": ranks, "loading": loading, "far_samples": far_samples,
        "memory": memory,
    }  # fmt: skip
    found = {}
    for name, part in parts.items():
        found[name] = part(args)
        print(name, json.dumps(found[name]), flush=True)
    print(write_result(RESULTS, "corpus", found))


if __name__ == "__main__":
    main()
