"""Cross-entropy in torch operations, on blocks of rows that stay in the cache between the passes over them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn.backends import linear_cross_entropy
from fastattn.backends.linear_cross_entropy import LinearGrads
from fastattn.backends.torch.softmax import block_elements
from fastattn.spec import CrossEntropyCall, LinearCrossEntropyCall, SoftmaxSpec, accumulation_dtype


def cross_entropy_fwd(spec: SoftmaxSpec, call: CrossEntropyCall) -> tuple[Tensor, Tensor]:
    """(losses, norms) in the accumulation dtype: those of `reference.cross_entropy`, (N,), 0 where ignored.

    norms (N, 2) are the parts of lse, the largest logit and the logarithm of sum(exp(z - largest)): apart they lose
    nothing to the size of the logits. A target that is no class has loss NaN.
    """
    logits, smoothing, weight = call.logits, call.label_smoothing, call.class_weight
    dtype = accumulation_dtype(logits.dtype)
    losses = logits.new_empty(logits.shape[0], dtype=dtype)
    norms = logits.new_empty(logits.shape[0], 2, dtype=dtype)
    ignored, wrong, target = _targets(call)
    own, mean = _target_weights(call, target), call.weight_mean()
    for rows in _blocks(logits):
        z = logits[rows].to(dtype)
        largest = z.amax(1, keepdim=True)
        shifted = z - largest
        norms[rows, :1] = largest
        chosen = shifted.gather(1, target[rows, None])[:, 0]
        spread = None  # the mean of (weighted) logits
        if smoothing:
            spread = shifted.mean(1) if weight is None else shifted @ (weight / weight.shape[0])
        norms[rows, 1] = log_sum = shifted.exp_().sum(1).log_()
        if own is None:
            if spread is not None:
                chosen = chosen * (1 - smoothing) + smoothing * spread
            torch.sub(log_sum, chosen, out=losses[rows])
        else:
            torch.mul(own[rows], log_sum - chosen, out=losses[rows])
            if spread is not None and mean is not None:
                losses[rows] += smoothing * (mean * log_sum - spread)
        if call.z_loss:
            losses[rows] += call.z_loss * (largest[:, 0] + log_sum).square_()
    return losses.masked_fill_(wrong, torch.nan).masked_fill_(ignored, 0), norms


def cross_entropy_bwd(
    spec: SoftmaxSpec, call: CrossEntropyCall, dlosses: Tensor, norms: Tensor, out: Tensor | None = None
) -> Tensor:
    """dloss * (f * exp(z - lse) - (1 - s) * w[target] * [target] - s * w / V) of each row, written to `out` if given.

    f = (1 - s) * w[target] + s * mean(w) + 2 * z_loss * lse. `out` may be z. A target that is no class gives NaN.
    """
    logits, smoothing, weight = call.logits, call.label_smoothing, call.class_weight
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format) if out is None else out
    ignored, wrong, target = _targets(call)
    some_ignored = bool(ignored.any())
    dlosses = dlosses.masked_fill(wrong, torch.nan)
    own, mean = _target_weights(call, target), call.weight_mean()
    factor = own if own is None or mean is None else own + smoothing * mean
    if call.z_loss:
        factor = 2 * call.z_loss * norms.sum(1) + (1.0 if factor is None else factor)
    for rows in _blocks(logits):
        part, dloss = dlogits[rows], dlosses[rows, None]
        probs = part if part.dtype == norms.dtype else torch.empty_like(part, dtype=norms.dtype)
        torch.sub(logits[rows], norms[rows, :1], out=probs).sub_(norms[rows, 1:]).exp_()
        if factor is not None:
            probs.mul_(factor[rows, None])
        if smoothing:
            probs.sub_(smoothing / logits.shape[1] * (1.0 if weight is None else weight))
        wanted = smoothing - 1 if own is None else -own[rows, None]
        probs.mul_(dloss).scatter_add_(1, target[rows, None], dloss * wanted)
        if some_ignored:
            probs.masked_fill_(ignored[rows, None], 0)
        if probs is not part:
            part.copy_(probs)
    return dlogits


def linear_cross_entropy_fwd(
    spec: SoftmaxSpec, call: LinearCrossEntropyCall, needs: tuple[bool, ...] | None = None
) -> tuple[Tensor, Tensor, LinearGrads | None]:
    """(losses, norms) without all the logits, and the gradients of the sum of losses that are needed."""
    return linear_cross_entropy.forward(spec, call, needs, cross_entropy_fwd, cross_entropy_bwd)


def linear_cross_entropy_bwd(
    spec: SoftmaxSpec, call: LinearCrossEntropyCall, dlosses: Tensor, norms: Tensor, needs: tuple[bool, ...]
) -> LinearGrads:
    """The gradients of hidden, weight and bias that are needed, from logits computed again."""
    return linear_cross_entropy.backward(spec, call, dlosses, norms, needs, cross_entropy_bwd)


def _targets(call: CrossEntropyCall) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows are ignored, which have a target that is no class (ignored or not), and a class for every row."""
    target = call.target.clamp(0, call.logits.shape[1] - 1)
    return call.target == call.ignore_index, call.target != target, target


def _target_weights(call: CrossEntropyCall, target: Tensor) -> Tensor | None:
    """(1 - s) * w[target], if there are class weights."""
    return None if call.class_weight is None else call.class_weight[target] * (1 - call.label_smoothing)


def _blocks(logits: Tensor) -> Iterator[slice]:
    step = max(1, block_elements(logits.device.type) // max(1, logits.shape[1]))
    return (slice(start, start + step) for start in range(0, logits.shape[0], step))
