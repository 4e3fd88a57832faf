"""How long `sctd report` takes for many runs.

    python benchmarks/report.py --run runs/sctd

Copies a run, with its evaluations, as many times as asked for, under the names of four arms and of several seeds. What
is timed is the whole command, with its start. Writes results/report-<device>.json; nothing else should run meanwhile.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from sctd.bench.result import write_result
from sctd.errors import UserError
from sctd.report.gather import gather

RESULTS = Path(__file__).parent / "results"
ARMS = ("baseline", "token_drop", "sctd", "random_drop")
ROUNDS = 3
_HEAVY = ("checkpoints", "export", "events.out.*")  # which no report reads


def copies(run: Path, count: int, folder: Path) -> list[Path]:
    """So many runs like this one."""
    made = []
    for number in range(count):
        place = folder / f"run-{number}"
        shutil.copytree(run, place, ignore=shutil.ignore_patterns(*_HEAVY))
        config = yaml.safe_load((place / "config.yaml").read_text(encoding="utf-8"))
        config["arm"], config["run"]["seed"] = ARMS[number % len(ARMS)], 1 + number // len(ARMS)
        (place / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        made.append(place)
    return made


def measure(folders: list[Path], out: Path) -> float:
    """Seconds of one command."""
    command = [sys.executable, "-m", "sctd", "report", *map(str, folders), "--out", str(out)]
    start = time.perf_counter()
    subprocess.run(command, env=os.environ, check=True, capture_output=True)
    return time.perf_counter() - start


def size_of(run: Path) -> dict[str, Any]:
    """What a report reads of it."""
    try:
        found = gather([run]).runs[0]
    except (UserError, IndexError) as error:
        raise SystemExit(f"--run {run}: {error or 'is no run'}") from None
    evaluations = found.evaluations.values()
    return {
        "records": len(found.records),
        "fine_tunings": sum(len(each.cells) for each in evaluations),
        "probes": sum(len(each.probes) for each in evaluations),
        "drift_points": len(found.drift["points"]) if found.drift else 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a pretraining run with evaluations")
    parser.add_argument("--count", type=int, default=20, help="runs in the report (default %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sctd-") as name:
        folders, out = copies(args.run, args.count, Path(name)), Path(name) / "report.html"
        seconds = [measure(folders, out) for _ in range(ROUNDS)]
        result = {
            "runs": args.count, "each": size_of(args.run), "seconds": seconds, "median": statistics.median(seconds),
            "page_bytes": out.stat().st_size,
        }  # fmt: skip
    print(write_result(RESULTS, "report", result))
    print(f"{args.count} runs in {result['median']:.1f} s, {result['page_bytes'] / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
