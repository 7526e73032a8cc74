"""Launches of the cache kernels: the grid, the arguments and the compiled variant of a cache call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.kernels import attention_decode
from fastattn.kernels.decode_tiles import APPEND_ROWS, COMBINE_SPLITS
from fastattn.kernels.launches import AttentionVariant, Launch, _cdiv, _launch, _strides, _unit
from fastattn.kernels.tiles import Tile
from fastattn.spec import AttentionSpec, KVCacheCall


class CacheVariant(NamedTuple):
    """What a compiled kernel depends on beside the AttentionVariant: the cache's layout, and positions."""

    page_size: int = 0  # tokens in a page; 0 = a dense cache
    unit_columns: bool = True  # neighbours in a row are neighbours in memory
    rotary_dim: int = 0  # leading columns that are rotated; 0 = none
    rotary_interleaved: bool = False
    top_left: bool = False  # query i has the position of key i
    lengths: bool = True  # sequences have lengths of their own, or else all that there is room for


def append_launch(spec: AttentionSpec, call: KVCacheCall) -> Launch:
    """cache_append_kernel on a call with new keys and values."""
    key, value = call.key, call.value
    assert key is not None
    assert value is not None
    unit = _cache_unit(call, key, value)
    variant = AttentionVariant(
        spec.head_dim, spec.value_dim, unit=unit, int64_offsets=_wide(call, call.capacity)
    )
    args = _cache_arguments(call, unit) | _strides("new_k", key, unit) | _strides("new_v", value, unit)
    args |= {"key": key, "value": value, "VARIANT": variant, "BLOCK_ROWS": APPEND_ROWS}
    batch, num_kv_heads, new_keys, _ = key.shape
    grid = batch * num_kv_heads * _cdiv(new_keys, APPEND_ROWS)
    return _launch(attention_decode.cache_append_kernel, grid, args, Tile(APPEND_ROWS, 0, 4, 1))


def decode_launch(
    spec: AttentionSpec, call: KVCacheCall, out: Tensor, lse: Tensor, num_splits: int, tile: Tile
) -> Launch:
    """attention_decode_kernel on a call; out (B, H, Sq, Dv), or (splits, B, H, Sq, Dv) float32 to be combined."""
    query, slopes = call.query, call.alibi_slopes
    batch, num_heads, seqlen_q, _ = query.shape
    first_out = out if num_splits == 1 else out[0]
    unit = _cache_unit(call, query, first_out)
    longest = seqlen_q + call.capacity
    right = call.window_right if call.window_right >= 0 else longest
    args = _cache_arguments(call, unit) | _strides("q", query, unit) | _strides("o", first_out, unit)
    args |= {
        "q": query,
        "out": out,
        "lse": lse,
        "slopes": slopes,
        "sinks": call.sinks,
        "num_heads": num_heads,
        "stride_slopes_b": slopes.stride(0) if slopes is not None and slopes.shape[0] > 1 else 0,
        "num_splits": num_splits,
        "num_rows": batch * num_heads * seqlen_q,
        "seqlen_q": seqlen_q,
        "left": min(call.window_left, longest),
        "right": 0 if call.causal != "none" else min(right, longest),
        "scale": call.scale,
        "softcap": call.softcap,
        "VARIANT": _variant(spec, call, unit, num_splits, tile),
    }
    tiles = _cdiv(seqlen_q * spec.group_size, tile.block_m)
    grid = batch * call.k_cache.shape[1] * num_splits * tiles
    return _launch(attention_decode.attention_decode_kernel, grid, args, tile)


def combine_launch(
    spec: AttentionSpec, call: KVCacheCall, split_out: Tensor, split_lse: Tensor, out: Tensor, lse: Tensor
) -> Launch:
    """attention_combine_kernel on the splits' results, contiguous (splits, B, H, Sq, Dv) and (splits, B, H, Sq)."""
    _, num_heads, seqlen_q, _ = out.shape
    args: dict[str, Any] = {
        "split_out": split_out,
        "split_lse": split_lse,
        "out": out,
        "lse": lse,
        "sinks": call.sinks,
        "num_heads": num_heads,
        "num_splits": split_lse.shape[0],
        "num_rows": lse.numel(),
        "seqlen_q": seqlen_q,
        "VARIANT": AttentionVariant(spec.head_dim, spec.value_dim, sinks=spec.sinks),
        "BLOCK_SPLITS": COMBINE_SPLITS,
    }
    args |= _strides("o", out, 1)
    return _launch(
        attention_decode.attention_combine_kernel, lse.numel(), args, Tile(1, COMBINE_SPLITS, 4, 1)
    )


def _cache_arguments(call: KVCacheCall, unit: int) -> dict[str, Any]:
    """Every argument that follows from the caches and the rotation."""
    table, cos, sin = call.block_table, call.rotary_cos, call.rotary_sin
    args: dict[str, Any] = {
        "k_cache": call.k_cache,
        "v_cache": call.v_cache,
        "cache_lengths": call.cache_lengths,
        "block_table": table,
        "rotary_cos": cos,
        "rotary_sin": sin,
        "stride_kd": call.k_cache.stride(3),
        "stride_vd": call.v_cache.stride(3),
        "stride_table": 0 if table is None else table.stride(0),
        "stride_cos": 0 if cos is None else cos.stride(0),
        "stride_sin": 0 if sin is None else sin.stride(0),
        "rotary_positions": 0 if cos is None else cos.shape[0],
        "num_kv_heads": call.k_cache.shape[1],
        "new_keys": call.new_keys,
        "capacity": call.capacity,
        "CACHE": CacheVariant(
            page_size=0 if table is None else call.k_cache.shape[2],
            unit_columns=_unit_columns(call),
            rotary_dim=0 if cos is None else 2 * cos.shape[1],
            rotary_interleaved=call.rotary_interleaved and cos is not None,
            top_left=call.causal == "top_left",
            lengths=call.cache_lengths.numel() > 0,
        ),
    }
    return args | _strides("k", call.k_cache, unit) | _strides("v", call.v_cache, unit)


def _variant(
    spec: AttentionSpec, call: KVCacheCall, unit: int, num_splits: int, tile: Tile
) -> AttentionVariant:
    """The attention of one split; the sinks are added here if nothing is combined afterwards."""
    sinks = spec.sinks and num_splits == 1
    return AttentionVariant(
        head_dim=spec.head_dim,
        value_dim=spec.value_dim,
        group_size=spec.group_size,
        has_left=spec.window_left,
        has_right=spec.window_right or call.causal != "none",
        alibi=spec.alibi,
        softcap=spec.softcap,
        sinks=sinks,
        fold_scale=call.scale > 0.0
        and spec.dtype != torch.float32
        and not (spec.softcap or spec.alibi or sinks),
        dot_precision=spec.float32_precision,
        unit=unit,
        int64_offsets=_wide(call, tile.block_n),
    )


def _cache_unit(call: KVCacheCall, *tensors: Tensor) -> int:
    """How many elements strides count: 16 bytes where every row of caches and tensors starts at a multiple of it."""
    return _unit(call.k_cache, call.v_cache, *tensors) if _unit_columns(call) else 1


def _unit_columns(call: KVCacheCall) -> bool:
    return all(cache.stride(3) == 1 or cache.shape[3] == 1 for cache in (call.k_cache, call.v_cache))


def _wide(call: KVCacheCall, rows: int) -> bool:
    """Whether the offset of a row among `rows` of one page, or of one block of a dense cache, needs 64 bits."""
    rows = min(rows, call.k_cache.shape[2])
    return any(rows * cache.stride(2) >= 2**31 for cache in (call.k_cache, call.v_cache))
