"""The statistics of rows from which a backward pass recomputes weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.spec import AttentionCall, GradsNeeded

EXTREME_LSE = 1e4  # a larger lse has too few digits to tell how many keys it sums over


def references(lse: Tensor) -> tuple[Tensor, bool]:
    """(lse to subtract from scores, +inf in fully masked rows so that their weights are 0; whether one is NaN)."""
    lowest = lse.min().item() if lse.numel() else 0.0  # NaN if one element is
    if lowest > -torch.inf:
        return lse, False
    return lse.masked_fill(lse == -torch.inf, torch.inf), lowest != lowest


def is_extreme(call: AttentionCall, lse: Tensor) -> bool:
    """Whether a bias makes some row's scores so large that exp(score - lse) loses its weights to rounding."""
    return call.bias is not None and bool(((lse.abs() > EXTREME_LSE) & lse.isfinite()).any())


def delta_of(out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    """rowsum(dout * out) - dlse, which dscore = p * (dp - delta) subtracts; 0 in rows that see nothing."""
    delta = (dout.to(lse.dtype) * out).sum(-1)
    if dlse is not None:
        delta -= dlse
    return delta.masked_fill_(lse == -torch.inf, 0)


def dsinks(sink_weight: Tensor | None, delta: Tensor | None, needs: GradsNeeded) -> Tensor | None:
    if not needs.sinks or sink_weight is None or delta is None:
        return None
    terms = sink_weight * delta
    return -terms.sum((0, 2), dtype=torch.float64).to(terms.dtype)  # few results of many terms that cancel
