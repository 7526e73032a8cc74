"""Attention against a key/value cache in torch operations: append, rotate, gather, then the padded call's code."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn.backends.torch.attention import attention_fwd
from fastattn.rotary import apply_rotary
from fastattn.spec import (
    AttentionSpec,
    KVCacheCall,
    accumulation_dtype,
    empty_in_order,
    with_unit_last_stride,
)


def kv_cache_fwd(spec: AttentionSpec, call: KVCacheCall) -> tuple[Tensor, Tensor]:
    """(out, lse); the new keys and values are in the cache afterwards."""
    batch, num_heads, seqlen_q, _ = call.query.shape
    totals = call.cache_lengths.long() + call.new_keys
    query, key = call.query, call.key
    if call.rotary_cos is not None:
        steps = torch.arange(seqlen_q, device=query.device)
        query = rotated(call, query, totals[:, None] - seqlen_q + steps)
        if key is not None:
            steps = torch.arange(call.new_keys, device=query.device)
            key = rotated(call, key, call.cache_lengths.long()[:, None] + steps)
    if key is not None and call.value is not None:
        append(call, key, call.value)
    out = empty_in_order(call.query, (batch, num_heads, seqlen_q, spec.value_dim))
    lse = out.new_empty((batch, num_heads, seqlen_q), dtype=accumulation_dtype(spec.dtype))
    for rows, keys, values in _sequences(call, totals.tolist()):
        slopes = call.alibi_slopes
        if slopes is not None and slopes.shape[0] > 1:
            slopes = slopes[rows]
        keys, values = with_unit_last_stride(keys), with_unit_last_stride(values)
        out[rows], lse[rows] = attention_fwd(spec, call.attending(query[rows], keys, values, slopes))
    return out, lse


def _sequences(call: KVCacheCall, totals: list[int]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(sequences, their keys, their values), one run of sequences of equal length at a time."""
    if call.block_table is None:
        start = 0
        for stop in range(1, len(totals) + 1):
            if stop == len(totals) or totals[stop] != totals[start]:
                rows, length = slice(start, stop), totals[start]
                yield rows, call.k_cache[rows, :, :length], call.v_cache[rows, :, :length]
                start = stop
        return
    page = call.k_cache.shape[2]
    for b, length in enumerate(totals):
        blocks = call.block_table[b, : -(-length // max(page, 1))].long()
        keys, values = (
            cache[blocks].transpose(0, 1).flatten(1, 2)[None, :, :length]
            for cache in (call.k_cache, call.v_cache)
        )
        yield slice(b, b + 1), keys, values


def append(call: KVCacheCall, key: Tensor, value: Tensor) -> None:
    steps = torch.arange(call.new_keys, device=key.device)
    positions = call.cache_lengths.long()[:, None] + steps  # (B, Sn)
    if call.block_table is None:
        blocks = torch.arange(key.shape[0], device=key.device)[:, None]
    else:
        page = call.k_cache.shape[2]
        blocks, positions = call.block_table.long().gather(1, positions // page), positions % page
    call.k_cache[blocks, :, positions] = key.transpose(1, 2).to(call.k_cache.dtype)
    call.v_cache[blocks, :, positions] = value.transpose(1, 2).to(call.v_cache.dtype)


def rotated(call: KVCacheCall, tensor: Tensor, positions: Tensor) -> Tensor:
    """`tensor` (B, heads, S, D) with its first rotary_dim dimensions rotated to `positions` (B, S)."""
    assert call.rotary_cos is not None
    assert call.rotary_sin is not None
    dtype = accumulation_dtype(tensor.dtype)
    cos, sin = (table[positions].to(dtype) for table in (call.rotary_cos, call.rotary_sin))  # (B, S, R/2)
    return apply_rotary(tensor, (cos, sin), interleaved=call.rotary_interleaved)
