"""Cross-entropy in torch operations, on blocks of rows that stay in the cache between the passes over them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn.backends import linear_cross_entropy
from fastattn.backends.linear_cross_entropy import LinearGrads
from fastattn.backends.torch_softmax import block_elements
from fastattn.spec import CrossEntropyCall, LinearCrossEntropyCall, SoftmaxSpec, accumulation_dtype


def cross_entropy_fwd(spec: SoftmaxSpec, call: CrossEntropyCall) -> tuple[Tensor, Tensor]:
    """(losses, lse), both (N,) in the accumulation dtype: lse - (1 - s) * z[target] - s * mean(z), 0 where ignored."""
    logits, smoothing = call.logits, call.label_smoothing
    dtype = accumulation_dtype(logits.dtype)
    lse = logits.new_empty(logits.shape[0], dtype=dtype)
    losses = torch.empty_like(lse)
    ignored, target = _ignored(call)
    for rows in _blocks(logits):
        z = logits[rows].to(dtype)
        torch.logsumexp(z, 1, out=lse[rows])
        chosen = z.gather(1, target[rows, None])[:, 0]
        torch.sub(lse[rows], chosen, alpha=1 - smoothing, out=losses[rows])
        if smoothing:
            losses[rows] -= smoothing * z.mean(1)
    return losses.masked_fill_(ignored, 0), lse


def cross_entropy_bwd(
    spec: SoftmaxSpec, call: CrossEntropyCall, dlosses: Tensor, lse: Tensor, out: Tensor | None = None
) -> Tensor:
    """dloss * (exp(z - lse) - (1 - s) * [target] - s / V) of each row, written to `out` if given: that may be z."""
    logits, smoothing = call.logits, call.label_smoothing
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format) if out is None else out
    ignored, target = _ignored(call)
    some_ignored = bool(ignored.any())
    for rows in _blocks(logits):
        part, dloss = dlogits[rows], dlosses[rows, None]
        probs = part if part.dtype == lse.dtype else torch.empty_like(part, dtype=lse.dtype)
        torch.sub(logits[rows], lse[rows, None], out=probs).exp_()
        if smoothing:
            probs.sub_(smoothing / logits.shape[1])
        probs.mul_(dloss).scatter_add_(1, target[rows, None], dloss * (smoothing - 1))
        if some_ignored:
            probs.masked_fill_(ignored[rows, None], 0)
        if probs is not part:
            part.copy_(probs)
    return dlogits


def linear_cross_entropy_fwd(
    spec: SoftmaxSpec, call: LinearCrossEntropyCall, needs: tuple[bool, ...] | None = None
) -> tuple[Tensor, Tensor, LinearGrads | None]:
    """(losses, lse) without all the logits, and the gradients of the sum of losses that are needed."""
    return linear_cross_entropy.forward(spec, call, needs, cross_entropy_fwd, cross_entropy_bwd)


def linear_cross_entropy_bwd(
    spec: SoftmaxSpec, call: LinearCrossEntropyCall, dlosses: Tensor, lse: Tensor, needs: tuple[bool, ...]
) -> LinearGrads:
    """The gradients of hidden, weight and bias that are needed, from logits computed again."""
    return linear_cross_entropy.backward(spec, call, dlosses, lse, needs, cross_entropy_bwd)


def _ignored(call: CrossEntropyCall) -> tuple[Tensor, Tensor]:
    """Which rows are ignored, and targets that are classes in every row."""
    ignored = call.target == call.ignore_index
    return ignored, call.target.masked_fill(ignored, 0)


def _blocks(logits: Tensor) -> Iterator[slice]:
    step = max(1, block_elements(logits.device.type) // max(1, logits.shape[1]))
    return (slice(start, start + step) for start in range(0, logits.shape[0], step))
