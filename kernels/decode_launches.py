"""Launches of the cache kernels: the grid, the arguments and the compiled variant of a cache call.

Arguments stand in the order of the kernel's signature, a group to a line: kernels/arguments.py has the groups.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastattn.integers import cdiv
from fastattn.kernels import attention_decode
from fastattn.kernels.arguments import Launch, slope_stride_of, strides_of
from fastattn.kernels.decode_tiles import APPEND_ROWS, COMBINE_SPLITS, Splits, loops
from fastattn.kernels.tiles import Tile
from fastattn.kernels.variants import AttentionVariant, folds_scale
from fastattn.spec import AttentionSpec, KVCacheCall
from fastattn.strides import has_adjacent_columns


class CacheVariant(NamedTuple):
    """What a compiled kernel depends on beside the AttentionVariant: the cache's layout, and positions."""

    page_size: int = 0  # tokens in a page; 0 = a dense cache
    unit_columns: bool = True  # neighbours in a row are neighbours in memory
    rotary_dim: int = 0  # leading columns that are rotated; 0 = none
    rotary_interleaved: bool = False
    top_left: bool = False  # query i has the position of key i
    lengths: bool = True  # sequences have lengths of their own, or else all that there is room for

    @classmethod
    def of(cls, call: KVCacheCall) -> CacheVariant:
        """That of a call."""
        cos = call.rotary_cos
        return cls(
            page_size=0 if call.block_table is None else call.k_cache.shape[2],
            unit_columns=_unit_columns(call),
            rotary_dim=0 if cos is None else 2 * cos.shape[1],
            rotary_interleaved=call.rotary_interleaved and cos is not None,
            top_left=call.causal == "top_left",
            lengths=call.cache_lengths.numel() > 0,
        )


class CacheTensors(NamedTuple):
    """The small tensors of a cache call, one argument; None where absent."""

    lengths: Tensor  # (B,) int32: tokens in the cache before the append; empty where the cache is full
    block_table: Tensor | None  # (B, pages) int32
    rotary_cos: Tensor | None  # (positions, rotary_dim / 2)
    rotary_sin: Tensor | None
    slopes: Tensor | None = None  # (1 or B, H)
    sinks: Tensor | None = None  # (H,)
    split_counts: Tensor | None = None  # (B, H, Sq) int32, written: the splits of each row


def append_launch(spec: AttentionSpec, call: KVCacheCall) -> Launch:
    """cache_append_kernel on a call with new keys and values."""
    key, value = call.key, call.value
    assert key is not None
    assert value is not None
    unit = _cache_unit(spec, call)
    variant = AttentionVariant(
        spec.head_dim, spec.value_dim, unit=unit, int64_offsets=_needs_int64(call, call.capacity)
    )
    batch, num_kv_heads, new_keys, _ = key.shape
    tensors = CacheTensors(call.cache_lengths, call.block_table, call.rotary_cos, call.rotary_sin)
    args = (
        key, value, call.k_cache, call.v_cache, tensors,
        *strides_of(key, unit), *strides_of(value, unit),
        *_cache_strides(call, unit),
        *_table_strides(call), num_kv_heads, new_keys, call.capacity,
        variant, CacheVariant.of(call), APPEND_ROWS,
    )  # fmt: skip
    grid = batch * num_kv_heads * cdiv(new_keys, APPEND_ROWS)
    return Launch(attention_decode.cache_append_kernel, (grid,), args, num_warps=4, num_stages=1)


