"""What leaves the MLM plateau: each lever alone and together, in both families; and the arms behind it.

    python benchmarks/learning.py embedded --work runs/learning
    python benchmarks/learning.py wiki --source wiki-train-0.jsonl.xz --work runs/learning
    python benchmarks/learning.py tables
    python benchmarks/learning.py arms --source wiki-train-0.jsonl.xz --tokenizer vocab.txt

`embedded`: encoders of 4 x 128 on the documentation that Python carries, 600 steps of 32 rows of 128 tokens (2.5M
tokens), and the two demos with the recipe that they replaced, 1,300 steps; three seeds. `wiki`: 6 x 128 on one file of
English Wikipedia, 2,500 steps (10.2M tokens). Every run is `sctd pretrain`; one that is in the results, or complete in
--work, is not trained again, one that is not goes on. --only takes runs by name. Writes results/learning-WHAT.json
after each run; `tables` writes the tables of docs/learning.md and the picture of the README from them.

`arms`: the three arms on the same real text for the same steps. Each is `bert-mini` on rows of 128 tokens under the
deepspeed launcher, two ranks, ZeRO-1, one seed. Writes results/arms-<device>.json and docs/arms.png.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from sctd.bench.result import facts, write_result
from sctd.present.pictures import Curve, Panel, grid, write_picture
from sctd.train.keep.export import read_run
from sctd.train.keep.metrics import read_metrics

HERE = Path(__file__).parent
RESULTS, DOCS = HERE / "results", HERE.parent / "docs"
KEYS = ("step", "tokens", "flops", "valid_loss", "valid_gap", "valid_accuracy", "context_use", "breakthrough_step")
Runs = dict[str, tuple[str, ...]]  # by name: overrides of the recipe `demo`

BERT = (
    "model.family=bert", "model.heads=2", "model.intermediate_size=512", "model.layer_norm_eps=1e-12",
    "optimizer.name=adamw", "schedule.name=linear", "schedule.decay_steps=0", "optimizer.clip=1.0",
)  # fmt: skip
BASELINE = ("arm=baseline", "schedule.full_start=0", "schedule.full_finish=0")
SHORT = (*BASELINE, "train.steps=600", "schedule.warmup_steps=100")
CALM = ("schedule.name=wsd", "schedule.decay_steps=120", "optimizer.clip=0.5")
MUON, SINES = ("optimizer.name=muon",), ("model.positions=sinusoidal",)
MASKS = ("data.mask_probability=0.4", "data.mask_stages=[[301,0.15]]")
ROTARY = ("optimizer.name=adamw", "schedule.name=wsd", "schedule.decay_steps=120")

EMBEDDED: Runs = {
    "bert, as it was": (*SHORT, *BERT),
    "bert, weights N(0, 0.08)": (*SHORT, *BERT, "model.initializer_range=0.08"),
    "bert, WSD and clip 0.5": (*SHORT, *BERT, *CALM),
    "bert, mask rate 40 % then 15 %": (*SHORT, *BERT, *CALM, *MASKS),
    "bert, sinusoidal positions": (*SHORT, *BERT, *CALM, *SINES),
    "bert, Muon": (*SHORT, *BERT, *CALM, *MUON),
    "bert, sinusoidal positions and Muon": (*SHORT, *BERT, *CALM, *SINES, *MUON),
    "modernbert, AdamW": (*SHORT, *ROTARY),
    "modernbert, Muon": (*SHORT, *ROTARY, *MUON),
    "modernbert, Muon, mask rate 40 % then 15 %": (*SHORT, *ROTARY, *MUON, *MASKS),
    "old demo (bert, sctd)": (*BERT, "schedule.full_start=0", "schedule.full_finish=0", "train.precision=fp32"),
    "demo-bert": ("extends=demo-bert",),
    "demo": (),
    "demo, baseline": BASELINE,
    "demo, no full start or finish": ("schedule.full_start=0", "schedule.full_finish=0"),
}  # fmt: skip

LARGER = (
    "model.layers=6", "train.steps=2500", "train.valid_every=250", "train.valid_rows=1024", "run.examples=[]",
    "optimizer.name=adamw", "schedule.name=linear", "schedule.decay_steps=0",
)  # fmt: skip
STABLE = ("schedule.name=wsd", "schedule.decay_steps=500", "optimizer.clip=0.5")
PHASES = ("schedule.full_start=750", "schedule.full_finish=250")
WIKI: Runs = {
    "baseline": (*LARGER, *BASELINE),
    "sctd, full start and finish": (*LARGER, *PHASES),
    "token drop, full start and finish": (*LARGER, *PHASES, "arm=token_drop"),
    "token drop": (*LARGER, *BASELINE, "arm=token_drop"),
    "sctd": (*LARGER, *BASELINE, "arm=sctd"),
    "baseline, Muon": (*LARGER, *BASELINE, *MUON),
    "sctd, full start and finish, Muon": (*LARGER, *PHASES, *MUON),
    "bert baseline, sinusoidal positions and Muon": (*LARGER, *BASELINE, *BERT, *STABLE, *SINES, *MUON),
}  # fmt: skip
SUITES = {
    "embedded": (EMBEDDED, ("--source", "embedded", "--vocab-size", "4096", "--valid-fraction", "0.05"), (1, 2, 3)),
    "wiki": (WIKI, ("--vocab-size", "8192"), (1,)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*SUITES, "tables", "arms"])
    parser.add_argument("--source", help="text of the `wiki` runs, or of the arms")
    parser.add_argument("--tokenizer", help="of the arms")
    parser.add_argument("--work", type=Path, default=Path("runs/learning"))
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--only", nargs="+", help="names of runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    args = parser.parse_args()
    if args.what == "tables":
        return tables()
    if args.what == "arms":
        return compare_arms(args.source, args.tokenizer, args.work / "arms")
    torch.set_num_threads(1)  # as the runs do, which the results say
    runs, prepare, seeds = SUITES[args.what]
    corpus = args.work / args.what / "corpus"
    source = ("--source", args.source) if args.source else ()
    sctd("prepare", *prepare, *source, "--seq-len", "128", "--out", str(corpus))
    entropy = json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))["unigram_entropy"]
    path = RESULTS / f"learning-{args.what}.json"
    found = read(path)
    jobs = [(name, seed) for seed in args.seeds or seeds for name in args.only or runs]
    jobs = [(name, seed) for name, seed in jobs if str(seed) not in found.get(name, {"seeds": {}})["seeds"]]

    def work(job: tuple[str, int]) -> None:
        train(args.work / args.what, corpus, *job, runs[job[0]])

    with ThreadPoolExecutor(args.jobs) as pool:
        for (name, seed), _ in zip(jobs, pool.map(work, jobs), strict=True):
            entry = found.setdefault(name, {"overrides": runs[name], "seeds": {}})
            entry["seeds"][str(seed)] = collect(folder(args.work / args.what, name, seed))
            ordered = {name: found[name] for name in runs if name in found}
            path.write_text(
                json.dumps({"unigram_entropy": entropy, "runs": ordered}, indent=1) + "\n", encoding="utf-8"
            )


def read(path: Path) -> dict[str, Any]:
    """The runs that are there already, by name."""
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else {}


def train(work: Path, corpus: Path, name: str, seed: int, overrides: tuple[str, ...]) -> None:
    """One run to its end, wherever it stands."""
    run_dir = folder(work, name, seed)
    if (run_dir / "export").is_dir():
        return
    recipe, rest = "demo", overrides
    if rest[:1] and rest[0].startswith("extends="):
        recipe, rest = rest[0].removeprefix("extends="), rest[1:]
    resume = ["--resume"] if (run_dir / "config.yaml").is_file() else []
    own = (f"data.corpus={corpus}", f"run.dir={run_dir}", f"run.seed={seed}", "train.keep_checkpoints=1")
    sctd("pretrain", recipe, *rest, *own, *resume, log=run_dir.with_suffix(".log"))
    print(f"{name}, seed {seed}: {read_metrics(run_dir)[-1]['valid_gap']:.2f} nats below unigram", flush=True)


def folder(work: Path, name: str, seed: int) -> Path:
    plain = "".join(letter if letter.isalnum() else "-" for letter in name)
    return work / f"{plain}-{seed}"


def sctd(*words: str, log: Path | None = None) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if log is None:
        subprocess.run([sys.executable, "-m", "sctd", *words], check=True, env=environment)
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        subprocess.run([sys.executable, "-m", "sctd", *words], check=True, env=environment, stdout=file, stderr=file)


def collect(run_dir: Path) -> dict[str, Any]:
    """The validations of a finished run, how fast it went, and on what."""
    records = read_metrics(run_dir)
    return {
        **facts(),
        "precision": read_run(run_dir).train.precision,
        "tokens_per_s": statistics.median(record["tokens_per_s"] for record in records),
        "seconds": records[-1]["seconds"],
        "curve": [{key: record.get(key) for key in KEYS} for record in records if record.get("valid_loss") is not None],
    }


def tables() -> None:
    """The tables of docs/learning.md and docs/learning.png, from the results."""
    page = (DOCS / "learning.md").read_text(encoding="utf-8")
    for what in SUITES:
        result = json.loads((RESULTS / f"learning-{what}.json").read_text(encoding="utf-8"))
        table = "\n".join(_table(result))
        mark = re.compile(rf"(<!-- {what} -->\n).*?(<!-- end -->)", re.DOTALL)
        page = mark.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", page)
        if what == "embedded":
            _draw_runs(result, DOCS / "learning.png")
    (DOCS / "learning.md").write_text(page, encoding="utf-8")


def _table(result: dict[str, Any]) -> list[str]:
    """A row for each run: medians over its seeds, with the least and the most of the gaps where there are several."""
    lines = [
        "| run | tokens | seeds | held-out loss | gap (nats) | masked accuracy | context use | breakthrough | FLOPs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    whole = {}
    for name, entry in result["runs"].items():
        curves = [seed["curve"] for seed in entry["seeds"].values()]
        last = [curve[-1] for curve in curves]
        middle = {key: statistics.median(point[key] for point in last) for key in KEYS[:-1]}
        gaps = sorted(point["valid_gap"] for point in last)
        spread = f" ({gaps[0]:.2f} to {gaps[-1]:.2f})" if len(gaps) > 1 else ""
        escapes = [point["breakthrough_step"] for point in last]
        steps = ", ".join("-" if step is None else f"{step}" for step in escapes)
        base = whole.setdefault(middle["tokens"], middle["flops"])
        lines.append(
            f"| {name} | {middle['tokens'] / 1e6:.1f}M | {len(last)} | {middle['valid_loss']:.3f} | "
            f"{middle['valid_gap']:.2f}{spread} | {middle['valid_accuracy']:.1%} | {middle['context_use']:.2f} | "
            f"{steps} | {middle['flops'] / base:.2f} |"
        )
    return lines


def _draw_runs(result: dict[str, Any], path: Path) -> None:
    """Held-out loss over tokens: the recipe as it was, and the two demos; thin: further seeds."""
    shown = {"old demo (bert, sctd)": "#888888", "demo-bert": "#d1742b", "demo": "#2b6cb0"}
    curves = [
        _curve(name, seed["curve"], "tokens", colour, thin=number > 0)
        for name, colour in shown.items()
        for number, seed in enumerate(result["runs"][name]["seeds"].values())
    ]
    _draw(curves, "tokens", result["unigram_entropy"], path)


def _curve(name: str, points: list[dict[str, Any]], x: str, colour: str, thin: bool = False) -> Curve:
    return Curve(name, [point[x] for point in points], [point["valid_loss"] for point in points], colour, thin)


def _draw(curves: list[Curve], x: str, entropy: float, path: Path) -> None:
    """With the entropy that a model comes to which knows frequencies alone."""
    panel = Panel(curves, x=x, y="held-out MLM loss, full path (nats)", marker=".", levels=[entropy],
                  level_name="unigram entropy")  # fmt: skip
    write_picture(path, 7.2, 3.6, grid([panel.draw]))


# ---- arms ----------------------------------------------------------------------------------------------------------

ARMS = {"baseline": "#666666", "token-drop": "#d1742b", "sctd": "#2b6cb0"}
ARM_STEPS, ARM_RANKS = 250, 2


def compare_arms(source: str | None, tokenizer: str | None, work: Path) -> None:
    """Held-out loss curves of the three arms in one picture."""
    if source is None or tokenizer is None:
        raise SystemExit("arms: give --source and --tokenizer")
    corpus = work / "corpus"
    prepare = ["--source", source, "--tokenizer", tokenizer, "--seq-len", "128"]
    subprocess.run([sys.executable, "-m", "sctd", "prepare", *prepare, "--out", corpus], check=True)
    entropy = json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))["unigram_entropy"]
    keys = ("step", "valid_loss", "valid_accuracy")
    curves = {}
    for arm in ARMS:
        records = [record for record in train_arm(arm, work) if record.get("valid_loss") is not None]
        curves[arm] = [{key: record[key] for key in keys} for record in records]
    drawn = [_curve(arm, points, "step", ARMS[arm]) for arm, points in curves.items()]
    _draw(drawn, "step", entropy, DOCS / "arms.png")
    result = {
        "recipe": "bert-mini", "ranks": ARM_RANKS, "zero_stage": 1, "precision": "fp32", "steps": ARM_STEPS,
        "batch": "64x128", "source": Path(source).name, "unigram_entropy": entropy, "curves": curves,
    }  # fmt: skip
    path = write_result(RESULTS, "arms", result)
    for arm, points in curves.items():
        print(f"{arm:<12} held-out loss {points[0]['valid_loss']:.3f} -> {points[-1]['valid_loss']:.3f}")
    print(f"unigram entropy {entropy:.3f}; written {path.name} and docs/arms.png")


def train_arm(arm: str, work: Path) -> list[dict[str, Any]]:
    """Metrics of the finished run of one arm."""
    run_dir = work / arm
    if not (run_dir / "export").is_dir():
        overrides = [
            f"data.corpus={work / 'corpus'}", f"run.dir={run_dir}", f"train.steps={ARM_STEPS}",
            f"schedule.warmup_steps={ARM_STEPS // 5}", "train.batch_size=64", "train.precision=fp32",
            "train.zero_stage=1", f"train.valid_every={ARM_STEPS // 10}", "train.valid_rows=512",
        ]  # fmt: skip
        launcher = Path(sys.executable).parent / "deepspeed"
        command = [launcher, "--num_accelerators", str(ARM_RANKS), "--module", "sctd", "pretrain", f"bert-mini-{arm}"]
        subprocess.run([*command, *overrides], check=True, env=os.environ | {"DS_ACCELERATOR": "cpu"})
    return read_metrics(run_dir)


if __name__ == "__main__":
    main()
