"""Runs a model on rows of tokens in batches of similar lengths; results are in the order of the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastattn.data.encoding import InputTokenizer, Row
from fastattn.nn.modes import evaluating

Result = TypeVar("Result")
BATCH_SIZE = 32


def max_tokens(model: Any, tokenizer: InputTokenizer) -> int:
    """Most tokens of a text: the model's positions, or the smaller limit of the tokenizer's files."""
    config = model.config
    limits = [config.max_position_embeddings - config.position_offset, tokenizer.max_length]
    return min(limit for limit in limits if limit is not None)


@torch.no_grad()
def run(
    model: Any, rows: Sequence[Row], batch_size: int, take: Callable[[Any, int, int], Result]
) -> list[Result]:
    """The results of `take(outputs, i, row)` for the i-th sequence of a batch, in the order of `rows`.

    Batches hold rows of similar lengths, the longest first; the model runs in eval mode on its device.
    """
    results: list[Any] = [None] * len(rows)
    device = next(model.parameters()).device
    typed = model.config.type_vocab_size > 1
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids = _padded([rows[i].ids for i in chosen], model.config.pad_token_id or 0, device)
            lengths = torch.tensor([len(rows[i].ids) for i in chosen], device=device)
            mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
            types = _padded([rows[i].types for i in chosen], 0, device) if typed else None
            outputs = model(ids, mask, types)
            for place, index in enumerate(chosen):
                results[index] = take(outputs, place, index)
    return results


def trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """The characters of a span without white space around them: byte-level tokens may begin with a space."""
    part = text[start:end]
    start += len(part) - len(part.lstrip())
    return start, max(start, end - (len(part) - len(part.rstrip())))


def wide(logits: Tensor) -> Tensor:
    """Logits in float32, or float64 if they are float64: 16 bits are too few for a softmax."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def label_name(config: Any, number: int) -> str:
    """The name of a label, LABEL_0 and so on where the config has none."""
    names = config.id2label
    return names[number] if names else f"LABEL_{number}"


def on_one_line(text: str) -> str:
    """A text without tabs and line ends."""
    return " ".join(text.split())


def _padded(rows: Sequence[Sequence[int]], value: int, device: torch.device) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], device=device)
