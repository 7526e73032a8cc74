"""Cross-entropy of a linear layer's outputs, a few tokens at a time: the loop around any backend's cross-entropy.

Each chunk's logits are computed, used and overwritten by their gradient: memory is of the size of the operands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn import torch_compat
from fastattn.integers import cdiv
from fastattn.spec import CrossEntropyCall, LinearCrossEntropyCall, SoftmaxSpec, accumulation_dtype

CHUNK_LOGITS = {"cpu": 2**23}  # logits per chunk: enough tokens for an efficient matrix product
OTHER_CHUNK_LOGITS = 2**27
# rows of the weight's gradient that a CPU makes at once, where a product does not add to it
WEIGHT_ROWS = 4096
MIN_CHUNKS = 4  # and at most a quarter of all logits
# Of 16 bits a CPU takes this many times as many, in no more memory: the weight's gradient, in float32, is read and
# written once for each chunk.
NARROW_CHUNK = 2

Forward = Callable[[SoftmaxSpec, CrossEntropyCall], tuple[Tensor, ...]]
Backward = Callable[[SoftmaxSpec, CrossEntropyCall, Tensor, Tensor, Tensor | None], Tensor]
Fused = Callable[[SoftmaxSpec, CrossEntropyCall, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]


class LinearGrads(NamedTuple):
    """Gradients of one call; those of weight and bias in the accumulation dtype, None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def forward(
    spec: SoftmaxSpec,
    call: LinearCrossEntropyCall,
    needs: tuple[bool, ...] | None,
    cross_entropy_fwd: Forward,
    cross_entropy_bwd: Backward,
    scale: Tensor | None = None,
    fused: Fused | None = None,
) -> tuple[Tensor, Tensor, LinearGrads | None]:
    """(losses, norms) of every token, and the gradients of the sum of losses, times `scale`, if `needs` are given.

    fused: the forward that makes the gradient too, where a backend has one.
    """
    whole = call
    call, kept = _without_ignored(call)
    losses = call.hidden.new_empty(call.hidden.shape[0], dtype=accumulation_dtype(call.hidden.dtype))
    norms = losses.new_empty(losses.shape[0], 2)
    grads = None if needs is None else _Grads(call, needs)
    for rows in _chunks(call):
        chunk = _chunk(call, rows)
        if grads is None:
            losses[rows], norms[rows] = cross_entropy_fwd(spec, chunk)
            continue
        dlosses = (
            torch.ones_like(losses[rows]) if scale is None else scale.to(losses.dtype).expand_as(losses[rows])
        )
        into = grads.place(chunk)
        if fused is not None:
            losses[rows], norms[rows], dlogits = fused(spec, chunk, dlosses, into)
        else:
            losses[rows], norms[rows] = cross_entropy_fwd(spec, chunk)
            dlogits = cross_entropy_bwd(spec, chunk, dlosses.contiguous(), norms[rows], into)
        grads.add(chunk, rows, dlogits)
    made = None if grads is None else grads.results(kept, whole)
    return _spread(losses, kept, whole.target), _spread(norms, kept, whole.target), made


def backward(
    spec: SoftmaxSpec,
    call: LinearCrossEntropyCall,
    dlosses: Tensor,
    norms: Tensor,
    needs: tuple[bool, ...],
    cross_entropy_bwd: Backward,
) -> LinearGrads:
    """The needed gradients for any gradient of the losses, from logits computed again."""
    whole = call
    call, kept = _without_ignored(call)
    if kept is not None:
        dlosses, norms = dlosses[kept], norms[kept]
    grads = _Grads(call, needs)
    for rows in _chunks(call):
        chunk = _chunk(call, rows)
        dlogits = cross_entropy_bwd(spec, chunk, dlosses[rows], norms[rows], grads.place(chunk))
        grads.add(chunk, rows, dlogits)
    return grads.results(kept, whole)


