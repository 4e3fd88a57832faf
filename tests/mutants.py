"""Would the tests notice? Twenty faults of one line, put into a copy of the tree: the tests beside each must fail.

    python tests/mutants.py             all of them, which takes some minutes
    python tests/mutants.py 3 17        two of them
    python tests/mutants.py --list

A fault that its tests do not notice has survived: a test was weakened, or lost. The exit code is 1 then, and where
pytest does not get as far as a failing test.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = ("pipeline", "kernels", "tests", "ds_configs", "pyproject.toml", "README.md")
SCHEDULE, IMPORTANCE, LOSSES, DOCUMENTS = (
    "tests/objective/test_objective_schedule.py",
    "tests/objective/test_objective_importance.py",
    "tests/objective/test_objective_losses.py",
    "tests/model/test_model_attention.py",
)
ORDER, MASKING, STREAM = (f"tests/data/test_data_{name}.py" for name in ("order", "masking", "stream"))
DAMAGE, RUNS = "tests/train/test_checkpoint_damage.py", "tests/train/test_runs.py"


class Mutant(NamedTuple):
    """`old`, which occurs in `file` (of pipeline/sctd) once, becomes `new`; `tests` are pytest's."""

    file: str
    old: str
    new: str
    tests: str


MUTANTS = [
    Mutant("objective/schedule.py", "step % self.interval == 0", "(step - 1) % self.interval == 0", SCHEDULE),
    Mutant("objective/schedule.py", "step = engine.global_steps + 1", "step = engine.global_steps", SCHEDULE),
    Mutant("objective/schedule.py", "(last + 1, Phase.FULL)", "(last, Phase.FULL)", SCHEDULE),
    Mutant("objective/build.py", "(full_start + 1, steps", "(full_start, steps", SCHEDULE),
    Mutant("objective/importance.py", "+ (1 - beta) * mean_V", "+ beta * mean_V", IMPORTANCE),
    Mutant("objective/importance.py", "(count_V > 0) & self._updatable_V", "count_V > 0", IMPORTANCE),
    Mutant("objective/importance.py", "if applied:", "if True:", IMPORTANCE),
    Mutant("objective/pretraining.py", "sum_count_2V if phase is Phase.FULL else None", "sum_count_2V", LOSSES),
    Mutant("objective/pretraining.py", "teacher_ND.detach() if self.objective.detach_teacher else ", "", LOSSES),
    Mutant("objective/pretraining.py", "terms[0]) / len(terms) if terms", "terms[0]) if terms", LOSSES),
    Mutant("objective/pretraining.py", "read(teacher_ND), read(student_ND)", "teacher_ND, student_ND", LOSSES),
    Mutant("objective/pretraining.py", "(ends_BS.cumsum(1) - ends_BS).int()", "ends_BS.cumsum(1).int()", DOCUMENTS),
    Mutant("data/order.py", "hash64(seed, STREAM_ORDER, epoch.", "hash64(seed, STREAM_ORDER, 0 * epoch.", ORDER),
    Mutant("data/order.py", "cursor = max(cursor, end)", "cursor = end", STREAM),
    Mutant("data/masking.py", "= _LAST", "= _LAST >> np.uint64(1)", MASKING),
    Mutant("data/masking.py", "kind_BM < to_mask + to_random,", "kind_BM < to_mask,", MASKING),
    Mutant("data/stream.py", "mine = chosen[rank::world]", "mine = chosen", STREAM),
    Mutant("train/keep/checkpoint.py", "if manifest.pop(_SEAL) != _seal(manifest):", "if not manifest.pop(_SEAL):",
           f"{DAMAGE}::test_a_manifest_that_says_something_else_is_damaged"),
    Mutant("train/keep/checkpoint.py", "if found[name] != expected:", "if not found[name]:",
           f"{DAMAGE}::test_every_file_is_guarded"),
    Mutant("train/keep/checkpoint.py", "*found[written + keep :]", "*found[written + keep + 1 :]",
           f"{RUNS}::test_old_checkpoints_are_pruned_and_latest_points_at_the_newest"),
    Mutant("signals.py", "now - self._pressed >= _AGAIN", "now >= self._pressed",
           "tests/train/test_preemption.py::test_ctrl_c_again_ends_all_ranks_at_once"),
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, help="which of them, counted from 1 (default: all)")
    parser.add_argument("--list", action="store_true", help="show them, and that each applies once; run nothing")
    args = parser.parse_args()
    wanted = args.numbers or range(1, len(MUTANTS) + 1)
    chosen = [(number, MUTANTS[number - 1]) for number in wanted]
    for number, mutant in chosen:
        count = (ROOT / "pipeline" / "sctd" / mutant.file).read_text(encoding="utf-8").count(mutant.old)
        if count != 1:
            raise SystemExit(f"{number}: {mutant.old!r} occurs {count} times in {mutant.file}: it must occur once")
        if args.list:
            print(f"{number:>2}  {mutant.file}: {mutant.old}  ->  {mutant.new}\n    {mutant.tests}")
    if args.list:
        return 0
    with tempfile.TemporaryDirectory(prefix="sctd-mutants-") as name:
        tree, survivors = Path(name), 0
        for part in COPIED:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, tree / part)
        tests = dict.fromkeys(mutant.tests for _, mutant in chosen)
        if run(tree, *tests) != 0:
            raise SystemExit("tests fail without any fault put in: mend them first")
        for number, mutant in chosen:
            file = tree / "pipeline" / "sctd" / mutant.file
            text = file.read_text(encoding="utf-8")
            file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
            code = run(tree, mutant.tests)
            file.write_text(text, encoding="utf-8")
            survivors += code != 1
            said = {0: "SURVIVED", 1: "killed"}.get(code, f"pytest ended with {code}")
            print(f"{number:>2}  {said:<9} {mutant.file}: {mutant.old}  ->  {mutant.new}", flush=True)
    print(f"{len(chosen)} mutants, {survivors} not killed")
    return int(survivors > 0)


def run(tree: Path, *tests: str) -> int:
    """pytest's exit code: 0 where all pass, 1 where one fails."""
    # No byte code: two versions of a file may have the same size and second.
    roots = {"PYTHONPATH": f"{tree / 'pipeline'}:{tree / 'kernels'}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=tree, env=os.environ | roots, stdout=subprocess.DEVNULL).returncode


if __name__ == "__main__":
    sys.exit(main())
