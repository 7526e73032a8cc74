"""Attention against a key/value cache in torch operations: append, rotate, gather, then the padded call's code."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn.backends.torch import single_query
from fastattn.backends.torch.attention import attention_fwd, tiles, with_sinks
from fastattn.integers import cdiv
from fastattn.rotary import rotated_at
from fastattn.spec import (
    AttentionSpec,
    KVCacheCall,
    accumulation_dtype,
)
from fastattn.strides import empty_in_order, in_order, with_adjacent_columns


def kv_cache_tiles(spec: AttentionSpec) -> str:
    """The implementation of a few queries, and of more."""
    usual, causal = tiles(spec), spec.causal != "none"
    if spec.single_query or not single_query.keeps_scores(spec):
        return usual
    if spec.causal == "top_left" or spec.window_left or (spec.window_right and not causal):
        return usual
    most = f"{single_query.MOST_QUERIES} queries and {single_query.MOST_SCORES} scores of a sequence"
    return f"matrix products with all keys up to {most}, beyond {usual}"


def kv_cache_fwd(spec: AttentionSpec, call: KVCacheCall) -> tuple[Tensor, Tensor]:
    """(out, lse); the new keys and values are in the cache afterwards."""
    batch, num_heads, seqlen_q, _ = call.query.shape
    lengths = call.cache_lengths.tolist()
    query, key = call.query, call.key
    if call.rotary_cos is not None:
        first = call.cache_lengths.long()[:, None]
        steps = torch.arange(call.new_keys - seqlen_q, call.new_keys, device=query.device)
        query = rotated(call, query, first + steps)
        if key is not None:
            steps = torch.arange(call.new_keys, device=query.device)
            key = rotated(call, key, first + steps)
    if key is not None and call.value is not None:
        append(call, key, call.value, lengths)
    shape = (batch, num_heads, seqlen_q, spec.value_dim)
    by_products = single_query.keeps_scores(spec)
    out: Tensor | None = None
    for rows, keys, values in _sequences(call, [length + call.new_keys for length in lengths]):
        # caches have any strides: only what is read of them is copied
        keys, values = with_adjacent_columns(keys), with_adjacent_columns(values)
        results = _of_few_queries(call, query[rows], keys, values) if by_products else None
        if results is None:
            slopes = call.alibi_slopes
            if slopes is not None and slopes.shape[0] > 1:
                slopes = slopes[rows]
            results = attention_fwd(spec, call.attending(query[rows], keys, values, slopes))
        if out is None:
            if rows == slice(0, batch):  # the only run of sequences
                return in_order(results[0], call.query), results[1]
            out = empty_in_order(call.query, shape)
            lse = out.new_empty(shape[:3], dtype=accumulation_dtype(spec.dtype))
        out[rows], lse[rows] = results
    if out is None:
        out = empty_in_order(call.query, shape)
        lse = out.new_empty(shape[:3], dtype=accumulation_dtype(spec.dtype))
    return out, lse


def _of_few_queries(
    call: KVCacheCall, query: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor] | None:
    """(out, lse) of a call with a few queries per head; None where a query sees no key, or several have a window."""
    length, count = keys.shape[2], query.shape[2]
    causal = call.causal != "none"
    position = 0 if call.causal == "top_left" else length - 1
    right = 0 if causal else call.window_right
    start = max(0, position - call.window_left) if call.window_left >= 0 else 0
    stop = min(length, position + right + 1) if right >= 0 else length
    if count > 1:
        cut = call.causal == "top_left" or call.window_left >= 0 or (call.window_right >= 0 and not causal)
        if cut or not single_query.are_few(query.shape[1], count, length, causal):
            return None
    if stop <= start or not count:
        return None
    if stop - start < length:
        keys, values = keys.narrow(2, start, stop - start), values.narrow(2, start, stop - start)
    out, lse = single_query.results(query, keys, values, call.scale, False, causal and count > 1)
    assert lse is not None
    return with_sinks(call, out, lse)


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
        blocks = call.block_table[b, : cdiv(length, max(page, 1))].long()
        keys, values = (
            cache[blocks].transpose(0, 1).flatten(1, 2)[None, :, :length]
            for cache in (call.k_cache, call.v_cache)
        )
        yield slice(b, b + 1), keys, values


def append(call: KVCacheCall, key: Tensor, value: Tensor, lengths: list[int] | None = None) -> None:
    """Write new keys and values after those held. lengths: `cache_lengths` as integers, where they were read."""
    if lengths is not None and call.block_table is None and len(set(lengths)) <= 1:
        if lengths:
            call.k_cache.narrow(2, lengths[0], call.new_keys).copy_(key)
            call.v_cache.narrow(2, lengths[0], call.new_keys).copy_(value)
        return
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
    table = (call.rotary_cos, call.rotary_sin)
    return rotated_at(tensor, table, positions, interleaved=call.rotary_interleaved)
