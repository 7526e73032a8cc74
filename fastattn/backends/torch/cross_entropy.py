"""Cross-entropy in torch operations, on blocks of rows that stay in the cache between the passes over them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn.backends import linear_cross_entropy
from fastattn.backends.linear_cross_entropy import LinearGrads
from fastattn.backends.torch.softmax import block_elements
from fastattn.spec import CrossEntropyCall, LinearCrossEntropyCall, SoftmaxSpec, accumulation_dtype


def cross_entropy_fwd(
    spec: SoftmaxSpec, call: CrossEntropyCall, dlosses: Tensor | None = None
) -> tuple[Tensor, ...]:
    """(losses, norms) in the accumulation dtype: those of `reference.cross_entropy`, (N,), 0 where ignored.

    norms (N, 2) are the parts of lse, the largest logit and the logarithm of sum(exp(z - largest)): apart they lose
    nothing to the size of the logits. A target that is no class has loss NaN. With a gradient of the losses also that
    of the logits: the exponentials of a block make its sum and, while they are in the cache, its gradient.
    """
    if dlosses is None:
        return _forward(call, None, None)[:2]
    return _with_gradient(spec, call, dlosses)


def _with_gradient(
    spec: SoftmaxSpec, call: CrossEntropyCall, dlosses: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, norms, dlogits), the gradient written to `out` if given, which may be the logits."""
    made = torch.empty_like(call.logits, memory_format=torch.contiguous_format) if out is None else out
    losses, norms, _ = _forward(call, dlosses, made)
    return losses, norms, made


def _forward(
    call: CrossEntropyCall, dlosses: Tensor | None, dlogits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    logits, smoothing, weight = call.logits, call.label_smoothing, call.class_weight
    dtype = accumulation_dtype(logits.dtype)
    losses = logits.new_empty(logits.shape[0], dtype=dtype)
    norms = logits.new_empty(logits.shape[0], 2, dtype=dtype)
    ignored, wrong, target = _targets(call)
    own, mean = _target_weights(call, target), call.weight_mean()
    grads = None
    if dlosses is not None and dlogits is not None:
        grads = _BlockGrads(call, dlosses, dlogits, (ignored, wrong, target), own, mean)
    for rows in _blocks(logits):
        z = logits[rows]
        if z.dtype != dtype:
            z = z.to(dtype)
        largest = z.amax(1, keepdim=True)
        shifted = z - largest if grads is None else torch.sub(z, largest, out=grads.block(rows))
        norms[rows, :1] = largest
        chosen = shifted.gather(1, target[rows, None])[:, 0]
        spread = None  # the mean of (weighted) logits
        if smoothing:
            spread = shifted.mean(1) if weight is None else shifted @ (weight / weight.shape[0])
        total = shifted.exp_().sum(1)
        log_sum = total.log()
        norms[rows, 1] = log_sum
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
        if grads is not None:
            lse = largest[:, 0] + log_sum if call.z_loss else None
            grads.finish(rows, shifted.mul_((grads.factor(rows, lse) / total)[:, None]))
    losses = losses.masked_fill_(wrong, torch.nan).masked_fill_(ignored, 0)
    return losses, norms, dlogits


class _BlockGrads:
    """Turns the probabilities of a block of rows into the gradient of its logits.

    dloss * (f * probability - (1 - s) * w[target] * [target] - s * w / V),
    f = (1 - s) * w[target] + s * mean(w) + 2 * z_loss * lse. A target that is no class gives NaN.
    """

    def __init__(
        self,
        call: CrossEntropyCall,
        dlosses: Tensor,
        dlogits: Tensor,
        targets: tuple[Tensor, Tensor, Tensor],
        own: Tensor | None,
        mean: Tensor | None,
    ) -> None:
        ignored, wrong, self.target = targets
        self.call, self.own, self.dlogits = call, own, dlogits
        self.dtype = accumulation_dtype(dlogits.dtype)
        self.dlosses = dlosses.to(self.dtype).masked_fill(wrong, torch.nan)
        self.ignored = ignored if bool(ignored.any()) else None
        self.base = own if own is None or mean is None else own + call.label_smoothing * mean
        self.scratch: Tensor | None = None

    def block(self, rows: slice) -> Tensor:
        """Where a block's gradient is made: in its place, or in memory of its own where that has a narrower dtype."""
        part = self.dlogits[rows]
        if part.dtype == self.dtype:
            return part
        if self.scratch is None:
            self.scratch = torch.empty_like(part, dtype=self.dtype)
        return self.scratch[: part.shape[0]]

    def factor(self, rows: slice, lse: Tensor | None) -> Tensor:
        """dloss * f of each row."""
        dlosses = self.dlosses[rows]
        if lse is None:
            return dlosses if self.base is None else dlosses * self.base[rows]
        return dlosses * (2 * self.call.z_loss * lse + (1.0 if self.base is None else self.base[rows]))

    def finish(self, rows: slice, block: Tensor) -> None:
        """Take what belongs to the target and the smoothing from dloss * f * probability, and write the result."""
        smoothing, weight, dlosses = (
            self.call.label_smoothing,
            self.call.class_weight,
            self.dlosses[rows, None],
        )
        if smoothing:
            share = smoothing / block.shape[1] * dlosses
            block.sub_(share if weight is None else share * weight)
        wanted = smoothing - 1 if self.own is None else -self.own[rows, None]
        block.scatter_add_(1, self.target[rows, None], dlosses * wanted)
        if self.ignored is not None:
            block[self.ignored[rows]] = 0  # also where their logits are NaN
        part = self.dlogits[rows]
        if block.dtype != part.dtype:
            part.copy_(block)


def cross_entropy_bwd(
    spec: SoftmaxSpec, call: CrossEntropyCall, dlosses: Tensor, norms: Tensor, out: Tensor | None = None
) -> Tensor:
    """The gradient of the logits z, with probabilities exp(z - lse), written to `out` if given, which may be z."""
    logits = call.logits
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format) if out is None else out
    targets = _targets(call)
    own, mean = _target_weights(call, targets[2]), call.weight_mean()
    grads = _BlockGrads(call, dlosses, dlogits, targets, own, mean)
    lse = norms.sum(1) if call.z_loss else None
    for rows in _blocks(logits):
        block = grads.block(rows)
        torch.sub(logits[rows], norms[rows, :1], out=block).sub_(norms[rows, 1:]).exp_()
        block.mul_(grads.factor(rows, None if lse is None else lse[rows])[:, None])
        grads.finish(rows, block)
    return dlogits


def linear_cross_entropy_fwd(
    spec: SoftmaxSpec,
    call: LinearCrossEntropyCall,
    needs: tuple[bool, ...] | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, LinearGrads | None]:
    """(losses, norms) without all the logits, and the needed gradients of the sum of losses times `scale`."""
    return linear_cross_entropy.forward(
        spec, call, needs, cross_entropy_fwd, cross_entropy_bwd, scale, _with_gradient
    )


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