def chunks(tokens: int, vocab_size: int, device: str, dtype: torch.dtype) -> Iterator[slice]:
    """The tokens of each chunk, of hidden states of `dtype`."""
    times = NARROW_CHUNK if device == "cpu" and dtype.itemsize < 4 else 1
    fit = times * CHUNK_LOGITS.get(device, OTHER_CHUNK_LOGITS) // max(1, vocab_size)
    step = max(1, min(fit, cdiv(tokens, MIN_CHUNKS // times)))
    return (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))


def _chunks(call: LinearCrossEntropyCall) -> Iterator[slice]:
    hidden = call.hidden
    return chunks(hidden.shape[0], call.weight.shape[0], hidden.device.type, hidden.dtype)


class _Grads:
    """Accumulators of the gradients over chunks."""

    def __init__(self, call: LinearCrossEntropyCall, needs: tuple[bool, ...]) -> None:
        hidden, weight, bias = needs
        dtype = accumulation_dtype(call.hidden.dtype)
        self.call = call
        self.hidden = torch.empty_like(call.hidden) if hidden else None
        self.weight = torch.empty_like(call.weight, dtype=dtype) if weight else None
        self._adds = (
            False  # whether a chunk was written to the weight's gradient, so that the next ones add to it
        )
        self.bias = torch.zeros_like(call.bias, dtype=dtype) if bias and call.bias is not None else None

    def place(self, chunk: CrossEntropyCall) -> Tensor | None:
        """Where the gradient of a chunk's logits goes: over them, unless the softcap needs them."""
        return None if self.call.softcap else chunk.logits

    def add(self, chunk: CrossEntropyCall, rows: slice, dlogits: Tensor) -> None:
        """Add what the gradient of one chunk's logits contributes."""
        call, logits = self.call, chunk.logits
        if call.softcap:
            dlogits.mul_((logits / call.softcap).square_().neg_().add_(1))
        if self.hidden is not None:
            self.hidden[rows] = torch_compat.product(dlogits, call.weight.mT)
        if self.weight is not None:
            self._add_to_weight(self.weight, dlogits, _hidden(call, rows))
            self._adds = True
        if self.bias is not None:
            self.bias.add_(dlogits.sum(0, dtype=self.bias.dtype))

    def _add_to_weight(self, weight: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
        """The first chunk writes, so that the gradient, the largest tensor of a step, needs no zeros."""
        whole = not weight.is_cpu or torch_compat.prefers_mkl()
        if whole and weight.dtype == hidden.dtype:
            torch.addmm(weight, dlogits.mT, hidden, beta=int(self._adds), out=weight)
            return
        size = WEIGHT_ROWS if weight.is_cpu else weight.shape[0]
        for start in range(0, weight.shape[0], size):  # what is added is still in the cache
            classes = slice(start, start + size)
            rows = torch_compat.product(dlogits[:, classes].mT, hidden.mT)
            if self._adds:
                weight[classes] += rows
            else:
                weight[classes] = rows

    def results(self, kept: Tensor | None, whole: LinearCrossEntropyCall) -> LinearGrads:
        """The gradients, that of hidden with zeros at the tokens left out."""
        hidden = None if self.hidden is None else _spread(self.hidden, kept, whole.hidden)
        if self.weight is not None and not self._adds:  # all tokens are ignored
            self.weight.zero_()
        return LinearGrads(hidden, self.weight, self.bias)


def _chunk(call: LinearCrossEntropyCall, rows: slice) -> CrossEntropyCall:
    """The cross-entropy call of a chunk of tokens, with its logits."""
    hidden = _hidden(call, rows)
    if call.bias is None:
        logits = torch_compat.product(hidden, call.weight)
    else:
        logits = torch.addmm(call.bias, hidden, call.weight.mT)
    if call.softcap:
        logits.div_(call.softcap).tanh_().mul_(call.softcap)
    return CrossEntropyCall(
        logits, call.target[rows], call.ignore_index, call.label_smoothing, call.class_weight, call.z_loss
    )


def _hidden(call: LinearCrossEntropyCall, rows: slice) -> Tensor:
    """The rows of hidden of a chunk, with zeros in ignored rows, which may be NaN."""
    hidden = call.hidden[rows]
    if call.hidden.device.type == "cpu":  # they have been left out already
        return hidden
    return torch.where((call.target[rows] != call.ignore_index)[:, None], hidden, 0)


def _without_ignored(call: LinearCrossEntropyCall) -> tuple[LinearCrossEntropyCall, Tensor | None]:
    """The call without its ignored tokens and the positions of the others, where that costs no synchronisation.

    However few are ignored: to compute them too, `hidden` would be copied as well, for zeros in rows that may be NaN.
    """
    if call.hidden.device.type != "cpu":
        return call, None
    kept = (call.target != call.ignore_index).nonzero()[:, 0]
    if kept.shape[0] == call.target.shape[0]:
        return call, None
    return replace(call, hidden=call.hidden[kept], target=call.target[kept]), kept


def _spread(values: Tensor, kept: Tensor | None, like: Tensor) -> Tensor:
    """Rows of kept tokens at their positions among all of `like`'s, zeros elsewhere, in its memory order."""
    if kept is None:
        return values
    if values.dim() == like.dim():
        spread = torch.zeros_like(like, dtype=values.dtype)
    else:
        spread = values.new_zeros((like.shape[0], *values.shape[1:]))
    spread[kept] = values
    return spread
