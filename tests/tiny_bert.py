"""A BERT of no size, a tokenizer of a few words, and rows that both can learn in seconds: for tests of fine-tuning."""

import json
import random
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BertForMaskedLM, BertTokenizer, ModernBertForMaskedLM

from sctd.model.convert import to_hf_config
from sctd.model.shape import BertShape

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
FILLER = [
    "the",
    "of",
    "a",
    "list",
    "and",
    "object",
    "value",
    "if",
    "is",
    "not",
    "to",
    "in",
    "function",
    "string",
    "with",
]
WORDS = [*FILLER, "red", "green", "blue", "gold", "where", "what"]


def tiny_tokenizer(folder: Path) -> BertTokenizer:
    """Words are tokens; others are spelled letter by letter."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [*string.ascii_lowercase, *string.digits, *".,?!"]
    pieces = [*SPECIAL, *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(dict.fromkeys(pieces)) + "\n", encoding="utf-8")
    return BertTokenizer(vocab=str(vocabulary), do_lower_case=True)


def tiny_bert(folder: Path, positions: int = 64, seed: int = 0, family: str = "bert", dropout: float = 0.1) -> Path:
    """A random model with its tokenizer, as transformers saves them."""
    tokenizer = tiny_tokenizer(folder)
    shape = BertShape(len(tokenizer), 2, 32, 2, 64, positions, dropout, dropout, family=family)
    torch.manual_seed(seed)
    head = ModernBertForMaskedLM if shape.is_modern else BertForMaskedLM
    head(to_hf_config(shape, 0, 2, 3)).save_pretrained(folder)
    if shape.is_modern:
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return folder


def sentence(draw: random.Random, *planted: str, least: int = 3, most: int = 9) -> str:
    """Words without meaning, and the planted ones somewhere among them."""
    words = draw.choices(FILLER, k=draw.randint(least, most))
    for word in planted:
        words.insert(draw.randint(0, len(words)), word)
    return " ".join(words)


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ("\t".join(map(str, row)) + "\n" for row in (header, *rows))
    path.write_text("".join(lines), encoding="utf-8")


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_rte(folder: Path, train: int = 160, dev: int = 60, seed: int = 1) -> Path:
    """A colour in the second text decides. RTE's own files."""
    draw = random.Random(seed)
    for split, count in (("train", train), ("dev", dev)):
        rows = []
        for number in range(count):
            label = number % 2
            pair = sentence(draw, ("red", "blue")[label])
            rows.append((sentence(draw), pair, ("entailment", "not_entailment")[label], number))
        write_table(folder / "RTE" / f"{split}.tsv", ("sentence1", "sentence2", "label", "idx"), rows)
    return folder


def write_order(path: Path, rows: int) -> Path:
    """A probing task that is neither trivial nor hopeless: whether two words stand in this order."""
    draw, lines = random.Random(3), []
    for number in range(rows):
        words = draw.choices(FILLER, k=8)
        label = "yes" if words.index(min(words)) < words.index(max(words)) else "no"
        lines.append(f"{('tr', 'tr', 'va', 'te')[number % 4]}\t{label}\t{' '.join(words)}\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_stsb(folder: Path, train: int = 200, dev: int = 60) -> Path:
    """The score is how often `gold` stands there. The hub's files."""
    draw = random.Random(2)
    for split, count in (("train", train), ("dev", dev)):
        rows = []
        for _ in range(count):
            score = draw.randint(0, 4)
            rows.append((sentence(draw, *["gold"] * score), sentence(draw), float(score)))
        write_table(folder / "STS-B" / f"{split}.tsv", ("sentence1", "sentence2", "score"), rows)
    return folder


def write_copa(folder: Path, train: int = 160, dev: int = 60) -> Path:
    """The choice with `red` is right."""
    draw = random.Random(3)
    for split, count in (("train", train), ("val", dev)):
        records = []
        for number in range(count):
            label = draw.randint(0, 1)
            choices = [sentence(draw, "red" if place == label else "blue") for place in (0, 1)]
            record = {"premise": sentence(draw), "choice1": choices[0], "choice2": choices[1]}
            records.append(record | {"question": draw.choice(["cause", "effect"]), "label": label, "idx": number})
        write_lines(folder / "COPA" / f"{split}.jsonl", records)
    return folder


def write_squad(folder: Path, train: int = 160, dev: int = 60, most: int = 9, unanswerable: bool = False) -> Path:
    """The answer is `gold`, or `gold gold`; of SQuAD 2 a third has none. `most`: words of a context."""
    draw, version = random.Random(4), "v2.0" if unanswerable else "v1.1"
    for split, count in (("train", train), ("dev", dev)):
        paragraphs = []
        for number in range(count):
            none = unanswerable and number % 3 == 0
            answer = "" if none else "gold" + " gold" * draw.randint(0, 1)
            context = sentence(draw, *([] if none else [answer]), most=most)
            answers = [] if none else [{"text": answer, "answer_start": context.index(answer)}]
            question = {"id": f"{split}-{number}", "question": "Where is gold?", "answers": answers}
            if unanswerable:
                question["is_impossible"] = none
            paragraphs.append({"context": context, "qas": [question]})
        path = folder / "squad" / f"{split}-{version}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"version": version, "data": [{"paragraphs": paragraphs}]}), encoding="utf-8")
    return folder


def write_conll(folder: Path, train: int = 160, dev: int = 60) -> Path:
    """`red` begins a person, `blue` a place; `green` behind either belongs to it."""
    draw = random.Random(5)
    for split, count in (("train", train), ("valid", dev)):
        lines = []
        for _ in range(count):
            words = sentence(draw, draw.choice(["red", "blue", "red green", "blue green", "red blue"])).split()
            inside = ""
            for word in words:
                tag = {"red": "B-PER", "blue": "B-LOC"}.get(word, f"I-{inside}" if word == "green" and inside else "O")
                inside = tag[2:]
                lines.append(f"{word} {tag}")
            lines.append("")
        path = folder / "conll03" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
