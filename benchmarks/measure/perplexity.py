"""The cost of narrower weights: a trained model's perplexity on held-out text, through the steps of generation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from measure.training import train_gpt

LENGTH, BATCH = 128, 16
MODEL: dict[str, Any] = {"vocab_size": 2048, "n_positions": LENGTH, "n_embd": 256, "n_layer": 4, "n_head": 4}


@torch.no_grad()
def perplexity(model: Any, rows: Any, count: int = 256) -> float:
    """exp of the mean loss of a decoder's logits over at most `count` rows."""
    total, tokens = 0.0, 0
    for first in range(0, min(count, len(rows)), BATCH):
        part = range(first, min(first + BATCH, count, len(rows)))
        ids = torch.stack([torch.as_tensor(rows[i]["input_ids"]).long() for i in part])
        logits = model.decoder(*ids.shape).logits(ids)[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        tokens += ids[:, 1:].numel()
    return float(torch.tensor(total / tokens).exp())


def lines(steps: int, **changes: Any) -> Iterator[str]:
    """A line for each kind of weights."""
    from fastattn.data import default_corpus

    model, _, rows = train_gpt(
        default_corpus(), {**MODEL, **changes}, length=LENGTH, batch=BATCH, steps=steps
    )
    plain = perplexity(model, rows)
    yield f"float32: {plain:.4f}"
    for name, made in (("int8", model.quantize("int8")), ("bfloat16", None)):
        model = made if made is not None else model.quantize(None).bfloat16()
        found = perplexity(model, rows)
        yield f"{name}: {found:.4f} ({100 * (found / plain - 1):+.3f} %)"
