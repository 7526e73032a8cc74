"""The backward of calls with few keys: dense matrix products, one torch operation for each of the formula."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import torch_compat
from fastattn.backends.torch.parts import COL_BLOCK
from fastattn.backends.torch.whole_rows import minus_infinity
from fastattn.spec import AttentionCall, AttentionGrads, AttentionSpec, accumulation_dtype
from fastattn.strides import in_order

FUSED_BWD_MIN_KEYS = 33  # fewer keys: dp and delta nearly cancel, so delta has to come from the same products
# Fewer keys in 16 bits: the kernel takes 32 rows at a time below as many queries, and longer than float32 products of
# whole rows do.
NARROW_FUSED_BWD_MIN_KEYS = 192


def fused_bwd_min_keys(dtype: torch.dtype) -> int:
    """The number of keys from which on a backward is torch's fused kernel's, where products of whole rows can run.

    Products of bfloat16 by instructions for matrices are the faster ones for as many keys as whole rows may have.
    """
    if dtype == torch.bfloat16 and torch_compat.has_matrix_instructions():
        return COL_BLOCK + 1
    return FUSED_BWD_MIN_KEYS if dtype.itemsize > 2 else NARROW_FUSED_BWD_MIN_KEYS


def runs_dense(spec: AttentionSpec, call: AttentionCall) -> bool:
    """Whether a backward is one of few keys under nothing but causality and a window."""
    more = spec.mask or spec.bias or spec.segments or spec.key_lengths or spec.alibi or spec.sinks
    return call.key.shape[2] < FUSED_BWD_MIN_KEYS and not (more or spec.softcap or spec.dropout)


def prefers_whole_rows_bwd(spec: AttentionSpec, seqlen_k: int) -> bool:
    """Whether products of whole rows, or of whole runs of a segment, are the faster backward of some calls of this many
    keys: of runs `short.fewer_keys_bwd` says which."""
    return spec.dropout or (
        spec.dtype.itemsize < 4 and (spec.segments or seqlen_k < fused_bwd_min_keys(spec.dtype))
    )


def additive(hidden: Tensor | None, group_size: int, dtype: torch.dtype) -> Tensor | None:
    """-inf in the pairs (Sq, Sk) that do not attend, 0 elsewhere, for the rows of a group of heads: (g * Sq, Sk)."""
    if hidden is None:
        return None
    return minus_infinity(hidden, accumulation_dtype(dtype)).repeat(group_size, 1)


def dense_bwd(
    query: Tensor, key: Tensor, value: Tensor, dout: Tensor, scale: float, mask: Tensor | None
) -> AttentionGrads:
    """The gradients where every row sees a finite score: the weights come from the scores anew, and so sum to 1.

    mask: from `additive`; None = all pairs attend.
    """
    dtype = accumulation_dtype(query.dtype)
    operands = [query, dout, key, value]
    if dtype != query.dtype:
        operands = [t.to(dtype) for t in operands]
    rows = query.shape[0] * key.shape[1]
    q, do, k, v = [t.reshape(rows, -1, t.shape[3]) for t in operands]
    if mask is None:
        scores = torch.bmm(q, k.mT).mul_(scale)
    else:
        scores = torch.baddbmm(mask, q, k.mT, alpha=scale)
    probs = torch.softmax(scores, -1)
    dprobs = torch.baddbmm(probs, do, v.mT, beta=0, alpha=scale)
    dscores = torch_compat.softmax_gradient(dprobs, probs)
    dq, dk, dv = torch.bmm(dscores, k), torch.bmm(dscores.mT, q), torch.bmm(probs.mT, do)
    return AttentionGrads(_like(dq, query), _like(dk, key), _like(dv, value))


def _like(grad: Tensor, operand: Tensor) -> Tensor:
    grad = grad.view(operand.shape)
    if grad.dtype != operand.dtype:
        grad = grad.to(operand.dtype)
    return grad if operand.is_contiguous() else in_order(grad, operand)
