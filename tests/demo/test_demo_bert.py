"""The paper's BERT in miniature, with the levers that let it learn: the README's command, whole."""

from pathlib import Path

import pytest

from held_out import held_out_loss
from readme import command, shell
from support import records


def test_demo_bert_leaves_the_plateau(tmp_path: Path) -> None:
    words = "--source embedded --vocab-size 4096 --seq-len 128 --valid-fraction 0.05 --out runs/demo-corpus"
    shell(f"sctd prepare {words}", tmp_path)
    shell(f"OMP_NUM_THREADS=1 {command('sctd pretrain demo-bert')}", tmp_path, timeout=3000)
    run, corpus = tmp_path / "runs" / "demo-bert", tmp_path / "runs" / "demo-corpus"
    last = records(run)[-1]
    assert last["valid_gap"] >= 1.1, "nats below the unigram entropy; 1.2 is promised as the median of seeds"
    assert last["breakthrough_step"] is not None
    assert held_out_loss(run, corpus) == pytest.approx(last["valid_loss"], abs=0.1)
