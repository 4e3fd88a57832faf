"""What starting a run imports: nothing of what comes before it or after it."""

import subprocess
import sys

from support import environment

FOREIGN = ("matplotlib", "datasets", "transformers", "sctd.corpus.prepare", "sctd.corpus.report", "sctd.report",
           "sctd.evaluate")  # fmt: skip


def test_a_run_imports_neither_pictures_nor_the_rooms_around_it() -> None:
    """In a fresh process: pictures, the preparation of corpora, evaluation and reports wait until they are used."""
    code = f"import sys, sctd.train.pretrain, sctd.cli; print([name for name in {FOREIGN!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
