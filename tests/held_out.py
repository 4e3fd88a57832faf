"""The held-out loss of an export by transformers alone, on the rows and masks that its run was validated on."""

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForMaskedLM

from sctd.corpus.manifest import load_corpus_tokenizer, read_manifest
from sctd.data.masking import build_masker
from sctd.data.stream import Rows, valid_batches
from sctd.train.keep.export import read_run


@torch.no_grad()
def held_out_loss(run: Path, corpus: Path) -> float:
    """Mean cross-entropy in nats, in float32."""
    config, manifest = read_run(run), read_manifest(corpus)
    masker = build_masker(config, manifest, load_corpus_tokenizer(corpus, manifest))
    model = AutoModelForMaskedLM.from_pretrained(run / "export").eval()
    rows, losses = Rows(corpus, manifest, "valid", manifest.seq_len), []
    for _, batch in valid_batches(rows, masker, config.train.valid_rows, 32, 0, 1):
        logits_BSV = model(input_ids=batch["input_ids"]).logits
        logits_BMV = logits_BSV.gather(1, batch["positions"][..., None].expand(-1, -1, logits_BSV.shape[-1]))
        losses.append(F.cross_entropy(logits_BMV.flatten(0, 1), batch["labels"].flatten(), reduction="none"))
    return float(torch.cat(losses).mean())