def decode_launch(
    spec: AttentionSpec,
    call: KVCacheCall,
    out: Tensor,
    lse: Tensor,
    splits: Splits,
    tile: Tile,
    split_counts: Tensor | None = None,
) -> Launch:
    """attention_decode_kernel on a call; out (B, H, Sq, Dv), or (splits, B, H, Sq, Dv) float32 to be combined."""
    query = call.query
    batch, num_heads, seqlen_q, _ = query.shape
    num_kv_heads, capacity = call.k_cache.shape[1], call.capacity
    first_out = out if split_counts is None else out[0]
    unit = _cache_unit(spec, call)
    longest = seqlen_q + capacity
    right = 0 if call.causal != "none" else call.window_right
    right = min(right, longest) if right >= 0 else longest
    variant = AttentionVariant.of(
        spec,
        tile,
        unit,
        fold_scale=folds_scale(spec, call.scale, spec.sinks),
        sinks=spec.sinks,
        int64_offsets=_needs_int64(call, tile.block_n),
    )
    if spec.key_lengths:  # of a padded call with one query: here they are the cache's lengths
        variant = variant._replace(key_lengths=False)
    tensors = CacheTensors(
        call.cache_lengths, call.block_table, call.rotary_cos, call.rotary_sin, call.alibi_slopes, call.sinks,
        split_counts,
    )  # fmt: skip
    *table_strides, rotary_positions = _table_strides(call)
    cache_variant = CacheVariant.of(call)
    args = (
        query, call.k_cache, call.v_cache, out, lse, tensors,
        *strides_of(query, unit),
        *_cache_strides(call, unit),
        *strides_of(first_out, unit),
        *table_strides, slope_stride_of(call.alibi_slopes),
        rotary_positions, num_heads, num_kv_heads, splits.programs, splits.per_size, splits.blocks,
        batch * num_heads * seqlen_q, seqlen_q, call.new_keys, capacity, min(call.window_left, longest), right,
        call.scale, call.softcap,
        variant, cache_variant, tile.block_m, tile.block_n, loops(tile, not cache_variant.lengths),
    )  # fmt: skip
    grid = batch * num_kv_heads * splits.programs * cdiv(seqlen_q * spec.group_size, tile.block_m)
    return Launch(
        attention_decode.attention_decode_kernel,
        (grid,),
        args,
        tile.num_warps,
        tile.num_stages,
        tile.max_registers,
    )


def combine_launch(
    split_out: Tensor, split_lse: Tensor, split_counts: Tensor, out: Tensor, lse: Tensor
) -> Launch:
    """attention_combine_kernel on the splits' results, contiguous (splits, B, H, Sq, Dv) and (splits, B, H, Sq)."""
    _, num_heads, seqlen_q, value_dim = out.shape
    num_rows = lse.numel()
    args = (
        split_out, split_lse, split_counts, out, lse,
        *strides_of(out, 1),
        num_heads, num_rows, seqlen_q, value_dim, COMBINE_SPLITS,
    )  # fmt: skip
    return Launch(attention_decode.attention_combine_kernel, (num_rows,), args, num_warps=4, num_stages=1)


def _cache_strides(call: KVCacheCall, unit: int) -> tuple[int, ...]:
    """The four strides of each cache, the last in elements."""
    k_cache, v_cache = call.k_cache, call.v_cache
    return *strides_of(k_cache, unit), k_cache.stride(3), *strides_of(v_cache, unit), v_cache.stride(3)


def _table_strides(call: KVCacheCall) -> tuple[int, int, int, int]:
    """(stride_table, stride_cos, stride_sin, rotary_positions), 0 where there is none."""
    table, cos, sin = call.block_table, call.rotary_cos, call.rotary_sin
    return (
        0 if table is None else table.stride(0),
        0 if cos is None else cos.stride(0),
        0 if sin is None else sin.stride(0),
        0 if cos is None else cos.shape[0],
    )


def _cache_unit(spec: AttentionSpec, call: KVCacheCall) -> int:
    """How many elements strides count: the spec's unit, for which it takes the caches' columns to be adjacent."""
    return spec.unit if _unit_columns(call) else 1


def _unit_columns(call: KVCacheCall) -> bool:
    return has_adjacent_columns(call.k_cache) and has_adjacent_columns(call.v_cache)


def _needs_int64(call: KVCacheCall, rows: int) -> bool:
    """Whether the offset of a row among `rows` of one page, or of one block of a dense cache, needs 64 bits."""
    rows = min(rows, call.k_cache.shape[2])
    return rows * call.k_cache.stride(2) >= 2**31 or rows * call.v_cache.stride(2) >= 2**31
