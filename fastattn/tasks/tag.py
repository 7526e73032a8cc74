"""Entities in texts: spans of characters from the labels of tokens in BIO form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastattn.data.encoding import InputTokenizer, Row
from fastattn.models import BertForTokenClassification
from fastattn.tasks.batches import BATCH_SIZE, label_name, max_tokens, on_one_line, run, wide

NAME = "tag"
MODELS = (BertForTokenClassification,)
FIELDS = ("text",)
OPTIONAL: tuple[str, ...] = ()
OUTSIDE = "O"


def labels_of(logits: Tensor, config: Any) -> list[tuple[str, float]]:
    """The likeliest label of each token with its probability, of logits (S, num_labels).

    Of logits (S,), a model's with one label: that label where its probability is over 0.5, else O.
    """
    logits = wide(logits)
    if logits.dim() == 1:
        each = logits.sigmoid().tolist()
        return [(label_name(config, 0), p) if p > 0.5 else (OUTSIDE, 1 - p) for p in each]
    scores, numbers = logits.softmax(-1).max(-1)
    return [(label_name(config, n), p) for n, p in zip(numbers.tolist(), scores.tolist())]


def decode(labels: Sequence[tuple[str, float]], row: Row, text: str) -> list[dict[str, Any]]:
    """The entities of a text: runs of tokens with one tag, each B- starting anew; score is the mean of the tokens'.

    An I- that follows no token of its tag starts an entity too. Special tokens take no part.
    """
    entities: list[dict[str, Any]] = []
    scores: list[list[float]] = []
    last = OUTSIDE
    for (label, score), (start, end), sequence in zip(labels, row.offsets, row.sequences):
        if sequence is None:
            continue
        begins = label.startswith("B-")
        tag = label[2:] if label.startswith(("B-", "I-")) else label
        if tag != OUTSIDE:
            if tag == last and not begins:
                entities[-1]["end"] = end
                scores[-1].append(score)
            else:
                entities.append({"entity": tag, "start": start, "end": end})
                scores.append([score])
        last = tag
    return [
        {**entity, "score": sum(each) / len(each), "text": text[entity["start"] : entity["end"]]}
        for entity, each in zip(entities, scores)
    ]


def predict(
    model: Any,
    tokenizer: InputTokenizer,
    examples: Sequence[dict[str, str]],
    *,
    batch_size: int = BATCH_SIZE,
) -> list[dict[str, Any]]:
    """For each example (text) its entities by place, and `cut`, the tokens that did not fit."""
    rows = tokenizer.encode([e["text"] for e in examples], max_tokens(model, tokenizer))

    def take(outputs: Any, place: int, index: int) -> list[dict[str, Any]]:
        row = rows[index]
        labels = labels_of(outputs.logits[place, : len(row.ids)], model.config)
        return decode(labels, row, examples[index]["text"])

    found = run(model, rows, batch_size, take)
    return [{"entities": entities, "cut": row.cut} for entities, row in zip(found, rows)]


def line(prediction: dict[str, Any]) -> str:
    """The entities of a text, separated by tabs; empty without any."""
    return "\t".join(
        f"{e['entity']} {e['score']:.4f} {e['start']}:{e['end']} {on_one_line(e['text'])}"
        for e in prediction["entities"]
    )
