"""Texts as vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastattn.data.encoding import InputTokenizer
from fastattn.models import Bert, BertForEmbedding
from fastattn.tasks.batches import BATCH_SIZE, max_tokens, run

NAME = "embed"
MODELS = (BertForEmbedding, Bert)
FIELDS = ("text",)
OPTIONAL: tuple[str, ...] = ()


def predict(
    model: BertForEmbedding,
    tokenizer: InputTokenizer,
    examples: Sequence[dict[str, str]],
    *,
    batch_size: int = BATCH_SIZE,
) -> list[dict[str, Any]]:
    """For each example (text) its vector as a list, and `cut`, the tokens that did not fit.

    Texts are prepared as `BertForEmbedding.encode` does: in lower case and with the default prompt where the folder
    asks for these.
    """
    longest = max_tokens(model, tokenizer)
    if model.max_seq_length is not None:
        longest = min(longest, model.max_seq_length)
    rows = tokenizer.encode(model.prepared([example["text"] for example in examples]), longest)
    found = run(model, rows, batch_size, lambda out, i, _: out.embeddings[i].tolist())
    return [{"embedding": vector, "cut": row.cut} for vector, row in zip(found, rows)]


def line(prediction: dict[str, Any]) -> str:
    """The vector's numbers, separated by spaces."""
    return " ".join(f"{number:.6g}" for number in prediction["embedding"])
