"""Attention options, positions and targets that a GPT computes from its inputs before the first block."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.constants import IGNORE_INDEX
from fastattn.models.checks import readable
from fastattn.models.config import GPTConfig
from fastattn.models.losses import check_targets
from fastattn.nn.positions import positions_from_mask, positions_in_segments, positions_of_tokens


def embedding_scale(width: int, dtype: torch.dtype) -> float:
    """sqrt(width) rounded to a dtype, by which token embeddings of that dtype are multiplied, as in transformers."""
    scale = math.sqrt(width)
    step = torch.finfo(dtype).eps * 2.0 ** (math.frexp(scale)[1] - 1)  # between neighbouring numbers there
    return round(scale / step) * step


def visibility(attention_mask: Tensor | None, segment_ids: Tensor | None, seqlen: int) -> dict[str, Any]:
    """The options of attention by which only real tokens of one document see each other."""
    if attention_mask is None:
        return {"segment_ids": segment_ids}
    if segment_ids is None and seqlen == 1:
        return {"key_padding_mask": attention_mask == 0}  # (B, past + 1): one call decodes the whole batch
    real = attention_mask != 0
    if segment_ids is not None:
        ids = torch.where(real, segment_ids, -1)
    elif readable(real) and bool(real.all()):
        return {}  # without padding the call stays dense; elsewhere than on a CPU asking would synchronise
    else:
        ids = real.to(torch.int32) - 1  # 0 for a token, -1 for padding
    return {"segment_ids": (ids[:, ids.shape[1] - seqlen :], ids)}


def check_learned_positions(config: GPTConfig, most: int, width: int, attention_mask: Tensor | None) -> None:
    """Refuse a row of `width` columns with more than `most` real tokens; in a program that is recorded, all count."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    if width > most and attention_mask is not None and not recorded:
        width = max((int(n) for n in (attention_mask != 0).sum(-1)), default=0)
    if width > most:
        offset = config.position_offset
        raise ValueError(
            f"input_ids: {width} tokens is more than n_positions={config.n_positions}"
            f"{f' - position_offset={offset}' if offset else ''}, the learned positions there are"
        )


def count_positions(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    past: int,
    config: GPTConfig,
) -> Tensor:
    """Positions (B, S), or (S,) where all rows agree: the number of earlier tokens of the same document.

    With a position_offset they begin there, padding tokens are at the row before, and those of input_ids do not count.
    """
    offset, pad = config.position_offset, config.pad_token_id
    if segment_ids is not None:
        positions = positions_in_segments(segment_ids)
    elif attention_mask is not None:
        positions = positions_from_mask(attention_mask)[:, past:]
    elif offset:
        return positions_of_tokens(input_ids, pad, offset, past)
    else:
        return torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
    if not offset or pad is None:
        return positions + offset
    padding = (input_ids == pad).long()
    if segment_ids is not None:
        skipped = padding.cumsum(1)
        starts = torch.arange(input_ids.shape[1], device=input_ids.device) - positions
        skipped = skipped - (skipped - padding).gather(1, starts)
    else:
        assert attention_mask is not None
        skipped = (padding * (attention_mask[:, past:] != 0)).cumsum(1)
    return torch.where(padding != 0, offset - 1, positions - skipped + offset)


def next_tokens(
    labels: Tensor, segment_ids: Tensor | None, vocab_size: int, *, aligned: bool = False
) -> Tensor:
    """Targets (B, S) int64: labels shifted left by one, or as they are if aligned; IGNORE_INDEX where none counts."""
    targets = labels.long()
    if not aligned:
        targets = F.pad(targets, (0, 1), value=IGNORE_INDEX)[:, 1:]  # shifting labels copies no logits
    if segment_ids is not None:
        following = segment_ids if aligned else F.pad(segment_ids, (0, 1), value=-1)[:, 1:]
        targets = torch.where((following == segment_ids) & (segment_ids >= 0), targets, IGNORE_INDEX)
    check_targets("labels", targets, vocab_size, "vocab_size")
    return targets
