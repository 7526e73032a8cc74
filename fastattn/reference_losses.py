"""The oracle of softmax and the cross-entropies: plain torch, any float dtype, differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor

NOTHING = float("-inf")


def softmax(
    x: Tensor,
    dim: int = -1,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: bool = False,
    log: bool = False,
) -> Tensor:
    """exp(scale * x) over its sum along `dim`, in the dtype of x; what a mask hides is the constant 0 (-inf in log)."""
    scores = x * scale
    visible = scores != NOTHING
    if mask is not None:
        visible = visible & mask
    if causal:
        visible = visible & causal_mask(x.shape[-2], x.shape[-1], x.device)
    seen = visible.any(dim, keepdim=True)
    scores = scores.masked_fill(~visible, NOTHING).masked_fill(~seen, 0.0)  # no row is -inf alone
    result = scores.log_softmax(dim) if log else scores.softmax(dim)
    return torch.where(visible, result, NOTHING if log else 0.0)


def causal_mask(rows: int, columns: int, device: torch.device) -> Tensor:
    """True where j <= i + columns - rows."""
    i = torch.arange(rows, device=device)[:, None]
    return torch.arange(columns, device=device) <= i + columns - rows


def cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0
) -> Tensor:
    """logsumexp(z) - (1 - s) * z[target] - s * mean(z) of each row z of (N, V) logits; 0 where ignored."""
    kept = target != ignore_index
    logits = torch.where(kept[:, None], logits, 0)
    chosen = logits.gather(1, torch.where(kept, target, 0)[:, None])[:, 0]
    loss = logits.logsumexp(1) - (1 - label_smoothing) * chosen
    if label_smoothing:
        loss = loss - label_smoothing * logits.mean(1)
    return torch.where(kept, loss, 0)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """`cross_entropy` of softcap * tanh((hidden @ weight.T + bias) / softcap), all logits materialised."""
    logits = torch.nn.functional.linear(
        torch.where((target != ignore_index)[:, None], hidden, 0), weight, bias
    )
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return cross_entropy(logits, target, ignore_index, label_smoothing)
