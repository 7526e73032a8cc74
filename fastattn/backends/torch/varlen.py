"""Packed sequences in torch operations: one after another, each by the padded call's code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from fastattn import torch_compat
from fastattn.backends.torch import fused, short, single_query, whole_rows
from fastattn.backends.torch.attention import attention_bwd, attention_fwd, tiles
from fastattn.spec import (
    AttentionCall,
    AttentionGrads,
    AttentionSpec,
    GradsNeeded,
    VarlenCall,
    accumulation_dtype,
)
from fastattn.strides import empty_in_order, in_order

Planned = Callable[[Tensor, Tensor, Tensor, list[int], list[int]], "tuple[Tensor, Tensor] | None"]


def varlen_tiles(spec: AttentionSpec) -> str:
    """The implementation of short sequences and of the others."""
    usual = f"each sequence by itself: {tiles(spec)}"
    if not short.can_run(spec) or not (spec.dropout or spec.backward):
        return usual
    most, fewer = f"{whole_rows.ELEMENTS} weights of all heads", short.fewer_keys_bwd(spec)
    most = most if fewer is None else f"{fewer - 1} keys and {most}"
    return f"sequences of up to {most} together, as dense matrix products; beyond {usual}"


def varlen_fwd(spec: AttentionSpec, call: VarlenCall) -> tuple[Tensor, Tensor]:
    """(out (T, H, Dv), lse (H, T)); tokens of no sequence get 0 and -inf."""
    if (whole := _one_tile_each(spec, call)) is not None:
        return whole
    tokens, num_heads, _ = call.query.shape
    out = empty_in_order(call.query, (tokens, num_heads, spec.value_dim)).zero_()
    lse = call.query.new_full((num_heads, tokens), -torch.inf, dtype=accumulation_dtype(spec.dtype))
    bounds = _bounds(call)
    done: set[int] = set()
    # without dropout torch's fused kernel is one operation for each sequence
    given = short.Sequences.of(call, bounds)
    for batch in given.batches() if spec.dropout and short.can_run(spec) else ():
        done |= short.forward(given, batch, out, lse.T)
    for b, rows, _, sequence in _sequences(call, bounds, done):
        sequence_out, sequence_lse = attention_fwd(spec, sequence, b)
        out[rows] = sequence_out[0].transpose(0, 1)
        lse[:, rows] = sequence_lse[0]
    return out, lse


def _one_tile_each(spec: AttentionSpec, call: VarlenCall) -> tuple[Tensor, Tensor] | None:
    run = varlen_fwd_plan(spec, call)
    if run is None:
        return None
    return run(call.query, call.key, call.value, call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist())


def varlen_fwd_plan(spec: AttentionSpec, call: VarlenCall) -> Planned | None:
    """(query, key, value, cu_seqlens_q, cu_seqlens_k) -> what `varlen_fwd` gives for calls like this one, of offsets as
    lists; None where they are out of order, or a call needs more.

    None unless each sequence may be one tile to torch's fused kernel. The tiles are those of `attention_fwd`, without a
    call, a schedule and a check of the results for each sequence.
    """
    more = spec.alibi or spec.sinks or spec.window_left or spec.window_right
    if more or not fused.can_run(spec) or not call.scale > 0 or single_query.can_run(spec):
        return None
    causal, scale = call.causal != "none", call.scale
    tokens_q, num_heads, dim = call.query.shape
    tokens_k, num_kv_heads, _ = call.key.shape
    most_q = tokens_q if call.max_seqlen_q < 0 else call.max_seqlen_q
    most_k = tokens_k if call.max_seqlen_k < 0 else call.max_seqlen_k
    # of (1, heads, tokens, dim)
    q_strides, k_strides, v_strides = (
        (0, t.stride(1), t.stride(0), 1) for t in (call.query, call.key, call.value)
    )
    q_step, k_step, v_step = q_strides[2], k_strides[2], v_strides[2]
    flash = torch_compat.cpu_flash_kernel()

    def run(
        query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: list[int], cu_seqlens_k: list[int]
    ) -> tuple[Tensor, Tensor] | None:
        if cu_seqlens_q[-1] != tokens_q or not tokens_q or cu_seqlens_k[-1] > tokens_k:
            return None
        if cu_seqlens_q[0] or cu_seqlens_k[0]:
            return None
        q_first, k_first, v_first = query.storage_offset(), key.storage_offset(), value.storage_offset()
        outs, lses = [], []
        start_q = start_k = 0
        for stop_q, stop_k in zip(cu_seqlens_q[1:], cu_seqlens_k[1:]):
            rows, cols = stop_q - start_q, stop_k - start_k
            if not (0 <= rows <= most_q and 0 <= cols <= most_k):
                return None
            if rows:
                if not cols or (causal and rows != cols):
                    return None
                out, lse = flash(
                    query.as_strided((1, num_heads, rows, dim), q_strides, q_first + start_q * q_step),
                    key.as_strided((1, num_kv_heads, cols, dim), k_strides, k_first + start_k * k_step),
                    value.as_strided((1, num_kv_heads, cols, dim), v_strides, v_first + start_k * v_step),
                    0.0, causal and rows > 1, scale=scale,
                )  # fmt: skip
                outs.append(out.transpose(1, 2))  # (1, S, H, D), as the kernel lays it out
                lses.append(lse)
            start_q, start_k = stop_q, stop_k
        out, lse = torch.cat(outs, 1)[0], torch.cat(lses, 2)[0]
        if not fused.is_regular(lse):
            return None
        return in_order(out, query), lse

    return run


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
    bounds = _bounds(call)
    done: set[int] = set()
    given = short.Sequences.of(call, bounds)
    for batch in given.batches(short.fewer_keys_bwd(spec)) if short.can_run(spec) else ():
        done |= short.backward(given, batch, dout, None if dlse is None else dlse.T, (dq, dk, dv))
    for b, rows, cols, sequence in _sequences(call, bounds, done):
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


def _bounds(call: VarlenCall) -> short.Bounds:
    return list(zip(pairwise(call.cu_seqlens_q.tolist()), pairwise(call.cu_seqlens_k.tolist())))


def _sequences(
    call: VarlenCall, bounds: short.Bounds, done: set[int]
) -> Iterator[tuple[int, slice, slice, AttentionCall]]:
    """(b, its queries, its keys, its call) for every sequence with a query that is not done."""
    for b, (of_rows, of_cols) in enumerate(bounds):
        rows, cols = slice(*of_rows), slice(*of_cols)
        if rows.stop > rows.start and b not in done:
            yield b, rows, cols, call.sequence(b, rows, cols)


def _padded(tokens: Tensor) -> Tensor:
    """(S, H, D) as (1, H, S, D)."""
    return tokens.transpose(0, 1)[None]
