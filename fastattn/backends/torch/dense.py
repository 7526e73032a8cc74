"""The backward of calls with few keys in dense products, in as many operations as the formula has."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import torch_compat
from fastattn.spec import AttentionCall, AttentionGrads, AttentionSpec, accumulation_dtype, empty_in_order

FUSED_BWD_MIN_KEYS = 33  # fewer keys: dp and delta nearly cancel, so delta has to come from the same products


def runs_dense(spec: AttentionSpec, call: AttentionCall) -> bool:
    """Whether a backward is one of few keys under nothing but causality and a window."""
    more = spec.mask or spec.bias or spec.segments or spec.key_lengths or spec.alibi or spec.sinks
    return call.key.shape[2] < FUSED_BWD_MIN_KEYS and not (more or spec.softcap or spec.dropout)


def dense_bwd(call: AttentionCall, hidden: Tensor | None, dout: Tensor) -> AttentionGrads:
    """The gradients where every row sees a finite score: the weights come from the scores anew, and so sum to 1.

    hidden: (Sq, Sk) bool, the pairs that do not attend; None = all do.
    """
    query, key, value = call.query, call.key, call.value
    dtype = accumulation_dtype(query.dtype)
    batch, num_heads, seqlen_q, _ = query.shape
    num_kv_heads, seqlen_k = key.shape[1], key.shape[2]
    operands = [query, dout, key, value]
    if dtype != query.dtype:
        operands = [t.to(dtype) for t in operands]
    q, do, k, v = [t.reshape(batch * num_kv_heads, -1, t.shape[3]) for t in operands]
    scores = torch.bmm(q, k.mT).mul_(call.scale)
    if hidden is not None:
        scores.view(batch, num_heads, seqlen_q, seqlen_k).masked_fill_(hidden, -torch.inf)
    probs = torch.softmax(scores, -1)
    dscores = torch_compat.softmax_gradient(torch.bmm(do, v.mT), probs).mul_(call.scale)
    dq, dk, dv = torch.bmm(dscores, k), torch.bmm(dscores.mT, q), torch.bmm(probs.mT, do)
    return AttentionGrads(_like(dq, query), _like(dk, key), _like(dv, value))


def _like(grad: Tensor, operand: Tensor) -> Tensor:
    grad = grad.view(operand.shape)
    if grad.dtype != operand.dtype:
        grad = grad.to(operand.dtype)
    return grad if operand.is_contiguous() else in_order(grad, operand)


def in_order(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in the memory order of `like`, copied only where it has another."""
    if tensor.is_contiguous() and like.is_contiguous():
        return tensor
    wanted = empty_in_order(like, tuple(tensor.shape))
    return tensor if wanted.stride() == tensor.stride() else wanted.copy_(tensor)
