"""Fill masks: the likeliest tokens of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastattn.data import DataError
from fastattn.data.encoding import MASK_SPELLINGS, InputTokenizer, Row
from fastattn.models import BertForMaskedLM, BertForPreTraining
from fastattn.tasks.batches import BATCH_SIZE, max_tokens, run, wide

NAME = "fill"
MODELS = (BertForMaskedLM, BertForPreTraining)
FIELDS = ("text",)
OPTIONAL: tuple[str, ...] = ()
TOP_K = 5


def decode(logits: Tensor, tokenizer: InputTokenizer, top_k: int = TOP_K) -> list[dict[str, Any]]:
    """The likeliest tokens of a mask's logits (V,)."""
    scores, numbers = wide(logits).softmax(-1).topk(min(top_k, logits.shape[-1]))
    return [
        {"token": number, "text": tokenizer.core.decode([number], skip_special_tokens=False), "score": score}
        for number, score in zip(numbers.tolist(), scores.tolist())
    ]


def encode(tokenizer: InputTokenizer, texts: Sequence[str], longest: int) -> list[Row]:
    """The tokens of texts in which [MASK], <mask> or the tokenizer's own mask token stands for a missing word.

    Raises:
        ValueError: the tokenizer has no mask token.
        DataError: a text has none within its first `longest` tokens; the message has its number, from 1 on.
    """
    if tokenizer.mask_token is None or tokenizer.mask_id is None:
        raise ValueError("tokenizer: has no mask token")
    prepared = list(texts)
    for spelling in MASK_SPELLINGS:
        prepared = [text.replace(spelling, tokenizer.mask_token) for text in prepared]
    rows = tokenizer.encode(prepared, longest)
    for number, row in enumerate(rows, 1):
        if tokenizer.mask_id not in row.ids:
            among = f" among the first {longest} tokens" if row.cut else ""
            raise DataError(f"text {number}: holds no {tokenizer.mask_token}{among}")
    return rows


def predict(
    model: Any,
    tokenizer: InputTokenizer,
    examples: Sequence[dict[str, str]],
    *,
    batch_size: int = BATCH_SIZE,
    top_k: int = TOP_K,
) -> list[dict[str, Any]]:
    """The likeliest tokens of every mask of texts.

    Args:
        model: a `BertForMaskedLM` or `BertForPreTraining`; it runs in eval mode on its device.
        tokenizer: the model's.
        examples: dicts with "text", in which [MASK], <mask> or the tokenizer's own mask token stands for a word.
        batch_size: texts at a time.
        top_k: most tokens of a mask.

    Returns:
        For each example {"masks": for each mask [{"token", "text", "score"}, ...], "cut": the number of truncated
        tokens}; score is the token's probability.

    Raises:
        ValueError: the tokenizer has no mask token.
        DataError: a text has none within what the model reads.
    """
    rows = encode(tokenizer, [e["text"] for e in examples], max_tokens(model, tokenizer))

    def take(outputs: Any, place: int, index: int) -> list[list[dict[str, Any]]]:
        masks = [i for i, token in enumerate(rows[index].ids) if token == tokenizer.mask_id]
        return [decode(outputs.logits[place, i], tokenizer, top_k) for i in masks]

    found = run(model, rows, batch_size, take)
    return [{"masks": masks, "cut": row.cut} for masks, row in zip(found, rows)]


def line(prediction: dict[str, Any]) -> str:
    """The tokens of each mask with their scores; masks are separated by tabs."""
    return "\t".join(
        ", ".join(f"{each['text'].strip()} {each['score']:.4f}" for each in mask)
        for mask in prediction["masks"]
    )
