"""Packed sequences in torch operations: one after another, each by the padded call's code."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from fastattn import torch_compat
from fastattn.backends.torch import fused, single_query
from fastattn.backends.torch.attention import attention_bwd, attention_fwd
from fastattn.spec import (
    AttentionCall,
    AttentionGrads,
    AttentionSpec,
    GradsNeeded,
    VarlenCall,
    accumulation_dtype,
)
from fastattn.strides import empty_in_order, in_order


def varlen_fwd(spec: AttentionSpec, call: VarlenCall) -> tuple[Tensor, Tensor]:
    """(out (T, H, Dv), lse (H, T)); tokens of no sequence get 0 and -inf."""
    if (whole := _one_tile_each(spec, call)) is not None:
        return whole
    tokens, num_heads, _ = call.query.shape
    out = empty_in_order(call.query, (tokens, num_heads, spec.value_dim)).zero_()
    lse = call.query.new_full((num_heads, tokens), -torch.inf, dtype=accumulation_dtype(spec.dtype))
    for b, rows, _, sequence in _sequences(call):
        sequence_out, sequence_lse = attention_fwd(spec, sequence, b)
        out[rows] = sequence_out[0].transpose(0, 1)
        lse[:, rows] = sequence_lse[0]
    return out, lse


def _one_tile_each(spec: AttentionSpec, call: VarlenCall) -> tuple[Tensor, Tensor] | None:
    """(out, lse) where each sequence is one tile to torch's fused kernel and no token is outside; None elsewhere.

    The tiles are those of `attention_fwd`, without a call, a schedule and a check of the results for each sequence.
    """
    more = spec.alibi or spec.sinks or spec.window_left or spec.window_right
    if more or not fused.can_run(spec) or not call.scale > 0 or single_query.can_run(spec):
        return None
    cu_seqlens_q, cu_seqlens_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    if cu_seqlens_q[-1] != call.query.shape[0] or cu_seqlens_q[-1] == 0:
        return None
    causal = call.causal != "none"
    query, key, value = (t.transpose(0, 1)[None] for t in (call.query, call.key, call.value))  # (1, H, T, D)
    outs, lses = [], []
    for start_q, stop_q, start_k, stop_k in zip(
        cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:]
    ):
        rows, cols = stop_q - start_q, stop_k - start_k
        if not rows:
            continue
        if not cols or (causal and rows != cols):
            return None
        out, lse = torch_compat.cpu_flash_attention(
            query.narrow(2, start_q, rows), key.narrow(2, start_k, cols), value.narrow(2, start_k, cols),
            causal and rows > 1, None, call.scale,
        )  # fmt: skip
        outs.append(out[0].transpose(0, 1))  # (S, H, D), as the kernel lays it out
        lses.append(lse[0])
    out, lse = torch.cat(outs), torch.cat(lses, dim=1)
    if not fused.is_regular(lse):
        return None
    return in_order(out, call.query), lse


def varlen_bwd(
    spec: AttentionSpec,
    call: VarlenCall,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    needs: GradsNeeded,
) -> AttentionGrads:
    """Gradients of (out, lse), sequence by sequence in order."""
    dq, dk, dv = (empty_in_order(t, tuple(t.shape)).zero_() for t in (call.query, call.key, call.value))
    slopes = call.alibi_slopes
    dslopes = torch.zeros_like(slopes) if needs.alibi_slopes and slopes is not None else None
    dsinks = torch.zeros_like(call.sinks) if needs.sinks and call.sinks is not None else None
    for b, rows, cols, sequence in _sequences(call):
        grads = attention_bwd(
            spec, sequence, _padded(out[rows]), lse[None, :, rows], _padded(dout[rows]),
            None if dlse is None else dlse[None, :, rows], needs, b,
        )  # fmt: skip
        for total, tokens, grad in ((dq, rows, grads.query), (dk, cols, grads.key), (dv, cols, grads.value)):
            if grad is not None:
                total[tokens] = grad[0].transpose(0, 1)
        if dslopes is not None and grads.alibi_slopes is not None:
            dslopes[b if dslopes.shape[0] > 1 else 0] += grads.alibi_slopes[0]
        if dsinks is not None and grads.sinks is not None:
            dsinks += grads.sinks
    return AttentionGrads(dq, dk, dv, None, dslopes, dsinks)


def _sequences(call: VarlenCall) -> Iterator[tuple[int, slice, slice, AttentionCall]]:
    """(b, its queries, its keys, its call) for every sequence with a query."""
    cu_seqlens_k = list(pairwise(call.cu_seqlens_k.tolist()))
    for b, (start, stop) in enumerate(pairwise(call.cu_seqlens_q.tolist())):
        if stop > start:
            rows, cols = slice(start, stop), slice(*cu_seqlens_k[b])
            yield b, rows, cols, call.sequence(b, rows, cols)


def _padded(tokens: Tensor) -> Tensor:
    """(S, H, D) as (1, H, S, D)."""
    return tokens.transpose(0, 1)[None]
