"""A user's first command, whole: a promise that no test looks at rots."""

import re
import sys
from pathlib import Path

import pytest

from held_out import held_out_loss
from readme import command, shell
from support import ROOT, records

# What a reader would accept in the demo's sentences.
ANSWERS = {
    "Return a [MASK] of the object.": "list tuple hash copy string representation dict dictionary description set "
    "sequence reference version name subclass generator sum",
    "This [MASK] is deprecated since version 3.": "method function module class attribute parameter argument option "
    "feature property constant exception type keyword api command flag format",
    "If the argument is not given, the default [MASK] is used.": "value argument encoding locale object type name "
    "parameter format handler context timeout function setting option mode method policy class string factory",
}


def test_make_pretrain(tmp_path: Path) -> None:
    """The whole main job, as a user's first command runs it: what comes out has learned its language."""
    make = f"OMP_NUM_THREADS=1 make -o .venv/ready BIN={Path(sys.executable).parent} RUNS={tmp_path}"
    target = command("make pretrain").split(None, 1)[1]
    out = shell(f"{make} {target}", ROOT, timeout=3000)
    assert "tensorboard --logdir" in out and "held-out" in out
    found = dict(re.findall(r"^ *(.+?)  ->  (.+?) \d+%", out, flags=re.MULTILINE))
    assert found.keys() == ANSWERS.keys()
    for sentence, answer in found.items():
        assert answer in ANSWERS[sentence].split(), f"{sentence} -> {answer}"
    last = records(tmp_path / "demo")[-1]
    assert last["valid_gap"] >= 1.8, "nats below the unigram entropy; 2.0 is promised as the median of seeds"
    assert last["breakthrough_step"] is not None and last["context_use"] > 0.5
    assert held_out_loss(tmp_path / "demo", tmp_path / "demo-corpus") == pytest.approx(last["valid_loss"], abs=0.1)
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "export"} <= names
    assert any("tfevents" in name for name in names)
    assert "nothing to train" in shell(f"{make} {target}", ROOT)  # called again, it goes on from there
