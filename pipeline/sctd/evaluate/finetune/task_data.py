"""transformers' own heads on an encoder: the models that a plain script of theirs would fine-tune."""

from typing import Any

import torch
from torch import nn

from sctd.errors import UserError
from sctd.evaluate.encoder import Encoder, load_config, load_weights
from sctd.evaluate.tasks.task import Task

_HEADS = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "choice": "AutoModelForMultipleChoice",
    "span": "AutoModelForQuestionAnswering",
    "tags": "AutoModelForTokenClassification",
}


def build_model(encoder: Encoder, task: Task, classes: tuple[str, ...], seed: int) -> Any:
    """The encoder's weights in float32 under a new head, which is drawn from the seed, on the CPU.

    Raises:
        UserError: the weights cannot be loaded.
    """
    torch.manual_seed(seed)
    return load_weights(encoder, _HEADS[task.kind], **_labels(task, classes))


def longest_input(encoder: Encoder, task: Task, tokenizer: Any) -> int:
    """How many tokens, special ones included, the encoder takes.

    Raises:
        UserError: transformers has no head of the task's kind for it.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    config = load_config(encoder.source)
    try:
        with torch.device("meta"):
            model = getattr(transformers, _HEADS[task.kind]).from_config(config)
    except ValueError:
        raise UserError(
            f"{encoder.spec}: transformers has no {_HEADS[task.kind]} for a {config.model_type} model, "
            f"which {task.name} takes: leave the task out"
        ) from None
    limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", tokenizer.model_max_length))
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            unused = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa counts from behind [PAD]
            limit = min(limit, module.num_embeddings - unused)
    return limit


def _labels(task: Task, classes: tuple[str, ...]) -> dict[str, Any]:
    if task.kind == "regression":
        return {"num_labels": 1, "problem_type": "regression"}
    if task.kind == "span":
        return {"num_labels": 2}  # of a token: whether it is the first, and whether it is the last
    if task.kind == "choice":
        return {}
    named = {"id2label": dict(enumerate(classes)), "label2id": {name: number for number, name in enumerate(classes)}}
    return named | ({"problem_type": "single_label_classification"} if task.kind == "classification" else {})
