"""Logits and losses of single tokens from a decoder's hidden states, and the targets of positions."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.constants import IGNORE_INDEX
from fastattn.models.losses import widened
from fastattn.nn.linear import Linear
from fastattn.ops.cross_entropy import cross_entropy
from fastattn.ops.linear_cross_entropy import linear_cross_entropy


def next_targets(labels: Tensor, segment_ids: Tensor | None = None) -> Tensor:
    """(B, S) int64: for each position the next label of its segment, or IGNORE_INDEX."""
    targets = F.pad(labels.long(), (0, 1), value=IGNORE_INDEX)[:, 1:]
    if segment_ids is not None:
        following = F.pad(segment_ids, (0, 1), value=-1)[:, 1:]
        targets = torch.where((following == segment_ids) & (segment_ids >= 0), targets, IGNORE_INDEX)
    return targets


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Logits (..., V) of a GPT's last hidden states (..., E), in float32 at least."""
    logits = widened(model.lm_head(_transformed(model, hidden)))
    cap = model.config.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)


def token_losses(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """-ln P(target) for hidden states (N, E), in float32 at least, with the logits of a few tokens at a time."""
    head = model.lm_head
    if type(head) is not Linear:  # an adapter's
        return cross_entropy(logits_of(model, hidden), targets, reduction="none")
    x = _transformed(model, hidden)
    narrow = x.dtype in (torch.float16, torch.bfloat16)
    # the loss of a 16-bit model is wider than its dtype, as under autocast
    with torch.autocast(x.device.type, x.dtype) if narrow else nullcontext():
        losses = linear_cross_entropy(
            x,
            head.weight,
            targets,
            bias=head.bias,
            softcap=model.config.final_logit_softcapping,
            reduction="none",
        )
    return widened(losses)


def _transformed(model: Any, hidden: Tensor) -> Tensor:
    return hidden if model.lm_transform is None else model.lm_transform(hidden)
