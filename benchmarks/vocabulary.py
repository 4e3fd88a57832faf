"""How much shorter a text becomes with pieces of its own in the vocabulary.

    python benchmarks/vocabulary.py --tokenizer bert-base-uncased --source embedded --source "legal/*.jsonl"

Of each source, every tenth document is held out; the pieces are learned from the others, and both parts are encoded
with the tokenizer as it was and as it has grown. Writes results/vocabulary-<device>.json.
"""

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sctd.bench.result import write_result
from sctd.corpus.sources.source import read_documents
from sctd.corpus.tokenizer import corpus_encoder, count_words, encode_documents, load_tokenizer
from sctd.corpus.vocabulary import add_vocabulary

RESULTS = Path(__file__).parent / "results"
HEAD = "| source | pieces added | in slots | seconds | tokens a word, train | held out | saved, train | held out |"


def tokens(tokenizer: Tokenizer, texts: list[str]) -> int:
    encoder = corpus_encoder(tokenizer)
    return sum(len(ids) for text in texts for ids in encode_documents(encoder, [text]))


def measure(source: str, tokenizer: Tokenizer, sizes: list[int], most: int | None) -> list[dict[str, Any]]:
    """One record for each number of pieces."""
    documents = list(itertools.islice(read_documents(source), most))
    parts = {"train": [text for n, text in enumerate(documents) if n % 10], "held_out": documents[::10]}
    words = {name: sum(len(text.split()) for text in texts) for name, texts in parts.items()}
    before = {name: tokens(tokenizer, texts) for name, texts in parts.items()}
    start = time.perf_counter()
    counted = count_words(parts["train"], tokenizer)
    counting = time.perf_counter() - start
    found = []
    for size in sizes:
        start = time.perf_counter()
        grown, facts = add_vocabulary(tokenizer, size, *counted)
        seconds = counting + time.perf_counter() - start
        record = {"source": source, "seconds": seconds, "distinct_words": len(counted[0])}
        record |= {name: facts[name] for name in ("wanted", "added", "in_slots", "appended", "vocab_size")}
        for name, texts in parts.items():
            after = tokens(grown, texts)
            record[name] = {
                "documents": len(texts),
                "words": words[name],
                "tokens_per_word_before": before[name] / words[name],
                "tokens_per_word": after / words[name],
                "saved_share": 1 - after / before[name],
            }
        record["first_pieces"] = [piece["piece"] for piece in facts["pieces"][:20]]
        found.append(record)
        print(line(record), flush=True)
    return found


def line(record: dict[str, Any]) -> str:
    """A row of the table."""
    parts = [record["train"], record["held_out"]]
    ratios = [f"{part['tokens_per_word_before']:.3f} -> {part['tokens_per_word']:.3f}" for part in parts]
    shares = [f"{part['saved_share']:.1%}" for part in parts]
    cells = [record["source"], f"{record['added']:,}", f"{record['in_slots']:,}", f"{record['seconds']:.1f}"]
    return f"| {' | '.join([*cells, *ratios, *shares])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="as for `sctd prepare`")
    parser.add_argument("--source", action="append", required=True, help="as for `sctd prepare`; may be repeated")
    parser.add_argument("--add", default="100,1000,5000", help="numbers of pieces (default %(default)s)")
    parser.add_argument("--max-documents", type=int, help="of each source")
    args = parser.parse_args()
    tokenizer, sizes = load_tokenizer(args.tokenizer), [int(size) for size in args.add.split(",")]
    print(f"{HEAD}\n|---|{'---:|' * 7}")
    found = [record for source in args.source for record in measure(source, tokenizer, sizes, args.max_documents)]
    print(write_result(RESULTS, "vocabulary", {"tokenizer": args.tokenizer, "measured": found}))


if __name__ == "__main__":
    main()
