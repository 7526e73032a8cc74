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
    """(losses, norms) in the accumulation dtype: lse - (1 - s) * z[target] - s * mean(z), (N,), 0 where ignored.

    norms (N, 2) are the parts of lse, the largest logit and the logarithm of sum(exp(z - largest)): apart they lose
    nothing to the size of the logits.
    """
    logits, smoothing = call.logits, call.label_smoothing
    dtype = accumulation_dtype(logits.dtype)
    losses = logits.new_empty(logits.shape[0], dtype=dtype)
    norms = logits.new_empty(logits.shape[0], 2, dtype=dtype)
    ignored, target = _ignored(call)
    for rows in _blocks(logits):
        z = logits[rows].to(dtype)
        largest = z.amax(1, keepdim=True)
        shifted = z - largest
        norms[rows, :1] = largest
        chosen = shifted.gather(1, target[rows, None])[:, 0]
        if smoothing:
            chosen = chosen * (1 - smoothing) + smoothing * shifted.mean(1)
        norms[rows, 1] = shifted.exp_().sum(1).log_()
        torch.sub(norms[rows, 1], chosen, out=losses[rows])
    return losses.masked_fill_(ignored, 0), norms


def cross_entropy_bwd(
    spec: SoftmaxSpec, call: CrossEntropyCall, dlosses: Tensor, norms: Tensor, out: Tensor | None = None
) -> Tensor:
    """dloss * (exp(z - lse) - (1 - s) * [target] - s / V) of each row, written to `out` if given: that may be z."""
    logits, smoothing = call.logits, call.label_smoothing
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format) if out is None else out
    ignored, target = _ignored(call)
    some_ignored = bool(ignored.any())
    for rows in _blocks(logits):
        part, dloss = dlogits[rows], dlosses[rows, None]
        probs = part if part.dtype == norms.dtype else torch.empty_like(part, dtype=norms.dtype)
        torch.sub(logits[rows], norms[rows, :1], out=probs).sub_(norms[rows, 1:]).exp_()
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
    """(losses, norms) without all the logits, and the gradients of the sum of losses that are needed."""
    return linear_cross_entropy.forward(spec, call, needs, cross_entropy_fwd, cross_entropy_bwd)


def linear_cross_entropy_bwd(
    spec: SoftmaxSpec, call: LinearCrossEntropyCall, dlosses: Tensor, norms: Tensor, needs: tuple[bool, ...]
) -> LinearGrads:
    """The gradients of hidden, weight and bias that are needed, from logits computed again."""
    return linear_cross_entropy.backward(spec, call, dlosses, norms, needs, cross_entropy_bwd)


def _ignored(call: CrossEntropyCall) -> tuple[Tensor, Tensor]:
    """Which rows are ignored, and targets that are classes in every row."""
    ignored = call.target == call.ignore_index
    return ignored, call.target.masked_fill(ignored, 0)


def _blocks(logits: Tensor) -> Iterator[slice]:
    step = max(1, block_elements(logits.device.type) // max(1, logits.shape[1]))
    return (slice(start, start + step) for start in range(0, logits.shape[0], step))
