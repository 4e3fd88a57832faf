"""Whether `sctd finetune` can be trusted: the same fine-tunings through a plain transformers script, and a test.

    python benchmarks/harness.py --checkpoint bert-base-uncased --data-dir glue/

RTE, MRPC and a part of SST-2, with the same checkpoint and hyper-parameters, over several seeds: by `sctd finetune`,
and by a script that shares nothing with it but the numbers: pandas reads the files, `Trainer` trains on batches of its
own, scikit-learn scores. Welch's t-test tells whether the two means differ by more than the seeds do. What is finished
in --work is not run again. Trainer needs `pip install accelerate`. Writes results/harness-LAYERSxWIDTH-<device>.json.
"""

import argparse
import csv
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sctd.bench.result import write_result
from sctd.evaluate.encoder import load_config
from sctd.evaluate.results import read_cells
from sctd.evaluate.tasks.task import load_task

RESULTS = Path(__file__).parent / "results"
DOUBTFUL = 0.05  # a smaller p speaks against equal means
LENGTH = 256


@dataclass(frozen=True)
class Files:
    """Where a task's rows are below --data-dir, and what their columns are called."""

    folder: str
    train: str
    dev: str
    texts: tuple[str, ...]
    label: str


TASKS = {
    "rte": Files("RTE", "train.tsv", "dev.tsv", ("sentence1", "sentence2"), "label"),
    "mrpc": Files("MRPC", "msr_paraphrase_train.txt", "msr_paraphrase_test.txt", ("#1 String", "#2 String"), "Quality"),
    "sst2": Files("SST-2", "train.tsv", "dev.tsv", ("sentence",), "label"),
}
NAMES = {"entailment": 0, "not_entailment": 1}  # of RTE's labels, in GLUE's own files


def read(path: Path) -> Any:
    import pandas

    return pandas.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE, keep_default_na=False, encoding="utf-8-sig")


def lay_out(args: argparse.Namespace, tasks: list[str]) -> Path:
    """A folder with the files of the tasks, of SST-2 with the first rows alone, which both sides read."""
    out = args.work / f"data-{args.sst2_rows}"
    for task in tasks:
        files = TASKS[task]
        source = next(args.data_dir.rglob(f"{files.folder}/{files.train}"), None)
        if source is None:
            raise SystemExit(f"--data-dir {args.data_dir}: there is no {files.folder}/{files.train} in it")
        (out / files.folder).mkdir(parents=True, exist_ok=True)
        for name in (files.train, files.dev):
            lines = (source.parent / name).read_text(encoding="utf-8").splitlines(keepends=True)
            if task == "sst2" and name == files.train:
                lines = lines[: args.sst2_rows + 1]  # and a header
            (out / files.folder / name).write_text("".join(lines), encoding="utf-8")
    return out


def ours(args: argparse.Namespace, tasks: list[str], data: Path) -> dict[str, list[dict[str, float]]]:
    """Accuracy at the best and at the last epoch, seed by seed, of `sctd finetune`."""
    out = args.work / "ours"
    command = [sys.executable, "-m", "sctd", "finetune", args.checkpoint, "--task", ",".join(tasks), "--out", str(out)]
    command += ["--data-dir", str(data), "--seeds", str(args.seeds), "--epochs", str(args.epochs)]
    subprocess.run([*command, *(["--lr", str(args.lr)] if args.lr else [])], check=True)
    found: dict[str, list[dict[str, float]]] = {task: [] for task in tasks}
    for cell in read_cells(out):
        if cell["task"] not in found or cell["lr"] != (args.lr or load_task(cell["task"]).lr):
            continue
        if cell["epochs"] == args.epochs and cell["seed"] <= args.seeds:
            found[cell["task"]].append({name: cell["scores"][name]["accuracy"] for name in ("best", "last")})
    return found


