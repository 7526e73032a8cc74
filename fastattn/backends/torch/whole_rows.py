"""Attention of whole rows by matrix products and torch's softmax, a few matrices at a time.

For calls that no fused kernel of torch takes. Operands are batches of matrices, one for each key/value head of each
sequence: rows are queries of its group, and of the scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn import torch_compat
from fastattn.backends.torch.dropout import kept_weights
from fastattn.backends.torch.memory import shared
from fastattn.backends.torch.parts import COL_BLOCK, grouped, parts
from fastattn.backends.torch.schedule import Tile
from fastattn.philox import keep_scale
from fastattn.spec import AttentionCall, AttentionGrads, AttentionSpec, accumulation_dtype
from fastattn.strides import empty_in_order

# Weights of matrices that run together, and twice as many of 16 bits: what stays in a core's cache. The operations of a
# matrix with more take longer than starting them.
ELEMENTS = 2**19
NARROW_MIN_ROWS = 16  # of queries, from which on oneDNN computes products in 16 bits


def product(
    a: Tensor, b: Tensor, scale: float = 1.0, start: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """start + scale * the products of matrices; a single one is given twice, as a batch of one uses other code.

    Args:
        a, b: (m, rows, n) and (m, n, columns).
        start: broadcastable to (m, rows, columns); None = 0.
        out: (m, rows, columns), where several go; None = a new tensor.
    """
    if a.shape[0] == 1:
        return product(a.expand(2, -1, -1), b.expand(2, -1, -1), scale, start)[:1]
    if start is not None:
        return torch.baddbmm(start, a, b, alpha=scale, out=out)
    if scale == 1.0:
        return torch.bmm(a, b, out=out)
    return torch.baddbmm(a[:1, :1, :1], a, b, beta=0, alpha=scale, out=out)


def product_dtype(dtype: torch.dtype, rows: int, wants_lse: bool) -> torch.dtype:
    """The dtype of a backward's products, and of its scores and weights: the accumulation dtype of operands of `dtype`.

    bfloat16 itself where the processor has instructions for its products, which sum in float32: scores and weights are
    rounded as the formula in bfloat16 rounds them. Not with a gradient of lse, whose products with the weights would be
    rounded once more, nor for few rows, whose products are other code.

    Args:
        rows: of a matrix.
        wants_lse: there is a gradient of lse.
    """
    narrow = dtype == torch.bfloat16 and rows >= NARROW_MIN_ROWS and not wants_lse
    return dtype if narrow and torch_compat.has_matrix_instructions() else accumulation_dtype(dtype)


@dataclass(frozen=True)
class Matrices:
    """What the products take, in the accumulation dtype, or for `backward` in that of `product_dtype`.

    Args:
        query: (m, R, D), the R rows of the queries of a key/value head.
        key, value: (m, Sk, D) and (m, Sk, Dv).
        scale: of scores.
        heads: (b, H), the sequences and query heads of which the rows are.
        hidden: -inf in pairs that do not attend and 0 elsewhere, broadcastable to (b, H, Sq, Sk); None = all attend.
        keep: 1 for weights that dropout keeps, else 0, (m, R, Sk); None without dropout.
        keep_scale: what dropout multiplies kept weights by.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    heads: tuple[int, int]
    hidden: Tensor | None = None
    keep: Tensor | None = None
    keep_scale: float = 1.0

    def weights(self) -> tuple[Tensor, Tensor]:
        """The scores, -inf where a row does not see a key, and their softmax, (m, R, Sk), in memory of `shared`."""
        scores = product(self.query, self.key.mT, self.scale, out=self._shared("scores"))
        if self.hidden is not None:
            scores.view(*self.heads, -1, scores.shape[2]).add_(self.hidden)
        probs = self._shared("weights")
        torch_compat.softmax(probs, scores, -1, log=False)
        return scores, probs

    def _shared(self, name: str) -> Tensor:
        return shared(name, (*self.query.shape[:2], self.key.shape[1]), self.query.dtype)

    def forward(self) -> tuple[Tensor, Tensor]:
        """(out (m, R, Dv), lse (m, R))."""
        scores, probs = self.weights()
        lse = scores.amax(-1) - probs.amax(-1).log_()  # the largest weight is exp(0) / sum
        if self.keep is not None:
            probs.mul_(self.keep)
        return product(probs, self.value, self.keep_scale), lse

    def backward(self, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of gradients (m, R, Dv) and (m, R, 1). The weights come from the scores anew, and so sum to
        1."""
        scores, probs = self.weights()
        dprobs = product(dout, self.value.mT, self.scale * self.keep_scale, out=self._shared("gradients"))
        weights = probs
        if self.keep is not None:
            weights = torch.mul(probs, self.keep, out=scores)  # which are not needed again
            dprobs.mul_(self.keep)
        dv = product(weights.mT, dout, self.keep_scale)
        dscores = scores  # the same memory
        torch_compat.softmax_backward(dscores, dprobs, probs, -1, log=False)  # times scale
        if dlse is not None:
            dscores.addcmul_(probs, dlse, value=self.scale)
        return product(dscores, self.key), product(dscores.mT, self.query), dv


def minus_infinity(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf where `hidden` is True, 0 elsewhere."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def may_run(spec: AttentionSpec) -> bool:
    """Whether padded calls have scores that depend on queries and keys alone."""
    changed = spec.bias or spec.segments or spec.key_lengths or spec.alibi or spec.sinks or spec.softcap
    return spec.device == "cpu" and not changed


def can_run(spec: AttentionSpec, call: AttentionCall) -> bool:
    """Whether this is such a call with so few weights that at least two matrices run together."""
    seqlen_k = call.key.shape[2]
    weights = call.group_size * call.query.shape[2] * seqlen_k  # of a key/value head
    fits = seqlen_k <= COL_BLOCK and 0 < 2 * weights <= ELEMENTS
    return may_run(spec) and fits and call.query.shape[0] > 0


def attention_fwd(call: AttentionCall, first_sequence: int = 0) -> tuple[Tensor, Tensor] | None:
    """(out, lse) of a call that `can_run`, whose batch starts at `first_sequence` of the dropout stream; None where
    some of it is not finite, as where a row sees nothing."""
    shape = (*call.query.shape[:3], call.value.shape[3])
    out = empty_in_order(call.query, shape)
    lse = call.query.new_empty(shape[:3], dtype=accumulation_dtype(call.query.dtype))
    for heads in _some_heads(call, lse.dtype, first_sequence):
        out_rows, lse_rows = heads.matrices().forward()
        for total, rows in ((out, out_rows), (lse, lse_rows)):
            share = heads.of_queries(total)
            share.copy_(rows.view(share.shape))
    return (out, lse) if _are_finite(out, lse) else None


def attention_bwd(
    call: AttentionCall, dout: Tensor, dlse: Tensor | None, first_sequence: int = 0
) -> AttentionGrads | None:
    """The gradients of a call that `can_run` and whose rows all see a key; None where some of them are not finite."""
    dq, dk, dv = (empty_in_order(t, tuple(t.shape)) for t in (call.query, call.key, call.value))
    dtype = product_dtype(call.query.dtype, call.query.shape[2], dlse is not None)
    for heads in _some_heads(call, dtype, first_sequence):
        dlse_rows = None if dlse is None else heads.rows(dlse[..., None])
        of_rows, *of_cols = heads.matrices().backward(heads.rows(dout), dlse_rows)
        share = heads.of_queries(dq)
        share.copy_(of_rows.view(share.shape))
        for total, grad in zip((dk, dv), of_cols):
            share = heads.of_keys(total)
            share.copy_(grad.view(share.shape))
    return AttentionGrads(dq, dk, dv) if _are_finite(dq, dk, dv) else None


@dataclass(frozen=True)
class _Heads:
    """Some key/value heads of some sequences of a call, and the query heads that they serve."""

    call: AttentionCall
    dtype: torch.dtype  # of the products
    batch: slice
    kv_heads: slice
    hidden: Tensor | None  # of the call, from `_hidden`
    first_sequence: int

    @property
    def query_heads(self) -> slice:
        group = self.call.group_size
        return slice(self.kv_heads.start * group, self.kv_heads.stop * group)

    def of_queries(self, tensor: Tensor) -> Tensor:
        """Their share of (B, H, ...)."""
        return tensor[self.batch, self.query_heads]

    def of_keys(self, tensor: Tensor) -> Tensor:
        """Their share of (B, Hkv, ...)."""
        return tensor[self.batch, self.kv_heads]

    def rows(self, tensor: Tensor) -> Tensor:
        """Their share of (B, H, Sq, n), as rows of matrices."""
        share = self.of_queries(tensor).to(self.dtype)
        return grouped(share, self.kv_heads.stop - self.kv_heads.start).flatten(0, 1)

    def matrices(self) -> Matrices:
        """What their products take."""
        call, dtype = self.call, self.dtype
        key, value = (self.of_keys(t).to(dtype).flatten(0, 1) for t in (call.key, call.value))
        batch, num_heads = self.of_queries(call.query).shape[:2]
        return Matrices(
            self.rows(call.query), key, value, call.scale, (batch, num_heads), self._hidden(), self._keep(),
            keep_scale(call.dropout_p),
        )  # fmt: skip

    def _hidden(self) -> Tensor | None:
        hidden = self.hidden
        if hidden is None:
            return None
        if hidden.shape[0] > 1:
            hidden = hidden[self.batch]
        if hidden.shape[1] > 1:
            hidden = hidden[:, self.query_heads]
        return hidden

    def _keep(self) -> Tensor | None:
        call = self.call
        if call.dropout_seed is None:
            return None
        batch, num_heads, seqlen_q, _ = call.query.shape
        sequences = torch.arange(self.first_sequence, self.first_sequence + batch, device="cpu")[
            self.batch, None
        ]
        heads = (sequences * num_heads + torch.arange(num_heads, device="cpu")[self.query_heads]).flatten()
        rows, cols = range(seqlen_q), range(call.key.shape[2])
        keep = kept_weights(call.dropout_seed, heads, rows, cols, call.dropout_p)
        floats = shared("keep", keep.shape, self.dtype).copy_(keep)
        return floats.view(-1, call.group_size * seqlen_q, len(cols))


def _some_heads(call: AttentionCall, dtype: torch.dtype, first_sequence: int) -> Iterator[_Heads]:
    """All heads of all sequences: whole sequences while they are few weights, else some heads of one."""
    hidden = _hidden(call, dtype)
    batch, num_kv_heads = call.key.shape[:2]
    weights = call.group_size * call.query.shape[2] * call.key.shape[2]  # of a matrix
    most = max((2 if dtype.itemsize < 4 else 1) * ELEMENTS // weights, 1)
    sequences, heads = max(most // num_kv_heads, 1), min(most, num_kv_heads)
    for first in range(0, batch, sequences):
        for head in range(0, num_kv_heads, heads):
            part = slice(first, min(first + sequences, batch)), slice(head, min(head + heads, num_kv_heads))
            yield _Heads(call, dtype, *part, hidden, first_sequence)


def _hidden(call: AttentionCall, dtype: torch.dtype) -> Tensor | None:
    """-inf in pairs that do not attend and 0 elsewhere, (1 or B, 1 or H, 1 or Sq, Sk); None = all attend."""
    (part,) = parts(call)  # neither lengths nor segments tell sequences apart
    hidden = part.hidden(Tile(range(call.query.shape[2]), range(call.key.shape[2]), "masked"))
    if hidden is None:
        return None
    additive = minus_infinity(hidden, dtype)
    return additive if additive.dim() == 4 else additive[None, None]


def _are_finite(*tensors: Tensor) -> bool:
    return math.isfinite(sum(tensor.sum().item() for tensor in tensors))
