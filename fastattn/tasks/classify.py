"""Classes of texts with scores, or numbers from a regression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastattn.data.encoding import InputTokenizer
from fastattn.models import BertForSequenceClassification
from fastattn.tasks.batches import BATCH_SIZE, label_name, max_tokens, run, wide

NAME = "classify"
MODELS = (BertForSequenceClassification,)
FIELDS = ("text",)
OPTIONAL = ("text_pair",)


def scores_of(logits: Tensor, config: Any) -> Tensor:
    """Scores (..., num_labels) of logits: their softmax; with several labels at once or a single one, their sigmoid;
    for a regression, the logits themselves."""
    logits = wide(logits)
    if config.problem_type == "regression":
        return logits
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return logits.sigmoid()
    return logits.softmax(-1)


def decode(logits: Tensor, config: Any, top_k: int | None = None) -> list[dict[str, Any]]:
    """The labels of logits (num_labels,) by falling score, `top_k` of them or all."""
    scores = scores_of(logits, config).tolist()
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[:top_k]
    return [{"label": label_name(config, i), "score": scores[i]} for i in order]


def predict(
    model: Any,
    tokenizer: InputTokenizer,
    examples: Sequence[dict[str, str]],
    *,
    batch_size: int = BATCH_SIZE,
    top_k: int | None = None,
) -> list[dict[str, Any]]:
    """For each example (text, perhaps text_pair) its labels with scores, and `cut`, the tokens that did not fit."""
    texts = [(e["text"], e["text_pair"]) if "text_pair" in e else e["text"] for e in examples]
    rows = tokenizer.encode(texts, max_tokens(model, tokenizer))
    found = run(model, rows, batch_size, lambda out, i, _: decode(out.logits[i], model.config, top_k))
    return [{"labels": labels, "cut": row.cut} for labels, row in zip(found, rows)]


def line(prediction: dict[str, Any]) -> str:
    """The labels and their scores, separated by tabs."""
    return "\t".join(f"{label['label']} {label['score']:.4f}" for label in prediction["labels"])