def plain(args: argparse.Namespace, task: str, data: Path, seed: int) -> dict[str, float]:
    """The same of a plain script."""
    import datasets
    import transformers
    from sklearn.metrics import accuracy_score

    files, own = TASKS[task], load_task(task)
    lr = args.lr or own.lr
    result = args.work / "plain" / f"{task}-lr{lr:g}-{args.epochs}epochs-seed{seed}.json"
    if result.is_file():
        return dict(json.loads(result.read_text(encoding="utf-8")))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.checkpoint)
    transformers.set_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(args.checkpoint, num_labels=2)
    length = min(LENGTH, model.config.max_position_embeddings)

    def encoded(name: str) -> Any:
        table = read(data / files.folder / name)
        columns = tokenizer(*(table[text].tolist() for text in files.texts), truncation=True, max_length=length)
        labels = [NAMES[label] if label in NAMES else int(label) for label in table[files.label]]
        return datasets.Dataset.from_dict({**columns, "labels": labels})

    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                folder, per_device_train_batch_size=own.batch_size, per_device_eval_batch_size=64,
                num_train_epochs=args.epochs, learning_rate=lr, weight_decay=0.01, warmup_steps=0.06, seed=seed,
                eval_strategy="epoch", save_strategy="no", report_to="none", disable_tqdm=True,
            ),
            train_dataset=encoded(files.train),
            eval_dataset=encoded(files.dev),
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda found: {"accuracy": accuracy_score(found.label_ids, found.predictions.argmax(-1))},
        )  # fmt: skip
        trainer.train()
    accuracies = [record["eval_accuracy"] for record in trainer.state.log_history if "eval_accuracy" in record]
    scores = {"best": max(accuracies), "last": accuracies[-1]}
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(scores), encoding="utf-8")
    print(f"plain {task} seed {seed}: accuracy {scores['best']:.4f} best, {scores['last']:.4f} last", flush=True)
    return scores


def welch(one: list[float], other: list[float]) -> float:
    """Probability of so different means where there is no difference."""
    from scipy import stats

    if len(set(one)) == len(set(other)) == 1:  # no spread on either side
        return float(one[0] == other[0])
    return float(stats.ttest_ind(one, other, equal_var=False).pvalue)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="transformers folder or hub id")
    parser.add_argument("--data-dir", type=Path, required=True, help="with RTE/, MRPC/ and SST-2/ somewhere in it")
    parser.add_argument("--tasks", default="rte,mrpc,sst2", help="of these (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="of each side (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="passes (default %(default)s)")
    parser.add_argument("--lr", type=float, help="of all tasks (default: each one's)")
    parser.add_argument("--sst2-rows", type=int, default=4000, help="training rows of SST-2 (default %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/harness"))
    args = parser.parse_args()
    if importlib.util.find_spec("accelerate") is None:
        raise SystemExit("Trainer cannot be run: pip install accelerate")
    tasks = args.tasks.split(",")
    data = lay_out(args, tasks)
    by_us = ours(args, tasks, data)
    rows: list[dict[str, Any]] = []
    for task in tasks:
        by_them = [plain(args, task, data, seed) for seed in range(1, args.seeds + 1)]
        for epoch in ("best", "last"):
            one, other = ([score[epoch] for score in side] for side in (by_us[task], by_them))
            rows.append({"task": task, "epoch": epoch, "sctd": one, "plain": other, "p": welch(one, other)})
    print("| task | epoch | sctd finetune | plain transformers | difference | Welch's p |\n|---|---|---|---|---|---|")
    for row in rows:
        means = [statistics.fmean(row[side]) for side in ("sctd", "plain")]
        spreads = [statistics.stdev(row[side]) if args.seeds > 1 else 0.0 for side in ("sctd", "plain")]
        cells = [f"{mean:.4f} +- {spread:.4f}" for mean, spread in zip(means, spreads, strict=True)]
        doubt = " (differs)" if row["p"] < DOUBTFUL else " (no spread)" if not any(spreads) else ""
        test = f"{means[0] - means[1]:+.4f} | {row['p']:.2f}{doubt}"
        print(f"| {row['task']} | {row['epoch']} | {' | '.join(cells)} | {test} |")
    config = load_config(args.checkpoint)
    size = f"{config.num_hidden_layers}x{config.hidden_size}"
    facts = {
        "model": size,
        "epochs": args.epochs,
        "lr": args.lr,
        "seeds": args.seeds,
        "sst2_rows": args.sst2_rows,
        "rows": rows,
    }
    print(f"written {write_result(RESULTS, f'harness-{size}', facts)}")


if __name__ == "__main__":
    main()
