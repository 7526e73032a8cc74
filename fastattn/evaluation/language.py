"""Perplexity and bits per byte of language models."""

from __future__ import annotations

import math

from fastattn.evaluation.report import Report


def language(loss_sum: float, tokens: int, size: int, *, unknown: int = 0, documents: int = 1) -> Report:
    """Metrics of a text that a model predicted token by token.

    loss = loss_sum / tokens (nats), perplexity = exp(loss), bits_per_byte = loss_sum / ln 2 / size, which is comparable
    between tokenizers, and unknown, the share of unknown tokens, whose text the model did not have to predict. count:
    tokens.

    Args:
        loss_sum: sum of -ln P(token) over all predicted tokens.
        tokens: number of predicted tokens.
        size: bytes of their text in UTF-8.
        unknown: number of them that are the unknown token.
        documents: number of documents of the text.

    Raises:
        ValueError: tokens or size is below 1.
    """
    if tokens < 1 or size < 1:
        raise ValueError(f"tokens, size: got {tokens} and {size}, needs at least one token and one byte")
    loss = loss_sum / tokens
    return Report(
        metrics={
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "bits_per_byte": loss_sum / math.log(2) / size,
            "unknown": unknown / tokens,
        },
        count=tokens,
        tables={"bytes": size, "documents": documents},
    )
