"""Mean cross-entropies of language models and classifiers, in float32 at least."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from fastattn.constants import IGNORE_INDEX
from fastattn.ops.cross_entropy import cross_entropy
from fastattn.ops.linear_cross_entropy import linear_cross_entropy


def mean_loss(
    x: Tensor, head: Tensor, targets: Tensor, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """Mean over targets of -log softmax(x @ head.T + bias)[target], in float32 at least; NaN where there is no target.

    x (..., E), head (V, E), targets (...); a few tokens' logits exist at a time. softcap: logits become
    softcap * tanh(logit / softcap).
    """
    narrow = x.dtype in (torch.float16, torch.bfloat16)
    # the loss of a 16-bit model is wider than its dtype, as under autocast
    with torch.autocast(x.device.type, x.dtype) if narrow else nullcontext():
        loss = linear_cross_entropy(x, head, targets, bias=bias, ignore_index=IGNORE_INDEX, softcap=softcap)
    return loss.to(torch.promote_types(loss.dtype, torch.float32))


def mean_loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of materialised logits (..., V)."""
    logits = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX)
