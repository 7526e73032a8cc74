"""Mean cross-entropies of language models and classifiers, in float32 at least."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from fastattn.constants import IGNORE_INDEX
from fastattn.models.checks import check_range, readable
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
    return widened(loss)


def mean_loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of materialised logits (..., V)."""
    return cross_entropy(widened(logits.flatten(0, -2)), targets.flatten(), ignore_index=IGNORE_INDEX)


def widened(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_targets(name: str, targets: Tensor, size: int, limit: str) -> None:
    """Check that targets that are not ignored lie within [0, size), where that needs no synchronisation."""
    if readable(targets):
        check_range(name, targets[targets != IGNORE_INDEX], size, f"or {IGNORE_INDEX}; {limit}")
