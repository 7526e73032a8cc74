"""The oracle of softmax and the cross-entropies: plain torch, any float dtype, differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.visibility import lower_triangle

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
    """exp(scale * x) over its sum along `dim`, in the dtype of x; what a mask hides is the constant 0 (-inf in log).

    An entry of -inf is hidden whatever the scale, and so is one that is -inf after scaling. Nothing is checked: what
    does not fit raises torch's errors.

    Args:
        x: any shape, any float dtype.
        dim: the dimension that sums to one.
        scale: factor on x.
        mask: bool, True = keep, broadcastable to x.
        causal: keep entry (i, j) of the last two dims where j <= i + columns - rows.
        log: return the natural logarithm.

    Returns:
        A tensor of x's shape and dtype; a row of which nothing is kept is 0 (-inf in log).
    """
    scores = x * scale
    visible = (x != NOTHING) & (scores != NOTHING)
    if mask is not None:
        visible = visible & mask
    if causal:
        visible = visible & lower_triangle(x.shape[-2], x.shape[-1], x.device)
    seen = visible.any(dim, keepdim=True)
    scores = scores.masked_fill(~visible, NOTHING).masked_fill(~seen, 0.0)  # no row is -inf alone
    result = scores.log_softmax(dim) if log else scores.softmax(dim)
    return torch.where(visible, result, NOTHING if log else 0.0)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """The loss of each row z of (N, V) logits, lse = logsumexp(z); 0 where ignored.

    (1 - s) * w[target] * (lse - z[target]) + s * mean(w * (lse - z)) + z_loss * lse**2, where w = 1 by default and s is
    label_smoothing. Nothing is checked: what does not fit raises torch's errors.

    Args:
        logits: (N, V), any float dtype.
        target: (N,) int64 class indices, each in [0, V) or `ignore_index`.
        ignore_index: rows with this target have loss 0 and no gradient, even where their logits are NaN.
        label_smoothing: share of the target's weight spread over all classes, in [0, 1].
        class_weight: w, (V,), a factor on the cross-entropy of rows of each class.
        z_loss: factor on lse**2.

    Returns:
        (N,) losses in the dtype of logits; `fastattn.cross_entropy` also reduces them.
    """
    kept = target != ignore_index
    logits = torch.where(kept[:, None], logits, 0)
    target = torch.where(kept, target, 0)
    lse = logits.logsumexp(1)
    chosen = logits.gather(1, target[:, None])[:, 0]
    if class_weight is None:
        loss = lse - (1 - label_smoothing) * chosen
        if label_smoothing:
            loss = loss - label_smoothing * logits.mean(1)
    else:
        class_weight = class_weight.to(logits.dtype)
        loss = (1 - label_smoothing) * class_weight[target] * (lse - chosen)
        if label_smoothing:
            loss = loss + label_smoothing * (class_weight * (lse[:, None] - logits)).mean(1)
    if z_loss:
        loss = loss + z_loss * lse.square()
    return torch.where(kept, loss, 0)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    class_weight: Tensor | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """`cross_entropy` of softcap * tanh((hidden @ weight.T + bias) / softcap), all logits materialised.

    Args:
        hidden: (N, E), any float dtype.
        weight: (V, E), in hidden's dtype.
        target: (N,) int64 class indices, each in [0, V) or `ignore_index`.
        bias: (V,), in hidden's dtype.
        softcap: logits become softcap * tanh(logit / softcap); 0 for none.
        ignore_index, label_smoothing, class_weight, z_loss: as in `cross_entropy`; ignored rows may hold NaN.

    Returns:
        (N,) losses in the dtype of hidden.
    """
    logits = torch.nn.functional.linear(
        torch.where((target != ignore_index)[:, None], hidden, 0), weight, bias
    )
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return cross_entropy(logits, target, ignore_index, label_smoothing, class_weight, z_loss)
